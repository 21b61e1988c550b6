"""The global memory branch: bottleneck, neural memory, gate map (Sec. 3.3)."""
from __future__ import annotations

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from .neural_memory import NeuralMemory


class GlobalMemory(BaseModule):
    """Maps features X to the global context map G, of the same shape.

    A 1×1 convolution to the memory's channels, the memory over all H·W tokens in row-major order, and a 1×1
    convolution back.

    Args:
        in_channels (int): Channels of X, C.
        mem_channels (int): Channels of the memory, Cm.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.
        **memory_cfg: Options of :class:`NeuralMemory`.
    """

    def __init__(self, in_channels: int, mem_channels: int, init_cfg: dict | list[dict] | None = None,
                 **memory_cfg) -> None:
        super().__init__(init_cfg=init_cfg)
        self.reduce = nn.Conv2d(in_channels, mem_channels, 1)
        self.memory = NeuralMemory(mem_channels, **memory_cfg)
        self.expand = nn.Conv2d(mem_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        height, width = x.shape[2:]
        tokens = _pointwise(self.reduce, x.flatten(2).transpose(1, 2))  # (B, H·W, Cm)
        tokens = _pointwise(self.expand, self.memory(tokens))
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def _pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1×1 convolution of tokens (B, N, C), which is what channels_last maps are in memory: one matrix product."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)
