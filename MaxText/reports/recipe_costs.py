"""What a recipe says of itself in its header, and README's table of all recipes, which is made of that.

A header is a comment: entries of one word (command, hardware, cost ...), whose text goes on in indented lines.
"""

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARGIN, WIDTH = 16, 120  # of an entry's text
_PARTS = ("teacher", "student forward", "loss", "backward", "optimizer")
_HEADINGS = ("recipe", "TPU", "memory a chip", "a step, at least", "by the compiler's estimate")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the table says of a recipe.

    estimate: milliseconds; "" where the header does not tell.
    """

    name: str
    topology: str
    gigabytes: float
    least: str
    estimate: str


def topology(text: str) -> str:
    """The TPU that a recipe's command of its fit names."""
    found = re.search(r"TOPOLOGY=(\S+)", text)
    assert found, "no line `fits?` with a TOPOLOGY"
    return found[1]


def with_cost(text: str, row: Mapping[str, Any]) -> str:
    """A recipe's text, whose header tells the costs of the compiled step.

    Args:
      text: of the yml.
      row: of train_compile's metrics file.
    """
    lines = text.splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if line.startswith("#   cost"))
    last = next(at for at in range(first + 1, len(lines)) if not lines[at].startswith("#" + " " * (MARGIN - 1)))
    entry = textwrap.wrap(
        cost(row),
        WIDTH,
        initial_indent="#   cost".ljust(MARGIN),
        subsequent_indent="#".ljust(MARGIN),
        break_on_hyphens=False,
    )
    return "".join([*lines[:first], *(f"{line}\n" for line in entry), *lines[last:]])


def cost(row: Mapping[str, Any]) -> str:
    def number(name: str) -> float:
        return float(row[f"compile/{name}"])

    parts = [(part, f"{part.replace(' ', '_')}_estimated_seconds") for part in _PARTS]
    each = ", ".join(f"{part} {1000 * number(name):.0f}" for part, name in parts if f"compile/{name}" in row)
    least = max(number("roofline_compute_seconds"), number("roofline_memory_seconds"))
    most = ""
    if number("most_estimated_seconds") > number("estimated_seconds"):
        most = f", {1000 * number('most_estimated_seconds'):.0f} with every search at its longest"
    has_experts = any(name.startswith(("gmm", "tgmm")) for name in str(row["compile/kernels"]).split(", "))
    kinds = "attention and experts" if has_experts else "attention"
    return (
        f"{number('total_bytes') / 1e9:.2f} GB a chip of {number('available_bytes') / 1e9:.2f}: "
        f"{number('argument_bytes') / 1e9:.2f} of both models, optimizer and batch, "
        f"{number('temp_bytes') / 1e9:.2f} of temporaries; a step takes {1000 * least:.0f} ms at least, at the chip's "
        f"peak, and {1000 * number('estimated_seconds'):.0f} ms by the compiler's estimate, kernels of {kinds} not "
        f"among it ({each}{most}); {number('model_flops'):.3g} FLOPs a chip, {number('network_bytes') / 1e9:.1f} GB "
        f"over the network (by the line above, libtpu {row['compile/libtpu']})"
    )


def found(folder: Path) -> list[Recipe]:
    """The recipes of a folder, in the order of their names."""
    texts = {file.stem: file.read_text() for file in folder.glob("*.yml")}
    return [
        described(name, text) for name, text in sorted(texts.items()) if "\n#   cost" in text and "TOPOLOGY=" in text
    ]


def described(name: str, text: str) -> Recipe:
    header = " ".join(line.lstrip("# ") for line in text.split("base_config")[0].splitlines())
    memory = re.search(r"([\d.]+) GB a chip", header)
    least = re.search(r"(\d+) ms at (?:least|the chip's peak)", header)
    # Without the products of experts it says little.
    estimate = re.search(r"(\d+) ms by the compiler's estimate, kernels of attention not among it", header)
    assert memory and least, f"{name}: no costs of a step in its header"
    return Recipe(name, topology(text), float(memory[1]), least[1], estimate[1] if estimate else "")


def with_table(text: str, recipes: Sequence[Recipe]) -> str:
    """README's text, with the table of these recipes."""
    rows = [
        f"| [{recipe.name}](configs/{recipe.name}.yml) | {recipe.topology} | {recipe.gigabytes:.1f} GB "
        f"| {recipe.least} ms | {f'{recipe.estimate} ms' if recipe.estimate else '—'} |"
        for recipe in recipes
    ]
    table = "\n".join([f"| {' | '.join(_HEADINGS)} |", "|---|---|---:|---:|---:|", *rows]) + "\n"
    written, count = re.subn(r"\| recipe \| TPU \|.*\n(?:\|.*\n)+", lambda _: table, text)
    assert count == 1, "one table of recipes"
    return written
