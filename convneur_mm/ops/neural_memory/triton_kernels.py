"""The Triton kernels behind :mod:`convneur_mm.ops.neural_memory.triton`; importing this needs Triton.

Names and layouts in all of them:

- B images, h heads of d channels, e hidden units, n chunks of ``chunk_size`` tokens that are written.
- Both fast weights live in one matrix of rows of length d, ``rows = cat(W1ᵀ, W2)`` (2e, d). In registers the two
  halves are (EP, DP): e and d padded to what ``tl.dot`` takes. Every load masks the padding to zero, and zeros stay
  zeros throughout, so no later step needs a mask: GELU(0) = 0, and a padded hidden unit gets no gradient from W2.
- states: (n + 1, 3, B, h, 2e, d), for each chunk the gradient of Eq. 3 over 2/d, the momentum and the memory before it;
  coefficients: (n, B, 3, h, d), the sigmoids of step, momentum and decay. All of these are contiguous.
- Tokens are (B, h, d, N) of any strides, float32 as everything.
- rule: what multiplies a write, as gradients are over 2/d, and its norm over that of the bound.
- A grid has one axis, the head fastest: neighbours in it read neighbouring bytes. ``splits`` programs share a chunk,
  each writes a part of the sum over tokens, and the parts are added in a fixed order: results are deterministic.
- Offsets that grow with B·h·n or with N are int64; within a tile int32 does.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .types import MemoryOptions


@triton.jit
def _dot(a, b):
    # TF32 would not agree with float32 arithmetic.
    return tl.dot(a, b, input_precision='ieee')


@triton.jit
def _gelu(x):
    """GELU and its first two derivatives."""
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    x_pdf = x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    curve = 2 * 0.3989422804014327 * tl.exp(-0.5 * x * x) - x * x_pdf
    return x * cdf, cdf + x_pdf, curve


@triton.jit
def _load_tile(pointer, strides, tokens_left, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, DP)[None, :]
    return tl.load(pointer + n * strides[3] + d * strides[2], mask=(n < tokens_left) & (d < D), other=0.0)


@triton.jit
def _store_tile(pointer, value, strides, tokens_left, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, DP)[None, :]
    tl.store(pointer + n * strides[3] + d * strides[2], value, mask=(n < tokens_left) & (d < D))


@triton.jit
def _load_rows(pointer, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Both halves of rows (2e, d): W1ᵀ and W2."""
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
def _add_parts(pointer, stride, parts, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Sum of the rows at ``parts`` places ``stride`` apart."""
    first = tl.zeros((EP, DP), tl.float32)
    second = tl.zeros((EP, DP), tl.float32)
    for _ in range(parts):
        part1, part2 = _load_rows(pointer, D, E, DP, EP)
        first += part1
        second += part2
        pointer += stride
    return first, second


@triton.jit
def _place(tokens, chunk_size, chunks, part_size, batch, heads):
    """What this program works on: image, head, chunk and the chunk's tokens [begin, end) of [0, length)."""
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
    """Where the tokens of an image's head begin, from ``token`` on."""
    return pointer + image * strides[0] + head * strides[1] + token * strides[3]


@triton.jit
def read_kernel(q, memories, y, q_strides, y_strides, memory_stride, batch, heads, tokens, chunk_size, chunks,
                part_size, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """y = q + GELU(q·W1)·W2, for the tokens of chunk t with the memory at t·``memory_stride``."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + chunk * memory_stride + (image * heads + head) * (2 * E * D), D, E, DP, EP)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        z = _load_tile(_at(q, q_strides, image, head, token), q_strides, length - start, D, DP, TILE)
        active, _, _ = _gelu(_dot(z, tl.trans(w1)))
        _store_tile(_at(y, y_strides, image, head, token), z + _dot(active, w2), y_strides, length - start, D, DP, TILE)


@triton.jit
def read_backward_kernel(q, grad_y, memories, grad_q, y, parts, q_strides, grad_y_strides, grad_q_strides, y_strides,
                         memory_stride, batch, heads, tokens, chunk_size, chunks, part_size, D: tl.constexpr,
                         E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr, READS: tl.constexpr):
    """Gradients of q and, in ``parts`` (splits, chunks, B, h, 2e, d), of the memories read; y if READS."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + chunk * memory_stride + (image * heads + head) * (2 * E * D), D, E, DP, EP)
    grad_w1 = tl.zeros((EP, DP), tl.float32)
    grad_w2 = tl.zeros((EP, DP), tl.float32)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        left = length - start
        z = _load_tile(_at(q, q_strides, image, head, token), q_strides, left, D, DP, TILE)
        grad = _load_tile(_at(grad_y, grad_y_strides, image, head, token), grad_y_strides, left, D, DP, TILE)
        active, slope, _ = _gelu(_dot(z, tl.trans(w1)))
        grad_hidden = _dot(grad, tl.trans(w2)) * slope
        grad_w1 += _dot(tl.trans(grad_hidden), z)
        grad_w2 += _dot(tl.trans(active), grad)
        _store_tile(_at(grad_q, grad_q_strides, image, head, token), grad + _dot(grad_hidden, w1), grad_q_strides, left,
                    D, DP, TILE)
        if READS:
            _store_tile(_at(y, y_strides, image, head, token), z + _dot(active, w2), y_strides, left, D, DP, TILE)
    _store_rows(parts + tl.program_id(0).to(tl.int64) * (2 * E * D), grad_w1, grad_w2, D, E, DP, EP)


@triton.jit
def _surprise(k, v, k_strides, v_strides, w1, w2, begin, end, length,
              D: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """Sums over a chunk's tokens [begin, end): gradient of Eq. 3 over 2/d (both halves) and squared errors (DP,).

    ``k`` and ``v`` point to the chunk's first token.
    """
    g1 = tl.zeros((EP, DP), tl.float32)
    g2 = tl.zeros((EP, DP), tl.float32)
    squares = tl.zeros((DP,), tl.float32)
    for start in range(begin, end, TILE):
        first = tl.cast(start, tl.int64)
        key = _load_tile(k + first * k_strides[3], k_strides, length - start, D, DP, TILE)
        value = _load_tile(v + first * v_strides[3], v_strides, length - start, D, DP, TILE)
        active, slope, _ = _gelu(_dot(key, tl.trans(w1)))
        error = key + _dot(active, w2) - value
        grad_hidden = _dot(error, tl.trans(w2)) * slope
        g1 += _dot(tl.trans(grad_hidden), key)
        g2 += _dot(tl.trans(active), error)
        squares += tl.sum(error * error, 0)
    return g1, g2, squares


@triton.jit
def surprise_kernel(k, v, initial, parts, squares, k_strides, v_strides, batch, heads, tokens, chunk_size, chunks,
                    part_size, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
                    TILE: tl.constexpr):
    """Parts (splits, chunks, B, h, …) of the gradients of Eq. 3 at M_0 (2e, d) and of the mean squared errors (d)."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(initial + head * (2 * E * D), D, E, DP, EP)
    token = chunk * chunk_size
    g1, g2, total = _surprise(_at(k, k_strides, image, head, token), _at(v, v_strides, image, head, token), k_strides,
                              v_strides, w1, w2, begin, end, length, D, DP, EP, TILE)
    pid = tl.program_id(0).to(tl.int64)
    _store_rows(parts + pid * (2 * E * D), g1, g2, D, E, DP, EP)
    d = tl.arange(0, DP)
    tl.store(squares + pid * D + d, total / length, mask=d < D)


@triton.jit
def _surprise_backward(k, v, grad_k, grad_v, k_strides, v_strides, grad_k_strides, grad_v_strides, w1, w2, grad_g1,
                       grad_g2, grad_errors, begin, end, length,
                       D: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """Gradients of a chunk's k and v, stored, and of the memory, returned.

    From those of the gradient of Eq. 3 over 2/d (``grad_g1``, ``grad_g2``) and of the mean squared errors. All
    pointers are to the chunk's first token.
    """
    grad_w1 = tl.zeros((EP, DP), tl.float32)
    grad_w2 = tl.zeros((EP, DP), tl.float32)
    for start in range(begin, end, TILE):
        first = tl.cast(start, tl.int64)
        left = length - start
        key = _load_tile(k + first * k_strides[3], k_strides, left, D, DP, TILE)
        value = _load_tile(v + first * v_strides[3], v_strides, left, D, DP, TILE)
        active, slope, curvature = _gelu(_dot(key, tl.trans(w1)))
        error = key + _dot(active, w2) - value
        u = _dot(error, tl.trans(w2))  # what comes back to `active` in Eq. 3

        # Through g1 = (u ⊙ slope)ᵀ·key and g2 = activeᵀ·error.
        grad_b = _dot(key, tl.trans(grad_g1))
        grad_u = grad_b * slope
        grad_error = (2 / length) * grad_errors[None, :] * error + _dot(active, grad_g2) + _dot(grad_u, w2)
        grad_active = _dot(error, tl.trans(grad_g2)) + _dot(grad_error, tl.trans(w2))
        grad_hidden = grad_active * slope + grad_b * u * curvature

        grad_w1 += _dot(tl.trans(grad_hidden), key)
        grad_w2 += _dot(tl.trans(grad_u), error) + _dot(tl.trans(active), grad_error)
        grad_key = grad_error + _dot(u * slope, grad_g1) + _dot(grad_hidden, w1)
        _store_tile(grad_k + first * grad_k_strides[3], grad_key, grad_k_strides, left, D, DP, TILE)
        _store_tile(grad_v + first * grad_v_strides[3], -grad_error, grad_v_strides, left, D, DP, TILE)
    return grad_w1, grad_w2


@triton.jit
def surprise_backward_kernel(k, v, initial, grad_gradients, grad_surprises, grad_k, grad_v, parts, k_strides, v_strides,
                             grad_k_strides, grad_v_strides, batch, heads, tokens, chunk_size, chunks, part_size,
                             D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
                             TILE: tl.constexpr):
    """Gradients of k and v, and parts (splits, chunks, B, h, 2e, d) of that of M_0."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(initial + head * (2 * E * D), D, E, DP, EP)
    place = (chunk * batch + image) * heads + head
    grad_g1, grad_g2 = _load_rows(grad_gradients + place * (2 * E * D), D, E, DP, EP)
    d = tl.arange(0, DP)
    grad_errors = tl.load(grad_surprises + place * D + d, mask=d < D, other=0.0)
    token = chunk * chunk_size
    grad_w1, grad_w2 = _surprise_backward(
        _at(k, k_strides, image, head, token), _at(v, v_strides, image, head, token),
        _at(grad_k, grad_k_strides, image, head, token), _at(grad_v, grad_v_strides, image, head, token), k_strides,
        v_strides, grad_k_strides, grad_v_strides, w1, w2, grad_g1, grad_g2, grad_errors, begin, end, length,
        D, DP, EP, TILE)
    _store_rows(parts + tl.program_id(0).to(tl.int64) * (2 * E * D), grad_w1, grad_w2, D, E, DP, EP)


@triton.jit
def _load_coefficients(coefficients, head, heads, D: tl.constexpr, DP: tl.constexpr):
    """One head's step, momentum and decay, each (1, DP), of coefficients (3, h, d)."""
    d = tl.arange(0, DP)
    pointer = coefficients + head * D + d
    step = tl.load(pointer, mask=d < D, other=0.0)
    momentum = tl.load(pointer + heads * D, mask=d < D, other=0.0)
    decay = tl.load(pointer + 2 * heads * D, mask=d < D, other=0.0)
    return step[None, :], momentum[None, :], decay[None, :]


def rule_of(options: MemoryOptions, d: int) -> tuple[float, float]:
    """``rule`` for heads of ``d`` channels."""
    scale = options.inner_step * 2 / d
    return scale, scale / options.max_write_norm


@triton.jit
def bound(relative):
    """The factor that keeps a write within its bound, from its squared norm over that of the bound."""
    return tl.rsqrt(1 + relative)


@triton.jit
def bound_slope(relative):
    """Twice the derivative of :func:`bound`."""
    factor = bound(relative)
    return -factor * factor * factor


@triton.jit
def _load_state(states, place, pairs, pair, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Momentum and memory, both halves, of the ``pair`` of image and head before chunk ``place``."""
    momentum = states + ((place * 3 + 1) * pairs + pair) * (2 * E * D)
    p1, p2 = _load_rows(momentum, D, E, DP, EP)
    m1, m2 = _load_rows(momentum + pairs * (2 * E * D), D, E, DP, EP)
    return p1, p2, m1, m2


@triton.jit
def _write(states, place, pairs, pair, g1, g2, coefficients, head, heads, rule,
           D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Eq. 4 for one head: from the states of chunk ``place`` to the next ones."""
    p1, p2, m1, m2 = _load_state(states, place, pairs, pair, D, E, DP, EP)
    step, momentum, decay = _load_coefficients(coefficients, head, heads, D, DP)
    u1 = step * g1
    u2 = step * g2
    scale, bound_scale = rule[0], rule[1]
    factor = bound((tl.sum(u1 * u1) + tl.sum(u2 * u2)) * bound_scale * bound_scale)
    p1 = momentum * p1 - scale * factor * u1
    p2 = momentum * p2 - scale * factor * u2
    following = states + ((place * 3 + 4) * pairs + pair) * (2 * E * D)
    _store_rows(following, p1, p2, D, E, DP, EP)
    _store_rows(following + pairs * (2 * E * D), (1 - decay) * m1 + p1, (1 - decay) * m2 + p2, D, E, DP, EP)


@triton.jit
def write_kernel(parts, states, coefficients, splits, pairs, chunks, rule, heads,
                 D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Eq. 4 for ``chunks`` chunks, one head of one image (of ``pairs`` such) per program."""
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    rows: tl.constexpr = 2 * E * D
    for t in range(chunks):
        chunk = tl.cast(t, tl.int64)
        g1, g2 = _add_parts(parts + (chunk * pairs + pair) * rows, tl.cast(chunks, tl.int64) * pairs * rows, splits,
                            D, E, DP, EP)
        _store_rows(states + (chunk * 3 * pairs + pair) * rows, g1, g2, D, E, DP, EP)
        _write(states, chunk, pairs, pair, g1, g2, coefficients + (chunk * (pairs // heads) + image) * (3 * heads * D),
               head, heads, rule, D, E, DP, EP)
        tl.debug_barrier()


@triton.jit
def _write_backward(states, place, pairs, pair, grad_memories, grad_m, grad_p, coefficients, grad_outputs, head, heads,
                    rule, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Back through Eq. 4, from the memory after chunk ``place`` to the one before it.

    ``grad_m`` and ``grad_p`` carry what comes back to M and P; returned is what comes back to the gradient of Eq. 3,
    and stored in ``grad_outputs`` (3, h, d) what goes into the generators' sigmoids.
    """
    rows: tl.constexpr = 2 * E * D
    p1, p2, m1, m2 = _load_state(states, place, pairs, pair, D, E, DP, EP)
    g1, g2 = _load_rows(states + (place * 3 * pairs + pair) * rows, D, E, DP, EP)
    read1, read2 = _load_rows(grad_memories + ((place + 1) * pairs + pair) * rows, D, E, DP, EP)
    grad_m1, grad_m2 = _load_rows(grad_m + pair * rows, D, E, DP, EP)
    grad_p1, grad_p2 = _load_rows(grad_p + pair * rows, D, E, DP, EP)
    step, momentum, decay = _load_coefficients(coefficients, head, heads, D, DP)
    grad_m1 += read1
    grad_m2 += read2
    grad_p1 += grad_m1
    grad_p2 += grad_m2
    u1 = step * g1
    u2 = step * g2
    scale, bound_scale = rule[0], rule[1]
    relative = (tl.sum(u1 * u1) + tl.sum(u2 * u2)) * bound_scale * bound_scale
    factor = bound(relative)
    curb = (tl.sum(grad_p1 * u1) + tl.sum(grad_p2 * u2)) * bound_slope(relative) * bound_scale * bound_scale
    grad_u1 = -scale * (factor * grad_p1 + curb * u1)
    grad_u2 = -scale * (factor * grad_p2 + curb * u2)

    d = tl.arange(0, DP)
    pointer = grad_outputs + head * D + d
    grad_step = tl.sum(grad_u1 * g1, 0) + tl.sum(grad_u2 * g2, 0)
    grad_momentum = tl.sum(grad_p1 * p1, 0) + tl.sum(grad_p2 * p2, 0)
    grad_decay = -tl.sum(grad_m1 * m1, 0) - tl.sum(grad_m2 * m2, 0)
    tl.store(pointer, grad_step * tl.sum(step * (1 - step), 0), mask=d < D)
    tl.store(pointer + heads * D, grad_momentum * tl.sum(momentum * (1 - momentum), 0), mask=d < D)
    tl.store(pointer + 2 * heads * D, grad_decay * tl.sum(decay * (1 - decay), 0), mask=d < D)
    _store_rows(grad_m + pair * rows, (1 - decay) * grad_m1, (1 - decay) * grad_m2, D, E, DP, EP)
    _store_rows(grad_p + pair * rows, momentum * grad_p1, momentum * grad_p2, D, E, DP, EP)
    return step * grad_u1, step * grad_u2


@triton.jit
def write_backward_kernel(grad_m, grad_p, grad_memories, states, coefficients, grad_gradients, grad_outputs, pairs,
                          chunks, rule, heads,
                          D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Backward of :func:`write_kernel`, last chunk first; ``grad_m`` and ``grad_p`` (B, h, 2e, d) go from those after
    the last chunk to those before the first one, but for what is read there."""
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    for i in range(chunks):
        chunk = tl.cast(chunks - 1 - i, tl.int64)
        offset = (chunk * (pairs // heads) + image) * (3 * heads * D)
        grad_g1, grad_g2 = _write_backward(
            states, chunk, pairs, pair, grad_memories, grad_m, grad_p, coefficients + offset, grad_outputs + offset,
            head, heads, rule, D, E, DP, EP)
        _store_rows(grad_gradients + (chunk * pairs + pair) * (2 * E * D), grad_g1, grad_g2, D, E, DP, EP)
        tl.debug_barrier()


@triton.jit
def _linear(x, weight, bias, out, rows, columns, BLOCK: tl.constexpr, GELU_INPUT: tl.constexpr,
            SIGMOID: tl.constexpr):
    """out = weight·x + bias for ``weight`` (rows, columns), GELU before and sigmoid after if asked for."""
    for row in range(0, rows, BLOCK):
        r = row + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for column in range(0, columns, BLOCK):
            c = column + tl.arange(0, BLOCK)
            value = tl.load(x + c, mask=c < columns, other=0.0)
            if GELU_INPUT:
                value, _, _ = _gelu(value)
            total += value[None, :] * tl.load(weight + r[:, None] * columns + c[None, :],
                                              mask=(r[:, None] < rows) & (c[None, :] < columns), other=0.0)
        result = tl.sum(total, 1) + tl.load(bias + r, mask=r < rows, other=0.0)
        if SIGMOID:
            result = tl.sigmoid(result)
        tl.store(out + r, result, mask=r < rows)


@triton.jit
def _linear_backward(grad_out, weight, hidden, grad_x, rows, columns, BLOCK: tl.constexpr, GELU_INPUT: tl.constexpr):
    """grad_x = weightᵀ·grad_out, times GELU'(hidden) if asked for."""
    for column in range(0, columns, BLOCK):
        c = column + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in range(0, rows, BLOCK):
            r = row + tl.arange(0, BLOCK)
            value = tl.load(grad_out + r, mask=r < rows, other=0.0)
            total += value[:, None] * tl.load(weight + r[:, None] * columns + c[None, :],
                                              mask=(r[:, None] < rows) & (c[None, :] < columns), other=0.0)
        result = tl.sum(total, 0)
        if GELU_INPUT:
            _, slope, _ = _gelu(tl.load(hidden + c, mask=c < columns, other=0.0))
            result *= slope
        tl.store(grad_x + c, result, mask=c < columns)


@triton.jit
def fused_kernel(k, v, states, surprises, hidden, coefficients, in_weight, in_bias, out_weight, out_bias, k_strides,
                 v_strides, batch, heads, tokens, chunk_size, rule,
                 D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr,
                 BLOCK: tl.constexpr):
    """All sequential writes of one image per program.

    What one step hands to the next goes through the cache to other threads, hence the barriers.
    """
    image = tl.program_id(0).to(tl.int64)
    channels = heads * D
    pairs = tl.cast(batch, tl.int64) * heads
    rows: tl.constexpr = 2 * E * D
    d = tl.arange(0, DP)
    for t in range(tl.cdiv(tokens, chunk_size)):
        chunk = tl.cast(t, tl.int64)
        token = chunk * chunk_size
        length = tl.minimum(chunk_size, tokens - t * chunk_size)
        place = chunk * batch + image
        gradients = states + (chunk * 3 * pairs + image * heads) * rows
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            w1, w2 = _load_rows(gradients + (2 * pairs + head) * rows, D, E, DP, EP)
            g1, g2, total = _surprise(
                _at(k, k_strides, image, head, token), _at(v, v_strides, image, head, token), k_strides, v_strides,
                w1, w2, 0, length, length, D, DP, EP, TILE)
            _store_rows(gradients + head * rows, g1, g2, D, E, DP, EP)
            tl.store(surprises + place * channels + head * D + d, total / length, mask=d < D)
        tl.debug_barrier()
        _linear(surprises + place * channels, in_weight, in_bias, hidden + place * 4 * channels, 4 * channels, channels,
                BLOCK, False, False)
        tl.debug_barrier()
        _linear(hidden + place * 4 * channels, out_weight, out_bias, coefficients + place * 3 * channels, 3 * channels,
                4 * channels, BLOCK, True, True)
        tl.debug_barrier()
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            g1, g2 = _load_rows(gradients + head * rows, D, E, DP, EP)
            _write(states, chunk, pairs, image * heads + head, g1, g2, coefficients + place * 3 * channels, head, heads,
                   rule, D, E, DP, EP)
        tl.debug_barrier()


@triton.jit
def fused_backward_kernel(k, v, states, hidden, coefficients, in_weight, out_weight, grad_memories, grad_m, grad_p,
                          grad_gradients, grad_outputs, grad_hidden, grad_surprise, grad_k, grad_v, k_strides,
                          v_strides, grad_k_strides, grad_v_strides, batch, heads, tokens, chunk_size, rule,
                          D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr,
                          BLOCK: tl.constexpr):
    """Backward of :func:`fused_kernel`, with the same division of work.

    ``grad_m`` and ``grad_p`` are as in :func:`write_backward_kernel`. ``grad_gradients`` (B, h, 2e, d) and
    ``grad_surprise`` (B, Cm) are scratch.
    """
    image = tl.program_id(0).to(tl.int64)
    channels = heads * D
    pairs = tl.cast(batch, tl.int64) * heads
    rows: tl.constexpr = 2 * E * D
    d = tl.arange(0, DP)
    chunks = tl.cdiv(tokens, chunk_size)
    for i in range(chunks):
        t = chunks - 1 - i
        chunk = tl.cast(t, tl.int64)
        token = chunk * chunk_size
        length = tl.minimum(chunk_size, tokens - t * chunk_size)
        place = chunk * batch + image
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            pair = image * heads + head
            grad_g1, grad_g2 = _write_backward(
                states, chunk, pairs, pair, grad_memories, grad_m, grad_p, coefficients + place * 3 * channels,
                grad_outputs + place * 3 * channels, head, heads, rule, D, E, DP, EP)
            _store_rows(grad_gradients + pair * rows, grad_g1, grad_g2, D, E, DP, EP)
        tl.debug_barrier()
        _linear_backward(grad_outputs + place * 3 * channels, out_weight, hidden + place * 4 * channels,
                         grad_hidden + place * 4 * channels, 3 * channels, 4 * channels, BLOCK, True)
        tl.debug_barrier()
        _linear_backward(grad_hidden + place * 4 * channels, in_weight, hidden, grad_surprise + image * channels,
                         4 * channels, channels, BLOCK, False)
        tl.debug_barrier()
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            pair = image * heads + head
            grad_m1, grad_m2 = _load_rows(grad_m + pair * rows, D, E, DP, EP)
            w1, w2 = _load_rows(states + ((chunk * 3 + 2) * pairs + pair) * rows, D, E, DP, EP)
            grad_g1, grad_g2 = _load_rows(grad_gradients + pair * rows, D, E, DP, EP)
            grad_errors = tl.load(grad_surprise + image * channels + head * D + d, mask=d < D, other=0.0)
            grad_w1, grad_w2 = _surprise_backward(
                _at(k, k_strides, image, head, token), _at(v, v_strides, image, head, token),
                _at(grad_k, grad_k_strides, image, head, token), _at(grad_v, grad_v_strides, image, head, token),
                k_strides, v_strides, grad_k_strides, grad_v_strides, w1, w2, grad_g1, grad_g2, grad_errors,
                0, length, length, D, DP, EP, TILE)
            _store_rows(grad_m + pair * rows, grad_m1 + grad_w1, grad_m2 + grad_w2, D, E, DP, EP)
        tl.debug_barrier()
