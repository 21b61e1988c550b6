#!/usr/bin/env python
r"""Write a trained model's files for publication: its weights alone, its whole config, and a model card.

    tools/publish_model.py work_dirs/NAME/NAME.py work_dirs/NAME/epoch_12.pth --out-dir published --safetensors

Name the config in the checkpoint's work dir, or a shipped one with the --cfg-options of the training. The weights
include the class names and their licence, and load without pickle, by torch.load(weights_only=True). Files are named
NAME-HASH, with the first eight digits of the weights' SHA-256, so the same checkpoint gives the same name again.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    from _environment import prepare
    prepare()

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

from convneur_mm.analysis.model_card import describe, model_card, table
from convneur_mm.apis import init_model
from convneur_mm.apis.model import config_meta
from convneur_mm.engine.files.checkpoint import check_all_match, checkpoint_weights, compare_weights, read_checkpoint
from convneur_mm.engine.files.errors import one_line_errors
from convneur_mm.engine.files.weights_file import CheckpointError, weights_of
from convneur_mm.engine.launch import add_config_arguments, find_config
from convneur_mm.engine.runner.written_config import model_differences, started_from, written_settings
from convneur_mm.models import ConvNeur
from convneur_mm.models.hub import without_unused_norms

# Keys kept from a checkpoint's meta besides config and classes: training progress, and the converter's source notes.
KEPT = ('epoch', 'iter', 'seed', 'mmengine_version', 'source', 'version', 'layout', 'arch', 'licence')
# Config keys that describe one run: where it wrote and what it started from.
OF_A_RUN = ('work_dir', 'launcher', 'load_from', 'resume')
# Keys in logs and in results of tools/test.py that are not metrics.
NO_METRICS = ('time', 'data_time', 'step')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='path or URL of the checkpoint')
    add('--out-dir', type=Path, required=True, metavar='DIR', help='output folder, created if missing')
    add('--name', help='file name before the hash (default: the name of the config)')
    add('--ema', action=argparse.BooleanOptionalAction, help='publish the averaged weights, fail if there are '
        'none; --no-ema: publish the weights before averaging (default: the weights that tools/test.py tests, which '
        'are the averaged weights of a training with an EMAHook)')
    add('--safetensors', action='store_true', help='also write the weights as a safetensors file')
    add('--hub', action='store_true', help='also write a folder for the hub of Hugging Face with the backbone, or the '
        'whole model if it is a classifier; ConvNeur.from_pretrained and timm load it')
    add('--licence', metavar='TEXT', help='licence of the weights; an existing licence of the checkpoint or of its '
        'initial weights is kept, and a different one is refused')
    add('--metrics', type=Path, metavar='FILE.json', help='results for the card, {"name": number, …}, such as the file '
        'that tools/test.py writes to its work dir (default: the validation of this checkpoint in its work dir)')
    add('--allow-pickle', action='store_true', help='read a checkpoint that holds more than tensors and plain values, '
        'which can run any code; without it such a file is refused')
    return parser.parse_args(argv)


# ---- weights


def published_weights(model: BaseModel, checkpoint: Mapping, averaged: bool | None, filename: str
                      ) -> OrderedDict[str, Tensor]:
    """Return the weights to publish: the model's, in its order, each a contiguous copy.

    Args:
        model (BaseModel): Built from the config.
        checkpoint (Mapping): As read from the file.
        averaged (bool | None): Whether to take the averaged weights or those before averaging. None takes those that
            tools/test.py loads.
        filename (str): Name of the checkpoint.

    Raises:
        CheckpointError: If averages are asked for and missing, the weights are not the model's, or one of them is not
            finite.
    """
    weights, others = checkpoint_weights(checkpoint), checkpoint.get('ema_state_dict')
    if averaged and others is None:
        raise CheckpointError(f'--ema: {filename} holds no averaged weights; they are those of a training with '
                              "custom_hooks=[dict(type='EMAHook')]")
    if averaged is False and others is not None:
        # EMAHook saves the averages as state_dict, and the weights before averaging as ema_state_dict.
        weights |= {name.removeprefix('module.'): value for name, value in others.items()
                    if name.startswith('module.')}
    own = model.state_dict()
    differences = compare_weights(own, weights)
    check_all_match(own, differences, filename, None)
    if differences.unused:
        raise CheckpointError(f'{filename} is not of this model, which lacks {len(differences.unused)} of its weights, '
                              f'such as {differences.unused[0]}')
    infinite = [name for name, value in weights.items() if not value.isfinite().all()]
    if infinite:
        raise CheckpointError(f'{filename} holds values that are not finite, in {len(infinite)} of its weights such as '
                              f'{infinite[0]}: publish a checkpoint from before the training diverged')
    # Saving a view would save its whole storage.
    result = OrderedDict((name, weights[name].detach().clone(memory_format=torch.contiguous_format)) for name in own
                         if name in weights)
    # Some modules use these versions to rename weights of older releases.
    versions = getattr(weights_of(checkpoint), '_metadata', None)
    if versions is not None:
        result._metadata = versions
    return result


def plain(value: object, key: str) -> object:
    """Convert a value to Python's own types, which any reader accepts.

    Raises:
        CheckpointError: If this type cannot be converted.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(item, f'{key}.{name}') for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item, f'{key}[{i}]') for i, item in enumerate(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise CheckpointError(f'{key} must be a plain value to be published, got a {type(value).__name__}')


def pth_file(weights: OrderedDict[str, Tensor], meta: dict) -> bytes:
    """Return a checkpoint in torch's format, made in memory because torch stores a file's name inside the file."""
    file = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=weights), file)
    file.seek(0)
    torch.load(file, map_location='cpu', weights_only=True)  # users load it like this; fail here rather than there
    return file.getvalue()


def safetensors_file(weights: OrderedDict[str, Tensor], meta: dict) -> bytes:
    """Return the same checkpoint in the safetensors format."""
    from safetensors import torch as safetensors

    # Use one entry, because the format does not keep the order of several.
    return safetensors.save(dict(weights), dict(meta=json.dumps(meta)))


def hub_files(backbone: nn.Module, weights: Mapping[str, Tensor], licence: str | None, table: str) -> dict[str, bytes]:
    """Return the files of a folder that ``ConvNeur.from_pretrained`` and timm load.

    It holds the backbone, or timm's classifier of it if the weights are those of a classifier with a linear head.

    Args:
        backbone (nn.Module): The backbone of the published model.
        weights (Mapping[str, Tensor]): The published weights.
        licence (str | None): Licence of the weights, if known.
        table (str): Facts about the model, in Markdown.

    Raises:
        ValueError: If the backbone is not a ConvNeur.
    """
    if not isinstance(backbone, ConvNeur):
        raise ValueError(f'--hub is for models with ConvNeur, and the backbone is {type(backbone).__name__}')
    own = {name.removeprefix('backbone.'): value for name, value in weights.items()
           if name.startswith(('backbone.', 'head.fc.'))}
    options = dict(backbone.options)
    if 'head.fc.weight' in own and backbone.gap_before_final_norm and isinstance(backbone.arch, str):
        from convneur_mm.timm import ConvNeurClassifier
        arch, in_chans = options.pop('arch'), options.pop('in_channels')
        for name in ('out_indices', 'gap_before_final_norm'):
            del options[name]
        saved = ConvNeurClassifier(arch, len(own['head.fc.weight']), in_chans, **options)
        own = without_unused_norms(own)
    else:
        saved = ConvNeur(**options)
    saved.load_state_dict({name: value for name, value in own.items() if name in saved.state_dict()})
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        card = Path(folder, 'README.md')
        # The hub knows licences by identifiers, and all others as 'other' with a name.
        named = f'license: other\nlicense_name: {json.dumps(licence)}\n' if licence else ''
        card.write_text(card.read_text().replace('---\n', f'---\n{named}', 1) + f'\n{table}\n')
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


# ---- where they come from


class Origin(NamedTuple):
    """Origin of the weights.

    Attributes:
        licence (str | None): Licence of the weights, if known.
        sources (list[str]): What the training started from; [] if unknown.
        unknown (list[str]): Files among the sources that are missing or state no licence.
    """

    licence: str | None
    sources: list[str]
    unknown: list[str]


def find_origin(meta: Mapping, given: str | None, filename: str, allow_pickle: bool) -> Origin:
    """Find the licence and sources from the checkpoint, its initial weights, and the command line.

    Args:
        meta (Mapping): Meta of the checkpoint; the config in it tells how it was trained.
        given (str | None): Licence from the command line.
        filename (str): Name of the checkpoint.
        allow_pickle (bool): See :func:`read_checkpoint`; applies to the initial weights.

    Raises:
        CheckpointError: If the licences differ.
    """
    stated = {filename: meta['licence']} if meta.get('licence') else {}
    trained = written_settings(meta['cfg']) if isinstance(meta.get('cfg'), str) else {}
    files, unknown = started_from(trained), []
    for name in files:
        path = os.path.expanduser(name)
        own = read_checkpoint(path, allow_pickle, mmap=True).get('meta') if os.path.isfile(path) else None
        if isinstance(own, Mapping) and own.get('licence'):
            stated[name] = own['licence']
        else:
            unknown.append(name)
    if given:
        stated['--licence'] = given
    if len(set(stated.values())) > 1:
        raise CheckpointError('weights keep the licence of what they were made of, and here are several: '
                              + '; '.join(f'{name}: {text!r}' for name, text in stated.items()))
    if 'source' in meta:  # a converted checkpoint
        sources = [f'{meta["source"]} ({meta.get("version", "other")} weights, converted)']
    else:
        sources = files or (['random weights'] if trained else [])
    return Origin(next(iter(stated.values()), None), sources, unknown)


def check_same_classes(model: BaseModel, filename: str) -> None:
    """Raise a CheckpointError if the checkpoint's classes, now in the model, differ from the config's."""
    trained = model.dataset_meta.get('classes', ())
    expected = config_meta(model.cfg).get('classes', trained)
    if tuple(trained) != tuple(expected):
        raise CheckpointError(f'{filename} was trained for the classes {", ".join(trained[:8])}, and the config has '
                              f'{", ".join(expected[:8])}: set the classes of the training')


def check_same_model(meta: Mapping, settings: dict, filename: str) -> None:
    """Raise a CheckpointError if the config within the checkpoint describes a different model."""
    trained = written_settings(meta['cfg']) if isinstance(meta.get('cfg'), str) else {}
    found = list(model_differences(trained['model'], settings['model'])) if 'model' in trained else []
    if found:
        raise CheckpointError(f'{filename} is of another model than that of the config: {"; ".join(found[:3])}'
                              f'{"; …" if len(found) > 3 else ""}. Name the config in its work dir, or add the '
                              '--cfg-options of the training')


def effective_config(cfg: Config) -> str:
    """Return the config in one file with bases, overrides and settings, without the keys of one run."""
    return Config({key: value for key, value in cfg.to_dict().items() if key not in OF_A_RUN}).pretty_text


# ---- results


def read_metrics(path: Path) -> dict[str, float]:
    """Read the results from the user's file.

    Raises:
        ValueError: If the file is missing, or holds anything but names and numbers.
    """
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'--metrics {path}: {error.strerror}') from None
    except ValueError as error:
        raise ValueError(f'--metrics {path}: expected JSON ({error})') from None
    if not isinstance(found, dict) or not found or not all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in found.values()):
        raise ValueError(f'--metrics {path}: expected {{"name": number, …}}, got {json.dumps(found)[:80]}')
    return {key: value for key, value in found.items() if key not in NO_METRICS}


def validated(checkpoint: Path, meta: Mapping, cfg: Config) -> tuple[dict[str, float], str]:
    """Find the checkpoint's newest validation in the logs beside it, and its time; ({}, '') if there is none.

    Raises:
        ValueError: If a line of a log is not JSON.
    """
    logger = (cfg.get('default_hooks') or {}).get('logger') or {}
    counted = 'epoch' if logger.get('log_metric_by_epoch', True) else 'iter'
    if counted == 'epoch' and 'max_iters' in (cfg.get('train_cfg') or {}):
        return {}, ''  # an iteration-based loop logs every validation as epoch 0
    for path in sorted(checkpoint.parent.glob('*/vis_data/scalars.json'), reverse=True):
        for line in reversed(path.read_text(encoding='utf-8').splitlines()):
            try:
                scalars = json.loads(line)
            except ValueError:
                raise ValueError(f'{path}: expected JSON, got {line[:80]!r}; mend the log, or give results by --metrics'
                                 ) from None
            # Training lines have 'iter' besides 'step'.
            if 'iter' not in scalars and scalars.get('step') == meta.get(counted):
                return ({key: value for key, value in scalars.items() if key not in NO_METRICS},
                        f'validation after {counted} {meta[counted]}')
    return {}, ''


# ---- what is printed


def notes(config: str, origin: Origin, metrics: Mapping[str, float]) -> list[str]:
    """Return what the user should check before publishing the files."""
    found = []
    if origin.unknown:
        found.append(f'the training started from {", ".join(origin.unknown)}, which say nothing of their licence here')
    if not origin.licence:
        found.append('the card states no licence; --licence TEXT does')
    if not metrics:
        found.append('the card has no results, as the work dir has no validation of this checkpoint; --metrics '
                     'FILE.json gives them')
    paths = sorted(set(re.findall(r"""['"]((?:/|~|[A-Z]:\\)[^'"]+)['"]""", config)))
    if paths:
        found.append(f'the config names paths of this machine: {", ".join(paths)}')
    return found


# ---- files


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files or none: the files get their names only when all are complete.

    Raises:
        ValueError: If a file already exists, or the folder is not writable.
    """
    for name in files:
        if (folder / name).exists():
            raise ValueError(f'{folder / name} is there already; remove it, or choose another --out-dir or --name')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.publish-', dir=folder) as unfinished:
            for name, data in files.items():
                for place in (Path(unfinished, name), folder / name):
                    place.parent.mkdir(exist_ok=True)
                Path(unfinished, name).write_bytes(data)
            for name in files:
                os.replace(Path(unfinished, name), folder / name)
    except OSError as error:
        raise ValueError(f'--out-dir {folder}: {error.strerror}') from None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    name = Path(find_config(args.config)).stem if args.name is None else args.name
    if not re.fullmatch(r'[\w.+-]+', name):
        raise ValueError(f'--name must consist of letters, digits and . _ + -, got {name!r}')
    metrics, measured = (read_metrics(args.metrics), args.metrics.name) if args.metrics else ({}, '')

    # This refuses a checkpoint of another model; the model's classes are the checkpoint's, else the config's.
    model = init_model(args.config, args.checkpoint, 'cpu', args.cfg_options, args.allow_pickle)
    check_same_classes(model, args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint, args.allow_pickle)
    saved = checkpoint.get('meta') if isinstance(checkpoint.get('meta'), Mapping) else {}
    weights = published_weights(model, checkpoint, args.ema, args.checkpoint)
    config = effective_config(model.cfg)
    check_same_model(saved, written_settings(config), args.checkpoint)
    origin = find_origin(saved, args.licence, args.checkpoint, args.allow_pickle)
    before_averaging = args.ema is False and 'ema_state_dict' in checkpoint
    if not metrics and not before_averaging:  # validation uses the averaged weights
        metrics, measured = validated(Path(args.checkpoint), saved, model.cfg)

    meta = {key: plain(saved[key], f'meta.{key}') for key in KEPT if saved.get(key) is not None}
    meta.update(dataset_meta=plain(model.dataset_meta, 'meta.dataset_meta'), cfg=config)
    if origin.licence:
        meta['licence'] = origin.licence
    contents = {'pth': pth_file(weights, meta)}
    if args.safetensors:
        contents['safetensors'] = safetensors_file(weights, meta)
    hashes = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in contents.items()}
    names = {suffix: f'{name}-{digest[:8]}.{suffix}' for suffix, digest in hashes.items()}
    stem = Path(names['pth']).stem

    averaged = 'averaged' if 'ema_state_dict' in checkpoint else 'as trained'
    backbone = getattr(model, 'backbone', model)
    rows = describe(model, meta, origin.sources, 'as trained, before averaging' if before_averaging else averaged)
    hub = hub_files(backbone, weights, origin.licence, table(rows, '', '')) if args.hub else {}
    card = model_card(stem, rows, metrics, measured, {names[suffix]: digest for suffix, digest in hashes.items()})
    # The checkpoint is written last: if it exists, so do the others.
    write(args.out_dir, {**{f'{stem}/{file}': content for file, content in hub.items()},
                         f'{stem}.py': config.encode(), f'{stem}.md': card.encode(),
                         **{names[suffix]: contents[suffix] for suffix in reversed(contents)}})
    for file in (*names.values(), f'{stem}.py', f'{stem}.md', *([stem] if args.hub else [])):
        print(args.out_dir / file)
    for note in notes(config, origin, metrics):
        print(f'note: {note}')


if __name__ == '__main__':
    with one_line_errors():
        main()
