"""OverLoCK, a peer backbone. Weights have the names of its authors' checkpoints."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS
from torch import Tensor
from torchvision.ops import StochasticDepth

from ..engine.checkpoint import load_pretrained
from .blocks import LayerNorm2d
from .contmix import neighborhood_sum, relative_position_bias
from .convneur import ConvNeur

SMALL_KERNEL = 5  # of half the channels of ContMix
POOLED_SIZE = 7  # The context prior is averaged over 7 × 7 regions.
CONTEXT_REDUCTION = 4  # The context prior has a quarter of the last stage's channels.
BASE_RATIO, FOCUS_RATIO = 4, 3  # of the ConvFFNs' hidden channels
# Of each large kernel: (size, dilation) of the kernels merged into it.
DILATED_KERNELS = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class ResidualDWConv(nn.Conv2d):
    """``x + DWConv3×3(x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        return x + super().forward(x)


class ChannelScale(nn.Module):
    """A learned scale and bias of each channel.

    Args:
        channels (int): Number of channels, C.
        init_value (float): What the scales start from. Defaults to 1.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))  # that of a depthwise convolution
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        return F.conv2d(x, self.weight, self.bias, groups=x.size(1))


class GRN2d(nn.Module):
    """Global response normalisation of ConvNeXt-V2, on (N, C, H, W).

    Args:
        channels (int): Number of channels, C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape and dtype; the statistics are taken in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
        relative = response / (response.mean(dim=1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta.to(x.dtype), x, (self.gamma * relative + 1).to(x.dtype))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channels' means.

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
        """(N, C, H, W) → (N, C, H, W)."""
        return x * self.proj(x)


class DilatedRepConv(nn.Module):
    """A large depthwise convolution, trained as the sum of itself and smaller dilated ones, each with a BatchNorm.

    Args:
        channels (int): Number of channels, C.
        kernel_size (int): A key of :data:`DILATED_KERNELS`.
        deploy (bool): Whether to build the merged convolution at once. Defaults to False.

    Raises:
        ValueError: If ``kernel_size`` is another.
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
        """(N, C, H, W) → (N, C, H, W)."""
        if self.deploy:
            return self.lk_origin(x)
        return sum(bn(conv(x)) for conv, bn in self._branches())

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merges all branches into one convolution, equal to them in evaluation mode; a second call does nothing."""
        if self.deploy:
            return
        old = self.lk_origin
        kernel = torch.zeros_like(old.weight, dtype=torch.float64)
        bias = torch.zeros(old.out_channels, dtype=torch.float64, device=old.weight.device)
        for conv, bn in self._branches():
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            # Where the weights of the dilated kernel lie in the large one.
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
    """Layers of a ConvFFN: 1×1 → GELU → residual DWConv 3×3 → GRN → 1×1 back."""
    return [nn.Conv2d(in_channels, hidden_channels, 1), nn.GELU(), ResidualDWConv(hidden_channels),
            GRN2d(hidden_channels), nn.Conv2d(hidden_channels, in_channels, 1)]


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels)]


def _drop_path(rate: float) -> nn.Module:
    return StochasticDepth(rate, 'row') if rate > 0 else nn.Identity()


@contextmanager
def _batch_norms_kept(module: nn.Module) -> Iterator[None]:
    """Running statistics of the BatchNorms inside stay as they are."""
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
    """What Base-Net's and Focus-Net's blocks share: recomputing themselves in the backward pass.

    Args:
        with_cp (bool): Whether to do so.
    """

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp

    def forward(self, *features: Tensor) -> Tensor:
        """Calls :meth:`update`."""
        if self.with_cp and any(x.requires_grad for x in features):
            # The second pass sees the same batch, which running statistics must not count twice.
            return cp.checkpoint(self.update, *features, use_reentrant=False,
                                 context_fn=lambda: (nullcontext(), _batch_norms_kept(self)))
        return self.update(*features)

    def update(self, *features: Tensor) -> Tensor:
        """What the block computes."""
        raise NotImplementedError


class BaseBlock(Block):
    """A block of Base-Net and Overview-Net (Fig. 4a).

    Args:
        channels (int): Number of channels, C.
        kernel_size (int): Of the Dilated RepConv.
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
            SqueezeExcite(channels), *conv_ffn(channels, BASE_RATIO * channels), _drop_path(drop_path_rate))
        self.ls = ChannelScale(channels) if scaled else nn.Identity()

    def update(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class DynamicBlock(Block):
    """A block of Focus-Net (Fig. 4b): features Z and context prior P are fused, mixed by ContMix, and updated.

    Args:
        channels (int): Channels of Z, C.
        context_channels (int): Channels of P, Cp.
        kernel_size (int): Of the larger of ContMix's two kernels and of the Dilated RepConv.
        groups (int): Groups of channels with a kernel of their own, of each of the two kernel sizes.
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
        self.weight_query = nn.Sequential(*_conv_bn(channels, channels // 2, 1))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(POOLED_SIZE), *_conv_bn(context_channels, channels // 2, 1))
        self.weight_proj = nn.Conv2d(POOLED_SIZE ** 2, sum(size ** 2 for size in self.kernel_sizes), 1)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.zeros(self.heads, 2 * size - 1, 2 * size - 1)) for size in self.kernel_sizes)
        self.dyconv_proj = nn.Sequential(*_conv_bn(channels, channels, 1))
        self.lepe = nn.Sequential(DilatedRepConv(channels, kernel_size, deploy), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcite(channels)
        self.gate = nn.Sequential(*_conv_bn(channels, channels, 1), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, fused, 1))
        self.dwconv2 = ResidualDWConv(fused)
        self.norm2 = LayerNorm2d(fused, eps=1e-6)
        self.mlp = nn.Sequential(*conv_ffn(fused, FOCUS_RATIO * channels))
        self.ls1 = ChannelScale(fused)
        self.ls2 = ChannelScale(fused)
        self.drop_path = _drop_path(drop_path_rate)

    def update(self, x: Tensor, context: Tensor, initial: Tensor) -> Tensor:
        """Z (N, C, H, W), P and the initial P, (N, Cp, H, W) both → updated Z and P side by side, (N, C + Cp, H, W)."""
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
        """ContMix (Sec. 3.2).

        A map smaller than the kernel is enlarged to it and the result averaged back, as its authors do.

        Args:
            fused (Tensor): (N, C + Cp, H, W), of which the queries and the keys are computed.
            x (Tensor): (N, C, H, W), to be convolved.

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
            kernel_size = table.size(1) // 2 + 1
            mixed.append(neighborhood_sum(weights.to(value.dtype).unflatten(-1, (kernel_size, kernel_size)), value))
        x = torch.stack(mixed, dim=1).permute(0, 1, 2, 5, 3, 4).flatten(1, 3)
        return F.adaptive_avg_pool2d(x, size) if smallest < kernel_size else x


class ContextDownsample(nn.Module):
    """Halves the resolution of features and context prior between the two stages of Focus-Net.

    Args:
        in_channels (int): Channels of the features.
        out_channels (int): What they become.
        context_channels (int): Channels of the context prior.
    """

    def __init__(self, in_channels: int, out_channels: int, context_channels: int) -> None:
        super().__init__()
        self.x_proj = nn.Sequential(*_conv_bn(in_channels, out_channels, 3, stride=2))
        self.h_proj = nn.Sequential(*_conv_bn(context_channels, context_channels, 3, stride=2))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) and (N, Cp, H, W) → (N, C', H/2, W/2) and (N, Cp, H/2, W/2), sizes rounded up."""
        return self.x_proj(x), self.h_proj(context)


@MODELS.register_module()
class OverLoCK(BaseModule):
    """OverLoCK, from "An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels" (CVPR 2025).

    Base-Net computes features down to stride 16. Overview-Net takes them to stride 32 at once and yields the context
    prior. Guided by it, Focus-Net refines Base-Net's features at stride 16 and takes them to stride 32; its outputs
    hold the features' channels, then those of the context prior.

    ====  =====================  ==================  ======  ===================
    arch  depths of the 3 nets   channels            groups  output channels
    ====  =====================  ==================  ======  ===================
    xt    2, 2, 3 / 2 / 6, 2     56, 112, 256, 336   4, 6    56, 112, 340, 420
    t     4, 4, 6 / 2 / 12, 2    64, 128, 256, 512   4, 8    64, 128, 384, 640
    s     6, 6, 8 / 3 / 16, 3    64, 128, 320, 512   8, 16   64, 128, 448, 640
    b     8, 8, 10 / 4 / 20, 4   80, 160, 384, 576   6, 9    80, 160, 528, 720
    ====  =====================  ==================  ======  ===================

    Its authors publish the size of the merged model without the auxiliary head, and leave ContMix's weighted sums out
    of the FLOPs. Counted in full, the classifier has, at 224 × 224:

    ====  ======================  =====================  ====================
    arch  as trained              merged                 published
    ====  ======================  =====================  ====================
    xt    17.31 M, 2.86 GFLOPs    16.45 M, 2.70 GFLOPs   16 M, 2.6 GFLOPs
    t     34.99 M, 5.99 GFLOPs    33.47 M, 5.65 GFLOPs   33 M, 5.5 GFLOPs
    s     58.31 M, 10.44 GFLOPs   56.16 M, 9.89 GFLOPs   56 M, 9.7 GFLOPs
    b     98.01 M, 17.96 GFLOPs   94.94 M, 17.10 GFLOPs  95 M, 16.7 GFLOPs
    ====  ======================  =====================  ====================

    Args:
        arch (str | dict): A name from the table, or a dict of ``depths`` (of Base-Net's three stages and of
            Overview-Net), ``focus_depths`` (of Focus-Net's two stages), ``channels`` (of the four strides),
            ``kernel_sizes`` (of the four strides) and ``groups`` (of Focus-Net's two stages). Defaults to 't'.
        in_channels (int): Channels of the image. Defaults to 3.
        drop_path_rate (float): Largest stochastic depth rate; blocks rise to it linearly, in the order Base-Net,
            Overview-Net, Focus-Net. Defaults to 0.
        out_indices (int | Sequence[int]): Stages to return, counted from 0 (negative from the last). Each has a
            LayerNorm of its own; stages after the last one returned are not built. Defaults to (0, 1, 2, 3).
        for_classifier (bool): Whether to return what :class:`OverLoCKClsHead` takes: the last features of Overview-Net
            and of Focus-Net, without LayerNorm. ``out_indices`` must then be 3. Defaults to False.
        add_overview (bool): Whether a projection of Overview-Net's features, at first of scale 1e-5, is added to the
            last stage's output, as in the authors' detectors. Defaults to False.
        frozen_stages (int): How many stages, from the first, are frozen; 0 freezes none. Overview-Net is frozen with
            the third. Defaults to 0.
        with_cp (bool): Whether blocks are recomputed in the backward pass to save memory. Defaults to False.
        deploy (bool): Whether the model is built merged, for weights saved after :meth:`switch_to_deploy`.
            Defaults to False.
        init_cfg (dict | list[dict] | None): MMEngine initialisation, as in :class:`ConvNeur`: ``dict(type='Pretrained',
            checkpoint=...)`` takes a checkpoint of the authors or of this package. Defaults to None.

    Raises:
        ValueError: For an unknown arch, option or stage, naming the value and what was expected.
    """

    arch_settings = {
        'xt': dict(depths=[2, 2, 3, 2], focus_depths=[6, 2], channels=[56, 112, 256, 336],
                   kernel_sizes=[17, 15, 13, 7], groups=[4, 6]),
        't': dict(depths=[4, 4, 6, 2], focus_depths=[12, 2], channels=[64, 128, 256, 512],
                  kernel_sizes=[17, 15, 13, 7], groups=[4, 8]),
        # The paper's table has groups of 5 and 8; the released model has these.
        's': dict(depths=[6, 6, 8, 3], focus_depths=[16, 3], channels=[64, 128, 320, 512],
                  kernel_sizes=[17, 15, 13, 7], groups=[8, 16]),
        'b': dict(depths=[8, 8, 10, 4], focus_depths=[20, 4], channels=[80, 160, 384, 576],
                  kernel_sizes=[17, 15, 13, 7], groups=[6, 9]),
    }

    def __init__(
        self,
        arch: str | dict = 't',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        for_classifier: bool = False,
        add_overview: bool = False,
        frozen_stages: int = 0,
        with_cp: bool = False,
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        pretrained, others = ConvNeur._parse_init_cfg(init_cfg)
        super().__init__(init_cfg=others)
        self.pretrained = pretrained
        self.arch = arch
        settings = self._parse_arch(arch)
        channels, depths, focus_depths = settings['channels'], settings['depths'], settings['focus_depths']
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        self.out_indices = ConvNeur._parse_out_indices(out_indices, 4)
        self.for_classifier = for_classifier
        if for_classifier and self.out_indices != (3,):
            raise ValueError(f'for_classifier needs out_indices=3, got {out_indices!r}')
        self.add_overview = add_overview
        if add_overview and (for_classifier or 3 not in self.out_indices):
            raise ValueError('add_overview needs stage 3 among out_indices and for_classifier=False, got '
                             f'out_indices={out_indices!r} and for_classifier={for_classifier!r}')
        if isinstance(frozen_stages, bool) or frozen_stages not in range(5):
            raise ValueError(f'frozen_stages must be an integer from 0 to 4, got {frozen_stages!r}')
        self.frozen_stages = frozen_stages

        num_blocks = sum(depths) + sum(focus_depths)
        rates = iter([drop_path_rate * i / (num_blocks - 1) for i in range(num_blocks)])
        context = channels[3] // CONTEXT_REDUCTION
        self.context_channels = context

        def base_blocks(stage: int) -> ModuleList:
            return ModuleList(
                BaseBlock(channels[stage], settings['kernel_sizes'][stage], scaled=stage >= 2,
                          drop_path_rate=next(rates), with_cp=with_cp, deploy=deploy)
                for _ in range(depths[stage]))

        def focus_blocks(stage: int) -> ModuleList:
            return ModuleList(
                DynamicBlock(channels[stage], context, settings['kernel_sizes'][stage], settings['groups'][stage - 2],
                             first=stage == 2 and i == 0, drop_path_rate=next(rates), with_cp=with_cp, deploy=deploy)
                for i in range(focus_depths[stage - 2]))

        half = channels[0] // 2
        self.patch_embed1 = nn.Sequential(
            *_conv_bn(in_channels, half, 3, stride=2), nn.GELU(), *_conv_bn(half, half, 3), nn.GELU(),
            *_conv_bn(half, channels[0], 3, stride=2), nn.GELU(), *_conv_bn(channels[0], channels[0], 3))
        self.blocks1 = base_blocks(0)
        last = self.out_indices[-1]
        if last >= 1:
            self.patch_embed2 = nn.Sequential(*_conv_bn(channels[0], channels[1], 3, stride=2))
            self.blocks2 = base_blocks(1)
        if last >= 2:
            self.patch_embed3 = nn.Sequential(*_conv_bn(channels[1], channels[2], 3, stride=2))
            self.blocks3 = base_blocks(2)
            self.patch_embed4 = nn.Sequential(*_conv_bn(channels[2], channels[3], 3, stride=2))
            self.blocks4 = base_blocks(3)
            self.high_level_proj = nn.Conv2d(channels[3], context, 1)
            self.sub_blocks3 = focus_blocks(2)
        if last >= 3:
            self.patch_embedx = ContextDownsample(channels[2], channels[3], context)
            self.sub_blocks4 = focus_blocks(3)
        if not for_classifier:
            out_channels = [*channels[:2], channels[2] + context, channels[3] + context]
            self.extra_norm = nn.ModuleDict(
                {str(i): LayerNorm2d(out_channels[i], eps=1e-6) for i in self.out_indices})
        if add_overview:
            self.extra_norm['4'] = LayerNorm2d(channels[3], eps=1e-6)
            self.h_proj = nn.Sequential(
                nn.Conv2d(channels[3], out_channels[3], 1), ChannelScale(out_channels[3], init_value=1e-5))
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of the stages named by ``out_indices``.

        Args:
            x (Tensor): Images, (N, in_channels, H, W), of any size.

        Returns:
            tuple[Tensor, ...]: For stage i a contiguous (N, C_i, H/2^(2+i), W/2^(2+i)), sizes rounded up; with
            ``for_classifier`` the (N, C, H/32, W/32) of Overview-Net and the (N, C + Cp, H/32, W/32) of Focus-Net.
        """
        outs = []
        for i in range(min(self.out_indices[-1] + 1, 2)):
            x = getattr(self, f'patch_embed{i + 1}')(x)
            for block in getattr(self, f'blocks{i + 1}'):
                x = block(x)
            self._put_out(outs, i, x)
        if self.out_indices[-1] < 2:
            return tuple(outs)

        x = self.patch_embed3(x)
        for block in self.blocks3:
            x = block(x)
        overview = self.patch_embed4(x)
        for block in self.blocks4:
            overview = block(overview)
        prior = self.high_level_proj(overview)
        initial = F.interpolate(prior, x.shape[2:], mode='bilinear')
        x = self._focus(self.sub_blocks3, x, initial, initial)
        self._put_out(outs, 2, x)
        if self.out_indices[-1] < 3:
            return tuple(outs)

        x, context = self.patch_embedx(*self._split(x))
        x = self._focus(self.sub_blocks4, x, context, prior)
        if self.for_classifier:
            return overview, x
        self._put_out(outs, 3, x)
        if self.add_overview:
            outs[-1] = outs[-1] + self.h_proj(self.extra_norm['4'](overview))
        return tuple(outs)

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Features and context prior."""
        return fused.split([fused.size(1) - self.context_channels, self.context_channels], dim=1)

    def _focus(self, blocks: ModuleList, x: Tensor, context: Tensor, initial: Tensor) -> Tensor:
        for block in blocks[:-1]:
            x, context = self._split(block(x, context, initial))
        return blocks[-1](x, context, initial)

    def _put_out(self, outs: list[Tensor], stage: int, x: Tensor) -> None:
        if stage in self.out_indices and not self.for_classifier:
            # The permuted LayerNorm leaves channels_last memory, which mmcv's operators read as if it were NCHW.
            outs.append(self.extra_norm[str(stage)](x).contiguous())

    def switch_to_deploy(self) -> None:
        """Merges every Dilated RepConv into one convolution; the outputs in evaluation mode stay the same."""
        for module in self.modules():
            if isinstance(module, DilatedRepConv):
                module.switch_to_deploy()

    def init_weights(self) -> None:
        """Initialises all weights, then loads the pretrained ones if there are any; a second call changes nothing.

        Raises:
            ValueError: If the checkpoint named by ``init_cfg`` holds none of the backbone's weights, or weights of
                other shapes.
        """
        called_before = self.is_init
        super().init_weights()
        if called_before or self.pretrained is None:
            return
        checkpoint = self.pretrained.get('checkpoint')
        if checkpoint:
            load_pretrained(self, checkpoint, self.pretrained.get('prefix'), self.pretrained.get('allow_pickle', False))
        else:
            MMLogger.get_current_instance().warning(
                f'OverLoCK-{self.arch} starts from random weights: no ImageNet checkpoint is given. Set '
                'model.backbone.init_cfg.checkpoint to a path or URL.')

    def train(self, mode: bool = True) -> OverLoCK:
        """Sets the mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        stages = (('patch_embed1', 'blocks1'), ('patch_embed2', 'blocks2'),
                  ('patch_embed3', 'blocks3', 'patch_embed4', 'blocks4', 'high_level_proj', 'sub_blocks3'),
                  ('patch_embedx', 'sub_blocks4'))
        for names in stages[:min(self.frozen_stages, self.out_indices[-1] + 1)]:
            for name in names:
                getattr(self, name).eval().requires_grad_(False)

    def _parse_arch(self, arch: str | dict) -> dict[str, list[int]]:
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ValueError(f'arch must be one of {tuple(self.arch_settings)} or a dict, got {arch!r}')
            return self.arch_settings[arch]
        lengths = dict(depths=4, focus_depths=2, channels=4, kernel_sizes=4, groups=2)
        if {name: len(values) for name, values in arch.items()} != lengths:
            raise ValueError(f'a custom arch must be a dict of lists of the lengths {lengths}, got {dict(arch)}')
        for channels, groups in zip(arch['channels'][2:], arch['groups']):
            if channels % (4 * groups):
                raise ValueError(f'channels of Focus-Net must be a multiple of 4 x groups, got {channels} channels and '
                                 f'{groups} groups')
        return dict(arch)
