"""mmengine's ``compile`` switch: the training step of a shipped classifier, compiled as the runner does it."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import convneur_mm


@pytest.mark.slow
def test_compiled_training_step_learns_the_same():
    cfg = Config.fromfile(convneur_mm.config('convneur_m1_shapes'))
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    cfg.model.backbone.arch = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32], mem_channels=16)
    cfg.model.head.in_channels = 32
    cfg.model.data_preprocessor = cfg.data_preprocessor
    original = MODELS.build(cfg.model)
    data = dict(inputs=torch.randint(0, 255, (4, 3, 96, 96), dtype=torch.uint8),
                data_samples=[DataSample().set_gt_label(i) for i in range(4)])
    losses = []
    for compiled in (False, True):
        model = copy.deepcopy(original)
        wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
        step = torch.compile(model.train_step, backend='aot_eager') if compiled else model.train_step
        losses.append([step(copy.deepcopy(data), wrapper)['loss'].item() for _ in range(3)])
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
