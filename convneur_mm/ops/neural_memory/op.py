"""The neural memory as an operator on queries, keys and values, and the choice between its implementations."""
from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .exported import neural_memory_exported
from .memory import Settings, run
from .reference import neural_memory_reference
from .types import MemoryOptions, MemoryState, MemoryWeights, UpdateGenerators, check_choice, is_exporting

BACKENDS = ('reference', 'chunked', 'triton')


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    generators: UpdateGenerators,
    *,
    state: MemoryState | None = None,
    backend: str = 'auto',
    **options: Any,
) -> tuple[Tensor, MemoryState | None]:
    """Reads and rewrites a small per-image memory, chunk by chunk (Eqs. 2-4).

    With fast weights ``M(z) = z + GELU(z·W1)·W2`` per head, for each chunk t of ``chunk_size`` tokens:

    - retrieve ``y_t = M_{t-1}(q_t)`` (Eq. 2)
    - surprise ``L_t = Σ_i mean_d (M(k_i) − v_i)²`` (Eq. 3)
    - write ``u_t = θ_t ⊙ ∇L_t``, bounded per head: ``u_t / sqrt(1 + ‖u_t‖² / max_write_norm²)``
    - ``P_t = η_t ⊙ P_{t-1} − u_t``, ``M_t = (1 − α_t) ⊙ M_{t-1} + P_t`` (Eq. 4)

    θ, η and α come from the generators, which see each channel's mean squared error in the chunk. Everything is
    differentiable, also through the updates. Half-precision inputs are computed in float32, float64 stays float64,
    and autocast does not reach inside.

    Args:
        q (Tensor): Queries, (B, h, N, d), of which B and N may be 0. Float64 goes with float64 alone.
        k (Tensor): Keys, (B, h, N, d).
        v (Tensor): Values, (B, h, N, d).
        w1 (Tensor): First weight of the learned initial memory M_0, (h, d, e).
        w2 (Tensor): Second weight of M_0, (h, e, d).
        generators (UpdateGenerators): Weights of the update generators for Cm = h·d channels.
        state (MemoryState | None): Memory and momentum to go on from, as returned by an earlier call. Two calls
            split at a chunk boundary equal one. Its dtype is the inner loop's. None starts at M_0 with no momentum.
            Defaults to None.
        backend (str): 'reference' (autograd for the inner gradient, slow), 'chunked' (closed forms in PyTorch, on a CPU
            in C++ where that is compiled), 'triton' (kernels for CUDA, not chosen by themselves as they have yet to run
            on a GPU) or 'auto': what the environment variable CONVNEUR_MEMORY_BACKEND names, or else 'chunked'.
            Defaults to 'auto'.
        **options: Those of :class:`MemoryOptions`.

    Returns:
        tuple[Tensor, MemoryState | None]: ``y`` (B, h, N, d) in the dtype of ``q``, and the state in the inner
        loop's dtype if asked for.

    Raises:
        ValueError: For an option outside its range, tensors whose shapes, dtypes or devices do not fit together, or
            tensors that the backend asked for cannot take.
    """
    backend, options = resolve_backend(backend), MemoryOptions(**options).check()
    if q.dim() != 4:
        raise ValueError(f'q must have shape (B, h, N, d), got {tuple(q.shape)}')
    for name, x in (('k', k), ('v', v)):
        if x.shape != q.shape:
            raise ValueError(f'{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}')
    batch, heads, _, d = q.shape
    check_tensors(dict(q=q, k=k, v=v), batch, heads, d, w1, w2, generators, state)
    weights = MemoryWeights(w1, w2, *generators)
    if is_exporting():
        refuse_state(state, options)
        return neural_memory_exported(q, k, v, weights, options).to(q.dtype), None
    if backend == 'reference' and q.numel():
        y, state = neural_memory_reference(q, k, v, weights, state, options)
        return y.to(q.dtype), state
    inner_dtype = torch.promote_types(q.dtype, torch.float32)
    return run([x.to(inner_dtype) for x in (q, k, v)], MemoryWeights(*(w.to(inner_dtype) for w in weights)), state,
               Settings(False, 0.0, q.dtype, backend, options))


def refuse_state(state: MemoryState | None, options: MemoryOptions) -> None:
    """Raises a ValueError if a memory that is exported is to go on from a state or return one."""
    if state is not None or options.return_state:
        raise ValueError('an exported memory begins anew with each image: call it without state and return_state')


def check_backend(backend: str, name: str = 'backend') -> None:
    """Raises a ValueError unless ``backend`` is known."""
    check_choice(name, backend, ('auto', *BACKENDS))


def resolve_backend(backend: str) -> str:
    """The implementation that ``backend`` stands for.

    Raises:
        ValueError: If neither it nor, for 'auto', the environment variable names one.
    """
    check_backend(backend)
    if backend == 'auto':
        backend = os.environ.get('CONVNEUR_MEMORY_BACKEND', 'auto')
        check_backend(backend, 'CONVNEUR_MEMORY_BACKEND')
    return 'chunked' if backend == 'auto' else backend


def check_tensors(inputs: dict[str, Tensor], batch: int, heads: int, d: int, w1: Tensor, w2: Tensor,
                  generators: UpdateGenerators, state: MemoryState | None) -> None:
    """Raises a ValueError that names the first tensor that does not fit ``batch`` images of ``heads`` heads of ``d``.

    ``inputs`` holds the tokens first, and what else must fit their dtype and device. Float64 goes with float64 alone,
    as all else would round it. A state has the inner loop's dtype.
    """
    if w1.dim() != 3 or w1.shape[:2] != (heads, d) or not w1.numel():
        raise ValueError(f'w1 must have shape {(heads, d, "e")} and no empty dimension, got {tuple(w1.shape)}')
    hidden, channels = w1.size(-1), heads * d
    weights = {'w1': w1, 'w2': w2, **{f'generators.{n}': x for n, x in zip(UpdateGenerators._fields, generators)}}
    states = {f'state.{n}': x for n, x in zip(MemoryState._fields, state or ())}
    first, second = (heads, d, hidden), (heads, hidden, d)
    shapes = (first, second, (4 * channels, channels), (4 * channels,), (3 * channels, 4 * channels), (3 * channels,),
              *((batch, *first), (batch, *second)) * 2)
    for (name, x), shape in zip({**weights, **states}.items(), shapes):
        if x.shape != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(x.shape)}')
    (tokens_name, tokens), *_ = inputs.items()
    inner_dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    for name, x in {**inputs, **weights, **states}.items():
        if x.device != tokens.device:
            raise ValueError(f'{name} must be on {tokens.device} like {tokens_name}, got {x.device}')
        if not x.is_floating_point():
            raise ValueError(f'{name} must have a floating-point dtype, got {x.dtype}')
        if torch.float64 in (x.dtype, inner_dtype) and x.dtype != inner_dtype:
            raise ValueError(f'{tokens_name} of dtype {tokens.dtype} and {name} of dtype {x.dtype} do not go together')
    for name, x in states.items():
        if x.dtype != inner_dtype:
            raise ValueError(f'{name} must have dtype {inner_dtype}, that of the inner loop, got {x.dtype}')
