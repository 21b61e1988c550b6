"""What the tables share."""
import gc

import pytest

from convneur_mm.datasets.check import coco, folders


@pytest.fixture(autouse=True, scope='module')
def fast_data_sets():
    """Each data set of MMEngine's collects garbage, for which it goes through all of the packages' objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope='module')
def checks_in_this_process():
    """Processes for the few images of each row would take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        for module in coco, folders:
            patch.setattr(module, 'in_parallel', lambda function, items, workers: map(function, items))
        yield
