"""Models within other models."""
from __future__ import annotations

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within wrappers for several processes or for test-time augmentation, whose weights checkpoints hold."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def own_weights(runner: Runner) -> dict[str, Tensor]:
    """Parameters and buffers of a runner's model; where each process has but a part of it, the whole without data."""
    whole = getattr(getattr(runner, 'strategy', None), 'whole_weights', None)
    return whole or unwrapped(runner.model).state_dict(keep_vars=True)
