"""The memory for ``torch.export``, and so for ONNX, in operators that other runtimes support.

A scan runs over the chunks, so that one graph serves all image sizes: the number of chunks follows the input. A scan's
body must not depend on the number of images, so memories are (n, 2e, d). A scan needs at least one chunk, so the last
chunk is padded and written even if it is not read.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from . import pytorch
from .rule import normalized, step
from .types import MemoryOptions, UpdateGenerators, no_autocast, pack


def neural_memory_exported(qkv: Tensor, w1: Tensor, w2: Tensor, generators: UpdateGenerators,
                           options: MemoryOptions) -> Tensor:
    """Return the reads (B, h, d, N) of :func:`.memory.run`; B and N may be symbolic."""
    length, eps = options.chunk_size, options.qk_norm_eps
    num_chunks = (qkv.size(-1) + length - 1) // length
    with no_autocast(qkv):
        initial = pack(w1, w2).expand(qkv.size(0), -1, -1, -1).flatten(0, 1).clone()  # (n, 2e, d)
        shape = initial.expand(num_chunks, -1, -1, -1)
        q, k, v = (pytorch.to_chunks(z, shape, length) for z in qkv.unbind(1))  # (T, n, d, L)
        q, k = (pytorch.unit_length(z, eps) for z in (q, k))
        lengths = pytorch.chunk_lengths(qkv[:, 0], shape, length)
        parallel, scale = options.update_rule == 'parallel', options.curvature_scale

        def surprise(k: Tensor, v: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            gradient, errors, curvature = pytorch.surprise_chunks(k, v, memory, lengths, scale > 0)
            return normalized(gradient, curvature, scale) if scale else gradient, errors

        if parallel:  # all gradients at once
            gradients, errors = surprise(k, v, shape, lengths)

        def body(state: tuple[Tensor, Tensor], chunk: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], Tensor]:
            memory, momentum = state
            gradient, errors = chunk if parallel else surprise(*chunk[:2], memory, chunk[2])
            after = step(gradient, errors, memory, momentum, *generators, options.inner_step, options.max_write_norm)
            return after[:2], memory.clone()

        (memory, _), memories = scan(
            body, (initial.clone(), torch.zeros_like(initial)), (gradients, errors) if parallel else (k, v, lengths))
        if options.retrieve == 'final':
            memories = memory.expand(num_chunks, -1, -1, -1)
        return pytorch.from_chunks(pytorch.read_chunks(q, memories), qkv[:, 0])
