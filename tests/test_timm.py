"""convneur_mm.timm: the same model as OpenMMLab's, through all that timm asks of a model, also without MMEngine."""
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from without_openmmlab import WITHOUT_OPENMMLAB

timm = pytest.importorskip('timm')
from timm.models._manipulate import group_parameters  # noqa: E402

from convneur_mm.models import ConvNeur, NeuralMemory  # noqa: E402
from convneur_mm.timm import ARCHS, ConvNeurClassifier  # noqa: E402

IMAGE = (2, 3, 64, 96)


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with weights that leave nothing at a neutral value."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval()


@pytest.fixture
def model() -> ConvNeurClassifier:
    return randomised(timm.create_model('convneur_m1', num_classes=7))


@pytest.mark.parametrize('arch', ARCHS)
def test_all_archs_are_there(arch):
    with torch.device('meta'):
        model, own = ConvNeurClassifier(arch, num_classes=0), ConvNeur(arch, out_indices=-1)
    assert {name: x.shape for name, x in model.state_dict().items()} == {
        name: x.shape for name, x in own.state_dict().items()}
    assert model.num_features == own.channels[-1]
    assert f'convneur_{arch}' in timm.list_models('convneur_*')


def test_features_are_those_of_the_backbone(model):
    backbone, x = ConvNeur('m1').eval(), torch.randn(IMAGE)
    backbone.load_state_dict(model.state_dict(), strict=False)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert all(feature.is_contiguous() for feature in features)
    for i, expected in enumerate(backbone(x)):
        torch.testing.assert_close(getattr(backbone, f'norm{i}')(features[i]), expected)
    torch.testing.assert_close(model.forward_intermediates(x, norm=True)[1][-1], backbone(x)[-1])


def test_features_only(model):
    x = torch.randn(IMAGE)
    features = timm.create_model('convneur_m1', features_only=True, out_indices=(1, 2)).eval()
    assert (features.feature_info.channels(), features.feature_info.reduction()) == ([80, 160], [8, 16])
    assert not any(name.startswith(('model.stages.3', 'model.norm', 'model.head')) for name, _ in
                   features.named_parameters())
    features.model.load_state_dict(model.state_dict(), strict=False)
    expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    for found, feature in zip(features(x), expected, strict=True):
        torch.testing.assert_close(found, feature)


@pytest.mark.needs('mmpretrain')
def test_checkpoint_of_a_classifier_fits(tmp_path):
    from mmengine.registry import MODELS, DefaultScope
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        other = MODELS.build(dict(
            type='ImageClassifier',
            backbone=dict(type='ConvNeur', arch='m1', out_indices=-1, gap_before_final_norm=True),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=320)))
    torch.save(dict(state_dict=randomised(other).state_dict()), tmp_path / 'x.pth')
    model = timm.create_model('convneur_m1', num_classes=7, checkpoint_path=str(tmp_path / 'x.pth')).eval()
    x = torch.randn(IMAGE)
    torch.testing.assert_close(model(x), other(x))


def test_weights_are_drawn_as_by_mmengine():
    backbone = ConvNeur('m1', out_indices=-1)
    backbone.init_weights()
    model = timm.create_model('convneur_m1')
    for name, weight in backbone.state_dict().items():
        found = model.get_parameter(name)
        if weight.std() == 0 or weight.numel() < 2:
            assert torch.equal(found, weight), name
        elif 'generators.2.bias' in name:  # thirds
            assert torch.equal(found, weight)
        else:
            assert 0.7 < found.std() / weight.std() < 1.4, name
    assert model.head['fc'].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_layers_for_learning_rates(model):
    names = [name for name, _ in model.named_parameters()]
    for coarse in (True, False):
        layers = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(layers) == set(names)
        of_stage = [{layers[name] for name in names if name.startswith((f'stages.{i}.', f'downsample_layers.{i}.'))}
                    for i in range(4)]
        assert all(max(a) < min(b) for a, b in zip(of_stage, of_stage[1:]))
        assert layers['head.fc.weight'] >= max(of_stage[-1])
    assert len(set(layers.values())) >= sum(model.depths) + 1


def test_memories_do_not_decay(model):
    memories = [name for name, module in model.named_modules() if isinstance(module, NeuralMemory)]
    assert model.no_weight_decay() == {f'{name}.{weight}' for name in memories for weight in ('w1', 'w2')}
    assert len(memories) == 4
    assert all(isinstance(model.get_parameter(name), nn.Parameter) for name in model.no_weight_decay())


def test_checkpointing_changes_no_gradient(model):
    x, other = torch.randn(IMAGE), copy.deepcopy(model)
    other.set_grad_checkpointing()
    assert all(block.with_cp for stage in other.stages for block in stage)
    for one in (model, other):
        one(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    other.set_grad_checkpointing(False)
    assert not any(block.with_cp for stage in other.stages for block in stage)


def test_head(model):
    features = model.forward_features(torch.randn(IMAGE))
    assert features.shape == (2, 320, 2, 3)
    pooled = model.norm3(features.mean((2, 3), keepdim=True)).flatten(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(features), model.get_classifier()(pooled))
    model.reset_classifier(3, 'max')
    assert model.forward_head(features).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0, '')
    assert model.forward_head(features).shape == features.shape
    with pytest.raises(ValueError, match="3 classes needs global_pool='avg' or 'max', got ''"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="must be 'avg', 'max' or '', got 'sum'"):
        model.reset_classifier(3, 'sum')


def test_options_and_what_is_refused():
    model = timm.create_model('convneur_m1', in_chans=1, num_classes=0, drop_rate=0.5, drop_path_rate=0.2,
                              memory_cfg=dict(num_chunks=4))
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 320)
    assert {m.num_chunks for m in model.modules() if isinstance(m, NeuralMemory)} == {4}
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(torch.randn(1, 1, 64, 64), output_fmt='NLC')
    with pytest.raises(ValueError, match='at least 32 x 32 pixels'):
        model(torch.randn(1, 1, 31, 64))


def test_a_unet_of_another_library_trains():
    smp = pytest.importorskip('segmentation_models_pytorch')
    net = smp.Unet('tu-convneur_m1', encoder_weights=None, classes=3, decoder_channels=(32, 16, 16, 8, 8))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    x, target = torch.randn(2, 3, 64, 96), torch.randint(3, (2, 64, 96))
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    memory = next(m for m in net.modules() if isinstance(m, NeuralMemory))
    assert memory.w1.grad.abs().max() > 0


def test_without_openmmlab():
    code = WITHOUT_OPENMMLAB + """
import timm, torch, convneur_mm.timm
model = timm.create_model('convneur_m1', num_classes=5)
model(torch.randn(1, 3, 64, 64)).sum().backward()
assert model.stages[0][0].global_branch.memory.generators[2].bias.unique().tolist() == [-4, -2, 0]
assert not [name for name in sys.modules if name.split('.')[0] in HIDDEN]
try:
    convneur_mm.config
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout  # what to install for the rest
