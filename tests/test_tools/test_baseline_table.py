"""tools/analysis/baseline_table.py: its counts against the published ones and against counts by hand."""
import json

import pytest
from mmengine.config import Config

from convneur_mm.analysis.flops import build_on_meta
from convneur_mm.paths import config, config_root


@pytest.fixture(scope='module')
def tool(script):
    return script('baseline_table')


def row_of(tool, config):
    row, = (row for row in tool.DENSE if row.config == config)
    return row


def test_every_baseline_and_each_of_ours_has_one_row(tool):
    names = [row.config for row in tool.DENSE]
    expected = [path.stem for kind in ('cascade_rcnn_convneur_*_coco', 'semantic_fpn_*_ade20k', 'upernet_*_ade20k')
                for path in config_root().glob(f'{kind}.py')]
    expected += [f'baselines/{path.stem}' for path in (config_root() / 'baselines').glob('*.py')]
    assert len(expected) == 24 and sorted(names) == sorted(expected)
    for row in tool.DENSE:
        backbone = row.backbone.lower().replace('-', '').replace('_', '')
        assert backbone in row.config.replace('_', '')
        assert len(row.paper_results) in (0, len(tool.RESULTS[row.head]))


@pytest.mark.parametrize('config', [
    'semantic_fpn_resnet50', 'semantic_fpn_pvt_t', 'upernet_resnet50', 'upernet_deit_s', 'upernet_swin_t'])
def test_published_flops(config, tool):
    """They are those of MMEngine's counter, with norms and upsampling."""
    row = tool.measure_row(row_of(tool, f'baselines/{config}_80k_ade20k'))
    assert row['paper_gflops'] in (int(row['gflops_with_norms']), round(row['gflops_with_norms']))
    assert row['difference_gflops'] == pytest.approx(row['gflops_with_norms'] - row['paper_gflops'])


def test_our_published_flops_are_compared_without_norms(tool, monkeypatch):
    """tests/test_configs/test_ade20k.py counts them at full size."""
    monkeypatch.setattr(tool, 'SEGMENTATION_IMAGE', (1, 3, 64, 128))
    row = tool.measure_row(row_of(tool, 'semantic_fpn_convneur_m2_80k_ade20k'))
    assert 0 < row['gflops'] < row['gflops_with_norms']
    assert row['difference_gflops'] == pytest.approx(row['gflops'] - 106)


def conv(in_channels, out_channels, kernel, positions):
    return in_channels * out_channels * kernel**2 * positions


def test_a_detector_by_hand(tool):
    row = tool.measure_row(row_of(tool, 'baselines/cascade_rcnn_pvtv2_b0_1x_coco'))
    levels = [(800 // stride) * (1344 // stride) for stride in (4, 8, 16, 32)]
    neck = sum(conv(c, 256, 1, n) + conv(256, 256, 3, n) for c, n in zip((32, 64, 160, 256), levels))
    # Of the coarsest level FPN takes every second position.
    rpn = conv(256, 256, 3, 1) + conv(256, 3 * (1 + 4), 1, 1)
    rpn *= sum(levels) + 13 * 21
    box = 3 * 1000 * (256 * 7**2 * 1024 + 1024**2 + 1024 * (81 + 4))
    mask = 3 * 100 * (4 * conv(256, 256, 3, 14**2) + conv(256, 256, 2, 14**2) + conv(256, 80, 1, 28**2))
    assert row['gflops'] - row['backbone_gflops'] == pytest.approx((neck + rpn + box + mask) / 1e9, rel=1e-9)
    assert row['difference_gflops'] is None
    test_cfg = Config.fromfile(config_root() / 'cascade_rcnn_convneur_m3_1x_coco.py').model.test_cfg
    for count, what in ((test_cfg.rpn.max_per_img, 'proposals'), (test_cfg.rcnn.max_per_img, 'boxes')):
        assert f' {count} {what}' in tool.NOTES.replace('\n', '')


def test_parameters_are_those_of_inference(tool):
    row = row_of(tool, 'baselines/upernet_resnet50_80k_ade20k')
    model = build_on_meta(Config.fromfile(config(row.config)))
    params = dict(model.named_parameters())
    found = tool.measure_row(row)
    assert found['backbone_params_m'] * 1e6 == pytest.approx(
        sum(value.numel() for name, value in params.items() if name.startswith('backbone.')))
    assert found['params_m'] * 1e6 == pytest.approx(
        sum(value.numel() for name, value in params.items() if not name.startswith('auxiliary_head.')))


def test_what_is_printed_and_written(tool, monkeypatch, capsys, tmp_path):
    published = row_of(tool, 'baselines/semantic_fpn_resnet50_80k_ade20k')
    monkeypatch.setattr(tool, 'DENSE', (published, published._replace(paper_gflops=None, paper_results=())))
    tool.main(['--json', str(tmp_path / 'table.json')])
    first, second = json.loads((tmp_path / 'table.json').read_text())['rows']
    assert first['gflops'] == second['gflops'] > first['backbone_gflops'] > 0
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()
             if line.startswith('|')]
    assert lines[0][0] == 'Semantic FPN' and lines[0][-3:] == ['paper (G)', 'difference', 'paper mIoU']
    assert lines[2] == ['ResNet-50', f'{first["backbone_params_m"]:.2f}', f'{first["params_m"]:.2f}',
                        f'{first["backbone_gflops"]:.1f}', f'{first["gflops"]:.1f}',
                        f'{first["gflops_with_norms"]:.1f}', '183', f'{first["difference_gflops"]:+.1f}', '36.59']
    assert lines[3][-3:] == ['-', '-', '-']
