from .neural_memory import MemoryState, UpdateGenerators, neural_memory, written_tokens

__all__ = ['MemoryState', 'UpdateGenerators', 'neural_memory', 'written_tokens']
