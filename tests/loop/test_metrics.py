"""Laws of the metrics file: no row is lost, and none is written twice."""

import datetime
import json
import math
import pathlib
import re
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, Result

from MaxText import upstream
from MaxText.loop import compute, failures

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
    of_step = compute.Compute(total=1.0, teacher=0.25)
    logger = metrics.MetricLogger(config, lambda step: 0.1, start_step=0, of_step=of_step)
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


class Working:
    """A value on a device that is at work until `finish`."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        assert self.done.wait(10)
        return self

    def __float__(self):
        return 1.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock(logger, at, metrics)` lets a step be complete at that time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def finish(at, metrics):
        now[0] = at
        metrics["scalar"]["learning/loss"].done.set()
        metrics["completion"].result(10)

    def pass_until(at):
        now[0] = at

    return finish, pass_until


def test_each_step_has_the_time_to_its_own_completion_whenever_the_loop_asks(logger, clock):
    finish, pass_until = clock
    logger.start_clock()
    steps = [training(1.0) for _ in range(4)]
    for metrics in steps:
        metrics["scalar"]["learning/loss"] = Working()

    def dispatch(number):  # writes the step before it, which must be complete
        logger.buffer_and_write_metrics(steps[number], number, NO_TIME)

    dispatch(0)
    finish(5.0, steps[0])
    pass_until(50.0)  # the loop waits for data
    dispatch(1)
    finish(57.0, steps[1])  # 52 seconds after step 0, most of them without data
    logger.flush()
    pass_until(100.0)
    logger.start_clock()  # an evaluation was between
    dispatch(2)
    finish(103.0, steps[2])
    pass_until(110.0)  # something keeps the loop from asking
    dispatch(3)
    finish(111.0, steps[3])
    logger.flush_metrics_and_cleanup()
    assert [row["perf/step_time_seconds"] for row in rows(logger)] == [5.0, 52.0, 3.0, 8.0]
    for row in rows(logger):
        assert (row["perf/per_device_tflops"], row["perf/per_device_teacher_tflops"]) == (1.0, 0.25)


def test_upstreams_z_loss_is_taken_out_of_its_cross_entropy(metrics):
    config = type("Config", (), {"z_loss_multiplier": 1e-3, "gradient_accumulation_steps": 1})
    scalars = {"learning/lm_loss": 3.0, "learning/z_loss": 0.25}
    metrics.add_plain_ce(config, scalars)
    assert scalars["learning/ce_loss"] == 2.75


# Names and units ------------------------------------------------------------------------------------------------------


def documented():
    """Name -> where it is logged, "" for everywhere, by the tables of docs/metrics.md."""
    found = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and "/" in cells[0] and cells[0].startswith("`"):
            found |= {name.strip("` "): cells[3] for name in cells[0].split(",")}
    return found


def test_what_is_logged_stands_in_one_table_with_its_unit(train, teacher, experts):
    names = documented()
    everything = {"mtp_num_layers": 1, "mtp_eval_target_module": 1, "kd_mtp_alpha": 0.5, "eval_interval": 6}
    taught = {"use_kd": "true", "kd_teacher_parameters_path": teacher, "eval_steps": 1, "steps": 2}
    run = train("named", **taught, **everything, kd_top_k=8, z_loss_multiplier=1e-3, record_internal_nn_metrics="true")
    plain = Result(0, "", pathlib.Path(teacher).parent)
    for rows in (run.rows(), run.rows("evaluation/"), plain.rows(), experts.rows()):
        logged = {re.sub(r"layer_\d+", "layer_NNN", name) for name in rows[0]} - {"step", "run_name"}
        assert logged <= set(names), "not in docs/metrics.md"
        kind = "evaluation/" in "".join(logged)
        always = {name for name, where in names.items() if not where and name.startswith("eval") == kind}
        assert always <= logged, "docs/metrics.md has them everywhere"
    found = {name for row in (*run.rows(), *run.rows("evaluation/"), *plain.rows()) for name in row}
    conditional = {"a teacher or its cache", "a teacher", "not while the batch ramps up", "`kd_mtp_alpha` > 0"}
    assert {name for name, where in names.items() if where in conditional} <= found
    assert "perf/per_device_recomputed_tflops" in plain.rows()[0]


def test_utilization_is_of_the_chips_peak_and_absent_where_that_is_unknown(metrics, monkeypatch):
    amounts = {"perf/per_device_tflops": 40.0, "perf/per_device_tokens": 1000}
    monkeypatch.setattr(compute, "peak_memory", lambda: None)
    on_a_cpu = metrics.performance(amounts, compute.Compute(40.0), 0.5)
    assert on_a_cpu["perf/per_device_tflops_per_sec"] == 80
    assert on_a_cpu["perf/tokens_per_sec"] == 2000 * jax.device_count()
    assert not {"perf/mfu_percent", "perf/hfu_percent", "perf/peak_memory_gb"} & on_a_cpu.keys()
    monkeypatch.setattr(compute, "peak_memory", lambda: (12.5e9, 80e9))
    on_a_chip = metrics.performance(amounts, compute.Compute(40.0, 10.0, 8.0, peak=200.0), 0.5)
    assert (on_a_chip["perf/mfu_percent"], on_a_chip["perf/hfu_percent"]) == (40, 48)
    assert on_a_chip["perf/peak_memory_gb"] == 12.5
    assert "hfu" not in "".join(metrics.performance(amounts, compute.Compute(40.0, 10.0, None, 200.0), 0.5))
    assert "mfu" not in "".join(metrics.performance({}, compute.Compute(40.0, peak=200.0), 0.5))  # the batch ramps up


def test_a_half_of_a_chip_has_half_of_its_peak(logger):
    devices = np.array([types.SimpleNamespace(device_kind="TPU7x")], dtype=object)
    mesh = types.SimpleNamespace(devices=devices)
    of_step = compute.of_run(logger.config, None, mesh)
    assert of_step.peak == pytest.approx(2307 / 2)
    assert of_step.teacher == 0
    # By hand: 4 rows of 32 tokens; of each a layer's products of matrices, and half of those of attention.
    config = logger.config
    width, heads, kv, head = config.emb_dim, config.num_query_heads, config.num_kv_heads, config.head_dim
    layer = 2 * width * (2 * heads * head + 2 * kv * head + 3 * config.mlp_dim)
    attention = 2 * 32 * heads * head
    flops = 4 * 32 * config.num_decoder_layers * (layer + attention)
    assert of_step.recomputed == pytest.approx(flops / 1e12, rel=1e-6)


def test_memory_is_that_of_the_fullest_device_and_is_said_after_the_first_step(logger, capsys, monkeypatch):
    devices = [
        types.SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak, "bytes_limit": 80e9})
        for peak in (3e9, 5e9)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    for step in range(2):
        logger.buffer_and_write_metrics(training(1.0), step, NO_TIME)
    logger.flush_metrics_and_cleanup()
    assert [row["perf/peak_memory_gb"] for row in rows(logger)] == [5, 5]
    assert capsys.readouterr().out.count("memory  5.00 of 80.00 GB at the most on a device") == 1
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: None)])
    assert compute.peak_memory() is None


def test_weights_and_biases_gets_every_row_by_its_step(logger, monkeypatch):
    logged = {}
    wandb = types.SimpleNamespace(log=lambda metrics, step: logged.setdefault(step, metrics))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger.config = upstream.with_settings(logger.config, enable_wandb=True)
    for step in range(2):
        logger.buffer_and_write_metrics(training(float(step + 1)), step, NO_TIME)
    logger.flush_metrics_and_cleanup()
    assert [logged[row["step"]] for row in rows(logger)] == [
        {name: value for name, value in row.items() if "/" in name} for row in rows(logger)
    ]
