"""Checkpoints that are odd, damaged, of another model or dangerous."""
import io
import os
import pickle
import re
import zipfile

import pytest
import torch
from hostile import HANDLED, Row, built, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner import CheckpointLoader
from safetensors import torch as safetensors
from tiny_models import separated

from convneur_mm.engine import safe_loading
from convneur_mm.engine.files.checkpoint import load_pretrained, read_checkpoint
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.files.resume import latest_checkpoint
from convneur_mm.engine.files.weights_file import CheckpointError
from convneur_mm.engine.launch import readable_checkpoint

pytestmark = pytest.mark.needs('mmpretrain')


@pytest.fixture(scope='module')
def model():
    return separated(built('classifier'))


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('hacked',)


def changed(change=None, **kwargs):
    """Writes the weights of a model, changed."""
    def make(path, weights):
        weights = {name: value.clone() for name, value in weights.items()}
        path.write_bytes(saved(change(weights) or weights if change else weights, **kwargs))
    return make


def cast(dtype):
    return lambda weights: {name: value.to(dtype) for name, value in weights.items()}


def poisoned(value, name='head.fc.weight'):
    def change(weights):
        weights[name].view(-1)[1] = value
    return change


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def data(content):
    return lambda path, weights: path.write_bytes(content)


def document(path, weights):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('word/document.xml', '<document/>')


def cut_off(share):
    def make(path, weights):
        content = saved(weights)
        path.write_bytes(content[:int(share * len(content))])
    return make


def program(path, weights):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))


# ``make`` writes the file, given a model's weights. Handled are those whose weights the model then has.
ROWS = [
    Row('as it is', changed()),
    Row('float16', changed(cast(torch.float16))),
    Row('bfloat16', changed(cast(torch.bfloat16))),
    Row('float64', changed(cast(torch.float64))),
    Row('old format', changed(_use_new_zipfile_serialization=False)),
    Row('of a run', changed(lambda weights: dict(state_dict=weights, meta=dict(epoch=3), optimizer={}))),
    Row('of DDP', changed(lambda weights: {f'module.{name}': value for name, value in weights.items()})),
    Row('parameters', changed(lambda weights: {name: torch.nn.Parameter(value) for name, value in weights.items()})),
    Row('further weights', changed(lambda weights: dict(weights, other=torch.ones(3)))),
    Row('safetensors called .pth', lambda path, weights: path.write_bytes(safetensors.save(weights))),
    Row('empty file', data(b''), run='the file is empty'),
    Row('web page', data(b'<!DOCTYPE html>\n<html>404</html>'), run='no checkpoint, or damaged .*DOCTYPE'),
    Row('half of it', cut_off(0.5), run='no checkpoint, or damaged'),
    Row('all but a byte', lambda path, weights: path.write_bytes(saved(weights)[:-1]), run='no checkpoint, or damaged'),
    Row('document', document, run='no checkpoint, or damaged'),
    Row('picture', data(b'\x89PNG\r\n\x1a\n' + bytes(99)), run='no checkpoint, or damaged'),
    Row('huge safetensors header', data(b'\xff' * 7 + b'\x0f{"w":'), run='no checkpoint, or damaged'),
    Row('pickled code', data(pickle.dumps(dict(w=RunsCode()), 2)), run='no checkpoint, or damaged|needs pickle'),
    Row('code among the weights', changed(lambda weights: dict(weights, other=RunsCode())), run='needs pickle'),
    Row('TorchScript', program, run='is a TorchScript program'),
    Row('list', data(saved([torch.ones(1)])), run='it holds a list, expected a dict of names and weights'),
    Row('NumPy arrays', changed(lambda weights: {name: value.numpy() for name, value in weights.items()}),
        run='none of the model'),
    Row('names of another model', data(saved({'conv1.weight': torch.ones(2)})), run='none of the model.s weights'),
    Row('NaN among the weights', changed(poisoned(float('nan'))), run=r'head\.fc\.weight is NaN in 1 of 192 places'),
    Row('NaN in float16', changed(lambda weights: cast(torch.float16)(dict(weights, **{
        'head.fc.bias': torch.full((6,), float('nan'))}))), run=r'head\.fc\.bias is NaN in 6 of 6 places'),
    Row('NaN in a run', changed(lambda weights: dict(state_dict=dict(weights, **{
        'head.fc.bias': torch.full((6,), float('nan'))}))), run=r'head\.fc\.bias is NaN in 6 of 6 places'),
    Row('a weight is missing', changed(without('head.fc.bias')), run='head: 1 of 2 weights missing'),
    Row('other classes', changed(lambda weights: dict(weights, **{'head.fc.bias': torch.ones(9)})),
        run='head: 1 of 2 of other shapes'),
    Row('folder', lambda path, weights: path.mkdir(), run='no such'),
    Row('link to itself', lambda path, weights: path.symlink_to(path), run='no such'),
    Row('missing', lambda path, weights: None, run='no such'),
]


@pytest.mark.parametrize('row', ROWS, ids=ids(ROWS))
def test_checkpoint(row, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'a b.pth'
    weights = model.state_dict()
    row.make(path, weights)
    if row.run is HANDLED:
        assert readable_checkpoint(str(path), 'checkpoint', False) == str(path)
        loaded = built('classifier', path).state_dict()
        dtype = dict(float16=torch.float16, bfloat16=torch.bfloat16).get(row.name, torch.float64)
        for name, value in weights.items():
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value.to(dtype).float()), name
        return
    entries = [lambda: built('classifier', path)]
    if 'missing' not in row.name and row.name not in ('other classes', 'NumPy arrays', 'names of another model'):
        entries += [lambda: readable_checkpoint(str(path), '--resume', False), lambda: read_checkpoint(str(path))]
    if row.name.startswith('NaN'):
        entries += [lambda: load_pretrained(model.backbone, str(path)),
                    lambda: CheckpointLoader.load_checkpoint(str(path), 'cpu')]
    for entry in entries:
        with safe_loading(), pytest.raises((CheckpointError, LaunchError), match=row.run) as error:
            entry()
        assert 'a b.pth' in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'hacked').exists()


def test_infinite_buffers_are_loaded(tmp_path):
    """Such as the mask of an attention; and sums that overflow."""
    weights = dict(mask=torch.tensor([0.0, -float('inf'), float('inf')]), half=torch.full((9,), 6e4).half(),
                   count=torch.tensor(3), flag=torch.tensor([True]))
    path = tmp_path / 'a.pth'
    path.write_bytes(saved(weights))
    assert read_checkpoint(str(path)).keys() == weights.keys()


def test_a_run_goes_on_from_before_it_diverged(model, tmp_path):
    weights = model.state_dict()
    for epoch in 1, 2:
        changed(poisoned(float('nan')) if epoch == 2 else None)(tmp_path / f'epoch_{epoch}.pth', weights)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    assert latest_checkpoint(str(tmp_path), 'config.py', False) == str(tmp_path / 'epoch_1.pth')


WEIGHTS = dict(w=torch.arange(300.0), b=torch.ones(7, dtype=torch.float16))
KINDS = dict(zip=saved(WEIGHTS), old=saved(WEIGHTS, _use_new_zipfile_serialization=False),
             safetensors=safetensors.save(WEIGHTS))


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1, exclude_max=True))
def test_what_is_cut_off_is_refused(kind, share, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f'cut_off.{"safetensors" if kind == "safetensors" else "pth"}'
    path.write_bytes(KINDS[kind][:int(share * len(KINDS[kind]))])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_checkpoint(str(path))


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
       value=st.integers(1, 255))
def test_what_is_damaged_is_refused_by_name_or_loaded(kind, places, value, tmp_path_factory):
    content = bytearray(KINDS[kind])
    for place in places:
        content[int(place * len(content))] ^= value
    path = tmp_path_factory.getbasetemp() / f'damaged.{"safetensors" if kind == "safetensors" else "pth"}'
    path.write_bytes(content)
    try:
        read_checkpoint(str(path))
    except CheckpointError as error:
        assert str(path) in str(error) and '\n' not in str(error)
