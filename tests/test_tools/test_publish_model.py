"""tools/publish_model.py: what is published loads everywhere, predicts the same, and says where it comes from."""
import hashlib
import importlib.util
import json
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from managers import forget_runs
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from safetensors import safe_open
from tiny_models import CLASSES, CONFIGS
from training import train_tiny

from convneur_mm.analysis import model_card
from convneur_mm.apis import init_model
from convneur_mm.engine import safe_loading
from convneur_mm.engine.files.checkpoint import checkpoint_weights, load_pretrained
from convneur_mm.engine.files.weights_file import CheckpointError
from convneur_mm.engine.runner.quiet_console import QuietRunner
from convneur_mm.models import ConvNeur

pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')
ROOT = Path(__file__).parents[2]
LENGTH = dict(detector=1, segmentor=2, classifier=1)
METRICS = dict(detector='coco/bbox_mAP', segmentor='mIoU', classifier='accuracy/top1')
LICENCE = 'CC BY-NC 4.0'


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'{name}_tool', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', list(sys.path))
        yield load('publish_model')


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A config and a checkpoint of each task, in the work dir of the training."""
    options = dict(classifier=dict(custom_hooks=[dict(type='EMAHook', momentum=0.5)]))
    return {task: train_tiny(task, tmp_path_factory.mktemp(task), LENGTH[task], options.get(task)) for task in CONFIGS}


@pytest.fixture(scope='module')
def published(tool, trained, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """The files of each task by suffix."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # At full size a memory has hundreds of chunks, which take ten seconds to count.
        patch.setattr(model_card, 'SHAPES', dict.fromkeys(('mmdet', 'mmseg', 'mmpretrain'), (64, 96)))
        for task, (config, checkpoint) in trained.items():
            folder = tmp_path_factory.mktemp('published')
            tool.main([str(config), str(checkpoint), '--out-dir', str(folder), '--name', 'mine', '--safetensors'])
            found[task] = {path.suffix[1:]: path for path in folder.iterdir()}
    return found


@pytest.fixture
def publish(tool, trained, tmp_path, capsys, monkeypatch):
    """Publishes a task's checkpoint, or another one with its config, and returns its files by suffix and the output."""
    monkeypatch.setattr(model_card, 'cost', lambda model: {})

    def publish(task, *args, checkpoint=None, config=None, out='published'):
        capsys.readouterr()
        mine, saved = trained[task]
        tool.main([str(config or mine), str(checkpoint or saved), '--out-dir', str(tmp_path / out), *map(str, args)])
        printed = capsys.readouterr().out
        files = [tmp_path / line for line in printed.splitlines() if not line.startswith('note: ')]
        return {path.suffix[1:]: path for path in files}, printed

    return publish


def saved(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def changed(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint that ``change`` has had."""
    checkpoint = saved(source)
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


@pytest.mark.parametrize('task', CONFIGS)
def test_what_is_published_loads_everywhere(task, published, trained):
    files = published[task]
    source = saved(trained[task][1])
    assert {'optimizer', 'message_hub'} <= source.keys()
    found = torch.load(files['pth'], weights_only=True)
    assert found.keys() == {'meta', 'state_dict'}
    assert files['pth'].stat().st_size < trained[task][1].stat().st_size
    model = init_model(files['py'], files['pth'], 'cpu')
    assert model.dataset_meta['classes'] == CLASSES[task] == tuple(found['meta']['dataset_meta']['classes'])
    weights = checkpoint_weights(source)
    assert list(found['state_dict']) == list(weights) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    # By its file's name as torch.hub compares it, and without any pickle at all.
    for suffix in ('pth', 'safetensors'):
        digest = hashlib.sha256(files[suffix].read_bytes()).hexdigest()
        assert files[suffix].name == f'mine-{digest[:8]}.{suffix}'
        assert digest in files['md'].read_text()
    assert files['py'].stem == files['md'].stem == files['pth'].stem
    with safe_open(files['safetensors'], 'pt') as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in weights.items())
        assert json.loads(file.metadata()['meta'])['dataset_meta']['classes'] == list(CLASSES[task])
    init_model(files['py'], files['safetensors'], 'cpu')
    backbone = ConvNeur(**{key: value for key, value in model.cfg.model.backbone.items() if key not in (
        'type', 'init_cfg')})
    load_pretrained(backbone, str(files['pth']))
    assert all(torch.equal(value, weights[f'backbone.{name}']) for name, value in backbone.state_dict().items())
    assert Config.fromstring(found['meta']['cfg'], '.py').to_dict() == Config.fromfile(files['py']).to_dict()
    assert str(trained[task][0].parent) not in files['md'].read_text()


@pytest.mark.parametrize('task', CONFIGS)
def test_it_scores_and_predicts_what_the_checkpoint_did(task, published, trained, tmp_path, monkeypatch):
    files = published[task]
    results, predictions = [], []
    for name, config, checkpoint in (('run', *trained[task]), ('pth', files['py'], files['pth']),
                                     ('safetensors', files['py'], files['safetensors'])):
        forget_runs()
        out = tmp_path / name / ('labels' if task == 'segmentor' else 'found.pkl')
        monkeypatch.setattr(sys, 'argv', ['test.py', str(config), str(checkpoint), '--work-dir', str(tmp_path / name),
                                          '--out', str(out)])
        load('test').main()
        path, = (tmp_path / name).glob('*/*.json')
        results.append({key: value for key, value in json.loads(path.read_text()).items() if 'time' not in key})
        predictions.append([part.read_bytes() for part in sorted(out.parent.glob(f'{out.name}/*'))]
                           if task == 'segmentor' else numbers(pickle.loads(out.read_bytes())))
    assert METRICS[task] in results[0]
    assert results[0] == results[1] == results[2]
    assert len(predictions[0]) >= 6
    assert predictions[0] == predictions[1] == predictions[2]


def numbers(found: object) -> list:
    """Scores, labels, boxes and masks of pickled predictions."""
    if isinstance(found, dict):
        return [(key, numbers(value)) for key, value in found.items() if key.startswith('pred') or key in (
            'scores', 'labels', 'bboxes', 'masks', 'counts')]
    if isinstance(found, (list, tuple)):
        return [numbers(value) for value in found]
    return found.tolist() if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_trainings_start_from_it(suffix, published, tmp_path):
    files = published['segmentor']
    weights = torch.load(files['pth'], weights_only=True)['state_dict']

    def run(**settings):
        forget_runs()
        cfg = Config.fromfile(files['py'])
        cfg.merge_from_dict(dict(work_dir=str(tmp_path), custom_hooks=[dict(type='CheckpointKeysHook')], **settings))
        with safe_loading():  # as tools/train.py, where runner.train() then begins with these two
            runner = QuietRunner.from_cfg(cfg)
            runner._init_model_weights()
            runner.load_or_resume()
        return {name: torch.equal(value, weights[name]) for name, value in runner.model.state_dict().items()}

    assert all(run(load_from=str(files[suffix])).values())
    same = run(**{'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(files[suffix]))})
    assert all(equal for name, equal in same.items() if name.startswith('backbone.'))
    assert not same['decode_head.conv_seg.weight']


def test_the_same_checkpoint_makes_the_same_file_again(publish, published, trained, tmp_path):
    first = published['segmentor']
    # Whatever it is called.
    copy = shutil.copy(trained['segmentor'][1], tmp_path / 'other.pth')
    again, _ = publish('segmentor', '--safetensors', '--name', 'mine', checkpoint=copy)
    for suffix in ('pth', 'safetensors', 'py'):
        assert first[suffix].name == again[suffix].name
        assert first[suffix].read_bytes() == again[suffix].read_bytes()
    with pytest.raises(ValueError, match=rf'{first["py"].name} is there already'):
        publish('segmentor', '--name', 'mine', checkpoint=copy)


def test_a_folder_of_a_detector_for_the_hub(publish, trained):
    pytest.importorskip('huggingface_hub')
    _, printed = publish('detector', '--hub', '--licence', 'MIT')
    folder, = [Path(line) for line in printed.splitlines() if Path(line).is_dir()]
    model, x = init_model(*trained['detector'], 'cpu'), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for found, wanted in zip(ConvNeur.from_pretrained(folder)(x), model.backbone(x), strict=True):
            torch.testing.assert_close(found, wanted)
    assert 'license_name: "MIT"' in (folder / 'README.md').read_text()


def test_a_folder_of_a_classifier_for_the_hub(tool, tmp_path):
    """It is timm's classifier with the same logits."""
    timm = pytest.importorskip('timm')
    import convneur_mm.timm  # noqa: F401  registers the models
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(
            type='ImageClassifier',
            backbone=dict(type='ConvNeur', arch='m1', out_indices=-1, gap_before_final_norm=True,
                          memory_cfg=dict(num_chunks=4)),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=320))).eval()
    for name, content in tool.hub_files(model.backbone, model.state_dict(), None, '').items():
        (tmp_path / name).write_bytes(content)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


def test_only_convneur_goes_to_the_hub(tool):
    with pytest.raises(ValueError, match='the backbone is Linear'):
        tool.hub_files(torch.nn.Linear(2, 3), {}, None, '')


def test_averaged_weights_and_those_before(publish, published, trained):
    source = saved(trained['classifier'][1])
    averages = source['state_dict']
    before = {name.removeprefix('module.'): value for name, value in source['ema_state_dict'].items()}
    assert not torch.equal(averages['head.fc.weight'], before['head.fc.weight'])
    for option, expected, line in (('--ema', averages, 'averaged'),
                                   ('--no-ema', before, 'as trained, before averaging')):
        files, _ = publish('classifier', option, out=option)
        found = torch.load(files['pth'], weights_only=True)['state_dict']
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        card = files['md'].read_text()
        assert f'| weights | {line} |' in card
        # The validation was of the averages.
        assert ('accuracy/top1' in card) == (option == '--ema')
    default = torch.load(published['classifier']['pth'], weights_only=True)['state_dict']
    assert all(torch.equal(value, averages[name]) for name, value in default.items())
    with pytest.raises(CheckpointError, match='--ema: .* holds no averaged weights'):
        publish('segmentor', '--ema')


class TestCard:
    @pytest.mark.parametrize('task, trained_for', [('detector', 'epoch 1'), ('segmentor', 'iter 2')])
    def test_results_of_the_validation_of_this_checkpoint(self, task, trained_for, published, trained):
        log, = trained[task][1].parent.glob('*/vis_data/scalars.json')
        expected = json.loads(log.read_text().splitlines()[-1])
        card = published[task]['md'].read_text()
        assert f'From: validation after {trained_for}.' in card
        assert f'| {METRICS[task]} | {expected[METRICS[task]]} |' in card
        assert 'data_time' not in card and trained_for in card

    def test_a_validation_of_another_checkpoint_is_not_taken(self, publish, trained, tmp_path):
        config, checkpoint = trained['segmentor']
        work = shutil.copytree(checkpoint.parent, tmp_path / 'work')
        log, = work.glob('*/vis_data/scalars.json')
        log.write_text(log.read_text() + json.dumps(dict(mIoU=99.0, step=4)) + '\n')
        card = publish('segmentor', checkpoint=work / checkpoint.name, out='a')[0]['md'].read_text()
        assert '99.0' not in card and '| mIoU |' in card
        log.unlink()
        files, printed = publish('segmentor', checkpoint=work / checkpoint.name, out='b')
        assert 'Not known.' in files['md'].read_text()
        assert 'note: the card has no results' in printed

    def test_a_damaged_log_is_named(self, tool, tmp_path):
        log = tmp_path / 'now' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('{"mIoU": 1.0, "step": 2}\n{"mIo')
        cfg = Config(dict(default_hooks=dict(logger=dict(log_metric_by_epoch=False))))
        with pytest.raises(ValueError, match=f"^{log}: expected JSON, got '{{\"mIo'; mend the log, or give results by"):
            tool.validated(tmp_path / 'x.pth', dict(iter=2), cfg)
        log.write_text('{"mIoU": 1.0, "step": 2}\n')
        assert tool.validated(tmp_path / 'x.pth', dict(iter=2), cfg) == (dict(mIoU=1.0), 'validation after iter 2')
        # A loop of iterations logs all its validations as of epoch 0.
        cfg = Config(dict(train_cfg=dict(max_iters=2)))
        assert tool.validated(tmp_path / 'x.pth', dict(iter=2, epoch=2), cfg) == ({}, '')

    def test_results_of_a_file(self, publish, tmp_path):
        path = tmp_path / 'results.json'
        path.write_text('{"mIoU": 41.5, "time": 0.1, "data_time": 0.1}')
        card = publish('segmentor', '--metrics', path)[0]['md'].read_text()
        assert 'From: results.json.' in card and '| mIoU | 41.5 |' in card and '| time |' not in card

    @pytest.mark.parametrize('text, message', [
        (None, 'No such file'), ('{', 'expected JSON'), ('[1]', r'expected {"name": number, …}, got \[1\]'),
        ('{"mIoU": "high"}', 'got {"mIoU": "high"}'), ('{}', 'got {}'), ('{"mIoU": NaN}', 'got')])
    def test_other_files_are_refused(self, text, message, tool, tmp_path):
        path = tmp_path / 'results.json'
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=rf'^--metrics {path}: .*{message}'):
            tool.read_metrics(path)

    def test_the_model_is_described(self, published):
        card = published['detector']['md'].read_text()
        for row in ('| task | detection |', '| config | mine |', '| model | CascadeRCNN |', '| licence | not stated |',
                    '| classes | 6: disk, square, triangle, star, ring, cross |', 'multiply-accumulates, 64 × 96 |'):
            assert row in card, row
        assert 'mem_channels' in card and f'torch {torch.__version__.split("+")[0]}' in card


    def test_a_model_that_cannot_be_counted_says_so(self, tool):
        model = torch.nn.Linear(10, 100)
        model.cfg = Config(dict(default_scope='mmseg'))
        found = model_card.cost(model)
        assert found['parameters'] == '0.00 M'
        assert found['FLOPs'].startswith('not counted: expected a classifier, detector or segmentor')


class TestLicence:
    @pytest.fixture
    def source(self, tmp_path):
        """Weights with a licence, as the converter writes them."""
        torch.save(dict(meta=dict(licence=LICENCE), state_dict=dict(x=torch.ones(1))), tmp_path / 'source.pth')
        return tmp_path / 'source.pth'

    def from_source(self, source, trained, tmp_path):
        """A checkpoint whose training started from ``source``."""
        def change(checkpoint):
            text = checkpoint['meta']['cfg']
            assert 'checkpoint=None' in text
            checkpoint['meta']['cfg'] = text.replace('checkpoint=None', f'checkpoint={str(source)!r}', 1)

        return changed(trained['segmentor'][1], tmp_path / 'from_source.pth', change)

    def test_of_the_weights_it_started_from_is_kept(self, source, publish, trained, tmp_path):
        checkpoint = self.from_source(source, trained, tmp_path)
        files, printed = publish('segmentor', checkpoint=checkpoint)
        assert torch.load(files['pth'], weights_only=True)['meta']['licence'] == LICENCE
        card = files['md'].read_text()
        assert f'| licence | {LICENCE} |' in card and f'| started from | {source} |' in card
        assert 'licence' not in printed
        # And again by what is made of that.
        again, _ = publish('segmentor', checkpoint=files['pth'], config=files['py'], out='again')
        assert torch.load(again['pth'], weights_only=True)['meta']['licence'] == LICENCE
        with pytest.raises(CheckpointError, match=f"licence .* several: .*{LICENCE}.*--licence: 'MIT'"):
            publish('segmentor', '--licence', 'MIT', checkpoint=checkpoint, out='third')

    def test_that_cannot_be_found_out_is_said(self, publish, trained, tmp_path):
        checkpoint = self.from_source(tmp_path / 'gone.pth', trained, tmp_path)
        files, printed = publish('segmentor', '--licence', 'MIT', checkpoint=checkpoint)
        assert torch.load(files['pth'], weights_only=True)['meta']['licence'] == 'MIT'
        assert f'note: the training started from {tmp_path / "gone.pth"}, which say nothing of their licence' in printed
        assert 'states no licence' not in printed
        assert 'note: the card states no licence' in publish('segmentor', out='without')[1]

    def test_of_converted_weights(self, tool):
        meta = dict(licence=LICENCE, source='v2.pt', version='ConvNeXt-V2')
        assert tool.find_origin(meta, None, 'x.pth', False) == (LICENCE, ['v2.pt (ConvNeXt-V2 weights, converted)'], [])
        assert tool.find_origin({}, None, 'x.pth', False) == (None, [], [])
        assert tool.find_origin(dict(cfg='a = 1'), 'MIT', 'x.pth', False) == ('MIT', ['random weights'], [])

    def test_of_the_checkpoint_itself(self, publish, trained, tmp_path):
        checkpoint = changed(trained['segmentor'][1], tmp_path / 'x.pth',
                             lambda checkpoint: checkpoint['meta'].update(licence=LICENCE))
        files, _ = publish('segmentor', '--licence', LICENCE, checkpoint=checkpoint)
        assert f'| licence | {LICENCE} |' in files['md'].read_text()
        with pytest.raises(CheckpointError, match='several'):
            publish('segmentor', '--licence', 'MIT', checkpoint=checkpoint, out='other')


class TestRefused:
    def test_values_that_are_not_finite(self, publish, trained, tmp_path):
        def change(checkpoint):
            checkpoint['state_dict']['backbone.norm0.weight'][3] = float('inf')

        checkpoint = changed(trained['segmentor'][1], tmp_path / 'x.pth', change)
        with pytest.raises(CheckpointError, match='not finite, in 1 of its weights such as backbone.norm0.weight'):
            publish('segmentor', checkpoint=checkpoint)
        assert not (tmp_path / 'published').exists()

    def test_another_model(self, publish, trained, tmp_path):
        with pytest.raises(CheckpointError, match='is not of this model: '):
            publish('segmentor', checkpoint=trained['classifier'][1])
        checkpoint = changed(trained['segmentor'][1], tmp_path / 'x.pth',
                             lambda checkpoint: checkpoint['state_dict'].update({'spare.weight': torch.ones(1)}))
        with pytest.raises(CheckpointError, match='lacks 1 of its weights, such as spare.weight'):
            publish('segmentor', checkpoint=checkpoint)

    def test_the_same_weights_computing_something_else(self, publish):
        with pytest.raises(CheckpointError, match=r"memory_cfg\.chunk_size is None there and 4 here\. Name the co"):
            publish('segmentor', '--cfg-options', 'model.backbone.memory_cfg.chunk_size=4')

    def test_other_classes(self, publish, trained, tmp_path):
        names = ('soil', *CLASSES['segmentor'][1:])
        checkpoint = changed(trained['segmentor'][1], tmp_path / 'x.pth',
                             lambda checkpoint: checkpoint['meta']['dataset_meta'].update(classes=names))
        with pytest.raises(CheckpointError, match='was trained for the classes soil, disk, .* the config has backgr'):
            publish('segmentor', checkpoint=checkpoint)

    def test_objects_beside_the_classes(self, publish, trained, tmp_path):
        checkpoint = changed(trained['segmentor'][1], tmp_path / 'x.pth',
                             lambda checkpoint: checkpoint['meta']['dataset_meta'].update(more=torch.ones(1)))
        with pytest.raises(CheckpointError, match=r'meta\.dataset_meta\.more must be a plain value .* got a Tensor'):
            publish('segmentor', checkpoint=checkpoint)

    @pytest.mark.parametrize('name', ['a/b', '', 'a b'])
    def test_names_that_are_none(self, name, publish):
        with pytest.raises(ValueError, match='^--name must consist of letters'):
            publish('segmentor', '--name', name)

    def test_a_folder_that_cannot_be(self, tool, tmp_path):
        (tmp_path / 'file').write_text('')
        with pytest.raises(ValueError, match=f'^--out-dir {tmp_path / "file"}: File exists'):
            tool.write(tmp_path / 'file', {'x': b''})


def test_files_appear_when_all_are_complete(tool, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def fail(path, data):
        if path.name == 'b':
            raise OSError(28, 'No space left on device')
        write_bytes(path, data)

    monkeypatch.setattr(Path, 'write_bytes', fail)
    with pytest.raises(ValueError, match='No space left on device'):
        tool.write(tmp_path / 'out', dict(a=b'1', b=b'2'))
    assert list((tmp_path / 'out').iterdir()) == []
    monkeypatch.undo()
    tool.write(tmp_path / 'out', dict(a=b'1', b=b'2'))
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['a', 'b']


def test_paths_of_this_machine_are_named(tool):
    origin = tool.Origin('MIT', [], [])
    note, = tool.notes("a = '/home/me/x'\nb = dict(c=\"~/y\", d='data/coco/')\n", origin, dict(mIoU=1.0))
    assert note == 'the config names paths of this machine: /home/me/x, ~/y'
