"""The wheel carries configs and tools, and works from a folder without the checkout."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from convneur_mm.ops.neural_memory import cpu

ROOT = Path(__file__).parents[1]


def test_wheel_holds_configs_and_tools(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    of_checkout = {'quickstart.py', 'quickstart.sh', 'run_tests.sh', 'setup_env.sh'}
    for folder in ('configs', 'tools'):
        expected = {f'convneur_mm/.mim/{p.relative_to(ROOT).as_posix()}' for p in (ROOT / folder).rglob('*')
                    if p.is_file() and '__pycache__' not in p.parts and p.name not in of_checkout}
        assert expected
        assert expected <= names
    assert 'convneur_mm/.mim/model-index.yml' in names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'convneur_mm').rglob('*.py')}
    assert modules == {name for name in names if name.endswith('.py') and '/.mim/' not in name}
    assert not any(name.endswith(tuple(of_checkout)) for name in names)
    # What made the figures of the documentation, and what maintainers run, stay in the checkout.
    assert not any(folder in name.split('/') for name in names for folder in ('tests', 'experiments', 'dev'))


@pytest.mark.needs('kernels')
def test_wheel_holds_the_compiled_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith(f'convneur_mm/ops/neural_memory/{cpu.MODULE}.') for name in names)


@pytest.mark.slow
def test_wheel_without_a_compiler(tmp_path):
    """The kernels are left out then, and what is left works."""
    source = tmp_path / 'source'
    for name in ('convneur_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'model-index.yml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path,
                    source], check=True, capture_output=True, env=dict(os.environ, CC='false', CXX='false'))
    path, = tmp_path.glob('convneur_mm-*.whl')
    assert not any(name.endswith('.so') for name in zipfile.ZipFile(path).namelist())
    zipfile.ZipFile(path).extractall(tmp_path / 'site')
    code = ('import torch; from convneur_mm.models import NeuralMemory; from convneur_mm.ops.neural_memory import cpu; '
            'NeuralMemory(32)(torch.randn(1, 400, 32)).sum().backward(); print(cpu.kernels); print(cpu.__file__)')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, text=True, capture_output=True,
                          check=True, env={'PYTHONPATH': str(tmp_path / 'site'), 'PATH': '/usr/bin:/bin'})
    kernels, where = done.stdout.splitlines()[-2:]
    assert kernels == 'None' and Path(where).is_relative_to(tmp_path)


def test_wheel_names_no_openmmlab_requirement(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith('METADATA'))).decode()
    assert 'Requires-Dist' not in metadata


@pytest.mark.needs('mmdet')  # a base of the config is mmdet's
def test_unpacked_wheel_works_elsewhere(wheel, tmp_path):
    """In another folder, with the wheel's files ahead of the checkout's."""
    site, project = tmp_path / 'site', tmp_path / 'project'
    zipfile.ZipFile(wheel).extractall(site)
    project.mkdir()
    (project / 'child.py').write_text(
        "_base_ = __import__('convneur_mm').config('cascade_rcnn_convneur_m3_1x_coco')\n"
        'model = dict(backbone=dict(memory_cfg=dict(chunk_size=1024)))\n')
    code = ('import convneur_mm; from mmengine.config import Config; c = Config.fromfile("child.py"); '
            'print(convneur_mm.__file__); print(c.model.backbone.memory_cfg.chunk_size, c.model.backbone.arch)')
    done = subprocess.run([sys.executable, '-c', code], cwd=project, text=True, capture_output=True, check=True,
                          env={'PYTHONPATH': str(site), 'PATH': '/usr/bin:/bin'})
    where, what = done.stdout.split('\n')[:2]
    assert Path(where).is_relative_to(site)
    assert what == '1024 m3'


def test_tools_with_an_interpreter_can_be_called():
    """All files with a #! line, as the commands of README and docs call them by their path."""
    files = [path for folder in ('tools', 'experiments', 'dev') for path in (ROOT / folder).rglob('*')
             if path.suffix in ('.py', '.sh')]
    called = [path for path in files if path.read_bytes().startswith(b'#!')]
    assert len(called) > 10
    assert [path for path in called if not os.access(path, os.X_OK)] == []
