"""The result of a check, and its text for users."""
from __future__ import annotations

import os
import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """A fault in the data.

    Attributes:
        path: The file, or for an annotation the annotation file.
        kind: Kind of fault in a few words, the same for all faults of the kind.
        reason: Description of this fault.
    """

    path: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f'{self.path}: {self.reason}'


@dataclass(frozen=True)
class ClassCount:
    """Number of occurrences of a class.

    Attributes:
        name: Name of the class.
        images: Number of images with the class.
        instances: Number of its annotations; only for COCO.
        pixels: Number of its pixels; only for ADE20K.
    """

    name: str
    images: int
    instances: int | None = None
    pixels: int | None = None


@dataclass
class Report:
    """The result of a check.

    Attributes:
        name: Name of the checked data.
        images: Number of images that should exist.
        counts: A count for each class, including those that do not occur.
        faults: All faults, in the order of the files.
        notes: Remarks that are not faults.
        seconds: Duration of the check.
    """

    name: str
    images: int = 0
    counts: list[ClassCount] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Return whether there are no faults."""
        return not self.faults

    def add(self, path: str | os.PathLike[str], kind: str, reason: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(str(path), kind, reason))

    def text(self, max_shown: int = 10, width: int | None = None) -> str:
        """Return the report as text for users.

        Args:
            max_shown: Number of faults to show; the others are only counted.
            width: Line width of the classes and notes in characters; None for that of the terminal.

        Returns:
            Lines without a final line break.
        """
        width = width or shutil.get_terminal_size().columns
        rate = f' ({self.images / self.seconds:.0f} images/s)' if self.images and self.seconds else ''
        lines = [f'{self.name}: {self.images} images, checked in {self.seconds:.1f} s{rate}']
        occurring = [count for count in self.counts if count.images or count.instances]
        lines += ['', *_class_table(occurring, width)] if occurring else []
        absent = [count.name for count in self.counts if not (count.images or count.instances)]
        notes = list(self.notes)
        if absent:
            notes.append(f'classes that do not occur: {len(absent)} ({", ".join(absent)})')
        if notes:
            lines += ['', *(textwrap.fill(f'note: {note}', width, subsequent_indent='  ') for note in notes)]
        if not self.faults:
            return '\n'.join([*lines, '', 'no faults'])
        kinds = Counter(fault.kind for fault in self.faults)
        lines += ['', f'faults: {len(self.faults)} ({", ".join(f"{n} {kind}" for kind, n in kinds.most_common())})']
        lines += [f'  {fault}' for fault in self.faults[:max_shown]]
        if len(self.faults) > max_shown:
            lines.append(f'  ... and {len(self.faults) - max_shown} more')
        return '\n'.join(lines)


def _class_table(counts: list[ClassCount], width: int) -> list[str]:
    """Return the counts as a table, with several classes side by side if the lines are long enough."""
    header = ['class', 'images']
    if counts[0].instances is not None:
        header.append('instances')
    if counts[0].pixels is not None:
        header.append('pixels')
    total = sum(count.pixels or 0 for count in counts)
    rows = [header]
    for count in counts:
        rows.append([count.name, str(count.images)])
        if count.instances is not None:
            rows[-1].append(str(count.instances))
        if count.pixels is not None:
            rows[-1].append(f'{count.pixels / max(total, 1):.2%}')
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ['  '.join(text.ljust(size) if i == 0 else text.rjust(size)
                       for i, (text, size) in enumerate(zip(row, widths))) for row in rows]
    titles, cells = cells[0], cells[1:]
    # A line has an indent of 2 and 4 spaces between its columns: 2 + n (length + 4) - 4 characters.
    # Columns of fewer than ten classes would make the table harder to read.
    columns = max(1, min((width + 2) // (len(titles) + 4), -(-len(cells) // 10)))
    height = -(-len(cells) // columns)
    columns = -(-len(cells) // height)
    lines = ['    '.join([titles] * columns)]
    lines += ['    '.join(cells[row::height]) for row in range(height)]
    return [f'  {line}' for line in lines]
