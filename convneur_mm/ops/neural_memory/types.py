"""What every implementation of the neural memory shares: tensors that travel together, and two small rules."""
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Older versions of torch do not have it, and cannot compile the memory in any case.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)


class MemoryState(NamedTuple):
    """Fast weights and momentum of a batch of memories, after some chunk t.

    B images, h heads of d channels, e hidden units per head.

    Attributes:
        w1 (Tensor): First fast weight of M_t, (B, h, d, e).
        w2 (Tensor): Second fast weight of M_t, (B, h, e, d).
        p1 (Tensor): Momentum P_t of ``w1``, (B, h, d, e).
        p2 (Tensor): Momentum P_t of ``w2``, (B, h, e, d).
    """

    w1: Tensor
    w2: Tensor
    p1: Tensor
    p2: Tensor


class UpdateGenerators(NamedTuple):
    """Weights of the update generators: Linear Cm→4Cm, GELU, Linear 4Cm→3Cm (step | momentum | decay), sigmoid.

    Attributes:
        in_weight (Tensor): (4Cm, Cm).
        in_bias (Tensor): (4Cm,).
        out_weight (Tensor): (3Cm, 4Cm).
        out_bias (Tensor): (3Cm,).
    """

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def written_tokens(num_tokens: int, chunk_size: int, retrieve: str = 'previous', return_state: bool = False) -> int:
    """How many of the first tokens are written to the memory at all.

    What the last chunk would write is read by nobody, unless the state is returned or every token reads M_T.
    """
    if return_state or retrieve == 'final':
        return num_tokens
    return max(0, math.ceil(num_tokens / chunk_size) - 1) * chunk_size


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Keeps autocast out, which does not know the meta device, where shapes and FLOPs are counted without memory."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
