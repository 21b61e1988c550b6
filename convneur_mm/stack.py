"""Check the packages that convneur_mm needs, and name the commands that fix an unsuitable environment.

Models and operators need only torch, torchvision and mmengine. :func:`require` checks the other OpenMMLab packages
before they are used. mmcv need not be compiled, see :func:`provide_operators`.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

OLDEST_TORCH = (2, 10)  # torch.compile or torch.export fail in older versions
OPERATORS = Path(__file__).parent / 'ops' / 'mmcv_ext.py'


class Package(NamedTuple):
    """An OpenMMLab package, which exists twice under one import name, so that only one of the two can be installed.

    Attributes:
        fork (str): Requirement of the maintained fork, as in requirements/primary.txt.
        upstream (str): Requirement of the upstream package, as in requirements/openmmlab.txt, with its undeclared
            dependencies.
        oldest (str): Oldest suitable version of either.
    """

    fork: str
    upstream: str
    oldest: str


PACKAGES = {
    'mmengine': Package('onedl-mmengine==0.10.12', 'mmengine==0.10.7 setuptools<82', '0.10'),
    'mmcv': Package('onedl-mmcv==2.3.6', 'mmcv-lite==2.1.0', '2.0'),
    'mmdet': Package('onedl-mmdetection==3.5.1', 'mmdet==3.3.0', '3.0'),
    'mmseg': Package('onedl-mmsegmentation==1.4.2', 'mmsegmentation==1.2.2 ftfy regex', '1.0'),
    'mmpretrain': Package('onedl-mmpretrain==1.3.6', 'mmpretrain==1.2.0', '1.0'),
}


class StackError(ImportError):
    """The environment lacks a needed package, or has an unsuitable one."""


def distributions(name: str) -> tuple[list[str], list[str]]:
    """Return pip's names of an OpenMMLab package, given by import name: those of the fork, and the upstream ones."""
    fork, upstream = (requirement.partition('==')[0] for requirement in PACKAGES[name][:2])
    return [fork], [upstream, *(['mmcv'] if name == 'mmcv' else [])]  # for upstream mmcv: mmcv-lite, compiled mmcv


def installed_versions() -> dict[str, str]:
    """Return the installed versions of torch, torchvision and the OpenMMLab packages, by pip's names."""
    names = ['torch', 'torchvision', *(name for package in PACKAGES for names in distributions(package)
                                       for name in names)]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_packages(versions: Mapping[str, str], needed: Iterable[str], purpose: str) -> None:
    """Check that OpenMMLab packages are installed, only once each, and not too old.

    The packages check whether their versions fit together when they are imported.

    Args:
        versions (Mapping[str, str]): Result of :func:`installed_versions`.
        needed (Iterable[str]): Import names.
        purpose (str): User of the packages, for the message.

    Raises:
        StackError: Names the fault and the commands that fix it.
    """
    needed = list(dict.fromkeys(needed))
    found = {name: [[d for d in names if d in versions] for names in distributions(name)] for name in needed}
    doubled = [name for name, (forks, upstream) in found.items() if forks and upstream]
    if doubled:
        there = [distribution for name in doubled for kind in found[name] for distribution in kind]
        raise StackError(f'{" and ".join(there)} are installed over each other: the forks of the OpenMMLab packages '
                         'and the upstream ones share import names. Mend with: pip uninstall -y '
                         f'{" ".join(there)} && {_install(versions, doubled, upstream=False)}')
    missing = [name for name in needed if not any(found[name])]
    if missing:
        raise StackError(f'{purpose} needs {", ".join(missing)}, not installed here. '
                         f'Mend with: {_install(versions, missing)}')
    for name, (forks, upstream) in found.items():
        distribution, = (forks or upstream)[:1]
        if _numbers(versions[distribution]) < _numbers(PACKAGES[name].oldest):
            raise StackError(f'{distribution} {versions[distribution]} ({name}) is too old: expected at least '
                             f'{PACKAGES[name].oldest}. Mend with: {_install(versions, [name])}')


def _install(versions: Mapping[str, str], names: Iterable[str], *options: str, upstream: bool | None = None) -> str:
    """Return the command that installs packages, given by import name, of the installed family."""
    if upstream is None:
        upstream = any(d in versions for package in PACKAGES for d in distributions(package)[1])
    requirements = [part for name in names for part in PACKAGES[name][upstream].split()]
    return shlex.join(['pip', 'install', *options, *requirements])


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split('+')[0].split('.'):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def import_module(name: str, load: Callable[[str], ModuleType] = importlib.import_module) -> ModuleType:
    """Import a module of an installed package.

    Args:
        name (str): Name of the module.
        load (Callable[[str], ModuleType]): Function that imports. Defaults to ``importlib.import_module``.

    Raises:
        StackError: If the import fails, with the reason. MMEngine would continue without the package.
    """
    try:
        return load(name)
    except Exception as error:  # the packages also assert each other's versions when they are imported
        hint = f'`python -c "import {name}"` shows where'
        if 'libGL' in str(error) or 'libgthread' in str(error):
            hint = 'OpenCV lacks system libraries; on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0'
        elif name == 'torchvision':
            hint = ('It belongs to another torch. Mend with: pip uninstall -y torch torchvision && '
                    'pip install torch torchvision')
        elif name == 'mmcv._ext':
            hint = ('mmcv was compiled for another torch. Mend with an mmcv without compiled operators, in whose place '
                    f'torchvision\'s are used: {_without_operators()}')
        elif 'NoneType takes no arguments' in str(error):
            hint = ('transformers 5 no longer has what it imports from there. Mend with: pip install "transformers<5"')
        message = ' '.join(str(error).split())
        raise StackError(f'{name} is installed, but importing it fails with {type(error).__name__}: {message}. '
                         f'{hint}') from error


def check_torch() -> None:
    """Check that PyTorch is installed and not too old.

    Raises:
        StackError: Names the fault and the command that fixes it.
    """
    if not importlib.util.find_spec('torch'):
        raise StackError('convneur_mm needs torch, not installed here. Mend with: pip install torch torchvision')
    torch = import_module('torch')
    if _numbers(torch.__version__) < OLDEST_TORCH:
        raise StackError(f'torch {torch.__version__} is too old: expected at least '
                         f'{".".join(map(str, OLDEST_TORCH))}. Mend with: pip install --upgrade torch torchvision')


def check_stack() -> None:
    """Check the requirements of models and operators: PyTorch, torchvision, OpenCV and MMEngine.

    Raises:
        StackError: Names the fault and the commands that fix it.
    """
    check_torch()
    for name, distribution in (('torchvision', 'torchvision'), ('cv2', 'opencv-python')):
        if not importlib.util.find_spec(name):
            raise StackError(f'convneur_mm needs {name}, not installed here. Mend with: pip install {distribution}')
        import_module(name)  # MMEngine imports cv2; the check makes the error name it
    check_packages(installed_versions(), ['mmengine'], 'convneur_mm')


@functools.cache
def require(name: str) -> ModuleType:
    """Import a module of mmcv, mmdet, mmseg or mmpretrain, which most of convneur_mm does not need.

    Args:
        name (str): Name of the package, or of a module in it.

    Returns:
        ModuleType: The module.

    Raises:
        StackError: If the package or mmcv is not installed, does not fit, or fails when it is imported; names the
            commands that fix it.
    """
    package = name.partition('.')[0]
    check_packages(installed_versions(), ['mmengine', 'mmcv', package], name)
    if package in ('mmdet', 'mmseg'):
        # The packages treat an operator that fails to import as missing.
        import_module('mmcv._ext')
    return import_module(name)


# ---- mmcv's operators


class _OperatorFinder(MetaPathFinder):
    """Find our operators if no other finder has found mmcv's compiled ones."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        if fullname == 'mmcv._ext':
            return importlib.util.spec_from_file_location(fullname, OPERATORS)
        return None


def provide_operators() -> None:
    """Make Python load :mod:`convneur_mm.ops.mmcv_ext` as ``mmcv._ext`` if mmcv was not compiled.

    mmdet, mmseg and mmcv's layers look up operators when they are imported. If they were imported before this, their
    import has failed or they lack operators, so a warning is raised.
    """
    if any(isinstance(finder, _OperatorFinder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_OperatorFinder())
    early = [name for name in ('mmdet.models', 'mmseg.models', 'mmcv.cnn') if name in sys.modules]
    if early and 'mmcv._ext' not in sys.modules:
        warnings.warn(f'{early[0]} was imported before convneur_mm, and so without mmcv\'s operators, which '
                      'convneur_mm provides: import convneur_mm first', stacklevel=3)


def uses_compiled_mmcv() -> bool:
    """Return whether mmcv uses its own compiled operators; mmcv must be installed.

    Raises:
        StackError: If the operators were compiled for another torch.
    """
    return Path(import_module('mmcv._ext').__spec__.origin).name != OPERATORS.name


def check_cuda_operators() -> None:
    """Check that a compiled mmcv has operators for an available GPU, as else detectors fail in their first step.

    Raises:
        StackError: Names the command that fixes it.
    """
    import torch
    if torch.cuda.is_available() and import_module('mmcv.ops').get_compiling_cuda_version() == 'not available':
        raise StackError('mmcv was compiled without CUDA, and detectors need its operators on this machine\'s GPU. '
                         'Mend with an mmcv without compiled operators, in whose place torchvision\'s are used: '
                         f'{_without_operators()}')


def _without_operators() -> str:
    """Return the command that replaces the installed mmcv by one that is not compiled."""
    # pip's cache may hold a compiled one.
    command = _install(installed_versions(), ['mmcv'], '--force-reinstall', '--no-deps', '--no-cache-dir')
    return f'pip uninstall -y mmcv onedl-mmcv && {command}'


def compile_command() -> str:
    """Return the command that compiles mmcv with its own operators, of the installed family."""
    fork = 'onedl-mmcv' in installed_versions()
    return ('pip install \'setuptools<82\' wheel ninja psutil && MMCV_WITH_OPS=1 pip install --no-cache-dir '
            f'--no-build-isolation --force-reinstall --no-deps {"onedl-mmcv==2.3.6" if fork else "mmcv==2.1.0"} '
            '(needs PyTorch before 2.13)')
