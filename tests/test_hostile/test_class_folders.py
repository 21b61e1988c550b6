"""Class folders and lists of images that are odd or wrong."""
import re
import shutil

import pytest
from hostile import HANDLED, Row, config, ids, training_data

from convneur_mm.datasets import make_shapes_imagenet
from convneur_mm.datasets.check import check_imagenet
from convneur_mm.datasets.own_data import FaultyDataError, OwnDataError, prepare
from convneur_mm.engine.files.errors import LaunchError

pytestmark = pytest.mark.needs('mmpretrain')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return make_shapes_imagenet(tmp_path_factory.mktemp('folders') / 'data', num_train=12, num_val=6, image_size=64)


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / 'data')


def renamed(**names):
    def make(train):
        for old, new in names.items():
            (train / old).rename(train / new)
    return make


def only(*names):
    def make(train):
        for folder in train.iterdir():
            if folder.name not in names:
                shutil.rmtree(folder)
    return make


def emptied(train):
    for path in (train / 'ring').iterdir():
        path.unlink()


def without_folders(train):
    for path in sorted(train.glob('*/*')):
        path.rename(train / path.name)
    for folder in train.iterdir():
        if folder.is_dir():
            folder.rmdir()


def beside(train):
    shutil.copy(next((train / 'ring').iterdir()), train / 'stray.jpg')


def deeper(train):
    (train / 'ring/more').mkdir()
    for path in (train / 'ring').glob('*.jpg'):
        path.rename(train / 'ring/more' / path.name)


def other_files(train):
    (train / 'ring/notes.txt').write_text('a note')


def hidden_files(train):
    (train / 'ring/._000001.jpg').write_bytes(b'of a Mac')


# ``make`` changes the folder of training images. ``run`` is how a training by the names of the folders ends.
ROWS = [
    Row('as they are', lambda train: None),
    Row('names with blanks', renamed(ring='a ring', disk='a round  disk ')),
    Row('names in Unicode', renamed(ring='Ринг', disk='диск ☃', star='ä')),
    Row('names with odd signs', renamed(ring="it's, [0] #1 %s {x}", disk='-disk', star='.5 star'[1:])),
    Row('subfolders', deeper),
    Row('hidden files', hidden_files),
    Row('a class without images', emptied, 'class folder without an image'),
    Row('other files', other_files, 'its name ends in none of'),
    Row('images beside the folders', beside, 'lies in no class folder'),
    Row('no folders', without_folders, 'holds no class folders', 'mmpretrain/datasets/custom|no images|classes'),
    Row('one class', only('ring'), HANDLED, HANDLED),
]


@pytest.mark.parametrize('row', ROWS, ids=ids(ROWS))
def test_class_folders(row, root, tmp_path):
    train = root / 'train'
    row.make(train)
    report = check_imagenet(train, workers=1)
    if row.check is HANDLED:
        assert report.clean, report.text()
    else:
        assert re.search(row.check, report.faults[0].reason)
        assert report.faults[0].path.startswith(str(train))
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    cfg = config('classifier', root, **{
        'train_dataloader.dataset.classes': names, 'model.head.num_classes': len(names)})
    cfg.data_preprocessor.num_classes = len(names)
    if row.run is not HANDLED:
        with pytest.raises(LaunchError, match=row.run) as error:
            training_data(cfg)
        assert '\n' not in str(error.value)
        return
    dataset = training_data(cfg)
    for sample in map(dataset.__getitem__, range(len(dataset))):
        path = sample['data_samples'].img_path
        assert path.split('train/')[1].startswith(names[int(sample['data_samples'].gt_label)] + '/')
    # The same folders for tools/train_custom.py, which lists the images.
    if row.check is not HANDLED or len(names) == 1:
        with pytest.raises(FaultyDataError if row.check else OwnDataError, match='has 1 fault|one class alone'):
            prepare('cls', train, tmp_path / 'own')
        return
    own = prepare('cls', train, tmp_path / 'own')
    assert own.classes == tuple(names)
    cfg.train_dataloader.dataset.update(
        ann_file=str(own.train.ann_file), data_prefix=str(own.train.images), data_root='')
    listed = training_data(cfg)
    assert len(listed) == own.train.count
    for i in range(len(listed)):
        info = listed.get_data_info(i)
        assert info['img_path'].split('train/')[1].startswith(names[int(info['gt_label'])] + '/')


def listed(text, encoding='utf-8'):
    return lambda path: path.write_bytes(text.encode(encoding))


LISTS = [
    Row('lines of Windows', listed('a b.jpg 0\r\nc.jpg 5\r\n')),
    Row('names with blanks', listed('a b.jpg 0\nc.jpg 5\n')),
    Row('without the last line break', listed('a b.jpg 0\nc.jpg 5')),
    Row('label over the number of classes', listed('a b.jpg 0\nc.jpg 6'), 'label must be below 6, got 6'),
    Row('label that is no number', listed('a b.jpg zero\nc.jpg 5'), "line 1 must be .*, got 'a b.jpg zero'",
        r'list\.txt cannot be read: ValueError: .*zero'),
    Row('label that is negative', listed('a b.jpg -1\nc.jpg 5'), "line 1 must be .*, got 'a b.jpg -1'"),
    Row('empty line', listed('a b.jpg 0\n\nc.jpg 5'), "line 2 must be .*, got ''",
        r'list\.txt cannot be read: ValueError'),
    Row('image twice', listed('a b.jpg 0\nc.jpg 5\nc.jpg 4'), 'line 3: c.jpg occurs before, with the label 5'),
    Row('image that is missing', listed('a b.jpg 0\nc.jpg 5\nd.jpg 4'), 'does not exist',
        r'train_dataloader\.dataset: .+/d\.jpg does not exist'),
    Row('empty', listed(''), 'names no image with a label', r'list\.txt'),
    Row('another encoding', listed('ä b.jpg 0\nc.jpg 5', 'latin-1'), 'is no text in UTF-8',
        r'list\.txt cannot be read: UnicodeDecodeError'),
    Row('marked as UTF-8', listed('\ufeffa b.jpg 0\nc.jpg 5'), 'does not exist', r'a b\.jpg does not exist'),
]


@pytest.mark.parametrize('row', LISTS, ids=ids(LISTS))
def test_list(row, source, tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    for name, old in (('a b.jpg', 'square/000002.jpg'), ('c.jpg', 'square/000002.jpg')):
        shutil.copy(source / 'train' / old, images / name)
    path = tmp_path / 'list.txt'
    row.make(path)
    report = check_imagenet(images, workers=1, ann_file=path, num_classes=6)
    if row.check is HANDLED:
        assert report.clean, report.text()
    else:
        assert any(re.search(row.check, fault.reason) for fault in report.faults), report.text()
    cfg = config('classifier', source)
    cfg.train_dataloader.dataset.update(ann_file=str(path), data_prefix=str(images), data_root='')
    if row.run is not HANDLED:
        with pytest.raises(LaunchError, match=row.run) as error:
            training_data(cfg)
        assert '\n' not in str(error.value)
    else:
        labels = {info['img_path'].rpartition('/')[2]: int(info['gt_label'])
                  for info in map(training_data(cfg).get_data_info, range(2))}
        assert labels.keys() == {'a b.jpg', 'c.jpg'}
        assert row.check is not HANDLED or labels == {'a b.jpg': 0, 'c.jpg': 5}
