"""The memory's options, its named tuples of tensors, and small functions shared by all implementations."""
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Queries and keys with a norm below this are divided by it, not by their norm. This only matters for zero tokens, as
# are all those of an image's padding at initialisation: F.normalize's default of 1e-12 multiplies their gradient by
# 1e12, so that a detector's training fails in its first iteration. Ordinary norms are around 1.
NORMALIZE_EPS = 1e-2

# The smallest bound whose gradient does not underflow in float32.
MIN_WRITE_NORM = 1e-6

UPDATE_RULES = ('sequential', 'parallel')
RETRIEVALS = ('previous', 'final')


class MemoryOptions(NamedTuple):
    """Options of the memory, in the order of the operators' arguments.

    Attributes:
        chunk_size (int): Tokens per chunk, L. The last chunk may be shorter. Defaults to 196.
        inner_step (float): Factor of the step θ. 0 disables writing. Defaults to 1.0.
        max_write_norm (float): Bound on the norm of one head's write, at least 1e-6. A bound far above typical norms
            has no effect, and under the sequential rule a memory may then grow without limit. Defaults to 1.0.
        update_rule (str): 'sequential' takes the gradient of Eq. 3 at M_{t-1}; 'parallel' takes those of all chunks
            at M_0. Defaults to 'sequential'.
        retrieve (str): 'previous' reads as in Eq. 2; with 'final' every token reads M_T. Defaults to 'previous'.
        return_state (bool): Whether the memory after the last chunk is returned. Defaults to False.
        qk_norm_eps (float): If above 0, queries and keys are divided by their norms over d, or by this value where it
            is larger. Defaults to 0.0, which leaves them unchanged.
        step_normalization (float): If above 0, a chunk's gradient of Eq. 3 is divided by
            ``1 + step_normalization · inner_step · κ``, where κ bounds the curvature of the loss along a head's memory
            (:mod:`.operators`). As in normalised LMS, the step then shrinks where the loss is steep, and a write cannot
            overshoot by more than a factor of ``1 / step_normalization``. Defaults to 0.0, the paper's step.
    """

    chunk_size: int = 196
    inner_step: float = 1.0
    max_write_norm: float = 1.0
    update_rule: str = 'sequential'
    retrieve: str = 'previous'
    return_state: bool = False
    qk_norm_eps: float = 0.0
    step_normalization: float = 0.0

    def check(self) -> MemoryOptions:
        """Check the options and return them.

        Raises:
            ValueError: If an option is outside its range.
        """
        # chunk_size is a SymInt in an exported graph for all sizes with a fixed number of chunks.
        known = isinstance(self.chunk_size, (int, torch.SymInt)) and not isinstance(self.chunk_size, bool)
        if not known or self.chunk_size < 1:
            raise ValueError(f'chunk_size must be an integer of at least 1, got {self.chunk_size!r}')
        if not (isinstance(self.inner_step, (int, float)) and 0 <= self.inner_step <= 1):
            raise ValueError(f'inner_step must be a number in [0, 1], got {self.inner_step!r}')
        if not (isinstance(self.max_write_norm, (int, float)) and MIN_WRITE_NORM <= self.max_write_norm < math.inf):
            raise ValueError(f'max_write_norm must be a finite number of at least {MIN_WRITE_NORM}, got '
                             f'{self.max_write_norm!r}')
        for name in ('qk_norm_eps', 'step_normalization'):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f'{name} must be a finite number of at least 0, got {value!r}')
        check_choice('update_rule', self.update_rule, UPDATE_RULES)
        check_choice('retrieve', self.retrieve, RETRIEVALS)
        return self

    def written_tokens(self, num_tokens: int) -> int:
        """Return the number of leading tokens that are written, see :func:`written_tokens`."""
        return written_tokens(num_tokens, self.chunk_size, self.retrieve, self.return_state)

    @property
    def curvature_scale(self) -> float:
        """Return the factor of the curvature in a normalised step; 0 if steps are not normalised."""
        return self.step_normalization * self.inner_step

    def num_written(self, num_tokens: int) -> int:
        """Return the number of chunks that are written, T; the number of tokens may be symbolic."""
        return (self.written_tokens(num_tokens) + self.chunk_size - 1) // self.chunk_size


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is known."""
    if value not in known:
        raise ValueError(f'{name} must be one of {known}, got {value!r}')


class MemoryState(NamedTuple):
    """Fast weights and momentum of a batch of memories after a chunk t.

    There are B images and h heads of d channels, with e hidden units per head.

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
    """Return the number of leading tokens that are written to the memory; the sizes may be symbolic.

    The last chunk is written only if the state is returned or every token reads M_T, as else no token reads that write.
    """
    if return_state or retrieve == 'final' or isinstance(num_tokens, int) and not num_tokens:
        return num_tokens
    return (num_tokens - 1) // chunk_size * chunk_size


def is_exporting() -> bool:
    """Return whether ``torch.export``, not ``torch.compile``, traces the call; some versions confuse the two."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def in_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for a tensor's device; the meta device, used to count FLOPs, has no autocast."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context manager that turns autocast off on a tensor's device."""
    return torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext()


def check_inner_dtype(x: Tensor, name: str) -> None:
    """Raise a ValueError unless a tensor has a dtype of the inner loop, float32 or float64.

    The inner loop sums up to thousands of small writes, which half precision would round away, and squares the sum,
    which overflows in float16. So it runs in float32 or float64 even under autocast.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'the inner loop of a memory runs in float32 or float64, got {name} in {x.dtype}')


def pack(w1: Tensor, w2: Tensor) -> Tensor:
    """Return both weights of a memory, (…, d, e) and (…, e, d), as rows (…, 2e, d)."""
    return torch.cat((w1.mT, w2), dim=-2)


def unpack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights that :func:`pack` combined into ``rows``."""
    w1, w2 = rows.chunk(2, dim=-2)
    return w1.mT, w2
