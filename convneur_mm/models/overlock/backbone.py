"""OverLoCK, a backbone for comparison. Weights have the names of its authors' checkpoints."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._mmengine import MODELS, ModuleList
from ..base import Backbone, as_output, check_common_options
from ..blocks import LayerNorm2d
from .blocks import BaseBlock, ChannelScale, ContextDownsample, DilatedRepConv, DynamicBlock, conv_bn

CONTEXT_REDUCTION = 4  # The context prior has a quarter of the last stage's channels.


@MODELS.register_module()
class OverLoCK(Backbone):
    """OverLoCK, from "An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels" (CVPR 2025).

    Base-Net computes features down to stride 16. Overview-Net takes them directly to stride 32 and outputs the context
    prior. Guided by the prior, Focus-Net refines Base-Net's features at stride 16 and takes them to stride 32. Its
    output channels are those of the features, then those of the context prior.

    | arch | depths of the 3 nets | channels          | groups | output channels   |
    |------|----------------------|-------------------|--------|-------------------|
    | xt   | 2, 2, 3 / 2 / 6, 2   | 56, 112, 256, 336 | 4, 6   | 56, 112, 340, 420 |
    | t    | 4, 4, 6 / 2 / 12, 2  | 64, 128, 256, 512 | 4, 8   | 64, 128, 384, 640 |
    | s    | 6, 6, 8 / 3 / 16, 3  | 64, 128, 320, 512 | 8, 16  | 64, 128, 448, 640 |
    | b    | 8, 8, 10 / 4 / 20, 4 | 80, 160, 384, 576 | 6, 9   | 80, 160, 528, 720 |

    Its authors publish the size of the merged model without the auxiliary head, and do not count ContMix's weighted
    sums in the FLOPs. Counted in full, the classifier at 224 × 224 has:

    | arch | as trained            | merged                | published         |
    |------|-----------------------|-----------------------|-------------------|
    | xt   | 17.31 M, 2.86 GFLOPs  | 16.45 M, 2.70 GFLOPs  | 16 M, 2.6 GFLOPs  |
    | t    | 34.99 M, 5.99 GFLOPs  | 33.47 M, 5.65 GFLOPs  | 33 M, 5.5 GFLOPs  |
    | s    | 58.31 M, 10.44 GFLOPs | 56.16 M, 9.89 GFLOPs  | 56 M, 9.7 GFLOPs  |
    | b    | 98.01 M, 17.96 GFLOPs | 94.94 M, 17.10 GFLOPs | 95 M, 16.7 GFLOPs |

    Args:
        arch (str | dict): A name from the table, or a dict of ``depths`` (of Base-Net's three stages and of
            Overview-Net), ``focus_depths`` (of Focus-Net's two stages), ``channels`` (of the four strides),
            ``kernel_sizes`` (of the four strides) and ``groups`` (of Focus-Net's two stages). Defaults to 't'.
        in_channels (int): Channels of the image. Defaults to 3.
        drop_path_rate (float): Largest stochastic depth rate; it rises linearly over the blocks, in the order Base-Net,
            Overview-Net, Focus-Net. Defaults to 0.
        out_indices (int | Sequence[int]): Stages to return, counted from 0 (negative from the last). Each has a
            LayerNorm of its own; stages after the last returned one are not built. Defaults to (0, 1, 2, 3).
        for_classifier (bool): Whether to return the inputs of :class:`OverLoCKClsHead`: the last features of
            Overview-Net and of Focus-Net, without LayerNorm. ``out_indices`` must then be 3. Defaults to False.
        add_overview (bool): Whether a projection of Overview-Net's features, with an initial scale of 1e-5, is added
            to the last stage's output, as in the authors' detectors. Defaults to False.
        frozen_stages (int): Number of stages frozen, from the first; 0 and, as in mmdet, -1 freeze none.
            Overview-Net is frozen with the third. Defaults to 0.
        norm_eval (bool): Whether BatchNorms keep their running statistics in training, for detectors with few images
            per GPU. Defaults to False.
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
        # The paper's table has groups of 5 and 8; the released model has 8 and 16.
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
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        check_common_options(in_channels, for_classifier=for_classifier, add_overview=add_overview, norm_eval=norm_eval,
                             with_cp=with_cp, deploy=deploy)
        super().__init__(arch, 4, drop_path_rate, out_indices, frozen_stages, init_cfg)
        settings = self._parse_arch(arch)
        channels, depths, focus_depths = settings['channels'], settings['depths'], settings['focus_depths']
        self.norm_eval = norm_eval
        self.for_classifier = for_classifier
        if for_classifier and self.out_indices != (3,):
            raise ValueError(f'for_classifier needs out_indices=3, got {out_indices!r}')
        self.add_overview = add_overview
        if add_overview and (for_classifier or 3 not in self.out_indices):
            raise ValueError('add_overview needs stage 3 among out_indices and for_classifier=False, got '
                             f'out_indices={out_indices!r} and for_classifier={for_classifier!r}')

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
            *conv_bn(in_channels, half, 3, stride=2), nn.GELU(), *conv_bn(half, half, 3), nn.GELU(),
            *conv_bn(half, channels[0], 3, stride=2), nn.GELU(), *conv_bn(channels[0], channels[0], 3))
        self.blocks1 = base_blocks(0)
        last = self.out_indices[-1]
        if last >= 1:
            self.patch_embed2 = nn.Sequential(*conv_bn(channels[0], channels[1], 3, stride=2))
            self.blocks2 = base_blocks(1)
        if last >= 2:
            self.patch_embed3 = nn.Sequential(*conv_bn(channels[1], channels[2], 3, stride=2))
            self.blocks3 = base_blocks(2)
            self.patch_embed4 = nn.Sequential(*conv_bn(channels[2], channels[3], 3, stride=2))
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
        """Return the features of the stages named by ``out_indices``.

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
        """Split fused features into features and context prior."""
        return fused.split([fused.size(1) - self.context_channels, self.context_channels], dim=1)

    def _focus(self, blocks: ModuleList, x: Tensor, context: Tensor, initial: Tensor) -> Tensor:
        for block in blocks[:-1]:
            x, context = self._split(block(x, context, initial))
        return blocks[-1](x, context, initial)

    def _put_out(self, outs: list[Tensor], stage: int, x: Tensor) -> None:
        if stage in self.out_indices and not self.for_classifier:
            outs.append(as_output(self.extra_norm[str(stage)](x)))

    def train(self, mode: bool = True) -> OverLoCK:
        """Set the mode; with ``norm_eval`` all BatchNorms stay in evaluation mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def switch_to_deploy(self) -> None:
        """Merge every Dilated RepConv into one convolution; the outputs in evaluation mode stay the same."""
        for module in self.modules():
            if isinstance(module, DilatedRepConv):
                module.switch_to_deploy()

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules of each built stage; Overview-Net belongs to the third."""
        names = (('patch_embed1', 'blocks1'), ('patch_embed2', 'blocks2'),
                 ('patch_embed3', 'blocks3', 'patch_embed4', 'blocks4', 'high_level_proj', 'sub_blocks3'),
                 ('patch_embedx', 'sub_blocks4'))
        return [[getattr(self, name) for name in stage] for stage in names[:self.out_indices[-1] + 1]]

    def _parse_arch(self, arch: str | dict) -> dict[str, list[int]]:
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ValueError(f'arch must be one of {tuple(self.arch_settings)} or a dict, got {arch!r}')
            return self.arch_settings[arch]
        lengths = dict(depths=4, focus_depths=2, channels=4, kernel_sizes=4, groups=2)
        if not isinstance(arch, dict) or {name: len(values) if isinstance(values, (list, tuple)) else None
                                          for name, values in arch.items()} != lengths:
            raise ValueError(f'a custom arch must be a dict of lists of the lengths {lengths}, got {arch!r}')
        for channels, groups in zip(arch['channels'][2:], arch['groups']):
            if channels % (4 * groups):
                raise ValueError(f'channels of Focus-Net must be a multiple of 4 x groups, got {channels} channels and '
                                 f'{groups} groups')
        return dict(arch)
