"""What tests of several folders share."""
import subprocess
import sys
from pathlib import Path

import pytest

from convneur_mm.ops.neural_memory import cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def wheel(tmp_path_factory) -> Path:
    """The package's wheel, built once for all tests that look into it or install it."""
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', folder,
                    ROOT], check=True, capture_output=True)
    path, = folder.glob('convneur_mm-*.whl')
    return path


@pytest.fixture(params=['cpp', 'pytorch'], scope='module')
def both_codes(request):
    """Runs a module's tests with the compiled kernels, and then with what serves other devices and sizes."""
    assert cpu.kernels is not None, 'the kernels are not compiled: tools/setup_env.sh'
    with pytest.MonkeyPatch.context() as patch:
        if request.param == 'pytorch':
            patch.setattr(cpu, 'kernels', None)
        yield request.param
