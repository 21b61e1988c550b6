"""The loop over chunks and its derivative, as the operator ``convneur_mm::memory``."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .operators import implementation
from .reference import neural_memory_reference
from .rule import normalized, normalized_backward
from .types import MemoryOptions, MemoryState, UpdateGenerators, no_autocast, pack, unpack

# Names of a call's tensors, in the order in which all functions here take them. Queries, keys and values are columns of
# one tensor (B, 3, h, d, N), as one product computes them. M_0 is (h, 2e, d), memory and momentum are (n, 2e, d).
TENSORS = ('qkv', 'initial', 'memory', 'momentum', *UpdateGenerators._fields)


def run(qkv: Tensor, w1: Tensor, w2: Tensor, generators: UpdateGenerators, state: MemoryState | None, backend: str,
        options: MemoryOptions) -> tuple[Tensor, MemoryState | None]:
    """Return the values read by the queries, (B, h, d, N), and the state if asked for.

    Args:
        qkv (Tensor): Queries, keys and values, (B, 3, h, d, N), of any floating-point dtype.
        w1 (Tensor): First weight of M_0, (h, d, e), in the inner loop's dtype, as are all that follow.
        w2 (Tensor): Second weight of M_0, (h, e, d).
        generators (UpdateGenerators): Weights of the update generators.
        state (MemoryState | None): Initial memory and momentum; None for M_0 and zero momentum.
        backend (str): Name of the operators, see :func:`.operators.implementation`.
        options (MemoryOptions): The memory's options.
    """
    batch, _, heads = qkv.shape[:3]
    initial, memory, momentum = begin(batch, w1, w2, state)
    tensors = qkv, initial, memory, momentum, *generators
    if not qkv.numel():
        # As in PyTorch's layers, an empty input gives an empty output and zero gradients, for which DDP waits.
        y = qkv[:, 0] + sum(x.flatten()[:0].sum() for x in tensors)
        memory, momentum = memory.clone(), momentum.clone()
    else:
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        y, memory, momentum, *_ = memory_operator(*tensors, keep, backend, *options)
    if not options.return_state:
        return y, None
    return y, MemoryState(*(x for rows in (memory, momentum) for x in unpack(rows.unflatten(0, (batch, heads)))))


def begin(batch: int, w1: Tensor, w2: Tensor, state: MemoryState | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return M_0, (h, 2e, d), and the memory and momentum before the first chunk, (n, 2e, d)."""
    initial = pack(w1, w2)
    if state is None:
        memory = initial.expand(batch, -1, -1, -1).flatten(0, 1)
        return initial, memory, torch.zeros_like(memory)
    return initial, *(pack(*pair).flatten(0, 1) for pair in (state[:2], state[2:]))


def write_all(qkv: Tensor, initial: Tensor, memory: Tensor, momentum: Tensor, generators: UpdateGenerators,
              options: MemoryOptions, operators: Any) -> list[tuple[Tensor, ...]]:
    """Write all chunks whose writes are read, one after the other.

    Returns:
        list[tuple[Tensor, ...]]: For each of T written chunks: memory and momentum before it, (1, n, 2e, d), its
        gradient of Eq. 3, normalised if asked for, of the same shape, its errors, (1, n, d), its curvature, (1, n), or
        (1, 0) if steps are not normalised, the generators' hidden units, (B, 4Cm), and their outputs, (B, 3Cm). The
        last item is the pair of memory and momentum after the last chunk.
    """
    rule, found = (*generators, options.inner_step, options.max_write_norm), []
    memory, momentum = memory[None], momentum[None]
    keys, values = _written(qkv, options)
    if options.update_rule == 'parallel' and keys:
        surprises = zip(*(x.split(1) for x in _surprise(operators, options, *_points(qkv, initial, options))))
    for k, v in zip(keys, values):
        if options.update_rule == 'sequential':
            gradient, errors, curvature = _surprise(operators, options, k, v, memory, k.size(3), options.qk_norm_eps)
        else:
            gradient, errors, curvature = next(surprises)
        before = memory, momentum, gradient, errors, curvature
        memory, momentum, *generated = operators.step(gradient, errors, memory, momentum, *rule)
        found.append((*before, *generated))
    return [*found, (memory, momentum)]


def _surprise(operators: Any, options: MemoryOptions, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of Eq. 3, normalised if asked for, errors, and curvatures (T, n), or (T, 0) without."""
    scale = options.curvature_scale
    gradient, errors, curvature = operators.surprise(*args, scale > 0)
    if not scale:
        return gradient, errors, errors.new_empty(len(errors), 0)
    return normalized(gradient, curvature, scale), errors, curvature


def _surprise_backward(operators: Any, options: MemoryOptions, grad: Tensor, grad_errors: Tensor, gradient: Tensor,
                       curvature: Tensor, *args: Any) -> Tensor:
    """Return the gradient of the memories of :func:`_surprise`; fill those of the tokens, the last arguments."""
    scale, grad_curvature = options.curvature_scale, grad.new_empty(0)
    if scale:
        grad, grad_curvature = normalized_backward(grad, gradient, curvature, scale)
    *points, grad_k, grad_v = args
    return operators.surprise_backward(grad, grad_errors, grad_curvature, *points, scale > 0, grad_k, grad_v)


def _written(qkv: Tensor, options: MemoryOptions) -> list[tuple[Tensor, ...]]:
    """Return the written chunks of keys and of values."""
    length = options.written_tokens(qkv.size(-1))
    return [z[..., :length].split(options.chunk_size, dim=-1) if length else () for z in qkv[:, 1:].unbind(1)]


def _points(qkv: Tensor, initial: Tensor, options: MemoryOptions) -> tuple[Any, ...]:
    """Return the first arguments of ``surprise`` for the gradients of all chunks at M_0."""
    length = options.written_tokens(qkv.size(-1))
    points = initial.repeat(qkv.size(0), 1, 1).expand(options.num_written(qkv.size(-1)), -1, -1, -1)
    return *(z[..., :length] for z in qkv[:, 1:].unbind(1)), points, options.chunk_size, options.qk_norm_eps


def _readable(memories: Tensor, num_tokens: int, options: MemoryOptions) -> Tensor:
    """Return the memory read by each chunk, (chunks, n, 2e, d)."""
    chunks = math.ceil(num_tokens / options.chunk_size)
    return memories[-1].expand(chunks, -1, -1, -1) if options.retrieve == 'final' else memories[:chunks]


def _forward(tensors: Sequence[Tensor], keep: bool, backend: str, options: MemoryOptions) -> list[Tensor]:
    """Return reads, final memory and momentum, and, with ``keep``, the saved tensors besides the inputs."""
    qkv, initial, memory, momentum, *generators = tensors
    operators = implementation(backend, memory)
    options = options._replace(chunk_size=min(options.chunk_size, qkv.size(-1)))
    with no_autocast(qkv):
        *found, (memory, momentum) = write_all(
            qkv, initial, memory, momentum, UpdateGenerators(*generators), options, operators)
        memories = torch.cat([*(x[0] for x in found), memory])
        y = operators.read(qkv[:, 0], _readable(memories, qkv.size(-1), options), options.chunk_size,
                           options.qk_norm_eps)
    kept = []
    if keep and found:
        kept = [memories, *map(torch.cat, [*zip(*found)][1:])]
    elif keep:
        shapes = _kept_shapes(0, qkv, memory[0], generators, options)
        kept = [memories, *map(memories.new_empty, shapes[1:])]
    return [y, memory[0].clone(), momentum[0].clone(), *kept]


def _kept_shapes(chunks: int, qkv: Tensor, memory: Tensor, generators: Sequence[Tensor],
                 options: MemoryOptions) -> list[tuple[int, ...]]:
    """Return the shapes of the saved tensors of ``chunks`` chunks: the results of :func:`write_all`, concatenated.
    """
    rows, batch = memory.shape, qkv.size(0)
    return [(chunks + 1, *rows), (chunks, *rows), (chunks, *rows), (chunks, rows[0], rows[2]),
            (chunks, rows[0] if options.curvature_scale else 0),
            (chunks * batch, generators[1].size(0)), (chunks * batch, generators[3].size(0))]


def _backward(tensors: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor], backend: str,
              options: MemoryOptions) -> list[Tensor]:
    """Compute the gradients of all tensors."""
    qkv, initial, _, _, *generators = tensors
    memories, momenta, gradients, errors, curvatures, hidden, outputs = kept
    operators = implementation(backend, memories)
    options = options._replace(chunk_size=min(options.chunk_size, qkv.size(-1)))
    grad_y, (grad_memory, grad_momentum) = grads[0], (x[None] for x in grads[1:])
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_qkv[:, 1:, ..., options.written_tokens(qkv.size(-1)):].zero_()
    sequential, eps = options.update_rule == 'sequential', options.qk_norm_eps
    rule = generators[0], generators[2], options.inner_step, options.max_write_norm
    with no_autocast(qkv):
        grad_reads = operators.read_backward(grad_y, qkv[:, 0], _readable(memories, qkv.size(-1), options),
                                             options.chunk_size, eps, grad_qkv[:, 0]).split(1)
        if options.retrieve == 'final':
            grad_memory, grad_reads = grad_memory + torch.cat(grad_reads).sum(0, keepdim=True), ()
        elif len(grad_reads) > len(gradients):
            grad_memory = grad_memory + grad_reads[-1]
        chunks = list(zip(gradients.split(1), hidden.split(len(qkv)), outputs.split(len(qkv)), memories.split(1),
                          momenta.split(1)))
        tokens = list(zip(*_written(qkv, options), *_written(grad_qkv, options)))
        found = []
        for t in reversed(range(len(gradients))):
            *of_surprise, grad_memory, grad_momentum, grad_hidden, grad_output = operators.step_backward(
                grad_memory, grad_momentum, *chunks[t], *rule)
            if sequential:
                k, v, grad_k, grad_v = tokens[t]
                grad_memory = grad_memory + _surprise_backward(
                    operators, options, *of_surprise, chunks[t][0], curvatures[t:t + 1], k, v, memories[t:t + 1],
                    k.size(3), eps, grad_k, grad_v)
            if grad_reads:
                grad_memory = grad_memory + grad_reads[t]
            found.append((*of_surprise, grad_hidden, grad_output))
        grad_initial = torch.zeros_like(initial)
        grad_weights: Sequence[Tensor] = [torch.zeros_like(weight) for weight in generators]
        if found:
            grad_gradients, grad_errors, grad_hidden, grad_outputs = map(torch.cat, zip(*found[::-1]))
            grad_weights = (grad_hidden.mT @ errors.view(len(hidden), -1), grad_hidden.sum(0),
                            grad_outputs.mT @ F.gelu(hidden), grad_outputs.sum(0))
            if not sequential:
                length = options.written_tokens(qkv.size(-1))
                grad_points = _surprise_backward(
                    operators, options, grad_gradients, grad_errors, gradients, curvatures,
                    *_points(qkv, initial, options), *(z[..., :length] for z in grad_qkv[:, 1:].unbind(1)))
                grad_initial = grad_points.sum(0).view(-1, *initial.shape).sum(0)
    return [grad_qkv, grad_initial, grad_memory[0], grad_momentum[0].clone(), *grad_weights]


# ---- one operator with a derivative, as autograd and compilers would see the unrolled loop as thousands of operators


def _memory(*args: Any) -> list[Tensor]:
    tensors, (keep, backend, *options) = args[:len(TENSORS)], args[len(TENSORS):]
    y, memory, momentum, *kept = _forward(tensors, keep, backend, MemoryOptions(*options))
    # The saved tensors are concatenated: a graph for all sizes must not branch on whether there are 0 or 1 chunks.
    return [y, memory, momentum, *([torch.cat([x.flatten() for x in kept])] if keep else ())]


def _memory_backward(tensors: Sequence[Tensor], kept: Tensor, grads: Sequence[Tensor], backend: str,
                     *options: Any) -> list[Tensor]:
    qkv, _, memory, _, *generators = tensors
    options = MemoryOptions(*options)
    shapes = _kept_shapes(options.num_written(qkv.size(-1)), qkv, memory, generators, options)
    parts = [x.view(shape) for x, shape in zip(kept.split([math.prod(shape) for shape in shapes]), shapes)]
    return _backward(tensors, parts, grads, backend, options)


_KINDS = {int: 'SymInt', float: 'float', str: 'str', bool: 'bool'}
_SETTINGS = 'str backend, ' + ', '.join(
    f'{_KINDS[kind]} {name}' for name, kind in get_type_hints(MemoryOptions).items())
memory_operator = torch.library.custom_op(
    'convneur_mm::memory', _memory, mutates_args=(),
    schema=f'({", ".join(f"Tensor {name}" for name in TENSORS)}, bool keep, {_SETTINGS}) -> Tensor[]')
memory_backward_operator = torch.library.custom_op(
    'convneur_mm::memory_backward', _memory_backward, mutates_args=(),
    schema=f'(Tensor[] tensors, Tensor kept, Tensor[] grads, {_SETTINGS}) -> Tensor[]')


@memory_operator.register_fake
def _(*args):
    (qkv, _, memory, momentum, *generators), (keep, _, *options) = args[:len(TENSORS)], args[len(TENSORS):]
    options = MemoryOptions(*options)
    shapes = _kept_shapes(options.num_written(qkv.size(-1)), qkv, memory, generators, options)
    batch, _, heads, d, length = qkv.shape
    return [qkv.new_empty(batch, heads, d, length), *(x.new_empty(x.shape) for x in (memory, momentum)),
            *([memory.new_empty(sum(math.prod(shape) for shape in shapes))] if keep else ())]


@memory_backward_operator.register_fake
def _(tensors, *args):
    return [x.new_empty(x.shape) for x in tensors]


def _keep(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    ctx.settings = inputs[len(TENSORS) + 1:]
    ctx.save_for_backward(*inputs[:len(TENSORS)], *output[3:])


def _differentiate(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors  # read only once, as checkpointing recomputes them
    if torch.is_grad_enabled():  # with create_graph=True, a second derivative may be needed
        found = _differentiable_gradients(tensors, grads[:3], MemoryOptions(*ctx.settings[1:]))
    else:
        found = memory_backward_operator(tensors, kept, grads[:3], *ctx.settings)
    return *found, *[None] * (1 + len(ctx.settings))


def _differentiable_gradients(tensors: Sequence[Tensor], grads: Sequence[Tensor],
                              options: MemoryOptions) -> list[Tensor | None]:
    """Return gradients of ``tensors`` that can be differentiated again, None for those that require none."""
    # Views make each input a separate node: an input computed from another would else be counted twice.
    tensors = [x.view_as(x) for x in tensors]
    qkv, initial, memory, momentum, *generators = tensors
    batch, heads = qkv.size(0), qkv.size(2)
    state = MemoryState(*(x for rows in (memory, momentum) for x in unpack(rows.unflatten(0, (batch, heads)))))
    with no_autocast(qkv):
        y, state = neural_memory_reference(
            *qkv.mT.unbind(1), *unpack(initial), UpdateGenerators(*generators), state,
            options._replace(return_state=True))
    outputs = y.mT, pack(state.w1, state.w2).flatten(0, 1), pack(state.p1, state.p2).flatten(0, 1)
    outputs, grads = zip(*((output, grad) for output, grad in zip(outputs, grads) if output.requires_grad))
    wanted = [x for x in tensors if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in tensors]


memory_operator.register_autograd(_differentiate, setup_context=_keep)


def _flops(tensors: Sequence[Sequence[int]], options: MemoryOptions, read: int, surprise: int, step: int) -> int:
    """Return a call's FLOPs from its tensors' shapes and the number of products with each weight."""
    (batch, _, heads, d, length), (_, rows, _), _, _, in_weight, _, out_weight, _ = tensors
    token = batch * heads * d * rows  # two operations for each of e·d weights; rows is 2e
    generators = 2 * batch * (math.prod(in_weight) + math.prod(out_weight))
    return (token * (read * length + surprise * options.written_tokens(length))
            + generators * step * options.num_written(length))


@register_flop_formula(torch.ops.convneur_mm.memory)
def _(*args, out_shape: object = None) -> int:
    return _flops(args[:len(TENSORS)], MemoryOptions(*args[len(TENSORS) + 2:]), 2, 5, 1)


@register_flop_formula(torch.ops.convneur_mm.memory_backward)
def _(tensors: Sequence[Sequence[int]], kept: object, grads: object, backend: str, *options,
      out_shape: object = None) -> int:
    return _flops(tensors, MemoryOptions(*options), 5, 13, 2)
