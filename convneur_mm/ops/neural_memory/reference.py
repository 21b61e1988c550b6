"""The neural memory as written in the paper: one chunk after the other, with inner gradients by autograd.

Every faster implementation is tested against this definition. It stays close to the equations instead of being fast,
and holds autograd's whole graph of them.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import MemoryOptions, MemoryState, UpdateGenerators, check_inner_dtype, no_autocast


def read(z: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Compute M(z) = z + GELU(z·W1)·W2 for ``z`` (B, h, L, d), ``w1`` (B, h, d, e) and ``w2`` (B, h, e, d)."""
    return z + F.gelu(z @ w1) @ w2


def update_coefficients(surprise: Tensor, generators: UpdateGenerators, inner_step: float) -> tuple[Tensor, ...]:
    """Compute step θ, momentum η and decay α, each (B, h, d), from the per-channel surprise (B, h, d)."""
    hidden = F.gelu(F.linear(surprise.flatten(1), generators.in_weight, generators.in_bias))
    out = F.linear(hidden, generators.out_weight, generators.out_bias).sigmoid()
    step, momentum, decay = (c.reshape(surprise.shape) for c in out.chunk(3, dim=-1))
    return inner_step * step, momentum, decay


def bound(relative: Tensor) -> Tensor:
    """Return the factor that bounds a write, from the ratio of its squared norm to that of the bound."""
    return (1 + relative).rsqrt()


def curvature(k: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return a bound of the curvature of Eq. 3 at M for each head, (B, h, 1, 1).

    The Gauss-Newton matrix of a token's error has at most the eigenvalue 2/d · (‖a‖² + Σ_j slope_j² ‖W2_j‖² ‖k‖²), with
    a = GELU(k·W1) and its derivative ``slope``; a chunk's loss is the sum over its tokens.
    """
    hidden = k @ w1
    slope = 0.5 * (1 + torch.erf(hidden / 2**0.5)) + hidden * torch.exp(-hidden.square() / 2) / (2 * torch.pi)**0.5
    of_w1 = slope.square() * w2.square().sum(-1)[..., None, :] * k.square().sum(-1, keepdim=True)
    return 2 / k.size(-1) * (F.gelu(hidden).square() + of_w1).sum((-2, -1), keepdim=True)


def neural_memory_reference(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, generators: UpdateGenerators,
                            state: MemoryState | None,
                            options: MemoryOptions) -> tuple[Tensor, MemoryState | None]:
    """Run the memory, see :func:`convneur_mm.ops.neural_memory.neural_memory`; reads are in the inner loop's dtype.

    It runs under ``torch.no_grad`` but not under ``torch.inference_mode``, which forbids autograd altogether.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q):
        q, k, v, w1, w2, *generators = (x.to(dtype) for x in (q, k, v, w1, w2, *generators))
        if options.qk_norm_eps:
            q, k = (F.normalize(z, dim=-1, eps=options.qk_norm_eps) for z in (q, k))
        if state is None:
            m1, m2 = (w.expand(len(q), *w.shape) for w in (w1, w2))
            state = MemoryState(m1, m2, torch.zeros_like(m1), torch.zeros_like(m2))
        for name, tensor in state._asdict().items():
            check_inner_dtype(tensor, name)
        return _read_and_write(q, k, v, w1, w2, UpdateGenerators(*generators), state, options)


def _read_and_write(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, generators: UpdateGenerators,
                    state: MemoryState, options: MemoryOptions) -> tuple[Tensor, MemoryState | None]:
    learn = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, w1, w2, *generators, *state))
    m1, m2, p1, p2 = state
    initial = w1.expand(m1.shape), w2.expand(m2.shape)
    q_chunks, k_chunks, v_chunks = (x.split(options.chunk_size, dim=2) for x in (q, k, v))
    outputs = []
    for t, q_t in enumerate(q_chunks):
        outputs.append(read(q_t, m1, m2))  # Eq. 2
        if t == len(q_chunks) - 1 and not (options.return_state or options.retrieve == 'final'):
            break  # The last chunk's write would not be read.
        k_t, v_t = k_chunks[t], v_chunks[t]

        with torch.enable_grad():
            # A view, as keys and values may depend on the memory themselves; the gradient of Eq. 3 excludes that.
            a1, a2 = (
                a.view_as(a) if learn and a.requires_grad else a.detach().requires_grad_()
                for a in ((m1, m2) if options.update_rule == 'sequential' else initial)
            )
            error = read(k_t, a1, a2) - v_t
            loss = error.square().mean(dim=-1).sum()  # Eq. 3; heads have separate weights, so one sum suffices
            g1, g2 = torch.autograd.grad(loss, (a1, a2), create_graph=learn)
            if options.step_normalization:
                divisor = 1 + options.step_normalization * options.inner_step * curvature(k_t, a1, a2)
                g1, g2 = g1 / divisor, g2 / divisor
        if not learn:
            error, g1, g2 = (x.detach() for x in (error, g1, g2))

        step, momentum, decay = update_coefficients(error.square().mean(dim=2), generators, options.inner_step)
        u1, u2 = step[..., :, None] * g1, step[..., None, :] * g2
        square = u1.square().sum((-2, -1), keepdim=True) + u2.square().sum((-2, -1), keepdim=True)
        factor = bound(square / options.max_write_norm**2)
        p1 = momentum[..., :, None] * p1 - factor * u1  # Eq. 4
        p2 = momentum[..., None, :] * p2 - factor * u2
        m1 = (1 - decay[..., :, None]) * m1 + p1
        m2 = (1 - decay[..., None, :]) * m2 + p2

    y = read(q, m1, m2) if options.retrieve == 'final' else torch.cat(outputs, dim=2)
    return y, MemoryState(m1, m2, p1, p2) if options.return_state else None
