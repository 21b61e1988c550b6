"""What a memory does with each chunk of its tokens: surprise, step, momentum, decay and the size of the write."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import NeuralMemory
from ..ops.neural_memory import NORMALIZE_EPS, LayerWeights, MemoryOptions, MemoryState
from ..ops.neural_memory.memory import kernels_for
from ..ops.neural_memory.op import resolve_backend
from ..ops.neural_memory.reference import bound
from ..ops.neural_memory.types import no_autocast, pack


class ChunkTrace(NamedTuple):
    """The T writes of a memory of Cm channels in h heads, for B images.

    Of N tokens in ⌈N / chunk_size⌉ chunks, T are written: without the last chunk, whose write no token would read,
    unless the memory's state is returned or ``retrieve='final'``.

    Attributes:
        chunk_size (int): Tokens of a chunk, of which the last may be shorter.
        num_tokens (int): N.
        surprise (Tensor): Mean squared error of each channel over the chunk's tokens, s_t, (T, B, Cm).
        step (Tensor): θ_t, with the factor ``inner_step``, (T, B, Cm).
        momentum (Tensor): η_t, (T, B, Cm).
        decay (Tensor): α_t, (T, B, Cm).
        write_norm (Tensor): Norm of each head's write u_t, behind its bound, (T, B, h).
    """

    chunk_size: int
    num_tokens: int
    surprise: Tensor
    step: Tensor
    momentum: Tensor
    decay: Tensor
    write_norm: Tensor

    def chunk_of_tokens(self) -> Tensor:
        """Number of the chunk that each token belongs to, counted from 0, (N,) of int64; T or more is not written."""
        return torch.arange(self.num_tokens) // self.chunk_size


@torch.no_grad()
def trace(memory: NeuralMemory, x: Tensor, state: MemoryState | None = None, return_state: bool = False) -> ChunkTrace:
    """Writes a memory once more, by the kernels that it uses itself, and keeps what its forward drops.

    Args:
        memory (NeuralMemory): Is not changed.
        x (Tensor): Tokens as its forward takes them, (B, N, Cm), of which there is at least one.
        state (MemoryState | None): As its forward takes it. Defaults to None.
        return_state (bool): As its forward takes it: whether the last chunk is written too. Defaults to False.

    Returns:
        ChunkTrace: In float32, or float64 where the parameters are.
    """
    dtype = torch.promote_types(memory.query.weight.dtype, torch.float32)
    weights = LayerWeights(*(weight.to(dtype) for weight in memory.weights))
    options = MemoryOptions(memory.tokens_per_chunk(x.size(1)), memory.inner_step, memory.max_write_norm,
                            memory.update_rule, memory.retrieve, return_state)
    tokens = F.layer_norm(x.to(dtype), x.shape[-1:], weights.norm_weight, weights.norm_bias, memory.norm.eps)
    # Outside no_autocast, as the memory projects in autocast's precision too.
    product = F.linear(tokens, torch.cat((weights.key, weights.value)))
    with no_autocast(x):
        product = product.to(dtype).mT.contiguous().unflatten(1, (2, memory.num_heads, memory.head_dim))
        k, v = product[..., :options.written_tokens(x.size(1))].unbind(1)  # (B, h, d, ≤ N)
        initial = weights.memory.initial
        if state is None:
            rows = initial.expand(len(x), -1, -1, -1)
            momentum = torch.zeros_like(rows)
        else:
            rows, momentum = pack(state.w1, state.w2), pack(state.p1, state.p2)
        backend = resolve_backend(memory.backend)
        kernels = kernels_for('chunked' if backend == 'reference' else backend, k, rows, options)
        kernels.normalize_(k, NORMALIZE_EPS)
        written = kernels.write_all(k, v, initial, weights.memory.generators, rows, momentum, options)
        step, eta, alpha = written.coefficients.chunk(3, dim=-1)
        step = options.inner_step * step
        # The states hold ∇L over 2/d; θ acts on d, their last axis.
        write = step.unflatten(-1, (memory.num_heads, 1, -1)) * written.states[:-1, 0] * (2 / memory.head_dim)
        norm = torch.linalg.vector_norm(write, dim=(-2, -1))
        write_norm = norm * bound((norm / options.max_write_norm)**2)
    return ChunkTrace(options.chunk_size, x.size(1), written.surprises, step, eta, alpha, write_norm)
