"""Find the checkpoint to resume a training from."""
from __future__ import annotations

import json
import os
import os.path as osp
import re
from collections.abc import Mapping
from pathlib import Path

from mmengine.dist import all_gather_object
from mmengine.logging import MMLogger

from .checkpoint import read_checkpoint
from .errors import LaunchError
from .weights_file import CheckpointError, UnsafeCheckpointError
from .whole_files import write_whole


def latest_checkpoint(work_dir: str, config: str, allow_pickle: bool) -> str:
    """Return the newest intact checkpoint of a work dir, and log damaged ones.

    Args:
        work_dir (str): Folder where MMEngine saved ``epoch_*.pth`` or ``iter_*.pth``, and wrote the newest one's path
            to ``last_checkpoint``.
        config (str): Path of the config, to find other work dirs of it.
        allow_pickle (bool): Whether a file that holds more than weights may be the result. Its code is not run here.

    Raises:
        LaunchError: If there is no checkpoint, all are damaged, or the newest one needs pickle and may not use it.
    """
    path, error = _newest_intact(saved_checkpoints(work_dir), allow_pickle)
    if path:
        return path
    if error:
        raise LaunchError(f'--resume: no checkpoint in {work_dir} is intact: {error}')
    raise LaunchError(f'--resume: no checkpoint in {work_dir}{_others(work_dir, config)}; name the work dir of the '
                      'earlier run with --work-dir, or a file with --resume CHECKPOINT, or leave --resume out for a '
                      'first start')


def _newest_intact(paths: list[str], allow_pickle: bool) -> tuple[str | None, CheckpointError | None]:
    """Return the first intact checkpoint of ``paths``, and the error of the last damaged one before it."""
    error = None
    for path in paths:
        if osp.isdir(path):
            return path, error  # MMEngine's other strategies save a folder of parts
        try:
            read_checkpoint(path, mmap=True)
            return path, error
        except UnsafeCheckpointError as unsafe:
            if allow_pickle:
                return path, error
            raise LaunchError(f'--resume: {unsafe}') from None
        except CheckpointError as damaged:
            error = damaged
            MMLogger.get_current_instance().warning(f'--resume goes on from an older checkpoint: {damaged}')
    return None, error


def checkpoint_after_restart(work_dir: str, allow_pickle: bool, env: Mapping[str, str] = os.environ) -> str | None:
    """Return the newest intact checkpoint that this launch has saved, after torchrun has restarted its processes.

    At its first start, the first process of each machine records the checkpoints of earlier runs, which do not count.

    Args:
        work_dir (str): Work dir of the run.
        allow_pickle (bool): See :func:`latest_checkpoint`.
        env (Mapping[str, str]): Environment with the folder that tools/_torchrun.py keeps for the launch. Defaults to
            :data:`os.environ`.

    Returns:
        str | None: None if nothing was saved yet, or the processes were started in another way.

    Raises:
        LaunchError: If the newest one needs pickle and that is not allowed.
    """
    if 'CONVNEUR_LAUNCH_DIR' not in env:
        return None
    record = Path(env['CONVNEUR_LAUNCH_DIR'], 'earlier_checkpoints.json')
    # A file that is saved again under the name of an earlier one has another time.
    saved = {path: [osp.realpath(path), os.stat(path).st_mtime_ns] for path in saved_checkpoints(work_dir)
             if osp.exists(path)}
    if not record.exists():
        if env['LOCAL_RANK'] == '0':
            write_whole(record, json.dumps(list(saved.values())).encode())
        return None
    earlier = json.loads(record.read_text())
    return _newest_intact([path for path, file in saved.items() if file not in earlier], allow_pickle)[0]


def check_same_checkpoint(filename: str | None) -> None:
    """Check that all processes resume from the same checkpoint; all must call this at the same time.

    Raises:
        LaunchError: If they do not, as the work dirs of several nodes may differ.
    """
    names = all_gather_object(filename and osp.basename(filename))
    if len(set(names)) > 1:
        found = ', '.join(f'process {rank} {name or "none"}' for rank, name in enumerate(names))
        raise LaunchError(f'the processes found different checkpoints to resume from ({found}): the work dir must be '
                          'in a file system that all nodes share')


def saved_checkpoints(work_dir: str) -> list[str]:
    """Return the checkpoints of a work dir: first the one that ``last_checkpoint`` names, then by falling number."""
    record = Path(work_dir, 'last_checkpoint')
    # A run that is killed while MMEngine writes the record leaves only a part of the name, or nothing.
    name = record.read_text().strip() if record.is_file() else ''
    newest = [name] if name else []
    numbers = {str(path): int(match[1]) for path in Path(work_dir).glob('*.pth')
               if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))}
    others = [path for path in numbers if osp.realpath(path) not in map(osp.realpath, newest)]
    return newest + sorted(others, key=numbers.get, reverse=True)


def _others(work_dir: str, config: str) -> str:
    """Name work dirs near this one with checkpoints of the same config, the latest first."""
    name = osp.splitext(osp.basename(config))[0]
    parents = {Path(work_dir).parent, Path('work_dirs')}
    records = {osp.realpath(record): record for parent in parents for depth in ('*', '*/*')
               for record in parent.glob(f'{depth}/last_checkpoint')}
    # MMEngine writes the config of a run into its work dir.
    dirs = [record.parent for record in sorted(records.values(), key=osp.getmtime, reverse=True)
            if record.with_name(f'{name}.py').is_file() and saved_checkpoints(str(record.parent))]
    if not dirs:
        return ''
    shown = ', '.join(f'{folder} ({osp.basename(saved_checkpoints(str(folder))[0])})' for folder in dirs[:3])
    return f', but in {shown}{", …" if len(dirs) > 3 else ""} of the same config'
