"""``--resume``: the checkpoint it goes on from, and what it says where there is none."""
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

from convneur_mm.engine.files import resume
from convneur_mm.engine.files.errors import LaunchError
from convneur_mm.engine.files.resume import (
    check_same_checkpoint,
    checkpoint_after_restart,
    latest_checkpoint,
    saved_checkpoints,
)


class TestResumeAlone:
    @pytest.fixture
    def work(self, trained, run):
        shutil.copytree(trained, 'work')
        Path('work/last_checkpoint').write_text('work/epoch_2.pth')
        return Path('work')

    def test_takes_the_newest(self, work):
        (work / 'epoch_10.pth').write_bytes((work / 'epoch_1.pth').read_bytes())
        assert latest_checkpoint('work', 'config.py', False) == 'work/epoch_2.pth'

    @pytest.mark.parametrize('allow', [[], ['--allow-pickle']])
    def test_goes_on_from_the_one_before_a_damaged_one(self, work, run, allow):
        (work / 'epoch_2.pth').write_bytes((work / 'epoch_2.pth').read_bytes()[:2000])
        assert run('train', '--resume', *allow) is None
        log = max(work.glob('*/*.log')).read_text()
        assert 'resumed epoch: 1, iter: 2' in log
        assert torch.load(work / 'epoch_2.pth', weights_only=False)['meta']['epoch'] == 2

    def test_names_the_damaged_one(self, work, caplog, monkeypatch):
        logged = []
        monkeypatch.setattr(MMLogger, 'warning', lambda self, text: logged.append(text))
        (work / 'epoch_2.pth').write_bytes(b'')
        assert latest_checkpoint('work', 'config.py', False) == str(work / 'epoch_1.pth')
        assert len(logged) == 1 and '\n' not in logged[0]
        assert 'older checkpoint: work/epoch_2.pth is no checkpoint: the file is empty' in logged[0]

    def test_names_the_last_of_several_damaged_ones(self, work):
        for path in work.glob('epoch_*.pth'):
            path.write_bytes(b'')
        with pytest.raises(LaunchError, match='no checkpoint in work is intact: work/epoch_1.pth is no checkpoint'):
            latest_checkpoint('work', 'config.py', False)

    def test_does_without_the_record(self, work):
        (work / 'last_checkpoint').unlink()
        assert latest_checkpoint('work', 'config.py', False) == 'work/epoch_2.pth'


class TestNothingToResume:
    @pytest.mark.parametrize('args', [['--resume'], ['--cfg-options', 'resume=True']])
    def test_is_an_error_before_anything_is_trained(self, run, args):
        expected = ('--resume: no checkpoint in work; name the work dir of the earlier run with --work-dir, or a file '
                    'with --resume CHECKPOINT, or leave --resume out for a first start')
        assert run('train', *args) == expected
        assert not Path('work').exists()
        Path('work').mkdir()
        assert run('train', *args) == expected
        assert not list(Path('work').iterdir())


class TestWithoutATraining:
    """Small files in the places of checkpoints."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def save(path, content=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content or dict(state_dict={}), path)

    @staticmethod
    def work_dir(path, checkpoint='epoch_1.pth', time=0, config='config.py'):
        """A work dir with MMEngine's record and the config of its run."""
        Path(path).mkdir(parents=True)
        Path(path, config).touch()
        Path(path, 'last_checkpoint').write_text(f'{path}/{checkpoint}')
        os.utime(f'{path}/last_checkpoint', (time, time))

    def test_the_record_comes_first_then_falling_numbers(self):
        for name in 'epoch_9', 'iter_10', 'epoch_2', 'best_acc_epoch_30', 'epoch_40_ema':
            self.save(f'work/{name}.pth')
        assert saved_checkpoints('work') == ['work/iter_10.pth', 'work/epoch_9.pth', 'work/epoch_2.pth']
        Path('work/last_checkpoint').write_text(f'{Path("work/epoch_9.pth").absolute()}\n')
        assert saved_checkpoints('work') == [
            str(Path('work/epoch_9.pth').absolute()), 'work/iter_10.pth', 'work/epoch_2.pth']

    def test_one_that_needs_pickle_is_not_passed_over(self):
        self.save('work/epoch_1.pth')
        self.save('work/epoch_2.pth', dict(state_dict={}, config=Path('x')))
        with pytest.raises(LaunchError, match='^--resume: work/epoch_2.pth was not loaded, because it needs pickle'):
            latest_checkpoint('work', 'config.py', False)
        assert latest_checkpoint('work', 'config.py', True) == 'work/epoch_2.pth'

    def test_one_in_parts_is_not_read(self):
        self.save('work/epoch_1.pth')
        Path('work/epoch_2.pth').mkdir()
        assert latest_checkpoint('work', 'config.py', False) == 'work/epoch_2.pth'

    @pytest.mark.parametrize('allow_pickle', [False, True])
    def test_one_that_is_gone_is_passed_over(self, allow_pickle):
        self.save('work/epoch_1.pth')
        Path('work/last_checkpoint').write_text('work/epoch_2.pth')
        assert latest_checkpoint('work', 'config.py', allow_pickle) == 'work/epoch_1.pth'

    def test_other_work_dirs_of_the_config(self):
        def message():
            with pytest.raises(LaunchError) as error:
                latest_checkpoint('runs/work', 'configs/config.py', False)
            return re.match(r'--resume: no checkpoint in runs/work(.*); name the work dir', str(error.value))[1]

        assert message() == ''
        self.work_dir('runs/other', config='other.py')
        self.work_dir('runs/a/b/too_deep')
        assert message() == ''
        self.work_dir('runs/d', 'epoch_7.pth', time=1)
        self.work_dir('runs/x/c', 'iter_500.pth', time=3)
        self.work_dir('work_dirs/b', time=2)
        found = ', but in runs/x/c (iter_500.pth), work_dirs/b (epoch_1.pth), runs/d (epoch_7.pth)'
        assert message() == f'{found} of the same config'
        self.work_dir('work_dirs/oldest', time=0)
        assert message() == f'{found}, … of the same config'


class TestAfterARestart:
    """Small files in the places of checkpoints, beside those of an earlier run."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path('work').mkdir()
        Path('launch').mkdir()
        self.save(1)
        self.save(9)

    @staticmethod
    def save(number):
        torch.save(dict(state_dict={}), f'work/epoch_{number}.pth')
        Path('work/last_checkpoint').write_text(str(Path(f'work/epoch_{number}.pth').absolute()))

    @staticmethod
    def found(rank=0):
        path = checkpoint_after_restart('work', False, dict(CONVNEUR_LAUNCH_DIR='launch', LOCAL_RANK=str(rank)))
        return path and Path(path).name

    def test_only_what_this_launch_has_saved_counts(self):
        assert [self.found(rank) for rank in (1, 0, 1)] == [None] * 3  # the first start
        assert self.found() is None  # a restart before anything was saved
        self.save(1)  # under the name of an earlier one
        assert self.found() == 'epoch_1.pth'
        self.save(2)
        assert self.found(1) == 'epoch_2.pth'
        assert checkpoint_after_restart('elsewhere', False, dict(CONVNEUR_LAUNCH_DIR='launch')) is None
        # By another launcher.
        assert checkpoint_after_restart('work', False, dict(TORCHELASTIC_RESTART_COUNT='1')) is None

    def test_damaged_and_lost_ones_do_not_count(self):
        self.found()
        for number in 1, 2, 3:
            self.save(number)
        Path('work/epoch_3.pth').unlink()
        Path('work/epoch_2.pth').write_bytes(b'cut off')
        assert self.found() == 'epoch_1.pth'
        Path('work/epoch_1.pth').write_bytes(b'')
        assert self.found() is None


@pytest.mark.parametrize('own, others', [(None, [None]), ('a/epoch_1.pth', ['epoch_1.pth'])])
def test_all_processes_have_the_same_checkpoint(own, others, monkeypatch):
    monkeypatch.setattr(resume, 'all_gather_object', lambda name: [name, *others])
    check_same_checkpoint(own)


@pytest.mark.parametrize('own, others, found', [
    (None, ['epoch_1.pth'], 'process 0 none, process 1 epoch_1.pth'),
    ('a/epoch_2.pth', ['epoch_2.pth', 'epoch_1.pth'],
     'process 0 epoch_2.pth, process 1 epoch_2.pth, process 2 epoch_1.pth')])
def test_processes_with_different_checkpoints_do_not_train(own, others, found, monkeypatch):
    """They would train different models together."""
    monkeypatch.setattr(resume, 'all_gather_object', lambda name: [name, *others])
    with pytest.raises(LaunchError, match=rf'different checkpoints to resume from \({found}\): the work dir must be'):
        check_same_checkpoint(own)
