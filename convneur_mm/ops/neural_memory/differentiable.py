"""The neural memory with closed-form inner gradients, recorded by autograd.

The faster paths fall back to it when their backward is itself to be differentiated.

All update coefficients act on the channel axis d, so both fast weights live in one tensor of rows of length d,
``rows = cat(W1ᵀ, W2)`` of shape (…, 2e, d): one elementwise operation then serves where the equations need two.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import update_coefficients
from .types import MemoryState, UpdateGenerators


def pack(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.cat((w1.transpose(-2, -1), w2), dim=-2)


def unpack(rows: Tensor) -> tuple[Tensor, Tensor]:
    w1, w2 = rows.chunk(2, dim=-2)
    return w1.transpose(-2, -1), w2


def _read(z: Tensor, rows: Tensor) -> Tensor:
    """M(z) = z + GELU(z·W1)·W2; ``z`` (…, L, d), ``rows`` (…, 2e, d)."""
    w1, w2 = unpack(rows)
    return z + F.gelu(z @ w1) @ w2


def _surprise(k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of Eq. 3 at the memory ``rows`` and the per-channel surprise of a chunk.

    Args:
        k (Tensor): (…, L, d).
        v (Tensor): (…, L, d).
        rows (Tensor): (…, 2e, d), broadcast against the leading axes of ``k``.

    Returns:
        tuple[Tensor, Tensor]: The gradient in the layout of ``rows``, and mean squared errors (…, d).
    """
    w1, w2 = unpack(rows)
    hidden = k @ w1
    active = F.gelu(hidden)
    error = k + active @ w2 - v
    d_out = error * (2 / k.size(-1))
    # torch's own GELU derivative: one kernel instead of a dozen, and it can be differentiated again.
    d_hidden = torch.ops.aten.gelu_backward(d_out @ w2.transpose(-2, -1), hidden)
    grad = torch.cat((d_hidden.transpose(-2, -1) @ k, active.transpose(-2, -1) @ d_out), dim=-2)
    return grad, error.square().mean(dim=-2)


def _bounded_write(grad: Tensor, step: Tensor, max_write_norm: float) -> Tensor:
    """u ← θ ⊙ ∇L, scaled so that the norm of each head's whole write stays below ``max_write_norm``."""
    write = step.unsqueeze(-2) * grad
    norm = write.square().sum((-2, -1), keepdim=True)
    return write * (1 + norm / max_write_norm**2).rsqrt()


def _write(rows: Tensor, momentum_rows: Tensor, write: Tensor, momentum: Tensor, decay: Tensor):
    """Eq. 4: P_t = η ⊙ P_{t-1} − u_t and M_t = (1 − α) ⊙ M_{t-1} + P_t."""
    momentum_rows = momentum.unsqueeze(-2) * momentum_rows - write
    return (1 - decay).unsqueeze(-2) * rows + momentum_rows, momentum_rows


def _memories_sequential(k, v, rows, momentum_rows, generators, chunk_size, inner_step, max_write_norm):
    """Memories M_0 … M_n and the last momentum for the n chunks of ``k``, each gradient taken at M_{t-1}."""
    memories = [rows]
    if k.size(2):
        # split, not k[:, :, t]: the backward of indexing writes a whole k-sized tensor for every chunk.
        for k_t, v_t in zip(k.split(chunk_size, dim=2), v.split(chunk_size, dim=2)):
            grad, surprise = _surprise(k_t, v_t, rows)
            step, momentum, decay = update_coefficients(surprise, generators, inner_step)
            write = _bounded_write(grad, step, max_write_norm)
            rows, momentum_rows = _write(rows, momentum_rows, write, momentum, decay)
            memories.append(rows)
    return memories, momentum_rows


def _memories_parallel(k, v, initial, rows, momentum_rows, generators, chunk_size, inner_step, max_write_norm):
    """As :func:`_memories_sequential` with all gradients at ``initial`` (h, 2e, d), so only Eq. 4 remains a loop."""
    memories = [rows]
    for k_part, v_part in zip(_split_chunks(k, chunk_size), _split_chunks(v, chunk_size)):
        if k_part is None:
            continue
        grad, surprise = _surprise(k_part, v_part, initial.unsqueeze(1))  # (B, h, n, 2e, d), (B, h, n, d)
        batch, heads, n, d = surprise.shape
        flat = surprise.transpose(1, 2).reshape(batch * n, heads, d)
        step, momentum, decay = (
            c.view(batch, n, heads, d).transpose(1, 2) for c in update_coefficients(flat, generators, inner_step)
        )
        writes = _bounded_write(grad, step, max_write_norm)
        for write, eta, alpha in zip(writes.unbind(2), momentum.unbind(2), decay.unbind(2)):
            rows, momentum_rows = _write(rows, momentum_rows, write, eta, alpha)
            memories.append(rows)
    return memories, momentum_rows


def _split_chunks(x: Tensor, chunk_size: int) -> tuple[Tensor | None, Tensor | None]:
    """(B, h, N, d) → the whole chunks (B, h, n, L, d) and the ragged rest (B, h, 1, N − nL, d), None where empty."""
    n = x.size(2) // chunk_size
    whole, rest = x.split((n * chunk_size, x.size(2) - n * chunk_size), dim=2)
    return (
        whole.unflatten(2, (n, chunk_size)) if n else None,
        rest.unsqueeze(2) if rest.size(2) else None,
    )


def neural_memory_differentiable(
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
    """See :func:`convneur_mm.ops.neural_memory`; ``state`` is the memory before the first chunk."""
    rows, momentum_rows = pack(state.w1, state.w2), pack(state.p1, state.p2)
    options = (generators, chunk_size, inner_step, max_write_norm)
    if update_rule == 'sequential':
        memories, momentum_rows = _memories_sequential(k, v, rows, momentum_rows, *options)
    else:
        memories, momentum_rows = _memories_parallel(k, v, pack(w1, w2), rows, momentum_rows, *options)

    if retrieve == 'final' or q.size(2) <= chunk_size:
        y = _read(q, memories[-1] if retrieve == 'final' else memories[0])
    else:
        # Reads depend on no write of their own chunk: all of them run at once, after the writes.
        whole, rest = _split_chunks(q, chunk_size)
        parts = [_read(whole, torch.stack(memories[: whole.size(2)], dim=2)).flatten(2, 3)]
        if rest is not None:
            parts.append(_read(rest.squeeze(2), memories[whole.size(2)]))
        y = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    if not return_state:
        return y, None
    return y, MemoryState(*unpack(memories[-1]), *unpack(momentum_rows))


def differentiable_gradients(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor],
                             grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs`` that can be differentiated again, for the backward of a faster path.

    Args:
        function (Callable): What autograd records; maps ``inputs`` to outputs.
        inputs (Sequence[Tensor]): Those of the faster path.
        grads (Sequence[Tensor | None]): What comes back to each output, None for nothing.

    Returns:
        tuple[Tensor | None, ...]: One for each input, None where it requires none.
    """
    # Views are nodes of their own: what one input was made of another would else be counted twice.
    inputs = [x.view_as(x) for x in inputs]
    outputs, grads = zip(*((o, g) for o, g in zip(function(*inputs), grads) if g is not None and o.requires_grad))
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
