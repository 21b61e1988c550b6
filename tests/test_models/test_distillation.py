"""FeatureDistiller: stages predict the teacher's maps of their stride, whichever library the teacher is of."""
import pytest
import torch
from torch import nn

from convneur_mm.models.distillation import FeatureDistiller, Teacher, build_teacher

ARCH = dict(depths=[1] * 4, channels=[8, 16, 24, 32], mem_channels=16)
STUDENT = dict(type='ConvNeur', arch=ARCH)


@pytest.fixture
def timm_teacher(tmp_path):
    """A name and a file of weights."""
    timm = pytest.importorskip('timm')
    net = timm.create_model('resnet10t')
    torch.save(net.state_dict(), tmp_path / 'teacher.pth')
    return 'timm:resnet10t', str(tmp_path / 'teacher.pth')


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, 3, 64, 96), dtype=torch.uint8)


def test_timm(timm_teacher):
    """The features are those of timm's own model, normalised as it asks for."""
    import timm
    model = FeatureDistiller(STUDENT, *timm_teacher)
    assert [(pair.stage, pair.channels) for pair in model.pairs] == [(0, 64), (1, 128), (2, 256), (3, 512)]
    net = timm.create_model('resnet10t', features_only=True).eval()
    net.load_state_dict(torch.load(timm_teacher[1]), strict=False)
    x = torch.rand(2, 3, 64, 96)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    teacher = build_teacher(*timm_teacher)
    for found, expected in zip(teacher(x), net((x - mean) / std), strict=True):
        torch.testing.assert_close(found, expected)


def test_torchvision(tmp_path):
    from torchvision.models import get_model
    net = get_model('mobilenet_v3_small', weights=None).eval()
    torch.save(net.state_dict(), tmp_path / 'teacher.pth')
    model = FeatureDistiller(STUDENT, 'torchvision:mobilenet_v3_small', str(tmp_path / 'teacher.pth'))
    assert [pair.stage for pair in model.pairs] == [0, 1, 2, 3]
    x = torch.rand(1, 3, 64, 96)
    last = model._teacher[0](x)[-1]
    mean, std = (values.view(3, 1, 1) for values in (torch.tensor([0.485, 0.456, 0.406]),
                                                     torch.tensor([0.229, 0.224, 0.225])))
    torch.testing.assert_close(last, net.features((x - mean) / std))


def test_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4)
    transformers.ResNetBackbone(config).save_pretrained(tmp_path)
    model = FeatureDistiller(STUDENT, f'hf:{tmp_path}')
    assert [pair.channels for pair in model.pairs] == [8, 16, 24, 32]


def test_it_learns_and_the_teacher_does_not(timm_teacher):
    torch.manual_seed(0)
    model = FeatureDistiller(STUDENT, *timm_teacher)
    model.backbone.init_weights()
    before = [weight.clone() for weight in model._teacher[0].state_dict().values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch, first = images(), None
    for _ in range(12):
        loss, _ = model.parse_losses(model.train()(batch))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.85 * first
    assert all(torch.equal(a, b) for a, b in zip(before, model._teacher[0].state_dict().values()))
    assert not [name for name in model.state_dict() if 'teacher' in name]
    assert all(weight.grad is not None for name, weight in model.named_parameters() if '.norm' not in name)


def test_features_that_are_the_teachers_have_no_loss(timm_teacher):
    """With the teacher's own maps as outputs and the identity as the linear map."""
    model = FeatureDistiller(STUDENT, *timm_teacher)
    batch = images()

    class Same(nn.Module):
        def forward(self, x):
            maps = model._teacher[0](batch.float() / 255)
            return [nn.functional.layer_norm(each.movedim(1, -1), each.shape[1:2]).movedim(-1, 1)
                    for each in maps][-4:]

    model.backbone = Same()
    model.projections = nn.ModuleList(nn.Identity() for _ in model.pairs)
    for name, loss in model(batch).items():
        assert loss.abs() < 1e-5, name


def test_what_is_refused(tmp_path, timm_teacher):
    for name, weights, message in (
            ('resnet50', None, 'must be timm:NAME, torchvision:NAME or hf:PATH'),
            ('timm:', None, 'must be timm:NAME'),
            ('timm:resnet10_of_mine', None, "timm has no model 'resnet10_of_mine'"),
            ('timm:resnet10t', 'none.pth', 'no such file of the teacher.s weights: none.pth')):
        with pytest.raises(ValueError, match=message):
            build_teacher(name, weights)
    with pytest.raises(ValueError, match="mode must be 'loss'"):
        FeatureDistiller(STUDENT, *timm_teacher)(images(), mode='predict')
    assert isinstance(build_teacher(*timm_teacher).train(), Teacher) and not build_teacher(*timm_teacher).training
