"""tools/analysis/scaling.py: bytes by hand, the formula, and a measurement in real processes."""
import json
import re
import subprocess
from pathlib import Path

import pytest
from torch import nn
from warm_python import warm_python

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(script):
    return script('scaling')


def test_what_a_step_sends(tool):
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 8192, bias=False), nn.Linear(8, 1))
    found = tool.volume(model)
    assert found.parameters == 1024 * 1024 + 1024 * 8192 + 8 + 1
    assert found.nbytes == 4 * found.parameters
    # A bucket is closed when it is full: the first above 1 MiB, the next above 25 MiB.
    assert found.buckets == [4 * (9 + 1024 * 8192), 4 * 1024 * 1024]
    model[1].requires_grad_(False)
    assert tool.volume(model).nbytes == 4 * (1024 * 1024 + 9)


@pytest.mark.parametrize('bandwidth, hidden, exposed', [
    # A step of 0.3 s, 0.2 of which are the backward pass; all-reduces of 0.1, 0.2 and 0.4 s.
    (10e9, 1.0, 0.75), (5e9, 1.0, 0.6), (2.5e9, 0.6, 3 / 7)])
def test_efficiency(tool, bandwidth, hidden, exposed):
    assert tool.efficiency(0.3, 10 ** 9, bandwidth, 2) == pytest.approx((hidden, exposed))
    # Four processes send 1.5 times as much as two, one process sends nothing.
    assert tool.efficiency(0.3, 10 ** 9, 1.5 * bandwidth, 4) == pytest.approx((hidden, exposed))
    assert tool.efficiency(0.3, 10 ** 9, bandwidth, 1) == (1, 1)


def test_the_table_beside_processes(tmp_path):
    done = subprocess.run(
        [warm_python(), ROOT / 'tools' / 'analysis' / 'scaling.py', 'convneur_m1_shapes', '--step-time', '0.1',
         '--bandwidth', '0.1', '--processes', '1', '2', '--measure', '--size', '32', '--batch', '1', '--repeats', '2',
         '--json', tmp_path / 'scaling.json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / 'scaling.json').read_text())
    # Of the classifier in the paper, without 994 of its 1000 classes.
    assert found['parameters'] == pytest.approx(4.3e6 - 994 * 321, rel=0.01)
    assert sum(found['buckets']) == found['nbytes'] == 4 * found['parameters']
    seconds = found['nbytes'] / 1e8
    assert found['expected']['2']['exposed'] == pytest.approx(0.1 / (0.1 + seconds))
    for times in found['measured'].values():
        assert times['predicted'] == pytest.approx(times['alone'] + times['reduce']) and min(times.values()) > 0
    # Nothing is sent to nobody.
    assert found['measured']['1']['reduce'] < 0.1 * found['measured']['2']['reduce']
    assert len(re.findall(r'^\| 2 +\|', done.stdout, re.MULTILINE)) == 2 and 'bound by' in done.stdout
