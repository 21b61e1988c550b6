#!/usr/bin/env python
"""Write the licences of all packages that this environment has for the project to docs/dependencies.md.

    dev/licences.py            # writes the table
    dev/licences.py --check    # prints the differences, and exits with 1 if there are any

The table covers the requirements of the primary stack and of its tests, and their dependencies. A licence is read from
the package's metadata.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'dependencies.md'
BEGIN, END = '<!-- licences: begin -->\n', '<!-- licences: end -->\n'
SETS = {'use': ('primary.txt',), 'tests and documentation': ('tests_all.txt', 'build.txt')}
# Short names for the different spellings of a licence.
SHORT = {'Apache Software License': 'Apache-2.0', 'Apache 2.0': 'Apache-2.0', 'Apache License 2.0': 'Apache-2.0',
         'Apache License': 'Apache-2.0', 'Apache 2': 'Apache-2.0', 'LicenseRef-Apache-2.0': 'Apache-2.0',
         'MIT License': 'MIT', 'BSD License': 'BSD', '3-Clause BSD License': 'BSD-3-Clause',
         'BSD 3-Clause License': 'BSD-3-Clause', 'ISC License (ISCL)': 'ISC', 'FreeBSD': 'BSD-2-Clause',
         'Python Software Foundation License': 'PSF-2.0', 'Mozilla Public License 2.0 (MPL 2.0)': 'MPL-2.0',
         'NVIDIA Proprietary Software': 'NVIDIA, proprietary', 'LicenseRef-NVIDIA-Proprietary': 'NVIDIA, proprietary',
         'GNU Library or Lesser General Public License (LGPL)': 'LGPL'}


def requirements(names: Iterable[str]) -> list[Requirement]:
    """Read the requirements of files in ``requirements/``, and of the files that these include."""
    found = []
    for name in names:
        text = (ROOT / 'requirements' / name).read_text(encoding='utf-8')
        found += requirements(re.findall(r'^-r (\S+)', text, re.M))
        lines = (line.split('#')[0].strip() for line in text.splitlines())
        found += [Requirement(line) for line in lines if line and not line.startswith('-')]
    return found


def closure(asked: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """Return the requested packages and all their installed dependencies, by name.

    Raises:
        ValueError: If a requested package is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    left = [(requirement, True) for requirement in asked]
    while left:
        requirement, needed = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(requirement.marker.evaluate(dict(extra=extra))
                                          for extra in ('', *requirement.extras)):
            continue
        if name not in found:
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                if needed:
                    raise ValueError(f'{name} is not installed in {sys.prefix}: tools/setup_env.sh') from None
                continue  # an alternative build lacks this package, such as PyTorch's CPU builds
            left += [(Requirement(line), False) for line in found[name].requires or []
                     if 'extra ==' not in line or requirement.extras]
    return found


def licence(package: metadata.Distribution) -> str:
    """Return the licence in one line: its expression, else its classifiers, else its free text or that text's title."""
    about = package.metadata
    if about.get('License-Expression'):
        names = [about['License-Expression']]
    else:
        names = [line.split(' :: ')[-1] for line in about.get_all('Classifier', [])
                 if line.startswith('License ::') and not line.endswith('OSI Approved')]
    if not names or names == ['Other/Proprietary License']:
        text = (about.get('License') or '').strip()
        texts = [text, *[file.read_text() or '' for file in package.files or [] if 'licen' in file.name.lower()]]
        names = ([text] if text and '\n' not in text else [title for title in map(title_of, texts) if title][:1]) or [
            'not said']
    short = {SHORT.get(name, name) for name in names}
    return ', '.join(sorted(short))


def title_of(text: str) -> str:
    """Return the name of a licence's text; '' if it is not a usual one."""
    text = re.sub(r'\s+', ' ', text)
    return next((name for words, name in (
        ('Apache License Version 2.0', 'Apache-2.0'), ('Permission is hereby granted, free of charge', 'MIT'),
        ('Neither the name', 'BSD-3-Clause'), ('Redistribution and use in source', 'BSD-2-Clause'))
        if words in text), '')


def rows() -> dict[str, tuple[str, str]]:
    """Return the licence and first use of every package."""
    found: dict[str, tuple[str, str]] = {}
    for use, files in SETS.items():
        for name, package in closure(requirements(files)).items():
            found.setdefault(name, (licence(package), use))
    return found


def table(lines: dict[str, tuple[str, str]]) -> str:
    body = ''.join(f'| {name} | {text} | {use} |\n' for name, (text, use) in sorted(lines.items()))
    return f'| package | licence | needed for |\n| --- | --- | --- |\n{body}'


def read(page: str) -> dict[str, tuple[str, str]]:
    """Read the rows of the page's current table."""
    cells = [[cell.strip() for cell in line.strip('|\n').split('|')]
             for line in page.partition(BEGIN)[2].partition(END)[0].splitlines()[2:]]
    return {name: (text, use) for name, text, use in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args()
    page = PAGE.read_text(encoding='utf-8')
    try:
        found, written = rows(), read(page)
    except ValueError as error:
        sys.exit(f'licences: error: {error}')
    if args.check:
        # Packages only needed on other systems or Pythons may keep their rows.
        wrong = [f'{name}: {written.get(name)} in {PAGE.name}, {row} here' for name, row in sorted(found.items())
                 if written.get(name) != row]
        sys.exit('\n'.join(wrong) or 0)
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2], encoding='utf-8')
    print(f'{PAGE}: {len(found)} packages')


if __name__ == '__main__':
    main()
