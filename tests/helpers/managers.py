"""What of a run of MMEngine's outlives it in its process."""
from mmengine.utils import ManagerMixin


def forget_runs() -> None:
    """Lets the next run begin as in a process of its own.

    Loggers write to what pytest has closed since, message hubs go on with the logs of a run that began in the same
    second, and visualizers save to the folder of the run that made them.
    """
    kinds = [ManagerMixin]
    for kind in kinds:
        kind._instance_dict.clear()
        kinds += kind.__subclasses__()
