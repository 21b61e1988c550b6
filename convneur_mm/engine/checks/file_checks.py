"""Check before a run that the files that a config names exist and are safe to read."""
from __future__ import annotations

import os
import os.path as osp
from collections.abc import Iterator
from urllib.parse import urlparse

from mmengine.config import Config

from ..files.errors import LaunchError
from ..files.weights_file import ALLOW

# Arguments by which mmdet's and mmpretrain's metrics name files and folders.
EVALUATOR_PATHS = ('ann_file', 'seg_prefix')


def check_data_files(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the annotation files and folders named by data sets and evaluators exist.

    Args:
        cfg (Config): Config of a run.
        splits (tuple[str, ...]): Splits that the run reads, of 'train', 'val' and 'test'.

    Raises:
        LaunchError: Names the key and the path of the first one that does not exist.
    """
    for split in splits:
        for key, path in _data_paths(cfg, split):
            if not osp.exists(path):
                raise LaunchError(f'{key}: {path} does not exist (looked for from {os.getcwd()}); set data_root, '
                                  'ann_file and data_prefix of the dataset to where the data is')
        for key, path in _evaluator_paths(cfg, split):
            if not osp.exists(path):
                of_data = _annotations_of_data(cfg, split) if key.endswith('.ann_file') else None
                where = f'{of_data!r}, the file of {split}_dataloader' if of_data else 'where the data is'
                raise LaunchError(f'{key}: {path} does not exist (looked for from {os.getcwd()}); set it to {where}')


def walk(node: object, key: str) -> Iterator[tuple[str, object]]:
    """Yield (config key, value) of a part of a config and of everything within it, from the outside in."""
    yield key, node
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for name, value in inner:
        yield from walk(value, f'{key}.{name}' if isinstance(node, dict) else f'{key}[{name}]')


def data_sets(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """Yield (config key, config) of each data set of a split, inside any wrappers."""
    loader = cfg.get(f'{split}_dataloader')
    if isinstance(loader, dict) and isinstance(loader.get('dataset'), dict):
        yield from _unwrapped(loader['dataset'], f'{split}_dataloader.dataset')


def _unwrapped(dataset: dict, key: str) -> Iterator[tuple[str, dict]]:
    if 'dataset' in dataset:
        yield from _unwrapped(dataset['dataset'], f'{key}.dataset')
    for i, inner in enumerate(dataset.get('datasets', ())):
        yield from _unwrapped(inner, f'{key}.datasets[{i}]')
    if not {'dataset', 'datasets'} & dataset.keys():
        yield key, dataset


def evaluators(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """Yield (config key, config) of each evaluator of a split; the training has none."""
    found = cfg.get(f'{split}_evaluator') or ()
    if isinstance(found, dict):
        yield f'{split}_evaluator', found
    else:
        yield from ((f'{split}_evaluator[{i}]', metric) for i, metric in enumerate(found) if isinstance(metric, dict))


def local_path(cfg: dict, name: str) -> str | None:
    """Return the path in the entry ``name`` of a data set or evaluator, or None if it is not on a local disk."""
    value = cfg.get(name)
    if not isinstance(value, str) or not value or cfg.get('backend_args'):
        return None
    path = osp.join(cfg.get('data_root') or '', value)
    return None if urlparse(path).scheme else path


def _data_paths(cfg: Config, split: str) -> Iterator[tuple[str, str]]:
    """Yield (config key, local path) of each file and folder that the data sets of a split name."""
    for key, dataset in data_sets(cfg, split):
        prefix = dataset.get('data_prefix') or {}
        entries = {'ann_file': dataset.get('ann_file')}
        for name, value in (prefix.items() if isinstance(prefix, dict) else [('img_path', prefix)]):
            entries[f'data_prefix.{name}'] = value
        if not any(entries.values()):
            entries['data_root'] = '.'  # mmpretrain's data sets find their files below it themselves
        root = {name: dataset[name] for name in ('data_root', 'backend_args') if name in dataset}
        for name, value in entries.items():
            path = local_path({**root, 'value': value}, 'value')
            if path and (value != '.' or root.get('data_root')):
                yield f'{key}.{name}', osp.normpath(path)


def _evaluator_paths(cfg: Config, split: str) -> Iterator[tuple[str, str]]:
    for key, metric in evaluators(cfg, split):
        for name in EVALUATOR_PATHS:
            path = local_path(metric, name)
            if path:
                yield f'{key}.{name}', path


def _annotations_of_data(cfg: Config, split: str) -> str | None:
    return next(filter(None, (local_path(dataset, 'ann_file') for _, dataset in data_sets(cfg, split))), None)


def check_no_pickled_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the data are not read by unpickling, which could run code that they contain.

    Raises:
        LaunchError: Names the key and the file of the first data that would be unpickled.
    """
    for split in splits:
        for key, value in walk(cfg.get(f'{split}_dataloader') or {}, f'{split}_dataloader'):
            if isinstance(value, str) and value.endswith(('.pkl', '.pickle')):
                raise LaunchError(f'{key}: {value} was not loaded, because unpickling can run any code; {ALLOW}')
            if key.endswith('.decode_backend') and value == 'pickle':
                raise LaunchError(f'{key}: the data were not loaded, because unpickling can run any code; {ALLOW}')
