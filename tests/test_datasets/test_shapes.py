"""The scenes of shapes: what is on them, that it can be told, and that they can be made again."""
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convneur_mm.datasets import SHAPE_CLASSES
from convneur_mm.datasets.shapes import Scene, make_scene, make_single_scene, scene_at, single_scene_at

SIZES = {'train': 40, 'val': 20}
SEED = 3


@pytest.fixture(scope='module')
def scenes() -> dict[str, list[Scene]]:
    return {split: [scene_at(SEED, split, index, 160) for index in range(count)] for split, count in SIZES.items()}


@pytest.fixture(scope='module')
def single_scenes() -> list[Scene]:
    return [single_scene_at(SEED, 'train', index, 160) for index in range(60)]


def lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def test_classes_are_not_told_by_colour(scenes, single_scenes):
    """A class's objects spread over the colours about as widely as all objects do."""
    assert_colours_tell_nothing(scenes['train'] + scenes['val'])
    assert_colours_tell_nothing(single_scenes)


def assert_colours_tell_nothing(scenes: list[Scene]) -> None:
    colours: dict[int, list[np.ndarray]] = {label: [] for label in range(len(SHAPE_CLASSES))}
    for scene in scenes:
        for instance in scene.instances:
            colours[instance.label].append(lab(scene.image)[instance.mask].mean(0))
    whole = np.concatenate([np.array(each) for each in colours.values()]).std(0)
    for label, each in colours.items():
        assert (np.array(each).std(0) > 0.4 * whole).all(), SHAPE_CLASSES[label]


def test_sizes_and_occlusion(scenes):
    instances = [instance for scene in scenes['train'] for instance in scene.instances]
    areas = np.array([instance.mask.sum() for instance in instances])
    visible = np.array([instance.visible_fraction for instance in instances])
    assert {len(scene.instances) for scene in scenes['train']} == {1, 2, 3, 4, 5}
    assert np.mean(areas < 32**2) > 0.25 and np.mean(areas >= 32**2) > 0.25
    # An object inside the image and in front of all others is visible as a whole, but for a few lost pixels.
    assert np.mean(visible > 0.98) > 0.4 and np.mean(visible < 0.9) > 0.05


def test_large_scenes_have_more_and_larger_objects():
    scenes = [scene_at(SEED, 'train', index, 160, large=True) for index in range(20)]
    counts = [len(scene.instances) for scene in scenes]
    assert min(counts) >= 2 and max(counts) >= 5 and np.mean(counts) > 3.5
    # Half of the smallest object, a ring of 40 pixels.
    assert min(instance.mask.sum() for scene in scenes for instance in scene.instances) > 300
    for scene in scenes:
        visible = [instance.visible_fraction for instance in scene.instances]
        assert min(visible) >= 0.45 and (sum(instance.mask for instance in scene.instances) <= 1).all()


def covered_by_later(scene: Scene) -> list[bool]:
    """Whether the hull of an object's mask reaches under a later object."""
    hulls = []
    for instance in scene.instances:
        points = np.argwhere(instance.mask)[:, ::-1].astype(np.int32)
        hull = cv2.fillConvexPoly(np.zeros(instance.mask.shape, np.uint8), cv2.convexHull(points), 1).astype(bool)
        hulls.append(hull)
    return [any((hull & later.mask).sum() > 20 for later in scene.instances[i + 1:]) for i, hull in enumerate(hulls)]


def test_some_objects_cover_others(scenes):
    assert sum(sum(covered_by_later(scene)) for scene in scenes['train']) >= 5


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)).astype(bool)


def test_backgrounds_have_texture(scenes, single_scenes):
    spreads = []
    for scene in scenes['train'] + single_scenes:
        # Away from objects and their shadows, and blurred, so that fine noise alone does not count.
        background = ~grown(np.any([instance.mask for instance in scene.instances], axis=0), 7)
        spreads.append(lab(cv2.GaussianBlur(scene.image, (0, 0), 1.5))[background].std(0).max())
    assert min(spreads) > 2 and np.median(spreads) > 4


def test_objects_stand_out(scenes, single_scenes):
    """Nearly all of what surrounds an object differs clearly in colour from it."""
    # The mean colour of a large object with two colours may lie closer to its surroundings than either does.
    for scene, least in [(scene, 25) for scene in scenes['train']] + [(scene, 20) for scene in single_scenes]:
        colours = lab(scene.image)
        for instance in scene.instances:
            around = colours[grown(instance.mask, 4) & ~grown(instance.mask, 1)]
            assert np.quantile(np.linalg.norm(around - colours[instance.mask].mean(0), axis=1), 0.1) > least


@pytest.mark.parametrize('scene_at', [scene_at, single_scene_at])
def test_a_scene_shows_its_shapes(scene_at):
    """The area of a whole object over that of its smallest enclosing circle is that of its shape."""
    expected = {'disk': 1.0, 'square': 2 / np.pi, 'triangle': 3 * np.sqrt(3) / (4 * np.pi),
                'star': 5 * 0.6 * 0.25 * np.sin(np.pi / 5) / (np.pi * 0.36), 'ring': 1 - (0.27 / 0.52)**2,
                'cross': (4 * 0.54 * 0.34 - 0.34**2) / (np.pi * (0.54**2 + 0.17**2))}
    seen = set()
    for index in range(40):
        for instance in scene_at(SEED, 'train', index, 320).instances:
            border = instance.mask[[0, -1]].any() or instance.mask[:, [0, -1]].any()
            if border or instance.visible_fraction < 0.999 or instance.mask.sum() < 1500:
                continue
            name = SHAPE_CLASSES[instance.label]
            _, radius = cv2.minEnclosingCircle(np.argwhere(instance.mask).astype(np.int32))
            assert instance.mask.sum() / (np.pi * (radius + 0.5)**2) == pytest.approx(expected[name], rel=0.12), name
            seen.add(name)
    assert seen == set(SHAPE_CLASSES)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(64, 256))
def test_any_scene_is_sound(seed, size):
    scene = make_scene(np.random.default_rng(seed), size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert 1 <= len(scene.instances) <= 5
    for instance in scene.instances:
        assert 0 <= instance.label < len(SHAPE_CLASSES)
        assert instance.mask.shape == (size, size) and instance.mask.dtype == bool
        assert instance.mask.sum() >= 60 * (size / 160)**2
        assert 0.4 <= instance.visible_fraction <= 1
        rows, columns = np.nonzero(instance.mask)
        # A square's and a triangle's corners reach farther than their size.
        assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 0.55 * 1.22 * size + 2
    assert np.sum([instance.mask for instance in scene.instances], axis=0).max() == 1, 'masks overlap'
    np.testing.assert_array_equal(scene.image, make_scene(np.random.default_rng(seed), size).image)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(64, 256), label=st.integers(0, len(SHAPE_CLASSES) - 1))
def test_any_single_scene_has_one_clear_object(seed, size, label):
    scene = make_single_scene(np.random.default_rng(seed), size, label)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    instance, = scene.instances
    assert instance.label == label
    assert instance.mask.shape == (size, size) and instance.mask.dtype == bool
    # Of all shapes a cross, a star and a triangle cover the least of their square: about a third.
    assert 0.5**2 / 3.2 < instance.mask.mean() < 0.8**2
    assert instance.visible_fraction > 0.97
    np.testing.assert_array_equal(scene.image, make_single_scene(np.random.default_rng(seed), size, label).image)


def test_single_scenes_vary(single_scenes):
    assert [scene.instances[0].label for scene in single_scenes] == list(range(len(SHAPE_CLASSES))) * 10
    masks = [scene.instances[0].mask for scene in single_scenes]
    centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
    areas = np.array([mask.mean() for mask in masks])
    assert (centres.std(0) > 15).all() and areas.max() > 3 * areas.min()
    # The long axis of a square's hull points anywhere, since shapes are turned.
    angles = [cv2.minAreaRect(np.argwhere(mask).astype(np.int32))[2] for mask in masks[1::len(SHAPE_CLASSES)]]
    assert np.ptp(angles) > 45
    other = single_scene_at(SEED, 'val', 0, 160).image, single_scene_at(SEED + 1, 'train', 0, 160).image
    assert all((image != single_scenes[0].image).mean() > 0.5 for image in other)


def test_single_scenes_do_not_share_backgrounds_with_the_others(scenes, single_scenes):
    for scene, single in zip(scenes['train'][:10], single_scenes, strict=False):
        background = ~grown(np.any([each.mask for each in scene.instances + single.instances], axis=0), 7)
        assert np.abs(scene.image[background].astype(int) - single.image[background]).mean() > 5


def test_wrong_places_of_a_scene_are_named():
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        scene_at(0, 'test', 0, 64)
    with pytest.raises(ValueError, match='index must be .* got -1'):
        scene_at(0, 'val', -1, 64)
    with pytest.raises(ValueError, match='size must be .* got 10'):
        make_scene(np.random.default_rng(0), 10)
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        single_scene_at(0, 'test', 0, 64)
    with pytest.raises(ValueError, match='label must be an integer from 0 to 5, got 6'):
        make_single_scene(np.random.default_rng(0), 64, 6)
