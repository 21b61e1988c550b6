"""Convert weights of a ConvNeXt or ConvNeXt-V2 to those of a ConvNeur of the same depths and channels."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from mmengine.model import initialize
from torch import Tensor

from ..engine.files.weights_file import CheckpointError
from ..models import ConvNeur
from ..models.global_branch import GlobalBranch

# For each layout: a weight that only it has, and patterns from its names to ours, which are mmpretrain's.
LAYOUTS = {
    'timm': ('stages.0.blocks.0.conv_dw.weight', (
        (r'^stem\.', 'downsample_layers.0.'), (r'^stages\.(\d+)\.downsample\.', r'downsample_layers.\1.'),
        (r'^stages\.(\d+)\.blocks\.', r'stages.\1.'), (r'\.conv_dw\.', '.depthwise_conv.'),
        (r'\.mlp\.fc', '.pointwise_conv'), (r'\.mlp\.grn\.weight$', '.grn.gamma'), (r'\.mlp\.grn\.bias$', '.grn.beta'),
        (r'^head\.norm\.', 'norm3.'))),
    "the authors'": ('stages.0.0.dwconv.weight', (
        (r'\.dwconv\.', '.depthwise_conv.'), (r'\.pwconv', '.pointwise_conv'), (r'^norm\.', 'norm3.'),
        (r'^head\.(weight|bias)$', r'head.fc.\1'))),
    'mmpretrain': ('stages.0.0.depthwise_conv.weight', ()),
}
# Every weight of these modules must be known, because leaving one out would change the features.
BACKBONE = ('downsample_layers.', 'stages.', 'stem.', 'norm_pre.')
LICENCES = {
    'ConvNeXt': "the ConvNeXt code and its authors' weights are under MIT, timm's own weights under Apache-2.0; other "
                'weights, such as those of DINOv3, have licences of their own',
    'ConvNeXt-V2': 'the published ImageNet weights of ConvNeXt-V2 are under CC BY-NC 4.0, not for commercial use, and '
                   'so is what is made of them; its code is under MIT',
}


class Conversion(NamedTuple):
    """Weights of ConvNeur, and how each weight of the source was used.

    Attributes:
        weights (dict[str, Tensor]): ``backbone.*`` and, if the source has a linear head, ``head.fc.*``, all float32.
        arch (str): The arch of ConvNeur that they fit.
        layout (str): The source's layout, a key of ``LAYOUTS``.
        version (str): 'ConvNeXt' or 'ConvNeXt-V2'.
        taken (list[str]): Source names that are the same in the result, apart from a prefix ``backbone.``.
        renamed (list[str]): Source names of weights that have another name in the result.
        folded (list[str]): The source's layer scales, multiplied into ``pointwise_conv2``.
        doubled (list[str]): Names in the result of weights that are twice the source's.
        new (list[str]): Names in the result of weights that the source lacks.
        left_out (list[str]): Source names of weights that the result lacks.
    """

    weights: dict[str, Tensor]
    arch: str
    layout: str
    version: str
    taken: list[str]
    renamed: list[str]
    folded: list[str]
    doubled: list[str]
    new: list[str]
    left_out: list[str]


def convert(weights: Mapping[str, Tensor], arch: str | None = None) -> Conversion:
    """Convert a ConvNeXt or ConvNeXt-V2 to weights of ConvNeur with the same features and logits.

    The result is for the default ``placement`` and ``fusion``. New weights are drawn with a fixed seed.

    Args:
        weights (Mapping[str, Tensor]): Weights of the source, in one of ``LAYOUTS``.
        arch (str | None): The arch expected; None takes the one that fits. Defaults to None.

    Raises:
        CheckpointError: If the layout is unknown, no arch (or not the one expected) fits, or a weight is missing,
            unknown or of another shape.
    """
    layout, sources = _our_names(weights)
    values = {ours: weights[theirs].float() for ours, theirs in sources.items()}
    arch = _find_arch(values, arch)
    version = 'ConvNeXt-V2' if any(name.endswith('.grn.gamma') for name in values) else 'ConvNeXt'
    scales = {name: values.pop(name) for name in sources if re.fullmatch(r'stages\.\d+\.\d+\.gamma', name)}

    backbone = _new_backbone(arch, values)
    result = backbone.state_dict()
    known = [name for name in values if name in result]
    _check_names(result, values, scales, version)
    for name in known:
        result[name] = _reshaped(values[name], result[name].shape, sources[name])
    doubled = []
    for name, scale in scales.items():
        layer = name.replace('gamma', 'pointwise_conv2')
        scale = _reshaped(scale, result[f'{layer}.bias'].shape, sources[name])
        result[f'{layer}.weight'] *= scale[:, None]
        result[f'{layer}.bias'] *= scale
    for name, module in backbone.named_modules():
        if isinstance(module, GlobalBranch):
            block = name.rpartition('.')[0]
            for part in ('weight', 'bias'):
                result[f'{name}.expand.{part}'].zero_()
                result[f'{block}.pointwise_conv2.{part}'] *= 2
                doubled.append(f'backbone.{block}.pointwise_conv2.{part}')

    new = [f'backbone.{name}' for name in result if name not in values]
    result = {f'backbone.{name}': value for name, value in result.items()}
    # A lone linear layer after the final norm is the whole head.
    head = {name: value.clone() for name, value in values.items() if name.startswith('head.')}
    if set(head) == {'head.fc.weight', 'head.fc.bias'} and 'norm3.weight' in values:
        result.update(head)
        known += head
    unchanged = [ours for ours in known if sources[ours].removeprefix('backbone.') == ours]
    return Conversion(
        result, arch, layout, version,
        taken=[sources[ours] for ours in unchanged],
        renamed=[sources[ours] for ours in known if ours not in unchanged],
        folded=[sources[ours] for ours in scales],
        doubled=doubled,
        new=new,
        left_out=[theirs for ours, theirs in sources.items() if ours not in known and ours not in scales])


def _our_names(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Return the layout, and a mapping from our names (without ``backbone.``) to the source's."""
    bare = {name.removeprefix('backbone.'): name for name in weights}
    if any('.global_branch.' in name for name in bare):
        raise CheckpointError('these are weights of ConvNeur already')
    for layout, (mark, renames) in LAYOUTS.items():
        if mark not in bare:
            continue
        sources = {}
        for name, theirs in bare.items():
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            sources[name] = theirs
        return layout, sources
    marks = ', '.join(f'{mark} ({layout})' for layout, (mark, _) in LAYOUTS.items())
    raise CheckpointError(f'no ConvNeXt in a known layout: expected one of the weights {marks}, got '
                          f'{", ".join(list(weights)[:4]) or "none"}')


def _find_arch(values: Mapping[str, Tensor], expected: str | None) -> str:
    blocks = [(int(name.split('.')[1]), len(value)) for name, value in values.items()
              if re.fullmatch(r'stages\.\d+\.\d+\.depthwise_conv\.weight', name)]
    counts, sizes = Counter(stage for stage, _ in blocks), dict(blocks)
    depths, channels = [counts[stage] for stage in sorted(counts)], [sizes[stage] for stage in sorted(sizes)]
    for name, settings in ConvNeur.arch_settings.items():
        if (settings['depths'], settings['channels']) == (depths, channels):
            if expected not in (None, name):
                raise CheckpointError(f'--arch {expected} was asked for, and the weights are of {name}: depths '
                                      f'{depths}, channels {channels}')
            return name
    known = '; '.join(f'{name} {settings["depths"]}, {settings["channels"]}'
                      for name, settings in ConvNeur.arch_settings.items())
    raise CheckpointError(f'no arch of ConvNeur has depths {depths} and channels {channels}; there are {known}')


def _new_backbone(arch: str, values: Mapping[str, Tensor]) -> ConvNeur:
    """Build a backbone with memories drawn as in :meth:`ConvNeur.init_weights`, from a fixed seed."""
    norms = [i for i in range(len(ConvNeur.arch_settings[arch]['depths'])) if f'norm{i}.weight' in values]
    stem = values.get('downsample_layers.0.0.weight')
    in_channels = stem.size(1) if stem is not None and stem.dim() == 4 else 3
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        backbone = ConvNeur(arch, in_channels, out_indices=sorted({*norms, 3}))
        for module in backbone.modules():
            if isinstance(module, GlobalBranch):
                initialize(module, backbone.init_cfg)
                module.memory.reset_parameters()
    return backbone


def _check_names(own: Iterable[str], values: Mapping[str, Tensor], scales: Mapping[str, Tensor], version: str) -> None:
    """Raise a CheckpointError if the source lacks a weight of the backbone, or has one that ConvNeur lacks."""
    # The final norm belongs to the head; the encoders of masked autoencoders have none. V1 has no GRN.
    missing = [name for name in own if name not in values and '.global_branch.' not in name
               and not name.startswith('norm') and not (version == 'ConvNeXt' and '.grn.' in name)]
    if scales:
        blocks = {name.rsplit('.', 2)[0] for name in own if name.endswith('.pointwise_conv2.weight')}
        missing += [f'{block}.gamma' for block in sorted(blocks) if f'{block}.gamma' not in scales]
    unknown = [name for name in values if name.startswith(BACKBONE) and name not in own]
    if missing or unknown:
        parts = [f'{text} {_patterns(names)}' for text, names in (('lacks', missing), ('has also', unknown)) if names]
        raise CheckpointError(f'another ConvNeXt than ConvNeur is made of: in our names, it {" and ".join(parts)}')


def _reshaped(value: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return a copy in ConvNeur's shape; layouts differ in axes of size one, as a 1×1 convolution and a matrix do."""
    if [size for size in value.shape if size != 1] != [size for size in shape if size != 1]:
        raise CheckpointError(f'another ConvNeXt than ConvNeur is made of: {name} must be {tuple(shape)}, got '
                              f'{tuple(value.shape)}')
    return value.reshape(shape).clone()


def _patterns(names: Iterable[str]) -> str:
    """Join the names, with numbers replaced by ``*`` and with counts above 1."""
    counts = Counter(re.sub(r'(?<=\.)\d+(?=\.)', '*', name) for name in names)
    return ', '.join(name if count == 1 else f'{name} ({count})' for name, count in counts.items())


def report(done: Conversion, licence: str | None = None) -> str:
    """Describe in a few lines how each weight was used, and under which licence the result is.

    Args:
        done (Conversion): The conversion.
        licence (str | None): The licence of the source; None tells what is known of all such weights. Defaults to None.
    """
    branches = [re.sub(r'\.global_branch\..*', '.global_branch.*', name) for name in done.new]
    rows = {
        'taken as they are': str(len(done.taken)),
        'renamed': str(len(done.renamed)),
        'folded': f'{len(done.folded)} layer scales, into pointwise_conv2' if done.folded else '0',
        'doubled': f'{len(done.doubled)}: {_patterns(done.doubled)}',
        'made new': f'{len(done.new)}: {_patterns(branches)}',
        'left out': f'{len(done.left_out)}: {_patterns(done.left_out)}' if done.left_out else '0',
    }
    classes = f', head of {len(done.weights["head.fc.weight"])} classes' if 'head.fc.weight' in done.weights else ''
    title = f'{done.version}, layout: {done.layout} -> ConvNeur-{done.arch}{classes}'
    return '\n'.join([title, *(f'  {name:<18}{text}' for name, text in rows.items()),
                      f'licence: {licence or LICENCES[done.version]}'])
