"""Reading checkpoints safely, and loading weights with a clear word about what did not fit."""
from __future__ import annotations

import functools
import io
import os
import os.path as osp
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn as nn
import yaml
from mmengine.config import Config
from mmengine.dist import barrier, master_only
from mmengine.fileio.handlers import PickleHandler, YamlHandler, file_handlers
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from torch import Tensor
from torch.serialization import load as torch_load

from . import restricted_pickle

# Names that MMEngine looks up or fetches in its own ways; all else is a path or a URL.
MMENGINE_SCHEMES = ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls', 'pavi', 's3', 'petrel')
ALLOW = 'if you trust its source, allow it: --allow-pickle on the command line, allow_pickle=True in Python'
# Whether :func:`safe_loading` lets all files of the process run code.
_PICKLE_ALLOWED = ContextVar('pickle_allowed', default=False)


class CheckpointError(ValueError):
    """A checkpoint, or another file that a user named, cannot be loaded; the message is one line with its name."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class UnsafeCheckpointError(CheckpointError):
    """A file holds more than tensors and plain values, and was not loaded, as it could run code."""


def fetch_checkpoint(filename: str) -> str:
    """A local path of a checkpoint given by path or URL; downloads go to torch's hub folder, once.

    Raises:
        CheckpointNotFoundError: If ``filename`` is a path and no such file exists.
        CheckpointError: If it is a URL that cannot be fetched.
    """
    if not urlparse(filename).scheme:
        path = osp.expanduser(filename)
        if not osp.isfile(path):
            raise CheckpointNotFoundError(f'no such checkpoint: {filename}')
        return path
    path = osp.join(torch.hub.get_dir(), 'checkpoints', osp.basename(urlparse(filename).path))
    if not osp.isfile(path):
        MMLogger.get_current_instance().info(f'downloading {filename} to {path}')
        try:
            _download(filename, path)
        except OSError as error:
            raise CheckpointError(f'{filename} could not be fetched ({_one_line(error)}); check the address, or '
                                  f'download the file to {path}') from error
        barrier()
    return path


@master_only
def _download(url: str, path: str) -> None:
    os.makedirs(osp.dirname(path), exist_ok=True)
    torch.hub.download_url_to_file(url, path)


def is_mmengine_name(filename: str) -> bool:
    """Whether MMEngine has to find out where a checkpoint is, as for ``torchvision://resnet50``."""
    return urlparse(filename).scheme in MMENGINE_SCHEMES


def read_checkpoint(filename: str, allow_pickle: bool = False, mmap: bool = False) -> dict:
    """Reads a checkpoint onto the CPU: tensors, plain values, and the log buffers MMEngine saves beside them.

    Args:
        filename (str): Path, URL, or a name that MMEngine knows, such as ``torchvision://resnet50``. The file may be
            of torch's formats or a safetensors file.
        allow_pickle (bool): Whether a file that holds arbitrary Python objects may be loaded too. Unpickling runs code
            that the file brings along, so do this only for files from a source you trust. Defaults to False.
        mmap (bool): Whether tensors stay in the file until they are used, where its format allows that, so that a
            mere look at the file is cheap. Defaults to False.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        UnsafeCheckpointError: If the file needs pickle and that is not allowed.
        CheckpointError: If the file is no checkpoint at all.
    """
    allow_pickle = allow_pickle or _PICKLE_ALLOWED.get()
    if is_mmengine_name(filename):
        with safe_loading(allow_pickle):
            return CheckpointLoader.load_checkpoint(filename, 'cpu')
    checkpoint = _load_file(fetch_checkpoint(filename), 'cpu', allow_pickle, mmap)
    _check_structure(checkpoint, filename)
    return checkpoint


def _check_structure(checkpoint: object, filename: str) -> None:
    """Raises a CheckpointError unless this is a dict of weights, or holds one."""
    weights = _weights(checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f'{filename} is no checkpoint: it holds a {type(weights).__name__}, expected a dict of '
                              'names and weights; name another file')


def _weights(checkpoint: Mapping) -> Mapping:
    return checkpoint.get('state_dict', checkpoint.get('model', checkpoint))


def _load_file(file: str | os.PathLike | BinaryIO, map_location: Any, allow_pickle: bool, mmap: bool = False) -> Any:
    """What a file of weights holds, whatever its format; all errors are of one line."""
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
                                    f'for {_one_line(error)}; {ALLOW}') from None
    except Exception as error:  # what a damaged file makes the readers raise can be anything
        raise CheckpointError(f'{name} is no checkpoint, or damaged ({_one_line(error)}); replace it by an intact '
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
        # The same parser and the same test as in torch.load, which would hand these files to torch.jit.load.
        archive = torch._C.PyTorchFileReader(file)
        pickle_module = restricted_pickle.for_archive(archive)
        if 'constants.pkl' in archive.get_all_records():
            raise UnsafeCheckpointError(f'{name} was not loaded, because it is a TorchScript program; save its '
                                        'state_dict() instead')
    elif tarfile.is_tarfile(file):
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


def _one_line(error: Exception) -> str:
    text = _printable(str(error)) or type(error).__name__
    return text if len(text) <= 200 else f'{text[:200]} …'


def _printable(text: str) -> str:
    """Text that may come from a file, without line breaks and the control characters a terminal would obey."""
    return ''.join(character if character.isprintable() else '?' for character in ' '.join(text.split()))


@contextmanager
def safe_loading(allow_pickle: bool = False) -> Iterator[None]:
    """Within it, no data file that a user names can run code, whichever library of this process loads it.

    This holds for everything that goes through ``torch.load``, MMEngine's checkpoint loader, ``mmengine.load`` or
    ``numpy.load``: weights that a config names (``load_from``, ``resume``, ``init_cfg``), those of the inferencers of
    mmdet, mmseg and mmpretrain, pickled and YAML annotation files. Config files are Python programs and do run. It acts
    on the whole process, its threads and the workers forked from it included. ::

        with convneur_mm.engine.safe_loading():
            inferencer = DetInferencer(config, checkpoint)

    Args:
        allow_pickle (bool): Whether files that can run code are loaded too. What else is different within it stays:
            safetensors files load, and errors are of one line. Defaults to False.

    Raises:
        UnsafeCheckpointError: At the load of a file that could run code.
        CheckpointError: At the load of a file that is no checkpoint.
    """
    def load(f: str | os.PathLike | BinaryIO, map_location: Any = None, *args: object, **kwargs: object) -> Any:
        """``torch.load``, of files onto the CPU by default; how safely is not for its caller to say."""
        if map_location is None and isinstance(f, (str, os.PathLike)):
            map_location = 'cpu'
        return _load_file(f, map_location, allow_pickle)

    with ExitStack() as stack:
        token = _PICKLE_ALLOWED.set(allow_pickle)
        stack.callback(_PICKLE_ALLOWED.reset, token)
        for owner in (torch, torch.serialization):
            stack.enter_context(_replaced(owner, 'load', load))
        stack.enter_context(_replaced(torch.storage, '_load_from_bytes', _storage_from_bytes))
        stack.enter_context(_replaced(CheckpointLoader, 'load_checkpoint', _checkpoint_loader(allow_pickle)))
        if not allow_pickle:
            stack.enter_context(_replaced(Config, 'fromstring', _config_from_string()))
            stack.enter_context(_replaced(np, 'load', _numpy_loader(np.load)))
            previous = dict(file_handlers)
            stack.callback(file_handlers.update, previous)
            file_handlers.update(pkl=_NoPickleHandler(), pickle=_NoPickleHandler(), yml=_SafeYamlHandler(),
                                 yaml=_SafeYamlHandler())
        yield


@functools.wraps(torch.storage._load_from_bytes)  # other processes know it by that name
def _storage_from_bytes(data: bytes) -> Any:
    # Processes exchange results in pickles, tensors within them by this function. Whoever may send one may run code
    # anyway, and a slower reader would be felt: there are several for each image. No restricted pickle gets here.
    return torch_load(io.BytesIO(data), weights_only=False)


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    original = vars(owner)[name]  # not getattr, which would bind class methods
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _checkpoint_loader(allow_pickle: bool) -> classmethod:
    """MMEngine's way to load a checkpoint by any name, with errors of one line and without what it would act upon."""
    load_checkpoint = vars(CheckpointLoader)['load_checkpoint'].__func__

    def load(cls: type, filename: str, map_location: Any = None, logger: Any = 'current') -> dict:
        try:
            checkpoint = load_checkpoint(cls, filename, map_location, logger)
        except (CheckpointError, torch.cuda.OutOfMemoryError):
            raise
        except FileNotFoundError:
            raise CheckpointNotFoundError(f'no such checkpoint: {filename}') from None
        except Exception as error:  # each scheme has its own ways to fail: no network, no such model, no client
            reason = f'no model {error}' if isinstance(error, KeyError) else _one_line(error)
            raise CheckpointError(f'{filename} could not be fetched ({reason}); check the name, or download the file '
                                  'and give its path') from error
        _check_structure(checkpoint, filename)
        if not allow_pickle:
            _drop_instructions(checkpoint, filename)
        # MMEngine's hooks look for the weights there alone.
        return checkpoint if 'state_dict' in checkpoint else dict(state_dict=_weights(checkpoint))

    return classmethod(load)


def _drop_instructions(checkpoint: dict, filename: str) -> None:
    """Removes the entries of a checkpoint that MMEngine acts upon when it resumes.

    These are a config, which it would run as Python to compare the number of GPUs that MMCV 1 wrote there, and the
    paths of former checkpoints, which it deletes, wherever they are, when newer ones are saved.
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
        if file_format == '.py':
            raise UnsafeCheckpointError('the config in a checkpoint was not run, as it is a Python program: name the '
                                        f'config file too, or, {ALLOW}')
        return from_string(cfg_str, file_format)

    return staticmethod(refuse_python)


def _numpy_loader(numpy_load: Callable) -> Callable:
    def load(file: Any, mmap_mode: str | None = None, allow_pickle: bool = False, *args: Any, **kwargs: Any) -> Any:
        try:
            return numpy_load(file, mmap_mode, False, *args, **kwargs)
        except ValueError as error:
            if 'allow_pickle' not in str(error):
                raise
            raise UnsafeCheckpointError(f'{file} was not loaded, because it holds pickled objects, which can run any '
                                        f'code; {ALLOW}') from None

    return load


class _NoPickleHandler(PickleHandler):
    """Still writes pickle files, but reads none."""

    def load_from_fileobj(self, file: BinaryIO, **kwargs: Any) -> Any:
        raise UnsafeCheckpointError(f'{getattr(file, "name", "a pickle file (.pkl)")} was not loaded, because '
                                    f'unpickling can run any code; {ALLOW}')


class _SafeYamlHandler(YamlHandler):
    """Reads plain values alone; MMEngine's takes tags such as ``!!python/object/apply``, which call functions."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        try:
            return super().load_from_fileobj(file, Loader=yaml.SafeLoader)
        except yaml.constructor.ConstructorError as error:
            raise UnsafeCheckpointError(f'a YAML file was not loaded, because it asks for more than plain values '
                                        f'({_one_line(error)}); {ALLOW}') from None


def checkpoint_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """The weights of a checkpoint as saved by MMEngine, timm or plain torch, without DDP's ``module.`` prefix."""
    return {name.removeprefix('module.'): value for name, value in _weights(checkpoint).items()
            if isinstance(value, Tensor)}


def check_some_match(expected: Iterable[str], found: Iterable[str], filename: str) -> None:
    """Raises a CheckpointError if not one weight of the model is in the checkpoint."""
    expected, found = list(expected), list(found)
    if not set(expected) & set(found):
        raise CheckpointError(f'{filename} holds none of the model\'s weights: the model has {_some(expected)}, '
                              f'the checkpoint {_some(found)}')


def load_pretrained(backbone: nn.Module, filename: str, prefix: str | None = None, allow_pickle: bool = False) -> None:
    """Loads a backbone from a checkpoint of itself or of a whole model, and logs what is missing.

    Args:
        backbone (nn.Module): Takes the weights.
        filename (str): Path or URL.
        prefix (str | None): Prefix of the backbone's weights in the checkpoint. Defaults to 'backbone.' where the
            checkpoint has such names, else to none.
        allow_pickle (bool): See :func:`read_checkpoint`. Defaults to False.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If the file needs pickle, none of the backbone's weights is in it, or some have other shapes
            there.
    """
    weights = checkpoint_weights(read_checkpoint(filename, allow_pickle))
    own = backbone.state_dict()
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in weights) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    candidates = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    check_some_match(own, candidates or weights, filename)
    wrong = [f'{name} {tuple(candidates[name].shape)} (expected {tuple(own[name].shape)})'
             for name in own if name in candidates and candidates[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(f'{filename} holds weights of other shapes than the model, is it another arch? '
                              f'{_some(wrong)}')
    missing, unexpected = backbone.load_state_dict(candidates, strict=False)
    logger = MMLogger.get_current_instance()
    logger.info(f'loaded {len(own) - len(missing)} of {len(own)} backbone weights from {filename}')
    if missing:
        logger.warning(f'{filename} lacks {len(missing)} backbone weights, which stay as initialised: {_some(missing)}')
    if unexpected:
        logger.info(f'{len(unexpected)} weights of {filename} are not used: {_some(unexpected)}')


def _some(names: list[str], count: int = 4) -> str:
    shown = _printable(', '.join(names[:count]))
    return f'{shown}, … ({len(names)} in all)' if len(names) > count else shown or 'nothing'
