"""The wheel carries configs and tools, and works from a folder without the checkout."""
import subprocess
import sys
import zipfile
from pathlib import Path

from convneur_mm.ops.neural_memory import cpu

ROOT = Path(__file__).parents[1]


def test_wheel_holds_configs_and_tools(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ('configs', 'tools'):
        expected = {f'convneur_mm/.mim/{p.relative_to(ROOT).as_posix()}' for p in (ROOT / folder).rglob('*')
                    if p.is_file() and '__pycache__' not in p.parts}
        assert expected
        assert expected <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'convneur_mm').rglob('*.py')}
    assert modules <= names
    assert not any(name.startswith('tests') for name in names)


def test_wheel_holds_the_compiled_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith(f'convneur_mm/ops/neural_memory/{cpu.MODULE}.') for name in names)


def test_wheel_names_no_openmmlab_requirement(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith('METADATA'))).decode()
    assert 'Requires-Dist' not in metadata


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
