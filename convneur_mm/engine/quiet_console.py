"""A console without the hundreds of lines that a run otherwise logs and prints before its first step.

MMEngine writes the config, the environment, its table of hooks and the options of each parameter both to the log file
and to the console. Here the file keeps all of it and the console shows :mod:`.start_summary` instead. Nothing of this
happens unless a run is started through :mod:`.launch` and :func:`build_runner`, as the tools do.
"""
from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import LoggerHook
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from .data_files import name_faulty_files, naming_annotations
from .written_config import lay_out_once

# What MMEngine logs before the first step, beside records of several lines, and the summary says in fewer words.
REPLACED = ('paramwise_options -- ', 'Distributed training is not used, all SyncBatchNorm', 'Checkpoints will be saved',
            'Load checkpoint from',
            *(f'ConvNeur-{arch} starts from random weights' for arch in ('m1', 'm2', 'm3', 'm4', 'm5', 'm6')))
# Warnings about the insides of MMEngine and mmseg, which nobody who trains a model can do anything about.
POINTLESS = ('"FileClient" will be deprecated', '"HardDiskBackend" is the alias', 'The prefix is not set in metric')
# Lines that pycocotools, MMEngine and the forks' data sets print, in each process.
PRINTED = re.compile(r'loading annotations into memory\.\.\.|Done \(t=[\d.]+s\)|creating index\.\.\.|index created!|'
                     r'Loads checkpoint by \w+ backend from path: .*|Could not import OneDL.*')
# Printed with the names of all weights, where a Runner loads a checkpoint; the summary counts them.
MISMATCH = re.compile(r'The model and loaded state dict do not match exactly.*', re.DOTALL)

# Handed to a logger as ``extra``, this keeps a record of several lines on the console.
ON_CONSOLE = dict(on_console=True)


class ConsoleFilter(logging.Filter):
    """Keeps off the console what the summary replaces, until the first batch, and pointless warnings for good.

    Attributes:
        starting (bool): Whether the first batch is still to come.
    """

    starting = True

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the console shows ``record``."""
        message = record.getMessage()
        if message.startswith(POINTLESS):
            return False
        if not self.starting or hasattr(record, 'on_console'):
            return True
        several_lines = '\n' in message and record.levelno <= logging.INFO
        return not (several_lines or message.startswith(REPLACED))


class QuietRunner(Runner):
    """A Runner whose console has a :class:`ConsoleFilter`, unless ``log_level`` is 'DEBUG'."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """See :meth:`Runner.build_logger`; right after it, the Runner logs the environment and the config."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler) and handler.level >= logging.INFO:
                handler.addFilter(ConsoleFilter())
        return logger

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """See :meth:`Runner.build_dataloader`; errors of the data set, and of its pipeline later, name the file."""
        with naming_annotations(dataloader):
            loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        name_faulty_files(loader.dataset)
        return loader

    def load_checkpoint(self, *args, **kwargs) -> dict:
        """See :meth:`Runner.load_checkpoint`."""
        with quiet_prints(MISMATCH):
            return super().load_checkpoint(*args, **kwargs)


def end_of_start(logger: logging.Logger) -> None:
    """From here on the console shows all that ``logger`` logs, but for the pointless warnings."""
    for handler in logger.handlers:
        for console_filter in handler.filters:
            if isinstance(console_filter, ConsoleFilter):
                console_filter.starting = False


def build_runner(cfg: Config) -> Runner:
    """The Runner of a config: a :class:`QuietRunner`, or whatever its ``runner_type`` names, which logs as it does.

    The first process alone writes the file of a test's metrics, which MMEngine lets all do, one in the other's text.
    """
    lay_out_once()
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else QuietRunner.from_cfg(cfg)
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook) and get_rank():
            hook.after_test_epoch = lambda *args, **kwargs: None
    return runner


class _WithoutLines:
    """A text stream that drops what matches ``pattern``, if it is all that one call of print() prints."""

    def __init__(self, stream: TextIO, pattern: re.Pattern) -> None:
        self._stream = stream
        self._pattern = pattern
        self._dropped = False

    def write(self, text: str) -> int:
        if self._dropped and text == '\n':  # print() writes the end of a line by itself
            self._dropped = False
            return len(text)
        self._dropped = bool(self._pattern.fullmatch(text))
        if not self._dropped:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def quiet_prints(pattern: re.Pattern = PRINTED) -> Iterator[None]:
    """Keeps prints that match ``pattern`` off standard output; by default what each process prints for each file."""
    with redirect_stdout(_WithoutLines(sys.stdout, pattern)):
        yield
