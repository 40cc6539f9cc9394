"""Laws of the report over runs: it shows what was recorded, says what was not, and compares what is of one kind.

Most runs here are written by the test, under the trainer's names; one test lets the trainer write them.
"""

import html.parser
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_runs
import numpy as np
import pytest
import tensorboardX
from PIL import Image

from MaxText.reports import compare as comparison
from MaxText.reports import curves, run_records
from MaxText.reports import groups as grouping
from MaxText.reports import page as report_page

STEPS, EVERY = 40, 10
SETTINGS = {
    "dataset_type": "DatasetType.GRAIN",
    "grain_eval_files": "eval.arrayrecord",
    "init_weights_seed": "0",
    "data_shuffle_seed": "0",
    "learning_rate": "0.001",
    "num_target_devices": "4",
    "use_kd": "True",
    "kd_alpha": "0.5",
    "kd_alpha_schedule": "constant",
    "hf_access_token": "hf_secret",
}

Rows = list[dict[str, Any]]


def rows_of(name: str, bias: float = 0.0, tokens: float = 5000.0, **more: float) -> Rows:
    """What the trainer writes: a row per step, a row per evaluation."""
    rows: Rows = []
    for step in range(STEPS):
        ce = 3 + bias + 5 * math.exp(-step / 10)
        row = {"step": step, "run_name": name, "learning/loss": ce / 2, "learning/ce_loss": ce}
        row |= {"learning/kd_kept_mass": 0.9 + bias / 100, "perf/per_device_tflops": 2.0}
        row |= {"perf/per_device_tokens_per_sec": 100.0 + step, **more}
        rows.append(row)
        if (step and step % EVERY == 0) or step == STEPS - 1:
            row = {"step": step, "run_name": name, "evaluation/ce_loss": ce + 0.1, "evaluation/kl_t1": ce / 4}
            row |= {"evaluation/top1_agreement": 1 / ce, "evaluation/teacher_ce_loss": 2.5}
            row |= {"evaluation/perplexity": math.exp(ce + 0.1), "evaluation/total_weights": tokens}
            rows.append(row)
    return rows


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """record(name, rows, setting=value, ...) is a run that wrote those rows with those settings -> its folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, rows: Rows | None = None, events_only: bool = False, **settings: str) -> Path:
        folder = tmp_path / name
        rows = rows_of(name) if rows is None else rows
        write_events(folder, {"run_name": name} | SETTINGS | settings, rows if events_only else [])
        if not events_only:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def write_events(folder: Path, settings: dict[str, str], rows: Rows, order: str = "") -> None:
    """A process's TensorBoard events: every setting as a text, then the scalars."""
    with tensorboardX.SummaryWriter(str(folder / "tensorboard" / folder.name), filename_suffix=order) as writer:
        for key, value in settings.items():
            writer.add_text(key, value)
        for row in rows:
            for key, value in row.items():
                if "/" in key:
                    writer.add_scalar(key, value, row["step"])


def compare(*runs: Path) -> str:
    """The command -> the page."""
    compare_runs.main([*map(str, runs), "--out", "report"])
    return Path("report/index.html").read_text(encoding="utf-8")


def results(*runs: Path) -> dict[str, dict[str, str]]:
    """Row -> column -> cell of the table of results."""
    table = comparison.compare(runs).tables[0]
    return {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


def notes(*runs: Path) -> str:
    return "\n".join(comparison.compare(runs).notes)


@pytest.fixture
def one_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them all takes seconds."""
    monkeypatch.setattr(curves, "CURVES", curves.CURVES[:1])


class Page(html.parser.HTMLParser):
    """The page's table cells, notes, titles, tags, and every address in it."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: list[str] = []
        self.notes: list[str] = []
        self.titles: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        self.into = {"td": self.cells, "th": self.cells, "li": self.notes, "h2": self.titles}.get(tag)
        if self.into is not None:
            self.into.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "li", "h2"):
            self.into = None

    def handle_data(self, data: str) -> None:
        if self.into is not None:
            self.into[-1] += data


# What is read -------------------------------------------------------------------------------------------------------


def test_a_run_is_what_its_rows_say(record: Callable[..., Path]) -> None:
    rows = rows_of("a")
    run = run_records.read_run(record("a", rows))
    assert run.name == "a"
    assert run.series("learning/loss") == {row["step"]: row["learning/loss"] for row in rows if "learning/loss" in row}
    assert list(run.series("evaluation/kl_t1")) == [10, 20, 30, 39]
    assert run.settings == {"run_name": "a"} | SETTINGS
    assert (run.complete, run.devices, run.notes) == (True, 4, ())


def test_events_and_metrics_file_tell_the_same(record: Callable[..., Path]) -> None:
    file, events = (run_records.read_run(record(name, rows_of("a"), name == "events")) for name in ("a", "events"))
    for metric in ("learning/loss", "evaluation/ce_loss", "perf/per_device_tokens_per_sec"):
        assert events.series(metric) == pytest.approx(file.series(metric), rel=1e-6)


def test_a_metrics_file_elsewhere_is_found_by_the_settings(record: Callable[..., Path]) -> None:
    folder = record("a", metrics_file="elsewhere.jsonl")
    (folder / "metrics.jsonl").rename("elsewhere.jsonl")
    assert len(run_records.read_run(folder).series("learning/loss")) == STEPS


def test_one_run_is_told_from_others_in_a_shared_file(record: Callable[..., Path]) -> None:
    folder = record("a", rows_of("a") + rows_of("b", bias=1.0))
    assert run_records.read_run(folder).series("learning/loss")[0] == rows_of("a")[0]["learning/loss"]


@pytest.mark.usefixtures("one_chart")
def test_a_row_cut_off_by_a_kill_is_left_out_and_said(
    record: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    folder = record("a")
    file = folder / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 60])
    assert max(run_records.read_run(folder).series("evaluation/ce_loss")) == 30
    lines = whole.count("\n")
    message = f"metrics.jsonl: line {lines} is cut off (the run was killed while it wrote) and left out"
    assert message in Page(compare(folder)).notes[0]
    assert message in capsys.readouterr().out


def test_an_event_cut_off_by_a_kill_is_left_out_and_said(record: Callable[..., Path]) -> None:
    folder = record("a", events_only=True)
    [file] = (folder / "tensorboard").rglob("events*")
    file.write_bytes(file.read_bytes()[:-7])
    run = run_records.read_run(folder)
    assert len(run.series("learning/loss")) == STEPS
    assert "is cut off" in run.notes[0]


def test_rows_that_a_restart_replaced_do_not_count(record: Callable[..., Path]) -> None:
    """Killed at step 33, restored at 25, and not yet as far again."""
    before = [row for row in rows_of("a", bias=9.0) if row["step"] < 33]
    after = [row for row in rows_of("a") if 25 <= row["step"] < 30]
    expected = {step: 3 + 9 * (step < 25) + 5 * math.exp(-step / 10) for step in range(30)}
    run = run_records.read_run(record("a", before + after))
    assert run.series("learning/ce_loss") == pytest.approx(expected)
    assert list(run.series("evaluation/ce_loss")) == [10, 20]
    folder = record("b", before, events_only=True)
    write_events(folder, {"run_name": "b"} | SETTINGS, after, order=".later")
    assert len(list((folder / "tensorboard").rglob("events*"))) == 2
    assert run_records.read_run(folder).series("learning/ce_loss") == pytest.approx(expected, rel=1e-6)


BAD_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such run": (shutil.rmtree, "a: no such run"),
    "no records": (
        lambda folder: [shutil.rmtree(folder / "tensorboard"), (folder / "metrics.jsonl").unlink()],
        "holds neither a metrics file (*.jsonl, the run's metrics_file) nor TensorBoard events",
    ),
    "an empty file": (lambda folder: (folder / "metrics.jsonl").write_text(""), "metrics.jsonl: is empty"),
    "a cut-off row alone": (lambda folder: (folder / "metrics.jsonl").write_text('{"st'), "metrics.jsonl: is empty"),
    "another kind of file": (
        lambda folder: (folder / "metrics.jsonl").write_text("a,b\n1,2\n"),
        "metrics.jsonl:1: is no row of a metrics file: 'a,b'",
    ),
    "a row of another shape": (
        lambda folder: (folder / "metrics.jsonl").write_text('{"step": 0, "learning/loss": 1}\n[1]\n{"step": 1}\n'),
        "metrics.jsonl:2: is no row of a metrics file: '[1]'",
    ),
    "rows without metrics": (
        lambda folder: (folder / "metrics.jsonl").write_text('{"step": 0, "x": 1}\n'), "metrics.jsonl: holds no metrics"
    ),
    "several files": (
        lambda folder: [(folder / "metrics.jsonl").rename(folder / "x.jsonl"), (folder / "y.jsonl").write_text("")],
        "holds 2 files *.jsonl; name the metrics file itself",
    ),
    "a manifest of another kind": (
        lambda folder: (folder / "distillation.json").write_text("[]"), "distillation.json: is no manifest"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_cannot_be_read_is_one_message(record: Callable[..., Path], case: str) -> None:
    folder, other = record("a"), record("b")
    damage, message = BAD_RUNS[case]
    damage(folder)
    with pytest.raises(SystemExit) as end:
        compare(folder, other)
    assert str(end.value.code).startswith("error: ")
    assert message in str(end.value.code)
    assert not Path("report").exists()


def test_a_run_named_twice_is_refused(record: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    folder = record("a")
    with pytest.raises(SystemExit, match="2"):
        compare(folder, folder)
    assert "is named twice" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["{a}/../a", "{a}/metrics.jsonl", "link", "a"])
def test_a_run_under_two_spellings_is_no_second_seed(record: Callable[..., Path], spelling: str) -> None:
    folder = record("a")
    Path("link").symlink_to("a")
    with pytest.raises(SystemExit, match=r"a and .*: are one run"):
        compare(folder, Path(spelling.format(a=folder)))
    assert not Path("report").exists()


def test_a_run_without_a_metrics_file_is_known_by_its_events(record: Callable[..., Path]) -> None:
    folder = record("a", events_only=True)
    with pytest.raises(SystemExit, match="are one run"):
        compare(folder, Path("a"))


@pytest.mark.usefixtures("one_chart")
def test_two_runs_in_one_metrics_file_are_two(record: Callable[..., Path]) -> None:
    folders = [record(name, metrics_file="metrics.jsonl") for name in "ab"]
    Path("metrics.jsonl").write_text("".join((folder / "metrics.jsonl").read_text() for folder in folders))
    for folder in folders:
        (folder / "metrics.jsonl").unlink()
    assert results(*folders)["a (2 runs)"]["runs"] == "2"


# What belongs together ----------------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_one_curve_with_its_spread(record: Callable[..., Path]) -> None:
    biases = {"kd-seed0": 0.0, "kd-seed1": 0.3, "kd-seed2": -0.6}
    folders = [
        record(name, rows_of(name, bias), init_weights_seed=name[-1], metrics_file=f"{name}/metrics.jsonl")
        for name, bias in biases.items()
    ]
    [group] = grouping.group([run_records.read_run(folder) for folder in folders])
    line = curves.curve(group, "learning/ce_loss", False)
    assert line is not None
    ce = np.array(list(group.runs[0].series("learning/ce_loss").values()))
    for values, bias in ((line.y, -0.1), (line.low, -0.6), (line.high, 0.3)):
        np.testing.assert_allclose(values, ce + bias)
    row = results(*folders)["kd (3 runs)"]
    last = [3.1 + bias + 5 * math.exp(-(STEPS - 1) / 10) for bias in biases.values()]
    assert row["CE"] == f"{sum(last) / 3:.4f} ({min(last):.4f} to {max(last):.4f})"
    assert row["steps"] == str(STEPS)


@pytest.mark.parametrize("count", [2, 9])
def test_a_legend_never_hides_many_curves(count: int) -> None:
    lines = [
        report_page.Line(f"run {i}", report_page.STYLES[i], [0, 1], [0.0, i], [0.0, i], [0.0, i]) for i in range(count)
    ]
    figure = report_page.draw(report_page.Chart("ce", "CE", "", "steps", "nats", lines))
    assert bool(figure.legends) == (figure.axes[0].get_legend() is None) == (count == 9)


@pytest.mark.parametrize("difference", [{"kd_alpha": "1.0"}, {"learning_rate": "0.002"}, {"num_target_devices": "8"}])
def test_runs_that_differ_in_anything_else_are_curves_of_their_own(
    record: Callable[..., Path], difference: dict[str, str]
) -> None:
    folders = [record("a"), record("b", init_weights_seed="1", **difference)]
    assert [len(group.runs) for group in grouping.group([run_records.read_run(f) for f in folders])] == [1, 1]


def test_teachers_are_told_apart_by_what_they_are_and_not_by_where_they_lie(record: Callable[..., Path]) -> None:
    folders = [record(name, kd_teacher_parameters_path=f"/{name}") for name in "abc"]
    for folder, teacher in zip(folders, ("one", "one", "other"), strict=True):
        manifest = {"settings": {"use_kd": True}, "teacher": {"fingerprint": teacher}}
        (folder / "distillation.json").write_text(json.dumps(manifest))
    groups = grouping.group([run_records.read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["c"]]


def test_runs_without_recorded_settings_are_no_group_and_the_page_says_so(record: Callable[..., Path]) -> None:
    folders = [record(name) for name in "ab"]
    for folder in folders:
        shutil.rmtree(folder / "tensorboard")
    assert set(results(*folders)) == {"a", "b"}
    assert "Not all settings were recorded (enable_tensorboard=false) for a, b" in notes(*folders)


def test_the_settings_that_differ_are_listed_and_no_others(record: Callable[..., Path]) -> None:
    runs = record("a"), record("b", kd_alpha="1.0", learning_rate="0.002"), record("c", init_weights_seed="7")
    _, table = comparison.compare(runs).tables
    assert table.head == ["", "a (2 runs)", "b"]
    assert table.rows == [
        ["kd_alpha", "0.5", "1.0"], ["learning_rate", "0.001", "0.002"], ["init_weights_seed", "0, 7", "0"],
    ]  # fmt: skip


def test_access_tokens_are_no_part_of_a_report(record: Callable[..., Path]) -> None:
    assert "hf_" not in str(comparison.compare([record("a"), record("b", hf_access_token="hf_other")]))


def test_runs_of_other_evaluation_data_are_refused(record: Callable[..., Path]) -> None:
    a, b = record("a"), record("b", rows_of("b", tokens=4000.0), grain_eval_files="other.arrayrecord")
    with pytest.raises(SystemExit) as end:
        compare(a, b)
    message = str(end.value.code)
    assert "the runs were evaluated on different data" in message
    assert "a: 5,000 tokens, grain_eval_files=eval.arrayrecord" in message
    assert "b: 4,000 tokens, grain_eval_files=other.arrayrecord" in message
    assert not Path("report").exists()


def test_evaluation_data_of_another_name_and_equal_size_is_noted(record: Callable[..., Path]) -> None:
    said = notes(record("a"), record("b", grain_eval_files="other.arrayrecord"))
    assert "grain_eval_files differs (eval.arrayrecord, other.arrayrecord)" in said


# Compute ------------------------------------------------------------------------------------------------------------


def test_compute_is_that_of_all_steps_on_all_devices(record: Callable[..., Path]) -> None:
    [group] = grouping.group([run_records.read_run(record("a"))])
    assert group.flops == {step: pytest.approx(2e12 * 4 * (step + 1)) for step in range(STEPS)}
    line = curves.curve(group, "evaluation/ce_loss", True)
    assert line is not None
    assert line.x == pytest.approx([8e12 * (step + 1) for step in (10, 20, 30, 39)])


def test_steps_whose_rows_are_lost_cost_what_the_others_do(record: Callable[..., Path]) -> None:
    rows = [row for row in rows_of("a") if row["step"] % 3 == 2]
    run = run_records.read_run(record("a", rows))
    assert run.tflops_per_device == {step: pytest.approx(2.0 * (step + 1)) for step in range(2, STEPS, 3)}


def test_without_flops_for_every_step_there_is_no_curve_by_compute(record: Callable[..., Path]) -> None:
    rows = rows_of("a")
    del rows[3]["perf/per_device_tflops"]  # as while the batch ramps up
    report = comparison.compare([record("a", rows)])
    slugs = {chart.slug for chart in report.charts}
    assert "ce" in slugs
    assert not any(slug.endswith("by_flops") for slug in slugs)
    assert "FLOPs were not recorded for every step of a" in report.notes[0]


def test_unknown_numbers_of_devices_make_it_compute_per_device(record: Callable[..., Path]) -> None:
    known, unknown = record("a"), record("b")
    shutil.rmtree(unknown / "tensorboard")
    assert results(known, unknown)["a"]["compute a device"] == "80.00 TFLOP"
    assert results(known)["a"]["compute"] == "320.00 TFLOP"


@pytest.mark.parametrize(("settings", "more", "student", "teacher"), [
    ({}, {"perf/per_device_teacher_tflops": 0.5}, "6.00 TFLOP", "2.00 TFLOP"),
    ({"kd_alpha": "0.0"}, {}, "8.00 TFLOP", "0"), ({"use_kd": "False"}, {}, "8.00 TFLOP", "0"),
    ({"kd_alpha": "0.0", "kd_alpha_schedule": "linear"}, {}, "not recorded", "not recorded"),
    ({}, {}, "not recorded", "not recorded"),
])  # fmt: skip
def test_the_teachers_share_of_a_step_is_shown_where_it_is_known(
    record: Callable[..., Path], settings: dict[str, str], more: dict[str, float], student: str, teacher: str
) -> None:
    row = results(record("a", rows_of("a", **more), **settings))["a"]
    assert (row["student, a step"], row["teacher, a step"], row["both, a step"]) == (student, teacher, "8.00 TFLOP")


def test_runs_are_compared_at_the_compute_that_all_of_them_reached(record: Callable[..., Path]) -> None:
    dear = rows_of("dear")
    for row in dear:
        row |= {"perf/per_device_tflops": 4.0} if "perf/per_device_tflops" in row else {}
    table = results(record("dear", dear, kd_alpha="1.0"), record("cheap"))
    evaluations = {row["step"]: row["evaluation/ce_loss"] for row in dear if "evaluation/ce_loss" in row}
    # cheap ends after 40 steps of 8 TFLOP, which 20 of dear's cost: its step 19, between 10 and 20.
    expected = evaluations[10] + 0.9 * (evaluations[20] - evaluations[10])
    assert table["dear"]["CE at 320.00 TFLOP"] == f"{expected:.4f}"
    assert table["cheap"]["CE at 320.00 TFLOP"] == f"{evaluations[39]:.4f}"


def test_speed_is_tokens_by_seconds(record: Callable[..., Path]) -> None:
    seconds = sum(1 / (100.0 + step) for step in range(1, STEPS))  # one token a step; the first step is left out
    assert results(record("a"))["a"]["tokens/s"] == f"{4 * (STEPS - 1) / seconds:,.0f}"


def test_utilization_and_memory_are_shown_where_a_run_recorded_them(record: Callable[..., Path]) -> None:
    watched = rows_of("a")
    for row in watched:
        if "perf/per_device_tflops" in row:
            row |= {"perf/mfu_percent": 50.0 if row["step"] else 1.0, "perf/peak_memory_gb": 12.5}
    table = results(record("a", watched), record("b", kd_alpha="1.0"))
    assert (table["a"]["MFU"], table["a"]["peak memory a device"]) == ("50.0 %", "12.50 GB")
    assert (table["b"]["MFU"], table["b"]["peak memory a device"]) == ("\u2013", "\u2013")
    assert "MFU" not in results(record("b", kd_alpha="1.0"))["b"]


def test_a_long_curve_of_speed_is_thinned_to_tokens_by_seconds(
    record: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "POINTS", 10)
    [chart] = [chart for chart in comparison.compare([record("a")]).charts if chart.slug == "speed"]
    seconds = [sum(1 / (100.0 + step) for step in range(start, start + 4)) for start in range(0, STEPS, 4)]
    assert chart.lines[0].y == pytest.approx([4 * 4 / each for each in seconds])


def test_a_long_curve_is_thinned_to_means(record: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "POINTS", 10)
    [group] = grouping.group([run_records.read_run(record("a"))])
    line = curves.curve(group, "learning/ce_loss", False)
    assert line is not None
    values = np.array(list(group.runs[0].series("learning/ce_loss").values()))
    assert line.x == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    np.testing.assert_allclose(line.y, values.reshape(10, 4).mean(1))


# The page -----------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_chart_and_loads_nothing(record: Callable[..., Path]) -> None:
    text = compare(record("a"), record("b", rows_of("b", 1.0), kd_alpha="1.0"))
    page = Page(text)
    titles = [title for _, title, *_ in curves.CURVES]
    assert page.titles == ["Results", "Settings that differ", *titles, "Speed"]
    assert page.tags.count("svg") == len(titles) + 1
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "@import" not in text and "url(http" not in text
    slugs = {slug for slug, *_ in curves.CURVES} | {"speed"}
    assert {file.stem for file in Path("report").glob("*.png")} == slugs


@pytest.mark.usefixtures("one_chart")
def test_a_comparison_says_where_its_page_is_and_what_to_know(
    record: Callable[..., Path], capfd: pytest.CaptureFixture
) -> None:
    compare(record("a"), record("b", grain_eval_files="other.arrayrecord"))
    said = capfd.readouterr()
    assert said.out.splitlines() == [
        "note: The teacher's share of the FLOPs was not recorded for a, b: known is the sum.",
        "note: grain_eval_files differs (eval.arrayrecord, other.arrayrecord), though the evaluations are of equally "
        "many tokens: make sure that they are of the same ones",
        "report/index.html: 2 runs, 2 charts, each a PNG file beside it too",
    ]
    assert said.err == ""


@pytest.mark.usefixtures("one_chart")
def test_names_are_shown_as_they_are(record: Callable[..., Path]) -> None:
    name = "<script>alert(1)</script> [b]&"
    page = Page(compare(record("a", rows_of(name), run_name=name)))
    assert name in page.cells
    assert "script" not in page.tags


@pytest.mark.usefixtures("one_chart")
def test_png_files_show_the_curves_in_the_pages_colours(record: Callable[..., Path]) -> None:
    compare(record("a"), record("b", rows_of("b", 1.0), kd_alpha="1.0"))
    for color, _ in report_page.STYLES[:2]:
        assert columns_of(Path("report/ce.png"), color) > 400  # of 840


def columns_of(image: Path, color: str) -> int:
    """How many of the image's columns hold a pixel of just this colour: a curve has many, a legend's handle few."""
    pixels = np.asarray(Image.open(image).convert("RGB"))
    wanted = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return int((pixels == wanted).all(-1).any(0).sum())


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"),
    *("--enable-logging=stderr", "--window-size=1280,3600"),
)


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., list[str]]:
    """browser(page, screenshot, dark) opens a page -> what its console said."""
    program = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if program is None:
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")

    def open_page(page: Path, screenshot: Path, dark: bool) -> list[str]:
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        folder = f"--user-data-dir={tmp_path / 'profile'}"
        command = [program, *QUIET, scheme, folder, f"--screenshot={screenshot}", page.resolve().as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert screenshot.exists(), result.stderr[-2000:]
        return [line for line in result.stderr.splitlines() if "CONSOLE" in line]

    return open_page


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_curves(record: Callable[..., Path], browser: Callable[..., list[str]], dark: bool) -> None:
    compare(
        record("a"), record("b", rows_of("b", 1.0), kd_alpha="1.0"), record("c", rows_of("c", -1.0), kd_alpha="0.0")
    )
    page, screenshot = Path("report/index.html"), Path("page.png")
    assert browser(page, screenshot, dark) == []
    for color, _ in report_page.STYLES[:3]:
        assert columns_of(screenshot, color) > 700  # of 1280, in two columns of charts
    pixels = np.asarray(Image.open(screenshot).convert("RGB"))
    paper, ink = ("#0d1117", "#e6edf3") if dark else ("#ffffff", "#1f2328")
    assert tuple(pixels[5, 5]) == tuple(bytes.fromhex(paper[1:]))
    assert columns_of(screenshot, ink) > 900  # the axes of both columns, and text


@pytest.mark.slow
def test_a_page_that_loaded_something_would_be_heard(
    record: Callable[..., Path], browser: Callable[..., list[str]]
) -> None:
    text = compare(record("a"))
    Path("loads.html").write_text(text.replace("</body>", '<img src="https://example.invalid/x.png"></body>'))
    [line] = browser(Path("loads.html"), Path("page.png"), False)
    assert "Content Security Policy" in line


# The trainer's own records ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.e2e
def test_the_trainers_runs_are_read_by_the_names_it_writes(train: Callable[..., Any], teacher: str) -> None:
    keys = {"use_kd": True, "kd_teacher_parameters_path": teacher, "eval_interval": 2, "eval_steps": 2, "steps": 4}
    keys |= {"enable_tensorboard": True, "devices": 2, "kd_top_k": 8}
    ce = train("report_ce", **keys, kd_alpha=0).folder
    kd = [train(f"report_kd_{seed}", **keys, kd_alpha=0.5, init_weights_seed=seed).folder for seed in (0, 1)]
    report, table = comparison.compare([ce, *kd]), results(ce, *kd)
    assert set(table) == {"report_ce", "report_kd (2 runs)"}
    assert [chart.slug for chart in report.charts] == [slug for slug, *_ in curves.CURVES] + ["speed"]
    assert (table["report_ce"]["runs"], table["report_ce"]["steps"]) == ("1", "4")
    assert table["report_ce"]["teacher, a step"] == "0"
    [row] = [row for row in report.tables[1].rows if row[0] == "kd_alpha"]
    assert row == ["kd_alpha", "0.0", "0.5"]
    run = run_records.read_run(kd[0])
    tflops = run.series("perf/per_device_tflops")[3] * 4 * 2
    assert grouping.group([run])[0].flops[3] == pytest.approx(tflops * 1e12)
    (kd[0] / "metrics.jsonl").unlink()
    events = run_records.read_run(kd[0])
    for metric in ("learning/loss", "evaluation/kl_t1", "perf/per_device_tflops"):
        assert events.series(metric) == pytest.approx(run.series(metric), rel=1e-6)
