"""The neural memory as a layer over a sequence of tokens (Sec. 3.3 of the paper, between the two 1×1 convolutions)."""
from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.neural_memory import LayerWeights, MemoryOptions, MemoryState, check_backend, neural_memory_layer
from ._mmengine import BaseModule
from .plain import does_as

# Initial output biases of the update generators: a small step, a half momentum, hardly any decay.
STEP_BIAS, MOMENTUM_BIAS, DECAY_BIAS = -2.0, 0.0, -4.0


class NeuralMemory(BaseModule):
    """Multi-head neural memory: LayerNorm, projections, chunk-wise retrieval and update, output projection.

    All of it is one fused layer, which takes the weights of its submodules and never calls them: their forward hooks do
    not run, and a submodule that does something else than its weight says is refused. Hooks of the memory itself run.

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
        max_write_norm (float): Bound of the norm of one head's write, at least 1e-6. Defaults to 1.0.
        backend (str): Implementation, see :func:`convneur_mm.ops.neural_memory.neural_memory`. Defaults to 'auto'.
        num_chunks (int | None): Chunks per image, which instead decide L = ⌈N / num_chunks⌉ of an image of N tokens: so
            one setting serves all image sizes. Defaults to None.
        init_cfg (dict | list[dict] | None): MMEngine initialisation on top of the layer's own. Defaults to None.

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
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        MemoryOptions(chunk_size, inner_step, max_write_norm, update_rule, retrieve).check()
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
        """Projections as all of ConvNeXt-V2's, M_0 at the scale of its fan-in, the generators' biases as above."""
        self.norm.reset_parameters()
        for linear in (self.query, self.key, self.value, self.proj, self.generators[0], self.generators[2]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        for w in (self.w1, self.w2):
            nn.init.normal_(w, std=w.size(1) ** -0.5)
        nn.init.zeros_(self.generators[0].bias)
        step, momentum, decay = self.generators[2].bias.data.chunk(3)
        step.fill_(STEP_BIAS)
        momentum.fill_(MOMENTUM_BIAS)
        decay.fill_(DECAY_BIAS)

    def init_weights(self) -> None:
        """Resets the layer: a model-wide init_cfg may just have set its biases to zero and its scales to another."""
        if not self.init_cfg and not self.is_init:
            self.reset_parameters()
        super().init_weights()

    def tokens_per_chunk(self, num_tokens: int) -> int:
        """L for an image of ``num_tokens`` tokens."""
        # Nothing negative is divided: ONNX rounds that towards zero.
        return self.chunk_size if self.num_chunks is None else max(
            1, (num_tokens + self.num_chunks - 1) // self.num_chunks)

    def forward(self, x: Tensor, state: MemoryState | None = None,
                return_state: bool = False) -> Tensor | tuple[Tensor, MemoryState]:
        """Reads the memory for every token while it is rewritten chunk by chunk.

        Args:
            x (Tensor): Tokens in row-major order, (B, N, channels), of which B and N may be 0.
            state (MemoryState | None): Memory to go on from, as an earlier call returned it; None starts at the
                learned M_0. Defaults to None.
            return_state (bool): Whether to return the memory after the last chunk too. Defaults to False.

        Returns:
            Tensor | tuple[Tensor, MemoryState]: Tokens (B, N, channels), and the state if asked for.

        Raises:
            ValueError: If ``x`` is not (B, N, channels), or if its dtype or the state do not fit the parameters.
        """
        if x.dim() != 3 or x.size(-1) != self.channels:
            raise ValueError(f'expected tokens of shape (B, N, {self.channels}), got {tuple(x.shape)}')
        y, state = neural_memory_layer(
            x, self.weights, eps=self.norm.eps, chunk_size=self.tokens_per_chunk(x.size(1)), inner_step=self.inner_step,
            max_write_norm=self.max_write_norm, update_rule=self.update_rule, retrieve=self.retrieve, state=state,
            return_state=return_state, backend=self.backend)
        return (y, state) if return_state else y

    @property
    def weights(self) -> LayerWeights:
        """The parameters as the op takes them.

        Raises:
            ValueError: If a submodule was replaced by one whose weight is not all that it does.
        """
        first, _, last = self.generators
        parts = {'norm': self.norm, 'query': self.query, 'key': self.key, 'value': self.value, 'proj': self.proj,
                 'generators.0': first, 'generators.2': last}
        for name, part in parts.items():
            if not does_as(part, nn.LayerNorm if name == 'norm' else nn.Linear):
                raise ValueError(f'{name} of a NeuralMemory is a {type(part).__module__}.{type(part).__name__}, which '
                                 'would have no effect: the memory is one layer, which takes the weights of its parts '
                                 'and never calls them. Merge an adapter, or leave these parts out')
        return LayerWeights(
            self.norm.weight, self.norm.bias, self.query.weight, self.key.weight, self.value.weight, self.proj.weight,
            self.w1, self.w2, first.weight, first.bias, last.weight, last.bias)
