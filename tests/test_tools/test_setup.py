"""The set-up: when it has something to do, what it asks of pip, and what it leaves when a step fails or is ended."""
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
STACKS = {'primary': ('.venv', 'tests_all.txt'), 'openmmlab': ('.venv-openmmlab', 'tests_all.txt'),
          'core': ('.venv-core', 'tests.txt')}
# In place of Python: names a version, makes environments that hold itself, and writes down what pip is asked for.
PYTHON = '''#!/bin/bash
here=$(dirname "$0")
case "$*" in
  *'-m venv'*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
  *'-m pip'*) printf '%s|' "$@" >> "CALLS"; echo >> "CALLS"; echo "Downloading something"; . "CHECKOUT/on_pip" ;;
  *build_ext*) [ ! -e "CHECKOUT/on_compile" ] || . "CHECKOUT/on_compile" ;;
  *version_info*) cat "CHECKOUT/version" ;;
  *base_executable*) echo "CHECKOUT/python" ;;
esac
'''


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the set-up reads, with a stand-in for Python; its folder has a blank in its name."""
    checkout = tmp_path / 'a checkout'
    for name in ('tools', 'requirements', 'convneur_mm/ops/neural_memory/csrc'):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, checkout)
    (checkout / 'version').write_text('3.11\n')
    (checkout / 'on_pip').touch()
    python = checkout / 'python'
    python.write_text(PYTHON.replace('CALLS', f'{checkout}/calls').replace('CHECKOUT', str(checkout)))
    python.chmod(0o755)
    return checkout


def run(checkout, *args, code=0, **env):
    """What the set-up prints."""
    done = subprocess.run([checkout / 'tools' / 'setup_env.sh', *args], capture_output=True, text=True,
                          env={**os.environ, 'PYTHON': str(checkout / 'python'), **env})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def asked(checkout):
    """The arguments of each call of pip since the last time."""
    path = checkout / 'calls'
    calls = [line.split('|')[:-1] for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return calls


@pytest.mark.parametrize('stack, mmcv', [('primary', 'onedl-mmcv'), ('openmmlab', 'mmcv-lite'), ('core', None)])
def test_what_is_asked_of_pip(stack, mmcv, checkout):
    """torch comes from the named index alone, and mmcv not from pip's cache, which may hold a compiled one."""
    folder, tests = STACKS[stack]
    assert 'done in' in run(checkout, '--stack', stack)
    default = asked(checkout)
    assert (checkout / folder / 'bin' / 'python').exists()
    run(checkout, '--stack', stack, TORCH_INDEX_URL='http://localhost/cpu')
    first, *rest = asked(checkout)
    assert rest == default and not any('--index-url' in words for words in default)
    assert first[first.index('--index-url') + 1] == 'http://localhost/cpu' and '--no-deps' in first
    assert [word.partition('==')[0] for word in first[-2:]] == ['torch', 'torchvision']
    assert [words[-1].partition('==')[0] for words in default if '--no-cache-dir' in words] == ([mmcv] if mmcv else [])
    assert all(words[words.index('-c') + 1] == f'{checkout}/requirements/versions.lock' for words in default + [first])
    packages, ours = default[-2:]
    assert packages[-3:] == [f'-r{checkout}/requirements/{name}' for name in (f'{stack}.txt', tests, 'build.txt')]
    assert ours[-2:] == ['--editable', str(checkout)] and '--no-build-isolation' in ours


def test_a_second_run_has_nothing_to_do_until_something_changes(checkout):
    run(checkout)
    asked(checkout)
    for name, text in (('requirements/versions.lock', 'torch==9.9.9\n'), ('setup.py', '# changed\n'),
                       ('requirements/tests.txt', 'more\n')):
        assert 'is up to date' in run(checkout) and not asked(checkout)
        with (checkout / name).open('a') as file:
            file.write(text)
        assert 'done in' in run(checkout) and asked(checkout)
    # Another index is a change; a run that names none keeps what there is.
    assert 'done in' in run(checkout, TORCH_INDEX_URL='http://localhost/cpu')
    assert 'is up to date' in run(checkout) and 'is up to date' in run(checkout, TORCH_INDEX_URL='http://localhost/cpu')
    assert 'done in' in run(checkout, TORCH_INDEX_URL='http://localhost/other')


def test_settings_of_another_environment_do_not_reach_pip(checkout):
    (checkout / 'on_pip').write_text(f'env >> "{checkout}/env"')
    run(checkout, PYTHONPATH='/other/x', PIP_TARGET='/other/y', VIRTUAL_ENV='/other/z', CONDA_PREFIX='/other',
        PIP_INDEX_URL='http://localhost')
    seen = (checkout / 'env').read_text()
    assert '/other' not in seen and 'PIP_INDEX_URL=http://localhost' in seen


def test_what_the_set_up_did_not_make_is_left_alone(checkout):
    (checkout / '.venv' / 'bin').mkdir(parents=True)
    assert '.venv exists and was not made by this script' in run(checkout, code=1)
    (checkout / '.venv' / 'bin').rmdir()
    run(checkout)
    (checkout / 'version').write_text('3.13\n')
    (checkout / '.venv' / 'bin' / 'python').write_text('#!/bin/sh\necho 3.11\n')
    assert 'was made with Python 3.11, but PYTHON is 3.13' in run(checkout, code=1)
    assert (checkout / '.venv' / 'bin' / 'pip').exists() and len(asked(checkout)) == 4


def test_a_full_disk_is_named_before_anything_is_made(checkout, tmp_path):
    (tmp_path / 'bin').mkdir()
    df = tmp_path / 'bin' / 'df'
    df.write_text('#!/bin/sh\necho header; echo disk 1 1 13000000 1%% /\n')
    df.chmod(0o755)
    path = f'{tmp_path}/bin:{os.environ["PATH"]}'
    assert '13 GB of free disk are needed' in run(checkout, code=1, PATH=path)
    assert not asked(checkout) and not (checkout / '.venv').exists()
    run(checkout, PATH=path, TORCH_INDEX_URL='http://localhost/cpu')


@pytest.mark.parametrize('python', ['/nowhere/python', 'false'])
def test_a_python_that_does_not_fit_is_named(python, checkout):
    message = run(checkout, code=1, PYTHON=python)
    assert message == f'[setup] error: PYTHON={python} does not run or is older than Python 3.10\n'


def test_unknown_arguments_are_named(checkout):
    assert "--stack must be primary, openmmlab or core, got 'mine'" in run(checkout, '--stack', 'mine', code=1)
    assert 'unknown argument --all' in run(checkout, '--all', code=1)


def test_a_failing_command_shows_the_end_of_its_output(checkout):
    (checkout / 'on_pip').write_text('for i in {1..40}; do echo line $i; done; exit 3')
    message = run(checkout, code=1)
    assert re.search(r'\nline 17\n(.*\n){22}line 40\n.*failed; its whole output: .*torch.log', message)
    assert 'line 1\n' in (checkout / '.venv' / 'setup' / 'torch.log').read_text()
    (checkout / 'on_pip').write_text('')
    assert 'done in' in run(checkout)  # goes on


def ends(pids):
    """Return whether the process whose number is in the file `pids` ends within ten seconds."""
    status = Path(f'/proc/{int(pids.read_text())}/stat')
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = status.read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == 'Z':  # ended, and its new parent has not yet asked how
            return True
        time.sleep(0.05)
    return False


def test_a_failure_ends_the_compiler_too(checkout):
    """It compiles beside pip, and would keep the lock that the next set-up waits for."""
    (checkout / 'on_compile').write_text(f'sleep 300 & echo $! > "{checkout}/pids"; wait')
    # The first call of pip installs PyTorch, before anything compiles.
    (checkout / 'on_pip').write_text(
        f'[[ "$*" != *mmcv* ]] || {{ until [ -s "{checkout}/pids" ]; do sleep 0.05; done; exit 3; }}')
    assert 'the command above failed' in run(checkout, code=1, CXX='bash')
    assert ends(checkout / 'pids')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_it_has_started(number, checkout):
    (checkout / 'on_pip').write_text(f'sleep 300 & echo $! > "{checkout}/pids"; wait')
    process = subprocess.Popen([checkout / 'tools' / 'setup_env.sh'], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'PYTHON': str(checkout / 'python')})
    pids = checkout / 'pids'
    while not (pids.exists() and pids.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 130 and 'the same command goes on from here' in message
    assert ends(pids)


def test_a_second_set_up_waits_for_the_first(checkout):
    (checkout / 'on_pip').write_text(f'while [ ! -e "{checkout}/go" ]; do sleep 0.05; done')
    options = dict(stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHON': str(checkout / 'python')})
    with subprocess.Popen([checkout / 'tools' / 'setup_env.sh'], **options) as first:
        while not (checkout / 'calls').exists():
            time.sleep(0.05)
        with subprocess.Popen([checkout / 'tools' / 'setup_env.sh'], **options) as second:
            assert 'another set-up is at work on' in second.stdout.readline()
            (checkout / 'go').touch()
            assert 'done in' in first.communicate()[0]
            assert 'is up to date' in second.communicate()[0]


# ---- the lock


def locked():
    """The lines of the lock by name, which may have one for each of several Pythons."""
    lines = {}
    for line in (ROOT / 'requirements' / 'versions.lock').read_text().splitlines():
        if not line.startswith('#'):
            requirement = Requirement(line)
            lines.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return lines


def test_the_lock_has_every_requirement_at_a_version_that_will_do():
    lines = locked()
    files = ('primary', 'openmmlab', 'core', 'tests', 'tests_all', 'export', 'docs', 'build')
    asked = [Requirement(line.split('#')[0]) for name in files
             for line in (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
             if line.split('#')[0].strip() and not line.startswith('-')]
    assert len(asked) > 40
    for requirement in asked:
        found = lines[canonicalize_name(requirement.name)]
        versions = [version[2:] for line in found for version in map(str, line.specifier)]
        assert versions and all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_environment_is_the_locked_one():
    """What is tested is what others get."""
    if Path(sys.prefix) not in [ROOT / folder for folder, _ in STACKS.values()]:
        pytest.skip('not an environment of tools/setup_env.sh')
    # Not those that setuptools brings along for itself, which are on the path once it is imported.
    installed = {canonicalize_name(each.metadata['Name']): each.version
                 for each in metadata.distributions(path=[sysconfig.get_path('purelib')])}
    wanted = {name: [str(line.specifier)[2:] for line in lines if not line.marker or line.marker.evaluate()]
              for name, lines in locked().items()}
    assert len(wanted.keys() & installed.keys()) > 50
    assert not {name: (version, wanted[name]) for name, version in installed.items()
                if name in wanted and [version.split('+')[0]] != wanted[name]}
