"""experiments/small_ablation.py: its tasks say what they mean to, and a stopped ablation goes on where it was."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def tasks(script):
    return script('_small_tasks')


@pytest.fixture
def ablation(script, monkeypatch, tmp_path_factory):
    """The tool, its tasks made small: two iterations each at budget factor 1."""
    small_ablation = script('small_ablation')
    camvid = tmp_path_factory.mktemp('camvid')
    for folder in ('train', 'trainannot', 'val', 'valannot'):
        (camvid / folder).mkdir()
        for name in 'ab':
            Image.new('L', (64, 64), 1).save(camvid / folder / f'{name}.png')
    shrunk = dict(
        recall=dict(iterations=2, batch=2, side=4, channels=16, chunk_size=4),
        legend=dict(iterations=2, batch=2, channels=16, mem_channels=16),
        shapes=dict(iterations=2, batch=2, num_train=4, num_val=6, depths=(1, 1), channels=(8, 16), mem_channels=16))
    shrunk['hidden object'] = dict(iterations=2, batch=2, side=2, boxes=2, channels=8, mem_channels=16, chunk_size=8,
                                   long=4)
    shrunk['camvid'] = dict(iterations=2, batch=2, width=64, height=64, neck_channels=8, folder=str(camvid))
    assert set(shrunk) == set(small_ablation.TASKS)
    for name, fields in shrunk.items():
        monkeypatch.setitem(small_ablation.TASKS, name, replace(small_ablation.TASKS[name], **fields))
    threads = torch.get_num_threads()
    yield small_ablation
    torch.set_num_threads(threads)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- recall


def test_recall_labels(tasks):
    task = tasks.Recall()
    (keys, shown), labels = task.draw(8, generator())
    half = task.side**2 // 2
    assert (shown[:, half:] == task.values).all() and (labels[:, :half] == tasks.IGNORED).all()
    found = 0
    for i in range(8):
        table = {}
        for key, value in zip(keys[i, :half].tolist(), shown[i, :half].tolist()):
            assert table.setdefault(key, value) == value  # one value for a key
        for key, label in zip(keys[i, half:].tolist(), labels[i, half:].tolist()):
            if key in table:
                assert label == table[key]
                found += 1
    assert found > 0.95 * 8 * half
    assert len({tuple(row) for row in shown.tolist()}) == 8


# ---- legend


def cells_of(task, images):
    """Pixels between 0 and 1: (B, rows, columns, 4, 4, 3)."""
    from _small_tasks import PIXEL_MEAN, PIXEL_STD
    pixels = images * PIXEL_STD + PIXEL_MEAN
    return pixels.unflatten(3, (task.side, 4)).unflatten(2, (task.side, 4)).permute(0, 2, 4, 3, 5, 1)


def test_legend_labels(tasks):
    """Read off the pictures without noise: pattern → colour in the legend, then every query looked up."""
    task = replace(tasks.Legend(), noise=0.0)
    images, labels, at_top = task.pictures(16, generator())
    cells = cells_of(task, images)
    assert at_top.any() and not at_top.all()
    colours = torch.tensor(tasks.LEGEND_COLOURS)
    for picture, of_picture, top in zip(cells, labels, at_top):
        if not top:
            picture, of_picture = picture.flip(0), of_picture.flip(0)
        legend = {}
        for cell in picture[:task.band].flatten(0, 1):
            pattern = cell.amax(-1) > 0.5
            rgb = cell[pattern][0]
            colour = (colours - rgb).abs().sum(1).argmin().item()
            assert torch.allclose(rgb, colours[colour], atol=1e-6)
            assert legend.setdefault(tuple(pattern.flatten().tolist()), colour) == colour
        assert len(legend) == task.pairs
        for cell, label in zip(picture[-task.band:].flatten(0, 1), of_picture[-task.band:].flatten()):
            assert torch.allclose(cell, cell.round(), atol=1e-6)
            assert torch.equal(cell[..., 0], cell[..., 1]) and torch.equal(cell[..., 0], cell[..., 2])  # white
            assert legend[tuple((cell[..., 0] > 0.5).flatten().tolist())] == label
        assert (of_picture[:-task.band] == tasks.IGNORED).all()
        assert picture[task.band:-task.band].abs().max() < 1e-6


@pytest.mark.parametrize('at_top', [True, False])
def test_legend_out_of_local_sight(tasks, at_top):
    """The built backbone sees no pixel of the legend from any query, but through the memory."""
    task = tasks.Legend()
    torch.manual_seed(0)
    g = generator()
    images, labels, top = task.pictures(32, g)
    images, labels = images[top == at_top][:2].double(), labels[top == at_top][:2]

    def gradient(**options):
        model = task.build(**options).double()
        for module in model.modules():
            # GRN sums over the picture; without gamma it is the identity, which leaves what the convolutions see.
            if hasattr(module, 'gamma'):
                assert not module.gamma.any()
        pixels = images.clone().requires_grad_()
        logits = model(pixels).permute(0, 2, 3, 1)[labels != tasks.IGNORED]
        logits.square().sum().backward()
        rows = pixels.grad.abs().amax((0, 1, 3))
        return rows[:4 * task.band] if at_top else rows[-4 * task.band:]

    assert (gradient(placement='none') == 0).all()
    assert (gradient(memory_cfg=dict(retrieve='final')) > 0).all()


# ---- shapes


def test_shapes_measures_validation(tasks):
    """A model that knows the pictures of validation, and no others."""
    task = replace(tasks.Shapes(), num_train=12, num_val=12)
    images, labels = tasks.shapes_pictures('val', 12, 64)
    assert not any(torch.equal(a, b) for a in tasks.shapes_pictures('train', 12, 64)[0] for b in images)
    answers = {image.numpy().tobytes(): label for image, label in zip(images, labels)}

    class Known(torch.nn.Module):

        def forward(self, x):
            pixels = ((x * 0.25 + 0.5) * 255).round().to(torch.uint8)
            return torch.nn.functional.one_hot(torch.stack([answers[image.numpy().tobytes()] for image in pixels]), 6)

    assert task.measure(Known(), generator()) == dict(accuracy=1.0)


# ---- training and the tool


def test_train_repeats(tasks):
    """The same seed gives the same weights, another one others."""
    task = replace(tasks.Legend(), batch=4, band=1, side=8, channels=16, mem_channels=16)
    losses = []
    options = dict(placement='none')
    first = tasks.train(task, options, 0, 3, report=lambda iteration, loss: losses.append((iteration, loss)))
    again, other = tasks.train(task, options, 0, 3), tasks.train(task, options, 1, 3)
    assert [iteration for iteration, _ in losses] == [1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values()))
    assert not first.training


def test_every_variant_builds(ablation):
    """On every task, with the options that its name says."""
    for key, task in ablation.TASKS.items():
        for name, options in ablation.variants_of(key).items():
            inputs, labels = task.draw(2, generator())
            logits = task.build(**options)(*inputs)
            assert logits.shape[2:] == labels.shape[1:] and len(logits) == 2, name
            assert labels.dtype == torch.int64
    built = {name: ablation.TASKS['legend'].build(**options).backbone.stages[0][0]
             for name, options in ablation.VARIANTS.items()}
    assert built['none'].global_branch is None
    assert built['previous'].global_branch.memory.retrieve == 'previous'
    assert built['final, parallel'].global_branch.memory.retrieve == 'final'
    assert built['final, parallel'].global_branch.memory.update_rule == 'parallel'
    assert built['final, add'].fusion == 'add' and built['final'].fusion == 'gate'


def test_tiles_are_the_chunks(tasks):
    """Under 'previous' a token sees itself and the chunks before its own: tiles, or rows."""
    x = torch.randn(1, 16, 4, 4)
    other = x.clone()
    other[..., 2:, :2] = torch.randn(1, 16, 2, 2)  # the third of four tiles

    def changed(tile):
        torch.manual_seed(0)
        task = replace(tasks.Legend(), channels=16, mem_channels=16)
        branch = task.build(tile=tile, memory_cfg=dict(chunk_size=4)).backbone.stages[0][0].global_branch
        return (branch(x) != branch(other)).any(1)[0].int().tolist()

    assert changed(2) == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert changed(None) == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


class TestInnerVariants:

    @pytest.fixture
    def legend(self, tasks):
        return replace(tasks.Legend(), channels=16, mem_channels=32, chunk_size=60)  # 256 tokens: the last chunk has 16

    def outputs(self, legend, x, retrieve='final', **inner):
        torch.manual_seed(0)
        model = legend.build(memory_cfg=dict(retrieve=retrieve, inner_step=1.0), **inner).double()
        for name, weight in model.named_parameters():
            if name.endswith(('query.weight', 'key.weight', 'value.weight')):
                torch.nn.init.normal_(weight, std=0.3)
        return model(x)

    @pytest.mark.parametrize('retrieve', ['previous', 'final'])
    def test_without_options_equals_the_memory(self, legend, retrieve):
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        expected = self.outputs(legend, x, retrieve)
        torch.testing.assert_close(self.outputs(legend, x, retrieve, inner={}), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize('inner', [dict(direction=-1.0), dict(loss='dot'), dict(last_layer=True),
                                       dict(query_is_key=True), dict(reset_every=2), dict(linear_attention=True)])
    def test_each_option_changes_the_output(self, legend, inner):
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        assert (self.outputs(legend, x, inner=inner) - self.outputs(legend, x)).abs().max() > 1e-7

    def test_gradients_of_the_inner_losses(self, script):
        variants = script('_inner_variants')
        torch.manual_seed(0)
        k, v = torch.randn(2, 3, 16, 5, dtype=torch.float64)
        memory = variants.NeuralMemory(16).double()
        rows = torch.randn(3, 16, 16, dtype=torch.float64, requires_grad=True)
        recalled = k + rows[:, 8:].mT @ torch.nn.functional.gelu(rows[:, :8] @ k)
        for loss, value in (('squared', (recalled - v).square().sum() / 16), ('dot', -2 * (recalled * v).sum() / 16)):
            expected, = torch.autograd.grad(value, rows, retain_graph=True)
            gradient, _ = variants.InnerVariant(memory, loss=loss).surprise(k, v, rows)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
            ascent, _ = variants.InnerVariant(memory, -1.0, loss).surprise(k, v, rows)
            torch.testing.assert_close(ascent, -expected, rtol=0, atol=1e-12)
            last, _ = variants.InnerVariant(memory, loss=loss, last_layer=True).surprise(k, v, rows)
            assert not last[:, :8].any() and torch.equal(last[:, 8:], gradient[:, 8:])

    def test_resets_forget_the_chunks_before(self, legend):
        """Under 'previous' the third chunk of 60 tokens reads M_0 again, whatever stands in the first two."""
        torch.manual_seed(0)
        branch = legend.build(inner=dict(reset_every=2)).backbone.stages[0][0].global_branch
        x = torch.randn(1, 16, 16, 16)
        other = x.clone()
        other[:, :, :4] = torch.randn(1, 16, 4, 16)  # 64 tokens: the first chunk, and 4 tokens of the second
        changed = (branch(x) != branch(other)).any(1).flatten()
        assert changed[60:120].all() and not changed[120:].any()


def test_mean_iou(tasks):
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, -1, -1]])
    predicted = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 2]])
    # Class 0: one of three; class 1: two of three; class 2: one of two; class 3 is nowhere.
    assert tasks.mean_iou(predicted, labels, 4) == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize('layout', [0, 1])
def test_street_photos_of_both_layouts(tasks, tmp_path, layout):
    """Pictures and maps of other sizes are resized, and labels without a class are not asked."""
    for pictures, maps in tasks.CAMVID_LAYOUTS[layout]:
        for folder in (pictures, maps):
            (tmp_path / folder).mkdir(parents=True)
        Image.new('RGB', (48, 36), (255, 0, 0)).save(tmp_path / pictures / 'a.png')
        Image.fromarray(np.repeat(np.array([[0] * 16 + [11] * 16 + [255] * 16], np.uint8), 36, 0)).save(
            tmp_path / maps / 'a.png')
    images, labels = tasks.street_photos(str(tmp_path), 1, 24, 12)
    assert images.shape == (1, 3, 12, 24) and (images[0, 0] == 255).all() and not images[0, 1:].any()
    assert labels[0, 5].tolist() == [0] * 8 + [-1] * 16
    (tmp_path / maps / 'a.png').unlink()
    tasks.street_photos.cache_clear()
    with pytest.raises(ValueError, match='a.png has no label map'):
        tasks.street_photos(str(tmp_path), 1, 24, 12)
    with pytest.raises(ValueError, match='nowhere is not a folder of CamVid'):
        tasks.street_photos('nowhere', 0, 24, 12)


def test_goes_on_where_it_stopped(ablation, tmp_path, capsys, monkeypatch):
    command = ['--variants', 'none', 'final', '--seeds', '2', '--out-dir', str(tmp_path / 'runs')]
    executed, execute = [], ablation.execute

    def stop_after_five(*call):
        if len(executed) == 5:
            raise KeyboardInterrupt
        executed.append(call[0])
        return execute(*call)

    monkeypatch.setattr(ablation, 'execute', stop_after_five)
    with pytest.raises(SystemExit, match='the same command goes on from here'):
        ablation.main(command)
    before = {path: path.read_text() for path in (tmp_path / 'runs').iterdir()}
    assert len(before) == 5

    monkeypatch.setattr(ablation, 'execute', lambda *call: executed.append(call[0]) or execute(*call))
    ablation.main([*command, '--plot', str(tmp_path / 'plot.png')])  # reports what is there
    assert len(executed) == 5 and (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
    ablation.main(command)
    assert len(executed) == len(set(executed)) == 12
    assert all(path.read_text() == text for path, text in before.items())
    out = capsys.readouterr().out
    for task in ablation.DEFAULT_TASKS:
        assert f'\n{task}: 2 iterations' in out
    result = json.loads((tmp_path / 'runs' / 'legend-final-x1-seed1.json').read_text())
    assert result['settings']['options'] == dict(memory_cfg=dict(retrieve='final'))
    assert result['settings']['iterations'] == 2 and result['seed'] == 1
    assert set(result['figures']) == {'accuracy', 'legend_at_top', 'legend_at_bottom'}


def test_a_carried_state_is_measured(ablation, tmp_path):
    ablation.main(['--tasks', 'hidden object', '--seeds', '1', '--out-dir', str(tmp_path)])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ['hidden-object-carried-state-x1-seed0.json', 'hidden-object-without-state-x1-seed0.json']
    assert set(json.loads((tmp_path / files[0]).read_text())['figures']) == {
        'accuracy', 'hidden_for_30_frames', 'state_thrown_away', 'open_boxes'}


def test_other_process_equals_this_one(ablation, tmp_path):
    """A process started for the run trains what this one would, on this one's tasks."""
    command = ['--tasks', 'recall', '--variants', 'final', '--seeds', '1', '--out-dir']
    ablation.main([*command, str(tmp_path / 'this')])
    ablation.main([*command, str(tmp_path / 'other'), '--jobs', '2'])
    this, other = (json.loads((tmp_path / name / 'recall-final-x1-seed0.json').read_text())
                   for name in ('this', 'other'))
    assert (this['settings'], this['figures']) == (other['settings'], other['figures'])
    assert this['settings']['task']['side'] == 4


def result(ablation, folder, variant, seed, accuracy, factor=1.0, **changes):
    run = ablation.Run('recall', variant, factor, seed)
    folder.mkdir(exist_ok=True)
    run.path(folder).write_text(json.dumps(dict(
        task='recall', variant=variant, budget_factor=factor, seed=seed, settings=run.settings,
        figures=dict(accuracy=accuracy), seconds=3.0, parameters=1234, versions={}) | changes))
    return run.path(folder)


def test_table(ablation, tmp_path, capsys):
    for seed, accuracy in enumerate((0.99, 0.97, 0.5)):
        result(ablation, tmp_path, 'final', seed, accuracy)
    result(ablation, tmp_path, 'none', 0, 0.125)
    result(ablation, tmp_path, 'none', 0, 0.25, factor=3.0)
    ablation.main(['--table', '--out-dir', str(tmp_path)])
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in capsys.readouterr().out.splitlines()
            if line.startswith('|')]
    assert rows[0] == ['', 'solved', 'accuracy', 'least', 'most', 'parameters', 'CPU s']
    assert rows[2] == ['none', '0 of 1', '0.12', '0.12', '0.12', '1,234', '3']
    assert rows[3][:3] == ['none, 3 x the budget', '0 of 1', '0.25']
    assert rows[4] == ['final', '2 of 3', '0.82 ± 0.28', '0.50', '0.99', '1,234', '3']


@pytest.mark.parametrize('command', [[], ['--table']])
def test_files_that_do_not_fit_are_refused(ablation, tmp_path, command, refused):
    command = [*command, '--tasks', 'recall', '--variants', 'none', '--out-dir', str(tmp_path)]
    path = result(ablation, tmp_path, 'none', 0, 0.5, settings=dict(iterations=7))
    with refused(f'{path.name} was made with other settings'):
        ablation.main(command)
    path.write_text('{"task": ')
    with refused(f'{path.name} is not the result of a run'):
        ablation.main(command)


def test_table_without_results(ablation, tmp_path, refused):
    with refused('holds no results'):
        ablation.main(['--table', '--out-dir', str(tmp_path)])
    with refused('is not a folder'):
        ablation.main(['--table', '--out-dir', str(tmp_path / 'none')])
