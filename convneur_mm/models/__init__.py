from .convneur import ConvNeur
from .neural_memory import NeuralMemory
from .overlock import OverLoCK

__all__ = ['ConvNeur', 'NeuralMemory', 'OverLoCK']
