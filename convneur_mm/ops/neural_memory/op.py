"""The neural memory as a function of queries, keys and values, with checks of its arguments."""
from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .exported import neural_memory_exported
from .memory import run as run_loop
from .operators import BACKENDS
from .reference import neural_memory_reference
from .types import MemoryOptions, MemoryState, UpdateGenerators, check_choice, is_exporting, no_autocast


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
    """Read and rewrite a small memory per image, chunk by chunk (Eqs. 2-4).

    With fast weights ``M(z) = z + GELU(z·W1)·W2`` per head, for each chunk t of ``chunk_size`` tokens:

    - retrieve ``y_t = M_{t-1}(q_t)`` (Eq. 2)
    - surprise ``L_t = Σ_i mean_d (M(k_i) − v_i)²`` (Eq. 3)
    - with ``step_normalization`` a, divide ``∇L_t`` by ``1 + a · inner_step · κ_t``, κ_t a bound of its curvature
    - write ``u_t = θ_t ⊙ ∇L_t``, bounded per head: ``u_t / sqrt(1 + ‖u_t‖² / max_write_norm²)``
    - ``P_t = η_t ⊙ P_{t-1} − u_t``, ``M_t = (1 − α_t) ⊙ M_{t-1} + P_t`` (Eq. 4)

    θ, η and α come from the generators, whose inputs are each channel's mean squared error in the chunk. Everything is
    differentiable, also through the updates. Half-precision inputs are computed in float32, float64 stays float64, and
    autocast is off inside.

    Args:
        q (Tensor): Queries, (B, h, N, d); B and N may be 0. If one tensor is in float64, all must be.
        k (Tensor): Keys, (B, h, N, d).
        v (Tensor): Values, (B, h, N, d).
        w1 (Tensor): First weight of the learned initial memory M_0, (h, d, e).
        w2 (Tensor): Second weight of M_0, (h, e, d).
        generators (UpdateGenerators): Weights of the update generators for Cm = h·d channels.
        state (MemoryState | None): Memory and momentum to continue from, as returned by an earlier call, in the inner
            loop's dtype. Two calls split at a chunk boundary equal one. None starts at M_0 with zero momentum.
            Defaults to None.
        backend (str): Operators to use: 'torch' (closed forms in PyTorch, any device), 'cpp' (compiled, CPU), 'triton'
            (CUDA; it has not run on a GPU yet), 'reference' (autograd for the inner gradient, slow), or 'auto': the
            environment variable CONVNEUR_MEMORY_BACKEND if set, or else 'cpp' where it is compiled and takes the
            tensors, and 'torch' otherwise. Defaults to 'auto'.
        **options: Fields of :class:`MemoryOptions`.

    Returns:
        tuple[Tensor, MemoryState | None]: ``y`` (B, h, N, d) in the dtype of ``q``, and the state in the inner
        loop's dtype if asked for.

    Raises:
        ValueError: For an option outside its range, tensors whose shapes, dtypes or devices do not match, or tensors
            that the requested backend cannot take.
    """
    backend, options = resolve_backend(backend), MemoryOptions(**options).check()
    if q.dim() != 4:
        raise ValueError(f'q must have shape (B, h, N, d), got {tuple(q.shape)}')
    for name, x in (('k', k), ('v', v)):
        if x.shape != q.shape:
            raise ValueError(f'{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}')
    batch, heads, _, d = q.shape
    check_tensors(dict(q=q, k=k, v=v), batch, heads, d, w1, w2, generators, state)
    with no_autocast(q):
        qkv = torch.stack((q.mT, k.mT, v.mT), dim=1)
    y, state = _run(qkv, w1, w2, generators, state, backend, options)
    return y.mT.to(q.dtype), state


def run(qkv: Tensor, w1: Tensor, w2: Tensor, generators: UpdateGenerators, state: MemoryState | None, backend: str,
        options: MemoryOptions) -> tuple[Tensor, MemoryState | None]:
    """Run :func:`neural_memory`, with the same arguments but with tokens as columns.

    Queries, keys and values are one tensor (B, 3, h, d, N); reads are (B, h, d, N) in its dtype.
    """
    check_tensors(dict(qkv=qkv), qkv.size(0), qkv.size(2), qkv.size(3), w1, w2, generators, state)
    return _run(qkv, w1, w2, generators, state, resolve_backend(backend), options.check())


def _run(qkv: Tensor, w1: Tensor, w2: Tensor, generators: UpdateGenerators, state: MemoryState | None, backend: str,
         options: MemoryOptions) -> tuple[Tensor, MemoryState | None]:
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    w1, w2, *generators = (w.to(dtype) for w in (w1, w2, *generators))
    generators = UpdateGenerators(*generators)
    if is_exporting():
        if state is not None or options.return_state:
            raise ValueError('an exported memory begins anew with each image: call it without state and return_state')
        return neural_memory_exported(qkv, w1, w2, generators, options), None
    if backend == 'reference' and qkv.numel():
        if not options.written_tokens(qkv.size(-1)):
            # The generators do not affect the output then, and plain DDP refuses parameters without a gradient.
            w1 = w1 + sum(p.flatten()[:0].sum() for p in generators)
        y, state = neural_memory_reference(*qkv.mT.unbind(1), w1, w2, generators, state, options)
        return y.mT.to(qkv.dtype), state
    return run_loop(qkv, w1, w2, generators, state, backend, options)


def check_backend(backend: str, name: str = 'backend') -> None:
    """Raise a ValueError unless ``backend`` is a known name."""
    check_choice(name, backend, ('auto', *BACKENDS))


def resolve_backend(backend: str) -> str:
    """Return ``backend``, or, if it is 'auto', the value of CONVNEUR_MEMORY_BACKEND if set.

    Raises:
        ValueError: If either name is unknown.
    """
    check_backend(backend)
    if backend == 'auto':
        backend = os.environ.get('CONVNEUR_MEMORY_BACKEND', 'auto')
        check_backend(backend, 'CONVNEUR_MEMORY_BACKEND')
    return backend


def check_tensors(inputs: dict[str, Tensor], batch: int, heads: int, d: int, w1: Tensor, w2: Tensor,
                  generators: UpdateGenerators, state: MemoryState | None) -> None:
    """Raise a ValueError that names the first tensor that does not fit ``batch`` images of ``heads`` heads of ``d``.

    ``inputs`` holds the tokens first, then other tensors that must match their dtype and device. If one tensor is in
    float64, all must be, as others would be rounded. A state has the inner loop's dtype.
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
