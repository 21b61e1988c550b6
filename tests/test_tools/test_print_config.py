"""tools/analysis/print_config.py: what is printed is what tools/train.py would run."""
import sys

import pytest
from mmengine.config import Config

from convneur_mm.engine.files.errors import one_line_errors

NAME = 'convneur_m1_shapes'


@pytest.fixture
def tool(script):
    return script('print_config')


def test_overrides_and_settings_reach_what_is_printed(tool, tmp_path, capsys):
    tool.main([NAME, '--cfg-options', 'model.backbone.drop_path_rate=0.25', 'max_epochs=3', 'data_root=elsewhere/'])
    path = tmp_path / 'printed.py'
    path.write_text(capsys.readouterr().out)
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.drop_path_rate == 0.25
    assert cfg.train_cfg.max_epochs == 3 and cfg.param_scheduler[1].end == 3
    assert cfg.train_dataloader.dataset.data_root == 'elsewhere/'


def test_optimizer(tool, capsys):
    """The rates of the optimizer as built, by part: those of the last layer, and those of a head beside it."""
    tool.main(['semantic_fpn_convneur_m1_80k_ade20k', '--optimizer', '--cfg-options',
               'optim_wrapper.paramwise_cfg.layer_decay_rate=0.5', 'optim_wrapper.optimizer.lr=1.0'])
    rows = [tuple(cell.strip() for cell in line.strip('|').split('|')) for line in capsys.readouterr().out.splitlines()]
    found = {row[:2]: row[2:] for row in rows}
    assert found['backbone.downsample_layers.0', 'weights'] == (f'{40 * 3 * 16:,}', f'{0.5 ** 7:.3g}', '0.01')
    assert found['backbone.stages.2', 'weights'][1:] == ('0.0625 to 0.125', '0.01')
    assert found['backbone.stages.3', 'learned memory M_0'] == (f'{2 * 80 * 8:,}', '0.5', '0')
    assert found['backbone.stages.3', 'update generators'][1:] == ('0.5', '0 to 0.01')
    assert found['backbone.stages.3', 'global branch: norms, biases, scales'][1:] == ('0.5', '0')
    assert found['decode_head', 'weights'][1:] == ('10', '0.01')
    with pytest.raises(SystemExit):
        tool.main([NAME, '--optimizer', '--key', 'model'])


def test_a_file_holds_the_same(tool, tmp_path, capsys):
    tool.main([NAME])
    printed = capsys.readouterr().out
    tool.main([NAME, '--out', str(tmp_path / 'config.py')])
    assert (tmp_path / 'config.py').read_text().strip() == printed.strip() and not capsys.readouterr().out


def test_one_part(tool, capsys):
    tool.main([NAME, '--key', 'train_dataloader.dataset.pipeline.1'])
    out = capsys.readouterr().out
    assert "type='Resize'" in out and 'LoadImageFromFile' not in out
    tool.main([NAME, '--key', 'train_cfg.max_epochs'])
    assert capsys.readouterr().out.strip() == 'train_cfg_max_epochs = 8'


@pytest.mark.parametrize(('key', 'message'), [
    ('modle', "there is no 'modle' in the config, which holds: .*model"),
    ('model.bone', "there is no 'bone' in model, which holds: .*backbone"),
    ('model.backbone.arch.x', "there is no 'x' in model.backbone.arch, which holds: 'm1'"),
    ('train_dataloader.dataset.pipeline.9', "there is no '9' in train_dataloader.dataset.pipeline, .*: 0 to 4"),
])
def test_a_wrong_key_is_named_with_what_there_is(tool, key, message):
    with pytest.raises(ValueError, match=message):
        tool.main([NAME, '--key', key])


def test_a_folder_that_is_not_there(tool, tmp_path):
    with pytest.raises(ValueError, match='there is no folder .*nowhere'):
        tool.main([NAME, '--out', str(tmp_path / 'nowhere' / 'config.py')])


def test_a_broken_config_is_named(tool, tmp_path):
    path = tmp_path / 'broken.py'
    path.write_text('model = dict(\n')
    with pytest.raises(ValueError, match=r'broken\.py: the config cannot be read: SyntaxError'):
        tool.main([str(path)])


def test_a_missing_config_ends_the_process_with_one_line(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['print_config.py', 'no_such_config'])
    with pytest.raises(SystemExit) as ended, one_line_errors():
        tool.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert err.startswith("error: no config 'no_such_config'") and err.count('\n') == 1
