"""Find and read a config as the tools run it."""
from __future__ import annotations

import os
import os.path as osp

import torch
from mmengine.config import Config

from ...paths import config_root
from ...stack import StackError, check_cuda_operators, require
from ..checks.file_checks import walk
from ..files.checkpoint import fetch_checkpoint, is_mmengine_name, read_checkpoint
from ..files.errors import LaunchError
from ..files.weights_file import CheckpointError, CheckpointNotFoundError
from ..runner.loops import RESUMABLE_LOOPS
from ..settings import apply_settings

SCOPES = ('mmdet', 'mmseg', 'mmpretrain')


def read_config(path: str, options: dict) -> Config:
    """Read a config with its overrides, apply its settings, and import the OpenMMLab package that it is for.

    Without that package, MMEngine would find none of the names in the config, and would report only the first.

    Args:
        path (str): Path of the config file.
        options (dict): Overrides, as :meth:`Config.merge_from_dict` takes them.

    Raises:
        LaunchError: If the config is not valid; if its package, or that of one of its bases, is not installed or does
            not import; if mmcv lacks the operators a detector needs on this machine's GPU; or if a setting cannot be
            applied.
    """
    try:
        try:
            cfg = Config.fromfile(path)
        except ModuleNotFoundError as error:
            # A base such as 'mmdet::…' or custom_imports needs it; we know the remedy only for the first.
            package = str(error).partition(' is not installed')[0]
            if package in SCOPES:
                require(package)
            raise
        except (SyntaxError, NameError, KeyError, TypeError, AttributeError, OSError) as error:
            message = ' '.join(str(error).split())
            raise LaunchError(f'{path}: the config cannot be read: {type(error).__name__}: {message}') from error
        cfg.merge_from_dict(options)
        apply_settings(cfg)
        if cfg.get('default_scope') == 'mmpretrain':
            set_loader_defaults(cfg)
        if cfg.get('default_scope') in SCOPES:
            require(f'{cfg.default_scope}.models')
        if cfg.get('default_scope') == 'mmdet':
            check_cuda_operators()
    except StackError as error:
        raise LaunchError(str(error)) from None
    return cfg


def use_resumable_loop(train_cfg: dict) -> None:
    """Replace MMEngine's training loop by ours of the same kind, in place; leave any other loop as it is."""
    if 'type' not in train_cfg and 'by_epoch' in train_cfg:
        train_cfg['type'] = 'EpochBasedTrainLoop' if train_cfg.pop('by_epoch') else 'IterBasedTrainLoop'
    if train_cfg.get('type') in RESUMABLE_LOOPS:
        train_cfg['type'] = RESUMABLE_LOOPS[train_cfg['type']]


def set_loader_defaults(cfg: Config) -> None:
    """Set the data loader defaults of mmpretrain's own tool for a classifier; mmdet's and mmseg's tools have none.

    A batch is then one tensor, which is copied and normalised in one go.
    """
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())
            # PyTorch refuses this without workers.
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def find_config(name: str) -> str:
    """Find a config by path, relative to the current folder or to the shipped ``configs``, or by name."""
    path = name if name.endswith('.py') else f'{name}.py'
    root = config_root()
    candidates = [name, path, str(root / path), str(root.parent / path)]
    for candidate in candidates:
        if osp.isfile(candidate):
            return candidate
    raise LaunchError(f'no config {name!r}, neither here ({os.getcwd()}) nor among the shipped ones ({root})')


def readable_checkpoint(filename: str, argument: str, allow_pickle: bool) -> str:
    """Check that a checkpoint can be read, and return its local path; return a name for MMEngine unchanged.

    Args:
        filename (str): Path, URL, or a name such as ``torchvision://resnet50``.
        argument (str): Name of the command line's argument, for messages.
        allow_pickle (bool): Whether files that hold more than weights are loaded too. If so, the file is not checked,
            as its code would run twice.

    Raises:
        LaunchError: If there is no such file, it is no checkpoint, or it needs pickle and that is not allowed.
    """
    if is_mmengine_name(filename):
        return filename
    try:
        path = fetch_checkpoint(filename)
        if not allow_pickle:
            read_checkpoint(path, mmap=True)
    except CheckpointNotFoundError:
        raise LaunchError(f'{argument}: no such file: {filename}') from None
    except CheckpointError as error:
        raise LaunchError(f'{argument}: {error}') from None
    return path


def without_sync_bn(cfg: dict | list) -> bool:
    """Replace SyncBN, which needs a GPU, by BN in place, and return whether there was any."""
    found = False
    for _, node in walk(cfg, 'model'):
        kind = node.get('type') if isinstance(node, dict) else None
        if kind == 'SyncBN':
            node['type'], found = 'BN', True
        elif kind in ('RTMDet', 'mmdet.RTMDet'):
            # With several processes it makes SyncBN of all BN that it has, unless it is told not to.
            node['use_syncbn'], found = False, True
    return found
