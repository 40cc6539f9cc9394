"""Laws of the recipes' headers and of the table of them."""

import pytest
from conftest import ROOT

from MaxText.reports import recipe_costs

RECIPE = """# A recipe.
#
#   fits?       make fit CONFIG=configs/mine.yml TOPOLOGY=v5e-16
#   cost        9.00 GB a chip of 17.18: what it was
#               before, 7 ms at the chip's peak
#   tokens      many
base_config: recipe.yml

steps: 7
"""
ROW = {
    "compile/total_bytes": 2.66e9,
    "compile/available_bytes": 17.18e9,
    "compile/argument_bytes": 0.95e9,
    "compile/temp_bytes": 1.66e9,
    "compile/roofline_compute_seconds": 0.538,
    "compile/roofline_memory_seconds": 0.2,
    "compile/estimated_seconds": 0.804,
    "compile/most_estimated_seconds": 0.804,
    "compile/teacher_estimated_seconds": 0.405,
    "compile/network_bytes": 12.4e9,
    "compile/model_flops": 1.06e14,
    "compile/libtpu": "0.0.50.1",
    "compile/kernels": "splash_mha_dq, splash_mha_fwd",
}


def test_a_header_tells_what_the_compiled_step_costs_and_nothing_else_changes():
    written = recipe_costs.with_cost(RECIPE, ROW)
    assert recipe_costs.described("mine", written) == recipe_costs.Recipe("mine", "v5e-16", 2.66, "538", "804")
    (before, after), (was_before, was_after) = (
        (text.split("#   cost")[0], text[text.index("#   tokens") :]) for text in (written, RECIPE)
    )
    assert (before, after) == (was_before, was_after)
    assert "what it was" not in written and "teacher 405" in written
    assert all(len(line) <= recipe_costs.WIDTH for line in written.splitlines())
    assert recipe_costs.with_cost(written, ROW) == written


def test_a_header_tells_of_searches_at_their_longest_where_there_are_any():
    assert "longest" not in recipe_costs.cost(ROW)
    assert "900 with every search at its longest" in recipe_costs.cost(ROW | {"compile/most_estimated_seconds": 0.9})


def test_an_estimate_without_the_products_of_experts_stays_out_of_the_table():
    written = recipe_costs.with_cost(RECIPE, ROW | {"compile/kernels": "gmm, splash_mha_fwd"})
    assert "kernels of attention and experts not among it" in " ".join(written.replace("\n#", " ").split())
    assert recipe_costs.described("mine", written).estimate == ""


@pytest.mark.parametrize("text", ["no table", "| recipe | TPU |\n|---|\n\n| recipe | TPU |\n|---|\n"])
def test_a_table_is_written_over_the_one_that_is_there(text):
    with pytest.raises(AssertionError, match="one table"):
        recipe_costs.with_table(text, [])


def test_readme_s_table_is_what_the_recipes_say():
    text = (ROOT / "README.md").read_text()
    assert recipe_costs.with_table(text, recipe_costs.found(ROOT / "configs")) == text
