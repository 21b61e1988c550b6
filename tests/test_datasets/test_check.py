"""The checks of data sets: a clean set is clean, and every kind of fault is found and named."""
import json
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mmpretrain.datasets import ImageNet
from mmseg.datasets import ADE20KDataset
from PIL import Image
from pycocotools import mask as coco_mask

from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.datasets.check import ClassCount, Report, check_ade20k, check_coco, check_imagenet
from convneur_mm.datasets.check.coco import _uncompressed

TOOL = Path(__file__).parents[2] / 'tools' / 'check_dataset.py'
MAKERS = {'coco': make_shapes_coco, 'ade20k': make_shapes_ade20k, 'imagenet': make_shapes_imagenet}
NUM_TRAIN, SIZE = 12, 64


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Path:
    """A set of each form, not to be changed."""
    folder = tmp_path_factory.mktemp('clean')
    for form, make in MAKERS.items():
        make(folder / form, NUM_TRAIN, 6, SIZE)
    return folder


@pytest.fixture
def root(clean, tmp_path) -> Path:
    """A copy to plant faults in."""
    return shutil.copytree(clean, tmp_path / 'data')


def arguments(form: str, root: Path) -> list[str]:
    return {'coco': [str(root / 'coco/annotations/instances_train.json'), str(root / 'coco/train')],
            'ade20k': [str(root / 'ade20k/images/training'), str(root / 'ade20k/annotations/training')],
            'imagenet': [str(root / 'imagenet/train')]}[form]


def check(form: str, root: Path) -> Report:
    if form == 'ade20k':
        return check_ade20k(*arguments(form, root), num_classes=6, workers=1)
    return {'coco': check_coco, 'imagenet': check_imagenet}[form](*arguments(form, root), workers=1)


def edit(root: Path, change: Callable[[dict], None]) -> str:
    """Changes the annotation file and returns its path."""
    path = root / 'coco/annotations/instances_train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


def the_fault(report: Report, path: str | Path, kind: str, *words: str) -> None:
    """Asserts that there is one fault and that it is this one."""
    assert [fault.kind for fault in report.faults] == [kind], report.text()
    assert report.faults[0].path == str(path)
    for word in words:
        assert word in report.faults[0].reason


@pytest.mark.parametrize('form', MAKERS)
def test_a_clean_set_is_clean(clean, form):
    report = check(form, clean)
    assert report.clean and not report.faults, report.text()
    assert report.images == NUM_TRAIN
    assert report.text().endswith('no faults')


@pytest.mark.parametrize('form', MAKERS)
def test_the_time_of_a_check(clean, form):
    start = time.perf_counter()
    seconds = check(form, clean).seconds
    assert 0 < seconds < time.perf_counter() - start


def test_coco_classes_are_counted(clean):
    annotations = json.loads((clean / 'coco/annotations/instances_train.json').read_text())['annotations']
    for index, count in enumerate(check('coco', clean).counts):
        of_class = [each['image_id'] for each in annotations if each['category_id'] == index + 1]
        assert (count.name, count.instances, count.images) == (SHAPE_CLASSES[index], len(of_class), len(set(of_class)))


def test_ade20k_classes_are_counted(clean):
    labels = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
                       for path in (clean / 'ade20k/annotations/training').iterdir()])
    counts = check('ade20k', clean).counts
    assert [count.name for count in counts] == ['other', *(f'class {value}' for value in range(1, 7))]
    for value, count in enumerate(counts):
        assert count.pixels == (labels == value).sum()
        assert count.images == (labels == value).any((1, 2)).sum()


def test_ade20k_classes_have_their_names(clean):
    report = check_ade20k(*arguments('ade20k', clean), workers=1)
    assert len(report.counts) == 151 and [count.name for count in report.counts[:4]] == ['other', 'wall', 'building',
                                                                                         'sky']
    assert re.search(r'wall +\d+ +\d+\.\d\d%', report.text())
    assert re.search(r'do not occur: \d+ \(.*flag\)', report.text(width=10000))


def test_imagenet_classes_are_counted(root):
    shutil.copy(root / 'imagenet/train/disk/000001.jpg', root / 'imagenet/train/disk/copy.JPEG')
    counts = {count.name: count.images for count in check('imagenet', root).counts}
    assert list(counts) == sorted(SHAPE_CLASSES), 'the order in which mmpretrain numbers them'
    assert counts == {name: 3 if name == 'disk' else 2 for name in SHAPE_CLASSES}


IMAGES = {'coco': 'coco/train/000002.jpg', 'ade20k': 'ade20k/images/training/000002.jpg',
          'imagenet': 'imagenet/train/square/000002.jpg'}


@pytest.mark.parametrize('form', MAKERS)
@pytest.mark.parametrize('damage, word', [
    (lambda data: data[:len(data) // 2], 'truncated'), (lambda data: data[:-1], 'truncated'),
    (lambda data: b'', 'is empty'), (lambda data: b'<html>not found</html>', 'is no image')],
    ids=['half', 'last byte', 'empty', 'other'])
def test_images_that_do_not_decode(root, form, damage, word):
    path = root / IMAGES[form]
    path.write_bytes(damage(path.read_bytes()))
    the_fault(check(form, root), path, 'unreadable', word)


@pytest.mark.parametrize('form', MAKERS)
def test_an_image_that_only_pillow_reads(root, form):
    path = root / IMAGES[form]
    with Image.open(path) as image:
        image.save(path, format='PCX')
    the_fault(check(form, root), path, 'unknown format', 'PCX', 'OpenCV cannot read')


def test_a_missing_image_of_coco(root):
    path = root / IMAGES['coco']
    path.unlink()
    the_fault(check('coco', root), path, 'missing', 'does not exist')


@pytest.mark.parametrize('form, kind', [('coco', 'wrong size'), ('ade20k', 'sizes differ')])
def test_images_of_another_size(root, form, kind):
    path = root / IMAGES[form]
    cv2.imwrite(str(path), np.zeros((SIZE, SIZE + 5, 3), np.uint8))
    named = path if form == 'coco' else root / 'ade20k/annotations/training/000002.png'
    the_fault(check(form, root), named, kind, f'{SIZE + 5} x {SIZE}', f'{SIZE} x {SIZE}')


@pytest.mark.parametrize('form, kind', [('coco', 'wrong size'), ('ade20k', 'sizes differ')])
def test_images_are_of_the_size_that_training_sees(root, form, kind):
    """OpenCV turns a photo as its EXIF orientation says."""
    path = root / IMAGES[form]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (SIZE + 5, SIZE)).save(path, exif=exif)
    assert cv2.imread(str(path)).shape[:2] == (SIZE + 5, SIZE)
    named = path if form == 'coco' else root / 'ade20k/annotations/training/000002.png'
    the_fault(check(form, root), named, kind, f'{SIZE} x {SIZE + 5}', 'EXIF')


def test_a_tiny_image_is_no_fault(root):
    cv2.imwrite(str(root / IMAGES['imagenet']), np.zeros((1, 3, 3), np.uint8))
    assert check('imagenet', root).clean


@pytest.mark.parametrize('text, words', [
    ('{"images": [', ['not valid JSON', 'line 1']), ('[1, 2]', ['must hold a JSON object']),
    ('\xff\xfe', ['not valid JSON']), ('{"images": [], "categories": []}', ["needs a list 'annotations'"]),
    ('{"images": {}, "categories": [], "annotations": []}', ["needs a list 'images'", 'got {}'])])
def test_annotation_files_that_are_not_coco(root, text, words):
    path = root / 'coco/annotations/instances_train.json'
    path.write_bytes(text.encode('latin-1'))
    the_fault(check('coco', root), path, 'no JSON' if 'JSON' in words[0] and 'object' not in words[0] else 'not COCO',
              *words)


def test_an_annotation_file_without_images(root):
    path = edit(root, lambda content: content.update(images=[], annotations=[]))
    the_fault(check('coco', root), path, 'no images')


@pytest.mark.parametrize('key, what', [('images', 'image'), ('annotations', 'annotation'), ('categories', 'category')])
def test_duplicate_ids(root, key, what):
    def change(content):
        content[key].append({**content[key][1], 'name': 'new'})

    path = edit(root, change)
    the_fault(check('coco', root), path, 'duplicate id', f'{what} 2', 'occurs before')


@pytest.mark.parametrize('key, index, missing', [
    ('images', 3, 'file_name'), ('images', 3, 'width'), ('categories', 2, 'name'), ('annotations', 4, 'bbox'),
    ('annotations', 4, 'category_id'), ('annotations', 4, 'area'), ('annotations', 4, 'iscrowd'),
    ('annotations', 4, 'id')])
def test_missing_keys(root, key, index, missing):
    path = edit(root, lambda content: content[key][index].pop(missing))
    faults = [fault for fault in check('coco', root).faults if not fault.kind.startswith('unknown')]
    assert len(faults) == 1 and faults[0].path == path and faults[0].kind == 'missing key'
    assert f'has no {missing}' in faults[0].reason
    assert (f'{key}[{index}]' if missing == 'id' else f' {index + 1}') in faults[0].reason


@pytest.mark.parametrize('key', ['images', 'annotations', 'categories'])
@pytest.mark.parametrize('wrong', ['7', 1.0, True, None, [1]])
def test_ids_that_are_no_integers(root, key, wrong):
    def change(content):
        # Without annotations, which would name what is no longer there.
        content['annotations'] = content['annotations'][:1] if key == 'annotations' else []
        content[key][0]['id'] = wrong

    path = edit(root, change)
    the_fault(check('coco', root), path, 'bad id', f'{key}[0]: id must be an integer, got {wrong!r}')


def test_every_entry_that_is_no_object_is_named(root):
    path = edit(root, lambda content: content['categories'].extend([None, 'disk', dict(id=9)]))
    faults = check('coco', root).faults
    assert [(fault.path, fault.kind) for fault in faults] == [(path, 'missing key')] * 3
    assert [fault.reason for fault in faults] == [
        'categories[6] must be an object, got None', "categories[7] must be an object, got 'disk'",
        'category 9 has no name']


@pytest.mark.parametrize('bbox, clean_box', [
    ([-0.5, 5, 9, 9], True), ([-0.6, 5, 9, 9], False), ([5, -0.5, 9, 9], True), ([5, -0.6, 9, 9], False),
    ([5, 5, SIZE - 4.5, 9], True), ([5, 5, SIZE - 4.4, 9], False), ([5, 5, 9, SIZE - 4.5], True),
    ([5, 5, 9, SIZE - 4.4], False)])
def test_boxes_may_be_rounded_over_the_border_by_half_a_pixel(root, bbox, clean_box):
    edit(root, lambda content: content['annotations'][0].update(bbox=bbox))
    assert [fault.kind for fault in check('coco', root).faults] == ([] if clean_box else ['box outside the image'])


@pytest.mark.parametrize('bbox, thin', [
    ([5, 5, 1, 9], 0), ([5, 5, 0.99, 9], 1), ([5, 5, 9, 0.5], 1), ([5, 5, 9, 1], 0)])
def test_thin_boxes_are_noted(root, bbox, thin):
    edit(root, lambda content: content['annotations'][0].update(bbox=bbox))
    report = check('coco', root)
    assert report.clean
    assert report.notes == ([f'boxes less than a pixel wide or high: {thin} (mmdet passes over them)'] if thin else [])


def test_two_categories_of_one_name(root):
    path = edit(root, lambda content: content['categories'][3].update(name='disk'))
    the_fault(check('coco', root), path, 'duplicate category name', "2 categories are named 'disk'")


ANNOTATION_FAULTS = [
    (dict(image_id=999), 'unknown image', 'there is no image 999'),
    (dict(image_id=None), 'unknown image', 'there is no image None'),
    (dict(category_id=7), 'unknown category', 'there is no category 7'),
    (dict(category_id=[1]), 'unknown category', 'there is no category [1]'),
    (dict(bbox=[5, 5, 0, 9]), 'box without area', 'box [5, 5, 0, 9]'),
    (dict(bbox=[5, 5, 9, -2]), 'box without area', 'box [5, 5, 9, -2]'),
    (dict(bbox=[-1, 5, 9, 9]), 'box outside the image', f'reaches outside the image of {SIZE} x {SIZE}'),
    (dict(bbox=[50, 5, 15, 9]), 'box outside the image', 'box [50, 5, 15, 9]'),
    (dict(bbox=[5, 60, 9, 4.6]), 'box outside the image', 'box [5, 60, 9, 4.6]'),
    (dict(bbox=[5, 5, 9]), 'bad box', 'must be four numbers, got [5, 5, 9]'),
    (dict(bbox=[5, 5, 9, float('nan')]), 'bad box', 'got [5, 5, 9, nan]'),
    (dict(bbox='5 5 9 9'), 'bad box', "got '5 5 9 9'"),
    (dict(area=0), 'bad area', 'must be a positive number, got 0'),
    (dict(segmentation=[[1, 1, 5, 1, 5]]), 'bad polygon', 'polygon 0 has 5 numbers'),
    (dict(segmentation=[[1, 1, 5, 1, 5, 5], [1, 1, 5, 1]]), 'bad polygon', 'polygon 1 has 4 numbers'),
    (dict(segmentation=[[1, 1, 5, 1, 5, 5, 1]]), 'bad polygon', 'polygon 0 has 7 numbers'),
    (dict(segmentation=[[1, 1, 5, 1, 5, '5']]), 'bad polygon', 'finite numbers'),
    (dict(segmentation=[1, 1, 5, 1, 5, 5]), 'bad polygon', 'must be a list of numbers, got 1'),
    (dict(segmentation='mask.png'), 'bad segmentation', "got 'mask.png'"),
    (dict(segmentation=[]), 'no segmentation', 'unlike other annotations'),
    (dict(segmentation=dict(size=[SIZE, SIZE])), 'missing key', 'has no counts'),
    (dict(segmentation=dict(size=[9, 9], counts=[80, 1])), 'run lengths of another size', 'of size [9, 9]'),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts=[80, 1])), 'run lengths of another size', 'cover 81 pixels'),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts='1')), 'run lengths of another size', 'cover 1 pixels'),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts='1!')), 'bad run lengths', "character '!'"),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts='o')), 'bad run lengths', 'middle of a number'),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts=[SIZE**2 + 1, -1])), 'bad run lengths', '0 or more'),
    (dict(segmentation=dict(size=SIZE, counts=[1])), 'bad run lengths', 'must be [height, width]')]


def test_faults_of_annotations(root):
    """All at once, an annotation each: beside a fault the others are still found."""
    def change(content):
        template = next(each for each in content['annotations'] if isinstance(each['segmentation'], list))
        content['annotations'] += [{**template, 'id': 1000 + i, **wrong}
                                   for i, (wrong, _, _) in enumerate(ANNOTATION_FAULTS)]

    path = edit(root, change)
    faults = check('coco', root).faults
    assert [(fault.path, fault.kind) for fault in faults] == [(path, kind) for _, kind, _ in ANNOTATION_FAULTS]
    for i, (fault, (_, _, words)) in enumerate(zip(faults, ANNOTATION_FAULTS, strict=True)):
        assert fault.reason.startswith(f'annotation {1000 + i}')
        assert words in fault.reason


def test_run_lengths_of_an_image_that_is_not_square(root):
    """Their size is height first, that of an image width first."""
    size = dict(width=80, height=40)

    def change(content, shape):
        image = content['images'][0]
        image.update(size)
        content['annotations'] = [{**content['annotations'][0], 'image_id': 1, 'bbox': [0, 0, 5, 5],
                                   'segmentation': dict(size=shape, counts=[10, 5, 3185])}]

    cv2.imwrite(str(root / 'coco/train/000001.jpg'), np.zeros((40, 80, 3), np.uint8))
    edit(root, lambda content: change(content, [40, 80]))
    assert check('coco', root).clean
    path = edit(root, lambda content: change(content, [80, 40]))
    the_fault(check('coco', root), path, 'run lengths of another size', '[80, 40]', '[40, 80]')


@settings(max_examples=60, deadline=None)
@given(mask=hnp.arrays(bool, st.tuples(st.integers(1, 300), st.integers(1, 40)), elements=st.booleans()))
def test_run_lengths_are_those_of_pycocotools(mask):
    lengths = _uncompressed(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))['counts'].decode())
    values = np.arange(len(lengths)) % 2
    np.testing.assert_array_equal(np.repeat(values, lengths).reshape(mask.shape, order='F'), mask)


def test_what_is_no_fault_is_noted(root):
    assert check('coco', root).notes == []

    def change(content):
        for annotation in content['annotations']:
            del annotation['segmentation']
        content['annotations'] = [each for each in content['annotations'] if each['image_id'] != 5]
        # Rounding puts a box a little over the border.
        content['annotations'][0].update(id=0, bbox=[-0.3, 10, 0.5, SIZE - 9.8])

    edit(root, change)
    report = check('coco', root)
    assert report.clean, report.text()
    notes = '\n'.join(report.notes)
    for words in ('without an annotation: 1 ', 'less than a pixel wide or high: 1 ', 'boxes alone', 'the id 0'):
        assert words in notes


def test_bad_sizes_and_names_of_images(root):
    def change(content):
        content['images'][0].update(width=0)
        content['images'][1].update(height='64')
        content['images'][2].update(file_name=3)
        content['images'].append(None)

    path = edit(root, change)
    faults = check('coco', root).faults
    assert [(fault.path, fault.kind) for fault in faults] == [
        (path, 'missing key'), (path, 'bad size'), (path, 'bad size'), (path, 'bad file name')]
    assert 'got 0 and 64' in faults[1].reason and "got 64 and '64'" in faults[2].reason


def test_pairs_of_ade20k_that_lack_one(root):
    image, label = root / 'ade20k/images/training/000003.jpg', root / 'ade20k/annotations/training/000003.png'
    label.rename(label.with_name('other.png'))
    faults = check('ade20k', root).faults
    assert [(fault.path, fault.kind) for fault in faults] == [
        (str(image), 'image without label map'), (str(label.with_name('other.png')), 'label map without image')]
    assert str(label) in faults[0].reason and str(image.with_name('other.jpg')) in faults[1].reason


@pytest.mark.parametrize('mode', ['RGB', 'I;16', '1'])
def test_label_maps_of_another_format(root, mode):
    path = root / 'ade20k/annotations/training/000004.png'
    Image.new(mode, (SIZE, SIZE)).save(path)
    the_fault(check('ade20k', root), path, 'wrong label format', f'mode {mode}')


def test_label_maps_with_a_palette_are_fine(root):
    path = root / 'ade20k/annotations/training/000004.png'
    with Image.open(path) as label:
        colours = label.convert('P')
        colours.putdata(list(label.getdata()))
        colours.putpalette([200, 0, 0] * 7)
    before = check('ade20k', root)
    colours.save(path)
    after = check('ade20k', root)
    assert after.clean and after.counts == before.counts


def test_labels_out_of_range(root):
    path = root / 'ade20k/annotations/training/000004.png'
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    label[0, :5], label[1, :3], label[2, :2] = 6, 7, 255
    cv2.imwrite(str(path), label)
    report = check('ade20k', root)
    the_fault(report, path, 'label out of range', 'above 6: 7 (3 pixels)')
    assert report.faults[0].reason.endswith('pixels)') and '255 (' not in report.faults[0].reason
    assert report.notes == ['pixels of the value 255, which training ignores: 2, in 1 label maps']


def test_label_maps_whose_zero_is_a_class(root):
    """As mmsegmentation loads them with reduce_zero_label=False: 0 is the first class, and 6 of 6 does not exist."""
    labels = sorted((root / 'ade20k/annotations/training').iterdir())
    for path in labels:
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(label == 0, 255, label - 1).astype(np.uint8))
    before = check_ade20k(*arguments('ade20k', root), num_classes=6, workers=1, reduce_zero_label=False)
    assert before.clean and [count.name for count in before.counts] == [f'class {i}' for i in range(1, 7)]
    assert before.notes
    label = cv2.imread(str(labels[3]), cv2.IMREAD_UNCHANGED)
    label[0, :5] = 6
    cv2.imwrite(str(labels[3]), label)
    report = check_ade20k(*arguments('ade20k', root), num_classes=6, workers=1, reduce_zero_label=False)
    the_fault(report, labels[3], 'label out of range', 'above 5: 6 (5 pixels)')
    assert check('ade20k', root).clean


def test_the_default_is_how_ade20k_is_loaded(root):
    """The values that training sees: 0 to 149 for the classes and 255 for what is ignored."""
    path = root / 'ade20k/annotations/training/000001.png'
    cv2.imwrite(str(path), np.resize(np.array([0, 1, 150, 255], np.uint8), (SIZE, SIZE)))
    data = ADE20KDataset(data_prefix=dict(img_path=arguments('ade20k', root)[0], seg_map_path=str(path.parent)),
                         pipeline=[dict(type='mmseg.LoadAnnotations')])
    assert data.metainfo['reduce_zero_label']
    loaded = data[0]
    assert loaded['seg_map_path'] == str(path) and set(np.unique(loaded['gt_seg_map'])) == {0, 149, 255}
    assert check_ade20k(*arguments('ade20k', root), workers=1).clean


def test_label_maps_that_do_not_decode(root):
    path = root / 'ade20k/annotations/training/000004.png'
    path.write_bytes(path.read_bytes()[:-30])
    the_fault(check('ade20k', root), path, 'unreadable', 'does not decode')


def test_ade20k_folders_without_files_of_the_suffix(root):
    report = check_ade20k(*arguments('ade20k', root), num_classes=6, image_suffix='.jpeg')
    assert report.faults[0].kind == 'no files' and 'ends in .jpeg' in report.faults[0].reason
    assert len(report.faults) == 1 + NUM_TRAIN
    for path in (root / 'ade20k/images/training').iterdir():
        path.rename(path.with_suffix('.jpeg'))
    assert check_ade20k(*arguments('ade20k', root), num_classes=6, image_suffix='.jpeg').clean


def test_ade20k_in_subfolders_is_fine(root):
    for folder in arguments('ade20k', root):
        (Path(folder) / 'city').mkdir()
        for path in Path(folder).glob('00000[1-4].*'):
            path.rename(path.parent / 'city' / path.name)
    report = check('ade20k', root)
    assert report.clean and report.images == NUM_TRAIN


def test_faults_of_imagenet(root):
    folder = root / 'imagenet/train'
    (folder / 'empty').mkdir()
    (folder / 'disk/list.txt').write_text('')
    (folder / 'disk/.DS_Store').write_text('')
    shutil.copy(folder / 'ring/000005.jpg', folder / 'stray.jpg')
    (folder / 'README.md').write_text('')
    assert [(fault.path, fault.kind) for fault in check('imagenet', root).faults] == [
        (str(folder / 'stray.jpg'), 'outside the class folders'), (str(folder / 'disk/list.txt'), 'not an image'),
        (str(folder / 'empty'), 'empty class')]


@pytest.fixture
def listed(root) -> tuple[Path, Path]:
    """A folder with all images, and the list of their labels: mmpretrain's layout of ImageNet's validation set."""
    folder, ann_file = root / 'imagenet/val', root / 'imagenet/meta/val.txt'
    shutil.rmtree(folder)
    folder.mkdir()
    ann_file.parent.mkdir()
    lines = []
    for label, name in enumerate(sorted(SHAPE_CLASSES)):
        for path in sorted((root / 'imagenet/train' / name).iterdir()):
            shutil.copy(path, folder)
            lines.append(f'{path.name} {label}')
    ann_file.write_text('\n'.join(sorted(lines)) + '\n')
    return folder, ann_file


def check_list(listed: tuple[Path, Path], num_classes: int | None = len(SHAPE_CLASSES)) -> Report:
    return check_imagenet(listed[0], workers=1, ann_file=listed[1], num_classes=num_classes)


@pytest.mark.parametrize('num_classes', [None, 6, 8])
def test_a_list_of_labels(listed, num_classes):
    report = check_list(listed, num_classes)
    assert report.clean and report.images == NUM_TRAIN, report.text()
    assert [(count.name, count.images) for count in report.counts] == [
        (f'class {i}', 2 if i < 6 else 0) for i in range(num_classes or 6)]


def test_a_list_is_read_as_mmpretrain_reads_it(listed):
    folder, ann_file = listed
    (folder / '000001.jpg').rename(folder / 'a photo.jpg')
    ann_file.write_text(ann_file.read_text().replace('000001.jpg', 'a photo.jpg'))
    data = ImageNet(data_root=str(folder.parent), split='val', metainfo=dict(classes=SHAPE_CLASSES), pipeline=[])
    report = check_list(listed)
    assert report.clean and len(data) == NUM_TRAIN
    labels = [data.get_data_info(i)['gt_label'] for i in range(NUM_TRAIN)]
    assert [count.images for count in report.counts] == [labels.count(i) for i in range(6)]


@pytest.mark.parametrize('line, kind, words', [
    ('000001.jpg', 'bad line', "line 13 must be an image and its label, an integer of 0 or more, got '000001.jpg'"),
    ('000001.jpg -1', 'bad line', 'line 13 '), ('000001.jpg disk', 'bad line', "got '000001.jpg disk'"),
    ('', 'bad line', "got ''"), (' 4', 'bad line', "got ' 4'"),
    ('other.jpg 6', 'label out of range', 'line 13 (other.jpg): the label must be below 6, got 6'),
    ('000001.jpg 3', 'duplicate image', 'line 13: 000001.jpg occurs before, with the label ')])
def test_faults_of_a_list(listed, line, kind, words):
    with listed[1].open('a') as file:
        file.write(f'{line}\n')
    report = check_list(listed)
    the_fault(report, listed[1], kind, words)
    assert report.images == NUM_TRAIN


def test_a_label_beyond_any_model(listed):
    listed[1].write_text('000001.jpg 1000000\n000002.jpg 3\n')
    kinds = [fault.kind for fault in check_list(listed, None).faults]
    assert kinds == ['label out of range'] + ['not in the list'] * (NUM_TRAIN - 1)


def test_images_of_a_list_and_of_its_folder(listed):
    folder, ann_file = listed
    (folder / '000002.jpg').rename(folder / 'other.JPG')
    (folder / '000003.jpg').write_bytes(b'')
    (folder / 'README.md').write_text('')
    report = check_list(listed)
    assert [(fault.path, fault.kind) for fault in report.faults] == [
        (str(folder / 'other.JPG'), 'not in the list'), (str(folder / '000002.jpg'), 'missing'),
        (str(folder / '000003.jpg'), 'unreadable')]
    assert str(ann_file) in report.faults[0].reason
    assert sum(count.images for count in report.counts) == NUM_TRAIN - 2


def test_an_empty_list(listed):
    listed[1].write_text('')
    report = check_list(listed)
    assert [fault.kind for fault in report.faults] == ['no images'] + ['not in the list'] * NUM_TRAIN
    assert report.images == 0


def test_as_many_class_folders_as_the_model_has_classes(root):
    assert check_imagenet(*arguments('imagenet', root), workers=1, num_classes=6).clean
    the_fault(check_imagenet(*arguments('imagenet', root), workers=1, num_classes=7), root / 'imagenet/train',
              'wrong number of classes', 'holds 6 class folders, expected 7')


def test_the_tool_takes_a_list(listed, capfd):
    main = runpy.run_path(str(TOOL))['main']
    command = ['imagenet', str(listed[0]), '--ann-file', str(listed[1]), '--workers', '1']
    assert main(command) == 0
    assert main([*command, '--num-classes', '5']) == 1
    assert 'the label must be below 5, got 5' in capfd.readouterr().out
    assert main([*command[:3], str(listed[1].with_name('train.txt'))]) == 2
    assert f'no such file: {listed[1].with_name("train.txt")}' in capfd.readouterr().err


def test_the_tool_takes_label_maps_whose_zero_is_a_class(root, capfd):
    main = runpy.run_path(str(TOOL))['main']
    command = ['ade20k', *arguments('ade20k', root), '--num-classes', '6', '--workers', '1']
    assert main(command) == 0
    assert main([*command, '--keep-zero-label']) == 1
    assert 'has values above 5: 6 (' in capfd.readouterr().out


@pytest.mark.parametrize('num_classes', [0, 1.5, '6'])
def test_imagenet_refuses_a_number_of_classes_that_is_none(clean, num_classes):
    with pytest.raises(ValueError, match=f'num_classes must be an integer from 1 to 1000000, got {num_classes!r}'):
        check_imagenet(*arguments('imagenet', clean), num_classes=num_classes)


def test_links_are_followed(root):
    """Large data sets often lie elsewhere; the loaders of OpenMMLab follow the links, and so must the check."""
    for folder in (root / 'imagenet/train/disk', root / 'ade20k/images/training'):
        folder.rename(root / 'elsewhere')
        (folder / 'deep').mkdir(parents=True)
        (folder / 'deep/link').symlink_to(root / 'elsewhere', target_is_directory=True)
        broken = next(folder.glob('deep/link/*1.jpg'))
        broken.write_bytes(b'')
        form = folder.relative_to(root).parts[0]
        assert (str(broken), 'unreadable') in [(fault.path, fault.kind) for fault in check(form, root).faults]
        (root / 'elsewhere').rename(root / f'elsewhere_{form}')


def test_imagenet_without_class_folders(root):
    kinds = [fault.kind for fault in check_imagenet(root / 'imagenet/train/disk').faults]
    assert kinds == ['no class folders', 'outside the class folders', 'outside the class folders']


def test_a_report_as_a_person_reads_it():
    """Classes fill two columns of a table as soon as there are more than ten; those that do not occur are named."""
    counts = [ClassCount(f'c{i}', i, pixels=10 * i) for i in range(12)]
    report = Report('data', images=50, counts=counts, notes=['a note'], seconds=2.0)
    assert report.text(width=80).splitlines() == [
        'data: 50 images, checked in 2.0 s (25 images/s)', '',
        '  class  images  pixels    class  images  pixels',
        '  c1          1   1.52%    c7          7  10.61%',
        '  c2          2   3.03%    c8          8  12.12%',
        '  c3          3   4.55%    c9          9  13.64%',
        '  c4          4   6.06%    c10        10  15.15%',
        '  c5          5   7.58%    c11        11  16.67%',
        '  c6          6   9.09%', '',
        'note: a note', 'note: classes that do not occur: 1 (c0)', '', 'no faults']
    assert report.text(width=49).splitlines()[2:5] == [
        '  class  images  pixels', '  c1          1   1.52%', '  c2          2   3.03%']


def test_a_table_of_instances():
    counts = [ClassCount('a long name', 0, instances=1), ClassCount('b', 2, instances=30)]
    report = Report('data', images=3, counts=counts)
    assert report.text(width=80).splitlines() == [
        'data: 3 images, checked in 0.0 s', '', '  class        images  instances', '  a long name       0          1',
        '  b                 2         30', '', 'no faults']


def test_long_notes_are_broken_into_lines():
    report = Report('data', notes=['word ' * 12])
    assert report.text(width=30).splitlines()[2:-2] == ['note: word word word word word', '  word word word word word',
                                                       '  word word']


def test_the_commonest_faults_come_first():
    report = Report('data')
    for i, kind in enumerate(['rare', 'common', 'common']):
        report.add(Path(f'{i}.jpg'), kind, f'is {kind}')
    assert not report.clean
    assert report.text(max_shown=2).splitlines()[-4:] == [
        'faults: 3 (2 common, 1 rare)', '  0.jpg: is rare', '  1.jpg: is common', '  ... and 1 more']
    assert report.text(max_shown=3).splitlines()[-2:] == ['  1.jpg: is common', '  2.jpg: is common']


def test_more_faults_than_are_shown(root):
    for path in (root / 'coco/train').iterdir():
        path.unlink()
    report = check('coco', root)
    lines = report.text(max_shown=3).splitlines()
    assert lines[-5] == f'faults: {NUM_TRAIN} ({NUM_TRAIN} missing)'
    assert lines[-4:] == [f'  {root}/coco/train/{i:06d}.jpg: does not exist' for i in (1, 2, 3)] + [
        f'  ... and {NUM_TRAIN - 3} more']
    assert report.text(max_shown=NUM_TRAIN).endswith(f'{NUM_TRAIN:06d}.jpg: does not exist')


def test_one_worker_finds_the_same_as_many(root):
    (root / IMAGES['imagenet']).write_bytes(b'')
    (root / 'imagenet/train/star/000010.jpg').unlink()
    one, many = (check_imagenet(*arguments('imagenet', root), workers=workers) for workers in (1, 3))
    assert (one.faults, one.counts, one.images) == (many.faults, many.counts, many.images)
    assert len(one.faults) == 1


@pytest.mark.parametrize('form', MAKERS)
def test_the_tool_tells_by_its_exit_code(root, capfd, form):
    main = runpy.run_path(str(TOOL))['main']
    command = [form, *arguments(form, root), '--workers', '2', *(['--num-classes', '6'] if form == 'ade20k' else [])]
    assert main(command) == 0
    assert 'no faults' in capfd.readouterr().out
    path = root / IMAGES[form]
    path.write_bytes(path.read_bytes()[:-99])
    assert main(command) == 1
    assert f'faults: 1 (1 unreadable)\n  {path}: does not decode' in capfd.readouterr().out
    assert main([*command, '--max-shown', '0']) == 1
    assert capfd.readouterr().out.endswith('faults: 1 (1 unreadable)\n  ... and 1 more\n')


@pytest.mark.parametrize('form, place', [('coco', 0), ('coco', 1), ('ade20k', 0), ('ade20k', 1), ('imagenet', 0)])
def test_the_tool_names_a_path_that_does_not_exist(clean, capfd, form, place):
    main = runpy.run_path(str(TOOL))['main']
    paths = arguments(form, clean)
    paths[place] = str(clean / 'nowhere')
    assert main([form, *paths]) == 2
    error = capfd.readouterr().err
    assert f'{clean}/nowhere' in error and error.count('\n') == 1


@pytest.mark.parametrize('words', [
    ['imagenet', '--workers', '0'], ['imagenet', '--max-shown', '-1'], ['imagenet', '--workers', 'x'], ['coco'], [],
    ['ade20k', '.', '.', '--num-classes', '255']])
def test_the_tool_refuses_wrong_usage(clean, capfd, words):
    main = runpy.run_path(str(TOOL))['main']
    try:
        code = main([*words[:1], *arguments('imagenet', clean), *words[1:]] if words[:1] == ['imagenet'] else words)
    except SystemExit as error:
        code = error.code
    assert code == 2 and 'error: ' in capfd.readouterr().err


def test_a_file_is_no_folder(clean):
    with pytest.raises(NotADirectoryError, match='not a folder: .*shapes.json'):
        check_imagenet(clean / 'imagenet/shapes.json')
    with pytest.raises(FileNotFoundError, match='no such file: .*coco'):
        check_coco(clean / 'coco', clean / 'coco/train')
    with pytest.raises(ValueError, match='num_classes must be an integer from 1 to 254, got 0'):
        check_ade20k(*arguments('ade20k', clean), num_classes=0)


def test_the_tool_runs_by_itself(root):
    """The exit code and the report reach the shell, and the progress does not mix with the report."""
    (root / 'imagenet/train/empty').mkdir()
    done = subprocess.run([sys.executable, str(TOOL), 'imagenet', *arguments('imagenet', root)], capture_output=True,
                          text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f'ImageNet data set {root}/imagenet/train: {NUM_TRAIN} images')
    assert done.stdout.endswith(f'faults: 1 (1 empty class)\n  {root}/imagenet/train/empty: class folder without an '
                                'image\n')
    assert f'{NUM_TRAIN}/{NUM_TRAIN}' in done.stderr
