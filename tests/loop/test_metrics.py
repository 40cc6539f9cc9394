"""Laws of the metrics file: no row is lost, and none is written twice."""

import datetime
import json
import math
import pathlib
import time

import jax.numpy as jnp
import pytest

from MaxText import upstream
from MaxText.loop import failures

NO_TIME = datetime.timedelta(0)
pytestmark = pytest.mark.e2e  # the logger is upstream's, and importing it takes the engine


@pytest.fixture
def metrics():
    from MaxText.loop import metrics

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


def test_a_file_that_holds_no_metrics_is_left_as_it_is(tmp_path, metrics):
    from MaxText.config.keys import ConfigError

    file = tmp_path / "notes.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="is no metrics file"):
        metrics.keep_rows_before(str(file), "a", 0)
    assert file.read_text() == "a,b\n1,2\n"


def test_a_file_that_cannot_be_written_is_named(metrics):
    from MaxText.config.keys import ConfigError

    with pytest.raises(ConfigError, match="metrics_file='/dev/null/x'"):
        metrics.keep_rows_before("/dev/null/x", "a", 0)


@pytest.fixture
def logger(tmp_path, metrics):
    from conftest import SMOKE

    from MaxText.config import resolve

    arguments = [f"metrics_file={tmp_path}/metrics.jsonl", "run_name=a", f"base_output_directory={tmp_path}"]
    config = resolve.initialize(["train.py", SMOKE, *arguments]).student
    logger = metrics.MetricLogger(
        config, lambda step: 0.1, start_step=0, tflops_per_step=1.0, teacher_tflops_per_step=0.25
    )
    logger.write_setup_info_to_tensorboard({})
    return logger


def rows(logger):
    return [json.loads(line) for line in pathlib.Path(logger.config.metrics_file).read_text().splitlines()]


def training(loss):
    names = ("loss", "ce_loss", "lm_loss", "perplexity", "z_loss", "moe_lb_loss", "mtp_loss", "total_weights")
    return {"scalar": {f"learning/{name}": jnp.float32(loss) for name in names}, "scalars": {}}


def test_an_evaluation_is_weighted_by_tokens_not_by_batches(logger):
    names = ("ce_sum", "kd_sum", "kl_t1_sum", "teacher_ce_sum", "agreement_sum", "kept_mass_sum", "z_loss_sum")
    names += ("reverse_kl_t1_sum", "jsd_t1_sum", "moe_lb_loss_sum", "mtp_loss_sum", "log_z_sq_sum", "objective")
    for count, (n, mean) in enumerate(((10, 4.0), (1000, 1.0))):
        sums = {f"evaluation/{name}": jnp.float32(n * mean) for name in names}
        logger.buffer_and_write_metrics(
            {"scalar": sums | {"evaluation/n": jnp.float32(n)}}, count, NO_TIME, is_training=False
        )
    logger.buffer_and_write_metrics(training(1.0), 0, NO_TIME)
    (row,) = [row for row in rows(logger) if "evaluation/ce_loss" in row]
    expected = (10 * 4.0 + 1000 * 1.0) / 1010
    means = ("ce_loss", "kd_loss", "kl_t1", "reverse_kl_t1", "jsd_t1", "teacher_ce_loss", "top1_agreement")
    for name in (*means, "z_loss", "moe_lb_loss"):
        assert row[f"evaluation/{name}"] == pytest.approx(expected, rel=1e-6)
    assert row["evaluation/perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert row["evaluation/total_weights"] == 1010


def no_tokens(kind):
    """The metrics of a step, or an evaluation, without a token: every sum is 0."""
    if kind == "training":
        return training(0.0)
    names = ("ce_sum", "kd_sum", "z_loss_sum", "moe_lb_loss_sum", "mtp_loss_sum", "objective", "n")
    return {"scalar": {f"evaluation/{name}": jnp.float32(0) for name in names}}


def test_an_evaluation_without_a_token_is_no_row_and_reaches_no_target(logger, capsys):
    logger.config = upstream.with_settings(logger.config, target_eval_loss=2.0)
    for count in range(2):
        logger.buffer_and_write_metrics(no_tokens("evaluation"), count, NO_TIME, is_training=False)
    logger.finish_evaluation(7)
    logger.buffer_and_write_metrics(training(1.0), 8, NO_TIME)
    logger.flush_metrics_and_cleanup()
    assert [row["step"] for row in rows(logger)] == [8]
    assert "evaluation after step 7: no token counts" in capsys.readouterr().out


def test_a_step_without_a_token_is_said_and_is_no_row(logger, capsys):
    for step, metrics in enumerate((training(1.0), no_tokens("training"), no_tokens("training"), training(2.0))):
        logger.buffer_and_write_metrics(metrics, step, NO_TIME)
    logger.flush_metrics_and_cleanup()
    logger.check_has_learned()
    assert [row["step"] for row in rows(logger)] == [0, 3]
    said = capsys.readouterr().out
    assert said.count("no token counts") == 1 and "step 1: no token counts" in said


@pytest.mark.parametrize("steps", [1, 30])
def test_a_run_in_which_no_token_counts_fails(logger, steps):
    with pytest.raises(failures.RunError, match="no token counts"):
        for step in range(steps):
            logger.buffer_and_write_metrics(no_tokens("training"), step, NO_TIME)
        logger.flush_metrics_and_cleanup()
        logger.check_has_learned()
    assert logger.empty_steps == min(steps, failures.MOST_EMPTY_STEPS)


def test_each_step_has_its_own_time_around_an_evaluation_too(logger, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger.start_clock()
    first, second, third = training(1.0), training(2.0), training(3.0)
    logger.buffer_and_write_metrics(first, 0, NO_TIME)
    now[0] = 5.0  # step 0 took five seconds; step 1 has been dispatched and takes two; an evaluation follows it
    logger.flush()
    now[0] = 7.0
    logger.time_step(second)
    now[0] = 100.0
    logger.buffer_and_write_metrics(second, 1, NO_TIME)
    logger.start_clock()
    logger.buffer_and_write_metrics(third, 2, NO_TIME)
    now[0] = 103.0
    logger.flush_metrics_and_cleanup()
    assert [row["perf/step_time_seconds"] for row in rows(logger)] == [5.0, 2.0, 3.0]
    for row in rows(logger):
        assert (row["perf/per_device_tflops"], row["perf/per_device_teacher_tflops"]) == (1.0, 0.25)


def test_upstreams_z_loss_is_taken_out_of_its_cross_entropy(metrics):
    config = type("Config", (), {"z_loss_multiplier": 1e-3, "gradient_accumulation_steps": 1})
    scalars = {"learning/lm_loss": 3.0, "learning/z_loss": 0.25}
    metrics.add_plain_ce(config, scalars)
    assert scalars["learning/ce_loss"] == 2.75
