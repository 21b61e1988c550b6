"""Read weights files of all formats without running code that they contain."""
from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import load as torch_load

from . import restricted_pickle
from .errors import printable

ALLOW = 'if you trust its source, allow it: --allow-pickle on the command line, allow_pickle=True in Python'


class CheckpointError(ValueError):
    """A checkpoint or another file that a user named cannot be loaded; the message is one line with its name."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint does not exist."""


class UnsafeCheckpointError(CheckpointError):
    """A file was not loaded, because it holds more than tensors and plain values and could run code."""


def check_structure(checkpoint: object, filename: str) -> None:
    """Raise a CheckpointError unless this is or holds a dict of weights, and none of them has NaN values."""
    weights = weights_of(checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f'{filename} is no checkpoint: it holds a {type(weights).__name__}, expected a dict of '
                              'names and weights; name another file')
    for name, value in weights.items():
        count = _count_nan(value) if isinstance(value, Tensor) else 0
        if count:
            raise CheckpointError(f'{filename} was not loaded: {printable(name)} is NaN in {count} of {value.numel()} '
                                  'places, as a training that diverged leaves it; name an earlier checkpoint')


def _count_nan(value: Tensor) -> int:
    """Count NaN values. Infinite values do not count, as buffers such as an attention's mask may hold them."""
    if not value.is_floating_point() and not value.is_complex():
        return 0
    # float8 has no arithmetic.
    value = value.detach().float() if value.element_size() == 1 else value.detach()
    # The sum is the faster test, but it is also not finite if it overflows or if values are infinite.
    return 0 if value.sum().isfinite() else int(value.isnan().sum())


def weights_of(checkpoint: Mapping) -> Mapping:
    return checkpoint.get('state_dict', checkpoint.get('model', checkpoint))


def load_file(file: str | os.PathLike | BinaryIO, map_location: Any, allow_pickle: bool, mmap: bool = False) -> Any:
    """Load the content of a weights file of any format; all errors have one line."""
    path = os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
    name = path or getattr(file, 'name', 'a checkpoint in memory')
    try:
        if path is None:
            return _load_opened(file, name, map_location, allow_pickle)
        with open(path, 'rb') as opened:
            return _load_opened(opened, name, map_location, allow_pickle, mmap)
    except (CheckpointError, torch.cuda.OutOfMemoryError):
        raise
    except restricted_pickle.ForbiddenPickleError as error:
        raise UnsafeCheckpointError(f'{name} was not loaded, because it needs pickle, which can run any code: it asks '
                                    f'for {one_line(error)}; {ALLOW}') from None
    except Exception as error:  # damaged files can make the readers raise anything
        raise CheckpointError(f'{name} is no checkpoint, or damaged ({one_line(error)}); replace it by an intact '
                              'copy') from error


def _load_opened(file: BinaryIO, name: str, map_location: Any, allow_pickle: bool, mmap: bool = False) -> Any:
    start = file.tell()
    head = file.read(16)
    file.seek(start)
    if not head:
        raise CheckpointError(f'{name} is no checkpoint: the file is empty; replace it by an intact copy')
    # A safetensors file begins with the length of its header, which is a JSON object.
    if name.endswith('.safetensors') or head[8:9] == b'{':
        return _load_safetensors(file.read(), name)
    if allow_pickle:
        return torch_load(file, map_location, weights_only=False)
    if os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0') not in ('', '0'):
        raise CheckpointError(f'{name} was not loaded: unset TORCH_FORCE_WEIGHTS_ONLY_LOAD, which forces a reader that '
                              'lacks what MMEngine saves; the one used here is no less strict')
    pickle_module, is_zip = restricted_pickle, head.startswith(b'PK\x03\x04')
    if is_zip:
        # Use the same parser and the same test as torch.load, which would hand these files to torch.jit.load.
        archive = torch._C.PyTorchFileReader(file)
        if not mmap:  # from a map PyTorch returns nothing that is not in the file
            pickle_module = restricted_pickle.for_archive(archive)
        if 'constants.pkl' in archive.get_all_records():
            raise UnsafeCheckpointError(f'{name} was not loaded, because it is a TorchScript program; save its '
                                        'state_dict() instead')
    elif start == 0 and tarfile.is_tarfile(file):  # at other offsets tarfile accepts anything, and torch no archive
        raise UnsafeCheckpointError(f'{name} was not loaded, because it is a tar archive, which PyTorch wrote before '
                                    f'version 0.1.10; {ALLOW}')
    elif not head.startswith(b'\x80'):
        raise CheckpointError(f'{name} is no checkpoint, or damaged (it begins with {head!r}); replace it by an intact '
                              'copy')
    file.seek(start)
    # A memory map needs the path.
    options = dict(mmap=True) if mmap and is_zip else {}
    return torch_load(name if options else file, map_location, pickle_module=pickle_module, weights_only=False,
                      **options)


def _load_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        from safetensors import torch as safetensors
    except ImportError:
        raise CheckpointError(f'{name} is a safetensors file, and the package that reads them is missing: '
                              'pip install safetensors') from None
    return safetensors.load(data)


def one_line(error: Exception) -> str:
    text = printable(str(error)) or type(error).__name__
    return text if len(text) <= 200 else f'{text[:200]} …'
