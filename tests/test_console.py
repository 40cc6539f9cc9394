"""Laws of what the console shows."""

import io

import pytest
from rich.console import Console

from MaxText import console


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_takes_its_time_is_shown_on_a_terminal_and_nowhere_else(is_terminal, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda **_: Console(file=output, force_terminal=is_terminal))
    with console.waiting("compiling"):
        pass
    assert ("compiling" in output.getvalue()) == is_terminal
    assert is_terminal or not output.getvalue()
