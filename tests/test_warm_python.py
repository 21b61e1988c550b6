"""What runs in tests/helpers/warm_python.py ends as in a new interpreter."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not hasattr(os, 'pidfd_open'), reason='the interpreter itself is taken elsewhere')]

SEEN = """
import __main__, os, signal, sys, tempfile
print(sys.argv, sys.flags.dont_write_bytecode or sys.dont_write_bytecode, sys.stdin.read(), os.getcwd())
# Without folders that packages make for themselves.
paths = [path for path in sys.path if 'warm' not in path and os.path.dirname(path) != tempfile.gettempdir()]
print(paths, __name__, __main__.__dict__.get('__file__'))
print(sorted(item for item in os.environ.items() if item[0] != 'PWD'))  # the shell sets it
print(signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGINT))
print([name for name in sys.modules if name.split('.')[0] == 'convneur_mm'])
"""


def run(python, *args, **options):
    env = {**os.environ, **options.pop('env', {})}
    done = subprocess.run([python, *map(str, args)], capture_output=True, text=True, env=env, **options)
    return done.returncode, done.stdout, done.stderr.replace(sys.executable, 'python')


def without_frames_of_the_helper(text):
    lines, kept = iter(text.splitlines()), []
    for line in lines:
        if 'warm_python.py' in line:
            next(lines)
        else:
            kept.append(line)
    return kept


@pytest.mark.parametrize('form', ['code', 'script', 'module'])
def test_a_process_sees_what_a_new_one_would(tmp_path, form):
    script = tmp_path / 'a folder' / 'seen.py'
    script.parent.mkdir()
    script.write_text(SEEN)
    (tmp_path / 'sitecustomize.py').write_text('print("customized")')
    args = dict(code=['-c', SEEN], script=[script], module=['-m', 'seen'])[form]
    options = dict(cwd=script.parent, input='typed', env=dict(PYTHONPATH=f'{tmp_path}{os.pathsep}..', OTHER='1'))
    expected = run(sys.executable, *args, 'x', '-y', **options)
    assert expected[0] == 0 and expected[1].startswith('customized\n') and "'-y']" in expected[1]
    assert run(warm_python(), *args, 'x', '-y', **options) == expected


@pytest.mark.parametrize('code', [
    'import sys; sys.exit(7)', 'import sys; sys.exit("a reason")', 'raise ValueError("x")',
    'import os; print("lost"); os._exit(3)', 'import os; print("kept", flush=True); os.kill(os.getpid(), 9)',
    'import atexit; atexit.register(print, "at the end"); print("first")',
    'import os, sys; print(1); print(2, file=sys.stderr); sys.stdout.flush(); os.write(1, b"3")',
    'import concurrent.futures as f\nwith f.ProcessPoolExecutor(2) as p: print(list(p.map(abs, [-1, -2])))',
    'import subprocess, sys; print(subprocess.run([sys.executable, "-c", "import sys; sys.exit(5)"]).returncode)',
])
def test_a_process_ends_as_a_new_one_would(code):
    status, output, errors = run(sys.executable, '-c', code)
    ours = run(warm_python(), '-c', code)
    assert ours[:2] == (status, output)
    assert without_frames_of_the_helper(ours[2]) == errors.splitlines()


def test_a_signal_reaches_the_process():
    # Python would not see a signal that comes right before a long sleep begins.
    code = 'import signal, time\nsignal.signal(15, lambda *_: exit(9)); print("ready", flush=True)\n' \
        'for _ in range(600): time.sleep(0.1)'
    with subprocess.Popen([warm_python(), '-c', code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 9


def test_a_killed_call_takes_its_process_along():
    code = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
    with subprocess.Popen([warm_python(), '-c', code], stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
    limit = time.monotonic() + 20
    while Path(f'/proc/{pid}').exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not Path(f'/proc/{pid}').exists()


def test_what_a_fork_cannot_do_is_left_to_the_interpreter():
    code = 'import sys; print(sys.executable, "torch" in sys.modules)'
    expected = f'{sys.executable} False\n'
    assert run(warm_python(), '-W', 'ignore', '-c', code)[1] == expected
    assert run(warm_python(), '-c', code, env=dict(PYTHONWARNINGS='ignore'))[1] == expected
    assert run(warm_python(), '-c', code)[1] == f'{warm_python()} True\n'


def test_nothing_is_left_behind(tmp_path):
    """The process behind ends with the one that started it, however that ends."""
    code = f'import os, sys; sys.path.insert(0, {str(Path(__file__).parent / "helpers")!r})\n' \
        'import warm_python as w; w.PRELOADED = (); p = w.warm_python(); print(p); print(w.warm_python.process.pid)\n' \
        'sys.stdout.flush(); os.kill(os.getpid(), 9)'
    program, pid = run(sys.executable, '-c', code)[1].splitlines()
    limit = time.monotonic() + 60
    while (Path(f'/proc/{pid}').exists() or Path(program).parent.exists()) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not Path(f'/proc/{pid}').exists() and not Path(program).parent.exists()
