"""The ablation configs: all of Table 5, one option each, and every one of them trains."""
import json
import runpy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from convneur_mm import config
from convneur_mm.datasets import make_shapes_imagenet
from convneur_mm.engine.launch import read_config
from convneur_mm.models.global_branches import GLOBAL_BRANCHES
from convneur_mm.paths import config_root

OPTIONS = {
    'placement_none': dict(placement='none'),
    'placement_block': dict(placement='block'),
    'branch_cbam': dict(global_branch='cbam'),
    'branch_non_local': dict(global_branch='non_local'),
    'branch_self_attention': dict(global_branch='self_attention'),
    'branch_rwkv': dict(global_branch='rwkv'),
    'branch_titans': dict(global_branch='titans'),
    'fusion_add': dict(fusion='add'),
    'fusion_concat': dict(fusion='concat'),
    'mem_channels_64': dict(memory_cfg=dict(mem_channels=64)),
    'mem_channels_256': dict(memory_cfg=dict(mem_channels=256)),
}
# Trained in every run of the tests; the others with `pytest -m slow`.
ALWAYS = ('placement_block', 'branch_titans', 'fusion_concat')
# What only the memory's writes depend on, where a map is one chunk.
IDLE = tuple(f'global_branch.memory.{name}.' for name in ('key', 'value', 'generators'))

# Two steps on six pictures of 64 x 64 and a validation on six, at a learning rate that shows.
CHILD = """
_base_ = {parent!r}
classes = ('cross', 'disk', 'ring', 'square', 'star', 'triangle')
data_root = {data!r}
max_epochs = 1
model = dict(head=dict(num_classes=6, topk=(1, )), train_cfg=None)
data_preprocessor = dict(num_classes=6)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root=data_root, with_label=True, pipeline=pipeline,
               serialize_data=False)
loader = dict(num_workers=0, persistent_workers=False, batch_size=3)
train_dataloader = dict(dataset=dict(_delete_=True, data_prefix='train', **dataset), **loader)
val_dataloader = dict(dataset=dict(_delete_=True, data_prefix='val', **dataset), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(lr=1e-3), accumulative_counts=1)
default_hooks = dict(
    checkpoint=dict(interval=-1, save_best=None, save_last=False), logger=dict(interval=1),
    settings=dict(classes=classes, data_root=data_root, max_epochs=max_epochs, topk=(1, )))
custom_hooks = [dict(type='GradientRecorder')]
randomness = dict(seed=0)
"""


@HOOKS.register_module()
class GradientRecorder(Hook):
    """The parameters before the first step, their gradients in the last one, and the names of those that decay."""

    def before_train(self, runner: Runner) -> None:
        self.before = {name: param.detach().clone() for name, param in runner.model.named_parameters()}
        self.gradients = {}
        names = {id(param): name for name, param in runner.model.named_parameters()}
        self.decayed = {names[id(param)] for group in runner.optim_wrapper.optimizer.param_groups
                        for param in group['params'] if group['weight_decay']}
        runner.optim_wrapper.optimizer.register_step_pre_hook(lambda *_: self.gradients.update(
            (name, param.grad.clone()) for name, param in runner.model.named_parameters()))


def test_one_config_for_each_row():
    found = {path.stem for path in (config_root() / 'ablation').glob('*.py')}
    assert found == {f'convneur_m3_{name}_300e_in1k' for name in OPTIONS}
    assert {options['global_branch'] for options in OPTIONS.values() if 'global_branch' in options} == (
        set(GLOBAL_BRANCHES) - {'neural_memory'})


@pytest.mark.parametrize('name', OPTIONS)
def test_differs_from_the_parent_in_its_option_alone(name):
    content = runpy.run_path(config(f'ablation/convneur_m3_{name}_300e_in1k'))
    own = {key: value for key, value in content.items() if not key.startswith('__')}
    assert own == dict(_base_='../convneur_m3_300e_in1k.py', model=dict(backbone=OPTIONS[name]))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> str:
    return str(make_shapes_imagenet(tmp_path_factory.mktemp('pictures') / 'data', num_train=6, num_val=6,
                                    image_size=64))


@pytest.mark.parametrize('name', [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
                                  for name in OPTIONS])
def test_trains_and_validates(name, pictures, tmp_path, monkeypatch):
    # MMEngine lays out the config's text four times in a run, which takes as long as everything else here.
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
    child = tmp_path / f'{name}.py'
    child.write_text(CHILD.format(parent=config(f'ablation/convneur_m3_{name}_300e_in1k'), data=pictures))
    cfg = read_config(str(child), {})
    cfg.update(work_dir=str(tmp_path / 'work'), experiment_name=tmp_path.name, log_level='ERROR')
    runner = Runner.from_cfg(cfg)
    backbone = dict(type='ConvNeur', arch='m3', out_indices=3, gap_before_final_norm=True)
    assert runner.cfg.model.backbone.to_dict() == dict(backbone, **OPTIONS[name])
    runner.train()

    recorder, = (hook for hook in runner.hooks if isinstance(hook, GradientRecorder))
    assert len(recorder.before) > 100
    for param, gradient in recorder.gradients.items():
        assert gradient.isfinite().all(), param
        assert gradient.any() or any(idle in param for idle in IDLE), param
    moved = {name for name, param in runner.model.named_parameters() if not torch.equal(param, recorder.before[name])}
    assert moved >= {param for param, gradient in recorder.gradients.items() if gradient.any()}
    assert recorder.decayed == {
        param for param, value in recorder.before.items()
        if value.ndim > 1 and not param.endswith(('.memory.w1', '.memory.w2'))}
    log, = (tmp_path / 'work').glob('*/vis_data/scalars.json')
    scalars = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line['loss'] for line in scalars if 'loss' in line]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    validated = [line for line in scalars if 'accuracy/top1' in line]
    assert [line['step'] for line in validated] == [1] and 0 <= validated[0]['accuracy/top1'] <= 100
