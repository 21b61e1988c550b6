#!/usr/bin/env python
"""Measure how gradients of a memory of many chunks scatter at initialisation, by rule and setting.

    experiments/gradient_tails.py
    experiments/gradient_tails.py --settings 196/1 num_chunks=16 --rules sequential,previous --samples 100

A sample is a picture of generated shapes, newly drawn weights, and the gradient of a per-pixel cross- entropy behind a
random linear head. The model is stage 1 of ConvNeur-m1; at 448 x 588 it has 16,464 tokens, 84 chunks of 196. All
settings see the same samples. The first columns are norms of the gradient of all the memory's weights: the median over
samples, the 99 % quantile, the largest over the median, and the kurtosis, 3 for a normal distribution. The next columns
are the largest over the median for some of its weights, for the rest of the backbone, and for the tokens, that is the
gradient at the memory's input, with a norm for each chunk of each sample. Of these norms, the share above x falls as
x^-index: for an index below 2 the variance, and below 1 the mean, grows without bound with more samples.
"""
import argparse
import functools
import math
import runpy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'tools/_environment.py'))['prepare']()

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from torch import Tensor, nn

from convneur_mm.analysis import bench
from convneur_mm.datasets import SHAPE_CLASSES
from convneur_mm.datasets.shapes import scene_at
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.models import ConvNeur
from convneur_mm.ops.neural_memory import RETRIEVALS, UPDATE_RULES

ARCH = dict(depths=[1], channels=[40], mem_channels=80)
SHAPE = 448, 588
RULES = {f'{rule},{retrieve}': dict(update_rule=rule, retrieve=retrieve)
         for rule in UPDATE_RULES for retrieve in RETRIEVALS}


@dataclass(frozen=True)
class Setting:
    """Options of the memory, and the initial bias of its decay if it is not the default."""

    memory_cfg: dict
    decay_bias: float | None = None


SETTINGS = {
    '196/1': Setting(dict(chunk_size=196, inner_step=1.0)),
    '196/0.1': Setting(dict(chunk_size=196, inner_step=0.1)),
    '196/0.01': Setting(dict(chunk_size=196, inner_step=0.01)),
    'num_chunks=16': Setting(dict(num_chunks=16, inner_step=1.0)),
    'num_chunks=4': Setting(dict(num_chunks=4, inner_step=1.0)),
    '4096/0.001': Setting(dict(chunk_size=4096, inner_step=1e-3)),
    'max_write_norm=0.1': Setting(dict(chunk_size=196, inner_step=1.0, max_write_norm=0.1)),
    'decay bias -2': Setting(dict(chunk_size=196, inner_step=1.0), decay_bias=-2.0),
    'decay bias 0': Setting(dict(chunk_size=196, inner_step=1.0), decay_bias=0.0),
    'normalised': Setting(dict(chunk_size=196, inner_step=1.0, step_normalization=0.125)),
    'normalised, num_chunks=4': Setting(dict(num_chunks=4, inner_step=1.0, step_normalization=0.125)),
    'normalised, num_chunks=8': Setting(dict(num_chunks=8, inner_step=1.0, step_normalization=0.125)),
}
# Parameters of the memory, by prefixes of their names.
MEMORY_GROUPS = {'M_0': ('w1', 'w2'), 'generators': ('generators.', ), 'key, value': ('key.', 'value.'),
                 'query, proj': ('query.', 'proj.')}
REST = 'rest of the backbone'


@dataclass
class Norms:
    """Gradient norms of a setting: one for each sample; in ``chunks`` one for each chunk of each sample."""

    memory: list[float] = field(default_factory=list)
    groups: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*MEMORY_GROUPS, REST)})
    chunks: list[float] = field(default_factory=list)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (('settings', SETTINGS), ('rules', RULES)):
        parser.add_argument(f'--{name}', nargs='+', choices=list(known), default=list(known),
                            metavar=name.upper()[:-1], help=f'{name} to run, from: {"; ".join(known)} (default: all)')
    parser.add_argument('--samples', type=int, default=30, metavar='N',
                        help='samples of each case (default: %(default)s)')
    parser.add_argument('--shape', type=int, nargs=2, default=SHAPE, metavar=('H', 'W'),
                        help='height and width of the pictures (default: %(default)s)')
    parser.add_argument('--threads', type=int, metavar='N', help="number of CPU threads (default: torch's)")
    args = parser.parse_args(argv)
    for name, least in (('samples', 2), ('threads', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} must be at least {least}, got {value}')
    return args


@functools.lru_cache(maxsize=64)  # all settings see the same samples
def sample(seed: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a picture (1, 3, H, W), normalised by its mean and deviation, and the tokens' classes, (1, H/4, W/4)."""
    scene = scene_at(seed, 'train', 0, max(height, width))
    labels = np.zeros(scene.image.shape[:2], np.int64)
    for instance in scene.instances:
        labels[instance.mask] = instance.label + 1
    image = torch.from_numpy(scene.image[:height, :width].copy()).permute(2, 0, 1).float()
    image = (image - image.mean()) / image.std()
    return image[None], torch.from_numpy(labels[2:height:4, 2:width:4].copy())[None]


def build(setting: Setting, rule: str, seed: int) -> tuple[ConvNeur, nn.Conv2d]:
    """Build backbone and head with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    backbone = ConvNeur(ARCH, out_indices=(0, ), memory_cfg={**setting.memory_cfg, **RULES[rule]})
    backbone.init_weights()
    head = nn.Conv2d(ARCH['channels'][0], len(SHAPE_CLASSES) + 1, 1)
    if setting.decay_bias is not None:
        memory = backbone.stages[0][0].global_branch.memory
        memory.generators[2].bias.data[2 * memory.channels:] = setting.decay_bias
    return backbone, head


def add_norms(norms: Norms, setting: Setting, rule: str, seed: int, shape: Sequence[int]) -> None:
    """Add the norms of one sample."""
    image, labels = sample(seed, *shape)
    backbone, head = build(setting, rule, seed)
    memory = backbone.stages[0][0].global_branch.memory
    tokens: list[Tensor] = []
    memory.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    loss = F.cross_entropy(head(backbone(image)[0]), labels)
    grad_tokens, *grads = torch.autograd.grad(loss, [tokens[0], *backbone.parameters()])
    by_parameter = dict(zip(backbone.parameters(), grads))
    of_memory = {name: by_parameter.pop(p) for name, p in memory.named_parameters()}
    norms.memory.append(norm(of_memory.values()))
    norms.groups[REST].append(norm(by_parameter.values()))
    for group, prefixes in MEMORY_GROUPS.items():
        norms.groups[group].append(norm([grad for name, grad in of_memory.items() if name.startswith(prefixes)]))
    chunk_size = memory.tokens_per_chunk(grad_tokens.size(1))
    norms.chunks.extend(norm([chunk]) for chunk in grad_tokens.split(chunk_size, dim=1))


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the joint norm of all tensors."""
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


def tail_index(values: Sequence[float], share: float = 0.05) -> float:
    """Estimate the index of the tail x^-index, the share of values above x, from the largest values (Hill)."""
    ordered = np.sort(np.asarray(values, float))[::-1]
    number = max(2, round(share * len(ordered)))
    mean = float(np.mean(np.log(ordered[:number - 1] / ordered[number - 1])))
    return math.inf if mean == 0 else 1 / mean


def kurtosis(values: Sequence[float]) -> float:
    """Return the fourth central moment over the squared second; 3 for a normal distribution."""
    deviations = np.asarray(values, float) - np.mean(values)
    return float(np.mean(deviations**4) / max(np.mean(deviations**2)**2, 1e-300))


def row(name: str, rule: str, norms: Norms) -> tuple[str, ...]:
    """Return a row of the table."""

    def ratio(values: Sequence[float]) -> str:
        return f'{np.max(values) / max(np.median(values), 1e-300):.3g}'

    memory = norms.memory
    return (name, rule.replace(',', ', '), f'{np.median(memory):.3g}', f'{np.quantile(memory, 0.99):.3g}',
            ratio(memory), f'{kurtosis(memory):.1f}', *(ratio(values) for values in norms.groups.values()),
            ratio(norms.chunks), f'{tail_index(norms.chunks):.1f}')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    MMLogger.get_current_instance().setLevel('WARNING')  # hide the initialisation log of every parameter
    rows = []
    for name in args.settings:
        for rule in args.rules:
            norms = Norms()
            for seed in range(args.samples):
                add_norms(norms, SETTINGS[name], rule, seed, args.shape)
            rows.append(row(name, rule, norms))
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ('setting', 'rule', 'median', '99 %', 'max / median', 'kurtosis', *MEMORY_GROUPS, REST, 'tokens',
              'tail index')
    print(bench.format_table(header, rows))


if __name__ == '__main__':
    with one_line_errors():
        main()
