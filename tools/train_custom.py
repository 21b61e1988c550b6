#!/usr/bin/env python
"""Train on your own folder: find, check and split the data, write a config for it, train and test.

    tools/train_custom.py --task det data/nuts       # a COCO file and pictures
    tools/train_custom.py --task seg data/fields     # images/ and masks/, with pictures of equal names
    tools/train_custom.py --task cls data/leaves     # a folder of pictures for each class

Data named train and val stay separate; otherwise a fifth of the pictures is set aside. The data are not changed.
docs/own_data.md explains what is found and how settings are chosen.
"""
import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import urlparse

if __name__ == '__main__':
    # Without this, Ctrl-C during the imports of Python's modules would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from _environment import prepare as prepare_environment
    prepare_environment()

import torch

from convneur_mm.apis.convnext import LICENCES, convert
from convneur_mm.apis.sources import SOURCES, find_source
from convneur_mm.datasets.own_data import FaultyDataError, OwnData, prepare
from convneur_mm.datasets.own_data_fit import STRIDES, fit_anchors, fit_class_weights, fit_epochs, fit_image_size
from convneur_mm.engine.files.checkpoint import checkpoint_weights, read_checkpoint
from convneur_mm.engine.files.errors import LaunchError, one_line_errors
from convneur_mm.engine.files.weights_file import CheckpointError, CheckpointNotFoundError
from convneur_mm.models import ConvNeur
from convneur_mm.stack import require

TOOLS = Path(__file__).resolve().parent
PACKAGES = dict(det='mmdet', seg='mmseg', cls='mmpretrain')
# Images per step, as in the configs.
BATCH_SIZE = dict(det=4, seg=4, cls=16)
# Longest input side, without and with a GPU.
LIMITS = dict(det=(320, 640), seg=(320, 512), cls=(128, 224))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', metavar='DATA', help='data folder, or a COCO file, which is then split')
    parser.add_argument('--task', choices=list(PACKAGES), required=True,
                        help='task: detection with masks or with boxes only, segmentation, or classification')
    parser.add_argument('--head', choices=['rtmdet', 'cascade'], default='rtmdet',
                        help="of --task det: RTMDet, which is light, or the paper's Cascade R-CNN (default: rtmdet)")
    parser.add_argument('--arch', choices=list(ConvNeur.arch_settings),
                        help='backbone size (default: that of the checkpoint, or m1)')
    parser.add_argument('--checkpoint', metavar='FILE', help='initial weights of the backbone: from ConvNeur, also '
                        'inside a detector or segmentor, or from ConvNeXt or ConvNeXt-V2, which are converted')
    parser.add_argument('--pretrained', metavar='NAME', choices=list(SOURCES),
                        help='instead of --checkpoint: published weights, as timm names them; docs/weights.md lists '
                        'them with licences. A local file is used; if there is none, the tool says what to download')
    parser.add_argument('--classes', metavar='FILE', help='names, one a line: of label maps, those of the values 0, 1, '
                        '…; else the categories or class folders to take, and to pass over all others')
    parser.add_argument('--reduce-zero-label', action='store_true',
                        help='value 0 of label maps is no class, and names of --classes begin with value 1')
    parser.add_argument('--ignore-label', type=int, choices=range(255), metavar='VALUE',
                        help='another value of label maps that is no class, 0 to 254 (255 never is one)')
    parser.add_argument('--epochs', type=positive, metavar='N',
                        help='number of epochs (default: set by the number of pictures)')
    parser.add_argument('--work-dir', metavar='DIR', help='output folder (default: work_dirs/<DATA>_<task>)')
    parser.add_argument('--dry-run', action='store_true', help='check the data, write the config and stop')
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of 1 or more, got {text!r}')
    return int(text)


def say(name: str, text: str) -> None:
    print(f'{name:<9} {text}', flush=True)


def set_up(args: argparse.Namespace) -> tuple[Path, Path]:
    """Prepare the data and the weights, and write the config.

    Returns:
        tuple[Path, Path]: The config and the work dir.

    Raises:
        LaunchError, CheckpointError, OwnDataError, StackError, OSError: If the set-up fails; the message is one line.
    """
    require(f'{PACKAGES[args.task]}.models')
    data = Path(args.data).absolute()
    name = re.sub(r'\W', '_', data.stem if data.is_file() else data.name)
    out = Path(args.work_dir or Path('work_dirs') / f'{name}_{args.task}')
    if (out / 'train' / 'last_checkpoint').exists():
        raise LaunchError(f'{out} has a training already: go on with {shown(resume_command(out))}, or give another '
                          '--work-dir')
    for option, given in (('--reduce-zero-label', args.reduce_zero_label),
                          ('--ignore-label', args.ignore_label is not None)):
        if given and args.task != 'seg':
            raise LaunchError(f'{option} is for label maps, and --task is {args.task}')
    names = None
    if args.classes:
        if not os.path.isfile(args.classes):
            raise LaunchError(f'--classes: no such file: {args.classes}')
        names = [line.strip() for line in Path(args.classes).read_text(encoding='utf-8').splitlines() if line.strip()]
    arch, weights = find_weights(args, out)
    own = prepare(args.task, data, out / 'data', names, args.reduce_zero_label, args.ignore_label)
    say('data', f'{own.train.count} training and {own.val.count} validation pictures, of {own.train.ann_file} and '
                f'{own.val.ann_file}')
    say('classes', f'{len(own.classes)}: {", ".join(own.classes[:20])}{", …" * (len(own.classes) > 20)}')
    for note in own.notes:
        say('note', note)
    text = config_text(args, own, arch, weights)
    path = config_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    say('config', str(path))
    return path, out


def find_weights(args: argparse.Namespace, out: Path) -> tuple[str, str | None]:
    """Return the arch, and the path of the weights that its backbone starts from.

    Raises:
        LaunchError: If the file is missing, or its weights are of another model or arch than requested.
        CheckpointError: If the file is not a checkpoint.
    """
    if args.checkpoint and args.pretrained:
        raise LaunchError('--checkpoint and --pretrained were both given: choose one')
    option = '--pretrained' if args.pretrained else '--checkpoint'
    file = str(find_source(args.pretrained)) if args.pretrained else args.checkpoint
    if file is None:
        say('weights', 'random: --pretrained or --checkpoint names some to start from, for which far fewer pictures '
            'are enough')
        return args.arch or 'm1', None
    try:
        weights = checkpoint_weights(read_checkpoint(file))
    except CheckpointNotFoundError:
        raise LaunchError(f'{option}: no such file: {file}') from None
    if not any('.global_branch.' in name for name in weights):
        try:
            done = convert(weights, args.arch)
        except CheckpointError as error:
            raise LaunchError(f'{option}: {file}: {error}') from None
        licence = SOURCES[args.pretrained].licence if args.pretrained else LICENCES[done.version]
        path = out / f'convneur_{done.arch}.pth'
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(meta=dict(licence=licence), state_dict=done.weights), path)
        say('weights', f'{path}, which are {file} converted; licence: {licence}')
        return done.arch, str(path.absolute())
    bare = {name.removeprefix('backbone.'): value for name, value in weights.items()}
    for arch, settings in ConvNeur.arch_settings.items():
        if all(stage_of(bare, i) == stage for i, stage in enumerate(zip(settings['depths'], settings['channels']))):
            if args.arch not in (None, arch):
                raise LaunchError(f'--checkpoint: {args.checkpoint} is of {arch}, and --arch is {args.arch}')
            say('weights', f'backbone of {args.checkpoint}, {arch}')
            is_path = not urlparse(args.checkpoint).scheme
            return arch, str(Path(args.checkpoint).expanduser().absolute()) if is_path else args.checkpoint
    raise LaunchError(f'--checkpoint: the backbone of {args.checkpoint} is of none of the archs '
                      f'{", ".join(ConvNeur.arch_settings)}')


def stage_of(weights: dict[str, torch.Tensor], stage: int) -> tuple[int, int]:
    """Return (number of blocks, channels) of a stage in a backbone's weights."""
    kernels = [value for name, value in weights.items()
               if name.startswith(f'stages.{stage}.') and name.endswith('.depthwise_conv.weight')]
    return len(kernels), len(kernels[0]) if kernels else 0


def config_text(args: argparse.Namespace, own: OwnData, arch: str, weights: str | None) -> str:
    """Return the config: what the data and the command line change in configs/_base_/own_data/."""
    task = args.task
    limit = LIMITS[task][torch.cuda.is_available()]
    size = fit_image_size(task, own.sizes, own.boxes, limit)
    say('input', f'{size[0]} x {size[1]} pixels, at most {limit} {"with" if torch.cuda.is_available() else "without"} '
                 'a GPU')
    channels = ConvNeur.arch_settings[arch]['channels']
    kind = 'cascade' if task == 'det' and args.head == 'cascade' else task
    # Overrides of the model, by part.
    model: dict[str, list[str]] = {}

    def override(part: str, text: str) -> None:
        model.setdefault(part, []).append(text)

    if arch != 'm1':
        override('backbone', f"arch='{arch}'")
        if task == 'cls':
            override('head', f'in_channels={channels[-1]}')
        else:
            override('neck', f'in_channels={channels[1:] if kind == "det" else channels}')
    if own.train.count < BATCH_SIZE[task] and kind in ('det', 'seg'):
        say('norms', 'GroupNorm in neck and head: a step has too few pictures for BatchNorm to normalise by')
        for part in ('neck', 'bbox_head') if kind == 'det' else ('decode_head', ):
            override(part, "norm_cfg=dict(type='GN', num_groups=8)")
    base = kind if task != 'det' or own.has_masks else f'{kind}_boxes'
    if kind == 'cascade':
        scale, ratios, iou = fit_anchors(own.boxes * max(size))
        say('anchors', f'scale {scale:g} at the strides {", ".join(map(str, STRIDES))}, height to width '
                       f'{", ".join(f"{ratio:g}" for ratio in ratios)}: mean IoU with the objects {iou:.2f}')
        override('rpn_head', f'anchor_generator=dict(scales=[{scale:g}], ratios={ratios})')
    epochs = args.epochs or fit_epochs(kind, own.train.count)
    steps = -(-own.train.count // BATCH_SIZE[task])
    say('length', f'{epochs} epochs of {steps} steps; --epochs sets another number')
    unit, length = ('max_iters', epochs * steps) if task == 'seg' else ('max_epochs', epochs)
    interval = max(1, length // 10)
    lines = [
        f'# {shlex.join(["tools/train_custom.py", "--task", task, str(args.data)])}',
        f"_base_ = __import__('convneur_mm').config('_base_/own_data/{base}')",
        f'data_root = {data_root(args)!r}{suffix_text(own)}',
        split_text('train', own, args),
        split_text('val', own, args),
        f'classes = {own.classes!r}{weights_text(own)}',
        f'image_size, {unit} = {size}, {length}',
    ]
    if weights:
        # The first steps should not undo pretrained weights; RTMDet learns at four times the rate of the others.
        rate = '1e-3' if kind == 'det' else '3e-4'
        lines.append(f'pretrained, optim_wrapper = dict({arch}={weights!r}), dict(optimizer=dict(lr={rate}))')
    if model:
        parts = (f'{part}=dict({", ".join(texts)})' for part, texts in model.items())
        lines.append(f'model = dict({", ".join(parts)})')
    lines.append(f'train_cfg, default_hooks = dict(val_interval={interval}), '
                 f'dict(checkpoint=dict(interval={interval}))')
    return '\n'.join(lines) + '\n'


def suffix_text(own: OwnData) -> str:
    images, labels = own.suffixes
    return f'; img_suffix, seg_map_suffix = {images!r}, {labels!r}' if labels else ''


def weights_text(own: OwnData) -> str:
    if not own.pixels:
        return ''
    weights = fit_class_weights(own.pixels)
    say('weighting', f'the loss of a pixel by its class, from {min(weights):g} to {max(weights):g}')
    return f'; class_weight = {weights}'


def data_root(args: argparse.Namespace) -> str:
    data = Path(args.data).absolute()
    return f'{data if data.is_dir() else data.parent}/'


def split_text(name: str, own: OwnData, args: argparse.Namespace) -> str:
    """Return the config line with a split's paths, relative to ``data_root`` if they lie below it."""
    split = getattr(own, name)
    places = dict(ann=split.ann_file, images=split.images, **(dict(labels=split.labels) if split.labels else {}))
    names = ', '.join(f'{name}_{key}' for key in places)
    values = ', '.join(repr(str(path).removeprefix(data_root(args))) for path in places.values())
    return f'{names} = {values}'


def config_path(out: Path) -> Path:
    return out / f'{out.resolve().name}.py'


def train_command(out: Path) -> list[str]:
    return [str(TOOLS / 'train.py'), str(config_path(out)), '--work-dir', str(out / 'train'), '--auto-scale-lr']


def resume_command(out: Path) -> list[str]:
    return [*train_command(out), '--resume']


def shown(command: Sequence[str]) -> str:
    return shlex.join(os.path.relpath(word) if os.path.isabs(word) else word for word in command)


def run(command: Sequence[str]) -> None:
    """Run one of the tools in this interpreter; signals are passed to it, and its failure ends this process."""
    say('run', shown(command))
    with subprocess.Popen([sys.executable, *command]) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        # A terminal sends Ctrl-C to both processes; other signals only arrive here.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        signal.signal(signal.SIGTERM, pass_on)
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        try:
            config, out = set_up(args)
        except FaultyDataError as error:
            print(error.report.text(), file=sys.stderr)
            raise
    if args.dry_run:
        say('then', shown(train_command(out)))
        return
    run(train_command(out))
    checkpoint = (out / 'train' / 'last_checkpoint').read_text().strip()
    run([str(TOOLS / 'test.py'), str(config), checkpoint, '--work-dir', str(out / 'test'),
         '--show-dir', str(out / 'pictures')])
    say('pictures', f'{out / "pictures"}: truth on the left, prediction on the right')


if __name__ == '__main__':
    main()
