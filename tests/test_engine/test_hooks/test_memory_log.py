"""Curves of memories and gates: in a training of each task, with the numbers of the forward pass."""
import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from convneur_mm.engine import MemoryLogHook
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.hooks.memory_log import gated_stages
from convneur_mm.models import ConvNeur, NeuralMemory
from convneur_mm.models.global_branch import GlobalBranch
from convneur_mm.visualization import trace

GATES = {f'gate/stage{i}/{name}' for i in (1, 2, 3, 4) for name in ('mean', 'spread')}
# Images of 64 x 64 are one chunk of up to 30 tokens in the other two stages.
MEMORIES = {f'memory/stage{i}/{name}' for i in (1, 2) for name in ('surprise', 'write_norm', 'decay')}
pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')


@pytest.fixture
def make_runner(tiny_config, tmp_path):
    """Called with a model of ``tiny_config``, options of its backbone, and what else of the config is to be changed."""

    def make(model, backbone=None, interval=2, name='run', backend='LocalVisBackend', iterations=2, **changes):
        cfg = tiny_config(model)
        name = f'{tmp_path.name}_{name}'  # MMEngine keeps one visualizer of each name
        cfg.model.backbone.memory_cfg = dict(chunk_size=30)
        cfg.model.backbone.update(backbone or {})
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=100)
        cfg.custom_hooks = [dict(type='MemoryLogHook', interval=interval)]
        cfg.visualizer = dict(type='Visualizer', name=name, vis_backends=[dict(type=backend)])
        cfg.default_hooks.checkpoint = None
        cfg.default_hooks.pop('visualization', None)
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
        for step in cfg.train_dataloader.dataset.pipeline:
            if 'scale' in step:
                step.scale = (64, 64)
        if model == 'semantic_fpn':
            cfg.model.data_preprocessor.size = (64, 64)
        cfg.update(work_dir=str(tmp_path / name), experiment_name=name, randomness=dict(seed=0), **changes)
        init_default_scope(cfg.default_scope)
        return Runner.from_cfg(cfg)

    return make


def logged(runner):
    """The lines of the scalars' file that are ours."""
    lines = [json.loads(line) for path in Path(runner.work_dir).glob('*/vis_data/scalars.json')
             for line in path.read_text().splitlines()]
    return [line for line in lines if any(name.startswith(('gate/', 'memory/')) for name in line)]


@pytest.mark.parametrize('model', ['cascade_rcnn', 'semantic_fpn', ''])
def test_trainings_of_all_tasks_are_logged(model, make_runner):
    runner = make_runner(model)
    runner.train()
    line, = logged(runner)
    assert line['step'] == 2 and set(line) == GATES | MEMORIES | {'step'}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.model.backbone.modules())


def test_a_training_is_not_changed(make_runner):
    weights = []
    for interval in (1, 100):
        runner = make_runner('', interval=interval, name=f'every{interval}')
        runner.train()
        assert len(logged(runner)) == (2 if interval == 1 else 0)
        weights.append(runner.model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


@pytest.mark.parametrize('with_cp', [False, True])
def test_the_numbers_are_those_of_the_forward_pass(with_cp, make_runner):
    runner = make_runner('', backbone=dict(placement='block', with_cp=with_cp), interval=1, iterations=1)
    seen = {}
    for name, module in runner.model.named_modules():
        stage = f'stage{int(name.split("stages.")[1][0]) + 1}' if 'stages.' in name else ''
        if isinstance(module, GlobalBranch):
            module.register_forward_hook(lambda module, args, output, stage=stage: seen.setdefault(
                stage, []).append(output.detach().sigmoid()))
        elif isinstance(module, NeuralMemory):
            module.register_forward_pre_hook(lambda module, args, stage=stage: seen.setdefault(
                f'{stage} memory', []).append(trace(module, *args)))
    runner.train()
    line, = logged(runner)
    for i in (1, 2, 3, 4):
        gates = seen[f'stage{i}']
        assert line[f'gate/stage{i}/mean'] == pytest.approx(sum(g.mean().item() for g in gates) / len(gates), rel=1e-5)
        assert line[f'gate/stage{i}/spread'] == pytest.approx(sum(g.std().item() for g in gates) / len(gates), rel=1e-4)
    for name in MEMORIES:
        _, stage, field = name.split('/')
        values = [getattr(found, field).mean().item() for found in seen[f'{stage} memory']]
        assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_of_a_backbone_that_runs_twice_the_first_run_is_logged(make_runner):
    runner = make_runner('', interval=1, iterations=1)
    model, seen = runner.model, {}
    extract, branch = model.extract_feat, model.backbone.stages[0][-1].global_branch
    model.extract_feat = lambda images, *args, **kwargs: [
        extract(x, *args, **kwargs) for x in (images, torch.randn_like(images))][0]
    branch.register_forward_hook(lambda module, args, output: seen.setdefault('gate', []).append(
        output.detach().sigmoid().mean().item()))
    branch.memory.register_forward_pre_hook(lambda module, args: seen.setdefault('surprise', []).append(
        trace(module, *args).surprise.mean().item()))
    runner.train()
    line, = logged(runner)
    for name, key in (('gate', 'gate/stage1/mean'), ('surprise', 'memory/stage1/surprise')):
        first, second = seen[name]
        assert line[key] == pytest.approx(first, rel=1e-6)
        assert second != pytest.approx(first, rel=1e-6)


def test_only_the_first_process_looks(make_runner, monkeypatch):
    monkeypatch.setattr(Runner, 'rank', property(lambda self: 1))
    runner = make_runner('', interval=1, iterations=1)
    runner.train()
    assert not logged(runner)


@pytest.mark.parametrize('backbone, names', [
    (dict(fusion='add'), MEMORIES),
    (dict(global_branch='cbam', memory_cfg=None), GATES),
])
def test_what_there_is_is_logged(backbone, names, make_runner):
    runner = make_runner('', backbone=backbone, interval=1, iterations=1)
    runner.train()
    line, = logged(runner)
    assert set(line) == names | {'step'}


def test_tensorboard_gets_the_curves(make_runner):
    pytest.importorskip('tensorboard', reason='pip install tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    runner = make_runner('', backend='TensorboardVisBackend', interval=1, iterations=2)
    runner.train()
    events = EventAccumulator(str(next(Path(runner.work_dir).glob('*/vis_data'))))
    events.Reload()
    assert set(events.Tags()['scalars']) >= GATES | MEMORIES
    assert [event.step for event in events.Scalars('memory/stage1/surprise')] == [1, 2]


def test_models_that_it_cannot_look_into_are_named(make_runner):
    with pytest.raises(LaunchError, match='set compile=False'):
        make_runner('', compile=True, name='compiled').train()
    with pytest.raises(LaunchError, match='no ConvNeur with a global branch in a ImageClassifier'):
        make_runner('', backbone=dict(placement='none'), name='without').train()


@pytest.mark.parametrize('interval', [0, 1.5, True])
def test_an_interval_that_is_no_number_of_iterations_is_named(interval):
    with pytest.raises(ValueError, match=f'interval must be an integer of at least 1, got {interval!r}'):
        MemoryLogHook(interval)


def test_stages_of_several_backbones_have_their_names():
    arch = dict(depths=[1, 1], channels=[8, 16], mem_channels=16)
    model = torch.nn.ModuleDict({name: ConvNeur(arch, out_indices=(0, 1)) for name in ('rgb', 'depth')})
    assert list(gated_stages(model)) == ['rgb.stage1', 'rgb.stage2', 'depth.stage1', 'depth.stage2']
