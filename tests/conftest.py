"""What tests of several folders share."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def wheel(tmp_path_factory) -> Path:
    """The package's wheel, built once for all tests that look into it or install it."""
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', folder,
                    ROOT], check=True, capture_output=True)
    path, = folder.glob('convneur_mm-*.whl')
    return path
