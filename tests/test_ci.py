"""CI does the same wherever it runs: what .ci/run does."""
import os
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())
    job = workflow['jobs']['tests']
    commands = [step['run'] for step in job['steps'] if 'run' in step]
    assert commands[0] == '${{ matrix.tests }}' and 'tools/check_docs.py' in commands[1]
    runs = job['strategy']['matrix']['include']
    assert [run['tests'] for run in runs] == ['.ci/run', '.ci/run', 'tools/run_tests.sh --cov']
    assert {run['python'] for run in runs} <= {'3.10', '3.11', '3.12', '3.13'}
    script = ROOT / '.ci' / 'run'
    assert 'tools/run_tests.sh' in script.read_text() and os.access(script, os.X_OK)
    assert (ROOT / 'tools' / 'check_docs.py').exists()
