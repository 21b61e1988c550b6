"""Hooks of the tools' runs: checkpoints of other models and classes, and names for pictures."""
import errno
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS, MODELS, DefaultScope

from convneur_mm.engine.files.checkpoint import read_checkpoint
from convneur_mm.engine.files.resume import latest_checkpoint
from convneur_mm.engine.files.weights_file import CheckpointError
from convneur_mm.engine.hooks import checkpoints as hooks
from convneur_mm.engine.hooks.checkpoints import _check_optimizer
from convneur_mm.engine.launch import without_sync_bn


class Killed(BaseException):
    """Stands for the end of the process."""


class TestSaving:
    """Outdated checkpoints stay until the new one is complete."""

    KEEP = ('--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=1')
    BEST = """
val_dataloader = test_dataloader
val_cfg = dict()
val_evaluator = dict(type='RisingScore')
default_hooks['checkpoint'].update(save_best='score', rule='greater')
"""

    @staticmethod
    @contextmanager
    def killed_at(name):
        """Ends the run when such a file is written, and has not got its name yet."""
        def replace(part, path, original=os.replace):
            if Path(path).name == name:
                shutil.copy(part, 'part')
                raise Killed
            original(part, path)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, 'replace', replace)
            yield

    def test_a_run_that_ends_while_saving_can_be_resumed(self, run):
        with self.killed_at('epoch_2.pth'):
            run('train', *self.KEEP)
        assert sorted(path.name for path in Path('work').glob('*.pth')) == ['epoch_1.pth']
        assert Path('work/last_checkpoint').read_text().endswith('work/epoch_1.pth')
        # As a kill leaves it.
        Path('part').rename('work/epoch_2.pth.saving')
        Path('work/last_checkpoint.saving').write_text('work/epoch_2.pth')
        assert latest_checkpoint('work', 'config.py', False).endswith('work/epoch_1.pth')
        assert run('train', '--resume', *self.KEEP) is None
        assert not list(Path('work').glob('*.saving'))
        assert read_checkpoint('work/epoch_2.pth')['meta']['epoch'] == 2

    def test_the_former_best_stays_while_the_new_one_is_saved(self, run):
        with Path('config.py').open('a') as config:
            config.write(self.BEST)
        with self.killed_at('best_score_epoch_2.pth'):
            run('train', *self.KEEP)
        assert read_checkpoint('work/best_score_epoch_1.pth')['meta']['epoch'] == 1
        assert not Path('work/best_score_epoch_2.pth').exists()

    def test_a_run_that_ends_while_the_record_is_written_can_be_resumed(self, run):
        """MMEngine writes it in place, so a kill leaves a part of the name, or none of it."""
        assert run('train', '--cfg-options', 'train_cfg.max_epochs=1') is None
        for left in ('', 'work/epo'):
            Path('work/last_checkpoint').write_text(left)
            assert latest_checkpoint('work', 'config.py', False) == 'work/epoch_1.pth'
        assert run('train', '--resume') is None
        assert read_checkpoint('work/epoch_2.pth')['meta']['epoch'] == 2

    def test_hooks_of_others_see_the_runner_itself(self, run):
        """With its work dir, in which they may leave files beside the checkpoint."""
        seen = []

        @HOOKS.register_module(force=True)
        class RememberRunnerHook(Hook):
            def before_save_checkpoint(self, runner, checkpoint):
                seen.append((runner, runner.work_dir))

            def after_train(self, runner):
                seen.append((runner, runner.work_dir))

        assert run('train', '--cfg-options', 'custom_hooks.0.type=RememberRunnerHook') is None
        assert len(seen) == 3 and len(set(seen)) == 1

    def test_a_full_disk_ends_the_run_with_one_line(self, run, monkeypatch):
        def fsync(file, original=os.fsync):
            if Path('work/epoch_2.pth.saving').exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(file)

        monkeypatch.setattr(os, 'fsync', fsync)
        assert re.fullmatch(
            r'.*work/epoch_2\.pth was not saved \(No space left on device\): it takes 0\.\d MB, and [\d,.]+ MB are '
            r'free in .*work; make room, and run the command again, a training with --resume', run('train', *self.KEEP))
        assert Path('work/last_checkpoint').read_text().endswith('work/epoch_1.pth')
        assert read_checkpoint('work/epoch_1.pth')['meta']['epoch'] == 1
        assert not list(Path('work').glob('*.saving'))

    def test_a_folder_is_kept_until_the_end_too(self, tmp_path):
        """As a strategy leaves it that saves the parts of each process."""
        removed = []
        later = hooks._LateRemovals(SimpleNamespace(rmtree=removed.append, remove=None, isdir=lambda path: True))
        later.rmtree('epoch_1')
        assert not removed and later.isdir('epoch_1')
        for remove, path in later.removals:
            remove(path)
        assert removed == ['epoch_1']

    def test_then_they_are_deleted(self, run):
        with Path('config.py').open('a') as config:
            config.write(self.BEST)
        assert run('train', *self.KEEP) is None
        assert sorted(path.name for path in Path('work').glob('*.pth')) == ['best_score_epoch_2.pth', 'epoch_2.pth']


@METRICS.register_module()
class RisingScore(BaseMetric):
    """Each evaluation is better than the one before."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.count = getattr(self, 'count', 0) + 1
        return dict(score=self.count)


class TestClasses:
    """Of a checkpoint, against those of the data set: ('a', 'b')."""

    @pytest.fixture
    def save(self, run):
        def save(*classes, **meta):
            model = MODELS.build(dict(type='CheckpointTestModel'))
            meta = dict(meta=dict(dataset_meta=dict(classes=classes))) if classes else meta
            torch.save(dict(state_dict=model.state_dict(), **meta), 'x.pth')

        return save

    def test_the_same_or_none_pass(self, run, save):
        for classes, meta in ((('a', 'b'), {}), ((), {}), ((), dict(meta={})),
                              ((), dict(meta=dict(dataset_meta=dict(palette=[]))))):
            save(*classes, **meta)
            assert run('test', 'x.pth') is None
        assert 'calls its classes' not in max(Path('work').glob('*/*.log')).read_text()

    @pytest.mark.parametrize('trained', [('a', 'b', 'c'), ('a',), ('b', 'a')])
    def test_more_fewer_or_swapped_ones_are_refused(self, run, save, trained):
        save(*trained)
        assert run('test', 'x.pth').startswith(
            f'the checkpoint tells ({", ".join(trained)}) apart, but test_dataloader.dataset has the classes (a, b): ')

    def test_other_names_are_worth_a_warning(self, run, save):
        save('n02121620', 'n02924116')
        assert run('test', 'x.pth') is None
        assert ('the checkpoint calls its classes (n02121620, n02924116), the test data set (a, b)'
                in max(Path('work').glob('*/*.log')).read_text())

    def test_a_training_may_start_from_others(self, run, save):
        save('b', 'a')
        assert run('train', '--cfg-options', 'load_from=x.pth') is None

    def test_a_training_is_not_resumed_from_others(self, run, trained):
        checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
        checkpoint['meta']['dataset_meta']['classes'] = ('b', 'a')
        torch.save(checkpoint, 'x.pth')
        assert run('train', '--resume', 'x.pth') == (
            'the checkpoint tells (b, a) apart, but train_dataloader.dataset has the classes (a, b): its predictions '
            'would count for the wrong ones. Resume with the classes it was trained for, or name it as load_from '
            'instead')


class TestOptimizers:
    """Of a training that is resumed: AdamW, with all parameters in one group."""

    def resume(self, run, trained, *options):
        return run('train', '--resume', str(trained / 'epoch_1.pth'), '--cfg-options', 'train_cfg.max_epochs=1',
                   *options)

    def test_the_same_passes(self, run, trained):
        assert self.resume(run, trained, 'optim_wrapper.optimizer.lr=0.1') is None

    def test_another_is_refused(self, run, trained):
        """Its state would be loaded, and the first step fail."""
        assert re.search('another optimizer than SGD was at work: its settings were .*betas.*; set optim_wrapper as it '
                         'was, or name the checkpoint as load_from instead$',
                         self.resume(run, trained, 'optim_wrapper.optimizer.type=SGD'))

    def test_other_groups_are_refused(self, run, trained):
        assert 'its optimizer had 4 parameters in 1 groups, and has 4 in 4 here; set' in self.resume(
            run, trained, 'optim_wrapper.paramwise_cfg.bias_lr_mult=2.0')

    @pytest.mark.parametrize('there, here, same', [
        (torch.optim.AdamW, torch.optim.Adam, True), (torch.optim.SGD, torch.optim.SGD, True),
        (torch.optim.SGD, torch.optim.AdamW, False), (torch.optim.AdamW, torch.optim.SGD, False),
        (torch.optim.RMSprop, torch.optim.SGD, False), (torch.optim.SGD, torch.optim.RMSprop, False),
    ])
    def test_are_told_apart_by_their_settings(self, there, here, same):
        saved, own = (kind([torch.ones(1, requires_grad=True)], lr=0.1) for kind in (there, here))
        if same:
            _check_optimizer(own, saved.state_dict(), 'x.pth')
            return
        settings = ', '.join(sorted(set(saved.param_groups[0]) - {'params'}))
        with pytest.raises(CheckpointError, match=(
                f'^x.pth cannot be resumed from, as another optimizer than {here.__name__} was at work: its settings '
                f'were {settings}; set optim_wrapper as it was')):
            _check_optimizer(own, saved.state_dict(), 'x.pth')

    def test_parameters_are_counted_by_group(self):
        a, b, c = (torch.ones(1, requires_grad=True) for _ in range(3))
        saved = torch.optim.SGD([dict(params=[a, b]), dict(params=[c])], lr=0.1).state_dict()
        _check_optimizer(torch.optim.SGD([dict(params=[c, a]), dict(params=[b])], lr=0.1), saved, 'x.pth')
        with pytest.raises(CheckpointError, match='its optimizer had 3 parameters in 2 groups, and has 3 in 2 here'):
            _check_optimizer(torch.optim.SGD([dict(params=[a]), dict(params=[b, c])], lr=0.1), saved, 'x.pth')
        with pytest.raises(CheckpointError, match='its optimizer had 3 parameters in 2 groups, and has 2 in 1 here'):
            _check_optimizer(torch.optim.SGD([a, b], lr=0.1), saved, 'x.pth')

    @pytest.mark.parametrize('state', [None, [], {}, dict(param_groups=[])])
    def test_no_state_is_no_optimizer(self, state):
        with pytest.raises(CheckpointError, match='^x.pth cannot be resumed from, as it holds no state of the optim'):
            _check_optimizer(torch.optim.SGD([torch.ones(1)], lr=0.1), state, 'x.pth')

    def test_none_is_refused(self, run, trained):
        checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
        del checkpoint['optimizer']
        torch.save(checkpoint, 'x.pth')
        assert 'cannot be resumed from, as it holds no state of the optimizer' in run('train', '--resume', 'x.pth')


class TestStateOfTraining:
    @pytest.mark.parametrize('change', [
        lambda saved: saved.pop('message_hub'), lambda saved: saved.update(message_hub=[]),
        lambda saved: saved.pop('meta'), lambda saved: saved['meta'].pop('epoch'),
        lambda saved: saved['meta'].pop('iter')])
    def test_is_needed_to_resume(self, change, run, trained):
        saved = torch.load(trained / 'epoch_1.pth', weights_only=False)
        change(saved)
        torch.save(saved, 'x.pth')
        assert run('train', '--resume', 'x.pth') == (
            'x.pth cannot be resumed from, as it holds weights but no state of training; name it as load_from instead')


class TestModels:
    """Checkpoints of other models than the config's."""

    @pytest.fixture
    def save(self, run):
        """Writes the checkpoint of one model, and the config of another."""

        def save(model, config):
            config.dump('config.py')
            torch.manual_seed(0)
            without_sync_bn(model.model)
            with DefaultScope.overwrite_default_scope(model.default_scope):
                weights = MODELS.build(model.model).state_dict()
            classes = model.test_dataloader.dataset.metainfo.classes
            torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=classes))), 'x.pth')

        return save

    def test_the_same_passes(self, tiny_config, save, run):
        save(tiny_config('semantic_fpn'), tiny_config('semantic_fpn'))
        assert run('test', 'x.pth') is None

    def test_another_arch(self, tiny_config, save, run):
        """All names are the same."""
        save(tiny_config('semantic_fpn', channels=[8, 16, 32, 48]), tiny_config('semantic_fpn'))
        assert re.fullmatch(
            r'x\.pth is not of this model: backbone: \d+ of \d+ of other shapes, such as '
            r'backbone\.downsample_layers\.2\.1\.weight \(32, 16, 2, 2\) there, \(24, 16, 2, 2\) here; neck: 2 of 16 '
            r'of other shapes, such as .* here\. Another arch of the backbone\?', run('test', 'x.pth'))
        assert re.fullmatch(
            r'x\.pth is of another backbone, and MMEngine would leave random what does not fit: backbone\.down.* '
            r'\(32, 16, 2, 2\) there, \(24, 16, 2, 2\) here, … \d+ in all\. Another arch\?',
            run('train', '--cfg-options', 'load_from=x.pth'))

    def test_another_head(self, tiny_config, save, run):
        save(tiny_config('semantic_fpn'), tiny_config('upernet'))
        assert run('test', 'x.pth') == (
            'x.pth is not of this model: decode_head: 60 of 74 weights missing. Another head?')
        assert run('train', '--cfg-options', 'load_from=x.pth') is None

    def test_other_classes(self, tiny_config, save, run):
        save(tiny_config('semantic_fpn', classes=9), tiny_config('semantic_fpn'))
        assert run('test', 'x.pth') == (
            'x.pth is not of this model: decode_head: 2 of 44 of other shapes, such as decode_head.conv_seg.weight '
            '(9, 8, 1, 1) there, (7, 8, 1, 1) here. Different classes? The checkpoint has 9, the config 7.')
        # A training starts from it, and says which weights it does not use.
        assert run('train', '--cfg-options', 'load_from=x.pth') is None
        log = max(Path('work').glob('*/*.log')).read_text()
        assert '; 2 of another shape, not loaded: decode_head.conv_seg.weight, …' in log
        assert '\n    decode_head.conv_seg.weight (9, 8, 1, 1) there, (7, 8, 1, 1) here\n' in log

    def test_without_the_head_that_supervises_the_training(self, tiny_config, save, run):
        model = tiny_config('upernet')
        model.model.auxiliary_head = None
        save(model, tiny_config('upernet'))
        assert run('test', 'x.pth') is None

    def test_a_training_is_resumed_with_every_weight(self, run, trained):
        checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
        del checkpoint['state_dict']['head.out.bias']
        torch.save(checkpoint, 'x.pth')
        assert run('train', '--resume', 'x.pth') == (
            'x.pth is not of this model: head: 1 of 2 weights missing. Another head?')
        assert run('train', '--cfg-options', 'load_from=x.pth') is None
