"""Pictures of segmentations. They need mmseg, so configs import this module by name."""
from __future__ import annotations

import numpy as np

from ..stack import require

require('mmseg')

import cv2  # noqa: E402
from mmseg.registry import VISUALIZERS  # noqa: E402
from mmseg.visualization import SegLocalVisualizer  # noqa: E402


@VISUALIZERS.register_module()
class SegmentationVisualizer(SegLocalVisualizer):
    """mmseg's visualizer, which writes the name of each class at the class's innermost pixel.

    mmseg's own sorts all pixels of a class in Python to find a place for its name, which takes most of the time of a
    picture. Arguments are those of ``SegLocalVisualizer``.
    """

    def _get_center_loc(self, mask: np.ndarray) -> np.ndarray:
        """Return (x, y) of the pixel of a mask (H, W) that is farthest from the mask's edge and the picture's."""
        distance = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)
        return np.array(cv2.minMaxLoc(distance)[3]) - 1
