"""A picture as models of the three tasks see it."""
import cv2
import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from convneur_mm.apis import inference
from convneur_mm.visualization.view import look

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')


def picture_of(height, width):
    """Smooth, so that resizing keeps it about what it was; no channel like another."""
    y, x = np.mgrid[:height, :width]
    return np.stack((x * 255 / width, y * 255 / height, np.full_like(x, 40)), -1).astype(np.uint8)


@pytest.mark.parametrize('task, options', [
    ('detector', {}),
    ('segmentor', {}),
    ('classifier', {}),
])
def test_picture_parts_and_prediction_are_of_one_run(task, options):
    model, image = tiny_model(task, options=options), picture_of(90, 150)
    view = look(model, image)
    expected, = inference(model, [image])
    for name, value in expected.all_items():
        found = getattr(view.prediction.sample, name)
        for ours, theirs in zip(tensors(found), tensors(value), strict=True):
            assert torch.equal(ours, theirs)
    height, width = expected.img_shape[:2]
    assert view.picture.shape == (height, width, 3) and view.picture.dtype == np.uint8
    if task != 'classifier':  # whose pipeline crops the middle
        difference = view.picture.astype(float) - cv2.resize(image, (width, height))[..., ::-1]
        assert abs(difference).mean() < 2
    assert [part.stage for part in view.parts] == [1, 2, 3, 4]
    first = view.parts[0].before
    assert len(first) == 1 and first.size(2) * 4 >= height and first.size(3) * 4 >= width
    arrays = view.arrays()
    assert (arrays['picture'] == view.picture).all()
    assert (arrays['stage3.block1.influence'] == view.parts[2].influence[0].numpy()).all()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for _, item in value.all_items() for x in tensors(item)] if hasattr(value, 'all_items') else []


def test_windows_are_refused():
    options = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))}
    with pytest.raises(ValueError, match="mode='slide'"):
        look(tiny_model('segmentor', options=options), picture_of(96, 96))
