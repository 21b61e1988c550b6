"""What stands around every mixing of tokens."""
import pytest
import torch
import torch.nn.functional as F

from convneur_mm.models.global_branches import TokenMixer


class Row(TokenMixer):
    """Every token becomes the first of its row."""

    def mix(self, x, size):
        return x.unflatten(1, size)[:, :, :1].expand(-1, -1, size[1], -1).flatten(1, 2)


def test_mixes_between_a_layer_norm_and_a_projection():
    mixer = Row(4).double()
    for param in mixer.parameters():
        torch.nn.init.normal_(param)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    normed = F.layer_norm(x, (4,), mixer.norm.weight, mixer.norm.bias, 1e-6)
    expected = normed[:, [0, 0, 0, 3, 3, 3]] @ mixer.proj.weight.T
    torch.testing.assert_close(mixer(x, (2, 3)), expected, rtol=0, atol=1e-12)
    assert [name for name, _ in mixer.named_parameters()] == ['norm.weight', 'norm.bias', 'proj.weight']


def test_mix_is_for_subclasses():
    with pytest.raises(NotImplementedError):
        TokenMixer(4)(torch.zeros(1, 6, 4), (2, 3))


def test_init_cfg():
    mixer = Row(4, init_cfg=dict(type='Constant', layer='Linear', val=0.5))
    mixer.init_weights()
    assert (mixer.proj.weight == 0.5).all()
