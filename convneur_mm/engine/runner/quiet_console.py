"""Keep the hundreds of lines that a run logs before its first step off the console.

MMEngine writes the config, the environment, its table of hooks and the options of each parameter both to the log file
and to the console. Here the file keeps all of it and the console shows :mod:`..hooks.start_summary` instead. This only
happens if a run is started through :mod:`..launch` and :func:`build_runner`, as the tools do.
"""
from __future__ import annotations

import logging
from functools import partial

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import LoggerHook
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..checks.data_files import name_faulty_files, naming_annotations
from .interrupts import begin_worker
from .written_config import lay_out_once

# As ``extra`` of a logger's call, this shows a record on the console before the first batch too.
ON_CONSOLE = dict(on_console=True)


class ConsoleFilter(logging.Filter):
    """Pass only warnings, errors and records with :data:`ON_CONSOLE` until the first batch, and everything after it.

    Attributes:
        starting (bool): Whether the first batch is still to come.
    """

    starting = True

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the console shows ``record``."""
        return not self.starting or record.levelno >= logging.WARNING or hasattr(record, 'on_console')


class QuietRunner(Runner):
    """A Runner whose console has a :class:`ConsoleFilter`, unless ``log_level`` is 'DEBUG'."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Filter the console from now on, before the Runner logs the config; see :meth:`Runner.build_logger`."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler) and handler.level >= logging.INFO:
                handler.addFilter(ConsoleFilter())
        return logger

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        """Make errors of the data set and of its pipeline name the file; see :meth:`Runner.build_dataloader`.

        The data workers ignore signals until the main process ends them.
        """
        with naming_annotations(dataloader):
            loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        name_faulty_files(loader.dataset)
        if isinstance(dataloader, dict):
            loader.worker_init_fn = partial(begin_worker, loader.worker_init_fn)
        return loader


def end_of_start(logger: logging.Logger) -> None:
    """Have the console show everything that ``logger`` logs from now on."""
    for handler in logger.handlers:
        for console_filter in handler.filters:
            if isinstance(console_filter, ConsoleFilter):
                console_filter.starting = False


def build_runner(cfg: Config) -> Runner:
    """Build the Runner of a config: a :class:`QuietRunner`, or its ``runner_type``, which logs in its own way.

    Only the first process writes the file of a test's metrics; MMEngine has all processes write to it at once.
    """
    lay_out_once()
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else QuietRunner.from_cfg(cfg)
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook) and get_rank():
            hook.after_test_epoch = lambda *args, **kwargs: None
    return runner
