"""experiments/across_sizes.py: mosaics are made of the pictures and their labels."""
import pytest
import torch


@pytest.fixture
def tool(script):
    return script('across_sizes')


@pytest.mark.parametrize('size', [(8, 12), (20, 31), (16, 24)])
def test_mosaics(tool, size):
    """Each pixel has its label beside it, tiles are whole pictures, and not all the same."""
    labels = torch.arange(5)[:, None, None].expand(-1, 8, 12) * 100 + torch.arange(96).view(8, 12)
    pictures = labels[:, None].expand(-1, 3, -1, -1)
    found = list(tool.mosaics(pictures, labels, size, 3 * size[0] * size[1]))
    assert len(found) == 3
    for picture, label in found:
        assert picture.shape == (1, 3, *size) and torch.equal(picture[:, 0], label)
        assert torch.equal(label[0, :8, :12] % 100, torch.arange(96).view(8, 12))
    assert len({int(label[0, 0, 0]) for _, label in found}) > 1


def test_rows(tool):
    """Of a model whose logits are what it sees: every pixel is right, in float32 as in float64."""
    class Model(torch.nn.Module):
        align_corners = False

        @staticmethod
        def data_preprocessor(data):
            return dict(inputs=torch.nn.functional.pad(data['inputs'][0][None].float(), (0, 3, 0, 5)))

        def forward(self, inputs, mode):
            assert mode == 'tensor'
            return torch.stack([inputs[:, 0] == number for number in range(3)], 1).to(inputs.dtype)

    labels = torch.randint(3, (4, 8, 8))
    row = tool.row(Model(), labels[:, None].expand(-1, 3, -1, -1), labels, (8, 8), 1000)
    assert row == ('8 x 8', '15', '1.000', '0.0e+00', '0.00 %')
