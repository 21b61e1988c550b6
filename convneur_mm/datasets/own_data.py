"""Users' own pictures and annotations, in common layouts, as data that a config can name.

:func:`prepare` finds the files of a folder, rejects what the checks of :mod:`.check` reject, splits data that have no
split, and writes what the configs also need (split annotation files, lists of pictures, label maps with consecutive
values) into a separate folder; the data are not changed.
"""
from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .check import Report, check_ade20k, check_coco, check_imagenet
from .check.folders import IGNORED, IMAGENET_SUFFIXES
from .check.images import files_under, seen_size

# Words in file and folder names that tell the split; pictures for tests are not used in training.
_ROLES = dict(train='train', training='train', val='val', valid='val', validation='val', test='test', testing='test',
              trainval='all')
_IMAGE_DIRS = ('images', 'image', 'imgs', 'img', 'jpegimages', 'img_dir', 'photos', 'pictures')
_LABEL_DIRS = ('masks', 'mask', 'labels', 'label', 'annotations', 'annotation', 'ann_dir', 'segmentationclass',
               'label_maps', 'segmentation', 'segmentations', 'gt')
VAL_SHARE = 0.2
# Largest number of pictures whose size is looked up.
_MAX_SIZED = 200


class OwnDataError(ValueError):
    """The data cannot be trained on; the one-line message names the file or folder and what was expected."""


class FaultyDataError(OwnDataError):
    """The check of the data found faults.

    Attributes:
        report (Report): Result of the check.
    """

    def __init__(self, report: Report) -> None:
        count = len(report.faults)
        ending = 's: mend them first' if count > 1 else ': mend it first'
        super().__init__(f'{report.name} has {count} fault{ending}')
        self.report = report


class Split(NamedTuple):
    """A part of the data.

    Attributes:
        ann_file (Path): COCO file, or list of the pictures, one per line.
        images (Path): Folder to which the pictures' names are relative.
        labels (Path | None): Folder of the label maps.
        count (int): Number of pictures.
    """

    ann_file: Path
    images: Path
    labels: Path | None
    count: int


@dataclass
class OwnData:
    """Data that a config can name.

    Attributes:
        classes (tuple[str, ...]): Class names by label.
        train (Split): Training data.
        val (Split): Validation and test data.
        sizes (list[tuple[int, int]]): Widths and heights of pictures, not necessarily of all.
        boxes (np.ndarray): Boxes of a detector's training pictures, float64, shape (N, 2): width and height as
            fractions of the longer side of their picture.
        has_masks (bool): Whether the objects have masks.
        suffixes (tuple[str, str]): Endings of the names of pictures and label maps, left out in their list.
        pixels (tuple[int, ...]): Number of pixels of each class in the training label maps; () without label maps.
        notes (list[str]): Remarks for the user.
    """

    classes: tuple[str, ...]
    train: Split
    val: Split
    sizes: list[tuple[int, int]]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    has_masks: bool = False
    suffixes: tuple[str, str] = ('', '')
    pixels: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


def prepare(task: str, data: str | os.PathLike[str], out: str | os.PathLike[str],
            names: Sequence[str] | None = None, reduce_zero_label: bool = False, ignore_label: int | None = None,
            ) -> OwnData:
    """Find, check and split data.

    Args:
        task (str): 'det' for a COCO file and pictures; 'seg' for pictures and label maps; 'cls' for class folders.
        data (str | os.PathLike): Folder of the data, or a COCO file.
        out (str | os.PathLike): Folder for the written files, created if missing.
        names (Sequence[str] | None): Classes to use: names of categories or class folders, or for label maps the names
            of the values. None takes all. Defaults to None.
        reduce_zero_label (bool): Whether the value 0 of label maps is not a class. Defaults to False.
        ignore_label (int | None): Another value of label maps that is not a class, 0 to 254. 255 never is one, except
            in masks of only 0 and 255. Defaults to None.

    Raises:
        OwnDataError: If there are no such data, or they are for another task or too few to train on.
        FaultyDataError: If the check of the data finds faults.
    """
    data, out = Path(data).absolute(), Path(out).absolute()
    if not data.exists():
        raise OwnDataError(f'DATA: {data} does not exist')
    if names is not None and (not names or len(set(names)) < len(names)):
        raise OwnDataError(f'the file of classes must have a different name on each line, got {list(names)}')
    try:
        layout = _FINDERS[task](data)
    except OwnDataError as error:
        raise OwnDataError(f'{error}{_hint(task, data)}') from None
    if task == 'det':
        return _prepare_coco(layout, out, names)
    if task == 'seg':
        return _prepare_label_maps(layout, out, names, reduce_zero_label, ignore_label)
    return _prepare_class_folders(layout, out, names)


def _hint(task: str, data: Path) -> str:
    for other, find in _FINDERS.items():
        if other != task:
            try:
                find(data)
            except OwnDataError:
                continue
            return f'; these look like data for --task {other}'
    return ''


def _role(path: Path, root: Path) -> str | None:
    """Return the split named by the last known word in a path below ``root``."""
    words = re.findall('[a-z]+', path.relative_to(root).as_posix().lower())
    return next((_ROLES[word] for word in reversed(words) if word in _ROLES), None)


def _by_role(found: Iterable[tuple[str | None, object]], what: str) -> dict[str, object]:
    """Return one item each for 'train' and 'val', or one for 'all', which is still to be split.

    Raises:
        OwnDataError: If the choice is not clear.
    """
    roles: dict[str, list[object]] = {}
    for role, thing in found:
        roles.setdefault(role or 'all', []).append(thing)
    names = ('train', 'val') if 'train' in roles and 'val' in roles else next(
        ((name,) for name in ('all', 'train', 'val', 'test') if name in roles), ())
    for name in names:
        if len(roles[name]) > 1:
            raise OwnDataError(f'several {what}, and their names do not tell training from validation: '
                               f'{", ".join(str(thing) for thing in roles[name][:4])}; give one of them as DATA')
    return {name if len(names) == 2 else 'all': roles[name][0] for name in names}


def _folders(root: Path) -> list[Path]:
    """Return ``root`` and all folders below it, without hidden ones."""
    found = []
    for parent, folders, _ in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        found.append(Path(parent))
    return found


def _has_images(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGENET_SUFFIXES) for name in files_under(folder))


# COCO


class _Coco(NamedTuple):
    ann_file: Path
    content: dict
    images: Path


def _find_coco(data: Path) -> dict[str, _Coco]:
    """Return the COCO file and folder of pictures of each split."""
    files = [data] if data.is_file() else sorted(
        path for folder in _folders(data) for path in folder.glob('*.json') if path.is_file())
    contents = {path: content for path in files if (content := _coco_content(path)) is not None}
    root = data.parent if data.is_file() else data
    if not contents:
        raise OwnDataError(f'DATA: {data} has no COCO annotation file, which is a JSON file with images, annotations '
                           'and categories')
    # COCO itself has files of captions and keypoints besides those of instances.
    files = [path for path in contents if path.name.startswith('instances')] or list(contents)
    chosen = _by_role(((None if data.is_file() else _role(path, root), path) for path in files), 'annotation files')
    return {role: _Coco(path, contents[path], _image_folder(path, contents[path], root))
            for role, path in chosen.items()}


def _coco_content(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        raise OwnDataError(f'DATA: {path} cannot be read: {error.strerror}') from None
    lists = ('images', 'annotations', 'categories')
    return content if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in lists) else None


def _image_folder(ann_file: Path, content: dict, root: Path) -> Path:
    """Return the folder with most of the pictures named by a COCO file; among equal ones that of the same split."""
    names = [str(image.get('file_name')) for image in content['images'] if isinstance(image, dict)]
    names, role = names[:_MAX_SIZED], _role(ann_file, root)
    counts = {folder: sum((folder / name).is_file() for name in names) for folder in _folders(root)}
    best = max(counts, key=lambda folder: (counts[folder], _role(folder, root) == role))
    if not counts[best]:
        raise OwnDataError(f'no images found: {ann_file} names {", ".join(names[:2]) or "none"}, and no folder of '
                           f'{root} has such files')
    return best


def _prepare_coco(layout: Mapping[str, _Coco], out: Path, names: Sequence[str] | None) -> OwnData:
    notes = []
    for part in layout.values():
        notes += _checked(check_coco(part.ann_file, part.images)).notes
    contents = {role: part.content for role, part in layout.items()}
    first = next(iter(contents.values()))
    categories = [category['name'] for category in first['categories']]
    classes = _chosen(names, categories, next(iter(layout.values())).ann_file, 'categories')
    # mmdet numbers the classes in the order of the annotation file.
    classes = tuple(name for name in categories if name in classes)
    for role, content in contents.items():
        others = [category['name'] for category in content['categories'] if category['name'] in classes]
        if others != list(classes):
            raise OwnDataError(f'{layout[role].ann_file} has the categories {others}, and the training file '
                               f'{list(classes)}: they must be the same, in the same order')
    if 'all' in layout:
        ann_file, content, images = layout['all']
        labels = _labels_by_image(content, classes)
        parts = dict(zip(('train', 'val'), split([labels[image['id']] for image in content['images']])))
        contents = {role: _part_of_coco(content, indices) for role, indices in parts.items()}
        layout = {role: _Coco(_write(out / f'{role}.json', json.dumps(part)), part, images)
                  for role, part in contents.items()}
        notes.append(f'{ann_file} was split by chance, the same each time')
    present = set().union(*_labels_by_image(contents['train'], classes).values())
    empty = [name for name in classes if name not in present]
    if empty:
        raise OwnDataError(f'categories without boxes in {layout["train"].ann_file}: {", ".join(empty)}; leave them '
                           'out of the file, or name the others, one a line, in a file for --classes')
    splits = {role: Split(part.ann_file, part.images, None, len(part.content['images']))
              for role, part in layout.items()}
    sizes = {image['id']: (image['width'], image['height']) for image in contents['train']['images']}
    ids = {category['id'] for category in contents['train']['categories'] if category['name'] in classes}
    boxes = [np.array(annotation['bbox'][2:]) / max(sizes[annotation['image_id']])
             for annotation in contents['train']['annotations']
             if annotation['category_id'] in ids and not annotation['iscrowd']]
    has_masks = all(each.get('segmentation') for content in contents.values() for each in content['annotations'])
    return OwnData(classes, splits['train'], splits['val'], list(sizes.values()), np.array(boxes), has_masks,
                   notes=notes)


def _labels_by_image(content: Mapping[str, list[dict]], classes: Collection[str]) -> dict[int, set[str]]:
    """Return the classes in each picture, by its id."""
    names = {category['id']: category['name'] for category in content['categories']}
    found: dict[int, set[str]] = {image['id']: set() for image in content['images']}
    for annotation in content['annotations']:
        if names[annotation['category_id']] in classes and not annotation['iscrowd']:
            found[annotation['image_id']].add(names[annotation['category_id']])
    return found


def _part_of_coco(content: Mapping[str, object], indices: Collection[int]) -> dict[str, object]:
    images = [content['images'][i] for i in indices]
    ids = {image['id'] for image in images}
    annotations = [each for each in content['annotations'] if each['image_id'] in ids]
    # pycocotools treats the id 0 as "no match".
    annotations = [dict(each, id=i) for i, each in enumerate(annotations, 1)]
    return {**content, 'images': images, 'annotations': annotations}


# Pictures and label maps


class _Pair(NamedTuple):
    images: Path
    labels: Path


def _find_label_maps(data: Path) -> dict[str, _Pair]:
    """Return the folders of pictures and of label maps of each split."""
    found: list[tuple[str | None, _Pair]] = []
    for folder in _folders(data) if data.is_dir() else ():
        children = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
        images = next((children[name] for name in _IMAGE_DIRS if name in children), None)
        labels = next((children[name] for name in _LABEL_DIRS if name in children), None)
        if not (images and labels and _has_images(images) and _has_images(labels)):
            continue
        parts = {path.name: path for path in images.iterdir() if path.is_dir() and path.name.lower() in _ROLES}
        found += [(_ROLES[name.lower()], _Pair(path, labels / name)) for name, path in parts.items()
                  if (labels / name).is_dir()] or [(_role(folder, data), _Pair(images, labels))]
    if not found:
        raise OwnDataError(f'DATA: {data} has no folders of pictures and of label maps beside each other, such as '
                           'images and masks')
    return _by_role(found, 'folders of pictures and label maps')


def _suffixes(pair: _Pair) -> tuple[str, str]:
    """Return the endings of the names of pictures and of label maps, as of ``a.jpg`` and ``a_mask.png``."""
    images = [name for name in files_under(pair.images) if name.lower().endswith(IMAGENET_SUFFIXES)]
    ends = Counter(Path(name).suffix for name in images)
    if len(ends) > 1:
        raise OwnDataError(f'pictures of {pair.images} end in {", ".join(sorted(ends))}: mmseg takes one ending, in '
                           'capital or small letters; convert the others')
    stems = {str(Path(name).with_suffix('')) for name in images}
    rests: Counter[str] = Counter()
    for name in files_under(pair.labels):
        stem = next((name[:end] for end in range(len(name) - 1, 0, -1) if name[:end] in stems), None)
        if stem is not None:
            rests[name[len(stem):]] += 1
    if not rests:
        raise OwnDataError(f'no label map of {pair.labels} has the name of a picture of {pair.images}')
    return next(iter(ends)), rests.most_common(1)[0][0]


def _prepare_label_maps(layout: Mapping[str, _Pair], out: Path, names: Sequence[str] | None,
                        reduce_zero_label: bool, ignore_label: int | None) -> OwnData:
    notes = []
    suffixes = _suffixes(next(iter(layout.values())))
    stems: dict[str, list[str]] = {}
    void = {IGNORED, ignore_label, 0 if reduce_zero_label else None}
    named = [value for value in range(IGNORED) if value not in void][:len(names)] if names else []
    # The check takes all values up to the largest that is a class or void.
    num_classes = max(*named, ignore_label or 0) + 1 - reduce_zero_label if names else 254
    for role, pair in layout.items():
        report = check_ade20k(*pair, num_classes, *suffixes, reduce_zero_label=reduce_zero_label)
        notes += _checked(report).notes
        stems[role] = sorted(name.removesuffix(suffixes[0]) for name in files_under(pair.images)
                             if name.endswith(suffixes[0]))
    counts = {role: [_pixels(layout[role].labels / (stem + suffixes[1])) for stem in stems[role]] for role in layout}
    values = {role: [set(each) for each in part] for role, part in counts.items()}
    found = sorted(set().union(*(each for part in values.values() for each in part)))
    # 255 is ignored, except in masks of only 0 and 255.
    known = [value for value in found if value not in void]
    if ignore_label is not None and ignore_label not in found:
        raise OwnDataError(f'--ignore-label {ignore_label}: no label map of {next(iter(layout.values())).labels} has '
                           f'this value; the values are {found}')
    if known == [0] and IGNORED in found and (names is None or len(names) == 2):
        known.append(IGNORED)
        notes.append('255 is the second class here, since there are no values but 0 and 255')
    if len(known) < 2:
        passed_over = ' and '.join(map(str, sorted(value for value in void if value is not None)))
        raise OwnDataError(f'the label maps of {next(iter(layout.values())).labels} have one class alone, or none: '
                           f'their values are {found}, without {passed_over}, which stand for no class')
    if names:
        labels = named
        unnamed = [value for value in known if value not in named and value != IGNORED]
        if unnamed:
            raise OwnDataError(f'the label maps of {next(iter(layout.values())).labels} have values without a name: '
                               f'{unnamed}; the {len(names)} names are those of {named}')
        classes = tuple(names)
        absent = [name for name, value in zip(names, labels) if value not in known]
        if absent and known[-1] != IGNORED:
            notes.append(f'classes that no label map has: {", ".join(absent)}')
        labels = known if known[-1] == IGNORED else labels
    else:
        labels, classes = known, tuple(f'class {value}' for value in known)
        notes.append('the classes have no names: write one a line to a file, for the values '
                     f'{", ".join(map(str, known[:3]))}{", …" if len(known) > 3 else ""}, and add --classes FILE')
        if known[0] == 0:
            notes.append('value 0 of the label maps is a class; where it is none, set --reduce-zero-label')
    parts = {role: stems[role] for role in layout}
    if 'all' in layout:
        layout = dict.fromkeys(('train', 'val'), layout['all'])
        indices = dict(zip(layout, split(values['all'])))
        parts = {role: [stems['all'][i] for i in indices[role]] for role in layout}
        counts = {role: [counts['all'][i] for i in indices[role]] for role in layout}
        notes.append(f'{layout["train"].images} was split by chance, the same each time')
    else:
        unseen = sorted(set().union(*values['val']) - set().union(*values['train']))
        if unseen:
            notes.append(f'values that validation pictures alone have, and nothing can learn: {unseen}')
    folders = {role: pair.labels for role, pair in layout.items()}
    if labels != list(range(len(labels))):
        table = np.full(256, IGNORED, np.uint8)
        table[labels] = range(len(labels))
        for role in parts:
            folders[role] = out / 'labels' / role
            for stem in parts[role]:
                target = folders[role] / f'{stem}.png'
                target.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(layout[role].labels / (stem + suffixes[1])) as label:
                    Image.fromarray(table[np.asarray(label)]).save(target)
        suffixes = suffixes[0], '.png'
    splits = {role: Split(_write(out / f'{role}.txt', '\n'.join(parts[role]) + '\n'), layout[role].images,
                          folders[role], len(parts[role])) for role in parts}
    sizes = _sizes(splits['train'].images / (stem + suffixes[0]) for stem in parts['train'][:_MAX_SIZED])
    total = sum(counts['train'], Counter())
    return OwnData(classes, splits['train'], splits['val'], sizes, suffixes=suffixes,
                   pixels=tuple(total[label] for label in labels), notes=notes)


def _pixels(path: Path) -> Counter[int]:
    """Return the number of pixels of each value that occurs in a label map."""
    with Image.open(path) as label:
        return +Counter(dict(enumerate(label.histogram())))


# Class folders


def _find_class_folders(data: Path) -> dict[str, Path]:
    """Return the parent folder of the class folders of each split."""
    root = data
    while root.is_dir():
        children = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.'))
        parts = {_ROLES[path.name.lower()]: path for path in children if path.name.lower() in _ROLES}
        if 'train' in parts:
            roles = {role: path for role, path in parts.items() if role in ('train', 'val')}
            roles = roles if len(roles) == 2 else {'all': parts['train']}
            if all(_class_folders(path) for path in roles.values()):
                return roles
            break
        if len(children) != 1 or _has_images_itself(children[0]):
            if _class_folders(root):
                return {'all': root}
            break
        root = children[0]
    raise OwnDataError(f'DATA: {data} has no class folders, which are folders of pictures with the names of the '
                       'classes')


def _has_images_itself(folder: Path) -> bool:
    return any(path.name.lower().endswith(IMAGENET_SUFFIXES) for path in folder.iterdir())


def _class_folders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))
    # Folders of pictures and label maps are not class folders.
    other = {*_IMAGE_DIRS, *_LABEL_DIRS} & {name.lower() for name in names}
    return [] if other or not any(_has_images(folder / name) for name in names) else names


def _prepare_class_folders(layout: Mapping[str, Path], out: Path, names: Sequence[str] | None) -> OwnData:
    notes = []
    for folder in layout.values():
        notes += _checked(check_imagenet(folder)).notes
    folders = {role: _class_folders(folder) for role, folder in layout.items()}
    first = next(iter(layout))
    classes = tuple(_chosen(names, folders[first], layout[first], 'class folders'))
    if len(classes) < 2:
        raise OwnDataError(f'{layout[first]} has one class alone, {classes[0]}: there is nothing to tell apart')
    unknown = [name for name in folders.get('val', ()) if name not in folders[first]]
    if unknown:
        raise OwnDataError(f'{layout["val"]} has class folders that {layout["train"]} lacks: {", ".join(unknown)}')
    lines = {role: [[f'{name}/{file} {label}' for file in sorted(files_under(folder / name))
                     if file.lower().endswith(IMAGENET_SUFFIXES)] for label, name in enumerate(classes)]
             for role, folder in layout.items()}
    if 'all' in layout:
        train, val = _split_by_class(lines['all'])
        notes.append(f'{layout["all"]} was split by chance, the same each time')
        parts, layout = dict(train=train, val=val), dict.fromkeys(('train', 'val'), layout['all'])
    else:
        parts = {role: [line for part in by_class for line in part] for role, by_class in lines.items()}
    splits = {role: Split(_write(out / f'{role}.txt', '\n'.join(part) + '\n'), layout[role], None, len(part))
              for role, part in parts.items()}
    some = random.Random(0).sample(parts['train'], min(_MAX_SIZED, len(parts['train'])))
    sizes = _sizes(layout['train'] / line.rpartition(' ')[0] for line in some)
    return OwnData(classes, splits['train'], splits['val'], sizes, notes=notes)


def _split_by_class(lines: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Split lines into (train, val), with the same share of each class and at least one of each for training."""
    draw = random.Random(0)
    train, val = [], []
    for of_class in lines:
        count = min(len(of_class) - 1, max(1, round(VAL_SHARE * len(of_class))))
        chosen = set(draw.sample(range(len(of_class)), count))
        val += [line for i, line in enumerate(of_class) if i in chosen]
        train += [line for i, line in enumerate(of_class) if i not in chosen]
    if not val:
        raise OwnDataError(f'{len(train)} pictures, one of each class: they cannot be split into training and '
                           'validation')
    return train, val


# For all


def split(labels: Sequence[Collection[object]]) -> tuple[list[int], list[int]]:
    """Split pictures at random, but reproducibly, into a training and a validation part.

    A class that only one picture has stays in the training part, if another picture can go to validation.

    Args:
        labels (Sequence[Collection]): Classes in each picture.

    Returns:
        tuple[list[int], list[int]]: Indices of the two parts, in ascending order; neither is empty.

    Raises:
        OwnDataError: If there are fewer than two pictures.
    """
    if len(labels) < 2:
        raise OwnDataError(f'{len(labels)} picture cannot be split into training and validation: at least 2 are needed')
    order = random.Random(0).sample(range(len(labels)), len(labels))
    wanted = max(1, round(VAL_SHARE * len(labels)))
    left = Counter(label for each in labels for label in set(each))
    val: list[int] = []
    for i in order:
        if len(val) < wanted and all(left[label] > 1 for label in labels[i]):
            val.append(i)
            left.subtract(set(labels[i]))
    chosen = set(val or order[:1])
    return [i for i in range(len(labels)) if i not in chosen], sorted(chosen)


def _chosen(names: Sequence[str] | None, found: Sequence[str], where: Path, what: str) -> list[str]:
    """Return the requested classes, which must be among those found, or all if none are requested."""
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise OwnDataError(f'--classes names {", ".join(unknown)}, and the {what} of {where} are {", ".join(found)}')
    return list(names or found)


def _checked(report: Report) -> Report:
    if not report.clean:
        raise FaultyDataError(report)
    return report


def _sizes(paths: Iterable[Path]) -> list[tuple[int, int]]:
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(seen_size(image))
    return found


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


_FINDERS: dict[str, Callable[[Path], dict]] = dict(
    det=_find_coco, seg=_find_label_maps, cls=_find_class_folders)
