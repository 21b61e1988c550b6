"""Memories with another inner rule, to test what of the rule is needed (compare arXiv:2602.21204)."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convneur_mm.models import NeuralMemory
from convneur_mm.ops.neural_memory import pytorch, rule
from convneur_mm.ops.neural_memory.memory import begin


class InnerVariant(nn.Module):
    """A neural memory whose chunks are written by another rule than that of Eq. 3.

    Without other options it equals the memory. It is written for few and short chunks, by autograd.

    Args:
        memory: The memory, whose weights and options it takes. Steps must not be normalised.
        direction: Factor of the gradient: -1 writes by gradient ascent.
        loss: 'squared', or 'dot': the loss of a token is -v·M(k), and the generators see its parts instead of squares.
        last_layer: Whether only the last weight is written.
        query_is_key: Whether keys are read instead of queries.
        reset_every: Number of chunks after which memory and momentum begin anew; None never.
    """

    def __init__(self, memory: NeuralMemory, direction: float = 1.0, loss: str = 'squared', last_layer: bool = False,
                 query_is_key: bool = False, reset_every: int | None = None) -> None:
        super().__init__()
        if loss not in ('squared', 'dot'):
            raise ValueError(f"loss must be 'squared' or 'dot', got {loss!r}")
        if memory.update_rule != 'sequential' or memory.step_normalization:
            raise ValueError("only update_rule='sequential' without normalised steps has variants")
        self.memory = memory
        self.direction, self.loss, self.last_layer = direction, loss, last_layer
        self.query_is_key, self.reset_every = query_is_key, reset_every

    @property
    def proj(self) -> nn.Module:
        """Return the output projection, which the global branch looks at."""
        return self.memory.proj

    def forward(self, x: Tensor, state: None = None, return_state: bool = False,
                output: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map tokens (B, N, Cm) to tokens, as :meth:`NeuralMemory.forward` without a state."""
        memory, options = self.memory, self.memory.options(x.size(1))
        q, k, v = memory.project(memory.norm(x)).unbind(1)  # (B, h, d, N)
        q, k = (pytorch.unit_length(z, options.qk_norm_eps) for z in (q, k))
        _, start, no_momentum = begin(len(x), memory.w1, memory.w2, None)
        queries, keys, values = ([part.flatten(0, 1) for part in z.split(options.chunk_size, -1)]
                                 for z in (k if self.query_is_key else q, k, v))
        now, momentum, reads = start, no_momentum, []
        for number, (q, k, v) in enumerate(zip(queries, keys, values)):
            if self.reset_every and number % self.reset_every == 0:
                now, momentum = start, no_momentum
            if memory.retrieve == 'previous':
                reads.append(pytorch.read_chunks(q, now))
            gradient, errors = self.surprise(k, v, now)
            now, momentum, *_ = rule.step(gradient, errors, now, momentum, *memory.update_generators,
                                          memory.inner_step, memory.max_write_norm)
        if memory.retrieve == 'final':
            reads = [pytorch.read_chunks(q, now) for q in queries]
        y = torch.cat(reads, -1).view(len(x), -1, x.size(1)).mT
        return (output or memory.proj)(y)

    def surprise(self, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the inner loss at memories ``rows``, (n, 2e, d), and the generators' inputs (n, d)."""
        target = v
        if self.loss == 'dot':
            # The squared loss has the gradient of -v·M(k) where the target is M(k) + v, as M(k) - target is -v.
            recalled = pytorch.read_chunks(k, rows)
            target = recalled + v
        gradient, errors, _ = pytorch.surprise_chunks(k, target, rows, k.size(-1), False)
        if self.loss == 'dot':
            errors = -(v * recalled).mean(-1)
        if self.last_layer:
            first, last = gradient.chunk(2, dim=-2)
            gradient = torch.cat((torch.zeros_like(first), last), dim=-2)
        return self.direction * gradient, errors


class LinearAttention(nn.Module):
    """Linear attention over all tokens (Katharopoulos et al., 2020), with the norm and projections of a memory.

    Args:
        memory: The memory whose projections it takes; memory weights and generators are not used.
    """

    def __init__(self, memory: NeuralMemory) -> None:
        super().__init__()
        self.norm, self.proj, self.head_dim = memory.norm, memory.proj, memory.head_dim
        self.query, self.key, self.value = memory.query, memory.key, memory.value

    def forward(self, x: Tensor, state: None = None, return_state: bool = False,
                output: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map tokens (B, N, Cm) to tokens."""
        x = self.norm(x)
        q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))  # (B, h, N, d)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))
        return (output or self.proj)(y.transpose(1, 2).flatten(2))


def replace_memories(model: nn.Module, inner: dict[str, Any]) -> None:
    """Replace each memory of a model by a variant: 'linear attention', or options of :class:`InnerVariant`.

    Args:
        model: A model with ConvNeur blocks.
        inner: ``dict(linear_attention=True)``, or options of :class:`InnerVariant`.
    """
    for branch in [module for module in model.modules() if isinstance(getattr(module, 'memory', None), NeuralMemory)]:
        branch.memory = (LinearAttention(branch.memory) if inner.get('linear_attention')
                         else InnerVariant(branch.memory, **inner))
