"""Compiles recipes for the TPUs that they name, and writes what a step costs into their headers and README's table.

    python scripts/fit_table.py configs/qwen3-4b-to-0.6b.yml ...

Each recipe takes minutes (MaxText/train_compile.py); what is found is kept in runs/fit.jsonl, and a recipe that is
there already is compiled again only with --again. README's table is made of all recipes' headers. It needs libtpu
(`bash setup.sh tpu`).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from MaxText import console
from MaxText.config.files import ROOT
from MaxText.reports import recipe_costs

ROWS = ROOT / "runs/fit.jsonl"
README = ROOT / "README.md"


def known(rows: Path) -> dict[str, dict[str, Any]]:
    """A recipe's name -> its newest row."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    return {row["run_name"]: row for row in map(json.loads, lines)}


def compiled(recipe: Path) -> None:
    topology = recipe_costs.topology(recipe.read_text())
    arguments = [f"compile_topology={topology}", "compile_topology_num_slices=1"]
    arguments += [f"run_name={recipe.stem}", f"metrics_file={ROWS}"]
    program = [sys.executable, str(ROOT / "MaxText/train_compile.py"), str(recipe), *arguments]
    if status := subprocess.run(program).returncode:
        raise console.RunError(f"{recipe}: not compiled (status {status})")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="a recipe's yml in configs/")
    parser.add_argument("--again", action="store_true", help="compile what runs/fit.jsonl knows already, too")
    given = parser.parse_args(arguments)
    for recipe in given.recipes:
        if given.again or recipe.stem not in known(ROWS):
            compiled(recipe)
        row = known(ROWS)[recipe.stem]
        recipe.write_text(recipe_costs.with_cost(recipe.read_text(), row))
        print(f"{recipe}: header written")
    README.write_text(recipe_costs.with_table(README.read_text(), recipe_costs.found(ROOT / "configs")))
    print(f"{README.name}: table written")


if __name__ == "__main__":
    with console.errors_as_lines(failed=console.RunError):
        main(sys.argv[1:])
