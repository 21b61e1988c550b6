"""Small data sets of every form, and what tests of their checks share."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.datasets.check import Report, check_ade20k, check_coco, check_imagenet

TOOL = Path(__file__).parents[2] / 'tools' / 'check_dataset.py'
MAKERS = {'coco': make_shapes_coco, 'ade20k': make_shapes_ade20k, 'imagenet': make_shapes_imagenet}
NUM_TRAIN, SIZE = 12, 64


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Path:
    """A set of each form, not to be changed."""
    folder = tmp_path_factory.mktemp('clean')
    for form, make in MAKERS.items():
        make(folder / form, NUM_TRAIN, 6, SIZE)
    return folder


@pytest.fixture
def root(clean, tmp_path) -> Path:
    """A copy to plant faults in."""
    return shutil.copytree(clean, tmp_path / 'data')


def arguments(form: str, root: Path) -> list[str]:
    return {'coco': [str(root / 'coco/annotations/instances_train.json'), str(root / 'coco/train')],
            'ade20k': [str(root / 'ade20k/images/training'), str(root / 'ade20k/annotations/training')],
            'imagenet': [str(root / 'imagenet/train')]}[form]


def check(form: str, root: Path) -> Report:
    if form == 'ade20k':
        return check_ade20k(*arguments(form, root), num_classes=6, workers=1)
    return {'coco': check_coco, 'imagenet': check_imagenet}[form](*arguments(form, root), workers=1)


def edit(root: Path, change: Callable[[dict], None]) -> str:
    """Changes the annotation file and returns its path."""
    path = root / 'coco/annotations/instances_train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


def the_fault(report: Report, path: str | Path, kind: str, *words: str) -> None:
    """Asserts that there is one fault and that it is this one."""
    assert [fault.kind for fault in report.faults] == [kind], report.text()
    assert report.faults[0].path == str(path)
    for word in words:
        assert word in report.faults[0].reason


IMAGES = {'coco': 'coco/train/000002.jpg', 'ade20k': 'ade20k/images/training/000002.jpg',
          'imagenet': 'imagenet/train/square/000002.jpg'}


@pytest.fixture
def listed(root) -> tuple[Path, Path]:
    """A folder with all images, and the list of their labels: mmpretrain's layout of ImageNet's validation set."""
    folder, ann_file = root / 'imagenet/val', root / 'imagenet/meta/val.txt'
    shutil.rmtree(folder)
    folder.mkdir()
    ann_file.parent.mkdir()
    lines = []
    for label, name in enumerate(sorted(SHAPE_CLASSES)):
        for path in sorted((root / 'imagenet/train' / name).iterdir()):
            shutil.copy(path, folder)
            lines.append(f'{path.name} {label}')
    ann_file.write_text('\n'.join(sorted(lines)) + '\n')
    return folder, ann_file
