#!/usr/bin/env python
r"""Write the lists of models: model-index.yml, configs/metafile.yml, the tables of README and docs.

    dev/zoo.py            # writes them
    dev/zoo.py --check    # writes nothing; prints what is out of date, and exits with 1 if anything is

Parameters and FLOPs are counted as get_flops.py counts them. The paper's figures are those of
convneur_mm/analysis/paper.py, and are always marked as the paper's.
"""
import argparse
import difflib
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

import torch
import yaml

from convneur_mm.analysis import paper
from convneur_mm.analysis.flops import SHAPES, Count, add_up, build_on_meta, count_parts
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.launch import find_config, read_config
from convneur_mm.paths import config_root

ROOT = config_root().parent
INDEX, METAFILE, DOCS, README = 'model-index.yml', 'configs/metafile.yml', 'docs/model_zoo.md', 'README.md'
START, END = '<!-- written by dev/zoo.py -->', '<!-- end -->'
NOT_YET = 'not yet'

# Results of our own trainings by config, in the order of the paper's. None has been run.
REPRODUCED: dict[str, tuple[float, ...]] = {}


class Kind(NamedTuple):
    """Common properties of models for one task.

    Attributes:
        title (str): Title of their table.
        scope (str): Their package.
        dataset (str): Their training data.
        results (tuple[tuple[str, str], ...]): Task and metric of each result.
    """

    title: str
    scope: str
    dataset: str
    results: tuple[tuple[str, str], ...]


IMAGENET = Kind('ImageNet-1K', 'mmpretrain', 'ImageNet-1k', (('Image Classification', 'Top 1 Accuracy'), ))
COCO = Kind('COCO 2017, Cascade Mask R-CNN', 'mmdet', 'COCO',
            (('Object Detection', 'box AP'), ('Instance Segmentation', 'mask AP')))
ADE20K = Kind('ADE20K, single scale', 'mmseg', 'ADE20K', (('Semantic Segmentation', 'mIoU'), ))
ABLATION = IMAGENET._replace(title='Ablations of m3, ImageNet-1K')


class Model(NamedTuple):
    """A config and the paper's results for it.

    Attributes:
        kind (Kind): Its task.
        config (str): Its name, as ``convneur_mm.config`` takes it.
        paper_results (tuple[float, ...]): In the order of ``kind.results``; () if the paper has none.
    """

    kind: Kind
    config: str
    paper_results: tuple[float, ...]


def models() -> list[Model]:
    """List the paper's models, and the sizes of its recipes without results."""
    found = [Model(IMAGENET, f'convneur_{arch}_300e_in1k', (row.top1, )) for arch, row in paper.IMAGENET.items()]
    for row in paper.DENSE:
        if 'convneur' in row.config:
            found.append(Model(COCO if row.head == 'Cascade Mask R-CNN' else ADE20K, row.config, row.paper_results))
    found += [Model(ABLATION, row.config, (row.paper_top1, )) for row in paper.ABLATION
              if row.config != paper.DEFAULT]
    return found


def count(name: str) -> Count:
    """Count a shipped config's parameters and multiply-accumulates, at the task's size in ``SHAPES``."""
    cfg = read_config(find_config(name), {})
    image = torch.empty(1, 3, *SHAPES[cfg.default_scope], device='meta')
    return add_up(count_parts(build_on_meta(cfg), image))


# ---- what is written


def metafile(entries: Iterable[tuple[Model, Count]]) -> str:
    """Return configs/metafile.yml, in OpenMMLab's format."""
    collection = dict(
        Name='ConvNeur',
        Metadata=dict(Architecture=['ConvNeXt V2 block', 'Neural memory']),
        Paper=dict(Title='Efficiency Follows Global-Local Decoupling',
                   URL='https://github.com/NUST-Machine-Intelligence-Laboratory/ConvNeur'))
    listed = []
    for model, counted in entries:
        entry = dict(
            Name=Path(model.config).name,
            **{'In Collection': collection['Name'], 'Config': f'configs/{model.config}.py'},
            Metadata={'Training Data': model.kind.dataset, 'Parameters': counted.parameters,
                      'FLOPs': int(counted.macs)})
        entry['Results'] = [*_results(model, model.paper_results, ' (paper)'),
                            *_results(model, REPRODUCED.get(model.config, ()))] or None
        listed.append(entry)
    head = ('# Written by dev/zoo.py. Metrics marked (paper) are the paper\'s; there are no weights yet.\n'
            '# FLOPs: multiply-accumulates at 224 x 224 (ImageNet), 800 x 1344 (COCO), 512 x 2048 (ADE20K).\n')
    return head + _yaml(dict(Collections=[collection], Models=listed))


def _results(model: Model, values: Sequence[float], mark: str = '') -> list[dict]:
    return [dict(Task=task, Dataset=model.kind.dataset, Metrics={f'{metric}{mark}': value})
            for (task, metric), value in zip(model.kind.results, values)]


def _yaml(content: dict) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=120)


def tables(entries: Sequence[tuple[Model, Count]]) -> str:
    """Return the tables of docs/model_zoo.md, one for each kind."""
    parts = []
    for kind in dict.fromkeys(model.kind for model, _ in entries):
        height, width = SHAPES[kind.scope]
        metrics = ' / '.join(metric for _, metric in kind.results)
        lines = [f'### {kind.title}', '',
                 f'| config | params (M) | FLOPs (G, {height} × {width}) | paper\'s FLOPs (G) | paper\'s {metrics} | '
                 f'reproduced {metrics} | weights |', '|---|--:|--:|--:|--:|--:|---|']
        for model, counted in entries:
            if model.kind == kind:
                cost = paper.COSTS.get(model.config)
                note = f' ({cost.note})' if cost and cost.note else ''
                cells = (f'`{model.config}`',
                         f'{counted.parameters / 1e6:.2f}', f'{counted.macs / 1e9:.2f}',
                         f'{cost.gflops}{note}' if cost else '', _values(model.paper_results),
                         _values(REPRODUCED.get(model.config, ())) or NOT_YET, NOT_YET)
                lines.append(f'| {" | ".join(cells)} |')
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def summary(entries: Sequence[tuple[Model, Count]]) -> str:
    """Return the table of README.md: a row for each size, with the paper's results for each task."""
    height, width = SHAPES[IMAGENET.scope]
    lines = [f'| arch | params (M) | FLOPs (G, {height} × {width}) | ImageNet top-1 (paper) | COCO box / mask AP, '
             'Cascade Mask R-CNN 1x (paper) | ADE20K mIoU (paper) |', '|---|--:|--:|--:|--:|--:|']
    counts = {model.config: counted for model, counted in entries}
    heads = {row.config: f' ({row.head})' for row in paper.DENSE if row.head != 'Cascade Mask R-CNN'}
    for arch in paper.IMAGENET:
        counted = counts[f'convneur_{arch}_300e_in1k']
        cells = [arch, f'{counted.parameters / 1e6:.1f}', f'{counted.macs / 1e9:.2f}']
        for kind in (IMAGENET, COCO, ADE20K):
            cells.append('; '.join(
                _values(model.paper_results) + heads.get(model.config, '') for model, _ in entries
                if model.kind == kind and f'convneur_{arch}_' in model.config and model.paper_results))
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def _values(values: Sequence[float]) -> str:
    return ' / '.join(map(str, values))


def between_marks(path: Path, new: str) -> str:
    """Return the text of a page with ``new`` between the two marks.

    Raises:
        ValueError: If the page does not exist, or does not have each mark once, in this order.
    """
    if not path.is_file():
        raise ValueError(f'{path} is not there; this tool is for a checkout, not for an installed wheel')
    text = path.read_text(encoding='utf-8')
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f'{path} must have the lines {START} and {END} once each, around the tables')
    return f'{text.partition(START)[0]}{START}\n\n{new}\n\n{END}{text.partition(END)[2]}'


def files(root: Path, counter: Callable[[str], Count]) -> dict[str, str]:
    """Return the text of each file by its path below ``root``.

    Args:
        root (Path): A checkout.
        counter (Callable): Counts a config's parameters and multiply-accumulates by its name.

    Raises:
        ValueError: If a page does not exist or has no place for the tables.
    """
    entries = [(model, counter(model.config)) for model in models()]
    return {INDEX: '# Written by dev/zoo.py.\n' + _yaml(dict(Import=[METAFILE])),
            METAFILE: metafile(entries),
            DOCS: between_marks(root / DOCS, tables(entries)), README: between_marks(root / README, summary(entries))}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; print the differences and exit with 1 if '
                        'any are found')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    outdated = False
    for name, new in files(ROOT, count).items():
        path = ROOT / name
        old = path.read_text(encoding='utf-8') if path.is_file() else ''
        if old == new:
            continue
        outdated = True
        if args.check:
            print(*difflib.unified_diff(old.splitlines(), new.splitlines(), name, f'{name}, as it should be',
                                        lineterm=''), sep='\n')
        else:
            path.write_text(new, encoding='utf-8')
            print(f'written: {name}')
    return int(args.check and outdated)


if __name__ == '__main__':
    with one_line_errors():
        sys.exit(main())
