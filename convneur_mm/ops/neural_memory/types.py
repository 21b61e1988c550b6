"""The memory's options, the tensors that belong together, and small functions that all implementations share."""
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Queries and keys shorter than this are not stretched to unit length any further. It only matters for tokens that are
# zero, as every token of an image's padding is at initialisation: F.normalize's own 1e-12 multiplies their gradient by
# 1e12, which ends a detector's training in its first iteration. Ordinary norms are around 1.
NORMALIZE_EPS = 1e-2

# The smallest bound whose gradient does not underflow in float32.
MIN_WRITE_NORM = 1e-6

UPDATE_RULES = ('sequential', 'parallel')
RETRIEVALS = ('previous', 'final')


class MemoryOptions(NamedTuple):
    """Options of the memory, in the order in which operators take them.

    Attributes:
        chunk_size (int): Tokens per chunk, L. The last chunk may be shorter. Defaults to 196.
        inner_step (float): Factor of the step θ. 0 never writes. Defaults to 1.0.
        max_write_norm (float): Bound of the norm of one head's write, at least 1e-6. A bound far above typical norms
            has no effect, and under the sequential rule a memory may then grow without end. Defaults to 1.0.
        update_rule (str): 'sequential' takes the gradient of Eq. 3 at M_{t-1}; 'parallel' takes those of all chunks
            at M_0. Defaults to 'sequential'.
        retrieve (str): 'previous' reads as Eq. 2; with 'final' every token reads M_T. Defaults to 'previous'.
        return_state (bool): Whether the memory after the last chunk is returned. Defaults to False.
        qk_norm_eps (float): If above 0, queries and keys are divided by their norms over d, or by this where their norm
            is smaller. Defaults to 0.0, which takes them as they are.
    """

    chunk_size: int = 196
    inner_step: float = 1.0
    max_write_norm: float = 1.0
    update_rule: str = 'sequential'
    retrieve: str = 'previous'
    return_state: bool = False
    qk_norm_eps: float = 0.0

    def check(self) -> MemoryOptions:
        """Return the options.

        Raises:
            ValueError: If an option is outside its range.
        """
        # A SymInt is that of a graph for all sizes, whose number of chunks is fixed.
        known = isinstance(self.chunk_size, (int, torch.SymInt)) and not isinstance(self.chunk_size, bool)
        if not known or self.chunk_size < 1:
            raise ValueError(f'chunk_size must be an integer of at least 1, got {self.chunk_size!r}')
        if not (isinstance(self.inner_step, (int, float)) and 0 <= self.inner_step <= 1):
            raise ValueError(f'inner_step must be a number in [0, 1], got {self.inner_step!r}')
        if not (isinstance(self.max_write_norm, (int, float)) and MIN_WRITE_NORM <= self.max_write_norm < math.inf):
            raise ValueError(f'max_write_norm must be a finite number of at least {MIN_WRITE_NORM}, got '
                             f'{self.max_write_norm!r}')
        if not (isinstance(self.qk_norm_eps, (int, float)) and 0 <= self.qk_norm_eps < math.inf):
            raise ValueError(f'qk_norm_eps must be a finite number of at least 0, got {self.qk_norm_eps!r}')
        check_choice('update_rule', self.update_rule, UPDATE_RULES)
        check_choice('retrieve', self.retrieve, RETRIEVALS)
        return self

    def written_tokens(self, num_tokens: int) -> int:
        """Return how many of the first tokens are written, see :func:`written_tokens`."""
        return written_tokens(num_tokens, self.chunk_size, self.retrieve, self.return_state)

    def num_written(self, num_tokens: int) -> int:
        """Return how many chunks are written, T; the number of tokens may be symbolic."""
        return (self.written_tokens(num_tokens) + self.chunk_size - 1) // self.chunk_size


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is known."""
    if value not in known:
        raise ValueError(f'{name} must be one of {known}, got {value!r}')


class MemoryState(NamedTuple):
    """Fast weights and momentum of a batch of memories, after some chunk t.

    B images, h heads of d channels, e hidden units per head.

    Attributes:
        w1 (Tensor): First fast weight of M_t, (B, h, d, e).
        w2 (Tensor): Second fast weight of M_t, (B, h, e, d).
        p1 (Tensor): Momentum P_t of ``w1``, (B, h, d, e).
        p2 (Tensor): Momentum P_t of ``w2``, (B, h, e, d).
    """

    w1: Tensor
    w2: Tensor
    p1: Tensor
    p2: Tensor


class UpdateGenerators(NamedTuple):
    """Weights of the update generators: Linear Cm→4Cm, GELU, Linear 4Cm→3Cm (step | momentum | decay), sigmoid.

    Attributes:
        in_weight (Tensor): (4Cm, Cm).
        in_bias (Tensor): (4Cm,).
        out_weight (Tensor): (3Cm, 4Cm).
        out_bias (Tensor): (3Cm,).
    """

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def written_tokens(num_tokens: int, chunk_size: int, retrieve: str = 'previous', return_state: bool = False) -> int:
    """Return how many of the first tokens are written to the memory; the sizes may be symbolic.

    The last chunk is not, as no token reads what it would write, unless the state is returned or every token reads M_T.
    """
    if return_state or retrieve == 'final' or isinstance(num_tokens, int) and not num_tokens:
        return num_tokens
    return (num_tokens - 1) // chunk_size * chunk_size


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces the call, and not ``torch.compile``, which some versions take for it."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def in_autocast(x: Tensor) -> bool:
    """Return whether autocast is on where a tensor is; it does not know the meta device, where FLOPs are counted."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Turn autocast off."""
    return torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext()


def check_inner_dtype(x: Tensor, name: str) -> None:
    """Raise a ValueError unless the dtype of a tensor is one of the inner loop's.

    The inner loop adds up to thousands of small writes, which half precision would round away, and squares what it adds
    up, which overflows in float16. So it runs in float32, or float64, whatever autocast does around it.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'the inner loop of a memory runs in float32 or float64, got {name} in {x.dtype}')


def pack(w1: Tensor, w2: Tensor) -> Tensor:
    """Return both weights (…, d, e) and (…, e, d) of a memory as rows, (…, 2e, d)."""
    return torch.cat((w1.mT, w2), dim=-2)


def unpack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights that :func:`pack` made ``rows`` of."""
    w1, w2 = rows.chunk(2, dim=-2)
    return w1.mT, w2
