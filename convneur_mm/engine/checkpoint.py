"""Reading checkpoints by name, and loading weights with a clear word about what did not fit."""
from __future__ import annotations

import os
import os.path as osp
from collections.abc import Iterable, Mapping
from urllib.parse import urlparse

import torch
import torch.nn as nn
from mmengine.dist import barrier, master_only
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .safe_files import PICKLE_ALLOWED, safe_loading
from .weights_file import (
    CheckpointError,
    CheckpointNotFoundError,
    check_structure,
    load_file,
    one_line,
    printable,
    weights_of,
)

# Names that MMEngine looks up or fetches in its own ways; all else is a path or a URL.
MMENGINE_SCHEMES = ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls', 'pavi', 's3', 'petrel')


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
            raise CheckpointError(f'{filename} could not be fetched ({one_line(error)}); check the address, or '
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
    allow_pickle = allow_pickle or PICKLE_ALLOWED.get()
    if is_mmengine_name(filename):
        with safe_loading(allow_pickle):
            return CheckpointLoader.load_checkpoint(filename, 'cpu')
    checkpoint = load_file(fetch_checkpoint(filename), 'cpu', allow_pickle, mmap)
    check_structure(checkpoint, filename)
    return checkpoint


def checkpoint_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """The weights of a checkpoint as saved by MMEngine, timm or plain torch, without DDP's ``module.`` prefix."""
    return {name.removeprefix('module.'): value for name, value in weights_of(checkpoint).items()
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
    shown = printable(', '.join(names[:count]))
    return f'{shown}, … ({len(names)} in all)' if len(names) > count else shown or 'nothing'
