"""The memory as a layer: LayerNorm, projections, the memory itself and the output projection."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .exported import layer_exported
from .memory import Settings, run
from .op import check_tensors, refuse_state, resolve_backend
from .reference import layer_reference
from .types import LayerWeights, MemoryOptions, MemoryState, UpdateGenerators, is_exporting


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
        **options: Those of :class:`MemoryOptions`.

    Returns:
        tuple[Tensor, MemoryState | None]: Tokens (B, N, Cm), and the state if asked for.

    Raises:
        ValueError: As :func:`neural_memory`.
    """
    backend, options = resolve_backend(backend), MemoryOptions(**options).check()
    heads, d, _ = weights.w1.shape
    if x.dim() != 3 or x.size(2) != heads * d:
        raise ValueError(f'x must have shape (B, N, {heads * d}), got {tuple(x.shape)}')
    # Not weights.memory.generators: PyTorch 2.10 compiles no property of a property.
    check_tensors({'x': x, **dict(zip(LayerWeights._fields, weights))}, x.size(0), heads, d, weights.w1, weights.w2,
                  UpdateGenerators(*weights[-4:]), state)
    if is_exporting():
        refuse_state(state, options)
        return layer_exported(x, weights, eps, options), None
    if backend == 'reference' and x.numel():
        return layer_reference(x, weights, state, eps, options)
    inner_dtype = torch.promote_types(weights.query.dtype, torch.float32)
    return run([x], LayerWeights(*(w.to(inner_dtype) for w in weights)), state,
               Settings(False, eps, _product_dtype(weights.query), backend, options))


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What products with a weight come in, which autocast may have lowered: an empty one tells, on every device."""
    empty = weight.detach()[:0, :0]
    return torch.mm(empty, empty).dtype
