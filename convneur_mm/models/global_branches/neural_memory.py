"""The neural memory as a layer over a sequence of tokens (Sec. 3.3, between the two 1×1 convolutions)."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from ...ops.neural_memory import NORMALIZE_EPS, MemoryOptions, MemoryState, UpdateGenerators, check_backend
from ...ops.neural_memory import run as run_memory
from .._mmengine import BaseModule
from ..plain import are_plain, columns, is_plain, may_fuse, rows

# Without gradients, inputs of more tokens (images times length) than the first number are processed in segments of the
# second. On a CPU a segment's tensors should fit in the cache and be small enough for the allocator to reuse, as the
# system clears every page of a new large one. On other devices only memory use matters.
CPU_TOKENS, CPU_SEGMENT_TOKENS, SEGMENT_TOKENS = 2**14, 2**12, 2**19

# Initial output biases of the update generators: a small step, a momentum of one half, almost no decay.
STEP_BIAS, MOMENTUM_BIAS, DECAY_BIAS = -2.0, 0.0, -4.0
# A normalised step cannot be too large for the loss, so it begins near the whole of it, or learning would be slow.
NORMALIZED_STEP_BIAS = 2.0


class NeuralMemory(BaseModule):
    """Multi-head neural memory: LayerNorm, projections, chunk-wise retrieval and update, output projection.

    LayerNorm and projections are ordinary modules: hooks, adapters, pruning and quantised layers work on them as usual.
    The update generators run inside the operators, once per chunk; hooks or another forward on them are refused.

    Args:
        channels (int): Channels of the tokens, Cm.
        chunk_size (int): Tokens per chunk, L. Defaults to 196.
        inner_step (float): Factor of the generated step, in [0, 1]. Defaults to 1.0.
        head_dim (int): Channels per head, d. Must divide ``channels``. Defaults to 16.
        hidden_dim (int): Hidden units of each head's memory, e. Defaults to 8.
        update_rule (str): 'sequential' (Eq. 3, gradients at M_{t-1}) or 'parallel' (all gradients at M_0).
            Defaults to 'sequential'.
        retrieve (str): 'previous' (Eq. 2, causal over chunks) or 'final' (every token reads M_T).
            Defaults to 'previous'.
        max_write_norm (float): Bound on the norm of one head's write, at least 1e-6. Defaults to 1.0.
        backend (str): Implementation, see :func:`convneur_mm.ops.neural_memory.neural_memory`. Defaults to 'auto'.
        num_chunks (int | None): Chunks per image; it replaces ``chunk_size`` by L = ⌈N / num_chunks⌉ for an image of N
            tokens, so that one setting serves all image sizes. Defaults to None.
        step_normalization (float): If above 0, the step is normalised by the curvature of the loss, which keeps the
            gradients of many chunks bounded, see :class:`MemoryOptions`; the generators' initial step is then larger.
            0.125 is a good value. Defaults to 0.0, the paper's step.
        init_cfg (dict | list[dict] | None): MMEngine initialisation after the layer's own. Defaults to None.

    Raises:
        ValueError: If an option is outside its range or ``channels`` is not a multiple of ``head_dim``.
    """

    def __init__(
        self,
        channels: int,
        chunk_size: int = 196,
        inner_step: float = 1.0,
        head_dim: int = 16,
        hidden_dim: int = 8,
        update_rule: str = 'sequential',
        retrieve: str = 'previous',
        max_write_norm: float = 1.0,
        backend: str = 'auto',
        num_chunks: int | None = None,
        step_normalization: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        MemoryOptions(chunk_size, inner_step, max_write_norm, update_rule, retrieve,
                      step_normalization=step_normalization).check()
        check_backend(backend)
        for name, value in (('channels', channels), ('head_dim', head_dim), ('hidden_dim', hidden_dim),
                            ('num_chunks', 1 if num_chunks is None else num_chunks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be an integer of at least 1, got {value!r}')
        if channels % head_dim:
            raise ValueError(f'channels must be a multiple of head_dim, got channels={channels}, head_dim={head_dim}')
        self.channels = channels
        self.chunk_size = chunk_size
        self.num_chunks = num_chunks
        self.inner_step = inner_step
        self.head_dim = head_dim
        self.hidden_dim = hidden_dim
        self.num_heads = channels // head_dim
        self.update_rule = update_rule
        self.retrieve = retrieve
        self.max_write_norm = max_write_norm
        self.backend = backend
        self.step_normalization = step_normalization

        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.w1 = nn.Parameter(torch.empty(self.num_heads, head_dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(self.num_heads, hidden_dim, head_dim))
        self.generators = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, 3 * channels))
        self.proj = nn.Linear(channels, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw projections as in ConvNeXt-V2 and M_0 by its fan-in, and set the generators' biases."""
        self.norm.reset_parameters()
        for linear in (self.query, self.key, self.value, self.proj, self.generators[0], self.generators[2]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        for w in (self.w1, self.w2):
            nn.init.normal_(w, std=w.size(1) ** -0.5)
        nn.init.zeros_(self.generators[0].bias)
        step, momentum, decay = self.generators[2].bias.data.chunk(3)
        step.fill_(NORMALIZED_STEP_BIAS if self.step_normalization else STEP_BIAS)
        momentum.fill_(MOMENTUM_BIAS)
        decay.fill_(DECAY_BIAS)

    def init_weights(self) -> None:
        """Reset the layer, whose biases an outer ``init_cfg`` may have set, then apply its own ``init_cfg``."""
        if not self.is_init:
            self.reset_parameters()
        super().init_weights()

    def tokens_per_chunk(self, num_tokens: int) -> int:
        """Return L for an image of ``num_tokens`` tokens."""
        # The dividend is never negative, as ONNX rounds a negative quotient towards zero.
        return self.chunk_size if self.num_chunks is None else max(
            1, (num_tokens + self.num_chunks - 1) // self.num_chunks)

    def options(self, num_tokens: int, return_state: bool = False) -> MemoryOptions:
        """Return the memory's options for an image of ``num_tokens`` tokens."""
        return MemoryOptions(self.tokens_per_chunk(num_tokens), self.inner_step, self.max_write_norm, self.update_rule,
                             self.retrieve, return_state, NORMALIZE_EPS, self.step_normalization)

    def forward(self, x: Tensor, state: MemoryState | None = None, return_state: bool = False,
                output: Callable[[Tensor], Tensor] | None = None) -> Tensor | tuple[Tensor, MemoryState]:
        """Read the memory for every token while it is rewritten chunk by chunk.

        Without gradients, long inputs are processed in segments of whole chunks.

        Args:
            x (Tensor): Tokens in row-major order, (B, N, channels); B and N may be 0.
            state (MemoryState | None): State that an earlier call returned, from which the memory continues; None
                starts at the learned M_0. Defaults to None.
            return_state (bool): Whether to return the memory after the last chunk too. Defaults to False.
            output (Callable | None): A linear map that replaces ``proj``, from (B, n, channels), a view of columns, to
                (B, n, M). Defaults to None.

        Returns:
            Tensor | tuple[Tensor, MemoryState]: Tokens (B, N, channels), and the state if asked for.

        Raises:
            ValueError: If ``x`` is not (B, N, channels), if its dtype or the state do not fit the parameters, or if a
                generator's layer has hooks or its own forward.
        """
        if x.dim() != 3 or x.size(-1) != self.channels:
            raise ValueError(f'expected tokens of shape (B, N, {self.channels}), got {tuple(x.shape)}')
        if output is None:
            output = (lambda y: rows(y, self.proj.weight)) if may_fuse(x) and are_plain(self.proj) else self.proj
        options, num_tokens, length = self.options(x.size(1), return_state), x.size(1), x.size(1)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.retrieve == 'final'):
            whole, most = (CPU_TOKENS, CPU_SEGMENT_TOKENS) if x.device.type == 'cpu' else (SEGMENT_TOKENS,) * 2
            if x.size(0) * num_tokens > whole:
                length = max(1, most // (x.size(0) * options.chunk_size)) * options.chunk_size
        if length >= num_tokens:
            y, state = self._read(self.project(self.norm(x)), state, options)
            return (output(y), state) if return_state else output(y)
        out: Tensor | None = None
        qkv: Tensor | None = None  # of the previous segment, whose memory is in the cache
        for start in range(0, num_tokens, length):
            options = options._replace(return_state=return_state or start + length < num_tokens)
            qkv = self.project(self.norm(x[:, start:start + length]), qkv)
            y, state = self._read(qkv, state, options)
            y = output(y)
            if out is None:
                out = y.new_empty(x.size(0), num_tokens, y.size(2))
            out[:, start:start + length] = y
        return (out, state) if return_state else out

    def _read(self, qkv: Tensor, state: MemoryState | None,
              options: MemoryOptions) -> tuple[Tensor, MemoryState | None]:
        """Return the values read by the queries, (B, N, channels), a view of columns, and the state."""
        y, state = run_memory(qkv, self.w1, self.w2, self.update_generators, state, self.backend, options)
        return y.flatten(1, 2).mT, state

    @property
    def update_generators(self) -> UpdateGenerators:
        """Return the weights of the update generators.

        Raises:
            ValueError: If one of their layers has hooks or its own forward, which would have no effect.
        """
        first, _, last = self.generators
        for name, layer in (('0', first), ('2', last)):
            if not is_plain(layer, nn.Linear):
                raise ValueError(
                    f'generators.{name} of a NeuralMemory is a {type(layer).__name__} with hooks or its own forward, '
                    'which would have no effect: the operators take the weights of the generators and never call them. '
                    'Merge an adapter, make pruning permanent, or leave the generators out')
        return UpdateGenerators(first.weight, first.bias, last.weight, last.bias)

    def project(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """Project normalised tokens (B, N, channels) to queries, keys, values (B, 3, h, d, N), in ``out`` if it fits.
        """
        layers = self.query, self.key, self.value
        if are_plain(*layers):  # one product computes all three
            qkv = columns(torch.cat([layer.weight for layer in layers]), tokens,
                          None if out is None else out.flatten(1, 3))
        else:
            qkv = torch.cat([layer(tokens).mT for layer in layers], dim=1)
        return qkv.unflatten(1, (3, self.num_heads, self.head_dim))
