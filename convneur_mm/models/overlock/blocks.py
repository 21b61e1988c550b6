"""Building blocks of OverLoCK. Weights have the names of its authors' checkpoints."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor

from ..blocks import GRN, LayerNorm2d, drop_path
from .contmix import neighborhood_sum, relative_position_bias

SMALL_KERNEL = 5  # kernel size for half the channels of ContMix
POOLED_SIZE = 7  # The context prior is averaged over 7 × 7 regions.
BASE_RATIO, FOCUS_RATIO = 4, 3  # hidden channels of the ConvFFNs, as multiples of C
# For each large kernel, the (size, dilation) of the kernels merged into it.
DILATED_KERNELS = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class ResidualDWConv(nn.Conv2d):
    """A convolution with a skip connection: ``x + DWConv3×3(x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolution to (N, C, H, W)."""
        return x + super().forward(x)


class ChannelScale(nn.Module):
    """A learned scale and bias of each channel.

    Args:
        channels (int): Number of channels, C.
        init_value (float): Initial value of the scales. Defaults to 1.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))  # as in a depthwise convolution
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (N, C, H, W)."""
        return F.conv2d(x, self.weight, self.bias, groups=x.size(1))


class GRN2d(GRN):
    """:class:`GRN` on (N, C, H, W), with weights of the shapes of the authors' checkpoints."""

    dims, channel_dim, shape = (2, 3), 1, (1, -1, 1, 1)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means.

    Args:
        channels (int): Number of channels, C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(16, channels // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, H, W)."""
        return x * self.proj(x)


class DilatedRepConv(nn.Module):
    """A large depthwise convolution, trained as a sum with smaller dilated ones, each with a BatchNorm.

    Args:
        channels (int): Number of channels, C.
        kernel_size (int): A key of :data:`DILATED_KERNELS`.
        deploy (bool): Whether to build the merged convolution directly. Defaults to False.

    Raises:
        ValueError: If ``kernel_size`` is not a key.
    """

    def __init__(self, channels: int, kernel_size: int, deploy: bool = False) -> None:
        super().__init__()
        if kernel_size not in DILATED_KERNELS:
            raise ValueError(f'kernel_size must be one of {tuple(DILATED_KERNELS)}, got {kernel_size!r}')
        self.deploy = deploy
        self.lk_origin = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=deploy)
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for size, dilation in DILATED_KERNELS[kernel_size]:
            self.add_module(f'dil_conv_k{size}_{dilation}', nn.Conv2d(
                channels, channels, size, padding=dilation * (size // 2), dilation=dilation, groups=channels,
                bias=False))
            self.add_module(f'dil_bn_k{size}_{dilation}', nn.BatchNorm2d(channels))

    def _branches(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        names = [f'{size}_{dilation}' for size, dilation in DILATED_KERNELS[self.lk_origin.kernel_size[0]]]
        return [(self.lk_origin, self.origin_bn),
                *((getattr(self, f'dil_conv_k{name}'), getattr(self, f'dil_bn_k{name}')) for name in names)]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        if self.deploy:
            return self.lk_origin(x)
        return sum(bn(conv(x)) for conv, bn in self._branches())

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge all branches into one convolution, equal in evaluation mode; a second call does nothing."""
        if self.deploy:
            return
        old = self.lk_origin
        kernel = torch.zeros_like(old.weight, dtype=torch.float64)
        bias = torch.zeros(old.out_channels, dtype=torch.float64, device=old.weight.device)
        for conv, bn in self._branches():
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            # Positions of the dilated kernel's weights within the large one.
            margin = (old.kernel_size[0] - conv.dilation[0] * (conv.kernel_size[0] - 1) - 1) // 2
            inside = slice(margin, old.kernel_size[0] - margin, conv.dilation[0])
            kernel[:, :, inside, inside] += conv.weight.double() * scale.view(-1, 1, 1, 1)
            bias += bn.bias.double() - bn.running_mean.double() * scale
        merged = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding, groups=old.groups)
        merged.to(old.weight)
        merged.weight.copy_(kernel)
        merged.bias.copy_(bias)
        for name in list(self._modules):
            delattr(self, name)
        self.lk_origin = merged
        self.deploy = True


def conv_ffn(in_channels: int, hidden_channels: int) -> list[nn.Module]:
    """Return the layers of a ConvFFN: 1×1 → GELU → residual DWConv 3×3 → GRN → 1×1 back."""
    return [nn.Conv2d(in_channels, hidden_channels, 1), nn.GELU(), ResidualDWConv(hidden_channels),
            GRN2d(hidden_channels), nn.Conv2d(hidden_channels, in_channels, 1)]


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias, padded so that only the stride changes the size, and a BatchNorm."""
    return [nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels)]


@contextmanager
def _batch_norms_kept(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of the BatchNorms inside unchanged."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


class Block(nn.Module):
    """Base class of the blocks, which can be recomputed in the backward pass.

    Args:
        with_cp (bool): Whether to recompute the block in the backward pass to save memory.
    """

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp

    def forward(self, *features: Tensor) -> Tensor:
        """Call :meth:`update`, with recomputation if it is wanted."""
        if self.with_cp and any(x.requires_grad for x in features):
            # The recomputation sees the same batch, which running statistics must not count twice.
            return cp.checkpoint(self.update, *features, use_reentrant=False,
                                 context_fn=lambda: (nullcontext(), _batch_norms_kept(self)))
        return self.update(*features)

    def update(self, *features: Tensor) -> Tensor:
        """Compute the block's output."""
        raise NotImplementedError


class BaseBlock(Block):
    """A block of Base-Net and Overview-Net (Fig. 4a).

    Args:
        channels (int): Number of channels, C.
        kernel_size (int): Kernel size of the Dilated RepConv.
        scaled (bool): Whether the residual is scaled by a learned factor for each channel.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        with_cp (bool): Whether to recompute the block in the backward pass to save memory. Defaults to False.
        deploy (bool): Whether the Dilated RepConv is built merged. Defaults to False.
    """

    def __init__(self, channels: int, kernel_size: int, scaled: bool, drop_path_rate: float = 0.0,
                 with_cp: bool = False, deploy: bool = False) -> None:
        super().__init__(with_cp)
        self.dwconv = ResidualDWConv(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels, eps=1e-6), DilatedRepConv(channels, kernel_size, deploy), nn.BatchNorm2d(channels),
            SqueezeExcite(channels), *conv_ffn(channels, BASE_RATIO * channels), drop_path(drop_path_rate))
        self.ls = ChannelScale(channels) if scaled else nn.Identity()

    def update(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class DynamicBlock(Block):
    """A block of Focus-Net (Fig. 4b): features Z and context prior P are fused, mixed by ContMix, and updated.

    Args:
        channels (int): Channels of Z, C.
        context_channels (int): Channels of P, Cp.
        kernel_size (int): Size of the larger of ContMix's two kernels and of the Dilated RepConv.
        groups (int): Number of channel groups with their own kernel, for each of the two kernel sizes.
        first (bool): Whether this is the first block, whose P is the initial context prior itself.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        with_cp (bool): Whether to recompute the block in the backward pass to save memory. Defaults to False.
        deploy (bool): Whether the Dilated RepConv is built merged. Defaults to False.
    """

    def __init__(self, channels: int, context_channels: int, kernel_size: int, groups: int, first: bool,
                 drop_path_rate: float = 0.0, with_cp: bool = False, deploy: bool = False) -> None:
        super().__init__(with_cp)
        fused = channels + context_channels
        self.split = (channels, context_channels)
        self.kernel_sizes = (SMALL_KERNEL, kernel_size)
        self.heads = 2 * groups
        self.scale = (channels // self.heads) ** -0.5
        if not first:
            self.x_scale = ChannelScale(context_channels)
            self.h_scale = ChannelScale(context_channels)
        self.dwconv1 = ResidualDWConv(fused)
        self.norm1 = LayerNorm2d(fused, eps=1e-6)
        self.fusion = nn.Sequential(
            nn.Conv2d(fused, fused, 3, padding=1, groups=fused), nn.BatchNorm2d(fused), nn.GELU(),
            nn.Conv2d(fused, channels, 1), GRN2d(channels))
        self.weight_query = nn.Sequential(*conv_bn(channels, channels // 2, 1))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(POOLED_SIZE), *conv_bn(context_channels, channels // 2, 1))
        self.weight_proj = nn.Conv2d(POOLED_SIZE ** 2, sum(size ** 2 for size in self.kernel_sizes), 1)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.zeros(self.heads, 2 * size - 1, 2 * size - 1)) for size in self.kernel_sizes)
        self.dyconv_proj = nn.Sequential(*conv_bn(channels, channels, 1))
        self.lepe = nn.Sequential(DilatedRepConv(channels, kernel_size, deploy), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcite(channels)
        self.gate = nn.Sequential(*conv_bn(channels, channels, 1), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, fused, 1))
        self.dwconv2 = ResidualDWConv(fused)
        self.norm2 = LayerNorm2d(fused, eps=1e-6)
        self.mlp = nn.Sequential(*conv_ffn(fused, FOCUS_RATIO * channels))
        self.ls1 = ChannelScale(fused)
        self.ls2 = ChannelScale(fused)
        self.drop_path = drop_path(drop_path_rate)

    def update(self, x: Tensor, context: Tensor, initial: Tensor) -> Tensor:
        """Update Z (N, C, H, W) and P with the initial P, both (N, Cp, H, W); return both as (N, C + Cp, H, W)."""
        if hasattr(self, 'x_scale'):
            context = self.x_scale(context) + self.h_scale(initial)
        identity = self.dwconv1(torch.cat((x, context), dim=1))
        fused = self.norm1(identity)
        x = self.fusion(fused)
        mixed = self.dyconv_proj(self.mix(fused, x)) + self.lepe(x)
        mixed = self.proj(self.gate(x) * self.se_layer(mixed))
        fused = self.dwconv2(self.ls1(identity) + self.drop_path(mixed))
        return self.ls2(fused) + self.drop_path(self.mlp(self.norm2(fused)))

    def mix(self, fused: Tensor, x: Tensor) -> Tensor:
        """Apply ContMix (Sec. 3.2).

        A map smaller than the kernel is enlarged to it and the result averaged back, as in the authors' code.

        Args:
            fused (Tensor): (N, C + Cp, H, W), from which queries and keys are computed.
            x (Tensor): (N, C, H, W), the input of the convolution.

        Returns:
            Tensor: (N, C, H, W).
        """
        size = x.shape[2:]
        smallest, kernel_size = min(size), self.kernel_sizes[1]
        if smallest < kernel_size:
            enlarged = [side * kernel_size // smallest for side in size]
            fused, x = (F.interpolate(maps, enlarged, mode='bilinear') for maps in (fused, x))
        height, width = x.shape[2:]
        query, key = fused.split(self.split, dim=1)
        query = (self.weight_query(query) * self.scale).flatten(2).unflatten(1, (self.heads, -1))  # (N, g, c, H·W)
        key = self.weight_key(key).flatten(2).unflatten(1, (self.heads, -1))  # (N, g, c, S²)
        affinity = key.transpose(2, 3) @ query  # (N, g, S², H·W)
        kernels = self.weight_proj(affinity.transpose(1, 2))  # (N, k² + K², g, H·W)
        kernels = kernels.permute(0, 2, 3, 1).unflatten(2, (height, width))
        values = x.unflatten(1, (2, self.heads, -1)).permute(1, 0, 2, 4, 5, 3)  # (2, N, g, H, W, C / 2g)
        mixed = []
        for part, table, value in zip(
                kernels.split([size ** 2 for size in self.kernel_sizes], dim=-1), (self.rpb1, self.rpb2), values):
            weights = (part + relative_position_bias(table, height, width).flatten(3)).softmax(dim=-1)
            side = table.size(1) // 2 + 1
            mixed.append(neighborhood_sum(weights.to(value.dtype).unflatten(-1, (side, side)), value))
        x = torch.stack(mixed, dim=1).permute(0, 1, 2, 5, 3, 4).flatten(1, 3)
        return F.adaptive_avg_pool2d(x, size) if smallest < kernel_size else x


class ContextDownsample(nn.Module):
    """Halve the resolution of features and context prior between the two stages of Focus-Net.

    Args:
        in_channels (int): Channels of the features.
        out_channels (int): Channels of the downsampled features.
        context_channels (int): Channels of the context prior.
    """

    def __init__(self, in_channels: int, out_channels: int, context_channels: int) -> None:
        super().__init__()
        self.x_proj = nn.Sequential(*conv_bn(in_channels, out_channels, 3, stride=2))
        self.h_proj = nn.Sequential(*conv_bn(context_channels, context_channels, 3, stride=2))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, C, H, W) and (N, Cp, H, W) to (N, C', H/2, W/2) and (N, Cp, H/2, W/2), sizes rounded up."""
        return self.x_proj(x), self.h_proj(context)
