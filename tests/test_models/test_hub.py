"""ConvNeur.from_pretrained and save_pretrained: the same features in a fresh process, in timm and in transformers."""
import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from without_openmmlab import WITHOUT_OPENMMLAB

from convneur_mm.models import ConvNeur

pytest.importorskip('huggingface_hub')
pytest.importorskip('safetensors')
OPTIONS = dict(memory_cfg=dict(num_chunks=4, retrieve='final'), in_channels=4)
IMAGE = (2, 4, 65, 96)


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval()


@pytest.fixture
def backbone() -> ConvNeur:
    return filled(ConvNeur('m1', drop_path_rate=0.1, frozen_stages=1, with_cp=True, **OPTIONS,
                           init_cfg=dict(type='Pretrained', checkpoint='/a/path/of/this/machine.pth')))


def test_in_a_fresh_process_without_openmmlab(backbone, tmp_path):
    backbone.save_pretrained(tmp_path / 'model')
    x = torch.randn(IMAGE)
    with torch.no_grad():
        torch.save((x, backbone(x)), tmp_path / 'features.pth')
    code = WITHOUT_OPENMMLAB + f"""
import torch
from convneur_mm.models import ConvNeur
x, expected = torch.load({str(tmp_path / 'features.pth')!r})
model = ConvNeur.from_pretrained({str(tmp_path / 'model')!r})
assert not model.training
with torch.no_grad():
    for found, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
assert not [name for name in sys.modules if name.split('.')[0] in HIDDEN]
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_written(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    text = (tmp_path / 'config.json').read_text()
    assert 'this/machine' not in text and json.loads(text)['memory_cfg'] == OPTIONS['memory_cfg']
    assert 'from_pretrained' in (tmp_path / 'README.md').read_text()
    again = ConvNeur.from_pretrained(tmp_path)
    assert not again.frozen_stages and all(weight.requires_grad for weight in again.parameters())


def test_other_options_than_the_saved_ones(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    last, x = ConvNeur.from_pretrained(tmp_path, out_indices=[3]), torch.randn(IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(last(x)[0], backbone(x)[3])
    with pytest.raises(RuntimeError, match='stages.0.1.global_branch'):
        ConvNeur.from_pretrained(tmp_path, placement='block')
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='has no model.safetensors'):
        ConvNeur.from_pretrained(tmp_path)


def test_copies_save_the_same(backbone, tmp_path):
    """EMA copies a model, and a DataLoader may pickle it."""
    backbone.save_pretrained(tmp_path / 'first')
    expected = (tmp_path / 'first' / 'config.json').read_text()
    for i, copied in enumerate((copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)))):
        copied.save_pretrained(tmp_path / str(i))
        assert (tmp_path / str(i) / 'config.json').read_text() == expected


def test_timm_loads_the_backbone(backbone, tmp_path):
    timm = pytest.importorskip('timm')
    import convneur_mm.timm  # noqa: F401  registers the models
    backbone.save_pretrained(tmp_path)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    assert_same_features(backbone, model)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True)(torch.randn(IMAGE)).shape == (2, 320)


def assert_same_features(backbone: ConvNeur, model: nn.Module) -> None:
    x = torch.randn(IMAGE)
    with torch.no_grad():
        for i, (feature, expected) in enumerate(zip(model(x), backbone(x), strict=True)):
            torch.testing.assert_close(getattr(backbone, f'norm{i}')(feature), expected)


def test_transformers_loads_the_backbone(backbone, tmp_path):
    pytest.importorskip('timm')
    transformers = pytest.importorskip('transformers')
    import convneur_mm.timm  # noqa: F401  registers the models
    backbone.save_pretrained(tmp_path)
    model = transformers.TimmBackbone.from_pretrained(
        f'local-dir:{tmp_path}', out_indices=(0, 1, 2, 3), num_channels=4).eval()
    assert_same_features(backbone, lambda x: model(x).feature_maps)


def test_a_classifier_of_timm(tmp_path):
    timm = pytest.importorskip('timm')
    from convneur_mm.timm import ConvNeurClassifier
    model = filled(timm.create_model('convneur_m1', num_classes=7, in_chans=4, memory_cfg=OPTIONS['memory_cfg']))
    model.save_pretrained(tmp_path)
    x = torch.randn(IMAGE)
    with torch.no_grad():
        for again in (ConvNeurClassifier.from_pretrained(tmp_path),
                      timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()):
            torch.testing.assert_close(again(x), model(x))
        torch.testing.assert_close(ConvNeur.from_pretrained(tmp_path)(x)[0],
                                   model.norm3(model.forward_features(x)))
    assert ConvNeurClassifier.from_pretrained(tmp_path, num_classes=3)(x).shape == (2, 3)


def test_archs_that_timm_lacks(tmp_path):
    """A custom arch, and a backbone without its last stages, load again by the class alone."""
    arch = dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16], mem_channels=16)
    for i, model in enumerate((ConvNeur(arch), ConvNeur('m1', out_indices=(0, 1)))):
        model.eval().save_pretrained(tmp_path / str(i))
        assert 'architecture' not in json.loads((tmp_path / str(i) / 'config.json').read_text())
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for found, wanted in zip(ConvNeur.from_pretrained(tmp_path / str(i))(x), model(x), strict=True):
                torch.testing.assert_close(found, wanted)


def test_without_huggingface_hub(tmp_path):
    """The models need no hub; what does says what to install."""
    code = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == 'huggingface_hub' else find_spec(name, *args)
from convneur_mm.models import ConvNeur
for call in (ConvNeur.from_pretrained, ConvNeur('m1').save_pretrained, ConvNeur('m1').push_to_hub):
    try:
        call('x')
    except ImportError as error:
        assert 'pip install huggingface_hub' in str(error)
    else:
        raise AssertionError(call)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
