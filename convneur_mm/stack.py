"""Checks that the installed OpenMMLab packages are one consistent family, and says how to mend it if not."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib import metadata

# Import name → distribution names in the two families, and the versions each family was tested with: [at least, below).
PRIMARY = {
    'mmengine': ('onedl-mmengine', '0.10.8', '0.11'),
    'mmcv': ('onedl-mmcv', '2.3.0', '2.4'),
    'mmdet': ('onedl-mmdetection', '3.4.0', '3.6'),
    'mmseg': ('onedl-mmsegmentation', '1.3.0', '1.5'),
    'mmpretrain': ('onedl-mmpretrain', '1.3.0', '1.4'),
}
UPSTREAM = {
    'mmengine': ('mmengine', '0.10.0', '0.11'),
    'mmcv': ('mmcv', '2.0.0', '2.2'),
    'mmdet': ('mmdet', '3.1.0', '3.4'),
    'mmseg': ('mmsegmentation', '1.0.0', '1.3'),
    'mmpretrain': ('mmpretrain', '1.0.0', '1.3'),
}
# The pins of requirements/primary.txt, which an installed wheel does not carry.
PRIMARY_PINS = ('torch==2.12.1', 'torchvision==0.27.1', 'onedl-mmengine==0.10.12', 'onedl-mmcv==2.3.6',
                'onedl-mmdetection==3.5.1', 'onedl-mmsegmentation==1.4.2', 'onedl-mmpretrain==1.3.6')


class StackError(ImportError):
    """The environment lacks a package, mixes families, or holds a version that does not fit."""


def installed_versions() -> dict[str, str]:
    """Versions of the distributions that matter here, by name; those not installed are left out."""
    names = ['torch', 'torchvision'] + [names[0] for family in (PRIMARY, UPSTREAM) for names in family.values()]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _install(*requirements: str) -> str:
    """Commands that install pins of the primary stack in an order that works: torch, then mmcv, then the rest."""
    torch = [r for r in requirements if r.startswith('torch')]
    mmcv = [r for r in requirements if r.startswith('onedl-mmcv')]
    rest = [r for r in requirements if r not in torch + mmcv]
    commands = []
    if torch:
        commands.append(f'pip install {" ".join(torch)}')
    if mmcv or rest:
        commands.append("pip install 'setuptools>=77,<82' wheel ninja psutil")
    if mmcv:
        # mmcv is compiled, and pip's wheel cache does not know for which torch.
        commands.append('MMCV_WITH_OPS=1 pip install --no-cache-dir --no-build-isolation --force-reinstall --no-deps '
                        + mmcv[0])
    if rest:
        commands.append(f'pip install --no-build-isolation {" ".join(rest)}')
    return ' && '.join(commands)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split('+')[0].split('.'):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_versions(versions: Mapping[str, str]) -> None:
    """Checks distribution versions.

    Args:
        versions (Mapping[str, str]): As :func:`installed_versions` returns them.

    Raises:
        StackError: Names what is wrong and the commands that mend it.
    """
    pins = {pin.split('==')[0]: pin for pin in PRIMARY_PINS}
    upstream = [d for d, _, _ in UPSTREAM.values() if d in versions]
    forks = [d for d, _, _ in PRIMARY.values() if d in versions]
    if upstream and forks:
        # Both families unpack into the same folders, so uninstalling one damages the other: all goes, one comes back.
        raise StackError(
            f'two families of OpenMMLab packages are installed over each other: {", ".join(upstream)} and '
            f'{", ".join(forks)}. Mend with: pip uninstall -y {" ".join(upstream + forks)} && '
            f'{_install(*PRIMARY_PINS)}')
    family = UPSTREAM if upstream else PRIMARY

    missing = [d for d in ('torch', 'torchvision') if d not in versions]
    missing += [f'{d} ({name})' for name, (d, _, _) in family.items() if d not in versions]
    if missing:
        if family is UPSTREAM:
            command = 'pip install ' + ' '.join(
                f"'{d}>={low},<{high}'" for d, low, high in family.values() if d not in versions)
        else:
            command = _install(*(pins[m.split(' ')[0]] for m in missing))
        raise StackError(f'convneur_mm needs {", ".join(missing)}, not installed here. Mend with: {command}')

    for name, (distribution, low, high) in family.items():
        found = versions[distribution]
        if not _numbers(low) <= _numbers(found) < _numbers(high):
            command = (_install(pins[distribution]) if family is PRIMARY else
                       f"pip install '{distribution}>={low},<{high}'")
            raise StackError(f'{distribution} {found} ({name}) does not fit: expected at least {low} and below {high}. '
                             f'Mend with: {command}')

    torch, vision = versions['torch'], versions['torchvision']
    # torchvision 0.(15 + x) belongs to torch 2.x, and both to the same kind of build.
    paired = _numbers(torch)[0] != 2 or _numbers(vision)[:2] == (0, 15 + _numbers(torch)[1])
    if not paired or ('+cpu' in torch) != ('+cpu' in vision):
        raise StackError(f'torchvision {vision} was not built for torch {torch}, its operators will not load. '
                         f'Mend with: {_install(pins["torch"], pins["torchvision"], pins["onedl-mmcv"])}')


def check_operators(load: Callable[[str], object] = importlib.import_module) -> None:
    """Checks that mmcv was compiled with its operators, against the torch that is installed.

    Args:
        load (Callable[[str], object]): Imports a module by name. Defaults to ``importlib.import_module``.

    Raises:
        StackError: Names what is wrong and the commands that mend it.
    """
    load('torch')
    try:
        load('mmcv._ext')
    except ImportError as error:
        pin = next(p for p in PRIMARY_PINS if p.startswith('onedl-mmcv'))
        raise StackError(f'mmcv\'s compiled operators do not load ({error}): mmcv was built without them or for '
                         f'another torch. Mend with: {_install(pin)}') from error


def check_stack() -> None:
    """Checks versions and compiled operators; see :func:`check_versions` and :func:`check_operators`."""
    check_versions(installed_versions())
    check_operators()
