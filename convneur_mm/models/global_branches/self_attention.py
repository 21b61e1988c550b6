"""Multi-head self-attention (Vaswani et al., "Attention Is All You Need", NeurIPS 2017) as a global branch."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .token_mixer import TokenMixer


class MultiHeadAttention(nn.Module):
    """``Concat(head_1, …, head_h) W^O`` with ``head = softmax(q kᵀ / √d) v``, without masks and biases.

    Args:
        channels (int): Channels of the tokens, Cm.
        head_dim (int): Channels per head, d. Must divide ``channels``.

    Raises:
        ValueError: If ``head_dim`` is not a positive integer or does not divide ``channels``.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f'head_dim must be an integer of at least 1, got {head_dim!r}')
        if channels % head_dim:
            raise ValueError(f'channels must be a multiple of head_dim, got channels={channels}, head_dim={head_dim}')
        self.head_dim = head_dim
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, num_outputs: int | None = None) -> Tensor:
        """Attend from every token to every token.

        Args:
            x (Tensor): Tokens, (B, N, Cm).
            num_outputs (int | None): Number of last tokens to output. Defaults to None, which is all.

        Returns:
            Tensor: (B, num_outputs, Cm).
        """
        q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))  # (B, h, N, d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.output(y if num_outputs is None else y[:, -num_outputs:])


class SelfAttention(TokenMixer):
    """:class:`MultiHeadAttention` over all tokens of the map.

    Args:
        channels (int): Channels of the tokens, Cm.
        head_dim (int): Channels per head, d. Must divide ``channels``. Defaults to 16, as in the neural memory.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.

    Raises:
        ValueError: As :class:`MultiHeadAttention`.
    """

    def __init__(self, channels: int, head_dim: int = 16, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(channels, init_cfg)
        self.attention = MultiHeadAttention(channels, head_dim)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens, see :meth:`TokenMixer.mix`."""
        return self.attention(x)
