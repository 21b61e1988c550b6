"""Own data are found in the layouts people have, split, and refused where they cannot be trained on."""
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_sets import check
from PIL import Image

from convneur_mm.datasets.own_data import FaultyDataError, OwnDataError, prepare, split

pytestmark = pytest.mark.needs('pycocotools')
NAMES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')


@pytest.fixture
def boxes(root) -> Path:
    """Shapes in COCO's form, with all pictures in one folder and one annotation file beside it."""
    folder = root / 'own'
    (folder / 'photos').mkdir(parents=True)
    content = json.loads((root / 'coco/annotations/instances_train.json').read_text())
    for image in content['images']:
        shutil.copy(root / 'coco/train' / image['file_name'], folder / 'photos')
    (folder / 'export.json').write_text(json.dumps(content))
    return folder


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def maps(tmp_path) -> Path:
    """Five pictures of two sizes in images/, and in masks/ a label map of each, with the values 0, 3 and 7."""
    for name in ('images', 'masks'):
        (tmp_path / 'fields' / name).mkdir(parents=True)
    for i in range(5):
        label = np.zeros((40, 64), np.uint8)
        label[:10] = 3
        label[10:20] = 7
        label[0, 0] = 255
        cv2.imwrite(str(tmp_path / f'fields/images/{i}.jpg'), np.full((40, 64, 3), 9 * i, np.uint8))
        cv2.imwrite(str(tmp_path / f'fields/masks/{i}_mask.png'), label)
    return tmp_path / 'fields'


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_names_of_coco_files_tell_the_splits(root, tmp_path):
    data = prepare('det', root / 'coco', tmp_path / 'out')
    assert data.classes == NAMES and data.has_masks and data.notes == []
    for name, part, count in (('train', data.train, 12), ('val', data.val, 6)):
        assert part == (root / f'coco/annotations/instances_{name}.json', root / 'coco' / name, None, count)
    assert not (tmp_path / 'out').exists()
    assert data.sizes == [(64, 64)] * 12
    content = json.loads(data.train.ann_file.read_text())
    assert len(data.boxes) == len(content['annotations'])
    assert data.boxes[0] * 64 == pytest.approx(content['annotations'][0]['bbox'][2:])


def test_a_file_of_all_pictures_beside_those_of_the_splits_is_passed_over(root, tmp_path):
    shutil.copy(root / 'coco/annotations/instances_train.json', root / 'coco/annotations/instances_trainval.json')
    assert prepare('det', root / 'coco', tmp_path / 'out').train.ann_file.name == 'instances_train.json'


def test_one_coco_file_is_split(boxes, tmp_path):
    before = {path: path.read_bytes() for path in boxes.rglob('*') if path.is_file()}
    data = prepare('det', boxes, tmp_path / 'out')
    assert {path: path.read_bytes() for path in boxes.rglob('*') if path.is_file()} == before
    assert (data.train.count, data.val.count) == (10, 2)
    whole = json.loads((boxes / 'export.json').read_text())
    parts = [json.loads(part.ann_file.read_text()) for part in (data.train, data.val)]
    names = [[image['file_name'] for image in part['images']] for part in parts]
    assert sorted(names[0] + names[1]) == sorted(image['file_name'] for image in whole['images'])
    assert sum(len(part['annotations']) for part in parts) == len(whole['annotations'])
    for part in parts:
        assert part['categories'] == whole['categories']
        assert [each['id'] for each in part['annotations']] == list(range(1, len(part['annotations']) + 1))
        assert {each['image_id'] for each in part['annotations']} <= {image['id'] for image in part['images']}
    assert data.train.images == data.val.images == boxes / 'photos'
    again = prepare('det', boxes / 'export.json', tmp_path / 'again')
    assert again.val.ann_file.read_bytes() == data.val.ann_file.read_bytes()


def test_categories_without_boxes_are_refused_unless_left_out(boxes, tmp_path):
    change(boxes / 'export.json', lambda content: content['categories'].insert(0, dict(id=99, name='things')))
    with pytest.raises(OwnDataError, match=r'categories without boxes in .*: things; .*--classes'):
        prepare('det', boxes, tmp_path / 'out')
    # In the order of the annotation file, as mmdet numbers them.
    data = prepare('det', boxes, tmp_path / 'out', ['ring', 'disk'])
    assert data.classes == ('disk', 'ring')
    content = json.loads(data.train.ann_file.read_text())
    ids = {category['id'] for category in content['categories'] if category['name'] in ('disk', 'ring')}
    assert len(data.boxes) == sum(each['category_id'] in ids for each in content['annotations'])
    with pytest.raises(OwnDataError, match='names blob, and the categories of .* are things, disk'):
        prepare('det', boxes, tmp_path / 'out', ['disk', 'blob'])


def test_the_last_word_of_a_path_tells_the_split(root, tmp_path):
    shutil.move(root / 'coco', root / 'own' / 'training pictures')
    data = prepare('det', root / 'own', tmp_path / 'out')
    assert (data.train.count, data.val.count) == (12, 6)


def test_anchors_are_not_fitted_to_crowds(root, tmp_path):
    whole = prepare('det', root / 'coco', tmp_path / 'out')
    change(root / 'coco/annotations/instances_train.json', lambda content: content['annotations'][0].update(
        iscrowd=1, segmentation=dict(size=[64, 64], counts=[0, 64 * 64])))
    data = prepare('det', root / 'coco', tmp_path / 'out')
    assert data.boxes.tolist() == whole.boxes[1:].tolist()


def test_boxes_alone(boxes, tmp_path):
    change(boxes / 'export.json', lambda content: [each.pop('segmentation') for each in content['annotations']])
    assert not prepare('det', boxes, tmp_path / 'out').has_masks


def test_splits_of_different_categories(root, tmp_path):
    change(root / 'coco/annotations/instances_val.json', lambda content: content['categories'].reverse())
    with pytest.raises(OwnDataError, match=r"instances_val.json has the categories \['cross'.*same order"):
        prepare('det', root / 'coco', tmp_path / 'out')


def test_several_files_of_which_none_is_for_training(boxes, tmp_path):
    shutil.copy(boxes / 'export.json', boxes / 'other.json')
    with pytest.raises(OwnDataError, match='several annotation files.*export.json.*other.json; give one of them'):
        prepare('det', boxes, tmp_path / 'out')
    assert prepare('det', boxes / 'other.json', tmp_path / 'out').train.count == 10


def test_no_images(boxes, tmp_path):
    shutil.rmtree(boxes / 'photos')
    with pytest.raises(OwnDataError, match=r'no images found: .*export.json names .*\.jpg'):
        prepare('det', boxes, tmp_path / 'out')


def test_faults_are_those_of_the_check(root, tmp_path):
    (root / 'coco/train/000001.jpg').write_bytes(b'x')
    with pytest.raises(FaultyDataError, match='has 1 fault') as caught:
        prepare('det', root / 'coco', tmp_path / 'out')
    assert caught.value.report.faults == check('coco', root).faults != []


@pytest.mark.parametrize('task, form, right', [
    ('det', 'ade20k', 'seg'), ('det', 'imagenet', 'cls'), ('seg', 'coco', 'det'), ('seg', 'imagenet', 'cls'),
    ('cls', 'coco', 'det'), ('cls', 'ade20k', 'seg')])
def test_the_right_task_is_named(clean, tmp_path, task, form, right):
    with pytest.raises(OwnDataError, match=rf'DATA: .*{form} has no .*; these look like data for --task {right}$'):
        prepare(task, clean / form, tmp_path / 'out')


@pytest.mark.parametrize('task', ['det', 'seg', 'cls'])
def test_data_that_are_not_there(tmp_path, task):
    with pytest.raises(OwnDataError, match='nowhere does not exist'):
        prepare(task, tmp_path / 'nowhere', tmp_path / 'out')
    (tmp_path / 'empty').mkdir()
    if task == 'det':
        (tmp_path / 'empty' / 'folder.json').mkdir()
    with pytest.raises(OwnDataError, match='empty has no [^;]*$'):
        prepare(task, tmp_path / 'empty', tmp_path / 'out')


def test_label_maps_with_any_values_become_classes(maps, tmp_path):
    data = prepare('seg', maps, tmp_path / 'out')
    assert data.classes == ('class 0', 'class 3', 'class 7') and data.suffixes == ('.jpg', '.png')
    assert (data.train.count, data.val.count) == (4, 1) and data.sizes == [(64, 40)] * 4
    assert sorted(lines(data.train.ann_file) + lines(data.val.ann_file)) == list('01234')
    for part in (data.train, data.val):
        assert part.images == maps / 'images'
        assert {path.stem for path in part.labels.iterdir()} == set(lines(part.ann_file))
        for path in part.labels.iterdir():
            label = np.asarray(Image.open(path))
            assert label[0, 0] == 255 and label[5, 5] == 1 and label[15, 5] == 2 and label[30, 5] == 0


def test_label_maps_with_names_stay_where_they_are(maps, tmp_path):
    names = [f'name {i}' for i in range(8)]
    data = prepare('seg', maps, tmp_path / 'out', names)
    assert data.classes == tuple(names) and data.suffixes == ('.jpg', '_mask.png')
    assert data.train.labels == maps / 'masks' and not (tmp_path / 'out/labels').exists()
    assert any('no label map has: name 1, name 2, name 4, name 5, name 6' in note for note in data.notes)
    with pytest.raises(FaultyDataError) as caught:
        prepare('seg', maps, tmp_path / 'out', names[:5])
    assert 'values above 4: 7 (640 pixels)' in caught.value.report.text(width=200)


def test_zero_may_be_no_class(clean, tmp_path):
    data = prepare('seg', clean / 'ade20k', tmp_path / 'out', NAMES, reduce_zero_label=True)
    assert data.classes == NAMES and (data.train.count, data.val.count) == (12, 6)
    name = lines(data.val.ann_file)[0]
    label = np.asarray(Image.open(clean / f'ade20k/annotations/validation/{name}.png')).astype(int)
    assert np.array_equal(np.asarray(Image.open(data.val.labels / f'{name}.png')), (label - 1) % 256)


def test_another_value_may_be_no_class(maps, tmp_path):
    """With names, and without, when the note says for which values to write them."""
    data = prepare('seg', maps, tmp_path / 'out', ignore_label=3)
    assert data.classes == ('class 0', 'class 7')
    assert any(re.search('values 0, 7, and add --classes FILE', note) for note in data.notes)
    for path in data.train.labels.iterdir():
        label = np.asarray(Image.open(path))
        assert label[0, 0] == label[5, 5] == 255 and label[15, 5] == 1 and label[30, 5] == 0
    named = prepare('seg', maps, tmp_path / 'named', [f'name {i}' for i in range(7)], ignore_label=3)
    assert not any('--classes' in note for note in named.notes)
    label = np.asarray(Image.open(next(named.train.labels.iterdir())))
    assert label[5, 5] == 255 and label[15, 5] == 6  # 7 is the seventh value without 3
    with pytest.raises(OwnDataError, match=r'--ignore-label 9: no label map .* the values are \[0, 3, 7, 255\]'):
        prepare('seg', maps, tmp_path / 'out', ignore_label=9)
    with pytest.raises(OwnDataError, match=r'values without a name: \[3\]; the 2 names are those of \[0, 1\]'):
        prepare('seg', maps, tmp_path / 'out', ['a', 'b'], ignore_label=7)


def test_masks_of_0_and_255_have_two_classes(maps, tmp_path):
    for path in (maps / 'masks').iterdir():
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(label == 3, 255, 0).astype(np.uint8))
    data = prepare('seg', maps, tmp_path / 'out', ['ground', 'crop'])
    assert data.classes == ('ground', 'crop') and any('255 is the second class' in note for note in data.notes)
    assert set(np.unique(Image.open(next(data.train.labels.iterdir())))) == {0, 1}


@pytest.mark.parametrize('value', [0, 255])
def test_empty_label_maps(maps, tmp_path, value):
    for path in (maps / 'masks').iterdir():
        cv2.imwrite(str(path), np.full((40, 64), value, np.uint8))
    with pytest.raises(OwnDataError, match=rf'masks have one class alone, or none: their values are \[{value}\]'):
        prepare('seg', maps, tmp_path / 'out')


def test_pictures_of_two_endings(maps, tmp_path):
    (maps / 'images/0.jpg').rename(maps / 'images/0.JPG')
    with pytest.raises(OwnDataError, match=r'end in .JPG, .jpg: mmseg takes one ending'):
        prepare('seg', maps, tmp_path / 'out')


def test_class_folders_of_both_splits(root, tmp_path):
    data = prepare('cls', root / 'imagenet', tmp_path / 'out')
    assert data.classes == tuple(sorted(NAMES)) and (data.train.count, data.val.count) == (12, 6)
    for part in (data.train, data.val):
        for line in lines(part.ann_file):
            name, label = line.rsplit(' ', 1)
            assert (part.images / name).is_file() and data.classes[int(label)] == name.split('/')[0]
    (root / 'imagenet/val/disk').rename(root / 'imagenet/val/moon')
    with pytest.raises(OwnDataError, match='val has class folders that .*train lacks: moon'):
        prepare('cls', root / 'imagenet', tmp_path / 'out')


def test_class_folders_are_split_by_class(root, tmp_path):
    folder = root / 'imagenet/train'
    for name in ('disk', 'ring'):
        first = next((folder / name).iterdir())
        for i in range(8):
            shutil.copy(first, folder / name / f'more {i}.jpg')
    data = prepare('cls', folder, tmp_path / 'out', ['ring', 'disk', 'star'])
    assert data.classes == ('ring', 'disk', 'star')
    for part, counts in ((data.train, (8, 8, 1)), (data.val, (2, 2, 1))):
        labels = [int(line.rsplit(' ', 1)[1]) for line in lines(part.ann_file)]
        assert tuple(labels.count(label) for label in range(3)) == counts
    assert not set(lines(data.train.ann_file)) & set(lines(data.val.ann_file))


def test_the_only_picture_of_a_class_folder_is_trained_on(root, tmp_path):
    folder = root / 'imagenet/train'
    for path in sorted((folder / 'star').iterdir())[1:]:
        path.unlink()
    for i in range(4):
        shutil.copy(next((folder / 'ring').iterdir()), folder / 'ring' / f'more {i}.jpg')
    data = prepare('cls', folder, tmp_path / 'out')
    star = f' {data.classes.index("star")}'
    assert sum(line.endswith(star) for line in lines(data.train.ann_file)) == 1
    assert data.val.count and not any(line.endswith(star) for line in lines(data.val.ann_file))


def test_one_class_alone(root, tmp_path):
    for name in NAMES[1:]:
        shutil.rmtree(root / 'imagenet/train' / name)
    with pytest.raises(OwnDataError, match='has one class alone, disk'):
        prepare('cls', root / 'imagenet/train', tmp_path / 'out')


def test_names_must_differ(clean, tmp_path):
    with pytest.raises(OwnDataError, match=r"different name on each line, got \['disk', 'disk'\]"):
        prepare('cls', clean / 'imagenet', tmp_path / 'out', ['disk', 'disk'])


def test_a_split_leaves_every_class_in_the_training():
    labels = [{'rare'}, *({'common'} for _ in range(9))]
    train, val = split(labels)
    assert 0 in train and len(val) == 2 and sorted(train + val) == list(range(10))
    assert split([{'a'}, {'b'}])[1] != []
    with pytest.raises(OwnDataError, match='1 picture cannot be split'):
        split([{'a'}])


@pytest.mark.parametrize('count', [2, 3, 7, 20])
def test_the_only_picture_of_a_class_is_trained_on(count):
    for rare in range(count):
        labels = [{'often', 'rare'} if i == rare else {'often'} for i in range(count)]
        train, val = split(labels)
        assert rare in train and val and sorted(train + val) == list(range(count))


def test_pictures_are_as_high_as_they_are_seen(maps, tmp_path):
    """A camera held upright stores them turned, and says so in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (maps / 'images').iterdir():
        Image.new('RGB', (40, 64)).save(path, exif=exif)
    assert prepare('seg', maps, tmp_path / 'out').sizes == [(64, 40)] * 4
