from .neural_memory import LayerWeights, MemoryState, UpdateGenerators, neural_memory, neural_memory_layer

__all__ = ['LayerWeights', 'MemoryState', 'UpdateGenerators', 'neural_memory', 'neural_memory_layer']
