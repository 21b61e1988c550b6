from .convneur import ConvNeur
from .global_branches import NeuralMemory
from .overlock import OverLoCK

__all__ = ['ConvNeur', 'NeuralMemory', 'OverLoCK']
