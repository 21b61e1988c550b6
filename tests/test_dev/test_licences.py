"""dev/licences.py: the table is that of this environment, and what differs is said."""
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'dev' / 'licences.py'


@pytest.fixture
def tool():
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


def run(monkeypatch, page, *args):
    """The exit status of the tool, on another page."""
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *args])
    monkeypatch.setattr(Path, 'resolve', lambda self: page.parents[1] / 'dev' / 'licences.py')
    try:
        runpy.run_path(str(TOOL), run_name='__main__')
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture
def page(tmp_path):
    (tmp_path / 'requirements').symlink_to(ROOT / 'requirements')
    (tmp_path / 'docs').mkdir()
    page = tmp_path / 'docs' / 'dependencies.md'
    page.write_text((ROOT / 'docs' / 'dependencies.md').read_text())
    return page


primary = pytest.mark.skipif(Path(sys.prefix) != ROOT / '.venv', reason='another environment than the primary one')


@primary
def test_the_page_has_the_licences_of_this_environment(monkeypatch, page):
    assert run(monkeypatch, page, '--check') == 0


@primary
def test_what_differs_is_said_and_written(monkeypatch, page, capsys):
    text = page.read_text()
    wrong = text.replace('| yapf | Apache-2.0 | use |', '| yapf | secret | use |')
    wrong = wrong.replace('| timm | Apache-2.0 | tests and documentation |\n', '')
    page.write_text(wrong)
    assert run(monkeypatch, page, '--check').splitlines() == [
        "timm: None in dependencies.md, ('Apache-2.0', 'tests and documentation') here",
        "yapf: ('secret', 'use') in dependencies.md, ('Apache-2.0', 'use') here"]
    assert page.read_text() == wrong
    assert run(monkeypatch, page) == 0
    assert '| yapf | Apache-2.0 | use |\n' in page.read_text()
    assert page.read_text().partition('<!-- licences')[0] == text.partition('<!-- licences')[0]


@pytest.mark.parametrize(('about', 'licence'), [
    ({'License-Expression': 'MIT AND Apache-2.0', 'License': 'x'}, 'MIT AND Apache-2.0'),
    ({'Classifier': ['License :: OSI Approved :: MIT License', 'License :: OSI Approved']}, 'MIT'),
    ({'License': 'Apache 2.0'}, 'Apache-2.0'),
    ({'License': 'Copyright me\nRedistribution and use in\n source. Neither the name'}, 'BSD-3-Clause'),
    ({'Classifier': ['License :: Other/Proprietary License'], 'License': 'NVIDIA Proprietary Software'},
     'NVIDIA, proprietary'),
    ({}, 'not said')])
def test_a_licence_in_one_line(tool, about, licence):
    about = dict(about)
    classifiers = about.pop('Classifier', [])

    class About(dict):
        def get_all(self, name, default):
            return classifiers or default

    assert tool.licence(SimpleNamespace(metadata=About(about), files=[])) == licence


def test_all_that_is_needed_counts(tool):
    found = tool.closure([Requirement('pytest-cov')])
    assert {'pytest-cov', 'pytest', 'coverage', 'pluggy'} <= found.keys()
    assert found['pytest'].version == metadata.version('pytest')
    with pytest.raises(ValueError, match='no-such-thing is not installed in .*: tools/setup_env.sh'):
        tool.closure([Requirement('no_such_thing')])
