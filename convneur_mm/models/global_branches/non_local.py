"""The non-local block (Wang et al., "Non-local Neural Networks", CVPR 2018) as a global branch."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .token_mixer import TokenMixer


class NonLocal(TokenMixer):
    """``z = W_z y + x`` with ``y = softmax(θ(x) φ(x)ᵀ) g(x)``, the embedded Gaussian form (Eqs. 3 and 6).

    θ, φ and g halve the channels, as in the paper.

    Args:
        channels (int): Channels of the tokens, Cm, at least 2.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.

    Raises:
        ValueError: If there are fewer than 2 channels.
    """

    def __init__(self, channels: int, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(channels, init_cfg)
        if channels < 2:
            raise ValueError(f'channels must be at least 2, as a non-local block halves them, got {channels}')
        inner = channels // 2
        self.theta = nn.Linear(channels, inner)
        self.phi = nn.Linear(channels, inner)
        self.g = nn.Linear(channels, inner)
        self.output = nn.Linear(inner, channels)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens, see :meth:`TokenMixer.mix`."""
        y = F.scaled_dot_product_attention(self.theta(x), self.phi(x), self.g(x), scale=1.0)
        return self.output(y) + x
