"""Global branches for the bottleneck: the neural memory and those that it is compared with (Table 5)."""
from __future__ import annotations

import inspect

from .._mmengine import BaseModule
from .cbam import CBAM
from .neural_memory import NeuralMemory
from .non_local import NonLocal
from .rwkv import IRRWKV
from .self_attention import SelfAttention
from .titans import MemoryAsContext
from .token_mixer import TokenMixer

GLOBAL_BRANCHES: dict[str, type[BaseModule]] = {
    'neural_memory': NeuralMemory,
    'cbam': CBAM,
    'non_local': NonLocal,
    'self_attention': SelfAttention,
    'rwkv': IRRWKV,
    'titans': MemoryAsContext,
}


def branch_options(branch: str) -> tuple[str, ...]:
    """Return the options that a branch of :data:`GLOBAL_BRANCHES` takes besides its number of channels."""
    parameters = inspect.signature(GLOBAL_BRANCHES[branch]).parameters
    return tuple(name for name in parameters if name not in ('channels', 'init_cfg'))


__all__ = ['GLOBAL_BRANCHES', 'CBAM', 'IRRWKV', 'MemoryAsContext', 'NeuralMemory', 'NonLocal', 'SelfAttention',
           'TokenMixer', 'branch_options']
