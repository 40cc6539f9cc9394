"""Laws of the account of a compiled program, on a text by hand in the TPU compiler's manner.

Two layers of a product whose weights come over the network, a walk over blocks whose end depends on the data, in it a
search of unknown length, and an update.
"""

import pathlib

import pytest

from MaxText.compiled import text, traffic
from MaxText.compiled.account import Reading, account

PRODUCT, VISIT, SUM, UPDATE = 3000, 50, 700, 20  # cycles that the compiler estimates
BLOCKS, VISITS = 4, 5

PROGRAM = pathlib.Path(__file__).with_name("step.hlo").read_text()


def part_of(place):
    return next((part for part in ("student", "loss") if part in place), "update" if place else "")


def read(rounds=(BLOCKS, VISITS)):
    return account(text.parse(PROGRAM), Reading(part_of, "rest", {"loss": rounds}))


def test_a_loop_s_cycles_count_as_often_as_it_runs():
    parts = read().parts
    assert {part: work.cycles for part, work in parts.items() if work.cycles} == {
        "student": 2 * PRODUCT,  # from 2 to 6 by 2
        "loss": BLOCKS * (VISITS * VISIT + SUM),
        "update": UPDATE,
    }
    assert read().loops == {"student": [(2,)], "loss": [(BLOCKS, VISITS)]}


@pytest.mark.parametrize("visits", [3, 7])
def test_a_loop_of_unknown_end_runs_as_often_as_is_said(visits):
    assert read((9, visits)).parts["loss"].cycles == 9 * (visits * VISIT + SUM)
    assert read(()).parts["loss"].cycles == VISIT + SUM


def test_what_comes_over_the_network_is_told_by_whether_something_waits_for_it():
    parts = read().parts
    weights = 16 * 128 * 2 * 3  # of three other devices, in two fusions that are one gathering
    assert (parts["student"].received, parts["student"].waited) == (2 * weights, 0)
    total = 256 * 4 * 2 * 3 / 4
    assert parts["loss"].received == parts["loss"].waited == BLOCKS * total


def test_of_a_stack_of_layers_a_round_reads_one_layer():
    program = text.parse(PROGRAM)
    layer = program.computations["layer"]
    assert traffic.memory(layer.instructions["own.1"], layer, program) == 16 * 128 * 2
    assert traffic.memory(layer.instructions["product"], layer, program) == 0  # all of it lies in faster memory


def test_what_is_gathered_beside_several_operations_is_written_once():
    program = text.parse(pathlib.Path(__file__).with_name("gathering.hlo").read_text())
    main = program.computations["main"]
    moved = {name: traffic.memory(main.instructions[name], main, program) for name in ("first", "second", "last")}
    assert moved == {"first": 64 * 128 * 2, "second": 2 * 256 * 4, "last": 0}


def test_kernels_without_an_estimate_are_named():
    assert read().total.kernels == {"attend": 1}
    assert read().parts["student"].kernels == {"attend": 1}


def test_the_whole_is_the_sum_of_its_parts():
    found = read()
    for field in ("cycles", "memory", "received", "waited"):
        assert getattr(found.total, field) == sum(getattr(work, field) for work in found.parts.values())
