"""Checkpoints by path, URL and name, of this model and of others."""
import functools
import logging
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.fileio import load
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from safetensors import torch as safetensors

from convneur_mm.engine import safe_loading
from convneur_mm.engine.files import checkpoint
from convneur_mm.engine.files.checkpoint import (
    check_all_match,
    check_backbone_shapes,
    check_some_match,
    checkpoint_weights,
    compare_weights,
    fetch_checkpoint,
    is_mmengine_name,
    load_pretrained,
    read_checkpoint,
)
from convneur_mm.engine.files.weights_file import CheckpointError, CheckpointNotFoundError, UnsafeCheckpointError
from convneur_mm.engine.launch import readable_checkpoint
from convneur_mm.models import ConvNeur

ROOT = Path(__file__).parents[3]


def flat(value, key=''):
    """(key, value) of all leaves, with log buffers and arrays taken apart."""
    if isinstance(value, HistoryBuffer):
        value = vars(value)
    if isinstance(value, dict):
        return [leaf for name in value for leaf in flat(value[name], f'{key}.{name}')]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in flat(item, f'{key}[{i}]')]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [(key, type(value), str(value.dtype), value.tolist())]
    return [(key, type(value), value)]


class TestSoundCheckpoints:
    def test_load_as_any_pickle_would(self, trained):
        path = trained / 'epoch_2.pth'
        whole = torch.load(path, map_location='cpu', weights_only=False)
        assert {'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub', 'meta'} <= set(whole)
        assert isinstance(whole['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
        assert len(flat(whole)) > 50
        assert flat(read_checkpoint(str(path))) == flat(whole)
        with safe_loading():
            assert flat(CheckpointLoader.load_checkpoint(str(path))) == flat(whole)
            assert flat(torch.load(path)) == flat(whole)

    def test_resume_as_any_pickle_would(self, trained, run):
        results = []
        for args in [[], ['--allow-pickle']]:
            shutil.rmtree('work', ignore_errors=True)
            shutil.copytree(trained, 'work')
            Path('work/last_checkpoint').write_text('work/epoch_2.pth')
            assert run('train', '--resume', *args, '--cfg-options', 'train_cfg.max_epochs=3') is None
            saved = torch.load('work/epoch_3.pth', weights_only=False)
            assert len(saved['message_hub']['log_scalars']['train/loss'].data[0]) == 6
            del saved['meta'], saved['message_hub']
            results.append(flat(saved))
        assert results[0] == results[1]
        assert results[0] != flat(torch.load(trained / 'epoch_2.pth', weights_only=False))

    def test_are_tested(self, trained, run):
        assert run('test', trained / 'epoch_2.pth') is None
        assert pickle.loads(Path('predictions.pkl').read_bytes()) == [{}, {}]

    @pytest.mark.parametrize('name, save', [
        ('weights.safetensors', safetensors.save_file),
        ('weights.pth', safetensors.save_file),  # known by its contents, too
        ('flat.pth', torch.save),
        ('timm.pth', lambda weights, name: torch.save(dict(model=weights), name)),
    ])
    def test_may_hold_weights_alone(self, run, name, save):
        """MMEngine's EMAHook asks for a 'state_dict'."""
        model = MODELS.build(dict(type='CheckpointTestModel'))
        weights = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
        save(weights, name)
        for allow in [], ['--allow-pickle']:
            assert run('test', name, *allow) is None
            assert run('train', *allow, '--cfg-options', f'load_from={name}', 'optim_wrapper.optimizer.lr=0.') is None
            trained = torch.load('work/epoch_2.pth', weights_only=False)['state_dict']
            assert sorted(flat(trained)) == sorted(flat(weights))
        assert 'cannot be resumed from, as it holds weights but no state of training' in run('train', '--resume', name)


@pytest.mark.parametrize('name, message', [
    ('nowhere.pth', 'no such (file|checkpoint): nowhere.pth'),
    ('open-mmlab://no_such_net', r"open-mmlab://no_such_net could not be fetched \(no model 'no_such_net'\)"),
    ('openmmlab://no_such_net', 'openmmlab://no_such_net could not be fetched'),
    ('torchvision://no_such_net', 'torchvision://no_such_net could not be fetched'),
    ('mmcls://no_such_net', 'mmcls://no_such_net could not be fetched'),
    ('s3://bucket/x.pth', r's3://bucket/x.pth could not be fetched \(Please install petrel_client'),
    ('http://127.0.0.1:9/x.pth', r'http://127.0.0.1:9/x.pth could not be fetched \(<urlopen error'),
    ('gopher://host/x.pth', r'gopher://host/x.pth could not be fetched \(<urlopen error unknown url type'),
])
def test_what_cannot_be_fetched_is_named_in_one_line(name, message, run, monkeypatch, tmp_path):
    # MMEngine takes a scheme that it does not know for a part of a path.
    in_mmengine = message if not name.startswith('gopher') else f'no such checkpoint: {name}'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    init_cfg = ['--cfg-options', 'model.init_cfg.type=Pretrained', f'model.init_cfg.checkpoint={name}']
    for args in (['test', name], ['train', '--resume', name], ['train', '--cfg-options', f'load_from={name}'],
                 ['test', name, '--allow-pickle']):
        assert re.search(message, run(*args)), args
    assert re.search(in_mmengine, run('train', *init_cfg))
    with pytest.raises(CheckpointError, match=message.replace('(file|checkpoint)', 'checkpoint')):
        read_checkpoint(name)


def test_urls_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    torch.save(dict(state_dict={'w': torch.ones(2)}), tmp_path / 'source.pth')
    url = (tmp_path / 'source.pth').as_uri()
    path = readable_checkpoint(url, 'checkpoint', False)
    assert path == f'{tmp_path}/checkpoints{tmp_path}/source.pth'
    (tmp_path / 'source.pth').unlink()
    assert read_checkpoint(url)['state_dict']['w'].sum() == 2


def test_files_of_one_name_at_several_addresses_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, dst: Path(dst).write_text(url))
    urls = [f'https://{place}' for place in ('a/epoch_12.pth', 'b/epoch_12.pth', 'b/c/epoch_12.pth', 'b/get?id=1',
                                             'b/get?id=2', 'b/../../outside')]
    assert [Path(fetch_checkpoint(url)).read_text() for url in [*urls, *urls]] == [*urls, *urls]
    assert os.listdir(tmp_path) == ['checkpoints']


@pytest.mark.parametrize('resume', [False, True])
def test_what_the_training_began_with_is_not_tested(resume, trained, run):
    """A config in a work dir names it, where it may be gone; the checkpoint that is tested is the command line's."""
    with open('config.py', 'a') as file:
        file.write(f'\nload_from = "gone.pth"\nresume = {resume}\n')
    # Weights alone, which nothing can be resumed from.
    torch.save(dict(state_dict=read_checkpoint(str(trained / 'epoch_2.pth'))['state_dict']), 'weights.pth')
    assert run('test', trained / 'epoch_2.pth') is run('test', 'weights.pth') is None
    assert run('train') == 'load_from: no such file: gone.pth'


@pytest.mark.parametrize('args', [['test', 'other.pth'], ['train', '--cfg-options', 'load_from=other.pth']])
def test_a_checkpoint_of_another_model_is_refused(args, run):
    """MMEngine alone would log the mismatch and go on with random weights."""
    torch.save(dict(state_dict={'layer1.conv.weight': torch.zeros(3)}), 'other.pth')
    assert re.search("other.pth holds none of the model's weights.*layer1.conv.weight", run(*args))


FETCH = """
import datetime, os, sys, time
import torch.distributed
from convneur_mm.engine.files.checkpoint import fetch_checkpoint
store, rank, *urls = sys.argv[1:]
torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=int(rank), world_size=2,
                                     timeout=datetime.timedelta(seconds=60))
for url in urls:
    try:
        print('path', fetch_checkpoint(url), flush=True)
    except ValueError as error:
        print('error', error, flush=True)
# The other one may still read what this one has sent.
open(f'{store}.{rank}', 'w').close()
while not os.path.exists(f'{store}.{1 - int(rank)}'):
    time.sleep(0.05)
os._exit(0)
"""


def test_processes_of_two_machines_meet_whichever_has_the_file(tmp_path):
    """The one that has it would else go on without the other, which would wait for it for ever."""
    torch.save(dict(state_dict={'w': torch.ones(2)}), tmp_path / 'there.pth')
    there, gone = (tmp_path / 'there.pth').as_uri(), (tmp_path / 'gone.pth').as_uri()
    hubs = [tmp_path / f'hub{rank}' / 'hub' / 'checkpoints' / tmp_path.relative_to('/') for rank in range(2)]
    hubs[0].mkdir(parents=True)
    hubs[1].mkdir(parents=True)
    (hubs[0] / 'there.pth').write_bytes((tmp_path / 'there.pth').read_bytes())
    (hubs[1] / 'gone.pth').write_bytes(b'x')
    processes = [subprocess.Popen(
        [sys.executable, '-c', FETCH, str(tmp_path / 'store'), str(rank), there, gone], text=True, cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, 'TORCH_HOME': str(tmp_path / f'hub{rank}'), 'OMP_NUM_THREADS': '1'}) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    for hub, output in zip(hubs, outputs):
        of_there, of_gone = [line for line in output if ' - INFO - downloading ' not in line]
        # One of them fetches it.
        assert of_there == f'path {hub}/there.pth'
        assert (hub / 'there.pth').read_bytes() == (tmp_path / 'there.pth').read_bytes()
        # Both fail where one cannot.
        assert re.match(r'error file://.*/gone\.pth could not be fetched \(.*\); check the address', of_gone)


def test_processes_of_a_machine_download_once(tmp_path, monkeypatch):
    """Before they have joined a group. The file has its name only when it is complete."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    path = tmp_path / 'checkpoints' / 'host' / 'x.pth'
    calls = []

    def download(url, dst):
        calls.append(url)
        time.sleep(0.2)
        Path(dst).write_bytes(b'x')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    threads = [threading.Thread(target=fetch_checkpoint, args=('http://host/x.pth', )) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ['http://host/x.pth'] and path.read_bytes() == b'x'


def matching(own, weights, classes=None):
    """The error of check_all_match, of weights with these shapes, without its beginning."""
    own, weights = ({name: torch.empty(shape) for name, shape in shapes.items()} for shapes in (own, weights))
    with pytest.raises(CheckpointError) as error:
        check_all_match(own, compare_weights(own, weights), 'x.pth', classes)
    return str(error.value).removeprefix('x.pth is not of this model: ')


class TestDifferences:
    """Between a model's weights and those of a checkpoint."""

    def test_are_found_by_names_and_shapes(self):
        own = {'backbone.a': torch.ones(2), 'backbone.b': torch.ones(3), 'head.c': torch.ones(4), 'same': torch.ones(1),
               'missing': torch.ones(1), 'bn.num_batches_tracked': torch.tensor(0), 'extra_state': 'text'}
        weights = {'backbone.a': torch.ones(3), 'same': torch.zeros(1), 'backbone.d': torch.ones(1),
                   'extra_state': torch.ones(1), 'e': torch.ones(1)}
        differences = compare_weights(own, weights)
        assert differences == (['backbone.b', 'head.c', 'missing'], {'backbone.a': ((3,), (2,))},
                               ['backbone.d', 'extra_state', 'e'])

    def test_auxiliary_heads_do_not_predict(self):
        own = {'auxiliary_head.a': torch.ones(2), 'auxiliary_head.b': torch.ones(1), 'head.c': torch.ones(4)}
        weights = {'auxiliary_head.a': torch.ones(3), 'auxiliary_head.d': torch.ones(1), 'e': torch.ones(1)}
        assert compare_weights(own, weights).for_prediction() == (['head.c'], {}, ['e'])

    def test_equal_weights_pass(self):
        own = {'w': torch.ones(2)}
        check_all_match(own, compare_weights(own, {'w': torch.zeros(2), 'other': torch.ones(1)}), 'x.pth', None)
        check_backbone_shapes(compare_weights(own, {'w': torch.zeros(3)}), 'x.pth')
        check_some_match(['a', 'b'], ['b', 'c'], 'x.pth')

    def test_none_in_common(self):
        with pytest.raises(CheckpointError) as error:
            check_some_match(iter(['a', 'b']), iter(['c', 'd', 'e', 'f', 'g']), 'x.pth')
        assert str(error.value) == ("x.pth holds none of the model's weights: the model has a, b, the checkpoint c, d, "
                                    'e, f, … 5 in all')
        with pytest.raises(CheckpointError, match='the model has a, b, c, d, the checkpoint nothing$'):
            check_some_match(list('abcd'), [], 'x.pth')

    @pytest.mark.parametrize('own, weights, classes, message', [
        ({'backbone.a': (2, 2), 'backbone.b': (2,), 'head.c': (3,)}, {'backbone.a': (3, 2), 'head.c': (3,)}, None,
         'backbone: 1 of 2 weights missing; backbone: 1 of 2 of other shapes, such as backbone.a (3, 2) there, (2, 2) '
         'here. Another arch of the backbone?'),
        ({'backbone.a': (2,), 'neck.b': (2,)}, {'neck.b': (3,)}, (2, 3),
         'backbone: 1 of 1 weights missing; neck: 1 of 1 of other shapes, such as neck.b (3,) there, (2,) here. '
         'Another backbone?'),
        ({'backbone.a': (2,), 'bbox_head.b': (2,), 'neck.c': (1,)}, {'backbone.a': (2,), 'neck.c': (2,)}, None,
         'bbox_head: 1 of 1 weights missing; neck: 1 of 1 of other shapes, such as neck.c (2,) there, (1,) here. '
         'Another head?'),
        ({'neck.head': (2,)}, {}, None, 'neck: 1 of 1 weights missing. Another model?'),
        ({'neck.a': (2,), 'head.b': (2, 4)}, {'neck.a': (2,), 'head.b': (3, 4)}, None,
         'head: 1 of 1 of other shapes, such as head.b (3, 4) there, (2, 4) here. Different classes?'),
        ({'head.b': (2, 4)}, {'head.b': (3, 4)}, (3, 2),
         'head: 1 of 1 of other shapes, such as head.b (3, 4) there, (2, 4) here. Different classes? '
         'The checkpoint has 3, the config 2.'),
        ({'head.b': (2, 4)}, {'head.b': (3, 4)}, (3, 3),
         'head: 1 of 1 of other shapes, such as head.b (3, 4) there, (2, 4) here. Different classes?'),
        ({'head.b': (2, 4)}, {'head.b': (2, 5)}, (3, 2),
         'head: 1 of 1 of other shapes, such as head.b (2, 5) there, (2, 4) here'),
    ])
    def test_are_named_with_a_guess(self, own, weights, classes, message):
        assert matching(own, weights, classes) == message

    def test_of_a_backbone_to_fine_tune(self):
        own = {'backbone.a': torch.ones(2), 'backbone.b': torch.ones(2), 'head.c': torch.ones(2)}
        with pytest.raises(CheckpointError) as error:
            check_backbone_shapes(compare_weights(own, {name: torch.ones(3) for name in own}), 'x.pth')
        assert str(error.value) == ('x.pth is of another backbone, and MMEngine would leave random what does not fit: '
                                    'backbone.a (3,) there, (2,) here, … 2 in all. Another arch?')

    def test_weights_are_tensors_without_the_prefix_of_ddp(self):
        found = checkpoint_weights(dict(state_dict={'module.a': torch.ones(1), 'b.module.c': torch.ones(1), 'd': 1}))
        assert list(found) == ['a', 'b.module.c']


@pytest.fixture
def logged(monkeypatch):
    """(Level, message) of what is logged."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    logger = logging.Logger('x')
    logger.addHandler(Keep())
    monkeypatch.setattr(MMLogger, 'get_current_instance', lambda: logger)
    return lines


class TestFetching:
    def test_paths_may_begin_in_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        (tmp_path / 'x.pth').touch()
        assert fetch_checkpoint('~/x.pth') == str(tmp_path / 'x.pth')
        with pytest.raises(CheckpointNotFoundError, match='^no such checkpoint: ~/y.pth$'):
            fetch_checkpoint('~/y.pth')

    def test_downloads_are_logged_once(self, tmp_path, monkeypatch, logged):
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
        urls = [(tmp_path / name).as_uri() for name in ('x.pth', 'y.pth')]
        for name in 'x.pth', 'y.pth':
            (tmp_path / name).write_bytes(b'x')
        for url in [*urls, *urls]:
            assert fetch_checkpoint(url) == f'{tmp_path}/hub/checkpoints{tmp_path}/{url[-5:]}'
        assert [message.split(' to ')[0] for _, message in logged] == [f'downloading {url}' for url in urls]

    def test_the_error_of_another_process_is_an_error(self, tmp_path, monkeypatch):
        """This one has the file."""
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
        (tmp_path / 'checkpoints' / 'host').mkdir(parents=True)
        (tmp_path / 'checkpoints' / 'host' / 'x.pth').touch()
        monkeypatch.setattr(checkpoint, 'all_gather_object', lambda error: [error, 'no network there', 'nor here'])
        with pytest.raises(CheckpointError, match='^no network there$'):
            fetch_checkpoint('http://host/x.pth')

    def test_what_holds_no_weights_is_no_checkpoint(self, tmp_path):
        torch.save([1], tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match='x.pth is no checkpoint: it holds a list'):
            read_checkpoint(str(tmp_path / 'x.pth'))

    def test_names_of_mmengine(self):
        assert is_mmengine_name('torchvision://resnet50') and is_mmengine_name('s3://bucket/x.pth')
        assert not is_mmengine_name('http://host/x.pth') and not is_mmengine_name('work/torchvision.pth')


class TestBackbones:
    """Weights for a backbone alone, with the errors' remedies."""

    def test_linear_layers_saved_as_convolutions(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        weights = model.state_dict()
        torch.save({name: value[..., None, None] if value.ndim == 2 else value for name, value in weights.items()},
                   tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'x.pth holds 1 x 1 convolutions where the model has linear layers.*'
                                                  r'weight.reshape\(expected shape\): 0.weight \(4, 3, 1, 1\) '
                                                  r'\(expected \(4, 3\)\)'):
            load_pretrained(model, str(tmp_path / 'x.pth'))

    def test_another_arch(self, tmp_path):
        torch.save(nn.Linear(3, 4).state_dict(), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'x.pth holds weights of other shapes than the model, is it another '
                                                  r'arch\? weight \(4, 3\) \(expected \(5, 3\)\), bias'):
            load_pretrained(nn.Linear(3, 5), str(tmp_path / 'x.pth'))

    @pytest.mark.parametrize('names', [
        ('stem.0.weight', 'stages.0.blocks.0.conv_dw.weight'),
        # Of these, the first is ours too.
        ('downsample_layers.0.0.weight', 'stages.0.0.dwconv.weight'),
        ('backbone.downsample_layers.0.0.weight', 'backbone.stages.0.0.dwconv.weight'),
        ('downsample_layers.0.0.weight', 'stages.0.0.gamma'),
        ('backbone.downsample_layers.0.0.weight', 'backbone.stages.0.0.gamma'),
    ], ids=['timm', 'authors', 'authors-detector', 'mmpretrain-v1', 'mmpretrain-v1-classifier'])
    def test_convnext_has_to_be_converted(self, names, tmp_path):
        backbone = ConvNeur(dict(depths=[1], channels=[16], mem_channels=16), out_indices=0)
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        path = tmp_path / 'a folder' / 'x.pth'
        path.parent.mkdir()
        torch.save({name: torch.zeros(16, 3, 4, 4) for name in names}, path)
        with pytest.raises(CheckpointError, match='^.*Those are weights of ConvNeXt: convert them by ') as error:
            load_pretrained(backbone, str(path))
        assert '\n' not in str(error.value)
        tool, *arguments = shlex.split(str(error.value).partition('convert them by ')[2])
        assert (Path(__file__).parents[3] / tool).is_file() and arguments == [str(path), 'NEW.pth']
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    @pytest.mark.parametrize('source, target, is_told', [
        ('none', 'stage', True), ('none', 'none', False), ('stage', 'stage', False), ('stage', 'block', False)])
    def test_a_file_without_memories_may_be_of_convnext(self, source, target, is_told, tmp_path, logged):
        """mmpretrain's ConvNeXt-V2 has our names."""
        arch = dict(depths=[2, 1], channels=[16, 16], mem_channels=16)
        torch.save(ConvNeur(arch, placement=source, out_indices=1).state_dict(), tmp_path / 'x.pth')
        load_pretrained(ConvNeur(arch, placement=target, out_indices=(0, 1)), str(tmp_path / 'x.pth'))
        warning, = [line for level, line in logged if level == 'WARNING']  # norm0 is missing in any case
        assert ('If these are weights of ConvNeXt-V2, convert them by tools/' in warning) == is_told

    @pytest.mark.parametrize('prefix, saved', [
        (None, ''), (None, 'backbone.'), ('', ''), ('neck', 'neck.'), ('neck.', 'neck.'), ('model.backbone',
                                                                                           'model.backbone.')])
    def test_lie_below_a_prefix(self, prefix, saved, tmp_path, logged):
        weights = {f'{saved}{name}': torch.full_like(value, 7) for name, value in nn.Linear(2, 1).state_dict().items()}
        torch.save(dict(state_dict={**weights, 'other.weight': torch.ones(5)}), tmp_path / 'x.pth')
        model = nn.Linear(2, 1)
        load_pretrained(model, str(tmp_path / 'x.pth'), prefix)
        assert model.weight.tolist() == [[7, 7]] and model.bias.tolist() == [7]
        unused = [('INFO', f'1 weights of {tmp_path}/x.pth are not used: other.weight')]
        assert logged == [('INFO', f'loaded 2 of 2 backbone weights from {tmp_path}/x.pth'), *(unused * (not saved))]

    def test_what_is_missing_is_logged(self, tmp_path, logged):
        torch.save({'weight': torch.ones(1, 2)}, tmp_path / 'x.pth')
        load_pretrained(nn.Linear(2, 1), str(tmp_path / 'x.pth'))
        assert logged == [
            ('INFO', f'loaded 1 of 2 backbone weights from {tmp_path}/x.pth'),
            ('WARNING', f'{tmp_path}/x.pth lacks 1 backbone weights, which stay as initialised: bias')]

    def test_none_below_the_prefix(self, tmp_path):
        torch.save({'weight': torch.ones(1, 2)}, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match='the model has a.weight, a.bias, the checkpoint weight$'):
            load_pretrained(nn.ModuleDict(dict(a=nn.Linear(2, 1))), str(tmp_path / 'x.pth'), 'neck')

    @pytest.mark.parametrize('options', [{}, dict(allow_pickle=False), dict(allow_pickle=True)])
    def test_of_a_file_that_needs_pickle(self, options, tmp_path):
        torch.save({'weight': torch.ones(1, 2), 'bias': torch.ones(1), 'call': functools.partial(int)},
                   tmp_path / 'x.pth')
        for read in read_checkpoint, functools.partial(load_pretrained, nn.Linear(2, 1)):
            with nullcontext() if options.get('allow_pickle') else pytest.raises(UnsafeCheckpointError):
                read(str(tmp_path / 'x.pth'), **options)


@pytest.mark.needs('mmpretrain')
def test_the_file_of_overlocks_authors_is_tested_as_it_is(run, tiny_config):
    """Its names are those of backbone and head, without a word before them: the scores are the same."""
    cfg = tiny_config('')
    cfg.custom_imports = dict(imports=['convneur_mm', 'convneur_mm.models.overlock.head'])
    channels = [8, 16, 32, 32]
    cfg.model.backbone = dict(type='OverLoCK', out_indices=3, for_classifier=True, arch=dict(
        depths=[1] * 4, focus_depths=[1, 1], channels=channels, kernel_sizes=[7] * 4, groups=[2, 2]))
    cfg.model.head = dict(type='OverLoCKClsHead', num_classes=6, in_channels=40, overview_channels=32)
    cfg.dump('config.py')
    init_default_scope('mmpretrain')
    import convneur_mm.models.overlock.head  # noqa: F401
    weights = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=weights, meta={}), 'ours.pth')
    torch.save({name.removeprefix('backbone.').removeprefix('head.'): value for name, value in weights.items()},
               'authors.pth')
    found = []
    for name in 'ours', 'authors':
        assert run('test', f'{name}.pth', '--out', f'{name}.pkl') is None
        found.append(load(f'{name}.pkl'))
    assert len(found[0]) == 6
    for ours, authors in zip(*found):
        assert torch.equal(ours['pred_score'], authors['pred_score'])

    # One that lacks a weight is refused as before.
    del weights['head.aux_head.0.weight']
    torch.save({name.removeprefix('backbone.').removeprefix('head.'): value for name, value in weights.items()},
               'partial.pth')
    assert re.match("partial.pth holds none of the model's weights", run('test', 'partial.pth'))
