"""The memory's operators for CUDA, in Triton; see :mod:`.operators`.

Surprise and reads run on a grid of images, heads, chunks and ``splits`` programs per chunk, so that few images with
long chunks fill a GPU too; partial sums over tokens are added in a fixed order. Eq. 4 is one kernel. No kernel waits
for the device. The environment variable CONVNEUR_MEMORY_PRECISION sets the precision of ``tl.dot``: 'ieee', the
default, or 'tf32x3', which runs on tensor cores with nearly the same rounding.
"""
from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rule import generate, generate_backward
from .types import UpdateGenerators, check_choice

try:
    import triton

    from . import triton_kernels as kernels
except ImportError:
    triton = kernels = None

MAX_WIDTH = 64  # of d and of e: a head's weights and gradients stay in registers; wider heads would spill
TILE = 64  # tokens that a program processes at a time, in heads of up to 16 channels
PRECISIONS = ('ieee', 'tf32x3')


def is_available(x: Tensor) -> bool:
    """Return whether the kernels can run on a tensor: on CUDA, or on any device in Triton's interpreter."""
    # With TRITON_INTERPRET=1, set before Triton was first imported, kernels are not of the class JITFunction.
    return triton is not None and (x.is_cuda or not isinstance(kernels.read_kernel, triton.JITFunction))


def refuses(memories: Tensor) -> str | None:
    """Return why no kernel takes memories of rows (…, 2e, d), or None if one does."""
    if not is_available(memories):
        return f'needs Triton and CUDA tensors, got tensors on {memories.device}'
    if memories.dtype != torch.float32:
        return f'takes memories in float32, got {memories.dtype}'
    hidden, d = memories.size(-2) // 2, memories.size(-1)
    if max(d, hidden) > MAX_WIDTH:
        return f'takes heads of at most {MAX_WIDTH} channels and hidden units, got {d} and {hidden}'
    return None


def read(q: Tensor, memories: Tensor, chunk_size: int, eps: float) -> Tensor:
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _launch('read_kernel', q, memories, chunk_size, eps, lambda parts: (
        q, memories, y, q.stride(), y.stride(), memories.stride(0)))
    return y


def read_backward(grad_y: Tensor, q: Tensor, memories: Tensor, chunk_size: int, eps: float, grad_q: Tensor) -> Tensor:
    return _launch('read_backward_kernel', q, memories, chunk_size, eps, lambda parts: (
        grad_y, q, memories, grad_q, parts, grad_y.stride(), q.stride(), grad_q.stride(), memories.stride(0)),
        part=memories.shape, num_warps=8).view(memories.shape)


def surprise(k: Tensor, v: Tensor, memories: Tensor, chunk_size: int, eps: float,
             curvature: bool) -> tuple[Tensor, Tensor, Tensor]:
    chunks, n, rows, d = memories.shape
    sizes = chunks * n * rows * d, chunks * n * d, chunks * n * curvature

    def arguments(parts: Tensor) -> tuple:
        return k, v, memories, *parts[0].split(sizes), parts.stride(0), k.stride(), v.stride(), memories.stride(0)

    gradient, errors, bounds = _launch(
        'surprise_kernel', k, memories, chunk_size, eps, arguments, part=(sum(sizes),), CURVATURE=curvature,
    ).split(sizes)
    return gradient.view(memories.shape), errors.view(chunks, n, d), bounds.view((chunks, n) if curvature else 0)


def surprise_backward(grad_gradient: Tensor, grad_errors: Tensor, grad_curvature: Tensor, k: Tensor, v: Tensor,
                      memories: Tensor, chunk_size: int, eps: float, curvature: bool, grad_k: Tensor,
                      grad_v: Tensor) -> Tensor:
    given = [x.contiguous() for x in (grad_gradient, grad_errors, grad_curvature)]
    return _launch('surprise_backward_kernel', k, memories, chunk_size, eps, lambda parts: (
        *given, k, v, memories, grad_k, grad_v, parts, k.stride(), v.stride(), grad_k.stride(), grad_v.stride(),
        memories.stride(0)), part=memories.shape, CURVATURE=curvature, num_warps=8)  # with 4, registers are spilled


def step(gradient: Tensor, errors: Tensor, memory: Tensor, momentum: Tensor, in_weight: Tensor, in_bias: Tensor,
         out_weight: Tensor, out_bias: Tensor, inner_step: float, max_write_norm: float) -> tuple[Tensor, ...]:
    hidden, outputs = generate(errors, UpdateGenerators(in_weight, in_bias, out_weight, out_bias))
    return *_launch_write('write_kernel', (gradient, outputs, memory, momentum), outputs, (memory, memory), inner_step,
                          max_write_norm), hidden, outputs


def step_backward(grad_memory: Tensor, grad_momentum: Tensor, gradient: Tensor, hidden: Tensor, outputs: Tensor,
                  memory: Tensor, momentum: Tensor, in_weight: Tensor, out_weight: Tensor, inner_step: float,
                  max_write_norm: float) -> tuple[Tensor, ...]:
    grad_gradient, grad_outputs, grad_memory, grad_momentum = _launch_write(
        'write_backward_kernel', (grad_memory, grad_momentum, gradient, outputs, memory, momentum), outputs,
        (memory, outputs, memory, memory), inner_step, max_write_norm)
    grad_hidden, grad_errors = generate_backward(grad_outputs, hidden, in_weight, out_weight)
    grad_errors = grad_errors.view(*memory.shape[:-2], -1)
    return grad_gradient, grad_errors, grad_memory, grad_momentum, grad_hidden, grad_outputs


def _launch_write(name: str, given: tuple[Tensor, ...], outputs: Tensor, like: tuple[Tensor, ...],
                  *rule: float) -> tuple[Tensor, ...]:
    """Launch one program for each of n memories, and return the filled tensors, shaped like ``like``."""
    rows, d = like[0].shape[-2:]
    filled = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like)
    with torch.cuda.device_of(outputs):  # Triton launches on the current device
        getattr(kernels, name)[(like[0].numel() // (rows * d),)](
            *(x.contiguous() for x in given), *filled, outputs.size(1) // (3 * d), *rule, **_sizes(rows, d))
    return filled


def _launch(name: str, tokens: Tensor, memories: Tensor, chunk_size: int, eps: float,
            arguments: Callable[[Tensor], tuple],
            part: tuple[int, ...] = (), **options: Any) -> Tensor | None:
    """Launch a kernel over all chunks of all heads; return the sum of its parts if their shape ``part`` is given.

    ``arguments`` maps the parts (splits, *part) to the kernel's first arguments.
    """
    (batch, heads, _, length), (chunks, _, rows, d) = tokens.shape, memories.shape
    sizes = _sizes(rows, d)
    grid, part_size = grid_of(batch * heads, length, chunk_size, max(sizes['DP'], sizes['EP']), tokens.device)
    tile = tile_of(max(sizes['DP'], sizes['EP']))
    if not part:  # nothing is summed, so every tile gets a program
        part_size, grid = tile, batch * heads * chunks * math.ceil(min(chunk_size, length) / tile)
    parts = memories.new_empty(grid // (batch * heads * chunks), *part) if part else memories
    kind = os.environ.get('CONVNEUR_MEMORY_PRECISION', 'ieee')
    check_choice('CONVNEUR_MEMORY_PRECISION', kind, PRECISIONS)
    with torch.cuda.device_of(tokens):
        getattr(kernels, name)[(grid,)](
            *arguments(parts), batch, heads, length, chunk_size, chunks, part_size, eps, **sizes, TILE=tile,
            NORMALIZE=eps > 0, PRECISION=kind, **options)
    return None if not part else parts[0] if len(parts) == 1 else parts.sum(0)


def _sizes(rows: int, d: int) -> dict[str, int]:
    """Return the kernels' compile-time sizes: d, e and both padded to powers of two that ``tl.dot`` accepts."""
    padded_d, padded_e = (max(16, triton.next_power_of_2(x)) for x in (d, rows // 2))
    return dict(D=d, E=rows // 2, DP=padded_d, EP=padded_e)


def tile_of(width: int) -> int:
    """Return the tokens a program processes at a time: fewer in wider heads, but at least what ``tl.dot`` needs."""
    return max(16, TILE * 16 // width)


def grid_of(n: int, num_tokens: int, chunk_size: int, width: int, device: torch.device) -> tuple[int, int]:
    """Return the number of programs for all chunks of n heads, about four per multiprocessor, and their tokens."""
    tile, chunks = tile_of(width), math.ceil(num_tokens / chunk_size)
    tiles = math.ceil(min(chunk_size, num_tokens) / tile)
    splits = min(tiles, max(1, 4 * _multiprocessors(device) // (n * chunks)))
    part_size = math.ceil(tiles / splits) * tile
    return math.ceil(tiles * tile / part_size) * n * chunks, part_size


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1
