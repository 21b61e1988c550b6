"""tools/train_custom.py: the config it writes trains and tests, and what cannot be is refused in a line."""
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from data_sets import IMAGES
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from safetensors.torch import save_file
from warm_python import warm_python

from convneur_mm.engine import launch
from convneur_mm.engine.checks.class_checks import check_classes
from convneur_mm.engine.checks.file_checks import check_data_files
from convneur_mm.models import ConvNeur

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
TOOLS = Path(__file__).parents[2] / 'tools'
DATA = dict(det='coco', seg='ade20k', cls='imagenet')


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import train_custom
        yield train_custom


@pytest.fixture
def write(tool, tmp_path, monkeypatch):
    """Runs the tool without training; returns the lines of its config."""
    monkeypatch.chdir(tmp_path)

    def run(task: str, data: Path, *options: object) -> list[str]:
        tool.main(['--task', task, str(data), '--work-dir', 'out', '--dry-run', *map(str, options)])
        return Path('out/out.py').read_text().splitlines()

    return run


@pytest.fixture
def trained(tmp_path):
    """Trains the config that was written, as tools/train.py reads it; returns the config and the metrics."""
    scope = DefaultScope.get_current_instance()

    def run(options: dict | None = None) -> tuple[Config, set[str]]:
        in_process = {f'{split}_dataloader.{key}': value for split in ('train', 'val', 'test')
                      for key, value in (('num_workers', 0), ('persistent_workers', False))}
        cfg = launch.read_config('out/out.py', {**in_process, **(options or {})})
        launch.without_sync_bn(cfg.model)
        check_data_files(cfg, ('train', 'val', 'test'))
        check_classes(cfg, ('train', 'val', 'test'))
        cfg.update(work_dir=str(tmp_path / 'run'), log_level='ERROR')
        runner = Runner.from_cfg(cfg)
        runner.train()
        return cfg, {name.removeprefix('val/') for name in runner.message_hub.log_scalars}

    yield run
    if scope is not None:
        DefaultScope._instance_dict[scope.instance_name] = scope


def shorten(path: Path, count: int, has_masks: bool) -> None:
    """Leaves the first pictures in an annotation file."""
    content = json.loads(path.read_text())
    content['images'] = content['images'][:count]
    ids = {image['id'] for image in content['images']}
    content['annotations'] = [each for each in content['annotations'] if each['image_id'] in ids]
    if not has_masks:
        for annotation in content['annotations']:
            del annotation['segmentation']
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('has_masks', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_detection(tool, write, trained, root, monkeypatch, has_masks):
    """RTMDet, whose augmentation has the size of the pictures too, and ends before the training."""
    monkeypatch.setitem(tool.LIMITS, 'det', (96, 96))
    for split, count in (('train', 8), ('val', 1)):
        shorten(root / f'coco/annotations/instances_{split}.json', count, has_masks)
    lines = write('det', root / 'coco', '--epochs', 2)
    assert len(lines) <= 10
    # After so few steps all scores are low, and mmdet reports no metrics without a detection.
    cfg, metrics = trained({'model.test_cfg.score_thr': 0.0})
    assert 'GN' not in str(cfg.model)
    assert ('coco/segm_mAP' in metrics) == has_masks and 'coco/bbox_mAP' in metrics
    assert cfg.model.bbox_head.type == ('RTMDetInsSepBNHead' if has_masks else 'RTMDetSepBNHead')
    assert cfg.model.bbox_head.num_classes == 6 and cfg.image_size == (96, 96)
    average, switch = (next(hook for hook in cfg.custom_hooks if hook.type == name)
                       for name in ('EMAHook', 'PipelineSwitchHook'))
    assert average.ema_type == 'ExpMomentumEMA' and switch.switch_epoch == 1
    sizes = dict(CachedMosaic='img_scale', RandomResize='scale', RandomCrop='crop_size', Pad='size',
                 CachedMixUp='img_scale', Resize='scale')
    for pipeline, count in ((cfg.train_dataloader.dataset.pipeline, 5), (switch.switch_pipeline, 3),
                            (cfg.test_dataloader.dataset.pipeline, 2)):
        found = [each[sizes[each.type]] for each in pipeline if each.type in sizes]
        assert found == [(96, 96)] * count


@pytest.mark.parametrize('has_masks', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_detection_by_cascade(tool, write, trained, root, monkeypatch, has_masks):
    monkeypatch.setitem(tool.LIMITS, 'det', (96, 96))
    for split, count in (('train', 8), ('val', 1)):
        shorten(root / f'coco/annotations/instances_{split}.json', count, has_masks)
    lines = write('det', root / 'coco', '--epochs', 1, '--head', 'cascade')
    assert len(lines) <= 10
    cfg, metrics = trained()
    dataset = cfg.train_dataloader.dataset
    assert (dataset.data_root, dataset.ann_file) == (f'{root}/coco/', 'annotations/instances_train.json')
    assert dataset.data_prefix == dict(img='train')
    assert ('coco/segm_mAP' in metrics) == has_masks and 'coco/bbox_mAP' in metrics
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [6] * 3
    # Of 64 x 64 pixels, whose shapes would be too small.
    assert cfg.image_size == (96, 96)
    anchors = cfg.model.rpn_head.anchor_generator
    assert anchors.scales != [5] and re.search(rf'scales=\[{anchors.scales[0]}\], ratios=\[', '\n'.join(lines))
    assert [each.scale for each in cfg.train_dataloader.dataset.pipeline if each.type == 'Resize'] == [(96, 96)]


def test_segmentation(write, trained, clean, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('disk\nsquare\n\ntriangle\nstar\nring\ncross \n')
    lines = write('seg', clean / 'ade20k', '--epochs', 2, '--classes', names, '--reduce-zero-label')
    assert len(lines) <= 10
    cfg, metrics = trained()
    weights = cfg.model.decode_head.loss_decode.class_weight
    assert len(weights) == 6 and weights == cfg.class_weight and len(set(weights)) > 1
    assert cfg.model.decode_head.num_classes == 6 and cfg.train_cfg.max_iters == 2 * 3 and 'mIoU' in metrics
    size = [(each.type, each.get('scale', each.get('crop_size'))) for each in cfg.train_dataloader.dataset.pipeline]
    assert ('RandomResize', (64, 64)) in size and ('RandomCrop', (64, 64)) in size
    assert cfg.model.data_preprocessor.size == (64, 64)
    assert cfg.val_dataloader.dataset.ann_file == f'{tmp_path}/out/data/val.txt'


def test_classification_by_the_command(root):
    """The whole of it: training, test and pictures, each by its tool."""
    command = [warm_python(), str(TOOLS / 'train_custom.py'), '--task', 'cls', 'imagenet/train', '--epochs', '1']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    out = root / 'work_dirs/train_cls'
    # Twelve pictures of six classes.
    assert re.search(r'^data +6 training and 6 validation pictures', done.stdout, re.MULTILINE), done.stdout
    assert len((out / 'train_cls.py').read_text().splitlines()) <= 10
    assert 'accuracy/top1' in done.stdout and len(list((out / 'pictures').rglob('*.jpg'))) == 6
    assert 'random' in done.stdout
    again = subprocess.run(command, cwd=root, env=env, text=True, capture_output=True)
    assert again.returncode == 2
    assert re.fullmatch(r'error: work_dirs/train_cls has a training already: go on with '
                        r'.*tools/train.py\'? work_dirs/train_cls/train_cls.py --work-dir work_dirs/train_cls/train '
                        r'--auto-scale-lr --resume, or give another --work-dir\n', again.stderr)


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_a_batch_of_few_pictures_is_normalised_by_groups(write, trained, root, tmp_path, task):
    """Two pictures to train on, so each step has two in place of four."""
    if task == 'det':
        for split, count in (('train', 2), ('val', 1)):
            shorten(root / f'coco/annotations/instances_{split}.json', count, True)
    else:
        for folder in ('images', 'annotations'):
            for path in sorted((root / f'ade20k/{folder}/training').iterdir())[2:]:
                path.unlink()
    names = tmp_path / 'names.txt'
    names.write_text('disk\nsquare\n' if task == 'det' else ''.join(f'{i}\n' for i in range(7)))
    write(task, root / DATA[task], '--epochs', 1, '--classes', names, '--arch', 'm2')
    cfg, _ = trained()
    parts = (cfg.model.neck, cfg.model.bbox_head) if task == 'det' else (cfg.model.decode_head, )
    assert [part.norm_cfg.type for part in parts] == ['GN'] * len(parts)


def test_sizes_that_are_not_square_go_where_they_belong(write, tmp_path):
    import cv2
    import numpy as np
    for name in ('images', 'masks'):
        (tmp_path / 'wide' / name).mkdir(parents=True)
    for i in range(2):
        cv2.imwrite(str(tmp_path / f'wide/images/{i}.jpg'), np.zeros((60, 100, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f'wide/masks/{i}.png'), np.eye(60, 100, dtype=np.uint8))
    write('seg', tmp_path / 'wide')
    cfg = launch.read_config('out/out.py', {})
    assert cfg.image_size == (96, 64) and cfg.model.data_preprocessor.size == (64, 96)
    pipeline = {each.type: each for each in cfg.train_dataloader.dataset.pipeline}
    assert pipeline['RandomResize'].scale == (96, 64) and pipeline['RandomCrop'].crop_size == (64, 96)


def saved(path: Path, arch: str, prefix: str = 'backbone.') -> Path:
    with torch.device('meta'):
        weights = ConvNeur(arch, out_indices=(0, 1, 2, 3)).state_dict()
    torch.save(dict(state_dict={prefix + name: torch.zeros(value.shape) for name, value in weights.items()}), path)
    return path


@pytest.mark.parametrize('task', ['det', 'seg', 'cls'])
def test_the_arch_is_that_of_the_checkpoint(write, clean, tmp_path, task):
    path = saved(tmp_path / 'm3.pth', 'm3')
    assert len(write(task, clean / DATA[task], '--checkpoint', path)) <= 10
    model = launch.read_config('out/out.py', {}).model
    assert model.backbone.arch == 'm3' and model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(path))
    assert (model.head if task == 'cls' else model.neck).in_channels == dict(
        det=[128, 256, 512], seg=[64, 128, 256, 512], cls=512)[task]


def test_a_url_stays_one(write, clean, tmp_path):
    url = saved(tmp_path / 'm3.pth', 'm3').as_uri()
    write('cls', clean / 'imagenet', '--checkpoint', url)
    assert launch.read_config('out/out.py', {}).model.backbone.init_cfg.checkpoint == url


def test_weights_of_convnext_are_converted(write, clean, tmp_path, capsys):
    import timm
    source = timm.create_model('convnextv2_atto', num_classes=3)
    torch.save(source.state_dict(), tmp_path / 'atto.pth')
    write('cls', clean / 'imagenet', '--checkpoint', tmp_path / 'atto.pth')
    path = launch.read_config('out/out.py', {}).model.backbone.init_cfg.checkpoint
    weights = torch.load(path)['state_dict']
    assert torch.equal(weights['backbone.downsample_layers.0.0.weight'], source.stem[0].weight)
    assert 'CC BY-NC' in capsys.readouterr().out


def test_weights_by_name(write, clean, tmp_path, capsys):
    import timm
    source = timm.create_model('convnext_atto.d2_in1k', num_classes=3)
    (tmp_path / 'weights').mkdir()
    save_file(source.state_dict(), tmp_path / 'weights/convnext_atto.d2_in1k.safetensors')
    write('cls', clean / 'imagenet', '--pretrained', 'convnext_atto.d2_in1k')
    checkpoint = torch.load(launch.read_config('out/out.py', {}).model.backbone.init_cfg.checkpoint)
    assert torch.equal(checkpoint['state_dict']['backbone.downsample_layers.0.0.weight'], source.stem[0].weight)
    assert checkpoint['meta']['licence'] == 'apache-2.0' and 'licence: apache-2.0' in capsys.readouterr().out


def test_what_cannot_be_is_refused_in_a_line(tool, clean, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    m3 = saved(tmp_path / 'm3.pth', 'm3')
    (tmp_path / 'bad.pth').write_bytes(b'no checkpoint')
    torch.save(dict(state_dict={'fc.weight': torch.zeros(2)}), tmp_path / 'other.pth')
    path = root / IMAGES['imagenet']
    path.write_bytes(path.read_bytes()[:-99])
    for words, expected in (
            (['cls', tmp_path / 'nowhere'], 'DATA: .*nowhere does not exist'),
            (['seg', clean / 'coco'], 'has no folders .*these look like data for --task det'),
            (['cls', clean / 'imagenet', '--checkpoint', 'none.pth'], '--checkpoint: no such file: none.pth'),
            (['cls', clean / 'imagenet', '--checkpoint', 'bad.pth'], 'bad.pth'),
            (['cls', clean / 'imagenet', '--checkpoint', 'other.pth'], '--checkpoint: other.pth: no ConvNeXt'),
            (['cls', clean / 'imagenet', '--checkpoint', m3, '--arch', 'm1'], 'm3.pth is of m3, and --arch is m1'),
            (['cls', clean / 'imagenet', '--classes', 'none.txt'], '--classes: no such file: none.txt'),
            (['cls', clean / 'imagenet', '--reduce-zero-label'], '--reduce-zero-label is for label maps'),
            (['cls', clean / 'imagenet', '--ignore-label', '3'], '--ignore-label is for label maps'),
            (['cls', clean / 'imagenet', '--pretrained', 'convnext_pico.d1_in1k'], 'download .*/timm/convnext_pico'),
            (['cls', clean / 'imagenet', '--pretrained', 'convnext_pico.d1_in1k', '--checkpoint', m3], 'choose one'),
            (['cls', root / 'imagenet'], r'ImageNet data set .* has 1 fault: mend it first')):
        with pytest.raises(SystemExit) as caught:
            tool.main(['--task', *map(str, words), '--work-dir', 'out', '--dry-run'])
        assert caught.value.code == 2
        *before, error = capsys.readouterr().err.strip().splitlines()
        assert re.match('error: ', error) and re.search(expected, error), error
        # The checks' progress, and their report where they found something.
        assert 'does not decode' in '\n'.join(before) if words[1] == root / 'imagenet' else 'error' not in before
    assert not Path('out/out.py').exists()
    for words in (['cls'], ['pose', 'x'], ['cls', 'x', '--epochs', '0']):
        with pytest.raises(SystemExit) as caught:
            tool.main(['--task', *words])
        assert caught.value.code == 2


def test_a_run_that_fails_ends_with_its_code(tool, tmp_path):
    script = tmp_path / 'script.py'
    for text, code in (('raise SystemExit(3)', 3), ('import os, signal; os.kill(os.getpid(), signal.SIGTERM)', 143)):
        script.write_text(text)
        with pytest.raises(SystemExit) as caught:
            tool.run([str(script)])
        assert caught.value.code == code
