"""What all checks do alike: a clean set is clean, images are decoded as training will, paths and links are followed."""
import os
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from data_sets import IMAGES, MAKERS, NUM_TRAIN, SIZE, arguments, check, the_fault
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from convneur_mm.datasets.check import check_ade20k, check_coco, check_imagenet, images


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
    report = check(form, root)
    the_fault(report, named, kind, f'{SIZE + 5} x {SIZE}', f'{SIZE} x {SIZE}')
    assert 'EXIF' not in report.faults[0].reason


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


@pytest.mark.parametrize('workers', [0, 1025, 1.5, True])
def test_workers_are_from_1_to_1024(workers):
    assert [images.checked_workers(number) for number in (1, 1024)] == [1, 1024]
    with pytest.raises(ValueError, match=f'workers must be an integer from 1 to 1024, got {workers}'):
        images.checked_workers(workers)


def test_a_worker_for_each_core_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {2, 5, 7} if process == 0 else None, raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    assert images.checked_workers(None) == 3
    monkeypatch.delattr(os, 'sched_getaffinity')
    assert images.checked_workers(None) == 8
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert images.checked_workers(None) == 1


def save_turned(path: str, orientation: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (40, 24)).save(path, exif=exif)
    return path


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('orientation', range(10))
def test_sizes_of_turned_images_are_those_of_opencv(tmp_path, orientation, suffix):
    path = save_turned(str(tmp_path / f'1.{suffix}'), orientation)
    assert images.decode_image(path) == (None, cv2.imread(path).shape[1::-1], (40, 24))


def test_tiff_is_turned_by_both(tmp_path):
    path = save_turned(str(tmp_path / '1.tif'), 6)
    size = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR).shape[1::-1]
    assert images.decode_image(path)[:2] == (None, size)


def test_a_damage_that_pillow_passes_over(tmp_path):
    """The chunk that ends the file is missing."""
    path = tmp_path / '1.png'
    cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint8))
    assert images.decode_image(str(path))[0] is None
    path.write_bytes(path.read_bytes()[:-12])
    if cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) is None:  # not so in every version of OpenCV
        fault = images.decode_image(str(path))[0]
        assert fault.kind == 'unreadable'
        assert fault.reason == 'does not decode: OpenCV, and so training, cannot read this PNG (mode RGB of Pillow)'


def test_images_of_more_pixels_than_pillow_takes(tmp_path, monkeypatch):
    path = str(tmp_path / '1.png')
    Image.new('1', (400, 400)).save(path)
    assert images.too_large(path) is None and images.decode_image(path)[0] is None
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 70_000)
    for fault in images.too_large(path), images.decode_image(path)[0]:
        assert (fault.path, fault.kind) == (path, 'too large')
        assert fault.reason.endswith('140000 pixels): cut it into tiles')
    (tmp_path / 'text').write_text('no picture')
    assert images.too_large(str(tmp_path / 'text')) is images.too_large(str(tmp_path / 'missing')) is None


@pytest.mark.parametrize('mode, form, word', [
    ('L', 'PNG', None), ('P', 'PNG', None), ('L', 'TIFF', None), ('1', 'PNG', 'mode 1'), ('RGB', 'PNG', 'mode RGB'),
    ('I;16', 'PNG', 'mode I;16'), ('L', 'JPEG', 'is JPEG')])
def test_what_a_label_map_is(tmp_path, mode, form, word):
    Image.new(mode, (5, 4)).save(tmp_path / '1', form)
    with Image.open(tmp_path / '1') as label:
        reason = images.label_fault(label)
    assert reason is None if word is None else word in reason


def test_formats_that_opencv_does_not_turn(tmp_path):
    path = save_turned(str(tmp_path / '1.webp'), 6)
    if cv2.imread(path).shape[1::-1] == (40, 24):  # not so in every version of OpenCV
        assert images.decode_image(path) == (None, (40, 24), (40, 24))


@pytest.mark.parametrize('size, decoded', [((64, 40), (8, 5)), ((160, 16), (20, 2)), ((16, 160), (2, 20)),
                                           ((7, 5), (2, 2))])
def test_jpegs_are_decoded_at_an_eighth_of_their_size(tmp_path, monkeypatch, size, decoded):
    """In greys: half the time."""
    load, seen = JpegImageFile.load, []

    def spy(image):
        seen.append((image.mode, image.size))
        return load(image)

    Image.new('RGB', size).save(tmp_path / '1.jpg')
    monkeypatch.setattr(JpegImageFile, 'load', spy)
    assert images.decode_image(str(tmp_path / '1.jpg')) == (None, size, size)
    assert seen == [('L', decoded)]


def test_errors_of_damaged_images(tmp_path):
    empty, other = tmp_path / 'empty', tmp_path / 'other'
    empty.write_bytes(b'')
    other.write_bytes(b'1')
    for path, error, kind, reason in (
            (empty, FileNotFoundError('x'), 'missing', 'does not exist'),
            (empty, UnidentifiedImageError('x'), 'unreadable', 'is empty'),
            (other, UnidentifiedImageError('x'), 'unreadable', 'is no image'),
            (other, OSError('truncated'), 'unreadable', 'does not decode: truncated'),
            (other, EOFError(), 'unreadable', 'does not decode: EOFError')):
        fault = images.unreadable(str(path), error)
        assert (fault.path, fault.kind, fault.reason) == (str(path), kind, reason)


def test_files_under_a_folder(tmp_path):
    """As mmengine lists them: not those whose name starts with a dot, but those in such a folder."""
    for name in ('a.jpg', '.hidden', 'b/.c/d', 'b/.e'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('')
    assert sorted(images.files_under(tmp_path)) == ['a.jpg', 'b/.c/d']


def look(item: int) -> tuple:
    """What a worker sees; of a module, as workers find functions by name."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn('of Pillow', stacklevel=1)
    return item, os.getpid() != PARENT, signal.getsignal(signal.SIGINT), seen


PARENT = os.getpid()


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere workers would have to import this file')
def test_workers_ignore_signals_and_warnings(capfd):
    found = list(images.in_parallel(look, range(9), 2))
    assert found == [(i, True, signal.SIG_IGN, []) for i in range(9)]
    out, err = capfd.readouterr()
    assert not out and 'checking' in err and '9/9' in err


class Pool:
    """Stands in for the processes: notes how it is used and works in this one."""

    def __init__(self, workers, context, **options):
        self.used = {'workers': workers, 'context': context, **options}
        Pool.last = self

    def map(self, function, items, chunksize):
        self.used['chunksize'] = chunksize
        return map(function, items)

    def shutdown(self, **options):
        self.used['shutdown'] = options


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(images, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(images.multiprocessing, 'get_context', lambda method: method)
    return Pool


@pytest.mark.parametrize('items, workers, used, chunksize', [
    (1, 4, 1, 1), (7, 1, 1, 1), (80, 2, 2, 10), (255, 2, 2, 31), (5000, 2, 2, 32), (16, 3, 3, 1)])
def test_items_go_to_workers_in_chunks(pool, monkeypatch, items, workers, used, chunksize):
    """Of at most 32, and four or more for each worker, so that none is left with much when the others are done."""
    for platform, context in (('linux', 'fork'), ('darwin', None)):
        monkeypatch.setattr(images.sys, 'platform', platform)
        assert list(images.in_parallel(str, range(items), workers)) == [str(i) for i in range(items)]
        assert pool.last.used == dict(workers=used, context=context, initializer=images._start_worker,
                                      chunksize=chunksize, shutdown=dict(cancel_futures=True))


def test_nothing_to_do_starts_nothing(pool):
    pool.last = None
    assert list(images.in_parallel(str, [], 2)) == [] and pool.last is None


def test_an_error_ends_the_workers(pool):
    with pytest.raises(ValueError, match='invalid literal'):
        list(images.in_parallel(int, ['1', 'x'], 1))
    assert pool.last.used['shutdown'] == dict(cancel_futures=True)


@pytest.mark.parametrize('finished, speed, text', [(None, None, ''), (None, 7.4, '7 images/s'), (9, 7, '9 images/s')])
def test_the_rate_beside_the_progress_bar(finished, speed, text):
    task = SimpleNamespace(finished_speed=finished, speed=speed)
    assert images._RateColumn().render(task).plain == text
