"""The memory in operators that other runtimes have: what ``torch.export``, and with it ONNX, sees of it.

The chunks are a scan, so that one graph serves all sizes of images: their number follows the input. The closed forms
are those of :mod:`.pytorch`, for inference alone. A scan's body must not hold the number of images, nor may a scan have
no chunk at all: so images and heads are one dimension in it, and the last chunk is padded and written, read or not.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from .reference import bound
from .types import NORMALIZE_EPS, LayerWeights, MemoryOptions, MemoryWeights, UpdateGenerators, no_autocast


def neural_memory_exported(q: Tensor, k: Tensor, v: Tensor, weights: MemoryWeights, options: MemoryOptions) -> Tensor:
    """Reads (B, h, N, d) of :func:`convneur_mm.ops.neural_memory.neural_memory`; B and N may be symbolic."""
    (heads, d, hidden), (batch, _, num_tokens, _) = weights.w1.shape, q.shape
    length, final = options.chunk_size, options.retrieve == 'final'
    num_chunks = (num_tokens + length - 1) // length
    padding = num_chunks * length - num_tokens

    def chunks(z: Tensor) -> Tensor:
        """(B, h, N, d) → (T, B·h, L, d)."""
        return F.pad(z, (0, 0, 0, padding)).unflatten(2, (num_chunks, length)).permute(2, 0, 1, 3, 4).flatten(1, 2)

    dtype = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q):
        q, k, v, *weights = (x.to(dtype) for x in (q, k, v, *weights))
        weights = MemoryWeights(*weights)
        initial = weights.initial.expand(batch, -1, -1, -1).flatten(0, 1).clone()  # (B·h, 2e, d)
        # Padding has no error, as a memory reads zero from zero, but must not count where a mean is taken.
        lengths = (num_tokens - length * torch.arange(num_chunks, device=q.device)).clamp(max=length).to(dtype)[:, None]

        if options.update_rule == 'sequential':
            writes = chunks(k), chunks(v), lengths
        else:  # all gradients at once
            at = initial.expand(num_chunks, -1, -1, -1).flatten(0, 1)
            of_each = lengths.expand(-1, batch * heads).flatten()[:, None]
            found = _surprise(chunks(k).flatten(0, 1), chunks(v).flatten(0, 1), of_each, at, hidden)
            writes = tuple(z.unflatten(0, (num_chunks, batch * heads)) for z in found)

        def step(state: tuple[Tensor, Tensor], chunk: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], Tensor]:
            rows, momentum = state
            gradient, surprise = chunk if len(chunk) == 2 else _surprise(*chunk, rows, hidden)
            return _write(gradient, surprise, rows, momentum, weights.generators, heads, options), rows.clone()

        (rows, _), memories = scan(step, (initial.clone(), torch.zeros_like(initial)), writes)
        if final:
            return _read(q.flatten(0, 1), rows, hidden).view(q.shape)
        y = _read(chunks(q).flatten(0, 1), memories.flatten(0, 1), hidden)
        y = y.view(num_chunks, batch, heads, length, d).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return y[:, :, :num_tokens]


def layer_exported(x: Tensor, weights: LayerWeights, eps: float, options: MemoryOptions) -> Tensor:
    """Tokens (B, N, Cm) of :func:`convneur_mm.ops.neural_memory.neural_memory_layer`; B and N may be symbolic."""
    tokens = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, eps)
    q, k, v = (F.linear(tokens, weight).unflatten(2, (len(weights.w1), -1)).transpose(1, 2)
               for weight in (weights.query, weights.key, weights.value))
    q, k = (F.normalize(z, dim=-1, eps=NORMALIZE_EPS) for z in (q, k))
    y = neural_memory_exported(q, k, v, weights.memory, options)
    return F.linear(y.transpose(1, 2).flatten(2).to(q.dtype), weights.proj)


def _read(q: Tensor, rows: Tensor, hidden: int) -> Tensor:
    """Eq. 2 for tokens (n, L, d) and n memories of rows (n, 2e, d)."""
    w1, w2 = rows.split(hidden, dim=1)
    return q + torch.bmm(F.gelu(torch.bmm(q, w1.mT)), w2)


def _surprise(k: Tensor, v: Tensor, length: Tensor, rows: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Gradient of Eq. 3 over 2/d, (n, 2e, d), and each channel's mean squared error, (n, d).

    Of keys and values (n, L, d), of which the first ``length`` (1,) or (n, 1) are none of the padding, at memories of
    ``rows`` (n, 2e, d).
    """
    w1, w2 = rows.split(hidden, dim=1)
    inner = torch.bmm(k, w1.mT)
    cumulative = 0.5 * (1 + torch.erf(inner * math.sqrt(0.5)))
    slope = cumulative + inner * torch.exp(inner.square() * -0.5) / math.sqrt(2 * math.pi)
    active = inner * cumulative
    error = k - v + torch.bmm(active, w2)
    d_inner = torch.bmm(error, w2.mT) * slope
    gradient = torch.cat((torch.bmm(d_inner.mT, k), torch.bmm(active.mT, error)), dim=1)
    return gradient, error.square().sum(1) / length


def _write(gradient: Tensor, surprise: Tensor, rows: Tensor, momentum: Tensor, generators: UpdateGenerators, heads: int,
           options: MemoryOptions) -> tuple[Tensor, Tensor]:
    """Eq. 4: memory and momentum afterwards, (n, 2e, d)."""
    d = rows.size(2)
    active = F.gelu(F.linear(surprise.reshape(-1, heads * d), generators.in_weight, generators.in_bias))
    coefficients = F.linear(active, generators.out_weight, generators.out_bias).sigmoid()
    step, eta, alpha = (c.reshape(-1, 1, d) for c in coefficients.split(heads * d, dim=1))
    write = step * gradient * (options.inner_step * 2 / d)
    relative = write.square().sum((1, 2), keepdim=True) / options.max_write_norm**2
    momentum = eta * momentum - bound(relative) * write
    return (1 - alpha) * rows + momentum, momentum
