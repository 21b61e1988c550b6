#!/usr/bin/env python
"""Predict pictures, a folder of them or a video: write the predictions, and draw them.

    tools/infer.py CONFIG CHECKPOINT photo.jpg
    tools/infer.py cascade_rcnn_convneur_m3_1x_coco work_dirs/m3/epoch_12.pth photos --out-dir found
    tools/infer.py CONFIG CHECKPOINT street.mp4 --stream

Subfolders are searched too. docs/inference.md describes the output. The exit code is 1 if a picture could not be read,
and 2 if nothing could be done.
"""
import argparse
import math
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __name__ == '__main__':
    # Without this, Ctrl-C during the imports would print a traceback. Later, launch.run reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from _environment import prepare
    prepare()

import cv2
import numpy as np
from mmengine.model import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convneur_mm.apis import ImageError, init_model, iter_inference
from convneur_mm.apis.results import Painter, open_results
from convneur_mm.engine import launch
from convneur_mm.engine.runner.interrupts import Interrupted
from convneur_mm.models.stream import stream
from convneur_mm.stack import require

PICTURES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_model_arguments(parser)
    parser.add_argument('input', type=Path, help=f'picture, folder of pictures ({" ".join(PICTURES)}) or video '
                        f'({" ".join(VIDEOS)})')
    parser.add_argument('--out-dir', type=Path, default=Path('predictions'), metavar='DIR',
                        help='output folder; files of the same names are replaced (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='pictures per batch; only '
                        'pictures of the same size share a batch (default: %(default)s)')
    parser.add_argument('--stream', action='store_true', help='carry the memories of a ConvNeur from frame to '
                        'frame of a video, or of a folder of frames sorted by number; see docs/stream.md')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='SCORE', help='minimum score of detections '
                        'to draw; all are written to the file (default: %(default)s)')
    parser.add_argument('--no-pictures', action='store_true', help='skip drawing, which takes longer than the '
                        'prediction of a small model')
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f'--batch-size must be at least 1, got {args.batch_size}')
    if args.stream and args.batch_size != 1:
        parser.error(f'--stream takes one frame after the other, got --batch-size {args.batch_size}')
    return args


def main() -> None:
    args = parse_args()
    is_video = args.input.suffix.lower() in VIDEOS and not args.input.is_dir()
    check_out_dir(args, is_video)
    paths = [] if is_video else find_pictures(args.input, args.out_dir)
    if args.stream:
        paths = in_order(paths, args.input)
    with open_video(args.input) if is_video else ExitStack() as video:
        # Check the input before importing the packages, which takes seconds.
        checkpoint = launch.readable_checkpoint(args.checkpoint, 'checkpoint', args.allow_pickle)
        model = init_model(args.config, checkpoint, args.device, args.cfg_options, args.allow_pickle)
        try:
            args.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise launch.LaunchError(f'--out-dir {args.out_dir} cannot be made: {error.strerror}') from None
        with ExitStack() as stack:
            if args.stream:
                carry_memories(model, stack)
            unreadable = predict_video(model, video, args) if is_video else predict_pictures(model, paths, args)
    if unreadable:
        print(f'error: {unreadable} of {len(paths)} pictures could not be read, see above', file=sys.stderr)
        sys.exit(1)


def check_out_dir(args: argparse.Namespace, is_video: bool) -> None:
    """Raise a LaunchError if the output would replace the input."""
    folder = (args.input if args.input.is_dir() else args.input.parent).resolve()
    if is_video:
        replaced = drawn_video(args).resolve() == args.input.resolve()
    else:
        replaced = (args.input.is_dir() and folder == args.out_dir.resolve()) or any(
            folder.is_relative_to((args.out_dir / name).resolve()) for name in ('pictures', 'labels'))
    if replaced:
        raise launch.LaunchError(f'--out-dir {args.out_dir} would mix what is written with {args.input}: name another '
                                 'folder')


def find_pictures(path: Path, out_dir: Path) -> list[Path]:
    """Return the pictures in a folder and below it, sorted, without hidden files and the files in ``out_dir``.

    Raises:
        LaunchError: If there are none, or ``path`` does not exist.
    """
    if not path.exists():
        raise launch.LaunchError(f'no such picture, folder or video: {path}')
    if not path.is_dir():
        return [path]
    folder, out_dir = path.resolve(), out_dir.resolve()
    written = out_dir if out_dir.is_relative_to(folder) else None
    files = [file for file in sorted(path.rglob('*')) if file.is_file()
             and not any(part.startswith('.') for part in file.relative_to(path).parts)
             and not (written and (folder / file.relative_to(path)).is_relative_to(written))]
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    if not pictures:
        raise launch.LaunchError(f'{path} holds no pictures ({" ".join(PICTURES)}) but {len(files)} other files')
    return pictures


def in_order(paths: list[Path], folder: Path) -> list[Path]:
    """Sort the frames of one video by the numbers in their names, with or without leading zeros.

    Raises:
        LaunchError: If the frames are in several folders.
    """
    folders = sorted({str(path.parent) for path in paths})
    if len(folders) > 1:
        raise launch.LaunchError(f'--stream takes the frames of one video, and the pictures of {folder} are in '
                                 f'{len(folders)} folders, such as {folders[0]} and {folders[1]}')
    return sorted(paths, key=lambda path: [(int(part), '') if part.isdigit() else (-1, part)
                                           for part in re.split('([0-9]+)', path.name)])


def carry_memories(model: BaseModel, stack: ExitStack) -> None:
    """Make each picture start from the memories of the one before, until ``stack`` ends.

    Raises:
        LaunchError: If the model has no memories, or predicts a picture in several calls.
    """
    if (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide':
        raise launch.LaunchError("--stream needs one call of the backbone for a frame, and model.test_cfg.mode is "
                                 "'slide': set --cfg-options model.test_cfg.mode=whole")
    try:
        stack.enter_context(stream(model))
    except ValueError as error:
        raise launch.LaunchError(f'--stream: {error}') from None


def output_names(paths: list[Path], folder: Path) -> list[str]:
    """Return each picture's path below ``folder``, without suffixes unless two pictures differ only in them."""
    files = [path.relative_to(folder) for path in paths]
    names = [file.with_suffix('').as_posix() for file in files]
    if max(Counter(names).values()) == 1:
        return names
    return [file.as_posix() for file in files]


def predict_pictures(model: BaseModel, paths: list[Path], args: argparse.Namespace) -> int:
    """Write and draw the predictions of pictures; return how many could not be read."""
    folder = args.input if args.input.is_dir() else args.input.parent
    names = output_names(paths, folder)
    errors = 0

    def report(index: int, error: ImageError) -> None:
        nonlocal errors
        errors += 1
        progress.console.print(f'unreadable: {error}', markup=False, highlight=False, soft_wrap=True)
        progress.advance(task)

    imwrite = require('mmcv').imwrite
    with working(len(paths), args) as (progress, task), open_results(model, args.out_dir) as results:
        painter = None if args.no_pictures else Painter(model, args.score_thr)
        for index, picture, sample in iter_inference(model, paths, args.batch_size, report):
            results.add(names[index], paths[index].relative_to(folder).as_posix(), sample)
            if painter:
                imwrite(painter(picture, sample), str(args.out_dir / 'pictures' / f'{names[index]}.jpg'))
            progress.advance(task)
    say_where(results.path, painter and args.out_dir / 'pictures')
    return errors


@contextmanager
def working(total: int | None, args: argparse.Namespace) -> Iterator[tuple[Progress, int]]:
    """Show a progress bar; after a signal, report how many predictions are finished."""
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task('predicting', total=total)
        try:
            yield progress, task
        except Interrupted as interrupted:
            done = int(progress.tasks[task].completed)
            interrupted.advice = f'after {done} of {total or "the"} pictures; their results are in {args.out_dir}'
            raise


def say_where(results: Path, drawn: Path | None) -> None:
    print(f'predictions: {results}' + (f', drawn: {drawn}' if drawn else ''))


@contextmanager
def open_video(path: Path) -> Iterator[cv2.VideoCapture]:
    """Open a video.

    Raises:
        LaunchError: If there is no such file, or OpenCV cannot read it.
    """
    if not path.is_file():
        raise launch.LaunchError(f'no such picture, folder or video: {path}')
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise launch.LaunchError(f'{path} is no video that OpenCV {cv2.__version__} can read, or damaged')
        yield capture
    finally:
        capture.release()


def drawn_video(args: argparse.Namespace) -> Path:
    return args.out_dir / f'{args.input.stem}.mp4'


def frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        found, frame = capture.read()
        if not found:
            return
        yield frame


def predict_video(model: BaseModel, capture: cv2.VideoCapture, args: argparse.Namespace) -> int:
    """Write the predictions of a video's frames, and draw them into another video; frames are not kept."""
    total, rate = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
    if not (math.isfinite(rate) and rate > 0):
        print(f'note: {args.input} does not say its frames per second; 25 are written', file=sys.stderr)
        rate = 25.0
    path = drawn_video(args)
    with working(int(total) if total > 0 else None, args) as (progress, task), ExitStack() as stack:
        results = stack.enter_context(open_results(model, args.out_dir))
        painter, writer = None if args.no_pictures else Painter(model, args.score_thr), None
        for index, picture, sample in iter_inference(model, frames(capture), args.batch_size):
            name = f'{index:06}'
            results.add(name, name, sample)
            if painter:
                drawn = painter(picture, sample)
                writer = writer or open_writer(path, rate, drawn.shape[1::-1], stack)
                writer.write(drawn)
            progress.advance(task)
        number = int(progress.tasks[task].completed)
    if not number:
        raise launch.LaunchError(f'{args.input} has no frame that can be read')
    if total > 0 and number != total:
        print(f'note: {number} frames of {args.input} could be read; by its header there are {total:.0f}',
              file=sys.stderr)
    say_where(results.path, painter and path)
    return 0


def open_writer(path: Path, rate: float, size: tuple[int, int], stack: ExitStack) -> cv2.VideoWriter:
    """Open a video for writing frames of ``size`` (width, height); it is closed with ``stack``.

    Raises:
        LaunchError: If OpenCV cannot write one.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), rate, size)
    stack.callback(writer.release)
    if not writer.isOpened():
        raise launch.LaunchError(f'OpenCV {cv2.__version__} cannot write the video {path}; --no-pictures writes the '
                                 'predictions alone')
    return writer


if __name__ == '__main__':
    launch.run(main)
