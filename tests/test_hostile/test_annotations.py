"""COCO files that are odd or wrong: check_dataset and the start of a training treat them alike."""
import copy
import json
import re
import shutil

import numpy as np
import pytest
from hostile import HANDLED, Row, config, ids, training_data
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from pycocotools import mask as coco_mask

from convneur_mm.datasets import make_shapes_coco
from convneur_mm.datasets.check import check_coco
from convneur_mm.engine.files.errors import LaunchError

pytestmark = pytest.mark.needs('mmdet')
SIZE = 64
NAMES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Three images, of which the first has two objects and the others one."""
    root = make_shapes_coco(tmp_path_factory.mktemp('annotations') / 'data', num_train=3, num_val=2, image_size=SIZE)
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    boxes = [(1, [4, 4, 30, 20]), (1, [20, 30, 10, 10]), (2, [0, 0, SIZE, SIZE]), (3, [10, 10, 5, 9])]
    content['annotations'] = [
        dict(id=i, image_id=image, category_id=i, bbox=box, area=box[2] * box[3], iscrowd=0,
             segmentation=[polygon(box)])
        for i, (image, box) in enumerate(boxes, 1)]
    path.write_text(json.dumps(content))
    return root


def polygon(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def run_lengths(box, packed=True):
    mask = np.zeros((SIZE, SIZE), np.uint8, order='F')
    mask[box[1]:box[1] + box[3], box[0]:box[0] + box[2]] = 1
    if packed:
        encoded = coco_mask.encode(mask)
        return dict(size=[SIZE, SIZE], counts=encoded['counts'].decode())
    values = mask.flatten(order='F')
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), values.size]
    lengths = np.diff([0, *ends]).tolist()
    return dict(size=[SIZE, SIZE], counts=[0, *lengths] if values[0] else lengths)


def first(**changes):
    """Changes the first annotation, which is of the first image."""
    return lambda content: content['annotations'][0].update(changes)


def last(**changes):
    """Changes the only annotation of the last image."""
    return lambda content: content['annotations'][-1].update(changes)


def without(key, *names):
    def change(content):
        for entry in content[key]:
            for name in names:
                entry.pop(name, None)
    return change


def twice(key, **changes):
    """Adds the first entry of a list once more."""
    return lambda content: content[key].append({**content[key][0], **changes})


def mixed(content):
    for annotation, segmentation in zip(content['annotations'], (
            run_lengths([4, 4, 30, 20]), run_lengths([20, 30, 10, 10], packed=False), [polygon([0, 0, SIZE, SIZE])])):
        annotation['segmentation'] = segmentation


def far_ids(content):
    """Category and image ids neither in order nor without gaps."""
    for category in content['categories']:
        category['id'] = 1000 - 7 * category['id']
    for image in content['images']:
        image['id'] = 5 + 3 * image['id']
    for annotation in content['annotations']:
        annotation['category_id'] = 1000 - 7 * annotation['category_id']
        annotation['image_id'] = 5 + 3 * annotation['image_id']


NAN = float('nan')

# ``make`` changes the content of the annotation file. A training passes over what of a COCO file is faulty in the ways
# that pycocotools and mmdet pass over it, so that only the check tells; what would stop it, or spoil the loss, is told
# at its start.
ROWS = [
    Row('as it is', lambda content: None),
    Row('ids with gaps', far_ids),
    Row('run lengths and polygons', mixed),
    Row('crowd alone', last(iscrowd=1, segmentation=run_lengths([10, 10, 5, 9], packed=False))),
    Row('image without annotations', lambda content: content['annotations'].pop()),
    Row('box half a pixel outside', first(bbox=[-0.4, 4, 30, 20])),
    Row('box less than a pixel wide', last(bbox=[10, 10, 0.5, 9])),
    Row('other keys', lambda content: (content.update(info={}, licenses=[]), first(score=1, color='red')(content))),
    Row('name in Unicode', lambda content: content['images'][0].update(file_name='bild ä ☃.jpg')),
    Row('box outside', first(bbox=[70, 4, 30, 20]), 'reaches outside the image'),
    Row('box partly outside', first(bbox=[50, 4, 30, 20]), 'reaches outside the image'),
    Row('box without area', first(bbox=[4, 4, 0, 20]), 'has no area'),
    Row('box turned inside out', first(bbox=[34, 24, -30, -20]), 'has no area'),
    Row('box of three numbers', first(bbox=[4, 4, 30]), 'must be four numbers',
        r'instances_train\.json.*: not enough values to unpack'),
    Row('box that is NaN', first(bbox=[NAN, 4, 30, 20]), 'must be four numbers, got .nan'),
    Row('box that is infinite', first(bbox=[4, 4, float('inf'), 20]), 'must be four numbers, got .*inf',
        r'000001\.jpg has an object with the box \[4, 4, inf'),
    Row('no segmentation for one', lambda content: content['annotations'][0].pop('segmentation'), 'no segmentation',
        r'000001\.jpg has an object without a segmentation'),
    Row('no segmentation at all', without('annotations', 'segmentation'), HANDLED,
        r'000001\.jpg has an object without a segmentation'),
    Row('polygon of two points', first(segmentation=[[1, 1, 5, 5]]), 'polygon 0 has 4 numbers'),
    Row('run lengths of another size', first(segmentation=dict(size=[9, 9], counts=[80, 1])), 'of size .9, 9.',
        r'000001\.jpg cannot be used: LoadAnnotations raised'),
    Row('category that is unknown', first(category_id=99), 'there is no category 99'),
    Row('image that is unknown', first(image_id=99), 'there is no image 99'),
    Row('image twice', twice('images'), r'image 1 \(000001\.jpg\): its id occurs before'),
    Row('annotation twice', twice('annotations'), 'annotation 1: its id occurs before', 'are not unique'),
    Row('category twice', twice('categories'), 'category 1: its id occurs before',
        r'instances_train\.json has several categories .*disk'),
    Row('category name twice', twice('categories', id=77), "2 categories are named 'disk'",
        r'instances_train\.json has several categories .*disk'),
    Row('category id twice', twice('categories', name='other'), 'category 1: its id occurs before',
        r'instances_train\.json has several categories .*1'),
    Row('category without name', without('categories', 'name'), 'has no name', "no list 'categories'"),
    Row('category name that is a number', lambda content: content['categories'][0].update(name=5),
        'name must be a string, got 5', "no list 'categories'"),
    Row('no categories', lambda content: content.update(categories=[], annotations=[]), "list 'categories' is empty",
        'has no category'),
    Row('no images', lambda content: content.update(images=[], annotations=[]), "list 'images' is empty",
        r'instances_train\.json has no image to use'),
    Row('no annotations', lambda content: content.update(annotations=[]), HANDLED,
        r'instances_train\.json has no image to use: .* none that has an annotation of one of the classes'),
    Row('crowd that is a word', first(iscrowd='no'), "iscrowd must be 0 or 1, got 'no'"),
    Row('size of another image', lambda content: content['images'][0].update(width=80), 'is 64 x 64 .* says 80 x 64'),
    Row('file that is missing', lambda content: content['images'][1].update(file_name='nowhere.jpg'), 'does not exist',
        r'train_dataloader\.dataset: .+/nowhere\.jpg does not exist'),
    Row('folders that are missing', lambda content: [image.update(file_name=f'x/{image["file_name"]}')
                                                     for image in content['images']], 'does not exist',
        r'train_dataloader\.dataset: .+/x/000001\.jpg does not exist, nor do 2 other files'),
]


# Of each image, by its id, the classes of its objects, where they are others than those of the file as it is.
CLASSES = {1: ['disk', 'square'], 2: ['triangle'], 3: ['star']}
ONE_PASSED_OVER = {**CLASSES, 1: ['square']}
OTHER_CLASSES = {
    'ids with gaps': {8: ['disk', 'square'], 11: ['triangle'], 14: ['star']},
    'crowd alone': {**CLASSES, 3: []},
    'image without annotations': {1: ['disk', 'square'], 2: ['triangle']},
    'box less than a pixel wide': {**CLASSES, 3: []},
    **dict.fromkeys(('box outside', 'box that is NaN', 'box without area', 'box turned inside out',
                     'polygon of two points', 'category that is unknown', 'image that is unknown',
                     'crowd that is a word'), ONE_PASSED_OVER),
}


def change(root, make):
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    make(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / 'data')


@pytest.mark.parametrize('row', ROWS, ids=ids(ROWS))
def test_annotation_file(row, root):
    path = change(root, row.make)
    if row.name == 'name in Unicode':
        (root / 'train/000001.jpg').rename(root / 'train/bild ä ☃.jpg')
    report = check_coco(path, root / 'train', workers=1)
    if row.check is HANDLED:
        assert report.clean, report.text()
    else:
        assert any(re.search(row.check, fault.reason) for fault in report.faults), report.text()
        assert all(fault.path == str(path) or fault.path.startswith(f'{root}/train/') for fault in report.faults)
    cfg = config('detector', root)
    if row.run is not HANDLED:
        with pytest.raises(LaunchError, match=row.run) as error:
            dataset = training_data(cfg)
            for i in range(len(dataset)):
                dataset[i]
        assert str(root) in str(error.value) and '\n' not in str(error.value)
        return
    dataset = training_data(cfg)
    found = {}
    for sample in map(dataset.__getitem__, range(len(dataset))):
        objects = sample['data_samples'].gt_instances
        assert objects.bboxes.tensor.isfinite().all()
        assert len(objects.bboxes) == len(objects.masks) == len(objects.labels)
        found[sample['data_samples'].img_id] = [NAMES[label] for label in objects.labels]
        if row.name == 'run lengths and polygons' and sample['data_samples'].img_id == 1:
            # At 160 x 160 instead of 64 x 64 pixels, where the borders are other pixels.
            np.testing.assert_allclose(objects.masks.areas / 2.5 ** 2, [600, 100], rtol=0.05)
    assert found == OTHER_CLASSES.get(row.name, CLASSES)


def test_images_without_objects_are_trained_on(root):
    """One with a crowd alone, and one without annotations, where the config keeps it."""
    def make(content):
        content['annotations'][2].update(iscrowd=1, segmentation=run_lengths([0, 0, SIZE, SIZE]))
        content['annotations'].pop()

    change(root, make)
    cfg = config('detector', root, **{'train_dataloader.dataset.filter_cfg': None})
    dataset = training_data(cfg)
    data = pseudo_collate([dataset[i] for i in range(3)])
    assert [len(sample.gt_instances) for sample in data['data_samples']] == [2, 0, 0]
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        for kept in [0, 1, 2], [1, 2]:
            batch = {key: [values[i] for i in kept] for key, values in data.items()}
            total, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode='loss'))
            total.backward()
            assert total.isfinite()
            assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


PLACES = [(key, index, name) for key, index, names in (
    ('images', 0, ('id', 'file_name', 'width', 'height')), ('categories', 0, ('id', 'name')),
    ('annotations', 0, ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'))) for name in names]
VALUES = st.one_of(
    st.sampled_from([None, True, '', 'a', [], {}, NAN, float('inf'), -1, 0, 1, 2, 1.5, 10**30, -1e308, [[]], [NAN] * 4,
                     [1] * 4, dict(size=[SIZE, SIZE], counts=''), dict(size=[0, 0], counts=[]), dict(counts='a')]),
    st.lists(st.floats(-100, 100), min_size=4, max_size=4))


@settings(max_examples=25, deadline=None)
@given(places=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_what_the_check_passes_is_trained_on(places, source, tmp_path_factory):
    """And whatever is wrong, the check ends with a report, and a training with a line."""
    original = json.loads((source / 'annotations/instances_train.json').read_text())
    content = copy.deepcopy(original)
    for (key, index, name), value in places:
        content[key][index][name] = value
    path = tmp_path_factory.getbasetemp() / 'annotations.json'
    path.write_text(json.dumps(content))
    report = check_coco(path, source / 'train', workers=1)
    cfg = config('detector', source, **{'train_dataloader.dataset.ann_file': str(path)})
    try:
        dataset = training_data(cfg)
        for i in range(len(dataset)):
            dataset[i]
    except LaunchError as error:
        assert not report.clean or 'no image to use' in str(error), error
