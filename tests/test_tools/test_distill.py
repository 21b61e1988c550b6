"""tools/distill.py: from a folder of pictures to weights that a config's backbone takes, also after an interruption."""
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from warm_python import warm_python

from convneur_mm.models import ConvNeur

pytestmark = pytest.mark.needs('mmseg')
CONFIG = 'semantic_fpn_convneur_m1_shapes'
TOOL = Path(__file__).parents[2] / 'tools' / 'distill.py'


def run(folder: Path, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([warm_python(), str(TOOL), *map(str, args)], cwd=folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_from_pictures_to_weights(root, tmp_path):
    timm = pytest.importorskip('timm')
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'teacher.pth')
    common = [CONFIG, root / 'coco', '--teacher', 'timm:resnet10t', '--teacher-weights',
              tmp_path / 'teacher.pth', '--batch-size', 2, '--image-size', 64, '--workers', 0, '--work-dir', 'out']
    done = run(tmp_path, *common, '--iterations', 2)
    assert done.returncode == 0, done.stdout[-3000:]
    done = run(tmp_path, *common, '--iterations', 4, '--resume')
    assert done.returncode == 0, done.stdout[-3000:]
    # Steps 3 and 4 alone are new.
    assert [int(step) for step in re.findall(r'Iter\(train\)\s+\[(\d)/4\]', done.stdout)] == [3, 4]
    model = ConvNeur('m1', memory_cfg=dict(num_chunks=4),
                     init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'out/backbone.pth')))
    model.init_weights()
    saved = torch.load(tmp_path / 'out/backbone.pth')
    assert all(torch.equal(value, saved['state_dict'][name]) for name, value in model.state_dict().items())
    assert saved['meta']['source'] == 'timm:resnet10t'
    checkpoint = torch.load(tmp_path / 'out/iter_4.pth', weights_only=False)
    assert not [name for name in checkpoint['state_dict'] if 'teacher' in name]


@pytest.mark.parametrize('config, data, teacher, size, message', [
    (CONFIG, 'nowhere', 'timm:resnet10t', 64, 'nowhere is no folder with pictures'),
    (CONFIG, 'coco', 'resnet', 64, 'teacher must be timm:NAME'),
    (CONFIG, 'coco', 'timm:resnet10t', 8, '--image-size must be at least'),
    ('none', 'coco', 'timm:resnet10t', 64, "no config 'none'"),
])
def test_what_cannot_be_is_refused_in_a_line(config, data, teacher, size, message, root):
    done = run(root, config, data, '--teacher', teacher, '--image-size', size, '--workers', 0)
    assert done.returncode == 2
    error = done.stdout.strip().splitlines()[-1]
    assert error.startswith('error: ') and message in error, done.stdout[-2000:]
