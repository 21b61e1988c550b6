"""The ConvNeur backbone."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.neural_memory import MemoryState
from ._mmengine import MODELS, ModuleList, Sequential
from .base import Backbone, as_output, check_common_options
from .blocks import FUSIONS, ConvNeurBlock, LayerNorm2d, Stage
from .global_branch import GlobalBranch
from .global_branches import GLOBAL_BRANCHES, NeuralMemory, branch_options
from .hub import CARD, TIMM_CFG, HubModel

PLACEMENTS = ('stage', 'block', 'none')


@MODELS.register_module()
class ConvNeur(Backbone, HubModel, library_name='convneur_mm', tags=['timm'], model_card_template=CARD,
               pipeline_tag='image-feature-extraction'):
    """ConvNeur, from "Efficiency Follows Global-Local Decoupling" (CVPR 2026).

    Four stages of ConvNeXt-V2 blocks; the first block of each stage is gated by a global branch, a neural memory that
    is read and rewritten chunk by chunk over the feature map.

    | arch | depths      | channels            | mem_channels |
    |------|-------------|---------------------|--------------|
    | m1   | 2, 2, 6, 2  | 40, 80, 160, 320    | 80           |
    | m2   | 2, 2, 6, 2  | 48, 96, 192, 384    | 96           |
    | m3   | 2, 2, 6, 2  | 64, 128, 256, 512   | 128          |
    | m4   | 2, 2, 8, 2  | 80, 160, 320, 640   | 160          |
    | m5   | 3, 3, 9, 3  | 96, 192, 384, 768   | 192          |
    | m6   | 3, 3, 27, 3 | 128, 256, 512, 1024 | 256          |

    The paper has m1 to m4. m5 and m6 are ours: they have the depths and channels of ConvNeXt-V2 Tiny and Base, so that
    weights can be converted from those.

    Args:
        arch (str | dict): A name from the table, or a dict of ``depths``, ``channels`` and ``mem_channels``.
            Defaults to 'm3'.
        in_channels (int): Channels of the image. Defaults to 3.
        memory_cfg (dict | None): Options of the global branch that differ from their defaults: ``mem_channels``, the
            width of its bottleneck (default: by arch), and those of the branch's class. Those of the neural memory are
            listed in :class:`NeuralMemory`, among them ``chunk_size=196`` and ``inner_step=1.0``. Unknown options are
            refused. Defaults to None.
        placement (str): Blocks with a global branch: the first of each 'stage', every 'block', or 'none'.
            Defaults to 'stage'.
        global_branch (str): Module in the bottleneck: 'neural_memory' or, for comparisons, 'cbam', 'non_local',
            'self_attention', 'rwkv' or 'titans', see :mod:`.global_branches`. Defaults to 'neural_memory'.
        fusion (str): How the global map is fused with the local features: 'gate', 'add' or 'concat'. Defaults to
            'gate'.
        drop_path_rate (float): Largest stochastic depth rate; it rises linearly over the blocks. Defaults to 0.
        out_indices (int | Sequence[int]): Stages to return, counted from 0 (negative from the last). Each has a
            LayerNorm of its own; stages after the last returned one are not built. Defaults to (0, 1, 2, 3).
        gap_before_final_norm (bool): Whether each output is averaged over the image before its LayerNorm, as for
            classification. Defaults to False.
        frozen_stages (int): Number of stages frozen, from the first; 0 and, as in mmdet, -1 freeze none.
            Defaults to 0.
        with_cp (bool): Whether blocks are recomputed in the backward pass to save memory. Defaults to False.
        channels_last (bool): Whether to convert the image to channels_last memory, which all later layers use for
            their features anyway: the first convolution then needs no copy. The outputs are contiguous in both cases,
            see :func:`convneur_mm.models.base.as_output`. Defaults to True.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. ``dict(type='Pretrained', checkpoint=...)``,
            alone or in a list, takes a path or URL of a ConvNeur checkpoint, of the backbone or of a whole model, and
            is loaded last. With a ``checkpoint`` of None, training starts from random weights, with a warning. All
            others replace the default, a truncated normal distribution of the convolutions' and linear layers' weights
            with std 0.02. A stem bias of zero is drawn from it too. Defaults to None.

    Raises:
        ValueError: For an unknown arch, option or stage, naming the value and what was expected.
    """

    arch_settings = {
        'm1': dict(depths=[2, 2, 6, 2], channels=[40, 80, 160, 320], mem_channels=80),
        'm2': dict(depths=[2, 2, 6, 2], channels=[48, 96, 192, 384], mem_channels=96),
        'm3': dict(depths=[2, 2, 6, 2], channels=[64, 128, 256, 512], mem_channels=128),
        'm4': dict(depths=[2, 2, 8, 2], channels=[80, 160, 320, 640], mem_channels=160),
        'm5': dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768], mem_channels=192),
        'm6': dict(depths=[3, 3, 27, 3], channels=[128, 256, 512, 1024], mem_channels=256),
    }

    def __init__(
        self,
        arch: str | dict = 'm3',
        in_channels: int = 3,
        memory_cfg: dict | None = None,
        placement: str = 'stage',
        global_branch: str = 'neural_memory',
        fusion: str = 'gate',
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        gap_before_final_norm: bool = False,
        frozen_stages: int = 0,
        with_cp: bool = False,
        channels_last: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        check_common_options(in_channels, gap_before_final_norm=gap_before_final_norm, with_cp=with_cp,
                             channels_last=channels_last)
        # How to build this model again, without what belongs to one training.
        self.options = dict(
            arch=arch, in_channels=in_channels, memory_cfg=memory_cfg, placement=placement,
            global_branch=global_branch, fusion=fusion, out_indices=out_indices,
            gap_before_final_norm=gap_before_final_norm, channels_last=channels_last)
        depths, channels, mem_channels = self._parse_arch(arch)
        num_stages = len(depths)
        super().__init__(arch, num_stages, drop_path_rate, out_indices, frozen_stages, init_cfg)
        self.depths, self.channels = depths, channels
        for name, value, known in (('placement', placement, PLACEMENTS), ('fusion', fusion, FUSIONS),
                                   ('global_branch', global_branch, tuple(GLOBAL_BRANCHES))):
            if value not in known:
                raise ValueError(f'{name} must be one of {known}, got {value!r}')
        if placement == 'none' and global_branch != 'neural_memory':
            raise ValueError(f"global_branch={global_branch!r} needs placement='stage' or 'block', got 'none'")
        memory_cfg = self._parse_memory_cfg(memory_cfg, global_branch)
        if memory_cfg.get('mem_channels') is not None:
            mem_channels = memory_cfg['mem_channels']
        memory_cfg.pop('mem_channels', None)
        if not isinstance(mem_channels, int) or mem_channels < 1:
            raise ValueError(f'mem_channels must be an integer of at least 1, got {mem_channels!r}')
        self.placement, self.global_branch = placement, global_branch
        self.gap_before_final_norm = gap_before_final_norm
        self.channels_last = channels_last

        num_blocks = sum(self.depths)
        drop_path_rates = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        first_blocks = [sum(self.depths[:i]) for i in range(num_stages)]
        self.downsample_layers = ModuleList()
        self.stages = ModuleList()
        for i in range(self.out_indices[-1] + 1):
            channels = self.channels[i]
            if i == 0:
                downsample = Sequential(nn.Conv2d(in_channels, channels, 4, stride=4), LayerNorm2d(channels, eps=1e-6))
            else:
                downsample = Sequential(
                    LayerNorm2d(self.channels[i - 1], eps=1e-6),
                    nn.Conv2d(self.channels[i - 1], channels, 2, stride=2))
            self.downsample_layers.append(downsample)
            self.stages.append(Stage(*(
                ConvNeurBlock(
                    channels,
                    global_branch=GlobalBranch(channels, mem_channels, global_branch, **memory_cfg)
                    if placement == 'block' or (placement == 'stage' and j == 0) else None,
                    fusion=fusion,
                    drop_path_rate=drop_path_rates[first_blocks[i] + j],
                    with_cp=with_cp)
                for j in range(self.depths[i]))))
            if i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm2d(channels, eps=1e-6))
        self._freeze_stages()

    def forward(self, x: Tensor, states: Sequence[MemoryState] | None = None, return_states: bool = False,
                ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], tuple[MemoryState, ...]]:
        """Return the features of the stages named by ``out_indices``.

        With ``states`` the memories continue from an earlier call, such as that of the previous video frame: each of
        the N images is the next frame of a separate stream. Frames may change their size. With 'previous' the first
        chunk of a frame then reads what all earlier frames wrote; with 'final' all of its tokens read the memory after
        this frame. The parallel rule still takes its gradients at the learned M_0. Where states are returned, the last
        chunk of the frame is written too; with 'previous' this frame's own features do not depend on it. So for each
        memory, consecutive frames equal one call on all their chunks, up to the limit of
        :func:`~.global_branch.limit_norm`. Autograd records consecutive calls; detach the states to end that.

        Args:
            x (Tensor): Images, (N, in_channels, H, W), of at least 32 × 32 pixels.
            states (Sequence[MemoryState] | None): States that an earlier call returned, one for each memory in the
                order of the blocks, in float64 for float64 images and else in float32. None starts at the learned
                memories. Defaults to None.
            return_states (bool): Whether to return the memories after this call too. Defaults to False.

        Returns:
            tuple: For stage i a contiguous (N, C_i, H/2^(2+i), W/2^(2+i)), sizes rounded down; or (N, C_i) with
            ``gap_before_final_norm``. With ``return_states`` a pair of that tuple and the states.

        Raises:
            ValueError: If the image is too small for the last stage, if the states do not fit the backbone or the
                images, or if it has no memory whose state could be carried.
        """
        if states is not None or return_states:
            self._check_states(x, states)
        x = self._prepared(x, len(self.stages))
        outs, returned = [], []
        given = None if states is None else iter(states)
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            if return_states:
                x, of_stage = stage(downsample(x), given, return_states=True)
                returned += of_stage
            else:
                x = stage(downsample(x), given)
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                if self.gap_before_final_norm:
                    outs.append(norm(x.mean((2, 3), keepdim=True)).flatten(1))
                else:
                    outs.append(as_output(norm(x)))
        return (tuple(outs), tuple(returned)) if return_states else tuple(outs)

    def _prepared(self, x: Tensor, num_stages: int) -> Tensor:
        """Check that images are large enough for ``num_stages``, and return them in the first layer's layout."""
        stride = 2 ** (1 + num_stages)
        if min(x.shape[2:]) < stride:
            raise ValueError(f'images must be at least {stride} x {stride} pixels, got {tuple(x.shape[2:])}')
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def initial_states(self, batch: int) -> tuple[MemoryState, ...]:
        """Return the states of ``batch`` streams before their first frame: the learned M_0 and zero momentum.

        Raises:
            ValueError: If the backbone has no memory whose state could be carried.
        """
        states = []
        for memory in self._memories().values():
            w1, w2 = (w.to(torch.promote_types(w.dtype, torch.float32)).expand(batch, *w.shape)
                      for w in (memory.w1, memory.w2))
            states.append(MemoryState(w1, w2, torch.zeros_like(w1), torch.zeros_like(w2)))
        return tuple(states)

    def _memories(self) -> dict[str, NeuralMemory]:
        """Return the memories by name, in the order of the blocks.

        Raises:
            ValueError: If there are none.
        """
        memories = {name: module for name, module in self.stages.named_modules(prefix='stages')
                    if isinstance(module, NeuralMemory)}
        if not memories:
            setting = f'placement={self.placement!r}, global_branch={self.global_branch!r}'
            raise ValueError('states are those of neural memories, of which this ConvNeur has none: it has '
                             f"{setting}, and needs placement='stage' or 'block' and global_branch='neural_memory'")
        return memories

    def _check_states(self, x: Tensor, states: Sequence[MemoryState] | None) -> None:
        memories = self._memories()
        if states is None:
            return
        if len(states) != len(memories) or not all(isinstance(state, MemoryState) for state in states):
            raise ValueError(f'states must be {len(memories)} MemoryStates, one for each of {", ".join(memories)}, '
                             f'got {[type(state).__name__ for state in states]}')
        for (name, memory), state in zip(memories.items(), states):
            dtype = torch.promote_types(memory.w1.dtype, torch.float32)
            for field, tensor in state._asdict().items():
                shape = (len(x), *(memory.w1 if field in ('w1', 'p1') else memory.w2).shape)
                for what, found, expected in (('shape', tuple(tensor.shape), shape), ('dtype', tensor.dtype, dtype),
                                              ('device', tensor.device, x.device)):
                    if found != expected:
                        raise ValueError(f'the state of {name} has {field} of {what} {found}, expected {expected} for '
                                         f'{len(x)} images on {x.device}: states are carried on with the same '
                                         'backbone, number of images, dtype and device')

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules of each built stage."""
        return [list(modules) for modules in zip(self.downsample_layers, self.stages)]

    def hub_config(self) -> dict[str, Any]:
        """Return the arguments of this class, and what timm needs to build its model of the same backbone."""
        if not isinstance(self.arch, str) or self.out_indices[-1] < len(self.depths) - 1:
            return dict(self.options)  # timm has no such model
        own = {name: self.options[name] for name in ('memory_cfg', 'placement', 'global_branch', 'fusion')}
        channels = self.options['in_channels']
        return dict(
            self.options, architecture=f'convneur_{self.arch}', num_classes=0, num_features=self.channels[-1],
            model_args=dict(own, in_chans=channels),
            pretrained_cfg=dict(TIMM_CFG, num_classes=0, input_size=(channels, *TIMM_CFG['input_size'][1:])))

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer of a parameter for layer-wise learning rates, and the number of layers.

        Layers are counted as in mmpretrain's ConvNeXt. The stem is layer 0, and the first two stages are 1 and 2. From
        layer 3 on, three blocks of the third stage share one; the fourth stage is the last. A downsampling layer counts
        as the stage behind it, and a memory as its block. All other parameters of the model are one layer above.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): Prefix of the backbone's parameters, such as 'backbone.'. Defaults to ''.
        """
        last = max(6, 3 + math.ceil(self.depths[2] / 3)) if len(self.depths) > 2 else len(self.depths)
        part, _, rest = param_name.removeprefix(prefix).partition('.')
        if not param_name.startswith(prefix) or part not in ('downsample_layers', 'stages'):
            return last + 1, last + 2
        stage, block, *_ = rest.split('.')
        if part == 'downsample_layers':
            return (0, 2, 3, last)[min(int(stage), 3)], last + 2
        return (1, 2, 3 + int(block) // 3, last)[min(int(stage), 3)], last + 2

    def _complete_weights(self) -> None:
        # With a bias of zero, an image's padding is zero after the stem, and every LayerNorm multiplies its gradient by
        # 1 / sqrt(eps) = 1000 in the backward pass: over four stages, training from random weights fails at once.
        stem_bias = self.downsample_layers[0][0].bias
        if not stem_bias.any():
            nn.init.trunc_normal_(stem_bias, std=0.02)

    def _parse_arch(self, arch: str | dict) -> tuple[list[int], list[int], int]:
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ValueError(f'arch must be one of {tuple(self.arch_settings)} or a dict, got {arch!r}')
            arch = self.arch_settings[arch]
        expected = {'depths', 'channels', 'mem_channels'}
        if not isinstance(arch, dict) or set(arch) != expected or not _are_sizes(arch['depths'], arch['channels']):
            raise ValueError(f'a custom arch must be a dict of {sorted(expected)} with as many depths as channels, all '
                             f'of them integers of at least 1, got {arch!r}')
        return list(arch['depths']), list(arch['channels']), arch['mem_channels']

    @staticmethod
    def _parse_memory_cfg(memory_cfg: dict | None, global_branch: str) -> dict:
        if memory_cfg is not None and not isinstance(memory_cfg, dict):
            raise ValueError(f'memory_cfg must be a dict of options, got {memory_cfg!r}')
        memory_cfg = dict(memory_cfg or {})
        known = ('mem_channels', *branch_options(global_branch))
        unknown = sorted(set(memory_cfg) - set(known))
        if unknown:
            raise ValueError(f'memory_cfg takes the keys {known} with global_branch={global_branch!r}, got {unknown}')
        return memory_cfg


def _are_sizes(depths: object, channels: object) -> bool:
    return all(isinstance(sizes, (list, tuple)) and sizes and all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        for sizes in (depths, channels)) and len(depths) == len(channels)
