"""What every implementation of the neural memory shares: its options, tensors that travel together, small rules."""
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

# float32 holds the powers of a bound that its gradient needs, and those of writes beside it, from here on.
MIN_WRITE_NORM = 1e-6

UPDATE_RULES = ('sequential', 'parallel')
RETRIEVALS = ('previous', 'final')


class MemoryOptions(NamedTuple):
    """Options of the memory, in the order in which operators take them.

    Attributes:
        chunk_size (int): Tokens per chunk, L. The last chunk may be shorter. Defaults to 196.
        inner_step (float): Factor of the step θ. 0 never writes. Defaults to 1.0.
        max_write_norm (float): Bound of the norm of one head's write, at least 1e-6. One far above the norms that there
            are is none: under the sequential rule a memory may then grow without end. Defaults to 1.0.
        update_rule (str): 'sequential' takes the gradient of Eq. 3 at M_{t-1}; 'parallel' takes those of all chunks
            at M_0. Defaults to 'sequential'.
        retrieve (str): 'previous' reads as Eq. 2; with 'final' every token reads M_T. Defaults to 'previous'.
        return_state (bool): Whether the memory after the last chunk is returned. Defaults to False.
    """

    chunk_size: int = 196
    inner_step: float = 1.0
    max_write_norm: float = 1.0
    update_rule: str = 'sequential'
    retrieve: str = 'previous'
    return_state: bool = False

    def check(self) -> MemoryOptions:
        """Returns itself.

        Raises:
            ValueError: That names the first option outside its range.
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
        check_choice('update_rule', self.update_rule, UPDATE_RULES)
        check_choice('retrieve', self.retrieve, RETRIEVALS)
        return self

    def written_tokens(self, num_tokens: int) -> int:
        """See :func:`written_tokens`."""
        return written_tokens(num_tokens, self.chunk_size, self.retrieve, self.return_state)


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises a ValueError unless ``value`` is known."""
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


class MemoryWeights(NamedTuple):
    """Parameters of the memory for Cm channels in h heads of d, e hidden units a head.

    Attributes:
        w1 (Tensor): First weight of the initial memory M_0, (h, d, e).
        w2 (Tensor): Second weight of M_0, (h, e, d).
        in_weight (Tensor): See :class:`UpdateGenerators`, also for the rest.
        in_bias (Tensor): See there.
        out_weight (Tensor): See there.
        out_bias (Tensor): See there.
    """

    w1: Tensor
    w2: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    @property
    def generators(self) -> UpdateGenerators:
        return UpdateGenerators(*self[2:])

    @property
    def initial(self) -> Tensor:
        """M_0 as rows, (h, 2e, d)."""
        return pack(self.w1, self.w2)


class LayerWeights(NamedTuple):
    """Parameters of the layer around the memory.

    Attributes:
        norm_weight (Tensor): Of the LayerNorm, (Cm,).
        norm_bias (Tensor): (Cm,).
        query (Tensor): (Cm, Cm), as are ``key``, ``value`` and ``proj``.
        key (Tensor): See ``query``.
        value (Tensor): See ``query``.
        proj (Tensor): See ``query``.
        w1 (Tensor): See :class:`MemoryWeights`, also for the rest.
        w2 (Tensor): See there.
        in_weight (Tensor): See there.
        in_bias (Tensor): See there.
        out_weight (Tensor): See there.
        out_bias (Tensor): See there.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    proj: Tensor
    w1: Tensor
    w2: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    @property
    def memory(self) -> MemoryWeights:
        return MemoryWeights(*self[-len(MemoryWeights._fields):])

    @property
    def projections(self) -> Tensor:
        """Of queries, keys and values, (3Cm, Cm)."""
        return torch.cat((self.query, self.key, self.value))


def written_tokens(num_tokens: int, chunk_size: int, retrieve: str = 'previous', return_state: bool = False) -> int:
    """How many of the first tokens are written to the memory at all.

    What the last chunk would write is read by nobody, unless the state is returned or every token reads M_T.
    """
    if return_state or retrieve == 'final':
        return num_tokens
    return max(0, math.ceil(num_tokens / chunk_size) - 1) * chunk_size


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces the call, and not ``torch.compile``, which some versions take for it."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Keeps autocast out, which does not know the meta device, where shapes and FLOPs are counted without memory."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_inner_dtype(**tensors: Tensor) -> None:
    """Raises a ValueError that names the first tensor whose dtype is none of the inner loop's.

    The inner loop adds up to thousands of small writes, which half precision would round away, and squares what it adds
    up, which overflows in float16. So it runs in float32, or float64, whatever autocast does around it.
    """
    for name, x in tensors.items():
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f'the inner loop of a memory runs in float32 or float64, got {name} in {x.dtype}')


def pack(w1: Tensor, w2: Tensor) -> Tensor:
    """Both weights (…, d, e) and (…, e, d) of a memory as rows, (…, 2e, d)."""
    return torch.cat((w1.mT, w2), dim=-2)


def unpack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The other way round."""
    w1, w2 = rows.chunk(2, dim=-2)
    return w1.mT, w2
