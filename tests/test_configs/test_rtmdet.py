"""configs/rtmdet: mmdet's recipe of its tiny model, with ConvNeur, and wider necks and heads for m3 and m4."""
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

pytest.importorskip('mmdet')
from mmdet.testing import demo_mm_inputs

from convneur_mm.engine.launch import without_sync_bn
from convneur_mm.paths import config_root

CONFIGS = sorted(path.stem for path in (config_root() / 'rtmdet').glob('*_coco.py'))


def test_all_are_found():
    assert sorted(f'{kind}_convneur_{arch}_300e_coco' for kind in ('rtmdet', 'rtmdet-ins')
                             for arch in ('m1', 'm2', 'm3', 'm4')) == CONFIGS


@pytest.mark.parametrize('name', CONFIGS)
def test_learns_and_predicts(name, open_config, build_model, param_groups, undecayed):
    """All parts get gradients, M_0 and norms do not decay, and the detections have masks where they should."""
    torch.manual_seed(0)
    cfg = open_config(f'rtmdet/{name}')
    assert cfg.model.backbone.arch in name
    without_sync_bn(cfg.model)  # as a run on CPUs does
    model = build_model(cfg)
    masks = name.startswith('rtmdet-ins')
    data = demo_mm_inputs(2, (3, 96, 128), num_items=[3, 2], num_classes=80, with_mask=masks)
    loss, losses = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    assert [key for key, value in losses.items() if not value.isfinite().all()] == []
    loss.backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []
    assert model.backbone.stages[1][0].global_branch.memory.generators[0].weight.grad.any()

    groups = param_groups(model, build_optim_wrapper(model, cfg.optim_wrapper))
    assert {name for name, group in groups.items() if not group['weight_decay']} >= undecayed(model)

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(data, False), mode='predict')
    assert len(results) == 2 and all(('masks' in result.pred_instances) == masks for result in results)


@pytest.mark.parametrize('name', ['rtmdet_convneur_m1_300e_coco', 'rtmdet-ins_convneur_m1_300e_coco'])
def test_what_differs_from_mmdet(name):
    """Data, schedule and hooks are mmdet's; the pictures are in the backbone's colours."""
    ours = Config.fromfile(config_root() / 'rtmdet' / f'{name}.py')
    mmdets = Config.fromstring(f"_base_ = 'mmdet::rtmdet/{name.partition('_')[0]}_tiny_8xb32-300e_coco.py'", '.py')
    for key in ('train_dataloader', 'val_dataloader', 'param_scheduler', 'custom_hooks', 'train_cfg', 'val_evaluator'):
        assert ours[key] == mmdets[key], key
    assert ours.optim_wrapper.optimizer == mmdets.optim_wrapper.optimizer
    assert ours.model.data_preprocessor.bgr_to_rgb and ours.model.data_preprocessor.mean[0] == 123.675
    assert ours.model.bbox_head == mmdets.model.bbox_head
