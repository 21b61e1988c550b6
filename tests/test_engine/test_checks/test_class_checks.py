"""A model and data that disagree on the classes are refused with one line before any data are read."""
import copy
import functools
import itertools
import json
import re
import shutil

import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config

import convneur_mm
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.checks.class_checks import check_classes, coco_categories
from convneur_mm.engine.files.errors import LaunchError

SHAPES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
FOLDERS = tuple(sorted(SHAPES))
TRAINING = ('train', 'val')


@functools.cache
def config(name, root):
    cfg = Config.fromfile(convneur_mm.config(name))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(root)
    for split in ('val', 'test'):
        if 'ann_file' in cfg[f'{split}_evaluator']:
            cfg[f'{split}_evaluator'].ann_file = str(root / 'annotations/instances_val.json')
    return cfg


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return make_shapes_coco(tmp_path_factory.mktemp('coco') / 'shapes', num_train=1, num_val=1, image_size=64)


@pytest.fixture
def detector(coco):
    return copy.deepcopy(config('cascade_rcnn_convneur_m1_shapes', coco))


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    return make_shapes_ade20k(tmp_path_factory.mktemp('ade20k') / 'shapes', num_train=1, num_val=1, image_size=64)


@pytest.fixture
def segmentor(ade20k):
    return copy.deepcopy(config('semantic_fpn_convneur_m1_shapes', ade20k))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return make_shapes_imagenet(tmp_path_factory.mktemp('imagenet') / 'shapes', num_train=6, num_val=6, image_size=64)


@pytest.fixture
def classifier(folders):
    return copy.deepcopy(config('convneur_m1_shapes', folders))


def message(cfg, splits=TRAINING):
    with pytest.raises(LaunchError) as error:
        check_classes(cfg, splits)
    assert '\n' not in str(error.value)
    return str(error.value)


def set_classes(cfg, classes, splits=TRAINING):
    for split in splits:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=classes)


def set_heads(cfg, number):
    for head in (*cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        head.num_classes = number


def test_the_shipped_configs_pass(detector, segmentor, classifier):
    for cfg in (detector, segmentor, classifier):
        check_classes(cfg, TRAINING)
        check_classes(cfg, ('test',))
    check_classes(Config.fromfile(convneur_mm.config('convneur_m1_300e_in1k')), TRAINING)
    check_classes(Config.fromfile(convneur_mm.config('upernet_convneur_m1_80k_ade20k')), TRAINING)


class TestDetectors:
    def test_classes_left_at_those_of_the_base(self, detector):
        for split in TRAINING:
            del detector[f'{split}_dataloader'].dataset.metainfo
        text = message(detector)
        assert text.startswith('train_dataloader.dataset.metainfo.classes, which is not set, has 80 classes (person, ')
        assert 'instances_train.json has no category (person, ' in text
        assert f'set metainfo.classes of all data sets to those that are to be found, such as {SHAPES}' in text

    @pytest.mark.parametrize('number', [1, 5, 7, 80])
    def test_too_many_or_few_in_all_heads(self, detector, number):
        set_heads(detector, number)
        keys = [*(f'model.roi_head.bbox_head[{i}]' for i in range(3)), 'model.roi_head.mask_head']
        assert message(detector) == (
            f'{", ".join(f"{key}.num_classes={number}" for key in keys)}, but '
            f'train_dataloader.dataset.metainfo.classes has 6 classes ({", ".join(SHAPES)}): set num_classes=6 there')

    def test_the_mask_head_alone(self, detector):
        detector.model.roi_head.mask_head.num_classes = 80
        assert message(detector).startswith('model.roi_head.mask_head.num_classes=80, but ')

    def test_one_of_the_box_heads(self, detector):
        detector.model.roi_head.bbox_head[2].num_classes = 5
        assert message(detector).startswith('model.roi_head.bbox_head[2].num_classes=5, but ')

    @pytest.mark.parametrize('model', [
        dict(type='RetinaNet', bbox_head=dict(type='RetinaHead', num_classes=80)),
        dict(type='SOLO', mask_head=dict(type='SOLOHead', num_classes=80)),
        dict(type='SoftTeacher', detector=dict(type='FasterRCNN', roi_head=dict(
            bbox_head=dict(type='Shared2FCBBoxHead', num_classes=80)))),
        dict(type='PointRend', roi_head=dict(point_head=dict(type='MaskPointHead', num_classes=80))),
    ])
    def test_other_models(self, detector, model):
        detector.model = {**model, 'rpn_head': dict(num_classes=1), 'semantic_head': dict(num_classes=183)}
        assert re.match(r'model\.[a-z_.]+_head\.num_classes=80, but ', message(detector))

    @pytest.mark.parametrize('split', TRAINING)
    def test_the_order_in_one_data_set(self, detector, split):
        swapped = ('square', 'disk', *SHAPES[2:])
        set_classes(detector, swapped, [split])
        text = message(detector)
        assert re.match(rf'mmdet numbers the classes in the order of .*instances_{split}\.json, \(disk, square, .* '
                        rf'whereas {split}_dataloader.dataset.metainfo.classes has them as \(square, disk, ', text)
        assert text.endswith(f'names would be swapped: set metainfo.classes={SHAPES} in all data sets')

    def test_some_of_the_files_categories(self, detector):
        set_classes(detector, ('disk', 'star'))
        set_heads(detector, 2)
        check_classes(detector, TRAINING)
        set_classes(detector, ['disk'], ['val'])
        assert message(detector) == (
            'train_dataloader.dataset.metainfo.classes has 2 classes (disk, star), '
            'val_dataloader.dataset.metainfo.classes has 1 class (disk): only the former has (star); set the same '
            'classes, in the same order, in all data sets')

    def test_a_test_on_some_of_the_models_classes(self, detector):
        set_classes(detector, ('disk', 'star'), ['test'])
        text = message(detector, ('test',))
        assert text.endswith('lists them anyway')
        assert 'test_evaluator.classwise=True' in text
        check_classes(detector, TRAINING)

    def test_wrapped_and_joined_data_sets(self, detector):
        inner = detector.train_dataloader.dataset
        wrong = {**inner, 'metainfo': dict(classes=('square', 'disk'))}
        for dataset, key in [
            (dict(type='RepeatDataset', times=2, dataset=wrong), 'dataset.dataset'),
            (dict(type='ClassBalancedDataset', oversample_thr=1, dataset=wrong), 'dataset.dataset'),
            (dict(type='ConcatDataset', datasets=[inner, wrong]), 'dataset.datasets[1]'),
        ]:
            detector.train_dataloader.dataset = dataset
            assert f' train_dataloader.{key}.metainfo.classes has them as (square, disk)' in message(detector)

    def test_categories_of_the_same_name(self, detector, tmp_path):
        """mmdet gives each a label, and the model has one too few."""
        names = (*detector.train_dataloader.dataset.metainfo.classes, 'star', 'other', 'other')
        path = tmp_path / 'x.json'
        path.write_text(json.dumps(dict(categories=[dict(id=i, name=name) for i, name in enumerate(names)])))
        detector.train_dataloader.dataset.ann_file = str(path)
        assert message(detector) == (f"{path} has several categories of the name 'star', which would have labels of "
                                     'their own: give them other names, or make one of them')

    def test_the_file_of_an_evaluator(self, detector, tmp_path):
        (tmp_path / 'other.json').write_text('{"categories": [{"id": 1, "name": "cat"}]}')
        detector.val_evaluator = [dict(type='CocoMetric', ann_file=str(tmp_path / 'other.json'))]
        assert message(detector).startswith('val_evaluator[0].ann_file: val_dataloader.dataset.metainfo.classes has 6 ')

    def test_names_in_a_file(self, detector, tmp_path):
        (tmp_path / 'names.txt').write_text('\n'.join(SHAPES))
        set_classes(detector, str(tmp_path / 'names.txt'))
        check_classes(detector, TRAINING)
        (tmp_path / 'names.txt').write_text('\n'.join(SHAPES[::-1]))
        assert 'names would be swapped' in message(detector)

    def test_a_forgotten_comma(self, detector):
        """('disk') is a string, whose letters mmdet would take for four classes."""
        set_classes(detector, 'disk')
        assert message(detector) == ("train_dataloader.dataset.metainfo.classes: 'disk' is neither a list of names nor "
                                     "a file with one name a line; for a single class set ('disk', )")

    def test_what_is_not_known_passes(self, detector):
        detector.train_dataloader.dataset.type = detector.val_dataloader.dataset.type = 'NoSuchDataset'
        for split in TRAINING:
            del detector[f'{split}_dataloader'].dataset.metainfo
        detector.val_evaluator.type = 'NoSuchMetric'
        check_classes(detector, TRAINING)
        check_classes(Config(dict(model=dict(type='Unknown', head=None, neck=[dict(type='x')]))), TRAINING)

    def test_behind_what_is_not_known(self, detector):
        wrong = {**detector.train_dataloader.dataset, 'metainfo': dict(classes=('square', 'disk'))}
        detector.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[dict(type='NoSuchDataset'), wrong])
        assert 'names would be swapped' in message(detector)

    def test_data_sets_of_own_code_pass(self, detector):
        """A subclass may number the categories in its own way. Types may be classes, not names alone."""
        class Own(CocoDataset):
            pass

        set_classes(detector, SHAPES[::-1])
        detector.val_evaluator.type = 'CocoPanopticMetric'
        for split in TRAINING:
            detector[f'{split}_dataloader'].dataset.type = Own
        assert 'names would be swapped' in message(detector)
        Own.load_data_list = lambda self: []
        check_classes(detector, TRAINING)

    def test_files_on_other_machines_pass(self, detector):
        for split in TRAINING:
            detector[f'{split}_dataloader'].dataset.backend_args = dict(backend='petrel')
        detector.val_evaluator.pop('ann_file')
        check_classes(detector, TRAINING)

    def test_an_evaluators_file_alone(self, detector, tmp_path):
        (tmp_path / 'other.json').write_text('{"categories": [{"id": 1, "name": "cat"}]}')
        detector.test_evaluator.ann_file = str(tmp_path / 'other.json')
        assert message(detector, ('test',)).startswith('test_evaluator.ann_file: test_dataloader.dataset.metainfo.')
        detector.test_dataloader.dataset = dict(type='NoSuchDataset')
        check_classes(detector, ('test',))

    def test_a_test_on_more_than_the_models_classes(self, detector):
        """That is no choice, but a mistake."""
        set_heads(detector, 5)
        assert message(detector, ('test',)).endswith(': set num_classes=6 there')
        detector.model.roi_head.mask_head.num_classes = 7
        assert message(detector, ('test',)).endswith('lists them anyway')
        assert message(detector, ('train', 'test')).endswith(': set num_classes=6 there')

    def test_without_a_model_nothing_is_compared(self, detector):
        set_classes(detector, ('no', 'such'))
        detector.model = None
        check_classes(detector, TRAINING)

    @pytest.mark.parametrize('count, expected', [
        (1, "('c0',)"), (2, "('c0', 'c1')"), (12, "(" + ', '.join(f"'c{i}'" for i in range(12)) + ')'),
        (13, "(" + ', '.join(f"'c{i}'" for i in range(12)) + ', …)')])
    def test_the_advice_can_be_copied(self, detector, tmp_path, count, expected):
        path = tmp_path / 'x.json'
        path.write_text(json.dumps(dict(categories=[dict(id=i, name=f'c{i}') for i in range(count)])))
        detector.train_dataloader.dataset.ann_file = str(path)
        assert f'such as {expected}, and num_classes' in message(detector)

    def test_models_that_read_the_names_pass(self, detector):
        set_heads(detector, 256)
        detector.model.language_model = dict(type='BertModel')
        check_classes(detector, TRAINING)


class TestSegmentors:
    @pytest.mark.parametrize('number', [6, 8, 150])
    def test_each_head(self, segmentor, number):
        segmentor.model.auxiliary_head = [dict(type='FCNHead', num_classes=7), dict(type='FCNHead', num_classes=number)]
        text = message(segmentor)
        assert text.startswith(f'model.auxiliary_head[1].num_classes={number}, but train_dataloader.dataset.')
        segmentor.model.auxiliary_head = dict(type='FCNHead', num_classes=7)
        check_classes(segmentor, TRAINING)
        segmentor.model.decode_head.num_classes = number
        assert message(segmentor).startswith(f'model.decode_head.num_classes={number}, but ')

    def test_a_data_sets_own_classes_and_its_zero(self, segmentor):
        """ADE20K's label 0 is none of its 150 classes; the shapes' is one of seven."""
        for split in TRAINING:
            segmentor[f'{split}_dataloader'].dataset = dict(type='ADE20KDataset')
        assert message(segmentor).startswith(
            'model.decode_head.num_classes=7, but train_dataloader.dataset.metainfo.classes, which is not set, has 150 '
            'classes (wall, ')
        segmentor.model.decode_head.num_classes = 150
        check_classes(segmentor, TRAINING)
        for split in TRAINING:
            segmentor[f'{split}_dataloader'].dataset.reduce_zero_label = True
        check_classes(segmentor, TRAINING)

    def test_names_a_data_set_does_not_have(self, segmentor):
        for split in TRAINING:
            segmentor[f'{split}_dataloader'].dataset.type = 'ADE20KDataset'
        assert message(segmentor) == (
            'train_dataloader.dataset.metainfo.classes: ADE20KDataset has (wall, building, sky, floor, tree, ceiling, '
            '… 150 in all), and not (background, disk, square, triangle, star, ring, … 7 in all); for label maps of '
            "other classes set type='BaseSegDataset' in the data set")

    def test_the_order_in_the_validation(self, segmentor):
        names = list(segmentor.val_dataloader.dataset.metainfo.classes)
        set_classes(segmentor, [*names[:2], names[3], names[2], *names[4:]], ['val'])
        assert "label 2 is 'square' there and 'triangle' here; set the same classes" in message(segmentor)

    def test_some_of_a_data_sets_names(self, segmentor):
        for split in TRAINING:
            segmentor[f'{split}_dataloader'].dataset.type = 'ADE20KDataset'
        set_classes(segmentor, ('floor', 'wall'))
        segmentor.model.decode_head.num_classes = 2
        check_classes(segmentor, TRAINING)

    def test_a_name_twice(self, segmentor):
        set_classes(segmentor, ('soil', 'crop'), ['train'])
        set_classes(segmentor, ('soil', 'crop', 'crop'), ['val'])
        assert message(segmentor) == (
            'train_dataloader.dataset.metainfo.classes has 2 classes (soil, crop), val_dataloader.dataset.metainfo.'
            'classes has 3 classes (soil, crop, crop): a name is there twice; set the same classes, in the same order, '
            'in all data sets')

    @pytest.mark.parametrize('head, passes', [
        (dict(num_classes=2, out_channels=1), True), (dict(num_classes=2), True), (dict(num_classes=1), True),
        (dict(num_classes=3), False), (dict(num_classes=3, out_channels=3), False),
    ])
    def test_two_classes(self, segmentor, head, passes):
        set_classes(segmentor, ('background', 'crack'))
        segmentor.model.decode_head = head
        if passes:
            check_classes(segmentor, TRAINING)
        else:
            assert message(segmentor).startswith('model.decode_head.num_classes=3, but ')


class TestClassifiers:
    def test_the_head_and_the_preprocessor(self, classifier):
        classifier.model.head.num_classes = classifier.data_preprocessor.num_classes = 1000
        assert message(classifier).startswith(
            'model.head.num_classes=1000, data_preprocessor.num_classes=1000, but train_dataloader.dataset.classes has '
            '6 classes (cross, ')
        classifier.model.head.num_classes = 6
        assert message(classifier).startswith('data_preprocessor.num_classes=1000, but ')
        classifier.data_preprocessor = None
        classifier.model.data_preprocessor = dict(num_classes=5)
        assert message(classifier).startswith('model.data_preprocessor.num_classes=5, but ')

    def test_folders_are_counted_where_no_classes_are_set(self, classifier):
        for split in TRAINING:
            del classifier[f'{split}_dataloader'].dataset.classes
        check_classes(classifier, TRAINING)
        classifier.model.head.num_classes = 1000
        assert message(classifier).startswith(
            'model.head.num_classes=1000, but train_dataloader.dataset.classes, which is not set, has 6 classes (cro')

    def test_classes_and_folders(self, classifier):
        for split in TRAINING:
            classifier[f'{split}_dataloader'].dataset.classes = FOLDERS[:5]
        assert re.search(r'has 5 classes .*, whereas .*/train has 6 class folders .*: only the latter has '
                         r'\(triangle\); set train_dataloader.dataset.classes=\(\'cross\', ', message(classifier))
        for split in TRAINING:
            classifier[f'{split}_dataloader'].dataset.classes = SHAPES
        assert 'names would be swapped: set train_dataloader.dataset.classes=' in message(classifier)
        for split in TRAINING:
            classifier[f'{split}_dataloader'].dataset.classes = list('abcdef')
        check_classes(classifier, TRAINING)  # other names for the folders, as ImageNet has

    def test_train_and_val(self, classifier):
        """A folder that is missing in the validation shifts all labels behind it."""
        del classifier.train_dataloader.dataset['classes']
        classifier.val_dataloader.dataset = dict(
            type='CustomDataset', ann_file='val.txt', data_prefix='val', classes=FOLDERS[:5])
        assert 'only the former has (triangle); set the same classes' in message(classifier)

    @pytest.mark.parametrize('prefix', ['train', 'train/', dict(img_path='train')])
    def test_folders_by_their_prefix(self, classifier, prefix):
        classifier.train_dataloader.dataset.update(data_prefix=prefix, classes=FOLDERS[:5])
        assert 'train has 6 class folders' in message(classifier)

    @pytest.mark.parametrize('prefix', [None, '', dict(), dict(img_path=None)])
    def test_folders_without_a_prefix(self, classifier, folders, prefix):
        classifier.train_dataloader.dataset.update(
            data_root=str(folders / 'train'), data_prefix=prefix, classes=FOLDERS[:5])
        classifier.train_dataloader.dataset.pop('split', None)
        assert f' whereas {folders / "train"} has 6 class folders' in message(classifier)

    @pytest.mark.parametrize('changes', [
        dict(with_label=False), dict(split='test'), dict(data_prefix='nowhere'), dict(backend_args=dict(backend='s3')),
        dict(ann_file='list.txt')])
    def test_folders_that_are_not_numbered(self, classifier, changes):
        """Those without labels, not there or elsewhere, or listed in a file."""
        dataset = dict(type='CustomDataset', data_prefix='train', classes=SHAPES,
                       data_root=classifier.train_dataloader.dataset.data_root)
        classifier.train_dataloader.dataset = dataset
        assert 'names would be swapped' in message(classifier, ('train',))
        classifier.train_dataloader.dataset = {**dataset, **changes}
        check_classes(classifier, ('train',))

    def test_files_beside_the_folders(self, classifier, folders, tmp_path):
        shutil.copytree(folders / 'train', tmp_path / 'train')
        (tmp_path / 'train/notes.txt').touch()
        classifier.train_dataloader.dataset.data_root = str(tmp_path)
        check_classes(classifier, ('train',))

    def test_a_list_of_the_split(self, classifier, folders, tmp_path):
        shutil.copytree(folders, tmp_path / 'data')
        dataset = dict(type='ImageNet', data_root=str(tmp_path / 'data'), split='train', classes=SHAPES)
        classifier.train_dataloader.dataset = dataset
        assert 'names would be swapped' in message(classifier, ('train',))
        (tmp_path / 'data/meta').mkdir(exist_ok=True)
        (tmp_path / 'data/meta/train.txt').write_text('a.jpg 0')
        check_classes(classifier, ('train',))

    def test_imagenets_own_list(self, classifier, folders):
        """With meta/train.txt the folders are not numbered."""
        for split in TRAINING:
            classifier[f'{split}_dataloader'].dataset = dict(type='ImageNet', data_root=str(folders), split=split)
        assert 'has 1000 classes (tench' in message(classifier)
        assert 'train has 6 class folders' in message(classifier)


class TestCategories:
    LIST = [dict(id=7, name='cat'), dict(id=3, name='é "apple"'), dict(id=40, name='bus', supercategory='x')]
    NAMES = ('cat', 'é "apple"', 'bus')

    @pytest.mark.parametrize('indent', [None, 2])
    @pytest.mark.parametrize('content', [
        dict(images=[], categories=LIST),
        dict(categories=LIST, annotations=[dict(id=i) for i in range(20000)]),
        dict(images=[], annotations=[], categories=LIST, info='no "categories" here'),
        dict(categories=LIST, info={'categories': 'three'}),
        dict(categories=LIST, images=[{'categories': ['cat']}]),
        dict(categories=LIST, info=['categories']),
    ])
    def test_are_those_of_the_whole_file(self, content, indent, tmp_path):
        for ascii_only in (True, False):
            (tmp_path / 'x.json').write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), 'utf-8')
            assert coco_categories(str(tmp_path / 'x.json')) == self.NAMES

    def test_are_many(self, tmp_path):
        names = tuple(f'class {i}' for i in range(30000))  # over a megabyte
        content = dict(categories=[dict(id=i, name=name) for i, name in enumerate(names)])
        (tmp_path / 'x.json').write_text(json.dumps(content))
        assert coco_categories(str(tmp_path / 'x.json')) == names

    def test_the_rest_of_a_large_file_is_not_decoded(self, tmp_path):
        """That takes seconds for COCO's own, and here it cannot be done."""
        annotations = b'{"segmentation": [[239.97, 260.24, 222.04, 270.49]], "bbox": [1, 2, 3, 4], NOT JSON}, ' * 1000
        many = [dict(id=i, name=f'class {i}') for i in range(3000)]  # 100 kB
        for first, categories in itertools.product((True, False), (self.LIST, many)):
            parts = [b'"categories": ' + json.dumps(categories).encode(), b'"annotations": [' + annotations + b'{}]']
            (tmp_path / 'x.json').write_bytes(b'{' + b', '.join(parts if first else parts[::-1]) + b'}')
            assert coco_categories(str(tmp_path / 'x.json')) == tuple(category['name'] for category in categories)

    @pytest.mark.parametrize('content, expected', [
        ('', 'is not a JSON file, or damaged: '),
        ('{"categories": [{"id": 1', 'is not a JSON file, or damaged: '),
        ('<html>', 'is not a JSON file, or damaged: '),
        ('[]', "has no list 'categories' of objects with id and name"),
        ('{"images": []}', "has no list 'categories'"),
        ('{"categories": ["cat"]}', "has no list 'categories'"),
        ('{"categories": [{"id": 1}]}', "has no list 'categories'"),
        ('{"categories": [{"name": "cat"}]}', "has no list 'categories'"),
    ])
    def test_are_missing(self, content, expected, tmp_path):
        (tmp_path / 'x.json').write_text(content)
        with pytest.raises(LaunchError, match=rf'^.*x\.json {expected}'):
            coco_categories(str(tmp_path / 'x.json'))

    def test_share_an_id(self, tmp_path):
        """pycocotools keeps the last of them, and all objects are called by its name."""
        for other in 'cat', 'dog':
            categories = [dict(id=1, name='cat'), dict(id=2, name='bus'), dict(id=1, name=other)]
            (tmp_path / 'x.json').write_text(json.dumps(dict(categories=categories)))
            if other == 'cat':
                assert coco_categories(str(tmp_path / 'x.json')) == ('cat', 'bus', 'cat')
                continue
            with pytest.raises(LaunchError, match=r"x\.json has several categories of the id 1, 'cat' and 'dog': give "
                                                  'each an id of its own$'):
                coco_categories(str(tmp_path / 'x.json'))
