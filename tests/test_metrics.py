"""Laws of the metrics file: no row is lost, and none is written twice."""

import json

import pytest

pytestmark = pytest.mark.e2e  # the logger is upstream's, and importing it takes the engine


@pytest.fixture
def metrics():
    from MaxText import metrics

    return metrics


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_replaces_its_rows_from_the_restored_step_on(tmp_path, metrics):
    file = tmp_path / "metrics.jsonl"
    write(file, [{"run_name": "a", "step": step} for step in (0, 1, 2, 2, 3)])
    metrics.keep_rows_before(str(file), "a", 2)
    assert steps(file) == [0, 1]


def test_rows_of_another_run_stay(tmp_path, metrics):
    file = tmp_path / "metrics.jsonl"
    write(file, [{"run_name": "a", "step": 5}, {"run_name": "b", "step": 5}])
    metrics.keep_rows_before(str(file), "b", 0)
    assert file.read_text() == json.dumps({"run_name": "a", "step": 5}) + "\n"


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path, metrics):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"run_name": "a", "step": 0}\n{"run_name": "a", "st')
    metrics.keep_rows_before(str(file), "a", 1)
    assert steps(file) == [0]


def test_a_file_that_cannot_be_written_is_named(metrics):
    from MaxText.pyconfig import ConfigError

    with pytest.raises(ConfigError, match="metrics_file='/dev/null/x'"):
        metrics.keep_rows_before("/dev/null/x", "a", 0)


def test_upstreams_z_loss_is_taken_out_of_its_cross_entropy(metrics):
    config = type("Config", (), {"z_loss_multiplier": 1e-3, "gradient_accumulation_steps": 1})
    scalars = {"learning/lm_loss": 3.0, "learning/z_loss": 0.25}
    metrics.add_plain_ce(config, scalars)
    assert scalars["learning/ce_loss"] == 2.75
