"""Write files whole or not at all: under another name first, and renamed when they are complete."""
from __future__ import annotations

import os
import os.path as osp
import shutil
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.utils import mkdir_or_exist

from .errors import LaunchError

# Suffix of a file's name while it is written. A process that is killed meanwhile leaves such a file behind.
SUFFIX = '.saving'


class NotSavedError(LaunchError, OSError):
    """A file cannot be written; the message is one line with its name, its size and the free space."""


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file; an existing one stays as it is until the new one is on the disk.

    Args:
        path (str | os.PathLike): Path of the file. Its folder must exist.
        data (bytes): Content of the file.

    Raises:
        NotSavedError: If it cannot be written, as when the disk is full. The part written so far is removed.
    """
    part = f'{os.fspath(path)}{SUFFIX}'
    try:
        with open(part, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(part)
        if isinstance(error, OSError):
            raise NotSavedError(_reason(path, len(data), error)) from error
        raise
    _sync_folder(osp.dirname(part) or '.')


def _reason(path: str | os.PathLike, size: int, error: OSError) -> str:
    folder = osp.dirname(path) or '.'
    with suppress(OSError):
        free = f', and {_megabytes(shutil.disk_usage(folder).free)} are free in {folder}'
        return f'{path} was not saved ({error.strerror}): it takes {_megabytes(size)}{free}; make room, and run the ' \
               'command again, a training with --resume'
    return f'{path} was not saved ({error.strerror})'


def _megabytes(size: int) -> str:
    return f'{size / 1e6:,.1f} MB'


def _sync_folder(folder: str) -> None:
    """Flush a new name to the disk if the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_parts(*folders: str) -> None:
    """Remove partial files that killed processes left in these folders."""
    for folder in {osp.realpath(folder) for folder in folders}:
        for path in Path(folder).glob(f'*{SUFFIX}'):
            path.unlink()


class WholeFileBackend(LocalBackend):
    """Write local files for MMEngine, but never in place."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write ``obj`` with :func:`write_whole`, and make the folder if it does not exist."""
        mkdir_or_exist(osp.dirname(filepath))
        write_whole(filepath, obj)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write text as :meth:`put` writes bytes."""
        self.put(obj.encode(encoding), filepath)


def write_files_whole() -> None:
    """Make MMEngine write all local files of this process whole from now on."""
    register_backend('local', WholeFileBackend, prefixes='', force=True)
