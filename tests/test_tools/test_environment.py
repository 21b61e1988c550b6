"""Which warnings the tools hide."""
import warnings
from pathlib import Path

TOOLS = Path(__file__).parents[2] / 'tools'


def test_known_warnings_alone_are_hidden(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import _environment
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        _environment.hide_warnings()
        warnings.warn('torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument.',
                      stacklevel=1)
        warnings.warn('Setting OMP_NUM_THREADS environment variable for each process to be 1', stacklevel=1)
        warnings.warn_explicit('old', FutureWarning, 'x.py', 1, module='mmengine.optim.amp')
        assert caught == []
        warnings.warn_explicit('old', FutureWarning, 'x.py', 1, module='mine.mmengine')
        warnings.warn_explicit('the data is wrong', UserWarning, 'x.py', 1, module='mmengine.optim.amp')
        assert len(caught) == 2
