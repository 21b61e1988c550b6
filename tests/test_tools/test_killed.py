"""tools/train.py, killed at random moments and resumed, in the three tasks."""
import json
import subprocess
from pathlib import Path

import pytest
from warm_python import warm_python

SCRIPT = Path(__file__).parents[1] / 'helpers' / 'killed_runs.py'


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    """Of a training of each task, killed while a checkpoint is written."""
    folder = tmp_path_factory.mktemp('killed') / 'runs'
    done = subprocess.run([warm_python(), SCRIPT, folder, '--kills', '1'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {record['task']: record for record in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize('task', ['detector', 'segmentor', 'classifier'])
def test_ends_with_the_weights_of_one_that_was_not_killed(records, task):
    """Bit by bit, those of the optimizer too; and nothing is left of files that were not complete."""
    record = records[task]
    assert len(record['killed']) == len(record['resumed']) == 1
    assert record['differing'] == [] and record['same_names'] and record['tensors'] > 100
    assert record['left'] == []
