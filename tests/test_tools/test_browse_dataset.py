"""tools/analysis/browse_dataset.py: pictures of generated data sets of all three forms, with their labels in them."""
import cv2
import numpy as np
import pytest

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet

FLIP = 'train_dataloader.dataset.pipeline.{}.prob=0.0'
# Config, folder of the training images, size they are brought to, and what turns the flips off.
FORMS = {
    'coco': ('cascade_rcnn_convneur_m1_shapes', 'train', (160, 160),
             [FLIP.format(3), 'train_dataloader.dataset.pipeline.3.direction=horizontal']),
    'ade20k': ('semantic_fpn_convneur_m1_shapes', 'images/training', (96, 96), [FLIP.format(3), FLIP.format(4)]),
}


@pytest.fixture
def tool(script):
    return script('browse_dataset')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data set of each form, not to be changed."""
    root = tmp_path_factory.mktemp('data')
    for make, form in ((make_shapes_coco, 'coco'), (make_shapes_ade20k, 'ade20k'), (make_shapes_imagenet, 'imagenet')):
        make(root / form, 6, 6, 64)
    return root


def browse(tool, config, root, out, *args, options=()):
    tool.main([config, '--out', str(out), *args, '--cfg-options', f'data_root={root}/', *options])
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize('form', FORMS)
def test_labels_are_drawn_over_the_image(tool, form, data, tmp_path):
    """Labels change some of the picture; the rest is the image in its own colours."""
    config, folder, size, options = FORMS[form]
    names = browse(tool, config, data / form, tmp_path, '--number', '2', options=options)
    assert len(names) == 2 and all(name.startswith(f'{i}_') for i, name in enumerate(names))
    plain = cv2.imread(str(data / form / folder / f'{names[0][2:-4]}.jpg'))
    plain, drawn = cv2.resize(plain, size).astype(int), cv2.imread(str(tmp_path / names[0])).astype(int)
    assert drawn.shape == plain.shape
    changed = np.abs(plain - drawn).max(2) > 40
    assert 0.01 < changed.mean() < 0.9
    # Where labels cover the whole map half of the image shows through.
    order = [np.corrcoef(plain.ravel(), drawn[..., channels].ravel())[0, 1] for channels in ([0, 1, 2], [2, 1, 0])]
    assert order[0] > order[1] + 0.02


def test_the_pipeline_is_the_one_of_training(tool, data, tmp_path):
    """Flipped pictures differ from seed to seed, and one seed gives the same picture twice."""
    folders = [tmp_path / name for name in 'abc']
    for folder, seed in zip(folders, ('1', '1', '2')):
        browse(tool, FORMS['ade20k'][0], data / 'ade20k', folder, '--seed', seed, '--number', '0')
    pictures = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in folders]
    assert len(pictures[0]) == 6
    assert pictures[0] == pictures[1] != pictures[2]


def test_classification(tool, data, tmp_path, capsys):
    names = browse(tool, 'convneur_m1_shapes', data / 'imagenet', tmp_path, '--number', '3')
    assert len(names) == 3
    assert min(cv2.imread(str(tmp_path / names[0])).shape[:2]) >= 224  # large enough for the label to be read
    assert '3 of 6 images of the training data set' in capsys.readouterr().out


@pytest.mark.parametrize(('args', 'message'), [
    (['--number', '-1'], '--number must be at least 0, got -1'),
    (['--cfg-options', 'data_root=nowhere/'], 'nowhere'),
    (['--cfg-options', 'train_dataloader=None'], 'the config has no train_dataloader'),
])
def test_what_cannot_be_drawn(tool, args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tool.main([FORMS['coco'][0], '--out', str(tmp_path / 'out'), *args])
    assert not (tmp_path / 'out').exists()


def test_a_config_of_another_package_is_refused(tool, tmp_path):
    path = tmp_path / 'other.py'
    path.write_text("default_scope = 'mmpose'\n")
    with pytest.raises(ValueError, match="default_scope must be one of mmdet, mmseg, mmpretrain, got 'mmpose'"):
        tool.main([str(path)])
