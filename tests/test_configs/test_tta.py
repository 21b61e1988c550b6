"""Test-time augmentation by the configs' tta_model and tta_pipeline, as tools/test.py --tta sets them up."""
import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from mmengine.runner import set_random_seed

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_imagenet
from convneur_mm.engine.launch import LaunchError
from convneur_mm.engine.runner.model_wrappers import unwrapped

TEST = Path(__file__).parents[2] / 'tools' / 'test.py'


@pytest.fixture(scope='module')
def use_tta():
    spec = importlib.util.spec_from_file_location('test_tool', TEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.use_tta


def first_views(cfg):
    """All views of the first test image, and how many there are."""
    batch = pseudo_collate([DATASETS.build(cfg.test_dataloader.dataset)[0]])
    return batch, len(batch['inputs'])


@pytest.mark.parametrize('name, factors', [
    ('semantic_fpn_convneur_m1_80k_ade20k', [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]),
    ('semantic_fpn_convneur_m1_shapes', [0.75, 1.0, 1.25]),
])
def test_segmentation_is_the_mean_over_sizes_and_flips(name, factors, tmp_path, open_config, build_model, use_tta):
    make_shapes_ade20k(tmp_path, num_train=1, num_val=1, image_size=64)
    cfg = open_config(name)
    cfg.test_dataloader.dataset.data_root = str(tmp_path)
    # On a CPU as the tools do it; flat predictions of a fresh head would not differ from each other.
    cfg.model.decode_head.norm_cfg = dict(type='BN')
    use_tta(cfg, name)
    set_random_seed(0)
    model = build_model(cfg).eval()
    for param in model.module.decode_head.conv_seg.parameters():
        torch.nn.init.normal_(param)
    assert unwrapped(model) is model.module and 'backbone.norm0.weight' not in model.state_dict()
    batch, count = first_views(cfg)
    base = 64 if name.endswith('ade20k') else 96
    assert [tuple(image[0].shape[1:]) for image in batch['inputs'][::2]] == [(base * f, base * f) for f in factors]
    for plain, flipped in zip(batch['inputs'][::2], batch['inputs'][1::2]):
        assert torch.equal(plain[0].flip(-1), flipped[0]) and not torch.equal(plain[0], flipped[0])

    with torch.no_grad():
        merged, = model.test_step(batch)
        single = []
        for i in range(count):
            prediction, = model.module.test_step({key: value[i] for key, value in batch.items()})
            single.append(prediction.seg_logits.data.softmax(0))
    mean = torch.stack(single).double().mean(0)
    assert merged.pred_sem_seg.shape == merged.gt_sem_seg.shape == (64, 64)
    found = merged.pred_sem_seg.data[0]
    # Where float32 leaves no doubt.
    best = mean.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-5
    assert clear.float().mean() > 0.95
    assert torch.equal(found[clear], best.indices[0][clear])
    assert not torch.equal(found, single[0].argmax(0))


def test_classification_is_the_mean_over_flips(tmp_path, open_config, build_model, use_tta):
    """As mmpretrain's own tool does without tta_pipeline."""
    make_shapes_imagenet(tmp_path, num_train=6, num_val=6, image_size=64)
    cfg = open_config('convneur_m1_shapes')
    cfg.test_dataloader.dataset.data_root = str(tmp_path)
    use_tta(cfg, 'convneur_m1_shapes')
    set_random_seed(0)
    model = build_model(cfg).eval()
    for param in model.module.head.parameters():
        torch.nn.init.normal_(param)
    batch, count = first_views(cfg)
    assert count == 2 and torch.equal(batch['inputs'][0][0].flip(-1), batch['inputs'][1][0])
    with torch.no_grad():
        merged, = model.test_step(batch)
        views = [model.module.test_step({key: value[i] for key, value in batch.items()})[0] for i in range(2)]
    scores = [view.pred_score for view in views]
    assert not torch.allclose(scores[0], scores[1])
    torch.testing.assert_close(merged.pred_score, (scores[0] + scores[1]) / 2)
    assert merged.gt_label == views[0].gt_label


def test_a_detector_is_refused_in_one_line(open_config, use_tta):
    cfg = open_config('cascade_rcnn_convneur_m1_shapes')
    with pytest.raises(LaunchError, match='^--tta needs tta_model and tta_pipeline, which mine.py lacks; mmdet merges '
                                          'boxes of several views, but no masks$'):
        use_tta(cfg, 'mine.py')
