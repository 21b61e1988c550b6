"""Models of a few thousand weights of each task, by overrides of the shipped configs for the shapes."""
from pathlib import Path

import torch
from mmengine.model import BaseModel

from convneur_mm.apis import init_model

CHANNELS = [8, 16, 24, 32]
ARCH = {'model.backbone.arch': dict(depths=[1] * 4, channels=CHANNELS, mem_channels=16, _delete_=True)}
CONFIGS = dict(detector='cascade_rcnn_convneur_m1_shapes', segmentor='semantic_fpn_convneur_m1_shapes',
               classifier='convneur_m1_shapes')
# Nothing is trained, so that no score is high: of whatever scores best, the detector keeps a few.
TINY = dict(
    detector={**ARCH, 'model.neck.in_channels': CHANNELS, 'model.test_cfg.rpn.max_per_img': 20,
              'model.test_cfg.rcnn.score_thr': 0.0, 'model.test_cfg.rcnn.max_per_img': 5},
    segmentor={**ARCH, 'model.neck.in_channels': CHANNELS, 'model.neck.out_channels': 8,
               'model.decode_head.in_channels': [8] * 4, 'model.decode_head.channels': 8},
    classifier={**ARCH, 'model.head.in_channels': CHANNELS[3]})
CLASSES = dict(detector=('disk', 'square', 'triangle', 'star', 'ring', 'cross'),
               segmentor=('background', 'disk', 'square', 'triangle', 'star', 'ring', 'cross'),
               classifier=('cross', 'disk', 'ring', 'square', 'star', 'triangle'))


def tiny_model(task: str, checkpoint: str | Path | None = None, options: dict | None = None) -> BaseModel:
    """A model on the CPU."""
    return init_model(CONFIGS[task], checkpoint, 'cpu', {**TINY[task], **(options or {})})


def save_weights(model: BaseModel, path: Path, **dataset_meta: object) -> Path:
    """Writes a checkpoint as a run does."""
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dataset_meta)), path)
    return path


def separated(model: BaseModel) -> BaseModel:
    """The model with predictions that differ between pictures: as initialised they are nearly the same for all."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model
