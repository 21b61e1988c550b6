"""Arguments that several tools share."""
from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from mmengine.config import Config, DictAction

from .config import find_config, read_config

# Matches blanks within a value, except beside a comma or just inside a bracket, where they only separate.
BLANKS_WITHIN = re.compile(r'(?<=[^\s,(\[]) +(?=[^\s,)\]])')
KEPT_BLANK = '\ue000'  # private-use code point


class OverridesAction(DictAction):
    """MMEngine's ``--cfg-options``, but it keeps blanks within a value, such as those of a folder's name.

    MMEngine's own drops them, and so reads other files than the named ones. A word that is not ``KEY=VALUE`` ends the
    program with a message in place of a traceback.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Sequence[str],
                 option_string: str | None = None) -> None:
        marked = []
        for word in values:
            key, equals, value = word.partition('=')
            if not key or not equals:
                parser.error(f'{option_string} takes KEY=VALUE, got {word!r}; one with blanks is written "KEY=VALUE"')
            if value.count('(') != value.count(')') or value.count('[') != value.count(']'):
                parser.error(f'{option_string}: brackets do not match in {word!r}; a list is written "KEY=[a,b]"')
            value = BLANKS_WITHIN.sub(lambda found: KEPT_BLANK * len(found[0]), value)
            marked.append(f'{key}={value}')
        super().__call__(parser, namespace, marked, option_string)
        options = getattr(namespace, self.dest)
        setattr(namespace, self.dest, {key: _with_blanks(value) for key, value in options.items()})


def _with_blanks(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_blanks, value))
    return value.replace(KEPT_BLANK, ' ') if isinstance(value, str) else value


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of the arguments that training and testing share."""
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher')
    parser.add_argument('--allow-pickle', action='store_true',
                        help='load checkpoints and pickled or YAML data files that hold more than tensors and plain '
                        'values, which can run any code; without it they are refused. Configs are Python programs, and '
                        'run in either case')
    # Launchers use either spelling; the value is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tools that use a trained model on pictures, as in ``apis.init_model``."""
    add = parser.add_argument
    add_config_arguments(parser)
    add('checkpoint', help='path or URL of the checkpoint')
    add('--device', help='device, e.g. cpu, cuda or cuda:1 (default: the GPU if there is one, else the CPU)')
    add('--allow-pickle', action='store_true', help='load a checkpoint that holds more than tensors and plain values, '
        'which can run any code; without it such a file is refused')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a config and its overrides as arguments."""
    parser.add_argument('config', metavar='CONFIG', help='path of a config, or the name of one that convneur_mm ships')
    parser.add_argument('--cfg-options', nargs='+', action=OverridesAction, default={}, metavar='KEY=VALUE',
                        help='override settings, e.g. model.backbone.memory_cfg.chunk_size=196; a list is '
                        'written "key=[a,b]"')


def config_of(args: argparse.Namespace) -> Config:
    """Read the config of :func:`add_config_arguments` as tools/train.py would run it.

    Raises:
        LaunchError: If there is no such config, it is invalid, or a setting or package in it is missing.
    """
    return read_config(find_config(args.config), args.cfg_options)
