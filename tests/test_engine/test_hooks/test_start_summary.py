"""The start of a run on the console: short, complete, and nothing missing in the log file."""
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torchvision
from managers import forget_runs
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import init_default_scope
from torch import nn

from convneur_mm.datasets import make_shapes_ade20k, make_shapes_coco, make_shapes_imagenet
from convneur_mm.engine.hooks import start_summary
from convneur_mm.engine.hooks.start_summary import chunk_lines, memory_groups, memory_path
from convneur_mm.models import ConvNeur, NeuralMemory
from convneur_mm.ops.neural_memory import cpu
from convneur_mm.stack import uses_compiled_mmcv

ROOT = Path(__file__).parents[3]
MAX_LINES, MAX_WIDTH = 40, 160
TINY = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32], mem_channels=16)
LOADERS = """
train_dataloader = dict(batch_size=2, num_workers=1)
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""
DETECTION = f"""
_base_ = __import__('convneur_mm').config('cascade_rcnn_convneur_m1_shapes')
{LOADERS}
train_cfg = dict(max_epochs=1, val_begin=2)
"""
SEGMENTATION = f"""
_base_ = __import__('convneur_mm').config('semantic_fpn_convneur_m1_shapes')
model = dict(backbone=dict(_delete_=True, type='ConvNeur', arch={TINY}, memory_cfg=dict(chunk_size=3, inner_step=0.5)),
             neck=dict(in_channels=[8, 16, 24, 32]))
{LOADERS}
train_cfg = dict(max_iters=2, val_begin=3)
default_hooks = dict(logger=dict(interval=1))
"""
CLASSIFICATION = f"""
_base_ = __import__('convneur_mm').config('convneur_m1_shapes')
model = dict(
    backbone=dict(_delete_=True, type='ConvNeur', arch={TINY}, out_indices=3, gap_before_final_norm=True),
    head=dict(in_channels=32))
{LOADERS}
"""


def run_tool(*command, cwd):
    """What the command prints, with all that comes before its first step or result apart."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={
                              **os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [
                                  str(ROOT), os.environ.get('PYTHONPATH')])),
                              'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-4000:]
    return parts(done.stdout)


def parts(text):
    lines = re.sub(r'\x1b\[\d+m', '', text).splitlines()
    first_step = next(i for i, line in enumerate(lines) if re.search(r'(Epoch|Iter)\((train|test)\)', line))
    return lines[:first_step], lines[first_step:]


def log_text(folder):
    path, = folder.glob('*/*.log')
    return path.read_text()


def summary_of(model):
    return start_summary._model(model, model.state_dict(keep_vars=True).values())


def fact(lines, label):
    """The lines with a label, and those below that go on."""
    return '\n'.join(line for line in lines if line.startswith(f'    {label} '))


@pytest.fixture(scope='module')
def detection(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detection')
    make_shapes_coco(folder / 'data' / 'shapes', num_train=4, num_val=3, image_size=64)
    (folder / 'config.py').write_text(DETECTION)
    sizes = ['train_dataloader.dataset.pipeline.2.scale=(64,64)', 'val_dataloader.dataset.pipeline.1.scale=(64,64)']
    memory = [f'model.backbone.memory_cfg.{option}' for option in (
        'num_chunks=None', 'chunk_size=196', 'retrieve=previous', 'step_normalization=0.25')]
    start, rest = run_tool(sys.executable, ROOT / 'tools' / 'train.py', 'config.py', '--work-dir', 'work',
                           '--cfg-options', *sizes, *memory, 'default_hooks.logger.interval=1', cwd=folder)
    return start, rest, log_text(folder / 'work')


@pytest.fixture(scope='module')
def segmentation(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentation')
    make_shapes_ade20k(folder / 'data' / 'shapes_ade20k', num_train=5, num_val=2, image_size=96)
    (folder / 'config.py').write_text(SEGMENTATION)
    start, rest = run_tool(ROOT / 'tools' / 'dist_train.sh', 'config.py', 2, '--work-dir', 'work', cwd=folder)
    return start, rest, log_text(folder / 'work')


@pytest.fixture(scope='module')
def classification(tmp_path_factory, tool):
    """A training from a checkpoint that lacks a weight, has one of another shape and three of no use; in this process.
    """
    folder = tmp_path_factory.mktemp('classification')
    make_shapes_imagenet(folder / 'data' / 'shapes_imagenet', num_train=6, num_val=6, image_size=64)
    (folder / 'config.py').write_text(CLASSIFICATION)
    from mmpretrain.registry import MODELS
    cfg = Config.fromfile(folder / 'config.py')
    init_default_scope('mmpretrain')
    weights = MODELS.build(cfg.model).state_dict()
    del weights['head.fc.weight']
    weights['head.fc.bias'] = torch.ones(5)
    weights.update({f'neck.{i}': torch.zeros(1) for i in range(3)})
    torch.save(dict(state_dict=weights, meta={}), folder / 'weights.pth')
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', 'config.py', '--work-dir', 'work', '--cfg-options',
                                    'load_from=weights.pth', 'train_cfg.max_epochs=1'])
        forget_runs()
        train = tool('train')
        train.launch.run(train.main)
    return *parts(output.getvalue()), log_text(folder / 'work')


@pytest.fixture(params=['detection', 'segmentation', 'classification'])
def any_run(request):
    return request.getfixturevalue(request.param)


def test_the_start_fits_a_screen(any_run):
    start, _, _ = any_run
    text = '\n'.join(start)
    assert 5 < len(start) <= MAX_LINES, text
    assert max(len(line) for line in start if line.startswith('    ')) <= MAX_WIDTH, text


def test_config_environment_and_hooks_are_in_the_log_file_alone(any_run):
    start, rest, log = any_run
    for shown in ('\n'.join(start), '\n'.join(rest)):
        for text in ('dataloader = dict(', 'System environment', 'before_train_iter:', 'paramwise_options'):
            assert text not in shown
    for text in ('test_dataloader = dict(', 'System environment', 'before_train_iter:'):
        assert text in log


def test_parameters_are_in_the_log_file(detection, segmentation):
    for _, _, log in (detection, segmentation):
        assert 'Name of parameter - Initialization information' in log
    assert 'paramwise_options -- backbone.stages.0.0' in segmentation[2]


def test_the_console_says_nothing_that_the_log_file_does_not(any_run):
    start, _, log = any_run
    for line in start:
        if line.startswith('    ') or ' - mmengine - ' in line:  # what pycocotools prints is not logged
            assert re.sub(r'^\d\d/\d\d ', '', line) in log


def test_a_training_says_what_it_is(detection):
    start, rest, _ = detection
    assert any('training starts; config, environment and hooks are in the log file' in line for line in start)
    assert re.search(r'CascadeRCNN with ConvNeur-m1; \d\.\d\d M parameters, \d\.\d\d M of them trainable',
                     fact(start, 'model'))
    assert fact(start, 'memory').endswith(
        '4 memories: chunk size 196 tokens, inner step 1, normalised with 0.25, update rule \'sequential\', retrieve '
        '\'previous\'')
    code = 'PyTorch operators' if cpu.kernels is None else f'C++ kernels ({cpu.kernels.instruction_set()})'
    assert fact(start, 'computed').endswith(f'by {code} on cpu, float32 parameters')
    assert 'RANDOM: no checkpoint is loaded; to start from one, add --cfg-options load_from=PATH' in fact(
        start, 'weights')
    assert fact(start, 'data').endswith(
        'train 4 images; val 3 images; 6 classes: disk, square, triangle, star, ring, cross')
    assert fact(start, 'batches').endswith(
        '2 images x 1 process = 2 a step; 1 epoch of 2 steps; validation every epoch')
    assert 'CPU, 1 process, each with 1 thread and 1 data worker; no mixed precision' in fact(start, 'device')
    whose = "mmcv's own" if uses_compiled_mmcv() else f'of torchvision {torchvision.__version__}'
    assert whose in fact(start, 'operators')
    assert fact(start, 'results').endswith(' work; checkpoint every epoch, the last 1 kept')
    assert re.search(r' work/(\w+)/\1\.log$', fact(start, 'log'))
    assert len([line for line in rest if 'Epoch(train)' in line]) == 2


def test_memories_that_are_never_written_are_named(detection):
    start, _, _ = detection
    assert any('first batch, 64 x 64 pixels' in line for line in start)
    assert re.search(r'stage 1 +256 tokens +2 chunks$', fact(start, 'stage 1'))
    for stage, tokens in ((2, 64), (3, 16), (4, 4)):
        assert re.search(rf'{tokens} tokens +1 chunk   the memory is never written', fact(start, f'stage {stage}'))
    assert any('memory_cfg.chunk_size (at most 63 for stage 2, 15 for stage 3, 3 for stage 4)' in line
               for line in start)


def test_two_processes_say_everything_once(segmentation):
    start, rest, _ = segmentation
    assert len([line for line in start if 'training starts' in line]) == 1
    assert 'EncoderDecoder with ConvNeur (depths [1, 1, 1, 1], channels [8, 16, 24, 32])' in fact(start, 'model')
    assert 'chunk size 3 tokens, inner step 0.5' in fact(start, 'memory')
    assert '7 classes: background, disk, square, triangle, star, ring, …' in fact(start, 'data')
    assert '2 images x 2 processes = 4 a step; 2 iterations; validation every' in fact(start, 'batches')
    assert 'CPU, 2 processes, each with 1 thread' in fact(start, 'device')
    assert 'checkpoint every 925 iterations' in fact(start, 'results')
    assert fact(start, 'note').count('BN replaces SyncBN, which needs a GPU') == 1
    assert len([line for line in rest if 'Iter(train)' in line]) == 2


def test_memories_that_are_written_bring_no_note(segmentation):
    start, _, _ = segmentation
    for stage, tokens, chunks in ((1, 576, 192), (2, 144, 48), (3, 36, 12), (4, 9, 3)):
        assert re.search(rf' {tokens} tokens +{chunks} chunks$', fact(start, f'stage {stage}'))
    assert not [line for line in start if 'never written' in line or 'single chunk' in line]


def test_a_training_says_how_much_of_the_checkpoint_fits(classification):
    start, rest, log = classification
    total = re.search(r'weights +from weights\.pth: (\d+) of (\d+); 1 not in it: head\.fc\.weight; 1 of another shape, '
                      r'not loaded: head\.fc\.bias; 3 in it, but not in the model: neck\.0, …$', fact(start, 'weights'))
    assert int(total[1]) + 2 == int(total[2]) > 50
    for name in ('head.fc.weight', 'head.fc.bias (5,) there, (6,) here', 'neck.0', 'neck.1', 'neck.2'):
        assert f'\n    {name}\n' in log
    assert '6 images; 6 classes: cross, disk, ring, square, star, triangle' in fact(start, 'data')
    assert any(line.startswith('    stage 4') for line in start)


def test_a_test_says_what_it_tests(run, tiny_config, capfd):
    cfg = tiny_config('')
    cfg.dump('config.py')
    init_default_scope('mmpretrain')
    from mmpretrain.registry import MODELS
    model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict(), meta={}), 'weights.pth')
    assert run('test', 'weights.pth', '--cfg-options', 'test_dataloader.batch_size=1') is None
    start = capfd.readouterr().out.splitlines()
    assert any('test starts' in line for line in start)
    total = len(model.state_dict())
    assert fact(start, 'weights').endswith(f'from weights.pth: {total} of {total}')
    assert fact(start, 'data').endswith('test 6 images; 6 classes: cross, disk, ring, square, star, triangle')
    assert '1 image x 1 process = 1 a step, 6 steps' in fact(start, 'batches')
    assert 'checkpoint' not in fact(start, 'results')
    assert any(line.startswith('    stage 4') for line in start)


def test_resumed_weights(toy_runner, tmp_path, capsys, monkeypatch):
    # Upstream's MMEngine cannot read its own checkpoints otherwise.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    toy_runner(ConvNeur(TINY)).train()
    assert 'weights   RANDOM' in capsys.readouterr().out
    runner = toy_runner(ConvNeur(TINY), resume=True)
    runner._train_loop['max_iters'] = 3
    runner.train()
    total = len(runner.model.state_dict())
    assert (f'resumed from {tmp_path}/iter_2.pth at epoch 0, iteration 2: {total} of {total}\n'
            in capsys.readouterr().out)


def test_pretrained_parts_are_named(toy_runner, tmp_path, capsys):
    torch.save(ConvNeur(TINY).state_dict(), tmp_path / 'backbone.pth')
    toy_runner(ConvNeur(TINY, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth')))).train()
    assert f'pretrained: backbone from {tmp_path}/backbone.pth; others random' in capsys.readouterr().out
    assert re.search(r'loaded (\d+) of \1 backbone weights', log_text(tmp_path))


def test_a_model_without_memories(toy_runner, capsys):
    toy_runner(nn.Sequential(nn.Conv2d(3, 4, 3))).train()
    out = capsys.readouterr().out
    assert 'Toy with Sequential; 0.00 M parameters, 0.00 M of them trainable' in out
    assert re.search(' memory +none\n', out)
    assert 'chunks' not in out


def test_other_settings(toy_runner, capsys):
    runner = toy_runner(nn.ModuleDict(dict(
        a=ConvNeur(TINY, global_branch='cbam'), b=ConvNeur(TINY, memory_cfg=dict(inner_step=0.0)))))
    runner.model.backbone.forward = runner.model.backbone['b'].forward
    runner.model.backbone['a'].requires_grad_(False)
    runner.optim_wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(type='SGD', lr=1e-3), accumulative_counts=2)
    next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook)).interval = -1
    runner.train()
    out = capsys.readouterr().out
    total, trained = re.search(r'; (\S+) M parameters, (\S+) M of them trainable', out).groups()
    assert 0 < float(trained) < float(total)
    for text in ("4 global branches 'cbam' in place of the memory", 'with an inner step of 0 the memory never changes',
                 '= 2 a step, 2 steps an update; 2 iterations', '; mixed precision', '; NO checkpoint is saved'):
        assert text in out


class WithSpare(nn.Module):
    """A backbone beside a memory that the forward pass leaves out."""

    def __init__(self):
        super().__init__()
        self.used = ConvNeur(TINY)
        self.spare = NeuralMemory(16)

    def forward(self, x):
        return self.used(x)


def test_a_memory_without_a_part_in_the_forward_pass_is_left_out(toy_runner, capsys):
    toy_runner(WithSpare()).train()
    out = capsys.readouterr().out
    assert '5 memories' in out
    assert out.count('chunks of the memories at the first batch, 32 x 64 pixels') == 1
    assert ' stage 4 ' in out
    assert 'spare' not in out


def test_chunks_are_not_watched_where_the_model_is_compiled(toy_runner):
    """A forward hook would be compiled with the model, or keep it from being compiled."""
    runner = toy_runner(ConvNeur(TINY))
    runner.train_loop  # noqa: B018
    hook = next(hook for hook in runner.hooks if isinstance(hook, start_summary.StartSummaryHook))
    runner.cfg['compile'] = True
    hook.before_train_iter(runner, 0)
    assert not any(module._forward_pre_hooks for module in runner.model.modules())
    hook._chunks, runner.cfg['compile'] = None, False
    hook.before_train_iter(runner, 0)
    assert sum(bool(module._forward_pre_hooks) for module in runner.model.modules()) == 5


def test_memories_are_found_in_any_model():
    one = nn.ModuleDict(dict(backbone=ConvNeur(dict(TINY, depths=[1, 2, 1, 1]), placement='block')))
    assert {name: len(memories) for name, memories in memory_groups(one).items()} == {
        'stage 1': 1, 'stage 2': 2, 'stage 3': 1, 'stage 4': 1}
    two = nn.ModuleDict(dict(rgb=ConvNeur(TINY, out_indices=0), depth=ConvNeur(TINY, out_indices=1),
                             head=NeuralMemory(16), plain=ConvNeur(TINY, placement='none')))
    assert list(memory_groups(two)) == ['rgb stage 1', 'depth stage 1', 'depth stage 2', 'head']
    assert memory_groups(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize('tokens, options, written', [
    (10, dict(chunk_size=9), True),
    (10, dict(chunk_size=10), False),
    (10, dict(chunk_size=10, retrieve='final'), True),
])
def test_chunks_of_a_memory(tokens, options, written):
    memories = [NeuralMemory(16, **options) for _ in range(2)]
    lines = chunk_lines({'stage 9': memories}, dict.fromkeys(memories, tokens))
    assert lines[0][0] == 'stage 9'
    assert '10 tokens' in lines[0][1]
    assert 'in each of 2 memories' in lines[0][1]
    assert ('never written' in lines[0][1]) is not written
    assert len(lines) == (1 if written else 3)
    assert written or '(at most 9 for stage 9)' in lines[2][1]


def test_a_single_token_cannot_be_cut():
    memory = NeuralMemory(16)
    lines = chunk_lines({'stage 4': [memory]}, {memory: 1})
    assert 'never written' in lines[0][1]
    assert 'at most' not in ' '.join(text for _, text in lines)


@pytest.mark.needs('kernels')
@pytest.mark.parametrize('options, path', [
    (dict(), 'C\\+\\+ kernels \\(\\w+\\) on cpu, float32 parameters'),
    (dict(head_dim=8), 'PyTorch operators on cpu'),
    (dict(backend='reference'), 'the reference implementation, which is slow, on cpu'),
])
def test_the_memorys_path(options, path, monkeypatch):
    monkeypatch.delenv('CONVNEUR_MEMORY_BACKEND', raising=False)
    assert re.match(path, memory_path(NeuralMemory(16, **options)))


def test_the_named_path_is_the_one_taken(monkeypatch):
    """The summary may not call that C++ what PyTorch computes, or the other way round."""
    if cpu.kernels is None:
        pytest.fail('the kernels are not compiled: tools/setup_env.sh')
    calls, real = [], cpu.kernels

    class Kernels:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(cpu, 'kernels', Kernels())
    for options in (dict(), dict(head_dim=8), dict(backend='reference'), dict(compiled=True), dict(half=True)):
        compiled, half = options.pop('compiled', False), options.pop('half', False)
        memory, tokens = NeuralMemory(16, chunk_size=4, **options), torch.rand(1, 9, 16)
        if half:
            memory, tokens = memory.half(), tokens.half()
        calls.clear()
        (torch.compile(memory, backend='eager') if compiled else memory)(tokens)
        assert ('step' in calls) is memory_path(memory).startswith('C++'), options
