"""tools/doctor.py: a line for each part of the environment, and an exit code for broken ones."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import convneur_mm.engine.launch
from convneur_mm import stack
from convneur_mm.ops.neural_memory import cpu

TOOL = Path(__file__).parents[2] / 'tools' / 'doctor.py'


@pytest.fixture
def run(capfd):
    """Returns the exit code and the lines."""
    spec = importlib.util.spec_from_file_location('doctor_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run():
        capfd.readouterr()
        with pytest.raises(SystemExit) as error:
            module.main([])
        return error.value.code, [line for line in capfd.readouterr().out.splitlines()
                                  if line.startswith(('ok', 'note', 'broken'))]

    return run


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(convneur_mm.engine.launch, 'why_no_gpu', lambda: 'there is no driver')


@pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain', 'kernels')
def test_a_whole_environment(run):
    code, lines = run()
    assert code == 0
    assert [line for line in lines if not line.startswith('ok')] == [
        'note    no GPU, there is no driver: all runs on the CPU. If the machine has one, it needs NVIDIA\'s driver '
        'and a torch built for CUDA, as tools/setup_env.sh installs']
    for text in (f'Python {sys.version.split()[0]}', f'torch {torch.__version__.split("+")[0]}', 'mmdet imports',
                 'mmseg imports', 'mmpretrain imports', 'neural memory: compiled kernels on a CPU',
                 'neural memory on cpu: backend chunked works'):
        assert any(text in line for line in lines), text


def test_packages_that_are_broken_or_missing(run, monkeypatch):
    def require(name):
        raise stack.StackError(f'{name} does not fit. Mend with: pip install it')

    monkeypatch.setattr(stack, 'require', require)
    for found, state, expected in ((object(), 'broken', 1), (None, 'note', 0)):
        monkeypatch.setattr('importlib.util.find_spec', lambda name, found=found: found)
        spec = importlib.util.spec_from_file_location('doctor_tool', TOOL)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        lines = [f'{finding.state} {finding.text}' for finding in module.packages()]
        assert f'{state} mmseg: mmseg.models does not fit. Mend with: pip install it' in lines
        monkeypatch.setattr(module, 'findings', lambda module=module: module.packages())
        with pytest.raises(SystemExit) as error:
            module.main([])
        assert error.value.code == expected


def test_an_environment_that_the_package_refuses(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'convneur_mm', None)
    code, lines = run()
    assert code == 1
    assert lines[-1].startswith('broken  packages: ')
    assert len(lines) == 2


def test_kernels_that_were_not_compiled(run, monkeypatch):
    monkeypatch.setattr(cpu, 'missing', 'they were not compiled')
    monkeypatch.setattr(cpu, 'kernels', None)
    monkeypatch.setattr(cpu, '_has_warned', True)
    _, lines = run()
    line, = (line for line in lines if 'they were not compiled' in line)
    assert line.startswith('note ')
    assert 'pip install --no-build-isolation' in line


def test_a_backend_that_does_not_work(run, monkeypatch):
    monkeypatch.setenv('CONVNEUR_MEMORY_BACKEND', 'none')
    code, lines = run()
    assert code == 1
    assert lines[-1].startswith('broken  neural memory on cpu: CONVNEUR_MEMORY_BACKEND must be ')


def test_gpus(run, monkeypatch):
    def refuse(versions):
        raise stack.StackError('mmcv was compiled without its CUDA operators')

    spec = importlib.util.spec_from_file_location('doctor_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: f'card {i}')
    monkeypatch.setattr(module, 'find_spec', lambda name: object())
    monkeypatch.setattr(stack, 'check_cuda_operators', lambda versions: None)
    states = [finding.state for finding in module.gpus()]
    assert states == ['ok', 'ok']
    monkeypatch.setattr(stack, 'check_cuda_operators', refuse)
    found = list(module.gpus())
    assert found[0].text.startswith('2 GPUs (card 0, card 1), CUDA ')
    assert found[1] == ('broken', 'mmcv was compiled without its CUDA operators')
