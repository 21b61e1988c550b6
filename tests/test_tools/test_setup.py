"""The set-up: what it compiles for, when it has something to do, and what it leaves when a step fails or is ended."""
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
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
import mmcv_wheel  # noqa: E402
import shell  # noqa: E402

sys.path.remove(str(FOLDER))
CPU = mmcv_wheel.Torch('2.12.1+cpu', None, [], 'cp311-linux-x86_64')
LOGIN_NODE = mmcv_wheel.Torch('2.12.1', '13.0', [], 'cp311-linux-x86_64')
GPU_NODE = mmcv_wheel.Torch('2.12.1', '13.0', ['8.0', '9.0'], 'cp311-linux-x86_64')


# ---- what mmcv is compiled for


@pytest.mark.parametrize('torch, env, archs', [
    (CPU, {}, []), (CPU, {'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': '9.0'}, []),
    (LOGIN_NODE, {}, []), (LOGIN_NODE, {'TORCH_CUDA_ARCH_LIST': '9.0'}, []),
    (LOGIN_NODE, {'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': '9.0;8.0 8.6+PTX'}, ['8.0', '8.6+PTX', '9.0']),
    (GPU_NODE, {}, ['8.0', '9.0']), (GPU_NODE, {'TORCH_CUDA_ARCH_LIST': '9.0'}, ['9.0']),
])
def test_architectures_are_those_of_the_gpus_or_those_named(torch, env, archs):
    assert mmcv_wheel.cuda_archs(torch, env) == archs


def test_forcing_cuda_without_a_gpu_asks_for_which():
    with pytest.raises(shell.SetupError, match='FORCE_CUDA=1 where no GPU is visible: .*ARCH_LIST="8.0;9.0"'):
        mmcv_wheel.cuda_archs(LOGIN_NODE, {'FORCE_CUDA': '1'})


@pytest.mark.parametrize('archs, gpu, does', [
    (['8.0'], '8.0', True), (['8.0'], '8.6', True), (['8.6'], '8.0', False), (['8.0'], '9.0', False),
    (['8.0+PTX'], '12.0', True), (['9.0+PTX'], '8.0', False), (['7.5', '9.0a'], '9.0', True), ([], '8.0', False),
    (['12.0'], '10.0', False), (['Hopper'], '9.0', True),
])
def test_which_gpus_compiled_code_serves(archs, gpu, does):
    assert mmcv_wheel.serves(archs, gpu) == does


def test_wheels_are_kept_apart_by_all_they_depend_on():
    keys = {mmcv_wheel.wheel_key(torch, mmcv_wheel.cuda_archs(torch, env)) for torch, env in [
        (CPU, {}), (LOGIN_NODE, {}), (GPU_NODE, {}), (GPU_NODE, {'TORCH_CUDA_ARCH_LIST': '9.0'}),
        (mmcv_wheel.Torch('2.12.1', '12.8', ['9.0'], 'cp311-linux-x86_64'), {}),
        (mmcv_wheel.Torch('2.12.1', '13.0', ['9.0'], 'cp313-linux-x86_64'), {}),
        (mmcv_wheel.Torch('2.11.0', '13.0', ['9.0'], 'cp311-linux-x86_64'), {})]}
    assert len(keys) == 7
    assert all(re.fullmatch(r'[\w.+-]+', key) for key in keys)


@pytest.mark.parametrize('env, error', [
    ({'CUDA_HOME': '/nowhere'}, r'nvcc, which was not found: install the CUDA toolkit 13.0 or set CUDA_HOME'),
    ({'CUDA_HOME': 'old'}, r'is of CUDA 12.4, but torch 2.12.1 was built for 13.0'), ({'CUDA_HOME': 'new'}, None)])
def test_the_cuda_compiler_is_checked_before_anything_is_compiled(env, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, release in (('old', '12.4'), ('new', '13.2')):
        write_script(tmp_path / name / 'bin' / 'nvcc', f'echo "Cuda compilation tools, release {release}, V1"')
    if error is None:
        mmcv_wheel.check_nvcc(GPU_NODE, env)
    else:
        with pytest.raises(shell.SetupError, match=error):
            mmcv_wheel.check_nvcc(GPU_NODE, env)


# ---- the build of mmcv


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def sources(folder, names=('nms', 'pybind', 'roi_align')):
    bindings = folder / mmcv_wheel.BINDINGS
    (bindings / 'cpu').mkdir(parents=True)
    for name in names:
        (bindings / f'{name}.cpp').write_text(f'// {name}')
    (bindings / 'cpu' / 'nms.cpp').write_text('// the kernel')
    return bindings


def test_bindings_become_one_file(tmp_path):
    bindings = sources(tmp_path)
    assert mmcv_wheel.merge_bindings(tmp_path) == 3
    merged, = bindings.glob('*.cpp')
    assert merged.read_text().splitlines() == [
        '#include <torch/extension.h>', '#include "bindings/nms.cpp"', '#include "bindings/pybind.cpp"',
        '#include "bindings/roi_align.cpp"']
    assert (bindings / 'bindings' / 'nms.cpp').read_text() == '// nms'
    assert (bindings / 'cpu' / 'nms.cpp').read_text() == '// the kernel'


def test_sources_of_another_layout_are_refused(tmp_path):
    with pytest.raises(shell.SetupError, match='no mmcv/ops/csrc/pytorch/pybind.cpp'):
        mmcv_wheel.merge_bindings(tmp_path)


@pytest.fixture
def pip(tmp_path):
    """A stand-in for an environment's Python: its pip downloads small sources and writes down what it is asked for."""
    bindings = sources(tmp_path / 'mmcv-1.0')
    with tarfile.open(tmp_path / 'mmcv-1.0.tar.gz', 'w:gz') as archive:
        archive.add(tmp_path / 'mmcv-1.0', 'mmcv-1.0')
    assert bindings.exists()
    return write_script(tmp_path / 'bin' / 'python', f'''
printf '%s ' "$@" >> "{tmp_path}/calls"; echo "CFLAGS=$CFLAGS FORCE_CUDA=$FORCE_CUDA" >> "{tmp_path}/calls"
command=$4; last=; folder=; previous=
for word in "$@"; do
  case "$previous" in --dest | --wheel-dir) folder=$word ;; esac
  previous=$word; last=$word
done
case "$command" in
  download) cp "{tmp_path}/mmcv-1.0.tar.gz" "$folder" ;;
  wheel)
    if [ -d "$last" ]; then [ ! -e "{tmp_path}/fast_fails" ] || {{ echo no such header; exit 1; }}; fi
    echo wheel > "$folder/mmcv-1.0-cp311-none-any.whl" ;;
esac''')


def install(python, tmp_path, problem=lambda: ''):
    return mmcv_wheel.install(python, 'mmcv==1.0', CPU, tmp_path / 'cache', {'PATH': '/usr/bin:/bin'},
                              Path('the.lock'), problem)


def calls(tmp_path):
    return [re.search(r'-check (\w+)', line)[1] for line in (tmp_path / 'calls').read_text().splitlines()]


def test_mmcv_is_compiled_once(pip, tmp_path, capsys):
    assert install(pip, tmp_path) == 'compiled (fast build)'
    assert calls(tmp_path) == ['download', 'wheel', 'install', 'install']
    _, build, _, others = (tmp_path / 'calls').read_text().splitlines()
    assert 'install -c the.lock mmcv==1.0 ' in others
    # Optimised, without debug information, whatever Python itself was built with; and not for GPUs.
    assert re.search(r'CFLAGS=.* -O3 -g0 FORCE_CUDA=0$', build)
    assert install(pip, tmp_path).startswith('reused ')
    assert calls(tmp_path)[4:] == ['install', 'install']


def test_the_plain_build_follows_where_the_fast_one_fails(pip, tmp_path, capsys):
    (tmp_path / 'fast_fails').touch()
    assert install(pip, tmp_path) == 'compiled (plain build)'
    assert calls(tmp_path) == ['download', 'wheel', 'wheel', 'install', 'install']
    said = capsys.readouterr().out
    assert 'the fast build did not work' in said and 'plain build, which takes ten to thirty minutes' in said
    log, = (tmp_path / 'cache').rglob('fast-build.log')
    assert 'no such header' in log.read_text() and str(log) in said


def test_a_module_that_lacks_operators_is_not_kept(pip, tmp_path, capsys):
    def lacks_operators_until(builds):
        return '' if calls(tmp_path).count('wheel') >= builds else 'nms miss in module _ext'

    assert install(pip, tmp_path, lambda: lacks_operators_until(2)) == 'compiled (plain build)'
    assert 'does not import: nms miss in module _ext' in capsys.readouterr().out
    # A kept wheel that has come to fail, as after a library of the system changed, is compiled anew.
    assert install(pip, tmp_path, lambda: lacks_operators_until(3)) == 'compiled (fast build)'
    with pytest.raises(shell.SetupError, match='nms miss'):
        install(pip, tmp_path / 'again', lambda: lacks_operators_until(99))
    assert not list((tmp_path / 'again').rglob('*.whl'))


# ---- when there is something to do


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An environment that is complete, made on a machine without a GPU."""
    stack = setup.Stack(str(tmp_path / '.venv'), 'primary.txt', 'primary.lock', 'convneur_mm')
    monkeypatch.setitem(setup.STACKS, 'primary', stack)
    environment = setup.Environment('primary', {})
    environment.folder.mkdir()
    stamp(environment)
    return environment


def stamp(environment, **values):
    environment.stamp.write_text(json.dumps({
        'inputs': environment.inputs(), 'torch_index_url': '', 'cuda_archs': [], 'unusable_gpus': [], **values}))


def test_a_login_node_s_environment_is_made_anew_on_a_gpu_node(made):
    a100, h100 = setup.Gpu('8.0', '580.1'), setup.Gpu('9.0', '580.1')
    assert made.is_up_to_date([])
    assert not made.is_up_to_date([a100])
    stamp(made, cuda_archs=['8.0'])
    assert made.is_up_to_date([]) and made.is_up_to_date([a100]) and not made.is_up_to_date([a100, h100])


def test_a_gpu_with_too_old_a_driver_does_not_start_it_every_time(made):
    stamp(made, unusable_gpus=[str(setup.Gpu('8.0', '470.1'))])
    assert made.is_up_to_date([setup.Gpu('8.0', '470.1')])
    assert not made.is_up_to_date([setup.Gpu('8.0', '580.1')])


def test_another_index_or_requirement_or_python_counts(made, monkeypatch):
    again = setup.Environment('primary', {'TORCH_INDEX_URL': 'http://localhost/cpu'})
    assert not again.is_up_to_date([])
    stamp(made, torch_index_url='http://localhost/cpu')
    assert again.is_up_to_date([]) and setup.Environment('primary', {}).is_up_to_date([])
    monkeypatch.setattr(setup, 'VERSION', '3.12')
    assert not made.is_up_to_date([])


def test_an_unfinished_environment_counts(made):
    made.stamp.write_text('{}')
    assert not made.is_up_to_date([])
    made.stamp.unlink()
    assert not made.is_up_to_date([])


def test_gpus_are_those_nvidia_smi_names(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    assert setup.visible_gpus() == []
    write_script(tmp_path / 'nvidia-smi', 'echo "9.0, 580.65"; echo "9.0, 580.65"; echo "8.0, 580.65"')
    assert setup.visible_gpus() == [setup.Gpu('8.0', '580.65'), setup.Gpu('9.0', '580.65')]
    write_script(tmp_path / 'nvidia-smi', 'echo "NVIDIA-SMI has failed"; exit 9')
    assert setup.visible_gpus() == []


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
    with pytest.raises(shell.SetupError, match=r'^13 GB .*environment, pip.s cache .*TMPDIR.*CONVNEUR.*found 12.9 GB'):
        cuda.check_disk()
    setup.Environment('primary', {**places, 'TORCH_INDEX_URL': 'http://localhost/cpu'}).check_disk()
    free.free = 13 * 2 ** 30
    cuda.check_disk()


def test_torch_comes_from_the_named_index_alone(made, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, 'run', lambda command, *args, **kwargs: asked.append([str(c) for c in command]))
    monkeypatch.setattr(setup.Environment, 'torch', lambda self: CPU)
    for url in ('', 'http://localhost/cpu'):
        setup.Environment('primary', {'TORCH_INDEX_URL': url}).install_torch()
    default, first, second = asked
    assert '--index-url' not in default + second
    assert first[first.index('--index-url') + 1] == 'http://localhost/cpu' and '--no-deps' in first
    assert first[-2:] == ['torch==2.12.1', 'torchvision==0.27.1']
    assert default == second and 'onedl-mmengine==0.10.12' in second
    assert not any(re.search('mmcv|mmdet|mmseg|mmpretrain', word) for word in second)
    lock = str(ROOT / 'requirements' / 'primary.lock')
    assert all(words[words.index('-c') + 1] == lock for words in asked)


def locked(stack):
    """The lines of a stack's lock by name, which may have one for each of several Pythons."""
    lines = {}
    for line in (ROOT / 'requirements' / setup.STACKS[stack].lock).read_text().splitlines():
        if not line.startswith('#'):
            requirement = Requirement(line)
            lines.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return lines


@pytest.mark.parametrize('stack', setup.STACKS)
def test_the_lock_has_every_requirement_at_a_version_that_will_do(stack):
    lines = locked(stack)
    files = [path for name in (setup.STACKS[stack].requirements, setup.STACKS[stack].tests, 'build.txt') for path in
             setup.Environment.requirement_files(ROOT / 'requirements' / name)]
    asked = [Requirement(line.split('#')[0]) for path in files for line in path.read_text().splitlines()
             if line.split('#')[0].strip() and not line.startswith('-')]
    assert len(asked) > 20
    for requirement in asked:
        found = lines[canonicalize_name(requirement.name)]
        versions = [version[2:] for line in found for version in map(str, line.specifier)]
        assert versions and all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_environment_is_the_locked_one():
    """What is tested is what others get."""
    stack = next((name for name, stack in setup.STACKS.items() if Path(sys.prefix) == ROOT / stack.folder), None)
    if stack is None:
        pytest.skip('not an environment of tools/setup_env.sh')
    # Not those that setuptools brings along for itself, which are on the path once it is imported.
    installed = {canonicalize_name(each.metadata['Name']): each.version
                 for each in metadata.distributions(path=[sysconfig.get_path('purelib')])}
    wanted = {name: [str(line.specifier)[2:] for line in lines if not line.marker or line.marker.evaluate()]
              for name, lines in locked(stack).items()}
    assert len(wanted.keys() & installed.keys()) > 50
    assert not {name: (version, wanted[name]) for name, version in installed.items()
                if name in wanted and [version.split('+')[0]] != wanted[name]}


def test_settings_of_another_environment_do_not_reach_pip():
    environment = setup.Environment('core', {'PYTHONPATH': '/opt/x', 'PIP_TARGET': '/opt/y', 'VIRTUAL_ENV': '/opt/z',
                                             'HOME': '/home/me', 'PIP_INDEX_URL': 'http://localhost'})
    assert not {'PYTHONPATH', 'PIP_TARGET', 'VIRTUAL_ENV'} & set(environment.env)
    assert environment.env['PIP_INDEX_URL'] == 'http://localhost'


@pytest.mark.parametrize('python, stack, message', [
    ('/nowhere/python', 'primary', 'PYTHON=/nowhere/python does not run or is not Python 3.10 to 3.13'),
    ('false', 'openmmlab', 'PYTHON=false does not run or is not Python 3.10 or 3.11')])
def test_a_python_that_does_not_fit_is_named(python, stack, message):
    done = subprocess.run([ROOT / 'tools' / 'setup_env.sh', '--stack', stack], env={**os.environ, 'PYTHON': python},
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


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


def test_progress_names_what_is_done_and_the_time_left():
    assert mmcv_wheel.ninja_progress('x [1/8] c++ a\n[4/8] c++ b', 60) == 'file 4 of 8, about 1:00 min left'
    # The first files say nothing of the others: one of them is as long as ten.
    assert mmcv_wheel.ninja_progress('x [1/8] c++ a', 60) == 'file 1 of 8'
    assert mmcv_wheel.ninja_progress('nothing yet', 60) == ''
    assert shell.pip_progress('Collecting a\n  Downloading a.whl (3 MB)\n', 1) == 'Downloading a.whl (3 MB)'
