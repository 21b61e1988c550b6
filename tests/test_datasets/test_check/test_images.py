"""What all checks do alike: a clean set is clean, images are decoded as training will, paths and links are followed."""
import time

import cv2
import numpy as np
import pytest
from data_sets import IMAGES, MAKERS, NUM_TRAIN, SIZE, arguments, check, the_fault
from PIL import Image

from convneur_mm.datasets.check import check_ade20k, check_coco, check_imagenet


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


def test_one_worker_finds_the_same_as_many(root):
    (root / IMAGES['imagenet']).write_bytes(b'')
    (root / 'imagenet/train/star/000010.jpg').unlink()
    one, many = (check_imagenet(*arguments('imagenet', root), workers=workers) for workers in (1, 3))
    assert (one.faults, one.counts, one.images) == (many.faults, many.counts, many.images)
    assert len(one.faults) == 1


def test_a_file_is_no_folder(clean):
    with pytest.raises(NotADirectoryError, match='not a folder: .*shapes.json'):
        check_imagenet(clean / 'imagenet/shapes.json')
    with pytest.raises(FileNotFoundError, match='no such file: .*coco'):
        check_coco(clean / 'coco', clean / 'coco/train')
    with pytest.raises(ValueError, match='num_classes must be an integer from 1 to 254, got 0'):
        check_ade20k(*arguments('ade20k', clean), num_classes=0)
