"""Input size, anchors and length follow the data."""
import numpy as np
import pytest

from convneur_mm.datasets.own_data_fit import fit_anchors, fit_class_weights, fit_epochs, fit_image_size

NONE = np.zeros((0, 2))


@pytest.mark.parametrize('size, side, expected', [
    ((800, 600), 0.1, (320, 256)),  # 32 of 320 pixels
    ((600, 800), 0.1, (320, 256)),  # mmdet fits either way
    ((800, 600), 0.5, (160, 128)),
    ((800, 600), 0.01, (640, 480)),  # the limit
    ((100, 100), 0.01, (192, 192)),  # at most twice the pictures
    ((64, 64), 0.9, (64, 64)),
])
def test_objects_of_a_detector_are_large_enough(size, side, expected):
    assert fit_image_size('det', [size] * 3, np.full((4, 2), side), 640) == expected


@pytest.mark.parametrize('sizes, expected', [
    ([(800, 600)], (320, 256)), ([(600, 800)], (256, 320)), ([(800, 600), (600, 800)], (320, 320)),
    ([(100, 64)], (96, 64)), ([(20, 20)], (32, 32))])
def test_pictures_of_a_segmentor_fit_in_whichever_way_they_stand(sizes, expected):
    assert fit_image_size('seg', sizes, NONE, 320) == expected


@pytest.mark.parametrize('sizes, expected', [([(64, 64)], 64), ([(800, 600)], 128), ([(20, 30)], 32)])
def test_pictures_of_a_classifier_are_square(sizes, expected):
    assert fit_image_size('cls', sizes, NONE, 128) == (expected, expected)


def test_anchors_have_the_shapes_of_the_objects():
    wide = np.stack([np.linspace(40, 80, 20), np.linspace(10, 20, 20)], axis=1)
    scale, ratios, iou = fit_anchors(wide)
    assert ratios == [0.25] and iou > 0.7
    _, ratios, _ = fit_anchors(np.concatenate([wide, wide[:, ::-1], [[30, 30]] * 20]))
    assert ratios == [0.25, 1.0, 4.0]


def test_anchors_have_the_sizes_of_the_objects():
    """Sides of 4 to 32 times 6, of which the scale 5 of the shapes is far from all."""
    scale, ratios, iou = fit_anchors(np.repeat([[24.0], [48.0], [96.0], [192.0]], 2, axis=1))
    assert (scale, ratios) == (6.0, [1.0]) and iou == pytest.approx(1)


def test_fewer_pictures_are_seen_more_often():
    for task in ('det', 'cascade', 'seg', 'cls'):
        epochs = [fit_epochs(task, count) for count in (1, 10, 100, 1000, 10 ** 6)]
        assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1] >= 10
    assert fit_epochs('cascade', 100) == 20


def test_rare_classes_weigh_more():
    pixels = (9000, 900, 90, 10, 0)
    weights = fit_class_weights(pixels)
    assert weights[1] / weights[0] == pytest.approx(10 ** 0.5, rel=0.02)
    assert [weight / weights[0] for weight in weights[2:]] == pytest.approx([5] * 3, rel=0.02)
    assert np.dot(weights, pixels) / sum(pixels) == pytest.approx(1, rel=0.02)
