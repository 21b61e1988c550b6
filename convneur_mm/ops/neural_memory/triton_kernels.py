"""The Triton kernels of :mod:`convneur_mm.ops.neural_memory.triton`; importing this module needs Triton.

Names and layouts in all kernels:

- B images, h heads of d channels, n = B·h, e hidden units, T chunks of ``chunk_size`` tokens.
- Rows cat(W1ᵀ, W2) of a memory are (2e, d), contiguous. In registers the two halves are (EP, DP): e and d padded to
  sizes that ``tl.dot`` accepts. Every load sets the padding to zero, and it stays zero throughout, so later steps need
  no mask: GELU(0) = 0, and a padded hidden unit gets no gradient from W2.
- Tokens are (B, h, d, N) of any strides and dtype, and float32 in registers. All else is float32.
- The grid has one axis, on which the head varies fastest: neighbouring programs read neighbouring bytes. ``splits``
  programs share a chunk, each writes its part of the sums over tokens, and the parts are added in a fixed order, so
  results are deterministic.
- Offsets that grow with n·T or with N are int64; within a tile int32 suffices.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _gelu(x):
    """Return GELU and its first two derivatives."""
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * cdf, cdf + x * density, (2 - x * x) * density


@triton.jit
def _load_tile(pointer, strides, tokens_left, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, DP)[None, :]
    tile = tl.load(pointer + n * strides[3] + d * strides[2], mask=(n < tokens_left) & (d < D), other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _store_tile(pointer, value, strides, tokens_left, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, DP)[None, :]
    tl.store(pointer + n * strides[3] + d * strides[2], value, mask=(n < tokens_left) & (d < D))


@triton.jit
def _load_rows(pointer, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Return both halves of rows (2e, d): W1ᵀ and W2."""
    e = tl.arange(0, EP)[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (e < E) & (d < D)
    offsets = e * D + d
    return tl.load(pointer + offsets, mask=mask, other=0.0), tl.load(pointer + E * D + offsets, mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, first, second, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (e < E) & (d < D)
    offsets = e * D + d
    tl.store(pointer + offsets, first, mask=mask)
    tl.store(pointer + E * D + offsets, second, mask=mask)


@triton.jit
def _place(tokens, chunk_size, chunks, part_size, batch, heads):
    """Return this program's image, head and chunk, its tokens [begin, end) of the chunk, and the chunk's length."""
    pid = tl.program_id(0)
    head = pid % heads
    image = (pid // heads) % batch
    chunk = (pid // (heads * batch)) % chunks
    begin = pid // (heads * batch * chunks) * part_size
    length = tl.minimum(chunk_size, tokens - chunk * chunk_size)
    end = tl.minimum(begin + part_size, length)
    return image.to(tl.int64), head.to(tl.int64), chunk.to(tl.int64), begin, end, length


@triton.jit
def _at(pointer, strides, image, head, token):
    """Return a pointer to an image's head from ``token`` on."""
    return pointer + image * strides[0] + head * strides[1] + token * strides[3]


@triton.jit
def _unit(z, eps, NORMALIZE: tl.constexpr):
    """Return tokens over their norms or ``eps`` if larger, the factor, and whether each norm is at least ``eps``."""
    length = tl.sqrt(tl.sum(z * z, 1))[:, None]
    if NORMALIZE:
        factor = 1 / tl.maximum(length, eps)
        return z * factor, factor, length >= eps
    return z, length, length >= 0


@triton.jit
def _unit_backward(grad, unit, factor, is_long, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        along = tl.where(is_long, tl.sum(grad * unit, 1)[:, None], 0.0)
        return (grad - unit * along) * factor
    return grad


@triton.jit
def read_kernel(q, memories, y, q_strides, y_strides, memory_stride, batch, heads, tokens, chunk_size, chunks,
                part_size, eps, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
                TILE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Fill y = q + GELU(q·W1)·W2 for the tokens of chunk t, with the memory at t·``memory_stride``."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + chunk * memory_stride + (image * heads + head) * (2 * E * D), D, E, DP, EP)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        z = _load_tile(_at(q, q_strides, image, head, token), q_strides, length - start, D, DP, TILE)
        z, _, _ = _unit(z, eps, NORMALIZE)
        active, _, _ = _gelu(_dot(z, tl.trans(w1), PRECISION))
        _store_tile(_at(y, y_strides, image, head, token), z + _dot(active, w2, PRECISION), y_strides, length - start,
                    D, DP, TILE)


@triton.jit
def read_backward_kernel(grad_y, q, memories, grad_q, parts, grad_y_strides, q_strides, grad_q_strides, memory_stride,
                         batch, heads, tokens, chunk_size, chunks, part_size, eps, D: tl.constexpr, E: tl.constexpr,
                         DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr, NORMALIZE: tl.constexpr,
                         PRECISION: tl.constexpr):
    """Fill the gradients of q and, in ``parts`` (splits, T, n, 2e, d), of the memories that were read."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + chunk * memory_stride + (image * heads + head) * (2 * E * D), D, E, DP, EP)
    grad_w1 = tl.zeros((EP, DP), tl.float32)
    grad_w2 = tl.zeros((EP, DP), tl.float32)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        left = length - start
        z = _load_tile(_at(q, q_strides, image, head, token), q_strides, left, D, DP, TILE)
        z, factor, is_long = _unit(z, eps, NORMALIZE)
        grad = _load_tile(_at(grad_y, grad_y_strides, image, head, token), grad_y_strides, left, D, DP, TILE)
        active, slope, _ = _gelu(_dot(z, tl.trans(w1), PRECISION))
        grad_hidden = _dot(grad, tl.trans(w2), PRECISION) * slope
        grad_w1 += _dot(tl.trans(grad_hidden), z, PRECISION)
        grad_w2 += _dot(tl.trans(active), grad, PRECISION)
        grad = _unit_backward(grad + _dot(grad_hidden, w1, PRECISION), z, factor, is_long, NORMALIZE)
        _store_tile(_at(grad_q, grad_q_strides, image, head, token), grad, grad_q_strides, left, D, DP, TILE)
    _store_rows(parts + tl.program_id(0).to(tl.int64) * (2 * E * D), grad_w1, grad_w2, D, E, DP, EP)


@triton.jit
def surprise_kernel(k, v, memories, gradients, errors, curvatures, part_stride, k_strides, v_strides, memory_stride,
                    batch, heads, tokens, chunk_size, chunks, part_size, eps, D: tl.constexpr, E: tl.constexpr,
                    DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr, NORMALIZE: tl.constexpr,
                    PRECISION: tl.constexpr, CURVATURE: tl.constexpr):
    """Fill parts of the gradients of Eq. 3, mean squared errors and curvature bounds, ``part_stride`` apart."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    n = image * heads + head
    w1, w2 = _load_rows(memories + chunk * memory_stride + n * (2 * E * D), D, E, DP, EP)
    norms = tl.sum(w2 * w2, 1)[None, :]
    g1 = tl.zeros((EP, DP), tl.float32)
    g2 = tl.zeros((EP, DP), tl.float32)
    squares = tl.zeros((DP,), tl.float32)
    bounds = tl.zeros((EP,), tl.float32)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        key = _load_tile(_at(k, k_strides, image, head, token), k_strides, length - start, D, DP, TILE)
        key, _, _ = _unit(key, eps, NORMALIZE)
        value = _load_tile(_at(v, v_strides, image, head, token), v_strides, length - start, D, DP, TILE)
        active, slope, _ = _gelu(_dot(key, tl.trans(w1), PRECISION))
        error = key + _dot(active, w2, PRECISION) - value
        grad_hidden = _dot(error, tl.trans(w2), PRECISION) * slope
        g1 += _dot(tl.trans(grad_hidden), key, PRECISION)
        g2 += _dot(tl.trans(active), error, PRECISION)
        squares += tl.sum(error * error, 0)
        if CURVATURE:
            bounds += tl.sum(active * active + slope * slope * norms * tl.sum(key * key, 1)[:, None], 0)
    part = tl.program_id(0).to(tl.int64) // (heads * batch * chunks) * part_stride
    place = chunk * batch * heads + n
    _store_rows(gradients + part + place * (2 * E * D), g1 * (2 / D), g2 * (2 / D), D, E, DP, EP)
    d = tl.arange(0, DP)
    tl.store(errors + part + place * D + d, squares / length, mask=d < D)
    if CURVATURE:
        tl.store(curvatures + part + place, tl.sum(bounds) * (2 / D))


@triton.jit
def surprise_backward_kernel(grad_gradients, grad_errors, grad_curvatures, k, v, memories, grad_k, grad_v, parts,
                             k_strides, v_strides, grad_k_strides, grad_v_strides, memory_stride, batch, heads, tokens,
                             chunk_size, chunks, part_size, eps, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr,
                             EP: tl.constexpr, TILE: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
                             CURVATURE: tl.constexpr):
    """Fill the gradients of k and v and, in ``parts`` (splits, T, n, 2e, d), of the memories."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    n = image * heads + head
    place = chunk * batch * heads + n
    w1, w2 = _load_rows(memories + chunk * memory_stride + n * (2 * E * D), D, E, DP, EP)
    grad_g1, grad_g2 = _load_rows(grad_gradients + place * (2 * E * D), D, E, DP, EP)
    grad_g1 *= 2 / D
    grad_g2 *= 2 / D
    d = tl.arange(0, DP)
    of_errors = tl.load(grad_errors + place * D + d, mask=d < D, other=0.0)[None, :] * (2 / length)
    norms = tl.sum(w2 * w2, 1)[None, :]
    grad_w1 = tl.zeros((EP, DP), tl.float32)
    grad_w2 = tl.zeros((EP, DP), tl.float32)
    of_norms = tl.zeros((EP,), tl.float32)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        left = length - start
        key = _load_tile(_at(k, k_strides, image, head, token), k_strides, left, D, DP, TILE)
        key, factor, is_long = _unit(key, eps, NORMALIZE)
        value = _load_tile(_at(v, v_strides, image, head, token), v_strides, left, D, DP, TILE)
        active, slope, bend = _gelu(_dot(key, tl.trans(w1), PRECISION))
        error = key + _dot(active, w2, PRECISION) - value
        back = _dot(error, tl.trans(w2), PRECISION)  # the gradient of the hidden units in Eq. 3 is back·slope

        grad_slopes = _dot(key, tl.trans(grad_g1), PRECISION)
        grad_back = grad_slopes * slope
        grad_error = of_errors * error + _dot(active, grad_g2, PRECISION) + _dot(grad_back, w2, PRECISION)
        grad_active = _dot(error, tl.trans(grad_g2), PRECISION) + _dot(grad_error, tl.trans(w2), PRECISION)
        grad_hidden = grad_slopes * bend * back
        grad_key = grad_error + _dot(back * slope, grad_g1, PRECISION)
        grad_w2 += _dot(tl.trans(grad_back), error, PRECISION) + _dot(tl.trans(active), grad_error, PRECISION)
        if CURVATURE:
            scale = tl.load(grad_curvatures + place) * (4 / D)
            lengths = tl.sum(key * key, 1)[:, None]
            grad_active += scale * active
            grad_hidden += scale * slope * bend * norms * lengths
            grad_key += key * tl.sum(scale * slope * slope * norms, 1)[:, None]
            of_norms += tl.sum(scale * slope * slope * lengths, 0)
        grad_hidden += grad_active * slope
        grad_w1 += _dot(tl.trans(grad_hidden), key, PRECISION)
        grad_key = _unit_backward(grad_key + _dot(grad_hidden, w1, PRECISION), key, factor, is_long, NORMALIZE)
        _store_tile(_at(grad_k, grad_k_strides, image, head, token), grad_key, grad_k_strides, left, D, DP, TILE)
        _store_tile(_at(grad_v, grad_v_strides, image, head, token), -grad_error, grad_v_strides, left, D, DP, TILE)
    grad_w2 += w2 * of_norms[:, None]
    _store_rows(parts + tl.program_id(0).to(tl.int64) * (2 * E * D), grad_w1, grad_w2, D, E, DP, EP)


# ---- Eq. 4 as in rule.py, with one program for each head of each image


@triton.jit
def _load_coefficients(outputs, n, heads, D: tl.constexpr, DP: tl.constexpr):
    """Return one head's step, momentum and decay, each (1, DP), from the generators' ``outputs`` (B, 3, h, d)."""
    d = tl.arange(0, DP)
    pointer = outputs + (n // heads * 3 * heads + n % heads) * D + d
    step = tl.sigmoid(tl.load(pointer, mask=d < D, other=0.0))
    momentum = tl.sigmoid(tl.load(pointer + heads * D, mask=d < D, other=0.0))
    decay = tl.sigmoid(tl.load(pointer + 2 * heads * D, mask=d < D, other=0.0))
    return step[None, :], momentum[None, :], decay[None, :]


@triton.jit
def write_kernel(gradient, outputs, memory, momentum, next_memory, next_momentum, heads, inner_step, max_norm,
                 D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    place = n * (2 * E * D)
    g1, g2 = _load_rows(gradient + place, D, E, DP, EP)
    m1, m2 = _load_rows(memory + place, D, E, DP, EP)
    p1, p2 = _load_rows(momentum + place, D, E, DP, EP)
    step, eta, alpha = _load_coefficients(outputs, n, heads, D, DP)
    u1 = inner_step * step * g1
    u2 = inner_step * step * g2
    factor = tl.rsqrt(1 + (tl.sum(u1 * u1) + tl.sum(u2 * u2)) / (max_norm * max_norm))
    p1 = eta * p1 - factor * u1
    p2 = eta * p2 - factor * u2
    _store_rows(next_momentum + place, p1, p2, D, E, DP, EP)
    _store_rows(next_memory + place, (1 - alpha) * m1 + p1, (1 - alpha) * m2 + p2, D, E, DP, EP)


@triton.jit
def write_backward_kernel(grad_memory, grad_momentum, gradient, outputs, memory, momentum, grad_gradient, grad_outputs,
                          grad_memory_before, grad_momentum_before, heads, inner_step, max_norm, D: tl.constexpr,
                          E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    place = n * (2 * E * D)
    g1, g2 = _load_rows(gradient + place, D, E, DP, EP)
    m1, m2 = _load_rows(memory + place, D, E, DP, EP)
    p1, p2 = _load_rows(momentum + place, D, E, DP, EP)
    grad_m1, grad_m2 = _load_rows(grad_memory + place, D, E, DP, EP)
    grad_p1, grad_p2 = _load_rows(grad_momentum + place, D, E, DP, EP)
    step, eta, alpha = _load_coefficients(outputs, n, heads, D, DP)
    grad_p1 += grad_m1
    grad_p2 += grad_m2
    u1 = inner_step * step * g1
    u2 = inner_step * step * g2
    factor = tl.rsqrt(1 + (tl.sum(u1 * u1) + tl.sum(u2 * u2)) / (max_norm * max_norm))
    curb = (tl.sum(grad_p1 * u1) + tl.sum(grad_p2 * u2)) * factor * (factor / max_norm) * (factor / max_norm)
    grad_u1 = inner_step * (curb * u1 - factor * grad_p1)
    grad_u2 = inner_step * (curb * u2 - factor * grad_p2)

    d = tl.arange(0, DP)
    pointer = grad_outputs + (n // heads * 3 * heads + n % heads) * D + d
    grad_step = tl.sum(grad_u1 * g1 + grad_u2 * g2, 0)
    grad_eta = tl.sum(grad_p1 * p1 + grad_p2 * p2, 0)
    grad_alpha = -tl.sum(grad_m1 * m1 + grad_m2 * m2, 0)
    tl.store(pointer, grad_step * tl.sum(step * (1 - step), 0), mask=d < D)
    tl.store(pointer + heads * D, grad_eta * tl.sum(eta * (1 - eta), 0), mask=d < D)
    tl.store(pointer + 2 * heads * D, grad_alpha * tl.sum(alpha * (1 - alpha), 0), mask=d < D)
    _store_rows(grad_gradient + place, step * grad_u1, step * grad_u2, D, E, DP, EP)
    _store_rows(grad_memory_before + place, (1 - alpha) * grad_m1, (1 - alpha) * grad_m2, D, E, DP, EP)
    _store_rows(grad_momentum_before + place, eta * grad_p1, eta * grad_p2, D, E, DP, EP)
