"""The checks of ADE20K's and ImageNet's layouts: every kind of fault is found and named."""
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_sets import NUM_TRAIN, SIZE, arguments, check, the_fault
from mmpretrain.datasets import ImageNet
from mmseg.datasets import ADE20KDataset
from PIL import Image

from convneur_mm.datasets import SHAPE_CLASSES
from convneur_mm.datasets.check import Report, check_ade20k, check_imagenet


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


def test_label_maps_that_are_jpeg(root):
    path = root / 'ade20k/annotations/training/000004.png'
    with Image.open(path) as label:
        label.load()
        label.save(path, 'JPEG')
    the_fault(check('ade20k', root), path, 'wrong label format', 'is JPEG, which changes labels')


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


def test_a_single_pixel_counts(root):
    paths = sorted((root / 'ade20k/annotations/training').iterdir())
    for path in paths:
        cv2.imwrite(str(path), np.zeros((SIZE, SIZE), np.uint8))
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[3, 4], label[5, 6] = 2, 255
    cv2.imwrite(str(paths[1]), label)
    report = check('ade20k', root)
    assert [(count.images, count.pixels) for count in report.counts] == [
        (NUM_TRAIN, NUM_TRAIN * SIZE**2 - 2), (0, 0), (1, 1), (0, 0), (0, 0), (0, 0), (0, 0)]
    assert report.notes == ['pixels of the value 255, which training ignores: 1, in 1 label maps']


@pytest.mark.parametrize('num_classes', [1, 254])
def test_as_few_and_as_many_classes_as_label_maps_can_have(root, num_classes):
    for path in (root / 'ade20k/annotations/training').iterdir():
        cv2.imwrite(str(path), np.full((SIZE, SIZE), num_classes, np.uint8))
    report = check_ade20k(*arguments('ade20k', root), num_classes=num_classes, workers=1)
    assert report.clean and not report.notes and len(report.counts) == num_classes + 1
    assert report.counts[-1].images == NUM_TRAIN
    with pytest.raises(ValueError, match='num_classes must be an integer from 1 to 254, got 255'):
        check_ade20k(*arguments('ade20k', root), num_classes=255)


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
    assert report.images == 0 and len(report.counts) == len(SHAPE_CLASSES)
    assert check_list(listed, None).counts == []


def test_a_list_of_one_image_and_the_label_0(listed):
    folder, ann_file = listed
    ann_file.write_text('000001.jpg 0')
    for path in folder.iterdir():
        if path.name != '000001.jpg':
            path.unlink()
    for num_classes in (None, 1):
        report = check_list(listed, num_classes)
        assert report.clean and [(count.name, count.images) for count in report.counts] == [('class 0', 1)]


def test_as_many_class_folders_as_the_model_has_classes(root):
    assert check_imagenet(*arguments('imagenet', root), workers=1, num_classes=6).clean
    the_fault(check_imagenet(*arguments('imagenet', root), workers=1, num_classes=7), root / 'imagenet/train',
              'wrong number of classes', 'holds 6 class folders, expected 7')


@pytest.mark.parametrize('num_classes', [0, 1.5, '6'])
def test_imagenet_refuses_a_number_of_classes_that_is_none(clean, num_classes):
    with pytest.raises(ValueError, match=f'num_classes must be an integer from 1 to 1000000, got {num_classes!r}'):
        check_imagenet(*arguments('imagenet', clean), num_classes=num_classes)


def test_imagenet_without_class_folders(root):
    kinds = [fault.kind for fault in check_imagenet(root / 'imagenet/train/disk').faults]
    assert kinds == ['no class folders', 'outside the class folders', 'outside the class folders']


def test_a_list_that_is_no_text(listed):
    listed[1].write_bytes('bild ä.jpg 0'.encode('latin-1'))
    report = check_imagenet(listed[0], workers=1, ann_file=listed[1])
    assert [(fault.path, fault.kind) for fault in report.faults] == [(str(listed[1]), 'no text')]
    assert "can't decode byte 0xe4" in report.faults[0].reason
