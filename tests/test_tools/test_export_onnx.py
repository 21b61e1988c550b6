"""tools/deploy/export_onnx.py: the graph computes what the model does, at every size, or is not written."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmseg.structures import SegDataSample
from tiny_models import CLASSES, CONFIGS, TINY, save_weights, separated
from training import train_tiny

from convneur_mm.apis import init_model
from convneur_mm.engine.launch import find_config, read_config
from convneur_mm.models import NeuralMemory

FOLDER = Path(__file__).parents[2] / 'tools' / 'deploy'
onnx, onnxruntime, openvino = map(pytest.importorskip, ('onnx', 'onnxruntime', 'openvino'))

ONE_STAGE = dict(depths=[1], channels=[32], mem_channels=16, _delete_=True)


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', [str(FOLDER), *sys.path])
        import export_onnx
        # What is compared while exporting takes longer than the export of so small a model.
        patch.setattr(export_onnx, 'SIZES', ((1, 40, 72), (2, 65, 33)))
        yield export_onnx


def export(tool, folder: Path, task: str, *options: str, length: int = 0, **backbone: object) -> tuple[nn.Module, Path]:
    """A tiny model, trained for ``length`` as of :func:`train_tiny`, and its file, by the tool in this process."""
    overrides = {**TINY[task], **{f'model.backbone.{name}': value for name, value in backbone.items()}}
    out = folder / 'model.onnx'
    if length:
        config, checkpoint = train_tiny(task, folder, length, overrides)
        model = init_model(config, checkpoint, 'cpu')
    else:
        config = folder / 'config.py'
        read_config(find_config(CONFIGS[task]), overrides).dump(config)
        model = separated(init_model(config, device='cpu'))
        checkpoint = save_weights(model, folder / 'weights.pth', classes=CLASSES[task])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['export_onnx.py', *map(str, (config, checkpoint, '--out', out)), *options])
        tool.main()
    return model, out


def normalised(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """RGB pictures (N, 3, H, W) as the model's own preprocessor leaves them, which takes what OpenCV reads, BGR."""
    samples = [SegDataSample() for _ in image] if hasattr(model, 'encode_decode') else None
    return model.data_preprocessor(dict(inputs=list(image.flip(1)), data_samples=samples))['inputs']


@pytest.mark.parametrize('task, length, backbone', [
    ('classifier', 8, dict(arch=ONE_STAGE, out_indices=0, memory_cfg=dict(chunk_size=36, retrieve='final'))),
    pytest.param('segmentor', 24, dict(placement='none'), marks=pytest.mark.slow)])
def test_one_file_for_all_sizes(tool, tmp_path, capsys, task, length, backbone):
    """Of a trained model, in onnxruntime and in OpenVINO, against it and its preprocessing as mmengine runs them.

    A memory in one of them and mmseg's heads in the other, as each takes the exporter a while.
    """
    model, file = export(tool, tmp_path, task, '--dynamic', '--check-shapes', '48x80', '3x33x65', length=length,
                         **backbone)
    lines = [line.partition(':')[0] for line in capsys.readouterr().out.splitlines() if 'largest error' in line]
    assert lines == ['1 x 48 x 80', '3 x 33 x 65']
    session = onnxruntime.InferenceSession(str(file))
    other = openvino.Core().compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for size in ((1, 64, 64), (3, 224, 224), (2, 111, 75), (1, 300, 160)):
        image = (torch.rand(size[0], 3, *size[1:]) * 255).round()
        x = normalised(model, image)[:, :, :size[1], :size[2]]
        with torch.no_grad():
            expected = model(x) if task == 'classifier' else model.encode_decode(
                x, [dict(img_shape=size[1:], ori_shape=size[1:])] * size[0])
        assert (expected.std(0).max() if size[0] > 1 else expected.std()) > 1e-2
        for found in (session.run(None, {'image': image.numpy()})[0], other(image.numpy())[0]):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    assert json.loads(onnx.load(str(file)).metadata_props[0].value) == list(CLASSES[task])
    assert [x.name for x in session.get_outputs()] == ['scores' if task == 'classifier' else 'logits']


@pytest.mark.slow
def test_backbone_of_a_detector_at_one_size(tool, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        export(tool, tmp_path, 'detector')
    assert ended.value.code == 2
    assert 'CascadeRCNN is neither a classifier nor a segmentor: export its backbone' in capsys.readouterr().err
    options = ['--part', 'backbone', '--shape', '70', '90', '--batch-size', '2']
    model, file = export(tool, tmp_path, 'detector', *options, placement='none')
    session = onnxruntime.InferenceSession(str(file))
    assert session.get_inputs()[0].shape == [2, 3, 70, 90]
    image = (torch.rand(2, 3, 70, 90) * 255).round()
    with torch.no_grad():
        expected = model.backbone(normalised(model, image)[:, :, :70, :90])
    assert [x.name for x in session.get_outputs()] == ['stage0', 'stage1', 'stage2', 'stage3']
    for found, feature in zip(session.run(None, {'image': image.numpy()}), expected):
        torch.testing.assert_close(torch.from_numpy(found), feature, rtol=0, atol=1e-4)


def test_a_graph_that_differs_is_not_written(tool, tmp_path, capsys, monkeypatch):
    """mmseg's upsampling bakes the traced size into the graph, which then is right at that size alone."""
    monkeypatch.setattr(tool, '_replace', lambda model: None)
    with pytest.raises(SystemExit) as ended:
        export(tool, tmp_path, 'segmentor', '--dynamic', placement='none')
    assert ended.value.code == 2
    assert 'the graph computes something else than the model' in capsys.readouterr().err
    assert not list(tmp_path.glob('*.onnx*'))


@pytest.mark.parametrize('options, message', [
    (['--out', 'x.pt'], 'must be a file that ends with .onnx'),
    (['--out', 'nowhere/x.onnx'], 'in a folder that exists'),
    (['--out', 'x.onnx', '--dynamic', '--shape', '64', '64'], 'leave them or --dynamic out'),
    (['--out', 'x.onnx', '--shape', '16', '64'], 'at least 32 x 32'),
    (['--out', 'x.onnx', '--batch-size', '0'], 'at least 1'),
    (['--out', 'x.onnx', '--check-shapes', '64x64'], '--check-shapes goes with --dynamic'),
    (['--out', 'x.onnx', '--dynamic', '--no-check', '--check-shapes', '64x64'], 'and not with --no-check'),
    (['--out', 'x.onnx', '--dynamic', '--check-shapes', '64'], "such as 3x224x224, got '64'"),
    (['--out', 'x.onnx', '--dynamic', '--check-shapes', '0x64x64'], "got '0x64x64'"),
    (['--out', 'x.onnx', '--dynamic', '--check-shapes', '64x31'], "at least 32 x 32, such as 3x224x224, got '64x31'")])
def test_arguments(tool, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        tool.parse_args(['config.py', *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


class Rounding(nn.Module):
    """The image times two, with rounding errors of about 1 in float32 where it is wider than 64."""

    def forward(self, image):
        offset = 2.0**25 if image.size(3) > 64 else 0.0
        return (image * 2 + offset - offset,)


def graph(file: Path, factor: float) -> Path:
    """A file that multiplies images by a factor."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, ['N', 3, 'H', 'W']) for name in ('image', 'out')]
    node = helper.make_node('Mul', ['image', 'factor'], ['out'])
    weights = [helper.make_tensor('factor', kind, [], [factor])]
    model = helper.make_model(helper.make_graph([node], 'scaled', ends[:1], ends[1:], weights),
                              opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    onnx.save(model, str(file))
    return file


class TestCheck:
    """Of a model that multiplies rounding errors at some sizes, as a memory can over many chunks."""

    def test_says_where_it_cannot_compare(self, tool, tmp_path, capsys):
        tool.check(Rounding(), graph(tmp_path / 'x.onnx', 2), [(1, 64, 64), (2, 64, 96)])
        first, second, third = capsys.readouterr().out.splitlines()
        assert first == '1 x 64 x 64: largest error 0.0e+00 at values of up to 510.0'
        assert second.startswith('2 x 64 x 96: ') and '; of PyTorch in float32 from float64 2.0e+00' in second
        assert third.startswith('  cannot be compared')

    @pytest.mark.parametrize('factor', [2, 2.005])
    def test_takes_no_model_that_can_be_compared_nowhere(self, tool, tmp_path, factor):
        """A graph may be somewhat farther from float64 than PyTorch in float32 is."""
        with pytest.raises(tool.UncheckedGraphError, match='^no size could be compared'):
            tool.check(Rounding(), graph(tmp_path / 'x.onnx', factor), [(1, 64, 96)])

    @pytest.mark.parametrize('factor, sizes', [
        (2.001, [(1, 64, 64)]), (2.2, [(1, 64, 96)]), (float('nan'), [(1, 64, 64)]), (float('nan'), [(1, 64, 96)])])
    def test_finds_what_rounding_does_not_explain(self, tool, tmp_path, factor, sizes):
        with pytest.raises(tool.UncheckedGraphError, match='^the graph computes something else than the model'):
            tool.check(Rounding(), graph(tmp_path / 'x.onnx', factor), sizes)

    def test_errors_are_of_each_output(self, tool):
        x = torch.ones(2)
        assert tool._errors([x * 1e6, x + 1e-3], [x * 1e6, x]) == [(0.0, 1e6), (pytest.approx(1e-3, 1e-3), 1.0)]
        assert tool._errors([x], [torch.ones(3)]) == [(float('inf'), 1.0)]


class Tokens(nn.Module):
    """A memory by itself, whose writes change much of what is read."""

    names = 'tokens',

    def __init__(self, **options) -> None:
        super().__init__()
        self.memory = separated(NeuralMemory(16, **options))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.memory(image.flatten(2).mT)


@pytest.mark.slow
@pytest.mark.parametrize('options', [dict(num_chunks=3), dict(chunk_size=20, retrieve='final')])
def test_chunks_follow_the_image(tool, tmp_path, options):
    """Also where their length does: rounded to one token less, there would be a fourth one."""
    model, file = Tokens(**options).eval(), tmp_path / 'model.onnx'
    tool.export(model, torch.randn(3, 16, 8, 12), dynamic=True).save(file)
    session = onnxruntime.InferenceSession(str(file))
    for size in ((1, 5, 8), (2, 7, 7), (3, 10, 25)):  # 40, 49 and 250 tokens: the last of three chunks is shorter
        image = torch.randn(size[0], 16, *size[1:])
        with torch.no_grad():
            expected = model(image)
        found = torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('options', [
    dict(chunk_size=36), dict(chunk_size=196), dict(chunk_size=4096), dict(num_chunks=16)])
def test_traced_with_several_chunks_of_several_tokens_everywhere(tool, options):
    _, height, width = tool.traced_shape(nn.Sequential(NeuralMemory(16, **options)))
    last = (height // 32) * (width // 32)
    length = NeuralMemory(16, **options).tokens_per_chunk(last)
    assert length > 1 and last > length


@pytest.mark.parametrize('size', [(7, 9), (12, 6), (1, 5), (3, 4)])
def test_pooling(tool, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for bins in ((1, 1), (2, 3), (6, 6)):
        torch.testing.assert_close(tool._Pool(bins)(x), nn.AdaptiveAvgPool2d(bins)(x), rtol=0, atol=1e-12)
