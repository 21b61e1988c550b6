"""The model card that tools/publish_model.py writes beside the weights."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.model import BaseModel

from .. import __version__
from ..stack import installed_versions
from .flops import SHAPES, add_up, count_parameters, count_parts


def cost(model: BaseModel) -> dict[str, str]:
    """Count parameters, and FLOPs at the size of tools/analysis/get_flops.py; the model loses its weights."""
    height, width = SHAPES[model.cfg.default_scope]
    parameters = f'{count_parameters(model) / 1e6:.2f} M'
    try:
        macs = add_up(count_parts(model.to('meta'), torch.empty(1, 3, height, width, device='meta'))).macs
        flops = f'{macs / 1e9:.2f} G multiply-accumulates, {height} × {width}'
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:  # the model may be user-defined
        flops = f'not counted: {" ".join(str(error).split())}'
    return {'parameters': parameters, 'FLOPs': flops}


def describe(model: BaseModel, meta: Mapping, sources: Sequence[str], weights: str) -> dict[str, str]:
    """Return the rows of a card's table; the model loses its weights.

    Args:
        model (BaseModel): As :func:`init_model` returns it.
        meta (Mapping): Meta of the published checkpoint.
        sources (Sequence[str]): What the training started from.
        weights (str): Which of the checkpoint's weights are published.
    """
    cfg, classes = model.cfg, model.dataset_meta.get('classes', ())
    backbone = dict(cfg.model.get('backbone') or {})
    kind, names = backbone.pop('type', 'none'), ', '.join(map(str, classes[:20]))
    backbone.pop('init_cfg', None)
    versions = {'convneur_mm': __version__, **installed_versions()}
    return {
        'task': dict(mmdet='detection', mmseg='segmentation', mmpretrain='classification')[cfg.default_scope],
        'config': Path(cfg.filename).stem,
        'model': cfg.model.type,
        'backbone': f'{kind}({", ".join(f"{key}={value!r}" for key, value in backbone.items())})',
        **cost(model),
        'classes': f'{len(classes)}: {names}{", …" if len(classes) > 20 else ""}' if classes else 'not known',
        'trained': ', '.join(f'{key} {meta[key]}' for key in ('epoch', 'iter') if key in meta) or 'not known',
        'weights': weights,
        'started from': ', '.join(sources) or 'not known',
        'licence': meta.get('licence', 'not stated'),
        'published with': ', '.join(f'{package} {version}' for package, version in sorted(versions.items())),
    }


def table(rows: Mapping[str, object], *header: str) -> str:
    """Format a table of two columns in Markdown."""
    cells = [header, ('---', '---'), *((name, str(value).replace('|', r'\|')) for name, value in rows.items())]
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def model_card(stem: str, rows: Mapping[str, object], metrics: Mapping[str, float], measured: str,
               hashes: Mapping[str, str]) -> str:
    """Return the card in Markdown.

    Args:
        stem (str): Name of the config, the card and the .pth file, without a suffix.
        rows (Mapping[str, object]): Facts about the model, by row name.
        metrics (Mapping[str, float]): Results; {} if none are known.
        measured (str): Source of the results.
        hashes (Mapping[str, str]): SHA-256 of each file, by file name.
    """
    results = f'From: {measured}.\n\n{table(metrics, "metric", "value")}' if metrics else 'Not known.'
    return f"""\
# {stem}

{table(rows, '', '')}

## Results

{results}

## Files

{table({f'`{name}`': f'`{digest}`' for name, digest in hashes.items()}, 'file', 'SHA-256')}

`{stem}.py` is the config, in one file.

## Use

It needs convneur_mm {__version__}.

```bash
convneur-mm infer {stem}.py {stem}.pth photo.jpg
convneur-mm test {stem}.py {stem}.pth
```

```python
from convneur_mm.apis import inference, init_model
model = init_model('{stem}.py', '{stem}.pth')
```

To start another training from its backbone, set `init_cfg=dict(type='Pretrained', checkpoint='{stem}.pth')` of a
backbone of the same settings; to start from all of it, `load_from = '{stem}.pth'`.
"""
