"""The memory's operators in C++ for CPUs, for heads of 16 channels with 8 hidden units; see :mod:`.operators`.

Installing the package compiles ``csrc`` for the installed PyTorch. Memories that the compiled operators do not take
(:func:`refuses`) use :mod:`.pytorch`; the first call for which only the compiled code is missing raises a warning.
"""
from __future__ import annotations

import hashlib
import importlib
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Compiled code works with one version of torch only, which setup.py puts into the module's name.
MODULE = '_cpu_' + re.sub(r'\W', '_', torch.__version__.split('+')[0])
HEAD_DIM, HIDDEN_DIM = 16, 8  # the only sizes for which csrc is compiled
kernels: Any = None
missing = ''  # why there are no kernels, if so
try:
    kernels = importlib.import_module(f'.{MODULE}', __package__)
except ModuleNotFoundError:
    missing = f'they were not compiled for PyTorch {torch.__version__}'
except ImportError as error:
    missing = f'they were compiled for another PyTorch and do not load ({error})'
# An installed wheel has no sources; those of a checkout may have changed since they were compiled.
sources = Path(__file__).with_name('csrc')
if kernels is not None and sources.is_dir() and getattr(kernels, 'SOURCE', '') != hashlib.sha256(
        b''.join(path.read_bytes() for path in sorted(sources.iterdir()))).hexdigest():
    kernels, missing = None, 'they were compiled from other sources than those of this checkout'
_has_warned = False


def refuses(memories: Tensor) -> str | None:
    """Return why no kernel takes memories of rows (…, 2e, d), or None if one does."""
    if memories.device.type != 'cpu' or memories.dtype not in (torch.float32, torch.float64):
        return f'takes float32 and float64 on a CPU, got {memories.dtype} on {memories.device}'
    hidden, d = memories.size(-2) // 2, memories.size(-1)
    if (d, hidden) != (HEAD_DIM, HIDDEN_DIM):
        return f'takes heads of {HEAD_DIM} channels with {HIDDEN_DIM} hidden units, got {d} with {hidden}'
    if missing:
        _warn_once()
    return missing or None


def _warn_once() -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn('the neural memory runs in PyTorch, two to three times as slowly as its C++ kernels for a CPU: '
                      f'{missing}. With a C++ compiler, mend with: {install_command()}', stacklevel=3)


def install_command() -> str:
    """Return the command that compiles the kernels for the installed torch."""
    checkout = Path(__file__).resolve().parents[3]
    # A checkout has the source; an installed wheel does not.
    source = f'-e {shlex.quote(str(checkout))}' if (checkout / 'setup.py').is_file() else 'path/to/convneur-mm'
    return f"pip install 'setuptools>=77' && pip install --no-build-isolation --no-deps {source}"
