"""OverLoCK, a backbone for comparison. Its classification head needs mmpretrain: import it from :mod:`.head`."""
from .backbone import OverLoCK

__all__ = ['OverLoCK']
