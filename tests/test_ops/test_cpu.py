"""The compiled kernels against the same in PyTorch."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from convneur_mm.models import NeuralMemory
from convneur_mm.ops.neural_memory import UpdateGenerators, cpu, neural_memory
from convneur_mm.ops.neural_memory.operators import implementation

needs_kernels = pytest.mark.needs('kernels')


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


@needs_kernels
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize('rule', ['sequential', 'parallel'])
@pytest.mark.parametrize('retrieve', ['previous', 'final'])
@pytest.mark.parametrize('batch, heads, tokens, chunk_size', [
    (2, 3, 301, 100), (1, 1, 5, 7), (3, 2, 48, 16), (1, 8, 70, 1)])
def test_equals_pytorch(dtype, tolerance, rule, retrieve, batch, heads, tokens, chunk_size):
    options = dict(chunk_size=chunk_size, update_rule=rule, retrieve=retrieve, inner_step=0.7, max_write_norm=0.9)
    found = results(inputs(batch, heads, tokens, dtype), backend='cpp', **options)
    # In float64, but of the numbers that float32 has.
    expected = results([x.detach().double().requires_grad_() for x in inputs(batch, heads, tokens, dtype)],
                       backend='torch', **options)
    assert all(error < tolerance for error in errors(found, expected))  # not their maximum, which may pass over NaN


SETS = {'default': 'baseline', 'avx2': 'avx2', 'avx512': 'avx512'}  # by the name that PyTorch has for each


def python(*args: str, capability: str = '') -> str:
    """What a process prints in which PyTorch may use the processor's instructions up to ``capability``."""
    env = {name: value for name, value in os.environ.items() if name != 'ATEN_CPU_CAPABILITY'}
    if capability:
        env['ATEN_CPU_CAPABILITY'] = capability
    done = subprocess.run([sys.executable, '-W', 'ignore', *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_kernels
@pytest.mark.slow
def test_older_processors():
    """The kernels are those of the instructions that PyTorch may use, of which the processor may have fewer."""
    code = f"""if True:
        import importlib.util, torch
        spec = importlib.util.spec_from_file_location({cpu.MODULE!r}, {cpu.kernels.__file__!r})
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        capability = torch.backends.cpu.get_cpu_capability().lower()
        print('default' if capability == 'no avx' else capability, kernels.instruction_set())
    """
    order = list(SETS)
    has, _ = python('-c', code).split()
    # PyTorch does not compare the variable with the processor, and would run what that does not have.
    for capability in order[:order.index(has) + 1] if has in order else ['']:
        allowed, used = python('-c', code, capability=capability).split()
        assert allowed == (capability or has)
        expected = SETS.get(allowed, 'baseline')
        assert used == (expected if expected in cpu.kernels.INSTRUCTION_SETS else 'baseline')


@needs_kernels
@pytest.mark.parametrize('capability', ['default', pytest.param('avx2', marks=pytest.mark.slow)])
def test_older_processors_equal_pytorch(capability):
    out = python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:randomly', '--rootdir', os.getcwd(),
                 f'{__file__}::test_equals_pytorch', '-k', '301', capability=capability)
    assert '8 passed' in out


@needs_kernels
@pytest.mark.parametrize('scale', [1e-4, 1.0, 3.0, 100.0])
def test_float32_is_as_exact_as_pytorch(scale):
    """Also where GELUs hardly bend, or saturate, where the generators' own gradients are beyond float32 for both."""
    options = dict(chunk_size=64, inner_step=1.0)
    tensors = inputs(2, 2, 200, torch.float32, scale)
    ours, theirs = (results(tensors, backend=backend, **options) for backend in ('cpp', 'torch'))
    exact = results([x.detach().double().requires_grad_() for x in tensors], backend='torch', **options)
    compared = slice(10 if scale == 100 else None)
    for found, reference in zip(errors(ours, exact)[compared], errors(theirs, exact)[compared]):
        assert found <= 3 * reference + 1e-6


@needs_kernels
def test_a_nan_stays_one():
    tensors = inputs(1, 2, 40, torch.float32)
    tensors[1].data[0, 1, 3, 5] = float('nan')
    y, *state_and_gradients = results(tensors, chunk_size=16)
    assert not y[0, :, :16].isnan().any() and y[0, 1, 16:].isnan().any()
    assert all(x.isnan().any() for x in state_and_gradients)


@needs_kernels
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


@needs_kernels
def test_only_for_what_it_can_do():
    rows = torch.empty(4, 16, 16)
    assert implementation('auto', rows) is implementation('cpp', rows) is cpu.kernels
    for x in (rows.half(), rows.to('meta')):
        assert cpu.refuses(x).startswith('takes float32 and float64 on a CPU, got ')
    for x in (rows[..., :8], rows[:, :8]):
        assert cpu.refuses(x).startswith('takes heads of 16 channels with 8 hidden units, got ')
        assert implementation('auto', x) is not cpu.kernels
        with pytest.raises(ValueError, match="backend 'cpp' takes heads of 16"):
            implementation('cpp', x)


def test_kernels_that_do_not_load_are_left_out(tmp_path):
    """Name the reason without a warning: kernels of another PyTorch of the same version fail to load."""
    code = f"""if True:
        import importlib.util, warnings
        import {cpu.__package__}
        real = importlib.import_module
        def fail(name, package=None):
            if name.startswith('._cpu_'):
                raise error
            return real(name, package)
        importlib.import_module = fail
        for error in ModuleNotFoundError('No module'), ImportError('undefined symbol'):
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                spec = importlib.util.spec_from_file_location('{cpu.__package__}.again', r'{cpu.__file__}')
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            print(module.kernels, module.missing)
    """
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True,
                         cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(Path(cpu.__file__).parents[3])}).stdout
    assert out.splitlines()[-2:] == [
        f'None they were not compiled for PyTorch {torch.__version__}',
        'None they were compiled for another PyTorch and do not load (undefined symbol)']


@needs_kernels
@pytest.mark.parametrize('change, missing', [
    ('// another rule', 'they were compiled from other sources than those of this checkout'),
    (None, '')])  # an installed wheel, which has no sources
def test_kernels_of_other_sources_are_left_out(change, missing, tmp_path):
    """Rather than called with what they do not take."""
    package = tmp_path / 'convneur_mm'
    shutil.copytree(Path(cpu.__file__).parents[2], package, ignore=shutil.ignore_patterns('__pycache__'))
    csrc = package / 'ops' / 'neural_memory' / 'csrc'
    if change is None:
        shutil.rmtree(csrc)
    else:
        with open(csrc / 'kernels.h', 'a') as file:
            file.write(change)
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from convneur_mm.ops.neural_memory import cpu; '
                          'print(cpu.__file__); print(cpu.missing)'], capture_output=True, text=True, check=True,
                         cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)}).stdout.splitlines()
    assert out[-2:] == [str(package / 'ops' / 'neural_memory' / 'cpu.py'), missing]


@pytest.fixture
def without_kernels(monkeypatch):
    """As if nothing had been compiled, and nobody warned yet."""
    monkeypatch.setattr(cpu, 'missing', 'they were not compiled')
    monkeypatch.setattr(cpu, '_has_warned', False)


def warnings_of(function, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        function(*args)
    return [str(warning.message) for warning in found if 'neural memory' in str(warning.message)]


def test_missing_kernels_are_warned_of_once(without_kernels):
    """In one line, with the command; by the layer whether or not anything is written, and not again."""
    message, = warnings_of(NeuralMemory(32), torch.zeros(1, 5, 32))
    assert '\n' not in message
    assert re.search(r"they were not compiled\..*mend with: pip install 'setuptools.*' && pip install "
                     '--no-build-isolation --no-deps ', message)
    assert not warnings_of(NeuralMemory(32), torch.zeros(1, 400, 32))


def test_the_command_names_the_checkout(monkeypatch, tmp_path):
    """Where there is one; an installed wheel has none."""
    source = tmp_path / "someone's check out"
    module = source / 'convneur_mm' / 'ops' / 'neural_memory' / 'cpu.py'
    monkeypatch.setattr(cpu, '__file__', str(module))
    assert cpu.install_command().endswith(' --no-deps path/to/convneur-mm')
    source.mkdir()
    (source / 'setup.py').touch()
    assert shlex.split(cpu.install_command())[-3:] == ['--no-deps', '-e', str(source)]


@pytest.mark.parametrize('options', [dict(head_dim=8), dict(hidden_dim=4), dict(backend='reference')], ids=str)
def test_no_warning_where_kernels_would_not_be_used(without_kernels, options):
    assert not warnings_of(NeuralMemory(32, **options), torch.zeros(1, 400, 32))


def test_no_warning_without_numbers(without_kernels):
    assert not warnings_of(NeuralMemory(32).to('meta'), torch.zeros(1, 400, 32, device='meta'))


def bindings() -> dict[str, dict]:
    """Arguments that each of the compiled functions takes: 2 images, 3 heads, 20 tokens in 3 chunks."""
    def tokens():
        return torch.ones(2, 3, 16, 20)

    def rows(chunks=1):
        return torch.ones(chunks, 6, 16, 16)

    size = dict(chunk_size=8, eps=0.1)
    memories = dict(memories=rows(3), **size)
    keys, rule = dict(k=tokens(), v=tokens(), **memories, curvature=True), dict(inner_step=1.0, max_write_norm=1.0)
    state = dict(memory=rows(), momentum=rows())
    return dict(
        read=dict(q=tokens(), **memories),
        read_backward=dict(grad_y=tokens(), q=tokens(), **memories, grad_q=tokens()),
        surprise=keys,
        surprise_backward=dict(grad_gradient=rows(3), grad_errors=torch.ones(3, 6, 16), grad_curvature=torch.ones(3, 6),
                               **keys, grad_k=tokens(), grad_v=tokens()),
        step=dict(gradient=rows(), errors=torch.ones(1, 6, 16), **state, in_weight=torch.ones(192, 48),
                  in_bias=torch.ones(192), out_weight=torch.ones(144, 192), out_bias=torch.ones(144), **rule),
        step_backward=dict(grad_memory=rows(), grad_momentum=rows(), gradient=rows(), hidden=torch.ones(2, 192),
                           outputs=torch.ones(2, 144), **state, in_weight=torch.ones(192, 48),
                           out_weight=torch.ones(144, 192), **rule))


TENSORS = [(function, name) for function, arguments in bindings().items() for name, x in arguments.items()
           if isinstance(x, torch.Tensor)]


def spoilt(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is not ``x``: in its sizes, of which a smaller one would be read beyond its end, or device."""
    found = {f'size {i} one less': x.narrow(i, 0, n - 1).contiguous() for i, n in enumerate(x.shape)}
    found.update({f'size {i} one more': torch.cat((x, x.narrow(i, 0, 1)), dim=i) for i in range(x.dim())})
    return dict(found, empty=x.new_empty(0), elsewhere=x.to('meta'))


@needs_kernels
@pytest.mark.parametrize('function', bindings())
def test_bindings_take_what_fits(function):
    getattr(cpu.kernels, function)(*bindings()[function].values())


@needs_kernels
@pytest.mark.parametrize('function, name', TENSORS)
def test_bindings_refuse_tensors_that_do_not_fit(function, name):
    """Each tensor in turn, with an error instead of reading or writing what is not theirs."""
    for defect, x in spoilt(bindings()[function][name]).items():
        if name == next(iter(bindings()[function])) == 'q' and defect.startswith('size 3'):
            continue  # as many chunks of another number of queries
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            getattr(cpu.kernels, function)(*{**bindings()[function], name: x}.values())
            pytest.fail(f'took {name} with {defect}')


@needs_kernels
@pytest.mark.parametrize('function', ['read', 'read_backward', 'surprise', 'surprise_backward'])
@pytest.mark.parametrize('chunk_size', [0, -1])
def test_bindings_refuse_chunks_without_tokens(function, chunk_size):
    with pytest.raises(ValueError, match=f'expected a chunk_size of at least 1, got {chunk_size}'):
        getattr(cpu.kernels, function)(*{**bindings()[function], 'chunk_size': chunk_size}.values())


@needs_kernels
@pytest.mark.parametrize('function, name', TENSORS)
def test_bindings_take_tensors_of_all_strides(function, name):
    """Also those that they fill."""
    plain, strided = bindings()[function], bindings()[function]
    for arguments in (plain, strided):
        g = torch.Generator().manual_seed(0)
        for key, x in arguments.items():
            if isinstance(x, torch.Tensor):
                arguments[key] = torch.randn(x.shape, generator=g)
    x = strided[name]
    strided[name] = torch.stack((x, x), -1).movedim(0, -2).contiguous().movedim(-2, 0)[..., 0]
    assert x.dim() == 1 or not strided[name].is_contiguous()
    for arguments in (plain, strided):
        found = getattr(cpu.kernels, function)(*arguments.values())
        arguments['found'] = found if isinstance(found, tuple) else (found,)
    for a, b in zip(strided.pop('found'), plain.pop('found'), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for key, x in plain.items():
        assert not isinstance(x, torch.Tensor) or (strided[key] - x).norm() <= 1e-5 * x.norm()


@needs_kernels
def test_the_longest_chunk(monkeypatch):
    """As many tokens as an integer can say are one chunk."""
    tensors = inputs(1, 2, 40, torch.float64)
    found, expected = (results(tensors, chunk_size=n) for n in (2**63 - 1, 40))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
