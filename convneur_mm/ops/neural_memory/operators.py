"""The operators ``torch.ops.convneur_mm.*`` that the memory is made of: schemas, shapes without numbers, FLOPs.

===========  ===========================================================================================================
read         ``y = q + GELU(q·W1)·W2`` of each chunk at its memory (Eq. 2)
surprise     gradient of Eq. 3 at each chunk's memory, mean squared errors, and the curvature bound if it is asked for
step         update generators and Eq. 4 for one chunk: memory and momentum afterwards
*_backward   the vector-Jacobian product of each
===========  ===========================================================================================================

Shapes, for B images, h heads of d channels, n = B·h memories of e hidden units, N tokens in T chunks of ``chunk_size``:
tokens are columns, (B, h, d, N); memories are rows cat(W1ᵀ, W2), (T, n, 2e, d), gradients like them; errors are
(T, n, d), curvatures (T, n). With ``eps`` above 0 queries and keys are divided by their norms over d, or by ``eps``.
Tokens may be in half precision beside memories in float32. The bound of a head's curvature is
``2/d · Σ_i (‖a_i‖² + Σ_j slope_ij²·‖W2_j‖²·‖k_i‖²)``, with ``a = GELU(k·W1)`` and its slope.

PyTorch's dispatcher chooses among the implementations: :mod:`.cpu` for CPU tensors, :mod:`.pytorch` for all that this
does not take and for all other devices. :func:`implementation` gives those that a backend's name asks for, and spares
CPU tensors the dispatcher, whose way through Python costs as much as the work on a short chunk.
"""
from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, pytorch
from .types import is_watched

TOKENS, RULE = 'SymInt chunk_size, float eps', 'float inner_step, float max_write_norm'
SCHEMAS = dict(
    read=f'(Tensor q, Tensor memories, {TOKENS}) -> Tensor',
    read_backward=f'(Tensor grad_y, Tensor q, Tensor memories, {TOKENS}, Tensor(a!) grad_q) -> Tensor',
    surprise=f'(Tensor k, Tensor v, Tensor memories, {TOKENS}, bool curvature) -> (Tensor, Tensor, Tensor)',
    surprise_backward='(Tensor grad_gradient, Tensor grad_errors, Tensor grad_curvature, Tensor k, Tensor v, '
                      f'Tensor memories, {TOKENS}, bool curvature, Tensor(a!) grad_k, Tensor(b!) grad_v) -> Tensor',
    step='(Tensor gradient, Tensor errors, Tensor memory, Tensor momentum, Tensor in_weight, Tensor in_bias, '
         f'Tensor out_weight, Tensor out_bias, {RULE}) -> (Tensor, Tensor, Tensor, Tensor)',
    step_backward='(Tensor grad_memory, Tensor grad_momentum, Tensor gradient, Tensor hidden, Tensor outputs, '
                  f'Tensor memory, Tensor momentum, Tensor in_weight, Tensor out_weight, {RULE}) -> '
                  '(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
for _name, _schema in SCHEMAS.items():
    torch.library.define(f'convneur_mm::{_name}', _schema)
    torch.library.impl(f'convneur_mm::{_name}', 'CompositeExplicitAutograd')(getattr(pytorch, _name))
    torch.library.impl(f'convneur_mm::{_name}', 'CPU')(cpu.chooser(_name))
BACKENDS = ('torch', 'cpp', 'triton', 'reference')
_DISPATCHED = SimpleNamespace(**{name: getattr(torch.ops.convneur_mm, name).default for name in SCHEMAS})


def implementation(backend: str, memory: Tensor) -> Any:
    """Return an object that has the six operators as functions.

    Args:
        backend (str): 'torch', 'cpp' or 'triton'; of all else those that fit.
        memory (Tensor): Rows (…, 2e, d) of the memories that they will get.

    Raises:
        ValueError: If the backend asked for cannot take such a memory.
    """
    if backend == 'torch':
        return pytorch
    if backend not in ('cpp', 'triton'):
        fits = memory.is_cpu and not is_watched(memory) and cpu.refuses(memory) is None
        return cpu.kernels if fits else _DISPATCHED
    module = importlib.import_module('.cpu' if backend == 'cpp' else '.triton', __package__)
    reason = module.refuses(memory)
    if reason:
        raise ValueError(f'backend {backend!r} {reason}')
    return module.kernels if backend == 'cpp' else module


@torch.library.register_fake('convneur_mm::read')
def _(q: Tensor, *args) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake('convneur_mm::read_backward')
def _(grad_y: Tensor, q: Tensor, memories: Tensor, *args) -> Tensor:
    return memories.new_empty(memories.shape)


@torch.library.register_fake('convneur_mm::surprise')
def _(k: Tensor, v: Tensor, memories: Tensor, chunk_size: int, eps: float, curvature: bool) -> tuple[Tensor, ...]:
    chunks, n, rows, d = memories.shape
    return (memories.new_empty(memories.shape), memories.new_empty(chunks, n, d),
            memories.new_empty((chunks, n) if curvature else 0))


@torch.library.register_fake('convneur_mm::surprise_backward')
def _(grad_gradient: Tensor, *args) -> Tensor:
    return grad_gradient.new_empty(grad_gradient.shape)


@torch.library.register_fake('convneur_mm::step')
def _(gradient: Tensor, errors: Tensor, memory: Tensor, momentum: Tensor, in_weight: Tensor, in_bias: Tensor,
      out_weight: Tensor, out_bias: Tensor, *args) -> tuple[Tensor, ...]:
    batch = errors.numel() // in_weight.size(1)
    return (memory.new_empty(memory.shape), memory.new_empty(memory.shape), memory.new_empty(batch, in_bias.size(0)),
            memory.new_empty(batch, out_bias.size(0)))


@torch.library.register_fake('convneur_mm::step_backward')
def _(grad_memory: Tensor, grad_momentum: Tensor, gradient: Tensor, hidden: Tensor, outputs: Tensor, memory: Tensor,
      *args) -> tuple[Tensor, ...]:
    found = [x.new_empty(x.shape) for x in (memory, memory, memory, hidden, outputs)]
    return found[0], memory.new_empty(*memory.shape[:-2], memory.shape[-1]), *found[1:]


def _register_flops(name: str, tokens: int, products: int) -> None:
    """Count ``products`` products of a memory's weight, e·d numbers, with each token of the argument ``tokens``."""

    @register_flop_formula(getattr(torch.ops.convneur_mm, name))
    def _(*shapes: Sequence[int], out_shape: object = None, **kwargs) -> int:
        (batch, heads, d, length), rows = shapes[tokens], shapes[tokens + 1 + ('surprise' in name)][-2]
        return products * batch * heads * d * length * rows  # two operations a product, and rows are 2e


@register_flop_formula(torch.ops.convneur_mm.step)
def _(gradient, errors, memory, momentum, in_weight, in_bias, out_weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * out_shape[2][0] * (in_weight[0] * in_weight[1] + out_weight[0] * out_weight[1])


@register_flop_formula(torch.ops.convneur_mm.step_backward)
def _(grad_memory, grad_momentum, gradient, hidden, outputs, memory, momentum, in_weight, out_weight, *args,
      out_shape=None, **kwargs) -> int:
    return 2 * hidden[0] * (in_weight[0] * in_weight[1] + out_weight[0] * out_weight[1])


for _arguments in (('read', 0, 2), ('read_backward', 1, 5), ('surprise', 0, 5), ('surprise_backward', 3, 13)):
    _register_flops(*_arguments)
