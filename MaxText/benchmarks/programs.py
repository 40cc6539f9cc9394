"""What is measured: a row of the table, the program that fills it, and the FLOPs that its shapes make.

No token is masked. Left out on purpose: more than one device.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

from MaxText.config.files import CONFIGS, load_yml
from MaxText.config.keys import Distillation, KDKeys
from MaxText.distill.kd_loss import TRUNCATION_STRATEGIES

# N tokens, D student's width, E teacher's width, V vocabulary

ALPHA, TEMPERATURE = 0.5, 2.0
DRAWS = 50  # kd_cache_draws
TILES = 8  # num_vocab_tiling of upstream's cross-entropy

CE_DENSE, CE_TILED, KD_DENSE = "CE, dense", f"CE, upstream's tiling by {TILES}", "KD, dense reference"
LIGER = "Liger's fused linear JSD (beta 0) and CE"
STEP_CE, STEP_KD = f"upstream's CE step, tiling by {TILES}", "KD step"
STEP_STORED, CACHING = "step from a cache", "caching"
TEACHER_LOGITS, TEACHER_HIDDEN = "teacher forward, to logits", "teacher forward, to hidden states"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all rows of a table have in common: widths, the ceiling of a block (kd_block_mib), what is computed in."""

    width: int
    teacher_width: int
    block_mib: int
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What the teacher's distribution is cut down to."""

    name: str
    top_k: int = 0
    top_p: float = 0.0
    strategy: str = "renormalize"


def truncations(vocabulary: int) -> list[Truncation]:
    """No truncation, top-k 64 and top-p 0.9, these by each strategy."""
    k = min(64, vocabulary)
    return [
        Truncation("full"),
        *(Truncation(f"top-k {k}, {strategy}", top_k=k, strategy=strategy) for strategy in TRUNCATION_STRATEGIES),
        *(Truncation(f"top-p 0.9, {strategy}", top_p=0.9, strategy=strategy) for strategy in TRUNCATION_STRATEGIES),
    ]


def stored(vocabulary: int) -> list[Truncation]:
    """What a cache holds: draws, which leave nothing out, and the k largest, by each strategy."""
    return [Truncation(f"{DRAWS} draws"), *(kept for kept in truncations(vocabulary) if kept.top_k)]


@dataclasses.dataclass
class Row:
    """One measured program.

    Attributes:
      group: loss or step.
      block: tokens of a block; None where there are none.
      temp_bytes, argument_bytes, output_bytes: by XLA's memory_analysis.
      xla_flops: by XLA's cost_analysis, which counts the body of each loop once.
      flops: counted from shapes, every visit of a loop's body included; for a step, the models' own as upstream counts
        them, which leaves out what is projected or computed twice.
      seconds: one number per round; empty where the program was not run.
    """

    group: str
    name: str
    tokens: int
    vocabulary: int
    width: int
    teacher_width: int
    flops: float
    block: int | None = None
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    xla_flops: float = math.nan
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """The slowest round less the fastest."""
        return max(self.seconds) - min(self.seconds) if self.seconds else math.nan


@dataclasses.dataclass
class Program:
    """A row and what runs it: `call` dispatches one execution and returns arrays to wait for."""

    row: Row
    call: Callable[[], Any]


def kd_flops(tokens: int, vocabulary: int, width: int, teacher_width: int) -> float:
    """2 N V (3 D + E): both heads' projections, and the gradients for the student's hidden states and head."""
    return 2 * tokens * vocabulary * (3 * width + teacher_width)


def ce_flops(tokens: int, vocabulary: int, width: int, projections: int = 1) -> float:
    """2 N V D for each projection and for both gradients."""
    return 2 * tokens * vocabulary * width * (projections + 2)


def analysed(row: Row, compiled: Any) -> Row:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return dataclasses.replace(
        row,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        xla_flops=cost.get("flops", math.nan),
    )


def distillation(sizes: Sizes, kept: Truncation) -> Distillation:
    defaults = load_yml(str(CONFIGS / "base.yml"))
    settings = {key: defaults[key] for key in KDKeys.model_fields} | {
        "use_kd": True,
        "kd_alpha": ALPHA,
        "kd_temperature": TEMPERATURE,
        "kd_top_k": kept.top_k,
        "kd_top_p": kept.top_p,
        "kd_truncation_strategy": kept.strategy,
        "kd_block_mib": sizes.block_mib,
    }
    return Distillation(**settings)
