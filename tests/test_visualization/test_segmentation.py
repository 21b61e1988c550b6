"""Names of the classes in pictures of segmentations."""
import numpy as np
import pytest
import torch
from mmengine.structures import PixelData

pytest.importorskip('mmseg')
from mmseg.structures import SegDataSample

from convneur_mm.visualization.segmentation import SegmentationVisualizer


def drawn(labels, **options):
    visualizer = SegmentationVisualizer(alpha=1.0)
    visualizer.dataset_meta = dict(classes=['sky', 'l'], palette=[[10, 20, 30], [200, 100, 50]])
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(labels)[None]))
    kept = []
    visualizer.add_image = lambda name, image, step: kept.append(image)
    visualizer.add_datasample('', np.zeros((*labels.shape, 3), np.uint8), sample, draw_gt=False, **options)
    return kept[0]


def test_a_name_begins_inside_its_class():
    """Of a ring, whose centre is another class, and of a thin part beside a wide one, where it is widest."""
    y, x = np.mgrid[:200, :300]
    radius = np.hypot(y - 100, x - 150)
    for inside in ((radius > 40) & (radius < 80), (y < 3) | (x > 250) & (y > 100)):
        labels = inside.astype(np.int64)
        changed = (drawn(labels) != drawn(labels, with_labels=False)).any(-1)
        # The corner of a name's frame, of the class that is drawn first.
        frame = np.argwhere(changed)
        assert len(frame) and changed.mean() < 0.1
        visualizer = SegmentationVisualizer()
        for number in (0, 1):
            column, row = visualizer._get_center_loc((labels == number).astype(np.uint8))
            assert labels[row, column] == number and changed[row, column]
    assert column > 250 and row > 100


@pytest.mark.parametrize('labels', [np.zeros((20, 30), np.int64), np.eye(30, dtype=np.int64)])
def test_whole_pictures_and_single_pixels(labels):
    assert drawn(labels).shape == (*labels.shape, 3)
