"""What the tables share."""
import pytest

from convneur_mm.datasets.check import coco, folders


@pytest.fixture(autouse=True, scope='session')
def checks_in_this_process():
    """Processes for the few images of each row would take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        for module in coco, folders:
            patch.setattr(module, 'in_parallel', lambda function, items, workers: map(function, items))
        yield
