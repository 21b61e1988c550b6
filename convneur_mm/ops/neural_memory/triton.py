"""The neural memory in Triton kernels, with a backward in closed form.

The maths is that of :mod:`.differentiable`. Saved for the backward are the inputs, the memory, momentum and gradient
of each chunk, and the generators' activations; whatever has the size of the tokens is recomputed tile by tile.

Reads need no write of their own chunk, so all of them run in one launch after the writes. For the writes there are
two variants:

- *split*: several programs share a chunk of one head and the generators are PyTorch matrix products between the
  launches. Any batch fills the GPU if the chunks are long, at a dozen launches per chunk and direction ('sequential')
  or per call ('parallel').
- *fused* ('sequential' only): one launch, in which one program carries one image through all chunks.
"""
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .differentiable import differentiable_gradients, neural_memory_differentiable, pack, unpack
from .types import MemoryState, UpdateGenerators, no_autocast

try:
    import triton

    # Kernel arguments that are tuples came with 3.3.
    HAS_TRITON = tuple(int(x) for x in triton.__version__.split('.')[:2]) >= (3, 3)
except ImportError:
    HAS_TRITON = False
if HAS_TRITON:
    from . import triton_kernels as kernels

# Of d and of e: a head's weights and their gradients stay in registers, of which widths above 32 spill some.
MAX_WIDTH = 64
TILE = 64  # tokens that a program works on at a time, in heads of up to 16 channels
BLOCK = 64  # rows and columns of the generators' weights, likewise
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_available(*tensors: Tensor) -> bool:
    """Whether the kernels can run where these tensors are: on CUDA, or anywhere in Triton's interpreter."""
    if not HAS_TRITON:
        return False
    # TRITON_INTERPRET=1 makes something else of a kernel, provided that it was set when Triton was first imported.
    interpreted = not isinstance(kernels.read_kernel, triton.JITFunction)
    return interpreted or all(x.is_cuda for x in tensors)


def unsupported(q: Tensor, k: Tensor, v: Tensor, w1: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    if not is_available(q, k, v, w1):
        return f'needs Triton 3.3 or newer and CUDA tensors, got tensors on {q.device}'
    for name, x in (('q', q), ('k', k), ('v', v)):
        if x.dtype not in INPUT_DTYPES:
            return f'takes {name} of dtype float32, bfloat16 or float16, got {x.dtype}'
    if max(w1.shape[-2:]) > MAX_WIDTH:
        return f'takes heads of at most {MAX_WIDTH} channels and hidden units, got w1 of shape {tuple(w1.shape)}'
    return None


class _Options(NamedTuple):
    chunk_size: int
    inner_step: float
    max_write_norm: float
    update_rule: str
    retrieve: str
    return_state: bool


class _Writes(NamedTuple):
    """What the writes of n chunks leave behind; all float32.

    Without a backward to come, ``momenta`` and ``gradients`` hold one entry and the last three are None.
    """

    memories: Tensor  # (n + 1, B, h, 2e, d)
    momenta: Tensor  # (n + 1, B, h, 2e, d)
    gradients: Tensor  # of Eq. 3, (n, B, h, 2e, d)
    surprises: Tensor | None  # (n, B, Cm)
    hidden: Tensor | None  # of the generators, before their GELU, (n, B, 4Cm)
    coefficients: Tensor | None  # (n, B, 3Cm), sigmoids


def neural_memory_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    generators: UpdateGenerators,
    state: MemoryState,
    *,
    chunk_size: int,
    inner_step: float,
    max_write_norm: float,
    update_rule: str,
    retrieve: str,
    return_state: bool,
) -> tuple[Tensor, MemoryState | None]:
    """See :func:`convneur_mm.ops.neural_memory`; ``state`` is the memory before the first chunk.

    Args:
        q (Tensor): (B, h, N, d) in float32, bfloat16 or float16, any strides; so are ``k`` and ``v``, each in a dtype
            of its own. The conversion to float32 takes place in the kernels.
        k (Tensor): The written tokens alone, (B, h, ≤ N, d).
        v (Tensor): As ``k``.
        w1 (Tensor): (h, d, e), float32 like ``w2``, ``generators`` and ``state``.
        w2 (Tensor): (h, e, d).

    Returns:
        tuple[Tensor, MemoryState | None]: ``y`` (B, h, N, d) in the dtype of ``q``, (B, N, h, d) in memory; the state.

    Raises:
        ValueError: For tensors that the kernels do not take, see :func:`unsupported`.
    """
    reason = unsupported(q, k, v, w1)
    if reason is not None:
        raise ValueError(f"backend 'triton' {reason}")
    options = _Options(chunk_size, float(inner_step), float(max_write_norm), update_rule, retrieve, return_state)
    tensors = (q, k, v, w1, w2, *generators, *state)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            y, *new_state = _NeuralMemory.apply(options, *tensors)
        else:
            (y, *new_state), _ = _forward(options, *tensors, keep=False)
    return y, MemoryState(*new_state) if return_state else None


class _NeuralMemory(torch.autograd.Function):

    @staticmethod
    def forward(ctx, options: _Options, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, writes = _forward(options, *tensors, keep=True)
        ctx.options = options
        ctx.save_for_backward(*tensors, *writes)
        return outputs

    @staticmethod
    def backward(ctx, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing recomputes them
        tensors, writes = saved[:13], saved[13:]
        q = tensors[0]
        # The caller keeps autocast off around the forward alone. Autocast does not know the meta device.
        with no_autocast(q):
            if torch.is_grad_enabled():
                return None, *differentiable_gradients(partial(_differentiable, ctx.options), tensors, d_outputs)
            return None, *_backward(ctx.options, *tensors, _Writes(*writes), d_outputs)


def _differentiable(options: _Options, q, k, v, w1, w2, *others: Tensor) -> tuple[Tensor, ...]:
    """The forward of :class:`_NeuralMemory` as autograd can record it."""
    y, state = neural_memory_differentiable(
        q.float(), k.float(), v.float(), w1, w2, UpdateGenerators(*others[:4]), MemoryState(*others[4:]),
        **options._asdict())
    return y.to(q.dtype), *(state or ())


def _sizes(d: int, e: int) -> dict[str, int]:
    """The kernels' compile-time sizes: d, e and both padded to powers of two that ``tl.dot`` takes."""
    dp, ep = (max(16, triton.next_power_of_2(x)) for x in (d, e))
    return dict(D=d, E=e, DP=dp, EP=ep)


def _tile(sizes: dict[str, int]) -> int:
    """Tokens that a program works on at a time: fewer in wider heads, but no fewer than ``tl.dot`` takes."""
    return max(16, TILE * 16 // max(sizes['DP'], sizes['EP']))


def _splits(tokens: int, programs: int, tile: int, device: torch.device) -> tuple[int, int]:
    """How many programs share ``tokens`` tokens when ``programs`` such groups run anyway, and the tokens of each."""
    tiles = math.ceil(tokens / tile)
    splits = min(tiles, max(1, 4 * _multiprocessors(device) // programs))
    part_size = math.ceil(tiles / splits) * tile
    return math.ceil(tokens / part_size), part_size


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def _token_like(x: Tensor) -> Tensor:
    """Empty tensor of the shape (B, h, N, d) and dtype of ``x`` that lies as (B, N, h, d) in memory."""
    batch, heads, tokens, d = x.shape
    return x.new_empty(batch, tokens, heads, d).transpose(1, 2)


def _groups(options: _Options, tokens: int):
    """Chunks that are launched together: first chunk, number of chunks, first token and end of the tokens."""
    n = math.ceil(tokens / options.chunk_size)
    size = 1 if options.update_rule == 'sequential' else max(n, 1)
    for t in range(0, n, size):
        yield t, size, t * options.chunk_size, min((t + size) * options.chunk_size, tokens)


def _reads(options: _Options, tokens: int, memories: Tensor) -> tuple[slice, int]:
    """Which memories are read, each by how many tokens."""
    if options.retrieve == 'final':
        return slice(memories.size(0) - 1, None), tokens
    return slice(0, math.ceil(tokens / options.chunk_size)), min(options.chunk_size, tokens)


def _forward(options, q, k, v, w1, w2, *others, keep):
    generators, state = UpdateGenerators(*others[:4]), MemoryState(*others[4:])
    batch, heads, tokens, d = q.shape
    n = math.ceil(k.size(2) / options.chunk_size)
    rows, momentum_rows = pack(state.w1, state.w2), pack(state.p1, state.p2)
    memories = rows.new_empty(n + 1, *rows.shape)
    momenta = rows.new_empty(n + 1 if keep else 1, *rows.shape)
    gradients = rows.new_empty(n if keep else min(n, 1), *rows.shape)
    memories[0], momenta[0] = rows, momentum_rows
    writes = _Writes(memories, momenta, gradients, None, None, None)
    if n:
        if _use_fused(options, k):
            activations = _fused_writes(options, k, v, generators, writes, keep)
        else:
            initial = pack(w1, w2) if options.update_rule == 'parallel' else None
            activations = _split_writes(options, k, v, generators, writes, keep, initial)
        writes = writes._replace(**activations)

    y = _token_like(q)
    which, read_size = _reads(options, tokens, memories)
    chunks = math.ceil(tokens / read_size)
    sizes = _sizes(d, w1.size(-1))
    tile = _tile(sizes)
    kernels.read_kernel[(batch * heads * chunks * math.ceil(read_size / tile),)](
        q, memories[which], y, q.stride(), memories.stride(0), batch, heads, tokens, read_size, chunks, tile, **sizes,
        TILE=tile)
    if not options.return_state:
        return (y,), writes
    # Copies, so that whoever changes the state in place leaves what the backward needs alone.
    last = [x.clone(memory_format=torch.contiguous_format) for x in (*unpack(memories[-1]), *unpack(momenta[-1]))]
    return (y, *last), writes


def _split_writes(options, k, v, generators, writes, keep, initial) -> dict[str, Tensor]:
    """Fills ``writes``; returns the generators' activations if they are to be kept.

    The gradients are those at ``initial`` (h, 2e, d), or at M_{t-1} if that is None.
    """
    memories, momenta, gradients = writes[:3]
    batch, heads, tokens, d = k.shape
    sizes = _sizes(d, memories.size(-2) // 2)
    tile = _tile(sizes)
    activations = []
    for t, chunks, begin, end in _groups(options, tokens):
        programs = batch * heads * chunks
        length = min(options.chunk_size, end - begin)
        splits, part_size = _splits(length, programs, tile, k.device)
        at, stride = (memories[t], memories.stride(1)) if initial is None else (initial, 0)
        parts = memories.new_empty(splits, chunks, *memories.shape[1:])
        squares = memories.new_empty(splits, chunks * batch, heads * d)
        kernels.surprise_kernel[(splits * programs,)](
            k[:, :, begin:end], v[:, :, begin:end], at, parts, squares, k.stride(), v.stride(), stride, batch, heads,
            end - begin, length, chunks, part_size, **sizes, TILE=tile)
        surprise = squares.sum(0)
        hidden = F.linear(surprise, generators.in_weight, generators.in_bias)
        coefficients = F.linear(F.gelu(hidden), generators.out_weight, generators.out_bias).sigmoid()
        kept = t if keep else 0
        kernels.write_kernel[(batch * heads,)](
            parts, memories[t:], momenta[kept:], gradients[kept:], coefficients, splits, batch * heads, chunks,
            options.inner_step, options.max_write_norm**-2, heads, **sizes, KEEP=int(keep))
        if keep:
            activations.append((surprise, hidden, coefficients))
    if not keep:
        return {}
    names = ('surprises', 'hidden', 'coefficients')
    return {name: torch.cat(parts).unflatten(0, (-1, batch)) for name, parts in zip(names, zip(*activations))}


def _backward(options, q, k, v, w1, w2, *others_and_writes):
    *others, writes, (dy, *d_state) = others_and_writes
    generators = UpdateGenerators(*others[:4])
    memories = writes.memories
    batch, heads, tokens, d = q.shape
    n = memories.size(0) - 1
    sizes = _sizes(d, w1.size(-1))
    tile = _tile(sizes)

    dq = _token_like(q)
    which, read_size = _reads(options, tokens, memories)
    chunks = math.ceil(tokens / read_size)
    splits, part_size = _splits(read_size, batch * heads * chunks, tile, q.device)
    parts = memories.new_empty(splits, chunks, *memories.shape[1:])
    kernels.read_backward_kernel[(splits * batch * heads * chunks,)](
        q, dy, memories[which], dq, parts, q.stride(), dy.stride(), memories.stride(0), batch, heads, tokens,
        read_size, chunks, part_size, **sizes, TILE=tile, num_warps=8)
    d_reads = torch.zeros_like(memories)
    d_reads[which] = parts.sum(0)
    if d_state:
        dm, dp = pack(*d_state[:2]), pack(*d_state[2:])
    else:
        dm, dp = torch.zeros_like(memories[0]), torch.zeros_like(memories[0])

    dk, dv = _token_like(k), _token_like(v)
    dw1, dw2, d_generators = None, None, (None,) * 4
    if n:
        arguments = (options, k, v, generators, writes, d_reads[1:], dm, dp, dk, dv)
        if _use_fused(options, k):
            d_hidden, d_outputs = _fused_writes_backward(*arguments)
        elif options.update_rule == 'sequential':
            d_hidden, d_outputs, _ = _split_writes_backward(*arguments)
        else:
            d_hidden, d_outputs, d_initial = _split_writes_backward(*arguments, initial=pack(w1, w2))
            dw1, dw2 = unpack(d_initial)
        d_generators = _generator_gradients(writes, d_hidden, d_outputs)
    return dq, dk, dv, dw1, dw2, *d_generators, *unpack(dm + d_reads[0]), *unpack(dp)


def _split_writes_backward(options, k, v, generators, writes, d_reads, dm, dp, dk, dv, initial=None):
    """Fills dk and dv, turns dm and dp from gradients of the last memory and momentum into those of the first.

    Returns the gradients of the generators' two linear outputs, (n, B, 4Cm) and (n, B, 3Cm), and of ``initial``.
    """
    memories, momenta, gradients, _, hidden, coefficients = writes
    batch, heads, tokens, d = k.shape
    sizes = _sizes(d, memories.size(-2) // 2)
    tile = _tile(sizes)
    d_hidden, d_outputs = torch.empty_like(hidden), torch.empty_like(coefficients)
    parts = memories.new_empty(0, 1, *memories.shape[1:])
    for t, chunks, begin, end in reversed(list(_groups(options, tokens))):
        programs = batch * heads * chunks
        d_gradients = torch.empty_like(gradients[t:t + chunks])
        kernels.write_backward_kernel[(batch * heads,)](
            parts, dm, dp, d_reads[t:], memories[t:], momenta[t:], gradients[t:], coefficients[t:], d_gradients,
            d_outputs[t:], parts.size(0), batch * heads, chunks, options.inner_step, options.max_write_norm**-2, heads,
            **sizes)
        group = slice(t, t + chunks)
        d_hidden[group] = torch.ops.aten.gelu_backward(d_outputs[group] @ generators.out_weight, hidden[group])
        d_surprise = d_hidden[group] @ generators.in_weight
        length = min(options.chunk_size, end - begin)
        splits, part_size = _splits(length, programs, tile, k.device)
        at, stride = (memories[t], memories.stride(1)) if initial is None else (initial, 0)
        parts = memories.new_empty(splits, chunks, *memories.shape[1:])
        kernels.surprise_backward_kernel[(splits * programs,)](
            k[:, :, begin:end], v[:, :, begin:end], at, d_gradients, d_surprise, dk[:, :, begin:end],
            dv[:, :, begin:end], parts, k.stride(), v.stride(), stride, dk.stride(0), batch, heads, end - begin,
            length, chunks, part_size, **sizes, TILE=tile, num_warps=8)  # with 4, registers are spilled
    if initial is None:
        dm += parts.sum((0, 1))
        return d_hidden, d_outputs, None
    return d_hidden, d_outputs, parts.sum((0, 1, 2))


def _use_fused(options: _Options, k: Tensor) -> bool:
    """Whether the fused variant serves.

    It takes a chunk's tiles one after the other, in every head: a few microseconds each, against the dozen launches
    that the split variant spends on a chunk. Up to some 64 tiles it should come out ahead, and the more so the more
    images there are than multiprocessors, since then waiting for one another costs nothing.
    """
    batch, heads = k.shape[:2]
    tiles = heads * math.ceil(min(options.chunk_size, k.size(2)) / TILE)
    return options.update_rule == 'sequential' and tiles <= 64 * max(1, batch // _multiprocessors(k.device))


def _fused_writes(options, k, v, generators, writes, keep) -> dict[str, Tensor]:
    """As :func:`_split_writes` for 'sequential', in one launch."""
    memories, momenta, gradients = writes[:3]
    batch, heads, tokens, d = k.shape
    sizes = _sizes(d, memories.size(-2) // 2)
    surprises, hidden, coefficients = (memories.new_empty(gradients.size(0), batch, f * heads * d) for f in (1, 4, 3))
    kernels.fused_kernel[(batch,)](
        k, v, memories, momenta, gradients, surprises, hidden, coefficients,
        *(x.contiguous() for x in generators), k.stride(), v.stride(), batch, heads, tokens, options.chunk_size,
        options.inner_step, options.max_write_norm**-2, **sizes, TILE=_tile(sizes), BLOCK=BLOCK,
        KEEP=int(keep), num_warps=8, num_stages=1)
    return dict(surprises=surprises, hidden=hidden, coefficients=coefficients)


def _fused_writes_backward(options, k, v, generators, writes, d_reads, dm, dp, dk, dv):
    """As :func:`_split_writes_backward` for 'sequential', in one launch."""
    memories, momenta, gradients, _, hidden, coefficients = writes
    batch, heads, tokens, d = k.shape
    sizes = _sizes(d, memories.size(-2) // 2)
    d_hidden, d_outputs = torch.empty_like(hidden), torch.empty_like(coefficients)
    kernels.fused_backward_kernel[(batch,)](
        k, v, memories, momenta, gradients, hidden, coefficients, generators.in_weight.contiguous(),
        generators.out_weight.contiguous(), d_reads, dm, dp, torch.empty_like(dm), d_outputs, d_hidden,
        memories.new_empty(batch, heads * d), dk, dv, k.stride(), v.stride(), batch, heads, tokens,
        options.chunk_size, options.inner_step, options.max_write_norm**-2, **sizes, TILE=_tile(sizes),
        BLOCK=BLOCK, num_warps=8, num_stages=1)
    return d_hidden, d_outputs


def _generator_gradients(writes: _Writes, d_hidden: Tensor, d_outputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the generators' weights and biases, over all chunks at once."""
    surprises, hidden, d_hidden, d_outputs = (
        x.flatten(0, 1) for x in (writes.surprises, writes.hidden, d_hidden, d_outputs))
    return d_hidden.T @ surprises, d_hidden.sum(0), d_outputs.T @ F.gelu(hidden), d_outputs.sum(0)
