"""The quick start's way to run the other tools."""
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location('quickstart', ROOT / 'tools' / 'quickstart.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_launchers_get_the_interpreter_that_runs_it(quickstart, tmp_path, monkeypatch):
    """Another one that has PyTorch, named by PYTHON or by an active environment, may lack what this one has."""
    monkeypatch.setenv('PYTHON', '/usr/bin/python3')
    (tmp_path / 'launcher').write_text('#!/bin/sh\necho "$PYTHON"\n')
    (tmp_path / 'launcher').chmod(0o755)
    quickstart.run([tmp_path / 'launcher'], tmp_path / 'log')
    assert (tmp_path / 'log').read_text() == f'{sys.executable}\n'


def test_a_step_that_fails_ends_it_with_what_it_said(quickstart, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        quickstart.run([sys.executable, '-c', 'import sys; print("Epoch(train)  [1][2/3]  loss: 4.5  lr: 1"); '
                        'sys.exit("no such data")'], tmp_path / 'log')
    assert 'no such data' in str(error.value) and str(tmp_path / 'log') in str(error.value)
    assert '    train [1][2/3]  loss: 4.5\n' in capsys.readouterr().out
