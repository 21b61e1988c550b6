"""The memory's kernels in plain PyTorch, for any device; see :mod:`.contract`.

What autograd would record of the update loop costs several times what the loop itself does. Here the forward keeps what
each chunk leaves behind (memory, momentum, inner gradient and coefficients: 3·2e·d numbers a head), and the backward
recomputes a chunk's activations, chunk by chunk in reverse. Only the recurrence of Eq. 4 and what depends on it is a
loop; reads, and gradients under the parallel rule, are batched.

Within, weights and tokens are (n, 2e, d) and (n, d, L), where n counts independent memories: images times heads, times
chunks where all chunks run at once.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import WriteGradients, Written
from .types import MemoryOptions, UpdateGenerators

_gelu_backward = torch.ops.aten.gelu_backward

# On a CPU, chunks are worked on together as long as one of their tensors has at most this many numbers: what is worked
# on should stay in the cache, and fewer operations cost less to launch.
GROUP_NUMBERS = 2**18


def refuses(tokens: Tensor, rows: Tensor, options: MemoryOptions) -> str | None:
    return None


def write_all(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, rows: Tensor, momentum: Tensor,
              options: MemoryOptions) -> Written:
    batch, heads, *head = rows.shape
    num_chunks = math.ceil(k.size(-1) / options.chunk_size)
    states = rows.new_empty(num_chunks + 1, 3, *rows.shape)
    states[0, 1], states[0, 2] = momentum, rows
    states[-1, 0].zero_()
    # Views are made for all chunks at once: one by one, they take longer than many of the operations on them.
    gradients, momenta, memories = (x.unbind() for x in states.unbind(1))

    if not num_chunks:
        return Written(states, *(rows.new_empty(0, batch, n * heads * rows.size(-1)) for n in (1, 4, 3)))
    if options.update_rule == 'sequential':
        surprises, pre_hidden, coefficients = [], [], []
        out = states[:, 0].flatten(1, 2).unbind()
        weights = zip(*(x.unbind() for x in states[:, 2].flatten(1, 2).chunk(2, dim=2)))
        chunks = zip(_split(k, options), _split(k - v, options), weights)
        for t, (k_t, residual, (w1, w2)) in enumerate(chunks):
            surprise = _surprise(k_t, residual, w1, w2, out=out[t]).view(batch, -1)
            pre_hidden_t, coefficients_t = generate(surprise, generators)
            _write(gradients[t], momenta[t:t + 2], memories[t:t + 2], coefficients_t, options)
            surprises.append(surprise)
            pre_hidden.append(pre_hidden_t)
            coefficients.append(coefficients_t)
        return Written(states, torch.stack(surprises), torch.stack(pre_hidden), torch.stack(coefficients))
    surprises = rows.new_empty(num_chunks, batch, heads, rows.size(-1))
    for chunks, tokens in _chunk_groups(k, options):
        n = chunks.stop - chunks.start
        at = initial.repeat_interleave(n, dim=0).repeat(batch, 1, 1)
        gradient = torch.empty_like(at)
        k_t, v_t = _take(k, tokens, n), _take(v, tokens, n)
        surprise = _surprise(k_t, k_t - v_t, *at.chunk(2, dim=1), out=gradient)
        states[chunks, 0] = gradient.view(batch, heads, n, *head).movedim(2, 0)
        surprises[chunks] = surprise.view(batch, heads, n, -1).movedim(2, 0)
    surprises = surprises.flatten(2)
    pre_hidden, coefficients = generate(surprises, generators)
    for t in range(num_chunks):
        _write(gradients[t], momenta[t:t + 2], memories[t:t + 2], coefficients[t], options)
    return Written(states, surprises, pre_hidden, coefficients)


def _surprise(k: Tensor, residual: Tensor, w1: Tensor, w2: Tensor, out: Tensor) -> Tensor:
    """Gradient of Eq. 3 at memories of weights ``w1`` (transposed) and ``w2``, and each channel's mean squared error.

    Args:
        k (Tensor): (n, d, L).
        residual (Tensor): Keys less values, (n, d, L).
        w1 (Tensor): (n, e, d).
        w2 (Tensor): (n, e, d).
        out (Tensor): Takes the gradient over 2/d, (n, 2e, d).

    Returns:
        Tensor: Mean squared errors, (n, d).
    """
    hidden = torch.bmm(w1, k)
    active = F.gelu(hidden)
    error = torch.baddbmm(residual, w2.mT, active)
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


def _surprise_backward(k, residual, rows, grad_gradient, grad_surprise, grad_k, grad_v, work: _Workspace) -> Tensor:
    """Gradients of keys, values (written to ``grad_k``, ``grad_v``) and ``rows`` (returned) of :func:`_surprise`.

    With h, a, E of :func:`_surprise`, which are computed anew, u = W2·E and b = u ⊙ GELU'(h), the inner gradients are
    b·kᵀ and a·Eᵀ; ``g1`` and ``g2`` are what comes back to them.
    """
    torch.stack((rows.unflatten(1, (2, -1)), grad_gradient.unflatten(1, (2, -1))), dim=2, out=work.weights)
    torch.bmm(work.w1_g1, k, out=work.hidden_grad_b)
    slope = _gelu_backward(work.ones, work.hidden)
    torch.ops.aten.gelu(work.hidden, out=work.active)
    torch.mul(work.grad_b, slope, out=work.grad_u)
    error = torch.baddbmm(residual, work.w2.mT, work.active)
    torch.bmm(work.w2_g2, error, out=work.u_grad_active)
    grad_error = error * (grad_surprise * (2 / k.size(2))).unsqueeze(2)
    torch.baddbmm(grad_error, work.w2_g2.mT, work.grad_u_active, out=grad_error)
    torch.neg(grad_error, out=grad_v)

    grad_active = torch.bmm(work.w2, grad_error).add_(work.grad_active).mul_(slope)
    # GELU''(h) = φ(h)·(2 − h²)
    square = work.hidden.square()
    curvature = (square * -0.5).exp_().mul_(2 - square).mul_(work.u)
    torch.mul(work.u, slope, out=work.b)
    torch.addcmul(grad_active, work.grad_b, curvature, value=1 / math.sqrt(2 * math.pi), out=work.grad_hidden)
    torch.baddbmm(grad_error, work.w1_g1.mT, work.grad_hidden_b, out=grad_k)
    grad_w2 = torch.baddbmm(torch.bmm(work.grad_u, error.mT), work.active, grad_error.mT)
    return torch.cat((torch.bmm(work.grad_hidden, k.mT), grad_w2), dim=1)


def generate(surprise: Tensor, generators: UpdateGenerators) -> tuple[Tensor, Tensor]:
    """Hidden units before their GELU (…, 4Cm), and step, momentum and decay side by side (…, 3Cm)."""
    pre_hidden = F.linear(surprise, generators.in_weight, generators.in_bias)
    return pre_hidden, F.linear(F.gelu(pre_hidden), generators.out_weight, generators.out_bias).sigmoid_()


def generate_backward(grad_outputs: Tensor, pre_hidden: Tensor, generators: UpdateGenerators) -> tuple[Tensor, Tensor]:
    """What comes back to the hidden units and to the surprise, from ``grad_outputs`` before the sigmoid."""
    grad_pre_hidden = _gelu_backward(grad_outputs @ generators.out_weight, pre_hidden)
    return grad_pre_hidden, grad_pre_hidden @ generators.in_weight


def _by_head(coefficients: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(…, 3Cm) → step, momentum and decay, (…, h, 1, d) each."""
    return coefficients.unflatten(-1, (3, heads, 1, -1)).unbind(-4)


def bound(relative: Tensor) -> Tensor:
    """The factor that keeps a write within its bound, from its squared norm over that of the bound."""
    return (1 + relative).rsqrt_()


def bound_slope(relative: Tensor) -> Tensor:
    """Twice the derivative of :func:`bound`."""
    return -bound(relative)**3


def _write(gradient, momenta, memories, coefficients: Tensor, options: MemoryOptions) -> None:
    """Eq. 4: fills in the second of two ``momenta`` and of two ``memories``, (B, h, 2e, d) each."""
    step, eta, alpha = _by_head(coefficients, gradient.size(1))
    scale = options.inner_step * 2 / gradient.size(-1)
    write = step * gradient
    torch.addcmul(eta * momenta[0], write, bound(_relative(write, scale, options)), value=-scale, out=momenta[1])
    torch.addcmul(momenta[1], 1 - alpha, memories[0], out=memories[1])


def _relative(write: Tensor, scale: float, options: MemoryOptions) -> Tensor:
    """Squared norms (…, 1, 1) of each head's writes (…, 2e, d), which ``scale`` multiplies, over that of the bound."""
    return write.square().sum((-2, -1), keepdim=True).mul_((scale / options.max_write_norm)**2)


def write_all_backward(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, written: Written,
                       grad_memories: Tensor, grad_momentum: Tensor | None, grad_k: Tensor, grad_v: Tensor,
                       options: MemoryOptions) -> WriteGradients:
    states, _, pre_hidden, coefficients = written
    batch, heads, *head = grad_memories.shape[1:]
    sequential = options.update_rule == 'sequential'
    # What comes back to write, P and M after a chunk.
    grad_states = torch.zeros_like(states[0])
    grad_write, grad_p, grad_m = grad_states.unbind()
    grad_m.copy_(grad_memories[-1])
    if grad_momentum is not None:
        grad_p.copy_(grad_momentum)

    # All that the reversed recurrence needs and that does not depend on it.
    step, eta, alpha = _by_head(coefficients, heads)
    scale = options.inner_step * 2 / head[-1]
    writes = step * states[:-1, 0]
    relative = _relative(writes, scale, options)
    curbs = bound_slope(relative) * (scale / options.max_write_norm)**2
    # Of sigmoids, times what step, momentum and decay are multiplied by; a tensor of these three factors would be a
    # copy from the host, which waits for the device.
    slopes = (coefficients * (1 - coefficients)).unflatten(-1, (3, heads, -1))
    slopes[:, :, 0].mul_(-scale)
    slopes[:, :, 2].neg_()
    each = zip(states, writes, bound(relative), curbs, step * -scale, eta, 1 - alpha, slopes, grad_memories)
    grad_gradients, grad_out, grad_pre_hidden = [], [], []
    outputs = [(x, x if _is_flat(x) else torch.empty_like(x, memory_format=torch.contiguous_format))
               for x in (grad_k, grad_v)]
    grad_k, grad_v = (out for _, out in outputs)
    if sequential:
        tokens = list(zip(*(_split(x, options) for x in (k, k - v, grad_k, grad_v))))
        flat_memories = states[:, 2].flatten(1, 2).unbind()
    work: _Workspace | None = None  # of whole chunks, and of a shorter rest before them

    def surprise_backward(k_t: Tensor, *args: Tensor) -> Tensor:
        nonlocal work
        if work is None or (work.ones.size(0), work.ones.size(2)) != (k_t.size(0), k_t.size(2)):
            work = _Workspace(len(k_t), head[0] // 2, head[1], k_t.size(2), states)
        return _surprise_backward(k_t, *args, work)

    for t, (state, write, factor, curb, step_t, eta_t, keep, slope, grad_read) in reversed(list(enumerate(each))):
        grad_p += grad_m
        inner = (grad_p * write).sum((-2, -1), keepdim=True)
        torch.mul(grad_p, factor, out=grad_write)
        grad_write.addcmul_(write, inner * curb)
        grad_gradient = grad_write * step_t
        grad_out.append(((grad_states * state).sum(-2).transpose(0, 1) * slope).flatten(1))
        grad_m.mul_(keep).add_(grad_read)
        grad_p *= eta_t
        if sequential:
            grad_pre_hidden_t, grad_surprise = generate_backward(
                grad_out[-1], pre_hidden[t], generators)
            grad_pre_hidden.append(grad_pre_hidden_t)
            k_t, residual, grad_k_t, grad_v_t = tokens[t]
            grad_m += surprise_backward(
                k_t, residual, flat_memories[t], grad_gradient.flatten(0, 1), grad_surprise.view(-1, head[-1]),
                grad_k_t, grad_v_t).view(grad_m.shape)
        else:
            grad_gradients.append(grad_gradient)

    grad_out = torch.stack(grad_out[::-1])
    grad_initial = None
    if sequential:
        grad_pre_hidden = torch.stack(grad_pre_hidden[::-1])
    else:
        grad_pre_hidden, grad_surprises = generate_backward(grad_out, pre_hidden, generators)
        grad_gradients = torch.stack(grad_gradients[::-1])
        grad_initial = torch.zeros_like(initial)
        for chunks, span in _chunk_groups(k, options):
            n = chunks.stop - chunks.start
            at = initial.repeat_interleave(n, dim=0).repeat(batch, 1, 1)
            grad_k_t, grad_v_t = _slot(grad_k, span, n), _slot(grad_v, span, n)
            k_t = _take(k, span, n)
            rows_grad = surprise_backward(
                k_t, k_t - _take(v, span, n), at, grad_gradients[chunks].movedim(0, 2).flatten(0, 2),
                grad_surprises[chunks].unflatten(-1, (heads, -1)).movedim(0, 2).flatten(0, 2), grad_k_t, grad_v_t)
            _put(grad_k, span, n, grad_k_t)
            _put(grad_v, span, n, grad_v_t)
            grad_initial += rows_grad.view(batch, heads, n, *head).sum((0, 2))
    for x, out in outputs:
        if x is not out:
            x.copy_(out)
    return WriteGradients(grad_initial, grad_out, grad_pre_hidden, grad_m, grad_p)


def read_all(q: Tensor, memories: Tensor, y: Tensor, options: MemoryOptions) -> None:
    for chunks, tokens in _chunk_groups(q, options):
        n = chunks.stop - chunks.start
        q_t, y_t = _take(q, tokens, n), _slot(y, tokens, n)
        w1, w2 = _readable(memories, chunks, options).chunk(2, dim=1)
        torch.baddbmm(q_t, w2.mT, F.gelu(torch.bmm(w1, q_t)), out=y_t)
        _put(y, tokens, n, y_t)


def read_all_backward(q: Tensor, memories: Tensor, grad_y: Tensor, grad_memories: Tensor, grad_q: Tensor,
                      y: Tensor | None, options: MemoryOptions) -> None:
    for chunks, tokens in _chunk_groups(q, options):
        n = chunks.stop - chunks.start
        q_t, grad_t, grad_q_t = _take(q, tokens, n), _take(grad_y, tokens, n), _slot(grad_q, tokens, n)
        w1, w2 = _readable(memories, chunks, options).chunk(2, dim=1)
        hidden = torch.bmm(w1, q_t)
        grad_hidden = _gelu_backward(torch.bmm(w2, grad_t), hidden)
        torch.baddbmm(grad_t, w1.mT, grad_hidden, out=grad_q_t)
        _put(grad_q, tokens, n, grad_q_t)
        active = F.gelu(hidden)
        if y is not None:
            y_t = _slot(y, tokens, n)
            torch.baddbmm(q_t, w2.mT, active, out=y_t)
            _put(y, tokens, n, y_t)
        grad_rows = torch.cat((torch.bmm(grad_hidden, q_t.mT), torch.bmm(active, grad_t.mT)), dim=1)
        grad_rows = grad_rows.view(*grad_memories.shape[1:3], n, *grad_rows.shape[1:]).movedim(2, 0)
        if options.retrieve == 'final':
            grad_memories[-1] += grad_rows.sum(0)
        else:
            grad_memories[chunks] += grad_rows


def _readable(memories: Tensor, chunks: slice, options: MemoryOptions) -> Tensor:
    """The memories that the queries of ``chunks`` read, (B·h·chunks, 2e, d)."""
    if options.retrieve == 'final':
        chosen = memories[-1:].expand(chunks.stop - chunks.start, *memories.shape[1:])
    else:
        chosen = memories[chunks]
    return chosen.movedim(0, 2).flatten(0, 2)


def _chunk_groups(x: Tensor, options: MemoryOptions) -> Iterator[tuple[slice, slice]]:
    """Slices of chunks and of their tokens that are worked on at once: as many whole chunks as fit, the rest alone."""
    num_tokens, chunk_size = x.size(-1), options.chunk_size
    start, numbers = 0, x[..., 0].numel() * chunk_size
    most = max(1, GROUP_NUMBERS // numbers) if x.device.type == 'cpu' else num_tokens
    whole = num_tokens // chunk_size
    while start < whole:
        stop = min(start + most, whole)
        yield slice(start, stop), slice(start * chunk_size, stop * chunk_size)
        start = stop
    if num_tokens > whole * chunk_size:
        yield slice(whole, whole + 1), slice(whole * chunk_size, num_tokens)


def _split(x: Tensor, options: MemoryOptions) -> tuple[Tensor, ...]:
    """Tokens (B, h, d, N) in chunks of (B·h, d, L)."""
    return x.flatten(0, 1).split(options.chunk_size, dim=-1)


def _take(x: Tensor, tokens: slice, chunks: int = 1) -> Tensor:
    """Some tokens of (B, h, d, N) as (B·h·chunks, d, L)."""
    x = x[..., tokens].flatten(0, 1)
    return x if chunks == 1 else x.unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1)


def _is_flat(x: Tensor) -> bool:
    """Whether images and heads of (B, h, d, N) are one axis to a view."""
    return len(x) == 1 or x.stride(0) == x.size(1) * x.stride(1)


def _slot(x: Tensor, tokens: slice, chunks: int) -> Tensor:
    """Where to write what :func:`_take` would take: the view itself if there is one, else a tensor for :func:`_put`."""
    if chunks == 1 and _is_flat(x):
        return _take(x, tokens)
    return x.new_empty(x.size(0) * x.size(1) * chunks, x.size(2), (tokens.stop - tokens.start) // chunks)


def _put(x: Tensor, tokens: slice, chunks: int, value: Tensor) -> None:
    """Copies ``value``, filled as a :func:`_slot`, to its place."""
    if chunks > 1 or not _is_flat(x):
        x = x[..., tokens].unflatten(3, (chunks, -1)).transpose(2, 3)
        x.copy_(value.view(x.shape))


def normalize_(z: Tensor, eps: float) -> Tensor:
    length = (z * z).sum(dim=2, keepdim=True).sqrt_()
    scale = length.clamp_min(eps).reciprocal_()
    z *= scale
    return torch.where(length < eps, -scale, scale)


def normalize_backward_(unit: Tensor, scale: Tensor, grad: Tensor) -> None:
    along = (grad * unit).sum(dim=2, keepdim=True).mul_(scale > 0)
    grad.addcmul_(unit, along, value=-1).mul_(scale.abs())
