"""The launchers and the start of every tool: which Python they take, from where, and what they hand on."""
import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.relative_to(ROOT / 'tools') for path in (ROOT / 'tools').rglob('*.py') if path.name[0] != '_')
# A tool that prints what it was called with, instead of doing anything.
ECHO = """
import json, os, sys
if __name__ == '__main__':
    from _environment import prepare
    prepare()
names = 'OMP_WAIT_POLICY', 'PYTHONPATH', 'MASTER_PORT'
print(json.dumps(dict(python=sys.executable, argv=sys.argv, path=sys.path, unbuffered=sys.stdout.write_through,
                      **{name: os.environ.get(name) for name in names})))
"""

CONFIG = """
_base_ = './cascade_rcnn_convneur_m1_shapes.py'
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}/'))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}/'))
val_evaluator = dict(ann_file='{data}/annotations/instances_val.json')
train_cfg = dict(max_epochs=1)
"""


def make_environment(folder, packages=(), paths=()):
    """A virtual environment with empty packages, or with folders of packages on its path; returns its Python."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    site, = folder.glob('lib/python3*/site-packages')
    for name in packages:
        (site / name).mkdir()
        (site / name / '__init__.py').touch()
    (site / 'paths.pth').write_text('\n'.join(paths))
    for path in paths:
        # Through this file setuptools brings distutils, which Python has no more from 3.12 on, and MMEngine imports.
        for hook in Path(path).glob('distutils-precedence.pth'):
            shutil.copy(hook, site / 'paths_then_distutils.pth')
    return folder / 'bin' / 'python'


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """The Python of an environment without PyTorch."""
    return make_environment(tmp_path_factory.mktemp('foreign') / 'environment')


@pytest.fixture(scope='module')
def fit(tmp_path_factory):
    """The Python of an environment with (empty) PyTorch and MMEngine."""
    return make_environment(tmp_path_factory.mktemp('fit') / 'environment', ['torch', 'mmengine'])


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the launchers, with blanks in its path, a .venv of its own, and tools that print their arguments."""
    root = tmp_path_factory.mktemp('a') / 'check out'
    shutil.copytree(ROOT / 'tools', root / 'tools')
    (root / 'convneur_mm').mkdir()
    (root / 'convneur_mm' / '__init__.py').touch()
    for name in ('_torchrun.py', 'train.py', 'test.py'):
        (root / 'tools' / name).write_text(ECHO)
    make_environment(root / '.venv', ['torch', 'mmengine'])
    return root


@pytest.fixture
def without_venv(checkout, tmp_path):
    """The same checkout before its environment is made."""
    shutil.copytree(checkout, tmp_path / 'copy', ignore=shutil.ignore_patterns('.venv'))
    return tmp_path / 'copy'


def run(*command, cwd='/', path='/usr/bin:/bin', **env):
    """Runs a command with these variables alone."""
    return subprocess.run([str(c) for c in command], cwd=cwd, text=True, capture_output=True,
                          env={'PATH': str(path), **{name: str(value) for name, value in env.items()}})


def printed(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def path_with(folder, **programs):
    """A folder with these programs, for a PATH."""
    folder.mkdir()
    for name, target in programs.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        (folder / name).chmod(0o755)
    return folder


# ---- which Python


@pytest.mark.parametrize('variable, label', [
    ('PYTHON', 'PYTHON='), ('VIRTUAL_ENV', 'the active environment '), ('CONDA_PREFIX', 'the active environment ')])
def test_a_python_without_pytorch_is_passed_over_with_a_line(checkout, foreign, variable, label):
    value = foreign if variable == 'PYTHON' else foreign.parents[1]
    done = run(checkout / 'tools' / 'dist_train.sh', 'config', 1, **{variable: value})
    own = checkout / '.venv' / 'bin' / 'python'
    assert printed(done)['python'] == str(own)
    assert done.stderr == f'note: {label}{value} lacks torch, mmengine; using {own}\n'


def test_all_that_were_passed_over_are_in_one_line(checkout, foreign):
    environment = foreign.parents[1]
    done = run(checkout / 'tools' / 'dist_train.sh', 'config', 1, PYTHON='python3.0', VIRTUAL_ENV=environment)
    own = checkout / '.venv' / 'bin' / 'python'
    assert printed(done)['python'] == str(own)
    assert done.stderr == (f'note: PYTHON=python3.0 does not exist; the active environment {environment} lacks torch, '
                           f'mmengine; using {own}\n')


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_a_python_that_will_do_is_taken_without_a_line(checkout, fit, foreign, script):
    for env in (dict(PYTHON=fit, VIRTUAL_ENV=foreign.parents[1]), dict(VIRTUAL_ENV=fit.parents[1]),
                dict(CONDA_PREFIX=fit.parents[1])):
        done = run(checkout / 'tools' / script, 'config', 1, 1, **env)
        assert printed(done)['python'] == str(fit)
        assert done.stderr == ''


def test_the_paths_python_comes_last(without_venv, fit, foreign, tmp_path):
    programs = path_with(tmp_path / 'programs', python=foreign, python3=fit)
    done = run(without_venv / 'tools' / 'dist_train.sh', 'config', 1, path=f'{programs}:/usr/bin:/bin')
    assert printed(done)['python'] == str(fit)
    assert done.stderr == f'note: {programs}/python lacks torch, mmengine; using {programs}/python3\n'


def test_no_python_at_all_is_one_line(without_venv, foreign, tmp_path):
    programs = path_with(tmp_path / 'programs', python=foreign, python3='false')
    done = run(without_venv / 'tools' / 'dist_train.sh', 'config', 1, path=f'{programs}:/usr/bin:/bin')
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('error: no Python with torch and mmengine was found (')
    assert f'{programs}/python lacks torch, mmengine; {programs}/python3 does not run' in done.stderr
    assert str(without_venv / 'tools' / 'setup_env.sh') in done.stderr


def test_folders_in_the_current_folder_are_no_packages(checkout, foreign, tmp_path):
    for name in ('torch', 'mmengine'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').touch()
    done = run(checkout / 'tools' / 'dist_train.sh', 'config', 1, cwd=tmp_path, PYTHON=foreign)
    assert printed(done)['python'] == str(checkout / '.venv' / 'bin' / 'python')


def test_an_installed_wheel_uses_its_environment(without_venv, foreign, tmp_path):
    fit = make_environment(tmp_path / 'environment', ['torch', 'mmengine', 'convneur_mm'])
    site, = fit.parents[1].glob('lib/python3*/site-packages')
    shutil.copytree(without_venv / 'tools', site / 'convneur_mm' / '.mim' / 'tools')
    tools = site / 'convneur_mm' / '.mim' / 'tools'
    programs = path_with(tmp_path / 'programs', python=foreign, python3=foreign)
    assert printed(run(tools / 'dist_train.sh', 'config', 1, path=f'{programs}:/usr/bin:/bin'))['python'] == str(fit)
    done = run(foreign, tools / 'train.py')
    assert printed(done)['python'] == str(fit)
    assert done.stderr == f'note: {foreign} lacks torch, mmengine, convneur_mm; using {fit}\n'
    shutil.rmtree(fit.parent)
    done = run(foreign, tools / 'train.py')
    assert done.returncode == 2
    assert done.stderr == (f'error: {foreign} lacks torch, mmengine, convneur_mm; use the Python of the environment '
                           'that convneur_mm is installed in\n')


# ---- what tools do when they are called directly


@pytest.mark.parametrize('tool', TOOLS, ids=str)
def test_every_tool_looks_for_pytorch_first(checkout, foreign, tool, tmp_path):
    """Called with a system's Python: another takes over. It stops at its empty PyTorch here, if not at --help."""
    shutil.copytree(checkout, tmp_path / 'copy', symlinks=True)
    shutil.copy(ROOT / 'tools' / tool, tmp_path / 'copy' / 'tools' / tool)
    done = run(foreign, tmp_path / 'copy' / 'tools' / tool, '--help')
    own = tmp_path / 'copy' / '.venv' / 'bin' / 'python'
    assert done.stderr.splitlines()[0] == f'note: {foreign} lacks torch, mmengine; using {own}'


@pytest.mark.parametrize('tool', [*TOOLS, Path('_environment.py')], ids=str)
def test_old_pythons_can_read_every_tool(tool):
    """They must get as far as the line that names a newer one."""
    tree = ast.parse((ROOT / 'tools' / tool).read_text(), feature_version=(3, 7))
    # Python 3.6 does not know this one, and ast does not look at it.
    assert not any(isinstance(node, ast.ImportFrom) and node.module == '__future__' for node in ast.walk(tree))


def test_an_old_python_will_not_do_although_it_has_the_packages(monkeypatch):
    spec = importlib.util.spec_from_file_location('environment_of_tools', ROOT / 'tools' / '_environment.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.lacks() == []
    monkeypatch.setattr(sys, 'version_info', (3, 9, 20))
    assert module.lacks() == ['Python 3.10']


def test_another_python_takes_over_with_all_arguments(checkout, foreign, tmp_path):
    (tmp_path / 'link').symlink_to(checkout / 'tools' / 'train.py')
    done = run(foreign, '-u', tmp_path / 'link', 'my config.py', '--work-dir', 'a b')
    told = printed(done)
    assert told['python'] == str(checkout / '.venv' / 'bin' / 'python')
    assert told['argv'][1:] == ['my config.py', '--work-dir', 'a b']
    assert told['unbuffered']
    assert len(done.stderr.splitlines()) == 1


def test_without_any_environment_a_tool_names_the_set_up(without_venv, foreign):
    done = run(foreign, without_venv / 'tools' / 'train.py')
    assert done.returncode == 2
    assert done.stderr == (f'error: {foreign} lacks torch, mmengine; make an environment with '
                           f'{without_venv}/tools/setup_env.sh\n')


def test_half_an_environment_is_not_tried_again_and_again(without_venv):
    """An interrupted set-up leaves one without packages."""
    for name in ('.venv', '.venv-openmmlab'):
        python = make_environment(without_venv / name, ['torch'])
        site, = python.parents[1].glob('lib/python3*/site-packages')
        (site / 'mmengine').mkdir()  # what an uninstalled package leaves behind
    done = run(without_venv / '.venv' / 'bin' / 'python', without_venv / 'tools' / 'train.py')
    assert done.returncode == 2
    assert 'lacks mmengine; make an environment with' in done.stderr


def test_a_checkout_that_is_not_installed_is_found(checkout, fit):
    """By the interpreter and by processes it starts."""
    told = printed(run(fit, checkout / 'tools' / 'train.py', PYTHONPATH='/mine'))
    assert told['path'][-1] == str(checkout)
    assert told['PYTHONPATH'] == f'/mine:{checkout}'


def test_an_installed_package_goes_first(checkout, tmp_path):
    python = make_environment(tmp_path / 'environment', ['torch', 'mmengine', 'convneur_mm'])
    told = printed(run(python, checkout / 'tools' / 'train.py'))
    assert str(checkout) not in told['path'] and told['PYTHONPATH'] is None


def test_waiting_threads_sleep_unless_the_user_says_otherwise(checkout, fit):
    train = checkout / 'tools' / 'train.py'
    assert printed(run(fit, train))['OMP_WAIT_POLICY'] == 'PASSIVE'
    assert printed(run(fit, train, OMP_WAIT_POLICY='ACTIVE'))['OMP_WAIT_POLICY'] == 'ACTIVE'


# ---- what launchers hand on


@pytest.mark.parametrize('shell', [[], ['bash'], ['sh']], ids=['direct', 'bash', 'sh'])
def test_launchers_work_through_links_and_with_blanks(checkout, tmp_path, shell):
    (tmp_path / 'dist').symlink_to(checkout / 'tools' / 'dist_train.sh')
    (tmp_path / 'tools').symlink_to(checkout / 'tools')
    for script in (tmp_path / 'dist', tmp_path / 'tools' / 'dist_train.sh', checkout / 'tools' / 'dist_train.sh'):
        told = printed(run(*shell, script, 'my config.py', 2, '--work-dir', 'a b', CDPATH='/usr'))
        assert told['argv'][-6:] == [str(checkout / 'tools' / 'train.py'), 'my config.py', '--work-dir', 'a b',
                                     '--launcher', 'pytorch']
        assert '--nproc-per-node=2' in told['argv']
    told = printed(run(*shell, checkout / 'tools' / 'dist_test.sh', 'my config.py', 'check point.pth', 3, '--out', 'o'))
    assert told['argv'][-7:] == [str(checkout / 'tools' / 'test.py'), 'my config.py', 'check point.pth', '--out', 'o',
                                 '--launcher', 'pytorch']


@pytest.mark.parametrize('env, expected', [
    ({}, ['--nnodes=1', '--standalone', '--local-addr=127.0.0.1']),
    (dict(PORT=1234), ['--nnodes=1', '--node-rank=0', '--master-addr=127.0.0.1', '--master-port=1234']),
    (dict(NNODES=2, NODE_RANK=1, MASTER_ADDR='10.0.0.1', PORT=1234),
     ['--nnodes=2', '--node-rank=1', '--master-addr=10.0.0.1', '--master-port=1234']),
])
def test_rendezvous(checkout, env, expected):
    argv = printed(run(checkout / 'tools' / 'dist_train.sh', 'config', 1, **env))['argv']
    found = [arg for arg in argv if arg.startswith(('--nnodes', '--standalone', '--node-', '--master-', '--local-'))]
    assert found == expected


def test_restarts(checkout):
    for env, number in ({}, 0), (dict(MAX_RESTARTS=3), 3):
        told = printed(run(checkout / 'tools' / 'dist_train.sh', 'config', 1, **env))
        assert f'--max-restarts={number}' in told['argv']


@pytest.mark.parametrize('command, env, message', [
    ('dist_train.sh', {}, 'usage: '),
    ('dist_test.sh config x.pth', {}, 'usage: '),
    ('slurm_train.sh part', {}, 'usage: '),
    ('slurm_test.sh part', {}, 'usage: '),
    ('dist_train.sh config 0', {}, "error: GPUS must be a number of 1 or more, got '0'"),
    ('dist_train.sh config two', {}, "error: GPUS must be a number of 1 or more, got 'two'"),
    ('dist_train.sh config 08', {}, "error: GPUS must be a number of 1 or more, got '08'"),
    ('dist_train.sh config 1', dict(NNODES='two'), "error: NNODES must be a number of 1 or more, got 'two'"),
    ('dist_train.sh config 1', dict(NNODES=2, MASTER_ADDR='a'), 'error: NNODES=2 needs NODE_RANK: '),
    ('dist_train.sh config 1', dict(NNODES=2, NODE_RANK=1), 'error: NNODES=2 needs MASTER_ADDR: '),
    ('dist_train.sh config 1', dict(NNODES=2, NODE_RANK=0), 'error: NNODES=2 needs MASTER_ADDR: '),
    ('dist_train.sh config 1', dict(NNODES=2, NODE_RANK=2, MASTER_ADDR='a'),
     "error: NODE_RANK must be a number from 0 to 1, got '2'"),
    ('dist_train.sh config 1', dict(NODE_RANK=1), "error: NODE_RANK must be a number from 0 to 0, got '1'"),
    ('dist_train.sh config 1', dict(MAX_RESTARTS='x'), "error: MAX_RESTARTS must be a number of 0 or more, got 'x'"),
    ('dist_train.sh config 1', dict(PORT='x'), "error: PORT must be a number from 1 to 65535, got 'x'"),
    ('dist_train.sh config 1', dict(PORT=70000), "error: PORT must be a number from 1 to 65535, got '70000'"),
    ('slurm_train.sh p j config w', dict(GPUS='x'), "error: GPUS must be a number of 0 or more, got 'x'"),
    ('slurm_train.sh p j config w', dict(GPUS=0), 'error: GPUS=0 needs TASKS: '),
    ('slurm_train.sh p j config w', dict(GPUS=0, TASKS=0), "error: TASKS must be a number of 1 or more, got '0'"),
    ('slurm_train.sh p j config w', dict(GPUS=0, TASKS=1, GPUS_PER_NODE=1), 'error: GPUS=0 and GPUS_PER_NODE=1 '),
    ('slurm_train.sh p j config w', dict(GPUS=4, TASKS=4), 'error: TASKS is for jobs on CPUs, with GPUS=0; '),
    ('slurm_train.sh p j config w', dict(GPUS_PER_NODE='all'), 'error: GPUS_PER_NODE must be a number of 1 or more'),
    ('slurm_train.sh p j config w', dict(GPUS=12), 'error: GPUS must be a multiple of GPUS_PER_NODE, got 12 and 8'),
    ('slurm_train.sh p j config w', dict(CPUS_PER_TASK='5 '), "error: CPUS_PER_TASK must be a number of 1 or more"),
    ('slurm_train.sh p j config w', dict(PORT='x'), 'error: PORT must be a number from 1 to 65535'),
    ('slurm_train.sh p j config w', {}, 'error: srun was not found'),
])
def test_launchers_name_what_is_wrong(checkout, command, env, message):
    script, *args = command.split()
    done = run(checkout / 'tools' / script, *args, **env)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


# ---- Slurm


@pytest.fixture
def slurm(checkout, tmp_path):
    """Runs a Slurm launcher with a program in srun's place that starts one process; returns srun's arguments too."""
    programs = tmp_path / 'programs'
    programs.mkdir()
    (programs / 'srun').write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n'
                                   'while [ "$1" != "$STUB_PYTHON" ]; do shift; done\nexec "$@"\n')
    (programs / 'srun').chmod(0o755)

    def start(script, *args, **env):
        python = checkout / '.venv' / 'bin' / 'python'
        done = run(checkout / 'tools' / script, *args, path=f'{programs}:/usr/bin:/bin', STUB_PYTHON=python, **env)
        return (tmp_path / 'arguments').read_text().split('\n')[:-1], printed(done)

    return start


def test_slurm_starts_one_process_a_gpu(slurm, checkout):
    args, told = slurm('slurm_train.sh', 'part', 'my job', 'my config.py', 'a b', '--amp', GPUS=16,
                       SRUN_ARGS='--qos high')
    python = args.index(str(checkout / '.venv' / 'bin' / 'python'))
    assert args[:python] == ['-p', 'part', '--job-name=my job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8',
                             '--cpus-per-task=5', '--kill-on-bad-exit=1', '--qos', 'high']
    assert told['argv'] == [str(checkout / 'tools' / 'train.py'), 'my config.py', '--work-dir', 'a b', '--amp',
                            '--launcher', 'slurm']
    args, told = slurm('slurm_test.sh', 'part', 'job', 'config', 'x.pth', GPUS=6, GPUS_PER_NODE=3, CPUS_PER_TASK=2)
    assert {'--gres=gpu:3', '--ntasks=6', '--ntasks-per-node=3', '--cpus-per-task=2'} <= set(args)
    assert told['argv'][1:] == ['config', 'x.pth', '--launcher', 'slurm']


def test_a_slurm_job_on_cpus_asks_for_no_gpu(slurm):
    args, _ = slurm('slurm_train.sh', 'part', 'job', 'config', 'work', GPUS=0, TASKS=4)
    assert '--ntasks=4' in args
    assert not any('gres' in arg or 'gpu' in arg or 'per-node' in arg for arg in args)


def test_slurm_port(slurm):
    command = 'slurm_train.sh', 'part', 'job', 'config', 'work'
    assert slurm(*command, PORT=1234)[1]['MASTER_PORT'] == '1234'
    assert slurm(*command)[1]['MASTER_PORT'] is None  # the tools choose one by the job's number


# ---- all together


@pytest.mark.slow
def test_a_copy_trains_whatever_is_active(foreign, tmp_path):
    """A checkout that is installed nowhere, in a folder with blanks, from / and with other Pythons active."""
    root = tmp_path / 'check out'
    for name in ('tools', 'configs', 'convneur_mm'):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('__pycache__'))
    packages = [path for path in sys.path if path.endswith('-packages')]
    make_environment(root / '.venv', paths=packages)
    env = dict(PYTHON=foreign, VIRTUAL_ENV=foreign.parents[1], HOME=tmp_path)
    done = run(foreign, root / 'tools' / 'make_shapes.py', tmp_path / 'my data', '--num-train', 2, '--num-val', 1,
               '--image-size', 64, **env)
    assert done.returncode == 0, done.stderr
    (root / 'configs' / 'my config.py').write_text(CONFIG.format(data=tmp_path / 'my data'))
    (tmp_path / 'link').symlink_to(root / 'tools' / 'dist_train.sh')
    done = run(tmp_path / 'link', root / 'configs' / 'my config.py', 1, '--work-dir', tmp_path / 'my work',
               OMP_NUM_THREADS=1, **env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / 'my work' / 'epoch_1.pth').exists()
    assert 'coco/bbox_mAP' in done.stdout + done.stderr
