"""OverLoCK's classification head. It needs mmpretrain, so configs import this module by name."""
from __future__ import annotations

import torch.nn as nn
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor


@MODELS.register_module()
class OverLoCKClsHead(ClsHead):
    """Classify Focus-Net's features and, as an auxiliary loss in training, Overview-Net's.

    The weights have the names of the authors' classifier, so ``init_cfg=dict(type='Pretrained', checkpoint=...)``
    loads the head's part of their checkpoints.

    Args:
        num_classes (int): Number of classes.
        in_channels (int): Channels of Focus-Net's features.
        overview_channels (int): Channels of Overview-Net's features.
        hidden_channels (int): Channels before the last layer. Defaults to 1024.
        aux_weight (float): Weight of the auxiliary loss; with 0 there is no auxiliary classifier. Defaults to 0.4.
        **kwargs: ``loss``, ``topk``, ``cal_acc`` and ``init_cfg`` of mmpretrain's ``ClsHead``.

    Raises:
        ValueError: If ``num_classes`` is less than 1 or ``aux_weight`` less than 0.
    """

    def __init__(self, num_classes: int, in_channels: int, overview_channels: int, hidden_channels: int = 1024,
                 aux_weight: float = 0.4, **kwargs) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f'num_classes must be at least 1, got {num_classes!r}')
        if aux_weight < 0:
            raise ValueError(f'aux_weight must be at least 0, got {aux_weight!r}')
        self.num_classes = num_classes
        self.aux_weight = aux_weight
        self.head = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 1, bias=False), nn.BatchNorm2d(hidden_channels), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden_channels, num_classes, 1))
        if aux_weight > 0:
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(overview_channels), nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(overview_channels, num_classes, 1))

    def pre_logits(self, feats: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features before the last layer.

        Args:
            feats (tuple[Tensor, Tensor]): Overview-Net's (N, overview_channels, H, W) and Focus-Net's
                (N, in_channels, H, W).

        Returns:
            Tensor: (N, hidden_channels, 1, 1).
        """
        return self.head[:-1](feats[-1])

    def forward(self, feats: tuple[Tensor, Tensor]) -> Tensor:
        """Compute class scores (N, num_classes) from Focus-Net's features."""
        return self.head[-1](self.pre_logits(feats)).flatten(1)

    def loss(self, feats: tuple[Tensor, Tensor], data_samples: list[DataSample], **kwargs) -> dict[str, Tensor]:
        """Compute ``loss`` from Focus-Net's scores and the weighted ``loss_aux`` from Overview-Net's."""
        losses = super().loss(feats, data_samples, **kwargs)
        if self.aux_weight > 0:
            scores = self.aux_head(feats[0]).flatten(1)
            losses['loss_aux'] = self.aux_weight * self._get_loss(scores, data_samples, **kwargs)['loss']
        return losses
