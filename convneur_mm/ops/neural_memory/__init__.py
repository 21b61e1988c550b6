"""The neural memory of Sec. 3.3: the operator :func:`neural_memory`, its implementations, and the layer around it."""
from .layer import neural_memory_layer
from .op import BACKENDS, check_backend, neural_memory
from .types import (
    NORMALIZE_EPS,
    RETRIEVALS,
    UPDATE_RULES,
    LayerWeights,
    MemoryOptions,
    MemoryState,
    UpdateGenerators,
    written_tokens,
)

__all__ = ['BACKENDS', 'NORMALIZE_EPS', 'RETRIEVALS', 'UPDATE_RULES', 'LayerWeights', 'MemoryOptions', 'MemoryState',
           'UpdateGenerators', 'check_backend', 'neural_memory', 'neural_memory_layer', 'written_tokens']
