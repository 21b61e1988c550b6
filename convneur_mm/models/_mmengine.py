"""MMEngine imports of the models, with plain stand-ins where MMEngine is not installed, as with timm alone."""
from __future__ import annotations

import importlib.util

if importlib.util.find_spec('mmengine'):
    from mmengine.logging import MMLogger
    from mmengine.model import BaseModule, ModuleList, PretrainedInit, Sequential
    from mmengine.registry import MODELS
else:
    from torch.nn import Module, ModuleList, Sequential

    class BaseModule(Module):
        """A module with ``init_cfg``; without MMEngine, :mod:`convneur_mm.timm` draws the weights."""

        def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
            super().__init__()
            self.init_cfg = init_cfg

    class PretrainedInit:
        """A type that no ``init_cfg`` has."""

    class MODELS:
        """A registry that registers nothing."""

        @staticmethod
        def register_module():
            return lambda kind: kind

    MMLogger = None

__all__ = ['MODELS', 'BaseModule', 'MMLogger', 'ModuleList', 'PretrainedInit', 'Sequential']
