"""The interface of all global branches, and the layers around the mixing that they share with the neural memory."""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .._mmengine import BaseModule


class TokenMixer(BaseModule):
    """LayerNorm, a token mixing that a subclass defines as :meth:`mix`, and an output projection.

    The neural memory has the same norm and the same projection (Cm→Cm, without bias), so that branches in the same
    bottleneck differ only in the mixing. Every branch has ``proj`` and accepts another linear map in its place, as
    :class:`GlobalBranch` may merge it with the convolution after it.

    Args:
        channels (int): Channels of the tokens, Cm.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.
    """

    def __init__(self, channels: int, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.channels = channels
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.proj = nn.Linear(channels, channels, bias=False)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix normalised tokens (B, H·W, Cm) of a map of ``size`` (H, W); return the same shape."""
        raise NotImplementedError

    def forward(self, x: Tensor, size: tuple[int, int], output: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Mix the tokens of a feature map.

        Args:
            x (Tensor): Tokens in row-major order, (B, H·W, channels), of a floating-point dtype.
            size (tuple[int, int]): H and W.
            output (Callable | None): A linear map of (B, H·W, channels) that replaces ``proj``. Defaults to None.

        Returns:
            Tensor: Tokens of the same shape.

        Raises:
            ValueError: If ``x`` is not (B, H·W, channels).
        """
        if x.dim() != 3 or x.size(1) != size[0] * size[1] or x.size(2) != self.channels:
            raise ValueError(f'expected tokens of shape (B, {size[0]} * {size[1]}, {self.channels}), '
                             f'got {tuple(x.shape)}')
        return (self.proj if output is None else output)(self.mix(self.norm(x), size))
