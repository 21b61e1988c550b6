"""Find an interpreter that has PyTorch and MMEngine. The tools call this before they import either.

The system's ``python`` may be old, so this file uses only Python 3.6 syntax. Run as a script, it prints what its
interpreter lacks, or an empty line.
"""
import os
import os.path as osp
import subprocess
import sys
import warnings
from importlib.util import find_spec

TOOLS = osp.dirname(osp.realpath(__file__))
ROOT = osp.dirname(TOOLS)
INSTALLED = osp.basename(ROOT) == '.mim'  # from a wheel: ENVIRONMENT/lib/python3.x/site-packages/convneur_mm/.mim/tools

# Regular expressions that match the start of a message.
MESSAGES = (
    'pkg_resources is deprecated',
    'Deprecated call to `pkg_resources',
    'TypedStorage is deprecated',
    r'torch\.meshgrid: in an upcoming release',
    # From mmengine. The summary at the start already gives the number of threads.
    r'Setting (OMP|MKL)_NUM_THREADS environment variable for each process',
    # From DDP: a depthwise convolution's gradient has another memory layout than its weight.
    'Grad strides do not match bucket view strides',
    # From mmdet: a missing optional metric, and a tensor copied in the mask head.
    'faster_coco_eval is not installed',
    'To copy construct from a tensor',
    # From mmengine's visualizer, for boxes that touch the image border.
    r'Warning: The \w+ is out of bounds',
    # mmseg 1.2 calls its own deprecated function.
    r'``build_\w+`` would be deprecated soon',
    # From mmseg: the losses and the drawing hook report settings that their configs chose.
    'Default ``avg_non_ignore`` is False',
    'The draw is False, it means that the hook for visualization',
)
PACKAGES = '(mmengine|mmcv|mmdet|mmseg|mmpretrain)'


def prepare():
    """Make ``import torch, mmengine, convneur_mm`` work in this process, or replace it by one where it works.

    Exits with one line on stderr if neither is possible.
    """
    # OpenMP reads this when torch loads it. Waiting threads then sleep. By default they keep their cores busy for a
    # while, and next to another job a training step takes many times as long.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    lacking = lacks()
    if lacking:
        run_elsewhere(lacking)
    hide_warnings()
    if missing(['convneur_mm']):
        # This interpreter's environment lacks convneur_mm. The variable passes this checkout on to child processes.
        sys.path.append(ROOT)
        os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), ROOT]))


def hide_warnings():
    """Hide other packages' warnings that users of the tools cannot act on; data workers inherit the filters."""
    for message in MESSAGES:
        warnings.filterwarnings('ignore', message=message)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings('ignore', category=category, module=PACKAGES + r'(\.|$)')


def lacks():
    """Return which of every tool's requirements this interpreter lacks."""
    if sys.version_info < (3, 10):  # noqa: UP036  older Pythons run this file
        return ['Python 3.10']
    return missing(['torch', 'mmengine'] + ['convneur_mm'] * INSTALLED)


def missing(names):
    """Return those of the packages ``names`` that this interpreter cannot find, without importing any."""
    # A folder without __init__.py has no origin; an uninstalled package may leave one behind.
    return [name for name in names if getattr(find_spec(name), 'origin', None) is None]


def run_elsewhere(lacking):
    """Replace this process by the same command in an environment that has the packages."""
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
            # Keep the interpreter's own options, such as -u, if this Python version knows them.
            command = getattr(sys, 'orig_argv', [sys.executable] + sys.argv)
            os.execv(python, [python] + command[1:])
    print(f'error: {reason}; {remedy}', file=sys.stderr, flush=True)
    sys.exit(2)


def has_packages(python):
    """Tell whether the interpreter ``python`` runs and finds the packages."""
    try:
        done = subprocess.run([python, osp.realpath(__file__)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return done.returncode == 0 and not done.stdout.strip()


if __name__ == '__main__':
    print(', '.join(lacks()))
