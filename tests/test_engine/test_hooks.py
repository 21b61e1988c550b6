"""Hooks that compare class names before a test, and find names for pictures."""
import logging
from types import SimpleNamespace

import pytest
from mmengine import runner as loops

from convneur_mm.engine import ClassNamesHook
from convneur_mm.engine.hooks import _path_below_prefix

# By other names, as pytest would take the second for a class of tests.
VAL, TEST = loops.ValLoop, loops.TestLoop
# In the order of the file; neither by name nor by id.
CATEGORIES = [dict(id=7, name='cat'), dict(id=3, name='apple'), dict(id=40, name='bus')]


def runner(classes, categories=CATEGORIES, kind=TEST):
    loop = object.__new__(kind)
    coco = SimpleNamespace(dataset=dict(categories=categories))
    loop.evaluator = SimpleNamespace(metrics=[
        SimpleNamespace(), SimpleNamespace(_coco_api=None),
        SimpleNamespace(_coco_api=coco, dataset_meta=dict(classes=classes))])
    loop.dataloader = SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=classes)))
    val_loop, test_loop = (None, loop) if kind is TEST else (loop, dict(type='TestLoop'))
    return SimpleNamespace(_val_loop=val_loop, _test_loop=test_loop, test_loop=test_loop,
                           logger=logging.getLogger(__name__))


@pytest.mark.parametrize('kind', [VAL, TEST])
def test_classes_may_be_any_in_the_order_of_the_file(kind):
    for classes in (('cat', 'apple', 'bus'), ['cat', 'bus'], ('apple',)):
        ClassNamesHook().before_run(runner(classes, kind=kind))


@pytest.mark.parametrize('kind', [VAL, TEST])
def test_classes_in_another_order_than_the_files_are_refused(kind):
    """mmdet would take label 0 for the first of them in the file and call it by the first of the names."""
    with pytest.raises(ValueError, match=r'order of the annotation file, \(cat, bus\), whereas .* as \(bus, cat\)'):
        ClassNamesHook().before_run(runner(('bus', 'cat'), kind=kind))


def test_classes_that_are_not_in_the_file_are_refused():
    """mmdet would leave them out without a word, and number the others anew."""
    with pytest.raises(ValueError, match=r'no category \(dog\); it has \(cat, apple, bus\)'):
        ClassNamesHook().before_run(runner(('cat', 'dog', 'bus')))


def checkpoint(*classes):
    return dict(meta=dict(dataset_meta=dict(classes=classes)))


def test_a_checkpoint_of_the_same_classes_passes(caplog):
    ClassNamesHook().after_load_checkpoint(runner(['cat', 'bus']), checkpoint('cat', 'bus'))
    for without_names in (dict(), dict(meta=dict()), dict(meta=dict(dataset_meta=dict(palette=[])))):
        ClassNamesHook().after_load_checkpoint(runner(['cat', 'bus']), without_names)
    assert not caplog.records


@pytest.mark.parametrize('trained', [('cat', 'apple', 'bus'), ('cat',), ('bus', 'cat')])
def test_a_checkpoint_of_more_fewer_or_swapped_classes_is_refused(trained):
    with pytest.raises(ValueError, match=r'tells \(.*\) apart, but .* has the classes \(cat, bus\)'):
        ClassNamesHook().after_load_checkpoint(runner(('cat', 'bus')), checkpoint(*trained))


def test_other_names_are_worth_a_warning(caplog):
    ClassNamesHook().after_load_checkpoint(runner(('cat', 'bus')), checkpoint('n02121620', 'n02924116'))
    assert 'calls its classes (n02121620, n02924116), the test data set (cat, bus)' in caplog.text


def test_training_may_start_from_a_checkpoint_of_other_classes():
    ClassNamesHook().after_load_checkpoint(runner(('cat', 'bus'), kind=VAL), checkpoint('apple'))


@pytest.mark.parametrize('path, prefixes, name', [
    ('data/val/1.jpg', dict(img='data/val/'), '1.jpg'),
    ('data/val/cat/1.jpg', dict(img_path='data/val'), 'cat/1.jpg'),
    ('data/images/1.jpg', dict(seg_map_path='data/annotations', img_path='data/images'), '1.jpg'),
    ('elsewhere/1.jpg', dict(img='data/val'), '1.jpg'),
    ('data/val/1.jpg', dict(img_path=''), '1.jpg'),
])
def test_pictures_are_named_by_their_place_below_the_data_prefix(path, prefixes, name):
    assert _path_below_prefix(path, SimpleNamespace(data_prefix=prefixes)) == name


def test_pictures_of_joined_data_sets_are_named_by_their_files():
    assert _path_below_prefix('data/val/1.jpg', SimpleNamespace(datasets=[])) == '1.jpg'
