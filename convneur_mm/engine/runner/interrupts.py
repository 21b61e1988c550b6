"""End a run at Ctrl-C or SIGTERM with one line that names the newest checkpoint.

A training that :class:`..hooks.sigterm.SaveAtSigtermHook` watches saves before SIGTERM ends it.
"""
from __future__ import annotations

import logging
import multiprocessing
import os
import os.path as osp
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace, TracebackType
from typing import NoReturn

import torch.distributed
from mmengine.runner import Runner

from ..files.checkpoint import read_checkpoint
from ..files.resume import saved_checkpoints
from ..files.weights_file import CheckpointError, UnsafeCheckpointError

NAMES = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
# Launchers repeat a signal for processes that have got it already, within this many seconds.
REPEATED_WITHIN = 1.0

# State of raised_signals(): whether to defer SIGTERM, whether it was received, and since when the process is ending.
signals = SimpleNamespace(sigterm_deferred=False, sigterm_received=False, ending_since=None)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the run.

    Args:
        signum (int): SIGINT or SIGTERM.

    Attributes:
        advice (str): Text of the message after the name of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.advice = ''

    def __str__(self) -> str:
        return f'ended by {NAMES[self.signum]} {self.advice}'.strip()


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise :class:`Interrupted` in the main thread at the first SIGINT or SIGTERM; a second one ends the process.

    While ``signals.sigterm_deferred`` is set, SIGTERM only sets ``signals.sigterm_received``.
    """
    process = os.getpid()
    signals.sigterm_deferred = signals.sigterm_received = False
    signals.ending_since = None

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            # In a forked child: the main process, which gets Ctrl-C too, ends it.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        # PyTorch's own handler raises an error if the signal has also ended a data worker. SIG_IGN would make Python
        # report an error for a SIGCHLD that has already arrived.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if signum == signal.SIGTERM and signals.sigterm_deferred:
            signals.sigterm_received = True
        elif signals.ending_since is None:
            signals.ending_since = time.monotonic()
            raise Interrupted(signum)
        elif time.monotonic() - signals.ending_since > REPEATED_WITHIN:
            os._exit(128 + signum)

    previous = {signum: signal.signal(signum, handle) for signum in NAMES}
    try:
        yield
    finally:
        signals.sigterm_received = False
        if signals.ending_since is None:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def begin_worker(begin: Callable[[int], object] | None, number: int) -> None:
    """Set up a data worker that only the main process ends, because saving may need further batches.

    Slurm and torchrun signal all processes of a run, and a terminal sends Ctrl-C to all.

    Args:
        begin (Callable | None): What else the data loader makes its workers do at first.
        number (int): Number of the worker.
    """
    if begin is not None:
        begin(number)
    report = sys.excepthook

    def report_others(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The connection breaks if the main process ends while it takes a batch.
        if not issubclass(kind, ConnectionError):
            report(kind, error, trace)

    sys.excepthook = report_others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_at_sigterm_of_parent, daemon=True).start()


def _exit_at_sigterm_of_parent() -> NoReturn:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)  # PyTorch treats any other code as an error


def leave(interrupted: Interrupted, message: str | None) -> NoReturn:
    """Print the message, if this process has one, and end the process without a traceback.

    The exit code is what a shell reports for a program that the signal ended.
    """
    if message:
        print(message, file=sys.stderr, flush=True)
    code = 128 + interrupted.signum
    if torch.distributed.is_initialized():
        exit_without_finalizing(code)
    _end_logs_and_workers()
    for signum in NAMES:
        signal.signal(signum, signal.SIG_DFL)
    sys.exit(code)


def exit_without_finalizing(code: int) -> NoReturn:
    """End one of several processes with this exit code, while the others end or have ended.

    The interpreter is not shut down: gloo's threads would sometimes abort it, and torchrun would see another exit code.
    """
    _end_logs_and_workers()
    sys.stdout.flush()
    os._exit(code)


def _end_logs_and_workers() -> None:
    logging.shutdown()
    for child in multiprocessing.active_children():
        child.kill()  # PyTorch would wait five seconds for each data worker


@contextmanager
def report_on_interrupt(runner: Runner, trains: bool = True) -> Iterator[None]:
    """Save what is to be saved when a signal ends a training or a test, and name the newest checkpoint.

    Args:
        runner (Runner): Runner of the training or test.
        trains (bool): Whether it is a training. Defaults to True.
    """
    try:
        try:
            yield
        except RuntimeError as error:
            # Most likely SIGTERM has ended a data worker or another process, and this error reports the loss.
            if signals.sigterm_received:
                raise Interrupted(signal.SIGTERM) from error
            signals.sigterm_deferred = False
            raise
    except Interrupted as interrupted:
        signals.sigterm_deferred = True  # a repeated signal must not end the save
        signals.ending_since = signals.ending_since or time.monotonic()
        if interrupted.signum == signal.SIGTERM:
            for hook in runner.hooks:
                if hasattr(hook, 'save_interrupted'):
                    hook.save_interrupted(runner)
        runner.visualizer.close()
        newest = next(filter(_is_intact, saved_checkpoints(runner.work_dir)), None)
        if not trains:
            interrupted.advice = 'without results'
        elif newest:
            interrupted.advice = f'(newest checkpoint: {osp.relpath(newest)}); to go on, add --resume'
        else:
            interrupted.advice = 'before a checkpoint was saved'
        raise


def _is_intact(path: str) -> bool:
    try:
        osp.isdir(path) or read_checkpoint(path, mmap=True)
    except UnsafeCheckpointError:
        return True
    except CheckpointError:
        return False
    return True
