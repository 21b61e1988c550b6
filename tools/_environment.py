"""Finds an interpreter that has PyTorch and MMEngine; the tools call this before they import either.

Only what Python 3.6 understands is used here, as the system's ``python`` may be that old. Run as a script it prints
what its interpreter lacks, and nothing if it will do.
"""
import os
import os.path as osp
import subprocess
import sys
from importlib.util import find_spec

TOOLS = osp.dirname(osp.realpath(__file__))
ROOT = osp.dirname(TOOLS)
INSTALLED = osp.basename(ROOT) == '.mim'  # from a wheel: ENVIRONMENT/lib/python3.x/site-packages/convneur_mm/.mim/tools


def prepare():
    """Makes ``import torch, mmengine, convneur_mm`` work, in this process or in another that replaces it.

    Exits with one line on stderr where neither is possible.
    """
    # Read by the OpenMP library when torch loads it. Threads that wait for others then sleep; by default they keep
    # their cores busy for a while, and beside another job a training step takes many times as long.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    lacking = lacks()
    if lacking:
        run_elsewhere(lacking)
    if missing(['convneur_mm']):
        # This checkout is not installed into the interpreter's environment. The variable is for other processes.
        sys.path.append(ROOT)
        os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), ROOT]))


def lacks():
    """What this interpreter lacks of what every tool needs."""
    if sys.version_info < (3, 10):  # noqa: UP036  other Pythons than ours run this
        return ['Python 3.10']
    return missing(['torch', 'mmengine'] + ['convneur_mm'] * INSTALLED)


def missing(names):
    """Those of the packages ``names`` that this interpreter does not find; nothing is imported."""
    # A folder without __init__.py, such as what an uninstalled package left behind, has no origin.
    return [name for name in names if getattr(find_spec(name), 'origin', None) is None]


def run_elsewhere(lacking):
    """Replaces this process by the same command in an environment that has the packages."""
    if INSTALLED:
        environments = [osp.abspath(osp.join(TOOLS, *['..'] * 6))]
        remedy = 'use the Python of the environment that convneur_mm is installed in'
    else:
        environments = [osp.join(ROOT, '.venv'), osp.join(ROOT, '.venv-openmmlab')]
        remedy = 'make an environment with ' + osp.join(TOOLS, 'setup_env.sh')
    reason = f'{sys.executable} lacks ' + ', '.join(lacking)
    for environment in environments:
        python = osp.join(environment, 'bin', 'python')
        if has_packages(python):
            print(f'note: {reason}; using {python}', file=sys.stderr, flush=True)
            # With options of the interpreter itself, such as -u, where this version of Python knows them.
            command = getattr(sys, 'orig_argv', [sys.executable] + sys.argv)
            os.execv(python, [python] + command[1:])
    print(f'error: {reason}; {remedy}', file=sys.stderr, flush=True)
    sys.exit(2)


def has_packages(python):
    """Whether the interpreter ``python`` runs and finds the packages."""
    try:
        done = subprocess.run([python, osp.realpath(__file__)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return done.returncode == 0 and not done.stdout.strip()


if __name__ == '__main__':
    print(', '.join(lacks()))
