"""ConvNeur for timm: ``import convneur_mm.timm`` registers ``convneur_m1`` to ``convneur_m6`` with its factory.

    import timm
    import convneur_mm.timm
    model = timm.create_model('convneur_m3', features_only=True)

It needs timm, and none of the OpenMMLab packages. There are no pretrained weights; ``checkpoint_path`` takes a
backbone's or classifier's checkpoint of this package, and ``local-dir:FOLDER`` and ``hf-hub:REPOSITORY`` what
``save_pretrained`` wrote and ``push_to_hub`` uploaded.
"""
from __future__ import annotations

import os
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, create_model, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .models import NeuralMemory
from .models.convneur import ConvNeur
from .models.hub import TIMM_CFG, without_unused_norms

__all__ = ['ConvNeurClassifier']

ARCHS = tuple(ConvNeur.arch_settings)


class ConvNeurClassifier(ConvNeur):
    """:class:`ConvNeur` as a timm model, with pooling, LayerNorm and a linear layer after the last stage.

    Args:
        arch (str): 'm1' to 'm6'.
        num_classes (int): Number of classes; 0 omits the linear layer. Defaults to 1000.
        in_chans (int): Channels of the image. Defaults to 3.
        global_pool (str): 'avg', 'max' or '', which keeps the map. Defaults to 'avg'.
        drop_rate (float): Dropout before the linear layer. Defaults to 0.
        drop_path_rate (float): Largest stochastic depth rate. Defaults to 0.
        **options: Other options of :class:`ConvNeur`, such as ``memory_cfg``.

    Raises:
        ValueError: For an option outside its range.
    """

    def __init__(self, arch: str, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0.0, drop_path_rate: float = 0.0, **options: Any) -> None:
        super().__init__(arch, in_channels=in_chans, drop_path_rate=drop_path_rate, out_indices=-1, **options)
        self.feature_info = [dict(num_chs=channels, reduction=4 * 2**i, module=f'stages.{i}')
                             for i, channels in enumerate(self.channels)]
        self.num_features = self.head_hidden_size = self.channels[-1]
        self.drop_rate = drop_rate
        self._draw_weights()
        self.head = nn.ModuleDict()
        self.reset_classifier(num_classes, global_pool)
        self._register_load_state_dict_pre_hook(_without_prefix)

    def hub_config(self) -> dict[str, Any]:
        """Return what timm and :class:`ConvNeur` need to build this model again."""
        config = super().hub_config()
        config['model_args']['global_pool'] = self.global_pool
        config['pretrained_cfg']['num_classes'] = self.num_classes
        return dict(config, num_classes=self.num_classes)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **options: Any) -> ConvNeurClassifier:
        """Return the model of a folder that :meth:`save_pretrained` wrote, or of a repository on the hub.

        Args:
            name (str | PathLike): The folder or the repository.
            **options: Options of :func:`timm.create_model`.
        """
        source = 'local-dir' if os.path.isdir(name) else 'hf-hub'
        return create_model(f'{source}:{os.fspath(name)}', pretrained=True, **options).eval()

    def _draw_weights(self) -> None:
        """Draw the weights as MMEngine does by this package's defaults."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, NeuralMemory):
                module.reset_parameters()
        nn.init.trunc_normal_(self.downsample_layers[0][0].bias, std=0.02)  # see ConvNeur._complete_weights

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
                              ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return features of stages, (N, C_i, H/2^(2+i), W/2^(2+i)), in the interface of timm's other models.

        Args:
            x (Tensor): Images, (N, in_chans, H, W).
            indices (int | list[int] | None): Number of last stages, or indices of stages; None for all.
            norm (bool): Whether to apply the LayerNorm to the last stage's features.
            stop_early (bool): Whether to skip stages after the last requested one.
            output_fmt (str): Only 'NCHW'.
            intermediates_only (bool): Whether to omit the last features, which are else returned before the list.

        Raises:
            ValueError: If the format is another, or an image is too small.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        stages = list(zip(self.downsample_layers, self.stages))[:last + 1 if stop_early else None]
        x, features = self._prepared(x, len(stages)), []
        for i, (downsample, stage) in enumerate(stages):
            x = stage(downsample(x))
            if i in taken:
                features.append(self.norm3(x) if norm and i == len(self.depths) - 1 else x)
        features = [feature.contiguous() for feature in features]
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove what the features of ``indices`` do not need, and return the remaining indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.downsample_layers, self.stages = self.downsample_layers[:last + 1], self.stages[:last + 1]
        shortened = last < len(self.depths) - 1
        if shortened:
            self.num_features = self.head_hidden_size = self.channels[last]
        if prune_norm or shortened:
            self.norm3 = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, '')
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (N, in_chans, H, W) to the last stage's features, (N, C, H/32, W/32)."""
        return self.forward_intermediates(x, indices=1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map those features to scores (N, num_classes), or to the linear layer's input, (N, C)."""
        if self.global_pool == 'avg':
            x = x.mean((2, 3), keepdim=True)
        elif self.global_pool == 'max':
            x = x.amax((2, 3), keepdim=True)
        x = self.norm3(x)
        if self.global_pool:
            x = x.flatten(1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_chans, H, W) to (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the linear layer, or the identity."""
        return self.head['fc']

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer, and the pooling if one is named."""
        if global_pool is not None:
            if global_pool not in ('avg', 'max', ''):
                raise ValueError(f"global_pool must be 'avg', 'max' or '', got {global_pool!r}")
            self.global_pool = global_pool
        if num_classes and not self.global_pool:
            raise ValueError(f"a classifier of {num_classes} classes needs global_pool='avg' or 'max', got ''")
        self.num_classes = num_classes
        self.head['fc'] = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head['fc'].weight, std=0.02)
            nn.init.zeros_(self.head['fc'].bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of layers' weights, for layer-wise learning rates: the stem, then each stage or block."""
        return dict(
            stem=r'^downsample_layers\.0',
            blocks=r'^(?:stages|downsample_layers)\.(\d+)' if coarse else [
                (r'^downsample_layers\.(\d+)', (0,)), (r'^stages\.(\d+)\.(\d+)', None), (r'^norm3', (99999,))])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether blocks are recomputed in the backward pass to save memory."""
        for stage in self.stages:
            for block in stage:
                block.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of the memories' initial weights, which are initial states rather than maps."""
        return {f'{name}.{weight}' for name, module in self.named_modules() if isinstance(module, NeuralMemory)
                for weight in ('w1', 'w2')}


def _without_prefix(weights: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Remove the prefix of the backbone's weights in checkpoints of mmpretrain's classifiers."""
    start = f'{prefix}backbone.'
    for name in [name for name in weights if name.startswith(start)]:
        weights[prefix + name.removeprefix(start)] = weights.pop(name)


default_cfgs = generate_default_cfgs({
    f'convneur_{arch}.untrained': dict(TIMM_CFG, url='', num_classes=1000, license='apache-2.0') for arch in ARCHS})


def _register(arch: str) -> None:
    name = f'convneur_{arch}'

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            ConvNeurClassifier, name, pretrained, arch=arch, pretrained_filter_fn=without_unused_norms,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'), **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""ConvNeur-{arch} as a :class:`ConvNeurClassifier`."""
    globals()[name] = register_model(create)


for _arch in ARCHS:
    _register(_arch)
