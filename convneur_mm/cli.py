"""The command ``convneur-mm``, which runs the tools of a checkout or an installed wheel by name, from any folder.

``convneur-mm train CONFIG`` runs ``tools/train.py CONFIG``. The tools are found in the folders, not listed here.
"""
from __future__ import annotations

import ast
import difflib
import os
import sys
from pathlib import Path

from .paths import config_root

FOLDERS = ('', 'analysis', 'deploy', 'model_converters')
SHORT = {'check-dataset': 'check', 'publish-model': 'publish'}


def find_tools() -> dict[str, Path]:
    """Return the paths of the tools by command name: 'make-shapes' is make_shapes.py."""
    root = config_root().parent / 'tools'
    paths = [path for folder in FOLDERS for path in sorted((root / folder).glob('*.py')) if path.name[0] != '_']
    names = [path.stem.replace('_', '-') for path in paths]
    return dict(zip([SHORT.get(name, name) for name in names], paths, strict=True))


def summary(path: Path) -> str:
    """Return the first line of a tool's docstring, without running the tool."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '').partition('\n')[0]


def help_text(tools: dict[str, Path]) -> str:
    """Return the help text, with a line for each tool."""
    width = max(map(len, tools))
    lines = [f'  {name:{width}}  {summary(path)}' for name, path in tools.items()]
    return '\n'.join(['usage: convneur-mm COMMAND [ARGUMENTS]', '', *lines, '',
                      'convneur-mm COMMAND --help lists the arguments of a command.'])


def main(argv: list[str] | None = None) -> None:
    """Replace this process by the tool that the first argument names; see ``convneur-mm --help``.

    Tools need a new process, because they set variables that torch reads when imported, and torch is imported here.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    tools = find_tools()
    if name in ('-h', '--help', 'help'):
        print(help_text(tools))
        return
    path = tools.get(name.replace('_', '-')) or tools.get(SHORT.get(name.replace('_', '-'), ''))
    if path is None:
        near = difflib.get_close_matches(name, tools, n=1)
        hint = f'did you mean {near[0]}?' if near else 'convneur-mm --help lists the commands'
        print(f'error: convneur-mm has no command {name!r}; {hint}', file=sys.stderr)
        sys.exit(2)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *arguments])


if __name__ == '__main__':
    main()
