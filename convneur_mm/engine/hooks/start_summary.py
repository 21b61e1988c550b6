"""Log at the start of a run what runs, with which weights and data, on what, and where the results go."""
from __future__ import annotations

import logging
import math
import os.path as osp
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torchvision
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...models import ConvNeur, NeuralMemory
from ...models.global_branch import GlobalBranch
from ...ops.neural_memory import pytorch, written_tokens
from ...ops.neural_memory.op import resolve_backend
from ...ops.neural_memory.operators import implementation
from ...stack import uses_compiled_mmcv
from ..files.checkpoint import checkpoint_weights, compare_weights
from ..runner.model_wrappers import is_resumed, own_weights, started_from, unwrapped
from ..runner.optim import BFloat16OptimWrapper
from ..runner.quiet_console import ON_CONSOLE, end_of_start


@HOOKS.register_module()
class StartSummaryHook(Hook):
    """Log before training or a test what runs, with which weights and data, on what, and where the results go.

    At the first batch, log into how many chunks the memories cut it.

    Args:
        notes (Sequence[str]): Notes to add to the summary, such as what was changed in the config. Defaults to ().
    """

    priority = 'LOWEST'  # runs after the hooks that resume or change the model

    def __init__(self, notes: Sequence[str] = ()) -> None:
        self.notes = list(notes)
        self._loaded: str | None = None
        self._chunks: _ChunkCounter | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Count the model's weights in ``checkpoint``, and log the names of all others to the file."""
        own = own_weights(runner)
        missing, reshaped, unused = compare_weights(own, checkpoint_weights(checkpoint))
        self._loaded = f'{len(own) - len(missing) - len(reshaped)} of {len(own)}'
        for names, short, what in (
                (missing, 'not in it', 'weights of the model that the checkpoint lacks:'),
                (reshaped, 'of another shape, not loaded',
                 'weights of the model that have another shape in the checkpoint, and stay as initialised:'),
                (unused, 'in it, but not in the model', 'weights of the checkpoint that the model does not have:')):
            if names:
                self._loaded += f'; {len(names)} {short}: {next(iter(names))}{", …" if len(names) > 1 else ""}'
                runner.logger.info('\n    '.join([what, *(
                    f'{name} {reshaped[name][0]} there, {reshaped[name][1]} here' if name in reshaped else name
                    for name in names)]))

    def before_train(self, runner: Runner) -> None:
        """Log the summary of a training."""
        self._log_summary(runner, 'train', runner.train_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Log the summary of a test."""
        self._log_summary(runner, 'test', runner.test_dataloader)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """End the quiet start, and watch what the memories get of the first batch."""
        self._at_first_batch(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Log the chunks now if some memory had no part in the first step, so that they are not logged yet."""
        self._chunks.finish()

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Do the same as :meth:`before_train_iter`."""
        self._at_first_batch(runner)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                        outputs: Sequence | None = None) -> None:
        """Do the same as :meth:`after_train_iter`."""
        self._chunks.finish()

    def _log_summary(self, runner: Runner, mode: str, loader: DataLoader) -> None:
        model = unwrapped(runner.model)
        lines = [
            ('model', _model(model, own_weights(runner).values())),
            *_memory(model),
            *_weights(runner, model, self._loaded),
            ('data', _data(runner, mode)),
            ('batches', _batches(runner, mode, loader)),
            ('device', _device(runner, model, loader)),
            *_operators(runner),
            *(('note', note) for note in self.notes),
            ('results', _results(runner, mode)),
            ('log', _short(runner.logger.log_file)),
        ]
        title = 'training starts' if mode == 'train' else 'test starts'
        _log(runner.logger, f'{title}; config, environment and hooks are in the log file', lines)

    def _at_first_batch(self, runner: Runner) -> None:
        if self._chunks is not None:
            return
        end_of_start(runner.logger)
        watch = runner.rank == 0 and not runner.cfg.get('compile')  # a compiler would compile the hooks too
        self._chunks = _ChunkCounter(unwrapped(runner.model) if watch else nn.Module(), runner.logger)


class _ChunkCounter:
    """Log into how many chunks the memories of ``model`` cut their first input, as soon as all have had one."""

    def __init__(self, model: nn.Module, logger: logging.Logger) -> None:
        self._logger = logger
        self._groups = memory_groups(model)
        self._tokens: dict[NeuralMemory, int] = {}
        self._images: set[str] = set()
        self._missing = {memory for memories in self._groups.values() for memory in memories}
        self._handles = [memory.register_forward_pre_hook(self._see_tokens) for memory in self._missing]
        self._handles += [m.register_forward_pre_hook(self._see_image) for m in model.modules()
                          if isinstance(m, ConvNeur)]

    def _see_image(self, backbone: ConvNeur, args: tuple[Tensor, ...]) -> None:
        height, width = args[0].shape[2:]
        self._images.add(f', {height} x {width} pixels (height x width)')

    def _see_tokens(self, memory: NeuralMemory, args: tuple[Tensor, ...]) -> None:
        self._tokens.setdefault(memory, args[0].size(1))
        self._missing.discard(memory)
        if not self._missing:
            self.finish()

    def finish(self) -> None:
        """Log the observed numbers at the first call."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._tokens:
            _log(self._logger, f'chunks of the memories at the first batch{"".join(sorted(self._images))}',
                 chunk_lines(self._groups, self._tokens))
        self._tokens = {}


def memory_groups(model: nn.Module) -> dict[str, list[NeuralMemory]]:
    """Return a model's memories by place: the stage of a ConvNeur backbone, or the name of any other memory."""
    backbones = {name: module for name, module in model.named_modules() if isinstance(module, ConvNeur)}
    groups: dict[str, list[NeuralMemory]] = {}
    for name, module in model.named_modules():
        if isinstance(module, NeuralMemory):
            backbone, inside, rest = name.rpartition('stages.')
            if inside and backbone.rstrip('.') in backbones:
                prefix = '' if len(backbones) == 1 else f'{backbone.rstrip(".")} '
                name = f'{prefix}stage {int(rest.partition(".")[0]) + 1}'
            groups.setdefault(name, []).append(module)
    return groups


def chunk_lines(groups: dict[str, list[NeuralMemory]], tokens: dict[NeuralMemory, int]) -> list[tuple[str, str]]:
    """Return a line for each group: tokens, chunks, and whether a memory is never written, with a remedy.

    Args:
        groups (dict[str, list[NeuralMemory]]): See :func:`memory_groups`.
        tokens (dict[NeuralMemory, int]): Number of tokens that each memory got.
    """
    lines, limits, never = [], [], False
    for name, memories in groups.items():
        memory, count = memories[0], len(memories)
        number = tokens.get(memory)
        if number is None:
            continue
        length = memory.tokens_per_chunk(number)
        chunks = math.ceil(number / length)
        idle = not written_tokens(number, length, memory.retrieve)
        lines.append((name, f'{number:6d} tokens {chunks:5d} chunk{"s" if chunks > 1 else " "}'
                      + (f'  in each of {count} memories' if count > 1 else '')
                      + ('  the memory is never written' if idle else '')))
        never = never or idle
        if idle and number > 1:
            limits.append(f'{number - 1} for {name}')
    if never:
        lines.append(('note', 'a memory is written after each chunk but the last: with a single chunk only its learned '
                      'initial state is read.'))
    if limits:
        lines.append(('', f'To have it written, set a smaller memory_cfg.chunk_size (at most {", ".join(limits)}) or '
                      'use larger images.'))
    return lines


def _log(logger: logging.Logger, title: str, lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines)
    text = '\n'.join(f'    {label:{width}s}  {line}' for label, line in lines)
    logger.info(f'{title}\n{text}', extra=ON_CONSOLE)


def _model(model: nn.Module, weights: Iterable[Tensor]) -> str:
    names = [f'ConvNeur-{module.arch}' if isinstance(module.arch, str) else
             f'ConvNeur (depths {module.depths}, channels {module.channels})'
             for module in model.modules() if isinstance(module, ConvNeur)]
    backbone = getattr(model, 'backbone', None)
    if backbone is not None and not names:
        names = [type(backbone).__name__]
    parameters = {id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)}.values()
    total, trained = (sum(p.numel() for p in ps) / 1e6 for ps in (
        parameters, [p for p in parameters if p.requires_grad]))
    return (f'{type(model).__name__}{" with " * bool(names)}{" and ".join(names)}; {total:.2f} M parameters, '
            f'{trained:.2f} M of them trainable')


def _memory(model: nn.Module) -> list[tuple[str, str]]:
    """Return lines on the options of the memories, on what computes them, and on what replaces them."""
    branches = [module for module in model.modules() if isinstance(module, GlobalBranch)]
    others = Counter(module.branch for module in branches if module.branch != 'neural_memory')
    lines = [('branch', f'{_count(count, "global branch", "global branches")} {branch!r} in place of the memory')
             for branch, count in others.items()]
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    if not memories:
        return [*lines, ('memory', 'none')]
    for (size, step, normalization, rule, retrieve), count in Counter(
            (f'chunk size {m.chunk_size} tokens' if m.num_chunks is None else
             f'{_count(m.num_chunks, "chunk", "chunks")} of an image',
             m.inner_step, m.step_normalization, m.update_rule, m.retrieve) for m in memories).items():
        normalized = f', normalised with {normalization:g}' if normalization else ''
        lines.append(('memory', f'{_count(count, "memory", "memories")}: {size}, inner step {step:g}{normalized}, '
                      f"update rule '{rule}', retrieve '{retrieve}'"))
        if not step:
            lines.append(('note', 'with an inner step of 0 the memory never changes; set memory_cfg.inner_step'))
    return [*lines, *(('computed', f'by {path}') for path in dict.fromkeys(memory_path(m) for m in memories))]


def memory_path(memory: NeuralMemory) -> str:
    """Return what computes a memory whose parameters are on the device and in the dtype in which it will run."""
    weight = memory.query.weight
    backend = resolve_backend(memory.backend)
    names = {'reference': 'the reference implementation, which is slow,', 'triton': 'Triton kernels'}
    name = names.get(backend)
    if name is None:
        # The inner loop of half precision runs in float32.
        rows = weight.new_empty(2 * memory.hidden_dim, memory.head_dim,
                                dtype=torch.promote_types(weight.dtype, torch.float32))
        found = implementation(backend, rows)
        name = 'PyTorch operators' if found is pytorch else f'C++ kernels ({found.instruction_set()})'
    return f'{name} on {weight.device.type}, {str(weight.dtype).removeprefix("torch.")} parameters'


def _weights(runner: Runner, model: nn.Module, loaded: str | None) -> list[tuple[str, str]]:
    if loaded:
        source = _short(started_from(runner) or find_latest_checkpoint(runner.work_dir) or 'a checkpoint')
        if not is_resumed(runner):
            return [('weights', f'from {source}: {loaded}')]
        return [('weights', f'resumed from {source} at epoch {runner.epoch}, iteration {runner.iter}: {loaded}')]
    pretrained = []
    for name, module in model.named_modules():
        init_cfg = getattr(module, 'pretrained', None) or getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained' and init_cfg.get('checkpoint'):
            pretrained.append(f'{name or "all"} from {init_cfg["checkpoint"]}')
    if pretrained:
        return [('weights', f'pretrained: {", ".join(pretrained)}; others random')]
    return [('weights', 'RANDOM: no checkpoint is loaded; to start from one, add --cfg-options load_from=PATH')]


def _data(runner: Runner, mode: str) -> str:
    if mode == 'test':
        loaders = {'test': runner.test_dataloader}
    else:
        loaders = {'train': runner.train_dataloader}
        if runner.val_loop is not None:
            loaders['val'] = runner.val_dataloader
    sizes, classes = [], {}
    for split, loader in loaders.items():
        dataset = loader.dataset
        sizes.append(f'{split} {len(dataset) if hasattr(dataset, "__len__") else "unknown number of"} images')
        names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        if names:
            classes.setdefault(tuple(names), []).append(split)
    for names, splits in classes.items():
        shown = ', '.join(names[:6]) + (', …' if len(names) > 6 else '')
        where = f' in {" and ".join(splits)}' if len(classes) > 1 else ''
        sizes.append(f'{len(names)} classes{where}: {shown}')
    return '; '.join(sizes)


def _batches(runner: Runner, mode: str, loader: DataLoader) -> str:
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
    total = size * runner.world_size
    text = f'{_count(size, "image")} x {_count(runner.world_size, "process", "processes")} = {total} a step'
    if mode == 'test':
        return f'{text}, {_count(len(loader), "step")}'
    accumulated = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    if accumulated > 1:
        text += f', {accumulated} steps an update'
    loop = runner.train_loop
    by_iter = isinstance(loop, IterBasedTrainLoop)
    text += f'; {loop.max_iters} iterations' if by_iter else (
        f'; {_count(loop.max_epochs, "epoch")} of {_count(len(loader), "step")}')
    if runner.val_loop is not None:
        text += f'; validation every {_interval(loop.val_interval, not by_iter)}'
    return text


def _device(runner: Runner, model: nn.Module, loader: DataLoader) -> str:
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    name = f'{torch.cuda.get_device_name(device)} GPU' if device.type == 'cuda' else device.type.upper()
    mixed = isinstance(runner.optim_wrapper, (AmpOptimWrapper, BFloat16OptimWrapper))
    precision = 'mixed precision' if mixed else 'no mixed precision'
    processes = _count(runner.world_size, 'process', 'processes')
    threads, workers = _count(torch.get_num_threads(), 'thread'), _count(loader.num_workers, 'data worker')
    return f'{name}, {processes}, each with {threads} and {workers}; {precision}'


def _operators(runner: Runner) -> list[tuple[str, str]]:
    if runner.cfg.get('default_scope') != 'mmdet':
        return []
    return [('operators', 'mmcv\'s own, compiled' if uses_compiled_mmcv() else
             f'of torchvision {torchvision.__version__}, as mmcv was not compiled')]


def _results(runner: Runner, mode: str) -> str:
    text = _short(runner.work_dir)
    if mode == 'test':
        return text
    saving = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    if saving is None or saving.interval <= 0:
        return f'{text}; NO checkpoint is saved'
    text += f'; checkpoint every {_interval(saving.interval, saving.by_epoch)}'
    if saving.max_keep_ckpts > 0:
        text += f', the last {saving.max_keep_ckpts} kept'
    if saving.save_best:
        text += f', and the best ({", ".join(saving.save_best)})'  # MMEngine turns it into a list
    return text


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f'{number} {noun if number == 1 else plural or noun + "s"}'


def _interval(number: int, by_epoch: bool) -> str:
    noun = 'epoch' if by_epoch else 'iteration'
    return noun if number == 1 else f'{number} {noun}s'


def _short(path: str) -> str:
    """Return ``path`` relative to the current folder if it is in it."""
    relative = osp.relpath(path)
    return path if relative.startswith('..') else relative
