"""Predictions for files and arrays: those of a test, in order, and independent of each other."""
import copy
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from tiny_models import CONFIGS, save_weights, separated, tiny_model

from convneur_mm.apis import ImageError, inference, iter_inference
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.runner.quiet_console import QuietRunner

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
TASKS = tuple(CONFIGS)
MAKERS = dict(detector=make_shapes_coco, segmentor=make_shapes_ade20k, classifier=make_shapes_imagenet)
SIZES = ((40, 64), (64, 40), (40, 64), (64, 64), (64, 40))


@pytest.fixture(scope='module')
def models():
    torch.manual_seed(2)  # with others, a proposal close to a threshold may depend on the batch
    return {task: separated(tiny_model(task)) for task in TASKS}


@pytest.fixture(scope='module')
def pictures():
    """Arrays of three sizes."""
    return [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)]


def values(sample):
    """What a data sample predicts, as tensors."""
    if 'pred_instances' in sample:
        found = sample.pred_instances
        return [found.bboxes, found.scores, found.labels, found.masks]
    return [sample.seg_logits.data, sample.pred_sem_seg.data] if 'pred_sem_seg' in sample else [
        sample.pred_score, sample.pred_label]


def assert_equal(found, expected, **tolerance):
    for one, other in zip(values(found), values(expected), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other).cpu(), **tolerance)


class Keep(Hook):
    def __init__(self):
        self.samples = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.samples += outputs


@pytest.mark.parametrize('task', TASKS)
def test_predictions_are_those_of_a_test(task, models, tmp_path):
    """Of the same files by a Runner, elsewhere and without their annotations."""
    root = MAKERS[task](tmp_path / 'data', num_train=6, num_val=6, image_size=64)
    model = models[task]
    cfg = copy.deepcopy(model.cfg)
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.data_root = str(root)
    if 'ann_file' in cfg.test_evaluator:
        cfg.test_evaluator.ann_file = str(root / cfg.test_dataloader.dataset.ann_file)
    cfg.update(work_dir=str(tmp_path / 'work'), experiment_name=task, runner_type='Runner',
               load_from=str(save_weights(model, tmp_path / 'x.pth')))
    runner, keep = QuietRunner.from_cfg(cfg), Keep()
    runner.register_hook(keep)
    runner.test()
    (tmp_path / 'elsewhere').mkdir()
    paths = [shutil.copy(sample.img_path, tmp_path / 'elsewhere' / f'{i}.jpg') for i, sample in enumerate(keep.samples)]
    found = inference(model, paths)
    assert len(found) == len(paths) == 6
    for path, one, expected in zip(paths, found, keep.samples, strict=True):
        assert one.img_path == str(path)
        assert_equal(one, expected)


@pytest.mark.parametrize('task', TASKS)
def test_order_and_values_do_not_depend_on_the_batch(task, models, pictures, monkeypatch):
    model = models[task]
    alone = inference(model, pictures)
    assert [sample.ori_shape for sample in alone] == list(SIZES)
    assert not torch.equal(values(alone[0])[0], values(alone[2])[0])
    batches, step = [], model.test_step
    monkeypatch.setattr(model, 'test_step', lambda data: batches.append(
        [tuple(image.shape) for image in data['inputs']]) or step(data))
    together = inference(model, iter(pictures), batch_size=4)
    assert [len(batch) for batch in batches] == ([4, 1] if task == 'classifier' else [2, 1, 1, 1])
    assert all(len(set(batch)) == 1 for batch in batches)
    for one, other in zip(together, alone, strict=True):
        assert one.ori_shape == other.ori_shape
        # Other kernels compute several pictures, and a box is decoded by three stages, each from the last one's.
        assert_equal(one, other, **(dict(rtol=1e-4, atol=1e-3) if task == 'detector' else {}))


@pytest.mark.parametrize('task', TASKS)
def test_arrays_are_predicted_as_the_files_that_hold_them(task, models, pictures, tmp_path):
    paths = [tmp_path / f'{i}.png' for i in range(2)]
    for path, picture in zip(paths, pictures, strict=False):
        cv2.imwrite(str(path), picture)
    for one, other in zip(inference(models[task], paths), inference(models[task], pictures[:2]), strict=True):
        assert one.metainfo.keys() == other.metainfo.keys()
        assert_equal(one, other)


def test_floats_of_a_loader_are_those_of_arrays_too(pictures, tmp_path):
    model = separated(tiny_model('classifier'))
    model.cfg.test_dataloader.dataset.pipeline[0].to_float32 = True
    cv2.imwrite(str(tmp_path / 'a.png'), pictures[0])
    one, other = iter_inference(model, [tmp_path / 'a.png', pictures[0]])
    for prediction in (one, other):
        assert prediction.picture.dtype == np.uint8
        assert np.array_equal(prediction.picture, pictures[0])
    assert_equal(one.sample, other.sample)
    # Resized before they are rounded, they are others than those of integers.
    model.cfg.test_dataloader.dataset.pipeline[0].to_float32 = False
    assert not torch.equal(inference(model, pictures[:1])[0].pred_score, one.sample.pred_score)


def test_given_arrays_are_not_written_to(models, pictures):
    before = [picture.copy() for picture in pictures]
    predictions = list(iter_inference(models['classifier'], pictures, 2))
    assert [prediction.index for prediction in predictions] == [0, 1, 2, 3, 4]
    for picture, prediction, copied in zip(pictures, predictions, before, strict=True):
        assert np.array_equal(picture, copied)
        assert np.array_equal(prediction.picture, copied)


def test_no_more_than_a_batch_is_taken_at_a_time(models, pictures):
    taken = []
    frames = (taken.append(i) or pictures[0] for i in range(100))
    for prediction in iter_inference(models['classifier'], frames, 3):
        assert len(taken) <= 3 * (prediction.index // 3 + 1)
        if prediction.index == 7:
            break
    assert len(taken) == 9


class TestUnreadable:
    @pytest.fixture
    def paths(self, pictures, tmp_path):
        cv2.imwrite(str(tmp_path / 'good.png'), pictures[0])
        (tmp_path / 'text.jpg').write_text('no picture')
        (tmp_path / 'empty.jpg').touch()
        (tmp_path / 'folder.jpg').mkdir()
        return [tmp_path / name for name in ('text.jpg', 'good.png', 'missing.jpg', 'empty.jpg', 'folder.jpg')]

    def test_is_named(self, models, paths):
        for path in paths:
            if path.stem != 'good':
                with pytest.raises(ImageError, match=f'^{path} '):
                    inference(models['classifier'], [path])

    def test_the_others_are_predicted(self, models, paths):
        errors = {}
        for batch_size in (1, 4):
            found = list(iter_inference(models['classifier'], paths, batch_size, errors.__setitem__))
            assert [prediction.index for prediction in found] == [1]
            assert sorted(errors) == [0, 2, 3, 4]
        assert str(errors[2]) == f'{paths[2]} does not exist'
        assert str(errors[4]) == f'{paths[4]} cannot be read: Is a directory'
        assert str(errors[0]) == f'{paths[0]} is no picture, or damaged'

    def test_a_loader_that_ignores_them_names_them_as_well(self, models, paths):
        model = copy.deepcopy(models['classifier'])
        model.cfg.test_dataloader.dataset.pipeline[0].ignore_empty = True
        with pytest.raises(ImageError, match=f'^{paths[2]} '):
            inference(model, paths[2:])


@pytest.mark.parametrize('array', [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8),
                                   np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_of_other_kinds_are_refused(array, models, pictures):
    with pytest.raises(ValueError, match=r'^image 1 must be an array \(height, width, 3\) of uint8, got \('):
        inference(models['classifier'], [pictures[0], array])


def test_other_arguments_are_refused(models, pictures):
    with pytest.raises(ValueError, match="images must be a list of paths or arrays, got 'a.jpg'"):
        inference(models['classifier'], 'a.jpg')
    with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
        inference(models['classifier'], pictures, 0)


@pytest.mark.parametrize('options', [
    {'test_dataloader.dataset.pipeline': [dict(type='PackInputs')]}, {'test_dataloader': None}])
def test_a_pipeline_that_loads_no_pictures_is_named(options, pictures):
    with pytest.raises(LaunchError, match=r'^test_dataloader.dataset.pipeline must begin with LoadImageFromFile, got '):
        inference(tiny_model('classifier', options=options), pictures)
