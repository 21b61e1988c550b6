"""A Runner of a few milliseconds, as the tools build it."""
import uuid

import pytest
import torch
from mmengine.model import BaseModel
from torch.utils.data import DataLoader

from convneur_mm.engine.quiet_console import QuietRunner


class Toy(BaseModel):
    """Squared features of whatever backbone, as a loss."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=sum(y.square().mean() for y in self.backbone(inputs)))


@pytest.fixture
def toy_runner(tmp_path):
    """Builds a Runner for two iterations over images of 32 x 64 pixels, in the work dir ``tmp_path``."""

    def build(backbone, **kwargs):
        data = DataLoader([dict(inputs=torch.rand(3, 32, 64)) for _ in range(4)], batch_size=2)
        return QuietRunner(
            Toy(backbone), str(tmp_path), train_dataloader=data, train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)), custom_hooks=[dict(type='StartSummaryHook')],
            # Loggers are kept by this name.
            experiment_name=f'toy_{uuid.uuid4().hex}',
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)), **kwargs)

    return build
