"""tools/analysis/visualize_gate.py: the files that it writes, and one line for what it cannot do."""
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_models import CHANNELS, CLASSES, save_weights, tiny_model

from convneur_mm.visualization.view import look

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools' / 'analysis'))
        import visualize_gate
        yield visualize_gate


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A config, a checkpoint and a picture."""
    folder = tmp_path_factory.mktemp('gate')
    model = tiny_model('segmentor')
    save_weights(model, folder / 'weights.pth', classes=CLASSES['segmentor'])
    model.cfg.dump(folder / 'config.py')
    cv2.imwrite(str(folder / 'photo.png'), np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    return folder


def test_sheet_and_arrays_are_those_of_the_model(tool, folder, capsys):
    tool.main([str(folder / name) for name in ('config.py', 'weights.pth', 'photo.png')] + [
        '--out', str(folder / 'sheet.png'), '--arrays', str(folder / 'parts.npz'), '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert f'4 blocks with a global branch: {folder / "sheet.png"}' in printed and 'parts.npz' in printed
    sheet = cv2.imread(str(folder / 'sheet.png'))
    assert sheet.shape[1] > 1000 and len(np.unique(sheet)) > 50
    expected = look(tiny_model('segmentor', folder / 'weights.pth'), str(folder / 'photo.png')).arrays()
    found = np.load(folder / 'parts.npz')
    assert set(found) == set(expected) and all((found[name] == expected[name]).all() for name in expected)
    assert found['stage1.block1.gate'].shape[0] == CHANNELS[0]


@pytest.mark.parametrize('arguments, message', [
    (['config.py', 'weights.pth', 'missing.png'], 'IMAGE: no such file: missing.png'),
    (['missing.py', 'weights.pth', 'photo.png'], "no config 'missing.py'"),
    (['config.py', 'missing.pth', 'photo.png'], 'no such checkpoint: missing.pth'),
    (['config.py', 'weights.pth', 'weights.pth'], 'weights.pth is no picture, or damaged'),
    (['config.py', 'weights.pth', 'photo.png', '--out', 'sheet.jpg'], '--out must end in .png, got sheet.jpg'),
    (['config.py', 'weights.pth', 'photo.png', '--arrays', 'no/parts.npz'], '--arrays: no is not a folder'),
    (['config.py', 'weights.pth', 'photo.png', '--device', 'cuda'], "device 'cuda': no GPU"),
    (['config.py', 'weights.pth', 'photo.png', '--cfg-options', 'model.test_cfg.mode=slide',
      'model.test_cfg.crop_size=(64,64)', 'model.test_cfg.stride=(32,32)'], 'ran its backbone twice'),
])
def test_what_cannot_be_done_is_one_line(tool, folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['visualize_gate.py', *arguments])
    with pytest.raises(SystemExit) as exit_:
        tool.launch.run(tool.main)
    assert exit_.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('error: ') and message in line


def test_a_model_without_convneur_is_named(tool, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    model = tiny_model('classifier', options={'model.backbone': dict(
        _delete_=True, type='ResNet', depth=18, num_stages=4, out_indices=(3,)), 'model.head.in_channels': 512})
    save_weights(model, folder / 'resnet.pth', classes=CLASSES['classifier'])
    model.cfg.dump(folder / 'resnet.py')
    with pytest.raises(tool.launch.LaunchError, match='ImageClassifier must be a ConvNeur.* got a ResNet'):
        tool.main(['resnet.py', 'resnet.pth', 'photo.png', '--device', 'cpu'])
