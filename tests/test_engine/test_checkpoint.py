"""Checkpoints by path, URL and name, of this model and of others."""
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from safetensors import torch as safetensors

from convneur_mm.engine import safe_loading
from convneur_mm.engine.checkpoint import fetch_checkpoint, load_pretrained, read_checkpoint
from convneur_mm.engine.launch import readable_checkpoint
from convneur_mm.engine.weights_file import CheckpointError
from convneur_mm.models import ConvNeur

ROOT = Path(__file__).parents[2]


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
            checkpoint = torch.load('work/epoch_3.pth', weights_only=False)
            assert len(checkpoint['message_hub']['log_scalars']['train/loss'].data[0]) == 6
            del checkpoint['meta'], checkpoint['message_hub']
            results.append(flat(checkpoint))
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
    assert path == str(tmp_path / 'checkpoints' / 'source.pth')
    (tmp_path / 'source.pth').unlink()
    assert read_checkpoint(url)['state_dict']['w'].sum() == 2


@pytest.mark.parametrize('args', [['test', 'other.pth'], ['train', '--cfg-options', 'load_from=other.pth']])
def test_a_checkpoint_of_another_model_is_refused(args, run):
    """MMEngine alone would log the mismatch and go on with random weights."""
    torch.save(dict(state_dict={'layer1.conv.weight': torch.zeros(3)}), 'other.pth')
    assert re.search("other.pth holds none of the model's weights.*layer1.conv.weight", run(*args))


FETCH = """
import datetime, os, sys, time
import torch.distributed
from convneur_mm.engine.checkpoint import fetch_checkpoint
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
    hubs = [tmp_path / f'hub{rank}' / 'hub' / 'checkpoints' for rank in range(2)]
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
        assert re.match(r'error file://\S*/gone\.pth could not be fetched \(.*\); check the address', of_gone)


def test_processes_of_a_machine_download_once(tmp_path, monkeypatch):
    """Before they have joined a group. The file has its name only when it is complete."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    path = tmp_path / 'checkpoints' / 'x.pth'
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

    @pytest.mark.needs('timm')
    def test_timms_names(self, tmp_path):
        """Renamed as the message says they load, but for those of convolutions that are linear layers here."""
        import timm
        weights = timm.create_model('convnextv2_atto', depths=(1, 1, 1, 1)).state_dict()
        torch.save(weights, tmp_path / 'x.pth')
        backbone = ConvNeur(dict(depths=[1, 1, 1, 1], channels=[40, 80, 160, 320], mem_channels=16))
        with pytest.raises(CheckpointError, match=r"Those are timm's names: save it again with stem\.") as error:
            load_pretrained(backbone, str(tmp_path / 'x.pth'))
        assert '\n' not in str(error.value)
        for pattern, name in (
                (r'^stem\.', 'downsample_layers.0.'), (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
                (r'^stages\.(\d)\.blocks\.', r'stages.\1.'), ('conv_dw', 'depthwise_conv'),
                (r'mlp\.fc', 'pointwise_conv'), (r'mlp\.grn\.weight', 'grn.gamma'), (r'mlp\.grn\.bias', 'grn.beta')):
            assert name.replace('\\1', 'N') in str(error.value)
            weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
        weights = {name: value for name, value in weights.items() if not name.startswith('head.')}
        assert set(weights) <= set(backbone.state_dict())
        torch.save(weights, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match='1 x 1 convolutions .*pointwise_conv1.weight'):
            load_pretrained(backbone, str(tmp_path / 'x.pth'))
