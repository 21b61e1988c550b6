"""Make a virtual environment with a pinned stack; ``tools/setup_env.sh`` finds a Python and calls this.

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
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shell import SetupError, lock, minutes, pip_progress, run, say

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / 'requirements'
LOCK = REQUIREMENTS / 'versions.lock'  # the versions of all packages, in all stacks
VERSION = '.'.join(platform.python_version_tuple()[:2])
# Settings of the caller's shell that would lead pip or the environment's Python elsewhere.
MISLEADING = ('PYTHONPATH', 'PYTHONHOME', 'PIP_USER', 'PIP_TARGET', 'PIP_PREFIX', 'PIP_ROOT', 'VIRTUAL_ENV',
              'CONDA_PREFIX', '__PYVENV_LAUNCHER__')
OPENMMLAB = 'convneur_mm, mmcv.ops, mmdet.models, mmseg.models, mmpretrain.models'


@dataclass(frozen=True)
class Stack:
    """A set of packages.

    Attributes:
        folder (str): Of its environment, below the checkout.
        requirements (tuple[str, ...]): Files in ``requirements/``.
        modules (str): What must import in the end.
    """

    folder: str
    requirements: tuple[str, ...]
    modules: str


STACKS = {
    'primary': Stack('.venv', ('primary.txt', 'tests_all.txt', 'build.txt'), OPENMMLAB),
    'openmmlab': Stack('.venv-openmmlab', ('openmmlab.txt', 'tests_all.txt', 'build.txt'), OPENMMLAB),
    'core': Stack('.venv-core', ('core.txt', 'tests.txt', 'build.txt'), 'convneur_mm.models'),
}


class Environment:
    """The environment of a stack: where it is, what it was made from, and the steps that make it.

    Args:
        name (str): Of the stack.
        env (Mapping[str, str]): The caller's environment variables.
    """

    def __init__(self, name: str, env: Mapping[str, str]) -> None:
        self.stack = STACKS[name]
        self.folder = ROOT / self.stack.folder
        self.python = self.folder / 'bin' / 'python'
        # Says that the folder is ours and, once all is done, what it was made from.
        self.stamp = self.folder / '.convneur_mm.json'
        self.index = env.get('TORCH_INDEX_URL', '')
        self.env = {key: value for key, value in env.items() if key not in MISLEADING}
        self.env.update(PYTHONNOUSERSITE='1', PIP_DISABLE_PIP_VERSION_CHECK='1')

    def requirement_files(self) -> list[Path]:
        """Return the stack's files of requirements and those that they name with ``-r``."""
        files = [REQUIREMENTS / name for name in self.stack.requirements]
        for path in files:
            files += [path.parent / name for name in re.findall(r'^-r (\S+)', path.read_text(), re.M)]
        return files

    def inputs(self) -> str:
        """Return a digest of all that decides what is installed: files, Python's version, and the checkout's place."""
        files = [*self.requirement_files(), LOCK, ROOT / 'setup.py',
                 *sorted((ROOT / 'convneur_mm/ops/neural_memory/csrc').iterdir()),
                 *sorted(Path(__file__).parent.glob('*.py'))]
        digest = hashlib.sha256(f'{ROOT} {VERSION}'.encode())
        for path in files:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def is_up_to_date(self) -> bool:
        """Return whether nothing is left to do, for the files as they are now."""
        try:
            made = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return False
        return made.get('inputs') == self.inputs() and self.index in ('', made['torch_index_url'])

    def make(self) -> None:
        """Take all steps, and print the time that each took.

        Raises:
            SetupError: If something is missing on the machine, or a step fails.
        """
        self.check_folder()
        check_python()
        compiler = self.find_compiler()
        self.check_disk()
        say(f'Python: {platform.python_version()} {sys.executable}')
        say(f'compiler: {compiler or "none, so the memory runs in PyTorch"}; environment: {self.folder}')
        started = time.monotonic()
        steps = [('virtual environment', self.make_venv),
                 ('PyTorch and the other packages; several GB to download the first time', self.install_packages),
                 ('convneur_mm, editable; its CPU kernels take a minute to compile', self.install_ourselves)]
        for i, (what, step) in enumerate(steps, 1):
            say(f'{i}/{len(steps)} {what}')
            begun = time.monotonic()
            done = step()
            say(f'    {done + ", " if done else ""}{minutes(time.monotonic() - begun)}')
        self.check_imports()
        self.stamp.write_text(json.dumps(dict(inputs=self.inputs(), torch_index_url=self.index), indent=1))
        say(f'done in {minutes(time.monotonic() - started)}: {self.folder}')

    # ---- what is needed, checked before anything is downloaded

    def check_folder(self) -> None:
        """Refuse to replace what somebody else made, or an environment of another Python."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not self.stamp.exists():
            raise SetupError(f'{self.folder} exists and was not made by this script: move it away')
        config = self.folder / 'pyvenv.cfg'
        found = re.search(r'^version\s*=\s*(\d+\.\d+)', config.read_text(), re.M) if config.exists() else None
        if found and found[1] != VERSION:
            raise SetupError(f'{self.folder} was made with Python {found[1]}, but PYTHON is {VERSION} '
                             f'({sys.executable}): unset PYTHON to keep the environment, or delete the folder')

    def find_compiler(self) -> str:
        """Return the C++ compiler's name, or '' where there is none."""
        names = [self.env['CXX']] if self.env.get('CXX') else ['g++', 'c++', 'clang++']
        found = next((name for name in names if shutil.which(name.split()[0])), '')
        if found:
            self.env['CXX'] = found
        return found

    def check_disk(self) -> None:
        """Add up what each file system will take, and refuse to begin where there is not as much."""
        if self.python.exists():
            return
        large = not self.index  # the builds of the default index carry CUDA's libraries
        pip_cache = Path(self.env.get('PIP_CACHE_DIR') or Path(
            self.env.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'pip')
        places = {'the environment': (self.folder, 7 if large else 2), 'pip\'s cache (PIP_CACHE_DIR)': (
            pip_cache, 3 if large else 1), 'temporary files (TMPDIR)': (Path(tempfile.gettempdir()), 3 if large else 1)}
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

    def install_packages(self) -> str:
        if self.index:
            # From this index alone: beside another one pip would be free to take the other build.
            pins = re.findall(r'^(?:torch|torchvision)==\S+', LOCK.read_text(), re.M)
            self.pip('torch', '--force-reinstall', '--no-deps', '--index-url', self.index, *pins)
        # The cache may hold an mmcv that was compiled, for another torch.
        mmcv = re.findall(r'^\S*mmcv\S*==\S+', ''.join(path.read_text() for path in self.requirement_files()), re.M)
        if mmcv:
            self.pip('mmcv', '--no-deps', '--no-cache-dir', *mmcv)
        self.pip('packages', *(part for name in self.stack.requirements for part in ('-r', REQUIREMENTS / name)))
        return ''

    def install_ourselves(self) -> str:
        self.pip('convneur_mm', '--no-build-isolation', '--no-deps', '--editable', ROOT)
        # The kernels are an extra: a compiler that cannot do them (clang without OpenMP, say) must not cost the rest.
        if 'CXX' not in self.env:
            return 'without the CPU kernels, as there is no C++ compiler: the memory is slower on a CPU'
        if self.run_python('from convneur_mm.ops.neural_memory import cpu; assert cpu.kernels is not None'):
            command = [str(self.python), '-m', 'pip', 'install', '-v', '--no-build-isolation', '--no-deps', '-e',
                       str(ROOT)]
            return f'WITHOUT the CPU kernels, so the memory is slower on a CPU; why: {shlex.join(command)}'
        return 'CPU kernels compiled'

    def check_imports(self) -> None:
        """Import everything once; OpenCV's import is what a bare machine most often fails at (libGL)."""
        error = self.run_python('import cv2')
        if error:
            raise SetupError(f'OpenCV does not import ({error}); on Debian and Ubuntu: apt-get install libgl1 '
                             'libglib2.0-0')
        error = self.run_python(f'import {self.stack.modules}')
        if error:
            raise SetupError(f'the environment does not import: {error}')
        if shutil.which('nvidia-smi'):
            why = self.run_python('from convneur_mm.engine.launch import why_no_gpu; import torch\n'
                                  'if not torch.cuda.is_available(): raise SystemExit(why_no_gpu())')
            if why:
                say(f'    this machine has a GPU\'s driver, but {why}')

    # ---- helpers

    def log(self, name: str) -> Path:
        return self.folder / 'setup' / f'{name}.log'

    def pip(self, name: str, *args: str | Path) -> None:
        run([self.python, '-m', 'pip', 'install', '-c', LOCK, *args], self.log(name), self.env, pip_progress)

    def run_python(self, code: str) -> str:
        """Run code in the environment, away from this folder; return the last line of what went wrong, or ''."""
        done = subprocess.run([self.python, '-W', 'ignore', '-c', code], env=self.env, cwd='/', capture_output=True,
                              text=True)
        return (done.stderr.strip().splitlines() or ['it ended without a word'])[-1] if done.returncode else ''


def check_python() -> None:
    """Check that this Python can make environments."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(f'{sys.executable} has no venv and ensurepip modules; on Debian and Ubuntu: apt-get install '
                         'python3-venv') from None


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
        if not environment.is_up_to_date():
            with lock(ROOT / f'{environment.stack.folder}.lock', str(environment.folder)):
                if not environment.is_up_to_date():
                    environment.make()
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
