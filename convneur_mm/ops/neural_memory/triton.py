"""The memory's kernels for CUDA, in Triton; see :mod:`.contract`.

Whatever has the size of the tokens is computed anew tile by tile in the backward, and the number of launches does not
depend on the number of chunks. Reads need no write of their own chunk, so all of them are one launch after the writes.
Sequential writes are another, in which one program carries one image through all chunks: the generators see all heads
of an image, so heads cannot part. Under the parallel rule the gradients of all chunks are one launch, of several
programs a chunk, the generators are PyTorch's products, and Eq. 4 is a third one.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .contract import WriteGradients, Written
from .pytorch import generate, generate_backward, normalize_, normalize_backward_
from .types import MemoryOptions, UpdateGenerators

try:
    import triton
except ImportError:
    HAS_TRITON = False
else:
    from . import triton_kernels as kernels

    HAS_TRITON = True

__all__ = ['HAS_TRITON', 'normalize_', 'normalize_backward_', 'read_all', 'read_all_backward', 'refuses', 'write_all',
           'write_all_backward']

# Of d and of e: a head's weights and their gradients stay in registers, of which widths above 32 spill some.
MAX_WIDTH = 64
TILE = 64  # tokens that a program works on at a time, in heads of up to 16 channels
BLOCK = 64  # rows and columns of the generators' weights, likewise


def is_available(x: Tensor) -> bool:
    """Whether the kernels can run where a tensor is: on CUDA, or anywhere in Triton's interpreter."""
    if not HAS_TRITON:
        return False
    # TRITON_INTERPRET=1 makes something else of a kernel, provided that it was set when Triton was first imported.
    interpreted = not isinstance(kernels.read_kernel, triton.JITFunction)
    return interpreted or x.is_cuda


def refuses(tokens: Tensor, rows: Tensor, options: MemoryOptions) -> str | None:
    if not is_available(tokens):
        return f'needs Triton and CUDA tensors, got tensors on {tokens.device}'
    if tokens.dtype != torch.float32:
        return f'takes tensors of up to 32 bits, got {tokens.dtype}'
    d, e = rows.size(-1), rows.size(-2) // 2
    if max(d, e) > MAX_WIDTH:
        return f'takes heads of at most {MAX_WIDTH} channels and hidden units, got {d} and {e}'
    return None


def on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the first argument."""
    @wraps(function)
    def run(tokens: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(tokens):
            return function(tokens, *args)
    return run


@on_its_device
def write_all(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, rows: Tensor, momentum: Tensor,
              options: MemoryOptions) -> Written:
    (batch, heads, d, num_tokens), sizes = k.shape, _sizes(rows)
    chunks = math.ceil(num_tokens / options.chunk_size)
    states = rows.new_empty(chunks + 1, 3, *rows.shape)
    states[0, 1], states[0, 2] = momentum, rows
    states[-1, 0].zero_()
    surprises, pre_hidden, coefficients = (rows.new_empty(chunks, batch, f * heads * d) for f in (1, 4, 3))
    if not chunks:
        return Written(states, surprises, pre_hidden, coefficients)
    if options.update_rule == 'sequential':
        kernels.fused_kernel[(batch,)](
            k, v, states, surprises, pre_hidden, coefficients, *(x.contiguous() for x in generators), k.stride(),
            v.stride(), batch, heads, num_tokens, options.chunk_size, kernels.rule_of(options, d), **sizes,
            TILE=_tile(sizes), BLOCK=BLOCK, num_warps=8, num_stages=1)
        return Written(states, surprises, pre_hidden, coefficients)
    splits, part_size = _splits(options.chunk_size, num_tokens, batch * heads, sizes, k.device)
    parts = states.new_empty(splits, chunks, *rows.shape)
    squares = states.new_empty(splits, *surprises.shape)
    kernels.surprise_kernel[(splits * chunks * batch * heads,)](
        k, v, initial, parts, squares, k.stride(), v.stride(), batch, heads, num_tokens, options.chunk_size, chunks,
        part_size, **sizes, TILE=_tile(sizes))
    surprises = squares.sum(0)
    pre_hidden, coefficients = generate(surprises, generators)
    kernels.write_kernel[(batch * heads,)](
        parts, states, coefficients, splits, batch * heads, chunks, kernels.rule_of(options, d), heads, **sizes)
    return Written(states, surprises, pre_hidden, coefficients)


@on_its_device
def write_all_backward(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, written: Written,
                       grad_memories: Tensor, grad_momentum: Tensor | None, grad_k: Tensor, grad_v: Tensor,
                       options: MemoryOptions) -> WriteGradients:
    states, _, pre_hidden, coefficients = written
    (batch, heads, d, num_tokens), sizes = k.shape, _sizes(states)
    chunks, rule = len(states) - 1, kernels.rule_of(options, d)
    grad_outputs = torch.empty_like(coefficients)
    grad_m = torch.zeros_like(grad_memories[0])
    grad_p = torch.zeros_like(grad_m) if grad_momentum is None else grad_momentum.clone(
        memory_format=torch.contiguous_format)
    if options.update_rule == 'sequential':
        grad_pre_hidden = torch.empty_like(pre_hidden)
        kernels.fused_backward_kernel[(batch,)](
            k, v, states, pre_hidden, coefficients, generators.in_weight.contiguous(),
            generators.out_weight.contiguous(), grad_memories, grad_m, grad_p, torch.empty_like(grad_m), grad_outputs,
            grad_pre_hidden, states.new_empty(batch, heads * d), grad_k, grad_v, k.stride(), v.stride(),
            grad_k.stride(), grad_v.stride(), batch, heads, num_tokens, options.chunk_size, rule, **sizes,
            TILE=_tile(sizes), BLOCK=BLOCK, num_warps=8, num_stages=1)
        return WriteGradients(None, grad_outputs, grad_pre_hidden, grad_m + grad_memories[0], grad_p)
    grad_gradients = torch.empty_like(grad_memories[1:])
    kernels.write_backward_kernel[(batch * heads,)](
        grad_m, grad_p, grad_memories, states, coefficients, grad_gradients, grad_outputs, batch * heads, chunks,
        rule, heads, **sizes)
    grad_pre_hidden, grad_surprises = generate_backward(grad_outputs, pre_hidden, generators)
    splits, part_size = _splits(options.chunk_size, num_tokens, batch * heads, sizes, k.device)
    parts = states.new_empty(splits, *grad_gradients.shape)
    kernels.surprise_backward_kernel[(splits * chunks * batch * heads,)](
        k, v, initial, grad_gradients, grad_surprises, grad_k, grad_v, parts, k.stride(), v.stride(), grad_k.stride(),
        grad_v.stride(), batch, heads, num_tokens, options.chunk_size, chunks, part_size, **sizes, TILE=_tile(sizes),
        num_warps=8)  # with 4, registers are spilled
    return WriteGradients(parts.sum((0, 1, 2)), grad_outputs, grad_pre_hidden, grad_m + grad_memories[0], grad_p)


@on_its_device
def read_all(q: Tensor, memories: Tensor, y: Tensor, options: MemoryOptions) -> None:
    (batch, heads, _, num_tokens), sizes = q.shape, _sizes(memories)
    which, read_size = _reads(options, num_tokens, memories)
    chunks, tile = math.ceil(num_tokens / read_size), _tile(sizes)
    kernels.read_kernel[(batch * heads * chunks * math.ceil(min(read_size, num_tokens) / tile),)](
        q, memories[which], y, q.stride(), y.stride(), memories.stride(0), batch, heads, num_tokens, read_size, chunks,
        tile, **sizes, TILE=tile)


@on_its_device
def read_all_backward(q: Tensor, memories: Tensor, grad_y: Tensor, grad_memories: Tensor, grad_q: Tensor,
                      y: Tensor | None, options: MemoryOptions) -> None:
    (batch, heads, _, num_tokens), sizes = q.shape, _sizes(memories)
    which, read_size = _reads(options, num_tokens, memories)
    chunks = math.ceil(num_tokens / read_size)
    splits, part_size = _splits(read_size, num_tokens, batch * heads, sizes, q.device)
    parts = memories.new_empty(splits, chunks, *memories.shape[1:])
    out = grad_q if y is None else y
    kernels.read_backward_kernel[(splits * batch * heads * chunks,)](
        q, grad_y, memories[which], grad_q, out, parts, q.stride(), grad_y.stride(), grad_q.stride(), out.stride(),
        memories.stride(0), batch, heads, num_tokens, read_size, chunks, part_size, **sizes, TILE=_tile(sizes),
        READS=int(y is not None), num_warps=8)
    grad_memories[which] += parts.sum(0)


def _sizes(rows: Tensor) -> dict[str, int]:
    """The kernels' compile-time sizes: d, e and both padded to powers of two that ``tl.dot`` takes."""
    e, d = rows.size(-2) // 2, rows.size(-1)
    padded_d, padded_e = (max(16, triton.next_power_of_2(x)) for x in (d, e))
    return dict(D=d, E=e, DP=padded_d, EP=padded_e)


def _tile(sizes: dict[str, int]) -> int:
    """Tokens that a program works on at a time: fewer in wider heads, but no fewer than ``tl.dot`` takes."""
    return max(16, TILE * 16 // max(sizes['DP'], sizes['EP']))


def _splits(chunk_size: int, num_tokens: int, pairs: int, sizes: dict[str, int],
            device: torch.device) -> tuple[int, int]:
    """How many programs share a chunk, of as many as there are anyway, and the tokens of each."""
    tile, programs = _tile(sizes), pairs * math.ceil(num_tokens / chunk_size)
    tiles = math.ceil(min(chunk_size, num_tokens) / tile)
    splits = min(tiles, max(1, 4 * _multiprocessors(device) // programs))
    part_size = math.ceil(tiles / splits) * tile
    return math.ceil(tiles * tile / part_size), part_size


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def _reads(options: MemoryOptions, num_tokens: int, memories: Tensor) -> tuple[slice, int]:
    """Which memories are read, each by how many tokens."""
    if options.retrieve == 'final':
        return slice(len(memories) - 1, None), num_tokens
    return slice(0, math.ceil(num_tokens / options.chunk_size)), options.chunk_size
