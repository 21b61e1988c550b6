"""mmdet's own detectors train and predict with whatever operators mmcv has: on a CPU, mostly torchvision's.

Three that use different operators are run always, the others with ``pytest -m slow``.
"""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope

import convneur_mm  # noqa: F401 before mmdet.models, which asks for mmcv's operators

pytestmark = pytest.mark.needs('mmdet')
ALWAYS = [
    'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco',  # NMS, RoIAlign, modulated deformable convolutions
    'guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco',  # masked and deformable convolutions
    'carafe/mask-rcnn_r50_fpn-carafe_1x_coco',
]
MORE = [
    'retinanet/retinanet_r50_fpn_1x_coco', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco', 'dino/dino-4scale_r50_8xb2-12e_coco',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'tood/tood_r50_fpn_1x_coco',
    'reppoints/reppoints-moment_r50_fpn_1x_coco', 'dyhead/atss_r50_fpn_dyhead_1x_coco',
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco',
    'cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco', 'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco',
    'faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco',
]


@pytest.mark.parametrize('name', [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_detector_of_mmdet_s_trains_and_predicts(name):
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / f'{name}.py').model
    without_pretrained(cfg)
    model = MODELS.build(cfg)
    model.init_weights()  # some parameters of the DETRs have no values before
    # With fewer pixels DINO has fewer tokens than queries.
    sizes = [[3, 128, 128] if name in ALWAYS else [3, 256, 256]] * 2
    # RTMDet takes masks for those of RTMDet-Ins where there are any.
    options = dict(with_mask='rtmdet_' not in name, with_semantic=True)
    inputs = demo_mm_inputs(2, sizes, **options)
    MessageHub.get_current_instance().update_info('epoch', 0)  # which TOOD asks for
    losses = model(**model.data_preprocessor(inputs, True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0
    model.eval()
    with torch.no_grad():
        inputs = demo_mm_inputs(1, sizes[:1], **options)  # masked convolutions take one image
        result, = model(**model.data_preprocessor(inputs, False), mode='predict')
    assert result.pred_instances.scores.isfinite().all()


def without_pretrained(cfg: dict | list) -> None:
    """Take all weights to be downloaded out of a model's config, in place."""
    if isinstance(cfg, dict) and (cfg.get('init_cfg') or {}).get('type') == 'Pretrained':
        cfg['init_cfg'] = None
    for value in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(value, (dict, list, tuple)):
            without_pretrained(value)
