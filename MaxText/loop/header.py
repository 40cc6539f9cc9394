"""What the console says before the first step: what is trained, from what, on what."""

from typing import Any

import jax
from flax import nnx

from MaxText import upstream
from MaxText.config.keys import Distillation
from MaxText.config.resolve import Run
from MaxText.console import readable, say
from MaxText.data.cached import Cached
from MaxText.models import fresh, frozen, heads
from MaxText.models.walk import Walk


def header(run: Run, student: Any, teacher: Any) -> None:
    """Prints the run in a few lines."""
    config, kd = run.student, run.kd
    tokens = config.global_batch_size_to_train_on * config.max_target_length
    left = config.steps - student.start_step
    lines = [
        ("run", f"{config.run_name}: {steps_text(student.start_step, config.steps)}"),
        ("student", model_text(config, nnx.state(student.state, nnx.Param))),
    ]
    if not student.origin and fresh.table_std(config) != upstream.EMBEDDING_STD:
        lines.append(("", f"fresh, with an embedding table of standard deviation {fresh.table_std(config):.3g}"))
    if trained := frozen.check(config, nnx.state(student.state.model, nnx.Param)):
        lines.append(("", trained))
    if teacher is not None:
        at = "" if teacher.checkpoint.step is None else f", step {teacher.checkpoint.step}"
        lines.append(("teacher", model_text(teacher.config, nnx.filter_state(teacher.state, nnx.Param))))
        lines.append(("", f"from {teacher.checkpoint.root}{at}"))
    if student.cached is not None:
        lines += targets_text(kd, student.cached)
    lines.append(("loss", loss_text(kd)))
    if kd.use_kd:
        lines.append(("", walk_text(heads.walk_of(student.mesh, config, teacher and teacher.config, kd), kd)))
    lines.append(("tokens", f"{readable(tokens)} a step, {readable(tokens * left)} to go; {data_text(config)}"))
    lines.append(("devices", layout_text(student.mesh)))
    say("\n".join(f"{title:>8}  {text}" for title, text in lines))


def walk_text(walk: Walk, kd: Distillation) -> str:
    shared = f", which {walk.pool} devices have together" if walk.pool > 1 else ""
    ceiling = f"kd_block_mib {kd.kd_block_mib}" if kd.kd_block_mib else "chosen for the device"
    blocks = "one block" if walk.rounds == 1 else f"{walk.rounds} blocks"
    return f"in {blocks} of {readable(walk.block)} tokens per device{shared} ({ceiling})"


def targets_text(kd: Distillation, cached: Cached) -> list[tuple[str, str]]:
    """What was stored, of which teacher."""
    contents = cached.contents
    assert contents is not None
    kept = f"{contents.draws} draws" if contents.mode == "sample" else f"the {cached.slots} likeliest tokens"
    at = "" if contents.teacher.step is None else f", step {contents.teacher.step}"
    use = "" if kd.distils else "; read by evaluations alone (kd_alpha=0)"
    return [
        ("targets", f"{kept} a position, stored in {cached.folder}{use}"),
        ("", f"of the teacher {contents.teacher.path}{at}"),
    ]


def steps_text(start: int, steps: int) -> str:
    return f"steps {start} to {steps - 1}" + (" (resumed)" if start else "")


def model_text(config: Any, params: nnx.State) -> str:
    leaves = jax.tree.leaves(params)
    held = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    name = config.model_name if config.model_name != "default" else f"{config.decoder_block.value} (no preset)"
    layers = f"{config.num_decoder_layers} layers x {config.emb_dim}"
    count = readable(sum(leaf.size for leaf in leaves))
    return f"{name}, {layers}, {count} parameters held in {held}, computed in {config.dtype}"


def loss_text(kd: Distillation) -> str:
    if not kd.use_kd:
        return "cross-entropy (use_kd=false)"
    if not kd.distils:
        return "cross-entropy (kd_alpha=0); the teacher serves evaluation alone"
    kept = f"the {kd.kd_vocab_size} shared tokens" if kd.kd_vocab_size else "the whole vocabulary"
    if kd.truncates:
        size = f"top {kd.kd_top_k}" if kd.kd_top_k else f"top-p {kd.kd_top_p:g}"
        kept = f"the teacher's {size} ({kd.kd_truncation_strategy})"
    weights = f"{1 - kd.kd_alpha:g} CE + {kd.kd_alpha:g}"
    course = schedule_text(kd.kd_alpha_schedule, kd.kd_alpha_start, kd.kd_alpha, kd.kd_alpha_end)
    alpha = ""
    if kd.kd_alpha_schedule != "constant":
        weights, alpha = "(1 - a) CE + a", f", a = {course}"
    course = schedule_text(
        kd.kd_temperature_schedule, kd.kd_temperature_start, kd.kd_temperature, kd.kd_temperature_end
    )
    where = f" at the {kd.kd_positions:.0%} of positions of highest entropy" if kd.chooses_positions else ""
    return f"{weights} T^2 {divergence_text(kd)} over {kept}{where}{alpha}, T = {course}"


def divergence_text(kd: Distillation) -> str:
    beta, skew = f"{kd.kd_jsd_beta:g}", f"{kd.kd_skew:g}"
    rest = f"{1 - kd.kd_skew:g}"
    return {
        "forward_kl": "KL(teacher || student)",
        "reverse_kl": "KL(student || teacher)",
        "jsd": f"JSD(teacher, student) with a beta of {beta}",
        "skew_kl": f"KL(teacher || {skew} teacher + {rest} student)",
        "skew_reverse_kl": f"KL(student || {rest} teacher + {skew} student)",
        "tvd": "TVD(teacher, student)",
    }[kd.kd_divergence]


def schedule_text(form: str, start: float | None, value: float, end: float | None) -> str:
    """The values that a schedule leads through, in order, and its form."""
    values = " to ".join(f"{x:g}" for x in (start, value, end) if x is not None)
    return values if form == "constant" else f"{values} ({form})"


def data_text(config: Any) -> str:
    return (
        f"{getattr(config.dataset_type, 'value', config.dataset_type)} data, {config.max_target_length} positions a row"
    )


def layout_text(mesh: jax.sharding.Mesh) -> str:
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})"
