"""Files of weights in all formats, and files that are none."""
import functools
import io
import re
import struct
import zipfile

import pytest
import torch
import torch.nn as nn

from convneur_mm.engine import safe_loading
from convneur_mm.engine.checkpoint import load_pretrained, read_checkpoint
from convneur_mm.engine.weights_file import CheckpointError


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


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
def test_what_is_no_checkpoint_is_named_in_one_line(kind, loaders, tmp_path, run):
    data, message = NOT_CHECKPOINTS[kind]
    path = tmp_path / 'x.pth'
    if data is None:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('readme.txt', 'hello')
    else:
        path.write_bytes(data)
    entries = [functools.partial(entry, 'x.pth') for entry in loaders.values()]
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
