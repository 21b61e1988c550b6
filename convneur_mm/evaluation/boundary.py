"""Agreement of a segmentation's boundaries with the truth: boundary F1, boundary IoU, trimap IoU, Hausdorff distance.

A class's boundary consists of its pixels that have one of their four neighbours outside the class. Pixels beyond the
image's edge are outside every class, and so are ignored pixels, in the prediction too. The module needs mmseg, so
configs import it by name.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger, print_log

from ..stack import require

require('mmseg')

from mmseg.registry import METRICS  # noqa: E402
from prettytable import PrettyTable  # noqa: E402
from scipy.ndimage import find_objects  # noqa: E402
from scipy.spatial import KDTree  # noqa: E402

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


class BoundaryCounts(NamedTuple):
    """Counts of one image, or of several along an additional first axis; all are float64 of (num_classes,).

    Attributes:
        matched_pred (np.ndarray): Boundary pixels of the prediction within the tolerance of the truth's boundary.
        pred (np.ndarray): Boundary pixels of the prediction.
        matched_truth (np.ndarray): Boundary pixels of the truth within the tolerance of the prediction's boundary.
        truth (np.ndarray): Boundary pixels of the truth.
        band_intersection (np.ndarray): Pixels in the class's inner band in both prediction and truth.
        band_union (np.ndarray): Pixels in the class's inner band in prediction or truth.
        trimap_intersection (np.ndarray): Pixels of the trimap with the class in both prediction and truth.
        trimap_union (np.ndarray): Pixels of the trimap with the class in prediction or truth.
        hausdorff (np.ndarray): Hausdorff distance of the boundaries in pixels; the image's diagonal if the class is
            in only one of prediction and truth, NaN if it is in neither.
        hd95 (np.ndarray): As ``hausdorff``, with the 95th percentile instead of the maximum.
    """

    matched_pred: np.ndarray
    pred: np.ndarray
    matched_truth: np.ndarray
    truth: np.ndarray
    band_intersection: np.ndarray
    band_union: np.ndarray
    trimap_intersection: np.ndarray
    trimap_union: np.ndarray
    hausdorff: np.ndarray
    hd95: np.ndarray


def boundary_counts(pred: np.ndarray, truth: np.ndarray, num_classes: int, ignore_index: int = 255,
                    tolerance: int | float = 0.0075, band_width: int | float = 0.02) -> BoundaryCounts:
    """Compare the boundaries of two label maps, class by class.

    Args:
        pred (np.ndarray): Predicted labels, integers of (H, W).
        truth (np.ndarray): True labels, integers of (H, W).
        num_classes (int): Number of classes; their labels start at 0.
        ignore_index (int): Label of pixels of ``truth`` that are ignored. Defaults to 255.
        tolerance (int | float): See :class:`BoundaryMetric`.
        band_width (int | float): See :class:`BoundaryMetric`.

    Returns:
        BoundaryCounts: Arrays of (num_classes,).

    Raises:
        ValueError: If the two differ in shape, or have a label that is not a class.
    """
    if pred.ndim != 2 or pred.shape != truth.shape:
        raise ValueError(f'prediction and truth must be two maps of one size, got {pred.shape} and {truth.shape}')
    valid = truth != ignore_index
    # From here on, 0 stands for ignored pixels, and i + 1 for class i.
    pred = _shifted_labels(pred, valid, num_classes, 'the prediction')
    truth = _shifted_labels(truth, valid, num_classes, 'the truth')
    diagonal = float(np.hypot(*pred.shape))
    tolerance = tolerance * diagonal if isinstance(tolerance, float) else tolerance
    width = max(1, round(band_width * diagonal)) if isinstance(band_width, float) else band_width
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)

    counts = BoundaryCounts(*np.zeros((len(BoundaryCounts._fields), num_classes)))
    counts.hausdorff[:] = counts.hd95[:] = np.nan
    for i, boxes in enumerate(zip(find_objects(pred, num_classes), find_objects(truth, num_classes))):
        if boxes == (None, None):
            continue
        # The class has no pixels outside the joint box, so the results within it are those of the whole image.
        box = _joint_box([box for box in boxes if box])
        masks = [(labels[box] == i + 1).view(np.uint8) for labels in (pred, truth)]
        bands = [_rim(mask, square) for mask in masks]
        counts.band_intersection[i] = (bands[0] & bands[1]).sum()
        counts.band_union[i] = (bands[0] | bands[1]).sum()
        boundaries = [_rim(mask, CROSS) for mask in masks]
        counts.pred[i], counts.truth[i] = (boundary.sum() for boundary in boundaries)
        if None in boxes:
            counts.hausdorff[i] = counts.hd95[i] = diagonal
            continue
        to_truth, to_pred = _distances(*(np.argwhere(boundary) for boundary in boundaries))
        counts.matched_pred[i] = (to_truth <= tolerance).sum()
        counts.matched_truth[i] = (to_pred <= tolerance).sum()
        counts.hausdorff[i] = max(to_truth.max(), to_pred.max())
        counts.hd95[i] = max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))

    # A window with more than one label has a change of label within ``width``.
    trimap = cv2.dilate(truth, square) != cv2.erode(truth, square)
    pred, truth = pred[trimap], truth[trimap]
    both, *each = (np.bincount(labels, minlength=num_classes + 1)[1:] for labels in (truth[pred == truth], pred, truth))
    counts.trimap_intersection[:] = both
    counts.trimap_union[:] = sum(each) - both
    return counts


def boundary_scores(images: Sequence[BoundaryCounts], num_classes: int) -> dict[str, np.ndarray]:
    """Compute the metrics of each class over a data set.

    F1 and the IoUs are computed from pixels counted over all images; distances are averaged over the images that have
    the class in prediction or truth.

    Args:
        images (Sequence[BoundaryCounts]): Counts of each image.
        num_classes (int): Number of classes.

    Returns:
        dict[str, np.ndarray]: 'F1', 'IoU' and 'TrimapIoU' from 0 to 1, 'Hausdorff' and 'HD95' in pixels; float64 of
        (num_classes,), NaN for a class without any such pixel in prediction and truth.
    """
    fields = BoundaryCounts._fields
    images = BoundaryCounts(*np.reshape(images, (-1, len(fields), num_classes)).swapaxes(0, 1))
    total = BoundaryCounts(*(np.nansum(counts, axis=0) for counts in images))
    precision, recall = _ratio(total.matched_pred, total.pred), _ratio(total.matched_truth, total.truth)
    # A class that is in only one of prediction and truth has no precision or no recall, and an F1 of 0.
    f1 = np.nan_to_num(_ratio(2 * precision * recall, precision + recall))
    return dict(
        F1=np.where(total.pred + total.truth > 0, f1, np.nan),
        IoU=_ratio(total.band_intersection, total.band_union),
        TrimapIoU=_ratio(total.trimap_intersection, total.trimap_union),
        Hausdorff=_ratio(total.hausdorff, np.isfinite(images.hausdorff).sum(axis=0)),
        HD95=_ratio(total.hd95, np.isfinite(images.hd95).sum(axis=0)))


@METRICS.register_module()
class BoundaryMetric(BaseMetric):
    """Boundary F1, boundary IoU, trimap IoU, Hausdorff distance and its 95th percentile of each class, and their means.

    The means are over the classes that are in prediction or truth anywhere in the data set. They are returned as
    ``boundary/mF1``, ``boundary/mIoU`` and ``boundary/mTrimapIoU`` in percent, and ``boundary/mHausdorff`` and
    ``boundary/mHD95`` in pixels of the label map; a table of all classes is logged.

    Lengths are an integer in pixels, or a float below 1, a fraction of each image's diagonal.

    Args:
        tolerance (int | float): Largest distance of a matched boundary pixel from the other boundary, for F1; not
            rounded. Defaults to 0.0075.
        band_width (int | float): Distance that the boundary IoU's band extends into the class, and the trimap to both
            sides of a change of label, as the larger of the distances in x and y; a fraction is rounded to pixels, at
            least 1. Defaults to 0.02.
        ignore_index (int): Label of pixels that are ignored. Defaults to 255.
        **kwargs: ``collect_device``, ``prefix`` and ``collect_dir`` of MMEngine's ``BaseMetric``.

    Raises:
        ValueError: If a length is neither of the two.
    """

    default_prefix = 'boundary'

    def __init__(self, tolerance: int | float = 0.0075, band_width: int | float = 0.02, ignore_index: int = 255,
                 **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.tolerance = _length('tolerance', tolerance, least=0)
        self.band_width = _length('band_width', band_width, least=1)
        self.ignore_index = ignore_index

    def process(self, data_batch: dict | None, data_samples: Sequence[dict]) -> None:
        """Compare a batch's ``pred_sem_seg`` with its ``gt_sem_seg``, whose data are labels of (1, H, W).

        Raises:
            ValueError: If an image has no truth, or if :func:`boundary_counts` raises; names the image.
        """
        for sample in data_samples:
            if 'gt_sem_seg' not in sample:
                raise ValueError(f'{sample.get("img_path")}: no label map to compare with; expected LoadAnnotations in '
                                 'the test pipeline')
            pred, truth = (sample[name]['data'].squeeze(0).cpu().numpy() for name in ('pred_sem_seg', 'gt_sem_seg'))
            try:
                counts = boundary_counts(
                    pred, truth, len(self.dataset_meta['classes']), self.ignore_index, self.tolerance, self.band_width)
            except ValueError as error:
                raise ValueError(f'{sample.get("img_path")}: {error}') from error
            self.results.append(counts)

    def compute_metrics(self, results: list[BoundaryCounts]) -> dict[str, float]:
        """Return the means over the classes, rounded to two digits, and log the table of all classes."""
        classes = self.dataset_meta['classes']
        table = PrettyTable()
        table.add_column('Class', list(classes))
        means = {}
        for name, values in boundary_scores(results, len(classes)).items():
            if name not in ('Hausdorff', 'HD95'):
                values = 100 * values
            table.add_column(name, list(np.round(values, 2)))
            known = values[~np.isnan(values)]
            means[f'm{name}'] = round(float(known.mean()), 2) if len(known) else float('nan')
        logger = MMLogger.get_current_instance()
        print_log('per class results of boundaries (%, distances in pixels):', logger)
        print_log('\n' + table.get_string(), logger=logger)
        return means


def _shifted_labels(labels: np.ndarray, valid: np.ndarray, num_classes: int, what: str) -> np.ndarray:
    """Return labels plus 1, and 0 where they are not valid, as uint16, which OpenCV accepts."""
    found = labels[valid]
    wrong = found[(found < 0) | (found >= num_classes)]
    if len(wrong):
        raise ValueError(f'{what} has the label {wrong[0]}, expected 0 to {num_classes - 1}, or the ignore_index in '
                         'the truth')
    return np.where(valid, labels.astype(np.int64) + 1, 0).astype(np.uint16)


def _joint_box(boxes: Sequence[tuple[slice, slice]]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes))


def _rim(mask: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask, uint8 of 0 and 1, whose kernel reaches outside the mask or image: bool."""
    return mask > cv2.erode(mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)


def _distances(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each point's distance to the other set, (N,) and (M,), float64, for sets of points (N, 2) and (M, 2).

    Boundaries are few pixels of an image, so trees of them take a third to a tenth of two distance transforms' time.
    """
    # Building unbalanced trees saves more time than it costs in the search.
    trees = [KDTree(each, balanced_tree=False, compact_nodes=False) for each in (points, others)]
    return trees[1].query(points)[0], trees[0].query(others)[0]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, with NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _length(name: str, value: int | float, least: int) -> int | float:
    is_share = isinstance(value, float) and 0 < value < 1
    if not is_share and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f'{name} must be an integer of at least {least}, in pixels, or a share of the image\'s '
                         f'diagonal between 0.0 and 1.0, got {value!r}')
    return value
