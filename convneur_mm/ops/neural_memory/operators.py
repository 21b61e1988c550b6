"""Whose operators a memory runs with.

Each of :mod:`.pytorch` (any device), :mod:`.cpu` (C++) and :mod:`.triton` (CUDA) has the same six functions:

===========  ===========================================================================================================
read         ``y = q + GELU(q·W1)·W2`` of each chunk at its memory (Eq. 2)
surprise     gradient of Eq. 3 at each chunk's memory, mean squared errors, and the curvature bound if it is asked for
step         update generators and Eq. 4 for one chunk: memory and momentum afterwards
*_backward   the vector-Jacobian product of each
===========  ===========================================================================================================

Shapes, for B images, h heads of d channels, n = B·h memories of e hidden units, N tokens in T chunks of ``chunk_size``:
tokens are columns, (B, h, d, N); memories are rows cat(W1ᵀ, W2), (T, n, 2e, d), gradients like them; errors are
(T, n, d), curvatures (T, n), or empty where they are not asked for. With ``eps`` above 0 queries and keys are divided
by their norms over d, or by ``eps``. Tokens may be in half precision beside memories in float32. The bound of a head's
curvature is ``2/d · Σ_i (‖a_i‖² + Σ_j slope_ij²·‖W2_j‖²·‖k_i‖²)``, with ``a = GELU(k·W1)`` and its slope. Gradients of
tokens are written to the arguments ``grad_*`` at the end; those of memories are returned.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor

from . import cpu, pytorch

BACKENDS = ('torch', 'cpp', 'triton', 'reference')


def implementation(backend: str, memory: Tensor) -> Any:
    """Return an object that has the six operators as functions.

    Args:
        backend (str): 'torch', 'cpp' or 'triton'; for all else, C++ where it takes the memory, and PyTorch elsewhere.
        memory (Tensor): Rows (…, 2e, d) of the memories that they will get.

    Raises:
        ValueError: If the backend asked for cannot take such a memory.
    """
    if backend == 'torch':
        return pytorch
    if backend not in ('cpp', 'triton'):
        return cpu.kernels if memory.is_cpu and cpu.refuses(memory) is None else pytorch
    if backend == 'cpp':
        module, found = cpu, cpu.kernels
    else:
        from . import triton
        module = found = triton
    reason = module.refuses(memory)
    if reason:
        raise ValueError(f'backend {backend!r} {reason}')
    return found
