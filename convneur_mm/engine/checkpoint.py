"""Loading weights with a clear word about what did not fit."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor


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


def load_pretrained(backbone: nn.Module, filename: str, prefix: str | None = None) -> None:
    """Loads a backbone from a checkpoint of itself or of a whole model, and logs what is missing.

    Args:
        backbone (nn.Module): Takes the weights.
        filename (str): Path or URL.
        prefix (str | None): Prefix of the backbone's weights in the checkpoint. Defaults to 'backbone.' where the
            checkpoint has such names, else to none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If none of the backbone's weights is in the file, or some have other shapes there.
    """
    weights = checkpoint_weights(CheckpointLoader.load_checkpoint(filename, map_location='cpu'))
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
