"""Laws of the benchmark: what it counts, what it compares, and that its table says what its file says."""

import json
from pathlib import Path
from typing import Any

import benchmark_kd
import jax
import pytest

from MaxText.benchmarks import loss as loss_lib
from MaxText.benchmarks import programs, table, timing

# N tokens, D student's width, E teacher's width, V vocabulary
N, D, E, V = 512, 16, 24, 2048


def row(name: str, seconds: list[float]) -> Any:
    return programs.Row("loss", name, N, V, D, E, flops=1.0, seconds=seconds)


def test_flops_are_those_of_the_dense_program_whose_loops_xla_can_count():
    """Without loops XLA counts all there is; what is not a matrix product is a small part at these widths."""
    tokens, vocabulary, width, teacher_width = 64, 512, 768, 1024
    inputs = loss_lib.loss_inputs(tokens, vocabulary, width, teacher_width)

    def loss(*arguments):
        return loss_lib.dense_kd(programs.Truncation("full"), *arguments)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    counted = programs.kd_flops(tokens, vocabulary, width, teacher_width)
    assert counted == 2 * 64 * 512 * (3 * 768 + 1024)
    assert counted < compiled.cost_analysis()["flops"] < 1.05 * counted


def test_a_distillation_without_a_teacher_costs_what_cross_entropy_costs():
    assert programs.kd_flops(N, V, D, 0) == programs.ce_flops(N, V, D)
    assert programs.ce_flops(N, V, D, projections=2) == programs.ce_flops(N, V, D) * 4 / 3


def test_a_drift_that_hits_a_whole_round_moves_no_ratio():
    fast, slow = row("fast", [1.0, 1.0, 1.0]), row("slow", [2.0, 2.0, 2.0])
    drift = [1.0, 5.0, 0.3]
    drifting = [row(r.name, [d * s for d, s in zip(drift, r.seconds, strict=True)]) for r in (fast, slow)]
    assert timing.ratio([slow], [fast]) == pytest.approx(2)
    assert timing.ratio([drifting[1]], [drifting[0]]) == pytest.approx(2)
    assert timing.ratio([slow], [fast, slow]) == pytest.approx(2 / 3)


def test_a_program_that_was_not_run_has_no_time_and_no_ratio():
    entries = timing.compare([row(programs.CE_TILED, [1.0]), row(programs.KD_DENSE, [])])
    assert entries[0]["to_tiled_ce"] == 1
    assert entries[1]["median_seconds"] is None and entries[1]["to_tiled_ce"] is None
    assert table.cells(entries[1])[4:7] == ["-", "-", "-"]


def test_a_program_larger_than_the_memory_is_not_run():
    small, large = row("small", []), row("large", [])
    large.temp_bytes = 2**60
    assert timing.fits(small) and not timing.fits(large)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "many"], "--tokens"),
        (["--tokens", "100"], "--tokens: 100: expected a multiple of 8"),
        (["--width", "20"], "--width: 20: expected a multiple of 8"),
        (["--rounds", "-1"], "--rounds"),
        (["--only", "teacher"], "--only"),
        (["--out", __file__], "--out"),
        (["--vocab-size", "8"], "--vocab-size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        benchmark_kd.parse(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """The file that a run of the benchmark wrote."""
    benchmark_kd.main(["--tokens", str(N), "--vocabulary", str(V), "--rounds", "2", "--out", str(folder), *arguments])
    return json.loads((folder / "benchmark.json").read_text())


def assert_table_shows(report: dict[str, Any], output: str) -> None:
    lines = output.splitlines()
    for entry in report["rows"]:
        (line,) = (line for line in lines if line.startswith(f"│ {entry['name']} "))
        shown = [cell.strip() for cell in line.strip("│").split("│")]
        assert shown[1:3] == [str(entry["tokens"]), str(entry["vocabulary"])]
        assert shown[4] == f"{sorted(entry['seconds'])[0] / 2 + sorted(entry['seconds'])[1] / 2:.4f}"
        assert shown[7] == f"{entry['temp_bytes'] / 2**20:.1f}"


@pytest.mark.slow
@pytest.mark.e2e
def test_loss_rows_are_all_there_and_blocks_need_less_memory_than_dense_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    widths = ("--width", str(D), "--teacher-width", str(E), "--block-mib", "1")
    report = measured(tmp_path, "--only", "loss", *widths)
    rows = {entry["name"]: entry for entry in report["rows"]}
    blocks = [name for name in rows if name.startswith("KD, blockwise")]
    stored = [name for name in rows if name.startswith("KD, stored")]
    assert list(rows) == [programs.CE_DENSE, programs.CE_TILED, programs.KD_DENSE, *blocks, *stored]
    assert blocks == [
        "KD, blockwise, full",
        *(
            f"KD, blockwise, {kept}, {strategy}"
            for kept in ("top-k 64", "top-p 0.9")
            for strategy in ("renormalize", "other_bucket", "renormalize_teacher")
        ),
    ]
    strategies = ("renormalize", "other_bucket", "renormalize_teacher")
    assert stored == ["KD, stored, 50 draws", *(f"KD, stored, top-k 64, {strategy}" for strategy in strategies)]
    for name in stored:
        assert (
            rows[name]["temp_bytes"]
            <= rows[name.replace("stored", "blockwise").replace("50 draws", "full")]["temp_bytes"]
        )
        assert rows[name]["flops"] == 2 * N * V * 3 * D
    assert rows[programs.KD_DENSE]["temp_bytes"] >= 2 * 4 * N * V
    for name in blocks:
        assert rows[name]["block"] < N
        assert rows[name]["temp_bytes"] < rows[programs.CE_DENSE]["temp_bytes"] < rows[programs.KD_DENSE]["temp_bytes"]
        assert rows[name]["flops"] == 2 * N * V * (3 * D + E)
    assert all(len(entry["seconds"]) == 2 and min(entry["seconds"]) > 0 for entry in report["rows"])
    assert_table_shows(report, capsys.readouterr().out)


@pytest.mark.e2e
@pytest.mark.slow
def test_step_rows_compare_our_step_with_upstreams_and_a_forward_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = measured(tmp_path, "--only", "step", "--width", "16", "--block-mib", "1")
    names = [entry["name"] for entry in report["rows"]]
    assert names[:3] == [programs.STEP_CE, programs.TEACHER_LOGITS, programs.TEACHER_HIDDEN]
    assert names[3:6] == ["KD step, full", "KD step, top-k 64, renormalize", "KD step, top-p 0.9, renormalize"]
    stored = ("50 draws", "top-k 64, renormalize")
    assert names[6:] == [f"{what}, {kept}" for kept in stored for what in (programs.CACHING, programs.STEP_STORED)]
    for caching, learning in (report["rows"][6:8], report["rows"][8:]):
        assert caching["to_logits"] > 0
        assert learning["temp_bytes"] <= report["rows"][3]["temp_bytes"]
        assert learning["argument_bytes"] < report["rows"][3]["argument_bytes"]
    for entry in report["rows"][3:6]:
        assert 0 < entry["to_ce_and_logits"] < entry["to_tiled_ce"]
        assert entry["temp_bytes"] < 2 * 4 * N * V + report["rows"][0]["temp_bytes"]
    assert_table_shows(report, capsys.readouterr().out)
