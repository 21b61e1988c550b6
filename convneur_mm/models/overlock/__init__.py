"""OverLoCK, a peer backbone. Its classification head needs mmpretrain, so :mod:`.head` is imported by name."""
from .backbone import OverLoCK

__all__ = ['OverLoCK']
