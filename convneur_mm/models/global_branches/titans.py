"""Titans' memory as context (Behrouz et al., "Titans: Learning to Memorize at Test Time", 2024) as a global branch."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...ops.neural_memory import NORMALIZE_EPS, MemoryState, neural_memory
from .._mmengine import BaseModule
from .neural_memory import NeuralMemory
from .self_attention import MultiHeadAttention


class MemoryAsContext(BaseModule):
    """The neural memory with Titans' segmented attention and persistent tokens (MAC, Sec. 4.1 there).

    Tokens are split into segments S_t. ConvNeur's LayerNorm and output projection come before and after all of this.
    With ConvNeur's memory M, for each segment:

    - ``h_t = M_{t-1}(S_t W_Q)``,
    - ``y_t = Attn([p_1 … p_n, h_t, S_t])``, in which every token of the context attends; only the outputs of the
      segment's tokens are kept,
    - M_t is M_{t-1} written with ``y_t W_K`` and ``y_t W_V``, with the segment as one chunk,
    - ``o_t = y_t ⊙ M_t(y_t)``.

    Args:
        channels (int): Channels of the tokens, Cm.
        chunk_size (int): Tokens per segment, L. Defaults to 196.
        num_persistent (int): Number of persistent tokens, n; they are learned and the same for all segments and
            images. Defaults to 4.
        inner_step (float): See :class:`NeuralMemory`. Defaults to 1.0.
        head_dim (int): Channels per head of the memory and of the attention. Defaults to 16.
        hidden_dim (int): See :class:`NeuralMemory`. Defaults to 8.
        max_write_norm (float): See :class:`NeuralMemory`. Defaults to 1.0.
        backend (str): See :class:`NeuralMemory`. Defaults to 'auto'.
        num_chunks (int | None): Segments per image, which replace ``chunk_size``, see :class:`NeuralMemory`. Defaults
            to None.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.

    Raises:
        ValueError: If an option is outside its range.
    """

    def __init__(
        self,
        channels: int,
        chunk_size: int = 196,
        num_persistent: int = 4,
        inner_step: float = 1.0,
        head_dim: int = 16,
        hidden_dim: int = 8,
        max_write_norm: float = 1.0,
        backend: str = 'auto',
        num_chunks: int | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if isinstance(num_persistent, bool) or not isinstance(num_persistent, int) or num_persistent < 1:
            raise ValueError(f'num_persistent must be an integer of at least 1, got {num_persistent!r}')
        # Only its parts are used and its forward is never called: the tokens read differ from those written.
        self.memory = NeuralMemory(
            channels, chunk_size=chunk_size, inner_step=inner_step, head_dim=head_dim, hidden_dim=hidden_dim,
            max_write_norm=max_write_norm, backend=backend, num_chunks=num_chunks)
        self.attention = MultiHeadAttention(channels, head_dim)
        self.persistent = nn.Parameter(torch.empty(num_persistent, channels))
        nn.init.trunc_normal_(self.persistent, std=0.02)

    @property
    def proj(self) -> nn.Linear:
        """Return the output projection."""
        return self.memory.proj

    def forward(self, x: Tensor, size: tuple[int, int], output: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Mix the tokens of a feature map, see :meth:`TokenMixer.forward`."""
        memory = self.memory
        if x.dim() != 3 or x.size(1) != size[0] * size[1] or x.size(2) != memory.channels:
            raise ValueError(f'expected tokens of shape (B, {size[0]} * {size[1]}, {memory.channels}), '
                             f'got {tuple(x.shape)}')
        persistent = self.persistent.expand(len(x), -1, -1)
        outputs, state = [], None
        for segment in memory.norm(x).split(memory.tokens_per_chunk(x.size(1)), dim=1):
            q = memory.query(segment)
            read = self._run(q, q, q, state)[0].to(segment.dtype)  # M_{t-1}(S_t W_Q), without a write
            y = self.attention(torch.cat((persistent.to(segment.dtype), read, segment), dim=1), segment.size(1))
            read, state = self._run(y, memory.key(y), memory.value(y), state, retrieve='final', return_state=True)
            outputs.append(y * read.to(y.dtype))
        return (self.proj if output is None else output)(torch.cat(outputs, dim=1))

    def _run(self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState | None,
             **options: str | bool) -> tuple[Tensor, MemoryState | None]:
        """Return the values read by a chunk of tokens (B, L, Cm), in that shape, and the state if asked for."""
        memory = self.memory
        q, k, v = (x.unflatten(2, (-1, memory.head_dim)).transpose(1, 2).to(
            torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        y, state = neural_memory(
            q, k, v, memory.w1, memory.w2, memory.update_generators, state=state, backend=memory.backend,
            chunk_size=max(q.size(2), 1), inner_step=memory.inner_step, max_write_norm=memory.max_write_norm,
            qk_norm_eps=NORMALIZE_EPS, **options)
        return y.transpose(1, 2).flatten(2), state
