"""Images that are odd, damaged or dangerous: check_dataset, training and inference treat them alike."""
import io
import re
import resource
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from hostile import HANDLED, Row, built, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import Compose
from PIL import Image, ImageOps
from tiny_models import separated

from convneur_mm.apis import ImageError, inference, iter_inference
from convneur_mm.datasets.check import check_imagenet
from convneur_mm.datasets.check.images import decode_image
from convneur_mm.engine.checks.data_files import DataError, NamingPipeline

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')

SMOOTH = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), (48, 32),
                    interpolation=cv2.INTER_CUBIC)
COLOURS = Image.fromarray(SMOOTH)


def encoded(image=COLOURS, form='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def bomb(side):
    """A black PNG of side x side pixels; of 30 000 x 30 000 in a tenth of a megabyte."""
    rows = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b''.join(rows.compress(row * 100) for _ in range(side // 100)) + rows.flush()
    header = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def flat(height, width):
    return encoded(Image.new('RGB', (width, height), (10, 20, 30)))


def deep(form, image):
    return cv2.imencode(form, image)[1].tobytes()


def damaged(data, where):
    changed = bytearray(data)
    changed[where] ^= 255
    return bytes(changed)


def see_through():
    image = COLOURS.convert('RGBA')
    image.putalpha(0)
    return image


def files(data):
    return lambda path: path.write_bytes(data)


# ``make`` writes the file.
HANDLED_ROWS = [
    Row('one pixel', files(flat(1, 1))),
    Row('1 x 4000', files(flat(1, 4000))),
    Row('4000 x 1', files(flat(4000, 1))),
    Row('grey', files(encoded(COLOURS.convert('L')))),
    Row('grey with alpha', files(encoded(COLOURS.convert('LA')))),
    Row('black and white', files(encoded(COLOURS.convert('1')))),
    Row('palette', files(encoded(COLOURS.convert('P')))),
    Row('transparent everywhere', files(encoded(see_through()))),
    Row('grey of 16 bit', files(deep('.png', SMOOTH[..., 0].astype(np.uint16) * 257))),
    Row('colours of 16 bit', files(deep('.tif', SMOOTH.astype(np.uint16) * 257))),
    Row('CMYK', files(encoded(COLOURS.convert('CMYK'), 'JPEG', quality=95))),
    Row('progressive', files(encoded(form='JPEG', progressive=True))),
    Row('PNG called .jpg', files(encoded())),
    Row('WebP called .jpg', files(encoded(form='WEBP', lossless=True))),
    Row('EXIF that is none', files(encoded(form='JPEG', exif=b'Exif\0\0garbage'))),
    *(Row(f'EXIF orientation {number}', files(encoded(form='JPEG', exif=with_orientation(number))))
      for number in range(9)),
    Row('TIFF turned by its tag', files(encoded(form='TIFF', exif=with_orientation(6)))),
    Row('bytes after the end', files(encoded(form='JPEG') + b'of a camera')),
]
NO_PICTURE = 'is no picture, or damaged'
REFUSED_ROWS = [
    Row('empty file', files(b''), 'is empty', NO_PICTURE),
    Row('web page', files(b'<!DOCTYPE html>'), 'is no image', NO_PICTURE),
    Row('JPEG cut off', files(encoded(form='JPEG')[:-200]), 'does not decode: .*truncated', NO_PICTURE),
    Row('JPEG cut off by a byte', files(encoded(form='JPEG')[:-1]), 'does not decode: .*truncated', NO_PICTURE),
    Row('PNG cut off', files(encoded()[:-200]), 'does not decode: .*truncated', NO_PICTURE),
    Row('PNG without its end', files(encoded()[:-12]), 'does not decode', NO_PICTURE),
    Row('PNG with a wrong byte', files(damaged(encoded(), -40)), 'does not decode', NO_PICTURE),
    Row('decompression bomb', files(bomb(30000)), 'too large to be decoded .*900000000 pixels.*cut it into tiles',
        'too large to be decoded .*tiles'),
    Row('format of Pillow alone', files(encoded(form='PCX')), 'is PCX, which OpenCV cannot read',
        NO_PICTURE),
    Row('floating-point numbers', files(deep('.tif', SMOOTH[..., 0].astype(np.float32))),
        'OpenCV, and so training, cannot read this TIFF', NO_PICTURE),
    Row('folder', lambda path: path.mkdir(), HANDLED, 'Is a directory'),
    Row('link to itself', lambda path: path.symlink_to(path), 'Too many levels', 'Too many levels'),
    Row('link to nowhere', lambda path: path.symlink_to('nowhere'), 'does not exist', 'does not exist'),
]


def seen(path):
    """The pixels that a person sees, (H, W, 3) in BGR, by Pillow."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I;16'):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        # Without the mask, as if nothing were transparent.
        return np.array(image.convert('RGBA' if image.mode == 'RGBA' else 'RGB'))[..., 2::-1]


@pytest.fixture(scope='module')
def model():
    return separated(built('classifier'))


@pytest.fixture(scope='module')
def load():
    return NamingPipeline(Compose([dict(type='mmcv.LoadImageFromFile')]))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'data' / 'a class' / 'bild ä 1.jpg'
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize('row', HANDLED_ROWS, ids=ids(HANDLED_ROWS))
def test_handled(row, path, model, load):
    row.make(path)
    report = check_imagenet(path.parents[1], workers=1)
    assert report.clean, report.text()
    pixels = load(dict(img_path=str(path), sample_idx=0))['img']
    found, = iter_inference(model, [path])
    assert np.array_equal(found.picture, pixels)
    # What JPEG's colours are rounded to is up to the decoder.
    np.testing.assert_allclose(pixels.astype(int), seen(path), atol=2)
    assert decode_image(str(path))[1] == pixels.shape[1::-1] == found.sample.ori_shape[::-1]
    assert torch.equal(found.sample.pred_score, inference(model, [pixels])[0].pred_score)


@pytest.mark.parametrize('row', REFUSED_ROWS, ids=ids(REFUSED_ROWS))
def test_refused(row, path, model, load):
    row.make(path)
    report = check_imagenet(path.parents[1], workers=1)
    if row.check is HANDLED:
        assert not report.images
    else:
        fault, = report.faults
        assert fault.path == str(path)
        assert re.search(row.check, fault.reason)
    with pytest.raises(DataError, match=f'^{re.escape(str(path))} ') as error:
        load(dict(img_path=str(path), sample_idx=0))
    assert '\n' not in str(error.value)
    with pytest.raises(ImageError, match=f'^{re.escape(str(path))} .*{row.run}'):
        inference(model, [path])


def test_a_bomb_takes_no_memory(path, model, load):
    """30 000 x 30 000 pixels would be 2.7 gigabytes."""
    path.write_bytes(bomb(30000))
    assert path.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: inference(model, [path]), lambda: load(dict(img_path=str(path)))):
        with pytest.raises(ValueError, match='too large to be decoded'):
            read()
    assert decode_image(str(path))[0].kind == 'too large'
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_what_no_resize_can_do_is_named(tmp_path):
    """Segmentors, and detectors too, keep the ratio of the sides, which leaves no pixel of the shorter one."""
    model = built('segmentor')
    for size in (1, 4000), (4000, 1):
        (tmp_path / 'a.png').write_bytes(flat(*size))
        with pytest.raises(ImageError, match=rf'^{tmp_path}/a.png cannot be used: Resize raised error: OpenCV.*resize'):
            inference(model, [tmp_path / 'a.png'])
    with pytest.raises(ImageError, match='^image 0 cannot be used: Resize raised error: OpenCV'):
        inference(model, [np.zeros((1, 4000, 3), np.uint8)])


MODES = dict(PNG=('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'), JPEG=('L', 'RGB', 'CMYK'), BMP=('1', 'L', 'P', 'RGB'),
             TIFF=('L', 'RGB'), WEBP=('RGB', 'RGBA'), PPM=('L', 'RGB'))
KINDS = st.sampled_from([(form, mode) for form, modes in MODES.items() for mode in modes])


@settings(max_examples=80, deadline=None)
@given(kind=KINDS, width=st.integers(1, 40), height=st.integers(1, 40), orientation=st.integers(0, 9))
def test_the_check_knows_the_size_that_is_loaded(kind, width, height, orientation, tmp_path_factory, load):
    form, mode = kind
    path = tmp_path_factory.getbasetemp() / 'size'
    options = dict(exif=with_orientation(orientation)) if form in ('PNG', 'JPEG', 'TIFF', 'WEBP') else {}
    path.write_bytes(encoded(Image.new(mode, (width, height)), form, **options))
    fault, size, _ = decode_image(str(path))
    assert fault is None
    assert load(dict(img_path=str(path)))['img'].shape == (*size[::-1], 3)


WHOLE = {form: encoded(form=form) for form in ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP')}


def agree(data, form, folder, load):
    """What the check passes is loaded; returns the pixels, or None."""
    path = folder / 'damaged'
    path.write_bytes(data)
    fault = decode_image(str(path))[0]
    try:
        pixels = load(dict(img_path=str(path)))['img']
    except DataError as error:
        assert fault, error
        assert str(error).startswith(f'{path} ')
        return None
    return None if fault else pixels


@settings(max_examples=80, deadline=None)
@given(form=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 1, exclude_max=True))
def test_what_is_cut_off_is_refused_or_whole(form, share, tmp_path_factory, load):
    data, folder = WHOLE[form], tmp_path_factory.getbasetemp()
    pixels = agree(data[:int(share * len(data))], form, folder, load)
    assert pixels is None or np.array_equal(pixels, agree(data, form, folder, load))


@settings(max_examples=80, deadline=None)
@given(form=st.sampled_from(sorted(WHOLE)), places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
       value=st.integers(1, 255))
def test_what_the_check_passes_is_loaded(form, places, value, tmp_path_factory, load):
    data = bytearray(WHOLE[form])
    for place in places:
        data[int(place * len(data))] ^= value
    agree(bytes(data), form, tmp_path_factory.getbasetemp(), load)
