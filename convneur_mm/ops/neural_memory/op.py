"""The neural memory as an operator on queries, keys and values, and the choice between its implementations."""
from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .chunked import neural_memory_chunked
from .reference import neural_memory_reference
from .triton import neural_memory_triton
from .types import MemoryState, UpdateGenerators, no_autocast, written_tokens

BACKENDS = {'reference': neural_memory_reference, 'chunked': neural_memory_chunked, 'triton': neural_memory_triton}
UPDATE_RULES = ('sequential', 'parallel')
RETRIEVALS = ('previous', 'final')


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    generators: UpdateGenerators,
    *,
    chunk_size: int = 196,
    inner_step: float = 1.0,
    max_write_norm: float = 1.0,
    update_rule: str = 'sequential',
    retrieve: str = 'previous',
    state: MemoryState | None = None,
    return_state: bool = False,
    backend: str = 'auto',
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
        chunk_size (int): Tokens per chunk, L. The last chunk may be shorter. Defaults to 196.
        inner_step (float): Factor of the step θ. 0 never writes. Defaults to 1.0.
        max_write_norm (float): Bound of the norm of one head's write. Defaults to 1.0.
        update_rule (str): 'sequential' takes the gradient of Eq. 3 at M_{t-1}; 'parallel' takes those of all chunks
            at M_0. Defaults to 'sequential'.
        retrieve (str): 'previous' reads as Eq. 2; with 'final' every token reads M_T. Defaults to 'previous'.
        state (MemoryState | None): Memory and momentum to go on from, as returned by an earlier call. Two calls
            split at a chunk boundary equal one. Its dtype is the inner loop's. None starts at M_0 with no momentum.
            Defaults to None.
        return_state (bool): Whether the memory after the last chunk is returned. Defaults to False.
        backend (str): 'reference' (autograd for the inner gradient, slow), 'chunked' (closed forms in PyTorch, on a CPU
            in C++ where that is compiled), 'triton' (kernels for CUDA, not chosen by themselves as they have yet to run
            on a GPU) or 'auto': what the environment variable CONVNEUR_MEMORY_BACKEND names, or else 'chunked'.
            Defaults to 'auto'.

    Returns:
        tuple[Tensor, MemoryState | None]: ``y`` (B, h, N, d) in the dtype of ``q``, and the state in the inner
        loop's dtype if asked for.

    Raises:
        ValueError: For an option outside its range, tensors whose shapes, dtypes or devices do not fit together, or
            tensors that the backend asked for cannot take.
    """
    check_options(chunk_size, inner_step, max_write_norm, update_rule, retrieve, backend)
    backend = resolve_backend(backend)
    if q.dim() != 4:
        raise ValueError(f'q must have shape (B, h, N, d), got {tuple(q.shape)}')
    for name, x in (('k', k), ('v', v)):
        if x.shape != q.shape:
            raise ValueError(f'{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}')
    batch, heads, num_tokens, d = q.shape
    check_tensors(dict(q=q, k=k, v=v), batch, heads, d, w1, w2, generators, state)

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    with no_autocast(q):
        w1, w2 = w1.to(dtype), w2.to(dtype)
        num_written = written_tokens(num_tokens, chunk_size, retrieve, return_state)
        options = dict(
            chunk_size=chunk_size, inner_step=inner_step, max_write_norm=max_write_norm, update_rule=update_rule,
            retrieve=retrieve, return_state=return_state)
        if backend == 'chunked':
            options['num_written'] = num_written
        else:
            k, v = k[:, :, :num_written], v[:, :, :num_written]  # the last chunk's are not needed, see there
        if backend != 'triton':  # whose kernels convert what they load
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        generators = UpdateGenerators(*(x.to(dtype) for x in generators))
        if state is None:
            m1, m2 = (w.expand(batch, *w.shape) for w in (w1, w2))
            state = MemoryState(m1, m2, torch.zeros_like(m1), torch.zeros_like(m2))
        if not q.numel():
            # As in layers of PyTorch an empty input has an empty output and gradients of zero, which DDP waits for.
            unused = sum(x.flatten()[:0].sum() for x in (k, v, w1, w2, *generators, *state))
            return (q + unused).to(out_dtype), MemoryState(*(x.clone() for x in state)) if return_state else None
        y, new_state = BACKENDS[backend](q, k, v, w1, w2, generators, state, **options)
    return y.to(out_dtype), new_state


def resolve_backend(backend: str) -> str:
    """The implementation that ``backend`` stands for.

    Raises:
        ValueError: If it is 'auto' and the environment variable names none.
    """
    if backend != 'auto':
        return backend
    backend = os.environ.get('CONVNEUR_MEMORY_BACKEND', 'auto')
    if backend not in ('auto', *BACKENDS):
        raise ValueError(f'CONVNEUR_MEMORY_BACKEND must be one of {("auto", *BACKENDS)}, got {backend!r}')
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


def check_options(chunk_size: int, inner_step: float, max_write_norm: float, update_rule: str, retrieve: str,
                  backend: str) -> None:
    """Raises a ValueError that names the first option outside its range."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f'chunk_size must be an integer of at least 1, got {chunk_size!r}')
    if not (isinstance(inner_step, (int, float)) and 0 <= inner_step <= 1):
        raise ValueError(f'inner_step must be a number in [0, 1], got {inner_step!r}')
    if not (isinstance(max_write_norm, (int, float)) and 0 < max_write_norm < math.inf):
        raise ValueError(f'max_write_norm must be a positive finite number, got {max_write_norm!r}')
    for name, value, known in (('update_rule', update_rule, UPDATE_RULES), ('retrieve', retrieve, RETRIEVALS),
                               ('backend', backend, ('auto', *BACKENDS))):
        if value not in known:
            raise ValueError(f'{name} must be one of {known}, got {value!r}')
