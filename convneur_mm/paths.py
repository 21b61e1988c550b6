"""Paths of the shipped configs, in a checkout and in an installed wheel."""
from __future__ import annotations

import difflib
from pathlib import Path


def config_root() -> Path:
    """Return the folder of the shipped configs: ``.mim/configs`` in an installed wheel, ``configs`` in a checkout."""
    package = Path(__file__).resolve().parent
    packed = package / '.mim' / 'configs'
    return packed if packed.is_dir() else package.parent / 'configs'


def config(name: str) -> str:
    """Return the path of a shipped config, for ``_base_ = __import__('convneur_mm').config('…')`` in any folder.

    Args:
        name (str): Name of a config, with or without ``.py``, e.g. 'cascade_rcnn_convneur_m3_1x_coco'.

    Returns:
        str: Absolute path.

    Raises:
        ValueError: If there is no such config; names similar ones.
    """
    root = config_root()
    path = root / f'{name.removesuffix(".py")}.py'
    if path.is_file():
        return str(path)
    known = sorted(str(p.relative_to(root).with_suffix('')) for p in root.rglob('*.py'))
    near = difflib.get_close_matches(name.removesuffix('.py'), known, n=4, cutoff=0.3) or known
    raise ValueError(f'no config {name!r} in {root}; near ones: {", ".join(near)}')
