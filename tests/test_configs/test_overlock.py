"""The OverLoCK configs: each builds and fits together, published cost, the recipes, and an epoch in each task."""
import copy
import functools
import os
from unittest.mock import patch

import mmengine.config.utils as config_utils
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torchvision.ops import StochasticDepth

from convneur_mm.datasets import SHAPE_CLASSES
from convneur_mm.engine.launch import load_config, make_parser, without_sync_bn
from convneur_mm.engine.settings import apply_settings
from convneur_mm.paths import config_root

DENSE_ARCHS = ('t', 's', 'b')
CONFIGS = sorted(f'overlock/{path.stem}' for path in (config_root() / 'overlock').glob('*.py'))
LIGHT = dict(depths=[1, 1, 1, 1], focus_depths=[1, 1], channels=[8, 16, 32, 32], kernel_sizes=[7, 7, 7, 7],
             groups=[2, 2])
CHANNELS = [8, 16, 40, 40]


def test_all_are_found():
    assert set(CONFIGS) == {
        *(f'overlock/overlock_{arch}_300e_in1k' for arch in ('xt', *DENSE_ARCHS)),
        *(f'overlock/{head}_overlock_{arch}_{schedule}_coco' for head in ('mask_rcnn', 'cascade_rcnn')
          for arch in DENSE_ARCHS for schedule in ('1x', '3x')),
        *(f'overlock/upernet_overlock_{arch}_160k_ade20k' for arch in DENSE_ARCHS),
    }


@pytest.fixture(scope='module', autouse=True)
def metafiles_read_once():
    """For every base in mmdet MMEngine reads all of mmdet's metafiles, which takes most of a config's loading."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(config_utils, '_get_cfg_metainfo', functools.cache(config_utils._get_cfg_metainfo))
        yield


@pytest.fixture
def build_meta(build_model):
    """A config's model without memory for its weights."""
    def build(cfg):
        without_sync_bn(cfg.model)
        with torch.device('meta'):
            return build_model(cfg).eval()
    return build


def predict(model, scope, *size):
    """All convolutions and linear layers of a prediction: 1000 boxes, and masks of 100 objects."""
    image = torch.zeros(1, 3, *size, device='meta')
    if scope == 'mmseg':
        model.decode_head(model.backbone(image))
        return
    model.rpn_head(model.neck(model.backbone(image)))
    model.roi_head.bbox_head(torch.zeros(1000, 256, 7, 7, device='meta'))
    model.roi_head.mask_head(torch.zeros(100, 256, 14, 14, device='meta'))


DROP_PATH = {  # from the paper, and the authors' scripts and configs
    'in1k': dict(xt=0.1, t=0.15, s=0.4, b=0.5), 'coco': dict(t=0.2, s=0.4, b=0.5), 'ade20k': dict(t=0.2, s=0.3, b=0.5)}


@pytest.mark.parametrize('name', CONFIGS)
def test_each_builds_and_its_parts_fit_together(name, open_config, build_meta):
    cfg = open_config(name)
    arch, task = name.split('overlock_')[1].split('_')[0], name.rsplit('_', 1)[1]
    before = copy.deepcopy(cfg.to_dict())
    before.pop('runner_type')
    assert apply_settings(cfg).to_dict() == before

    model = build_meta(cfg)
    backbone = model.backbone
    assert backbone.arch == arch
    rates = [module.p for module in backbone.modules() if isinstance(module, StochasticDepth)]
    assert max(rates) == pytest.approx(DROP_PATH[task][arch])
    if task == 'in1k':
        overview, focus = backbone.high_level_proj.in_channels, backbone.sub_blocks4[-1].dwconv2.out_channels
        assert (model.head.aux_head[2].in_channels, model.head.head[0].in_channels) == (overview, focus)
    else:
        assert cfg.model.backbone.init_cfg.checkpoint.endswith(f'/overlock_{arch}_in1k_224.pth')
        channels = [backbone.extra_norm[str(i)].normalized_shape[0] for i in range(4)]
        assert list((model.neck if task == 'coco' else model.decode_head).in_channels) == channels
        assert task == 'coco' or model.auxiliary_head.in_channels == channels[2]


@pytest.mark.parametrize('name, lr, decay, batch, clip_grad', [
    ('overlock_b_300e_in1k', 2e-3, 0.05, 256, dict(max_norm=5.0)),
    ('mask_rcnn_overlock_s_1x_coco', 2e-4, 0.05, 2, None), ('cascade_rcnn_overlock_b_3x_coco', 2e-4, 0.05, 2, None),
    ('upernet_overlock_s_160k_ade20k', 6e-5, 0.01, 2, None),
])
def test_recipe(name, lr, decay, batch, clip_grad, open_config, build_meta, param_groups):
    cfg = open_config(f'overlock/{name}')
    assert cfg.train_dataloader.batch_size == batch and cfg.auto_scale_lr.base_batch_size == 8 * batch
    assert cfg.sync_bn == 'torch'
    cfg.model.backbone.update(arch=LIGHT)
    model = build_meta(cfg)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(optim_wrapper.optimizer) is torch.optim.AdamW
    assert (optim_wrapper._accumulative_counts, optim_wrapper.clip_grad_kwargs) == (1, clip_grad)
    params = dict(model.named_parameters())
    for param, group in param_groups(model, optim_wrapper).items():
        assert group['lr'] == lr, param
        spared = params[param].ndim < 2 if 'in1k' in name else 'norm' in param
        assert group['weight_decay'] == (0 if spared else decay), param


def mparams(model):
    return round(sum(param.numel() for param in model.parameters()) / 1e6)


@pytest.mark.parametrize('name, size, gmacs, published, millions', [
    ('upernet_overlock_t_160k_ade20k', (512, 2048), 960, 969, 63),
    ('mask_rcnn_overlock_t_1x_coco', (800, 1280), 285, 281, 52),
])
def test_published_cost(name, size, gmacs, published, millions, open_config, build_meta):
    """Of the merged model; the published figures are another counter's."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = open_config(f'overlock/{name}')
    model = build_meta(cfg)
    model.backbone.switch_to_deploy()
    assert mparams(model) == millions
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(model, cfg.default_scope, *size)
    counted = counter.get_total_flops() / 2e9
    assert round(counted) == gmacs and abs(counted / published - 1) < 0.03


def test_cascade_has_the_published_size(open_config, build_meta):
    model = build_meta(open_config('overlock/cascade_rcnn_overlock_t_1x_coco'))
    model.backbone.switch_to_deploy()
    assert mparams(model) == 90


@pytest.mark.parametrize('name, end, milestones', [
    ('mask_rcnn_overlock_t_1x_coco', 12, [8, 11]), ('mask_rcnn_overlock_t_3x_coco', 36, [27, 33]),
    ('cascade_rcnn_overlock_s_1x_coco', 12, [8, 11]), ('cascade_rcnn_overlock_s_3x_coco', 36, [27, 33]),
])
def test_coco_schedules(name, end, milestones, open_config):
    cfg = open_config(f'overlock/{name}')
    assert cfg.train_cfg.max_epochs == end
    assert (cfg.param_scheduler[1].end, cfg.param_scheduler[1].milestones) == (end, milestones)


def test_other_schedules(open_config):
    cfg = open_config('overlock/upernet_overlock_b_160k_ade20k')
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 160000
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 1500
    cfg = open_config('overlock/overlock_b_300e_in1k')
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 300
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 5
    assert cfg.param_scheduler[1].eta_min == 1e-5


@pytest.mark.parametrize('arch, side', [('xt', 242), ('t', 235), ('s', 235), ('b', 229)])
def test_the_centre_is_taken_of_a_picture_of_each_archs_size(arch, side, open_config):
    cfg = open_config(f'overlock/overlock_{arch}_300e_in1k')
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        _, resize, crop, _ = loader.dataset.pipeline
        assert (resize.scale, resize.interpolation, crop.crop_size) == (side, 'bicubic', 224)


def test_without_a_gpu_batch_norm_is_not_synchronised(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with patch.dict(os.environ):
        cfg = load_config(make_parser('').parse_args(['overlock/overlock_xt_300e_in1k']), ())
    assert 'sync_bn' not in cfg
    assert any('BN replaces SyncBN' in note for hook in cfg.custom_hooks for note in hook.get('notes', ()))


# An epoch of each task on generated pictures.

def classification(cfg: Config, root: str) -> None:
    cfg.model.head.update(in_channels=40, overview_channels=32, hidden_channels=32, num_classes=6)
    cfg.data_preprocessor.num_classes = 6
    resized = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')]
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
        loader.dataset = dict(type='CustomDataset', data_root=f'{root}/imagenet', data_prefix=split, pipeline=resized)
    cfg.val_evaluator.topk = (1, )


def detection(cfg: Config, root: str) -> None:
    cfg.model.neck.update(in_channels=CHANNELS, out_channels=32)
    cfg.model.rpn_head.update(in_channels=32, feat_channels=32)
    roi_head = cfg.model.roi_head
    roi_head.bbox_roi_extractor.out_channels = roi_head.mask_roi_extractor.out_channels = 32
    roi_head.bbox_head.update(in_channels=32, fc_out_channels=32, num_classes=6)
    roi_head.mask_head.update(in_channels=32, conv_out_channels=32, num_classes=6)
    cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 32
    cfg.model.train_cfg.rcnn.sampler.num = 16
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
        loader.dataset.update(
            data_root=f'{root}/coco/', ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'), metainfo=dict(classes=tuple(SHAPE_CLASSES)))
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = (64, 64)
            # The pictures of 3x: the same choices at a tenth of their size.
            for choice in transform.get('transforms', ()):
                for part in choice:
                    if part.type == 'RandomChoiceResize':
                        part.scales = [(side // 10, 133) for side, _ in part.scales]
                    elif part.type == 'RandomCrop':
                        part.crop_size = (38, 60)
    cfg.val_evaluator.ann_file = f'{root}/coco/annotations/instances_val.json'


def segmentation(cfg: Config, root: str) -> None:
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.decode_head.update(in_channels=CHANNELS, channels=16, num_classes=7)
    cfg.model.auxiliary_head.update(in_channels=40, channels=16, num_classes=7)
    classes = dict(classes=('background', *SHAPE_CLASSES))
    for loader, split in ((cfg.train_dataloader, 'training'), (cfg.val_dataloader, 'validation')):
        loader.dataset.update(type='BaseSegDataset', metainfo=classes, data_root=f'{root}/ade20k/', data_prefix=dict(
            img_path=f'images/{split}', seg_map_path=f'annotations/{split}'))
        for transform in loader.dataset.pipeline:
            if transform.type in ('RandomResize', 'Resize'):
                transform.scale = (64, 64)
            elif transform.type == 'RandomCrop':
                transform.crop_size = (64, 64)
    cfg.train_cfg.update(max_iters=6, val_interval=6)
    cfg.default_hooks.checkpoint = None
    cfg.param_scheduler = []


@pytest.mark.parametrize('name, lighten, metric', [
    ('overlock_xt_300e_in1k', classification, 'accuracy/top1'),
    ('mask_rcnn_overlock_t_1x_coco', detection, 'coco/segm_mAP'),
    ('upernet_overlock_t_160k_ade20k', segmentation, 'mIoU'),
])
def test_an_epoch(name, lighten, metric, clean, open_config, tmp_path):
    cfg = open_config(f'overlock/{name}')
    lighten(cfg, str(clean))
    without_sync_bn(cfg.model)
    cfg.model.backbone.update(arch=LIGHT, init_cfg=None)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    if 'max_epochs' in cfg.train_cfg:
        cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.pop('settings')
    cfg.default_hooks.logger.interval = 1
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg', 'runner_type'):
        cfg.pop(key)
    cfg.update(work_dir=str(tmp_path), log_level='ERROR', experiment_name=f'{name}_{tmp_path.name}',
               visualizer=None, env_cfg=dict(cudnn_benchmark=False))
    runner = Runner.from_cfg(cfg)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == (6 if 'upernet' in name else 3) and all(map(torch.isfinite, map(torch.as_tensor, losses)))
    assert runner.message_hub.get_scalar(f'val/{metric}').current() >= 0
    after = runner.model.state_dict()
    same = [key for key, value in before.items() if key.startswith('backbone.') and torch.equal(value, after[key])]
    assert same == [], same


def test_pictures_of_the_3x_schedule_vary(clean, open_config):
    cfg = open_config('overlock/mask_rcnn_overlock_t_3x_coco')
    detection(cfg, str(clean))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    shapes = {tuple(dataset[0]['inputs'].shape) for _ in range(30)}
    assert len(shapes) > 5
