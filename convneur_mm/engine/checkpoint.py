"""Reading checkpoints safely, and loading weights with a clear word about what did not fit."""
from __future__ import annotations

import os
import os.path as osp
import pickle
from collections.abc import Iterable, Mapping
from urllib.parse import urlparse

import torch
import torch.nn as nn
from mmengine.dist import barrier, master_only
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor


class UnsafeCheckpointError(ValueError):
    """A checkpoint holds more than tensors and plain values, and was not loaded."""


def fetch_checkpoint(filename: str) -> str:
    """A local path of a checkpoint given by path or URL; downloads go to torch's hub folder, once.

    Raises:
        FileNotFoundError: If ``filename`` is a path and no such file exists.
    """
    if not urlparse(filename).scheme:
        path = osp.expanduser(filename)
        if not osp.isfile(path):
            raise FileNotFoundError(f'no such checkpoint: {filename}')
        return path
    path = osp.join(torch.hub.get_dir(), 'checkpoints', osp.basename(urlparse(filename).path))
    if not osp.isfile(path):
        MMLogger.get_current_instance().info(f'downloading {filename} to {path}')
        _download(filename, path)
        barrier()
    return path


@master_only
def _download(url: str, path: str) -> None:
    os.makedirs(osp.dirname(path), exist_ok=True)
    torch.hub.download_url_to_file(url, path)


def read_checkpoint(filename: str, allow_pickle: bool = False) -> dict:
    """Reads a checkpoint onto the CPU: tensors, plain values, and the log buffers MMEngine saves beside them.

    Args:
        filename (str): Path or URL.
        allow_pickle (bool): Whether a file that holds arbitrary Python objects may be loaded too. Unpickling runs code
            that the file brings along, so do this only for files from a source you trust. Defaults to False.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeCheckpointError: If the file needs pickle and that is not allowed.
        ValueError: If the file is no checkpoint at all.
    """
    path = fetch_checkpoint(filename)
    try:
        if allow_pickle:
            return torch.load(path, map_location='cpu', weights_only=False)
        return _load_safely(path)
    except pickle.UnpicklingError as error:
        reason = str(error).split('WeightsUnpickler error: ')[-1].split('. Please use')[0].splitlines()[0]
        if 'GLOBAL' not in reason and 'nsupported' not in reason:
            raise ValueError(f'{filename} is no checkpoint, or damaged: {reason}') from error
        raise UnsafeCheckpointError(f'{filename} was not loaded, because it needs pickle, which can run any code: '
                                    f'{reason}. If you trust its source') from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f'{filename} is no checkpoint, or damaged: {error}') from error


def _load_safely(path: str) -> dict:
    """Weights-only loading that lets MMEngine's log buffers, which lie in each of its checkpoints, pass."""
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(mmengine_checkpoint.get_torch_safe_globals()):
            return torch.load(path, map_location='cpu', weights_only=True)
    # Older torch, of the upstream stack, knows no way to add to what its weights-only reader accepts.
    return torch.load(path, map_location='cpu', weights_only=False, pickle_module=_RestrictedPickle)


class _RestrictedPickle:
    """The part of the pickle module that torch.load uses, for tensors, plain values and log buffers alone."""

    class Unpickler(pickle.Unpickler):
        """Finds the few classes and functions that such files need, and no others."""

        def find_class(self, module: str, name: str):
            if (module, name) in (('builtins', 'getattr'), ('__builtin__', 'getattr')):
                return _log_buffer_method
            if (module, name) in _HARMLESS or (
                    module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)) or (
                    module == 'torch' and name.endswith('Storage')):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {module}.{name}')

    @classmethod
    def load(cls, file, **kwargs):
        return cls.Unpickler(file, **kwargs).load()


_HARMLESS = {
    ('collections', 'OrderedDict'), ('torch._utils', '_rebuild_tensor_v2'), ('torch._utils', '_rebuild_parameter'),
    ('torch', 'Size'), ('torch', 'device'), ('mmengine.logging.history_buffer', 'HistoryBuffer'),
    ('numpy', 'ndarray'), ('numpy', 'dtype'), ('_codecs', 'encode'),
    *((f'numpy.{core}.multiarray', name) for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
}


def _log_buffer_method(owner: type, name: str):
    """Stands in for getattr, with which log buffers name their own methods."""
    if owner is not HistoryBuffer or name not in ('mean', 'max', 'min', 'current'):
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def checkpoint_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """The weights of a checkpoint as saved by MMEngine, timm or plain torch, without DDP's ``module.`` prefix."""
    weights = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    return {name.removeprefix('module.'): value for name, value in weights.items()}


def check_some_match(expected: Iterable[str], found: Iterable[str], filename: str) -> None:
    """Raises a ValueError if not one weight of the model is in the checkpoint."""
    expected, found = list(expected), list(found)
    if not set(expected) & set(found):
        raise ValueError(f'{filename} holds none of the model\'s weights: the model has {_some(expected)}, '
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
        FileNotFoundError: If there is no such file.
        ValueError: If the file needs pickle, none of the backbone's weights is in it, or some have other shapes there.
    """
    try:
        weights = checkpoint_weights(read_checkpoint(filename, allow_pickle))
    except UnsafeCheckpointError as error:
        raise ValueError(f'{error}, set init_cfg.allow_pickle=True.') from None
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
        raise ValueError(f'{filename} holds weights of other shapes than the model, is it another arch? {_some(wrong)}')
    missing, unexpected = backbone.load_state_dict(candidates, strict=False)
    logger = MMLogger.get_current_instance()
    logger.info(f'loaded {len(own) - len(missing)} of {len(own)} backbone weights from {filename}')
    if missing:
        logger.warning(f'{filename} lacks {len(missing)} backbone weights, which stay as initialised: {_some(missing)}')
    if unexpected:
        logger.info(f'{len(unexpected)} weights of {filename} are not used: {_some(unexpected)}')


def _some(names: list[str], count: int = 4) -> str:
    shown = ', '.join(names[:count])
    return f'{shown}, … ({len(names)} in all)' if len(names) > count else shown or 'nothing'
