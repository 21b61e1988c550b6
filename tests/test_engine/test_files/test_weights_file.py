"""Files of weights in all formats, and files that are none."""
import functools
import io
import pickle
import re
import struct
import sys
import tarfile
import zipfile

import pytest
import torch
import torch.nn as nn
from safetensors import torch as safetensors

from convneur_mm.engine import safe_loading
from convneur_mm.engine.files import weights_file
from convneur_mm.engine.files.checkpoint import load_pretrained, read_checkpoint
from convneur_mm.engine.files.weights_file import (
    CheckpointError,
    UnsafeCheckpointError,
    check_structure,
    load_file,
    one_line,
    printable,
    weights_of,
)

ALLOW = 'if you trust its source, allow it: --allow-pickle on the command line, allow_pickle=True in Python'


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def tar():
    """Sound: PyTorch loads an empty dict."""
    buffer = io.BytesIO()
    empty = pickle.dumps(0, 2)
    with tarfile.open(fileobj=buffer, mode='w:') as archive:
        for name, data in dict(storages=empty + pickle.dumps([], 2), tensors=empty, pickle=b'\x80\x02}.').items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr(name, 'hello')
    return buffer.getvalue()


WEIGHTS = {'w': torch.arange(3.0)}
FORMATS = {
    'zip': saved(WEIGHTS),
    'old format': saved(WEIGHTS, _use_new_zipfile_serialization=False),
    'safetensors': safetensors.save(WEIGHTS),
}


class TestLoadFile:
    @pytest.mark.parametrize('allow_pickle', [False, True])
    @pytest.mark.parametrize('kind', FORMATS)
    def test_reads_each_format(self, kind, allow_pickle, tmp_path):
        (tmp_path / 'x.pth').write_bytes(FORMATS[kind])
        opened = io.BytesIO(FORMATS[kind])
        for file in tmp_path / 'x.pth', str(tmp_path / 'x.pth'), opened:
            loaded = load_file(file, 'cpu', allow_pickle)
            assert list(loaded) == ['w'] and loaded['w'].tolist() == [0, 1, 2]

    @pytest.mark.parametrize('kind', ['old format', 'safetensors'])
    def test_reads_an_open_file_from_where_it_stands(self, kind):
        file = io.BytesIO(b'before' + FORMATS[kind])
        file.seek(6)
        assert load_file(file, 'cpu', False)['w'].tolist() == [0, 1, 2]

    def test_puts_tensors_where_they_are_wanted(self):
        for kind in 'zip', 'old format':
            for allow_pickle in False, True:
                assert load_file(io.BytesIO(FORMATS[kind]), 'meta', allow_pickle)['w'].is_meta

    def test_maps_memory_where_the_format_has_it(self, tmp_path):
        for kind in 'zip', 'old format':
            path = tmp_path / 'x.pth'
            for mmap in (), (False,), (True,):
                path.write_bytes(FORMATS[kind])
                weight = load_file(path, 'cpu', False, *mmap)['w']
                with path.open('r+b') as file:  # the same file, so that a map of it changes
                    file.write(FORMATS[kind].replace(struct.pack('<f', 2), struct.pack('<f', 7)))
                assert weight.tolist() == [0, 1, 7 if mmap == (True,) and kind == 'zip' else 2]
        assert load_file(path, 'cpu', False)['w'].tolist() == [0, 1, 7]

    @pytest.mark.parametrize('allow_pickle', [False, True])
    def test_what_needs_pickle_is_refused_unless_allowed(self, allow_pickle, tmp_path):
        torch.save(dict(x=functools.partial(int)), tmp_path / 'x.pth')
        if allow_pickle:
            assert load_file(tmp_path / 'x.pth', 'cpu', True)['x']() == 0
            return
        with pytest.raises(UnsafeCheckpointError) as error:
            load_file(tmp_path / 'x.pth', 'cpu', False)
        assert str(error.value) == (f'{tmp_path}/x.pth was not loaded, because it needs pickle, which can run any '
                                    f'code: it asks for functools.partial; {ALLOW}')

    def test_torchscript_is_refused(self, tmp_path):
        """torch.load would hand it to torch.jit.load, which runs its code."""
        (tmp_path / 'x.pth').write_bytes(torchscript())
        with pytest.raises(UnsafeCheckpointError, match=r'/x\.pth was not loaded, because it is a TorchScript program; '
                                                        r'save its state_dict\(\) instead$'):
            load_file(tmp_path / 'x.pth', 'cpu', False)

    def test_archives_of_the_oldest_format_are_not_unpacked(self, tmp_path):
        """torch.load would extract members, which may be links or special files, before it reads the first one."""
        (tmp_path / 'x.pth').write_bytes(tar())
        assert load_file(tmp_path / 'x.pth', 'cpu', True) == {}
        with pytest.raises(UnsafeCheckpointError, match=r'x\.pth was not loaded, because it is a tar archive, which '
                                                        r'PyTorch wrote before version 0\.1\.10; if you trust'):
            load_file(tmp_path / 'x.pth', 'cpu', False)

    @pytest.mark.parametrize('value, refused', [(None, False), ('', False), ('0', False), ('1', True)])
    def test_torchs_own_reader_cannot_be_forced(self, value, refused, monkeypatch):
        monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
        if value is not None:
            monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', value)
        if not refused:
            assert load_file(io.BytesIO(FORMATS['zip']), 'cpu', False)['w'].tolist() == [0, 1, 2]
            return
        with pytest.raises(CheckpointError, match='^a checkpoint in memory was not loaded: unset '
                                                  'TORCH_FORCE_WEIGHTS_ONLY_LOAD, which forces a reader'):
            load_file(io.BytesIO(FORMATS['zip']), 'cpu', False)

    def test_files_are_named_by_path_name_or_as_memory(self, tmp_path):
        (tmp_path / 'x.pth').write_bytes(b'')
        with pytest.raises(CheckpointError, match=f'^{tmp_path}/x.pth is no checkpoint: the file is empty; replace it '
                                                  'by an intact copy$'):
            load_file(tmp_path / 'x.pth', 'cpu', False)
        with (tmp_path / 'x.pth').open('rb') as file, pytest.raises(CheckpointError, match=f'^{tmp_path}/x.pth is no'):
            load_file(file, 'cpu', False)
        with pytest.raises(CheckpointError, match='^a checkpoint in memory is no checkpoint: the file is empty'):
            load_file(io.BytesIO(), 'cpu', False)

    def test_safetensors_are_known_by_name_too(self, tmp_path):
        """So that a damaged one is called that, whatever it begins with."""
        (tmp_path / 'x.safetensors').write_bytes(b'hello, this is text')
        with pytest.raises(CheckpointError, match=r'x\.safetensors is no checkpoint, or damaged \(.*header'):
            load_file(tmp_path / 'x.safetensors', 'cpu', True)

    def test_safetensors_are_missed_by_name(self, tmp_path, monkeypatch):
        (tmp_path / 'x.safetensors').write_bytes(FORMATS['safetensors'])
        monkeypatch.setitem(sys.modules, 'safetensors', None)
        with pytest.raises(CheckpointError, match=r'x\.safetensors is a safetensors file, and the package that reads '
                                                  r'them is missing: pip install safetensors$'):
            load_file(tmp_path / 'x.safetensors', 'cpu', False)

    def test_a_full_gpu_is_no_damaged_file(self, monkeypatch):
        def load(*args, **kwargs):
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')

        monkeypatch.setattr(weights_file, 'torch_load', load)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            load_file(io.BytesIO(FORMATS['zip']), 'cuda', False)

    @pytest.mark.parametrize('mmap, error', [(False, 'the storage 0 is longer than its record'), (True, '')])
    def test_storages_end_where_their_record_does(self, tmp_path, mmap, error):
        """The number of elements stands in the pickle; behind the record lies other memory of the process."""
        with zipfile.ZipFile(io.BytesIO(saved(dict(w=torch.ones(4))))) as archive, zipfile.ZipFile(
                tmp_path / 'x.pth', 'w') as changed:
            for name in archive.namelist():
                # 4 elements of the storage and 4 of the tensor become 32767.
                changed.writestr(name, archive.read(name).replace(b'K\x04tq', b'M\xff\x7ftq').replace(
                    b'K\x04\x85', b'M\xff\x7f\x85'))
        with pytest.raises(CheckpointError, match=rf'x\.pth is no checkpoint, or damaged \({error}'):
            load_file(tmp_path / 'x.pth', 'cpu', False, mmap)


NOT_CHECKPOINTS = {
    'empty': (b'', 'the file is empty'),
    'text': (b'hello', r"damaged \(it begins with b'hello'\); replace it by an intact copy"),
    'page': (b'<!DOCTYPE html>\n<html>Not found</html>', r"begins with b'<!DOCTYPE html>\\n'"),
    'picture': (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'begins with'),
    'number': (b'\x80\x02K\x01.', 'magic number'),
    'cut-off pickle': (saved(dict(a=torch.ones(9)), _use_new_zipfile_serialization=False)[:60], 'damaged'),
    'cut-off data': (saved(dict(a=torch.ones(99)), _use_new_zipfile_serialization=False)[:-50], 'damaged'),
    'cut-off archive': (saved(dict(a=torch.ones(99)))[:-200], 'damaged'),
    'archive of something else': (zipped('readme.txt'), 'damaged'),
    'cut-off safetensors': (struct.pack('<Q', 60) + b'{"w":{"dtype":"F32","shape":[2],', r'damaged \(.*header'),
    'list': (saved([torch.ones(1)]), 'it holds a list, expected a dict of names and weights; name another file'),
    'tensor': (saved(torch.ones(1)), 'it holds a Tensor, expected a dict'),
    'list of weights': (saved(dict(state_dict=[1])), 'it holds a list, expected a dict'),
    'numbered weights': (saved({1: torch.ones(1)}), 'it holds a dict, expected a dict of names and weights'),
}


@pytest.mark.parametrize('kind', NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named_in_one_line(kind, loaders, tmp_path, monkeypatch):
    data, message = NOT_CHECKPOINTS[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.pth').write_bytes(data)
    entries = [functools.partial(entry, 'x.pth') for entry in loaders.values()]
    for read in [lambda: read_checkpoint('x.pth'), lambda: load_pretrained(nn.Linear(1, 1), 'x.pth'), *entries]:
        with safe_loading(), pytest.raises(CheckpointError, match=f'^x.pth is no checkpoint.*{message}') as error:
            read()
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['text', 'list'])
def test_the_tools_name_what_is_no_checkpoint(kind, run, tmp_path):
    data, message = NOT_CHECKPOINTS[kind]
    (tmp_path / 'x.pth').write_bytes(data)
    for args in ['test', 'x.pth'], ['train', '--resume', 'x.pth'], ['train', '--cfg-options', 'load_from=x.pth']:
        assert re.search(f'x.pth is no checkpoint.*{message}', run(*args))
    assert 'x.pth is no checkpoint' in run('test', 'x.pth', '--allow-pickle')


def test_weights_are_those_of_any_saver():
    assert weights_of(dict(state_dict=1, model=2)) == 1
    assert weights_of(dict(model=2, meta=3)) == 2
    assert weights_of(dict(w=4)) == dict(w=4)


def test_a_dict_of_weights_passes():
    for checkpoint in {}, dict(w=1), dict(state_dict=dict(w=1), meta={}, other=[]), dict(model=dict(w=1)):
        check_structure(checkpoint, 'x.pth')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
                                   torch.float8_e4m3fn])
def test_weights_that_are_nan_are_refused(dtype):
    weights = torch.arange(6.0).to(dtype)
    check_structure(dict(w=weights, other=7), 'x.pth')
    weights = torch.tensor([1, float('nan'), 2, float('nan')]).to(dtype)
    for checkpoint in dict(a=torch.ones(2), w=weights), dict(state_dict=dict(w=weights), meta={}):
        with pytest.raises(CheckpointError, match=r'^x\.pth was not loaded: w is NaN in 2 of 4 places, as a training '
                                                  r'that diverged leaves it; name an earlier checkpoint$'):
            check_structure(checkpoint, 'x.pth')


def test_infinite_weights_pass_and_so_do_sums_that_overflow():
    infinite = torch.tensor([float('inf'), -float('inf'), 0])
    check_structure(dict(a=infinite, b=torch.full((9,), 6e4).half(), c=torch.tensor(3), d=torch.ones(0)), 'x.pth')
    with pytest.raises(CheckpointError, match='a is NaN in 1 of 4 places'):
        check_structure(dict(a=torch.cat((infinite, torch.tensor([float('nan')])))), 'x.pth')


def test_texts_of_files_are_short_and_cannot_write_to_the_terminal():
    assert printable(' two\nlines\t\x1b[2J ä ') == 'two lines ?[2J ä'
    assert one_line(ValueError('a\nb')) == 'a b'
    assert one_line(ValueError('a' * 200)) == 'a' * 200
    assert one_line(ValueError('a' * 200 + 'b')) == 'a' * 200 + ' …'
    assert one_line(MemoryError()) == 'MemoryError'
