"""The global branch: bottleneck, neural memory or another mixing of tokens, gate map (Sec. 3.3)."""
from __future__ import annotations

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from .global_branches import GLOBAL_BRANCHES
from .plain import is_plain


class GlobalMemory(BaseModule):
    """Maps features X to the global context map G, of the same shape.

    A 1×1 convolution to the memory's channels, the memory over all H·W tokens in row-major order, and a 1×1
    convolution back. Another branch takes the memory's place between the same convolutions.

    Args:
        in_channels (int): Channels of X, C.
        mem_channels (int): Channels of the memory, Cm.
        branch (str): A name of :data:`GLOBAL_BRANCHES`. Defaults to 'neural_memory'.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.
        **memory_cfg: Options of the branch, see :func:`branch_options`.

    Raises:
        ValueError: If ``branch`` is unknown or an option is outside its range.
    """

    def __init__(self, in_channels: int, mem_channels: int, branch: str = 'neural_memory',
                 init_cfg: dict | list[dict] | None = None, **memory_cfg) -> None:
        super().__init__(init_cfg=init_cfg)
        if branch not in GLOBAL_BRANCHES:
            raise ValueError(f'global_branch must be one of {tuple(GLOBAL_BRANCHES)}, got {branch!r}')
        self.reduce = nn.Conv2d(in_channels, mem_channels, 1)
        mixer = GLOBAL_BRANCHES[branch](mem_channels, **memory_cfg)
        if branch == 'neural_memory':
            self.memory = mixer
        else:
            self.mixer = mixer
        self.branch = branch
        self.expand = nn.Conv2d(mem_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        tokens = _pointwise(self.reduce, x).flatten(2).transpose(1, 2)  # (B, H·W, Cm)
        tokens = self.memory(tokens) if self.branch == 'neural_memory' else self.mixer(tokens, tuple(x.shape[2:]))
        return _pointwise(self.expand, tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1×1 convolution of (B, C, H, W): of channels_last maps one matrix product, as which it is faster."""
    if not is_plain(conv, nn.Conv2d):
        return conv(x)
    tokens = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
    tokens = F.linear(tokens, conv.weight.flatten(1), conv.bias)
    return tokens.transpose(1, 2).unflatten(2, x.shape[2:])
