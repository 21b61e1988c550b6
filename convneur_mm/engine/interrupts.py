"""Ctrl-C and SIGTERM end a run with one line that says what was saved, and how to go on.

A training that :class:`.sigterm.SaveAtSigtermHook` watches saves before SIGTERM ends it.
"""
from __future__ import annotations

import argparse
import logging
import mmap
import multiprocessing
import os
import os.path as osp
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed
from mmengine.runner import Runner

from .checkpoint import read_checkpoint
from .resume import saved_checkpoints
from .weights_file import CheckpointError, UnsafeCheckpointError

NAMES = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
# Seconds that a data worker goes on after SIGTERM, if that is held back in the main process.
WORKERS_STAY = 60.0


class Interrupted(KeyboardInterrupt):
    """A signal that ends the run.

    Args:
        signum (int): Of SIGINT or SIGTERM.

    Attributes:
        advice (str): What the line says beside the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.advice = 'before the run began'

    def __str__(self) -> str:
        return f'ended by {NAMES[self.signum]} {self.advice}'


class _Sigterm:
    """What becomes of SIGTERM within :func:`raised_signals`.

    Attributes:
        came (bool): Whether it was noted.
    """

    came = False

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nothing is held back, by a process and all forks that it makes from now on."""
        self._held = mmap.mmap(-1, 1)
        self.came = False

    @property
    def held(self) -> bool:
        """Whether it is only noted. Data workers see when the main process does so no longer: it has done with them."""
        return bool(self._held[0])

    @held.setter
    def held(self, value: bool) -> None:
        self._held[0] = value


sigterm = _Sigterm()


def ignore_lost_connections() -> None:
    """For data workers: a main process that ends while it takes a batch has nothing to do with them."""
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError):
            report(kind, error, trace)

    sys.excepthook = hook


@cache
def watch_forks() -> None:
    """Has all further forks of this process :func:`ignore_lost_connections`, which cannot be taken back."""
    os.register_at_fork(after_in_child=ignore_lost_connections)


@contextmanager
def raised_signals() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise :class:`Interrupted` in the main thread, until :func:`no_more_signals`.

    Python drops an exception within a destructor or a fork, so it is raised again as long as it is not caught.
    """
    process = os.getpid()
    sigterm.begin()
    watch_forks()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            # A data worker, which the main process will end, or which has lost it. Another exit code than 0 would have
            # PyTorch raise an error in a main process that ends its workers as it exits.
            if signum == signal.SIGTERM and not sigterm.held:
                os._exit(0)
            if signum == signal.SIGTERM and not signal.getitimer(signal.ITIMER_REAL)[0]:
                # Slurm signals all processes of a job, and the main one still needs batches until it has saved.
                signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
                signal.setitimer(signal.ITIMER_REAL, WORKERS_STAY)
            return
        # PyTorch raises an error when the signal has ended a data worker too.
        signal.signal(signal.SIGCHLD, ignore)
        if signum == signal.SIGTERM and sigterm.held:
            sigterm.came = True
            return
        signal.signal(signal.SIGALRM, lambda *_: handle(signum, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        raise Interrupted(signum)

    previous = {signum: signal.signal(signum, handle) for signum in NAMES}
    try:
        yield
    except Interrupted:
        no_more_signals()
        raise
    finally:
        sigterm.held = sigterm.came = False
        for signum, handler in previous.items():
            if signal.getsignal(signum) is handle:
                signal.signal(signum, handler)


def ignore(signum: int, frame: FrameType | None) -> None:
    """For a signal that may be under way already, which Python reports as an error where it finds SIG_IGN."""


def no_more_signals() -> None:
    """Has further signals ignored: torchrun sends one again to processes that have got it from the terminal."""
    for signum in NAMES:
        signal.signal(signum, ignore)
    signal.setitimer(signal.ITIMER_REAL, 0)


def leave(interrupted: Interrupted, message: str | None) -> NoReturn:
    """Prints the message, if this process has one, and ends it without a traceback.

    Its exit code is that of a shell whose program was ended by the signal.
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
    """Ends one of several processes with this exit code, while the others end or have ended.

    The interpreter is not shut down: gloo's threads would abort it now and then, and torchrun see another exit code.
    """
    _end_logs_and_workers()
    sys.stdout.flush()
    os._exit(code)


def _end_logs_and_workers() -> None:
    logging.shutdown()
    for child in multiprocessing.active_children():
        child.kill()  # data workers stay after SIGTERM


@contextmanager
def going_on(runner: Runner, args: argparse.Namespace) -> Iterator[None]:
    """Around a training or a test: a signal within says which checkpoint is the newest, and the command to go on.

    Args:
        runner (Runner): Of the run.
        args (argparse.Namespace): The arguments of tools/train.py, with ``resume``, or of tools/test.py.
    """
    trains = hasattr(args, 'resume')
    before = {} if runner._resume else _times(runner.work_dir)
    try:
        with _sigterm_first():
            yield
    except Interrupted as interrupted:
        no_more_signals()
        runner.visualizer.close()
        if interrupted.signum == signal.SIGTERM:
            for hook in runner.hooks:
                if hasattr(hook, 'save_interrupted'):
                    hook.save_interrupted(runner)
        if not trains:
            interrupted.advice = f'without results; to test again: {command(args, runner.work_dir)}'
            raise
        after = _times(runner.work_dir)
        saved = next((path for path in after if after[path] != before.get(path) and _is_intact(path)), None)
        if saved:
            interrupted.advice = (f'after {osp.relpath(saved)} was saved; to go on: '
                                  f'{command(args, runner.work_dir, "--resume")}')
        else:
            interrupted.advice = ('before a checkpoint was saved; to start again: '
                                  f'{command(args, runner.work_dir)}')
        raise


@contextmanager
def _sigterm_first() -> Iterator[None]:
    """Raises what SIGTERM, held back, does to this process; other processes and data workers that it ends are errors.
    """
    try:
        yield
    except RuntimeError as error:
        if not sigterm.came:
            raise
        raise Interrupted(signal.SIGTERM) from error
    finally:
        sigterm.held = False


def _times(work_dir: str) -> dict[str, float]:
    """Checkpoints of a work dir, the newest first, and when they were written."""
    return {path: osp.getmtime(path) for path in saved_checkpoints(work_dir) if osp.exists(path)}


def _is_intact(path: str) -> bool:
    try:
        osp.isdir(path) or read_checkpoint(path, mmap=True)
    except UnsafeCheckpointError:
        return True
    except CheckpointError:
        return False
    return True


def command(args: argparse.Namespace, work_dir: str, *further: str, argv: Sequence[str] = (),
            env: Mapping[str, str] = os.environ) -> str:
    """The shell command of this run, with its work dir and without what it was resumed from.

    Args:
        args (argparse.Namespace): The arguments of the tool.
        work_dir (str): Of the run.
        further (str): Arguments to add.
        argv (Sequence[str]): The command line of this process. Defaults to :data:`sys.orig_argv`.
        env (Mapping[str, str]): The variables of the launcher. Defaults to :data:`os.environ`.
    """
    if args.launcher == 'slurm':
        return ' '.join(['the same command', *(['with', *further] if further else [])])
    argv = list(argv or sys.orig_argv)
    tool = next(i for i, part in enumerate(argv) if osp.basename(part) in ('train.py', 'test.py'))
    program, words = argv[:tool + 1], _without(argv[tool + 1:], '--resume')
    if args.launcher == 'pytorch':
        words = _without(words, '--launcher')
        script = osp.join(osp.dirname(argv[tool]), f'dist_{osp.basename(argv[tool])[:-3]}.sh')
        number = 1 + hasattr(args, 'checkpoint')
        program = [script, *words[:number], env.get('LOCAL_WORLD_SIZE', '1')]
        words = words[number:]
    if not args.work_dir:
        words += ['--work-dir', work_dir]
    return shlex.join([*program, *words, *further])


def _without(words: Sequence[str], option: str) -> list[str]:
    """Arguments without an option and its value, if it has one."""
    kept, skips = [], False
    for word in words:
        if word == option or word.startswith(f'{option}='):
            skips = word == option
        elif skips and not word.startswith('-'):
            skips = False
        else:
            kept.append(word)
            skips = False
    return kept
