"""The memory's kernels in C++ for a CPU, for heads of 16 channels with 8 hidden units; see :mod:`.contract`.

One head works on a chunk of 196 tokens in a few microseconds, about what PyTorch needs to launch one of its operators.
In ``csrc``, a head's numbers stay in registers and the first cache until a chunk is done. Installing the package
compiles it for the torch that is there; where no compiler is, where sizes are others, or where somebody watches the
operators (FLOP counters, tensors of other kinds), :mod:`.pytorch` does the work. Where only the compiled code is
missing, the first call that it would take warns of it.
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

from .contract import WriteGradients, Written
from .types import MemoryOptions, UpdateGenerators

# Compiled code fits one version of torch; its name, which setup.py gives it, says which.
MODULE = '_cpu_' + re.sub(r'\W', '_', torch.__version__.split('+')[0])
# The sizes that csrc is compiled for.
HEAD_DIM, HIDDEN_DIM = 16, 8
kernels: Any = None
missing = ''  # why there are no kernels, if there are none
try:
    kernels = importlib.import_module(f'.{MODULE}', __package__)
except ModuleNotFoundError:
    missing = f'they were not compiled for PyTorch {torch.__version__}'
except ImportError as error:
    missing = f'they were compiled for another PyTorch and do not load ({error})'
# An installed wheel has no sources; a checkout may have been brought up to date since they were compiled.
sources = Path(__file__).with_name('csrc')
if kernels is not None and sources.is_dir() and getattr(kernels, 'SOURCE', '') != hashlib.sha256(
        b''.join(path.read_bytes() for path in sorted(sources.iterdir()))).hexdigest():
    kernels, missing = None, 'they were compiled from other sources than those of this checkout'
_has_warned = False


def refuses(tokens: Tensor, rows: Tensor, options: MemoryOptions) -> str | None:
    """Why there are no kernels for tokens (B, h, d, N) with rows of weights (…, 2e, d), or None if there are."""
    if type(tokens) is not Tensor or tokens.device.type != 'cpu' or tokens.dtype not in (torch.float32, torch.float64):
        return f'takes float32 and float64 on a CPU, got {tokens.dtype} on {tokens.device}'
    if (tokens.size(-2), rows.size(-2)) != (HEAD_DIM, 2 * HIDDEN_DIM):
        return (f'takes heads of {HEAD_DIM} channels with {HIDDEN_DIM} hidden units, got {tokens.size(-2)} with '
                f'{rows.size(-2) // 2}')
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return 'is not seen by what watches the operators'
    if missing:
        _warn_once()
    return None if kernels is not None else missing or 'is turned off'


def _warn_once() -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn('the neural memory runs in PyTorch, two to three times as slowly as its C++ kernels for a CPU: '
                      f'{missing}. With a C++ compiler, mend with: {install_command()}', stacklevel=3)


def install_command() -> str:
    """The command that compiles the kernels for the torch that is installed."""
    checkout = Path(__file__).resolve().parents[3]
    # The source is there in a checkout, and not where a wheel was installed.
    source = f'-e {shlex.quote(str(checkout))}' if (checkout / 'setup.py').is_file() else 'path/to/convneur-mm'
    return f"pip install 'setuptools>=77' && pip install --no-build-isolation --no-deps {source}"


def write_all(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, rows: Tensor, momentum: Tensor,
              options: MemoryOptions) -> Written:
    return Written(*kernels.write_all(_columns(k), _columns(v), initial, *generators, rows, momentum, options))


def write_all_backward(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, written: Written,
                       grad_memories: Tensor, grad_momentum: Tensor | None, grad_k: Tensor, grad_v: Tensor,
                       options: MemoryOptions) -> WriteGradients:
    states, _, pre_hidden, coefficients = written
    return WriteGradients(*kernels.write_all_backward(
        _columns(k), _columns(v), initial, generators.in_weight, generators.out_weight, states, pre_hidden,
        coefficients, grad_memories, grad_momentum, grad_k, grad_v, options))


def read_all(q: Tensor, memories: Tensor, y: Tensor, options: MemoryOptions) -> None:
    kernels.read_all(_columns(q), memories, y, options)


def read_all_backward(q: Tensor, memories: Tensor, grad_y: Tensor, grad_memories: Tensor, grad_q: Tensor,
                      y: Tensor | None, options: MemoryOptions) -> None:
    kernels.read_all_backward(_columns(q), memories, _columns(grad_y), grad_memories, grad_q, y, options)


def normalize_(z: Tensor, eps: float) -> Tensor:
    return kernels.normalize_(z, eps)


def normalize_backward_(unit: Tensor, scale: Tensor, grad: Tensor) -> None:
    kernels.normalize_backward_(unit, scale, grad)


def _columns(x: Tensor) -> Tensor:
    """Tokens (B, h, d, N), contiguous over N."""
    return x if x.stride(-1) == 1 else x.contiguous()
