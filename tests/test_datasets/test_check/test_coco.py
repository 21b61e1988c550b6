"""The check of COCO's format: every kind of fault in the annotation file is found and named."""
import json

import cv2
import numpy as np
import pytest
from data_sets import IMAGES, SIZE, check, edit, the_fault
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from convneur_mm.datasets import SHAPE_CLASSES
from convneur_mm.datasets.check.coco import _uncompressed


def test_coco_classes_are_counted(clean):
    annotations = json.loads((clean / 'coco/annotations/instances_train.json').read_text())['annotations']
    for index, count in enumerate(check('coco', clean).counts):
        of_class = [each['image_id'] for each in annotations if each['category_id'] == index + 1]
        assert (count.name, count.instances, count.images) == (SHAPE_CLASSES[index], len(of_class), len(set(of_class)))


def test_a_missing_image_of_coco(root):
    path = root / IMAGES['coco']
    path.unlink()
    the_fault(check('coco', root), path, 'missing', 'does not exist')


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
    (dict(bbox=[5, 5, True, 9]), 'bad box', 'got [5, 5, True, 9]'),
    (dict(bbox='5 5 9 9'), 'bad box', "got '5 5 9 9'"),
    (dict(area='9'), 'bad area', "must be a positive number, got '9'"),
    (dict(area=0), 'bad area', 'must be a positive number, got 0'),
    (dict(iscrowd='no'), 'bad iscrowd', "must be 0 or 1, got 'no'"),
    (dict(iscrowd=None), 'bad iscrowd', 'got None'),
    (dict(iscrowd=2), 'bad iscrowd', 'got 2'),
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
    (dict(segmentation=dict(size=[SIZE, SIZE], counts='1p')), 'bad run lengths', "character 'p'"),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts='1/')), 'bad run lengths', "character '/'"),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts=None)), 'bad run lengths', 'a list or a string, got None'),
    (dict(segmentation=dict(size=[SIZE, 64.0], counts=[SIZE * SIZE])), 'bad run lengths', 'must be [height, width]'),
    (dict(segmentation=dict(size=[SIZE, SIZE], counts='o' * 10**6)), 'bad run lengths', 'more than 40 bit'),
    (dict(segmentation=dict(counts=[1])), 'missing key', 'has no size'),
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


@pytest.mark.parametrize('right', [
    dict(area=0.5), dict(segmentation=[[1, 1, 5, 1, 5, 5]]), dict(segmentation=[[1, 1, 5, 1.5, 5, 5, 1, 5]]),
    dict(segmentation=dict(size=[SIZE, SIZE], counts=[0, SIZE**2])), dict(bbox=[0, 0, SIZE, SIZE])], ids=str)
def test_what_is_right_with_an_annotation(root, right):
    edit(root, lambda content: content['annotations'][0].update(right))
    assert check('coco', root).clean


def test_a_single_annotation_with_a_mask(root):
    """All others lack one, then."""
    def change(content):
        content['annotations'] = content['annotations'][:3]
        for annotation in content['annotations'][1:]:
            del annotation['segmentation']

    edit(root, change)
    assert [(fault.kind, fault.reason.partition(' of ')[0]) for fault in check('coco', root).faults] == [
        ('no segmentation', 'annotation 2'), ('no segmentation', 'annotation 3')]


def test_an_image_of_one_pixel(root):
    cv2.imwrite(str(root / 'coco/train/000001.jpg'), np.zeros((1, 1, 3), np.uint8))

    def change(content):
        content['images'][0].update(width=1, height=1)
        content['annotations'] = [each for each in content['annotations'] if each['image_id'] != 1]

    edit(root, change)
    assert check('coco', root).clean


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


def test_categories_have_names(root):
    path = edit(root, lambda content: content['categories'][0].update(name=5))
    the_fault(check('coco', root), path, 'bad category name', 'category 1: name must be a string, got 5')


def test_an_annotation_file_without_categories(root):
    path = edit(root, lambda content: content.update(categories=[], annotations=[]))
    the_fault(check('coco', root), path, 'no categories', "its list 'categories' is empty")
