"""The data sets of shapes: that their files are true to the scenes and to each other, and can be made again."""
import json
import os
import runpy
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from warm_python import warm_python

from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.datasets.shapes import Scene, scene_at, single_scene_at
from convneur_mm.datasets.shapes_formats import ADE20K_SPLITS, mask_to_segmentation

TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'
MAKERS = {'coco': make_shapes_coco, 'ade20k': make_shapes_ade20k, 'imagenet': make_shapes_imagenet}
SIZES = {'train': 18, 'val': 9}
SEED = 3

every_form = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    return make_shapes_coco(tmp_path_factory.mktemp('shapes') / 'made', SIZES['train'], SIZES['val'], 160, SEED)


@pytest.fixture(scope='module')
def ade20k_root(tmp_path_factory) -> Path:
    return make_shapes_ade20k(tmp_path_factory.mktemp('shapes') / 'ade20k', SIZES['train'], SIZES['val'], 160, SEED)


@pytest.fixture(scope='module')
def imagenet_root(tmp_path_factory) -> Path:
    return make_shapes_imagenet(tmp_path_factory.mktemp('shapes') / 'imagenet', SIZES['train'], SIZES['val'], 160, SEED)


@pytest.fixture(scope='module')
def scenes() -> dict[str, list[Scene]]:
    return {split: [scene_at(SEED, split, index, 160) for index in range(count)] for split, count in SIZES.items()}


def load(root: Path, split: str) -> COCO:
    return COCO(str(root / 'annotations' / f'instances_{split}.json'))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob('*')}


def files(make, num_train: int, num_val: int) -> set[str]:
    """What a form should consist of."""
    numbers = {'train': range(num_train), 'val': range(num_val)}
    names = {'shapes.json'}
    for split, indices in numbers.items():
        for index in indices:
            stem = f'{index + 1:06d}'
            if make is make_shapes_coco:
                names |= {f'annotations/instances_{split}.json', f'{split}/{stem}.jpg'}
            elif make is make_shapes_ade20k:
                folder = {'train': 'training', 'val': 'validation'}[split]
                names |= {f'images/{folder}/{stem}.jpg', f'annotations/{folder}/{stem}.png'}
            else:
                names |= {f'{split}/{SHAPE_CLASSES[index % 6]}/{stem}.jpg'}
    return names


def decode(segmentation, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *shape))
    return coco_mask.decode(segmentation).astype(bool)


@every_form
def test_the_same_arguments_give_the_same_bytes(make, tmp_path):
    first = contents(make(tmp_path / 'a', 7, 6, 96, 7))
    second = contents(make(tmp_path / 'b', 7, 6, 96, 7))
    assert first == second
    assert set(first) == files(make, 7, 6)


@every_form
def test_another_seed_gives_other_images(make, tmp_path):
    first = contents(make(tmp_path / 'a', 6, 6, 96, 7))
    second = contents(make(tmp_path / 'b', 6, 6, 96, 8))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first if name.endswith('.jpg'))


@every_form
def test_files_do_not_depend_on_how_many_there_are(make, root, ade20k_root, imagenet_root, tmp_path):
    roots = {make_shapes_coco: root, make_shapes_ade20k: ade20k_root, make_shapes_imagenet: imagenet_root}
    many = contents(roots[make])
    few = contents(make(tmp_path / 'few', 7, 6, 160, SEED))
    images = [name for name in few if not name.endswith('.json')]
    assert len(images) >= 13
    assert all(few[name] == many[name] for name in images)


def test_annotations_do_not_depend_on_how_many_there_are(root, tmp_path):
    few = make_shapes_coco(tmp_path / 'few', 5, 2, 160, SEED)
    for split, count in (('train', 5), ('val', 2)):
        many = json.loads((root / 'annotations' / f'instances_{split}.json').read_text())
        less = json.loads((few / 'annotations' / f'instances_{split}.json').read_text())
        assert less['images'] == many['images'][:count]
        assert less['annotations'] == [entry for entry in many['annotations'] if entry['image_id'] <= count]


def test_no_image_occurs_twice(root, imagenet_root):
    images = [path.read_bytes() for folder in (root, imagenet_root) for path in folder.rglob('*.jpg')]
    assert len(images) == 2 * sum(SIZES.values()) == len(set(images))


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


@pytest.fixture(scope='module')
def large_scenes() -> dict[str, list[Scene]]:
    return {split: [scene_at(SEED, split, index, 160, large=True) for index in range(count)]
            for split, count in SIZES.items()}


@pytest.mark.parametrize('split', SIZES)
def test_ade20k_has_the_masks_of_the_scenes(ade20k_root, large_scenes, split):
    folder = ADE20K_SPLITS[split]
    names = sorted(path.stem for path in (ade20k_root / 'images' / folder).iterdir())
    assert len(names) == len(large_scenes[split])
    for name, scene in zip(names, large_scenes[split]):
        image = cv2.imread(str(ade20k_root / 'images' / folder / f'{name}.jpg'))[..., ::-1]
        assert np.abs(image.astype(int) - scene.image).mean() < 6  # JPEG
        labels = cv2.imread(str(ade20k_root / 'annotations' / folder / f'{name}.png'), cv2.IMREAD_UNCHANGED)
        assert labels.dtype == np.uint8
        expected = np.zeros(scene.image.shape[:2], np.uint8)
        for instance in scene.instances:
            expected[instance.mask] = instance.label + 1
        np.testing.assert_array_equal(labels, expected)


def test_mmseg_reads_the_labels(ade20k_root, large_scenes):
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations
    dataset = BaseSegDataset(
        data_root=str(ade20k_root), data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        metainfo=dict(classes=SHAPE_CLASSES), reduce_zero_label=True,
        pipeline=[LoadImageFromFile(), LoadAnnotations()])
    assert len(dataset) == SIZES['train']
    for index, scene in enumerate(large_scenes['train']):
        data = dataset[index]
        assert np.abs(data['img'][..., ::-1].astype(int) - scene.image).mean() < 6
        expected = np.full(scene.image.shape[:2], 255)
        for instance in scene.instances:
            expected[instance.mask] = instance.label
        np.testing.assert_array_equal(data['gt_seg_map'], expected)


@pytest.mark.parametrize('split', SIZES)
def test_mmpretrain_reads_the_classes(imagenet_root, split):
    from mmpretrain.datasets import CustomDataset
    dataset = CustomDataset(data_root=str(imagenet_root), data_prefix=split)
    assert dataset.CLASSES == ('cross', 'disk', 'ring', 'square', 'star', 'triangle') == tuple(sorted(SHAPE_CLASSES))
    assert dataset.class_to_idx == {name: index for index, name in enumerate(sorted(SHAPE_CLASSES))}
    assert len(dataset) == SIZES[split]
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        scene = single_scene_at(SEED, split, int(Path(info['img_path']).stem) - 1, 160)
        assert dataset.CLASSES[info['gt_label']] == SHAPE_CLASSES[scene.instances[0].label]
        image = cv2.imread(info['img_path'])
        assert image.shape == scene.image.shape
        assert np.abs(image[..., ::-1].astype(int) - scene.image).mean() < 6


@pytest.mark.parametrize('split', SIZES)
def test_imagenet_classes_are_balanced(imagenet_root, split):
    counts = {name: len(os.listdir(imagenet_root / split / name)) for name in os.listdir(imagenet_root / split)}
    assert set(counts) == set(SHAPE_CLASSES) and sum(counts.values()) == SIZES[split]
    assert max(counts.values()) - min(counts.values()) <= 1


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


@every_form
def test_a_second_run_changes_nothing(make, tmp_path):
    root = make(tmp_path / 'set', 7, 6, 64)
    before = stamps(root)
    assert make(root, 7, 6, 64) == root
    assert stamps(root) == before


@pytest.mark.parametrize('make, damage', [
    (make_shapes_coco, 'val/000002.jpg'), (make_shapes_coco, 'annotations/instances_train.json'),
    (make_shapes_coco, 'shapes.json'), (make_shapes_ade20k, 'images/training/000003.jpg'),
    (make_shapes_ade20k, 'annotations/validation/000001.png'), (make_shapes_ade20k, 'shapes.json'),
    (make_shapes_imagenet, 'train/disk/000001.jpg'), (make_shapes_imagenet, 'val/star/000004.jpg'),
    (make_shapes_imagenet, 'shapes.json')])
def test_an_incomplete_set_is_completed(make, tmp_path, damage):
    root = make(tmp_path / 'set', 7, 6, 64)
    whole = contents(root)
    if damage == 'shapes.json':
        os.replace(root / damage, root / 'shapes.unfinished.json')  # The state that a run which was killed leaves.
    else:
        (root / damage).unlink()
    make(root, 7, 6, 64)
    assert contents(root) == whole


@every_form
def test_other_arguments_replace_the_set_and_nothing_else(make, tmp_path):
    root = make(tmp_path / 'set', 13, 7, 64)
    notes = {str(path.relative_to(root) / 'notes.txt'): b'mine' for path in root.rglob('*') if path.is_dir()}
    for name, text in notes.items():
        (root / name).write_bytes(text)
    make(root, 6, 6, 64, seed=1)
    expected = contents(make(tmp_path / 'fresh', 6, 6, 64, seed=1))
    assert contents(root) == {**expected, **notes}


@every_form
def test_a_run_that_fails_leaves_no_complete_set(make, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('disk full')

    root = make(tmp_path / 'set', 6, 6, 64)
    with monkeypatch.context() as patched:
        patched.setattr('convneur_mm.datasets.shapes_formats._write_image', fail)
        with pytest.raises(OSError, match='disk full'):
            make(root, 7, 6, 64)
    assert not (root / 'shapes.json').exists()
    assert contents(make(root, 7, 6, 64)) == contents(make(tmp_path / 'fresh', 7, 6, 64))


@every_form
@pytest.mark.parametrize('name', ['holiday.jpg', 'shapes.json', 'train/000001.jpg'])
def test_a_folder_of_someone_else_is_not_touched(make, tmp_path, name):
    path = tmp_path / 'photos' / name
    path.parent.mkdir(parents=True)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=f'made by {make.__name__}, got a folder with other content.*photos'):
        make(tmp_path / 'photos', 6, 6, 64)
    assert contents(tmp_path) == {f'photos/{name}': b'{"format": "other"}'}


@every_form
def test_another_form_is_not_touched(make, tmp_path):
    root = make(tmp_path / 'set', 6, 6, 64)
    before = stamps(root)
    for other in MAKERS.values():
        if other is not make:
            with pytest.raises(ValueError, match=f'made by {other.__name__}, got a folder with other content.*set'):
                other(root, 6, 6, 64)
    assert stamps(root) == before
    # The same while the set is not finished.
    os.replace(root / 'shapes.json', root / 'shapes.unfinished.json')
    before = stamps(root)
    for other in MAKERS.values():
        if other is not make:
            with pytest.raises(ValueError, match='other content'):
                other(root, 6, 6, 64)
    assert stamps(root) == before


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='must be a folder.*file'):
        make_shapes_coco(tmp_path / 'file', 2, 2, 64)


@pytest.mark.parametrize('argument, value', [
    ('num_train', 0), ('num_val', -3), ('num_train', 2.5), ('num_val', '10'), ('num_train', True), ('image_size', 63),
    ('image_size', 4096), ('image_size', None), ('seed', -1), ('seed', 2**32), ('seed', 0.5)])
@every_form
def test_wrong_arguments_are_named(make, tmp_path, argument, value):
    with pytest.raises(ValueError, match=f'{argument} must be an integer from .* got {value!r}'):
        make(tmp_path / 'set', **{'num_train': 6, 'num_val': 6, 'image_size': 64, argument: value})
    assert not (tmp_path / 'set').exists()


def test_imagenet_needs_an_image_of_each_class(tmp_path):
    with pytest.raises(ValueError, match='num_val must be an integer from 6 to 999999, got 5'):
        make_shapes_imagenet(tmp_path / 'set', 6, 5, 64)
    assert not (tmp_path / 'set').exists()


def test_the_tool_makes_a_set_and_counts_it(tmp_path):
    command = [warm_python(), str(TOOL), str(tmp_path / 'set'), '--num-train', '3', '--num-val', '2', '--image-size',
               '64']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for split, count in (('train', 3), ('val', 2)):
        entries = json.loads((tmp_path / 'set' / 'annotations' / f'instances_{split}.json').read_text())['annotations']
        disks = sum(entry['category_id'] == 1 for entry in entries)
        assert f'{split}: {count} images, {len(entries)} objects: disk {disks}, ' in done.stdout


@pytest.mark.parametrize('form', ['ade20k', 'imagenet'])
def test_the_tool_makes_the_other_forms(tmp_path, capsys, form):
    main = runpy.run_path(str(TOOL))['main']
    main([str(tmp_path / 'set'), '--format', form, '--num-train', '8', '--num-val', '6', '--image-size', '64'])
    assert contents(tmp_path / 'set') == contents(MAKERS[form](tmp_path / 'expected', 8, 6, 64))
    printed = capsys.readouterr().out
    if form == 'imagenet':
        assert 'train: 8 images: disk 2, square 2, triangle 1, star 1, ring 1, cross 1' in printed
        return
    paths = (tmp_path / 'set' / 'annotations' / 'training').iterdir()
    share = np.mean([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) == 0 for path in paths])
    assert f'training: 8 images, pixels: background {share:.1%}, disk ' in printed


def test_the_tool_reports_wrong_arguments_in_one_line(tmp_path, refused):
    # In this process, since the import of the whole package takes seconds.
    with refused('image_size must be an integer from 64 to 2048, got 9'):
        runpy.run_path(str(TOOL))['main']([str(tmp_path / 'set'), '--image-size', '9'])
