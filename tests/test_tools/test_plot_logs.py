"""tools/analysis/plot_logs.py: which points it draws, where, and what it says of logs that it cannot."""
import json

import pytest
from matplotlib import pyplot as plt
from matplotlib.image import imread

from convneur_mm.analysis.logs import read_training


@pytest.fixture
def tool(script):
    return script('plot_logs')


@pytest.fixture
def figure(tool, monkeypatch):
    """The last figure, which the tool closes."""
    kept = []
    monkeypatch.setattr(plt, 'close', kept.append)
    yield lambda: kept[-1]
    monkeypatch.undo()
    for each in kept:
        plt.close(each)


def write(work_dir, *scalars, run='20260101_000000'):
    path = work_dir / run / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in scalars))
    return work_dir


def train(step, loss, **others):
    return dict(loss=loss, lr=0.1 / step, iter=step, step=step, epoch=1, **others)


def curves(figure):
    """Title → label → points; the legend's labels belong to the colours in their order."""
    return {axis.get_title(): [list(zip(*line.get_data())) for line in axis.lines] for axis in figure.axes}


def test_a_curve_for_each_training_in_a_plot_for_each_key(tool, figure, tmp_path, capsys):
    a = write(tmp_path / 'a', train(10, 4.0), train(20, 2.0), {'coco/bbox_mAP': 0.3, 'mIoU': 40.0, 'step': 1})
    b = write(tmp_path / 'b', train(10, 5.0), train(20, 3.0))
    tool.main([str(a), str(b), '--out', str(tmp_path / 'c.png')])
    drawn = curves(figure())
    assert list(drawn) == ['loss', 'coco/bbox_mAP', 'mIoU', 'lr']
    assert drawn['loss'] == [[(10, 4.0), (20, 2.0)], [(10, 5.0), (20, 3.0)]]
    assert drawn['coco/bbox_mAP'] == [[(1, 0.3)]]
    assert [text.get_text() for text in figure().legends[0].get_texts()] == ['a', 'b']
    assert imread(tmp_path / 'c.png').ndim == 3
    assert 'loss, coco/bbox_mAP, mIoU, lr' in capsys.readouterr().out


def test_chosen_keys_labels_and_smoothing(tool, figure, tmp_path):
    a = write(tmp_path / 'a', *(train(i, float(i), s0_loss_cls=1.0, acc=50.0) for i in (1, 2, 3, 4)))
    tool.main([str(a), '--keys', '*loss*', '--labels', 'mine', '--smooth', '2', '--out', str(tmp_path / 'c.png')])
    drawn = curves(figure())
    assert sorted(drawn) == ['loss', 's0_loss_cls']
    assert drawn['loss'] == [[(1, 1.0), (2, 1.5), (3, 2.5), (4, 3.5)]]
    assert figure().legends[0].get_texts()[0].get_text() == 'mine'


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    work_dir = write(tmp_path / 'a', train(1, 1.0), train(2, 2.0), train(3, 3.0))
    write(work_dir, train(2, 20.0), train(3, 30.0), train(4, 40.0), run='20260102_000000')
    assert read_training(work_dir)['loss'] == ([1, 2, 3, 4], [1.0, 20.0, 30.0, 40.0])


@pytest.mark.parametrize(('args', 'message'), [
    (['{}/none'], 'none: nothing is logged there; expected a work dir'),
    (['{}/empty_log'], 'empty_log: nothing is logged there'),
    (['{}/broken'], "scalars.json, line 2: expected a JSON object with a step, got 'loss 3'"),
    (['{}/good', '--keys', 'loss', 'accuracy*'], r'--keys accuracy\*: no such key in the logs, which have: loss, lr'),
    (['{}/good', '--labels', 'a', 'b'], '--labels must be one for each of the 1 work dirs, got 2'),
    (['{}/good', '{}/good'], 'every curve needs a label of its own'),
    (['{}/good', '--out', 'c.txt'], r'--out must be a \.png'),
])
def test_what_cannot_be_drawn(tool, args, message, tmp_path):
    write(tmp_path / 'empty_log')
    write(tmp_path / 'good', train(1, 1.0))
    broken = write(tmp_path / 'broken') / '20260101_000000/vis_data/scalars.json'
    broken.write_text('{"loss": 1, "step": 1}\nloss 3\n')
    with pytest.raises(ValueError, match=message):
        tool.main(['--out', str(tmp_path / 'c.png'), *(arg.format(tmp_path) for arg in args)])
    assert not (tmp_path / 'c.png').exists()
