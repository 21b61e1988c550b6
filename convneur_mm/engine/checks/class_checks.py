"""Check before a run that model, data sets and annotation files agree on the classes.

Labels are mere numbers. If the model has too few classes, a loss fails in the middle of a step. If it has too many, or
the names are in another order, a training ends normally but finds the wrong things.
"""
from __future__ import annotations

import json
import mmap
import os.path as osp
import re
from collections.abc import Sequence
from typing import NamedTuple

from mmengine.config import Config
from mmengine.fileio import list_dir_or_file, list_from_file
from mmengine.registry import DATASETS

from ..files.errors import LaunchError, some
from .file_checks import data_sets, evaluators, local_path, walk

# Keys of the heads of mmdet, mmseg and mmpretrain whose ``num_classes`` is that of the data. A proposal head has one
# class, and a detector's semantic head has its own classes.
HEADS = ('bbox_head', 'mask_head', 'mask_iou_head', 'point_head', 'segm_head', 'glbctx_head', 'decode_head',
         'auxiliary_head', 'head')


class DataClasses(NamedTuple):
    """The classes of a data set.

    Attributes:
        key (str): Config key that has them, or would have them.
        names (tuple[str, ...]): Class names in label order.
        is_set (bool): Whether the config sets them, not the data set's own code or its folders.
    """

    key: str
    names: tuple[str, ...]
    is_set: bool

    def __str__(self) -> str:
        where = self.key if self.is_set else f'{self.key}, which is not set,'
        return f'{where} has {_count(self.names)}'


def check_classes(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that data sets, annotation files, class folders and the model's heads agree on the classes.

    Only models and data sets like those of mmdet, mmseg and mmpretrain are checked.

    Args:
        cfg (Config): Config of a run.
        splits (tuple[str, ...]): Splits that the run reads, of 'train', 'val' and 'test'.

    Raises:
        LaunchError: Names the first disagreement and what to set.
    """
    model = cfg.get('model')
    if not isinstance(model, dict) or 'language_model' in model:
        return  # models with a language model take different classes for each data set
    found = []
    for split in splits:
        for key, dataset in data_sets(cfg, split):
            kind = _class_of(dataset.get('type'), cfg.get('default_scope'))
            classes = _classes_of(dataset, kind, key)
            if classes is None:
                continue
            found.append(classes)
            if _defined_in(kind, 'load_data_list', 'mmdet.datasets.coco') and local_path(dataset, 'ann_file'):
                _check_categories(classes, local_path(dataset, 'ann_file'))
        for key, metric in evaluators(cfg, split):
            path = local_path(metric, 'ann_file')
            if found and path and str(metric.get('type')).endswith('CocoMetric'):
                _check_categories(found[-1], path, f'{key}.ann_file: ')
    if not found:
        return
    first, *others = found
    for other in others:
        _check_equal(first, other)
    _check_heads(cfg, first, splits)


def _class_of(name: str | type, scope: str | None) -> type | None:
    """Return the data set class that MMEngine would build, or None if no class has that name."""
    if not isinstance(name, str):
        return name
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return registry.get(name)


def _defined_in(kind: type | None, method: str, module: str) -> bool:
    """Return whether a class has the method that ``module`` defines, not a subclass's own."""
    bases = kind.__mro__ if isinstance(kind, type) else ()
    return next((base.__module__ for base in bases if method in vars(base)), None) == module


def _classes_of(dataset: dict, kind: type | None, key: str) -> DataClasses | None:
    """Return the classes of a data set as its code finds them, or None if it has none."""
    metainfo = dataset.get('metainfo') or {}
    own = getattr(kind, 'METAINFO', {}).get('classes')
    if 'classes' in metainfo:
        classes = DataClasses(f'{key}.metainfo.classes', _names(metainfo['classes'], f'{key}.metainfo.classes'), True)
    elif dataset.get('classes'):
        classes = DataClasses(f'{key}.classes', _names(dataset['classes'], f'{key}.classes'), True)
    else:
        classes = DataClasses(f'{key}.metainfo.classes', tuple(own), False) if own else None
    if _defined_in(kind, '_find_samples', 'mmpretrain.datasets.custom'):
        return _classes_of_folders(dataset, classes, key)
    if classes and classes.is_set and own and _defined_in(kind, 'get_label_map', 'mmseg.datasets.basesegdataset'):
        others = [name for name in classes.names if name not in own]
        if others:
            raise LaunchError(f'{classes.key}: {kind.__name__} has ({some(own)}), and not ({some(others)}); for label '
                              'maps of other classes set type=\'BaseSegDataset\' in the data set')
    return classes


def _names(value: str | Sequence[str], key: str) -> tuple[str, ...]:
    if not isinstance(value, str):
        return tuple(value)
    try:
        return tuple(list_from_file(value))
    except FileNotFoundError:
        raise LaunchError(f'{key}: {value!r} is neither a list of names nor a file with one name a line; for a single '
                          f'class set ({value!r}, )') from None


def _classes_of_folders(dataset: dict, classes: DataClasses | None, key: str) -> DataClasses | None:
    """Return the classes, checked against the sorted folders that mmpretrain numbers without an annotation file."""
    split = dataset.get('split') or ''
    root = dataset.get('data_root') or ''
    listed = dataset.get('ann_file') or (split and osp.isfile(osp.join(root, 'meta', f'{split}.txt')))
    prefix = dataset.get('data_prefix') or split
    prefix = prefix.get('img_path') or '' if isinstance(prefix, dict) else prefix
    folder = local_path({**dataset, 'folder': prefix or '.'}, 'folder')
    if listed or not dataset.get('with_label', split != 'test') or not folder or not osp.isdir(folder):
        return classes
    folder = osp.normpath(folder)
    names = tuple(sorted(list_dir_or_file(folder, list_file=False)))
    if classes is None:
        return DataClasses(f'{key}.classes', names, False)
    if len(names) != len(classes.names):
        raise LaunchError(f'{classes}, whereas {folder} has {len(names)} class folders ({some(names)}): '
                          f'{_differences(classes.names, names)}; set {key}.classes={_literal(names)}, or mend the '
                          'folders')
    moved = [name for label, name in enumerate(names)
             if name in classes.names and classes.names[label] != name]
    if moved:
        raise LaunchError(f'mmpretrain numbers the classes in the order of the sorted folders of {folder}, '
                          f'({some(names)}), whereas {classes.key} has them as ({some(classes.names)}), so that names '
                          f'would be swapped: set {key}.classes={_literal(names)}')
    return classes


def _check_categories(classes: DataClasses, path: str, where: str = '') -> None:
    """Check the classes against the categories of a COCO file, which mmdet numbers in the file's order."""
    categories = coco_categories(path)
    found = tuple(name for name in categories if name in classes.names)
    if found == classes.names:
        return
    twice = [name for name in classes.names if categories.count(name) > 1]
    if twice:
        raise LaunchError(f'{where}{path} has several categories of the name {twice[0]!r}, which would have labels of '
                          'their own: give them other names, or make one of them')
    missing = [name for name in classes.names if name not in categories]
    if missing:
        raise LaunchError(f'{where}{classes}, but {path} has no category ({some(missing)}); it has '
                          f'({some(categories)}): set metainfo.classes of all data sets to those that are to be found, '
                          f'such as {_literal(categories)}, and num_classes of all heads to their number')
    raise LaunchError(f'{where}mmdet numbers the classes in the order of {path}, ({some(found)}), whereas '
                      f'{classes.key} has them as ({some(classes.names)}), so that names would be '
                      f'swapped: set metainfo.classes={_literal(found)} in all data sets')


def coco_categories(path: str) -> tuple[str, ...]:
    """Return the category names of a COCO file in its order, decoding the whole file only if necessary.

    Args:
        path (str): Path of the JSON file, which may have hundreds of megabytes.

    Raises:
        LaunchError: If the file cannot be read, is not JSON, has no list of categories, or two of them share an id.
    """
    try:
        categories = _last_categories(path)
    except OSError as error:
        raise LaunchError(f'{path} cannot be read: {error.strerror}') from None
    if categories is None:
        try:
            with open(path, encoding='utf-8') as file:
                content = json.load(file)
        except ValueError as error:
            raise LaunchError(f'{path} is not a JSON file, or damaged: {error}') from None
        categories = content.get('categories') if isinstance(content, dict) else None
    if not _are_categories(categories):
        raise LaunchError(f'{path} has no list \'categories\' of objects with id and name, as COCO\'s annotation files '
                          'have')
    names: dict[str, str] = {}
    for category in categories:
        other = names.setdefault(repr(category['id']), category['name'])
        if other != category['name']:
            raise LaunchError(f'{path} has several categories of the id {category["id"]!r}, {other!r} and '
                              f'{category["name"]!r}: give each an id of its own')
    return tuple(category['name'] for category in categories)


def _last_categories(path: str) -> list[dict] | None:
    """Return the list after a file's last ``"categories":``, or None if it is not one of categories."""
    key = b'"categories"'
    with open(path, 'rb') as file:
        if not file.seek(0, 2):
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(key) + len(key)
            if start < len(key):
                return None
            # Only decoding shows where the list ends, so decode a small part of the file first.
            size = 1 << 16
            while True:
                text = content[start:start + size].decode('utf-8', 'ignore').lstrip().removeprefix(':').lstrip()
                try:
                    value, _ = json.JSONDecoder().raw_decode(text)
                    return value if _are_categories(value) else None
                except ValueError:
                    if not text.startswith('[') or start + size >= len(content):
                        return None
                size *= 8


def _are_categories(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(category, dict) and 'id' in category and isinstance(category.get('name'), str) for category in value)


def _check_equal(first: DataClasses, other: DataClasses) -> None:
    if other.names == first.names:
        return
    if len(other.names) != len(first.names):
        reason = _differences(first.names, other.names)
    else:
        label, one, two = next((label, one, two) for label, (one, two) in enumerate(zip(first.names, other.names))
                               if one != two)
        reason = f'label {label} is {one!r} there and {two!r} here'
    raise LaunchError(f'{first}, {other}: {reason}; set the same classes, in the same order, in all data sets')


def _check_heads(cfg: Config, classes: DataClasses, splits: tuple[str, ...]) -> None:
    """Check that each head and mmpretrain's preprocessor have as many classes as the data."""
    number = len(classes.names)
    counts = {f'{key}.num_classes': head['num_classes'] for key, head in _heads(cfg['model']).items()
              if isinstance(head.get('num_classes'), int) and not _is_binary(head, number)}
    for key, preprocessor in (('data_preprocessor', cfg.get('data_preprocessor')),
                              ('model.data_preprocessor', cfg['model'].get('data_preprocessor'))):
        if isinstance(preprocessor, dict) and isinstance(preprocessor.get('num_classes'), int):
            counts[f'{key}.num_classes'] = preprocessor['num_classes']
    wrong = {key: count for key, count in counts.items() if count != number}
    if not wrong:
        return
    advice = f'set num_classes={number} there'
    if splits == ('test', ) and max(wrong.values()) > number:
        advice += (', or test on all classes that the model was trained for: test_evaluator.classwise=True gives a '
                   'detector\'s figures of each class, while a segmentor\'s log lists them anyway')
    raise LaunchError(f'{", ".join(f"{key}={count}" for key, count in wrong.items())}, but {classes}: {advice}')


def _heads(model: dict) -> dict[str, dict]:
    """Return the heads whose number of classes is that of the data, by config key; heads within heads are their own."""
    heads: dict[str, dict] = {}
    for key, value in walk(model, 'model'):
        name = re.sub(r'\[\d+]$', '', key).rpartition('.')[2]
        if name in HEADS and isinstance(value, dict) and not any(key.startswith(f'{head}.') for head in heads):
            heads[key] = value
    return heads


def _is_binary(head: dict, number: int) -> bool:
    """Return whether one output with a threshold tells two classes apart."""
    return number == 2 and head.get('out_channels', head['num_classes']) == 1


def _differences(first: Sequence[str], other: Sequence[str]) -> str:
    parts = [f'{name} ({some(names)})' for name, names in (
        ('only the former has', [name for name in first if name not in other]),
        ('only the latter has', [name for name in other if name not in first])) if names]
    return ', '.join(parts) or 'a name is there twice'


def _count(names: Sequence[str]) -> str:
    return f'{len(names)} class{"es" * (len(names) != 1)} ({some(names)})'


def _literal(names: Sequence[str], count: int = 12) -> str:
    """Return the names as a config writes them."""
    shown = ', '.join(repr(str(name)) for name in names[:count])
    return f'({shown}, …)' if len(names) > count else f'({shown}{"," * (len(names) == 1)})'
