"""tools/doctor.py: a line for each part of the environment, and an exit code for broken ones."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import convneur_mm.engine.launch
from convneur_mm import stack
from convneur_mm.ops.neural_memory import cpu, pytorch

TOOL = Path(__file__).parents[2] / 'tools' / 'doctor.py'


@pytest.fixture
def tool(monkeypatch):
    """tools/doctor.py as a module."""
    monkeypatch.setattr(sys, 'path', list(sys.path))
    spec = importlib.util.spec_from_file_location('doctor_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, capfd):
    """Returns the exit code and the lines."""
    def run():
        capfd.readouterr()
        with pytest.raises(SystemExit) as error:
            tool.main([])
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
    assert [line for line in lines if not line.startswith('ok') and ' data: ' not in line] == [
        'note    no GPU, there is no driver: all runs on the CPU. If the machine has one, it needs NVIDIA\'s driver '
        'and a torch built for CUDA, as tools/setup_env.sh installs']
    for text in (f'Python {sys.version.split()[0]}', f'torch {torch.__version__.split("+")[0]}', 'mmdet imports',
                 'mmseg imports', 'mmpretrain imports', 'neural memory: compiled kernels on a CPU',
                 'mmcv\'s operators: ',
                 'neural memory on cpu: backend auto (the default) agrees with the reference to '):
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
    code, lines = run()
    assert code == 0  # and the slower code agrees with the reference
    line, = (line for line in lines if 'they were not compiled' in line)
    assert line.startswith('note ')
    assert 'pip install --no-build-isolation' in line


def test_a_backend_that_does_not_work(run, monkeypatch):
    monkeypatch.setenv('CONVNEUR_MEMORY_BACKEND', 'none')
    code, lines = run()
    assert code == 1
    assert any(line.startswith('broken  neural memory on cpu: CONVNEUR_MEMORY_BACKEND must be ') for line in lines)


def test_the_backend_of_the_environment_is_taken_and_named(tool, monkeypatch):
    monkeypatch.setenv('CONVNEUR_MEMORY_BACKEND', 'reference')
    *_, found = tool.memory()
    assert found.state == 'ok'
    assert 'backend reference (by CONVNEUR_MEMORY_BACKEND) agrees with the reference to ' in found.text


def test_kernels_that_compute_something_else_are_broken(tool, monkeypatch):
    read = pytorch.read
    monkeypatch.setattr(pytorch, 'read', lambda *args: 1.01 * read(*args))
    found = tool.check_backend('torch', 'the default', 'cpu')
    assert found.state == 'broken'
    assert 'backend torch (the default): differs from the reference by ' in found.text
    assert found.text.endswith('CONVNEUR_MEMORY_BACKEND=reference sets another')


def test_kernels_that_fail_are_broken(tool):
    found = tool.check_backend('triton', 'by CONVNEUR_MEMORY_BACKEND', 'cpu')
    assert found.state == 'broken'
    assert 'CUDA tensors' in found.text and found.text.endswith('CONVNEUR_MEMORY_BACKEND=torch sets another')


class TestData:
    def lines(self, tool):
        return [(finding.state, finding.text) for finding in tool.data()]

    def test_none(self, tool, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.lines(tool) == [
            ('note', f'data: no {folder} here; put or link it here, or set data_root in the config')
            for folder in ('data/coco', 'data/ade/ADEChallengeData2016', 'data/imagenet')]

    def test_some(self, tool, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for folder, parts in tool.DATA.items():
            for part in parts:
                path = tmp_path / folder / part
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix:
                    path.write_text('{}')
                else:
                    path.mkdir()
                    (path / 'a.jpg').write_text('x')
        assert [state for state, _ in self.lines(tool)] == 3 * ['ok']
        (tmp_path / 'data/coco/annotations/instances_train2017.json').write_text('')
        (tmp_path / 'data/coco/val2017/a.jpg').unlink()
        assert self.lines(tool)[0] == (
            'note', 'data: data/coco lacks 2 of 4, or they are empty: annotations/instances_train2017.json, val2017; '
                    'add them, or set data_root in the config')

    @pytest.mark.needs('mmdet', 'mmpretrain')
    @pytest.mark.parametrize('name', [
        'cascade_rcnn_convneur_m3_1x_coco', 'upernet_convneur_m4_80k_ade20k', 'convneur_m3_300e_in1k'])
    def test_it_is_what_the_configs_name(self, name, tool):
        cfg = Config.fromfile(convneur_mm.config(name))
        sets = [cfg[f'{split}_dataloader'].dataset for split in ('train', 'val')]
        root = sets[0].data_root.rstrip('/')
        assert root == sets[1].data_root.rstrip('/')
        named = {part.rstrip('/') for dataset in sets for part in (
            dataset.get('ann_file'), dataset.get('split'), *dataset.get('data_prefix', {}).values()) if part}
        assert named == set(tool.DATA[root])


def test_gpus(run, monkeypatch):
    def refuse():
        raise stack.StackError('mmcv was compiled without its CUDA operators')

    spec = importlib.util.spec_from_file_location('doctor_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: f'card {i}')
    monkeypatch.setattr(module, 'find_spec', lambda name: object())
    monkeypatch.setattr(stack, 'check_cuda_operators', lambda: None)
    states = [finding.state for finding in module.gpus()]
    assert states == ['ok', 'ok']
    monkeypatch.setattr(stack, 'check_cuda_operators', refuse)
    found = list(module.gpus())
    assert found[0].text.startswith('2 GPUs (card 0, card 1), CUDA ')
    assert found[1] == ('broken', 'mmcv was compiled without its CUDA operators')
