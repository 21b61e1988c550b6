"""Building blocks of ConvNeur. Names follow mmpretrain's ConvNeXt, so its ConvNeXt-V2 weights load unchanged."""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor
from torchvision.ops import StochasticDepth

from ..ops.neural_memory import MemoryState
from ._mmengine import BaseModule, Sequential
from .plain import is_plain, pointwise

FUSIONS = ('gate', 'add', 'concat')


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


def drop_path(rate: float) -> nn.Module:
    """Return stochastic depth over the images of a batch, or the identity at a rate of 0."""
    return StochasticDepth(rate, 'row') if rate > 0 else nn.Identity()


class GRN(nn.Module):
    """Global response normalisation of ConvNeXt-V2, on (N, H, W, C).

    Args:
        channels (int): Number of channels, C.
        eps (float): Value added to the mean response. Defaults to 1e-6.
    """

    dims, channel_dim, shape = (1, 2), -1, (-1,)  # axes to sum over, channel axis, and shape of the weights

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels).view(self.shape))
        self.beta = nn.Parameter(torch.zeros(channels).view(self.shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, H, W, C), keeping shape and dtype; the statistics use at least float32."""
        # γ·(x·relative) + β + x in one pass over x.
        return torch.addcmul(self.beta.to(x.dtype), x, self.scale(x).to(x.dtype))

    def scale(self, x: Tensor) -> Tensor:
        """Return the factor of (N, H, W, C) before β is added: (N, 1, 1, C) of at least float32."""
        if x.dtype in (torch.float16, torch.bfloat16):
            response = torch.linalg.vector_norm(x, dim=self.dims, keepdim=True, dtype=torch.float32)
        else:
            # On a CPU this is two to four times as fast as vector_norm over axes that are not the last. The bound
            # keeps the root's gradient finite where a channel is zero everywhere.
            response = (x * x).sum(dim=self.dims, keepdim=True).clamp_min(1e-30).sqrt()
        relative = response / (response.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        return self.gamma * relative + 1


class ConvNeurBlock(BaseModule):
    """A ConvNeXt-V2 block whose output a global branch may modulate.

    ``F_loc`` is depthwise 7×7 → LayerNorm → Linear C→4C → GELU → GRN → Linear 4C→C of the input X, and G the global
    branch's map of the same X. The output is

    - ``X + DropPath(F_loc)`` without a global branch,
    - ``X + DropPath(sigmoid(G) ⊙ F_loc)`` for fusion 'gate' (Eq. 6),
    - ``X + DropPath(F_loc + G)`` for 'add',
    - ``X + DropPath(Conv1×1([F_loc, G]))`` for 'concat'.

    Args:
        channels (int): Number of channels, C.
        global_branch (nn.Module | None): Maps (N, C, H, W) to the same shape. With a state, it is called like
            :class:`GlobalBranch`. Defaults to None.
        fusion (str): 'gate', 'add' or 'concat'. Defaults to 'gate'.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        with_cp (bool): Whether to recompute the block in the backward pass to save memory. Defaults to False.

    Raises:
        ValueError: If ``fusion`` is unknown.
    """

    def __init__(self, channels: int, global_branch: nn.Module | None = None, fusion: str = 'gate',
                 drop_path_rate: float = 0.0, with_cp: bool = False) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f'fusion must be one of {FUSIONS}, got {fusion!r}')
        self.with_cp = with_cp
        self.fusion = fusion
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.global_branch = global_branch
        if global_branch is not None and fusion == 'concat':
            self.fuse = nn.Conv2d(2 * channels, channels, 1)
        self.drop_path = drop_path(drop_path_rate)

    def local_features(self, x: Tensor) -> Tensor:
        """Compute F_loc of (N, C, H, W)."""
        x = self.norm(self.depthwise_conv(x)).permute(0, 2, 3, 1)
        x = F.gelu(_linear(self.pointwise_conv1, x))
        return self._grn_linear(x).permute(0, 3, 1, 2)

    def _grn_linear(self, x: Tensor) -> Tensor:
        """Compute ``pointwise_conv2(grn(x))`` of (N, H, W, 4C).

        With GRN's scale s of each image and channel, W·(s ⊙ x + β) + b equals (W ⊙ s)·x + (W·β + b). So the scale can
        multiply the weights instead of the features, which is cheaper with more positions than channels.
        """
        # A graph for all sizes must not branch on a size, and compilers fuse the two by themselves.
        if torch.compiler.is_compiling() or x.size(1) * x.size(2) < x.size(3) or not (
                is_plain(self.grn, GRN) and is_plain(self.pointwise_conv2, nn.Linear)):
            return _linear(self.pointwise_conv2, self.grn(x))
        weight, bias = self.pointwise_conv2.weight, self.pointwise_conv2.bias
        scaled = (weight * self.grn.scale(x).squeeze(1)).to(x.dtype)  # (N, C, 4C)
        bias = (bias + (weight * self.grn.beta).sum(1)).to(x.dtype)
        return (torch.bmm(x.flatten(1, 2), scaled.mT) + bias).unflatten(1, x.shape[1:3])

    def join(self, local: Tensor, context: Tensor) -> Tensor:
        """Fuse F_loc and G, both (N, C, H, W), as ``fusion`` says."""
        if self.fusion == 'gate':
            return context.sigmoid() * local
        if self.fusion == 'add':
            return local + context
        return self.fuse(torch.cat((local, context), dim=1))

    def forward(self, x: Tensor, state: MemoryState | None = None,
                return_state: bool = False) -> Tensor | tuple[Tensor, MemoryState]:
        """Map (N, C, H, W) to the same shape, and return the state if asked for; see :class:`GlobalBranch`."""

        def update(x: Tensor, state: MemoryState | None) -> tuple[Tensor, MemoryState | None]:
            local = self.local_features(x)
            if return_state:
                context, state = self.global_branch(x, state, return_state=True)
                local = self.join(local, context)
            elif self.global_branch is not None:
                context = self.global_branch(x) if state is None else self.global_branch(x, state)
                local = self.join(local, context)
            return x + self.drop_path(local), state

        if self.with_cp and x.requires_grad:
            x, state = cp.checkpoint(update, x, state, use_reentrant=False)
        else:
            x, state = update(x, state)
        return (x, state) if return_state else x


class Stage(Sequential):
    """A sequence of blocks."""

    def forward(self, x: Tensor, states: Iterator[MemoryState] | None = None,
                return_states: bool = False) -> Tensor | tuple[Tensor, list[MemoryState]]:
        """Map (N, C, H, W) to the same shape, and return the memories' states if asked for.

        Args:
            x (Tensor): Features, (N, C, H, W).
            states (Iterator[MemoryState] | None): States of the blocks that have a memory, in order. Defaults to
                None.
            return_states (bool): Whether to return the states after this call too. Defaults to False.
        """
        if states is None and not return_states:
            return super().forward(x)
        returned = []
        for block in self:
            if block.global_branch is None:
                x = block(x)
                continue
            state = None if states is None else next(states)
            if return_states:
                x, state = block(x, state, return_state=True)
                returned.append(state)
            else:
                x = block(x, state)
        return (x, returned) if return_states else x


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer, or its replacement, to (N, H, W, C)."""
    if is_plain(layer, nn.Linear):
        return pointwise(layer, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer(x)
