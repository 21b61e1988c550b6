"""A short run of helpers/long_runs.py: memory does not grow with the calls, no data worker outlives its training."""
import json
import subprocess
from pathlib import Path

import pytest
from warm_python import warm_python

SCRIPT = Path(__file__).parents[1] / 'helpers' / 'long_runs.py'


@pytest.mark.slow
def test_nothing_piles_up(tmp_path):
    done = subprocess.run([warm_python(), SCRIPT, tmp_path / 'run', '--tasks', 'segmentor', '--iterations', '24',
                           '--calls', '120'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    trained, predicted = json.loads(done.stdout.splitlines()[-1])
    assert trained['left'] == 0 and len(trained['main']) == 24
    # A prediction takes 0.3 MB: of 60 calls that were kept, 18 would be left.
    assert len(predicted['main']) == 40 and predicted['growth'] < 6
