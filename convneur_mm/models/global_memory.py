"""The global memory branch: bottleneck, neural memory, gate map (Sec. 3.3)."""
from __future__ import annotations

from mmengine.model import BaseModule
from torch import Tensor, nn

from .neural_memory import NeuralMemory
from .plain import is_plain, pointwise


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
        tokens = self.memory(_convolve(self.reduce, x).flatten(2).transpose(1, 2))  # (B, H·W, Cm)
        return _convolve(self.expand, tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    return pointwise(conv, x) if is_plain(conv, nn.Conv2d) else conv(x)
