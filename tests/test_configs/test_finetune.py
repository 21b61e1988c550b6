"""configs/finetune: the recipes of their bases, with what trained weights and a new memory ask for."""
import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS

from convneur_mm.paths import config_root

CONFIGS = sorted(path.stem for path in (config_root() / 'finetune').glob('*.py'))


def test_there_is_one_for_each_task():
    assert CONFIGS == ['cascade_rcnn_convneur_m3_finetune_1x_coco', 'convneur_m3_finetune_30e_in1k',
                       'semantic_fpn_convneur_m3_finetune_80k_ade20k', 'upernet_convneur_m3_finetune_80k_ade20k']


@pytest.mark.parametrize('name', CONFIGS)
def test_learning_rates_as_built(name, open_config, build_model, param_groups, undecayed):
    """Local layers fall by 0.9 from the last to the first; the memory has five times its layer's, and M_0 no decay."""
    cfg = open_config(f'finetune/{name}')
    model = build_model(cfg)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(optim_wrapper.optimizer).__name__ == 'AdamW'
    found = param_groups(model, optim_wrapper)
    assert [type(HOOKS.build(hook)).__name__ for hook in cfg.custom_hooks] == ['EMAHook']
    lr = cfg.optim_wrapper.optimizer.lr
    for part, layer, mult in (
            ('downsample_layers.0.0.weight', 0, 1), ('stages.0.0.depthwise_conv.weight', 1, 1),
            ('stages.1.1.depthwise_conv.weight', 2, 1), ('stages.2.5.depthwise_conv.weight', 4, 1),
            ('stages.3.1.depthwise_conv.weight', 6, 1), ('stages.0.0.global_branch.expand.weight', 1, 5),
            ('stages.3.0.global_branch.memory.generators.0.weight', 6, 5),
            ('stages.3.0.global_branch.memory.w1', 6, 5)):
        group = found[f'backbone.{part}']
        assert group['lr'] == pytest.approx(lr * mult * 0.9 ** (7 - layer)), part
    assert undecayed(model) == {name for name, group in found.items() if not group['weight_decay']}
    assert {group['weight_decay'] for group in found.values()} == {0, 0.05}
    heads = 10 if cfg.default_scope == 'mmseg' else 1
    assert {group['lr'] for name, group in found.items() if not name.startswith('backbone.')} == {heads * lr}


@pytest.mark.parametrize('name', CONFIGS)
def test_what_differs_from_the_base(name, open_config):
    """Model, data and length are the base's but for drop path, the dense tasks' memory, and ImageNet's epochs."""
    base = name.replace('_finetune', '').replace('_30e', '_300e')
    cfg, of_base = open_config(f'finetune/{name}'), open_config(base)
    for config in (cfg, of_base):
        config.model.backbone.pop('memory_cfg', None)
        config.model.backbone.pop('drop_path_rate', None)
        for key in ('custom_hooks', 'param_scheduler', 'optim_wrapper', 'filename', 'max_epochs'):
            config.pop(key, None)
        config.train_cfg.pop('max_epochs', None)
    assert cfg.to_dict() == of_base.to_dict()
