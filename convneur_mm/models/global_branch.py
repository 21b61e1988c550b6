"""The global branch: bottleneck, neural memory or another token mixer, and gate map (Sec. 3.3)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.neural_memory import MemoryState
from ..ops.neural_memory.types import no_autocast
from ._mmengine import BaseModule
from .global_branches import GLOBAL_BRANCHES
from .plain import are_plain, has_output_hooks, is_plain, may_fuse, pointwise, rows

MAX_STATE_NORM = 10.0  # see limit_norm


class GlobalBranch(BaseModule):
    """Map features X to the global context map G of the same shape.

    A 1×1 convolution reduces X to the bottleneck's channels, the neural memory runs over all H·W tokens in row-major
    order, and a 1×1 convolution expands the result. Another branch replaces the memory between the same convolutions.

    Args:
        in_channels (int): Channels of X, C.
        mem_channels (int): Channels of the bottleneck, Cm.
        branch (str): A name of :data:`GLOBAL_BRANCHES`. Defaults to 'neural_memory'.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.
        **memory_cfg: Options of the branch, see :func:`branch_options`.

    Raises:
        ValueError: If ``branch`` is unknown or an option is outside its range.
    """

    def __init__(self, in_channels: int, mem_channels: int, branch: str = 'neural_memory',
                 init_cfg: dict | list[dict] | None = None, **memory_cfg: object) -> None:
        super().__init__(init_cfg=init_cfg)
        if branch not in GLOBAL_BRANCHES:
            raise ValueError(f'global_branch must be one of {tuple(GLOBAL_BRANCHES)}, got {branch!r}')
        self.branch = branch
        self.reduce = nn.Conv2d(in_channels, mem_channels, 1)
        mixer = GLOBAL_BRANCHES[branch](mem_channels, **memory_cfg)
        if branch == 'neural_memory':
            self.memory = mixer
        else:
            self.mixer = mixer
        self.expand = nn.Conv2d(mem_channels, in_channels, 1)

    def forward(self, x: Tensor, state: MemoryState | None = None,
                return_state: bool = False) -> Tensor | tuple[Tensor, MemoryState]:
        """Return the context map of X.

        Args:
            x (Tensor): Features, (B, C, H, W).
            state (MemoryState | None): State that an earlier call returned, from which the memory continues; None
                starts at the learned M_0. Defaults to None.
            return_state (bool): Whether to return the memory after the last chunk too, its norm limited by
                :func:`limit_norm`. Defaults to False.

        Returns:
            Tensor | tuple[Tensor, MemoryState]: The map (B, C, H, W), and the state if asked for.

        Raises:
            ValueError: If a state is given to or asked of a branch other than the neural memory.
        """
        if (state is not None or return_state) and self.branch != 'neural_memory':
            raise ValueError(f"only global_branch='neural_memory' has a state to carry, got {self.branch!r}")
        mixer, output, size = self.token_mixer, None, tuple(x.shape[2:])
        if may_fuse(x) and are_plain(mixer.proj) and is_plain(self.expand, nn.Conv2d) and not has_output_hooks(mixer):
            with no_autocast(x):  # Both are linear, so one product with a weight of the second's size replaces them.
                weight = self.expand.weight.flatten(1) @ mixer.proj.weight

            def output(y: Tensor) -> Tensor:
                return rows(y, weight, self.expand.bias)

        tokens = self.tokens(x)
        if self.branch == 'neural_memory':
            tokens = mixer(tokens, state, return_state, output=output)
        else:
            tokens = mixer(tokens, size, output=output)
        tokens, state = tokens if return_state else (tokens, None)
        out = tokens.transpose(1, 2).unflatten(2, size)
        out = _convolve(self.expand, out) if output is None else out
        return (out, limit_norm(state, mixer.w1, mixer.w2)) if return_state else out

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens of features (B, C, H, W) in row-major order, (B, H·W, Cm)."""
        return _convolve(self.reduce, x).flatten(2).transpose(1, 2)

    @property
    def token_mixer(self) -> BaseModule:
        """Return the module that mixes the tokens: ``memory`` of the neural memory, else ``mixer``."""
        return self.memory if self.branch == 'neural_memory' else self.mixer


def limit_norm(state: MemoryState, w1: Tensor, w2: Tensor) -> MemoryState:
    """Scale down a carried state, for each head of each image whose norm is too large.

    The norms of memory and momentum, each over both of its weights, stay within :data:`MAX_STATE_NORM` times the norm
    of the head's M_0. A smaller state is returned unchanged, so that two calls still equal one.

    Args:
        state (MemoryState): State after the last chunk, for B images.
        w1 (Tensor): First weight of M_0, (h, d, e).
        w2 (Tensor): Second weight of M_0, (h, e, d).
    """
    limit = MAX_STATE_NORM * _norm(w1, w2).to(state.w1.dtype)
    # Autograd sees constants, as the root has no gradient at the zero momentum of a memory that was never written.
    memory, momentum = ((limit / _norm(*pair).clamp(min=1e-30)).clamp(max=1) for pair in (state[:2], state[2:]))
    return MemoryState(state.w1 * memory, state.w2 * memory, state.p1 * momentum, state.p2 * momentum)


@torch.no_grad()
def _norm(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the joint norm of both weights of a head, (…, h, 1, 1)."""
    return (w1.square().sum((-2, -1), keepdim=True) + w2.square().sum((-2, -1), keepdim=True)).sqrt()


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    return pointwise(conv, x) if is_plain(conv, nn.Conv2d) else conv(x)
