"""Makes a virtual environment with a pinned stack; ``tools/setup_env.sh`` finds a Python and calls this.

Every step may be interrupted, and a second run goes on. Needs nothing but Python's standard library.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mmcv_wheel
from shell import SetupError, lock, minutes, pip_progress, run, say

ROOT = Path(__file__).resolve().parents[2]
VERSION = '.'.join(platform.python_version_tuple()[:2])
# Settings of the caller's shell that would lead pip or the environment's Python elsewhere.
MISLEADING = ('PYTHONPATH', 'PYTHONHOME', 'PIP_USER', 'PIP_TARGET', 'PIP_PREFIX', 'PIP_ROOT', 'VIRTUAL_ENV',
              'CONDA_PREFIX', '__PYVENV_LAUNCHER__')


@dataclass(frozen=True)
class Stack:
    """A set of packages.

    Attributes:
        folder (str): Of its environment, below the checkout.
        requirements (str): File in ``requirements/``.
        lock (str): File in ``requirements/`` with the versions of all packages, also of those that no requirement
            names.
        modules (str): What must import in the end.
        mmcv (bool): Whether mmcv is part of it, which is compiled.
        tests (str): File in ``requirements/`` with what its tests need beside it.
    """

    folder: str
    requirements: str
    lock: str
    modules: str
    mmcv: bool = True
    tests: str = 'tests.txt'


STACKS = {
    'primary': Stack('.venv', 'primary.txt', 'primary.lock',
                     'convneur_mm, mmcv.ops, mmdet.models, mmseg.models, mmpretrain.models', tests='tests_primary.txt'),
    'openmmlab': Stack('.venv-openmmlab', 'openmmlab.txt', 'openmmlab.lock',
                       'convneur_mm, mmcv.ops, mmdet.models, mmseg.models, mmpretrain.models'),
    'core': Stack('.venv-core', 'core.txt', 'primary.lock', 'convneur_mm.models', mmcv=False),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as ``nvidia-smi`` names it: its compute capability, such as '9.0', and the driver's version."""

    capability: str
    driver: str


def visible_gpus() -> list[Gpu]:
    """The GPUs of this machine, in a fraction of the time that PyTorch takes to tell; none without a driver."""
    try:
        done = subprocess.run(['nvidia-smi', '--query-gpu=compute_cap,driver_version', '--format=csv,noheader'],
                              capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.split(',') for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return sorted({Gpu(line[0].strip(), line[1].strip()) for line in lines
                   if len(line) == 2 and re.fullmatch(r'\d+\.\d+', line[0].strip())}, key=str)


class Environment:
    """The environment of a stack: where it is, what it was made from, and the steps that make it.

    Args:
        name (str): Of the stack.
        env (Mapping[str, str]): The caller's environment variables.
    """

    def __init__(self, name: str, env: Mapping[str, str]) -> None:
        self.name = name
        self.stack = STACKS[name]
        self.folder = ROOT / self.stack.folder
        self.python = self.folder / 'bin' / 'python'
        self.requirements = ROOT / 'requirements' / self.stack.requirements
        self.tests = ROOT / 'requirements' / self.stack.tests
        self.lock = ROOT / 'requirements' / self.stack.lock
        # Says that the folder is ours and, once all is done, what it was made from.
        self.stamp = self.folder / '.convneur_mm.json'
        self.index = env.get('TORCH_INDEX_URL', '')
        self.env = {key: value for key, value in env.items() if key not in MISLEADING}
        self.env.update(PYTHONNOUSERSITE='1', PIP_DISABLE_PIP_VERSION_CHECK='1')
        self.cache = Path(env.get('CONVNEUR_CACHE') or Path(
            env.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'convneur_mm')

    def inputs(self) -> str:
        """A digest of all that decides what is installed: files, Python's version, and where the checkout is."""
        files = [*self.requirement_files(self.requirements), *self.requirement_files(self.tests), self.lock,
                 ROOT / 'requirements' / 'build.txt', ROOT / 'setup.py',
                 *sorted((ROOT / 'convneur_mm/ops/neural_memory/csrc').iterdir()),
                 *sorted(Path(__file__).parent.glob('*.py'))]
        digest = hashlib.sha256(f'{ROOT} {VERSION}'.encode())
        for path in files:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def made_from(self) -> dict:
        """What the stamp says; nothing where the environment is not complete."""
        try:
            return json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}

    def is_up_to_date(self, gpus: Sequence[Gpu]) -> bool:
        """Whether nothing is left to do, for the files as they are now and for the GPUs of this machine.

        A login node and a GPU node may share the environment: mmcv compiled for GPUs serves both, one compiled without
        them serves the first alone.
        """
        made = self.made_from()
        if made.get('inputs') != self.inputs() or (self.index and self.index != made['torch_index_url']):
            return False
        if not self.stack.mmcv:
            return True
        return all(mmcv_wheel.serves(made['cuda_archs'], gpu.capability) or str(gpu) in made['unusable_gpus']
                   for gpu in gpus)

    def make(self, gpus: Sequence[Gpu]) -> None:
        """All steps, with the time each took.

        Raises:
            SetupError: If something is missing on the machine, or a step fails.
        """
        self.check_folder()
        check_python(headers=self.stack.mmcv)
        compiler = self.find_compiler()
        if compiler:
            self.env['CXX'] = compiler
        self.check_disk()
        say(f'Python: {platform.python_version()} {sys.executable}')
        say(f'compiler: {compiler or "none, so the memory runs in PyTorch"}; environment: {self.folder}')
        started = time.monotonic()
        steps = [('virtual environment', self.make_venv),
                 ('torch and the build tools; several GB to download the first time', self.install_torch)]
        if self.stack.mmcv:
            steps.append(('mmcv; three to five minutes of compiling on two cores, once', self.install_mmcv))
        steps += [('the other packages', self.install_rest),
                  ('convneur_mm, editable; its CPU kernels take a minute to compile', self.install_ourselves)]
        for i, (what, step) in enumerate(steps, 1):
            say(f'{i}/{len(steps)} {what}')
            begun = time.monotonic()
            done = step()
            say(f'    {done + ", " if done else ""}{minutes(time.monotonic() - begun)}')
        self.check_imports()
        torch = self.torch()
        self.stamp.write_text(json.dumps(dict(
            inputs=self.inputs(), torch_index_url=self.index, torch=torch.version,
            cuda_archs=mmcv_wheel.cuda_archs(torch, self.env) if self.stack.mmcv else [],
            unusable_gpus=[] if torch.gpus else [str(gpu) for gpu in gpus]), indent=1))
        say(f'done in {minutes(time.monotonic() - started)}: {self.folder}')

    # ---- what is needed, checked before anything is downloaded

    def check_folder(self) -> None:
        """Deletes nothing that somebody else made, nor an environment of another Python."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not (self.stamp.exists() or any(self.folder.glob('.convneur_mm-*'))):
            raise SetupError(f'{self.folder} exists and was not made by this script: move it away')
        config = self.folder / 'pyvenv.cfg'
        found = re.search(r'^version\s*=\s*(\d+\.\d+)', config.read_text(), re.M) if config.exists() else None
        if found and found[1] != VERSION:
            raise SetupError(f'{self.folder} was made with Python {found[1]}, but PYTHON is {VERSION} '
                             f'({sys.executable}): unset PYTHON to keep the environment, or delete the folder')

    def find_compiler(self) -> str:
        """The C++ compiler's name; '' where there is none and none is needed."""
        names = [self.env['CXX']] if self.env.get('CXX') else ['g++', 'c++', 'clang++']
        found = next((name for name in names if shutil.which(name.split()[0])), '')
        if not found and self.stack.mmcv:
            raise SetupError(f'no C++ compiler found ({", ".join(names)}), which compiling mmcv needs; on Debian and '
                             'Ubuntu: apt-get install g++')
        return found

    def check_disk(self) -> None:
        """Adds up what each file system will take."""
        if (self.folder / 'bin' / 'python').exists():
            return
        large = not self.index  # the builds of the default index carry CUDA's libraries
        pip_cache = Path(self.env.get('PIP_CACHE_DIR') or Path(
            self.env.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'pip')
        places = {'the environment': (self.folder, 6 if large else 2), 'pip\'s cache (PIP_CACHE_DIR)': (
            pip_cache, 3 if large else 1), 'temporary files (TMPDIR)': (Path(tempfile.gettempdir()), 3 if large else 1),
            'compiled wheels (CONVNEUR_CACHE)': (self.cache, 1)}
        needs: dict[int, list] = {}
        for what, (path, size) in places.items():
            while not path.exists():
                path = path.parent
            needs.setdefault(path.stat().st_dev, []).append((what, path, size))
        for entries in needs.values():
            needed = sum(size for _, _, size in entries)
            free = shutil.disk_usage(entries[0][1]).free / 2 ** 30
            if free < needed:
                raise SetupError(f'{needed} GB of free disk are needed in {entries[0][1]}, for '
                                 f'{", ".join(what for what, _, _ in entries)}; found {free:.1f} GB')

    # ---- the steps

    def make_venv(self) -> str:
        whole = self.python.exists() and self.run_python('import pip') == ''
        if not whole:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        self.stamp.write_text('{}')
        if whole:
            return 'there already'
        # Not this interpreter where it is an environment's: that may be the very one just removed.
        run([getattr(sys, '_base_executable', sys.executable), '-m', 'venv', self.folder], self.log('venv'), self.env)
        return ''

    def install_torch(self) -> str:
        """PyTorch, the build tools and MMEngine, all of which compiling and trying mmcv needs."""
        pins = self.pins()
        torch = [pin for name, pin in pins.items() if name in ('torch', 'torchvision')]
        others = [pin for name, pin in pins.items() if name not in ('torch', 'torchvision') and not re.search(
            'mmcv|mmdet|mmseg|mmpretrain', name)]
        if self.index:
            # From this index alone: beside another one pip would be free to take the other build.
            self.pip('torch', '--force-reinstall', '--no-deps', '--index-url', self.index, *torch)
        self.pip('torch', '-r', ROOT / 'requirements' / 'build.txt', *torch, *others)
        torch = self.torch()
        if visible_gpus() and not torch.gpus:
            say(f'    a GPU is visible, but torch {torch.version} cannot use it (driver {visible_gpus()[0].driver}): '
                f'{torch_needs(torch)}. mmcv is compiled for CPUs alone')
        return f'torch {torch.version}'

    def install_mmcv(self) -> str:
        requirement = next(pin for name, pin in self.pins().items() if name.endswith('mmcv'))
        return mmcv_wheel.install(self.python, requirement, self.torch(), self.cache, self.env,
                                  self.lock, lambda: self.run_python('import mmcv.ops'))

    def install_rest(self) -> str:
        self.pip('rest', '--no-build-isolation', '-r', self.requirements, '-r', self.tests)
        return ''

    def install_ourselves(self) -> str:
        self.pip('convneur_mm', '--no-build-isolation', '--no-deps', '--editable', ROOT)
        # The kernels are an extra: a compiler that cannot do them (clang without OpenMP, say) must not cost the rest.
        if self.run_python('from convneur_mm.ops.neural_memory import cpu; assert cpu.kernels is not None'):
            command = [str(self.python), '-m', 'pip', 'install', '-v', '--no-build-isolation', '--no-deps', '-e',
                       str(ROOT)]
            return f'WITHOUT the CPU kernels, so the memory is slower on a CPU; why: {shlex.join(command)}'
        return 'CPU kernels compiled'

    # ---- helpers

    @staticmethod
    def requirement_files(first: Path) -> list[Path]:
        """A file of requirements and those it names with ``-r`` or ``-c``."""
        files = [first]
        for path in files:
            files += [path.parent / name for name in re.findall(r'^-[rc] (\S+)', path.read_text(), re.M)]
        return files

    def pins(self) -> dict[str, str]:
        """Requirements of the stack by name."""
        lines = [line.split('#')[0].strip() for path in self.requirement_files(self.requirements)
                 for line in path.read_text().splitlines()]
        return {re.match(r'[\w.-]+', line)[0]: line for line in lines if line and not line.startswith('-')}

    def log(self, name: str) -> Path:
        return self.folder / 'setup' / f'{name}.log'

    def pip(self, name: str, *args: str | Path) -> None:
        run([self.python, '-m', 'pip', 'install', '-c', self.lock, *args], self.log(name), self.env, pip_progress)

    def run_python(self, code: str) -> str:
        """Runs code in the environment, away from this folder; returns the last line of what went wrong, or ''."""
        done = subprocess.run([self.python, '-W', 'ignore', '-c', code], env=self.env, cwd='/', capture_output=True,
                              text=True)
        return (done.stderr.strip().splitlines() or ['it ended without a word'])[-1] if done.returncode else ''

    def torch(self) -> mmcv_wheel.Torch:
        code = ('import json, sys, sysconfig, warnings; warnings.simplefilter("ignore"); import torch; c = torch.cuda; '
                'n = c.device_count() if c.is_available() else 0; '
                'gpus = sorted({"%d.%d" % c.get_device_capability(i) for i in range(n)}); '
                'print(json.dumps([torch.__version__, torch.version.cuda, gpus, "cp%d%d-%s" % '
                '(*sys.version_info[:2], sysconfig.get_platform())]))')
        done = subprocess.run([self.python, '-c', code], env=self.env, cwd='/', capture_output=True, text=True)
        if done.returncode:
            raise SetupError(f'torch does not import: {done.stderr.strip().splitlines()[-1]}')
        return mmcv_wheel.Torch(*json.loads(done.stdout.splitlines()[-1]))

    def check_imports(self) -> None:
        """OpenCV's import is what a bare machine most often fails at (libGL)."""
        error = self.run_python('import cv2')
        if error:
            raise SetupError(f'OpenCV does not import ({error}); on Debian and Ubuntu: apt-get install libgl1 '
                             'libglib2.0-0')
        error = self.run_python(f'import {self.stack.modules}')
        if error:
            raise SetupError(f'the environment does not import: {error}')


def check_python(headers: bool) -> None:
    """Whether this Python can make environments and, if asked, compile extensions."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(f'{sys.executable} has no venv and ensurepip modules; on Debian and Ubuntu: apt-get install '
                         'python3-venv') from None
    if headers and not (Path(sysconfig.get_paths()['include']) / 'Python.h').exists():
        raise SetupError(f'{sys.executable} has no header files (Python.h), which compiling mmcv needs; on Debian and '
                         'Ubuntu: apt-get install python3-dev')


def torch_needs(torch: mmcv_wheel.Torch) -> str:
    """What a GPU that PyTorch cannot use wants."""
    if not torch.cuda:
        return 'it is a build for CPUs; unset TORCH_INDEX_URL for one with CUDA'
    return (f'it wants a driver for CUDA {torch.cuda}. Install a newer driver; or take the upstream stack, whose torch '
            'wants CUDA 12.1 (--stack openmmlab); or another build of torch (TORCH_INDEX_URL)')


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog='tools/setup_env.sh', description='Makes the project\'s environment.')
    parser.add_argument('--stack', choices=list(STACKS), default='primary', help='set of packages (default: primary)')
    environment = Environment(parser.parse_args().stack, os.environ)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, interrupt)
    try:
        if not environment.is_up_to_date(gpus := visible_gpus()):
            with lock(ROOT / f'{environment.stack.folder}.lock', str(environment.folder)):
                if not environment.is_up_to_date(gpus):
                    environment.make(gpus)
                    return 0
        say(f'environment is up to date: {environment.folder}')
    except SetupError as error:
        print(f'[setup] error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('[setup] interrupted; the same command goes on from here', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
