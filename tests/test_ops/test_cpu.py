"""The compiled kernels against the same in PyTorch."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from convneur_mm.ops import UpdateGenerators, neural_memory
from convneur_mm.ops.neural_memory import cpu


def inputs(batch, heads, tokens, dtype, scale=1.0):
    """q, k, v (rows of tokens, as an attention layer has them), w1, w2 and the generators' weights."""
    g = torch.Generator().manual_seed(0)
    channels = 16 * heads

    def draw(*shape, std=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    q, k, v = (draw(batch, heads, tokens, 16, std=scale) for _ in range(3))
    drawn = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, draw(heads, 16, 8, std=0.25 * scale),
             draw(heads, 8, 16, std=0.35 * scale), draw(4 * channels, channels, std=channels**-0.5),
             draw(4 * channels, std=0.1), draw(3 * channels, 4 * channels, std=channels**-0.5), draw(3 * channels)]
    return [x.to(dtype).requires_grad_() for x in drawn]


def results(tensors, **options):
    """Reads, state and all gradients of a sum, which come back as one number expanded."""
    y, state = neural_memory(*tensors[:5], UpdateGenerators(*tensors[5:]), return_state=True, **options)
    loss = y.sum() + (y * y).sum() + sum((i + 1) * s.square().sum() for i, s in enumerate(state))
    return [y, *state, *torch.autograd.grad(loss, tensors)]


def errors(found, expected):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected)]


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
@pytest.mark.parametrize('retrieve', ['previous', 'final'])
@pytest.mark.parametrize('batch, heads, tokens, chunk_size', [
    (2, 3, 301, 100), (1, 1, 5, 7), (3, 2, 48, 16), (1, 8, 70, 1)])
def test_equals_pytorch(monkeypatch, dtype, tolerance, rule, retrieve, batch, heads, tokens, chunk_size):
    assert cpu.kernels is not None
    options = dict(chunk_size=chunk_size, update_rule=rule, retrieve=retrieve, inner_step=0.7, max_write_norm=0.9)
    found = results(inputs(batch, heads, tokens, dtype), **options)
    monkeypatch.setattr(cpu, 'kernels', None)
    # In float64, but of the numbers that float32 has.
    expected = results([x.detach().double().requires_grad_() for x in inputs(batch, heads, tokens, dtype)], **options)
    assert max(errors(found, expected)) < tolerance


@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_older_processors(capability):
    """The kernels are those of the instructions that PyTorch may use."""
    code = f'from {cpu.__package__} import cpu; print(cpu.kernels.instruction_set())'
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    used = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True,
                          check=True).stdout.split()[-1]
    assert used == 'baseline' or (capability, used) == ('avx2', 'avx2')  # 'baseline' too where there is no AVX2
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--rootdir', os.getcwd(),
                           f'{__file__}::test_equals_pytorch'], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout


@pytest.mark.parametrize('scale', [1e-4, 1.0, 3.0, 100.0])
def test_float32_is_as_exact_as_pytorch(monkeypatch, scale):
    """Also where GELUs hardly bend, or saturate, where the generators' own gradients are beyond float32 for both."""
    options = dict(chunk_size=64, inner_step=1.0)
    tensors = inputs(2, 2, 200, torch.float32, scale)
    ours = results(tensors, **options)
    monkeypatch.setattr(cpu, 'kernels', None)
    theirs = results(tensors, **options)
    exact = results([x.detach().double().requires_grad_() for x in tensors], **options)
    compared = slice(10 if scale == 100 else None)
    for found, reference in zip(errors(ours, exact)[compared], errors(theirs, exact)[compared]):
        assert found <= 3 * reference + 1e-6


def test_a_nan_stays_one():
    tensors = inputs(1, 2, 40, torch.float32)
    tensors[1].data[0, 1, 3, 5] = float('nan')
    y, *state_and_gradients = results(tensors, chunk_size=16)
    assert not y[0, :, :16].isnan().any() and y[0, 1, 16:].isnan().any()
    assert all(x.isnan().any() for x in state_and_gradients)


def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    try:
        several = results(inputs(2, 4, 150, torch.float32), chunk_size=32)
        torch.set_num_threads(1)
        one = results(inputs(2, 4, 150, torch.float32), chunk_size=32)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(several, one):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_only_for_what_it_can_do():
    tokens, rows = torch.empty(1, 2, 16, 5), torch.empty(1, 2, 16, 16)
    assert cpu.usable(tokens, rows)
    assert not cpu.usable(tokens.half(), rows)
    assert not cpu.usable(tokens.to('meta'), rows)
    assert not cpu.usable(tokens[:, :, :8], rows)
    assert not cpu.usable(tokens, rows[..., :8, :])
    with FlopCounterMode(display=False):
        assert not cpu.usable(tokens, rows)


def test_kernels_that_do_not_load_are_left_out(tmp_path):
    """With a warning, as those of another PyTorch of the same version would be."""
    folder = Path(cpu.__file__).parent
    code = f"""if True:
        import importlib.util, sys, warnings
        import {cpu.__package__}
        real = importlib.import_module
        def fail(name, package=None):
            if name.startswith('._cpu_'):
                raise ImportError('undefined symbol')
            return real(name, package)
        importlib.import_module = fail
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            spec = importlib.util.spec_from_file_location('{cpu.__package__}.again', r'{folder / "cpu.py"}')
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        print(module.kernels, found[-1].message)
    """
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True,
                         cwd=tmp_path).stdout
    assert 'None CPU kernels compiled for another PyTorch are left out' in out and 'undefined symbol' in out


@pytest.mark.parametrize('change, message', [
    (dict(k=torch.empty(1, 2, 8, 20)), 'expected tokens'),
    (dict(v=torch.empty(1, 2, 16, 19)), 'expected 20 keys and as many values'),
    (dict(initial=torch.empty(3, 16, 16)), 'expand'),
    (dict(v=torch.empty(1, 2, 16, 20, dtype=torch.float64)), 'Double'),
])
def test_bad_tensors_are_errors_not_crashes(change, message):
    tensors = dict(k=torch.empty(1, 2, 16, 20), v=torch.empty(1, 2, 16, 20), initial=torch.empty(2, 16, 16))
    tensors.update(change)
    generators = [torch.empty(128, 32), torch.empty(128), torch.empty(96, 128), torch.empty(96)]
    with pytest.raises((ValueError, RuntimeError), match=message):
        cpu.kernels.write_all(*tensors.values(), *generators, *torch.empty(2, 1, 2, 16, 16), 20, 8, False, 1.0, 1.0)
