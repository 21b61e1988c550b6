"""Process groups: join one from the variables of torchrun or Slurm, and leave it."""
from __future__ import annotations

import gc
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed
from mmengine.config import Config

from ..files.errors import LaunchError


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


def leave_group() -> None:
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


def node_name(env: Mapping[str, str]) -> str:
    """Return 'node 1 (its host name): ' from torchrun's or Slurm's variables, or '' if there is one machine."""
    torchrun = 'GROUP_WORLD_SIZE' in env
    count, node = ('GROUP_WORLD_SIZE', 'GROUP_RANK') if torchrun else ('SLURM_NNODES', 'SLURM_NODEID')
    return f'node {env[node]} ({socket.gethostname()}): ' if int(env.get(count, 1)) > 1 else ''


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
