"""Boundary metrics: answers worked out by hand, the definitions as loops, MONAI, and a Runner's test loop."""
import importlib
import multiprocessing
import sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS, DefaultScope
from PIL import Image

import convneur_mm
from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_ade20k
from convneur_mm.engine.runner.quiet_console import QuietRunner
from convneur_mm.stack import StackError

pytestmark = pytest.mark.needs('mmseg')

DISTANCES = ('Hausdorff', 'HD95')


def counts(pred, truth, num_classes=2, **options):
    from convneur_mm.evaluation.boundary import boundary_counts
    return boundary_counts(np.asarray(pred), np.asarray(truth), num_classes, **options)


def scores(*images, num_classes=2, **options):
    """The metrics of pairs of prediction and truth."""
    from convneur_mm.evaluation.boundary import boundary_scores
    return boundary_scores([counts(*image, num_classes, **options) for image in images], num_classes)


def square(x, y=5, side=6, size=20):
    labels = np.zeros((size, size), int)
    labels[y:y + side, x:x + side] = 1
    return labels


def build_metric(num_classes=2, **options):
    from convneur_mm.evaluation.boundary import BoundaryMetric
    metric = BoundaryMetric(**options)
    metric.dataset_meta = dict(classes=[f'class {i}' for i in range(num_classes)])
    return metric


def sample(pred, truth, path='images/a.jpg'):
    return dict(img_path=path, pred_sem_seg=dict(data=torch.as_tensor(pred)[None]),
                gt_sem_seg=dict(data=torch.as_tensor(truth)[None]))


# Known answers.


def test_square_shifted_by_one_pixel():
    """The square's boundary has 20 pixels, and 10 of them lie on the shifted one's: 5 above and 5 below."""
    shifted = square(6), square(5)
    found = scores(shifted, tolerance=0, band_width=1)
    assert found['F1'][1] == 0.5
    assert found['IoU'][1] == 10 / 30
    # Windows of 3 x 3 see a change in the true boundary's 20 pixels and the 28 around it. Of the prediction's 20 there,
    # 14 are the truth's.
    assert found['TrimapIoU'].tolist() == [22 / 34, 14 / 26]
    assert found['Hausdorff'][1] == found['HD95'][1] == 1
    assert scores(shifted, tolerance=1)['F1'].tolist() == [1, 1]
    # Two pixels deep the band has 32 pixels: 24 of them in both.
    assert scores(shifted, band_width=2)['IoU'][1] == 24 / 40


def test_precision_and_recall_are_of_different_boundaries():
    """A second square, of 12 boundary pixels, found where there is nothing."""
    pred = square(5) + square(14, y=14, side=4)
    found = counts(pred, square(5), tolerance=0)
    assert (found.matched_pred[1], found.pred[1], found.matched_truth[1], found.truth[1]) == (20, 32, 20, 20)
    precision, recall = 20 / 32, 1
    assert scores((pred, square(5)), tolerance=0)['F1'][1] == 2 * precision * recall / (precision + recall)
    # Its corner is the farthest from the square, whose own corner is at (10, 10).
    assert found.hausdorff[1] == np.hypot(7, 7)
    # 12 of 32 pixels are far, so the 95th percentile is among them: the corner is passed by one or two of 32.
    far = np.sort([np.hypot(x - 10, y - 10) for x in range(14, 18) for y in range(14, 18)
                   if {x, y} & {14, 17}])
    assert found.hd95[1] == np.percentile(np.concatenate([np.zeros(20), far]), 95) < np.hypot(7, 7)
    # The same the other way round: the squares that the distances start from change places.
    assert counts(square(5), pred).hausdorff[1] == np.hypot(7, 7)


@pytest.mark.parametrize('missed', [True, False])
def test_class_in_one_of_both(missed):
    """A class that is missed, or found where there is none: the worst values, which is the diagonal for distances."""
    pair = (np.zeros((20, 20), int), square(5)) if missed else (square(5), np.zeros((20, 20), int))
    found = scores(pair)
    assert found['F1'][1] == found['IoU'][1] == 0
    assert found['Hausdorff'][1] == found['HD95'][1] == np.hypot(20, 20)
    if missed:
        assert found['TrimapIoU'][1] == 0
    else:
        # The truth has one label, so there is no change of label to look around.
        assert np.isnan(found['TrimapIoU']).all()


def test_class_in_neither_does_not_count():
    found = scores((square(6), square(5)), num_classes=3)
    assert all(np.isnan(found[name][2]) for name in found)
    with_it, without = (build_metric(n, tolerance=0) for n in (3, 2))
    for metric in (with_it, without):
        metric.process(None, [sample(square(6), square(5))])
    assert with_it.evaluate(1) == without.evaluate(1)


def test_picture_of_one_class():
    """Its boundary is at the image's edge; the truth has no change of label, so that there is no trimap."""
    picture = np.zeros((12, 16), int)
    found = scores((picture, picture), tolerance=0)
    assert [found[name][0] for name in ('F1', 'IoU', 'Hausdorff', 'HD95')] == [1, 1, 0, 0]
    assert np.isnan(found['TrimapIoU']).all()
    assert counts(picture, picture).truth[0] == 2 * (12 + 16) - 4


def test_image_edge_is_a_boundary():
    """As in the authors' code of boundary IoU: of 12 x 16 pixels, 8 x 12 are more than two from the edge."""
    found = counts(np.zeros((12, 16), int), np.zeros((12, 16), int), band_width=2)
    assert found.band_union[0] == 12 * 16 - 8 * 12


@pytest.mark.filterwarnings('error')
def test_all_ignored():
    metric = build_metric()
    metric.process(None, [sample(square(5), np.full((20, 20), 255))])
    means = metric.evaluate(1)
    assert set(means) == {'boundary/mF1', 'boundary/mIoU', 'boundary/mTrimapIoU', 'boundary/mHausdorff',
                          'boundary/mHD95'}
    assert all(np.isnan(value) for value in means.values())


def test_ignored_label_of_the_metric():
    truth = square(5)
    truth[:, 8:12] = 254
    metric = build_metric(ignore_index=254)
    metric.process(None, [sample(square(5), truth)])
    assert metric.evaluate(1)['boundary/mF1'] == 100


def test_ignored_pixels():
    """What is predicted there makes no difference, and their edge is a boundary of prediction and truth."""
    truth = square(5)
    truth[:, 8:12] = 254
    options = dict(ignore_index=254, tolerance=0, band_width=1)
    pred = square(6)
    nonsense = np.where(truth == 254, 1 - pred, pred)
    assert np.array_equal(counts(pred, truth, **options), counts(nonsense, truth, **options), equal_nan=True)
    # Of the square 3 of 6 columns are left, whose boundary is all but 4 pixels.
    assert counts(truth, truth, **options).truth[1] == 3 * 6 - 4
    with pytest.raises(ValueError, match='^the truth has the label 254, expected 0 to 1, or the ignore_index'):
        counts(pred, truth)


def test_256_classes():
    """Labels of a PNG's 8 bits, all of them classes but 0."""
    truth = np.where(square(5) == 1, 255, 7).astype(np.uint8)
    found = counts(truth, truth, 256, ignore_index=0)
    assert np.flatnonzero(found.truth).tolist() == [7, 255]
    assert found.truth[255] == 20


def test_lengths_as_a_share_of_the_diagonal():
    """Which is 50 pixels here. A tolerance is not rounded, a width is, to 1 at least."""
    labels = np.random.default_rng(0).integers(2, size=(2, 30, 40)).repeat(3, 1)[:, :30]
    same = [dict(tolerance=0.04, band_width=0.04), dict(tolerance=2, band_width=2),
            dict(tolerance=0.0447, band_width=0.0499)]  # 2.235 < sqrt(5), and 2.495 pixels
    first, *others = (counts(*labels, **options) for options in same)
    assert all(np.array_equal(first, other) for other in others)
    for other in dict(tolerance=0.0448), dict(band_width=0.0501):
        assert not np.array_equal(first, counts(*labels, **{**same[0], **other}))
    assert np.array_equal(counts(*labels, band_width=0.001), counts(*labels, band_width=1))
    assert np.array_equal(counts(*labels, band_width=500), counts(*labels, band_width=40))


def test_data_set_of_several_images():
    """Pixels are added up, distances averaged over the images that have the class; the classes' mean is theirs."""
    images = [(square(6), square(5)), (square(9, side=3), square(5, side=3)), (np.zeros((20, 20), int),) * 2]
    found = scores(*images, tolerance=0, band_width=1)
    # The second image's squares lie apart: 8 boundary pixels each, none matched, 4 pixels from each other.
    assert found['F1'][1] == 10 / 28
    assert found['IoU'][1] == 10 / (30 + 16)
    assert found['Hausdorff'][1] == (1 + 4) / 2
    metric = build_metric(tolerance=0, band_width=1)
    for image in images:
        metric.process(None, [sample(*image)])
    assert metric.evaluate(3) == {
        f'boundary/m{name}': round(values.mean() * (1 if name in DISTANCES else 100), 2)
        for name, values in found.items()}


def test_scores_of_counts():
    """With numbers that all differ, so that none can stand for another."""
    from convneur_mm.evaluation.boundary import BoundaryCounts, boundary_scores
    first = BoundaryCounts(*np.array([[2, 7], [5, 11], [3, 4], [8, 9], [6, 1], [13, 12], [10, 14], [15, 16],
                                      [17, np.nan], [18, np.nan]]))
    second = BoundaryCounts(*np.array([[1, 0], [19, 0], [2, 0], [7, 0], [4, 0], [9, 0], [3, 0], [5, 0],
                                       [23, np.nan], [29, np.nan]]))
    precision, recall = 3 / 24, 5 / 15
    found = boundary_scores([first, second], 2)
    expected = dict(F1=2 * precision * recall / (precision + recall), IoU=10 / 22, TrimapIoU=13 / 20, Hausdorff=20,
                    HD95=23.5)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected, rel=1e-14)
    assert found['F1'][1] == pytest.approx(2 * (7 / 11) * (4 / 9) / (7 / 11 + 4 / 9), rel=1e-14)
    assert np.isnan(found['Hausdorff'][1])


def test_boundaries_notice_a_shift_more_than_iou():
    y, x = np.mgrid[:200, :200]
    disk = (np.hypot(y - 100, x - 100) < 70).astype(int)
    pred = np.roll(disk, 3, axis=1)
    iou = (pred & disk).sum() / (pred | disk).sum()
    found = scores((pred, disk), tolerance=1, band_width=4)
    assert iou > 0.94
    for name in 'F1', 'IoU', 'TrimapIoU':
        assert found[name][1] < iou - 0.15, name
    # A shift twice as far is worse in all of them.
    worse = scores((np.roll(disk, 6, axis=1), disk), tolerance=1, band_width=4)
    assert all(worse[name][1] < found[name][1] for name in ('F1', 'IoU', 'TrimapIoU'))
    assert [worse['Hausdorff'][1], found['Hausdorff'][1]] == [6, 3]


# The definitions, pixel by pixel and for all pairs of boundary pixels.


def plain_counts(pred, truth, num_classes, ignore_index, tolerance, width):
    height, width_px = truth.shape
    pred, truth = (np.where(truth == ignore_index, -1, labels) for labels in (pred, truth))

    def around(labels, y, x, reach, diagonally=True):
        """Labels within reach of a pixel, None beyond the image's edge."""
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                if diagonally or abs(dy) + abs(dx) <= reach:
                    inside = 0 <= y + dy < height and 0 <= x + dx < width_px
                    yield labels[y + dy, x + dx] if inside else None

    pixels = [(y, x) for y in range(height) for x in range(width_px)]
    trimap = {(y, x) for y, x in pixels
              if truth[y, x] != -1 and len(set(around(truth, y, x, width)) - {None}) > 1}
    rows = []
    for label in range(num_classes):
        edges, bands, regions = [], [], []
        for labels in (pred, truth):
            mask = [p for p in pixels if labels[p] == label]
            edges.append([p for p in mask if set(around(labels, *p, 1, diagonally=False)) != {label}])
            bands.append({p for p in mask if set(around(labels, *p, width)) != {label}})
            regions.append(trimap.intersection(mask))
        to_truth, to_pred = ([min(((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5 for b in others) for a in points]
                             if others else [] for points, others in (edges, edges[::-1]))
        hausdorff = hd95 = np.nan
        if to_truth:
            hausdorff = max(to_truth + to_pred)
            hd95 = max(np.quantile(to_truth, 0.95), np.quantile(to_pred, 0.95))
        elif edges[0] or edges[1]:
            hausdorff = hd95 = (height ** 2 + width_px ** 2) ** 0.5
        rows.append([
            sum(d <= tolerance for d in to_truth), len(edges[0]), sum(d <= tolerance for d in to_pred), len(edges[1]),
            len(bands[0] & bands[1]), len(bands[0] | bands[1]),
            len(regions[0] & regions[1]), len(regions[0] | regions[1]), hausdorff, hd95])
    return np.array(rows, float).T


@st.composite
def pairs(draw, ignored=()):
    """Two label maps of one size, of up to 4 classes, with patches of a label."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 9)))
    labels = st.sampled_from([0, 0, 0, 1, 1, 3])
    pred = draw(arrays(np.int64, shape, elements=labels))
    return pred, draw(arrays(np.uint8, shape, elements=labels | st.sampled_from(ignored) if ignored else labels))


@settings(deadline=None)
@given(pair=pairs(ignored=[255]), tolerance=st.integers(0, 3), width=st.integers(1, 3))
def test_small_maps_against_the_definitions(pair, tolerance, width):
    expected = plain_counts(*pair, 4, 255, tolerance, width)
    np.testing.assert_allclose(
        counts(*pair, 4, tolerance=tolerance, band_width=width), expected, rtol=1e-14, atol=0)


def test_a_picture_against_the_definitions():
    """Of several regions of each class, wrong at their edges, where some pixels are ignored."""
    rng = np.random.default_rng(2)
    truth = rng.integers(4, size=(7, 9)).repeat(6, 0).repeat(5, 1)
    pred = np.roll(truth, (1, 2), axis=(0, 1))
    truth[rng.random(truth.shape) < 0.02] = 255
    found = counts(pred, truth, 5, tolerance=2, band_width=3)
    np.testing.assert_allclose(found, plain_counts(pred, truth, 5, 255, 2, 3), rtol=1e-14, atol=0)
    assert (found.matched_pred[:4] < found.pred[:4]).all()  # and so something is told apart


@pytest.mark.filterwarnings('ignore:.*always_return_as_numpy:FutureWarning')
@pytest.mark.parametrize('seed', range(4))
def test_distances_and_matches_are_those_of_monai(seed):
    """In float32, as MONAI's are. Its surface Dice is the share of both boundaries that has a match."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    noise = np.random.default_rng(seed).random((2, 41, 58, 4))
    maps = [cv2.GaussianBlur(each, (0, 0), 4).argmax(-1) for each in noise]
    images = [torch.nn.functional.one_hot(torch.from_numpy(each), 4).permute(2, 0, 1)[None] for each in maps]
    found = counts(*maps, 4, tolerance=3)
    for ours, percentile in ((found.hausdorff, None), (found.hd95, 95)):
        theirs = compute_hausdorff_distance(*images, include_background=True, percentile=percentile)
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-6)
    dice = compute_surface_dice(*images, class_thresholds=[3] * 4, include_background=True)
    np.testing.assert_allclose((found.matched_pred + found.matched_truth) / (found.pred + found.truth), dice[0],
                               rtol=1e-6)


@settings(deadline=None)
@given(pair=pairs())
def test_prediction_and_truth_change_places(pair):
    """All but the trimap are the same."""
    forth, back = scores(pair, num_classes=4), scores(pair[::-1], num_classes=4)
    for name in 'F1', 'IoU', 'Hausdorff', 'HD95':
        np.testing.assert_allclose(forth[name], back[name], rtol=1e-14, atol=0, err_msg=name)


@settings(deadline=None)
@given(pair=pairs(ignored=[255]))
def test_truth_as_prediction(pair):
    truth = pair[1]
    found = scores((np.where(truth == 255, 2, truth), truth), num_classes=4, tolerance=0)
    present = np.isin(range(4), truth)
    for name in 'F1', 'IoU', 'Hausdorff', 'HD95':
        np.testing.assert_array_equal(found[name], np.where(present, float(name not in DISTANCES), np.nan))
    assert set(found['TrimapIoU'][~np.isnan(found['TrimapIoU'])]) <= {1.0}


# The metric.


@pytest.mark.parametrize('options, message', [
    (dict(tolerance=-1), 'tolerance must be an integer of at least 0, .* got -1'),
    (dict(tolerance=True), 'tolerance must be an integer .* got True'),
    (dict(tolerance=1.5), 'tolerance must be .* a share of the image.s diagonal between 0.0 and 1.0, got 1.5'),
    (dict(tolerance=0.0), 'tolerance must be .* got 0.0'),
    (dict(band_width=0), 'band_width must be an integer of at least 1, .* got 0'),
    (dict(band_width='2%'), "band_width must be .* got '2%'")])
def test_lengths_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        build_metric(**options)


def test_data_that_does_not_fit():
    metric = build_metric()
    without = sample(square(5), square(5))
    del without['gt_sem_seg']
    for data, message in [
        (without, 'images/a.jpg: no label map to compare with; expected LoadAnnotations in the test pipeline'),
        (sample(square(5), square(5, size=24)), r'images/a.jpg: .* of one size, got \(20, 20\) and \(24, 24\)'),
        (sample(square(5) * 2, square(5)), 'images/a.jpg: the prediction has the label 2, expected 0 to 1'),
        (sample(square(5), square(5) * -3), 'images/a.jpg: the truth has the label -3, expected 0 to 1'),
    ]:
        with pytest.raises(ValueError, match=f'^{message}'):
            metric.process(None, [data])


def test_without_mmseg(monkeypatch):
    """The error names what to install."""
    def missing(name):
        raise StackError(f'{name} needs mmsegmentation')

    monkeypatch.setattr('convneur_mm.stack.require', missing)
    monkeypatch.delitem(sys.modules, 'convneur_mm.evaluation.boundary', raising=False)
    with pytest.raises(StackError, match='^mmseg needs'):
        importlib.import_module('convneur_mm.evaluation.boundary')


def evaluate_part(rank, metric, store, queue):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    queue.put(metric.evaluate(3))
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    """Both return what one process would; the second image of the second process only fills the batch."""
    images = [(square(6), square(5)), (square(9, side=3), square(5, side=3)), (square(5), square(5))]
    whole = build_metric()
    whole.process(None, [sample(*image) for image in images])
    expected = whole.evaluate(3)
    context = multiprocessing.get_context('fork')  # no imports, which would take seconds
    queue, processes = context.Queue(), []
    for rank, part in enumerate((images[::2], [images[1], images[0]])):
        metric = build_metric()
        metric.process(None, [sample(*image) for image in part])
        processes.append(context.Process(target=evaluate_part, args=(rank, metric, tmp_path / 'store', queue)))
        processes[-1].start()
    try:
        found = [queue.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    assert found == [expected, expected]


def test_registered_for_mmseg():
    import mmseg.registry

    from convneur_mm.evaluation.boundary import BoundaryMetric
    assert mmseg.registry.METRICS.module_dict['BoundaryMetric'] is BoundaryMetric
    assert 'BoundaryMetric' not in METRICS.module_dict
    with DefaultScope.overwrite_default_scope('mmseg'):
        evaluator = Evaluator([dict(type='BoundaryMetric', tolerance=3, prefix='edges')])
    assert (evaluator.metrics[0].tolerance, evaluator.metrics[0].prefix) == (3, 'edges')


def test_a_runner_tests_with_it(tmp_path, capfd):
    """A config's child adds the metric to mIoU; the means are those of the label maps that IoUMetric writes."""
    make_shapes_ade20k(tmp_path / 'data', num_train=1, num_val=3, image_size=64)
    (tmp_path / 'child.py').write_text(f"""
_base_ = {convneur_mm.config('semantic_fpn_convneur_m1_shapes')!r}
custom_imports = dict(imports=['convneur_mm', 'convneur_mm.evaluation.boundary'])
test_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU'], output_dir={str(tmp_path / 'found')!r}),
    dict(type='BoundaryMetric', tolerance=2, band_width=3)]
model = dict(
    backbone=dict(arch=dict(_delete_=True, depths=[1, 1, 1, 1], channels=[8, 8, 8, 8], mem_channels=16)),
    neck=dict(in_channels=[8, 8, 8, 8], out_channels=8), decode_head=dict(in_channels=[8, 8, 8, 8], channels=8))
test_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root={str(tmp_path / 'data')!r}))
""")
    cfg = Config.fromfile(tmp_path / 'child.py')
    cfg.work_dir = str(tmp_path / 'work')
    torch.manual_seed(1)
    metrics = QuietRunner.from_cfg(cfg).test()

    names = sorted(path.name for path in (tmp_path / 'data/annotations/validation').iterdir())
    images = [tuple(np.array(Image.open(folder / name)).astype(int) for folder in (
        tmp_path / 'found', tmp_path / 'data/annotations/validation')) for name in names]
    assert len(images) == 3
    num_classes = len(SHAPE_CLASSES) + 1
    assert len({label for pred, _ in images for label in np.unique(pred)}) > 1, 'the model should find something'
    expected = scores(*images, num_classes=num_classes, tolerance=2, band_width=3)
    for name, values in expected.items():
        mean = np.nanmean(values) * (1 if name in DISTANCES else 100)
        assert metrics[f'boundary/m{name}'] == pytest.approx(mean, abs=0.005)
    assert 'mIoU' in metrics
    log, = (tmp_path / 'work').rglob('*.log')
    row, = (line for line in log.read_text().splitlines() if line.startswith('| ') and 'TrimapIoU' in line)
    assert [cell.strip() for cell in row.strip('|').split('|')] == ['Class', *expected]
    rows = [line for line in log.read_text().split('TrimapIoU')[1].splitlines() if line.strip().startswith('|')]
    disk, = (row for row in rows if ' disk ' in row)
    assert [float(cell) for cell in disk.strip('| ').split('|')[1:]] == pytest.approx([
        values[1] * (1 if name in DISTANCES else 100) for name, values in expected.items()], abs=0.005, nan_ok=True)
