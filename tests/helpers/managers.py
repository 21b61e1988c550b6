"""What of a run of MMEngine's outlives it in its process."""
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin


def kinds() -> list[type[ManagerMixin]]:
    """Of objects with a name by which MMEngine finds them again."""
    found = [ManagerMixin]
    for kind in found:
        found += kind.__subclasses__()
    return found


def forget_runs() -> None:
    """Lets the next run begin as in a process of its own.

    Loggers write to what pytest has closed since, message hubs go on with the logs of a run that began in the same
    second, and visualizers save to the folder of the run that made them.
    """
    for kind in kinds():
        kind._instance_dict.clear()


@contextmanager
def runs_of_before() -> Iterator[None]:
    """Forgets the runs within, and what they have set of loggers from before."""
    before = {kind: dict(kind._instance_dict) for kind in kinds()}
    levels = {logger: logger.level for logger in before[MMLogger].values()}
    try:
        yield
    finally:
        for kind in kinds():
            kind._instance_dict.clear()
            kind._instance_dict.update(before.get(kind, {}))
        # Of loggers that can be found, as a level set elsewhere leaves what they noted of which messages are written.
        for logger, level in levels.items():
            logger.setLevel(level)
