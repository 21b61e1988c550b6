"""The memory of chunked.py on a CPU, in C++: the same functions, for heads of 16 channels with 8 hidden units.

One head works on a chunk of 196 tokens in a few microseconds, about what PyTorch needs to launch one of its operators.
In ``csrc``, a head's numbers stay in registers and the first cache until a chunk is done. Installing the package
compiles it for the torch that is there; where no compiler is, where sizes are others, or where somebody watches the
operators (compilers, FLOP counters, tensors of other kinds), chunked.py does the work itself. Where only the compiled
code is missing, the first call that it would take warns of it.
"""
from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .types import UpdateGenerators, is_compiling

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
_has_warned = False


def usable(tokens: Tensor, rows: Tensor | None = None) -> bool:
    """Whether there are kernels for tokens (B, h, d, N) and, if they matter, rows of weights (…, 2e, d)."""
    if not (type(tokens) is Tensor and tokens.device.type == 'cpu'
            and tokens.dtype in (torch.float32, torch.float64) and tokens.size(-2) == HEAD_DIM
            and (rows is None or rows.size(-2) == 2 * HIDDEN_DIM) and not _is_watched()):
        return False
    if missing and rows is not None:
        _warn_once()
    return kernels is not None


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
    source = f"-e '{checkout}'" if (checkout / 'setup.py').is_file() else 'path/to/convneur-mm'
    return f"pip install 'setuptools>=77,<82' wheel && pip install --no-build-isolation --no-deps {source}"


def _is_watched() -> bool:
    return is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def write_all(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators, rows: Tensor, momentum: Tensor,
              options: dict) -> list[Tensor]:
    """The fields of :class:`.chunked.Written`, see :func:`.chunked.write_all`."""
    return kernels.write_all(_columns(k), _columns(v), initial, *generators, rows, momentum, *_settings(options))


def write_all_backward(k: Tensor, v: Tensor, initial: Tensor, generators: UpdateGenerators,
                       written: tuple[Tensor, ...], grad_memories: Tensor, grad_momentum: Tensor | None,
                       options: dict) -> list[Tensor]:
    """Gradients of k, v, M_0 (None under the sequential rule), of all chunks' coefficients before their sigmoid and
    hidden units before their GELU, and of the memory and momentum before the first chunk."""
    states, _, pre_hidden, coefficients = written
    return kernels.write_all_backward(
        _columns(k), _columns(v), initial, generators.in_weight, generators.out_weight, states, pre_hidden,
        coefficients, grad_memories, grad_momentum, *_settings(options))


def read_all(q: Tensor, memories: Tensor, options: dict, out: Tensor) -> None:
    """See :func:`.chunked.read_all`; ``out`` may be ``q`` itself."""
    kernels.read_all(_columns(q), _readable(memories, q, options), out, options['chunk_size'])


def read_all_backward(q: Tensor, memories: Tensor, grad_y: Tensor, grad_memories: Tensor, options: dict,
                      y: Tensor | None) -> Tensor:
    """The gradient of q; adds those of the memories to ``grad_memories`` and fills ``y`` with the reads, if there is
    one, which must be contiguous."""
    return kernels.read_all_backward(
        _columns(q), _readable(memories, q, options), _columns(grad_y), _readable(grad_memories, q, options), y,
        options['chunk_size'])


def _settings(options: dict) -> tuple:
    return (options['num_written'], options['chunk_size'], options['update_rule'] == 'sequential',
            options['inner_step'], options['max_write_norm'])


def _columns(x: Tensor) -> Tensor:
    """Tokens (B, h, d, N), contiguous over N."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _readable(memories: Tensor, q: Tensor, options: dict) -> Tensor:
    """The memory that each chunk reads; all of them the last one with retrieve='final'."""
    if options['retrieve'] == 'final':
        return memories[-1:].expand(-(-q.size(-1) // options['chunk_size']), *memories.shape[1:])
    return memories
