"""The memory's operators in PyTorch, for any device; see :mod:`.operators` for schemas, shapes and equations.

The operators split tokens (B, h, d, N) into chunks and pad the last one with zeros: zero tokens have no error, gradient
or curvature. The functions below them, which export uses too, take n memories with one chunk of L tokens each: rows
(…, n, 2e, d) and tokens (…, n, d, L).
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import step, step_backward
from .types import is_exporting

__all__ = ['read', 'read_backward', 'step', 'step_backward', 'surprise', 'surprise_backward']

_gelu_backward = torch.ops.aten.gelu_backward


def read(q: Tensor, memories: Tensor, chunk_size: int, eps: float) -> Tensor:
    return from_chunks(read_chunks(unit_length(to_chunks(q, memories, chunk_size), eps), memories), q)


def read_backward(grad_y: Tensor, q: Tensor, memories: Tensor, chunk_size: int, eps: float, grad_q: Tensor) -> Tensor:
    raw, grad_y = (to_chunks(z, memories, chunk_size) for z in (q, grad_y))
    unit = unit_length(raw, eps)
    w1, w2 = memories.chunk(2, dim=-2)
    hidden = w1 @ unit
    grad_hidden = _gelu_backward(w2 @ grad_y, hidden)
    grad_q.copy_(from_chunks(unit_length_backward(grad_y + w1.mT @ grad_hidden, raw, unit, eps), q))
    return torch.cat((grad_hidden @ unit.mT, F.gelu(hidden) @ grad_y.mT), dim=-2)


def surprise(k: Tensor, v: Tensor, memories: Tensor, chunk_size: int, eps: float,
             curvature: bool) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (to_chunks(z, memories, chunk_size) for z in (k, v))
    return surprise_chunks(unit_length(keys, eps), values, memories, chunk_lengths(k, memories, chunk_size), curvature)


def surprise_backward(grad_gradient: Tensor, grad_errors: Tensor, grad_curvature: Tensor, k: Tensor, v: Tensor,
                      memories: Tensor, chunk_size: int, eps: float, curvature: bool, grad_k: Tensor,
                      grad_v: Tensor) -> Tensor:
    raw, values = (to_chunks(z, memories, chunk_size) for z in (k, v))
    unit, (w1, w2) = unit_length(raw, eps), memories.chunk(2, dim=-2)
    g1, g2 = (grad_gradient * (2 / k.size(2))).chunk(2, dim=-2)
    hidden = w1 @ unit
    active, slope = _gelu(hidden)
    bend = (hidden.square() * -0.5).exp() * (2 - hidden.square()) / math.sqrt(2 * math.pi)  # GELU''
    error = unit - values + w2.mT @ active
    back, grad_slopes = w2 @ error, g1 @ unit  # the gradient of the hidden units in Eq. 3 is back·slope
    grad_error = error * (grad_errors * 2 / chunk_lengths(k, memories, chunk_size)).unsqueeze(-1)
    grad_error = grad_error + w2.mT @ (grad_slopes * slope) + g2.mT @ active
    grad_active = w2 @ grad_error + g2 @ error
    grad_hidden = grad_slopes * bend * back
    grad_unit = grad_error + g1.mT @ (back * slope)
    grad_w2 = (grad_slopes * slope) @ error.mT + active @ grad_error.mT
    if curvature:
        factor = (grad_curvature * (4 / k.size(2)))[..., None, None]
        squares, norms = factor * slope.square(), w2.square().sum(-1, keepdim=True)
        lengths = unit.square().sum(-2, keepdim=True)
        grad_active = grad_active + factor * active
        grad_hidden = grad_hidden + factor * slope * bend * norms * lengths
        grad_unit = grad_unit + unit * (squares * norms).sum(-2, keepdim=True)
        grad_w2 = grad_w2 + w2 * (squares * lengths).sum(-1, keepdim=True)
    grad_hidden = grad_hidden + grad_active * slope
    grad_k.copy_(from_chunks(unit_length_backward(grad_unit + w1.mT @ grad_hidden, raw, unit, eps), k))
    grad_v.copy_(from_chunks(-grad_error, v))
    return torch.cat((grad_hidden @ unit.mT, grad_w2), dim=-2)


def read_chunks(q: Tensor, rows: Tensor) -> Tensor:
    w1, w2 = rows.chunk(2, dim=-2)
    return q + w2.mT @ F.gelu(w1 @ q)


def surprise_chunks(k: Tensor, v: Tensor, rows: Tensor, lengths: Tensor | int,
              curvature: bool) -> tuple[Tensor, Tensor, Tensor]:
    w1, w2 = rows.chunk(2, dim=-2)
    active, slope = _gelu(w1 @ k)
    error = k - v + w2.mT @ active
    gradient = torch.cat((((w2 @ error) * slope) @ k.mT, active @ error.mT), dim=-2) * (2 / k.size(-2))
    bound = error.new_empty(0)
    if curvature:
        hidden_part = slope.square() * w2.square().sum(-1, keepdim=True) * k.square().sum(-2, keepdim=True)
        bound = (active.square() + hidden_part).sum((-2, -1)) * (2 / k.size(-2))
    return gradient, error.square().sum(-1) / lengths, bound


def _gelu(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return GELU and its derivative."""
    if not is_exporting():
        return F.gelu(hidden), _gelu_backward(torch.ones_like(hidden), hidden)
    cumulative = 0.5 * (1 + torch.erf(hidden * math.sqrt(0.5)))  # with operators that other runtimes support
    return hidden * cumulative, cumulative + hidden * torch.exp(hidden.square() * -0.5) / math.sqrt(2 * math.pi)


def unit_length(z: Tensor, eps: float) -> Tensor:
    """Return tokens divided by their norms over d, or by ``eps`` where it is larger; unchanged if ``eps`` is 0."""
    return z / z.square().sum(-2, keepdim=True).sqrt().clamp_min(eps) if eps else z


def unit_length_backward(grad: Tensor, z: Tensor, unit: Tensor, eps: float) -> Tensor:
    if not eps:
        return grad
    length = z.square().sum(-2, keepdim=True).sqrt()
    along = (grad * unit).sum(-2, keepdim=True) * (length >= eps)
    return (grad - unit * along) / length.clamp_min(eps)


def to_chunks(z: Tensor, memories: Tensor, chunk_size: int) -> Tensor:
    """Return tokens (B, h, d, N) in chunks, (T, B·h, d, L), in the memories' dtype."""
    padding = memories.size(0) * chunk_size - z.size(3)
    z = z.flatten(0, 1).to(memories.dtype)
    if isinstance(padding, torch.SymInt) or padding:
        z = F.pad(z, (0, padding))
    return z.unflatten(2, (memories.size(0), chunk_size)).movedim(2, 0)


def from_chunks(z: Tensor, like: Tensor) -> Tensor:
    """Return chunks (T, B·h, d, L) as tokens of the shape and dtype of ``like``, (B, h, d, N)."""
    return z.movedim(0, 2).flatten(2)[..., :like.size(3)].reshape(like.shape).to(like.dtype)


def chunk_lengths(tokens: Tensor, memories: Tensor, chunk_size: int) -> Tensor:
    """Return the number of tokens of each chunk, (T, 1, 1)."""
    starts = chunk_size * torch.arange(memories.size(0), device=tokens.device)[:, None, None]
    return (tokens.size(3) - starts).clamp(max=chunk_size).to(memories.dtype)
