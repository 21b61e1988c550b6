"""The COCO configs: the recipe as built, optimizer, schedule and memory."""
import uuid

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from convneur_mm.models.global_branches.neural_memory import NeuralMemory

ARCHS = ('m1', 'm2', 'm3', 'm4')


@pytest.mark.parametrize('arch', ARCHS)
def test_optimizer_and_memory(arch, open_config, build_model, param_groups):
    cfg = open_config(f'cascade_rcnn_convneur_{arch}_1x_coco')
    model = build_model(cfg)
    assert model.backbone.arch == arch
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    assert [(memory.chunk_size, memory.inner_step) for memory in memories] == [(4096, 1e-3)] * 4

    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(optim_wrapper.optimizer) is torch.optim.SGD
    assert not optim_wrapper.clip_grad_kwargs and optim_wrapper._accumulative_counts == 1
    states = {id(param) for memory in memories for param in (memory.w1, memory.w2)}
    assert len(states) == 8
    assert len(optim_wrapper.optimizer.param_groups) == 2
    params = dict(model.named_parameters())
    for name, group in param_groups(model, optim_wrapper).items():
        assert (group['lr'], group['momentum'], group['nesterov']) == (0.02, 0.9, False), name
        # Norms and biases decay, M_0 does not.
        assert group['weight_decay'] == (0 if id(params[name]) in states else 1e-4), name


def test_chunks_by_their_number(open_config, tmp_path):
    """Instead of the chunk size that the config has; what a run writes down shows it."""
    cfg = open_config('cascade_rcnn_convneur_m1_1x_coco')
    cfg.merge_from_dict({'model.backbone.memory_cfg.num_chunks': 16})
    cfg.dump(tmp_path / 'written.py')
    written = Config.fromfile(tmp_path / 'written.py')
    assert 'num_chunks=16' in written.pretty_text
    backbone = MODELS.build(written.model.backbone)
    memories = [module for module in backbone.modules() if isinstance(module, NeuralMemory)]
    assert [memory.tokens_per_chunk(200 * 336) for memory in memories] == [4200] * 4


class Toy(BaseModel):

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> dict:
        return dict(loss=self.weight.sum())


class Recorder(Hook):
    """The learning rate of each iteration."""

    def __init__(self) -> None:
        self.lrs = []

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.lrs.append(runner.optim_wrapper.param_groups[0]['lr'])


def learning_rates(cfg, folder, iterations, batch_size=2, **kwargs):
    recorder = Recorder()
    Runner(
        Toy(), str(folder),
        train_dataloader=DataLoader([dict(inputs=torch.zeros(1))] * iterations * batch_size, batch_size=batch_size),
        train_cfg=cfg.train_cfg, optim_wrapper=cfg.optim_wrapper, param_scheduler=cfg.param_scheduler,
        default_hooks=dict(timer=None, logger=None, checkpoint=None, sampler_seed=None), custom_hooks=[recorder],
        log_level='ERROR', default_scope=cfg.default_scope, experiment_name=uuid.uuid4().hex, **kwargs).train()
    return recorder.lrs


def test_schedule_over_a_whole_run(open_config, tmp_path):
    per_epoch = 100
    lrs = learning_rates(open_config('cascade_rcnn_convneur_m3_1x_coco'), tmp_path, per_epoch)
    assert len(lrs) == 12 * per_epoch
    expected = [0.02 * (1e-3 + (1 - 1e-3) * min(i / 499, 1)) * 0.1**((i >= 800) + (i >= 1100)) for i in range(1200)]
    assert lrs == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('batch_size', [8, 2])
def test_auto_scale_lr(batch_size, open_config, tmp_path):
    """The recipe is for 8 images; here is one process of as many, or of a quarter of that."""
    cfg = open_config('cascade_rcnn_convneur_m3_1x_coco')
    cfg.param_scheduler = []
    cfg.train_cfg.max_epochs = 1
    assert learning_rates(cfg, tmp_path, 2, batch_size, auto_scale_lr=dict(cfg.auto_scale_lr, enable=True)) == (
        pytest.approx([0.02 * batch_size / 8] * 2))
    assert learning_rates(cfg, tmp_path, 2, batch_size, auto_scale_lr=cfg.auto_scale_lr) == [0.02] * 2


def test_the_recipe_is_for_four_gpus(open_config):
    cfg = open_config('cascade_rcnn_convneur_m2_1x_coco')
    assert 4 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 8
