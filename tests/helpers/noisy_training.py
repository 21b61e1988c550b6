"""A training of milliseconds, in which data set and model draw random numbers from all generators."""
from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import Dataset

from convneur_mm.engine import safe_loading
from convneur_mm.engine.runner.quiet_console import QuietRunner

LOADED = []


@DATASETS.register_module()
class NoisyData(Dataset):
    """Seven points with noise from all generators, as transforms draw it; keeps a list of what was loaded."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        LOADED.append(index)
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002 as mmcv's transforms do
        return dict(inputs=torch.tensor([float(index), noise]))


@MODELS.register_module()
class NoisyModel(BaseModel):
    """A layer with dropout and noise; keeps a list of its inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = []

    def forward(self, inputs, mode='loss'):
        if mode == 'predict':
            return [{}] * len(inputs)
        inputs = torch.stack(inputs)
        self.seen.append(inputs)
        noise = random.random() + np.random.rand()  # noqa: NPY002 as mmpretrain's Mixup does
        return dict(loss=nn.functional.dropout(self.layer(inputs)).square().mean() * noise)


def train_noisily(folder: Path, name: str, loop: dict, seed: int | None = 0, resume: str | None = None,
                  hooks: Sequence[dict] = (), settings: dict | None = None, **loader: object) -> NoisyModel:
    """Trains in ``folder / name``, from a checkpoint below ``folder`` if one is named, and returns the model."""
    for manager in MMLogger, MessageHub, Visualizer:
        manager._instance_dict.clear()
    LOADED.clear()
    by_epoch = 'max_epochs' in loop
    runner = QuietRunner.from_cfg(Config({**dict(
        model=dict(type='NoisyModel'), work_dir=str(folder / name), randomness=dict(seed=seed),
        train_dataloader={
            **dict(dataset=dict(type='NoisyData'), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=True)),
            **loader},
        train_cfg=dict(type=f'Resumable{"Epoch" if by_epoch else "Iter"}BasedTrainLoop', **loop),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        default_hooks=dict(checkpoint=dict(type='SaveThenDeleteHook', interval=1 if by_epoch else 3,
                                           by_epoch=by_epoch)),
        custom_hooks=list(hooks), log_level='ERROR', load_from=str(folder / resume) if resume else None,
        resume=bool(resume)), **(settings or {})}))
    with safe_loading():
        runner.train()
    return runner.model


def assert_goes_on(whole: NoisyModel, resumed: NoisyModel, first: int) -> None:
    """A model that was resumed has seen what the whole training saw from an iteration on, and has its weights."""
    assert len(whole.seen) - first == len(resumed.seen) > 0
    assert all(map(torch.equal, whole.seen[first:], resumed.seen))
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
