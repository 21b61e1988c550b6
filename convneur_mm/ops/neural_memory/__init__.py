"""The neural memory of Sec. 3.3: the function :func:`neural_memory` and its operators."""
from . import cpu
from .op import BACKENDS, check_backend, neural_memory, run
from .types import (
    NORMALIZE_EPS,
    RETRIEVALS,
    UPDATE_RULES,
    MemoryOptions,
    MemoryState,
    UpdateGenerators,
    written_tokens,
)

__all__ = ['BACKENDS', 'NORMALIZE_EPS', 'RETRIEVALS', 'UPDATE_RULES', 'MemoryOptions', 'MemoryState',
           'UpdateGenerators', 'check_backend', 'cpu', 'neural_memory', 'run', 'written_tokens']
