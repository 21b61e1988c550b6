"""tools/infer.py: what it writes for folders and videos, and how it ends."""
import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from tiny_models import CLASSES, CONFIGS, save_weights, separated, tiny_model

from convneur_mm.apis import inference
from convneur_mm.engine.runner.interrupts import Interrupted
from convneur_mm.models.stream import stream

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
ROOT = Path(__file__).parents[2]
TASKS = tuple(CONFIGS)


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('infer_tool', ROOT / 'tools' / 'infer.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with the config file and the checkpoint of a run of each task, and the models."""
    folder, models = tmp_path_factory.mktemp('trained'), {}
    for task in TASKS:
        models[task] = separated(tiny_model(task))
        models[task].cfg.dump(str(folder / f'{task}.py'))
        save_weights(models[task], folder / f'{task}.pth', classes=CLASSES[task])
    return folder, models


def paint(path: Path, seed: int, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))
    return path


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Pictures of two sizes, with a subfolder, beside files that are none."""
    folder = tmp_path / 'photos'
    (folder / '.thumbs').mkdir(parents=True)
    paint(folder / '.thumbs' / 'a.jpg', 9)
    paint(folder / '.hidden.jpg', 9)
    (folder / 'notes.txt').write_text('no picture')
    return [paint(folder / name, i, (48 + 16 * (i % 2), 64)) for i, name in enumerate(('a.png', 'b.JPG', 'sub/a.png'))]


@pytest.fixture
def run(tool, trained, tmp_path, monkeypatch, capfd):
    """Runs the tool in ``tmp_path`` and returns its exit code and its lines of output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(task, *args, checkpoint=None, config=None):
        config = config or trained[0] / f'{task}.py'
        checkpoint = checkpoint or trained[0] / f'{task}.pth'
        monkeypatch.setattr(sys, 'argv', ['infer.py', '--device', 'cpu', *map(str, (config, checkpoint, *args))])
        MMLogger._instance_dict.clear()  # it writes to what pytest had before
        capfd.readouterr()
        code = 0
        try:
            tool.launch.run(tool.main)
        except SystemExit as error:
            code = error.code
        out, err = capfd.readouterr()
        assert 'Traceback' not in err
        return code, out.splitlines(), err.splitlines()

    return run


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'classifications.jsonl').read_text().splitlines()]


def test_detections_of_a_folder(run, trained, photos, tmp_path):
    code, out, _ = run('detector', 'photos', '--out-dir', 'out', '--batch-size', 2)
    assert code == 0
    assert out[-1] == 'predictions: out/detections.json, drawn: out/pictures'
    assert files(tmp_path / 'out') == ['detections.json', 'pictures/a.jpg', 'pictures/b.jpg', 'pictures/sub/a.jpg']
    content = json.loads((tmp_path / 'out/detections.json').read_text())
    assert [image['file_name'] for image in content['images']] == ['a.png', 'b.JPG', 'sub/a.png']
    assert [(image['width'], image['height']) for image in content['images']] == [(64, 48), (64, 64), (64, 48)]
    for image, sample in zip(content['images'], inference(trained[1]['detector'], photos), strict=True):
        found = [entry for entry in content['annotations'] if entry['image_id'] == image['id']]
        assert [entry['category_id'] - 1 for entry in found] == sample.pred_instances.labels.tolist()
        assert [entry['score'] for entry in found] == pytest.approx(sample.pred_instances.scores.tolist(), abs=1e-4)


def test_segmentations_of_a_folder(run, trained, photos, tmp_path):
    code, out, _ = run('segmentor', 'photos', '--out-dir', 'out')
    assert code == 0
    assert out[-1] == 'predictions: out/labels, drawn: out/pictures'
    assert files(tmp_path / 'out') == ['classes.json', *(
        f'{kind}/{name}' for kind, suffix in (('labels', 'png'), ('pictures', 'jpg'))
        for name in (f'a.{suffix}', f'b.{suffix}', f'sub/a.{suffix}'))]
    for name, sample in zip(('a', 'b', 'sub/a'), inference(trained[1]['segmentor'], photos), strict=True):
        picture = cv2.imread(str(tmp_path / f'out/labels/{name}.png'), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(picture, sample.pred_sem_seg.data[0])


def test_unreadable_pictures_are_named_and_the_others_predicted(run, trained, photos, tmp_path):
    (tmp_path / 'photos/broken.jpg').write_bytes(photos[1].read_bytes()[:20])
    code, out, err = run('classifier', 'photos', '--batch-size', 3)
    assert code == 1
    assert 'unreadable: photos/broken.jpg is no picture, or damaged' in err
    assert err[-1] == 'error: 1 of 4 pictures could not be read, see above'
    assert out[-1] == 'predictions: predictions/classifications.jsonl, drawn: predictions/pictures'
    found = entries(tmp_path / 'predictions')
    assert [entry['file'] for entry in found] == ['a.png', 'b.JPG', 'sub/a.png']
    for entry, sample in zip(found, inference(trained[1]['classifier'], photos), strict=True):
        assert entry['top'][0]['label'] == int(sample.pred_label)


def test_what_is_written_within_the_folder_is_not_read_again(run, photos, tmp_path):
    (tmp_path / 'photos/broken.jpg').write_text('no picture')
    for _ in range(2):
        assert run('classifier', 'photos', '--out-dir', 'photos/out')[0] == 1
        assert [entry['file'] for entry in entries(tmp_path / 'photos/out')] == ['a.png', 'b.JPG', 'sub/a.png']


def test_a_folder_below_the_one_to_write_to(run, photos, tmp_path):
    assert run('classifier', 'photos', '--out-dir', '.', '--no-pictures')[0] == 0
    assert len(entries(tmp_path)) == 3
    assert not (tmp_path / 'pictures').exists()


def test_pictures_that_differ_in_the_suffix_alone_keep_it(run, photos, tmp_path):
    paint(tmp_path / 'photos/a.bmp', 5)
    assert run('segmentor', 'photos', '--out-dir', 'out', '--no-pictures')[0] == 0
    assert files(tmp_path / 'out/labels') == ['a.bmp.png', 'a.png.png', 'b.JPG.png', 'sub/a.png.png']


def test_one_picture(run, photos, tmp_path):
    code, _, _ = run('classifier', 'photos/sub/a.png')
    assert code == 0
    assert files(tmp_path / 'predictions') == ['classifications.jsonl', 'pictures/a.jpg']
    assert entries(tmp_path / 'predictions')[0]['file'] == 'a.png'


class TestVideo:
    @pytest.fixture
    def clip(self, tmp_path) -> Path:
        writer = cv2.VideoWriter(str(tmp_path / 'clip.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))
        for i in range(5):
            writer.write(np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8))
        writer.release()
        return tmp_path / 'clip.avi'

    @staticmethod
    def frames(path):
        capture = cv2.VideoCapture(str(path))
        return [capture.read()[1] for _ in range(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))]

    @pytest.mark.parametrize('task', TASKS)
    def test_frames_are_predicted_and_drawn(self, task, run, trained, clip, tmp_path):
        code, out, err = run(task, 'clip.avi', '--out-dir', 'out', '--batch-size', 2)
        assert code == 0
        assert out[-1].endswith(', drawn: out/clip.mp4')
        assert not any(line.startswith('note') for line in err)
        samples = inference(trained[1][task], self.frames(clip))
        assert len(samples) == 5
        names = [f'{i:06}' for i in range(5)]
        if task == 'detector':
            images = json.loads((tmp_path / 'out/detections.json').read_text())['images']
            assert [image['file_name'] for image in images] == names
        elif task == 'segmentor':
            for name, sample in zip(names, samples, strict=True):
                labels = cv2.imread(str(tmp_path / f'out/labels/{name}.png'), cv2.IMREAD_UNCHANGED)
                assert (labels == sample.pred_sem_seg.data[0].numpy()).mean() > 0.99
        else:
            assert [(entry['file'], entry['top'][0]['label']) for entry in entries(tmp_path / 'out')] == [
                (name, int(sample.pred_label)) for name, sample in zip(names, samples, strict=True)]
        drawn = self.frames(tmp_path / 'out/clip.mp4')
        assert len(drawn) == 5
        height, width = drawn[0].shape[:2]
        assert height == (224 if task == 'classifier' else 48)
        assert width / height == pytest.approx(64 / 48, rel=0.01)
        assert cv2.VideoCapture(str(tmp_path / 'out/clip.mp4')).get(cv2.CAP_PROP_FPS) == 10

    def test_memories_are_carried_along(self, run, trained, clip, tmp_path):
        """Of a video, and of its frames in a folder, by their numbers."""
        model, frames = trained[1]['classifier'], self.frames(clip)
        with stream(model):
            carried = [sample.pred_score for sample in inference(model, frames)]
        alone = [sample.pred_score for sample in inference(model, frames)]
        assert [torch.equal(a, b) for a, b in zip(carried, alone, strict=True)] == [True] + 4 * [False]
        for number, frame in zip((1, 2, 3, 10, 11), frames, strict=True):
            (tmp_path / 'frames').mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / f'frames/{number}.png'), frame)
        for source in ('clip.avi', 'frames'):
            code, *_ = run('classifier', source, '--stream', '--no-pictures', '--out-dir', f'out_{source}')
            assert code == 0
            for entry, scores in zip(entries(tmp_path / f'out_{source}'), carried, strict=True):
                assert entry['top'][0]['score'] == pytest.approx(float(scores.max()), abs=1e-5)
        assert [entry['file'] for entry in entries(tmp_path / 'out_frames')] == [
            f'{number}.png' for number in (1, 2, 3, 10, 11)]

    def test_one_that_ends_early_is_noted(self, run, clip, tmp_path):
        content = clip.read_bytes()
        clip.write_bytes(content[:len(content) * 6 // 10])
        code, _, err = run('classifier', clip, '--no-pictures', '--out-dir', 'out')
        count = len(entries(tmp_path / 'out'))
        assert 0 < count < 5
        assert code == 0
        assert any(line.startswith(f'note: {count} frames of {clip} could be read') for line in err)
        assert files(tmp_path / 'out') == ['classifications.jsonl']

    def test_one_that_is_none_is_named(self, run, tmp_path):
        (tmp_path / 'x.mp4').write_text('no video')
        code, _, err = run('classifier', 'x.mp4')
        assert (code, err[-1]) == (2, f'error: x.mp4 is no video that OpenCV {cv2.__version__} can read, or damaged')

    def test_it_is_not_overwritten(self, run, clip, tmp_path):
        content = clip.rename(tmp_path / 'clip.mp4').read_bytes()
        code, _, err = run('classifier', 'clip.mp4', '--out-dir', '.')
        assert code == 2
        assert err[-1].startswith('error: --out-dir . would mix what is written with clip.mp4')
        assert (tmp_path / 'clip.mp4').read_bytes() == content


class TestErrors:
    """Each of one line, with the exit code 2."""

    @pytest.mark.parametrize('args, message', [
        (['nowhere'], 'no such picture, folder or video: nowhere'),
        (['nowhere.mp4'], 'no such picture, folder or video: nowhere.mp4'),
        (['empty'], 'empty holds no pictures (.bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp) but 1 other files'),
        (['photos', '--out-dir', 'photos'], '--out-dir photos would mix what is written with photos'),
        (['photos', '--out-dir', 'photos/../photos'], '--out-dir photos/../photos would mix what is written'),
        (['photos', '--stream'], '--stream takes the frames of one video, and the pictures of photos are in 2 folders'),
        (['labels', '--out-dir', '.'], '--out-dir . would mix what is written with labels'),
        (['photos', '--out-dir', 'empty/notes.txt'], '--out-dir empty/notes.txt cannot be made: File exists'),
    ])
    def test_of_folders(self, args, message, run, photos, tmp_path):
        (tmp_path / 'empty').mkdir()
        (tmp_path / 'empty/notes.txt').touch()
        paint(tmp_path / 'labels/a.png', 0)
        code, _, err = run('classifier', *args)
        assert code == 2
        assert err[-1].startswith(f'error: {message}')

    def test_of_checkpoints(self, run, trained, photos, tmp_path):
        torch.save(dict(state_dict={}, object=print), 'pickled.pth')
        other = trained[0] / 'segmentor.pth'
        for checkpoint, message in (('x.pth', 'checkpoint: no such file: x.pth'),
                                    (other, f'{other} is not of this model'),
                                    ('pickled.pth', 'checkpoint: pickled.pth was not loaded, because it needs pickle')):
            code, _, err = run('classifier', 'photos', checkpoint=checkpoint)
            assert code == 2
            assert err[-1].startswith(f'error: {message}')
        assert not (tmp_path / 'predictions').exists()

    def test_of_devices_and_configs(self, run, photos, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        for options, config, message in ((['--device', 'cuda'], None, "device 'cuda': no GPU, "),
                                         (['--device', 'gpu'], None, 'device must be one of cpu, cuda on this machine'),
                                         ([], 'nowhere', "no config 'nowhere'")):
            code, _, err = run('classifier', 'photos', *options, config=config)
            assert code == 2
            assert err[-1].startswith(f'error: {message}')

    @pytest.mark.parametrize('task, options, message', [
        ('classifier', ['model.backbone.placement=none'], '--stream: states are those of neural memories, of which'),
        ('segmentor', ['model.test_cfg.mode=slide'], '--stream needs one call of the backbone for a frame')])
    def test_of_models_without_a_stream(self, task, options, message, run, trained, photos, tmp_path):
        weights = torch.load(trained[0] / f'{task}.pth', weights_only=True)
        if task == 'classifier':
            weights['state_dict'] = {
                name: x for name, x in weights['state_dict'].items() if '.global_branch.' not in name}
        torch.save(weights, tmp_path / 'weights.pth')
        code, _, err = run(task, 'photos/sub', '--stream', '--cfg-options', *options, checkpoint='weights.pth')
        assert code == 2
        assert err[-1].startswith(f'error: {message}')

    @pytest.mark.parametrize('args, message', [
        (['--batch-size', '0'], '--batch-size must be at least 1, got 0'),
        (['--stream', '--batch-size', '2'], '--stream takes one frame after the other, got --batch-size 2')])
    def test_of_arguments(self, args, message, tool, capsys):
        with pytest.raises(SystemExit) as exit_info:
            tool.parse_args(['c', 'x', 'i', *args])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_a_signal_leaves_what_was_predicted(tool, trained, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict = tool.iter_inference

    def interrupted(*args):
        predictions = predict(*args)
        yield next(predictions)
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(tool, 'iter_inference', interrupted)
    monkeypatch.setattr(sys, 'argv', ['infer.py', *(str(trained[0] / f'detector.{end}') for end in ('py', 'pth')),
                                      'photos', '--device', 'cpu'])
    with pytest.raises(Interrupted) as error:
        tool.main()
    assert str(error.value) == 'ended by Ctrl-C after 1 of 3 pictures; their results are in predictions'
    assert len(json.loads((tmp_path / 'predictions/detections.json').read_text())['images']) == 1
