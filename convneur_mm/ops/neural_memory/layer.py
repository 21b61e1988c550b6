"""The memory as a layer: LayerNorm, projections, the memory itself and the output projection.

Around the memory a layer is bound by its tokens' way through the machine's memory rather than by arithmetic. So where
'chunked' does the work, the layer has a backward of its own and passes in segments, forward and backward: of several
segments, nothing is kept in between but what the writes leave behind, and nothing is as long as the input but the
output and the input's gradient.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, cpu
from .differentiable import differentiable_gradients, neural_memory_differentiable, pack, unpack
from .op import check_options, check_tensors, neural_memory, resolve_backend
from .types import MemoryState, UpdateGenerators, is_compiling, no_autocast, written_tokens

# Queries and keys shorter than this are not stretched to unit length any further. It only matters for tokens that are
# zero, as every token of an image's padding is at initialisation: F.normalize's own 1e-12 multiplies their gradient by
# 1e12, which ends a detector's training in its first iteration. Ordinary norms are around 1.
NORMALIZE_EPS = 1e-2

# Tokens of a segment, images times length. On a CPU its tensors should fit in the cache, and be small enough for the
# allocator to use them again: the system clears every page of a new large one. Where a backward pass will follow they
# are longer, as what keeps its projections for it, instead of computing them anew, is a single segment. On other
# devices only their memory counts.
CPU_SEGMENT_TOKENS, CPU_SEGMENT_TOKENS_TO_KEEP, SEGMENT_TOKENS = 2**12, 2**14, 2**19


class LayerWeights(NamedTuple):
    """Parameters of the layer for Cm channels in h heads of d, e hidden units a head.

    Attributes:
        norm_weight (Tensor): Of the LayerNorm, (Cm,).
        norm_bias (Tensor): (Cm,).
        query (Tensor): (Cm, Cm), as are ``key``, ``value`` and ``proj``.
        key (Tensor): See ``query``.
        value (Tensor): See ``query``.
        proj (Tensor): See ``query``.
        w1 (Tensor): First weight of the initial memory M_0, (h, d, e).
        w2 (Tensor): Second weight of M_0, (h, e, d).
        in_weight (Tensor): See :class:`UpdateGenerators`, also for the rest.
        in_bias (Tensor): See there.
        out_weight (Tensor): See there.
        out_bias (Tensor): See there.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    proj: Tensor
    w1: Tensor
    w2: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    @property
    def generators(self) -> UpdateGenerators:
        return UpdateGenerators(self.in_weight, self.in_bias, self.out_weight, self.out_bias)


def neural_memory_layer(
    x: Tensor,
    weights: LayerWeights,
    *,
    eps: float,
    state: MemoryState | None = None,
    backend: str = 'auto',
    **options: Any,
) -> tuple[Tensor, MemoryState | None]:
    """:func:`neural_memory` between a LayerNorm, three projections to unit queries, unit keys and values, and a fourth.

    Args:
        x (Tensor): Tokens, (B, N, Cm), of which B and N may be 0.
        weights (LayerWeights): The layer's parameters.
        eps (float): Of the LayerNorm.
        state (MemoryState | None): See :func:`neural_memory`. Defaults to None.
        backend (str): See :func:`neural_memory`. Defaults to 'auto'.
        **options: All other options of :func:`neural_memory`.

    Returns:
        tuple[Tensor, MemoryState | None]: Tokens (B, N, Cm), and the state if asked for.

    Raises:
        ValueError: As :func:`neural_memory`.
    """
    check_options(backend=backend, **{name: x for name, x in options.items() if name != 'return_state'})
    backend = resolve_backend(backend)
    heads, d, _ = weights.w1.shape
    if x.dim() != 3 or x.size(2) != heads * d:
        raise ValueError(f'x must have shape (B, N, {heads * d}), got {tuple(x.shape)}')
    check_tensors({'x': x, **dict(zip(LayerWeights._fields, weights))}, len(x), heads, d, weights.w1, weights.w2,
                  weights.generators, state)
    # Parameters in half precision, not just autocast to it, are nobody's fast path.
    if x.numel() and backend == 'chunked' and weights.query.dtype in (torch.float32, torch.float64) and (
            HAS_CUSTOM_OPS or not is_compiling()):
        return _segmented(x, weights, eps, state, options)
    unused = 0
    if torch.is_grad_enabled() and not written_tokens(
            x.size(1), options['chunk_size'], options['retrieve'], options['return_state']):
        # A single chunk writes nothing, so keys, values and generators have no part in the output, and plain DDP
        # refuses parameters without a gradient. Sums of no elements tie them to the graph: nothing is computed, their
        # gradients are exact zeros.
        unused = sum(p.flatten()[:0].sum() for p in (weights.key, weights.value, *weights.generators))
    w1 = weights.w1 + unused

    def memory(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, MemoryState | None]:
        return neural_memory(q, k, v, w1, weights.w2, weights.generators, state=state, backend=backend, **options)

    # As the segmented layer, takes half precision where the parameters are in float32.
    return _plain(x.to(torch.promote_types(x.dtype, weights.query.dtype)), weights, eps, memory)


def _plain(x: Tensor, weights: LayerWeights, eps: float, memory: Callable) -> tuple[Tensor, MemoryState | None]:
    """The layer as it is written down; ``memory`` maps queries, keys and values (B, h, N, d) to reads and a state."""
    columns = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, eps).mT

    def project(weight: Tensor, normalize: bool = False) -> Tensor:
        """(B, h, N, d), (B, h, d, N) in memory; normalised over d, in at least float32, if asked for."""
        z = torch.bmm(weight.expand(len(x), -1, -1), columns).unflatten(1, (len(weights.w1), -1))
        if normalize:
            z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=2, eps=NORMALIZE_EPS)
        return z.mT

    y, state = memory(project(weights.query, True), project(weights.key, True), project(weights.value))
    y = y.mT.flatten(1, 2).mT.to(weights.proj.dtype)
    return torch.bmm(y, weights.proj.t().expand(len(x), -1, -1)), state


def _segmented(x: Tensor, weights: LayerWeights, eps: float, state: MemoryState | None,
               options: dict) -> tuple[Tensor, MemoryState | None]:
    """The same with the 'chunked' memory and a backward in closed form."""
    if state is None:
        initial = pack(weights.w1, weights.w2).expand(len(x), -1, -1, -1)
        rows, momentum = initial, torch.zeros_like(initial)
    else:
        rows, momentum = pack(state.w1, state.w2), pack(state.p1, state.p2)
    # A product of nothing, which shows what autocast makes of products.
    nothing = weights.query.detach()[:0, :0]
    dtype = torch.mm(nothing, nothing).dtype
    keep = torch.is_grad_enabled() and any(z.requires_grad for z in (x, rows, momentum, *weights))
    if is_compiling():
        settings = (eps, *(options[name] for name in OPTION_NAMES), dtype)
        y, rows, momentum, *_ = compiled_forward(x, rows, momentum, list(weights), keep, *settings)
    else:
        y, rows, momentum = _SegmentedLayer.apply(x, rows, momentum, *weights, keep, eps, options, dtype)
    return y, MemoryState(*unpack(rows), *unpack(momentum)) if options['return_state'] else None


class _SegmentedLayer(torch.autograd.Function):
    """x (B, N, Cm), memory and momentum (B, h, 2e, d), weights → tokens (B, N, Cm), and the other two afterwards."""

    @staticmethod
    def forward(ctx, x, rows, momentum, *arguments):
        weights, ctx.settings = LayerWeights(*arguments[:-4]), arguments[-3:]
        y, new_rows, new_momentum, *kept = _forward(x, rows, momentum, weights, arguments[-4], *ctx.settings)
        ctx.save_for_backward(x, rows, momentum, *weights, *kept)
        return y, new_rows, new_momentum

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once: checkpointing recomputes them
        inputs, kept = saved[:3 + len(LayerWeights._fields)], saved[3 + len(LayerWeights._fields):]
        if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate once more
            with no_autocast(inputs[0]):
                again = differentiable_gradients(partial(_differentiable, *ctx.settings), inputs, grads)
            return *again, *[None] * 4
        x, _, _, *weights = inputs
        return *_backward(x, LayerWeights(*weights), kept, grads, *ctx.settings), *[None] * 4


def _forward(x, rows, momentum, weights, keep, eps, options, dtype) -> tuple[Tensor, ...]:
    """Tokens, memory and momentum afterwards, and if ``keep`` what the backward needs besides the inputs."""
    spans, initial = list(_spans(x, options, keep)), pack(weights.w1, weights.w2)
    out, kept = x.new_empty(x.shape, dtype=dtype), []
    with no_autocast(x):
        for span, num_written in spans:
            _, tokens, _, _ = _layer_norm(x[:, span], weights, eps, dtype)
            projected = _project(tokens, weights)
            segment_options = dict(options, num_written=num_written)
            written = chunked.write_all(
                projected.k, projected.v, initial, weights.generators, rows, momentum, segment_options)
            # In the memory of the queries, unless they are kept.
            y = chunked.read_all(projected.q, written.states[:, 2], segment_options,
                                 out=None if keep and len(spans) == 1 else projected.q)
            torch.bmm(y.flatten(1, 2).mT.to(dtype), _batched(weights.proj.t(), x, dtype), out=out[:, span])
            rows, momentum = written.states[-1, 2], written.states[-1, 1]
            kept.extend(written if keep else ())
    kept.extend(projected if keep and len(spans) == 1 else ())
    # Copies, as views would keep the states of all chunks alive.
    return out, rows.clone(), momentum.clone(), *kept


class _Projected(NamedTuple):
    """What a segment is to the memory.

    Attributes:
        q (Tensor): Unit queries, (B, h, d, N).
        k (Tensor): Unit keys, (B, h, d, N).
        v (Tensor): Values, (B, h, d, N).
        q_scale (Tensor): What made the queries unit, (B, h, 1, N); negative where they were too short for that.
        k_scale (Tensor): The same of the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor


def _layer_norm(x: Tensor, weights: LayerWeights, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``x`` in the parameters' precision, its LayerNorm in ``dtype``, mean and inverse deviation, (B, N, ·) each."""
    x = x.to(weights.norm_weight.dtype)
    tokens, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, eps)
    return x, tokens.to(dtype), mean, rstd


def _project(tokens: Tensor, weights: LayerWeights) -> _Projected:
    q, k, v = (
        torch.bmm(_batched(weight, tokens, tokens.dtype), tokens.mT).to(weight.dtype).unflatten(
            1, (len(weights.w1), -1)) for weight in (weights.query, weights.key, weights.value))
    return _Projected(q, k, v, _normalize_(q), _normalize_(k))


def _normalize_(z: Tensor) -> Tensor:
    """Divides (B, h, d, N) by the lengths over d, at least NORMALIZE_EPS; returns :class:`_Projected`'s scale."""
    if cpu.usable(z):
        return cpu.kernels.normalize_(z, NORMALIZE_EPS)
    length = (z * z).sum(dim=2, keepdim=True).sqrt_()
    scale = length.clamp_min(NORMALIZE_EPS).reciprocal_()
    z *= scale
    return torch.where(length < NORMALIZE_EPS, -scale, scale)


def _normalize_backward_(unit: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    """The gradient before :func:`_normalize_`, in the memory of ``grad``, the one behind it."""
    if cpu.usable(unit):
        return cpu.kernels.normalize_backward_(unit, scale, grad)
    along = (grad * unit).sum(dim=2, keepdim=True).mul_(scale > 0)
    return grad.addcmul_(unit, along, value=-1).mul_(scale.abs())


def _batched(weight: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).expand(len(x), -1, -1)


def _backward(x, weights, kept, grads, eps, options, dtype) -> tuple[Tensor, ...]:
    """Gradients of x, of memory and momentum before the first token, and of the weights."""
    grad_out, grad_rows, grad_momentum = grads
    spans, num_kept = list(_spans(x, options, keep=True)), len(chunked.Written._fields)
    initial, heads = pack(weights.w1, weights.w2), len(weights.w1)
    totals = LayerWeights(*(torch.zeros_like(weight) for weight in weights))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    with no_autocast(x):
        for i, (span, num_written) in reversed(list(enumerate(spans))):
            part, tokens, mean, rstd = _layer_norm(x[:, span], weights, eps, dtype)
            q, k, v, q_scale, k_scale = _Projected(*kept[num_kept:]) if len(spans) == 1 else _project(tokens, weights)
            written = chunked.Written(*kept[i * num_kept:(i + 1) * num_kept])

            grad_part, y = grad_out[:, span].mT, torch.empty_like(q)
            grad_y = torch.bmm(_batched(weights.proj.t(), x, dtype), grad_part).to(q.dtype).unflatten(1, (heads, -1))
            grad_q, grad_k, grad_v, grad_initial, *grad_generators, grad_rows, grad_momentum = chunked.backward(
                q, k, v, initial, weights.generators, written, (grad_y, grad_rows, grad_momentum),
                dict(options, num_written=num_written), y=y)
            # Images are summed in the weights' dtype: under autocast the products are in half precision.
            totals.proj.add_(torch.bmm(grad_part, y.flatten(1, 2).mT.to(dtype)).sum(0, dtype=totals.proj.dtype))

            projections = [(_normalize_backward_(q, q_scale, grad_q), weights.query, totals.query)]
            if num_written:
                projections += [(_normalize_backward_(k, k_scale, grad_k), weights.key, totals.key),
                                (grad_v, weights.value, totals.value)]
                for total, grad in zip(totals.generators, grad_generators):
                    total += grad
            if grad_initial is not None:
                for total, grad in zip((totals.w1, totals.w2), unpack(grad_initial)):
                    total += grad
            grad_tokens = None
            for grad, weight, total in projections:
                grad, weight = grad.flatten(1, 2).to(dtype), _batched(weight, x, dtype)
                total += torch.bmm(grad, tokens).sum(0, dtype=total.dtype)
                grad_tokens = torch.bmm(grad.mT, weight) if grad_tokens is None else torch.baddbmm(
                    grad_tokens, grad.mT, weight, out=grad_tokens)
            grad_x[:, span], grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_tokens.to(part.dtype), part, part.shape[-1:], mean, rstd, weights.norm_weight, weights.norm_bias,
                (True, True, True))
            totals.norm_weight.add_(grad_weight)
            totals.norm_bias.add_(grad_bias)
    return grad_x, grad_rows.clone(), grad_momentum.clone(), *totals  # of one tensor until here


def _differentiable(eps, options, dtype, x, rows, momentum, *weights) -> tuple[Tensor, ...]:
    """The forward of :class:`_SegmentedLayer` as autograd can record it."""
    weights = LayerWeights(*weights)
    written = slice(written_tokens(x.size(1), options['chunk_size'], options['retrieve'], options['return_state']))

    def memory(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, MemoryState]:
        return neural_memory_differentiable(
            q, k[:, :, written], v[:, :, written], weights.w1, weights.w2, weights.generators,
            MemoryState(*unpack(rows), *unpack(momentum)), **dict(options, return_state=True))

    out, state = _plain(x.to(weights.query.dtype), weights, eps, memory)
    return out.to(dtype), pack(state.w1, state.w2), pack(state.p1, state.p2)


def _spans(x: Tensor, options: dict, keep: bool) -> Iterator[tuple[slice, int]]:
    """The segments of (B, N, Cm), in whole chunks but for the last one, and how many tokens of each are written."""
    (batch, num_tokens, _), chunk_size = x.shape, options['chunk_size']
    length = num_tokens
    if options['retrieve'] == 'previous':
        most = SEGMENT_TOKENS
        if x.device.type == 'cpu':
            most = CPU_SEGMENT_TOKENS_TO_KEEP if keep else CPU_SEGMENT_TOKENS
        length = max(1, most // (batch * chunk_size)) * chunk_size
    for start in range(0, num_tokens, length):
        stop = min(start + length, num_tokens)
        return_state = options['return_state'] or stop < num_tokens
        yield slice(start, stop), written_tokens(stop - start, chunk_size, options['retrieve'], return_state)


# For a compiler the layer is one opaque operator: unrolled, its loops would be thousands of operations to compile. What
# follows is that operator: schema, code, which also runs on tensors without numbers to find shapes, and backward.
HAS_CUSTOM_OPS = hasattr(torch.library, 'custom_op')
OPTION_NAMES = ('chunk_size', 'inner_step', 'max_write_norm', 'update_rule', 'retrieve', 'return_state')
_SETTINGS = ('float eps, int chunk_size, float inner_step, float max_write_norm, str update_rule, str retrieve, '
             'bool return_state, ScalarType dtype')


def _named(eps: float, *settings: Any) -> tuple[float, dict, torch.dtype]:
    """The operator's settings as the functions above take them: eps, options, dtype."""
    return eps, dict(zip(OPTION_NAMES, settings)), settings[-1]


def _opaque_forward(x, rows, momentum, weights, keep, *settings) -> list[Tensor]:
    return list(_forward(x, rows, momentum, LayerWeights(*weights), keep, *_named(*settings)))


def _opaque_backward(x, weights, kept, grads, *settings) -> list[Tensor]:
    return list(_backward(x, LayerWeights(*weights), kept, grads, *_named(*settings)))


def _keep(ctx, inputs, output) -> None:
    x, _, _, weights, _, *ctx.settings = inputs
    ctx.save_for_backward(x, *weights, *output[3:])


def _differentiate(ctx, grads) -> tuple:
    x, *saved = ctx.saved_tensors
    weights, kept = saved[:len(LayerWeights._fields)], saved[len(LayerWeights._fields):]
    grad_x, grad_rows, grad_momentum, *grad_weights = compiled_backward(x, weights, kept, grads[:3], *ctx.settings)
    return grad_x, grad_rows, grad_momentum, grad_weights, *[None] * (1 + len(ctx.settings))


if HAS_CUSTOM_OPS:
    compiled_forward = torch.library.custom_op(
        'convneur_mm::memory_layer', _opaque_forward, mutates_args=(),
        schema=f'(Tensor x, Tensor rows, Tensor momentum, Tensor[] weights, bool keep, {_SETTINGS}) -> Tensor[]')
    compiled_backward = torch.library.custom_op(
        'convneur_mm::memory_layer_backward', _opaque_backward, mutates_args=(),
        schema=f'(Tensor x, Tensor[] weights, Tensor[] kept, Tensor[] grads, {_SETTINGS}) -> Tensor[]')
    compiled_forward.register_fake(_opaque_forward)
    compiled_backward.register_fake(_opaque_backward)
    compiled_forward.register_autograd(_differentiate, setup_context=_keep)
