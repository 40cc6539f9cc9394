"""Metrics: from the steps' sums and scalars to console, metrics_file, TensorBoard and what else MaxText writes to.

MaxText's own logger does the writing and the buffering (step n is dispatched before step n - 1 is read); this one adds
the distillation's scalars, evaluations weighted by tokens, a console made for reading, and a metrics file that loses
no row.
"""

import json
import os
import pathlib
import time
from concurrent import futures
from typing import Any

import jax
import numpy as np

from MaxText import upstream
from MaxText.config.data import data_settings
from MaxText.config.keys import ConfigError
from MaxText.console import RunError, duration, readable, say
from MaxText.loop import compute, failures

Metrics = dict[str, Any]

# What an evaluation reports -> the sum it is made of, divided by the token count over the whole evaluation.
EVALUATION = {
    "evaluation/ce_loss": "evaluation/ce_sum",
    "evaluation/kd_loss": "evaluation/kd_sum",
    "evaluation/kl_t1": "evaluation/kl_t1_sum",
    "evaluation/reverse_kl_t1": "evaluation/reverse_kl_t1_sum",
    "evaluation/jsd_t1": "evaluation/jsd_t1_sum",
    "evaluation/teacher_ce_loss": "evaluation/teacher_ce_sum",
    "evaluation/top1_agreement": "evaluation/agreement_sum",
    "evaluation/kd_kept_mass": "evaluation/kept_mass_sum",
    "evaluation/z_loss": "evaluation/z_loss_sum",
    "evaluation/moe_lb_loss": "evaluation/moe_lb_loss_sum",
}
# The counts of the tokens that an MTP head drafted: those that the model accepts, and all.
MTP_ACCEPTANCE = ("evaluation/mtp_accepted_sum", "evaluation/mtp_n")
# Means over a batch that upstream's evaluation adds up by these names.
UPSTREAMS_MEANS = ("z_loss", "moe_lb_loss", "mtp_loss")


class MetricLogger(upstream.metric_logger.MetricLogger):
    """MaxText's logger with the distillation's metrics.

    Args:
      config: MaxText's configuration of the student.
      learning_rate_schedule: step -> learning rate.
      start_step: the first step of this process; rows of the metrics file from it on are replaced.
      of_step: what a step computes.

    Raises:
      ConfigError: metrics_file cannot be written.
    """

    performance_metric_queue: Any

    def __init__(
        self,
        config: Any,
        learning_rate_schedule: Any,
        start_step: int,
        of_step: compute.Compute,
    ):
        super().__init__(config=config, learning_rate_schedule=learning_rate_schedule, start_step=start_step)
        self.of_step = of_step
        self.watching = futures.ThreadPoolExecutor(1, "completion")
        self.last_completion = time.monotonic()
        self.first_step_at = self.last_completion
        self.state_is_finite = True  # after the last step that was written
        self.tokens = 0.0  # that counted in the steps of this process
        self.empty_steps = 0  # in a row, in which no token counted
        self.has_learned = False  # whether a token counted in any step
        if config.metrics_file and jax.process_index() == 0:
            keep_rows_before(config.metrics_file, config.run_name, start_step)

    # How long a step took: from the completion of the one before it, not from dispatch to dispatch ----------------

    def start_clock(self) -> None:
        """Leaves out of the next step's time what came before it: set-up, or an evaluation."""
        self.last_completion = time.monotonic()

    def flush(self) -> None:
        """Writes what is buffered."""
        while self.buffered_metrics:
            self._flush_one_buffered_entry(self.buffered_metrics.pop(0))

    def flush_metrics_and_cleanup(self) -> None:
        super().flush_metrics_and_cleanup()
        self.watching.shutdown()

    def seconds_of(self, completion: "futures.Future[float]") -> float:
        """Waits for a step -> how long it took."""
        now = completion.result()
        seconds = max(now - self.last_completion, 1e-9)
        self.last_completion = now
        return seconds

    def record_train_metrics(self, metrics: Metrics, step: int, step_time: float) -> None:
        """Adds what needs no waiting; the time follows when the step is complete.

        A thread waits for that: the loop asks when it has time to, which may be long after.
        """
        metrics["completion"] = self.watching.submit(completed_at, list(metrics["scalar"].values()))
        queue: Any = self.performance_metric_queue
        self.performance_metric_queue = None
        super().record_train_metrics(metrics, step, step_time=1.0)
        self.performance_metric_queue = queue
        if "perf/per_device_tflops" in metrics["scalar"]:  # absent while the batch size ramps up
            metrics["scalar"]["perf/per_device_teacher_tflops"] = self.of_step.teacher
            if self.of_step.recomputed is not None:
                metrics["scalar"]["perf/per_device_recomputed_tflops"] = self.of_step.recomputed

    def _flush_one_buffered_entry(self, entry: tuple[str, int, dict[str, Any], Any]) -> None:
        kind, _, metrics, _ = entry
        if kind == "train":
            seconds = self.seconds_of(metrics.pop("completion"))
            metrics["scalar"] |= performance(metrics["scalar"], self.of_step, seconds)
            if self.performance_metric_queue:
                self.performance_metric_queue.put(seconds)
        super()._flush_one_buffered_entry(entry)

    # What is written where --------------------------------------------------------------------------------------

    def write_metrics(self, metrics: Metrics, step: int, metric_type: str = "train") -> None:
        if metric_type == "train" and float(metrics["scalar"]["learning/total_weights"]) == 0:
            self.skip_empty_step(step)
        elif metric_type == "train":
            self.empty_steps, self.has_learned = 0, True
            add_plain_ce(self.config, metrics["scalar"])
            super().write_metrics(metrics, step, metric_type)
            if step == self.start_step and (memory := compute.peak_memory()):
                say(memory_text(*memory))
        elif metric_type != "running_eval":  # upstream's running averages are rows of neither kind
            super().write_metrics(metrics, step, metric_type)
        if metric_type == "train":
            self.tokens += float(metrics["scalar"]["learning/total_weights"])
            self.state_is_finite = failures.state_is_finite(metrics["scalar"])
            self.stop_if_diverged(metrics["scalar"], step)

    def skip_empty_step(self, step: int) -> None:
        """A step without a token has no loss to write; a run of such steps is none."""
        if self.empty_steps == 0:
            say(f"warning: step {step}: {failures.NO_TOKEN_COUNTS}")
        self.empty_steps += 1
        if not self.has_learned and self.empty_steps == failures.MOST_EMPTY_STEPS:
            self.check_has_learned()

    def check_has_learned(self) -> None:
        """Raises RunError where steps were made and not one of them had a token that counted."""
        if self.empty_steps and not self.has_learned:
            raise RunError(
                f"{data_settings(self.config)}: in the {self.empty_steps} steps so far {failures.NO_TOKEN_COUNTS}"
            )

    def write_metrics_locally(self, metrics: Metrics, step: int) -> None:
        if jax.process_index() != 0:
            return
        row = {"step": int(step), "run_name": self.config.run_name}
        row |= {name: float(value) for name, value in metrics["scalar"].items()}
        with open(self.config.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_setup_info_to_tensorboard(self, params: Any) -> None:
        keys = upstream.metric_logger.MetadataKey
        self.metadata[keys.PER_DEVICE_TFLOPS] = self.of_step.total
        self.metadata[keys.PER_DEVICE_TOKENS] = upstream.maxtext_utils.calculate_tokens_training_per_device(self.config)
        if self.config.enable_tensorboard:
            count = upstream.max_utils.calculate_num_params_from_pytree(params)
            upstream.max_utils.add_text_to_summary_writer("num_model_parameters", str(count), self.writer)
            upstream.maxtext_utils.add_config_to_summary_writer(self.config, self.writer)

    def _maybe_abort_after_write_metrics(self, metrics: Metrics) -> None:
        """Upstream's, which knows neither the step nor the terms: `stop_if_diverged` does."""

    def stop_if_diverged(self, scalars: Metrics, step: int) -> None:
        what, values = failures.divergence(scalars, step)
        config = self.config
        for key, wanted, found in (
            ("abort_on_nan_loss", config.abort_on_nan_loss, np.isnan(values).any()),
            ("abort_on_inf_loss", config.abort_on_inf_loss, np.isinf(values).any()),
        ):
            if wanted and found:
                raise RunError(f"{what}. The newest checkpoint is of an earlier step; {key}=false goes on.")

    # Evaluation: sums over its batches, one division ------------------------------------------------------------

    def _accumulate_eval_metrics(self, metrics: Metrics) -> None:
        scalars = dict(metrics["scalar"])
        if "evaluation/total_loss" in scalars:  # use_kd=false: upstream's step, whose loss has the z-loss in it
            weights = float(scalars["evaluation/total_weights"])
            z_loss_sum = float(scalars["evaluation/z_loss"]) * weights
            scalars["evaluation/z_loss_sum"] = z_loss_sum
            scalars["evaluation/ce_sum"] = float(scalars["evaluation/total_loss"]) - z_loss_sum
            scalars["evaluation/moe_lb_loss_sum"] = float(scalars["evaluation/moe_lb_loss"]) * weights
            scalars["evaluation/n"] = weights
        else:  # upstream's totals and means, by the names it adds up
            n = max(float(scalars["evaluation/n"]), 1.0)
            scalars["evaluation/total_loss"] = scalars["evaluation/ce_sum"] + scalars["evaluation/z_loss_sum"]
            scalars["evaluation/total_weights"] = scalars["evaluation/n"]
            scalars |= {f"evaluation/{name}": scalars[f"evaluation/{name}_sum"] / n for name in UPSTREAMS_MEANS}
        super()._accumulate_eval_metrics({"scalar": scalars})
        total = self.cumulative_eval_metrics["scalar"]
        for name in (*EVALUATION.values(), "evaluation/n", *MTP_ACCEPTANCE):
            if name in scalars:
                total[name] += float(scalars[name])

    def finish_evaluation(self, step: int) -> None:
        """Writes what has been evaluated after `step`; raises upstream's StopTraining at the target loss."""
        self.flush()
        if self._pending_eval_step_count and self.cumulative_eval_metrics["scalar"]["evaluation/n"] == 0:
            say(f"warning: evaluation after step {step}: {failures.NO_TOKEN_COUNTS}: nothing is written")
            self.reset_eval_metrics()
        elif self._pending_eval_step_count:
            self._finalize_eval_metrics(step)
        self.start_clock()

    def _finalize_eval_metrics(self, train_step: int) -> None:
        total = self.cumulative_eval_metrics["scalar"]
        n = total.pop("evaluation/n")
        for name, sum_name in EVALUATION.items():
            if sum_name in total:
                total[name] = total.pop(sum_name) / n
        if MTP_ACCEPTANCE[0] in total:
            accepted, drafted = (total.pop(name) for name in MTP_ACCEPTANCE)
            # Upstream divides by the number of batches.
            total["eval/mtp_acceptance_rate_percent"] = (
                self._pending_eval_step_count * 100 * accepted / max(drafted, 1.0)
            )
        total["evaluation/perplexity"] = float(np.exp(total["evaluation/ce_loss"]))
        total["evaluation/total_weights"] = n
        super()._finalize_eval_metrics(train_step)

    # The console ------------------------------------------------------------------------------------------------

    def _log_training_metrics(self, metrics: Metrics, step: int) -> None:
        scalars = metrics["scalar"]
        parts = [f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}"]
        parts.append(f"loss {float(scalars['learning/loss']):.4f}")
        for title, name in (("ce", "ce_loss"), ("kd", "kd_loss"), ("moe lb", "moe_lb_loss"), ("mtp", "mtp_loss")):
            value = float(scalars.get(f"learning/{name}", 0.0))
            if value:
                parts.append(f"{title} {value:.4f}")
        parts.append(f"lr {float(scalars['learning/current_learning_rate']):.2e}")
        hidden = self.config.hide_profiler_step_metric and self._is_profiler_boundary_step(step)
        if "perf/per_device_tokens_per_sec" in scalars and not hidden:  # absent while the batch size ramps up
            parts.append(f"{readable(float(scalars['perf/tokens_per_sec']))} tok/s")
            parts.append(f"{float(scalars['perf/per_device_tflops_per_sec']):.3g} TFLOP/s/device")
            if "perf/mfu_percent" in scalars:
                parts[-1] += f" ({scalars['perf/mfu_percent']:.1f} % MFU)"
        if step > self.start_step:  # evaluations and saves count: they come again
            passed = (time.monotonic() - self.first_step_at) / (step - self.start_step)
            parts.append(f"{duration((self.config.steps - 1 - step) * passed)} left")
        else:
            self.first_step_at = time.monotonic()
        say(" | ".join(parts))

    def _log_eval_metrics(self, metrics: Metrics, step: int) -> None:
        scalars = metrics["scalar"]
        parts = [f"eval after step {step}: ce {scalars['evaluation/ce_loss']:.4f}"]
        parts.append(f"perplexity {scalars['evaluation/perplexity']:.2f}")
        shown = (
            ("kd", "kd_loss"),
            ("kl(T=1)", "kl_t1"),
            ("agreement", "top1_agreement"),
            ("teacher ce", "teacher_ce_loss"),
        )
        parts += [f"{title} {scalars[f'evaluation/{n}']:.4f}" for title, n in shown if f"evaluation/{n}" in scalars]
        if self.config.mtp_eval_target_module > 0:
            parts.append(f"mtp acceptance {scalars['eval/avg_mtp_acceptance_rate_percent']:.1f}%")
        say(" | ".join([*parts, f"{readable(scalars['evaluation/total_weights'])} tokens"]))


def completed_at(arrays: list[Any]) -> float:
    """Waits for a step's metrics -> when they were there."""
    jax.block_until_ready(arrays)
    return time.monotonic()


def performance(scalars: Metrics, of_step: compute.Compute, seconds: float) -> Metrics:
    """What a step's time makes of its amounts, which are absent while the batch size ramps up.

    Utilization is of the chip's peak in bfloat16, where that is known: MFU counts the models' FLOPs, HFU what is
    recomputed as well.
    """
    found = {"perf/step_time_seconds": seconds}
    for amount in ("perf/per_device_tflops", "perf/per_device_tokens"):
        if amount in scalars:
            found[f"{amount}_per_sec"] = scalars[amount] / seconds
    if "perf/per_device_tokens" in scalars:
        found["perf/tokens_per_sec"] = found["perf/per_device_tokens_per_sec"] * jax.device_count()
    if "perf/per_device_tflops" in scalars and of_step.peak is not None:
        found["perf/mfu_percent"] = 100 * of_step.total / seconds / of_step.peak
        if of_step.recomputed is not None:
            found["perf/hfu_percent"] = 100 * (of_step.total + of_step.recomputed) / seconds / of_step.peak
    if memory := compute.peak_memory():
        found["perf/peak_memory_gb"] = memory[0] / compute.GB
    return found


def memory_text(peak: float, limit: float) -> str:
    """After the first step, which has held all that a step holds: a line that goes with the header."""
    of = f" of {limit / compute.GB:.2f}" if limit else ""
    return f"  memory  {peak / compute.GB:.2f}{of} GB at the most on a device, in the first step"


def add_plain_ce(config: Any, scalars: dict[str, Any]) -> None:
    """Adds learning/ce_loss where upstream's step ran: its lm_loss less the z-loss that upstream folds into it."""
    exact = config.z_loss_multiplier == 0 or config.gradient_accumulation_steps == 1  # else upstream sums the z-losses
    if "learning/ce_loss" not in scalars and exact:
        scalars["learning/ce_loss"] = scalars["learning/lm_loss"] - scalars["learning/z_loss"]


def keep_rows_before(path: str, run_name: str, start_step: int) -> None:
    """Drops this run's rows from `start_step` on, so that a resumed run continues its file where its state stands."""
    file = pathlib.Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = [parse_row(path, line, is_last=line is lines[-1]) for line in lines]
        later = [row is None or (row.get("run_name") == run_name and row.get("step", -1) >= start_step) for row in rows]
        kept = [line for line, drop in zip(lines, later, strict=True) if not drop]
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise ConfigError(f"metrics_file={path!r}: cannot be written ({error.strerror})") from None


def parse_row(path: str, line: str, is_last: bool) -> dict[str, Any] | None:
    """A row of the metrics file; None for a last one that a killed process left unfinished."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    except json.JSONDecodeError:
        if is_last:
            return None
    raise ConfigError(f"metrics_file={path!r}: is no metrics file, a line of it is {line[:40]!r}; nothing was changed")
