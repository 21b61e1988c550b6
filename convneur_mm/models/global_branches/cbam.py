"""Convolutional block attention (Woo et al., "CBAM", ECCV 2018) as a global branch."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .token_mixer import TokenMixer

# The paper's defaults.
REDUCTION = 16
KERNEL_SIZE = 7


class CBAM(TokenMixer):
    """Scale each channel, then each position.

    - channels (Sec. 3, Eq. 2): ``F' = sigmoid(MLP(avg F) + MLP(max F)) ⊙ F``, both taken over the map; the MLP has
      one hidden layer of Cm / 16 with a ReLU,
    - positions (Eq. 3): ``F'' = sigmoid(Conv7×7([avg F', max F'])) ⊙ F'``, both taken over the channels.

    Args:
        channels (int): Channels of the tokens, Cm.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.
    """

    def __init__(self, channels: int, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(channels, init_cfg)
        hidden = max(channels // REDUCTION, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, KERNEL_SIZE, padding=KERNEL_SIZE // 2)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens, see :meth:`TokenMixer.mix`."""
        x = x * (self.mlp(x.mean(1, keepdim=True)) + self.mlp(x.amax(1, keepdim=True))).sigmoid()
        pooled = torch.stack((x.mean(2), x.amax(2)), dim=1).unflatten(2, size)  # (B, 2, H, W)
        return x * self.conv(pooled).flatten(2).transpose(1, 2).sigmoid()
