"""Base class of the backbones: pretrained weights, frozen stages, and checks of shared options."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from ._mmengine import BaseModule, MMLogger, PretrainedInit


def as_output(x: Tensor) -> Tensor:
    """Return a feature map (B, C, H, W) in contiguous memory, as backbones output it.

    The permuted LayerNorm before it leaves channels_last memory. The RoI operators of a compiled mmcv read that as if
    it were contiguous and silently give wrong features; torchvision's operators read any layout.
    """
    return x.contiguous()


class Backbone(BaseModule):
    """A backbone of stages, whose first stages can be frozen.

    A subclass defines ``stage_modules`` and calls :meth:`_freeze_stages` after building its layers.

    Args:
        arch (str | dict): Its name appears in log messages.
        num_stages (int): Number of stages, built or not.
        drop_path_rate (float): Stochastic depth rate in [0, 1); only checked here.
        out_indices (int | Sequence[int]): Stages to return, counted from 0 (negative from the last).
        frozen_stages (int): Number of stages frozen, from the first; 0 and, as in mmdet, -1 freeze none.
        init_cfg (dict | list[dict] | None): See :class:`ConvNeur`.

    Raises:
        ValueError: For an unknown option or stage, naming the value and what was expected.
    """

    def __init__(self, arch: str | dict, num_stages: int, drop_path_rate: float, out_indices: int | Sequence[int],
                 frozen_stages: int, init_cfg: dict | list[dict] | None) -> None:
        pretrained, others = _parse_init_cfg(init_cfg)
        super().__init__(init_cfg=others)
        self.pretrained = pretrained
        self.arch = arch
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        self.out_indices = _parse_out_indices(out_indices, num_stages)
        if type(frozen_stages) is not int or frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(f'frozen_stages must be an integer from -1 to {num_stages}, got {frozen_stages!r}')
        self.frozen_stages = frozen_stages

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules of each built stage, without its output LayerNorm."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise all weights, then load the pretrained ones if there are any; a second call changes nothing.

        Raises:
            ValueError: If the checkpoint named by ``init_cfg`` holds none of the backbone's weights, or weights of
                other shapes.
        """
        called_before = self.is_init
        super().init_weights()
        if called_before:  # MMEngine has logged a warning and changed nothing
            return
        self._complete_weights()
        if self.pretrained is None:
            return
        checkpoint = self.pretrained.get('checkpoint')
        if checkpoint:
            from ..engine.files.checkpoint import load_pretrained  # imported here, as it needs MMEngine
            load_pretrained(self, checkpoint, self.pretrained.get('prefix'), self.pretrained.get('allow_pickle', False))
        else:
            MMLogger.get_current_instance().warning(
                f'{type(self).__name__}-{self.arch} starts from random weights: no ImageNet checkpoint is given. Set '
                'model.backbone.init_cfg.checkpoint to a path or URL.')

    def _complete_weights(self) -> None:
        """Set weights that ``init_cfg`` cannot describe, before pretrained ones are loaded."""

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        for modules in self.stage_modules()[:max(self.frozen_stages, 0)]:
            for module in modules:
                module.eval().requires_grad_(False)


def check_common_options(in_channels: int, **flags: bool) -> None:
    """Raise a ValueError unless ``in_channels`` is a positive int and all flags, given by name, are bools.

    On the command line ``with_cp=no`` becomes the string 'no', which is true in Python.
    """
    if isinstance(in_channels, bool) or not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f'in_channels must be an integer of at least 1, got {in_channels!r}')
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}')


def _parse_init_cfg(init_cfg: dict | list[dict] | None) -> tuple[dict | None, list[dict]]:
    """Return the checkpoint to load, if there is one, and the settings that draw the weights."""
    init_cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
    pretrained = [cfg for cfg in init_cfgs if cfg.get('type') in ('Pretrained', PretrainedInit)]
    if len(pretrained) > 1:
        names = ', '.join(repr(cfg.get('checkpoint')) for cfg in pretrained)
        raise ValueError(f'init_cfg must name one checkpoint at most, got {names}')
    others = [cfg for cfg in init_cfgs if cfg not in pretrained]
    default = dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)
    return dict(pretrained[0], type='Pretrained') if pretrained else None, others or [default]


def _parse_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    indices = [out_indices] if isinstance(out_indices, int) else (
        list(out_indices) if isinstance(out_indices, Sequence) else [])
    if not indices or any(type(i) is not int or not -num_stages <= i < num_stages for i in indices):
        raise ValueError(f'out_indices must name stages from {-num_stages} to {num_stages - 1}, got {out_indices!r}')
    indices = [i % num_stages for i in indices]
    if sorted(set(indices)) != indices:
        raise ValueError(f'out_indices must be in ascending order without repetition, got {out_indices!r}')
    return tuple(indices)
