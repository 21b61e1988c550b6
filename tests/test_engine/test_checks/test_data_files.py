"""Files of the data: looked for before a run, and named when one cannot be used."""
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, Compose, ConcatDataset, RepeatDataset
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import DataLoader

from convneur_mm.engine.checks.data_files import (
    CHECK,
    DataError,
    NamingPipeline,
    base_data_sets,
    check_samples,
    name_faulty_files,
    naming_annotations,
)
from convneur_mm.engine.files.errors import LaunchError


class Pictures(BaseDataset):
    """Of the files it is given, with boxes and masks as they are."""

    def __init__(self, infos, ann_file='list.json', pipeline=(), **kwargs):
        self.infos = infos
        super().__init__(ann_file=ann_file, pipeline=list(pipeline), metainfo=dict(classes=('a', 'b')), **kwargs)

    def load_data_list(self):
        return [dict(info) for info in self.infos]


class WithMask:
    with_mask = True

    def __call__(self, results):
        return results


def picture(path, **info):
    return dict(img_path=str(path), **info)


@pytest.fixture
def existing(tmp_path):
    path = tmp_path / 'a.png'
    Image.new('RGB', (5, 4)).save(path)
    return path


def error_of(dataset):
    try:
        check_samples(dataset, 'key')
    except DataError as error:
        return str(error)
    return None


class TestCheckSamples:
    def test_files_that_exist_pass(self, existing):
        assert error_of(Pictures([picture(existing), picture(existing)])) is None

    def test_missing_files_are_counted(self, existing, tmp_path):
        missing = picture(tmp_path / 'no.png'), picture(tmp_path / 'none/no.png')
        assert error_of(Pictures([picture(existing), missing[0]])) == (
            f'key: {tmp_path}/no.png does not exist, a file that list.json names; {CHECK}')
        assert error_of(Pictures([*missing, picture(existing), missing[0]])) == (
            f'key: {tmp_path}/no.png does not exist, nor do 2 other files that list.json names; {CHECK}')

    def test_several_images_of_one_sample_pass(self):
        assert error_of(Pictures([dict(img_path=['a.png', 'b.png'])])) is None

    def test_label_maps_are_looked_for(self, existing, tmp_path):
        labels = str(tmp_path / 'no.png')
        assert labels in error_of(Pictures([picture(existing, seg_map_path=labels)]))
        # mmseg lists the images of a folder, and takes it that each has a label map.
        assert error_of(Pictures([picture(existing, seg_map_path=labels)], ann_file='')) == (
            f'key: {labels} does not exist, a file that it names; {CHECK}')
        assert error_of(Pictures([picture(existing, seg_map_path=None)], ann_file='')) is None

    def test_listed_folders_are_not_looked_at_again(self, tmp_path):
        assert error_of(Pictures([picture(tmp_path / 'no.png')], ann_file='')) is None

    def test_paths_in_the_current_folder(self, existing, monkeypatch):
        monkeypatch.chdir(existing.parent)
        assert error_of(Pictures([picture('a.png')])) is None
        assert 'b.png does not exist' in error_of(Pictures([picture('b.png')]))

    def test_files_on_other_machines_pass(self, tmp_path):
        dataset = Pictures([picture(tmp_path / 'no.png')])
        dataset.backend_args = dict(backend='petrel')
        assert error_of(dataset) is None
        assert error_of(Pictures([picture('s3://bucket/no.png')])) is None

    def test_a_link_to_nowhere_is_no_file_but_a_name(self, tmp_path):
        """Folders are listed, files not opened: what is behind a name is told when it is loaded."""
        (tmp_path / 'link.png').symlink_to('nowhere')
        assert error_of(Pictures([picture(tmp_path / 'link.png')])) is None

    @pytest.mark.parametrize('box', [[1, float('nan'), 2, 2], [1, 1, float('inf'), 2]])
    def test_boxes_are_numbers(self, existing, box):
        sound = dict(bbox=[1, 1, 2, 2])
        assert error_of(Pictures([picture(existing, instances=[sound])])) is None
        assert error_of(Pictures([picture(existing, instances=[sound, dict(bbox=box)])])) == (
            f'key: {existing} has an object with the box {box}, in list.json; {CHECK}')

    def test_objects_have_masks_where_they_are_loaded(self, existing):
        infos = [picture(existing, instances=[dict(bbox=[1, 1, 2, 2], mask=[[1] * 6]), dict(bbox=[1, 1, 2, 2])])]
        assert error_of(Pictures(infos)) is None
        assert error_of(Pictures(infos, pipeline=[WithMask()])) == (
            f'key: {existing} has an object without a segmentation, in list.json, and the pipeline loads masks '
            f'(with_mask=True); {CHECK}')
        assert error_of(Pictures([picture(existing, instances=[infos[0]['instances'][0]])], pipeline=[WithMask()])
                        ) is None

    def test_no_images(self, existing):
        # MMEngine cannot serialise what is empty, and says it in its own way.
        empty = Pictures([], serialize_data=False)
        assert error_of(empty) == (
            'list.json has no image to use: it names none, or none that has an annotation of one of the classes and '
            'that filter_cfg of the data set leaves')
        for joined in [empty, Pictures([picture(existing)])], [Pictures([picture(existing)]), empty]:
            assert error_of(ConcatDataset(joined)) is None
        with pytest.raises(DataError, match=r'^a\.json has no image to use'), naming_annotations(
                dict(dataset=dict(ann_file='a.json'))):
            Pictures([])

    def test_data_sets_within_others(self, existing, tmp_path):
        wrong = Pictures([picture(tmp_path / 'no.png')])
        for dataset in RepeatDataset(wrong, 2), ConcatDataset([Pictures([picture(existing)]), wrong]):
            assert 'no.png does not exist' in error_of(dataset)

    def test_data_sets_of_other_kinds_pass(self):
        assert error_of([1, 2]) is None
        assert error_of(torch.utils.data.TensorDataset(torch.zeros(0))) is None
        assert list(base_data_sets(None)) == []


class Fails:
    def __call__(self, results):
        raise RuntimeError('two\nlines')


class FailsAsPlanned:
    def __call__(self, results):
        raise LaunchError('as planned')


class Gives:
    def __init__(self, value):
        self.value = value

    def __call__(self, results):
        return self.value


class TestNamingPipeline:
    @staticmethod
    def message(*transforms, **data):
        with pytest.raises(DataError) as error:
            NamingPipeline(Compose(list(transforms)))(data)
        return str(error.value)

    def test_does_what_the_pipeline_does(self):
        assert NamingPipeline(Compose([Gives(dict(a=1)), lambda results: dict(results, b=2)]))({}) == dict(a=1, b=2)
        assert NamingPipeline(Compose([Gives(None), Fails()]))({}) is None

    def test_errors_name_file_transform_and_place(self):
        assert re.fullmatch(
            r'x/a\.png cannot be used: Fails raised RuntimeError: two lines \(.*test_data_files\.py:\d+\)',
            self.message(Fails(), img_path='x/a.png'))
        assert self.message(Fails(), img_path=None, sample_idx=3).startswith('image 3 cannot be used: Fails ')

    def test_errors_of_label_maps_name_them(self):
        loader = type('LoadAnnotations', (Fails, ), {})()
        assert self.message(loader, img_path='a.jpg', seg_map_path='a.png').startswith('a.png cannot be used: ')
        assert self.message(loader, img_path='a.jpg', seg_map_path=None).startswith('a.jpg cannot be used: ')
        assert self.message(Fails(), img_path='a.jpg', seg_map_path='a.png').startswith('a.jpg cannot be used: ')

    def test_files_that_vanish(self, tmp_path):
        def read(results):
            return Path(results['img_path']).read_bytes()

        path = tmp_path / 'a.png'
        assert self.message(read, img_path=str(path)) == f'{path} cannot be used: it does not exist'

    def test_what_says_enough_stays(self):
        with pytest.raises(LaunchError, match='^as planned$'):
            NamingPipeline(Compose([FailsAsPlanned()]))(dict(img_path='a.png'))

    def test_sizes_are_looked_at_before_anything_is_decoded(self, tmp_path, monkeypatch):
        Image.new('1', (400, 400)).save(tmp_path / 'a.png')
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 70_000)
        assert re.fullmatch(rf'{tmp_path}/a\.png is too large to be decoded \(.*160000 pixels.*\): cut it into tiles',
                            self.message(Fails(), img_path=str(tmp_path / 'a.png')))


@pytest.mark.needs('mmseg')
class TestLabelMaps:
    @pytest.fixture
    def load(self, tmp_path):
        """Loads an image of 5 x 4 pixels and its label map, and resizes in between if asked to."""
        Image.new('RGB', (5, 4)).save(tmp_path / 'a.jpg')

        def load(label, resized=False, **options):
            label.save(tmp_path / 'a.png', **options)
            steps = [dict(type='mmcv.LoadImageFromFile'), *[dict(type='mmcv.Resize', scale=(10, 8))] * resized,
                     dict(type='mmseg.LoadAnnotations')]
            return NamingPipeline(Compose(steps))(dict(
                img_path=str(tmp_path / 'a.jpg'), seg_map_path=str(tmp_path / 'a.png'), reduce_zero_label=False,
                seg_fields=[]))['gt_seg_map']

        return load

    def test_one_channel_of_8_bit(self, load, tmp_path):
        assert np.array_equal(load(Image.new('L', (5, 4), 200)), np.full((4, 5), 200))
        for mode in 'RGB', 'I;16', '1':
            with pytest.raises(DataError, match=rf'^{tmp_path}/a\.png must have one .* got mode {mode} of Pillow; '):
                load(Image.new(mode, (5, 4)))
        with pytest.raises(DataError, match=rf'^{tmp_path}/a\.png is JPEG, which changes labels'):
            load(Image.new('L', (5, 4)), format='JPEG')

    @pytest.mark.parametrize('resized', [False, True])
    def test_the_size_of_the_image(self, load, resized, tmp_path):
        assert load(Image.new('L', (5, 4)), resized).shape == (4, 5)
        for size in (4, 5), (5, 3), (10, 8):
            with pytest.raises(DataError, match=re.escape(
                    f'{tmp_path}/a.png is {size[0]} x {size[1]} (width x height), its image {tmp_path}/a.jpg 5 x 4; ')):
                load(Image.new('L', size), resized)


def test_pipelines_within_wrappers_are_replaced_once(existing):
    one, other = Pictures([picture(existing)]), Pictures([picture(existing)])
    own = other.pipeline = type('Own', (Compose, ), {})([])
    for _ in range(2):
        name_faulty_files(ConcatDataset([one, other]))
    assert type(one.pipeline) is NamingPipeline and other.pipeline is own
    assert one.pipeline.transforms == []


def test_errors_come_out_of_workers_as_they_are(existing):
    """In one line, which torch hands over with the traceback."""
    dataset = Pictures([picture(existing)] * 2, pipeline=[Fails()])
    name_faulty_files(dataset)
    messages = []
    for workers in 0, 1:
        with pytest.raises(DataError) as error:
            next(iter(DataLoader(dataset, num_workers=workers)))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].startswith(f'{existing} cannot be used: ')
    assert str(pickle.loads(pickle.dumps(DataError('a b')))) == 'a b'


@pytest.mark.parametrize('loader, name', [
    (dict(dataset=dict(data_root='data', ann_file='a.json')), 'data/a.json'),
    (dict(dataset=dict(type='RepeatDataset', dataset=dict(data_root='data', ann_file='a.json'))), 'data/a.json'),
    (dict(dataset=dict(data_root='data')), 'data'), (dict(dataset=dict()), 'the data set'), (None, 'the data set')])
def test_errors_of_annotations_name_the_file(loader, name):
    def load_data_list():
        raise KeyError('x')

    with pytest.raises(DataError, match=rf'^{name} cannot be read: KeyError: .x. \(.+test_data_files\.py:\d+\)$'), \
            naming_annotations(loader):
        load_data_list()
    with pytest.raises(LaunchError, match='^as planned$'), naming_annotations(loader):
        raise LaunchError('as planned')
    with pytest.raises(KeyboardInterrupt), naming_annotations(loader):
        raise KeyboardInterrupt


@pytest.mark.parametrize('loader, named', [
    (dict(sampler=dict(type='NoSuchSampler')), 'NoSuchSampler'), (dict(batch_size='two'), 'batch_size')])
def test_other_errors_are_those_of_the_loader(loader, named, existing):
    """They are not of the annotations, whose file is none the wiser."""
    settings = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'))
    with pytest.raises(LaunchError, match=f'^a data loader cannot be built: .*{named}') as error, naming_annotations(
            dict(dataset=dict(ann_file='a.json'))):
        Runner.build_dataloader(dict(settings, dataset=Pictures([picture(existing)]), **loader))
    assert 'a.json' not in str(error.value) and error.value.__cause__ is not None


@TRANSFORMS.register_module()
class FailsAtTheSecond:
    def __call__(self, results):
        if results['sample_idx'] == 1:
            raise ValueError('of the second')
        return results


@pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
class TestTools:
    """Trainings and tests as the tools start them."""

    def test_a_missing_file_is_told_before_the_training(self, tiny_config, shapes, run, tmp_path):
        root = shutil.copytree(shapes / 'mmseg', tmp_path / 'data')
        missing = root / 'annotations/validation/000003.png'
        missing.unlink()
        cfg = tiny_config('semantic_fpn')
        cfg.val_dataloader.dataset.data_root = str(root)
        cfg.dump('config.py')
        assert run('train') == f'val_dataloader.dataset: {missing} does not exist, a file that it names; {CHECK}'

    def test_a_faulty_image_ends_a_training_by_its_name(self, tiny_config, run):
        """Which a worker of the data loader finds."""
        cfg = tiny_config('semantic_fpn')
        cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='FailsAtTheSecond'))
        cfg.train_dataloader.update(batch_size=6, num_workers=1)
        cfg.dump('config.py')
        assert re.fullmatch(r'.+/mmseg/images/training/\d+\.jpg cannot be used: FailsAtTheSecond raised ValueError: '
                            r'of the second \(.+:\d+\)', run('train'))
