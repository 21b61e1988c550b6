"""Unwrap a Runner's model and its weights, and ask it how it was started, which it has no public way to tell."""
from __future__ import annotations

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner, TestLoop
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


def is_resumed(runner: Runner) -> bool:
    """Return whether the runner resumes a training, so that a checkpoint is more than weights to it."""
    return runner._resume


def started_from(runner: Runner) -> str | None:
    """Return the path or name of the checkpoint that the runner loads or resumes from, if one was named."""
    return runner._load_from


def is_test(runner: Runner) -> bool:
    """Return whether the runner tests; in a training its test loop is not built yet."""
    return isinstance(runner._test_loop, TestLoop)
