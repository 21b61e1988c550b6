"""The neural memory of Sec. 3.3: the operator :func:`neural_memory`, its implementations, and the layer around it."""
from .layer import NORMALIZE_EPS, LayerWeights, neural_memory_layer
from .op import BACKENDS, RETRIEVALS, UPDATE_RULES, check_options, neural_memory
from .types import MemoryState, UpdateGenerators, written_tokens

__all__ = ['BACKENDS', 'NORMALIZE_EPS', 'RETRIEVALS', 'UPDATE_RULES', 'LayerWeights', 'MemoryState', 'UpdateGenerators',
           'check_options', 'neural_memory', 'neural_memory_layer', 'written_tokens']
