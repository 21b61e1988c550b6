"""Variables of a child config or of the command line reach every place that the shipped config has them in."""
import re
import shutil
import uuid

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, RUNNERS
from mmengine.runner import Runner
from torch.utils.data import Dataset

import convneur_mm
from convneur_mm.engine.launch import LaunchError, read_config, set_loader_defaults
from convneur_mm.engine.settings import SettingsError, apply_settings
from convneur_mm.paths import config_root

DETECTOR, SEGMENTOR = 'cascade_rcnn_convneur_m1_shapes', 'semantic_fpn_convneur_m1_shapes'
CLASSIFIER, COCO = 'convneur_m1_shapes', 'cascade_rcnn_convneur_m3_1x_coco'
ADE20K, IMAGENET = 'upernet_convneur_m2_80k_ade20k', 'convneur_m2_300e_in1k'


@pytest.fixture
def child(tmp_path):
    """Reads a child of a shipped config as the tools do; without a child's text, the shipped one."""

    def read(name, text='', options=None):
        path = tmp_path / f'{uuid.uuid4().hex}.py'
        path.write_text(f'_base_ = {convneur_mm.config(name)!r}\n{text}')
        return read_config(str(path), options or {})

    return read


def comparable(cfg):
    """A config's content, without what the detector's light config inherits and has no use for."""
    content = cfg.to_dict()
    content.get('default_hooks', {}).get('settings', {}).pop('milestones', None)
    return as_lists(content)


def as_lists(value):
    if isinstance(value, dict):
        return {key: as_lists(part) for key, part in value.items()}
    return [as_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize('name, text', [
    (DETECTOR, """
data_root = 'data/nuts/'
train_ann, train_images = 'train.json', 'images/a/'
val_ann, val_images = 'val.json', 'images/b/'
classes = ('date', 'fig')
image_size = (320, 240)
max_epochs = 40
pretrained = dict(m1='m1.pth')
"""), (SEGMENTOR, """
data_root = 'data/fields'
train_images, train_labels = 'a/images', 'a/labels'
val_images, val_labels = 'b/images', 'b/labels'
img_suffix, seg_map_suffix = '.tif', '_mask.png'
classes = ('soil', 'crop')
palette = [[1, 2, 3], [4, 5, 6]]
class_weight = [0.25, 0.75]
image_size = (128, 64)
max_iters = 300
pretrained = dict(m1='m1.pth')
"""), (CLASSIFIER, """
data_root = 'data/leaves'
train_images, val_images = 'a', 'b'
classes = ('ash', 'beech', 'oak')
image_size = (96, 64)
max_epochs = 3
pretrained = dict(m1='m1.pth')
"""),
])
def test_a_child_equals_the_shipped_file_with_these_lines_changed(name, text, child, tmp_path):
    shutil.copytree(config_root(), tmp_path / 'configs')
    edited = tmp_path / 'configs' / f'{name}.py'
    content = edited.read_text()
    for line in text.strip().splitlines():
        names = line.partition(' = ')[0]
        content, count = re.subn(rf'^{re.escape(names)} = .*$', line.replace('\\', r'\\'), content, flags=re.MULTILINE)
        assert count == 1, names
    edited.write_text(content)
    # Without the tools: what MMEngine makes of the edited file.
    expected = Config.fromfile(edited)
    expected.pop('runner_type')
    found = child(name, text)
    # A variable that the data sets are made of, and nothing else reads.
    expected.pop('dataset', None), found.pop('dataset', None)
    if name == CLASSIFIER:
        set_loader_defaults(expected)
    assert comparable(found) == comparable(expected)


def test_on_the_command_line(child):
    text = "classes = ('cat', 'dog')\nimage_size = (64, 64)\nmax_epochs = 3\ndata_root = 'd/'\n"
    options = dict(classes=['cat', 'dog'], image_size=64, max_epochs=3, data_root='d/')
    assert comparable(child(DETECTOR, options=options)) == comparable(child(DETECTOR, text))
    assert child(SEGMENTOR, options=dict(max_iters=120)).param_scheduler[1].end == 120


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER, COCO, ADE20K, IMAGENET])
def test_the_shipped_configs_are_in_agreement_with_themselves(name, child):
    shipped = Config.fromfile(convneur_mm.config(name))
    applied = apply_settings(Config.fromfile(convneur_mm.config(name)))
    assert shipped.pop('runner_type') == 'SettingsRunner'
    assert as_lists(applied.to_dict()) == as_lists(shipped.to_dict())


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER, COCO])
def test_the_config_in_a_work_dir_can_be_used_again(name, child, tmp_path):
    cfg = child(name, "classes = ('cat', 'dog')\ndata_root = 'elsewhere/'\n")
    cfg.dump(tmp_path / 'dumped.py')
    before = as_lists(cfg.to_dict())
    assert as_lists(read_config(str(tmp_path / 'dumped.py'), {}).to_dict()) == before
    assert as_lists(apply_settings(cfg).to_dict()) == before
    again = read_config(str(tmp_path / 'dumped.py'), dict(classes=['a', 'b', 'c']))
    model = again.model
    heads = dict(mmdet=lambda: model.roi_head.mask_head, mmseg=lambda: model.decode_head, mmpretrain=lambda: model.head)
    assert heads[cfg.default_scope]().num_classes == 3


def test_what_a_child_sets_itself_stays(child):
    cfg = child(DETECTOR, """
classes = ('cat', 'dog')
image_size = (320, 320)
data_root = 'own/'
val_ann = 'val.json'
max_epochs = 30
model = dict(roi_head=dict(mask_head=dict(num_classes=7)))
test_dataloader = dict(dataset=dict(ann_file='test.json', data_root='other/'))
test_evaluator = dict(ann_file='other/test.json')
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, begin=0, end=25, milestones=[20, 22])]
""")
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [2, 2, 2]
    assert cfg.model.roi_head.mask_head.num_classes == 7
    test, val = cfg.test_dataloader.dataset, cfg.val_dataloader.dataset
    assert (test.ann_file, test.data_root, tuple(test.metainfo.classes)) == ('test.json', 'other/', ('cat', 'dog'))
    assert (val.ann_file, val.data_root) == ('val.json', 'own/')
    assert (cfg.test_evaluator.ann_file, cfg.val_evaluator.ann_file) == ('other/test.json', 'own/val.json')
    assert cfg.param_scheduler == [dict(type='MultiStepLR', by_epoch=True, begin=0, end=25, milestones=[20, 22])]
    assert cfg.train_cfg.max_epochs == 30


def test_wrapped_data_sets(child):
    cfg = child(DETECTOR, """
classes = ('cat', 'dog')
data_root = 'own/'
train_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=3, dataset=dict(
        type='ConcatDataset', datasets=[
            dict(type='CocoDataset', data_root='data/shapes/', ann_file='a.json', pipeline=[]),
            dict(type='CocoDataset', data_root='more/', ann_file='b.json', metainfo=dict(classes=('x', )), pipeline=[]),
        ])))
""")
    first, second = cfg.train_dataloader.dataset.dataset.datasets
    assert (first.data_root, first.metainfo.classes, first.ann_file) == ('own/', ('cat', 'dog'), 'a.json')
    assert (second.data_root, second.metainfo.classes, second.ann_file) == ('more/', ('x', ), 'b.json')
    assert 'metainfo' not in cfg.train_dataloader.dataset


def test_colours_and_weights_are_those_of_the_classes(child):
    cfg = child(SEGMENTOR, "classes = ('soil', 'crop')\n")
    assert 'palette' not in cfg.train_dataloader.dataset.metainfo
    assert cfg.model.decode_head.loss_decode.get('class_weight') is None
    cfg = child(SEGMENTOR, 'max_iters = 100\n')
    assert len(cfg.train_dataloader.dataset.metainfo.palette) == 7
    assert cfg.model.decode_head.loss_decode.class_weight[0] == 0.4
    cfg = child(SEGMENTOR, "classes = ('soil', 'crop')\nclass_weight = [1.0, 2.0]\n")
    assert cfg.model.decode_head.loss_decode.class_weight == [1, 2]


def test_own_classes_with_the_papers_recipes(child):
    cfg = child(COCO, """
classes = ('cat', 'dog', 'cow')
data_root = 'farm/'
image_size, max_epochs = (800, 600), 24
""")
    heads = [*cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head]
    assert [head.num_classes for head in heads] == [3, 3, 3, 3]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == ('cat', 'dog', 'cow')
        assert loader.dataset.data_root == 'farm/'
        assert [step.scale for step in loader.dataset.pipeline if step.type == 'Resize'] == [(800, 600)]
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == 'farm/annotations/instances_val2017.json'
    assert cfg.train_cfg.max_epochs == 24
    # As in mmdet's 2x schedule.
    assert (cfg.param_scheduler[1].end, cfg.param_scheduler[1].milestones) == (24, [16, 22])

    cfg = child(ADE20K, "classes = ('wall', 'floor')\nmax_iters = 4000\ndata_root = 'rooms'\n")
    assert (cfg.model.decode_head.num_classes, cfg.model.auxiliary_head.num_classes) == (2, 2)
    assert cfg.train_dataloader.dataset.metainfo.classes == ('wall', 'floor')
    assert cfg.test_dataloader.dataset.data_root == 'rooms'
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler[1].end, cfg.param_scheduler[0].end) == (4000, 4000, 1500)

    cfg = child(IMAGENET, "classes = ('ash', 'beech', 'oak')\nmax_epochs = 50\ndata_root = 'leaves'\n")
    assert (cfg.model.head.num_classes, cfg.data_preprocessor.num_classes) == (3, 3)
    assert cfg.val_dataloader.dataset.classes == ('ash', 'beech', 'oak')
    assert cfg.train_dataloader.dataset.data_root == 'leaves'
    assert cfg.val_evaluator.topk == [1]
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end, cfg.param_scheduler[0].end) == (50, 50, 20)


def test_region_proposals_have_no_classes(child):
    cfg = child(COCO, "classes = ('cat', 'dog')\nmodel = dict(rpn_head=dict(num_classes=80))\n")
    assert cfg.model.rpn_head.num_classes == 80


def test_variables_that_are_no_settings_are_left_alone(child, tmp_path):
    cfg = child(COCO, "max_iters = 7\nval_labels = 'x'\nnum_classes = 9\n")
    assert (cfg.max_iters, cfg.val_labels, cfg.num_classes) == (7, 'x', 9)
    assert cfg.model.roi_head.mask_head.num_classes == 80 and 'max_iters' not in cfg.train_cfg
    (tmp_path / 'other.py').write_text("classes = 5\nmax_epochs = 'many'\nmodel = dict(head=dict(num_classes=3))\n")
    assert read_config(str(tmp_path / 'other.py'), {}).to_dict() == dict(
        classes=5, max_epochs='many', model=dict(head=dict(num_classes=3)))


@pytest.mark.parametrize('text, message', [
    ("classes = ('cat')", r"classes must be a list of different names, got 'cat'; one name is written \('cat', \)"),
    ("classes = ('cat', 'cat')", r"classes must be a list of different names, got \('cat', 'cat'\)"),
    ("classes = ()", r"classes must be a list of different names, got \(\)"),
    ("classes = ('cat', 3)", r"classes must be a list of different names, got \('cat', 3\)"),
    ("classes = 3", "classes must be a list of names, got 3"),
    ("image_size = (64, 64, 3)", r"image_size must be \(width, height\) in pixels, .* got \(64, 64, 3\)"),
    ("image_size = 0", "image_size must be .* got 0"),
    ("max_iters = 1.5", "max_iters must be a whole number of at least 1, got 1.5"),
    ("default_hooks = dict(_delete_=True, timer=dict(type='IterTimerHook'))",
     "default_hooks.settings is missing, .* keep it where you replace default_hooks, or set runner_type = 'Runner'"),
    ("max_iters = 50", r"max_iters must be more than 50, where param_scheduler\[1\] begins, got 50"),
    ("data_root = ['a']", r"data_root must be a string, got \['a'\]"),
    ("pretrained = 'm1.pth'", r"as in pretrained = dict\(m3='weights.pth'\), got 'm1.pth'"),
    ("pretrained = dict(m3='m3.pth')", r"pretrained names weights of \(m3\), but model.backbone.arch is 'm1'"),
    ("pretrained = dict(m1='m1.pth')\nmodel = dict(backbone=dict(init_cfg=None))",
     "pretrained.m1 is 'm1.pth', but model.backbone.init_cfg was set to None: leave one of the two out"),
])
def test_wrong_values_are_named(text, message, child):
    with pytest.raises(LaunchError, match=message):
        child(SEGMENTOR, text)


@pytest.mark.parametrize('name, arch', [
    (COCO, 'm3'), (ADE20K, 'm2'), (DETECTOR, 'm1'), (SEGMENTOR, 'm1'), (CLASSIFIER, 'm1')])
def test_pretrained_weights(name, arch, child):
    """From a child and from the command line, for the arch of the config, unless it names a checkpoint itself."""
    key = 'model.backbone.init_cfg.checkpoint'
    for cfg in (child(name, f"pretrained = dict({arch}='here.pth')\n"),
                child(name, options={f'pretrained.{arch}': 'here.pth'}),
                child(name, f"pretrained = dict({arch}='there.pth')\n", {key: 'here.pth'})):
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='here.pth')


@DATASETS.register_module(name='SettingsToyData', force=True)
class ToyData(Dataset):

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.zeros(1))


@MODELS.register_module(name='SettingsToy', force=True)
class Toy(BaseModel):

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.weight.sum())


def toy_config(tmp_path, **changes):
    """A config as a child that sets max_epochs leaves it, without the tools."""
    return Config(dict(
        runner_type='SettingsRunner', model=dict(type='SettingsToy'), work_dir=str(tmp_path), log_level='ERROR',
        train_cfg=dict(by_epoch=True, max_epochs=1),
        train_dataloader=dict(
            dataset=dict(type='SettingsToyData'), batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), experiment_name=uuid.uuid4().hex,
        default_hooks=dict(checkpoint=None, logger=None, settings=dict(type='SettingsHook', max_epochs=1)), **changes))


def test_tools_that_build_the_runner_type_apply_settings(tmp_path):
    runner = RUNNERS.build(toy_config(tmp_path, max_epochs=3))
    runner.train()
    assert runner.epoch == 3


def test_other_tools_are_stopped(tmp_path):
    with pytest.raises(SettingsError, match='max_epochs was set, but train_cfg.max_epochs is still 1 instead of 3: use '
                                            'tools/train.py .* or call convneur_mm.engine.apply_settings'):
        Runner.from_cfg(toy_config(tmp_path, max_epochs=3)).train()
    runner = Runner.from_cfg(apply_settings(toy_config(tmp_path, max_epochs=3)))
    runner.train()
    assert runner.epoch == 3
    # A variable that has been carried to its place by hand.
    by_hand = toy_config(tmp_path, max_epochs=2)
    by_hand.train_cfg.max_epochs = 2
    runner = Runner.from_cfg(by_hand)
    runner.train()
    assert runner.epoch == 2
