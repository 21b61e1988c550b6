"""Published ConvNeXt weights from which a ConvNeur can start, with their licences."""
from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..engine.files.weights_file import CheckpointNotFoundError


class Source(NamedTuple):
    """Weights on the hub of Hugging Face, in timm's layout.

    Attributes:
        arch (str): The arch of ConvNeur that the converted weights fit.
        licence (str): The licence of the weights, as timm states it.
        top1 (float | None): Published ImageNet-1K accuracy in % at 288 x 288 pixels, of timm's
            results/results-imagenet.csv; None if the weights have no classifier.
    """

    arch: str
    licence: str
    top1: float | None = None


# By timm's name. Licences that allow commercial use come first.
SOURCES = {
    'convnext_atto.d2_in1k': Source('m1', 'apache-2.0', 77.0),
    'convnext_femto.d1_in1k': Source('m2', 'apache-2.0', 78.7),
    'convnext_pico.d1_in1k': Source('m3', 'apache-2.0', 80.4),
    'convnext_nano.d1h_in1k': Source('m4', 'apache-2.0', 81.5),
    'convnext_nano.in12k_ft_in1k': Source('m4', 'apache-2.0', 82.9),
    'convnext_tiny.fb_in1k': Source('m5', 'apache-2.0', 82.7),
    'convnext_tiny.in12k_ft_in1k': Source('m5', 'apache-2.0', 84.5),
    'convnext_base.fb_in1k': Source('m6', 'apache-2.0', 84.4),
    'convnext_tiny.dinov3_lvd1689m': Source('m5', 'dinov3-license'),
    'convnext_base.dinov3_lvd1689m': Source('m6', 'dinov3-license'),
    'convnextv2_atto.fcmae_ft_in1k': Source('m1', 'cc-by-nc-4.0', 77.8),
    'convnextv2_femto.fcmae_ft_in1k': Source('m2', 'cc-by-nc-4.0', 79.3),
    'convnextv2_pico.fcmae_ft_in1k': Source('m3', 'cc-by-nc-4.0', 81.1),
    'convnextv2_nano.fcmae_ft_in1k': Source('m4', 'cc-by-nc-4.0', 82.5),
    'convnextv2_tiny.fcmae_ft_in1k': Source('m5', 'cc-by-nc-4.0', 83.5),
    'convnextv2_base.fcmae_ft_in1k': Source('m6', 'cc-by-nc-4.0', 85.5),
}
# Where a downloaded file is looked for, from the current folder.
FOLDER = 'weights'


def find_source(name: str) -> Path:
    """Return the local file with the weights of a source; nothing is downloaded.

    It is looked for in ``weights/``, under its name, and in the cache of huggingface_hub, if that is installed.

    Args:
        name (str): A key of ``SOURCES``.

    Raises:
        ValueError: If there is no such source.
        CheckpointNotFoundError: If the file is in neither place; the message says what to download.
    """
    if name not in SOURCES:
        raise ValueError(f'no weights are known as {name!r}; there are {", ".join(SOURCES)}')
    file = Path(FOLDER, f'{name}.safetensors')
    if file.is_file():
        return file
    cached = _cached(f'timm/{name}')
    if cached is not None:
        return cached
    raise CheckpointNotFoundError(
        f'{name} is not on this machine: download https://huggingface.co/timm/{name}/resolve/main/model.safetensors '
        f'to {file}, or run huggingface-cli download timm/{name} model.safetensors. Its licence: '
        f'{SOURCES[name].licence}')


def _cached(repo: str) -> Path | None:
    """Return a repository's weights in the cache of huggingface_hub, or None."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(repo, 'model.safetensors')
    return Path(found) if isinstance(found, (str, os.PathLike)) else None
