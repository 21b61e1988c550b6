"""Errors that end a command with one line, and with a traceback for those who look for a fault."""
import pytest

from convneur_mm.engine import launch
from convneur_mm.engine.files.errors import LaunchError, one_line_errors
from convneur_mm.stack import StackError


@pytest.mark.parametrize('error', [LaunchError('x: wrong'), ValueError('x:\nwrong'), FileNotFoundError('x: wrong'),
                                   StackError('x: wrong')])
def test_what_a_user_can_set_right_is_one_line(error, refused, monkeypatch):
    monkeypatch.delenv('CONVNEUR_DEBUG', raising=False)
    with refused('x: wrong$'), one_line_errors():
        raise error


@pytest.mark.parametrize('error', [KeyError('x'), RuntimeError('x'), AssertionError('x')])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


@pytest.mark.parametrize('debug, expected', [('1', LaunchError), ('0', SystemExit), ('', SystemExit)])
def test_tracebacks_are_shown_if_asked_for(debug, expected, monkeypatch):
    def main():
        raise LaunchError('x: wrong')

    monkeypatch.setenv('CONVNEUR_DEBUG', debug)
    with pytest.raises(expected), one_line_errors():
        main()
    with pytest.raises(expected):
        launch.run(main)
