"""Selection of the operators of a memory.

Each of :mod:`.pytorch` (any device), :mod:`.cpu` (C++) and :mod:`.triton` (CUDA) has the same six functions:

===========  ===========================================================================================================
read         ``y = q + GELU(q·W1)·W2`` of each chunk at its memory (Eq. 2)
surprise     gradient of Eq. 3 at each chunk's memory, mean squared errors, and the curvature bound if asked for
step         update generators and Eq. 4 for one chunk: memory and momentum afterwards
*_backward   vector-Jacobian product of each
===========  ===========================================================================================================

Shapes, for B images, h heads of d channels, n = B·h memories of e hidden units, N tokens in T chunks of ``chunk_size``:
tokens are columns, (B, h, d, N); memories are rows cat(W1ᵀ, W2), (T, n, 2e, d), gradients like them; errors are
(T, n, d), curvatures (T, n), or empty if not asked for. With ``eps`` above 0, queries and keys are divided by their
norms over d, or by ``eps`` where it is larger. Tokens may be in half precision with memories in float32. The bound of a
head's curvature is ``2/d · Σ_i (‖a_i‖² + Σ_j slope_ij²·‖W2_j‖²·‖k_i‖²)``, with ``a = GELU(k·W1)`` and its derivative
``slope``. Gradients of tokens are written to the last arguments ``grad_*``; those of memories are returned.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor

from . import cpu, pytorch

BACKENDS = ('torch', 'cpp', 'triton', 'reference')


def implementation(backend: str, memory: Tensor) -> Any:
    """Return an object that has the six operators as functions.

    Args:
        backend (str): 'torch', 'cpp' or 'triton'; any other selects C++ where it takes the memory, and else PyTorch.
        memory (Tensor): Rows (…, 2e, d) of the memories that will be passed.

    Raises:
        ValueError: If the requested backend cannot take such a memory.
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
