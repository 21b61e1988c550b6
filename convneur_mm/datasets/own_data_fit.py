"""Input size, anchors and number of epochs, fitted to the data."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Each side of an input is a multiple of the last stage's stride.
_STRIDE = 32
# Strides of the feature pyramid of the light Cascade R-CNN.
STRIDES = (4, 8, 16, 32)
# Total number of pictures seen in a training, unless _EPOCHS, the range of the number of epochs, limits it.
_PICTURES = dict(det=3200, cascade=2000, seg=1600, cls=10000)
_EPOCHS = dict(det=(12, 240), cascade=(12, 150), seg=(10, 200), cls=(10, 100))


def fit_image_size(task: str, sizes: Sequence[tuple[int, int]], boxes: np.ndarray, limit: int) -> tuple[int, int]:
    """Choose the width and height to which pictures are resized.

    For a detector they are large enough that only a quarter of the objects are smaller than 32 pixels, but at most
    twice the pictures' size. For a segmentor they are those of the pictures. For a classifier they are square.

    Args:
        task (str): 'det', 'seg' or 'cls'.
        sizes (Sequence[tuple[int, int]]): Widths and heights of pictures.
        boxes (np.ndarray): Float64, shape (N, 2), widths and heights of objects as fractions of the longer side of
            their picture; only used for a detector.
        limit (int): Upper limit of the longer side.
    """
    width, height = np.median(np.array(sizes), axis=0)
    longer, shorter = max(width, height), min(width, height)
    if task == 'cls':
        side = _rounded(min(limit, math.sqrt(width * height)))
        return side, side
    if task == 'det':
        wanted = 32 / max(np.quantile(np.sqrt(boxes.prod(1)), 0.25), 1e-6)
        # Smaller pictures have too few tokens for a memory, which must be written before it is read.
        side = min(limit, 2 * longer, max(wanted, min(longer, 160)))
        return _rounded(side), _rounded(side * shorter / longer)
    side = min(limit, longer)
    portraits = sum(height > width for width, height in sizes)
    if 0 < portraits < len(sizes):  # mmseg pads portrait and landscape pictures to the same size
        return _rounded(side), _rounded(side)
    fitted = _rounded(side), _rounded(side * shorter / longer)
    return fitted[::-1] if portraits else fitted


def _rounded(side: float) -> int:
    return max(1, round(side / _STRIDE)) * _STRIDE


def fit_anchors(boxes: np.ndarray) -> tuple[float, list[float], float]:
    """Choose scale and ratios of the anchors that overlap the objects best.

    Args:
        boxes (np.ndarray): Float64, shape (N, 2), widths and heights of objects in pixels of the input.

    Returns:
        tuple[float, list[float], float]: The scale, whose product with a level's stride is the side of a square
        anchor; ratios of height to width, ascending; and the objects' mean IoU with the best centred anchor.
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
    """Compute each object's best IoU with the anchors that have the same centre, shape (N,)."""
    sides = scale * np.array(STRIDES)[:, None]
    roots = np.sqrt(np.array(ratios))
    anchors = np.stack([sides / roots, sides * roots], axis=-1).reshape(-1, 2)
    common = np.minimum(boxes[:, None], anchors).prod(-1)
    return (common / (boxes.prod(-1)[:, None] + anchors.prod(-1) - common)).max(1)


def fit_epochs(task: str, count: int) -> int:
    """Return the number of epochs for a number of training pictures: with fewer pictures, each is seen more often.

    Args:
        task (str): 'det' for RTMDet, 'cascade' for Cascade R-CNN, 'seg' or 'cls'.
        count (int): Number of training pictures.
    """
    low, high = _EPOCHS[task]
    return min(high, max(low, round(_PICTURES[task] / count)))


def fit_class_weights(pixels: Sequence[int]) -> list[float]:
    """Choose the weights of classes in a segmentor's loss, so that rare classes are learned too.

    They fall with the square root of a class's share of the pixels, are at most five times those of the most frequent
    class, and have a mean of 1 over the pixels.

    Args:
        pixels (Sequence[int]): Number of training pixels of each class.
    """
    share = np.array(pixels) / max(pixels)
    weights = 1 / np.sqrt(np.maximum(share, 0.04))
    return [round(float(weight), 2) for weight in weights * share.sum() / (weights * share).sum()]
