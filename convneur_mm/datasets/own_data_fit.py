"""Input size, anchors and length of a training, chosen by the data."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Every side of an input is a multiple of the last stage's stride.
_STRIDE = 32
# Of the feature pyramid of the light detector.
STRIDES = (4, 8, 16, 32)
# How many pictures a training sees in all, where that is between the least and the most epochs.
_PICTURES = dict(det=2000, seg=1600, cls=10000)
_EPOCHS = dict(det=(12, 150), seg=(10, 200), cls=(10, 100))


def fit_image_size(task: str, sizes: Sequence[tuple[int, int]], boxes: np.ndarray, limit: int) -> tuple[int, int]:
    """Width and height that pictures are resized to.

    A detector's are so large that a quarter of the objects are smaller than 32 pixels, but at most twice the pictures;
    a segmentor's are those of the pictures; a classifier's are square.

    Args:
        task (str): 'det', 'seg' or 'cls'.
        sizes (Sequence[tuple[int, int]]): Widths and heights of pictures.
        boxes (np.ndarray): Float64, shape (N, 2), widths and heights of objects as fractions of the longer side of
            their picture; only a detector's are looked at.
        limit (int): Of the longer side.
    """
    width, height = np.median(np.array(sizes), axis=0)
    longer, shorter = max(width, height), min(width, height)
    if task == 'cls':
        side = _rounded(min(limit, math.sqrt(width * height)))
        return side, side
    if task == 'det':
        wanted = 32 / max(np.quantile(np.sqrt(boxes.prod(1)), 0.25), 1e-6)
        # A smaller picture has too few tokens for a memory, which has to be written before it is read.
        side = min(limit, 2 * longer, max(wanted, min(longer, 160)))
        return _rounded(side), _rounded(side * shorter / longer)
    side = min(limit, longer)
    portraits = sum(height > width for width, height in sizes)
    if 0 < portraits < len(sizes):  # mmseg pads to one size, whichever way a picture stands
        return _rounded(side), _rounded(side)
    fitted = _rounded(side), _rounded(side * shorter / longer)
    return fitted[::-1] if portraits else fitted


def _rounded(side: float) -> int:
    return max(1, round(side / _STRIDE)) * _STRIDE


def fit_anchors(boxes: np.ndarray) -> tuple[float, list[float], float]:
    """Scale and ratios of the anchors that overlap the objects best.

    Args:
        boxes (np.ndarray): Float64, shape (N, 2), widths and heights of objects in pixels of the input.

    Returns:
        tuple[float, list[float], float]: The scale, which times the stride of a level is the side of a square anchor;
        ratios of height to width, ascending; and the mean IoU of the objects with the best anchor at their centre.
    """
    ratios: list[float] = []
    for ratio in np.quantile(boxes[:, 1] / boxes[:, 0], (0.1, 0.5, 0.9)):
        ratio = round(float(np.clip(ratio, 0.1, 10)), 2)
        if not ratios or ratio > 1.2 * ratios[-1]:
            ratios.append(ratio)
    scales = np.arange(2, 10.1, 0.25)
    ious = [_best_iou(boxes, scale, ratios).mean() for scale in scales]
    best = int(np.argmax(ious))
    return float(scales[best]), ratios, float(ious[best])


def _best_iou(boxes: np.ndarray, scale: float, ratios: Sequence[float]) -> np.ndarray:
    """IoU of each object with the best of the anchors that have the same centre, shape (N,)."""
    sides = scale * np.array(STRIDES)[:, None]
    roots = np.sqrt(np.array(ratios))
    anchors = np.stack([sides / roots, sides * roots], axis=-1).reshape(-1, 2)
    common = np.minimum(boxes[:, None], anchors).prod(-1)
    return (common / (boxes.prod(-1)[:, None] + anchors.prod(-1) - common)).max(1)


def fit_epochs(task: str, count: int) -> int:
    """Number of epochs for a number of training pictures: the fewer they are, the more often each is seen."""
    low, high = _EPOCHS[task]
    return min(high, max(low, round(_PICTURES[task] / count)))
