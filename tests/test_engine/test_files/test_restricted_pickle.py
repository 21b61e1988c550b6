"""The unpickler for checkpoints: it reads what they hold, and nothing else, opcode by opcode."""
import copyreg
import io
import pickle
import struct
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from convneur_mm.engine.files import restricted_pickle
from convneur_mm.engine.files.restricted_pickle import ForbiddenPickleError


def text(value):
    """The opcode that pushes a string."""
    return b'X' + struct.pack('<I', len(value)) + value.encode()


def name(module, qualified):
    """The opcodes that push what a module has under a name; of protocol 4, so that dots look into it."""
    return text(module) + text(qualified) + b'\x93'


BUFFER = name('mmengine.logging.history_buffer', 'HistoryBuffer') + b')\x81'
ARRAY = name('numpy._core.multiarray', '_reconstruct') + name('numpy', 'ndarray') + b'K\x00\x85U\x01b\x87R'
DTYPE = name('numpy', 'dtype') + text('f8') + b'\x89\x88\x87R'
ORDERED = name('collections', 'OrderedDict') + b')R'
LATIN1 = name('_codecs', 'encode') + text('ab')


def log_buffer_state(**items):
    """The opcodes of a dict."""
    return b'}' + b''.join(text(key) + value + b's' for key, value in items.items())


def read(opcodes):
    return restricted_pickle.load(io.BytesIO(b'\x80\x04' + opcodes + b'.'), encoding='utf-8')


def test_the_pieces_of_the_hostile_pickles_are_sound():
    """Else the refusals below would be of something else."""
    assert type(read(BUFFER)) is HistoryBuffer
    assert read(ARRAY).shape == (0,)
    assert read(DTYPE) == np.float64
    assert read(ORDERED) == OrderedDict()
    assert read(LATIN1 + text('latin1') + b'\x86R') == b'ab'
    assert read(b'}' + text('a') + b'K\x01s') == {'a': 1}


@pytest.mark.parametrize('opcodes, value', [
    (b']K\x01a', [1]), (b'](K\x01K\x02e', [1, 2]), (b'\x8f(K\x01K\x02\x90', {1, 2}), (b'}K\x01K\x02s', {1: 2}),
    (b'}(K\x01K\x02K\x03K\x04u', {1: 2, 3: 4}),
])
def test_items_go_to_the_last_value(opcodes, value):
    assert read(b'K\x07K\x08' + opcodes + b'\x87') == (7, 8, value)


@pytest.mark.parametrize('opcodes, asked_for', [
    # Names, by each opcode that looks one up.
    (b'cos\nsystem\n', r'os\.system'),
    (name('os', 'system'), r'os\.system'),
    (name('torch', 'os.system'), r'torch\.os\.system'),
    (name('torch', '_utils._rebuild_tensor_v2'), r'torch\._utils\._rebuild_tensor_v2'),
    (name('mmengine.logging.history_buffer', 'HistoryBuffer.__init__'), 'HistoryBuffer.__init__'),
    (name('collections', 'OrderedDict.fromkeys'), 'OrderedDict.fromkeys'),
    (name('torch', 'load'), r'torch\.load'),
    (name('torch._tensor', '_rebuild_from_type_v2'), '_rebuild_from_type_v2'),
    (name('torch.storage', '_load_from_bytes'), '_load_from_bytes'),
    (name('numpy', 'load'), r'numpy\.load'),
    (b"(S'true'\nios\nsystem\n", 'opcode'),
    (b'(' + name('torch', 'device') + text('cpu') + b'o', 'opcode'),
    # getattr, for a log buffer's four methods alone.
    (name('builtins', 'getattr') + ORDERED + text('mean') + b'\x86R', 'getattr'),
    (name('builtins', 'getattr') + name('builtins', 'getattr') + text('__self__') + b'\x86R', 'getattr'),
    (name('builtins', 'getattr') + BUFFER[:-2] + text('__init__') + b'\x86R', 'getattr'),
    # Calls and instances of what is no function of the list.
    (BUFFER[:-2] + b')R', 'a call of'),
    (name('numpy', 'ndarray') + b'K\x05\x85R', 'a call of'),
    (name('collections', 'OrderedDict') + b')\x81', 'an instance of'),
    (BUFFER[:-2] + b'K\x05\x85\x81', 'an instance of'),
    (BUFFER[:-2] + b')}\x92', 'opcode'),
    (name('collections', 'OrderedDict') + b']R', 'a list in an unexpected place'),
    # Arguments that could bring methods of their own.
    (name('collections', 'OrderedDict') + BUFFER + b'\x85R', 'HistoryBuffer in an unexpected place'),
    (name('collections', 'Counter') + BUFFER + b'\x85R', 'HistoryBuffer in an unexpected place'),
    (name('builtins', 'set') + BUFFER + b'\x85R', 'HistoryBuffer in an unexpected place'),
    (name('torch', 'Size') + BUFFER + b'\x85R', 'HistoryBuffer in an unexpected place'),
    # The state of an object.
    (ORDERED + b'Nb', 'OrderedDict with attributes'),
    (BUFFER + log_buffer_state(max_length=b'K\x05', _log_history=b']', _count_history=ARRAY) + b'b',
     'a list in an unexpected place'),
    (BUFFER + log_buffer_state(max_length=b'K\x05', _log_history=ARRAY, _count_history=b']') + b'b',
     'a list in an unexpected place'),
    (BUFFER + log_buffer_state(max_length=b'N', _log_history=ARRAY, _count_history=ARRAY) + b'b',
     'a NoneType in an unexpected place'),
    (ORDERED + b'}' + text('__setstate__') + name('builtins', 'slice') + b'sb', 'attributes'),
    (ORDERED + b'N}' + text('__class__') + BUFFER[:-2] + b's\x86b', 'attributes'),
    (BUFFER + b'}' + text('statistics') + name('builtins', 'slice') + b'sb', 'HistoryBuffer with the attributes'),
    (BUFFER + b'N}' + text('mean') + b'Ns\x86b', 'a tuple in an unexpected place'),
    (name('builtins', 'set') + b'}' + text('__code__') + b'Nsb', 'a state for a function'),
    (BUFFER[:-2] + b'N}' + text('mean') + name('builtins', 'slice') + b's\x86b', 'a state for a type'),
    (name('torch', 'float32') + b'}b', 'a state for a dtype'),
    # NumPy arrays of objects, and bytes in their guise.
    (name('numpy', 'dtype') + text('O8') + b'\x89\x88\x87R', 'NumPy array of'),
    (name('numpy', 'dtype') + text('V8') + b'\x89\x88\x87R', 'NumPy array of'),
    (name('numpy', 'dtype') + text('i8,O') + b'\x89\x88\x87R', 'NumPy array of'),
    (DTYPE + b'(K\x03' + text('|') + b'N(' + text('f0') + b't}' + text('f0') + DTYPE + b'K\x00\x86sK\x08K\x01K\x3ftb',
     'dtype with the state'),
    (ARRAY + b'(K\x01K\x01\x85' + name('torch', 'float32') + b'\x89]tb', 'NumPy array of'),
    (ARRAY + b'(K\x01K\x01\x85' + DTYPE + b'\x89]K\x01atb', 'a list in an unexpected place'),
    (name('numpy._core.multiarray', 'scalar') + name('torch', 'float32') + text('x') + b'\x86R', 'NumPy array of'),
    (name('numpy', 'dtype') + BUFFER + b'\x89\x88\x87R', 'HistoryBuffer in an unexpected place'),
    (name('numpy._core.multiarray', 'scalar') + DTYPE + text('x') + b'\x86R', 'a str in an unexpected place'),
    (DTYPE + b']b', r'dtype with the state \[\]'),
    (DTYPE + b')b', r'dtype with the state \(\)'),
    (DTYPE + b'(K\x04' + text('>') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb', 'dtype with the state'),
    (ARRAY + b']b', 'a list in an unexpected place'),
    # Bytes by any codec but the one that pickle uses.
    (name('_codecs', 'encode') + BUFFER + text('latin1') + b'\x86R', 'HistoryBuffer in an unexpected place'),
    (LATIN1 + text('rot13') + b'\x86R', "the codec 'rot13'"),
    (LATIN1 + text('unicode_escape') + b'\x86R', "the codec 'unicode_escape'"),
    # Items, for lists, dicts and sets alone: other objects may have such methods of their own.
    (BUFFER + b'K\x01a', 'HistoryBuffer in an unexpected place'),
    (BUFFER + b'(K\x01e', 'HistoryBuffer in an unexpected place'),
    (BUFFER + b'(K\x01\x90', 'HistoryBuffer in an unexpected place'),
    (BUFFER + b'K\x01K\x02s', 'HistoryBuffer in an unexpected place'),
    (BUFFER + b'(K\x01K\x02u', 'HistoryBuffer in an unexpected place'),
    # Storages, not the classes whose source torch's oldest format compares.
    (b'(' + text('module') + BUFFER[:-2] + text('a.py') + text('source') + b'tQ', 'the persistent id'),
    (text('storage') + b'Q', 'the persistent id'),
    *((b'(' + text('storage') + BUFFER[:-2] + key_location_number + b'tQ', f'a {kind} in an unexpected place')
      for kind, key_location_number in (('NoneType', b'N' + text('cpu') + b'K\x01'), ('int', text('0') + b'K\x01K\x01'),
                                        ('str', text('0') + text('cpu') + text('1')))),
    (b'P0\n', 'opcode'),
    # Buffers that are not in the file.
    (b'\x97', 'opcode'), (b'\x96' + struct.pack('<Q', 1) + b'a', 'opcode'),
    # Tensors on what is no storage.
    (name('torch._utils', '_rebuild_tensor_v2') + b'(' + BUFFER + b'K\x00K\x01\x85K\x01\x85\x89' + ORDERED + b'tR',
     'HistoryBuffer in an unexpected place'),
    (name('torch._utils', '_rebuild_parameter') + BUFFER + b'\x89' + ORDERED + b'\x87R',
     'HistoryBuffer in an unexpected place'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_anything_else_is_refused(opcodes, asked_for):
    with pytest.raises(ForbiddenPickleError, match=asked_for):
        read(opcodes)


@pytest.fixture
def registered():
    copyreg.add_extension('os', 'system', 240)
    yield b'\x82\xf0'
    copyreg.remove_extension('os', 'system', 240)


def test_registered_extensions_are_refused(registered):
    """Python's own unpickler keeps what a number stands for, and then asks ``find_class`` no more."""
    import os
    assert pickle.loads(b'\x80\x02' + registered + b'.') is os.system
    with pytest.raises(ForbiddenPickleError, match='opcode'):
        read(registered)


def test_a_log_buffer_brings_no_methods_for_the_others():
    """MMEngine would put them into the table of the class."""
    buffer = read(BUFFER + log_buffer_state(
        max_length=b'K\x05', _log_history=ARRAY, _count_history=ARRAY,
        statistics_methods=b'}' + text('mean') + name('builtins', 'slice') + b's') + b'b')
    assert buffer.max_length == 5
    assert HistoryBuffer._statistics_methods['mean'] is HistoryBuffer.mean


def test_numpys_own_dtypes_keep_their_byte_order():
    """The state of a dtype sets it in place, and the file may ask for the instance that all arrays share."""
    shared = name('numpy', 'dtype') + text('f8') + b'\x89\x89\x87R'
    swapped = read(shared + b'(K\x03' + text('>') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb')
    assert swapped == np.dtype('>f8')
    assert np.dtype('f8').isnative


@pytest.mark.parametrize('protocol', [2, 3])
@pytest.mark.parametrize('new_format', [True, False])
def test_values_are_those_of_an_ordinary_load(new_format, protocol, tmp_path):
    weights = OrderedDict(a=torch.randn(3, 2).t(), half=torch.ones(2).half(), flag=torch.tensor(True),
                          parameter=torch.nn.Parameter(torch.ones(2)), trained=torch.ones(2, requires_grad=True))
    weights._metadata = OrderedDict(layer=dict(version=2))
    meta = dict(
        values=[None, True, -1, 2**80, 1.5, 1j, 'ä', b'', b'\xff\0', (), (1,), {1, 2}, slice(1, 2)],
        size=torch.Size([2]), dtype=torch.half, device=torch.device('cpu'), counts=Counter('aab'), scalar=np.float32(2),
        arrays=[np.arange(3), np.ones((2, 3), order='F'), np.arange(3, dtype='>f8'), np.array([True]), np.zeros(0)])
    buffer = HistoryBuffer([1.0, 2.0], [1, 1], max_length=7)
    torch.save(dict(state_dict=weights, meta=meta, buffer=buffer), tmp_path / 'x.pth', pickle_protocol=protocol,
               _use_new_zipfile_serialization=new_format)
    ours, ordinary = (torch.load(tmp_path / 'x.pth', weights_only=False, pickle_module=module)
                      for module in (restricted_pickle, pickle))
    for loaded in ours['state_dict'], ordinary['state_dict']:
        assert list(loaded) == list(weights)
        assert loaded._metadata == weights._metadata
    for key, value in ordinary['state_dict'].items():
        torch.testing.assert_close(ours['state_dict'][key], value, rtol=0, atol=0)
        assert type(ours['state_dict'][key]) is type(value)
        assert ours['state_dict'][key].stride() == value.stride()
        assert ours['state_dict'][key].requires_grad == value.requires_grad
    for one, other in zip(ours['meta'].pop('arrays'), ordinary['meta'].pop('arrays')):
        assert (one.dtype, one.strides) == (other.dtype, other.strides)
        np.testing.assert_array_equal(one, other)
    assert repr(ours['meta']) == repr(ordinary['meta'])
    assert repr(vars(ours['buffer'])) == repr(vars(ordinary['buffer']))
    assert ours['buffer'].statistics('mean') == 1.5


def test_weights_that_share_memory_still_do(tmp_path):
    tensor = torch.arange(4.0)
    torch.save(dict(a=tensor, b=tensor[1:]), tmp_path / 'x.pth')
    loaded = torch.load(tmp_path / 'x.pth', weights_only=False, pickle_module=restricted_pickle)
    loaded['a'][1] = 7
    assert loaded['b'][0] == 7


def storage_on(numbers):
    return torch.storage.TypedStorage(wrap_storage=torch.tensor(numbers).untyped_storage(), dtype=torch.float32,
                                      _internal=True)


def test_tensors_of_the_oldest_files_are_not_trained():
    """Their calls end with the strides."""
    tensor = restricted_pickle._tensor(storage_on([1.0, 2.0]), 0, (2,), (1,))
    assert tensor.tolist() == [1, 2] and not tensor.requires_grad


def test_tensors_of_a_dtype_lie_on_storages():
    for storage, dtype in ([1.0], torch.float32), (storage_on([1.0]), 'float32'):
        with pytest.raises(ForbiddenPickleError, match='a (list|str) in an unexpected place'):
            restricted_pickle._tensor_of_dtype(storage, 0, (1,), (1,), False, None, dtype)


@pytest.mark.parametrize('read_tensor, rest', [(restricted_pickle._tensor, ()),
                                               (restricted_pickle._tensor_of_dtype, (torch.float32,))])
def test_tensors_of_another_view_are_refused(read_tensor, rest):
    """PyTorch sets the attributes that the file names."""
    args = storage_on([1.0]), 0, (1,), (1,), False, None, *rest
    assert read_tensor(*args, {}).tolist() == [1]
    with pytest.raises(ForbiddenPickleError, match='a conjugated or negated tensor'):
        read_tensor(*args, dict(neg=True))


def test_conjugated_tensors_are_refused(tmp_path):
    torch.save(torch.ones(2, dtype=torch.complex64).conj(), tmp_path / 'x.pth')
    with pytest.raises(ForbiddenPickleError, match='a conjugated or negated tensor'):
        torch.load(tmp_path / 'x.pth', weights_only=False, pickle_module=restricted_pickle)


@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.uint16])
def test_types_without_a_storage_class_load(dtype, tmp_path):
    tensor = torch.arange(3.0).to(dtype)
    torch.save(tensor, tmp_path / 'x.pth')
    loaded = torch.load(tmp_path / 'x.pth', weights_only=False, pickle_module=restricted_pickle)
    assert loaded.dtype == dtype
    assert loaded.float().tolist() == [0, 1, 2]
    load = dict(weights_only=False, pickle_module=restricted_pickle)
    assert torch.load(tmp_path / 'x.pth', map_location='meta', **load).is_meta


class Archive:
    """PyTorch's reader, with a byte less in each record, and the names that it was asked for."""

    def __init__(self, path, less=0):
        self.reader, self.less, self.asked = torch._C.PyTorchFileReader(str(path)), less, []

    def get_record(self, name):
        self.asked.append(name)
        record = self.reader.get_record(name)
        return record[:len(record) - self.less]


@pytest.mark.parametrize('dtype', [torch.float16, torch.complex128, torch.bool, torch.uint16])
def test_storages_may_be_as_long_as_their_records(dtype, tmp_path):
    values = torch.ones(3, dtype=dtype)
    torch.save([values, values[1:], torch.zeros(0)], tmp_path / 'x.pth')
    archive = Archive(tmp_path / 'x.pth')
    module = restricted_pickle.for_archive(archive)
    assert module.__name__ == 'convneur_mm.engine.files.restricted_pickle'
    assert module.load is restricted_pickle.load
    whole, part, empty = torch.load(tmp_path / 'x.pth', pickle_module=module, weights_only=False)
    assert whole.equal(values) and part.equal(values[1:]) and empty.equal(torch.zeros(0))
    assert archive.asked == ['data/0', 'data/1']  # once each
    module = restricted_pickle.for_archive(Archive(tmp_path / 'x.pth', less=1))
    with pytest.raises(pickle.UnpicklingError, match='^the storage 0 is longer than its record$'):
        torch.load(tmp_path / 'x.pth', pickle_module=module, weights_only=False)


def test_storages_are_compared_before_pytorch_makes_them(tmp_path):
    """It would swap the bytes behind a record as well, in the process's memory."""
    torch.save(torch.ones(3), tmp_path / 'x.pth')
    unpickler = restricted_pickle.for_archive(Archive(tmp_path / 'x.pth', less=1)).Unpickler(io.BytesIO())
    unpickler.stack = [('storage', torch.serialization.StorageType('FloatStorage'), '0', 'cpu', 3)]
    unpickler.persistent_load = pytest.fail
    with pytest.raises(pickle.UnpicklingError, match='^the storage 0 is longer than its record$'):
        unpickler.load_binpersid()
