"""OverLoCK's classification head inside mmpretrain: scores, the auxiliary loss, and the authors' weights."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope

pytestmark = pytest.mark.needs('mmpretrain')

LIGHT = dict(depths=[1, 1, 1, 1], focus_depths=[1, 1], channels=[8, 16, 32, 32], kernel_sizes=[7, 7, 7, 7],
             groups=[2, 2])


@pytest.fixture(autouse=True)
def scope():
    """That of mmpretrain's runs, whatever run an earlier test has left its own of."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def build_head(**options):
    from convneur_mm.models.overlock.head import OverLoCKClsHead
    defaults = dict(num_classes=5, in_channels=10, overview_channels=8, hidden_channels=16)
    return OverLoCKClsHead(**{**defaults, **options})


def samples(labels, scores=None):
    from mmpretrain.structures import DataSample
    if scores is not None:
        return [DataSample().set_gt_score(score) for score in scores]
    return [DataSample().set_gt_label(label) for label in labels]


@pytest.fixture
def features():
    return torch.randn(4, 8, 2, 3), torch.randn(4, 10, 2, 3)


def test_scores_are_those_of_focus_net(features):
    head = build_head().eval()
    scores = head(features)
    hidden = F.silu(head.head[1](head.head[0](features[1]))).mean((2, 3))
    torch.testing.assert_close(scores, hidden @ head.head[4].weight.flatten(1).T + head.head[4].bias)
    assert torch.equal(scores, head((torch.randn_like(features[0]), features[1])))
    predicted = head.predict(features)
    assert [sample.pred_label.item() for sample in predicted] == scores.argmax(1).tolist()


@pytest.mark.parametrize('mixed', [False, True])
def test_both_nets_are_trained(features, mixed):
    """With labels, and with the mixed ones of Mixup and CutMix."""
    head = build_head()
    targets = torch.randn(4, 5).softmax(1) if mixed else torch.tensor([0, 1, 2, 4])
    losses = head.loss(features, samples(targets.tolist(), targets if mixed else None))
    aux_scores = head.aux_head[2].weight.flatten(1) @ head.aux_head[0](features[0]).mean((2, 3)).T
    aux_scores = aux_scores.T + head.aux_head[2].bias
    assert set(losses) == {'loss', 'loss_aux'}
    torch.testing.assert_close(losses['loss'], F.cross_entropy(head(features), targets))
    torch.testing.assert_close(losses['loss_aux'], 0.4 * F.cross_entropy(aux_scores, targets))
    sum(losses.values()).backward()
    assert all(param.grad.any() for param in head.parameters())


def test_without_the_auxiliary_loss(features):
    head = build_head(aux_weight=0)
    assert set(head.loss(features, samples([0, 1, 2, 3]))) == {'loss'}
    assert not hasattr(head, 'aux_head')


@pytest.mark.parametrize('options, message', [
    (dict(num_classes=0), 'num_classes must be at least 1, got 0'),
    (dict(aux_weight=-0.1), r'aux_weight must be at least 0, got -0\.1'),
])
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_head(**options)


def test_a_checkpoint_of_the_authors_fills_the_classifier(tmp_path):
    """Theirs is flat: the backbone's weights, and the classifiers' as ``head.*`` and ``aux_head.*``."""
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    import convneur_mm.models.overlock.head  # noqa: F401
    path = str(tmp_path / 'authors.pth')
    cfg = dict(
        type='ImageClassifier',
        backbone=dict(type='OverLoCK', arch=LIGHT, out_indices=3, for_classifier=True,
                      init_cfg=dict(type='Pretrained', checkpoint=path)),
        head=dict(type='OverLoCKClsHead', num_classes=5, in_channels=40, overview_channels=32,
                  init_cfg=dict(type='Pretrained', checkpoint=path)))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg)
        names = {'head.0.weight', 'head.1.weight', 'head.1.bias', 'head.1.running_mean', 'head.1.running_var',
                 'head.1.num_batches_tracked', 'head.4.weight', 'head.4.bias', 'aux_head.0.weight', 'aux_head.0.bias',
                 'aux_head.0.running_mean', 'aux_head.0.running_var', 'aux_head.0.num_batches_tracked',
                 'aux_head.2.weight', 'aux_head.2.bias'}
        weights = {**model.backbone.state_dict(), **model.head.state_dict()}
        assert set(model.head.state_dict()) == names
        weights = {name: torch.rand_like(value) if value.is_floating_point() else value + 7
                   for name, value in weights.items()}
        torch.save(weights, path)
        model.init_weights()
    for name, value in model.state_dict().items():
        part, _, own = name.partition('.')
        assert part in ('backbone', 'head') and torch.equal(value, weights[own]), name
