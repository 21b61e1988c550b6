"""The shapes data set: what is written, that it is true to the scenes, and that it can be made again."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_coco
from convneur_mm.datasets.shapes import Scene, make_scene, mask_to_segmentation, scene_at

TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'
SIZES = {'train': 40, 'val': 20}
SEED = 3


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    return make_shapes_coco(tmp_path_factory.mktemp('shapes') / 'made', SIZES['train'], SIZES['val'], 160, SEED)


@pytest.fixture(scope='module')
def scenes() -> dict[str, list[Scene]]:
    return {split: [scene_at(SEED, split, index, 160) for index in range(count)] for split, count in SIZES.items()}


def load(root: Path, split: str) -> COCO:
    return COCO(str(root / 'annotations' / f'instances_{split}.json'))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob('*')}


def decode(segmentation, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *shape))
    return coco_mask.decode(segmentation).astype(bool)


def lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    first = contents(make_shapes_coco(tmp_path / 'a', 4, 3, 96, 7))
    second = contents(make_shapes_coco(tmp_path / 'b', 4, 3, 96, 7))
    assert first == second
    assert set(first) == {'shapes.json', 'annotations/instances_train.json', 'annotations/instances_val.json',
                          *(f'train/{i:06d}.jpg' for i in (1, 2, 3, 4)), *(f'val/{i:06d}.jpg' for i in (1, 2, 3))}


def test_another_seed_gives_other_images(tmp_path):
    first = contents(make_shapes_coco(tmp_path / 'a', 2, 2, 96, 7))
    second = contents(make_shapes_coco(tmp_path / 'b', 2, 2, 96, 8))
    assert all(first[name] != second[name] for name in first if name.endswith('.jpg'))


def test_images_do_not_depend_on_how_many_there_are(root, tmp_path):
    few = make_shapes_coco(tmp_path / 'few', 5, 2, 160, SEED)
    for split, count in (('train', 5), ('val', 2)):
        assert len(list((few / split).iterdir())) == count
        for path in (few / split).iterdir():
            assert path.read_bytes() == (root / split / path.name).read_bytes()
        many = json.loads((root / 'annotations' / f'instances_{split}.json').read_text())
        less = json.loads((few / 'annotations' / f'instances_{split}.json').read_text())
        assert less['images'] == many['images'][:count]
        assert less['annotations'] == [entry for entry in many['annotations'] if entry['image_id'] <= count]


def test_no_image_occurs_twice(root):
    images = [path.read_bytes() for split in SIZES for path in (root / split).iterdir()]
    assert len(images) == sum(SIZES.values()) == len(set(images))


@pytest.mark.parametrize('split', SIZES)
def test_the_annotation_file_is_coco(root, split):
    content = json.loads((root / 'annotations' / f'instances_{split}.json').read_text())
    assert set(content) == {'info', 'licenses', 'images', 'annotations', 'categories'}
    assert [(entry['id'], entry['name']) for entry in content['categories']] == [
        (i + 1, name) for i, name in enumerate(SHAPE_CLASSES)]
    assert [entry['id'] for entry in content['images']] == list(range(1, SIZES[split] + 1))
    assert [entry['id'] for entry in content['annotations']] == list(range(1, len(content['annotations']) + 1))
    for entry in content['annotations']:
        assert set(entry) == {'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'}
        assert entry['iscrowd'] == 0
        if isinstance(entry['segmentation'], list):
            # What mmdet takes for a valid polygon.
            assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in entry['segmentation'])
            assert all(0 <= number <= 160 for polygon in entry['segmentation'] for number in polygon)
        else:
            assert entry['segmentation']['size'] == [160, 160]
            assert isinstance(entry['segmentation']['counts'], str)
    kinds = {type(entry['segmentation']) for entry in content['annotations']}
    assert kinds == {list, dict}, 'both ways to write a mask should be covered'


@pytest.mark.parametrize('split', SIZES)
def test_pycocotools_reads_back_the_masks_of_the_scenes(root, scenes, split):
    coco = load(root, split)
    for image_id, scene in enumerate(scenes[split], start=1):
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert [entry['category_id'] - 1 for entry in annotations] == [each.label for each in scene.instances]
        for entry, instance in zip(annotations, scene.instances, strict=True):
            mask = coco.annToMask(entry).astype(bool)
            np.testing.assert_array_equal(mask, instance.mask)
            assert entry['area'] == mask.sum()
            x, y, width, height = entry['bbox']
            assert mask[y:y + height, x:x + width].sum() == mask.sum(), 'the box cuts the mask'
            edges = mask[y, :], mask[y + height - 1, :], mask[:, x], mask[:, x + width - 1]
            assert all(edge.any() for edge in edges), 'the box is not tight'


@pytest.mark.parametrize('split', SIZES)
def test_images_are_those_of_the_scenes(root, scenes, split):
    for entry, scene in zip(load(root, split).dataset['images'], scenes[split], strict=True):
        image = cv2.imread(str(root / split / entry['file_name']))
        assert image.shape == (entry['height'], entry['width'], 3) == scene.image.shape
        # JPEG loses some colour at sharp edges; channels in the wrong order would be off by far more.
        assert np.abs(image[..., ::-1].astype(int) - scene.image).mean() < 6


@pytest.mark.parametrize('split', SIZES)
def test_every_class_occurs(root, split):
    coco = load(root, split)
    assert all(coco.getAnnIds(catIds=[category]) for category in coco.getCatIds())


def test_classes_are_not_told_by_colour(scenes):
    """A class's objects spread over the colours about as widely as all objects do."""
    colours: dict[int, list[np.ndarray]] = {label: [] for label in range(len(SHAPE_CLASSES))}
    for scene in scenes['train'] + scenes['val']:
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


def test_backgrounds_have_texture(scenes):
    spreads = []
    for scene in scenes['train']:
        # Away from objects and their shadows, and blurred, so that fine noise alone does not count.
        background = ~grown(np.any([instance.mask for instance in scene.instances], axis=0), 7)
        spreads.append(lab(cv2.GaussianBlur(scene.image, (0, 0), 1.5))[background].std(0).max())
    assert min(spreads) > 2 and np.median(spreads) > 4


def test_objects_stand_out(scenes):
    """Nearly all of what surrounds an object differs clearly in colour from it."""
    for scene in scenes['train']:
        colours = lab(scene.image)
        for instance in scene.instances:
            around = colours[grown(instance.mask, 4) & ~grown(instance.mask, 1)]
            assert np.quantile(np.linalg.norm(around - colours[instance.mask].mean(0), axis=1), 0.1) > 25


def test_a_scene_shows_its_shapes():
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


@settings(max_examples=150, deadline=None)
@given(mask=hnp.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_any_mask_survives_the_segmentation(mask):
    if not mask.any():
        with pytest.raises(ValueError, match='0 set'):
            mask_to_segmentation(mask)
        return
    segmentation = json.loads(json.dumps(mask_to_segmentation(mask)))
    np.testing.assert_array_equal(decode(segmentation, mask.shape), mask)


def test_solid_masks_become_polygons_and_masks_with_holes_do_not():
    mask = np.zeros((20, 30), bool)
    mask[2:9, 3:12] = True
    mask[12:18, 20:30] = True
    polygons = mask_to_segmentation(mask)
    assert isinstance(polygons, list) and len(polygons) == 2
    assert all(len(polygon) == 8 for polygon in polygons), 'a rectangle has four corners'
    mask[5, 5] = False
    assert mask_to_segmentation(mask)['size'] == [20, 30]


def test_a_second_run_changes_nothing(root):
    before = stamps(root)
    assert make_shapes_coco(root, SIZES['train'], SIZES['val'], 160, SEED) == root
    assert stamps(root) == before


@pytest.mark.parametrize('damage', ['val/000002.jpg', 'annotations/instances_train.json', 'shapes.json'])
def test_an_incomplete_set_is_completed(tmp_path, damage):
    root = make_shapes_coco(tmp_path / 'set', 3, 2, 64)
    whole = contents(root)
    if damage == 'shapes.json':
        os.replace(root / damage, root / 'shapes.unfinished.json')  # The state that a run which was killed leaves.
    else:
        (root / damage).unlink()
    make_shapes_coco(root, 3, 2, 64)
    assert contents(root) == whole


def test_other_arguments_replace_the_set_and_nothing_else(tmp_path):
    root = make_shapes_coco(tmp_path / 'set', 5, 3, 64)
    (root / 'train' / 'notes.txt').write_text('mine')
    make_shapes_coco(root, 2, 2, 64, seed=1)
    expected = contents(make_shapes_coco(tmp_path / 'fresh', 2, 2, 64, seed=1))
    assert contents(root) == {**expected, 'train/notes.txt': b'mine'}


def test_a_run_that_fails_leaves_no_complete_set(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('disk full')

    root = make_shapes_coco(tmp_path / 'set', 2, 2, 64)
    with monkeypatch.context() as patched:
        patched.setattr('convneur_mm.datasets.shapes._write_jpeg', fail)
        with pytest.raises(OSError, match='disk full'):
            make_shapes_coco(root, 3, 2, 64)
    assert not (root / 'shapes.json').exists()
    assert contents(make_shapes_coco(root, 3, 2, 64)) == contents(make_shapes_coco(tmp_path / 'fresh', 3, 2, 64))


@pytest.mark.parametrize('name', ['holiday.jpg', 'shapes.json', 'train/000001.jpg'])
def test_a_folder_of_someone_else_is_not_touched(tmp_path, name):
    path = tmp_path / 'photos' / name
    path.parent.mkdir(parents=True)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match='other content.*photos'):
        make_shapes_coco(tmp_path / 'photos', 2, 2, 64)
    assert contents(tmp_path) == {f'photos/{name}': b'{"format": "other"}'}


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='must be a folder.*file'):
        make_shapes_coco(tmp_path / 'file', 2, 2, 64)


@pytest.mark.parametrize('argument, value', [
    ('num_train', 0), ('num_val', -3), ('num_train', 2.5), ('num_val', '10'), ('num_train', True), ('image_size', 63),
    ('image_size', 4096), ('image_size', None), ('seed', -1), ('seed', 2**32), ('seed', 0.5)])
def test_wrong_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f'{argument} must be an integer from .* got {value!r}'):
        make_shapes_coco(tmp_path / 'set', **{'num_train': 1, 'num_val': 1, 'image_size': 64, argument: value})
    assert not (tmp_path / 'set').exists()


def test_wrong_places_of_a_scene_are_named():
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        scene_at(0, 'test', 0, 64)
    with pytest.raises(ValueError, match='index must be .* got -1'):
        scene_at(0, 'val', -1, 64)
    with pytest.raises(ValueError, match='size must be .* got 10'):
        make_scene(np.random.default_rng(0), 10)


def test_the_tool_makes_a_set_and_counts_it(tmp_path):
    command = [sys.executable, str(TOOL), str(tmp_path / 'set'), '--num-train', '3', '--num-val', '2', '--image-size',
               '64']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for split, count in (('train', 3), ('val', 2)):
        entries = json.loads((tmp_path / 'set' / 'annotations' / f'instances_{split}.json').read_text())['annotations']
        disks = sum(entry['category_id'] == 1 for entry in entries)
        assert f'{split}: {count} images, {len(entries)} objects: disk {disks}, ' in done.stdout


def test_the_tool_reports_wrong_arguments_in_one_line(tmp_path):
    # In this process, since the import of the whole package takes seconds.
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL))['main']([str(tmp_path / 'set'), '--image-size', '9'])
    assert 'image_size must be an integer from 64 to 2048, got 9' in caught.value.code
    assert '\n' not in caught.value.code
