"""Laws of `make demo-smollm2`: of its text, of the model that it makes, of its runs, and of what they cost."""

import json
from collections.abc import Iterator
from pathlib import Path

import installed
import numpy as np
import published
import pytest
import smollm2_plan as plan
import smollm2_results as results
from carry import Run, fingerprint
from test_demo import rows_of
from tokenizers import Tokenizer, models, pre_tokenizers

PLAN = plan.plan("runs/smollm2/hf", steps=10, seeds=2)
SENTENCE = "Of package {package} this is line {line}, which says a few words.\n"
LICENCE = "Permission is hereby granted, free of charge, to any person.\n"


# Text -----------------------------------------------------------------------------------------------------------------


def documents(package: int) -> installed.Documents:
    text = LICENCE + "".join(SENTENCE.format(package=package, line=line) for line in range(60))
    return {kind: iter([text.replace("line", kind)]) for kind in installed.KINDS}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of forty packages that share a licence."""
    folder = tmp_path_factory.mktemp("corpus")
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "packages", lambda: ((f"p{number}", documents(number)) for number in range(40)))
        installed.build(folder, folder, 30, 90)
    yield folder


def test_no_package_and_no_line_is_on_both_sides(corpus: Path) -> None:
    trained, held_out = (rows_of(corpus / f"{side}.arrayrecord") for side in ("train_long", "eval"))
    assert len(trained) == 90 and len(held_out) > 3
    assert any(LICENCE in row for row in trained)
    assert not installed.lines("".join(trained)) & installed.lines("".join(held_out))


def test_the_longer_text_has_all_rows_of_the_shorter_and_each_once(corpus: Path) -> None:
    short, long = (rows_of(corpus / f"{side}.arrayrecord") for side in ("train", "train_long"))
    assert len(short) == 30 and len(set(long)) == len(long) and set(short) < set(long)


def test_each_kind_of_text_has_as_many_rows(corpus: Path) -> None:
    rows = rows_of(corpus / "train.arrayrecord")
    assert [sum(f"this is {kind}" in row for row in rows) for kind in installed.KINDS] == [10, 10, 10]


def test_what_is_there_for_a_browser_a_licence_at_a_files_head_and_tables_of_numbers_are_left_out() -> None:
    said = "# A title\n[![badge](https://shields.io/x)](y)\n<img src=x>\n\n\n\n| a | b |\nA sentence.\n"
    assert installed.described(said) == "# A title\n\nA sentence.\n"
    assert installed.code("# Copyright\n#\n\nimport os\n# kept\n") == "import os\n# kept\n"
    assert installed.is_text("A sentence, as people write them.") and not installed.is_text("0.1.2 0.1.3 a-b")
    explained = "It explains. " * 30
    assert (
        installed.docstrings(f'def f():\n    """{explained}"""\n\ndef g():\n    """No."""\n').strip()
        == explained.strip()
    )
    assert installed.docstrings("def f(:\n") == ""


# The model ------------------------------------------------------------------------------------------------------------


def test_rotary_pairs_of_neighbours_become_halves() -> None:
    """Row i of a head's first half and row i of its second turn together; llama.cpp has them side by side."""
    heads, pairs, width = 3, 4, 2
    whole = np.arange(heads * 2 * pairs * width).reshape(heads, 2, pairs, width)
    side_by_side = np.stack([whole[:, 0], whole[:, 1]], axis=2).reshape(-1, width)
    np.testing.assert_array_equal(published.halves(side_by_side, heads), whole.reshape(-1, width))


def test_tensors_get_the_names_of_hugging_faces_llama() -> None:
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    value = np.zeros((4, 2))
    names = [published.renamed(name, value, config)[0] for name in ("token_embd.weight", "blk.7.attn_k.weight")]
    assert names == ["model.embed_tokens.weight", "model.layers.7.self_attn.k_proj.weight"]


# The runs -------------------------------------------------------------------------------------------------------------


def differences(one: Run, other: Run) -> set[str]:
    own, theirs = one.settings, other.settings
    return {key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key)} - {"run_name", "metrics_file"}


def of_kind(kind: str) -> plan.Student:
    return next(student for student in PLAN.students if student.kind == kind)


def test_students_differ_in_what_they_learn_from_and_how_they_begin_alone() -> None:
    sampled = of_kind("kd_sampled")
    assert differences(sampled, of_kind("ce")) == {"kd_alpha"}
    beginning = {"load_parameters_path", "learning_rate"}
    assert differences(sampled, of_kind("cut_kd")) == differences(of_kind("ce"), of_kind("cut_ce")) == beginning
    truncated = {"kd_truncation_strategy"}
    assert differences(sampled, of_kind("kd_top_k")) == {"kd_cache_path", "kd_top_k"} | truncated
    assert differences(of_kind("kd_full"), of_kind("kd_top_p")) == {"kd_top_p"} | truncated
    teacher = {"kd_teacher_parameters_path", "kd_teacher_model_name"}
    assert differences(sampled, of_kind("kd_full")) == {"kd_cache_path", "eval_interval"} | teacher
    alone = {"use_kd", "kd_embedding_std", "grain_train_files", "steps", "eval_interval", "checkpoint_period"}
    assert differences(of_kind("ce"), of_kind("ce_long")) == {"kd_cache_path", "kd_alpha"} | alone


def test_all_students_but_the_longer_one_read_the_rows_of_the_caches_once() -> None:
    rows = {int(cache.settings["kd_cache_rows"]) for cache in PLAN.caches}
    read = {
        student.settings["steps"] * student.settings["per_device_batch_size"]
        for student in PLAN.students
        if student.kind != "ce_long"
    }
    assert rows == read == {40}
    settings = of_kind("ce").settings
    assert (settings["per_device_batch_size"], settings["max_target_length"]) == (plan.BATCH, plan.LENGTH)
    assert of_kind("ce_long").settings["steps"] == 10 * plan.LONGER


def test_each_seed_has_a_beginning_an_order_and_a_folder_of_its_own() -> None:
    of_seeds = [student for student in PLAN.students if student.kind == "cut_kd"]
    assert differences(*of_seeds) == {"init_weights_seed", "data_shuffle_seed"}
    assert len({student.folder for student in PLAN.students}) == len(PLAN.students)


def test_what_takes_long_is_at_last_but_for_the_first_seed() -> None:
    names = [student.name for student in PLAN.students]
    assert sorted(names[-3:]) == ["ce_long_1", "kd_full_1", "kd_top_p_1"]
    assert names.index("kd_full_0") < names.index("ce_1")


def test_a_run_is_made_again_when_the_teacher_is_another_and_kept_when_there_are_more_seeds() -> None:
    def fingerprints(hf: str, seeds: int) -> dict[str, str]:
        return {run.name: fingerprint(run, ["corpus"]) for run in plan.plan(hf, 10, seeds).runs}

    first = fingerprints("runs/smollm2/hf", 1)
    assert first.items() <= fingerprints("runs/smollm2/hf", 3).items()
    assert not set(first.values()) & set(fingerprints("HuggingFaceTB/SmolLM2-135M", 1).values())


# What they cost -------------------------------------------------------------------------------------------------------

OF_TEACHER = 1e9  # FLOPs a position


def metrics(student: plan.Student) -> results.Rows:
    """Four steps of 3 TFLOP, the teacher's beside them where it is live; cross-entropy 9, 7 and 5."""
    teacher = OF_TEACHER * results.POSITIONS / 1e12 if "kd_teacher_model_name" in student.settings else 0.0
    own = {"perf/per_device_tflops": 3 + teacher, "perf/per_device_teacher_tflops": teacher}
    row = {"learning/loss": 1.0, "learning/total_weights": 1000.0, "perf/step_time_seconds": 2.0} | own
    evaluated = [{"step": step, "evaluation/ce_loss": ce} for step, ce in ((0, 9.0), (1, 7.0), (3, 5.0))]
    return [*({"step": step, **row} for step in range(4)), *evaluated]


def measured(kind: str) -> results.Outcome:
    student = of_kind(kind)
    return results.outcome(student, metrics(student), OF_TEACHER)


def test_the_teachers_flops_are_counted_for_whoever_learns_from_it() -> None:
    a_step = OF_TEACHER * plan.BATCH * plan.LENGTH
    calibration = OF_TEACHER * plan.CALIBRATION_ROWS * plan.LENGTH
    assert results.teachers_flops(metrics(of_kind("kd_full"))) == pytest.approx(OF_TEACHER)
    taught = {kind: measured(kind).of_teacher for kind in ("ce", "kd_sampled", "kd_full", "cut_ce", "cut_kd")}
    expected = {"ce": 0, "kd_sampled": 4 * a_step, "kd_full": 4 * a_step}
    assert taught == pytest.approx(expected | {"cut_ce": calibration, "cut_kd": calibration + 4 * a_step})
    assert [measured(kind).of_student for kind in ("ce", "kd_sampled", "kd_full")] == pytest.approx([12e12] * 3)
    assert measured("cut_kd").flops[0] == pytest.approx(3e12 + a_step + calibration)


def test_at_equal_flops_a_curve_is_read_between_its_evaluations() -> None:
    found = measured("ce")
    assert (found.steps, found.flops) == ([1, 2, 4], [3e12, 6e12, 12e12])
    assert results.at_flops(found, 9e12) == pytest.approx(6.0) and results.at_flops(found, 12e12) == 5.0
    assert results.at_flops(found, 1e12) is None is results.at_flops(found, 13e12)


def test_the_tokens_to_a_cross_entropy_are_those_of_the_first_time_that_it_was_reached() -> None:
    found = measured("ce")
    found.ce[:] = [9.0, 5.0, 6.0]  # after 1, 2 and 4 steps of 1,000 tokens
    assert results.tokens_to(found, 5.5) == pytest.approx(1875)
    assert results.tokens_to(found, 9.5) == pytest.approx(1000)  # no earlier evaluation tells
    assert results.tokens_to(found, 4.0) is None
    found.ce[:] = [6.0, 9.0, 5.0]  # it rose in between
    assert results.tokens_to(found, 5.5) == pytest.approx(3750)
    distilled = measured("kd_sampled")
    assert results.fresh_distilled({"CE": [found], "KD": [distilled]}) == [distilled]


def test_the_table_has_a_line_a_kind_with_the_range_of_its_seeds(tmp_path: Path) -> None:
    found = {"CE": [measured("ce"), measured("ce")], "KD": [measured("kd_full")]}
    found["CE"][1].ce[-1] = 6.0
    lines = results.lines(found)
    assert lines["CE"]["CE"] == "5.500 (5.000 to 6.000)" and lines["KD"]["CE"] == "5.000"
    assert lines["KD"]["KL to teacher"] == "-" and lines["KD"]["tokens"] == "4,000"
    assert json.dumps(lines)
    results.plot(found, 2.5, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
