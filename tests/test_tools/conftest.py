"""What the tests of tools/analysis share."""
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ANALYSIS = Path(__file__).parents[2] / 'tools' / 'analysis'


@pytest.fixture(scope='session')
def analysis_tool() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of tools/analysis, which sees its own folder first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSIS))
        yield importlib.import_module
