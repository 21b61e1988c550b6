"""Parallel decoding of images, and the paths and options shared by all checks."""
from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from mmengine.utils import digit_version
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

from ..shapes import checked_int
from .report import Fault

MAX_WORKERS = 1024

_EXIF_ORIENTATION = 0x0112
# EXIF orientations that swap width and height.
_TURNED = (5, 6, 7, 8)
# Formats that OpenCV turns; Pillow turns TIFF by itself.
_TURNED_FORMATS = ('JPEG', 'MPO', 'PNG', *(['WEBP'] if digit_version(cv2.__version__) >= digit_version('4.13') else []))

_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


def checked_workers(workers: int | None) -> int:
    if workers is not None:
        return checked_int('workers', workers, 1, MAX_WORKERS)
    # The cores that this process may use, where the system tells, since a job often has a share of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def existing_file(path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f'no such file: {path}')
    return Path(path)


def existing_folder(path: str | os.PathLike[str]) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f'no such folder: {path}')
    if not Path(path).is_dir():
        raise NotADirectoryError(f'not a folder: {path}')
    return Path(path)


def files_under(folder: Path) -> Iterator[str]:
    """Yield the files below a folder as mmengine lists them, relative to it, without hidden files, following links."""
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if not name.startswith('.'):
                yield Path(parent, name).relative_to(folder).as_posix()


def decode_image(path: str) -> tuple[Fault | None, tuple[int, int] | None, tuple[int, int] | None]:
    """Return a fault, or an image's size (W, H) as training will see it and as it is stored.

    Pillow decodes it, since it requires the last byte, where OpenCV may fill in missing data. Formats other than JPEG
    are also decoded by OpenCV, which rejects some damage that Pillow ignores, and some pixel formats.
    """
    try:
        with Image.open(path) as image:
            stored, size = image.size, seen_size(image)
            # For JPEG at an eighth of the size, in grey: this reads the whole file in half the time.
            image.draft('L', (max(stored[0] // 8, 1), max(stored[1] // 8, 1)))
            image.load()
            kind, mode = image.format, image.mode
        if not cv2.haveImageReader(path):
            reason = f'is {kind}, which OpenCV cannot read, and so training cannot'
            return Fault(path, 'unknown format', reason), None, None
        if kind not in ('JPEG', 'MPO') and cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) is None:
            reason = f'does not decode: OpenCV, and so training, cannot read this {kind} (mode {mode} of Pillow)'
            return Fault(path, 'unreadable', reason), None, None
    except Exception as error:
        return unreadable(path, error), None, None
    return None, size, stored


def seen_size(image: Image.Image) -> tuple[int, int]:
    """Return an open image's width and height as training and inference see it, turned by its EXIF orientation."""
    turned = image.format in _TURNED_FORMATS and image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    return image.size[::-1] if turned else image.size


def too_large(path: str) -> Fault | None:
    """Return a fault if an image has more pixels than Pillow decodes, 179 million, judged only by its header.

    OpenCV, which decodes images in training and inference, would need gigabytes for a file of a few kilobytes. Files
    that Pillow does not recognise pass.
    """
    try:
        with Image.open(path):
            return None
    except Image.DecompressionBombError as error:
        return unreadable(path, error)
    except Exception:  # a damaged file can make Pillow raise any exception
        return None


def label_fault(label: Image.Image) -> str | None:
    """Return why an open picture is not a label map, or None if it is one.

    The colour indices of a palette count as labels: mmseg reads label maps with Pillow, and casts them to 8 bit.
    """
    if label.mode not in ('L', 'P'):
        return f'must have one channel of 8 bit, got mode {label.mode} of Pillow'
    if label.format in ('JPEG', 'MPO'):
        return f'is {label.format}, which changes labels at the edges of objects: a label map must be PNG'
    return None


def unreadable(path: str, error: Exception) -> Fault:
    # A damaged file makes Pillow raise any exception, depending on the format and the place of the damage.
    if isinstance(error, FileNotFoundError):
        return Fault(path, 'missing', 'does not exist')
    if isinstance(error, Image.DecompressionBombError):
        sizes = str(error).partition(',')[0]
        return Fault(path, 'too large', f'is too large to be decoded ({sizes}): cut it into tiles')
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.getsize(path) == 0
        return Fault(path, 'unreadable', 'is empty' if empty else 'is no image')
    return Fault(path, 'unreadable', f'does not decode: {str(error) or type(error).__name__}')


class _RateColumn(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f'{speed:.0f} images/s' if speed else '')


def in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> Iterator[_Result]:
    """Yield ``function`` of each item, in order, computed by ``workers`` processes, with a progress bar."""
    if not items:
        return
    workers = min(workers, len(items))
    # On Linux, fork saves the workers seconds of imports. Elsewhere it is missing or unsafe.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), _RateColumn(),
               TimeRemainingColumn())
    try:
        # The processes start here, before the progress bar starts a thread: forking with threads may deadlock.
        results = pool.map(function, items, chunksize=max(1, min(32, len(items) // (4 * workers))))
        with Progress(*columns, console=Console(stderr=True)) as progress:
            yield from progress.track(results, total=len(items), description='checking')
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # The parent handles Ctrl-C; without this every worker would print its own traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Pillow's warnings are not faults, and would break the progress bar.
    warnings.simplefilter('ignore')
