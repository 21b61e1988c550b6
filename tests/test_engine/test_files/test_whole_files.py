"""Files that are there as a whole or not at all, also where the process is killed or the disk is full."""
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.fileio import LocalBackend, get_file_backend, register_backend

from convneur_mm.engine.files import whole_files
from convneur_mm.engine.files.whole_files import (
    NotSavedError,
    WholeFileBackend,
    remove_parts,
    write_files_whole,
    write_whole,
)


def test_replaces_a_file(tmp_path):
    for content in b'old', b'new':
        write_whole(tmp_path / 'x.pth', content)
        assert (tmp_path / 'x.pth').read_bytes() == content
    assert os.listdir(tmp_path) == ['x.pth']


def test_a_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_whole('x.pth', b'new')
    assert os.listdir() == ['x.pth']


def test_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that loses its power may keep the name and not the content."""
    calls, open_before = [], os.listdir('/proc/self/fd')

    def fsync(file, original=os.fsync):
        path = Path(os.readlink(f'/proc/self/fd/{file}'))
        calls.append(('fsync', path.name, path.read_bytes() if path.is_file() else (path / 'x.pth').exists()))
        original(file)

    def replace(part, path, original=os.replace):
        calls.append(('replace',))
        original(part, path)

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    write_whole(tmp_path / 'x.pth', b'new')
    assert calls == [('fsync', 'x.pth.saving', b'new'), ('replace',), ('fsync', tmp_path.name, True)]
    assert os.listdir('/proc/self/fd') == open_before


@pytest.mark.parametrize('place', ['fsync', 'replace'])
def test_a_kill_leaves_the_old_file_and_the_part(tmp_path, monkeypatch, place):
    write_whole(tmp_path / 'x.pth', b'old')
    process = os.fork()
    if not process:
        try:
            monkeypatch.setattr(os, place, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            write_whole(tmp_path / 'x.pth', b'new')
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert (tmp_path / 'x.pth').read_bytes() == b'old'
    assert (tmp_path / 'x.pth.saving').exists()
    remove_parts(str(tmp_path), f'{tmp_path}/', 'nowhere')
    assert os.listdir(tmp_path) == ['x.pth']


def test_an_interruption_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    write_whole(tmp_path / 'x.pth', b'old')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'fsync', interrupt)
        write_whole(tmp_path / 'x.pth', b'new')
    assert os.listdir(tmp_path) == ['x.pth']
    assert (tmp_path / 'x.pth').read_bytes() == b'old'


@pytest.mark.parametrize('folder', ['', 'folder/'])
def test_a_file_that_is_too_large(tmp_path, monkeypatch, folder):
    """As on a full disk, the first part of it can be written."""
    monkeypatch.chdir(tmp_path)
    os.makedirs(folder or '.', exist_ok=True)
    write_whole(f'{folder}x.pth', b'old')
    _, hard = limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(whole_files.shutil, 'disk_usage', lambda path: SimpleNamespace(free=7_654_321))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(NotSavedError) as error:
            write_whole(f'{folder}x.pth', bytes(1_234_567))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(error.value) == (
        f'{folder}x.pth was not saved (File too large): it takes 1.2 MB, and 7.7 MB are free in {folder[:-1] or "."}; '
        'make room, and run the command again, a training with --resume')
    assert os.listdir(folder or '.') == ['x.pth']
    assert Path(f'{folder}x.pth').read_bytes() == b'old'


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(NotSavedError, match=r'gone/x\.pth was not saved \(No such file or directory\)$'):
        write_whole(tmp_path / 'gone/x.pth', b'new')


def test_the_backend_makes_folders(tmp_path):
    WholeFileBackend().put(b'new', tmp_path / 'a/b/x.pth')
    assert os.listdir(tmp_path / 'a/b') == ['x.pth']
    assert WholeFileBackend().get(tmp_path / 'a/b/x.pth') == b'new'


def test_the_backend_replaces_text(tmp_path):
    """As MMEngine's JSON files are: a reader, or a hard link, keeps the old ones."""
    path = tmp_path / 'a' / 'x.json'
    WholeFileBackend().put_text('old', path)
    os.link(path, tmp_path / 'other.json')
    WholeFileBackend().put_text('neu: ü', path)
    assert path.read_text('utf-8') == 'neu: ü' and (tmp_path / 'other.json').read_text() == 'old'


def test_mmengine_writes_through_it():
    """Whatever backend was registered before."""
    register_backend('local', LocalBackend, prefixes='', force=True)
    assert type(get_file_backend('x.pth')) is LocalBackend
    write_files_whole()
    assert type(get_file_backend('x.pth')) is type(get_file_backend(backend_args=dict(backend='local'))) is \
        WholeFileBackend
