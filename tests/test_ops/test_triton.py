"""The Triton backend: its kernels without a GPU (interpreted, and compiled for one), and its absence."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convneur_mm.ops.neural_memory import triton as backend

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
HAS_TRITON = importlib.util.find_spec('triton') is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason='needs Triton')
KERNELS = {'read_kernel', 'read_backward_kernel', 'surprise_kernel', 'surprise_backward_kernel', 'write_kernel',
           'write_backward_kernel'}


def python(*args, **env: str) -> str:
    """Runs a process of its own: Triton decides when it is imported whether it interprets its kernels."""
    done = subprocess.run([sys.executable, *map(str, args)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_triton
@pytest.mark.timeout(1200)  # the interpreter takes minutes, several times that with coverage
@pytest.mark.parametrize('device, chosen', [
    ('interpreter', '(test_equals_reference and True) or test_operators or test_half_precision or test_widths'),
    pytest.param('interpreter', '', marks=pytest.mark.slow),
    *([('cuda', '')] if torch.cuda.is_available() else [])])
def test_equals_reference(device, chosen, tmp_path):
    environment = dict(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET='01'[device == 'interpreter'])
    if device == 'interpreter':
        environment['CUDA_VISIBLE_DEVICES'] = ''
    python('-m', 'pytest', '-q', '--import-mode=importlib', '-p', 'no:cacheprovider', '-k', chosen,
           FOLDER / 'check_triton.py', **environment)


@pytest.fixture(scope='module')
def compiled(tmp_path_factory) -> list[tuple[str, ...]]:
    """Capability, setting, name, registers, spilled and shared bytes of every kernel, for GPUs that need not be there.
    """
    report = python(FOLDER / 'compile_triton.py', '80:classification,detection', '90', '120:classification,detection',
                    TRITON_CACHE_DIR=str(tmp_path_factory.mktemp('triton')), TRITON_INTERPRET='0')
    return re.findall(r'sm_(\d+) (\w+) (\w+): (\d+) registers, (\d+) bytes spilled, (\d+) bytes shared', report)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize('capability, settings', [(80, 2), (90, 4), (120, 2)])
def test_compiles(capability, settings, compiled):
    """Every kernel, with hardly a register spilled."""
    lines = [line for line in compiled if int(line[0]) == capability]
    assert {name for _, _, name, *_ in lines} == KERNELS
    assert len({setting for _, setting, *_ in lines}) == settings
    for line in lines:
        assert int(line[4]) <= 64, line
        assert int(line[5]) <= 64 * 1024, line  # of at least 99 KiB that a block may have on sm_80 and later


@needs_triton
@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
@pytest.mark.parametrize('retrieve', ['previous', 'final'])
def test_shapes_without_a_gpu(monkeypatch, rule, retrieve):
    """Of what the kernels fill, forward and backward; on tensors without numbers none of them runs."""
    from compile_triton import call
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, 'run', lambda self, *args, **kwargs: launched.append(self.fn.__name__))
    monkeypatch.setattr(backend, 'is_available', lambda tensor: True)
    inputs, gradients = call(2, 2, 50, 16, rule, retrieve)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert set(launched) == KERNELS


def test_imports_without_triton():
    python('-c', '''
import sys
sys.modules['triton'] = None  # what an import of it then raises is an ImportError
import torch
from convneur_mm.ops.neural_memory.triton import refuses
assert 'needs Triton and CUDA tensors' in refuses(torch.zeros(4, 2))
''')


@needs_triton
@pytest.mark.parametrize('batch, tokens', [(64, 56 * 56), (2, 200 * 304)])
def test_launches_of_a_chunk(monkeypatch, batch, tokens):
    """Of one more written chunk: few, whatever the batch, and no copy to the host among them."""
    from compile_triton import call
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.jit import JITFunction

    launches = []
    views = ('view', 'slice', 'select', 'split', 'unbind', 'expand', 'permute', 'transpose', 't.', 'as_strided',
             'unsqueeze', 'squeeze', 'alias', 'detach', 'empty', 'new_empty', 'reshape')

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func).removeprefix('aten.')
            assert '_local_scalar_dense' not in name and 'nonzero' not in name, name
            launches.extend([] if name.lstrip('_').startswith(views) else [name])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(JITFunction, 'run', lambda self, *args, **kwargs: launches.append(self.fn.__name__))
    monkeypatch.setattr(backend, 'is_available', lambda tensor: True)
    monkeypatch.setattr(backend, '_multiprocessors', lambda device: 132)
    counts = []
    for chunks in 5, 6:
        launches.clear()
        forward = []
        with Launches():
            call(batch, 8, tokens // 16 * chunks, tokens // 16, between=lambda: forward.append(len(launches)))  # noqa: B023
        counts.append((*forward, len(launches) - forward[0]))
    (forward, backward), (more_forward, more_backward) = counts
    assert 1 <= more_forward - forward <= 6 and 1 <= more_backward - backward <= 10
    assert set(launches) >= KERNELS
