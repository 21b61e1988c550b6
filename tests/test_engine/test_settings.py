"""Variables of a child config or of the command line reach every place that the shipped config has them in."""
import copy
import re
import shutil
import uuid
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, RUNNERS
from mmengine.runner import Runner
from torch.utils.data import Dataset

import convneur_mm
from convneur_mm.engine.launch import LaunchError, read_config, set_loader_defaults
from convneur_mm.engine.settings import SettingsError, SettingsHook, apply_settings
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
    ("default_hooks = dict(_delete_=True, timer=dict(type='IterTimerHook'))",
     "default_hooks.settings is missing, .* keep it where you replace default_hooks, or set runner_type = 'Runner'"),
    ("max_iters = 50", r"max_iters must be more than 50, where param_scheduler\[1\] begins, got 50"),
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


OLD = dict(
    classes=('a', 'b', 'c', 'd', 'e', 'f'), palette=[[1, 1, 1], [2, 2, 2]], class_weight=[0.5, 1.5], topk=[1, 3, 5],
    data_root='data', train_ann='train.json', val_ann='val.json', train_images='train/i', val_images='val/i',
    train_labels='train/l', val_labels='val/l', img_suffix='.jpg', seg_map_suffix='.png', image_size=(64, 48),
    max_epochs=12, milestones=[8, 11], switch_epoch=8, pretrained=dict(m1='m1.pth', m2='m2.pth'))
NEW = dict(
    classes=('x', 'y', 'z'), palette=[[3, 3, 3]], class_weight=[2.5], topk=[2], data_root='own', train_ann='t.json',
    val_ann='v.json', train_images='t/i', val_images='v/i', train_labels='t/l', val_labels='v/l', img_suffix='.tif',
    seg_map_suffix='.bmp', image_size=(96, 32), max_epochs=30, milestones=[13, 17], switch_epoch=21,
    pretrained=dict(m1='other.pth', m2='m2.pth'))


def written_for(settings, **changes):
    """A small config with everything that settings reach, and things of the same names that they do not."""

    def data_set(side):
        pipeline = [dict(type='Resize', scale=settings['image_size']), dict(type='RandomCrop', scale=(64, 48)),
                    dict(type='Resize', size=(64, 48)), dict(type='CenterCrop', crop_size=(48, 64)),
                    dict(type='RandomCrop', crop_size=settings['image_size'][::-1])]
        meta = {key: settings[key] for key in ('classes', 'palette') if settings[key]}
        return dict(
            metainfo=meta, data_root=settings['data_root'], ann_file=settings[f'{side}_ann'],
            data_prefix=dict(img_path=settings[f'{side}_images'], seg_map_path=settings[f'{side}_labels']),
            img_suffix=settings['img_suffix'], seg_map_suffix=settings['seg_map_suffix'], pipeline=pipeline)

    def resize():
        return dict(type='Resize', scale=settings['image_size'])

    classes, weight, epochs = len(settings['classes']), settings['class_weight'], settings['max_epochs']
    annotations = f'{settings["data_root"]}/{settings["val_ann"]}'
    return Config(copy.deepcopy(dict(
        model=dict(
            data_preprocessor=dict(size=settings['image_size'][::-1]),
            backbone=dict(arch='m1', init_cfg=dict(type='Pretrained', checkpoint=settings['pretrained']['m1'])),
            neck=dict(init_cfg=dict(type='Pretrained', checkpoint='m1.pth'), size=(48, 64)),
            rpn_head=dict(num_classes=6), decode_head=dict(num_classes=classes, loss_decode=[
                dict(class_weight=weight) if weight else dict(), dict(weight=1.0)]),
            heads=[dict(num_classes=classes), dict(num_classes=7), dict(num_classes='six')]),
        data_preprocessor=dict(num_classes=classes, size=(48, 64)),
        train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=data_set('train'))),
        val_dataloader=dict(dataset=data_set('val')), test_dataloader=dict(dataset=data_set('val')),
        val_evaluator=[dict(ann_file=annotations), dict(topk=settings['topk'])],
        test_evaluator=dict(ann_file=annotations, topk=settings['topk']),
        custom_hooks=[
            dict(type='PipelineSwitchHook', switch_epoch=settings['switch_epoch'], switch_pipeline=[resize()]),
            dict(type='OtherHook', switch_epoch=8, pipeline=dict(type='Resize', scale=(64, 48)))],
        train_pipeline=[resize(), *(dict(type=name, img_scale=settings['image_size'], size=(64, 48)) for name in (
            'Mosaic', 'CachedMosaic', 'MixUp', 'CachedMixUp'))],
        train_pipeline_stage2=[resize(), dict(type='Pad', size=settings['image_size'])],
        test_pipeline=[dict(type='Pad'), resize()],
        tta_pipeline=[dict(type='TestTimeAug', transforms=[[resize(), dict(type='Pad')]])],
        train_cfg=dict(max_epochs=epochs, max_iters=12), param_scheduler=[
            dict(begin=0, end=5), dict(begin=5, by_epoch=True, end=epochs, T_max=epochs),
            dict(milestones=settings['milestones'], total_iters=epochs), dict(by_epoch=False, end=12)],
        default_hooks=dict(logger=dict(interval=12), settings=dict(type='SettingsHook', **settings)),
        **{'default_scope': 'mmseg', **settings, **changes})))


def applied(**changes):
    """The config for the old values after these variables were set."""
    return as_lists(apply_settings(written_for(OLD, **changes)).to_dict())


class TestPlaces:
    @pytest.mark.parametrize('names', [[name] for name in OLD if name != 'classes'] + [list(OLD)],
                             ids=lambda names: names[0] if len(names) == 1 else 'all')
    def test_what_was_written_for_other_values_equals_what_is_written_for_these(self, names):
        changes = {name: NEW[name] for name in names}
        settings = {**OLD, **changes}
        if names == ['max_epochs']:
            settings.update(milestones=[20, 28], switch_epoch=20)  # 8 and 11 of 12 are 20 and 27.5 of 30
        assert applied(**changes) == as_lists(written_for(settings).to_dict())

    def test_crops_of_mmdet_have_the_width_first(self):
        cfg = written_for(OLD, image_size=NEW['image_size'])
        cfg.default_scope = 'mmdet'
        cfg.train_pipeline = [dict(type='RandomCrop', crop_size=OLD['image_size'])]
        assert tuple(apply_settings(cfg).train_pipeline[0].crop_size) == NEW['image_size']

    def test_new_classes_alone(self):
        """Colours and weights of the former ones go, and so does every k beyond their number."""
        expected = {**OLD, 'classes': NEW['classes'], 'palette': None, 'class_weight': None, 'topk': [1, 3]}
        assert applied(classes=list(NEW['classes'])) == as_lists(written_for(expected).to_dict())
        # What is set along with them stays, even to the same value as before.
        kept = applied(classes=NEW['classes'], class_weight=NEW['class_weight'])
        assert kept['model']['decode_head']['loss_decode'][0] == dict(class_weight=[2.5])

    def test_the_runner_type_has_done_its_work(self):
        cfg = written_for(OLD, runner_type='SettingsRunner')
        assert apply_settings(cfg) is cfg and 'runner_type' not in cfg
        assert apply_settings(written_for(OLD, runner_type='Own')).runner_type == 'Own'

    def test_without_the_hook_nothing_is_a_setting(self):
        cfg = written_for(OLD, classes='?')
        del cfg.default_hooks['settings']
        before = cfg.to_dict()
        assert apply_settings(cfg) is cfg and cfg.to_dict() == before
        assert apply_settings(Config(dict(classes='?'))).to_dict() == dict(classes='?')

    def test_a_variable_of_none_is_none(self):
        assert applied(max_epochs=None, classes=None) == as_lists(written_for(OLD).to_dict())

    def test_a_setting_without_a_variable_stays_as_it_was(self):
        cfg = written_for(OLD, data_root='own')
        cfg.pop('classes')
        apply_settings(cfg)
        assert 'classes' not in cfg and cfg.default_hooks.settings.classes == OLD['classes']

    @pytest.mark.parametrize('prefix', ['train/i', dict(img='train/i', seg='x'), dict(img_path='train/i', img='x')])
    def test_folders_of_images(self, prefix):
        cfg = written_for(OLD, train_images='own')
        cfg.train_dataloader.dataset.dataset.data_prefix = prefix
        found = apply_settings(cfg).train_dataloader.dataset.dataset.data_prefix
        expected = 'own' if prefix == 'train/i' else dict(img='own', seg='x') if 'seg' in prefix else prefix
        assert found == expected

    @pytest.mark.parametrize('scope, key', [('mmpretrain', 'classes'), ('mmdet', 'metainfo'), (None, 'metainfo')])
    def test_names_reach_data_sets_without_any(self, scope, key):
        cfg = written_for(OLD, classes=('x', 'y'), default_scope=scope)
        cfg.train_dataloader.dataset = dict()
        expected = ('x', 'y') if key == 'classes' else dict(classes=('x', 'y'))
        assert apply_settings(cfg).train_dataloader.dataset == {key: expected}
        # Where other settings change alone they go on without.
        cfg = written_for(OLD, max_epochs=30, default_scope=scope)
        cfg.train_dataloader.dataset = dict()
        assert apply_settings(cfg).train_dataloader.dataset == dict()

    def test_a_number_of_classes_in_the_hook(self):
        """The data sets know the names."""
        cfg = written_for(OLD)
        cfg.default_hooks.settings.classes = 6
        cfg.classes = ('x', 'y', 'z')
        del cfg.train_dataloader.dataset.dataset.metainfo['classes']
        apply_settings(cfg)
        assert cfg.model.decode_head.num_classes == 3
        assert cfg.train_dataloader.dataset.dataset.metainfo.classes == ('x', 'y', 'z')

    def test_iterations(self):
        settings = dict(max_iters=400)
        cfg = Config(dict(max_iters=900, train_cfg=dict(max_iters=400), default_hooks=dict(settings=settings),
                          param_scheduler=dict(by_epoch=False, begin=100, end=400, T_max=400, total_iters=300)))
        apply_settings(cfg)
        assert cfg.train_cfg == dict(max_iters=900)
        assert cfg.param_scheduler == dict(by_epoch=False, begin=100, end=900, T_max=900, total_iters=300)

    @pytest.mark.parametrize('epochs', [4, 5])
    def test_a_schedule_that_would_end_before_it_begins(self, epochs):
        with pytest.raises(SettingsError, match=rf'^max_epochs must be more than 5, where param_scheduler\[1\] begins, '
                                                rf'got {epochs}$'):
            applied(max_epochs=epochs)
        assert applied(max_epochs=6)['param_scheduler'][1] == dict(begin=5, by_epoch=True, end=6, T_max=6)

    def test_weights_of_an_arch_without_any(self):
        """The place is filled; it may have no entry before."""
        cfg = written_for({**OLD, 'pretrained': dict(m1=None)}, pretrained=dict(m1='own.pth'))
        assert apply_settings(cfg).model.backbone.init_cfg.checkpoint == 'own.pth'
        cfg = written_for(OLD, pretrained=dict(m1='own.pth'))
        cfg.model.backbone.init_cfg = dict(type='Pretrained')
        assert apply_settings(cfg).model.backbone.init_cfg.checkpoint == 'own.pth'
        cfg = written_for(OLD, pretrained=dict(m1=None))
        assert apply_settings(cfg).model.backbone.init_cfg == dict(type='Pretrained')

    def test_weights_that_have_no_place(self):
        """Those of another arch are an error where there are none of the config's."""
        cfg = written_for({**OLD, 'pretrained': dict(m1=None, m2=None)}, pretrained=dict(m1=None, m2='a', m3='b'))
        with pytest.raises(SettingsError, match=r'^pretrained names weights of \(m2, m3\), but model.backbone.arch is '
                                                "'m1': set those of this arch$"):
            apply_settings(cfg)
        assert applied(pretrained=dict(m1='m1.pth', m3='b'))['model'] == as_lists(written_for(OLD).model.to_dict())
        cfg = written_for(OLD, pretrained=dict(m3='b'))
        cfg.model.backbone.arch = dict(depths=[1])
        with pytest.raises(SettingsError, match=r"model.backbone.arch is {'depths': \[1\]}: set"):
            apply_settings(cfg)
        for init_cfg in None, dict(type='TruncNormal'):
            cfg = written_for(OLD, pretrained=dict(m1='own.pth'))
            cfg.model.backbone.init_cfg = init_cfg
            with pytest.raises(SettingsError, match="^pretrained.m1 is 'own.pth', but model.backbone.init_cfg was set "
                                                    f'to {init_cfg!r}: leave one of the two out$'):
                apply_settings(cfg)
            cfg.pretrained, cfg.image_size = OLD['pretrained'], (8, 8)
            assert apply_settings(cfg).model.backbone.init_cfg == init_cfg

    @pytest.mark.parametrize('name, value, message', [
        ('classes', 'cat', r"must be a list of different names, got 'cat'; one name is written \('cat', \)"),
        ('classes', ('cat', 'cat'), r"must be a list of different names, got \('cat', 'cat'\)"),
        ('classes', (), r'must be a list of different names, got \(\)'),
        ('classes', ('cat', 3), r"must be a list of different names, got \('cat', 3\)"),
        ('classes', 3, 'must be a list of names, got 3'),
        ('classes', ('cat', ''), r"must be a list of different names, got \('cat', ''\)"),
        ('image_size', (64, 0), r'must be \(width, height\) in pixels, or one number for both, got \(64, 0\)'),
        ('image_size', (64, 64, 3), r'must be .* got \(64, 64, 3\)'), ('image_size', 0, 'must be .* got 0'),
        ('image_size', (64.0, 64), r'must be .*, got \(64.0, 64\)'), ('image_size', '64', "must be .*, got '64'"),
        ('max_epochs', 1.5, 'must be a whole number of at least 1, got 1.5'),
        ('max_epochs', 0, 'must be a whole number of at least 1, got 0'),
        ('pretrained', dict(m1=3), "must name a path or URL for each arch, as in pretrained = .*, got {'m1': 3}"),
        ('palette', 'ade', "must be a list, got 'ade'"), ('milestones', 3, 'must be a list, got 3'),
        ('class_weight', 1.0, 'must be a list, got 1.0'), ('topk', 1, 'must be a list, got 1'),
        ('pretrained', 'm1.pth', r"must .*, as in pretrained = dict\(m3='weights.pth'\), got 'm1.pth'"),
        ('img_suffix', 3, 'must be a string, got 3'), ('data_root', ['a'], r"must be a string, got \['a'\]"),
    ])
    def test_values_that_cannot_be(self, name, value, message):
        with pytest.raises(SettingsError, match=f'^{name} {message}$'):
            applied(**{name: value})

    def test_smallest_values(self):
        assert applied(image_size=1)['image_size'] == applied(image_size=[1, 1])['image_size'] == [1, 1]
        cfg = apply_settings(Config(dict(
            max_iters=1, train_cfg=dict(max_iters=4), param_scheduler=dict(by_epoch=False, end=4),
            default_hooks=dict(settings=dict(max_iters=4)))))
        assert cfg.train_cfg.max_iters == cfg.param_scheduler.end == 1


class TestHook:
    @staticmethod
    def before_run(cfg):
        SettingsHook().before_run(SimpleNamespace(cfg=cfg))

    def test_what_was_not_applied_stops_a_run(self):
        self.before_run(written_for(OLD))
        self.before_run(apply_settings(written_for(OLD, **NEW)))
        with pytest.raises(SettingsError, match=r"^data_root was set, but val_evaluator\[0\].ann_file is still "
                                                "'data/val.json' instead of 'own/val.json': use tools/train.py "):
            cfg = written_for(OLD, data_root='own')
            for loader in (cfg.train_dataloader.dataset, cfg.val_dataloader, cfg.test_dataloader):
                loader.dataset.data_root = 'own'
            self.before_run(cfg)
        with pytest.raises(SettingsError, match='^data_root and val_ann was set'):
            cfg.val_ann = 'v.json'
            for loader in cfg.val_dataloader, cfg.test_dataloader:
                loader.dataset.ann_file = 'v.json'
            self.before_run(cfg)

    def test_runs_of_other_configs_pass(self):
        self.before_run(Config(dict(classes='?')))
        self.before_run(Config(dict(classes='?', default_hooks=dict(timer=dict()))))
