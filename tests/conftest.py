"""What tests of several folders share.

In an environment without any of mmcv, mmdet, mmseg and mmpretrain the tests of the models and operators run too. There
a test marked ``needs('timm')``, say, is skipped where timm is missing, and one marked ``needs('kernels')`` where the
C++ kernels are not compiled. As soon as one of the four packages is installed nothing is skipped for want of another.

Tests run in another order each time, and always with the same random numbers: a failure comes back in every order.
"""
import importlib
import importlib.util
import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from managers import runs_of_before

from convneur_mm.engine.runner.written_config import lay_out_once
from convneur_mm.ops.neural_memory import cpu

ROOT = Path(__file__).parents[1]
IS_CORE = not any(importlib.util.find_spec(name) for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain'))
# Fixtures of tests/helpers. They need pycocotools, which the core environment does without.
pytest_plugins = [] if IS_CORE else ['data_sets']

# Of few tests that take long. Processes take a file each: begun last, one of these would keep the others waiting.
SLOW_FILES = {'test_compile', 'test_dist', 'test_inheritance', 'test_launchers', 'test_own_data', 'test_recall',
              'test_test', 'test_triton'}

# --hypothesis-profile=default looks for new examples.
settings.register_profile('fixed', derandomize=True)
settings.load_profile('fixed')


def pytest_configure(config):
    # A shell's background jobs ignore Ctrl-C, and so would all processes that the tests start and send it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As those of users may have, the paths of all folders of tests have a blank in them.
    folders = Path(tempfile.gettempdir(), f'convneur tests {os.getuid()}')
    folders.mkdir(exist_ok=True)
    os.environ.setdefault('PYTEST_DEBUG_TEMPROOT', str(folders))
    # Short runs in this process would spend half of their time on it.
    lay_out_once()
    # pytest-randomly shuffles the tests; its own seeds would give them other numbers in each run.
    config.option.randomly_reset_seed = False
    config.addinivalue_line('markers', "needs(name, ...): packages a test needs beside the core; 'kernels' for those "
                                       'of the memory in C++')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)  # and else as pytest-randomly has them


def seed(name: str) -> None:
    """Seeds Python, NumPy and PyTorch by a name, so that no two tests or fixtures draw the same numbers."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 what mmcv and mmdet draw from
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture's numbers depend neither on the test that asks for it first nor on other fixtures."""
    seed(f'{fixturedef.baseid}::{fixturedef.argname}')


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed(item.nodeid)


def pytest_runtest_setup(item):
    for mark in item.iter_markers('needs'):
        for name in mark.args:
            need(name)


def need(name: str) -> None:
    """Skips the test in the core environment if a package is missing; elsewhere that is an error."""
    missing = cpu.missing if name == 'kernels' else not importlib.util.find_spec(name)
    if missing:
        reason = 'kernels not compiled' if name == 'kernels' else f'{name} not installed'
        if IS_CORE:
            pytest.skip(reason)
        pytest.fail(f'{reason}: tools/setup_env.sh', pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """The process after a test, with the module's fixtures that it was the first to need, is as it was before.

    Otherwise the next run would write to a logger of this one, at its level, and to its folder. And a deterministic run
    is so for the whole process, where interpolation then takes other operators.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    with runs_of_before():
        try:
            return (yield)
        finally:
            torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope='session')
def wheel(tmp_path_factory) -> Path:
    """The package's wheel, built once for all tests that look into it or install it."""
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', folder,
                    ROOT], check=True, capture_output=True)
    path, = folder.glob('convneur_mm-*.whl')
    return path


@pytest.fixture(scope='session')
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of tools/analysis, experiments or dev by its name; they see these folders first."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ('tools/analysis', 'experiments', 'dev'):
            patch.syspath_prepend(str(ROOT / folder))
        yield importlib.import_module


@pytest.fixture
def refused():
    """Within ``with refused(message):`` a tool must end with exit code 2 and one line on stderr that matches."""

    @contextmanager
    def refused(message):
        with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as ended:
            yield
        line = errors.getvalue().splitlines()[-1]
        assert ended.value.code == 2 and re.search(f'^error: .*{message}', line), line

    return refused


@pytest.fixture
def nan_in_new_tensors():
    """As PyTorch fills the memory it hands out in its deterministic mode, from 2.2 on."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture(params=['cpp', 'torch'], scope='module')
def both_codes(request):
    """Runs a module's tests with the compiled operators, and then with those that serve other devices and sizes.

    Of the backend 'auto', which takes the compiled ones wherever they take the tensors.
    """
    if request.param == 'cpp':
        need('kernels')
    with pytest.MonkeyPatch.context() as patch:
        if request.param == 'torch':
            patch.setenv('CONVNEUR_MEMORY_BACKEND', 'torch')
        yield request.param
