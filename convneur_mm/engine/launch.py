"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, early checks, and the process group."""
from __future__ import annotations

import argparse
import os
import os.path as osp
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger

from ..paths import config_root
from .checkpoint import (
    ALLOW,
    CheckpointError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
    fetch_checkpoint,
    is_mmengine_name,
    read_checkpoint,
)


class LaunchError(Exception):
    """Something the user gave cannot work; the message names it. Raised before any long work."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that training and testing share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='path of a config, or the name of one that convneur_mm ships')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
                        help='override settings, e.g. model.backbone.memory_cfg.chunk_size=196; a list is '
                        'written key="[a,b]", without blanks')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher')
    parser.add_argument('--allow-pickle', action='store_true',
                        help='load checkpoints and pickled or YAML data files that hold more than tensors and plain '
                        'values, which can run any code; without it they are refused. Configs are Python programs, and '
                        'run in either case')
    # Launchers spell it either way; the value is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs ``main``; a launch or checkpoint error ends it with one line instead of a traceback for each process."""
    try:
        main()
    except (LaunchError, CheckpointError) as error:
        if os.environ.get('RANK', '0') == '0':
            print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)


def load_config(args: argparse.Namespace, splits: tuple[str, ...]) -> Config:
    """Loads the config with its overrides, checks what can be checked at once, and joins the process group.

    Args:
        args (argparse.Namespace): As parsed by :func:`make_parser`.
        splits (tuple[str, ...]): The data the run reads, of 'train', 'val' and 'test'.

    Returns:
        Config: Ready for ``Runner.from_cfg``.

    Raises:
        LaunchError: If the config, a data file or a device it names does not exist.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(find_config(args.config))
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join(
        'work_dirs', osp.splitext(osp.basename(args.config))[0])
    check_data_files(cfg, splits)
    if not args.allow_pickle:
        check_no_pickled_data(cfg, splits)
    hooks = cfg.get('custom_hooks') or []
    checks = [dict(type=name) for name in ('CheckpointKeysHook', 'ClassNamesHook')]
    cfg.custom_hooks = [*hooks, *(check for check in checks if check['type'] not in [hook['type'] for hook in hooks])]
    if not torch.cuda.is_available():
        without_sync_bn(cfg.model)
    if args.launcher != 'none':
        set_up_processes(cfg, args.launcher)
    if cfg.get('load_from'):
        cfg.load_from = readable_checkpoint(cfg.load_from, 'load_from', args.allow_pickle)
    return cfg


def find_config(name: str) -> str:
    """Path of a config given by path, relative to the current folder or to the shipped ``configs``, or by name."""
    path = name if name.endswith('.py') else f'{name}.py'
    root = config_root()
    candidates = [name, path, str(root / path), str(root.parent / path)]
    for candidate in candidates:
        if osp.isfile(candidate):
            return candidate
    raise LaunchError(f'no config {name!r}, neither here ({os.getcwd()}) nor among the shipped ones ({root})')


def readable_checkpoint(filename: str, argument: str, allow_pickle: bool) -> str:
    """Local path of a checkpoint, looked into before any long work; a name that MMEngine resolves stays as it is.

    Args:
        filename (str): Path, URL, or a name such as ``torchvision://resnet50``.
        argument (str): The command line's name for it, for messages.
        allow_pickle (bool): Whether files that hold more than weights are loaded too. They are not looked into, as
            their code would run twice.

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


def latest_checkpoint(work_dir: str, allow_pickle: bool) -> str | None:
    """The newest intact checkpoint of a work dir, or None where there is none; damaged ones are named in the log.

    Args:
        work_dir (str): Where MMEngine saved ``epoch_*.pth`` or ``iter_*.pth``, and wrote the newest one's path to
            ``last_checkpoint``.
        allow_pickle (bool): See :func:`readable_checkpoint`.

    Raises:
        LaunchError: If the newest one needs pickle and that is not allowed, or each one is damaged.
    """
    record = Path(work_dir, 'last_checkpoint')
    if not record.is_file():
        return None
    newest = record.read_text().strip()
    if osp.isdir(newest):
        return newest  # saved in parts by MMEngine's other strategies
    numbers = {str(path): int(match[1]) for path in Path(work_dir).glob('*.pth')
               if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))}
    older = [path for path in numbers if osp.realpath(path) != osp.realpath(newest)]
    error = None
    for path in [newest, *sorted(older, key=numbers.get, reverse=True)]:
        try:
            if not (allow_pickle and osp.isfile(path)):
                read_checkpoint(path, mmap=True)
            return path
        except UnsafeCheckpointError as unsafe:
            raise LaunchError(f'--resume: {unsafe}') from None
        except CheckpointError as damaged:
            error = damaged
            MMLogger.get_current_instance().warning(f'--resume goes on from an older checkpoint: {damaged}')
    raise LaunchError(f'--resume: no checkpoint in {work_dir} is intact: {error}')


def without_sync_bn(cfg: dict | list) -> None:
    """Replaces SyncBN by BN, in place: it exists on GPUs only."""
    for value in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(value, (dict, list)):
            without_sync_bn(value)
    if isinstance(cfg, dict) and cfg.get('type') == 'SyncBN':
        cfg['type'] = 'BN'


def check_data_files(cfg: Config, splits: tuple[str, ...]) -> None:
    """Checks that the annotation files and image folders named by a config exist.

    Raises:
        LaunchError: Names the key and the path of the first one that does not.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        for key, path in _data_paths(loader['dataset'], f'{split}_dataloader.dataset'):
            if not osp.exists(path):
                raise LaunchError(f'{key}: {path} does not exist (looked for from {os.getcwd()}); set data_root, '
                                  'ann_file and data_prefix of the dataset to where the data is')


def _data_paths(dataset: dict, key: str) -> Iterator[tuple[str, str]]:
    """(config key, local path) of each file and folder of a dataset config, wrapped datasets included."""
    if 'dataset' in dataset:
        yield from _data_paths(dataset['dataset'], f'{key}.dataset')
    for i, inner in enumerate(dataset.get('datasets', ())):
        yield from _data_paths(inner, f'{key}.datasets[{i}]')
    if dataset.get('backend_args'):
        return  # not on this machine's disk
    root = dataset.get('data_root') or ''
    entries = {'ann_file': dataset.get('ann_file')}
    prefix = dataset.get('data_prefix') or {}
    for name, value in (prefix.items() if isinstance(prefix, dict) else [('img_path', prefix)]):
        entries[f'data_prefix.{name}'] = value
    if not any(entries.values()):
        entries['data_root'] = ''  # mmpretrain's datasets find their files below it themselves
    for name, value in entries.items():
        if isinstance(value, str) and osp.join(root, value) and not urlparse(osp.join(root, value)).scheme:
            yield f'{key}.{name}', osp.join(root, value).rstrip('/')


def check_no_pickled_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Checks that the data are not read by unpickling, which could run code that they bring along.

    Raises:
        LaunchError: Names the key and the file of the first one that would be.
    """
    for split in splits:
        for key, value in _leaves(cfg.get(f'{split}_dataloader') or {}, f'{split}_dataloader'):
            if isinstance(value, str) and value.endswith(('.pkl', '.pickle')):
                raise LaunchError(f'{key}: {value} was not loaded, because unpickling can run any code; {ALLOW}')
            if key.endswith('.decode_backend') and value == 'pickle':
                raise LaunchError(f'{key}: the data were not loaded, because unpickling can run any code; {ALLOW}')


def _leaves(cfg: object, key: str) -> Iterator[tuple[str, object]]:
    """(config key, value) of all values within dicts and lists."""
    if isinstance(cfg, dict):
        for name, value in cfg.items():
            yield from _leaves(value, f'{key}.{name}')
    elif isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            yield from _leaves(value, f'{key}[{i}]')
    else:
        yield key, cfg


def set_up_processes(cfg: Config, launcher: str) -> None:
    """Joins the process group over gloo where there is no GPU; with GPUs, MMEngine does it over NCCL.

    MMEngine's own set-up asks for a CUDA device whatever the backend, and its DDP wrapper names one; both leave an
    existing process group and an explicit ``model_wrapper_cfg`` alone.

    Raises:
        LaunchError: If there are more processes than GPUs on this machine.
    """
    if torch.cuda.is_available():
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if processes > torch.cuda.device_count():
            raise LaunchError(f'{processes} processes were asked for, but {torch.cuda.device_count()} GPUs are visible')
        return
    if launcher == 'slurm':
        nodes = subprocess.run(['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']],
                               check=True, capture_output=True, text=True).stdout.split()
        os.environ.update(RANK=os.environ['SLURM_PROCID'], WORLD_SIZE=os.environ['SLURM_NTASKS'],
                          LOCAL_RANK=os.environ['SLURM_LOCALID'])
        os.environ.setdefault('MASTER_ADDR', nodes[0])
        os.environ.setdefault('MASTER_PORT', '29500')
    torch.distributed.init_process_group('gloo')
    cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    if not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False))
