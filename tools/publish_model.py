#!/usr/bin/env python
r"""Makes the files to give away of a trained model: its weights alone, its whole config, and a model card.

    tools/publish_model.py work_dirs/NAME/NAME.py work_dirs/NAME/epoch_12.pth --out-dir published --safetensors

Name the config in the checkpoint's work dir, or a shipped one with the --cfg-options of the training. The weights keep
the names of the classes and their licence, and load without pickle, by torch.load(weights_only=True). Files are named
NAME-HASH, by the first eight digits of the SHA-256 of the weights: the same checkpoint makes the same weights again.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':
    from _environment import prepare
    prepare()
    from _known_warnings import hide
    hide()
sys.path.append(str(Path(__file__).resolve().parent / 'analysis'))

import numpy as np
import torch
from _config import add_config_arguments, run
from _model_card import describe, model_card
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor

from convneur_mm.apis import init_model
from convneur_mm.apis.model import config_meta
from convneur_mm.engine.files.checkpoint import check_all_match, checkpoint_weights, compare_weights, read_checkpoint
from convneur_mm.engine.files.weights_file import CheckpointError, weights_of
from convneur_mm.engine.launch import find_config
from convneur_mm.engine.runner.written_config import model_differences, started_from, written_settings

# Of a checkpoint's meta, beside config and classes: how far it was trained, and what the converter says of a source.
KEPT = ('epoch', 'iter', 'seed', 'mmengine_version', 'source', 'version', 'layout', 'arch', 'licence')
# Of a config: where a run wrote and what it started from.
OF_A_RUN = ('work_dir', 'launcher', 'load_from', 'resume')
# Of a line in a log, and of the results of tools/test.py.
NO_METRICS = ('time', 'data_time', 'step')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='path or URL of the checkpoint')
    add('--out-dir', type=Path, required=True, metavar='DIR', help='folder for the files; made if there is none')
    add('--name', help='what the files are called, before the hash (default: the name of the config)')
    add('--ema', action=argparse.BooleanOptionalAction, help='publish the averaged weights, and fail if there are '
        'none; --no-ema: those before averaging (default: what tools/test.py tests, which are the averaged weights of '
        'a training with an EMAHook)')
    add('--safetensors', action='store_true', help='write the weights as a safetensors file too')
    add('--licence', metavar='TEXT', help='of the weights; a licence that the checkpoint or the weights it started '
        'from have already is kept, and another one refused')
    add('--metrics', type=Path, metavar='FILE.json', help='results for the card, {"name": number, …}, such as the file '
        'that tools/test.py writes to its work dir (default: the validation of this checkpoint in its work dir)')
    add('--allow-pickle', action='store_true', help='read a checkpoint that holds more than tensors and plain values, '
        'which can run any code; without it such a file is refused')
    return parser.parse_args(argv)


# ---- weights


def published_weights(model: BaseModel, checkpoint: Mapping, averaged: bool | None, filename: str
                      ) -> OrderedDict[str, Tensor]:
    """The weights to publish: those of the model, in its order, each a contiguous copy.

    Args:
        model (BaseModel): Of the config.
        checkpoint (Mapping): As read.
        averaged (bool | None): Whether to take the averaged weights or those before averaging; None takes those that
            tools/test.py loads.
        filename (str): Of the checkpoint.

    Raises:
        CheckpointError: If there are no averages but they are asked for, there are other weights than the model's, or
            one of them is not finite.
    """
    weights, others = checkpoint_weights(checkpoint), checkpoint.get('ema_state_dict')
    if averaged and others is None:
        raise CheckpointError(f'--ema: {filename} holds no averaged weights; they are those of a training with '
                              "custom_hooks=[dict(type='EMAHook')]")
    if averaged is False and others is not None:
        # EMAHook saves the averages as the state_dict, and here the weights that they are averages of.
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
    # A view would be saved with all of what it is a view of.
    result = OrderedDict((name, weights[name].detach().clone(memory_format=torch.contiguous_format)) for name in own
                         if name in weights)
    # Versions of the modules, by which some of them rename the weights of former ones.
    versions = getattr(weights_of(checkpoint), '_metadata', None)
    if versions is not None:
        result._metadata = versions
    return result


def plain(value: object, key: str) -> object:
    """A value in Python's own types, which any reader takes.

    Raises:
        CheckpointError: If it cannot be written in them.
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
    """A checkpoint in torch's format. It is written to memory, as torch keeps a file's name within the file."""
    file = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=weights), file)
    file.seek(0)
    torch.load(file, map_location='cpu', weights_only=True)  # as others will; better it fails here
    return file.getvalue()


def safetensors_file(weights: OrderedDict[str, Tensor], meta: dict) -> bytes:
    """The same in the format of safetensors."""
    from safetensors import torch as safetensors

    # One entry, as the format does not keep the order of several.
    return safetensors.save(dict(weights), dict(meta=json.dumps(meta)))


# ---- where they come from


class Origin(NamedTuple):
    """What weights were made of.

    Attributes:
        licence (str | None): Of the weights, if it is known.
        sources (list[str]): What the training started from; [] if that is not known.
        unknown (list[str]): Files among them that say nothing of a licence, or are not there.
    """

    licence: str | None
    sources: list[str]
    unknown: list[str]


def find_origin(meta: Mapping, given: str | None, filename: str, allow_pickle: bool) -> Origin:
    """Licence and sources by the checkpoint, the weights that its training started from, and the command line.

    Args:
        meta (Mapping): Of the checkpoint. The training is that of the config in it.
        given (str | None): Licence on the command line.
        filename (str): Of the checkpoint.
        allow_pickle (bool): See :func:`read_checkpoint`; for the weights it started from.

    Raises:
        CheckpointError: If these have different licences.
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
    if 'source' in meta:  # of a file that was converted
        sources = [f'{meta["source"]} ({meta.get("version", "other")} weights, converted)']
    else:
        sources = files or (['random weights'] if trained else [])
    return Origin(next(iter(stated.values()), None), sources, unknown)


def check_same_classes(model: BaseModel, filename: str) -> None:
    """Raises a CheckpointError if the classes of a checkpoint, which a model now has, are not those of its config."""
    trained = model.dataset_meta.get('classes', ())
    expected = config_meta(model.cfg).get('classes', trained)
    if tuple(trained) != tuple(expected):
        raise CheckpointError(f'{filename} was trained for the classes {", ".join(trained[:8])}, and the config has '
                              f'{", ".join(expected[:8])}: set the classes of the training')


def check_same_model(meta: Mapping, settings: dict, filename: str) -> None:
    """Raises a CheckpointError if the config within a checkpoint has a model that computes something else."""
    trained = written_settings(meta['cfg']) if isinstance(meta.get('cfg'), str) else {}
    found = list(model_differences(trained['model'], settings['model'])) if 'model' in trained else []
    if found:
        raise CheckpointError(f'{filename} is of another model than that of the config: {"; ".join(found[:3])}'
                              f'{"; …" if len(found) > 3 else ""}. Name the config in its work dir, or add the '
                              '--cfg-options of the training')


def effective_config(cfg: Config) -> str:
    """A config with its bases, overrides and settings in one file, without what belongs to one run."""
    return Config({key: value for key, value in cfg.to_dict().items() if key not in OF_A_RUN}).pretty_text


# ---- results


def read_metrics(path: Path) -> dict[str, float]:
    """The results in a file of the user's.

    Raises:
        ValueError: If there is no such file, or it holds something else than names and numbers.
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
    """The newest validation of a checkpoint in the logs beside it, and when it was; ({}, '') if there is none.

    Raises:
        ValueError: If a line of a log is no JSON.
    """
    logger = (cfg.get('default_hooks') or {}).get('logger') or {}
    counted = 'epoch' if logger.get('log_metric_by_epoch', True) else 'iter'
    if counted == 'epoch' and 'max_iters' in (cfg.get('train_cfg') or {}):
        return {}, ''  # a loop of iterations logs all its validations as of epoch 0
    for path in sorted(checkpoint.parent.glob('*/vis_data/scalars.json'), reverse=True):
        for line in reversed(path.read_text(encoding='utf-8').splitlines()):
            try:
                scalars = json.loads(line)
            except ValueError:
                raise ValueError(f'{path}: expected JSON, got {line[:80]!r}; mend the log, or give results by --metrics'
                                 ) from None
            # Lines of the training have an iteration beside the step.
            if 'iter' not in scalars and scalars.get('step') == meta.get(counted):
                return ({key: value for key, value in scalars.items() if key not in NO_METRICS},
                        f'validation after {counted} {meta[counted]}')
    return {}, ''


# ---- what is printed


def notes(config: str, origin: Origin, metrics: Mapping[str, float]) -> list[str]:
    """What is worth a look before the files are given away."""
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
    """Writes all files, or none: each gets its name when all are complete.

    Raises:
        ValueError: If one of them is there already, or the folder cannot be written to.
    """
    for name in files:
        if (folder / name).exists():
            raise ValueError(f'{folder / name} is there already; remove it, or choose another --out-dir or --name')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.publish-', dir=folder) as unfinished:
            for name, data in files.items():
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

    # Refuses a checkpoint of another model, and has its classes, or else those of the config.
    model = init_model(args.config, args.checkpoint, 'cpu', args.cfg_options, args.allow_pickle)
    check_same_classes(model, args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint, args.allow_pickle)
    saved = checkpoint.get('meta') if isinstance(checkpoint.get('meta'), Mapping) else {}
    weights = published_weights(model, checkpoint, args.ema, args.checkpoint)
    config = effective_config(model.cfg)
    check_same_model(saved, written_settings(config), args.checkpoint)
    origin = find_origin(saved, args.licence, args.checkpoint, args.allow_pickle)
    before_averaging = args.ema is False and 'ema_state_dict' in checkpoint
    if not metrics and not before_averaging:  # what is validated are the averages
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
    rows = describe(model, meta, origin.sources, 'as trained, before averaging' if before_averaging else averaged)
    card = model_card(stem, rows, metrics, measured, {names[suffix]: digest for suffix, digest in hashes.items()})
    # The checkpoint comes last: where it is, all the others are.
    write(args.out_dir, {f'{stem}.py': config.encode(), f'{stem}.md': card.encode(),
                         **{names[suffix]: contents[suffix] for suffix in reversed(contents)}})
    for file in (*names.values(), f'{stem}.py', f'{stem}.md'):
        print(args.out_dir / file)
    for note in notes(config, origin, metrics):
        print(f'note: {note}')


if __name__ == '__main__':
    run(main)
