"""Hooks of the tools' runs: checkpoints of other models and classes, and names for pictures."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from convneur_mm.engine.hooks import _path_below_prefix
from convneur_mm.engine.launch import without_sync_bn


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

    def test_none_is_refused(self, run, trained):
        checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
        del checkpoint['optimizer']
        torch.save(checkpoint, 'x.pth')
        assert 'cannot be resumed from, as it holds no state of the optimizer' in run('train', '--resume', 'x.pth')


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
            r'\(32, 16, 2, 2\) there, \(24, 16, 2, 2\) here, … \(\d+ in all\)\. Another arch\?',
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
            '(9, 8, 1, 1) there, (7, 8, 1, 1) here. Other classes: 9 there, 7 here?')
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


@pytest.mark.parametrize('path, prefixes, name', [
    ('data/val/1.jpg', dict(img='data/val/'), '1.jpg'),
    ('data/val/cat/1.jpg', dict(img_path='data/val'), 'cat/1.jpg'),
    ('data/images/1.jpg', dict(seg_map_path='data/annotations', img_path='data/images'), '1.jpg'),
    ('elsewhere/1.jpg', dict(img='data/val'), '1.jpg'),
    ('data/val/1.jpg', dict(img_path=''), '1.jpg'),
])
def test_pictures_are_named_by_their_place_below_the_data_prefix(path, prefixes, name):
    assert _path_below_prefix(path, SimpleNamespace(data_prefix=prefixes)) == name


def test_pictures_of_joined_data_sets_are_named_by_their_files():
    assert _path_below_prefix('data/val/1.jpg', SimpleNamespace(datasets=[])) == '1.jpg'
