"""A Runner of a few milliseconds, as the tools build it, and the tools themselves with a model of two layers."""
import importlib.util
import sys
import uuid
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn as nn
from managers import forget_runs
from mmengine import fileio
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, MODELS
from torch.utils.data import DataLoader, Dataset

import convneur_mm
from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.runner.quiet_console import QuietRunner

ROOT = Path(__file__).parents[2]

CONFIG = """
model = dict(type='CheckpointTestModel')
train_dataloader = dict(dataset=dict(type='CheckpointTestData'), batch_size=2, collate_fn=dict(type='default_collate'),
                        sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(dataset=dict(type='CheckpointTestData'), batch_size=2, collate_fn=dict(type='default_collate'),
                       sampler=dict(type='DefaultSampler', shuffle=False))
train_cfg = dict(by_epoch=True, max_epochs=2)
test_cfg = dict()
test_evaluator = dict(type='DumpResults', out_file_path='predictions.pkl')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
param_scheduler = [dict(type='MultiStepLR', milestones=[1, 2]), dict(type='LinearLR', begin=0, end=3, by_epoch=False)]
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook', interval=1))
custom_hooks = [dict(type='EMAHook')]
randomness = dict(seed=3)
"""

SHAPES = dict(mmdet=make_shapes_coco, mmseg=make_shapes_ade20k, mmpretrain=make_shapes_imagenet)


@MODELS.register_module()
class CheckpointTestModel(BaseModel):
    """Two layers, of which the second may be initialised from a checkpoint."""

    def __init__(self, init_cfg=None, head_init_cfg=None, data_preprocessor=None):
        super().__init__(init_cfg=init_cfg, data_preprocessor=data_preprocessor)
        self.layer = nn.Linear(3, 4)
        self.head = CheckpointTestHead(head_init_cfg)

    def forward(self, inputs, mode='tensor'):
        out = self.head(self.layer(inputs))
        return dict(loss=out.square().mean()) if mode == 'loss' else [{}]


class CheckpointTestHead(BaseModule):
    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(x)


@DATASETS.register_module()
class CheckpointTestData(Dataset):
    """Four points; ``ann_file`` is loaded as MMEngine's own data sets do."""

    metainfo = dict(classes=('a', 'b'), palette=[(1, 2, 3)])

    def __init__(self, ann_file=None, **kwargs):
        self.annotations = fileio.load(ann_file) if ann_file else None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((3,), float(index)))


class Toy(BaseModel):
    """Squared features of whatever backbone, as a loss."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=sum(y.square().mean() for y in self.backbone(inputs)))


@pytest.fixture
def toy_runner(tmp_path):
    """Builds a Runner for two iterations over images of 32 x 64 pixels, in the work dir ``tmp_path``."""

    def build(backbone, **kwargs):
        data = DataLoader([dict(inputs=torch.rand(3, 32, 64)) for _ in range(4)], batch_size=2)
        return QuietRunner(
            Toy(backbone), str(tmp_path), train_dataloader=data, train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)), custom_hooks=[dict(type='StartSummaryHook')],
            # Loggers are kept by this name.
            experiment_name=f'toy_{uuid.uuid4().hex}',
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)), **kwargs)

    return build


@pytest.fixture(scope='session')
def tool():
    """Imports a tool by its name."""
    return load_tool


def load_tool(name: str) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(f'{name}_tool', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a tool, on the config above in an empty folder, and returns the line that it ends with, or None.

    By default that is of an error, and returned without the word; ``code`` is another exit code than that of errors.
    ``config`` may name a shipped one.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text(CONFIG)

    def run(name, *args, config='config.py', code=2):
        module = load_tool(name)
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', config, '--work-dir', 'work', *map(str, args)])
        capfd.readouterr()
        forget_runs()
        try:
            module.launch.run(module.main)
        except SystemExit as error:
            assert error.code == code
            errors = capfd.readouterr().err.splitlines()
            assert 'Traceback' not in ''.join(errors)
            assert errors[-1].startswith('error: ') or code != 2
            return errors[-1].removeprefix('error: ')
        return None

    return run


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The work dir of two epochs: weights, their averages, optimizer, schedulers, and log buffers."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'config.py').write_text(CONFIG)
    forget_runs()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', 'config.py', '--work-dir', 'work'])
        load_tool('train').main()
    return folder / 'work'


class Inferencer(BaseInferencer):
    """What MMEngine's inferencers share, without data and pictures."""

    def __init__(self, cfg, weights):
        self.model = self._init_model(cfg, weights)

    def _init_pipeline(self, cfg):
        """Not needed."""

    def visualize(self, inputs, preds, show=False, **kwargs):
        """Not needed."""

    def postprocess(self, preds, visualization, return_datasample=False, **kwargs):
        """Not needed."""


def infer(path, model='CheckpointTestModel'):
    Inferencer(Config(dict(model=dict(type=model)) if model else None), str(path))


def initialise_whole(path):
    CheckpointTestModel(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


def initialise_part(path):
    CheckpointTestModel(head_init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='head')).init_weights()


# Entries from Python, with and without what guards them.


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """Folders of tiny data sets in the three layouts."""
    root = tmp_path_factory.mktemp('shapes')
    for name, make in SHAPES.items():
        make(root / name, num_train=6, num_val=6, image_size=64)
    return root


@pytest.fixture
def tiny_config(shapes):
    """Configs of the three tasks whose training is one iteration of a tiny model, without a validation.

    Called with 'cascade_rcnn', 'semantic_fpn', 'upernet' or '' (a classifier).
    """

    def config(model, channels=(8, 16, 24, 32), classes=None):
        base = 'semantic_fpn' if model == 'upernet' else model
        cfg = Config.fromfile(convneur_mm.config(f'{base}_convneur_m1_shapes'.lstrip('_')))
        arch = dict(depths=[1] * 4, channels=list(channels), mem_channels=16)
        cfg.model.backbone = {**cfg.model.backbone, 'arch': arch}
        if model == 'upernet':
            cfg.model = {**Config.fromfile(convneur_mm.config('upernet_convneur_m1_80k_ade20k')).model, **{
                name: cfg.model[name] for name in ('backbone', 'data_preprocessor')}}
            cfg.model.decode_head.update(in_channels=list(channels), channels=8, num_classes=7)
            cfg.model.auxiliary_head.update(in_channels=channels[2], channels=8, num_classes=7)
        elif model == '':
            cfg.model.head.in_channels = channels[3]
        else:
            cfg.model.neck.in_channels = list(channels)
        if model == 'semantic_fpn':
            cfg.model.neck.out_channels = 8
            cfg.model.decode_head.update(in_channels=[8] * 4, channels=8)
        if classes:
            cfg.model.decode_head.num_classes = classes
            cfg.model.decode_head.loss_decode.class_weight = None
        for split in ('train', 'val', 'test'):
            loader = cfg[f'{split}_dataloader']
            loader.update(batch_size=2, num_workers=0, persistent_workers=False)
            loader.dataset.data_root = str(shapes / cfg.default_scope)
            if classes:
                # Labels that are left over are those of no class.
                loader.dataset.metainfo = dict(classes=[f'c{i}' for i in range(classes)])
        for split in ('val', 'test'):
            if 'ann_file' in cfg[f'{split}_evaluator']:
                cfg[f'{split}_evaluator'].ann_file = str(shapes / 'mmdet/annotations/instances_val.json')
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=2)
        cfg.param_scheduler = None
        return cfg

    return config


@pytest.fixture(scope='session')
def loaders():
    """Ways to load a checkpoint into the model from Python, by MMEngine's own code."""
    return {'inferencer': infer, 'init_cfg': initialise_whole, 'init_cfg with prefix': initialise_part}
