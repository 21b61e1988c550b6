"""experiments/precision.py: both trainings are the same but for the precision."""
import math

import pytest


@pytest.fixture(scope='module')
def tool(script):
    return script('precision')


@pytest.mark.slow
def test_table(tool, capsys, monkeypatch):
    """Of short trainings: the losses of bfloat16 are close to those of float32, and not the same."""
    kept, train, tasks = {}, tool.losses_of, ['detection', 'classification']

    def losses_of(cfg, precision, work_dir):
        kept[cfg.default_scope, precision] = train(cfg, precision, work_dir)
        return kept[cfg.default_scope, precision]

    monkeypatch.setattr(tool, 'losses_of', losses_of)
    tool.main(['--iterations', '2', '--window', '1', '--tasks', *tasks])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')][2:]
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert [row[:2] for row in rows] == [[task, '0'] for task in tasks]
    assert all(row[5] == '0' for row in rows)
    for scope in ('mmdet', 'mmpretrain'):
        exact, rounded = kept[scope, 'float32'], kept[scope, 'bfloat16']
        assert len(exact) == len(rounded) == 2
        assert exact != rounded
        assert exact == pytest.approx(rounded, rel=0.02)


def test_rows(tool):
    losses = dict(float32=[9.0, 2.0, 2.0], bfloat16=[9.0, 2.0, 2.2])
    assert tool.row('detection', 1, losses, 2) == ('detection', '1', '2.0000', '2.1000', '+5.00 %', '0')
    losses['bfloat16'][0] = math.nan
    assert tool.row('detection', 1, losses, 2)[-1] == '1'
