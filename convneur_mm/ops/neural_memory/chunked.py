"""The fast path in plain PyTorch: closed-form inner gradients, and a backward of its own instead of autograd's.

What autograd would record of the update loop costs several times what the loop itself does. Here the forward keeps the
inputs and what each chunk leaves behind (memory, momentum, inner gradient and coefficients: 3·2e·d numbers a head), and
the backward recomputes a chunk's activations from them, chunk by chunk in reverse. Only the recurrence of Eq. 4 and
what depends on it is a loop; reads, the parallel rule's gradients and the generators' own gradients are batched.

As in :mod:`.differentiable`, both fast weights live in one tensor of rows, ``cat(W1ᵀ, W2)``, of shape (n, 2e, d), where
n counts independent memories: images times heads, times chunks where all chunks run at once. Tokens are columns:
queries, keys and values are (n, d, L) and hidden activations (n, e, L), the order in which sums over so few channels
and factors of a token run over contiguous numbers. Inputs may lie in memory in any order; (B, h, d, N) needs no copies.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .differentiable import differentiable_gradients, neural_memory_differentiable, pack, unpack
from .types import MemoryState, UpdateGenerators, is_compiling, no_autocast

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
    num_written: int,
    **options: Any,
) -> tuple[Tensor, MemoryState | None]:
    """See :func:`convneur_mm.ops.neural_memory`; ``state`` is the memory before the first chunk.

    Only the first ``num_written`` tokens are written.
    """
    options['num_written'] = num_written
    y, rows, momentum = _ChunkedMemory.apply(
        q.mT, k.mT, v.mT, pack(w1, w2), *generators, pack(state.w1, state.w2), pack(state.p1, state.p2), options)
    y = y.mT
    return y, MemoryState(*unpack(rows), *unpack(momentum)) if return_state else None


class _ChunkedMemory(torch.autograd.Function):
    """q, k, v (B, h, d, N), M_0 (h, 2e, d), generators, memory and momentum (B, h, 2e, d) → y and the last two."""

    @staticmethod
    def forward(ctx, q, k, v, initial, in_weight, in_bias, out_weight, out_bias, rows, momentum, options):
        generators = UpdateGenerators(in_weight, in_bias, out_weight, out_bias)
        written = write_all(k, v, initial, generators, rows, momentum, options)
        y = read_all(q, written.states[:, 2], options)
        ctx.save_for_backward(q, k, v, initial, *generators, rows, momentum, *written)
        ctx.options = options
        ctx.set_materialize_grads(False)
        # Copies, as a view would keep the states of all chunks alive.
        return y, written.states[-1, 2].clone(), written.states[-1, 1].clone()

    @staticmethod
    def backward(ctx, grad_y, grad_rows, grad_momentum):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them
        inputs, written = saved[:10], Written(*saved[10:])
        grads = grad_y, grad_rows, grad_momentum
        # As the forward, in the dtype of the inputs, also for a backward that is called under autocast.
        with no_autocast(inputs[0]):
            if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate once more
                return *differentiable_gradients(partial(_differentiable, ctx.options), inputs, grads), None
            q, k, v, initial, *generators, _, _ = inputs
            return *backward(q, k, v, initial, UpdateGenerators(*generators), written, grads, ctx.options), None


class Written(NamedTuple):
    """What T writes leave behind.

    Attributes:
        states (Tensor): For each chunk t what its coefficients multiply, (T + 1, 3, B, h, 2e, d): the inner gradient of
            Eq. 3 over 2/d, the momentum P_t and the memory M_t. Nothing is the gradient of the last one, t = T.
        surprises (Tensor): Mean squared errors, (T, B, Cm).
        pre_hidden (Tensor): The generators' hidden units before their GELU, (T, B, 4Cm).
        coefficients (Tensor): Step (without inner_step), momentum and decay, (T, B, 3Cm).
    """

    states: Tensor
    surprises: Tensor
    pre_hidden: Tensor
    coefficients: Tensor


def write_all(k, v, initial, generators, rows, momentum, options) -> Written:
    """Eqs. 3 and 4 for the chunks of the first ``num_written`` tokens."""
    if cpu.usable(k, initial):
        return Written(*cpu.write_all(k, v, initial, generators, rows, momentum, options))
    batch, heads, *head = rows.shape
    num_tokens, chunk_size = options['num_written'], options['chunk_size']
    num_chunks = math.ceil(num_tokens / chunk_size)
    states = rows.new_empty(num_chunks + 1, 3, *rows.shape)
    states[0, 1], states[0, 2] = momentum, rows
    # Views are made for all chunks at once: one by one, they take longer than many of the operations on them.
    gradients, momenta, memories = (x.unbind() for x in states.unbind(1))

    if not num_chunks:
        return Written(states, *(rows.new_empty(0, batch, n * heads * rows.size(-1)) for n in (1, 4, 3)))
    if options['update_rule'] == 'sequential':
        surprises, pre_hidden, coefficients = [], [], []
        out = states[:, 0].flatten(1, 2).unbind()
        weights = zip(*(x.unbind() for x in states[:, 2].flatten(1, 2).chunk(2, dim=2)))
        chunks = zip(_split(k, num_tokens, chunk_size), _split(v, num_tokens, chunk_size), weights)
        for t, (k_t, v_t, (w1, w2)) in enumerate(chunks):
            surprise = _surprise(k_t, v_t, w1, w2, out=out[t]).view(batch, -1)
            pre_hidden_t, coefficients_t = _coefficients(surprise, generators)
            _write(gradients[t], momenta[t:t + 2], memories[t:t + 2], coefficients_t, options)
            surprises.append(surprise)
            pre_hidden.append(pre_hidden_t)
            coefficients.append(coefficients_t)
        return Written(states, torch.stack(surprises), torch.stack(pre_hidden), torch.stack(coefficients))
    surprises = rows.new_empty(num_chunks, batch, heads, rows.size(-1))
    for chunks, tokens in _chunk_groups(k, num_tokens, chunk_size):
        n = chunks.stop - chunks.start
        at = initial.repeat_interleave(n, dim=0).repeat(batch, 1, 1)
        gradient = torch.empty_like(at)
        surprise = _surprise(_take(k, tokens, n), _take(v, tokens, n), *at.chunk(2, dim=1), out=gradient)
        states[chunks, 0] = gradient.view(batch, heads, n, *head).movedim(2, 0)
        surprises[chunks] = surprise.view(batch, heads, n, -1).movedim(2, 0)
    surprises = surprises.flatten(2)
    pre_hidden, coefficients = _coefficients(surprises, generators)
    for t in range(num_chunks):
        _write(gradients[t], momenta[t:t + 2], memories[t:t + 2], coefficients[t], options)
    return Written(states, surprises, pre_hidden, coefficients)


def _surprise(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, out: Tensor) -> Tensor:
    """Gradient of Eq. 3 at memories of weights ``w1`` (transposed) and ``w2``, and each channel's mean squared error.

    Args:
        k (Tensor): (n, d, L).
        v (Tensor): (n, d, L).
        w1 (Tensor): (n, e, d).
        w2 (Tensor): (n, e, d).
        out (Tensor): Takes the gradient over 2/d, (n, 2e, d).

    Returns:
        Tensor: Mean squared errors, (n, d).
    """
    hidden = torch.bmm(w1, k)
    active = F.gelu(hidden)
    error = _add_product(k - v, w2.mT, active)
    d_hidden = _gelu_backward(torch.bmm(w2, error), hidden)
    torch.cat((torch.bmm(d_hidden, k.mT), torch.bmm(active, error.mT)), dim=1, out=out)
    return error.square().mean(dim=2)


class _Workspace:
    """Tensors that :func:`_surprise_backward` fills anew for each chunk, n memories and L tokens, and their parts."""

    def __init__(self, n: int, e: int, d: int, length: int, like: Tensor) -> None:
        self.weights = like.new_empty(n, 2, 2, e, d)  # W1ᵀ, g1, W2, g2
        self.w1_g1, self.w2_g2 = (x.flatten(1, 2) for x in self.weights.unbind(1))
        self.w2 = self.weights[:, 1, 0]
        pairs = like.new_empty(4, n, 2 * e, length)
        self.hidden_grad_b, self.u_grad_active, self.grad_u_active, self.grad_hidden_b = pairs.unbind()
        first, second = (x.unbind() for x in pairs.chunk(2, dim=2))
        self.hidden, self.u, self.grad_u, self.grad_hidden = first
        self.grad_b, self.grad_active, self.active, self.b = second
        self.ones = like.new_ones(n, e, length)  # expanded from one number it would be several times as slow


def _surprise_backward(k, v, rows, grad_gradient, grad_surprise, grad_k, grad_v, space: _Workspace) -> Tensor:
    """Gradients of ``k``, ``v`` (written to ``grad_k``, ``grad_v``) and ``rows`` (returned) of :func:`_surprise`.

    With h, a, E of :func:`_surprise`, which are computed anew, u = W2·E and b = u ⊙ GELU'(h), the inner gradients are
    b·kᵀ and a·Eᵀ; ``g1`` and ``g2`` are what comes back to them.
    """
    torch.stack((rows.unflatten(1, (2, -1)), grad_gradient.unflatten(1, (2, -1))), dim=2, out=space.weights)
    torch.bmm(space.w1_g1, k, out=space.hidden_grad_b)
    slope = _gelu_backward(space.ones, space.hidden)
    _store(space.active, torch.ops.aten.gelu, space.hidden)
    _store(space.grad_u, torch.mul, space.grad_b, slope)
    error = _add_product(k - v, space.w2.mT, space.active)
    torch.bmm(space.w2_g2, error, out=space.u_grad_active)
    grad_error = error * (grad_surprise * (2 / k.size(2))).unsqueeze(2)
    grad_error = _add_product(grad_error, space.w2_g2.mT, space.grad_u_active)
    _store(grad_v, torch.neg, grad_error)

    grad_active = torch.bmm(space.w2, grad_error).add_(space.grad_active).mul_(slope)
    # GELU''(h) = φ(h)·(2 − h²)
    square = space.hidden.square()
    curvature = (square * -0.5).exp_().mul_(2 - square).mul_(space.u)
    _store(space.b, torch.mul, space.u, slope)
    _store(space.grad_hidden, torch.addcmul, grad_active, space.grad_b, curvature, value=1 / math.sqrt(2 * math.pi))
    _store(grad_k, torch.add, grad_error, torch.bmm(space.w1_g1.mT, space.grad_hidden_b))
    grad_w2 = _add_product(torch.bmm(space.grad_u, error.mT), space.active, grad_error.mT)
    return torch.cat((torch.bmm(space.grad_hidden, k.mT), grad_w2), dim=1)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a @ b`` in the memory of ``x``. Unlike of ``baddbmm_``, FLOP counters know of it."""
    _store(x, torch.baddbmm, x, a, b)
    return x


def _store(out: Tensor, function: Callable, *args: Tensor, **kwargs: float) -> None:
    """Writes a result to where it belongs, with a copy only for a compiler, which takes no ``out`` with gaps."""
    if is_compiling():
        out.copy_(function(*args, **kwargs))
    else:
        function(*args, **kwargs, out=out)


def _coefficients(surprise: Tensor, generators: UpdateGenerators) -> tuple[Tensor, Tensor]:
    """Hidden units before their GELU (…, 4Cm), and step, momentum and decay side by side (…, 3Cm)."""
    pre_hidden = F.linear(surprise, generators.in_weight, generators.in_bias)
    return pre_hidden, F.linear(F.gelu(pre_hidden), generators.out_weight, generators.out_bias).sigmoid_()


def _by_head(coefficients: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(…, 3Cm) → step, momentum and decay, (…, h, 1, d) each."""
    return coefficients.unflatten(-1, (3, heads, 1, -1)).unbind(-4)


def _write(gradient, momenta, memories, coefficients: Tensor, options: dict) -> None:
    """Eq. 4: fills in the second of two ``momenta`` and of two ``memories``, (B, h, 2e, d) each."""
    step, eta, alpha = _by_head(coefficients, gradient.size(1))
    scale = options['inner_step'] * 2 / gradient.size(-1)
    write = step * gradient
    bound = _bound(write, scale / options['max_write_norm'])
    torch.addcmul(eta * momenta[0], write, bound, value=-scale, out=momenta[1])
    torch.addcmul(momenta[1], 1 - alpha, memories[0], out=memories[1])


def _bound(write: Tensor, scale: float) -> Tensor:
    """The factor (…, 1, 1) that keeps the norm of each head's write (…, 2e, d) below ``1 / scale``."""
    return write.square().sum((-2, -1), keepdim=True).mul_(scale**2).add_(1).rsqrt_()


def backward(q, k, v, initial, generators, written, grads, options, y=None) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of :class:`_ChunkedMemory` from those of its outputs, of which any may be None.

    If ``y`` is a tensor, it is filled with what the forward returned.
    """
    grad_y, grad_rows, grad_momentum = grads
    memories = written.states[:, 2]
    grad_memories = torch.zeros_like(memories, memory_format=torch.contiguous_format)
    grad_q = None
    if grad_y is not None:
        grad_q = _read_all_backward(q, memories, grad_y, grad_memories, options, y)
    if grad_rows is not None:
        grad_memories[-1] += grad_rows
    if not options['num_written']:
        grad_momentum = torch.zeros_like(grad_memories[0]) if grad_momentum is None else grad_momentum
        return grad_q, *[None] * 7, grad_memories[0], grad_momentum
    write_all_backward = cpu.write_all_backward if cpu.usable(k, initial) else _write_all_backward
    grad_k, grad_v, grad_initial, grad_out, grad_pre_hidden, grad_rows, grad_momentum = write_all_backward(
        k, v, initial, generators, written, grad_memories, grad_momentum, options)
    flat_out, flat_hidden = grad_out.flatten(0, 1), grad_pre_hidden.flatten(0, 1)
    grad_generators = (
        flat_hidden.mT @ written.surprises.flatten(0, 1), flat_hidden.sum(0),
        flat_out.mT @ F.gelu(written.pre_hidden).flatten(0, 1), flat_out.sum(0))
    return grad_q, grad_k, grad_v, grad_initial, *grad_generators, grad_rows, grad_momentum


def _write_all_backward(k, v, initial, generators, written, grad_memories, grad_momentum, options):
    """Gradients of k, v and M_0, of the generators' outputs before the sigmoid (T, B, 3Cm) and their hidden units
    before the GELU (T, B, 4Cm), and of the memory and momentum before the first chunk.

    ``grad_memories`` (T + 1, B, h, 2e, d) holds what the reads and the caller return to each memory and
    ``grad_momentum`` (B, h, 2e, d) or None what comes back to P_T.
    """
    states, _, pre_hidden, coefficients = written
    batch, heads, *head = grad_memories.shape[1:]
    num_tokens, chunk_size = options['num_written'], options['chunk_size']
    sequential = options['update_rule'] == 'sequential'
    # What comes back to write, P and M after a chunk.
    left = torch.zeros_like(states[0])
    grad_write, grad_p, grad_m = left.unbind()
    grad_m.copy_(grad_memories[-1])
    if grad_momentum is not None:
        grad_p.copy_(grad_momentum)

    # All that the reversed recurrence needs and that does not depend on it.
    step, eta, alpha = _by_head(coefficients, heads)
    scale, max_norm = options['inner_step'] * 2 / head[-1], options['max_write_norm']
    writes = step * states[:-1, 0]
    bounds = _bound(writes, scale / max_norm)
    # Of sigmoids, times what step, momentum and decay are multiplied by; a tensor of these three factors would be a
    # copy from the host, which waits for the device.
    slopes = (coefficients * (1 - coefficients)).unflatten(-1, (3, heads, -1))
    slopes[:, :, 0].mul_(-scale)
    slopes[:, :, 2].neg_()
    each = zip(states, writes, bounds, bounds**3 * -(scale / max_norm)**2, step * -scale, eta, 1 - alpha, slopes,
               grad_memories)
    grad_gradients, grad_out, grad_pre_hidden = [], [], []
    grad_k, grad_v = _empty_like(k), _empty_like(v)
    for grad in (grad_k, grad_v):
        grad[..., num_tokens:].zero_()
    if sequential:
        tokens = list(zip(*(_split(x, num_tokens, chunk_size) for x in (k, v, grad_k, grad_v))))
        flat_memories = states[:, 2].flatten(1, 2).unbind()
    spaces: dict[tuple[int, int], _Workspace] = {}  # by memories and tokens: of whole chunks, and of a shorter rest

    def surprise_backward(k_t: Tensor, *args: Tensor) -> Tensor:
        size = len(k_t), k_t.size(2)
        if size not in spaces:
            spaces[size] = _Workspace(size[0], head[0] // 2, head[1], size[1], states)
        return _surprise_backward(k_t, *args, spaces[size])

    def generators_backward(grad_out: Tensor, pre_hidden: Tensor) -> tuple[Tensor, Tensor]:
        grad_pre_hidden = _gelu_backward(grad_out @ generators.out_weight, pre_hidden)
        return grad_pre_hidden, grad_pre_hidden @ generators.in_weight

    for t, (right, write, bound, curb, step_t, eta_t, keep, slope, grad_read) in reversed(list(enumerate(each))):
        grad_p += grad_m
        inner = (grad_p * write).sum((-2, -1), keepdim=True)
        torch.mul(grad_p, bound, out=grad_write)
        grad_write.addcmul_(write, inner * curb)
        grad_gradient = grad_write * step_t
        grad_out.append(((left * right).sum(-2).transpose(0, 1) * slope).flatten(1))
        grad_m.mul_(keep).add_(grad_read)
        grad_p *= eta_t
        if sequential:
            grad_pre_hidden_t, grad_surprise = generators_backward(grad_out[-1], pre_hidden[t])
            grad_pre_hidden.append(grad_pre_hidden_t)
            k_t, v_t, grad_k_t, grad_v_t = tokens[t]
            grad_m += surprise_backward(
                k_t, v_t, flat_memories[t], grad_gradient.flatten(0, 1), grad_surprise.view(-1, head[-1]), grad_k_t,
                grad_v_t).view(grad_m.shape)
        else:
            grad_gradients.append(grad_gradient)

    grad_out = torch.stack(grad_out[::-1])
    grad_initial = None
    if sequential:
        grad_pre_hidden = torch.stack(grad_pre_hidden[::-1])
    else:
        grad_pre_hidden, grad_surprises = generators_backward(grad_out, pre_hidden)
        grad_gradients = torch.stack(grad_gradients[::-1])
        grad_initial = torch.zeros_like(initial)
        for chunks, span in _chunk_groups(k, num_tokens, chunk_size):
            n = chunks.stop - chunks.start
            at = initial.repeat_interleave(n, dim=0).repeat(batch, 1, 1)
            grad_k_t, grad_v_t = _slot(grad_k, span, n), _slot(grad_v, span, n)
            rows_grad = surprise_backward(
                _take(k, span, n), _take(v, span, n), at, grad_gradients[chunks].movedim(0, 2).flatten(0, 2),
                grad_surprises[chunks].unflatten(-1, (heads, -1)).movedim(0, 2).flatten(0, 2), grad_k_t, grad_v_t)
            _put(grad_k, span, n, grad_k_t)
            _put(grad_v, span, n, grad_v_t)
            grad_initial += rows_grad.view(batch, heads, n, *head).sum((0, 2))
    return grad_k, grad_v, grad_initial, grad_out, grad_pre_hidden, grad_m, grad_p


def read_all(q: Tensor, memories: Tensor, options: dict, out: Tensor | None = None) -> Tensor:
    """Eq. 2 for all tokens (B, h, d, N); ``memories`` (T + 1, B, h, 2e, d). ``out`` may be ``q`` itself."""
    y = _empty_like(q) if out is None else out
    if cpu.usable(q, memories):
        cpu.read_all(q, memories, options, y)
        return y
    for chunks, tokens in _chunk_groups(q, q.size(-1), options['chunk_size']):
        n = chunks.stop - chunks.start
        q_t, y_t = _take(q, tokens, n), _slot(y, tokens, n)
        w1, w2 = _readable(memories, chunks, options).chunk(2, dim=1)
        _store(y_t, torch.add, q_t, torch.bmm(w2.mT, F.gelu(torch.bmm(w1, q_t))))
        _put(y, tokens, n, y_t)
    return y


def _read_all_backward(q, memories, grad_y, grad_memories, options, y) -> Tensor:
    """The gradient of q; adds those of the memories to ``grad_memories`` and fills ``y`` if it is a tensor."""
    if cpu.usable(q, memories):
        return cpu.read_all_backward(q, memories, grad_y, grad_memories, options, y)
    grad_q = _empty_like(q)
    for chunks, tokens in _chunk_groups(q, q.size(-1), options['chunk_size']):
        n = chunks.stop - chunks.start
        q_t, grad_t, grad_q_t = _take(q, tokens, n), _take(grad_y, tokens, n), _slot(grad_q, tokens, n)
        w1, w2 = _readable(memories, chunks, options).chunk(2, dim=1)
        hidden = torch.bmm(w1, q_t)
        grad_hidden = _gelu_backward(torch.bmm(w2, grad_t), hidden)
        _store(grad_q_t, torch.add, grad_t, torch.bmm(w1.mT, grad_hidden))
        _put(grad_q, tokens, n, grad_q_t)
        active = F.gelu(hidden)
        if y is not None:
            y_t = _slot(y, tokens, n)
            _store(y_t, torch.add, q_t, torch.bmm(w2.mT, active))
            _put(y, tokens, n, y_t)
        grad_rows = torch.cat((torch.bmm(grad_hidden, q_t.mT), torch.bmm(active, grad_t.mT)), dim=1)
        grad_rows = grad_rows.view(*grad_memories.shape[1:3], n, *grad_rows.shape[1:]).movedim(2, 0)
        if options['retrieve'] == 'final':
            grad_memories[-1] += grad_rows.sum(0)
        else:
            grad_memories[chunks] += grad_rows
    return grad_q


def _readable(memories: Tensor, chunks: slice, options: dict) -> Tensor:
    """The memories that the queries of ``chunks`` read, (B·h·chunks, 2e, d)."""
    if options['retrieve'] == 'final':
        chosen = memories[-1:].expand(chunks.stop - chunks.start, *memories.shape[1:])
    else:
        chosen = memories[chunks]
    return chosen.movedim(0, 2).flatten(0, 2)


def _chunk_groups(x: Tensor, num_tokens: int, chunk_size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of chunks and of their tokens that are worked on at once: as many whole chunks as fit, the rest alone."""
    start, numbers = 0, x[..., 0].numel() * chunk_size
    most = max(1, GROUP_NUMBERS // numbers) if x.device.type == 'cpu' else num_tokens
    whole = num_tokens // chunk_size
    while start < whole:
        stop = min(start + most, whole)
        yield slice(start, stop), slice(start * chunk_size, stop * chunk_size)
        start = stop
    if num_tokens > whole * chunk_size:
        yield slice(whole, whole + 1), slice(whole * chunk_size, num_tokens)


def _split(x: Tensor, num_tokens: int, chunk_size: int) -> tuple[Tensor, ...]:
    """The first tokens of (B, h, d, N) in chunks of (B·h, d, L)."""
    return x[..., :num_tokens].flatten(0, 1).split(chunk_size, dim=-1)


def _empty_like(x: Tensor) -> Tensor:
    """As ``x``, in the order of memory in which :func:`_take` makes views."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _take(x: Tensor, tokens: slice, chunks: int = 1) -> Tensor:
    """Some tokens of (B, h, d, N) as (B·h·chunks, d, L)."""
    x = x[..., tokens].flatten(0, 1)
    return x if chunks == 1 else x.unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1)


def _slot(x: Tensor, tokens: slice, chunks: int) -> Tensor:
    """Where to write what :func:`_take` would take: for one chunk the view itself, else a tensor for :func:`_put`."""
    if chunks == 1:
        return _take(x, tokens)
    return x.new_empty(x.size(0) * x.size(1) * chunks, x.size(2), (tokens.stop - tokens.start) // chunks)


def _put(x: Tensor, tokens: slice, chunks: int, value: Tensor) -> None:
    """Copies ``value``, filled as a :func:`_slot`, to its place."""
    if chunks > 1:
        x = x[..., tokens].flatten(0, 1).unflatten(2, (chunks, -1))
        x.copy_(value.unflatten(0, (-1, chunks)).transpose(1, 2))


def _differentiable(options, q, k, v, initial, in_weight, in_bias, out_weight, out_bias, rows, momentum):
    """The forward of :class:`_ChunkedMemory` as autograd can record it."""
    written, options = slice(options['num_written']), {n: x for n, x in options.items() if n != 'num_written'}
    y, state = neural_memory_differentiable(
        q.mT, k[..., written].mT, v[..., written].mT, *unpack(initial),
        UpdateGenerators(in_weight, in_bias, out_weight, out_bias), MemoryState(*unpack(rows), *unpack(momentum)),
        **dict(options, return_state=True))
    return y.mT, pack(state.w1, state.w2), pack(state.p1, state.p2)
