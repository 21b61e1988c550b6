"""Boundary AP: answers worked out by hand, faster-coco-eval's own call, and a Runner's test loop."""
import importlib
import json
from importlib import metadata

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

import convneur_mm
from convneur_mm.datasets import make_shapes_coco
from convneur_mm.engine.runner.quiet_console import QuietRunner
from convneur_mm.stack import StackError

pytestmark = pytest.mark.needs('mmdet', 'faster_coco_eval')

CLASSES = ('square', 'disk')


def square(x, y=30, side=40):
    mask = np.zeros((100, 100), np.uint8)
    mask[y:y + side, x:x + side] = 1
    return mask


def rle(mask):
    from pycocotools.mask import encode
    code = encode(np.asfortranarray(mask, np.uint8))
    return dict(code, counts=code['counts'].decode())


def coco(*images):
    """Annotations of images, each a list of (mask, category)."""
    instances = [(i, *instance) for i, image in enumerate(images) for instance in image]
    return dict(
        images=[dict(id=i, height=100, width=100) for i in range(len(images))],
        # As in COCO, ids are not the labels.
        categories=[dict(id=7 + label, name=name) for label, name in enumerate(CLASSES)],
        annotations=[dict(id=1 + n, image_id=i, category_id=7 + label, iscrowd=0, area=int(mask.sum()),
                          bbox=[0, 0, 1, 1], segmentation=rle(mask)) for n, (i, mask, label) in enumerate(instances)])


def pred(*instances, scores=None):
    masks = np.stack([mask for mask, _ in instances]) if instances else np.zeros((0, 100, 100))
    return dict(
        bboxes=torch.zeros(len(instances), 4), labels=torch.tensor([label for _, label in instances], dtype=torch.long),
        scores=torch.tensor(scores or [0.9] * len(instances)), masks=torch.as_tensor(masks.astype(bool)))


def samples(*preds, **others):
    return [dict(img_id=i, img_path=f'{i}.jpg', ori_shape=(100, 100), pred_instances=found, **others)
            for i, found in enumerate(preds)]


@pytest.fixture
def evaluate(tmp_path):
    def run(truth, *preds, type='BoundaryAP', classes=CLASSES, **options):
        importlib.import_module('convneur_mm.evaluation.boundary_ap')
        path = tmp_path / 'truth.json'
        path.write_text(json.dumps(coco(*truth)))
        with DefaultScope.overwrite_default_scope('mmdet'):
            evaluator = Evaluator(dict(type=type, ann_file=str(path), **options))
        evaluator.dataset_meta = dict(classes=classes)
        evaluator.process(samples(*preds))
        return evaluator.evaluate(len(preds))
    return run


def test_square_shifted_by_one_pixel(evaluate):
    """Boundary IoU says so, where mask IoU is above all thresholds.

    The diagonal of 141 pixels gives bands of 3. Of the masks 39 x 40 of 41 x 40 pixels are in both. Of the bands the
    same 39 x 40 less the two holes' 35 x 34 are in both, and each has 40 x 40 less 34 x 34: 370 of 518, or 0.714, which
    is above the 5 thresholds from 0.5 to 0.7.
    """
    truth, found = [[(square(30), 0)]], pred((square(31), 0))
    assert evaluate(truth, found, type='CocoMetric', metric='segm')['coco/segm_mAP'] == 1
    assert evaluate(truth, found) == {
        'coco/boundary_mAP': 0.5, 'coco/boundary_mAP_50': 1, 'coco/boundary_mAP_75': 0, 'coco/boundary_mAP_s': -1,
        'coco/boundary_mAP_m': 0.5, 'coco/boundary_mAP_l': -1}


def test_width_of_the_band(evaluate):
    """Bands of 1 pixel: 2 x 39 of 2 x 156 - 78 pixels in both. Bands of half the square's side are the square."""
    truth, found = [[(square(30), 0)]], pred((square(31), 0))
    assert evaluate(truth, found, band_width=0.001)['coco/boundary_mAP_50'] == 0
    assert evaluate(truth, found, band_width=0.2)['coco/boundary_mAP'] == 1


def test_perfect(evaluate):
    """Of two classes in two images, one of them with nothing."""
    truth = [[(square(30), 0), (square(2, side=10), 1)], []]
    found = evaluate(truth, pred(*truth[0]), pred())
    assert found == {f'coco/boundary_mAP{part}': 1 for part in ('', '_50', '_75', '_s', '_m')} | {
        'coco/boundary_mAP_l': -1}


def test_classes_are_told_apart(evaluate):
    truth = [[(square(30), 0), (square(2, side=10), 1)]]
    assert evaluate(truth, pred((square(30), 0), (square(2, side=10), 0)))['coco/boundary_mAP'] == 0.5


def test_classes_of_the_data_set_alone_count(evaluate):
    """The annotation file may have more."""
    truth = [[(square(30), 0), (square(2, side=10), 1)]]
    assert evaluate(truth, pred((square(2, side=10), 0)), classes=CLASSES[1:])['coco/boundary_mAP'] == 1


@pytest.mark.parametrize('truth, found, expected', [
    ([[(square(30), 0)]], pred(), 0),
    ([[]], pred((square(30), 0)), -1),
    ([[]], pred(), -1)], ids=['nothing found', 'nothing there', 'neither'])
def test_empty(evaluate, truth, found, expected):
    assert evaluate(truth, found)['coco/boundary_mAP'] == expected


def test_area_is_that_of_the_mask(evaluate):
    """Not of the box: a wrong small mask, in a box of any size, takes nothing from the AP of medium ones."""
    wrong = pred((square(30), 0), (square(2, side=10), 0), scores=[0.5, 0.9])
    wrong['bboxes'][1] = torch.tensor([0, 0, 60, 60])
    found = evaluate([[(square(30), 0)]], wrong)
    assert (found['coco/boundary_mAP'], found['coco/boundary_mAP_m']) == (0.5, 1)


def test_evaluating_twice(tmp_path):
    """As validations do, in one process: with the bands of the option, which the first evaluation has computed."""
    from convneur_mm.evaluation.boundary_ap import BoundaryAP
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(coco([(square(30), 0)])))
    metric = BoundaryAP(str(path), band_width=0.2)
    metric.dataset_meta = dict(classes=CLASSES)
    values = []
    for width in 0.2, 0.02, 0.02:
        metric.band_width = width
        metric.process({}, samples(pred((square(31), 0))))
        values.append(metric.evaluate(1)['coco/boundary_mAP'])
    assert values == [1, 0.5, 0.5]


def test_truth_of_the_data_samples():
    from convneur_mm.evaluation.boundary_ap import BoundaryAP
    metric = BoundaryAP(prefix='edges')
    metric.dataset_meta = dict(classes=CLASSES)
    instances = [dict(bbox=[30, 30, 70, 70], bbox_label=0, ignore_flag=0, mask=rle(square(30)))]
    metric.process({}, samples(pred((square(31), 0)), instances=instances))
    assert metric.evaluate(1)['edges/boundary_mAP'] == 0.5


def test_against_the_library(evaluate):
    """Many masks of ragged edges and different scores, in several images."""
    from faster_coco_eval import COCO, COCOeval_faster
    rng = np.random.default_rng(0)

    def ragged(mask):
        return (mask ^ (rng.random(mask.shape) < 5e-4)).astype(np.uint8)

    truth = [[(square(int(x), int(y), int(side)), int(label)) for x, y, side, label in zip(
        *rng.integers(0, 50, (2, 6)), rng.integers(8, 50, 6), rng.integers(2, size=6))] for _ in range(3)]
    found = [[(ragged(np.roll(mask, int(rng.integers(-1, 2)), 1)), label) for mask, label in image] for image in truth]
    scores = rng.random((3, 6)).round(3).tolist()
    ours = evaluate(truth, *(pred(*image, scores=s) for image, s in zip(found, scores)))

    reference = COCO(coco(*truth))
    results = reference.loadRes([
        dict(image_id=i, category_id=7 + label, score=score, segmentation=rle(mask))
        for i, (image, s) in enumerate(zip(found, scores)) for (mask, label), score in zip(image, s)])
    evaluation = COCOeval_faster(reference, results, 'boundary')
    evaluation.run()
    assert list(ours.values()) == pytest.approx(evaluation.stats[:6], abs=5e-4)
    assert 0.1 < ours['coco/boundary_mAP'] < 0.9


@pytest.mark.parametrize('width', [0.0, 1.0, 2, -0.1, '2%'])
def test_width_that_is_none(width):
    from convneur_mm.evaluation.boundary_ap import BoundaryAP
    with pytest.raises(ValueError, match=f"^band_width must be a share .* between 0.0 and 1.0, got {width!r}$"):
        BoundaryAP(band_width=width)


def test_data_without_masks():
    from convneur_mm.evaluation.boundary_ap import BoundaryAP
    metric = BoundaryAP()
    without = pred((square(30), 0))
    del without['masks']
    with pytest.raises(ValueError, match='^0.jpg: no masks predicted; .* expected a detector with a mask head$'):
        metric.process({}, samples(without))
    for others in {}, dict(instances=[dict(bbox=[0, 0, 1, 1], bbox_label=0)]):
        with pytest.raises(ValueError, match='^0.jpg: no masks to compare with; BoundaryAP expected an ann_file, or'):
            metric.process({}, samples(pred((square(30), 0)), **others))


@pytest.mark.parametrize('version', [None, '1.6.5'])
def test_library_that_is_missing_or_old(monkeypatch, version):
    """The error names what to install."""
    from convneur_mm.evaluation.boundary_ap import BoundaryAP

    def find(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, 'version', find)
    with pytest.raises(StackError, match=(
            f"^BoundaryAP needs faster-coco-eval 1.8 or later, got {version}.*: pip install 'faster-coco-eval>=1.8'$")):
        BoundaryAP()


@MODELS.register_module()
class ShiftedTruth(BaseModel):
    """A detector that knows the truth, and is a pixel off."""

    def __init__(self, ann_file):
        super().__init__()
        from pycocotools.coco import COCO
        self.truth = COCO(ann_file)

    def forward(self, inputs, data_samples, mode):
        for sample in data_samples:
            anns = self.truth.loadAnns(self.truth.getAnnIds(sample.img_id))
            masks = np.stack([np.roll(self.truth.annToMask(ann), 1, axis=1) for ann in anns]).astype(bool)
            labels = [self.truth.getCatIds().index(ann['category_id']) for ann in anns]
            sample.pred_instances = InstanceData(
                bboxes=torch.zeros(len(anns), 4), scores=torch.ones(len(anns)), labels=torch.tensor(labels),
                masks=torch.from_numpy(masks))
        return data_samples


def test_a_runner_tests_with_it(tmp_path):
    """A config's child adds the metric to those of its parent."""
    make_shapes_coco(tmp_path / 'data', num_train=1, num_val=3, image_size=64)
    ann_file = str(tmp_path / 'data/annotations/instances_val.json')
    (tmp_path / 'child.py').write_text(f"""
_base_ = {convneur_mm.config('cascade_rcnn_convneur_m1_shapes')!r}
custom_imports = dict(imports=['convneur_mm', 'convneur_mm.evaluation.boundary_ap'])
model = dict(_delete_=True, type='ShiftedTruth', ann_file={ann_file!r})
test_evaluator = [
    dict(type='CocoMetric', ann_file={ann_file!r}, metric='segm'), dict(type='BoundaryAP', ann_file={ann_file!r})]
test_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root={str(tmp_path / 'data')!r}))
""")
    cfg = Config.fromfile(tmp_path / 'child.py')
    cfg.work_dir = str(tmp_path / 'work')
    metrics = QuietRunner.from_cfg(cfg).test()
    assert 0 < metrics['coco/boundary_mAP'] < metrics['coco/segm_mAP'] - 0.1
    log, = (tmp_path / 'work').rglob('*.log')
    assert 'coco/boundary_mAP_50: ' in log.read_text()
