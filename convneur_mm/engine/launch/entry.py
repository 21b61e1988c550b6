"""Run ``tools/train.py`` and ``tools/test.py``: early checks of the config, and one line at user errors and signals."""
from __future__ import annotations

import argparse
import os
import os.path as osp
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed
from mmengine.config import Config

from ..checks.class_checks import check_classes
from ..checks.file_checks import check_data_files, check_no_pickled_data
from ..files.errors import LaunchError, shows_tracebacks
from ..files.weights_file import CheckpointError
from ..runner.interrupts import Interrupted, exit_without_finalizing, leave, raised_signals
from .config import find_config, read_config, readable_checkpoint, use_resumable_loop, without_sync_bn
from .processes import leave_group, node_name, set_up_processes, slurm_variables

# Hooks to add, unless the config has them already, perhaps with its own settings.
HOOKS_OF_TOOLS = ('CheckpointKeysHook', 'ClassNamesHook', 'LabelRangeHook', 'NonFiniteLossHook', 'SaveAtSigtermHook')


def run(main: Callable[[], None]) -> None:
    """Run ``main``; on user errors and signals, end with one line from each machine instead of tracebacks.

    Leave the process group that ``main`` has joined afterwards.
    """
    is_first = not int(os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or 0)
    try:
        with raised_signals():
            _run(main)
    except Interrupted as interrupted:
        leave(interrupted, f'{node_name(os.environ)}{interrupted}' if is_first else None)
    except (LaunchError, CheckpointError) as error:
        if shows_tracebacks():
            raise
        if not is_first:
            # The first process of this machine most likely fails in the same way: its launcher then ends this one
            # before it repeats the message.
            time.sleep(1)
        print(f'error: {node_name(os.environ)}{error}', file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            exit_without_finalizing(2)
        sys.exit(2)


def _run(main: Callable[[], None]) -> None:
    try:
        main()
        if torch.distributed.is_initialized():
            leave_group()
    except RuntimeError:
        if torch.distributed.is_initialized():
            # Most likely a signal has ended another process, and reaches this one within this time.
            time.sleep(1)
        raise


def load_config(args: argparse.Namespace, splits: tuple[str, ...]) -> Config:
    """Load the config with its overrides, run the early checks, and join the process group.

    Args:
        args (argparse.Namespace): Arguments that :func:`make_parser` parsed.
        splits (tuple[str, ...]): Splits that the run reads, of 'train', 'val' and 'test'.

    Returns:
        Config: Config that is ready for ``Runner.from_cfg``.

    Raises:
        LaunchError: If the config, a data file or a device it names does not exist, or model and data disagree on the
            classes.
    """
    if args.launcher == 'slurm':
        os.environ.update(slurm_variables(os.environ))
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise LaunchError('--launcher pytorch is for processes that torchrun starts, and RANK is not set here: use '
                          'tools/dist_train.sh or dist_test.sh')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(find_config(args.config), args.cfg_options)
    if 'train' not in splits:
        # A config in a work dir names where its training started from, which may be gone and is not what is tested.
        cfg.load_from, cfg.resume = None, False
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(args.config))[0])
    check_data_files(cfg, splits)
    if not args.allow_pickle:
        check_no_pickled_data(cfg, splits)
    check_classes(cfg, splits)
    hooks = cfg.get('custom_hooks') or []
    given = [hook.get('type') for hook in hooks if isinstance(hook, dict)]  # others are built already
    cfg.custom_hooks = [*hooks, *(dict(type=name) for name in HOOKS_OF_TOOLS if name not in given)]
    notes = []
    if not torch.cuda.is_available() and any([without_sync_bn(cfg.model), cfg.pop('sync_bn', None)]):
        notes.append('BN replaces SyncBN, which needs a GPU: with several processes, each normalises by its own images '
                     'alone; to share statistics, train on GPUs')
    # A config that an earlier run wrote to its work dir has this hook, with that run's notes.
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks
                        if not isinstance(hook, dict) or hook.get('type') != 'StartSummaryHook']
    cfg.custom_hooks.append(dict(type='StartSummaryHook', notes=notes))
    cfg.default_hooks = cfg.get('default_hooks') or {}
    saving = cfg.default_hooks.setdefault('checkpoint', dict(type='CheckpointHook'))
    if saving and saving.get('type') == 'CheckpointHook':
        saving['type'] = 'SaveThenDeleteHook'
    use_resumable_loop(cfg.get('train_cfg') or {})
    if args.launcher != 'none':
        set_up_processes(cfg)
    if cfg.get('load_from'):
        cfg.load_from = readable_checkpoint(cfg.load_from, 'load_from', args.allow_pickle)
    return cfg
