"""Compiles mmcv, which has no ready-made wheel on the package index, in a few minutes instead of half an hour.

Nearly all of the time goes into 58 short files that bind mmcv's operators to Python (``ops/csrc/pytorch/*.cpp``): each
parses all of PyTorch's headers again, and asks for debug information. Compiled as one file without it, by mmcv's own
build, they give the same module.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shell import SetupError, lock, minutes, run, say

BINDINGS = Path('mmcv/ops/csrc/pytorch')
# What a name in TORCH_CUDA_ARCH_LIST may look like: 9.0, 9.0a, 8.6+PTX.
ARCH = re.compile(r'(\d+)\.(\d)[a-z]?(\+PTX)?')


@dataclass(frozen=True)
class Torch:
    """What the environment's PyTorch says of itself.

    Attributes:
        version (str): With its build, such as '2.12.1+cpu'.
        cuda (str | None): The CUDA it was built for, such as '13.0'.
        gpus (list[str]): Compute capabilities of the GPUs it can use here, such as '9.0'.
        platform (str): Python's version and the operating system, as wheels spell them.
    """

    version: str
    cuda: str | None
    gpus: list[str]
    platform: str


def cuda_archs(torch: Torch, env: Mapping[str, str]) -> list[str]:
    """The compute capabilities to compile mmcv's CUDA operators for; none where they are not wanted.

    Raises:
        SetupError: If CUDA operators are forced where no GPU is visible and none is named.
    """
    forced = env.get('FORCE_CUDA') == '1'
    if not torch.cuda or not (torch.gpus or forced):
        return []
    named = env.get('TORCH_CUDA_ARCH_LIST', '').replace(';', ' ').split()
    if not named and not torch.gpus:
        raise SetupError('FORCE_CUDA=1 where no GPU is visible: name the compute capabilities of the GPUs that will be '
                         'used, e.g. TORCH_CUDA_ARCH_LIST="8.0;9.0" (A100 8.0, RTX 4090 8.9, H100 9.0, RTX 5090 12.0)')
    return sorted(set(named or torch.gpus))


def serves(archs: Sequence[str], gpu: str) -> bool:
    """Whether code compiled for ``archs`` runs on a GPU of compute capability ``gpu``.

    It runs on the same major version from the same minor one on, and as PTX on everything newer. Of a name that is no
    number (Hopper) it is believed.
    """
    major, minor = map(int, gpu.split('.'))
    for arch in archs:
        match = ARCH.fullmatch(arch)
        if not match:
            return True
        built = int(match[1]), int(match[2])
        if built[0] == major and built[1] <= minor or match[3] and built <= (major, minor):
            return True
    return False


def wheel_key(torch: Torch, archs: Sequence[str]) -> str:
    """Names what a compiled wheel fits: Python, PyTorch, the system, and the GPUs."""
    device = f'cu{torch.cuda}-sm{"_".join(archs)}' if archs else 'cpu'
    return re.sub(r'[^\w.+-]', '_', f'{torch.platform}-torch{torch.version}-{device}')


def merge_bindings(source: Path) -> int:
    """Makes one file of mmcv's binding files, in place, and returns how many they were.

    Raises:
        SetupError: If the sources are not laid out as expected.
    """
    folder = source / BINDINGS
    files = sorted(folder.glob('*.cpp'))
    if not (folder / 'pybind.cpp').is_file() or len(files) < 2:
        raise SetupError(f'mmcv\'s sources have no {BINDINGS}/pybind.cpp among other files')
    (folder / 'bindings').mkdir()
    for path in files:
        # mmcv's setup.py compiles each *.cpp of the folder itself.
        path.rename(folder / 'bindings' / path.name)
    lines = ['#include <torch/extension.h>', *(f'#include "bindings/{path.name}"' for path in files)]
    (folder / 'all_bindings.cpp').write_text('\n'.join(lines) + '\n')
    return len(files)


def ninja_progress(text: str, seconds: float) -> str:
    """Files compiled and, once their number says something of the others, the time left."""
    steps = re.findall(r'\[(\d+)/(\d+)\]', text)
    if not steps:
        return ''
    done, total = map(int, steps[-1])
    shown = f'file {done} of {total}'
    return shown if 4 * done < total else f'{shown}, about {minutes(seconds * (total - done) / done)} left'


def num_jobs(env: Mapping[str, str]) -> int:
    """Compiler processes: one for each core this process may use, and for each 3 GiB of free memory."""
    if env.get('MAX_JOBS'):
        return int(env['MAX_JOBS'])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        free = int(re.search(r'MemAvailable:\s+(\d+)', Path('/proc/meminfo').read_text())[1]) // 2 ** 20
    except (OSError, TypeError):
        free = 8
    return max(1, min(cores, free // 3))


def check_nvcc(torch: Torch, env: Mapping[str, str]) -> None:
    """Asks for a CUDA compiler of PyTorch's major version, before anything is compiled.

    Raises:
        SetupError: If there is none.
    """
    home = env.get('CUDA_HOME') or env.get('CUDA_PATH')
    nvcc = shutil.which('nvcc', path=f'{home}/bin') if home else shutil.which('nvcc') or shutil.which(
        'nvcc', path='/usr/local/cuda/bin')
    wanted = f'install the CUDA toolkit {torch.cuda} or set CUDA_HOME to it'
    if not nvcc:
        raise SetupError(f'mmcv\'s CUDA operators need the CUDA compiler nvcc, which was not found: {wanted}')
    text = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    found = re.search(r'release (\d+)\.(\d+)', text)
    if found and found[1] != torch.cuda.split('.')[0]:
        raise SetupError(f'{nvcc} is of CUDA {found[1]}.{found[2]}, but torch {torch.version} was built for '
                         f'{torch.cuda}: {wanted}')


def find_wheel(folder: Path, requirement: str) -> Path | None:
    """The compiled wheel of a pinned requirement in a folder, if it is there."""
    name, version = requirement.split('==')
    return next(iter(sorted(folder.glob(f'{name.replace("-", "_")}-{version}-*.whl'))), None)


def install(python: Path, requirement: str, torch: Torch, cache: Path, env: Mapping[str, str],
            constraints: Path, problem: Callable[[], str]) -> str:
    """Installs mmcv into an environment that has PyTorch and MMEngine, compiling it unless that was done before.

    Args:
        python (Path): The environment's interpreter.
        requirement (str): Pinned, such as 'onedl-mmcv==2.3.6'.
        torch (Torch): What to compile for.
        cache (Path): Keeps compiled wheels, in a folder for each :func:`wheel_key`: pip's own cache does not know the
            version of PyTorch.
        env (Mapping[str, str]): Environment of the commands.
        constraints (Path): File with the versions of the packages that mmcv depends on.
        problem (Callable[[], str]): Says what keeps the environment's mmcv from importing with all of its operators;
            '' if nothing does. Asked after installing.

    Returns:
        str: How it was done, for a person.

    Raises:
        SetupError: If mmcv compiles neither way.
    """
    archs = cuda_archs(torch, env)
    key = wheel_key(torch, archs)
    folder = cache / 'wheels' / key
    pip = [python, '-m', 'pip', '--disable-pip-version-check']
    env = dict(env, PATH=f'{python.parent}{os.pathsep}{env.get("PATH", "")}')

    def install_wheel(wheel: Path) -> None:
        run([*pip, 'install', '--force-reinstall', '--no-deps', wheel], folder / 'install.log', env)
        # The packages it depends on.
        run([*pip, 'install', '-c', constraints, requirement], folder / 'install.log', env)

    with lock(folder / '.lock', f'mmcv for {key}'):
        wheel = find_wheel(folder, requirement)
        if wheel:
            install_wheel(wheel)
            if not problem():
                return f'reused {wheel}'
            say(f'    {wheel} does not import here ({problem()}); compiling it again')
        if archs:
            check_nvcc(torch, env)
        jobs = num_jobs(env)
        env.update(MMCV_WITH_OPS='1', MAX_JOBS=str(jobs), PYTHONUNBUFFERED='1', FORCE_CUDA=str(int(bool(archs))),
                   TORCH_CUDA_ARCH_LIST=';'.join(archs))
        say(f'    compiling {requirement} for {key}, {jobs} job(s); log: {folder}/build.log')

        def build_and_try(build: Callable, name: str) -> str:
            with tempfile.TemporaryDirectory(dir=folder, prefix='build.') as scratch:
                build(pip, requirement, Path(scratch), env, folder / 'build.log')
                built = find_wheel(Path(scratch), requirement)
                if not built:
                    raise SetupError(f'the build left no wheel of {requirement}; log: {folder}/build.log')
                install_wheel(built)
                if problem():
                    raise SetupError(f'the compiled mmcv does not import: {problem()}')
                os.replace(built, folder / built.name)
                return f'compiled ({name} build)'

        try:
            return build_and_try(_build_fast, 'fast')
        except SetupError as error:
            kept = shutil.copy(folder / 'build.log', folder / 'fast-build.log')
            say(f'    the fast build did not work ({str(error).splitlines()[-1]}); log: {kept}. Going on with mmcv\'s '
                'plain build, which takes ten to thirty minutes')
            return build_and_try(_build_plain, 'plain')


def _build_fast(pip: list, requirement: str, scratch: Path, env: dict, log: Path) -> None:
    name = requirement.split('==')[0]
    run([*pip, 'download', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', name,
         '--dest', scratch, requirement], log, env)
    archive, = scratch.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / 'source', **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    source, = (scratch / 'source').iterdir()
    merge_bindings(source)
    # Where CFLAGS is set, setuptools takes it instead of the flags Python was built with, so these go along.
    flags = f'{sysconfig.get_config_var("CFLAGS") or ""} -O3 -g0'
    run([*pip, 'wheel', '--verbose', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--wheel-dir', scratch,
         source], log, dict(env, CFLAGS=flags, CXXFLAGS=flags), ninja_progress)


def _build_plain(pip: list, requirement: str, scratch: Path, env: dict, log: Path) -> None:
    run([*pip, 'wheel', '--verbose', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary',
         requirement.split('==')[0], '--wheel-dir', scratch, requirement], log, env, ninja_progress)
