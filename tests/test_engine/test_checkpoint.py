"""Checkpoints and other files that a user names: sound ones load, those that could run code do not, by any entry.

The entries are the tools, run within this process with a model of two layers, and what the README recommends beside
them.
"""
import functools
import importlib
import importlib.util
import io
import os
import pickle
import re
import runpy
import shutil
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine import fileio
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.visualization import Visualizer
from safetensors import torch as safetensors
from torch.utils.data import Dataset

import convneur_mm
from convneur_mm.engine import safe_files, safe_loading
from convneur_mm.engine.checkpoint import load_pretrained, read_checkpoint
from convneur_mm.engine.launch import LaunchError, latest_checkpoint, readable_checkpoint
from convneur_mm.engine.weights_file import CheckpointError, UnsafeCheckpointError

ROOT = Path(__file__).parents[2]

CONFIG = """
model = dict(type='CheckpointTestModel')
train_dataloader = dict(dataset=dict(type='CheckpointTestData'), batch_size=2, collate_fn=dict(type='default_collate'),
                        sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(dataset=dict(type='CheckpointTestData'), batch_size=2, collate_fn=dict(type='default_collate'),
                       sampler=dict(type='DefaultSampler', shuffle=False))
train_cfg = dict(by_epoch=True, max_epochs=2)
test_cfg = dict()
test_evaluator = dict(type='DumpResults', out_file_path='predictions.pkl')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
param_scheduler = [dict(type='MultiStepLR', milestones=[1, 2]), dict(type='LinearLR', begin=0, end=3, by_epoch=False)]
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook', interval=1))
custom_hooks = [dict(type='EMAHook')]
randomness = dict(seed=3)
"""


@MODELS.register_module()
class CheckpointTestModel(BaseModel):
    """Two layers, of which the second may be initialised from a checkpoint."""

    def __init__(self, init_cfg=None, head_init_cfg=None, data_preprocessor=None):
        super().__init__(init_cfg=init_cfg, data_preprocessor=data_preprocessor)
        self.layer = nn.Linear(3, 4)
        self.head = CheckpointTestHead(head_init_cfg)

    def forward(self, inputs, mode='tensor'):
        out = self.head(self.layer(inputs))
        return dict(loss=out.square().mean()) if mode == 'loss' else [{}]


class CheckpointTestHead(BaseModule):
    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(x)


@DATASETS.register_module()
class CheckpointTestData(Dataset):
    """Four points; ``ann_file`` is loaded as MMEngine's own data sets do."""

    metainfo = dict(classes=('a', 'b'), palette=[(1, 2, 3)])

    def __init__(self, ann_file=None, **kwargs):
        self.annotations = fileio.load(ann_file) if ann_file else None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((3,), float(index)))


def tool(name):
    spec = importlib.util.spec_from_file_location(f'{name}_tool', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a tool on the config above in an empty folder, and returns the one line of its error, or None."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text(CONFIG)

    def run(name, *args):
        module = tool(name)
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', 'config.py', '--work-dir', 'work', *map(str, args)])
        capfd.readouterr()
        for manager in MMLogger, MessageHub, Visualizer, DefaultScope:
            # A run is a process of its own; the loggers of former ones write to what pytest has closed.
            manager._instance_dict.clear()
        try:
            module.launch.run(module.main)
        except SystemExit as error:
            assert error.code == 2
            errors = capfd.readouterr().err.splitlines()
            assert 'Traceback' not in ''.join(errors)
            assert errors[-1].startswith('error: ')
            return errors[-1].removeprefix('error: ')
        return None

    return run


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def in_zip(opcodes):
    """A file of torch's format around hand-written opcodes, which get a valid checkpoint's place."""
    buffer = io.BytesIO(saved(dict(state_dict={})))
    result = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, 'w') as new:
        for name in old.namelist():
            new.writestr(name, opcodes if name.endswith('/data.pkl') else old.read(name))
    return result.getvalue()


def in_tar(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:') as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def text(value):
    return b'X' + struct.pack('<I', len(value)) + value.encode()


class Program(nn.Module):
    """Saved as TorchScript, this writes a file when it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.path)

    def forward(self, x):
        return x


def torchscript(marker):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Program(str(marker))), buffer)
    return buffer.getvalue()


def numpy_file(marker):
    path = marker.with_name('objects.npy')
    np.save(path, np.array([Call(open, str(marker), 'w')], dtype=object), allow_pickle=True)
    return saved(dict(state_dict={}, x=Call(np.load, str(path), None, True)))


def script(marker):
    path = marker.with_name('script.py')
    path.write_text(f'open({str(marker)!r}, "w")')
    return saved(Call(runpy.run_path, str(path)))


def eval_through_getattr(marker):
    """``getattr`` is all this asks for, and a function of torch's that its weights-only reader accepts."""
    builtins = Call(getattr, getattr, '__self__')
    evaluate = Call(getattr, builtins, 'eval')
    return saved(dict(state_dict={}, x=Call(
        torch._tensor._rebuild_from_type_v2, evaluate, torch.Tensor, (f'open({str(marker)!r}, "w")',), {})))


# Each makes the bytes of a file that creates ``marker`` where it is loaded as any pickle.
HOSTILE = {
    'os.system': lambda marker: saved(dict(state_dict={}, x=Call(os.system, f'touch {marker}'))),
    'eval': lambda marker: saved(dict(state_dict={}, x=Call(eval, f'open({str(marker)!r}, "w")'))),
    'key of a dict': lambda marker: saved({'state_dict': {}, Call(os.system, f'touch {marker}'): 1}),
    'getattr chain': eval_through_getattr,
    '_rebuild_from_type_v2': lambda marker: saved(
        Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f'touch {marker}',), {})),
    'functools.partial': lambda marker: saved(Call(functools.partial(open, str(marker), 'w'))),
    'nested torch.load': lambda marker: saved(
        Call(torch.storage._load_from_bytes, saved(Call(open, str(marker), 'w')))),
    'numpy.load': numpy_file,
    'runpy': script,
    'array of objects': lambda marker: saved(dict(
        state_dict={}, x=np.array([[Call(open, str(marker), 'w')], [None]], dtype=object))),
    'log buffer of objects': lambda marker: saved(dict(state_dict={}, message_hub=dict(log_scalars=dict(
        loss=HistoryBuffer([Call(open, str(marker), 'w')], [1]))))),
    'dotted name': lambda marker: in_zip(
        b'\x80\x04' + text('torch') + text('os.system') + b'\x93' + text(f'touch {marker}') + b'\x85R.'),
    '__setstate__ of an instance': lambda marker: in_zip(
        b'\x80\x02ccollections\nOrderedDict\n)R}' + text('__setstate__') + b'cos\nsystem\nsb'
        + text(f'touch {marker}') + b'b.'),
    'opcode INST': lambda marker: in_zip(b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n."),
    'opcode OBJ': lambda marker: in_zip(b'(cos\nsystem\n' + text(f'touch {marker}') + b'o.'),
    'old format': lambda marker: saved(Call(open, str(marker), 'w'), _use_new_zipfile_serialization=False),
    'bare pickle': lambda marker: pickle.dumps(Call(open, str(marker), 'w')),
    'pickle of protocol 0': lambda marker: pickle.dumps(Call(open, str(marker), 'w'), 0),
    'tar format': lambda marker: in_tar(storages=pickle.dumps(Call(open, str(marker), 'w'))),
    'TorchScript': torchscript,
}


@pytest.fixture(params=HOSTILE)
def hostile(request, tmp_path):
    """A hostile file, and what it creates if it runs."""
    path, marker = tmp_path / 'hostile.pth', tmp_path / 'marker'
    path.write_bytes(HOSTILE[request.param](marker))
    assert not marker.exists()
    return path, marker


def assert_one_line(message, path):
    assert '\n' not in str(message)
    assert str(path) in str(message)
    assert re.search('was not loaded, because|is no checkpoint, or damaged', str(message)), message


class Inferencer(BaseInferencer):
    """What MMEngine's inferencers share, without data and pictures."""

    def __init__(self, cfg, weights):
        self.model = self._init_model(cfg, weights)

    def _init_pipeline(self, cfg):
        """Not needed."""

    def visualize(self, inputs, preds, show=False, **kwargs):
        """Not needed."""

    def postprocess(self, preds, visualization, return_datasample=False, **kwargs):
        """Not needed."""


def infer(path):
    Inferencer(Config(dict(model=dict(type='CheckpointTestModel'))), str(path))


def initialise_whole(path):
    CheckpointTestModel(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


def initialise_part(path):
    CheckpointTestModel(head_init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='head')).init_weights()


# Entries from Python, with and without what guards them.
ENTRIES = {
    'inferencer': infer,
    'load_checkpoint': lambda path: load_checkpoint(CheckpointTestModel(), str(path)),
    'init_cfg': initialise_whole,
    'init_cfg with prefix': initialise_part,
    'torch.load': lambda path: torch.load(path),
    'torch.load of bytes': lambda path: torch.load(io.BytesIO(path.read_bytes()), weights_only=False),
    'torch.load of the caller\'s choice': lambda path: torch.load(path, pickle_module=pickle, weights_only=False),
    'torch.hub': lambda path: torch.hub.load_state_dict_from_url(path.as_uri(), model_dir=path.with_name('hub')),
    'URL': lambda path: CheckpointLoader.load_checkpoint(path.as_uri().replace('file:', 'http:')),
}


class TestHostileFiles:
    def test_they_run_where_that_is_allowed(self, hostile):
        """Else the other tests would show nothing."""
        path, marker = hostile
        try:
            read_checkpoint(str(path), allow_pickle=True)
        except CheckpointError as error:
            assert '\n' not in str(error)
        assert marker.exists()

    def test_they_are_refused_by_our_own_reader(self, hostile):
        path, marker = hostile
        for read in read_checkpoint, lambda name: load_pretrained(nn.Linear(1, 1), name):
            with pytest.raises(CheckpointError) as error:
                read(str(path))
            assert_one_line(error.value, path)
        assert not marker.exists()

    def test_they_are_refused_by_all_that_loads_in_this_process(self, hostile, monkeypatch):
        path, marker = hostile
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(path.parent / 'hub'))
        (path.parent / 'hub' / 'checkpoints').mkdir(parents=True)
        monkeypatch.setattr('mmengine.runner.checkpoint.load_url', lambda *args, **kwargs: torch.load(path))
        for name, entry in ENTRIES.items():
            with safe_loading(), pytest.raises(CheckpointError) as error:
                entry(path)
            assert_one_line(error.value, '' if name == 'torch.load of bytes' else path.name)
            assert not marker.exists(), name

    @pytest.mark.parametrize('args', [
        ['train', '--cfg-options', 'load_from=hostile.pth'],
        ['train', '--resume', 'hostile.pth'],
        ['train', '--resume'],
        ['train', '--cfg-options', 'model.init_cfg.type=Pretrained', 'model.init_cfg.checkpoint=hostile.pth'],
        ['test', 'hostile.pth'],
    ], ids=lambda args: ' '.join(args[:2]))
    def test_they_are_refused_by_the_tools(self, hostile, run, args):
        path, marker = hostile
        if args[1:] == ['--resume']:
            Path('work').mkdir()
            path.rename('work/epoch_1.pth')
            Path('work/last_checkpoint').write_text('work/epoch_1.pth')
        name = 'work/epoch_1.pth' if args[1:] == ['--resume'] else 'hostile.pth'
        assert_one_line(run(*args), name)
        assert not marker.exists()
        run(*args, '--allow-pickle')
        assert marker.exists()


INFERENCERS = {
    'DetInferencer': ('mmdet.apis', 'cascade_rcnn_convneur_m1_shapes'),
    'MMSegInferencer': ('mmseg.apis', 'semantic_fpn_convneur_m1_shapes'),
    'ImageClassificationInferencer': ('mmpretrain.apis', 'convneur_m1_shapes'),
}


@pytest.mark.parametrize('name', INFERENCERS)
def test_the_stock_inferencers_refuse_hostile_files_within_safe_loading(name, tmp_path):
    module, config = INFERENCERS[name]
    path, marker = tmp_path / 'hostile.pth', tmp_path / 'marker'
    path.write_bytes(HOSTILE['getattr chain'](marker))

    def infer():
        getattr(importlib.import_module(module), name)(convneur_mm.config(config), str(path), device='cpu')

    with safe_loading(), pytest.raises(UnsafeCheckpointError) as error:
        infer()
    assert_one_line(error.value, path)
    assert not marker.exists()
    # What safe_loading is for: MMEngine's own loader takes any pickle.
    with pytest.raises(Exception):  # noqa: B017 (whatever the model makes of a file without weights)
        infer()
    assert marker.exists()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The work dir of two epochs: weights, their averages, optimizer, schedulers, and log buffers."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'config.py').write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', 'config.py', '--work-dir', 'work'])
        tool('train').main()
    return folder / 'work'


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
        weights = {key: torch.full_like(value, 0.5) for key, value in CheckpointTestModel().state_dict().items()}
        save(weights, name)
        for allow in [], ['--allow-pickle']:
            assert run('test', name, *allow) is None
            assert run('train', *allow, '--cfg-options', f'load_from={name}', 'optim_wrapper.optimizer.lr=0.') is None
            trained = torch.load('work/epoch_2.pth', weights_only=False)['state_dict']
            assert sorted(flat(trained)) == sorted(flat(weights))
        assert 'cannot be resumed from, as it holds weights but no state of training' in run('train', '--resume', name)

    def test_safetensors_are_missed_by_name(self, tmp_path, monkeypatch):
        safetensors.save_file({'w': torch.ones(1)}, tmp_path / 'x.safetensors')
        monkeypatch.setitem(sys.modules, 'safetensors', None)
        with pytest.raises(CheckpointError, match=r'x\.safetensors is a safetensors file.*: pip install safetensors$'):
            read_checkpoint(str(tmp_path / 'x.safetensors'))


def test_the_config_in_a_checkpoint_is_not_run(trained, run):
    """MMEngine runs it as Python, to compare the number of GPUs."""
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['meta']['config'] = 'open("marker", "w")'
    torch.save(checkpoint, 'config.pth')
    for args in [], ['--cfg-options', 'train_cfg.max_epochs=3']:
        assert run('train', '--resume', 'config.pth', *args) is None
        assert not Path('marker').exists()
    assert torch.load('work/epoch_3.pth', weights_only=False)['meta']['epoch'] == 3
    run('train', '--resume', 'config.pth', '--allow-pickle')
    assert Path('marker').exists()


@pytest.mark.parametrize('place', ['meta', 'message_hub'])
def test_inferencers_do_not_run_the_config_in_a_checkpoint(place, tmp_path, monkeypatch):
    """They do so where no other config is named."""
    monkeypatch.chdir(tmp_path)
    program = "open('marker', 'w')\nmodel = dict(type='CheckpointTestModel')"
    held = dict(meta=dict(cfg=program), message_hub=dict(runtime_info=dict(cfg=program)))
    torch.save({'state_dict': CheckpointTestModel().state_dict(), place: held[place]}, 'weights.pth')

    def infer():
        Inferencer(Config(), 'weights.pth')

    with safe_loading(), pytest.raises(CheckpointError, match='config in a checkpoint was not run.*name the config'):
        infer()
    assert not Path('marker').exists()
    infer()
    assert Path('marker').exists()


def test_a_checkpoint_has_no_other_files_deleted(trained, run):
    """MMEngine deletes the best checkpoint so far, at the path in the file, when a better one is saved."""
    Path('precious.pth').mkdir()
    Path('work').mkdir()
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    for path, kept in ('precious.pth', False), ('work/best_x.pth', True), ('work', False), ('precious.txt', False):
        checkpoint['message_hub']['runtime_info'].update(best_ckpt=str(Path(path).absolute()))
        torch.save(checkpoint, 'work/x.pth')
        with safe_loading():
            loaded = CheckpointLoader.load_checkpoint('work/x.pth')
        assert ('best_ckpt' in loaded['message_hub']['runtime_info']) is kept, path
    checkpoint['message_hub']['runtime_info'].update(keep_ckpt_ids=[1, '/../../precious'], best_ckpt=None)
    torch.save(checkpoint, 'work/x.pth')
    with safe_loading(), pytest.raises(UnsafeCheckpointError, match='keep_ckpt_ids must be numbers'):
        CheckpointLoader.load_checkpoint('work/x.pth')


NOT_CHECKPOINTS = {
    'empty': (b'', 'the file is empty'),
    'text': (b'hello', 'begins with'),
    'page': (b'<!DOCTYPE html>\n<html>Not found</html>', 'begins with'),
    'picture': (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'begins with'),
    'number': (b'\x80\x02K\x01.', 'magic number'),
    'cut-off pickle': (saved(dict(a=torch.ones(9)), _use_new_zipfile_serialization=False)[:60], 'damaged'),
    'cut-off data': (saved(dict(a=torch.ones(99)), _use_new_zipfile_serialization=False)[:-50], 'damaged'),
    'cut-off archive': (saved(dict(a=torch.ones(99)))[:-200], 'damaged'),
    'archive of something else': (None, 'damaged'),
    'cut-off safetensors': (struct.pack('<Q', 60) + b'{"w":{"dtype":"F32","shape":[2],', 'damaged'),
    'list': (saved([torch.ones(1)]), 'it holds a list, expected a dict of names and weights'),
    'tensor': (saved(torch.ones(1)), 'it holds a Tensor, expected a dict'),
    'list of weights': (saved(dict(state_dict=[1])), 'it holds a list, expected a dict'),
    'numbered weights': (saved({1: torch.ones(1)}), 'it holds a dict, expected a dict of names and weights'),
}


@pytest.mark.parametrize('kind', NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named_in_one_line(kind, tmp_path, run):
    data, message = NOT_CHECKPOINTS[kind]
    path = tmp_path / 'x.pth'
    if data is None:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('readme.txt', 'hello')
    else:
        path.write_bytes(data)
    entries = [functools.partial(entry, 'x.pth') for entry in (infer, initialise_whole, initialise_part)]
    for read in [lambda: read_checkpoint('x.pth'), lambda: load_pretrained(nn.Linear(1, 1), 'x.pth'), *entries]:
        with safe_loading(), pytest.raises(CheckpointError, match=f'^x.pth is no checkpoint.*{message}') as error:
            read()
        assert '\n' not in str(error.value)
    for args in ['test', 'x.pth'], ['train', '--resume', 'x.pth'], ['train', '--cfg-options', 'load_from=x.pth']:
        assert re.search(f'x.pth is no checkpoint.*{message}', run(*args))
    assert 'x.pth is no checkpoint' in run('test', 'x.pth', '--allow-pickle')


@pytest.mark.parametrize('mmap', [False, True])
def test_storages_end_where_their_record_does(tmp_path, mmap):
    """The number of elements stands in the pickle; behind the record lies other memory of the process."""
    with zipfile.ZipFile(io.BytesIO(saved(dict(w=torch.ones(4))))) as archive, zipfile.ZipFile(
            tmp_path / 'x.pth', 'w') as changed:
        for name in archive.namelist():
            # 4 elements of the storage and 4 of the tensor become 32767.
            changed.writestr(name, archive.read(name).replace(b'K\x04tq', b'M\xff\x7ftq').replace(
                b'K\x04\x85', b'M\xff\x7f\x85'))
    with pytest.raises(CheckpointError, match='x.pth is no checkpoint, or damaged'):
        read_checkpoint(str(tmp_path / 'x.pth'), mmap=mmap)


def test_archives_of_the_oldest_format_are_not_unpacked(tmp_path):
    """torch.load would extract members, which may be links or special files, before it reads the first one."""
    empty = pickle.dumps(0, 2)
    (tmp_path / 'x.pth').write_bytes(in_tar(storages=empty + pickle.dumps([], 2), tensors=empty, pickle=b'\x80\x02}.'))
    assert torch.load(tmp_path / 'x.pth', weights_only=False) == {}
    with pytest.raises(UnsafeCheckpointError, match='x.pth was not loaded, because it is a tar archive'):
        read_checkpoint(str(tmp_path / 'x.pth'))


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path):
    path = str(tmp_path / 'x.pth')
    torch.save({'two\nlines \x1b[2J': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"none of the model's weights.*two lines \?\[2J$"):
        load_pretrained(nn.Linear(1, 1), path)
    Path(path).write_bytes(in_zip(b'\x80\x04' + text('os\n') + text('\x1b[2J') + b'\x93.'))
    with pytest.raises(CheckpointError, match=r'it asks for os \.\?\[2J; if'):
        read_checkpoint(path)


def test_pickles_are_not_taken_for_damaged(tmp_path):
    torch.save(dict(state_dict={}, args=functools.partial(int)), tmp_path / 'x.pth')
    with pytest.raises(LaunchError, match=r'^checkpoint: .*x.pth was not loaded, because it needs pickle.*asks for '
                                          r'functools.partial; if you trust its source.*--allow-pickle'):
        readable_checkpoint(str(tmp_path / 'x.pth'), 'checkpoint', False)


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


def test_names_that_mmengine_knows_are_read_safely(tmp_path, monkeypatch, run):
    """A table of one's own, in MMENGINE_HOME, may name local files."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text('{"sound": "sound.pth", "hostile": "hostile.pth"}')
    torch.save(dict(state_dict=CheckpointTestModel().state_dict()), tmp_path / 'sound.pth')
    torch.save(Call(open, str(tmp_path / 'marker'), 'w'), tmp_path / 'hostile.pth')
    assert 'layer.weight' in read_checkpoint('open-mmlab://sound')['state_dict']
    assert run('test', 'open-mmlab://sound') is None
    assert 'hostile.pth was not loaded' in run('test', 'open-mmlab://hostile')
    with pytest.raises(UnsafeCheckpointError, match='hostile.pth was not loaded'):
        read_checkpoint('open-mmlab://hostile')
    assert not (tmp_path / 'marker').exists()
    run('test', 'open-mmlab://hostile', '--allow-pickle')
    assert (tmp_path / 'marker').exists()


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


class TestResumeAlone:
    @pytest.fixture
    def work(self, trained, run):
        shutil.copytree(trained, 'work')
        Path('work/last_checkpoint').write_text('work/epoch_2.pth')
        return Path('work')

    def test_takes_the_newest(self, work):
        (work / 'epoch_10.pth').write_bytes((work / 'epoch_1.pth').read_bytes())
        assert latest_checkpoint('work', False) == 'work/epoch_2.pth'

    @pytest.mark.parametrize('allow', [[], ['--allow-pickle']])
    def test_goes_on_from_the_one_before_a_damaged_one(self, work, run, allow):
        (work / 'epoch_2.pth').write_bytes((work / 'epoch_2.pth').read_bytes()[:2000])
        if allow:
            # Loading it as any pickle to see whether it is intact would run its code twice.
            assert 'work/epoch_2.pth is no checkpoint, or damaged' in run('train', '--resume', *allow)
            return
        assert run('train', '--resume') is None
        log = max(work.glob('*/*.log')).read_text()
        assert 'resumed epoch: 1, iter: 2' in log
        assert torch.load(work / 'epoch_2.pth', weights_only=False)['meta']['epoch'] == 2

    def test_names_the_damaged_one(self, work, caplog, monkeypatch):
        logged = []
        monkeypatch.setattr(MMLogger, 'warning', lambda self, text: logged.append(text))
        (work / 'epoch_2.pth').write_bytes(b'')
        assert latest_checkpoint('work', False) == str(work / 'epoch_1.pth')
        assert len(logged) == 1 and '\n' not in logged[0]
        assert 'older checkpoint: work/epoch_2.pth is no checkpoint: the file is empty' in logged[0]

    def test_tells_numbers_from_names(self, work):
        for number in 9, 10:
            (work / f'epoch_{number}.pth').write_bytes((work / 'epoch_1.pth').read_bytes())
        (work / 'last_checkpoint').write_text('moved/epoch_11.pth')
        assert latest_checkpoint('work', False) == str(work / 'epoch_10.pth')

    def test_names_the_last_of_several_damaged_ones(self, work):
        for path in work.glob('epoch_*.pth'):
            path.write_bytes(b'')
        with pytest.raises(LaunchError, match='no checkpoint in work is intact: work/epoch_1.pth is no checkpoint'):
            latest_checkpoint('work', False)

    def test_finds_nothing_in_a_new_work_dir(self, tmp_path):
        assert latest_checkpoint(str(tmp_path), False) is None


class TestData:
    """Annotation files of other kinds than JSON."""

    @pytest.fixture(params=['pkl', 'pickle', 'yaml', 'yml'])
    def annotations(self, request, run):
        if request.param.startswith('y'):
            Path(f'data.{request.param}').write_text('!!python/object/apply:os.system ["touch marker"]')
        else:
            Path(f'data.{request.param}').write_bytes(pickle.dumps(Call(os.system, 'touch marker')))
        return f'data.{request.param}'

    def test_run_no_code_unless_allowed(self, annotations, run):
        args = ['train', '--cfg-options', f'train_dataloader.dataset.ann_file={annotations}']
        assert re.search('was not loaded, because.*--allow-pickle', run(*args))
        with safe_loading(), pytest.raises(UnsafeCheckpointError, match='was not loaded, because.*--allow-pickle'):
            fileio.load(annotations)
        assert not Path('marker').exists()
        assert run(*args, '--allow-pickle') is None
        assert Path('marker').exists()

    def test_plain_yaml_loads_and_pickles_are_written(self, run):
        Path('data.yml').write_text('{a: [1, 2.5, null]}')
        with safe_loading():
            assert fileio.load('data.yml') == dict(a=[1, 2.5, None])
            fileio.dump([1], 'data.pkl')
        assert fileio.load('data.pkl') == [1]

    def test_arrays_of_objects_are_refused(self, tmp_path):
        """mmdet's OpenImages loads an array with allow_pickle=True."""
        np.save(tmp_path / 'x.npy', np.array([Call(open, str(tmp_path / 'marker'), 'w')], dtype=object))
        np.save(tmp_path / 'plain.npy', np.arange(3))
        with safe_loading():
            with pytest.raises(UnsafeCheckpointError, match='x.npy was not loaded, because it holds pickled objects'):
                np.load(tmp_path / 'x.npy', allow_pickle=True)
            assert np.load(tmp_path / 'plain.npy', allow_pickle=True).tolist() == [0, 1, 2]
        assert not (tmp_path / 'marker').exists()
        np.load(tmp_path / 'x.npy', allow_pickle=True)
        assert (tmp_path / 'marker').exists()


class TestSafeLoading:
    def test_leaves_everything_as_it_was(self):
        def state():
            return [torch.load, torch.serialization.load, np.load, vars(CheckpointLoader)['load_checkpoint'],
                    vars(Config)['fromstring'], dict(fileio.handlers.file_handlers)]

        before = state()
        for allow in False, True:
            with pytest.raises(ZeroDivisionError), safe_loading(allow):
                assert torch.load is not before[0]
                assert np.load is before[2] or not allow
                _ = 1 / 0
            assert state() == before

    @pytest.mark.parametrize('allow', [False, True])
    def test_leaves_what_processes_exchange_to_torch(self, allow, monkeypatch):
        """Pickled results hold tensors, for each of which pickle calls torch.load."""
        def not_called(*args):
            raise AssertionError('the slow reader was used')

        monkeypatch.setattr(safe_files, 'load_file', not_called)
        with safe_loading(allow):
            sent = pickle.dumps(dict(score=torch.arange(3.0)))
            assert b'torch.storage' in sent
            assert pickle.loads(sent)['score'].tolist() == [0, 1, 2]
        assert pickle.loads(sent)['score'].tolist() == [0, 1, 2]

    def test_of_an_allowing_process_holds_for_the_backbone(self, tmp_path):
        """Its own argument is for one file."""
        torch.save(dict(state_dict={}, x=functools.partial(int)), tmp_path / 'x.pth')
        with pytest.raises(UnsafeCheckpointError):
            read_checkpoint(str(tmp_path / 'x.pth'))
        with safe_loading(allow_pickle=True):
            read_checkpoint(str(tmp_path / 'x.pth'))
        with safe_loading():
            with pytest.raises(UnsafeCheckpointError):
                read_checkpoint(str(tmp_path / 'x.pth'))
            read_checkpoint(str(tmp_path / 'x.pth'), allow_pickle=True)

    def test_says_when_torch_is_told_to_use_its_own_reader(self, tmp_path, monkeypatch):
        torch.save(dict(state_dict={}), tmp_path / 'x.pth')
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
        with pytest.raises(CheckpointError, match='unset TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
            read_checkpoint(str(tmp_path / 'x.pth'))

    def test_maps_to_where_the_caller_wants(self, tmp_path):
        torch.save(dict(w=torch.ones(2)), tmp_path / 'x.pth')
        with safe_loading():
            assert torch.load(tmp_path / 'x.pth', map_location='meta')['w'].is_meta
            assert torch.load(tmp_path / 'x.pth', torch.device('meta'))['w'].is_meta
            assert not torch.load(tmp_path / 'x.pth')['w'].is_meta


@pytest.mark.parametrize('name', ['train', 'test'])
def test_help_says_what_holds(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', '--help'])
    with pytest.raises(SystemExit):
        tool(name).main()
    shown = ' '.join(capsys.readouterr().out.split())
    assert ('load checkpoints and pickled or YAML data files that hold more than tensors and plain values, which can '
            'run any code; without it they are refused. Configs are Python programs, and run in either case') in shown
