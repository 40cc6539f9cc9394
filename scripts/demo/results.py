"""What the demo's runs came to: numbers, a table, a sentence."""

import math
import statistics
from typing import Any

from rich.table import Table

SEED_SPREAD = 0.02  # nats: how far the held-out cross-entropy moves from one seed to the next (docs/log.md)

Rows = list[dict[str, Any]]


def summary(rows: Rows) -> dict[str, float]:
    """A run's last evaluation, and its training speed: all tokens by all seconds of the steps after the first."""
    last = [row for row in rows if "evaluation/ce_loss" in row][-1]
    speeds = [row["perf/per_device_tokens_per_sec"] for row in rows if "perf/per_device_tokens_per_sec" in row]
    names = {"kl": "evaluation/kl_t1", "agreement": "evaluation/top1_agreement"}
    ce = last["evaluation/ce_loss"]
    return {"ce": ce, "perplexity": math.exp(ce), "tokens_per_second": statistics.harmonic_mean(speeds[1:])} | {
        name: last[key] for name, key in names.items() if key in last
    }


def verdict(ce: float, kd: float, teacher: float) -> str:
    """What the held-out cross-entropies of the CE student, the KD student and the teacher say, in one sentence."""
    gain = ce - kd
    if abs(gain) <= SEED_SPREAD:
        return f"KD {kd:.3f}, CE only {ce:.3f}: equal within the spread of seeds ({SEED_SPREAD} nats)."
    sentence = (
        f"KD {kd:.3f}, CE only {ce:.3f}: distillation is {abs(gain):.3f} nats {'better' if gain > 0 else 'WORSE'}"
    )
    if 0 < gain < ce - teacher:
        sentence += f", {gain / (ce - teacher):.0%} of the way to the teacher's {teacher:.3f}"
    return sentence + "."


def table(title: str, summaries: dict[str, dict[str, float]]) -> Table:
    """Lines, a summary each, as measured on the held-out files; agreement is of the most probable tokens."""
    view = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("", "CE", "perplexity", "KL to teacher", "agreement", "tokens/s"):
        view.add_column(heading, justify="right" if heading else "left")
    for name, row in summaries.items():
        kl = f"{row['kl']:.3f}" if "kl" in row else "-"
        agreement = f"{row['agreement']:.1%}" if "agreement" in row else "-"
        numbers = f"{row['ce']:.3f}", f"{row['perplexity']:.1f}", kl, agreement, f"{row['tokens_per_second']:,.0f}"
        view.add_row(name, *numbers)
    return view
