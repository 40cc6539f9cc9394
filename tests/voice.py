"""What a run may say: every line of an ordinary run's output is of one of these forms, or it is noise."""

import re

_NUMBER = r"[-\d.e+]+[kMBT]?"
_FORMS = [
    r" *(run|student|teacher|loss|tokens|text|devices|memory)  .*",  # the header
    r" {10}(fresh, with|from|in one block of|in \d+ blocks of|[\d.]+% of them are trained,) .*",
    rf"step +\d+/\d+ \| loss {_NUMBER} \| .*",
    rf"eval after step \d+: ce {_NUMBER} \| .* tokens",
    r"warning: .*",
    r"checkpoints: .*",
    r"W\d{4} [\d:.]+ +\d+ spmd_partitioner\.cc:.*",  # XLA, of a layout that makes it copy more than it would
    r"training stopped: .*",
    r"nothing left to do: .*",
    r"",
]
_KNOWN = re.compile("|".join(f"(?:{form})" for form in _FORMS))


def unknown_lines(output: str) -> list[str]:
    """The lines that none of the forms describes, upstream's with log_config=true apart."""
    return [line for line in output.splitlines() if not _KNOWN.fullmatch(line)]
