"""The set-up: when it has something to do, what it asks of pip, and what it leaves when a step fails or is ended."""
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'tools' / 'setup'
sys.path.insert(0, str(FOLDER))
import environment as setup  # noqa: E402
import shell  # noqa: E402

sys.path.remove(str(FOLDER))


# ---- when there is something to do


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An environment that is complete."""
    stack = setup.Stack(str(tmp_path / '.venv'), ('primary.txt', 'tests_all.txt'), 'convneur_mm')
    monkeypatch.setitem(setup.STACKS, 'primary', stack)
    environment = setup.Environment('primary', {})
    environment.folder.mkdir()
    stamp(environment)
    return environment


def stamp(environment, url=''):
    environment.stamp.write_text(json.dumps({'inputs': environment.inputs(), 'torch_index_url': url}))


def test_another_index_or_requirement_or_python_counts(made, monkeypatch):
    again = setup.Environment('primary', {'TORCH_INDEX_URL': 'http://localhost/cpu'})
    assert not again.is_up_to_date()
    stamp(made, 'http://localhost/cpu')
    assert again.is_up_to_date() and setup.Environment('primary', {}).is_up_to_date()
    monkeypatch.setattr(setup, 'VERSION', '3.12')
    assert not made.is_up_to_date()


def test_an_unfinished_environment_counts(made):
    made.stamp.write_text('{}')
    assert not made.is_up_to_date()
    made.stamp.unlink()
    assert not made.is_up_to_date()


def test_a_change_of_the_versions_counts(made, monkeypatch, tmp_path):
    assert made.is_up_to_date()
    monkeypatch.setattr(setup, 'LOCK', tmp_path / 'versions.lock')
    setup.LOCK.write_text('torch==9.9.9\n')
    assert not made.is_up_to_date()


# ---- what is refused, and what is asked of pip


def test_a_folder_of_somebody_else_is_left_alone(made):
    made.check_folder()
    made.stamp.unlink()
    made.check_folder()
    (made.folder / 'bin').mkdir()
    with pytest.raises(shell.SetupError, match=r'\.venv exists and was not made by this script'):
        made.check_folder()
    assert made.folder.exists()


def test_an_environment_of_another_python_is_left_alone(made):
    (made.folder / 'pyvenv.cfg').write_text('home = /usr/bin\nversion = 3.9.2\n')
    with pytest.raises(shell.SetupError, match='made with Python 3.9, but PYTHON is 3.*unset PYTHON .* or delete'):
        made.check_folder()
    assert made.folder.exists()


def test_disk_is_added_up_for_each_file_system(made, monkeypatch):
    free = SimpleNamespace(free=12.9 * 2 ** 30)
    monkeypatch.setattr(setup.shutil, 'disk_usage', lambda path: free)
    monkeypatch.setattr(setup.tempfile, 'gettempdir', lambda: str(made.folder.parent))
    places = {'XDG_CACHE_HOME': str(made.folder.parent)}
    cuda = setup.Environment('primary', places)
    with pytest.raises(shell.SetupError, match=r'^13 GB .*environment, pip.s cache .*TMPDIR.*found 12.9 GB'):
        cuda.check_disk()
    setup.Environment('primary', {**places, 'TORCH_INDEX_URL': 'http://localhost/cpu'}).check_disk()
    free.free = 13 * 2 ** 30
    cuda.check_disk()


@pytest.mark.parametrize('stack, mmcv', [('primary', 'onedl-mmcv'), ('openmmlab', 'mmcv-lite'), ('core', None)])
def test_what_is_asked_of_pip(stack, mmcv, monkeypatch):
    """torch comes from the named index alone, and mmcv not from pip's cache, which may hold a compiled one."""
    asked = []
    monkeypatch.setattr(setup, 'run', lambda command, *args, **kwargs: asked.append([str(c) for c in command]))
    setup.Environment(stack, {}).install_packages()
    default = asked.copy()
    setup.Environment(stack, {'TORCH_INDEX_URL': 'http://localhost/cpu'}).install_packages()
    first, *rest = asked[len(default):]
    assert rest == default and not any('--index-url' in words for words in default)
    assert first[first.index('--index-url') + 1] == 'http://localhost/cpu' and '--no-deps' in first
    assert [word.partition('==')[0] for word in first[-2:]] == ['torch', 'torchvision']
    assert [words[-1].partition('==')[0] for words in default if '--no-cache-dir' in words] == ([mmcv] if mmcv else [])
    assert all(words[words.index('-c') + 1] == str(ROOT / 'requirements' / 'versions.lock') for words in asked)


def locked():
    """The lines of the lock by name, which may have one for each of several Pythons."""
    lines = {}
    for line in (ROOT / 'requirements' / 'versions.lock').read_text().splitlines():
        if not line.startswith('#'):
            requirement = Requirement(line)
            lines.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return lines


@pytest.mark.parametrize('stack', setup.STACKS)
def test_the_lock_has_every_requirement_at_a_version_that_will_do(stack):
    lines = locked()
    asked = [Requirement(line.split('#')[0]) for path in setup.Environment(stack, {}).requirement_files()
             for line in path.read_text().splitlines() if line.split('#')[0].strip() and not line.startswith('-')]
    assert len(asked) > 15
    for requirement in asked:
        found = lines[canonicalize_name(requirement.name)]
        versions = [version[2:] for line in found for version in map(str, line.specifier)]
        assert versions and all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_environment_is_the_locked_one():
    """What is tested is what others get."""
    if Path(sys.prefix) not in [ROOT / stack.folder for stack in setup.STACKS.values()]:
        pytest.skip('not an environment of tools/setup_env.sh')
    # Not those that setuptools brings along for itself, which are on the path once it is imported.
    installed = {canonicalize_name(each.metadata['Name']): each.version
                 for each in metadata.distributions(path=[sysconfig.get_path('purelib')])}
    wanted = {name: [str(line.specifier)[2:] for line in lines if not line.marker or line.marker.evaluate()]
              for name, lines in locked().items()}
    assert len(wanted.keys() & installed.keys()) > 50
    assert not {name: (version, wanted[name]) for name, version in installed.items()
                if name in wanted and [version.split('+')[0]] != wanted[name]}


def test_settings_of_another_environment_do_not_reach_pip():
    environment = setup.Environment('core', {'PYTHONPATH': '/opt/x', 'PIP_TARGET': '/opt/y', 'VIRTUAL_ENV': '/opt/z',
                                             'HOME': '/home/me', 'PIP_INDEX_URL': 'http://localhost'})
    assert not {'PYTHONPATH', 'PIP_TARGET', 'VIRTUAL_ENV'} & set(environment.env)
    assert environment.env['PIP_INDEX_URL'] == 'http://localhost'


@pytest.mark.parametrize('python', ['/nowhere/python', 'false'])
def test_a_python_that_does_not_fit_is_named(python):
    done = subprocess.run([ROOT / 'tools' / 'setup_env.sh'], env={**os.environ, 'PYTHON': python}, capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert f'PYTHON={python} does not run or is older than Python 3.10' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_stack_is_named():
    done = subprocess.run([ROOT / 'tools' / 'setup_env.sh', '--stack', 'mine'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHON': sys.executable})
    assert done.returncode == 2
    assert "invalid choice: 'mine' (choose from" in done.stderr


# ---- commands that fail or are ended


def test_a_failing_command_shows_the_end_of_its_output(tmp_path):
    expected = r'^line 16\n(.*\n){23}line 40\n.*exit code 3\); its whole output: .*x.log'
    with pytest.raises(shell.SetupError, match=expected):
        shell.run(['sh', '-c', 'i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; done; exit 3'],
                  tmp_path / 'x.log', os.environ)
    assert (tmp_path / 'x.log').read_text().startswith('line 1\n')


def alive(pid):
    status = Path(f'/proc/{pid}/stat')
    return status.exists() and status.read_text().rsplit(')', 1)[1].split()[0] != 'Z'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_it_has_started(number, tmp_path):
    """Compilers are children of children, and a shell's background jobs ignore Ctrl-C."""
    code = f'''
import os, signal, sys
sys.path.insert(0, {str(FOLDER)!r})
import environment, shell
signal.signal(signal.SIGTERM, environment.interrupt)
shell.run(['bash', '-c', 'sleep 300 & echo $! > pids; echo $$ >> pids; wait'], environment.Path('log'), os.environ)
'''
    process = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    pids = []
    while len(pids) < 2:
        assert process.poll() is None
        time.sleep(0.05)
        pids = (tmp_path / 'pids').read_text().split() if (tmp_path / 'pids').exists() else []
    assert all(alive(pid) for pid in pids)
    process.send_signal(number)
    process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_second_set_up_waits_for_the_first(tmp_path):
    code = f'''
import sys, time
from pathlib import Path
sys.path.insert(0, {str(FOLDER)!r})
import shell
with shell.lock(Path('lock'), 'it'):
    print('in', flush=True)
    sys.stdin.readline()
print('out', flush=True)
'''
    command = [sys.executable, '-c', code]
    options = dict(cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as first:
        assert first.stdout.readline() == 'in\n'
        with subprocess.Popen(command, **options) as second:
            assert second.stdout.readline() == '[setup] another set-up is at work on it; waiting for it\n'
            first.communicate('\n')
            assert second.communicate('\n')[0] == 'in\nout\n'


def test_progress_names_what_is_done():
    assert shell.pip_progress('Collecting a\n  Downloading a.whl (3 MB)\n', 1) == 'Downloading a.whl (3 MB)'
