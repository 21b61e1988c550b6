"""Checkpoints and other files that a user names: sound ones load, those that could run code do not, by any entry.

The entries are the tools, run within this process, and what the README recommends beside them.
"""
import functools
import importlib
import importlib.util
import io
import os
import pickle
import re
import runpy
import shlex
import struct
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine import fileio
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, load_checkpoint

import convneur_mm
from convneur_mm.engine import safe_loading
from convneur_mm.engine.files import safe_files
from convneur_mm.engine.files.checkpoint import load_pretrained, read_checkpoint
from convneur_mm.engine.files.weights_file import CheckpointError, UnsafeCheckpointError
from convneur_mm.engine.launch import LaunchError, readable_checkpoint


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


def model():
    return MODELS.build(dict(type='CheckpointTestModel'))


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


def touch(marker):
    return shlex.join(['touch', str(marker)])


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
    'os.system': lambda marker: saved(dict(state_dict={}, x=Call(os.system, touch(marker)))),
    'eval': lambda marker: saved(dict(state_dict={}, x=Call(eval, f'open({str(marker)!r}, "w")'))),
    'key of a dict': lambda marker: saved({'state_dict': {}, Call(os.system, touch(marker)): 1}),
    'getattr chain': eval_through_getattr,
    '_rebuild_from_type_v2': lambda marker: saved(
        Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (touch(marker),), {})),
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
        b'\x80\x04' + text('torch') + text('os.system') + b'\x93' + text(touch(marker)) + b'\x85R.'),
    '__setstate__ of an instance': lambda marker: in_zip(
        b'\x80\x02ccollections\nOrderedDict\n)R}' + text('__setstate__') + b'cos\nsystem\nsb'
        + text(touch(marker)) + b'b.'),
    'opcode INST': lambda marker: in_zip(f'(S{touch(marker)!r}\nios\nsystem\n.'.encode()),
    'opcode OBJ': lambda marker: in_zip(b'(cos\nsystem\n' + text(touch(marker)) + b'o.'),
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


ENTRIES = {
    'load_checkpoint': lambda path: load_checkpoint(model(), str(path)),
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

    def test_they_are_refused_by_all_that_loads_in_this_process(self, hostile, loaders, monkeypatch):
        path, marker = hostile
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(path.parent / 'hub'))
        (path.parent / 'hub' / 'checkpoints').mkdir(parents=True)
        monkeypatch.setattr('mmengine.runner.checkpoint.load_url', lambda *args, **kwargs: torch.load(path))
        for name, entry in {**loaders, **ENTRIES}.items():
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
    def test_they_are_refused_by_the_tools(self, run, args, tmp_path):
        path, marker = tmp_path / 'hostile.pth', tmp_path / 'marker'
        path.write_bytes(HOSTILE['log buffer of objects'](marker))
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
def test_the_stock_inferencers_refuse_hostile_files_within_safe_loading(name, tmp_path, monkeypatch):
    # MMEngine's own loader takes any pickle; the upstream one only where PyTorch is told so.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    module, config = INFERENCERS[name]
    path, marker = tmp_path / 'hostile.pth', tmp_path / 'marker'
    path.write_bytes(HOSTILE['getattr chain'](marker))

    def infer():
        getattr(importlib.import_module(module), name)(convneur_mm.config(config), str(path), device='cpu')

    with safe_loading(), pytest.raises(UnsafeCheckpointError) as error:
        infer()
    assert_one_line(error.value, path)
    assert not marker.exists()
    # What safe_loading is for.
    with pytest.raises(Exception):  # noqa: B017 (whatever the model makes of a file without weights)
        infer()
    assert marker.exists()


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
def test_inferencers_do_not_run_the_config_in_a_checkpoint(place, loaders, tmp_path, monkeypatch):
    """They do so where no other config is named."""
    monkeypatch.chdir(tmp_path)
    program = "open('marker', 'w')\nmodel = dict(type='CheckpointTestModel')"
    held = dict(meta=dict(cfg=program), message_hub=dict(runtime_info=dict(cfg=program)))
    torch.save({'state_dict': model().state_dict(), place: held[place]}, 'weights.pth')

    def infer():
        loaders['inferencer']('weights.pth', model=None)

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


def test_names_that_mmengine_knows_are_read_safely(tmp_path, monkeypatch, run):
    """A table of one's own, in MMENGINE_HOME, may name local files."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text('{"sound": "sound.pth", "hostile": "hostile.pth"}')
    torch.save(dict(state_dict=model().state_dict()), tmp_path / 'sound.pth')
    torch.save(Call(open, str(tmp_path / 'marker'), 'w'), tmp_path / 'hostile.pth')
    assert 'layer.weight' in read_checkpoint('open-mmlab://sound')['state_dict']
    assert run('test', 'open-mmlab://sound') is None
    assert 'hostile.pth was not loaded' in run('test', 'open-mmlab://hostile')
    with pytest.raises(UnsafeCheckpointError, match='hostile.pth was not loaded'):
        read_checkpoint('open-mmlab://hostile')
    assert not (tmp_path / 'marker').exists()
    run('test', 'open-mmlab://hostile', '--allow-pickle')
    assert (tmp_path / 'marker').exists()


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
                _ = 1 / 0
            assert state() == before

    def test_leaves_everything_as_it_was_in_whatever_order_threads_end(self):
        """As of two threads that load models at the same time."""
        before = torch.load, np.load
        first, second = safe_loading(), safe_loading()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.load is not before[0]
        second.__exit__(None, None, None)
        assert (torch.load, np.load) == before

    def test_all_that_are_under_way_must_allow_it(self, tmp_path):
        """In other threads too: who loads a file safely must not depend on who else loads one."""
        path = tmp_path / 'x.pth'
        torch.save(dict(state_dict={}, x=functools.partial(int)), path)
        with safe_loading(allow_pickle=True):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.load, path).result()['x'].func is int
            with pytest.raises(pickle.UnpicklingError):
                torch.load(path, weights_only=True)
            with safe_loading(), pytest.raises(UnsafeCheckpointError):
                torch.load(path)
            torch.load(path)

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

    @pytest.mark.parametrize('name, reason', [
        ('open-mmlab://no_such_net', "no model 'no_such_net'"),
        ('s3://bucket/x.pth', 'Please install petrel_client.*')])
    def test_names_what_cannot_be_fetched(self, name, reason):
        with safe_loading(), pytest.raises(CheckpointError, match=(
                rf'^{name} could not be fetched \({reason}\); check the name, or download the file and give its ')):
            CheckpointLoader.load_checkpoint(name)

    def test_has_weights_where_mmengines_hooks_look_for_them(self, tmp_path):
        for saved, loaded in ((dict(w=1), dict(state_dict=dict(w=1))), (dict(model=dict(w=1), meta=2), dict(
                state_dict=dict(w=1))), (dict(state_dict=dict(w=1), meta={}), dict(state_dict=dict(w=1), meta={}))):
            torch.save(saved, tmp_path / 'x.pth')
            with safe_loading():
                assert CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth')) == loaded

    def test_maps_to_where_the_caller_wants(self, tmp_path):
        torch.save(dict(w=torch.ones(2)), tmp_path / 'x.pth')
        with safe_loading():
            assert torch.load(tmp_path / 'x.pth', map_location='meta')['w'].is_meta
            assert torch.load(tmp_path / 'x.pth', torch.device('meta'))['w'].is_meta
            assert not torch.load(tmp_path / 'x.pth')['w'].is_meta


@pytest.mark.parametrize('name', ['train', 'test'])
def test_help_says_what_holds(name, tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', '--help'])
    with pytest.raises(SystemExit):
        tool(name).main()
    shown = ' '.join(capsys.readouterr().out.split())
    assert ('load checkpoints and pickled or YAML data files that hold more than tensors and plain values, which can '
            'run any code; without it they are refused. Configs are Python programs, and run in either case') in shown
