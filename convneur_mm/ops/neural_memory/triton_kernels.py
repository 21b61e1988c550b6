"""The Triton kernels behind :mod:`convneur_mm.ops.neural_memory.triton`; importing this needs Triton.

Names and layouts in all of them:

- B images, h heads of d channels, e hidden units, n chunks of ``chunk_size`` tokens that are written.
- Both fast weights live in one matrix of rows of length d, ``rows = cat(W1ᵀ, W2)`` (2e, d). In registers the two
  halves are (EP, DP): e and d padded to what ``tl.dot`` takes. Every load masks the padding to zero, and zeros stay
  zeros throughout, so no later step needs a mask: GELU(0) = 0, and a padded hidden unit gets no gradient from W2.
- memories, momenta: (n + 1, B, h, 2e, d), before the first chunk and after each; gradients of Eq. 3: (n, B, h, 2e, d);
  coefficients: (n, B, 3, h, d), the sigmoids of step, momentum and decay. All of these are float32 and contiguous.
- q, k, v and the gradient of y have any strides (B, h, N, d) and any floating dtype; what the kernels make of that
  shape lies in (B, N, h, d) order.
- A grid has one axis, the head fastest: neighbours in it read neighbouring bytes. ``splits`` programs share a chunk,
  each writes a part of the sum over tokens, and the parts are added in a fixed order: results are deterministic.
- Offsets that grow with B·h·n or with N are int64; within a tile int32 does.
"""
from __future__ import annotations

import triton
import triton.language as tl


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
def _load_tile(pointer, stride_n, stride_d, tokens_left, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, DP)[None, :]
    return tl.load(pointer + n * stride_n + d * stride_d, mask=(n < tokens_left) & (d < D), other=0.0).to(tl.float32)


@triton.jit
def _store_tile(pointer, value, stride_n, tokens_left, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    n = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, DP)[None, :]
    tl.store(pointer + n * stride_n + d, value.to(pointer.dtype.element_ty), mask=(n < tokens_left) & (d < D))


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
def read_kernel(q, memories, y, q_strides, memory_stride, batch, heads, tokens, chunk_size, chunks, part_size,
                D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """y = q + GELU(q·W1)·W2, for the tokens of chunk t with the memory at t·``memory_stride``."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + chunk * memory_stride + (image * heads + head) * (2 * E * D), D, E, DP, EP)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        z = _load_tile(q + image * q_strides[0] + head * q_strides[1] + token * q_strides[2],
                       q_strides[2], q_strides[3], length - start, D, DP, TILE)
        active, _, _ = _gelu(_dot(z, tl.trans(w1)))
        _store_tile(y + ((image * tokens + token) * heads + head) * D, z + _dot(active, w2), heads * D,
                    length - start, D, DP, TILE)


@triton.jit
def read_backward_kernel(q, dy, memories, dq, parts, q_strides, dy_strides, memory_stride, batch, heads, tokens,
                         chunk_size, chunks, part_size,
                         D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """Gradients of q and, in ``parts`` (splits, chunks, B, h, 2e, d), of the memories read."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + chunk * memory_stride + (image * heads + head) * (2 * E * D), D, E, DP, EP)
    dw1 = tl.zeros((EP, DP), tl.float32)
    dw2 = tl.zeros((EP, DP), tl.float32)
    for start in range(begin, end, TILE):
        token = chunk * chunk_size + start
        z = _load_tile(q + image * q_strides[0] + head * q_strides[1] + token * q_strides[2],
                       q_strides[2], q_strides[3], length - start, D, DP, TILE)
        dout = _load_tile(dy + image * dy_strides[0] + head * dy_strides[1] + token * dy_strides[2],
                          dy_strides[2], dy_strides[3], length - start, D, DP, TILE)
        active, slope, _ = _gelu(_dot(z, tl.trans(w1)))
        d_hidden = _dot(dout, tl.trans(w2)) * slope
        dw1 += _dot(tl.trans(d_hidden), z)
        dw2 += _dot(tl.trans(active), dout)
        _store_tile(dq + ((image * tokens + token) * heads + head) * D, dout + _dot(d_hidden, w1), heads * D,
                    length - start, D, DP, TILE)
    _store_rows(parts + tl.program_id(0).to(tl.int64) * (2 * E * D), dw1, dw2, D, E, DP, EP)


@triton.jit
def _surprise(k, v, k_strides, v_strides, w1, w2, begin, end, length,
              D: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """Sums over a chunk's tokens [begin, end): gradient of Eq. 3 (both halves) and squared errors (DP,).

    ``k`` and ``v`` point to the chunk's first token.
    """
    g1 = tl.zeros((EP, DP), tl.float32)
    g2 = tl.zeros((EP, DP), tl.float32)
    squares = tl.zeros((DP,), tl.float32)
    for start in range(begin, end, TILE):
        first = tl.cast(start, tl.int64)
        key = _load_tile(k + first * k_strides[2], k_strides[2], k_strides[3], length - start, D, DP, TILE)
        value = _load_tile(v + first * v_strides[2], v_strides[2], v_strides[3], length - start, D, DP, TILE)
        active, slope, _ = _gelu(_dot(key, tl.trans(w1)))
        error = key + _dot(active, w2) - value
        d_out = error * (2 / D)
        d_hidden = _dot(d_out, tl.trans(w2)) * slope
        g1 += _dot(tl.trans(d_hidden), key)
        g2 += _dot(tl.trans(active), d_out)
        squares += tl.sum(error * error, 0)
    return g1, g2, squares


@triton.jit
def surprise_kernel(k, v, memories, parts, squares, k_strides, v_strides, memory_stride, batch, heads, tokens,
                    chunk_size, chunks, part_size,
                    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """Parts (splits, chunks, B, h, …) of the gradients of Eq. 3 (2e, d) and of the mean squared errors (d).

    The memory of image b is at b·``memory_stride``, for every chunk of the launch.
    """
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + image * memory_stride + head * (2 * E * D), D, E, DP, EP)
    k += image * k_strides[0] + head * k_strides[1] + chunk * chunk_size * k_strides[2]
    v += image * v_strides[0] + head * v_strides[1] + chunk * chunk_size * v_strides[2]
    g1, g2, total = _surprise(k, v, k_strides, v_strides, w1, w2, begin, end, length, D, DP, EP, TILE)
    pid = tl.program_id(0).to(tl.int64)
    _store_rows(parts + pid * (2 * E * D), g1, g2, D, E, DP, EP)
    d = tl.arange(0, DP)
    tl.store(squares + pid * D + d, total / length, mask=d < D)


@triton.jit
def _surprise_backward(k, v, dk, dv, k_strides, v_strides, w1, w2, dg1, dg2, ds, begin, end, length, heads,
                       D: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    """Gradients of a chunk's k and v, stored, and of the memory, returned.

    From those of the gradient of Eq. 3 (``dg1``, ``dg2``) and of the mean squared errors (``ds``). The forward is
    recomputed tile by tile. All pointers are to the chunk's first token.
    """
    dw1 = tl.zeros((EP, DP), tl.float32)
    dw2 = tl.zeros((EP, DP), tl.float32)
    for start in range(begin, end, TILE):
        first = tl.cast(start, tl.int64)
        key = _load_tile(k + first * k_strides[2], k_strides[2], k_strides[3], length - start, D, DP, TILE)
        value = _load_tile(v + first * v_strides[2], v_strides[2], v_strides[3], length - start, D, DP, TILE)
        active, slope, curve = _gelu(_dot(key, tl.trans(w1)))
        error = key + _dot(active, w2) - value
        d_out = error * (2 / D)
        back = _dot(d_out, tl.trans(w2))  # gradient of Eq. 3 with respect to `active`

        # Through g1 = (back ⊙ slope)ᵀ·key and g2 = activeᵀ·d_out.
        d_inner = _dot(key, tl.trans(dg1))
        d_back = d_inner * slope
        d_hidden = d_inner * back * curve
        d_error = (2 / length) * ds[None, :] * error + (2 / D) * (_dot(active, dg2) + _dot(d_back, w2))
        d_active = _dot(d_out, tl.trans(dg2)) + _dot(d_error, tl.trans(w2))
        d_hidden += d_active * slope

        dw1 += _dot(tl.trans(d_hidden), key)
        dw2 += _dot(tl.trans(d_back), d_out) + _dot(tl.trans(active), d_error)
        d_key = d_error + _dot(back * slope, dg1) + _dot(d_hidden, w1)
        _store_tile(dk + first * (heads * D), d_key, heads * D, length - start, D, DP, TILE)
        _store_tile(dv + first * (heads * D), -d_error, heads * D, length - start, D, DP, TILE)
    return dw1, dw2


@triton.jit
def surprise_backward_kernel(k, v, memories, d_gradients, d_surprise, dk, dv, parts, k_strides, v_strides,
                             memory_stride, dk_stride, batch, heads, tokens, chunk_size, chunks, part_size,
                             D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
                             TILE: tl.constexpr):
    """Gradients of k and v (images ``dk_stride`` apart) and parts (splits, chunks, B, h, 2e, d) of the memory's."""
    image, head, chunk, begin, end, length = _place(tokens, chunk_size, chunks, part_size, batch, heads)
    w1, w2 = _load_rows(memories + image * memory_stride + head * (2 * E * D), D, E, DP, EP)
    place = (chunk * batch + image) * heads + head
    dg1, dg2 = _load_rows(d_gradients + place * (2 * E * D), D, E, DP, EP)
    d = tl.arange(0, DP)
    ds = tl.load(d_surprise + place * D + d, mask=d < D, other=0.0)
    k += image * k_strides[0] + head * k_strides[1] + chunk * chunk_size * k_strides[2]
    v += image * v_strides[0] + head * v_strides[1] + chunk * chunk_size * v_strides[2]
    offset = image * dk_stride + (chunk * chunk_size * heads + head) * D
    dw1, dw2 = _surprise_backward(k, v, dk + offset, dv + offset, k_strides, v_strides, w1, w2, dg1, dg2, ds,
                                  begin, end, length, heads, D, DP, EP, TILE)
    _store_rows(parts + tl.program_id(0).to(tl.int64) * (2 * E * D), dw1, dw2, D, E, DP, EP)


@triton.jit
def _load_coefficients(coefficients, head, heads, D: tl.constexpr, DP: tl.constexpr):
    """One head's step, momentum and decay, each (1, DP), of coefficients (3, h, d)."""
    d = tl.arange(0, DP)
    pointer = coefficients + head * D + d
    step = tl.load(pointer, mask=d < D, other=0.0)
    momentum = tl.load(pointer + heads * D, mask=d < D, other=0.0)
    decay = tl.load(pointer + 2 * heads * D, mask=d < D, other=0.0)
    return step[None, :], momentum[None, :], decay[None, :]


@triton.jit
def _bounded(g1, g2, step, inverse_bound):
    """Write u = θ ⊙ ∇L, scaled so that the norm of both halves together stays below the bound; and the scale.

    ``inverse_bound`` is 1 / c².
    """
    u1 = step * g1
    u2 = step * g2
    scale = tl.rsqrt(1 + (tl.sum(u1 * u1) + tl.sum(u2 * u2)) * inverse_bound)
    return u1 * scale, u2 * scale, scale


@triton.jit
def _write(m1, m2, p1, p2, g1, g2, step, momentum, decay, inverse_bound):
    """Eq. 4: P_t = η ⊙ P_{t-1} − u_t and M_t = (1 − α) ⊙ M_{t-1} + P_t."""
    u1, u2, _ = _bounded(g1, g2, step, inverse_bound)
    p1 = momentum * p1 - u1
    p2 = momentum * p2 - u2
    return (1 - decay) * m1 + p1, (1 - decay) * m2 + p2, p1, p2


@triton.jit
def write_kernel(parts, memories, momenta, gradients, coefficients, splits, pairs, chunks, inner_step, inverse_bound,
                 heads, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, KEEP: tl.constexpr):
    """Eq. 4 for ``chunks`` chunks, one head of one image (of ``pairs`` such) per program.

    Unless KEEP (0 or 1), momenta and gradients hold one entry, which each chunk overwrites.
    """
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    rows: tl.constexpr = 2 * E * D
    m1, m2 = _load_rows(memories + pair * rows, D, E, DP, EP)
    p1, p2 = _load_rows(momenta + pair * rows, D, E, DP, EP)
    for t in range(chunks):
        chunk = tl.cast(t, tl.int64)
        g1, g2 = _add_parts(parts + (chunk * pairs + pair) * rows, tl.cast(chunks, tl.int64) * pairs * rows, splits,
                            D, E, DP, EP)
        _store_rows(gradients + (chunk * KEEP * pairs + pair) * rows, g1, g2, D, E, DP, EP)
        step, momentum, decay = _load_coefficients(
            coefficients + (chunk * (pairs // heads) + image) * (3 * heads * D), head, heads, D, DP)
        m1, m2, p1, p2 = _write(m1, m2, p1, p2, g1, g2, step * inner_step, momentum, decay, inverse_bound)
        _store_rows(memories + ((chunk + 1) * pairs + pair) * rows, m1, m2, D, E, DP, EP)
        _store_rows(momenta + ((chunk + 1) * KEEP * pairs + pair) * rows, p1, p2, D, E, DP, EP)


@triton.jit
def _write_backward(dm1, dm2, dp1, dp2, m1, m2, p1, p2, g1, g2, coefficients, d_outputs, head, heads, inner_step,
                    inverse_bound, D: tl.constexpr, DP: tl.constexpr):
    """From the gradients of M_t and P_t, those of M_{t-1}, P_{t-1} and the gradient of Eq. 3, which are returned, and
    of what goes into the generators' sigmoids, stored in ``d_outputs`` (3, h, d).
    """
    step, momentum, decay = _load_coefficients(coefficients, head, heads, D, DP)
    v1, v2, scale = _bounded(g1, g2, step * inner_step, inverse_bound)
    dp1 += dm1
    dp2 += dm2
    # du of the bounded write v = u·scale(u), given dv = −dp; every factor stays below max(1, 1/c).
    inner = (tl.sum(dp1 * v1) + tl.sum(dp2 * v2)) * inverse_bound
    du1 = scale * (inner * v1 - dp1)
    du2 = scale * (inner * v2 - dp2)

    d = tl.arange(0, DP)
    pointer = d_outputs + head * D + d
    d_step = tl.sum(du1 * g1, 0) + tl.sum(du2 * g2, 0)
    d_momentum = tl.sum(dp1 * p1, 0) + tl.sum(dp2 * p2, 0)
    d_decay = -tl.sum(dm1 * m1, 0) - tl.sum(dm2 * m2, 0)
    tl.store(pointer, d_step * inner_step * tl.sum(step * (1 - step), 0), mask=d < D)
    tl.store(pointer + heads * D, d_momentum * tl.sum(momentum * (1 - momentum), 0), mask=d < D)
    tl.store(pointer + 2 * heads * D, d_decay * tl.sum(decay * (1 - decay), 0), mask=d < D)
    step *= inner_step
    return ((1 - decay) * dm1, (1 - decay) * dm2, momentum * dp1, momentum * dp2, step * du1, step * du2)


@triton.jit
def write_backward_kernel(parts, dm, dp, d_reads, memories, momenta, gradients, coefficients, d_gradients, d_outputs,
                          splits, pairs, chunks, inner_step, inverse_bound, heads,
                          D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr):
    """Backward of :func:`write_kernel`, last chunk first.

    ``dm`` and ``dp`` (B, h, 2e, d) carry the gradients of M and P from chunk to chunk and from launch to launch.
    ``parts`` (splits, B, h, 2e, d) of the gradient of the last M, and ``d_reads`` (chunks, B, h, 2e, d), those from
    the reads of each M_t, are added. ``memories`` and ``momenta`` start with those before the first chunk.
    """
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    rows: tl.constexpr = 2 * E * D
    dm1, dm2 = _load_rows(dm + pair * rows, D, E, DP, EP)
    dp1, dp2 = _load_rows(dp + pair * rows, D, E, DP, EP)
    more1, more2 = _add_parts(parts + pair * rows, tl.cast(pairs, tl.int64) * rows, splits, D, E, DP, EP)
    dm1 += more1
    dm2 += more2
    for i in range(chunks):
        chunk = tl.cast(chunks - 1 - i, tl.int64)
        place = (chunk * pairs + pair) * rows
        read1, read2 = _load_rows(d_reads + place, D, E, DP, EP)
        m1, m2 = _load_rows(memories + place, D, E, DP, EP)
        p1, p2 = _load_rows(momenta + place, D, E, DP, EP)
        g1, g2 = _load_rows(gradients + place, D, E, DP, EP)
        offset = (chunk * (pairs // heads) + image) * (3 * heads * D)
        dm1, dm2, dp1, dp2, dg1, dg2 = _write_backward(
            dm1 + read1, dm2 + read2, dp1, dp2, m1, m2, p1, p2, g1, g2, coefficients + offset, d_outputs + offset,
            head, heads, inner_step, inverse_bound, D, DP)
        _store_rows(d_gradients + place, dg1, dg2, D, E, DP, EP)
    _store_rows(dm + pair * rows, dm1, dm2, D, E, DP, EP)
    _store_rows(dp + pair * rows, dp1, dp2, D, E, DP, EP)


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
def _linear_backward(d_out, weight, hidden, d_x, rows, columns, BLOCK: tl.constexpr, GELU_INPUT: tl.constexpr):
    """d_x = weightᵀ·d_out, times GELU'(hidden) if asked for."""
    for column in range(0, columns, BLOCK):
        c = column + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in range(0, rows, BLOCK):
            r = row + tl.arange(0, BLOCK)
            value = tl.load(d_out + r, mask=r < rows, other=0.0)
            total += value[:, None] * tl.load(weight + r[:, None] * columns + c[None, :],
                                              mask=(r[:, None] < rows) & (c[None, :] < columns), other=0.0)
        result = tl.sum(total, 0)
        if GELU_INPUT:
            _, slope, _ = _gelu(tl.load(hidden + c, mask=c < columns, other=0.0))
            result *= slope
        tl.store(d_x + c, result, mask=c < columns)


@triton.jit
def fused_kernel(k, v, memories, momenta, gradients, surprises, hidden, coefficients, in_weight, in_bias, out_weight,
                 out_bias, k_strides, v_strides, batch, heads, tokens, chunk_size, inner_step, inverse_bound,
                 D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr,
                 BLOCK: tl.constexpr, KEEP: tl.constexpr):
    """All sequential writes of one image per program: the generators see all heads of an image, so heads cannot part.

    What one step hands to the next goes through the cache to other threads, hence the barriers. Unless KEEP (0 or 1),
    everything but the memories holds one entry, which each chunk overwrites.
    """
    image = tl.program_id(0).to(tl.int64)
    channels = heads * D
    rows: tl.constexpr = 2 * E * D
    d = tl.arange(0, DP)
    k += image * k_strides[0]
    v += image * v_strides[0]
    for t in range(tl.cdiv(tokens, chunk_size)):
        chunk = tl.cast(t, tl.int64)
        token = chunk * chunk_size
        length = tl.minimum(chunk_size, tokens - t * chunk_size)
        place = chunk * batch + image
        kept = chunk * KEEP * batch + image
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            w1, w2 = _load_rows(memories + (place * heads + head) * rows, D, E, DP, EP)
            g1, g2, total = _surprise(
                k + head * k_strides[1] + token * k_strides[2], v + head * v_strides[1] + token * v_strides[2],
                k_strides, v_strides, w1, w2, 0, length, length, D, DP, EP, TILE)
            _store_rows(gradients + (kept * heads + head) * rows, g1, g2, D, E, DP, EP)
            tl.store(surprises + kept * channels + head * D + d, total / length, mask=d < D)
        tl.debug_barrier()
        _linear(surprises + kept * channels, in_weight, in_bias, hidden + kept * 4 * channels, 4 * channels, channels,
                BLOCK, False, False)
        tl.debug_barrier()
        _linear(hidden + kept * 4 * channels, out_weight, out_bias, coefficients + kept * 3 * channels, 3 * channels,
                4 * channels, BLOCK, True, True)
        tl.debug_barrier()
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            g1, g2 = _load_rows(gradients + (kept * heads + head) * rows, D, E, DP, EP)
            m1, m2 = _load_rows(memories + (place * heads + head) * rows, D, E, DP, EP)
            p1, p2 = _load_rows(momenta + (kept * heads + head) * rows, D, E, DP, EP)
            step, momentum, decay = _load_coefficients(coefficients + kept * 3 * channels, head, heads, D, DP)
            m1, m2, p1, p2 = _write(m1, m2, p1, p2, g1, g2, step * inner_step, momentum, decay, inverse_bound)
            _store_rows(memories + ((place + batch) * heads + head) * rows, m1, m2, D, E, DP, EP)
            _store_rows(momenta + ((kept + KEEP * batch) * heads + head) * rows, p1, p2, D, E, DP, EP)
        tl.debug_barrier()


@triton.jit
def fused_backward_kernel(k, v, memories, momenta, gradients, hidden, coefficients, in_weight, out_weight, d_reads, dm,
                          dp, d_gradients, d_outputs, d_hidden, d_surprise, dk, dv, k_strides, v_strides, batch, heads,
                          tokens, chunk_size, inner_step, inverse_bound,
                          D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr,
                          BLOCK: tl.constexpr):
    """Backward of :func:`fused_kernel`, with the same division of work.

    ``dm`` and ``dp`` (B, h, 2e, d) carry the gradients of M and P from chunk to chunk, ``d_reads`` (n, B, h, 2e, d)
    those from the reads of each M_t, t > 0. ``d_gradients`` (B, h, 2e, d) and ``d_surprise`` (B, Cm) are scratch.
    """
    image = tl.program_id(0).to(tl.int64)
    channels = heads * D
    rows: tl.constexpr = 2 * E * D
    d = tl.arange(0, DP)
    k += image * k_strides[0]
    v += image * v_strides[0]
    chunks = tl.cdiv(tokens, chunk_size)
    for i in range(chunks):
        t = chunks - 1 - i
        chunk = tl.cast(t, tl.int64)
        token = chunk * chunk_size
        length = tl.minimum(chunk_size, tokens - t * chunk_size)
        place = chunk * batch + image
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            offset = (place * heads + head) * rows
            carried = (image * heads + head) * rows
            dm1, dm2 = _load_rows(dm + carried, D, E, DP, EP)
            dp1, dp2 = _load_rows(dp + carried, D, E, DP, EP)
            read1, read2 = _load_rows(d_reads + offset, D, E, DP, EP)
            m1, m2 = _load_rows(memories + offset, D, E, DP, EP)
            p1, p2 = _load_rows(momenta + offset, D, E, DP, EP)
            g1, g2 = _load_rows(gradients + offset, D, E, DP, EP)
            dm1, dm2, dp1, dp2, dg1, dg2 = _write_backward(
                dm1 + read1, dm2 + read2, dp1, dp2, m1, m2, p1, p2, g1, g2, coefficients + place * 3 * channels,
                d_outputs + place * 3 * channels, head, heads, inner_step, inverse_bound, D, DP)
            _store_rows(dm + carried, dm1, dm2, D, E, DP, EP)
            _store_rows(dp + carried, dp1, dp2, D, E, DP, EP)
            _store_rows(d_gradients + carried, dg1, dg2, D, E, DP, EP)
        tl.debug_barrier()
        _linear_backward(d_outputs + place * 3 * channels, out_weight, hidden + place * 4 * channels,
                         d_hidden + place * 4 * channels, 3 * channels, 4 * channels, BLOCK, True)
        tl.debug_barrier()
        _linear_backward(d_hidden + place * 4 * channels, in_weight, hidden, d_surprise + image * channels,
                         4 * channels, channels, BLOCK, False)
        tl.debug_barrier()
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            carried = (image * heads + head) * rows
            dm1, dm2 = _load_rows(dm + carried, D, E, DP, EP)
            w1, w2 = _load_rows(memories + (place * heads + head) * rows, D, E, DP, EP)
            dg1, dg2 = _load_rows(d_gradients + carried, D, E, DP, EP)
            ds = tl.load(d_surprise + image * channels + head * D + d, mask=d < D, other=0.0)
            offset = ((image * tokens + token) * heads + head) * D
            dw1, dw2 = _surprise_backward(
                k + head * k_strides[1] + token * k_strides[2], v + head * v_strides[1] + token * v_strides[2],
                dk + offset, dv + offset, k_strides, v_strides, w1, w2, dg1, dg2, ds, 0, length, length, heads,
                D, DP, EP, TILE)
            _store_rows(dm + carried, dm1 + dw1, dm2 + dw2, D, E, DP, EP)
        tl.debug_barrier()
