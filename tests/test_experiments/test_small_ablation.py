"""experiments/small_ablation.py: its tasks say what they mean to, and a stopped ablation goes on where it was."""
import json
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def tasks(script):
    return script('_small_tasks')


@pytest.fixture
def ablation(script, monkeypatch):
    """The tool, its tasks made small: two iterations each at budget factor 1."""
    small_ablation = script('small_ablation')
    shrunk = dict(
        recall=dict(iterations=2, batch=2, side=4, channels=16, chunk_size=4),
        legend=dict(iterations=2, batch=2, channels=16, mem_channels=16),
        shapes=dict(iterations=2, batch=2, num_train=4, num_val=6, depths=(1, 1), channels=(8, 16), mem_channels=16))
    shrunk['hidden object'] = dict(iterations=2, batch=2, side=2, boxes=2, channels=8, mem_channels=16, chunk_size=8,
                                   long=4)
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
