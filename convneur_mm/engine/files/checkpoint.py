"""Read checkpoints by name, and load weights with clear messages about those that do not fit."""
from __future__ import annotations

import os
import os.path as osp
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import torch
import torch.nn as nn
from filelock import FileLock
from mmengine.dist import all_gather_object
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .errors import some
from .safe_files import pickle_is_allowed, safe_loading
from .weights_file import (
    CheckpointError,
    CheckpointNotFoundError,
    check_structure,
    load_file,
    one_line,
    weights_of,
)

# Schemes that MMEngine resolves in its own ways; any other name is a path or a URL.
MMENGINE_SCHEMES = ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls', 'pavi', 's3', 'petrel')
# Names that ConvNeur lacks: those of timm's and the authors' ConvNeXt, and of mmpretrain's layer scale.
CONVNEXT = re.compile(r'\bstages\.\d+\.(blocks\.)?\d+\.((conv_dw|dwconv)\.weight|gamma)$')
CONVERTER = 'tools/model_converters/convnext_to_convneur.py'


def fetch_checkpoint(filename: str) -> str:
    """Return a local path of a checkpoint given by path or URL.

    Each machine downloads once, to torch's hub folder below the name of the host, so that files of one name from
    several addresses stay apart. For a URL, all processes of a group must call this at the same time, and all fail if
    one cannot get the file.

    Raises:
        CheckpointNotFoundError: If ``filename`` is a path and no such file exists.
        CheckpointError: If ``filename`` is a URL that cannot be fetched.
    """
    if not urlparse(filename).scheme:
        path = osp.expanduser(filename)
        if not osp.isfile(path):
            raise CheckpointNotFoundError(f'no such checkpoint: {filename}')
        return path
    url = urlparse(filename)
    address = f'/{url.netloc}/{unquote(url.path)}{"?" if url.query else ""}{url.query}'
    path = osp.join(torch.hub.get_dir(), 'checkpoints', osp.normpath(address).lstrip('/'))
    error = None
    try:
        _download(filename, path)
    except OSError as failure:
        error = (f'{filename} could not be fetched ({one_line(failure)}); check the address, or download the file to '
                 f'{path}')
    # This is also the barrier of all processes, even those that found the file or failed.
    errors = [found for found in all_gather_object(error) if found]
    if errors:
        raise CheckpointError(error or errors[0])
    return path


def _download(url: str, path: str) -> None:
    """Download a file unless it exists; one process of each machine does so while the others wait.

    The processes may not have joined a group yet, so they use a lock in the file system. torch downloads to another
    name, and renames the file when it is complete.
    """
    if osp.isfile(path):
        return
    os.makedirs(osp.dirname(path), exist_ok=True)
    with FileLock(f'{path}.lock'):
        if not osp.isfile(path):
            MMLogger.get_current_instance().info(f'downloading {url} to {path}')
            torch.hub.download_url_to_file(url, path)


def is_mmengine_name(filename: str) -> bool:
    """Return whether MMEngine must resolve a checkpoint's name, as for ``torchvision://resnet50``."""
    return urlparse(filename).scheme in MMENGINE_SCHEMES


def read_checkpoint(filename: str, allow_pickle: bool = False, mmap: bool = False) -> dict:
    """Read a checkpoint onto the CPU: tensors, plain values, and MMEngine's log buffers.

    Args:
        filename (str): Path, URL, or a name that MMEngine knows, such as ``torchvision://resnet50``. The file may be
            in one of torch's formats or a safetensors file.
        allow_pickle (bool): Whether a file that holds arbitrary Python objects may be loaded too. Unpickling runs code
            in the file, so allow this only for files from a source you trust. Defaults to False.
        mmap (bool): Whether tensors stay in the file until they are used, if its format allows that, which makes it
            cheap to inspect a file. Defaults to False.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        UnsafeCheckpointError: If the file needs pickle and that is not allowed.
        CheckpointError: If the file cannot be fetched or is not a checkpoint.
    """
    allow_pickle = allow_pickle or pickle_is_allowed()
    if is_mmengine_name(filename):
        with safe_loading(allow_pickle):
            return CheckpointLoader.load_checkpoint(filename, 'cpu')
    checkpoint = load_file(fetch_checkpoint(filename), 'cpu', allow_pickle, mmap)
    check_structure(checkpoint, filename)
    return checkpoint


def checkpoint_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of MMEngine, timm or plain torch, without DDP's ``module.`` prefix."""
    return {name.removeprefix('module.'): value for name, value in weights_of(checkpoint).items()
            if isinstance(value, Tensor)}


def as_parts(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Add the prefixes of a model's backbone and head to the weights of a classifier, as mmpretrain names them.

    Files of OverLoCK's authors hold the weights of each part without such a prefix.

    Args:
        own (Mapping[str, Tensor]): The model's state dict.
        weights (Mapping[str, Tensor]): Weights of the checkpoint.

    Returns:
        dict[str, Tensor] | None: None if a weight has a name of the model already, or weights of the model are missing.
    """
    if any(name in own for name in weights):
        return None
    renamed = {next((whole for part in ('backbone', 'head') if (whole := f'{part}.{name}') in own), name): value
               for name, value in weights.items()}
    return None if compare_weights(own, renamed).missing else renamed


class Differences(NamedTuple):
    """Differences between the weights of a checkpoint and those of a model.

    Attributes:
        missing (list[str]): Names of weights of the model that the checkpoint lacks.
        other_shape (dict[str, tuple]): (Shape in the checkpoint, shape in the model) of weights whose shapes differ.
        unused (list[str]): Names of weights of the checkpoint that the model does not have.
    """

    missing: list[str]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: list[str]

    def for_prediction(self) -> Differences:
        """Return the differences without auxiliary heads, which supervise a segmentor's training alone."""
        def used(name: str) -> bool:
            return not name.startswith('auxiliary_head.')

        return Differences(list(filter(used, self.missing)),
                           {name: shapes for name, shapes in self.other_shape.items() if used(name)},
                           list(filter(used, self.unused)))


def compare_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Differences:
    """Compare the weights of a checkpoint with a model's state dict by names and shapes."""
    # Modules may keep things other than tensors in a state dict.
    own = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    # Old checkpoints lack BatchNorm's batch counts, which nothing needs.
    return Differences(
        [name for name in own if name not in weights and not name.endswith('.num_batches_tracked')],
        {name: (tuple(weights[name].shape), tuple(value.shape)) for name, value in own.items()
         if name in weights and weights[name].shape != value.shape},
        [name for name in weights if name not in own])


def check_some_match(expected: Iterable[str], found: Iterable[str], filename: str) -> None:
    """Raise a CheckpointError if the checkpoint has none of the model's weights."""
    expected, found = list(expected), list(found)
    if not set(expected) & set(found):
        raise CheckpointError(f'{filename} holds none of the model\'s weights: the model has {some(expected, 4)}, '
                              f'the checkpoint {some(found, 4)}{_convnext_remedy(found, filename)}')


def check_all_match(own: Collection[str], differences: Differences, filename: str, classes: tuple[int, int] | None
                    ) -> None:
    """Raise a CheckpointError unless the checkpoint has every weight of a model in the right shape.

    Args:
        own (Collection[str]): Names of the model's weights.
        differences (Differences): Differences between checkpoint and model.
        filename (str): Name of the checkpoint.
        classes (tuple[int, int] | None): Number of classes (that the checkpoint was trained for, of the data), if
            both are known.
    """
    if not (differences.missing or differences.other_shape):
        return
    total, missing = Counter(map(_module, own)), Counter(map(_module, differences.missing))
    reshaped = Counter(map(_module, differences.other_shape))
    parts = []
    for module, count in total.items():
        if missing[module]:
            parts.append(f'{module}: {missing[module]} of {count} weights missing')
        if reshaped[module]:
            name = next(name for name in differences.other_shape if _module(name) == module)
            parts.append(f'{module}: {reshaped[module]} of {count} of other shapes, such as '
                         f'{_shapes(name, *differences.other_shape[name])}')
    raise CheckpointError(f'{filename} is not of this model: {"; ".join(parts)}{_guess(differences, classes)}')


def _module(name: str) -> str:
    return name.split('.')[0]


def _shapes(name: str, there: tuple, here: tuple) -> str:
    return f'{name} {there} there, {here} here'


def _guess(differences: Differences, classes: tuple[int, int] | None) -> str:
    """Return the probable cause as a question, or '' if none is likely."""
    reshaped = differences.other_shape
    if any(_module(name) == 'backbone' for name in reshaped):
        return '. Another arch of the backbone?'
    if any(_module(name) == 'backbone' for name in differences.missing):
        return '. Another backbone?'
    if differences.missing:
        return f'. Another {"head" if "head" in differences.missing[0].split(".")[0] else "model"}?'
    if all(there[1:] == here[1:] for there, here in reshaped.values()):
        numbers = (f' The checkpoint has {classes[0]}, the config {classes[1]}.'
                   if classes and classes[0] != classes[1] else '')
        return f'. Different classes?{numbers}'
    return ''


def check_backbone_shapes(differences: Differences, filename: str) -> None:
    """Raise a CheckpointError if weights of the backbone have other shapes in a checkpoint to fine-tune."""
    wrong = [_shapes(name, *shapes) for name, shapes in differences.other_shape.items() if _module(name) == 'backbone']
    if wrong:
        raise CheckpointError(f'{filename} is of another backbone, and MMEngine would leave random what does not fit: '
                              f'{some(wrong, 1)}. Another arch?')


def load_pretrained(backbone: nn.Module, filename: str, prefix: str | None = None, allow_pickle: bool = False) -> None:
    """Load a backbone from a checkpoint of itself or of a whole model, and log what is missing.

    Args:
        backbone (nn.Module): Backbone to fill.
        filename (str): Path or URL of the checkpoint.
        prefix (str | None): Prefix of the backbone's weights in the checkpoint. Defaults to 'backbone.' if the
            checkpoint has such names, else to ''.
        allow_pickle (bool): See :func:`read_checkpoint`. Defaults to False.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If the file needs pickle, or holds none of the backbone's weights, or some in other shapes.
    """
    weights = checkpoint_weights(read_checkpoint(filename, allow_pickle))
    own = backbone.state_dict()
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in weights) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    candidates = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    # Some of the authors' names are ours too, and the others would be skipped with a warning.
    remedy = _convnext_remedy(candidates, filename)
    if remedy:
        raise CheckpointError(f'{filename} has other names than the model{remedy}')
    check_some_match(own, candidates or weights, filename)
    reshaped = compare_weights(own, candidates).other_shape
    if reshaped:
        wrong = some([f'{name} {there} (expected {here})' for name, (there, here) in reshaped.items()], 4)
        if all(_without_ones(there) == _without_ones(here) for there, here in reshaped.values()):
            raise CheckpointError(f'{filename} holds 1 x 1 convolutions where the model has linear layers, or the '
                                  'reverse: save it again with each of these weights reshaped, '
                                  f'weight.reshape(expected shape): {wrong}')
        raise CheckpointError(f'{filename} holds weights of other shapes than the model, is it another arch? {wrong}')
    missing, unexpected = backbone.load_state_dict(candidates, strict=False)
    logger = MMLogger.get_current_instance()
    logger.info(f'loaded {len(own) - len(missing)} of {len(own)} backbone weights from {filename}')
    if missing:
        if _has_memory(own) and not _has_memory(candidates):  # mmpretrain's ConvNeXt-V2 uses our names
            remedy = f'. If these are weights of ConvNeXt-V2, convert them by {_conversion(filename)}'
        logger.warning(f'{filename} lacks {len(missing)} backbone weights, which stay as initialised: '
                       f'{some(missing, 4)}{remedy}')
    if unexpected:
        logger.info(f'{len(unexpected)} weights of {filename} are not used: {some(unexpected, 4)}')


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _has_memory(names: Iterable[str]) -> bool:
    return any('.global_branch.' in name for name in names)


def _convnext_remedy(names: Iterable[str], filename: str) -> str:
    """Return the command that converts these weights, or '' if their names are not those of ConvNeXt."""
    if not any(CONVNEXT.search(name) for name in names):
        return ''
    return f'. Those are weights of ConvNeXt: convert them by {_conversion(filename)}'


def _conversion(filename: str) -> str:
    return shlex.join([CONVERTER, filename, 'NEW.pth'])
