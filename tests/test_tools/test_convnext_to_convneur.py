"""tools/model_converters/convnext_to_convneur.py: what it makes computes what the source computes."""
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from convneur_mm.engine.checkpoint import load_pretrained
from convneur_mm.models import ConvNeur
from convneur_mm.models.global_memory import GlobalMemory

pytestmark = pytest.mark.needs('timm', 'mmpretrain')
FOLDER = Path(__file__).parents[2] / 'tools' / 'model_converters'
NAMES = {'m1': 'atto', 'm2': 'femto', 'm3': 'pico', 'm4': 'nano', 'm5': 'tiny', 'm6': 'base'}
LAYOUTS = ('timm', "the authors'", 'mmpretrain')


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import convnext_to_convneur
        yield convnext_to_convneur


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights of ordinary scales, and with biases, norms, GRNs and layer scales that take part."""
    with torch.device('meta'):  # its own random weights would take longer than all else here
        model = build()
    model.to_empty(device='cpu').eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.3)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5)
    return model


def timm_model(name: str, **options: object) -> nn.Module:
    import timm
    return filled(lambda: timm.create_model(name, **options))


def timm_source(arch: str, version: int) -> nn.Module:
    return timm_model(f'convnext{"v2" if version == 2 else ""}_{NAMES[arch]}', num_classes=7)


def mmpretrain_classifier(arch: str, version: int, **options: object) -> nn.Module:
    from mmpretrain.registry import MODELS
    variant = dict(use_grn=True, layer_scale_init_value=0.0) if version == 2 else {}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return filled(lambda: MODELS.build(dict(
            type='ImageClassifier', backbone=dict(type='ConvNeXt', arch=NAMES[arch], **variant, **options),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=ConvNeur.arch_settings[arch]['channels'][-1]))))


def authors_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights as the authors' code names and shapes them."""
    renames = (
        (r'^stem\.', 'downsample_layers.0.'), (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
        (r'\.blocks\.', '.'), (r'conv_dw', 'dwconv'), (r'mlp\.fc', 'pwconv'), (r'mlp\.grn\.weight', 'grn.gamma'),
        (r'mlp\.grn\.bias', 'grn.beta'), (r'^head\.norm\.', 'norm.'), (r'^head\.fc\.', 'head.'))
    result = {}
    for name, value in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if '.grn.' in name:
            value = value.view(1, 1, 1, -1)
        result[name] = value.flatten(1) if 'pwconv' in name and value.dim() == 4 else value
    return result


@torch.no_grad()
def stage_outputs(model: nn.Module, head: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output of every stage, and that of the head."""
    seen = []
    handles = [stage.register_forward_hook(lambda _, __, out: seen.append(out)) for stage in model.stages]
    logits = head(model(x))
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    return [*seen, logits]


def assert_same_function(weights: dict[str, Tensor], arch: str, expected: list[Tensor], x: Tensor) -> None:
    with torch.device('meta'):
        backbone = ConvNeur(arch, out_indices=3, gap_before_final_norm=True).eval()
        head = nn.Linear(backbone.channels[-1], 7)
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.ModuleDict(dict(fc=head))))
    own = model.state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, assign=True)
    for found, wanted in zip(stage_outputs(backbone, lambda outs: head(outs[-1]), x), expected, strict=True):
        assert wanted.std() > 0.05
        assert (found - wanted).norm() / wanted.norm() <= 1e-5


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('arch', NAMES)
def test_features_and_logits_are_those_of_timm(tool, arch, version):
    source, x = timm_source(arch, version), torch.randn(2, 3, 64, 96)
    done = tool.convert(source.state_dict())
    assert (done.arch, done.layout, done.version) == (arch, 'timm', 'ConvNeXt-V2' if version == 2 else 'ConvNeXt')
    assert_same_function(done.weights, arch, stage_outputs(source, lambda logits: logits, x), x)
