"""An interpreter that starts in a second where a new one takes six: what most of the tests' processes run in.

Most of that time goes into importing PyTorch, OpenMMLab's packages and those around them. :func:`warm_python` is a
program to be called like ``python``. Behind it stands one process that has imported them, but not this project, and
that forks for each call: working directory, environment, arguments, standard streams, ``sys.path``, exit status and
signals are as those of a new interpreter, and ``sys.executable`` is the program, so that what a tool starts is as
quick. A test of imports, warnings, threads or process groups takes ``sys.executable`` itself.

Run as a script this file is the process behind (``serve SOCKET``) or a call (``call SOCKET [arguments of python]``).
"""
import contextlib
import functools
import os
import signal
import socket
import struct
import sys

# The dependencies that take longest; optional ones where they are installed.
PRELOADED = ('torch', 'torch._dynamo', 'torch.distributed.fsdp', 'torchvision', 'matplotlib.pyplot', 'cv2',
             'scipy.optimize', 'pycocotools.mask', 'rich.progress', 'modelindex', 'timm', 'numba', 'skimage.measure',
             'mmengine.runner', *(f'{scope}.{part}' for scope in ('mmdet', 'mmseg', 'mmpretrain') for part in (
                 'models', 'datasets', 'engine', 'evaluation', 'visualization')))
# Of the variables for Python, those that a forked process follows.
UNDERSTOOD = ('PYTHON', 'PYTHONPATH', 'PYTHONUNBUFFERED', 'PYTHONDONTWRITEBYTECODE')
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@functools.cache
def warm_python() -> str:
    """The path of the program; a system that cannot do this gets the interpreter itself."""
    import shlex
    import subprocess
    import tempfile
    from pathlib import Path
    if not hasattr(os, 'pidfd_open'):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix='warm python '))
    program, address = folder / 'python', folder / 'socket'
    command = shlex.join([sys.executable, '-IS', os.path.realpath(__file__), 'call', str(address)])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    # Ends when this process does, however that may be: its standard input is then at its end.
    process = subprocess.Popen([sys.executable, os.path.realpath(__file__), 'serve', str(address)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert process.stdout.readline() == b'ready\n', 'no process behind the warm interpreter'
    warm_python.process = process  # or it would be closed
    return str(program)


# ---- a call


def call(address: str, arguments: list[str]) -> None:
    """Runs in a bare interpreter: sends all there is to know, and ends as the process there does."""
    if not understood(arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
    import json
    import select
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until it is known where to send them
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    text = json.dumps(dict(arguments=arguments, cwd=os.getcwd(), env=dict(os.environ),
                           program=os.path.join(os.path.dirname(address), 'python'),
                           ignored=[number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]))
    socket.send_fds(connection, [struct.pack('!I', len(text.encode()))], [0, 1, 2])
    connection.sendall(text.encode())
    pid, = struct.unpack('!i', receive(connection, 4))
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    # Python would not see a signal that comes right before it begins to wait.
    while not select.select([connection], [], [], 0.2)[0]:
        pass
    status, = struct.unpack('!i', receive(connection, 4))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def understood(arguments: list[str]) -> bool:
    """Whether a forked process can do it: no options of Python's, and none by way of the environment."""
    options = [name for name in os.environ if name.startswith('PYTHON') and name not in UNDERSTOOD]
    return not options and bool(arguments) and (arguments[0] in ('-c', '-m') or not arguments[0].startswith('-'))


def receive(connection: socket.socket, size: int) -> bytes:
    data = b''
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError('the process behind the warm interpreter is gone')
        data += more
    return data


# ---- the process behind


def provide_operators() -> None:
    """Gives mmdet the operators of an mmcv that was not compiled, without an import of the project."""
    import importlib.util
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), *['..'] * 2, 'convneur_mm', 'stack.py')
    spec = importlib.util.spec_from_file_location('stack_of_the_checkout', os.path.normpath(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.provide_operators()


def serve(address: str) -> None:
    """Forks for each call, until standard input ends. Returns in the forked processes alone, with all in place."""
    import importlib
    import importlib.util
    import select
    import warnings
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):  # some print what they lack
        warnings.simplefilter('ignore')
        provide_operators()
        for name in PRELOADED:
            if importlib.util.find_spec(name.split('.')[0]):
                importlib.import_module(name)
    import gc
    gc.freeze()
    assert 'convneur_mm' not in sys.modules
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b'ready\n')
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forked ones here
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            folder = os.path.dirname(address)
            for name in (address, os.path.join(folder, 'python')):  # what has been made, and nothing else
                os.unlink(name)
            os.rmdir(folder)
            sys.exit()
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return handle(connection)
        connection.close()


def handle(connection: socket.socket) -> None:
    """Becomes the asked for process in a fork of its own, and tells the caller how it ended."""
    import json
    import select
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    wanted = json.loads(receive(connection, struct.unpack('!I', head)[0]))
    pid = os.fork()
    if not pid:
        connection.close()
        return become(wanted, files)
    for file in files:
        os.close(file)
    connection.sendall(struct.pack('!i', pid))
    child = os.pidfd_open(pid)
    ready, _, _ = select.select([child, connection], [], [])
    if child not in ready:  # the caller has been killed
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # nobody asks any more
        connection.sendall(struct.pack('!i', status))
    os._exit(0)


def become(wanted: dict, files: list[int]) -> None:
    """Streams, folder, environment and path of the caller; what is left is to run what it asked for."""
    import site
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(wanted['cwd'])
    os.environ.clear()
    os.environ.update(wanted['env'])
    for name, file, mode in (('stdin', 0, 'r'), ('stdout', 1, 'w'), ('stderr', 2, 'w')):
        errors = 'backslashreplace' if name == 'stderr' else None
        buffering = 1 if name == 'stderr' or 'PYTHONUNBUFFERED' in os.environ or os.isatty(file) else -1
        stream = open(file, mode, buffering=buffering, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f'__{name}__', stream)
    for number in FORWARDED:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in wanted['ignored'] else default)
    sys.executable = wanted['program']
    sys.dont_write_bytecode = 'PYTHONDONTWRITEBYTECODE' in os.environ
    path = [os.path.abspath(part) for part in wanted['env'].get('PYTHONPATH', '').split(os.pathsep) if part]
    sys.path[:] = dict.fromkeys(path + sys.path[1:])  # the first was this file's folder
    sys.modules.pop('sitecustomize', None)
    site.execsitecustomize()
    sys.argv[:] = wanted['arguments']


def run() -> None:
    """As ``python`` runs its arguments, here in ``sys.argv``."""
    import runpy
    import types
    if sys.argv[0] == '-m':
        sys.path.insert(0, os.getcwd())
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
        return
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    if sys.argv[0] == '-c':
        code, name = sys.argv.pop(1), '<string>'
        sys.path.insert(0, '')
    else:
        name = main.__file__ = sys.argv[0]
        sys.path.insert(0, os.path.dirname(os.path.realpath(name)))
        with open(name, 'rb') as file:
            code = file.read()
    exec(compile(code, name, 'exec'), main.__dict__)


if __name__ == '__main__':
    if sys.argv[1] == 'call':
        call(sys.argv[2], sys.argv[3:])
    else:
        serve(sys.argv[2])
        run()
