"""The fast path in plain PyTorch: closed-form inner gradients, and a backward of its own instead of autograd's.

What autograd would record of the update loop costs several times what the loop itself does. Here the forward keeps the
inputs and what each chunk leaves behind (memory, momentum, inner gradient and coefficients: 3·2e·d numbers a head), and
the backward recomputes a chunk's activations from them, chunk by chunk in reverse. Only the recurrence of Eq. 4 and
what depends on it is a loop; reads, the parallel rule's gradients and the generators' own gradients are batched.

As in :mod:`.differentiable`, both fast weights live in one tensor of rows, ``cat(W1ᵀ, W2)``, of shape (n, 2e, d), where
n counts independent memories: images times heads, times chunks where all chunks run at once. Hidden activations are
kept as (n, e, L), so that both halves of a fused product are contiguous.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .differentiable import neural_memory_differentiable, pack, unpack
from .types import MemoryState, UpdateGenerators

_gelu_backward = torch.ops.aten.gelu_backward

# On a CPU, chunks are worked on together as long as one of their tensors has at most this many numbers: what is worked
# on should stay in the cache, and fewer operations cost less to launch.
GROUP_NUMBERS = 2**18


def neural_memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    generators: UpdateGenerators,
    state: MemoryState,
    *,
    return_state: bool,
    **options: Any,
) -> tuple[Tensor, MemoryState | None]:
    """See :func:`convneur_mm.ops.neural_memory`; ``state`` is the memory before the first chunk."""
    y, rows, momentum = _ChunkedMemory.apply(
        q, k, v, pack(w1, w2), *generators, pack(state.w1, state.w2), pack(state.p1, state.p2), options)
    return y, MemoryState(*unpack(rows), *unpack(momentum)) if return_state else None


class _ChunkedMemory(torch.autograd.Function):
    """q, k, v (B, h, N, d), M_0 (h, 2e, d), generators, memory and momentum (B, h, 2e, d) → y and the last two."""

    @staticmethod
    def forward(ctx, q, k, v, initial, in_weight, in_bias, out_weight, out_bias, rows, momentum, options):
        generators = UpdateGenerators(in_weight, in_bias, out_weight, out_bias)
        written = _write_all(k, v, initial, generators, rows, momentum, options)
        y = _read_all(q, written.memories, options)
        ctx.save_for_backward(q, k, v, initial, *generators, rows, momentum, *written)
        ctx.options = options
        ctx.set_materialize_grads(False)
        # Copies, as a view would keep the memories of all chunks alive.
        return y, written.memories[-1].view(rows.shape).clone(), written.momenta[-1].view(rows.shape).clone()

    @staticmethod
    def backward(ctx, grad_y, grad_rows, grad_momentum):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them
        inputs, written = saved[:10], _Written(*saved[10:])
        grads = grad_y, grad_rows, grad_momentum
        # As the forward, in the dtype of the inputs, also for a backward that is called under autocast.
        with nullcontext() if inputs[0].is_meta else torch.autocast(inputs[0].device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate once more
                return *_differentiable_backward(inputs, grads, ctx.options), None
            return *_backward(inputs, written, grads, ctx.options), None


class _Written(NamedTuple):
    """What T writes leave behind, n memories = B images x h heads.

    Attributes:
        memories (Tensor): M_0 … M_T, (T + 1, n, 2e, d).
        momenta (Tensor): P_0 … P_T, (T + 1, n, 2e, d).
        gradients (Tensor): Inner gradients of Eq. 3, (T, n, 2e, d).
        surprises (Tensor): Mean squared errors, (T, B, Cm).
        pre_hidden (Tensor): The generators' hidden units before their GELU, (T, B, 4Cm).
        coefficients (Tensor): Step (without inner_step), momentum and decay, (T, B, 3Cm).
    """

    memories: Tensor
    momenta: Tensor
    gradients: Tensor
    surprises: Tensor
    pre_hidden: Tensor
    coefficients: Tensor


def _write_all(k, v, initial, generators, rows, momentum, options) -> _Written:
    """Eqs. 3 and 4 for all chunks of ``k``."""
    (batch, heads, num_tokens, d), chunk_size = k.shape, options['chunk_size']
    num_chunks = math.ceil(num_tokens / chunk_size)
    memories = rows.new_empty(num_chunks + 1, batch * heads, *rows.shape[2:])
    momenta, gradients = torch.empty_like(memories), torch.empty_like(memories[1:])
    memories[0], momenta[0] = rows.flatten(0, 1), momentum.flatten(0, 1)
    surprises = rows.new_empty(num_chunks, batch, heads * d)
    pre_hidden = rows.new_empty(num_chunks, batch, generators.in_bias.numel())
    coefficients = rows.new_empty(num_chunks, batch, generators.out_bias.numel())
    written = _Written(memories, momenta, gradients, surprises, pre_hidden, coefficients)

    if options['update_rule'] == 'sequential':
        for t, tokens in enumerate(_chunks(num_tokens, chunk_size)):
            gradients[t], surprise = _surprise(_take(k, tokens), _take(v, tokens), memories[t])
            surprises[t] = surprise.view(batch, heads * d)
            pre_hidden[t], coefficients[t] = _coefficients(surprises[t], generators)
            _write(written, t, options)
        return written
    for chunks, tokens in _chunk_groups(k, chunk_size):
        n = chunks.stop - chunks.start
        at = initial.repeat_interleave(n, dim=0).repeat(batch, 1, 1)
        gradient, surprise = _surprise(_take(k, tokens, n), _take(v, tokens, n), at)
        gradients[chunks] = gradient.unflatten(0, (-1, n)).transpose(0, 1)
        surprises[chunks] = surprise.view(batch, heads, n, d).permute(2, 0, 1, 3).flatten(2)
    pre_hidden[:], coefficients[:] = _coefficients(surprises, generators)
    for t in range(num_chunks):
        _write(written, t, options)
    return written


def _surprise(k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of Eq. 3 at the memories ``rows``, and each channel's mean squared error.

    Args:
        k (Tensor): (n, L, d).
        v (Tensor): (n, L, d).
        rows (Tensor): (n, 2e, d).

    Returns:
        tuple[Tensor, Tensor]: (n, 2e, d) and (n, d).
    """
    w1, w2 = rows.chunk(2, dim=1)
    hidden = torch.bmm(w1, k.mT)
    active = F.gelu(hidden)
    error = _add_product(k - v, active.mT, w2)
    d_hidden = _gelu_backward(torch.bmm(w2, error.mT), hidden)
    gradient = torch.cat((torch.bmm(d_hidden, k), torch.bmm(active, error)), dim=1)
    return gradient.mul_(2 / k.size(-1)), error.square().mean(dim=1)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a @ b`` in the memory of ``x``. Unlike of ``baddbmm_``, FLOP counters know of it."""
    return torch.baddbmm(x, a, b, out=x)


def _surprise_backward(k, v, rows, grad_gradient, grad_surprise):
    """Gradients of ``k``, ``v`` and ``rows`` of :func:`_surprise`; its activations are computed anew.

    With h, a, E of :func:`_surprise`, u = E·W2ᵀ and b = u ⊙ GELU'(h), the inner gradients are bᵀk and aᵀE; ``g1`` and
    ``g2`` are what comes back to them.
    """
    e = rows.size(1) // 2
    grad_gradient = grad_gradient * (2 / k.size(-1))
    w2, g2 = rows[:, e:], grad_gradient[:, e:]
    first = torch.cat((rows[:, :e], grad_gradient[:, :e]), dim=1)  # W1ᵀ, g1
    second = torch.cat((g2, w2), dim=1)
    hidden, grad_b = torch.bmm(first, k.mT).chunk(2, dim=1)

    # GELU(h) = h·Φ(h), its derivatives Φ + h·φ and φ·(2 − h²): one erf and one exp for all of them.
    square = hidden.square()
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    cumulative = (hidden * math.sqrt(0.5)).erf_().mul_(0.5).add_(0.5)
    slope = torch.addcmul(cumulative, hidden, density)
    active_and_grad_u = torch.cat((hidden * cumulative, grad_b * slope), dim=1)
    active, grad_u = active_and_grad_u.chunk(2, dim=1)

    error = _add_product(k - v, active.mT, w2)
    grad_active, u = torch.bmm(second, error.mT).chunk(2, dim=1)
    grad_error = _add_product(error * (grad_surprise.unsqueeze(1) * (2 / k.size(1))), active_and_grad_u.mT, second)
    grad_active = torch.baddbmm(grad_active, w2, grad_error.mT)
    curvature = square.neg_().add_(2).mul_(density)
    grad_hidden = torch.addcmul(grad_active * slope, grad_b * u, curvature)
    third = torch.cat((grad_gradient[:, :e], rows[:, :e]), dim=1)
    grad_k = torch.baddbmm(grad_error, torch.cat((u * slope, grad_hidden), dim=1).mT, third)
    grad_w1 = torch.bmm(grad_hidden, k)
    grad_w2 = _add_product(torch.bmm(grad_u, error), active, grad_error)
    return grad_k, grad_error.neg_(), torch.cat((grad_w1, grad_w2), dim=1)


def _coefficients(surprise: Tensor, generators: UpdateGenerators) -> tuple[Tensor, Tensor]:
    """Hidden units before their GELU (…, 4Cm), and step, momentum and decay side by side (…, 3Cm)."""
    pre_hidden = F.linear(surprise, generators.in_weight, generators.in_bias)
    return pre_hidden, F.linear(F.gelu(pre_hidden), generators.out_weight, generators.out_bias).sigmoid_()


def _write(written: _Written, t: int, options: dict) -> None:
    """Eq. 4 for chunk ``t``, whose gradients and coefficients are there."""
    d = written.memories.size(-1)
    step, eta, alpha = (c.reshape(-1, 1, d) for c in written.coefficients[t].chunk(3, dim=-1))
    write = (options['inner_step'] * step) * written.gradients[t]
    write *= _bound(write, options['max_write_norm'])
    written.momenta[t + 1] = eta * written.momenta[t] - write
    written.memories[t + 1] = (1 - alpha) * written.memories[t] + written.momenta[t + 1]


def _bound(write: Tensor, max_write_norm: float) -> Tensor:
    """The factor (…, 1, 1) that keeps the norm of each head's write (…, 2e, d) below ``max_write_norm``."""
    return (1 + write.square().sum((-2, -1), keepdim=True) / max_write_norm**2).rsqrt_()


def _backward(inputs, written, grads, options) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of :class:`_ChunkedMemory`."""
    q, k, v, initial, *generators, rows, _ = inputs
    grad_y, grad_rows, grad_momentum = grads
    grad_memories = torch.zeros_like(written.memories)
    grad_q = None
    if grad_y is not None:
        grad_q = _read_all_backward(q, written.memories, grad_y, grad_memories, options)
    if grad_rows is not None:
        grad_memories[-1] += grad_rows.flatten(0, 1)
    grad_momentum = torch.zeros_like(grad_memories[0]) if grad_momentum is None else grad_momentum.flatten(0, 1)
    grad_k, grad_v, grad_initial, grad_generators, grad_rows, grad_momentum = _write_all_backward(
        k, v, initial, UpdateGenerators(*generators), written, grad_memories, grad_momentum, options)
    return (grad_q, grad_k, grad_v, grad_initial, *grad_generators, grad_rows.view(rows.shape),
            grad_momentum.view(rows.shape))


def _write_all_backward(k, v, initial, generators, written, grad_memories, grad_momentum, options):
    """Gradients of k, v, M_0, the generators, and of the memory and momentum before the first chunk.

    ``grad_memories`` (T + 1, n, 2e, d) holds what the reads and the caller return to each memory and ``grad_momentum``
    (n, 2e, d) what comes back to P_T; both are used up.
    """
    memories, momenta, gradients, _, pre_hidden, coefficients = written
    (batch, heads, num_tokens, d), chunk_size = k.shape, options['chunk_size']
    num_chunks, n = gradients.shape[:2]
    inner_step, max_norm = options['inner_step'], options['max_write_norm']
    sequential = options['update_rule'] == 'sequential'

    # All that the reversed recurrence needs and that does not depend on it.
    step, eta, alpha = (c.reshape(num_chunks, n, 1, d) for c in coefficients.chunk(3, dim=-1))
    step = inner_step * step
    writes = step * gradients
    bound = _bound(writes, max_norm)
    grad_gradients = torch.empty_like(gradients)
    grad_out = torch.empty_like(coefficients)
    grad_pre_hidden = torch.empty_like(pre_hidden)
    grad_surprises = torch.empty_like(written.surprises)
    sigmoid_slope = coefficients * (1 - coefficients)
    grad_k, grad_v = (torch.empty_like(x, dtype=memories.dtype) for x in (k, v))
    tokens = list(_chunks(num_tokens, chunk_size))

    def generators_backward(at: int | slice) -> None:
        grad_out[at] *= sigmoid_slope[at]
        grad_pre_hidden[at] = _gelu_backward(grad_out[at] @ generators.out_weight, pre_hidden[at])
        grad_surprises[at] = grad_pre_hidden[at] @ generators.in_weight

    grad_rows = grad_memories[num_chunks]
    for t in reversed(range(num_chunks)):
        grad_momentum = grad_momentum + grad_rows
        inner = -(grad_momentum * writes[t]).sum((-2, -1), keepdim=True)
        grad_write = (writes[t] * (inner * (bound[t]**3 / -max_norm**2))).sub_(grad_momentum * bound[t])
        grad_gradients[t] = grad_write * step[t]
        out_t = grad_out[t].view(batch, 3, n // batch, d)
        out_t[:, 0] = (inner_step * (grad_write * gradients[t]).sum(-2)).view(batch, heads, d)
        out_t[:, 1] = (grad_momentum * momenta[t]).sum(-2).view(batch, heads, d)
        out_t[:, 2] = -(grad_rows * memories[t]).sum(-2).view(batch, heads, d)
        grad_rows = torch.addcmul(grad_memories[t], 1 - alpha[t], grad_rows)
        grad_momentum = eta[t] * grad_momentum
        if sequential:
            generators_backward(t)
            k_grad, v_grad, rows_grad = _surprise_backward(
                _take(k, tokens[t]), _take(v, tokens[t]), memories[t], grad_gradients[t], grad_surprises[t].view(n, d))
            _put(grad_k, tokens[t], k_grad)
            _put(grad_v, tokens[t], v_grad)
            grad_rows += rows_grad

    grad_initial = None
    if not sequential:
        generators_backward(slice(None))
        grad_initial = torch.zeros_like(initial)
        for chunks, span in _chunk_groups(k, chunk_size):
            c = chunks.stop - chunks.start
            at = initial.repeat_interleave(c, dim=0).repeat(batch, 1, 1)
            k_grad, v_grad, rows_grad = _surprise_backward(
                _take(k, span, c), _take(v, span, c), at, grad_gradients[chunks].transpose(0, 1).flatten(0, 1),
                grad_surprises[chunks].view(c, n, d).transpose(0, 1).flatten(0, 1))
            _put(grad_k, span, k_grad)
            _put(grad_v, span, v_grad)
            grad_initial += rows_grad.view(batch, heads, c, *initial.shape[1:]).sum((0, 2))

    flat_out, flat_hidden = grad_out.flatten(0, 1), grad_pre_hidden.flatten(0, 1)
    grad_generators = (
        flat_hidden.mT @ written.surprises.flatten(0, 1), flat_hidden.sum(0),
        flat_out.mT @ F.gelu(pre_hidden).flatten(0, 1), flat_out.sum(0))
    return grad_k, grad_v, grad_initial, grad_generators, grad_rows, grad_momentum


def _read_all(q: Tensor, memories: Tensor, options: dict) -> Tensor:
    """Eq. 2 for all tokens; in the memory layout of ``q``."""
    y = torch.empty_like(q)
    for chunks, tokens in _chunk_groups(q, options['chunk_size']):
        q_t = _take(q, tokens, chunks.stop - chunks.start)
        w1, w2 = _readable(memories, chunks, options).chunk(2, dim=1)
        _put(y, tokens, torch.baddbmm(q_t, F.gelu(torch.bmm(w1, q_t.mT)).mT, w2))
    return y


def _read_all_backward(q, memories, grad_y, grad_memories, options) -> Tensor:
    """The gradient of q; adds those of the memories to ``grad_memories``."""
    grad_q = torch.empty_like(q)
    for chunks, tokens in _chunk_groups(q, options['chunk_size']):
        c = chunks.stop - chunks.start
        q_t, grad_t = _take(q, tokens, c), _take(grad_y, tokens, c)
        w1, w2 = _readable(memories, chunks, options).chunk(2, dim=1)
        hidden = torch.bmm(w1, q_t.mT)
        grad_hidden = _gelu_backward(torch.bmm(w2, grad_t.mT), hidden)
        _put(grad_q, tokens, torch.baddbmm(grad_t, grad_hidden.mT, w1))
        grad_rows = torch.cat((torch.bmm(grad_hidden, q_t), torch.bmm(F.gelu(hidden), grad_t)), dim=1)
        grad_rows = grad_rows.unflatten(0, (-1, c)).transpose(0, 1)
        if options['retrieve'] == 'final':
            grad_memories[-1] += grad_rows.sum(0)
        else:
            grad_memories[chunks] += grad_rows
    return grad_q


def _readable(memories: Tensor, chunks: slice, options: dict) -> Tensor:
    """The memories that the queries of ``chunks`` read, (n·chunks, 2e, d)."""
    if options['retrieve'] == 'final':
        chosen = memories[-1:].expand(chunks.stop - chunks.start, -1, -1, -1)
    else:
        chosen = memories[chunks]
    return chosen.transpose(0, 1).flatten(0, 1)


def _chunks(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_size, num_tokens)) for start in range(0, num_tokens, chunk_size))


def _chunk_groups(x: Tensor, chunk_size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of chunks and of their tokens that are worked on at once: as many whole chunks as fit, the rest alone."""
    num_tokens, start = x.size(2), 0
    numbers = x.size(0) * x.size(1) * chunk_size * x.size(3)
    most = max(1, GROUP_NUMBERS // numbers) if x.device.type == 'cpu' else num_tokens
    whole = num_tokens // chunk_size
    while start < whole:
        stop = min(start + most, whole)
        yield slice(start, stop), slice(start * chunk_size, stop * chunk_size)
        start = stop
    if num_tokens > whole * chunk_size:
        yield slice(whole, whole + 1), slice(whole * chunk_size, num_tokens)


def _take(x: Tensor, tokens: slice, chunks: int = 1) -> Tensor:
    """Some tokens of (B, h, N, d) as (B·h·chunks, L, d)."""
    x = x[:, :, tokens]
    return x.reshape(x.size(0) * x.size(1) * chunks, x.size(2) // chunks, x.size(3))


def _put(x: Tensor, tokens: slice, value: Tensor) -> None:
    """Writes what :func:`_take` took."""
    x = x[:, :, tokens]
    x.copy_(value.view(x.shape))


def _differentiable_backward(inputs, grads, options) -> tuple[Tensor | None, ...]:
    """The same gradients from the path that autograd records, so that they can be differentiated again."""
    # Views are nodes of their own: what one input was made of another would else be counted twice.
    inputs = [x.view_as(x) for x in inputs]
    q, k, v, initial, *generators, rows, momentum = inputs
    w1, w2 = unpack(initial)
    y, state = neural_memory_differentiable(
        q, k, v, w1, w2, UpdateGenerators(*generators), MemoryState(*unpack(rows), *unpack(momentum)),
        return_state=True, **options)
    outputs = y, pack(state.w1, state.w2), pack(state.p1, state.p2)
    outputs, grads = zip(*((o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad))
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
