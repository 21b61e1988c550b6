"""Keep data files from running code in the whole process, whichever library loads them."""
from __future__ import annotations

import functools
import io
import os
import os.path as osp
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from mmengine.config import Config
from mmengine.fileio.handlers import PickleHandler, YamlHandler, file_handlers
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from torch.serialization import load as torch_load

from .weights_file import (
    ALLOW,
    CheckpointError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
    check_structure,
    load_file,
    one_line,
    weights_of,
)

# MMEngine searches all model cards of a package for its config, which takes seconds in pure Python.
SAFE_LOADER = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
# The ``allow_pickle`` of each active call of :func:`safe_loading`, in all threads of this process.
_ACTIVE: list[bool] = []
_LOCK = threading.Lock()
_PATCHES = ExitStack()


def pickle_is_allowed() -> bool:
    """Return whether all active calls of :func:`safe_loading` let files run code; without a call return False."""
    return bool(_ACTIVE) and all(_ACTIVE)


@contextmanager
def safe_loading(allow_pickle: bool = False) -> Iterator[None]:
    """Keep data files that a user names from running code, whichever library of this process loads them.

    This covers everything that goes through ``torch.load``, MMEngine's checkpoint loader, ``mmengine.load`` or
    ``numpy.load``: weights that a config names (``load_from``, ``resume``, ``init_cfg``), weights of the inferencers of
    mmdet, mmseg and mmpretrain, pickled and YAML annotation files. Config files are Python programs and do run. The
    call affects the whole process with its threads and forked workers, until the last active call ends. If several
    calls are active, all of them must allow files that run code. ::

        with convneur_mm.engine.safe_loading():
            inferencer = DetInferencer(config, checkpoint)

    Args:
        allow_pickle (bool): Whether files that can run code are loaded too. The other effects stay: safetensors files
            load, and errors have one line. Defaults to False.

    Raises:
        UnsafeCheckpointError: When a file that could run code is loaded.
        CheckpointError: When a file that is no checkpoint is loaded.
    """
    with _LOCK:
        if not _ACTIVE:
            _patch()
        _ACTIVE.append(allow_pickle)
    try:
        yield
    finally:
        with _LOCK:
            _ACTIVE.remove(allow_pickle)
            if not _ACTIVE:
                _PATCHES.close()


def _patch() -> None:
    for owner in (torch, torch.serialization):
        _PATCHES.enter_context(_replaced(owner, 'load', _load))
    for owner, name, value in ((torch.storage, '_load_from_bytes', _storage_from_bytes),
                               (CheckpointLoader, 'load_checkpoint', _checkpoint_loader()),
                               (Config, 'fromstring', _config_from_string()), (np, 'load', _numpy_loader(np.load))):
        _PATCHES.enter_context(_replaced(owner, name, value))
    _PATCHES.callback(file_handlers.update, dict(file_handlers))
    file_handlers.update(pkl=_NoPickleHandler(), pickle=_NoPickleHandler(), yml=_SafeYamlHandler(),
                         yaml=_SafeYamlHandler())


def _load(f: str | os.PathLike | BinaryIO, map_location: Any = None, *args: object, weights_only: bool | None = None,
          **kwargs: object) -> Any:
    """Load like ``torch.load``, files onto the CPU by default; the caller may ask for more safety, not for less."""
    if map_location is None and isinstance(f, (str, os.PathLike)):
        map_location = 'cpu'
    try:
        return load_file(f, map_location, pickle_is_allowed() and not weights_only)
    except UnsafeCheckpointError as error:
        if pickle_is_allowed():  # some callers of torch.load then leave weights_only=True out
            raise pickle.UnpicklingError(str(error)) from error
        raise


@functools.wraps(torch.storage._load_from_bytes)  # pickles of other processes use that name
def _storage_from_bytes(data: bytes) -> Any:
    # Processes exchange results in pickles, which restore tensors by this function. Whoever can send one can run code
    # anyway, and a slower reader would cost time, several times per image. Restricted pickles never call this.
    return torch_load(io.BytesIO(data), weights_only=False)


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    original = vars(owner)[name]  # getattr would bind class methods
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _checkpoint_loader() -> classmethod:
    """Wrap MMEngine's checkpoint loader, to raise one-line errors and drop entries that MMEngine would act upon."""
    load_checkpoint = vars(CheckpointLoader)['load_checkpoint'].__func__

    def load(cls: type, filename: str, map_location: Any = None, logger: Any = 'current') -> dict:
        try:
            checkpoint = load_checkpoint(cls, filename, map_location, logger)
        except (CheckpointError, torch.cuda.OutOfMemoryError):
            raise
        except FileNotFoundError:
            raise CheckpointNotFoundError(f'no such checkpoint: {filename}') from None
        except Exception as error:  # each scheme fails in its own ways: no network, no such model, no client
            reason = f'no model {error}' if isinstance(error, KeyError) else one_line(error)
            raise CheckpointError(f'{filename} could not be fetched ({reason}); check the name, or download the file '
                                  'and give its path') from error
        check_structure(checkpoint, filename)
        if not pickle_is_allowed():
            _drop_instructions(checkpoint, filename)
        # MMEngine's hooks look for the weights only there.
        return checkpoint if 'state_dict' in checkpoint else dict(state_dict=weights_of(checkpoint))

    return classmethod(load)


def _drop_instructions(checkpoint: dict, filename: str) -> None:
    """Remove the entries of a checkpoint that MMEngine acts upon when it resumes.

    These are a config, which MMEngine would run as Python to compare the number of GPUs that MMCV 1 wrote there, and
    paths of former checkpoints, which it would delete, wherever they are, when it saves newer ones.
    """
    meta = checkpoint.get('meta')
    if isinstance(meta, dict):
        dict.pop(meta, 'config', None)
    hub = checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if not isinstance(info, dict):
        return
    folder = osp.dirname(osp.realpath(filename))
    for name in [name for name in info if isinstance(name, str) and name.startswith('best_ckpt')]:
        path = info[name]
        if path is not None and not (isinstance(path, str) and path.endswith('.pth')
                                     and osp.dirname(osp.realpath(path)) == folder):
            del info[name]
            MMLogger.get_current_instance().warning(
                f'{filename} calls {path!r} the best checkpoint; as it is not beside it, it will not be deleted when a '
                'better one is saved')
    if not all(isinstance(number, int) for number in info.get('keep_ckpt_ids', ())):
        raise UnsafeCheckpointError(f'{filename} was not loaded: keep_ckpt_ids must be numbers, got '
                                    f'{info["keep_ckpt_ids"]!r}; {ALLOW}')


def _config_from_string() -> staticmethod:
    from_string = Config.fromstring

    def refuse_python(cfg_str: str, file_format: str) -> Config:
        if file_format == '.py' and not pickle_is_allowed():
            raise UnsafeCheckpointError('the config in a checkpoint was not run, as it is a Python program: name the '
                                        f'config file too, or, {ALLOW}')
        return from_string(cfg_str, file_format)

    return staticmethod(refuse_python)


def _numpy_loader(numpy_load: Callable) -> Callable:
    def load(file: Any, mmap_mode: str | None = None, allow_pickle: bool = False, *args: Any, **kwargs: Any) -> Any:
        try:
            return numpy_load(file, mmap_mode, allow_pickle and pickle_is_allowed(), *args, **kwargs)
        except ValueError as error:
            if pickle_is_allowed() or 'allow_pickle' not in str(error):
                raise
            raise UnsafeCheckpointError(f'{file} was not loaded, because it holds pickled objects, which can run any '
                                        f'code; {ALLOW}') from None

    return load


class _NoPickleHandler(PickleHandler):
    """Write pickle files, but read them only where that is allowed."""

    def load_from_fileobj(self, file: BinaryIO, **kwargs: Any) -> Any:
        if pickle_is_allowed():
            return super().load_from_fileobj(file, **kwargs)
        raise UnsafeCheckpointError(f'{getattr(file, "name", "a pickle file (.pkl)")} was not loaded, because '
                                    f'unpickling can run any code; {ALLOW}')


class _SafeYamlHandler(YamlHandler):
    """Read plain values only; MMEngine's accepts tags such as ``!!python/object/apply``, which call functions."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        if pickle_is_allowed():
            return super().load_from_fileobj(file, **kwargs)
        try:
            return super().load_from_fileobj(file, Loader=SAFE_LOADER)
        except yaml.constructor.ConstructorError as error:
            raise UnsafeCheckpointError(f'a YAML file was not loaded, because it asks for more than plain values '
                                        f'({one_line(error)}); {ALLOW}') from None
