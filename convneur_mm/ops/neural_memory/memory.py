"""The memory over a set of kernels, alone or as a layer: segments, states, autocast, gradients, and for compilers.

Around the memory a layer is bound by its tokens' way through the machine's memory rather than by arithmetic. So it has
a backward of its own and passes in segments, forward and backward: of several segments, nothing is kept in between but
what the writes leave behind, and nothing is as long as the input but the output and the input's gradient.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, pytorch, triton
from .contract import Written
from .reference import layer_reference, neural_memory_reference
from .types import (
    NORMALIZE_EPS,
    LayerWeights,
    MemoryOptions,
    MemoryState,
    MemoryWeights,
    check_inner_dtype,
    no_autocast,
    pack,
    unpack,
)

# Tokens of a segment, images times length. On a CPU its tensors should fit in the cache, and be small enough for the
# allocator to use them again: the system clears every page of a new large one. Where a backward pass will follow they
# are longer, as what keeps its projections for it, instead of computing them anew, is a single segment. On other
# devices only their memory counts.
CPU_SEGMENT_TOKENS, CPU_SEGMENT_TOKENS_TO_KEEP, SEGMENT_TOKENS = 2**12, 2**14, 2**19


class Settings(NamedTuple):
    """What is no tensor.

    Attributes:
        keep (bool): Whether a backward pass will follow.
        eps (float): Of the layer's LayerNorm.
        dtype (torch.dtype): Of the layer's matrix products.
        backend (str): Whose kernels: 'chunked' or 'triton'.
        options (MemoryOptions): Those of the memory.
    """

    keep: bool
    eps: float
    dtype: torch.dtype
    backend: str
    options: MemoryOptions


class Tensors(NamedTuple):
    """The tensors of a call.

    Attributes:
        rows (Tensor): The memory before the first token, (B, h, 2e, d).
        momentum (Tensor): Its momentum, as ``rows``.
        tokens (tuple[Tensor, ...]): x (B, N, Cm) of the layer; queries, keys, values (B, h, N, d) of the memory alone.
        weights (LayerWeights | MemoryWeights): Those of the layer, or of the memory alone.
    """

    rows: Tensor
    momentum: Tensor
    tokens: tuple[Tensor, ...]
    weights: LayerWeights | MemoryWeights

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Tensors:
        """From what autograd and operators take: all of them in a row."""
        rows, momentum, *others = tensors
        kind = LayerWeights if len(others) == 1 + len(LayerWeights._fields) else MemoryWeights
        number = len(others) - len(kind._fields)
        return cls(rows, momentum, tuple(others[:number]), kind(*others[number:]))


def run(tokens: Sequence[Tensor], weights: LayerWeights | MemoryWeights, state: MemoryState | None,
        settings: Settings) -> tuple[Tensor, MemoryState | None]:
    """Reads (B, h, N, d), or the layer's tokens (B, N, Cm), and the state if it is asked for.

    Args:
        tokens (Sequence[Tensor]): As in :class:`Tensors`.
        weights (LayerWeights | MemoryWeights): As there.
        state (MemoryState | None): Memory and momentum to begin with; None for M_0 and no momentum.
        settings (Settings): All else; ``keep`` is found out.
    """
    if state is None:
        rows = pack(weights.w1, weights.w2).expand(len(tokens[0]), -1, -1, -1)
        momentum = torch.zeros_like(rows)
    else:
        rows, momentum = pack(state.w1, state.w2), pack(state.p1, state.p2)
    tensors = rows, momentum, *tokens, *weights
    settings = settings._replace(keep=torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    if not tokens[0].numel():
        # As in layers of PyTorch an empty input has an empty output and gradients of zero, which DDP waits for.
        y = tokens[0] + sum(x.flatten()[:0].sum() for x in tensors)
        rows, momentum = rows.clone(), momentum.clone()
    elif torch.compiler.is_compiling():
        y, rows, momentum, *_ = operator_forward(tensors, *settings[:-1], *settings.options)
    else:
        y, rows, momentum = _Memory.apply(settings, *tensors)
    state = MemoryState(*unpack(rows), *unpack(momentum)) if settings.options.return_state else None
    return y.to(settings.dtype), state


def kernels_for(backend: str, tokens: Tensor, rows: Tensor, options: MemoryOptions) -> ModuleType:
    """The set of kernels for tokens (B, h, d, N) and a memory of ``rows``.

    Raises:
        ValueError: If they cannot go where the backend's name wants them to, or are in half precision.
    """
    check_inner_dtype(tokens=tokens, memory=rows)
    if backend == 'triton':
        reason = triton.refuses(tokens, rows, options)
        if reason:
            raise ValueError(f"backend 'triton' {reason}")
        return triton
    return pytorch if cpu.refuses(tokens, rows, options) else cpu


class _Memory(torch.autograd.Function):
    """Tensors in a row → reads or tokens, memory and momentum after the last chunk."""

    @staticmethod
    def forward(ctx, settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
        y, rows, momentum, *kept = _forward(tensors, settings)
        ctx.settings = settings
        ctx.save_for_backward(*tensors, *kept)
        return y, rows, momentum

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, number = ctx.saved_tensors, len(ctx.needs_input_grad) - 1  # once: checkpointing recomputes them
        tensors, kept = saved[:number], saved[number:]
        if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate once more
            return None, *_differentiable_gradients(tensors, grads, ctx.settings)
        return None, *_backward(tensors, kept, grads, ctx.settings)


def _forward(tensors: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Reads or tokens, memory and momentum afterwards, and what the backward needs beside the inputs if it is kept."""
    call = Tensors.of(tensors)
    function = _layer_forward if isinstance(call.weights, LayerWeights) else _memory_forward
    with no_autocast(call.tokens[0]):
        y, written, kept = function(call, settings)
    last = written[-1].states[-1]
    # Copies, as views would keep the states of all chunks alive.
    return [y, last[2].clone(), last[1].clone(), *([x for w in written for x in w] + kept if settings.keep else ())]


def _backward(tensors: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor],
              settings: Settings) -> list[Tensor]:
    """Gradients of all tensors."""
    call = Tensors.of(tensors)
    function = _layer_backward if isinstance(call.weights, LayerWeights) else _memory_backward
    with no_autocast(call.tokens[0]):
        rows, momentum, tokens, weights = function(call, kept, grads, settings)
    return [rows, momentum, *tokens, *weights]


# ---- the memory alone


def _memory_forward(call: Tensors, settings: Settings) -> tuple[Tensor, list[Written], list[Tensor]]:
    options, (q, k, v) = settings.options, _written(call, settings)
    kernels = kernels_for(settings.backend, q, call.rows, options)
    written = kernels.write_all(
        k, v, call.weights.initial, call.weights.generators, call.rows, call.momentum, options)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernels.read_all(q, written.memories, y, options)
    return y.mT, [written], []


def _memory_backward(call: Tensors, kept: Sequence[Tensor], grads: Sequence[Tensor],
                     settings: Settings) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    grad_y, grad_rows, grad_momentum = grads
    q, k, v = _written(call, settings)
    grad_tokens = [torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in call.tokens]
    weights = MemoryWeights(*(torch.zeros_like(w) for w in call.weights))
    rows, momentum = _segment_backward(
        (q, k, v), Written(*kept), (grad_y.mT, grad_rows, grad_momentum),
        [grad[..., :x.size(-1)] for grad, x in zip(grad_tokens, (q, k, v))], None, call.weights, weights,
        kernels_for(settings.backend, q, call.rows, settings.options), settings.options)
    return rows.clone(), momentum.clone(), [grad.mT for grad in grad_tokens], weights


def _written(call: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all tokens, keys and values of those that are written, (B, h, d, ≤ N)."""
    q, k, v = (x.mT for x in call.tokens)
    number = settings.options.written_tokens(q.size(-1))
    return q, k[..., :number], v[..., :number]


def _segment_backward(tokens: Sequence[Tensor], written: Written, grads: Sequence[Tensor],
                      grad_tokens: Sequence[Tensor], y: Tensor | None, weights: MemoryWeights, totals: MemoryWeights,
                      kernels: ModuleType, options: MemoryOptions) -> tuple[Tensor, Tensor]:
    """Back through the reads and writes of a segment.

    Fills ``grad_tokens``, those of queries, keys and values, and ``y``, if it is a tensor, with what was read; adds to
    ``totals`` the gradients of ``weights``; returns those of memory and momentum before the segment.
    """
    (q, k, v), (grad_q, grad_k, grad_v), (grad_y, grad_rows, grad_momentum) = tokens, grad_tokens, grads
    grad_memories = torch.zeros_like(written.memories, memory_format=torch.contiguous_format)
    kernels.read_all_backward(q, written.memories, grad_y, grad_memories, grad_q, y, options)
    grad_memories[-1] += grad_rows
    if not k.size(-1):
        return grad_memories[0], grad_momentum
    found = kernels.write_all_backward(k, v, weights.initial, weights.generators, written, grad_memories, grad_momentum,
                                       grad_k, grad_v, options)
    outputs, pre_hidden = found.outputs.flatten(0, 1), found.pre_hidden.flatten(0, 1)
    for total, grad in zip(totals.generators, (
            pre_hidden.mT @ written.surprises.flatten(0, 1), pre_hidden.sum(0),
            outputs.mT @ F.gelu(written.pre_hidden).flatten(0, 1), outputs.sum(0))):
        total += grad
    if found.initial is not None:
        for total, grad in zip(totals, unpack(found.initial)):
            total += grad
    return found.rows, found.momentum


# ---- the layer


def _layer_forward(call: Tensors, settings: Settings) -> tuple[Tensor, list[Written], list[Tensor]]:
    options, weights, (x,) = settings.options, call.weights, call.tokens
    memory, rows, momentum = weights.memory, call.rows, call.momentum
    initial, projections = memory.initial, weights.projections
    out, all_written = x.new_empty(x.shape, dtype=settings.dtype), []
    spans = list(_spans(x, settings))
    keep = settings.keep and len(spans) == 1
    product = None
    for span, num_written in spans:
        _, tokens, _, _ = _layer_norm(x[:, span], weights, settings)
        product = _project(tokens, projections, out=product)
        q, k, v = _by_head(product, len(memory.w1))
        kernels = kernels_for(settings.backend, q, rows, options)
        scales = [kernels.normalize_(z, NORMALIZE_EPS) for z in (q, k)]
        written = kernels.write_all(k[..., :num_written], v[..., :num_written], initial, memory.generators, rows,
                                    momentum, options)
        y = torch.empty_like(q, memory_format=torch.contiguous_format) if keep else q  # in the memory of the queries
        kernels.read_all(q, written.memories, y, options)
        torch.bmm(y.flatten(1, 2).mT.to(out.dtype), _batched(weights.proj.t(), x, out.dtype), out=out[:, span])
        rows, momentum = written.states[-1, 2], written.states[-1, 1]
        all_written.append(written)
    return out, all_written, [*scales, product] if keep else []


def _layer_backward(call: Tensors, kept: Sequence[Tensor], grads: Sequence[Tensor],
                    settings: Settings) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    options, weights, (x,) = settings.options, call.weights, call.tokens
    memory, projections, (grad_out, rows, momentum) = weights.memory, weights.projections, grads
    totals = LayerWeights(*(torch.zeros_like(weight) for weight in weights))
    grad_projections = torch.zeros_like(projections)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    spans, number = list(_spans(x, settings)), len(Written._fields)
    for i, (span, num_written) in reversed(list(enumerate(spans))):
        part, tokens, mean, rstd = _layer_norm(x[:, span], weights, settings)
        written = Written(*kept[i * number:(i + 1) * number])
        product = kept[-1] if len(spans) == 1 else _project(tokens, projections)
        q, k, v = _by_head(product, len(memory.w1))
        kernels = kernels_for(settings.backend, q, rows, options)
        q_scale, k_scale = kept[-3:-1] if len(spans) == 1 else (kernels.normalize_(z, NORMALIZE_EPS) for z in (q, k))

        grad_part, y = grad_out[:, span].mT, torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_y = torch.bmm(_batched(weights.proj.t(), x, settings.dtype), grad_part).to(q.dtype).view(q.shape)
        grad_product = torch.empty_like(product)
        grad_q, grad_k, grad_v = _by_head(grad_product, len(memory.w1))
        some = slice(0, num_written)
        rows, momentum = _segment_backward(
            (q, k[..., some], v[..., some]), written, (grad_y, rows, momentum),
            (grad_q, grad_k[..., some], grad_v[..., some]), y, memory, totals.memory, kernels, options)
        kernels.normalize_backward_(q, q_scale, grad_q)
        if num_written:
            for grad in (grad_k, grad_v):
                grad[..., num_written:].zero_()
            kernels.normalize_backward_(k, k_scale, grad_k)
        # Images are summed in the weights' dtype: under autocast the products are in half precision.
        totals.proj.add_(torch.bmm(grad_part, y.flatten(1, 2).mT.to(settings.dtype)).sum(0, dtype=totals.proj.dtype))
        channels = slice(None if num_written else x.size(2))  # of queries alone where nothing is written
        grad = grad_product[:, channels].to(settings.dtype)
        grad_projections[channels].add_(torch.bmm(grad, tokens).sum(0, dtype=totals.proj.dtype))
        grad_tokens = torch.bmm(grad.mT, _batched(projections[channels], x, settings.dtype))
        grad_x[:, span], grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_tokens.to(part.dtype), part, part.shape[-1:], mean, rstd, weights.norm_weight, weights.norm_bias,
            (True, True, True))
        totals.norm_weight.add_(grad_weight)
        totals.norm_bias.add_(grad_bias)
    query, key, value = grad_projections.chunk(3)
    return rows.clone(), momentum.clone(), [grad_x], totals._replace(
        query=query.clone(), key=key.clone(), value=value.clone())


def _layer_norm(x: Tensor, weights: LayerWeights, settings: Settings) -> tuple[Tensor, ...]:
    """``x`` in the parameters' precision, its LayerNorm in ``settings.dtype``, mean and inverse deviation."""
    x = x.to(weights.norm_weight.dtype)
    tokens, mean, rstd = torch.native_layer_norm(
        x, x.shape[-1:], weights.norm_weight, weights.norm_bias, settings.eps)
    return x, tokens.to(settings.dtype), mean, rstd


def _project(tokens: Tensor, projections: Tensor, out: Tensor | None = None) -> Tensor:
    """Queries, keys and values (B, 3Cm, N) of tokens (B, N, Cm) by ``projections`` (3Cm, Cm), in ``out`` if it fits."""
    if out is not None and (out.size(2), out.dtype) != (tokens.size(1), tokens.dtype):
        out = None
    return torch.bmm(_batched(projections, tokens, tokens.dtype), tokens.mT, out=out).to(projections.dtype)


def _by_head(product: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, (B, h, d, N) each, of what :func:`_project` returns."""
    return product.unflatten(1, (3, heads, -1)).unbind(1)


def _batched(weight: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).expand(len(x), -1, -1)


def _spans(x: Tensor, settings: Settings) -> Iterator[tuple[slice, int]]:
    """The segments of (B, N, Cm), in whole chunks but for the last one, and how many tokens of each are written."""
    (batch, num_tokens, _), options = x.shape, settings.options
    length = num_tokens
    if options.retrieve == 'previous':
        most = SEGMENT_TOKENS
        if x.device.type == 'cpu':
            most = CPU_SEGMENT_TOKENS_TO_KEEP if settings.keep else CPU_SEGMENT_TOKENS
        length = max(1, most // (batch * options.chunk_size)) * options.chunk_size
    for start in range(0, num_tokens, length):
        stop = min(start + length, num_tokens)
        # Of a segment with others behind it, all tokens are in whole chunks, and written.
        yield slice(start, stop), stop - start if stop < num_tokens else options.written_tokens(stop - start)


# ---- second derivatives, which the reference serves


def _differentiable_gradients(tensors: Sequence[Tensor], grads: Sequence[Tensor],
                              settings: Settings) -> tuple[Tensor | None, ...]:
    """Gradients of ``tensors`` that can be differentiated again, None where one requires none."""
    # Views are nodes of their own: what one input was made of another would else be counted twice.
    tensors = [x.view_as(x) for x in tensors]
    with no_autocast(tensors[0]):
        outputs = _reference(Tensors.of(tensors), settings)
    outputs, grads = zip(*((output, grad) for output, grad in zip(outputs, grads) if output.requires_grad))
    wanted = [x for x in tensors if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in tensors)


def _reference(call: Tensors, settings: Settings) -> tuple[Tensor, ...]:
    """What :func:`_forward` returns first, as autograd can record it."""
    state, options = MemoryState(*unpack(call.rows), *unpack(call.momentum)), settings.options
    if isinstance(call.weights, LayerWeights):
        y, state = layer_reference(*call.tokens, call.weights, state, settings.eps, options)
    else:
        y, state = neural_memory_reference(*call.tokens, call.weights, state, options)
    return (y, pack(state.w1, state.w2), pack(state.p1, state.p2)) if state else (y,)


# ---- for compilers, to which a call is one opaque operator: unrolled, its loops would be thousands of operations


def _operator_forward(tensors, keep, eps, dtype, backend, *options) -> list[Tensor]:
    return _forward(tensors, Settings(keep, eps, dtype, backend, MemoryOptions(*options)))


def _operator_backward(tensors, kept, grads, eps, dtype, backend, *options) -> list[Tensor]:
    return _backward(tensors, kept, grads, Settings(True, eps, dtype, backend, MemoryOptions(*options)))


def _keep(ctx, inputs, output) -> None:
    tensors, _, *ctx.settings = inputs
    ctx.number = len(tensors)
    ctx.save_for_backward(*tensors, *output[3:])


def _differentiate(ctx, grads) -> tuple:
    tensors, kept = ctx.saved_tensors[:ctx.number], ctx.saved_tensors[ctx.number:]
    return operator_backward(tensors, kept, grads[:3], *ctx.settings), *[None] * (1 + len(ctx.settings))


_SETTINGS = 'float eps, ScalarType dtype, str backend, ' + ', '.join(
    f'{kind.__name__} {name}' for name, kind in get_type_hints(MemoryOptions).items())
operator_forward = torch.library.custom_op(
    'convneur_mm::memory', _operator_forward, mutates_args=(),
    schema=f'(Tensor[] tensors, bool keep, {_SETTINGS}) -> Tensor[]')
operator_backward = torch.library.custom_op(
    'convneur_mm::memory_backward', _operator_backward, mutates_args=(),
    schema=f'(Tensor[] tensors, Tensor[] kept, Tensor[] grads, {_SETTINGS}) -> Tensor[]')
# The same code finds shapes, on tensors without numbers.
operator_forward.register_fake(_operator_forward)
operator_backward.register_fake(_operator_backward)
operator_forward.register_autograd(_differentiate, setup_context=_keep)
