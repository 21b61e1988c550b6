"""ConvNeur for OpenMMLab: importing this package registers the backbone for mmdet, mmseg and mmpretrain.

None of the three need be installed: models and operators need only torch, torchvision and mmengine. Without MMEngine,
:mod:`convneur_mm.timm` still works; import it by name.
"""
import importlib.util
from typing import NoReturn

from .stack import check_stack, provide_operators

__version__ = '0.1.0'
__all__ = ['config', 'engine', 'models']

if importlib.util.find_spec('mmengine'):
    check_stack()
    provide_operators()
    from . import engine, models
    from .paths import config
else:
    def __getattr__(name: str) -> NoReturn:
        if name in __all__:
            check_stack()  # raises an error that says what to install
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
