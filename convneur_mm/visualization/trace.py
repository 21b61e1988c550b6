"""The memory's values for each chunk of tokens: surprise, step, momentum, decay and norm of the write."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models import NeuralMemory
from ..ops.neural_memory import MemoryState, UpdateGenerators
from ..ops.neural_memory.memory import begin, write_all
from ..ops.neural_memory.op import resolve_backend
from ..ops.neural_memory.operators import implementation
from ..ops.neural_memory.rule import bounded, coefficients
from ..ops.neural_memory.types import no_autocast


class ChunkTrace(NamedTuple):
    """The T writes of a memory of Cm channels in h heads, for B images.

    N tokens form ⌈N / chunk_size⌉ chunks, of which T are written: all but the last chunk, whose write no token would
    read, unless the memory's state is returned or ``retrieve='final'``.

    Attributes:
        chunk_size (int): Tokens per chunk; the last chunk may be shorter.
        num_tokens (int): Number of tokens, N.
        surprise (Tensor): Mean squared error of each channel over the chunk's tokens, s_t, (T, B, Cm).
        step (Tensor): θ_t, including the factor ``inner_step``, (T, B, Cm).
        momentum (Tensor): η_t, (T, B, Cm).
        decay (Tensor): α_t, (T, B, Cm).
        write_norm (Tensor): Norm of each head's write u_t, after its bound, (T, B, h).
    """

    chunk_size: int
    num_tokens: int
    surprise: Tensor
    step: Tensor
    momentum: Tensor
    decay: Tensor
    write_norm: Tensor

    def chunk_of_tokens(self) -> Tensor:
        """Return each token's chunk number, counted from 0, (N,) of int64; numbers of T or more are not written."""
        return torch.arange(self.num_tokens) // self.chunk_size


@torch.no_grad()
def trace(memory: NeuralMemory, x: Tensor, state: MemoryState | None = None, return_state: bool = False) -> ChunkTrace:
    """Write a memory again, with its own operators, and keep what its forward drops.

    Args:
        memory (NeuralMemory): The memory, which is not changed.
        x (Tensor): Input of the memory's forward, (B, N, Cm), with at least one token.
        state (MemoryState | None): State passed to the memory's forward. Defaults to None.
        return_state (bool): Whether the last chunk is written too, as in the memory's forward. Defaults to False.

    Returns:
        ChunkTrace: Values in float32, or in float64 if the parameters are.
    """
    options = memory.options(x.size(1), return_state)
    qkv = memory.project(memory.norm(x))  # outside no_autocast, as the memory's forward projects under autocast too
    with no_autocast(x):
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        w1, w2, *generators = (weight.to(dtype) for weight in (memory.w1, memory.w2, *memory.update_generators))
        start = begin(len(x), w1, w2, state)
        *written, _ = write_all(qkv, *start, UpdateGenerators(*generators), options,
                                implementation(resolve_backend(memory.backend), start[1]))
        errors, outputs = (torch.stack([chunk[i].view(len(x), -1) for chunk in written]) if written else
                           w1.new_empty(0, len(x), factor * memory.channels) for i, factor in ((3, 1), (6, 3)))
        step, eta, alpha = outputs.sigmoid().chunk(3, dim=-1)
        norms = [torch.linalg.vector_norm(bounded(
            options.inner_step * coefficients(output, memory.head_dim)[0] * gradient, options.max_write_norm),
            dim=(-2, -1)).view(len(x), -1) for _, _, gradient, *_, output in written]
    return ChunkTrace(options.chunk_size, x.size(1), errors, options.inner_step * step, eta, alpha,
                      torch.stack(norms) if norms else w1.new_empty(0, len(x), memory.num_heads))
