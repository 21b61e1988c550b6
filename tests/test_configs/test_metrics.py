"""The metrics as the configs wire them, against known answers: pycocotools run alone, and plain numpy.

The data sets come from the configs too, over small generated folders, so that annotation files, category ids, label
maps and the order of the pipelines count. The predictions are made up, and wrong in part.
"""
import json

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, EVALUATOR
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# The ids have gaps, and neither they nor the names are in order.
CATEGORIES = [dict(id=7, name='cat'), dict(id=3, name='apple'), dict(id=40, name='bus')]
COCO_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def rectangle(shape, box):
    """A bool mask of a box x, y, w, h."""
    x, y, w, h = (int(value) for value in box)
    mask = np.zeros(shape, bool)
    mask[max(y, 0):max(y + h, 0), max(x, 0):max(x + w, 0)] = True
    return mask


def runs(mask):
    """Uncompressed run lengths, as COCO has them for crowds."""
    flat = np.concatenate([[0], mask.flatten(order='F'), [0]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    return dict(size=list(mask.shape), counts=counts)


@pytest.fixture(scope='module')
def coco_root(tmp_path_factory):
    """Pictures of many sizes in COCO's layout: small, medium and large boxes of three categories, some of them crowds,
    a picture without any, and ids with gaps."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'val2017').mkdir()
    (root / 'annotations').mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in (12, 5, 900, 31, 44, 45):
        height, width = (int(side) for side in rng.integers(150, 260, size=2))
        images.append(dict(id=image_id, file_name=f'{image_id:012}.jpg', height=height, width=width))
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(root / 'val2017' / f'{image_id:012}.jpg')
        for _ in range(12 * (image_id != 31)):
            side = rng.choice([12, 60, 120])
            w, h = (int(side * factor) for factor in rng.uniform(0.85, 1.15, size=2))
            box = [int(rng.integers(width - w)), int(rng.integers(height - h)), w, h]
            x, y, crowd = box[0], box[1], bool(rng.random() < 0.12)
            # A corner is cut off, so that the mask is not the box.
            polygon = [x, y, x + w, y, x + w, y + h // 2, x + w // 2, y + h, x, y + h]
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], height, width)))
            annotations.append(dict(
                id=10 * len(annotations) + 3, image_id=image_id, category_id=int(rng.choice([7, 3, 40])), bbox=box,
                area=int(mask.sum()), iscrowd=int(crowd), segmentation=runs(mask) if crowd else [polygon]))
    content = dict(images=images, annotations=annotations, categories=CATEGORIES)
    (root / 'annotations' / 'instances_val2017.json').write_text(json.dumps(content))
    return root


def made_up_detections(coco):
    """What a detector might find of the annotations: (boxes x1 y1 x2 y2, scores, category ids, masks) of each image.

    All numbers are multiples of 1/4 or less, which float32 holds exactly.
    """
    rng = np.random.default_rng(1)
    found = {}
    for image in coco.dataset['images']:
        shape = image['height'], image['width']
        boxes, categories = [], []
        for annotation in coco.imgToAnns[image['id']]:
            for _ in range(rng.choice([0, 1, 2], p=[0.15, 0.65, 0.2])):
                boxes.append(np.array(annotation['bbox']) + rng.integers(-1, 2, size=4) * (annotation['bbox'][2] // 12))
                categories.append(annotation['category_id'] if rng.random() < 0.85 else int(rng.choice([7, 3, 40])))
        for _ in range(3):
            boxes.append(np.array([*rng.integers(100, size=2), *rng.integers(10, 50, size=2)]))
            categories.append(int(rng.choice([7, 3, 40])))
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]) + 0.25
        masks = np.stack([rectangle(shape, box) for box in boxes])
        found[image['id']] = corners, rng.permutation(1024)[:len(boxes)] / 1024, categories, masks
    return found


def pycocotools_stats(coco, found, kind, categories):
    """The first six numbers of pycocotools, unrounded."""
    results = []
    for image_id, (boxes, scores, found_categories, masks) in found.items():
        for (x1, y1, x2, y2), score, category, mask in zip(boxes, scores, found_categories, masks):
            if category in categories:
                what = dict(bbox=[x1, y1, x2 - x1, y2 - y1]) if kind == 'bbox' else dict(
                    segmentation=coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
                results.append(dict(image_id=image_id, category_id=category, score=score, **what))
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.params.catIds = list(categories)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:6]


@pytest.mark.parametrize('classes', [('cat', 'apple', 'bus'), ('cat', 'bus')])
def test_coco(classes, coco_root, open_config, monkeypatch):
    """All numbers of boxes and masks, as reported and before they are rounded."""
    from mmdet.evaluation.metrics import coco_metric
    from mmengine.structures import InstanceData
    unrounded = {}

    class Recorded(coco_metric.COCOeval):

        def summarize(self):
            super().summarize()
            unrounded[self.params.iouType] = self.stats[:6]

    monkeypatch.setattr(coco_metric, 'COCOeval', Recorded)
    cfg = open_config('cascade_rcnn_convneur_m3_1x_coco')
    dataset = DATASETS.build(dict(
        cfg.test_dataloader.dataset, data_root=f'{coco_root}/', metainfo=dict(classes=classes)))
    annotations = cfg.test_evaluator.ann_file.removeprefix(cfg.test_dataloader.dataset.data_root)
    evaluator = EVALUATOR.build(dict(type='Evaluator', metrics=dict(
        cfg.test_evaluator, ann_file=f'{coco_root}/{annotations}')))
    evaluator.dataset_meta = dataset.metainfo

    coco = COCO(str(coco_root / 'annotations' / 'instances_val2017.json'))
    found = made_up_detections(coco)
    ids = {category['name']: category['id'] for category in CATEGORIES}
    samples = [dataset[i]['data_samples'] for i in range(len(dataset))]
    assert sorted(sample.img_id for sample in samples) == sorted(found)
    for sample in samples:
        boxes, scores, categories, masks = found[sample.img_id]
        kept = [i for i, category in enumerate(categories) if category in [ids[name] for name in classes]]
        assert sample.ori_shape == masks.shape[1:]
        sample.pred_instances = InstanceData(
            bboxes=torch.tensor(boxes[kept], dtype=torch.float32),
            scores=torch.tensor(scores[kept], dtype=torch.float32),
            labels=torch.tensor([[ids[name] for name in classes].index(categories[i]) for i in kept]),
            masks=torch.from_numpy(masks[kept]))
    for i in range(0, len(samples), 4):
        evaluator.process(data_samples=samples[i:i + 4], data_batch=None)
    metrics = evaluator.evaluate(len(dataset))

    assert len(metrics) == 12
    for kind in ('bbox', 'segm'):
        expected = pycocotools_stats(coco, found, kind, [ids[name] for name in classes])
        assert ((expected > 0.05) & (expected < 0.95)).all(), expected
        np.testing.assert_array_equal(unrounded[kind], expected)
        assert [metrics[f'coco/{kind}_{item}'] for item in COCO_ITEMS] == [round(value, 3) for value in expected]


# Labels as the files have them: for ADE20K 0 is "other", which nobody scores, and 1 to 150 are classes.
ADE20K_LABELS = (0, 1, 2, 3, 6, 13, 150, 255)
SIZES = ((37, 53), (64, 48), (41, 97))


def segmentation_root(root, labels):
    """Three pairs of different sizes in ADE20K's layout; the label maps hold blocks of ``labels``."""
    rng = np.random.default_rng(2)
    for kind in ('images', 'annotations'):
        (root / kind / 'validation').mkdir(parents=True)
    maps = []
    for i, (height, width) in enumerate(SIZES):
        blocks = rng.choice(labels, size=(height // 8 + 1, width // 8 + 1))
        maps.append(np.kron(blocks, np.ones((8, 8), int))[:height, :width])
        Image.fromarray(maps[-1].astype(np.uint8)).save(root / 'annotations' / 'validation' / f'{i}.png')
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(root / 'images' / 'validation' / f'{i}.jpg')
    return maps


def numpy_ious(truths, predictions, num_classes):
    """aAcc, mIoU and mAcc in percent from a confusion matrix in integers; truths of 255 are left out."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for truth, prediction in zip(truths, predictions):
        scored = truth != 255
        np.add.at(confusion, (truth[scored], prediction[scored]), 1)
    right, labelled = np.diag(confusion), confusion.sum(1)
    present = confusion.sum(0) + labelled - right > 0
    return dict(
        aAcc=100 * right.sum() / labelled.sum(),
        mIoU=100 * np.mean(right[present] / (confusion.sum(0) + labelled - right)[present]),
        mAcc=100 * np.mean(right[labelled > 0] / labelled[labelled > 0]))


@pytest.mark.parametrize('name, labels, classes, numbering', [
    ('semantic_fpn_convneur_m3_80k_ade20k', ADE20K_LABELS, None, {label: label - 1 for label in range(1, 151)}),
    ('upernet_convneur_m4_80k_ade20k', ADE20K_LABELS, None, {label: label - 1 for label in range(1, 151)}),
    # Some of the classes, in another order than ADE20K's, where sky, wall and tree are 3, 1 and 5.
    ('upernet_convneur_m4_80k_ade20k', (*ADE20K_LABELS, 5), ('sky', 'wall', 'tree'), {3: 0, 1: 1, 5: 2}),
    # Here the background is a class, and two of the shapes are nowhere.
    ('semantic_fpn_convneur_m1_shapes', (0, 1, 2, 3, 5, 255), None, {label: label for label in range(7)}),
])
def test_segmentation(name, labels, classes, numbering, tmp_path, open_config):
    from mmengine.structures import PixelData
    cfg = open_config(name)
    maps = segmentation_root(tmp_path, labels)
    settings = dict(cfg.test_dataloader.dataset, data_root=str(tmp_path))
    if classes:
        settings['metainfo'] = dict(classes=classes)
    dataset = DATASETS.build(settings)
    evaluator = EVALUATOR.build(dict(type='Evaluator', metrics=cfg.test_evaluator))
    evaluator.dataset_meta = dataset.metainfo
    num_classes = len(set(numbering.values()))
    assert len(dataset.metainfo['classes']) == num_classes

    rng = np.random.default_rng(3)
    # Ignored pixels are predicted too, and so is the last class, whether or not it is anywhere in the truth.
    lookup = np.array([numbering.get(label, 255) for label in range(256)])
    truths = [lookup[labels] for labels in maps]
    predictions = []
    for truth in truths:
        wrong = rng.choice([*range(min(num_classes, 6)), num_classes - 1], size=truth.shape)
        predictions.append(np.where((rng.random(truth.shape) < 0.3) | (truth == 255), wrong, truth))
    samples = [dataset[i]['data_samples'] for i in range(len(dataset))]
    assert [sample.ori_shape for sample in samples] == list(SIZES)
    for sample, prediction in zip(samples, predictions):
        sample.pred_sem_seg = PixelData(data=torch.from_numpy(prediction)[None])
    for sample in samples:
        evaluator.process(data_samples=[sample], data_batch=None)
    metrics = evaluator.evaluate(len(dataset))

    expected = numpy_ious(truths, predictions, num_classes)
    assert all(20 < value < 95 for value in expected.values()), expected
    # mmseg computes in float32 and rounds to two digits.
    # mmseg gives float32 or float64, depending on its version.
    assert {key: round(float(value), 2) for key, value in metrics.items()} == {
        key: round(float(value), 2) for key, value in expected.items()}


def test_a_class_found_nowhere_does_not_count():
    """The numpy answers themselves, on a case worked out by hand."""
    truth, prediction = np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]])
    answer = numpy_ious([truth], [prediction], num_classes=4)
    assert answer == pytest.approx(dict(aAcc=200 / 3, mIoU=50, mAcc=75))
    answer = numpy_ious([truth], [np.array([[0, 2, 1, 1]])], num_classes=4)
    assert answer == pytest.approx(dict(aAcc=200 / 3, mIoU=50, mAcc=75))  # IoUs of 1/2, 1 and 0, accuracies 1/2, 1


def test_imagenet_accuracy(tmp_path, open_config):
    cfg = open_config('convneur_m3_300e_in1k')
    rng = np.random.default_rng(4)
    labels = rng.choice(1000, size=16, replace=False)
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'val').mkdir()
    (tmp_path / 'meta' / 'val.txt').write_text(''.join(f'{i}.png {label}\n' for i, label in enumerate(labels)))
    for i in range(len(labels)):
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / 'val' / f'{i}.png')
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, data_root=str(tmp_path)))
    evaluator = EVALUATOR.build(dict(type='Evaluator', metrics=cfg.test_evaluator))
    evaluator.dataset_meta = dataset.metainfo

    # The right class is put at the first to the eighth place.
    places = np.arange(len(labels)) % 8
    scores = np.stack([rng.permutation(1000) / 1000 for _ in labels])
    for i, (label, place) in enumerate(zip(labels, places)):
        other = np.argsort(-scores[i])[place]
        scores[i, [label, other]] = scores[i, [other, label]]
    samples = [dataset[i]['data_samples'] for i in range(len(dataset))]
    assert [sample.gt_label.item() for sample in samples] == labels.tolist()
    for sample, score in zip(samples, scores):
        sample.set_pred_score(torch.from_numpy(score))
    for i in range(0, len(samples), 5):
        evaluator.process(data_samples=samples[i:i + 5], data_batch=None)
    metrics = evaluator.evaluate(len(dataset))

    order = np.argsort(-scores, axis=1)
    assert metrics == {f'accuracy/top{k}': 100 * np.mean([label in top for label, top in zip(labels, order[:, :k])])
                       for k in (1, 5)}
    assert metrics == {'accuracy/top1': 12.5, 'accuracy/top5': 62.5}
