"""The tensors that travel together through every implementation of the neural memory."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
