"""Which checkpoint a training goes on from."""
from __future__ import annotations

import os.path as osp
import re
from pathlib import Path

from mmengine.logging import MMLogger

from .checkpoint import read_checkpoint
from .errors import LaunchError
from .weights_file import CheckpointError, UnsafeCheckpointError


def latest_checkpoint(work_dir: str, config: str, allow_pickle: bool) -> str:
    """The newest intact checkpoint of a work dir; damaged ones are named in the log.

    Args:
        work_dir (str): Where MMEngine saved ``epoch_*.pth`` or ``iter_*.pth``, and wrote the newest one's path to
            ``last_checkpoint``.
        config (str): Path of the config, to find other work dirs of it.
        allow_pickle (bool): Whether files that hold more than weights are loaded too. They are not looked into, as
            their code would run twice.

    Raises:
        LaunchError: If there is none, the newest one needs pickle and that is not allowed, or each one is damaged.
    """
    error = None
    for path in saved_checkpoints(work_dir):
        if osp.isdir(path):
            return path  # saved in parts by MMEngine's other strategies
        try:
            if not (allow_pickle and osp.isfile(path)):
                read_checkpoint(path, mmap=True)
            return path
        except UnsafeCheckpointError as unsafe:
            raise LaunchError(f'--resume: {unsafe}') from None
        except CheckpointError as damaged:
            error = damaged
            MMLogger.get_current_instance().warning(f'--resume goes on from an older checkpoint: {damaged}')
    if error:
        raise LaunchError(f'--resume: no checkpoint in {work_dir} is intact: {error}')
    raise LaunchError(f'--resume: no checkpoint in {work_dir}{_others(work_dir, config)}; name the work dir of the '
                      'earlier run with --work-dir, or a file with --resume CHECKPOINT, or leave --resume out for a '
                      'first start')


def saved_checkpoints(work_dir: str) -> list[str]:
    """Paths of the checkpoints of a work dir: first that of the record ``last_checkpoint``, then by falling number."""
    record = Path(work_dir, 'last_checkpoint')
    newest = [record.read_text().strip()] if record.is_file() else []
    numbers = {str(path): int(match[1]) for path in Path(work_dir).glob('*.pth')
               if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))}
    others = [path for path in numbers if osp.realpath(path) not in map(osp.realpath, newest)]
    return newest + sorted(others, key=numbers.get, reverse=True)


def _others(work_dir: str, config: str) -> str:
    """Names work dirs near this one with checkpoints of the same config, the latest first."""
    name = osp.splitext(osp.basename(config))[0]
    parents = {Path(work_dir).parent, Path('work_dirs')}
    records = {osp.realpath(record): record for parent in parents for depth in ('*', '*/*')
               for record in parent.glob(f'{depth}/last_checkpoint')}
    # MMEngine writes the config of a run into its work dir.
    dirs = [record.parent for record in sorted(records.values(), key=osp.getmtime, reverse=True)
            if record.with_name(f'{name}.py').is_file()]
    if not dirs:
        return ''
    shown = ', '.join(f'{folder} ({osp.basename(next(iter(saved_checkpoints(str(folder)))))})' for folder in dirs[:3])
    return f', but in {shown}{", …" if len(dirs) > 3 else ""} of the same config'
