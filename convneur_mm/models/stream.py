"""Streams: memory states carried from frame to frame inside a model that does not handle states itself."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.neural_memory import MemoryState
from .convneur import ConvNeur


def detach_states(states: Sequence[MemoryState]) -> tuple[MemoryState, ...]:
    """Return the states without their autograd history (truncated BPTT)."""
    return tuple(MemoryState(*(tensor.detach() for tensor in state)) for state in states)


def reset_states(backbone: ConvNeur, states: Sequence[MemoryState], mask: Tensor) -> tuple[MemoryState, ...]:
    """Return states in which some streams start again, as at a cut in one video of a batch.

    Args:
        backbone (ConvNeur): The backbone that returned the states.
        states (Sequence[MemoryState]): States of B streams.
        mask (Tensor): Streams that start again, (B,), bool.

    Raises:
        ValueError: If the mask does not fit the states.
    """
    batch = len(states[0].w1)
    if mask.dtype != torch.bool or mask.shape != (batch,):
        raise ValueError(f'mask must be a bool tensor of shape ({batch},), one for each stream, got {mask.dtype} of '
                         f'shape {tuple(mask.shape)}')
    mask = mask.to(states[0].w1.device)[:, None, None, None]
    return tuple(MemoryState(*(torch.where(mask, new, old) for new, old in zip(fresh, state)))
                 for fresh, state in zip(backbone.initial_states(batch), states))


class Stream:
    """The states of a backbone between its calls, see :func:`stream`.

    Attributes:
        backbone (ConvNeur): The backbone.
        states (tuple[MemoryState, ...] | None): States after the last call; None before the first one.
    """

    def __init__(self, backbone: ConvNeur) -> None:
        self.backbone = backbone
        self.states: tuple[MemoryState, ...] | None = None

    def reset(self, mask: Tensor | None = None) -> None:
        """Restart all streams, or those in ``mask`` (B,), bool, at the next frame.

        Raises:
            ValueError: If the mask does not fit the states.
        """
        if mask is None:
            self.states = None
        elif self.states is not None:
            self.states = reset_states(self.backbone, self.states, mask)

    def detach(self) -> None:
        """Detach the states (truncated BPTT)."""
        if self.states is not None:
            self.states = detach_states(self.states)

    def _before(self, backbone: ConvNeur, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if len(args) > 1 or kwargs.keys() & {'states', 'return_states'}:
            raise ValueError('the backbone got states of its own within stream(): streams do not nest, and a call '
                             'within one takes images alone')
        return args, dict(kwargs, states=self.states, return_states=True)

    def _after(self, backbone: ConvNeur, args: tuple, output: tuple) -> tuple[Tensor, ...]:
        features, self.states = output
        return features


@contextmanager
def stream(model: nn.Module) -> Iterator[Stream]:
    """Make each call of a model's backbone continue from the memories after the previous call.

    Within the context the model is used as usual, with the frames of a video one after the other, or in batches with
    the next frame of each of B videos::

        with stream(detector) as state:
            for frame in video:
                result = inference_detector(detector, frame)

    Each call of the backbone is one frame: do not use test-time augmentation or a second model with the same backbone.
    Frames may change their size; their number per batch may change only after ``reset()``.

    Args:
        model (nn.Module): A ConvNeur, or a model with one inside.

    Yields:
        Stream: The states, to reset or detach.

    Raises:
        ValueError: If the model does not have exactly one ConvNeur, or the ConvNeur has no neural memory.
    """
    backbones = {name: module for name, module in model.named_modules() if isinstance(module, ConvNeur)}
    if len(backbones) != 1:
        raise ValueError('stream() carries the memories of one ConvNeur from frame to frame, and no other backbone has '
                         f'such a state: {type(model).__name__} has {list(backbones) or "none"}')
    backbone, = backbones.values()
    backbone.initial_states(0)  # raises a ValueError if there are no memories
    state = Stream(backbone)
    hooks = (backbone.register_forward_pre_hook(state._before, with_kwargs=True),
             backbone.register_forward_hook(state._after, prepend=True))
    try:
        yield state
    finally:
        for hook in hooks:
            hook.remove()
