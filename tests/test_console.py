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


@pytest.mark.parametrize(("error", "status", "line"), [
    (ValueError("kd_alpha=3: at most 1"), 2, "error: kd_alpha=3: at most 1"),
    (KeyError("lost"), 1, "error: 'lost'"),
    (OSError(28, "No space left on device", "out/a"), 1, "error: out/a: No space left on device; again"),
    (OSError("cut off\nat byte 9"), 1, "error: cut off; again"), (KeyboardInterrupt(), 1, "interrupted; again"),
])  # fmt: skip
def test_a_command_that_cannot_go_on_ends_in_one_line_and_a_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as end, console.errors_as_lines(refused=ValueError, failed=KeyError, hint="; again"):
        raise error
    code = end.value.code  # a text is what Python prints, with status 1
    assert (code, capsys.readouterr().err) == (2, f"{line}\n") if status == 2 else (code == line)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  no such key\nmore of it"), "no such key"),
        (ValueError("Validation error for field 'n':\n    TypeError: expected int\n"), None),
        (ValueError("nothing follows:"), "nothing follows:"),
        (KeyError(), "KeyError"),
    ],
    ids=["lines", "a colon", "a colon alone", "nothing"],
)
def test_a_message_of_one_line_does_not_end_where_the_reason_begins(error, line):
    expected = line or "Validation error for field 'n': TypeError: expected int"
    assert console.first_line(error) == expected
