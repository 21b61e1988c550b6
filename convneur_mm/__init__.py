"""ConvNeur for OpenMMLab: importing this package registers the backbone for mmdet, mmseg and mmpretrain alike.

None of the three need be installed: models and operators work with torch, torchvision and mmengine alone.
"""
from .stack import check_stack

check_stack()

from . import engine, models  # noqa: E402
from .paths import config  # noqa: E402

__version__ = '0.1.0'
__all__ = ['config', 'engine', 'models']
