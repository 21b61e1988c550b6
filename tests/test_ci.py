"""CI does the same wherever it runs, and looks for known weaknesses in the pinned packages."""
import os
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_known_weaknesses_are_left_out_and_others_are_not(tmp_path):
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'audit.yml').read_text())
    job = workflow['jobs']['audit']
    command = job['steps'][-1]['run']
    tool = tmp_path / 'pip-audit'
    tool.write_text('#!/bin/sh\necho "$@"\n')
    tool.chmod(0o755)
    words = subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True, text=True,
                           env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}).stdout.split()
    assert (ROOT / words[words.index('-r') + 1]).name == 'versions.lock'
    known = [word for before, word in zip(words, words[1:], strict=False) if before == '--ignore-vuln']
    assert 'CVE-2024-12044' in known
    assert all(word.split('-')[0] in ('CVE', 'GHSA', 'PYSEC') for word in known)


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())
    job = workflow['jobs']['tests']
    commands = [step['run'] for step in job['steps'] if 'run' in step]
    assert commands[0] == '${{ matrix.tests }}' and 'dev/check_docs.py' in commands[1]
    runs = job['strategy']['matrix']['include']
    assert [run['tests'] for run in runs].count('.ci/run') == 2
    script = ROOT / '.ci' / 'run'
    assert 'tools/run_tests.sh' in script.read_text() and os.access(script, os.X_OK)
    assert (ROOT / 'dev' / 'check_docs.py').exists()
