"""Label maps that are odd or wrong: check_dataset and the loading of a training treat them alike."""
import re
import shutil

import numpy as np
import pytest
from hostile import HANDLED, Row, config, ids, training_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convneur_mm.datasets import make_shapes_ade20k
from convneur_mm.datasets.check import check_ade20k
from convneur_mm.engine.checks.data_files import DataError
from convneur_mm.engine.hooks.label_range import Allowed

pytestmark = pytest.mark.needs('mmseg')
SIZE, CLASSES = 64, 7


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return make_shapes_ade20k(tmp_path_factory.mktemp('labels') / 'data', num_train=3, num_val=2, image_size=SIZE)


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / 'data')


def stripes(highest=CLASSES - 1, dtype=np.uint8, size=(SIZE, SIZE)):
    """Values 0 to ``highest`` in columns."""
    return np.broadcast_to(np.linspace(0, highest, size[1]).round().astype(dtype), size)


def drawn(array, mode=None, **options):
    """Writes the label map of the second image."""
    def make(image, label):
        Image.fromarray(np.ascontiguousarray(array), mode).save(label, **options)
    return make


def with_palette(image, label):
    picture = Image.fromarray(np.ascontiguousarray(stripes()))
    picture.putpalette([255 - i // 3 for i in range(768)])
    picture.save(label)


def in_colours(mode):
    return lambda image, label: Image.fromarray(np.ascontiguousarray(stripes())).convert(mode).save(label)


def turned(size):
    def make(image, label):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new('RGB', (40, 24)).save(image, exif=exif)
        Image.new('L', size).save(label)
    return make


def cut_off(image, label):
    label.write_bytes(label.read_bytes()[:-30])


# ``make`` takes the paths of an image and its label map.
ROWS = [
    Row('all values', drawn(stripes())),
    Row('ignored pixels', drawn(np.where(stripes() == 3, 255, stripes()).astype(np.uint8))),
    Row('ignored pixels alone', drawn(np.full((SIZE, SIZE), 255, np.uint8))),
    Row('palette', with_palette),
    Row('image turned by EXIF, label map as it is seen', turned((24, 40))),
    Row('image turned by EXIF, label map as it is stored', turned((40, 24)),
        r'is 40 x 24 .*, its image 24 x 40 after the turn that its EXIF orientation asks for',
        r'000002\.png is 40 x 24 \(width x height\), its image .+000002.jpg 24 x 40'),
    Row('of another size', drawn(stripes(size=(SIZE // 2, SIZE // 2))), 'is 32 x 32 .*, its image 64 x 64',
        r'000002\.png is 32 x 32 \(width x height\), its image .+ 64 x 64'),
    Row('sides swapped', drawn(stripes(size=(SIZE - 8, SIZE))), 'is 64 x 56 .*, its image 64 x 64',
        r'000002\.png is 64 x 56 \(width x height\), its image .+ 64 x 64'),
    Row('colours', in_colours('RGB'), 'one channel of 8 bit, got mode RGB', 'one channel of 8 bit, got mode RGB'),
    Row('colours with alpha', in_colours('RGBA'), 'got mode RGBA', 'got mode RGBA'),
    Row('grey with alpha', in_colours('LA'), 'got mode LA', 'got mode LA'),
    Row('16 bit', drawn(stripes(300, np.uint16)), 'got mode I;16', 'got mode I;16'),
    Row('black and white', in_colours('1'), 'got mode 1', 'got mode 1'),
    Row('floating-point numbers', drawn(stripes().astype(np.float32), format='TIFF'), 'got mode F', 'got mode F'),
    Row('JPEG', drawn(stripes(), format='JPEG'), 'is JPEG, which changes labels', 'is JPEG, which changes labels'),
    # The first batch is looked at, not each one.
    Row('value over the number of classes', drawn(stripes(CLASSES)), r'has values above 6: 7 \(\d+ pixels\)', 'value'),
    Row('cut off', cut_off, 'does not decode: .*truncated', r'000002\.png cannot be used: LoadAnnotations raised'),
    Row('empty', lambda image, label: label.write_bytes(b''), 'is empty',
        r'000002\.png cannot be used: LoadAnnotations raised'),
    Row('missing', lambda image, label: label.unlink(), 'has no label map',
        r'train_dataloader\.dataset: .+000002\.png does not exist'),
    Row('without image', lambda image, label: image.unlink(), 'has no image', HANDLED),
]


@pytest.mark.parametrize('row', ROWS, ids=ids(ROWS))
def test_label_map(row, root):
    image, label = root / 'images/training/000002.jpg', root / 'annotations/training/000002.png'
    row.make(image, label)
    report = check_ade20k(image.parent, label.parent, CLASSES, workers=1, reduce_zero_label=False)
    if row.check is HANDLED:
        assert report.clean, report.text()
    else:
        fault, = report.faults
        assert fault.path == str(image if row.name == 'missing' else label)
        assert re.search(row.check, fault.reason)
    cfg = config('segmentor', root)
    if row.run is HANDLED or row.run == 'value':
        dataset = training_data(cfg)
        samples = [dataset[i] for i in range(len(dataset))]
        assert len(samples) == (2 if row.name == 'without image' else 3)
        wrong = [Allowed('head', CLASSES, 255).wrong(sample['data_samples'].gt_sem_seg.data) for sample in samples]
        assert wrong == [[], [CLASSES] if row.run == 'value' else [], []][:len(wrong)]
        for sample in samples:
            assert sample['inputs'].shape[1:] == sample['data_samples'].gt_sem_seg.shape
    else:
        with pytest.raises(DataError, match=row.run) as error:
            dataset = training_data(cfg)
            for i in range(len(dataset)):
                dataset[i]
        assert str(label) in str(error.value) and '\n' not in str(error.value)


MODES = ('1', 'L', 'P', 'LA', 'RGB', 'I;16', 'F')


@settings(max_examples=20, deadline=None)
@given(mode=st.sampled_from(MODES), width=st.sampled_from([SIZE, 30]), value=st.integers(0, 255))
def test_what_the_check_passes_is_loaded_as_it_is(mode, width, value, source):
    image, label = source / 'images/training/000002.jpg', source / 'annotations/training/000002.png'
    before = label.read_bytes()
    try:
        picture = Image.new(mode, (width, SIZE), value) if mode in ('L', 'P') else Image.new(mode, (width, SIZE))
        if mode == 'P':
            picture.putpalette([i // 3 for i in range(768)])
        picture.save(label, 'TIFF' if mode == 'F' else 'PNG')
        report = check_ade20k(image.parent, label.parent, CLASSES, workers=1, reduce_zero_label=False)
        try:
            loaded = training_data(config('segmentor', source))[1]['data_samples'].gt_sem_seg.data.unique().tolist()
        except DataError:
            assert not report.clean
        else:
            assert loaded == [value]
            assert report.clean == (value < CLASSES or value == 255)
    finally:
        label.write_bytes(before)
