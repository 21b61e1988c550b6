"""Arguments, early checks and process group that ``tools/train.py`` and ``tools/test.py`` share."""
from __future__ import annotations

import argparse
import gc
import os
import os.path as osp
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed
from mmengine.config import Config, DictAction

from ..paths import config_root
from ..stack import StackError, check_cuda_operators, require
from .checks.class_checks import check_classes
from .checks.file_checks import check_data_files, check_no_pickled_data
from .files.checkpoint import fetch_checkpoint, is_mmengine_name, read_checkpoint
from .files.errors import LaunchError, shows_tracebacks
from .files.weights_file import CheckpointError, CheckpointNotFoundError
from .runner.interrupts import Interrupted, exit_without_finalizing, leave, raised_signals
from .runner.loops import RESUMABLE_LOOPS
from .settings import apply_settings

# Matches blanks within a value, except beside a comma or just inside a bracket, where they only separate.
BLANKS_WITHIN = re.compile(r'(?<=[^\s,(\[]) +(?=[^\s,)\]])')
KEPT_BLANK = '\ue000'  # private-use code point
SCOPES = ('mmdet', 'mmseg', 'mmpretrain')
# Hooks to add, unless the config has them already, perhaps with its own settings.
HOOKS_OF_TOOLS = ('CheckpointKeysHook', 'ClassNamesHook', 'LabelRangeHook', 'NonFiniteLossHook', 'SaveAtSigtermHook')


class OverridesAction(DictAction):
    """MMEngine's ``--cfg-options``, but it keeps blanks within a value, such as those of a folder's name.

    MMEngine's own drops them, and so reads other files than the named ones. A word that is not ``KEY=VALUE`` ends the
    program with a message in place of a traceback.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Sequence[str],
                 option_string: str | None = None) -> None:
        marked = []
        for word in values:
            key, equals, value = word.partition('=')
            if not key or not equals:
                parser.error(f'{option_string} takes KEY=VALUE, got {word!r}; one with blanks is written "KEY=VALUE"')
            if value.count('(') != value.count(')') or value.count('[') != value.count(']'):
                parser.error(f'{option_string}: brackets do not match in {word!r}; a list is written "KEY=[a,b]"')
            value = BLANKS_WITHIN.sub(lambda found: KEPT_BLANK * len(found[0]), value)
            marked.append(f'{key}={value}')
        super().__call__(parser, namespace, marked, option_string)
        options = getattr(namespace, self.dest)
        setattr(namespace, self.dest, {key: _with_blanks(value) for key, value in options.items()})


def _with_blanks(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_blanks, value))
    return value.replace(KEPT_BLANK, ' ') if isinstance(value, str) else value


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of the arguments that training and testing share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='path of a config, or the name of one that convneur_mm ships')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument('--cfg-options', nargs='+', action=OverridesAction, default={}, metavar='KEY=VALUE',
                        help='override settings, e.g. model.backbone.memory_cfg.chunk_size=196; a list is '
                        'written "key=[a,b]"')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher')
    parser.add_argument('--allow-pickle', action='store_true',
                        help='load checkpoints and pickled or YAML data files that hold more than tensors and plain '
                        'values, which can run any code; without it they are refused. Configs are Python programs, and '
                        'run in either case')
    # Launchers use either spelling; the value is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tools that use a trained model on pictures, as in ``apis.init_model``."""
    add = parser.add_argument
    add('config', help='path of a config, or the name of one that convneur_mm ships')
    add('checkpoint', help='path or URL of the checkpoint')
    add('--device', help='device, e.g. cpu, cuda or cuda:1 (default: the GPU if there is one, else the CPU)')
    add('--cfg-options', nargs='+', action=OverridesAction, default={}, metavar='KEY=VALUE',
        help='override settings of the config, as in tools/test.py')
    add('--allow-pickle', action='store_true', help='load a checkpoint that holds more than tensors and plain values, '
        'which can run any code; without it such a file is refused')


def run(main: Callable[[], None]) -> None:
    """Run ``main``; on user errors and signals, end with one line from each machine instead of tracebacks.

    Leave the process group that ``main`` has joined afterwards.
    """
    is_first = not int(os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or 0)
    try:
        with raised_signals():
            _run(main)
    except Interrupted as interrupted:
        leave(interrupted, f'{_node_name(os.environ)}{interrupted}' if is_first else None)
    except (LaunchError, CheckpointError) as error:
        if shows_tracebacks():
            raise
        if not is_first:
            # The first process of this machine most likely fails in the same way: its launcher then ends this one
            # before it repeats the message.
            time.sleep(1)
        print(f'error: {_node_name(os.environ)}{error}', file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            exit_without_finalizing(2)
        sys.exit(2)


def _run(main: Callable[[], None]) -> None:
    try:
        main()
        if torch.distributed.is_initialized():
            _leave_group()
    except RuntimeError:
        if torch.distributed.is_initialized():
            # Most likely a signal has ended another process, and reaches this one within this time.
            time.sleep(1)
        raise


def _leave_group() -> None:
    """Leave all process groups, including those of hooks, once every process is here, and join their threads.

    A gloo thread that drops a tensor while the interpreter shuts down would abort it, after all work is done.
    """
    # PyTorch has no public list of the groups or of their backends.
    backends = [group._get_backend(device) for group in torch.distributed.distributed_c10d._world.pg_map
                for device in group._device_types]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Freeing a backend joins its threads. Its own Python object releases the GIL meanwhile. DDP's reducer does not,
    # which deadlocks with a thread that needs the GIL to drop a tensor. So free the other owners first: the groups,
    # and the runner, whose parts refer to each other.
    gc.collect()
    del backends


def _node_name(env: Mapping[str, str]) -> str:
    """Return 'node 1 (its host name): ' from torchrun's or Slurm's variables, or '' if there is one machine."""
    torchrun = 'GROUP_WORLD_SIZE' in env
    count, node = ('GROUP_WORLD_SIZE', 'GROUP_RANK') if torchrun else ('SLURM_NNODES', 'SLURM_NODEID')
    return f'node {env[node]} ({socket.gethostname()}): ' if int(env.get(count, 1)) > 1 else ''


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
    found = isinstance(cfg, dict) and cfg.get('type') == 'SyncBN'
    if found:
        cfg['type'] = 'BN'
    for value in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(value, (dict, list)):
            found = without_sync_bn(value) or found
    return found


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torch.distributed for a process that srun started.

    MMEngine's own set-up keeps MASTER_ADDR and MASTER_PORT, and sets the others to the same values.

    Args:
        env (Mapping[str, str]): Environment, whose MASTER_ADDR and MASTER_PORT are kept.

    Returns:
        dict[str, str]: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        LaunchError: If srun did not start this process, or the address of the first node cannot be found.
    """
    for name in ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NODELIST', 'SLURM_JOB_ID'):
        if name not in env:
            raise LaunchError(f'--launcher slurm is for processes that srun starts, and {name} is not set here: use '
                              'tools/slurm_train.sh or slurm_test.sh, or without Slurm tools/dist_train.sh or '
                              'dist_test.sh')
    job, step = int(env['SLURM_JOB_ID']), int(env.get('SLURM_STEP_ID', 0))
    return dict(
        RANK=env['SLURM_PROCID'], WORLD_SIZE=env['SLURM_NTASKS'], LOCAL_RANK=env['SLURM_LOCALID'],
        MASTER_ADDR=env.get('MASTER_ADDR') or _first_slurm_node(env),
        # Jobs and their steps may share a node, so each gets its own port, below those that Linux gives to clients.
        MASTER_PORT=env.get('MASTER_PORT') or str(12000 + (job + 1009 * step) % 20000))


def _first_slurm_node(env: Mapping[str, str]) -> str:
    nodes = env.get('SLURM_STEP_NODELIST') or env['SLURM_NODELIST']
    if not shutil.which('scontrol'):
        raise LaunchError(f'scontrol, which names the first of the nodes {nodes}, was not found: set MASTER_ADDR to '
                          'that node\'s address')
    done = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True)
    if done.returncode or not done.stdout.split():
        raise LaunchError(f'scontrol does not name the first of the nodes {nodes} ({done.stderr.strip()}): set '
                          'MASTER_ADDR to that node\'s address')
    return done.stdout.split()[0]


def set_up_processes(cfg: Config) -> None:
    """Join the process group over gloo if there is no GPU; with GPUs, MMEngine joins it over NCCL.

    MMEngine's own set-up asks for a CUDA device whatever the backend, and its DDP wrapper names one. Both leave an
    existing process group and an explicit ``model_wrapper_cfg`` alone. The launcher's variables (RANK, WORLD_SIZE, …)
    are read from the environment.

    Raises:
        LaunchError: If there are more processes than GPUs on this machine, or not all processes join.
    """
    use_new_store()
    if torch.cuda.is_available():
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', int(os.environ['LOCAL_RANK']) + 1))
        if processes > torch.cuda.device_count():
            raise LaunchError(f'{processes} processes were asked for, but {torch.cuda.device_count()} GPUs are visible')
        return
    processes = int(os.environ['WORLD_SIZE'])
    if os.environ['RANK'] == '0':
        print(f'note: {why_no_gpu()}; {processes} CPU process{"es" * (processes > 1)} over gloo instead',
              file=sys.stderr, flush=True)
    seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
    try:
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
    except (RuntimeError, OSError) as error:
        raise LaunchError(f'the {processes} processes did not all join within {seconds} s '
                          f'({str(error).splitlines()[0]}); see what the others printed, on every machine') from None
    cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    if not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False))


def use_new_store() -> None:
    """Make processes that torchrun has restarted find each other in a new store, by their variables.

    torchrun keeps one store for all its starts. In that store, PyTorch would give a process the addresses of earlier
    ones, which are gone.
    """
    env = os.environ
    start = env.get('TORCHELASTIC_RESTART_COUNT', '0')
    if start == '0' or env.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return
    store = torch.distributed.TCPStore(env['MASTER_ADDR'], int(env['MASTER_PORT']), is_master=False)
    key = f'convneur_mm/port_of_start_{start}'
    if env['RANK'] == '0':
        with socket.socket() as probe:
            probe.bind(('', 0))
            store.set(key, str(probe.getsockname()[1]))
    # The first process runs at MASTER_ADDR, and serves the new store.
    env.update(MASTER_PORT=store.get(key).decode(), TORCHELASTIC_USE_AGENT_STORE='False')


def why_no_gpu() -> str:
    """Return why torch finds no usable CUDA device, and what helps."""
    if not torch.backends.cuda.is_built():
        return f'torch {torch.__version__} is a build without CUDA'
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    else:
        reason = 'torch.cuda.is_available() is false'
    if reason.startswith('Found no NVIDIA driver'):
        return 'there is no NVIDIA driver here'
    too_old = re.search(r'driver on your system is too old \(found version (\d+)\)', reason)
    if not too_old:
        return f'no usable CUDA device: {reason}'
    driver = int(too_old[1])
    return (f'no usable CUDA device: the NVIDIA driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, torch '
            f'{torch.__version__} for CUDA {torch.version.cuda}: install a newer driver, or make an environment with '
            'another torch (tools/setup_env.sh with TORCH_INDEX_URL)')
