"""Whether a layer may take a submodule's weights instead of calling it, which is faster."""
from __future__ import annotations

from torch import nn


def does_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does with its weights what its ``kind`` does, unlike an adapter or a quantised one."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether, besides, no hook would miss the call."""
    return does_as(module, kind) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
