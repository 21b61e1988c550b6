from .convneur import ConvNeur
from .neural_memory import NeuralMemory

__all__ = ['ConvNeur', 'NeuralMemory']
