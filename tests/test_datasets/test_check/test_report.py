"""What a check found, as a person reads it."""
import dataclasses
from pathlib import Path

import pytest
from data_sets import NUM_TRAIN, check

from convneur_mm.datasets.check import ClassCount, Fault, Report


def test_a_report_as_a_person_reads_it():
    """Classes fill two columns of a table as soon as there are more than ten; those that do not occur are named."""
    counts = [ClassCount(f'c{i}', i, pixels=10 * i) for i in range(12)]
    report = Report('data', images=50, counts=counts, notes=['a note'], seconds=2.0)
    assert report.text(width=80).splitlines() == [
        'data: 50 images, checked in 2.0 s (25 images/s)', '',
        '  class  images  pixels    class  images  pixels',
        '  c1          1   1.52%    c7          7  10.61%',
        '  c2          2   3.03%    c8          8  12.12%',
        '  c3          3   4.55%    c9          9  13.64%',
        '  c4          4   6.06%    c10        10  15.15%',
        '  c5          5   7.58%    c11        11  16.67%',
        '  c6          6   9.09%', '',
        'note: a note', 'note: classes that do not occur: 1 (c0)', '', 'no faults']
    assert report.text(width=48) == report.text(width=80)
    for width in (47, 10):
        assert report.text(width=width).splitlines()[2:5] == [
            '  class  images  pixels', '  c1          1   1.52%', '  c2          2   3.03%']
    report.counts = counts[1:11]
    assert report.text(width=80).splitlines()[2] == '  class  images  pixels'


def test_a_table_of_instances():
    counts = [ClassCount('a long name', 0, instances=1), ClassCount('b', 2, instances=30)]
    report = Report('data', images=3, counts=counts)
    assert report.text(width=80).splitlines() == [
        'data: 3 images, checked in 0.0 s', '', '  class        images  instances', '  a long name       0          1',
        '  b                 2         30', '', 'no faults']


def test_long_notes_are_broken_into_lines():
    report = Report('data', notes=['word ' * 12])
    assert report.text(width=30).splitlines()[2:-2] == ['note: word word word word word', '  word word word word word',
                                                       '  word word']


def test_the_commonest_faults_come_first():
    report = Report('data')
    for i, kind in enumerate(['rare', 'common', 'common']):
        report.add(Path(f'{i}.jpg'), kind, f'is {kind}')
    assert not report.clean
    assert report.text(max_shown=2).splitlines()[-4:] == [
        'faults: 3 (2 common, 1 rare)', '  0.jpg: is rare', '  1.jpg: is common', '  ... and 1 more']
    assert report.text(max_shown=3).splitlines()[-2:] == ['  1.jpg: is common', '  2.jpg: is common']


def test_more_faults_than_are_shown(root):
    for path in (root / 'coco/train').iterdir():
        path.unlink()
    report = check('coco', root)
    lines = report.text(max_shown=3).splitlines()
    assert lines[-5] == f'faults: {NUM_TRAIN} ({NUM_TRAIN} missing)'
    assert lines[-4:] == [f'  {root}/coco/train/{i:06d}.jpg: does not exist' for i in (1, 2, 3)] + [
        f'  ... and {NUM_TRAIN - 3} more']
    assert report.text(max_shown=NUM_TRAIN).endswith(f'{NUM_TRAIN:06d}.jpg: does not exist')


def test_shares_of_a_class_without_pixels():
    counts = [ClassCount('a', 1, pixels=0), ClassCount('b', 1, pixels=4)]
    assert Report('data', counts=counts).text(width=80).splitlines()[3:5] == [
        '  a           1    0.00%', '  b           1  100.00%']


@pytest.mark.parametrize('number', [dict(instances=3), dict(pixels=3)])
def test_a_table_of_one_class(number):
    title, = number
    assert Report('data', counts=[ClassCount('a', 1, **number)]).text(width=80).splitlines()[2].split() == [
        'class', 'images', title]


def test_an_empty_report():
    report = Report('data')
    assert report.text().splitlines() == ['data: 0 images, checked in 0.0 s', '', 'no faults']
    assert report.clean and report.images == 0


def test_ten_faults_are_shown():
    report = Report('data')
    for i in range(11):
        report.add(f'{i}.jpg', 'missing', 'does not exist')
    assert report.text().splitlines()[-2:] == ['  9.jpg: does not exist', '  ... and 1 more']


@pytest.mark.parametrize('part', [Fault('1.jpg', 'missing', 'does not exist'), ClassCount('disk', 3)])
def test_parts_of_a_report_do_not_change(part):
    """They are compared and counted."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.name = part.path = 'other'
    assert len({part, dataclasses.replace(part)}) == 1
