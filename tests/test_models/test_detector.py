"""The backbone inside mmdet: RoI features, losses and gradients of the shipped light detector."""
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torchvision.ops import roi_align

import convneur_mm
from convneur_mm.models import ConvNeur
from convneur_mm.models.stream import stream

pytestmark = pytest.mark.needs('mmdet')


@pytest.fixture(scope='module')
def detector():
    from mmdet.registry import MODELS

    cfg = Config.fromfile(convneur_mm.config('cascade_rcnn_convneur_m1_shapes'))
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def inputs(**kwargs):
    """A batch of two images of different sizes, as the data loader gives it."""
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(2, [[3, 128, 128], [3, 96, 128]], num_classes=6, **kwargs)


def test_roi_features_are_torchvisions(detector):
    """A compiled mmcv takes any memory for contiguous; torchvision looks at strides."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        features = detector.backbone(x)
    boxes = torch.tensor([[0, 3.0, 5.0, 40.0, 61.0], [0, 10.0, 0.0, 90.0, 90.0], [1, 77.3, 20.1, 150.2, 100.9]])
    extractor = detector.roi_head.bbox_roi_extractor[0]
    for feature, layer, stride in zip(features, extractor.roi_layers, (4, 8, 16, 32)):
        expected = roi_align(feature, boxes, (7, 7), 1 / stride, layer.sampling_ratio, aligned=True)
        assert torch.allclose(layer(feature, boxes), expected, atol=1e-5)
        assert feature.is_contiguous()


def test_channels_last_changes_no_prediction(detector):
    """Whatever memory the backbone works in, the detector sees the same features: boxes, scores, labels and masks."""
    detector.eval()
    torch.manual_seed(0)
    data = detector.data_preprocessor(inputs())
    test_cfg = detector.roi_head.test_cfg
    threshold, test_cfg.score_thr = test_cfg.score_thr, 0.0  # random weights are sure of nothing
    results = []
    for channels_last in (True, False):
        detector.backbone.channels_last = channels_last
        with torch.no_grad():
            results.append([sample.pred_instances for sample in detector(**data, mode='predict')])
    detector.backbone.channels_last, test_cfg.score_thr = True, threshold
    for a, b in zip(*results):
        assert len(a) == len(b) > 0
        assert torch.allclose(a.bboxes, b.bboxes, atol=1e-2) and torch.allclose(a.scores, b.scores, atol=1e-5)
        assert torch.equal(a.labels, b.labels) and (a.masks != b.masks).float().mean() < 1e-3


def test_losses_reach_every_parameter(detector):
    detector.train()
    data = detector.data_preprocessor(inputs(num_items=[6, 6], with_mask=True), True)
    losses, _ = detector.parse_losses(detector(**data, mode='loss'))
    losses.backward()
    assert losses.isfinite()
    for name, p in detector.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_backbone_is_ours(detector):
    assert type(detector.backbone) is ConvNeur
    assert detector.backbone.stages[0][0].global_branch.memory.num_chunks == 4


def test_a_video_without_changing_the_detector(detector):
    detector.eval()
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, 3, 64, 96)
    with torch.no_grad():
        alone = detector.extract_feat(second)
        with stream(detector) as state:
            detector.extract_feat(first)
            found = detector.extract_feat(second)
            assert len(state.states) == 4
        _, states = detector.backbone(first, return_states=True)
        expected = detector.neck(detector.backbone(second, states=states))
    for a, b, c in zip(found, expected, alone):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, c)
