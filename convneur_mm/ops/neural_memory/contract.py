"""What a set of kernels provides: the rule of the memory for all chunks, in one direction and back.

There are three sets: :mod:`.pytorch` on any device, :mod:`.cpu` in C++ and :mod:`.triton` for CUDA. :mod:`.memory` asks
one of them and does everything else: segments, states, autocast, the generators' own gradients, second derivatives.

Shapes, in all of them: B images, h heads of d channels, Cm = h·d, e hidden units a head, N tokens of which the first
ones are written, T chunks written. Tokens are columns, (B, h, d, N): sums over a head's few channels then run over
contiguous numbers. Both weights of a memory live in one tensor of rows, cat(W1ᵀ, W2) (…, 2e, d), as every coefficient
acts on d.
"""
from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from .types import MemoryOptions, UpdateGenerators


class Written(NamedTuple):
    """What T writes leave behind; the backward needs nothing else, as it computes activations anew.

    Attributes:
        states (Tensor): For each chunk t what its coefficients multiply, (T + 1, 3, B, h, 2e, d): the gradient of Eq. 3
            over 2/d, the momentum P_t and the memory M_t. The gradient of the last one, t = T, is zero.
        surprises (Tensor): Mean squared errors, (T, B, Cm).
        pre_hidden (Tensor): The generators' hidden units before their GELU, (T, B, 4Cm).
        coefficients (Tensor): Step (without inner_step), momentum and decay, (T, B, 3Cm).
    """

    states: Tensor
    surprises: Tensor
    pre_hidden: Tensor
    coefficients: Tensor

    @property
    def memories(self) -> Tensor:
        """M_0 … M_T, (T + 1, B, h, 2e, d)."""
        return self.states[:, 2]


class WriteGradients(NamedTuple):
    """What comes back through T writes, beside the gradients of keys and values.

    Attributes:
        initial (Tensor | None): Of M_0 as what gradients are taken at, (h, 2e, d); None under the sequential rule.
        outputs (Tensor): Of the generators' outputs before the sigmoid, (T, B, 3Cm).
        pre_hidden (Tensor): Of their hidden units before the GELU, (T, B, 4Cm).
        rows (Tensor): Of the memory before the first chunk, (B, h, 2e, d).
        momentum (Tensor): Of the momentum before the first chunk, (B, h, 2e, d).
    """

    initial: Tensor | None
    outputs: Tensor
    pre_hidden: Tensor
    rows: Tensor
    momentum: Tensor


class Kernels(Protocol):
    """A set of kernels, which is a module. What it takes is float32, or what else its own ``refuses`` lets pass."""

    def refuses(self, tokens: Tensor, rows: Tensor, options: MemoryOptions) -> str | None:
        """Why the set cannot take tokens (B, h, d, N) with rows of weights (…, 2e, d), or None if it can."""

    def write_all(self, k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, rows: Tensor,
                  momentum: Tensor, options: MemoryOptions) -> Written:
        """Eqs. 3 and 4, chunk by chunk of ``options.chunk_size`` tokens.

        Args:
            k (Tensor): Keys of the tokens that are written, (B, h, d, ≤ N), perhaps none.
            v (Tensor): Their values, as ``k``.
            initial (Tensor): M_0, (h, 2e, d), where the parallel rule takes its gradients.
            generators (UpdateGenerators): Their weights.
            rows (Tensor): The memory before the first chunk, (B, h, 2e, d).
            momentum (Tensor): The momentum before the first chunk, as ``rows``.
            options (MemoryOptions): Those of the memory.
        """

    def write_all_backward(self, k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, written: Written,
                           grad_memories: Tensor, grad_momentum: Tensor | None, grad_k: Tensor, grad_v: Tensor,
                           options: MemoryOptions) -> WriteGradients:
        """Back through :meth:`write_all`, of at least one chunk; fills ``grad_k`` and ``grad_v``.

        ``grad_memories`` (T + 1, B, h, 2e, d) is what reads and the caller return to each memory, ``grad_momentum``
        (B, h, 2e, d) or None what comes back to P_T.
        """

    def read_all(self, q: Tensor, memories: Tensor, y: Tensor, options: MemoryOptions) -> None:
        """Eq. 2: fills ``y`` (B, h, d, N), which may be ``q``, from ``memories`` (T + 1, B, h, 2e, d)."""

    def read_all_backward(self, q: Tensor, memories: Tensor, grad_y: Tensor, grad_memories: Tensor, grad_q: Tensor,
                          y: Tensor | None, options: MemoryOptions) -> None:
        """Fills ``grad_q``, adds to ``grad_memories`` and fills ``y`` with what was read, if there is one."""

    def normalize_(self, z: Tensor, eps: float) -> Tensor:
        """Divides tokens by their lengths over d, at least ``eps``.

        Returns the factor (B, h, 1, N), negative where a token was too short to become a unit one.
        """

    def normalize_backward_(self, unit: Tensor, scale: Tensor, grad: Tensor) -> None:
        """Turns ``grad``, what comes back behind :meth:`normalize_`, into what comes back before it."""
