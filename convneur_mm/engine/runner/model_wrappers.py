"""Unwrap models and their weights."""
from __future__ import annotations

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers for several processes or test-time augmentation, as checkpoints hold it."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def own_weights(runner: Runner) -> dict[str, Tensor]:
    """Return the parameters and buffers of a runner's model; under FSDP, full-size meta tensors."""
    whole = getattr(getattr(runner, 'strategy', None), 'whole_weights', None)
    return whole or unwrapped(runner.model).state_dict(keep_vars=True)
