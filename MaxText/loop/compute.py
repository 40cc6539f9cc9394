"""What a step computes, by the shapes of its models, and what its chip could compute at most.

FLOPs are model FLOPs, as MaxText counts them: the student's forward and backward pass and the teacher's forward pass,
of every position of the batch, whatever is masked. What is computed a second time to save memory is apart. Left out on
purpose: what the kernels do beyond that, which no shape tells.
"""

import dataclasses
from typing import Any

import jax

from MaxText import chips, upstream

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Compute:
    """Of one training step, in TFLOPs per device.

    total: the student's and the teacher's.
    teacher: the teacher's part of it.
    recomputed: the student's layers once more, which remat_policy=full adds; None where it is not known.
    peak: in a second, of the device, dense, in bfloat16; None for a chip that is not in the table.
    """

    total: float
    teacher: float = 0.0
    recomputed: float | None = None
    peak: float | None = None


def of_run(config: Any, teacher_config: Any, mesh: jax.sharding.Mesh) -> Compute:
    """Args:
    config: MaxText's configuration of the student.
    teacher_config: that of a teacher in the step, or None.
    mesh: the run's mesh.
    """
    total = upstream.tflops_per_step(config, teacher_config)
    alone = upstream.tflops_per_step(config, None)
    chip = chips.chip_of(mesh)
    peak = chip.flops / chip.devices / 1e12 if chip is not None else None
    return Compute(total, total - alone, recomputed(config, alone), peak)


def recomputed(config: Any, student: float) -> float | None:
    """The forward pass of all layers but the head, a third of what training them costs; `student` trains them all.

    Other policies keep a part of what a layer computes, and an MTP head is no layer of the decoder's.
    """
    if config.remat_policy != "full" or config.mtp_num_layers > 0:
        return None
    tokens = upstream.maxtext_utils.calculate_tokens_training_per_device(config)
    return student / 3 - 2 * tokens * config.emb_dim * config.vocab_size / 1e12


def peak_memory() -> tuple[float, float] | None:
    """The most bytes in use so far on a device of this host, and what it has, 0 if unknown; None: it does not tell."""
    found = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats and "peak_bytes_in_use" in stats for stats in found):
        return None
    return max(s["peak_bytes_in_use"] for s in found), max(s.get("bytes_limit", 0) for s in found)
