"""Checks the packages that convneur_mm stands on, and names the commands that mend an environment that does not fit.

Models and operators need torch, torchvision and mmengine alone. mmcv, mmdet, mmseg and mmpretrain are checked where
they are installed, and :func:`require` asks for them where something is about to use them.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from types import ModuleType
from typing import NamedTuple


class Package(NamedTuple):
    """A package of one of the two families.

    Attributes:
        distribution (str): What pip calls it.
        requirement (str): What to install of it.
        low (str): The oldest version that fits, '' for any.
        high (str): The first version that no longer fits, '' for none.
    """

    distribution: str
    requirement: str
    low: str = ''
    high: str = ''


class Family(NamedTuple):
    """The maintained forks, or the upstream packages: they share import names, so an environment holds one of the two.

    Attributes:
        packages (dict[str, Package]): By import name.
        build_tools (tuple[str, ...]): What compiling mmcv and building source packages needs beside torch.
        limits (tuple[str, ...]): Requirements that every installation must repeat, or pip would go beyond them.
    """

    packages: dict[str, Package]
    build_tools: tuple[str, ...]
    limits: tuple[str, ...] = ()


# The versions are those of requirements/primary.txt and requirements/openmmlab.txt, which no wheel carries.
PRIMARY = Family(
    {
        'torch': Package('torch', 'torch==2.12.1'),
        'torchvision': Package('torchvision', 'torchvision==0.27.1'),
        'cv2': Package('opencv-python', 'opencv-python'),
        'mmengine': Package('onedl-mmengine', 'onedl-mmengine==0.10.12', '0.10.8', '0.11'),
        'mmcv': Package('onedl-mmcv', 'onedl-mmcv==2.3.6', '2.3.0', '2.4'),
        'mmdet': Package('onedl-mmdetection', 'onedl-mmdetection==3.5.1', '3.4.0', '3.6'),
        'mmseg': Package('onedl-mmsegmentation', 'onedl-mmsegmentation==1.4.2', '1.3.0', '1.5'),
        'mmpretrain': Package('onedl-mmpretrain', 'onedl-mmpretrain==1.3.6', '1.3.0', '1.4'),
    },
    build_tools=('setuptools>=77,<82', 'wheel', 'packaging', 'ninja', 'psutil'))
UPSTREAM = Family(
    {
        'torch': Package('torch', 'torch==2.1.2'),
        'torchvision': Package('torchvision', 'torchvision==0.16.2'),
        'cv2': Package('opencv-python', 'opencv-python<4.12'),
        'mmengine': Package('mmengine', 'mmengine==0.10.7', '0.10.0', '0.11'),
        'mmcv': Package('mmcv', 'mmcv==2.1.0', '2.0.0', '2.2'),
        'mmdet': Package('mmdet', 'mmdet==3.3.0', '3.1.0', '3.4'),
        # It imports the other two without naming them.
        'mmseg': Package('mmsegmentation', 'mmsegmentation==1.2.2 ftfy regex', '1.0.0', '1.3'),
        'mmpretrain': Package('mmpretrain', 'mmpretrain==1.2.0', '1.0.0', '1.3'),
    },
    build_tools=('setuptools>=77,<81', 'wheel', 'packaging', 'ninja', 'psutil'),
    # torch 2.1 was built for numpy 1, and OpenCV 4.12 and later want numpy 2.
    limits=('numpy<2', 'opencv-python<4.12'))
UPSTREAM_PYTHON = (3, 11)  # the newest that torch 2.1 has wheels for
RUNNING_PYTHON = sys.version_info[:2]

# mmengine imports cv2, and its fork does not name it as a requirement.
CORE = ('torch', 'torchvision', 'cv2', 'mmengine')
SHARED = ('torch', 'torchvision', 'cv2')  # of the same name in both families


class StackError(ImportError):
    """The environment lacks a package, mixes families, or holds a version that does not fit."""


def installed_versions() -> dict[str, str]:
    """Versions of the distributions that matter here, by name; those not installed are left out."""
    versions = {}
    for name in {package.distribution for family in (PRIMARY, UPSTREAM) for package in family.packages.values()}:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # OpenCV comes in distributions of several names, and from system packages without any.
    if 'opencv-python' not in versions and importlib.util.find_spec('cv2'):
        versions['opencv-python'] = 'unknown'
    return versions


def _install(family: Family, names: Iterable[str]) -> str:
    """Commands that install packages, given by import name, in an order that works: torch, then mmcv, then the rest."""
    names = set(names)

    def pip(*options: str, of: Iterable[str] = (), also: tuple[str, ...] = ()) -> str:
        parts = [*options, *(family.packages[name].requirement for name in family.packages if name in of)]
        parts += [part for part in also if part not in parts]
        return ' '.join(['pip install', *(f"'{part}'" if set(part) & set('<>') else part for part in parts)])

    commands = []
    if names & {'torch', 'torchvision'}:
        commands.append(pip(of=names & {'torch', 'torchvision'}, also=family.limits))
    # Source packages, whose set-up imports torch: they are built with the tools that are installed beside it.
    from_source = names & {'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
    if from_source:
        commands.append(pip(*family.build_tools))
    if 'mmcv' in names:
        # Compiled for one torch, which pip's wheel cache does not know. The last command brings its requirements.
        commands.append('MMCV_WITH_OPS=1 ' + pip(
            '--no-cache-dir', '--no-build-isolation', '--force-reinstall', '--no-deps', of={'mmcv'}))
    rest = names - {'torch', 'torchvision'}
    if rest:
        commands.append(pip(*(['--no-build-isolation'] if from_source else []), of=rest, also=family.limits))
    return ' && '.join(commands)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split('+')[0].split('.'):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _found(family: Family, versions: Mapping[str, str]) -> dict[str, str]:
    """Versions of what is installed of a family, by import name."""
    return {name: versions[package.distribution] for name, package in family.packages.items()
            if package.distribution in versions}


def _family(versions: Mapping[str, str]) -> Family:
    return UPSTREAM if set(_found(UPSTREAM, versions)) - set(SHARED) else PRIMARY


def _mend(names: Iterable[str], versions: Mapping[str, str], python: tuple[int, int], before: str = '') -> str:
    """The remedy: commands that install packages of the family that is there, after the command ``before``."""
    family = _family(versions)
    if family is UPSTREAM and python > UPSTREAM_PYTHON:
        old = [name for name in _found(UPSTREAM, versions) if name not in SHARED]
        return ('The upstream packages, with torch 2.1, need Python '
                f'{".".join(map(str, UPSTREAM_PYTHON))} or older. In this environment, mend with: ' + _replace(
                    [UPSTREAM.packages[name].distribution for name in old], {*old, *names}, before))
    return f'Mend with: {before}{_install(family, names)}'


def _replace(distributions: Iterable[str], names: Iterable[str], before: str = '') -> str:
    """Commands that remove distributions and install packages of the primary stack, given by import name."""
    return f'pip uninstall -y {" ".join(distributions)} && {before}{_install(PRIMARY, names)}'


def check_versions(versions: Mapping[str, str], needed: Iterable[str] = CORE, purpose: str = 'convneur_mm',
                   python: tuple[int, int] = RUNNING_PYTHON) -> None:
    """Checks distribution versions: that what is needed is there, and that all that is there fits together.

    Args:
        versions (Mapping[str, str]): As :func:`installed_versions` returns them.
        needed (Iterable[str]): Import names of the packages that must be there. Defaults to :data:`CORE`.
        purpose (str): What needs them, for the message. Defaults to 'convneur_mm'.
        python (tuple[int, int]): Version of Python, which the remedy depends on. Defaults to the running one.

    Raises:
        StackError: Names what is wrong and the commands that mend it.
    """
    forks, upstream = ([name for name in _found(family, versions) if name not in SHARED]
                       for family in (PRIMARY, UPSTREAM))
    if forks and upstream:
        # Both families unpack into the same folders, so uninstalling one damages the other: all goes, one comes back.
        distributions = [[family.packages[name].distribution for name in names]
                         for family, names in ((UPSTREAM, upstream), (PRIMARY, forks))]
        command = _replace(sum(distributions, []), {*CORE, *forks, *upstream})
        raise StackError('two families of OpenMMLab packages are installed over each other: '
                         f'{" and ".join(map(", ".join, distributions))}. Mend with: {command}')
    family = _family(versions)
    found = _found(family, versions)

    missing = [name for name in needed if name not in found]
    if missing:
        distributions = {name: family.packages[name].distribution for name in missing}
        labels = [d if d == name else f'{d} ({name})' for name, d in distributions.items()]
        raise StackError(f'{purpose} needs {", ".join(labels)}, not installed here. '
                         f'{_mend(missing, versions, python)}')

    for name, version in found.items():
        distribution, _, low, high = family.packages[name]
        if low and not _numbers(low) <= _numbers(version) < _numbers(high):
            raise StackError(f'{distribution} {version} ({name}) does not fit: expected at least {low} and below '
                             f'{high}. {_mend([name], versions, python)}')

    torch, vision = versions['torch'], versions['torchvision']
    # torchvision 0.(15 + x) belongs to torch 2.x, and both to the same kind of build.
    paired = _numbers(torch)[0] != 2 or _numbers(vision)[:2] == (0, 15 + _numbers(torch)[1])
    if not paired or ('+cpu' in torch) != ('+cpu' in vision):
        names = ['torch', 'torchvision']
        if 'mmcv' in found and f'torch=={torch.split("+")[0]}' != family.packages['torch'].requirement:
            names.append('mmcv')  # compiled for the torch that goes
        # Uninstalled first, as pip takes 2.12.1+cpu for 2.12.1.
        remedy = _mend(names, versions, python, before='pip uninstall -y torch torchvision && ')
        raise StackError(f'torchvision {vision} was not built for torch {torch}, its operators will not load. {remedy}')


def check_operators(versions: Mapping[str, str], load: Callable[[str], ModuleType] = importlib.import_module,
                    python: tuple[int, int] = RUNNING_PYTHON) -> None:
    """Checks that mmcv was compiled with its operators, against the torch that is installed.

    Args:
        versions (Mapping[str, str]): As :func:`installed_versions` returns them.
        load (Callable[[str], ModuleType]): Imports a module by name. Defaults to ``importlib.import_module``.
        python (tuple[int, int]): See :func:`check_versions`.

    Raises:
        StackError: Names what is wrong and the commands that mend it.
    """
    load('torch')
    import_module('mmcv', load)
    try:
        load('mmcv._ext')
    except ImportError as error:
        raise StackError(f'mmcv\'s compiled operators do not load ({error}): mmcv was built without them or for '
                         f'another torch. {_mend(["mmcv"], versions, python)}') from error


def check_cuda_operators(versions: Mapping[str, str], load: Callable[[str], ModuleType] = importlib.import_module,
                         python: tuple[int, int] = RUNNING_PYTHON) -> None:
    """Checks that mmcv's operators were compiled for GPUs if there is one: mmdet's models fail in the first step else.

    An environment that was set up where no GPU is visible, on a login node say, has them for CPUs alone.

    Args:
        versions (Mapping[str, str]): As :func:`installed_versions` returns them.
        load (Callable[[str], ModuleType]): See :func:`check_operators`.
        python (tuple[int, int]): See :func:`check_versions`.

    Raises:
        StackError: Names the commands that mend it.
    """
    if load('torch').cuda.is_available() and load('mmcv.ops').get_compiling_cuda_version() == 'not available':
        raise StackError('mmcv was compiled without its CUDA operators, which detectors need on this machine\'s GPU. '
                         'In a checkout, run tools/setup_env.sh here; else '
                         f'{_mend(["mmcv"], versions, python).replace("Mend", "mend", 1)}')


def import_module(name: str, load: Callable[[str], ModuleType] = importlib.import_module) -> ModuleType:
    """Imports a module of a package that is installed.

    Args:
        name (str): Name of the module.
        load (Callable[[str], ModuleType]): See :func:`check_operators`.

    Raises:
        StackError: If the import fails, with the reason. MMEngine goes on without the package in this case.
    """
    try:
        return load(name)
    except Exception as error:  # the packages also assert each other's versions when they are imported
        hint = f'`python -c "import {name}"` shows where'
        if 'libGL' in str(error) or 'libgthread' in str(error):
            hint = 'OpenCV lacks system libraries; on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0'
        message = ' '.join(str(error).split())
        raise StackError(f'{name} is installed, but importing it fails with {type(error).__name__}: {message}. '
                         f'{hint}') from error


def check_stack() -> None:
    """Checks that what the models and operators need is there, and that all OpenMMLab packages that are there fit.

    Raises:
        StackError: Names what is wrong and the commands that mend it.
    """
    versions = installed_versions()
    check_versions(versions)
    import_module('cv2')
    if 'mmcv' in _found(_family(versions), versions):
        check_operators(versions)


@functools.cache
def require(name: str) -> ModuleType:
    """Imports a module of mmcv, mmdet, mmseg or mmpretrain, which most of convneur_mm does without.

    Args:
        name (str): Name of the package, or of a module in it.

    Returns:
        ModuleType: The module.

    Raises:
        StackError: If the package or mmcv is not installed, does not fit, or fails when it is imported; names the
            commands that mend it.
    """
    versions = installed_versions()
    package = name.partition('.')[0]
    check_versions(versions, needed=dict.fromkeys((*CORE, 'mmcv', package)), purpose=name)
    check_operators(versions)
    return import_module(name)
