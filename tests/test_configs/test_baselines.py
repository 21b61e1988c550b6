"""The baselines of the paper's Tables 3 and 4: our configs with another backbone."""
import functools
import re
import uuid

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner, set_random_seed

from convneur_mm.datasets import SHAPE_CLASSES, make_shapes_ade20k, make_shapes_coco
from convneur_mm.engine import apply_settings
from convneur_mm.paths import config_root

TABLES = {
    'cascade_rcnn_{}_1x_coco': (
        'resnet50', 'resnet101', 'resnext101_32x4d', 'pvt_t', 'pvt_s', 'pvtv2_b0', 'pvtv2_b1'),
    'semantic_fpn_{}_80k_ade20k': ('resnet50', 'pvt_t'),
    'upernet_{}_80k_ade20k': ('resnet50', 'deit_s', 'swin_t'),
}
OURS = {name.format(backbone): name.format('convneur_m3') for name, names in TABLES.items() for backbone in names}
SIZE = (64, 96)


@functools.cache
def resolved(path: str) -> dict[str, object]:
    """Every value of a shipped config by its full name."""
    return flat(Config.fromfile(config_root() / f'{path}.py').to_dict())


def flat(node: object, name: str = '') -> dict[str, object]:
    """Every value of a config by its full name."""
    if isinstance(node, dict):
        parts = node.items()
    elif isinstance(node, (list, tuple)) and any(isinstance(part, dict) for part in node):
        parts = enumerate(node)
    else:
        return {name: node}
    return {key: value for part, child in parts for key, value in flat(child, f'{name}.{part}').items()}


def losses_of(cfg: Config, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of one image with three objects, or of two small label maps."""
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs
        data = demo_mm_inputs(1, (3, *SIZE), num_items=[3], num_classes=80, with_mask=True)
    else:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(150, (1, *SIZE)))) for _ in range(2)]
        data = dict(inputs=[torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in samples], data_samples=samples)
    return model(**model.data_preprocessor(data, training=True), mode='loss')


def make_small(cfg: Config) -> None:
    """Few regions of an image are sampled, crops are not padded to their full size, and what is wide is narrow."""
    if cfg.default_scope == 'mmdet':
        for head in cfg.model.roi_head.bbox_head:
            head.fc_out_channels = 16
        cfg.model.train_cfg.rpn_proposal.max_per_img = 32
        for stage in cfg.model.train_cfg.rcnn:
            stage.sampler.num = 16
    else:
        cfg.model.data_preprocessor.size = SIZE
        cfg.model.decode_head.channels = 16


def test_those_of_the_tables_are_there():
    assert {path.stem for path in (config_root() / 'baselines').glob('*.py')} == set(OURS)


@pytest.mark.parametrize('name', OURS)
def test_nothing_but_the_backbone_differs_from_ours(name):
    ours, theirs = resolved(OURS[name]), resolved(f'baselines/{name}')
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert theirs['.model.backbone.type'] != 'ConvNeur' and '.model.backbone.type' in differing
    allowed = r'\.model\.(backbone\..*|(neck|decode_head|auxiliary_head)\.in_channels)'
    if name == 'upernet_deit_s_80k_ade20k':  # features of one stride, of which a neck makes those of a pyramid
        allowed += r'|\.model\.neck\..*'
    assert [key for key in sorted(differing) if not re.fullmatch(allowed, key)] == []


@pytest.mark.parametrize('name', OURS)
def test_features_fit_and_every_parameter_learns(name, open_config, build_model, param_groups):
    cfg = open_config(f'baselines/{name}')
    make_small(cfg)
    if 'resne' not in name:  # which would leave out a block now and then
        cfg.model.backbone.drop_path_rate = 0.0
    set_random_seed(0)
    model = build_model(cfg)
    reader = cfg.model.get('neck') or cfg.model.decode_head
    with torch.no_grad():
        features = model.backbone(torch.randn(1, 3, *SIZE))
        read = model.neck(features) if model.with_neck else features
    assert [feature.size(1) for feature in features] == list(reader.in_channels)
    assert [tuple(feature.shape[2:]) for feature in read[:4]] == [
        tuple(side // stride for side in SIZE) for stride in (4, 8, 16, 32)]

    groups = param_groups(model, build_optim_wrapper(model, cfg.optim_wrapper))
    assert {group['lr'] for param, group in groups.items() if param.startswith('backbone.')} == {
        0.02 if cfg.default_scope == 'mmdet' else 6e-5}
    # What is frozen is what mmdet's ResNets freeze.
    frozen = [param for param, value in model.named_parameters() if not value.requires_grad]
    assert bool(frozen) == ('cascade_rcnn_resne' in name)
    assert [param for param in frozen if not re.match(r'backbone\.(conv1|bn1|layer1)\.', param)] == []

    loss, losses = model.parse_losses(losses_of(cfg, model))
    assert [key for key, value in losses.items() if not value.isfinite().all()] == []
    loss.backward()
    gradients = {param: value.grad for param, value in model.named_parameters() if value.requires_grad}
    assert [param for param, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert [param for param, gradient in gradients.items()
            if param.startswith('backbone.') and not gradient.any()] == []


# A weight of each kind of backbone: what it is called in the file that the config names, and in the model.
SR = 'block2.0.attn.sr.weight'
WEIGHTS = {
    'cascade_rcnn_resnet50_1x_coco': ('layer1.0.conv1.weight', 'layer1.0.conv1.weight'),
    'cascade_rcnn_resnext101_32x4d_1x_coco': ('layer1.0.conv1.weight', 'layer1.0.conv1.weight'),
    'cascade_rcnn_pvt_t_1x_coco': (SR, 'layers.1.1.1.attn.sr.weight'),
    'cascade_rcnn_pvtv2_b0_1x_coco': (SR, 'layers.1.1.0.attn.sr.weight'),
    'semantic_fpn_resnet50_80k_ade20k': ('stem.0.weight', 'stem.0.weight'),
    'semantic_fpn_pvt_t_80k_ade20k': (SR, 'layers.1.1.1.attn.sr.weight'),
    'upernet_swin_t_80k_ade20k': ('layers.0.blocks.0.attn.qkv.weight', 'stages.0.blocks.0.attn.w_msa.qkv.weight'),
    'upernet_deit_s_80k_ade20k': ('layers.0.attn.attn.in_proj_weight', 'layers.0.attn.attn.in_proj_weight'),
}


@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_are_read_from_a_file_of_that_layout(name, open_config, tmp_path):
    cfg = open_config(f'baselines/{name}')
    assert cfg.model.backbone.init_cfg.type == 'Pretrained'
    in_file, in_model = WEIGHTS[name]
    backbone = MODELS.build(cfg.model.backbone)
    weight = torch.randn_like(backbone.get_parameter(in_model))
    content = {in_file: weight}
    if 'pvt_t' in name:  # by which PVT's reader knows its first version: blocks are numbered from the second on
        content['pos_embed1'] = torch.zeros(1, 56 * 56, 64)
    torch.save(content, tmp_path / 'weights.pth')
    backbone.init_cfg.checkpoint = str(tmp_path / 'weights.pth')
    backbone.init_weights()
    assert torch.equal(backbone.get_parameter(in_model), weight)


class Start(Hook):
    """The trainable weights before the first step."""

    def before_train(self, runner: Runner) -> None:
        self.weights = {name: value.detach().clone() for name, value in runner.model.named_parameters()
                        if value.requires_grad and value.ndim > 1}


def small_detection(cfg: Config) -> None:
    make_shapes_coco(cfg.data_root, num_train=2, num_val=1, image_size=64)
    cfg.train_ann, cfg.train_images = 'annotations/instances_train.json', 'train/'
    cfg.val_ann, cfg.val_images = 'annotations/instances_val.json', 'val/'
    cfg.classes, cfg.image_size, cfg.max_epochs = SHAPE_CLASSES, SIZE, 1
    cfg.model.test_cfg.rpn.max_per_img = 32
    cfg.model.test_cfg.rcnn.max_per_img = 4


def small_segmentation(cfg: Config) -> None:
    make_shapes_ade20k(cfg.data_root, num_train=4, num_val=1, image_size=64)
    cfg.max_iters = 1
    _, _, resize, crop, *_ = cfg.train_dataloader.dataset.pipeline
    resize.scale, crop.crop_size = (128, 64), (64, 64)
    cfg.test_dataloader.dataset.pipeline[1].scale = cfg.val_dataloader.dataset.pipeline[1].scale = (128, 64)


@pytest.mark.parametrize('name, prepare, metric', [
    ('cascade_rcnn_pvtv2_b0_1x_coco', small_detection, 'coco/segm_mAP'),
    ('semantic_fpn_pvt_t_80k_ade20k', small_segmentation, 'mIoU'),
])
@pytest.mark.slow
def test_an_epoch_on_generated_data(name, prepare, metric, open_config, tmp_path):
    cfg = open_config(f'baselines/{name}')
    cfg.data_root, cfg.work_dir = f'{tmp_path}/data/', f'{tmp_path}/work'
    prepare(cfg)
    make_small(cfg)
    cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
    cfg.param_scheduler = []
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.experiment_name = cfg.visualizer.name = uuid.uuid4().hex
    cfg.log_level = 'ERROR'
    cfg._format_python_code = False  # which takes seconds
    runner = Runner.from_cfg(apply_settings(cfg))
    start = Start()
    runner.register_hook(start)
    runner.train()
    assert runner.iter == 1
    after = dict(runner.model.named_parameters())
    assert any(weight.startswith('backbone.') for weight in start.weights)
    assert [weight for weight, value in start.weights.items() if torch.equal(value, after[weight])] == []
    assert 0 <= runner.message_hub.get_scalar(f'val/{metric}').current() <= 100
