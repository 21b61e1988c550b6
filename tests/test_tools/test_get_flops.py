"""tools/analysis/get_flops.py: published figures, counts by hand, and that the parts make the whole."""
import json

import pytest
import torch
from mmengine.config import Config

from convneur_mm.analysis import flops
from convneur_mm.analysis.paper import COSTS

SHAPES = 'cascade_rcnn_convneur_m1_shapes'


@pytest.fixture
def tool(script):
    return script('get_flops')


def count(tool, tmp_path, *args):
    tool.main([*args, '--json', str(tmp_path / 'cost.json')])
    return json.loads((tmp_path / 'cost.json').read_text())


def test_classifier_beside_the_paper_and_its_stages_by_hand(tool, tmp_path, capsys):
    found = count(tool, tmp_path, 'convneur_m1_300e_in1k')
    assert found['shape'] == [224, 224]
    assert round(found['total']['macs'] / 1e9, 2) == found['paper']['gflops'] == 0.71
    assert round(found['total']['parameters'] / 1e6, 1) == found['paper']['params_m'] == 4.3
    out = capsys.readouterr().out
    assert '| paper ' in out and '0.71' in out and '| stage 4' in out

    stages = found['stages']
    assert sum(sum(stage.values()) for stage in stages) == found['parts']['backbone']['macs']
    for i, (stage, channels) in enumerate(zip(stages, (40, 80, 160, 320))):
        tokens = (56 >> i)**2
        assert stage['projections'] == tokens * (2 * channels * 80 + 4 * 80 * 80)
        # Downsampling, depthwise 7 x 7, and two linear layers of a block.
        down = tokens * (3 * 4 * 4 if not i else channels // 2 * 2 * 2) * channels
        assert stage['local'] == down + (2, 2, 6, 2)[i] * tokens * (49 * channels + 8 * channels**2)
    # 196 tokens are one chunk: it is read by its queries and never written, two products with 8 hidden units.
    assert stages[2]['inner'] == 196 * 2 * 80 * 8 and stages[3]['inner'] == 49 * 2 * 80 * 8
    assert stages[0]['inner'] > 16 * stages[2]['inner']


def test_the_chunk_size_of_the_command_line_is_counted_and_has_no_paper_figure(tool, tmp_path):
    found = count(tool, tmp_path, 'convneur_m1_300e_in1k', '--cfg-options', 'model.backbone.memory_cfg.chunk_size=3136')
    assert found['stages'][0]['inner'] == 3136 * 2 * 80 * 8
    assert found['paper'] is None


def test_overlock_as_trained_and_merged(tool, tmp_path, capsys):
    """The figures are those in the backbone's docstring."""
    found = count(tool, tmp_path, 'overlock/overlock_xt_300e_in1k')
    for name, parameters, macs in (('total', 17.31, 2.86), ('merged', 16.45, 2.70)):
        total = found['total'] if name == 'total' else found['merged']['total']
        assert round(total['parameters'] / 1e6, 2) == parameters and round(total['macs'] / 1e9, 2) == macs
    assert found['paper']['gflops'] == 2.6
    out = capsys.readouterr().out
    assert '| total, as trained' in out and '| total, merged' in out


def test_a_detectors_heads_are_counted_at_its_number_of_boxes(tool, tmp_path, capsys):
    found = count(tool, tmp_path, SHAPES, '--shape', '64', '96')
    assert list(found['parts']) == ['backbone', 'neck', 'RPN', 'box heads', 'mask heads']
    box = 49 * 64 * 128 + 128 * 128 + 128 * (6 + 1) + 128 * 4
    assert found['parts']['box heads']['macs'] == 3 * 200 * box
    # Two 3 x 3 convolutions at 14 x 14, a transposed one by 2, and 1 x 1 to the classes at 28 x 28.
    mask = 2 * 196 * 9 * 64 * 64 + 196 * 4 * 64 * 64 + 784 * 64 * 6
    assert found['parts']['mask heads']['macs'] == 3 * 100 * mask
    assert found['boxes'] == dict(proposals=200, detections=100)
    assert found['total']['macs'] == sum(part['macs'] for part in found['parts'].values())
    assert '200 proposals go through every box head and 100 boxes' in capsys.readouterr().out


def test_a_segmentors_auxiliary_head_is_left_out_and_named(tool, tmp_path, capsys):
    found = count(tool, tmp_path, 'baselines/upernet_swin_t_80k_ade20k', '--shape', '64', '64')
    assert list(found['parts']) == ['backbone', 'head']
    assert found['training_parameters'] > found['total']['parameters']
    assert 'parameters work in training alone' in capsys.readouterr().out
    assert 'stages' not in found and found['paper'] is None


def test_every_paper_figure_belongs_to_a_config(tool):
    root = tool.config_root()
    assert len(COSTS) == 27
    assert all((root / f'{name}.py').is_file() for name in COSTS)


@pytest.mark.parametrize(('args', 'message'), [
    (['no_such_config'], "no config 'no_such_config'"),
    (['convneur_m1_300e_in1k', '--shape', '16', '224'], '--shape must be at least 32 32, got 16 224'),
    (['convneur_m1_300e_in1k', '--json', 'nowhere/cost.json'], 'there is no folder .*nowhere'),
    (['semantic_fpn_convneur_m1_shapes', '--shape', '64', '96', '--cfg-options',
      'model.neck.in_channels=[40,80,160,3]'],
     'its model fails on an image of 64 x 96: RuntimeError: .*channel'),
])
def test_what_cannot_be_counted(tool, args, message):
    with pytest.raises(ValueError, match=message):
        tool.main(args)


def test_a_config_without_a_model_is_refused(tool, tmp_path):
    path = tmp_path / 'empty.py'
    path.write_text("default_scope = 'mmdet'\n")
    with pytest.raises(ValueError, match=r'empty\.py: expected a model and a default_scope'):
        tool.main([str(path)])


def test_a_model_without_heads_is_refused():
    with pytest.raises(ValueError, match='expected a classifier, detector or segmentor.*got Linear'):
        flops.count_parts(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_one_stage_and_standard_roi_heads():
    """Single heads, where a cascade has lists of them."""
    class Head(torch.nn.Conv2d):

        def forward(self, rois):
            return super().forward(rois)

    roi = torch.nn.Module()
    roi.bbox_head = Head(4, 5, 1)
    roi.bbox_roi_extractor = torch.nn.Module()
    roi.bbox_roi_extractor.out_channels = 4
    roi.bbox_roi_extractor.roi_layers = [Config(dict(output_size=(2, 3)))]
    model = torch.nn.Module()
    model.backbone, model.roi_head = torch.nn.Conv2d(3, 4, 1), roi
    model.test_cfg = Config(dict(rpn=dict(max_per_img=7), rcnn=dict(max_per_img=2)))
    parts = flops.count_parts(model, torch.zeros(1, 3, 2, 2))
    assert list(parts) == ['backbone', 'box heads']
    assert parts['box heads'].macs == 7 * 6 * 4 * 5 and parts['backbone'] == flops.Count(16, 4 * 12)
