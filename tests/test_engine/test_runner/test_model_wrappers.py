"""Models within wrappers for several processes and for test-time augmentation."""
import pytest
import torch
from mmengine.model import BaseModel, BaseTTAModel, MMDistributedDataParallel
from torch import nn

from convneur_mm.engine.runner.model_wrappers import unwrapped


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)  # named as that of a wrapper

    def forward(self, inputs, mode='tensor'):
        return self.module(inputs)


class Augmented(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        """Not needed."""


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path / "group"}', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_is_its_own():
    model = Model()
    assert unwrapped(model) is model


def test_the_model_within(one_process):
    model = Model()
    distributed = MMDistributedDataParallel(model)
    assert unwrapped(distributed) is model
    assert unwrapped(Augmented(module=model)) is model
    assert unwrapped(Augmented(module=distributed)) is model
