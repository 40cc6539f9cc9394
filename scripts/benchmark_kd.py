"""Measures the distillation loss and the whole step: time in paired rounds, XLA's memory and FLOPs beside it.

    make bench                                                the default sizes: some 10 minutes on 2 cores (estimated)
    python scripts/benchmark_kd.py --full                     the whole grid; what does not fit in memory is not timed
    python scripts/benchmark_kd.py --only loss --tokens 512 --rounds 3
    python scripts/benchmark_kd.py --full --rounds 0          memory and FLOPs alone: compiled, not run

All rows of one shape take turns, round by round, in one process: a drift of the machine hits all alike, and ratios are
medians of the ratios within each round. Everything is computed in float32, no token is masked. The table is printed
and everything that was measured, each round's seconds included, is written to <out>/benchmark.json.

What the loss rows compute: the sum's value and its gradients for the hidden states [N, D] and the head [D, V]. What
the step rows compute: a Llama-like student of width D and a teacher of width 2 D, both with random values.
Left out on purpose: more than one device, and bfloat16, which CPUs emulate.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from flax.core.spmd import logical_axis_rules
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from MaxText import train_compile, upstream
from MaxText.config import resolve
from MaxText.config.files import CONFIGS, load_yml
from MaxText.config.keys import ConfigError, Distillation, KDKeys
from MaxText.config.resolve import Run
from MaxText.config.teacher import resolve_teacher
from MaxText.console import errors_as_lines
from MaxText.distill.blockwise import blockwise_kd
from MaxText.distill.kd_loss import TRUNCATION_STRATEGIES, cross_entropy, kd_sums
from MaxText.loop import step
from MaxText.models import heads, teacher
from MaxText.models import student as student_lib

# N tokens, D student's width, E teacher's width, V vocabulary

ROOT = Path(__file__).resolve().parents[1]
ALPHA, TEMPERATURE = 0.5, 2.0
TEACHER_SPREAD = 8.0  # standard deviation of the teacher's logits: at T = 2 a nucleus of 0.9 holds about 1 % of V
TILES = 8  # num_vocab_tiling of upstream's cross-entropy
SEQUENCE = 512  # positions of a row in the whole step, at most

CE_DENSE, CE_TILED, KD_DENSE = "CE, dense", f"CE, upstream's tiling by {TILES}", "KD, dense reference"
STEP_CE, STEP_KD = f"upstream's CE step, tiling by {TILES}", "KD step"
TEACHER_LOGITS, TEACHER_HIDDEN = "teacher forward, to logits", "teacher forward, to hidden states"


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


# The loss alone -------------------------------------------------------------------------------------------------------


def project(head: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ head


class Shell(nnx.Module):
    """The part of a model that upstream's tiled cross-entropy asks for: its head."""

    def __init__(self, head: jax.Array):
        self.logits_dense = nnx.Param(head)
        self.mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def logits_from_hidden_states_for_vocab_tiling(self, hidden, deterministic, model_mode):
        return hidden @ self.logits_dense.get_value()


def upstream_tiled_ce(vocabulary: int, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    config = types.SimpleNamespace(
        enable_dropout=False,
        shard_mode=upstream.types.ShardMode.AUTO,
        debug_sharding=False,
        vocab_tiling_ag_once=False,
        num_vocab_tiling=TILES,
        vocab_size=vocabulary,
        z_loss_multiplier=0.0,
    )
    data = {"targets": targets[None], "targets_segmentation": jnp.ones_like(targets)[None]}
    return upstream.pre_train.vocab_tiling_nnx_loss(Shell(head), hidden[None], data, config, True)[0]


def dense_kd(kept: Truncation, hidden, head, teacher_hidden, teacher_head, targets) -> jax.Array:
    sums = kd_sums(
        project(head, hidden),
        project(teacher_head, teacher_hidden),
        targets,
        jnp.ones(targets.shape, bool),
        temperature=TEMPERATURE,
        top_k=kept.top_k,
        top_p=kept.top_p,
        truncation_strategy=kept.strategy,
    )
    return (1 - ALPHA) * sums.ce_sum + ALPHA * sums.kd_sum


def block_kd(kept: Truncation, block: int, hidden, head, teacher_hidden, teacher_head, targets) -> jax.Array:
    objective, _ = blockwise_kd(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        targets,
        jnp.ones(targets.shape, bool),
        student_project=project,
        teacher_project=project,
        alpha=ALPHA,
        temperature=TEMPERATURE,
        top_k=kept.top_k,
        top_p=kept.top_p,
        truncation_strategy=kept.strategy,
        block_size=block,
    )
    return objective


def loss_inputs(tokens: int, vocabulary: int, width: int, teacher_width: int) -> tuple[jax.Array, ...]:
    """Hidden states and heads of student and teacher, and targets."""
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (tokens, width)),
        jax.random.normal(keys[1], (width, vocabulary)) / math.sqrt(width),
        jax.random.normal(keys[2], (tokens, teacher_width)),
        jax.random.normal(keys[3], (teacher_width, vocabulary)) * (TEACHER_SPREAD / math.sqrt(teacher_width)),
        jax.random.randint(keys[4], (tokens,), 0, vocabulary),
    )


def loss_programs(options: argparse.Namespace, tokens: int, vocabulary: int) -> Iterator[Program]:
    """Each row of the loss for one shape, compiled when it is asked for."""
    shape = (tokens, vocabulary, options.width, options.teacher_width)
    inputs = loss_inputs(*shape)
    student_alone = (inputs[0], inputs[1], inputs[4])

    def program(name: str, flops: float, loss: Callable, arguments: tuple, block: int | None = None) -> Program:
        row = Row("loss", name, *shape, flops=flops, block=block)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return Program(analysed(row, compiled), functools.partial(compiled, *arguments))

    def dense_ce(hidden, head, targets):
        return jnp.sum(cross_entropy(project(head, hidden), targets))

    ce = ce_flops(tokens, vocabulary, options.width)
    tiled = ce_flops(tokens, vocabulary, options.width, projections=2)  # once more in the backward pass
    kd = kd_flops(*shape)
    yield program(CE_DENSE, ce, dense_ce, student_alone)
    yield program(CE_TILED, tiled, functools.partial(upstream_tiled_ce, vocabulary), student_alone)
    yield program(KD_DENSE, kd, functools.partial(dense_kd, Truncation("full")), inputs)
    for kept in truncations(vocabulary):
        block = min(tokens, heads.block_tokens(vocabulary, distillation(options, kept)))
        yield program(f"KD, blockwise, {kept.name}", kd, functools.partial(block_kd, kept, block), inputs, block)


def distillation(options: argparse.Namespace, kept: Truncation) -> Distillation:
    defaults = load_yml(str(CONFIGS / "base.yml"))
    settings = {key: defaults[key] for key in KDKeys.model_fields} | {
        "use_kd": True,
        "kd_alpha": ALPHA,
        "kd_temperature": TEMPERATURE,
        "kd_top_k": kept.top_k,
        "kd_top_p": kept.top_p,
        "kd_truncation_strategy": kept.strategy,
        "kd_block_mib": options.block_mib,
    }
    return Distillation(**settings)


# The whole step -------------------------------------------------------------------------------------------------------


def run_settings(options: argparse.Namespace, tokens: int, vocabulary: int, folder: str, **keys: Any) -> Run:
    """The smoke configuration with a student of the wanted width; the teacher is twice as wide."""
    length = math.gcd(tokens, SEQUENCE)
    width = options.width
    keys |= {
        "base_output_directory": folder,
        "run_name": "bench",
        "metrics_file": "",
        "enable_checkpointing": "false",
        "per_device_batch_size": tokens // length,
        "max_target_length": length,
        "vocab_size": vocabulary,
        "override_model_config": "true",
        "base_emb_dim": width,
        "base_mlp_dim": 4 * width,
        "head_dim": width // 4,
        "kd_teacher_parameters_path": "unread",
        "kd_teacher_overrides": f"{{base_emb_dim: {2 * width}, base_mlp_dim: {8 * width}, head_dim: {width // 2}}}",
        "kd_alpha": ALPHA,
        "kd_temperature": TEMPERATURE,
        "kd_block_mib": options.block_mib,
    }
    smoke = str(ROOT / "configs/smoke.yml")
    return resolve.initialize(["train.py", smoke, *(f"{key}={value}" for key, value in keys.items())])


def random_teacher(config: Any, mesh: Any) -> tuple[teacher.Teacher, nnx.GraphDef]:
    """A teacher with random values, and its graph before it was cut off at its hidden states."""
    shapes = teacher.abstract(config, mesh, "")
    create, model = upstream.model_creation_utils.create_nnx_abstract_model(config, mesh)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        state = jax.jit(lambda: nnx.state(create()), out_shardings=shapes.shardings)()
    return dataclasses.replace(shapes, state=state), nnx.graphdef(model)


def random_batch(config: Any) -> step.Batch:
    shape = (config.micro_batch_size_to_train_on, config.max_target_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (shape[0], shape[1] + 1))
    position = np.broadcast_to(np.arange(shape[1]), shape)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    for name in ("inputs", "targets"):
        batch |= {f"{name}_position": position, f"{name}_segmentation": np.ones(shape)}
    return {key: jnp.asarray(value, jnp.int32) for key, value in batch.items()}


def step_programs(options: argparse.Namespace, tokens: int, vocabulary: int, folder: str) -> Iterator[Program]:
    """Each row of the whole step, compiled when it is asked for."""
    plain = run_settings(options, tokens, vocabulary, folder, use_kd="false", num_vocab_tiling=TILES)
    run = run_settings(options, tokens, vocabulary, folder, use_kd="true")
    config, rules = run.student, run.student.logical_axis_rules
    recorder = upstream.start_engine(config)
    student = student_lib.set_up(config, recorder)
    guide, dense_graph = random_teacher(resolve_teacher(run, config.scan_layers), student.mesh)
    batch = random_batch(config)
    shape = (tokens, vocabulary, options.width, 2 * options.width)
    student_flops = 1e12 * upstream.tflops_per_step(config, None)
    teacher_flops = 1e12 * upstream.tflops_per_step(config, guide.config) - student_flops

    def updating(row: Row, traced: Any, state: nnx.State, *constants: Any) -> Program:
        """A train step that goes on from the state it returned: the one it was given is donated."""
        held = [jax.tree.map(jnp.copy, state)]
        compiled = traced.lower().compile()

        def call() -> Any:
            held[0], output = compiled(held[0], *constants, batch)
            return held[0], output

        return Program(analysed(row, compiled), call)

    ce_student = student_lib.set_up(plain.student, recorder)
    ce_row = Row("step", STEP_CE, *shape, flops=student_flops)
    yield updating(ce_row, train_compile.trace(plain.student, plain.kd, ce_student, None), ce_student.state)

    def forward(graphdef: nnx.GraphDef, to_logits: bool, state: nnx.State, batch: step.Batch) -> jax.Array:
        model = nnx.merge(graphdef, state, copy=True)
        if to_logits:
            return model(
                decoder_input_tokens=batch["inputs"],
                decoder_positions=batch["inputs_position"],
                decoder_segment_ids=batch["inputs_segmentation"],
                enable_dropout=False,
            )
        reported = step.forward(model, guide.config, batch, enable_dropout=False)
        return heads.normed_hidden_states(model, reported, enable_dropout=False)

    head_flops = 2 * tokens * vocabulary * 2 * options.width
    for name, graphdef, flops in (
        (TEACHER_LOGITS, dense_graph, teacher_flops),
        (TEACHER_HIDDEN, guide.graphdef, teacher_flops - head_flops),
    ):
        jitted = jax.jit(functools.partial(forward, graphdef, name == TEACHER_LOGITS))
        with jax.set_mesh(student.mesh), logical_axis_rules(rules):
            compiled = jitted.lower(guide.state, batch).compile()
        row = Row("step", name, *shape, flops=flops)
        yield Program(analysed(row, compiled), functools.partial(compiled, guide.state, batch))

    for kept in truncations(vocabulary):
        if kept.strategy != "renormalize":  # the loss rows show what the strategies cost
            continue
        changed = {"kd_top_k": kept.top_k, "kd_top_p": kept.top_p, "kd_truncation_strategy": kept.strategy}
        kd = run.kd.model_copy(update=changed)
        block = heads.block_size(student.mesh, config, kd)
        row = Row("step", f"{STEP_KD}, {kept.name}", *shape, flops=student_flops + teacher_flops, block=block)
        yield updating(row, train_compile.trace(config, kd, student, guide), student.state, guide.state)


# Measuring ------------------------------------------------------------------------------------------------------------


def analysed(row: Row, compiled: Any) -> Row:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return dataclasses.replace(
        row,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        xla_flops=cost.get("flops", math.nan),
    )


def measure(programs: Iterator[Program], rounds: int, title: str, bar: Progress) -> list[Row]:
    """Compiles every program, runs each once to warm up, then all in turn, `rounds` times; 0 runs none."""
    task = bar.add_task(f"{title}: compiling", total=None)
    compiled = []
    for program in programs:
        compiled.append(program)
        bar.update(task, description=f"{title}: compiled {program.row.name}")
    runnable = [program for program in compiled if rounds and fits(program.row)]
    bar.update(task, description=f"{title}: running", total=(rounds + 1) * len(runnable), completed=0)
    for number in range(rounds + 1):
        for program in runnable:
            start = time.perf_counter()
            jax.block_until_ready(program.call())
            if number > 0:
                program.row.seconds.append(time.perf_counter() - start)
            bar.advance(task)
    bar.remove_task(task)
    return [program.row for program in compiled]


def fits(row: Row) -> bool:
    """Whether the machine has the memory to run it."""
    return row.temp_bytes + row.output_bytes < 0.9 * psutil.virtual_memory().available


def ratio(rows: Sequence[Row], bases: Sequence[Row]) -> float:
    """Median over rounds of the rows' time over the bases' time in the same round; NaN if one was not run."""
    if not all(row.seconds for row in (*rows, *bases)):
        return math.nan
    above = [sum(times) for times in zip(*(row.seconds for row in rows), strict=True)]
    below = [sum(times) for times in zip(*(row.seconds for row in bases), strict=True)]
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row as it stands in the table and in the JSON file, with its time relative to that of others."""
    found = []
    for row in rows:
        shape = (row.group, row.tokens, row.vocabulary)
        beside = {other.name: other for other in rows if (other.group, other.tokens, other.vocabulary) == shape}
        entry = dataclasses.asdict(row) | {"median_seconds": row.median, "spread_seconds": row.spread}
        entry["to_tiled_ce"] = ratio([row], [beside[CE_TILED if row.group == "loss" else STEP_CE]])
        if row.name.startswith(STEP_KD):
            for key, name in (("to_ce_and_logits", TEACHER_LOGITS), ("to_ce_and_hidden", TEACHER_HIDDEN)):
                entry[key] = ratio([row], [beside[STEP_CE], beside[name]])
        found.append({key: finite(value) for key, value in entry.items()})
    return found


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


# What is shown --------------------------------------------------------------------------------------------------------

COLUMNS = ("", "N", "V", "block", "median s", "spread s", "x tiled CE", "temp MiB", "GFLOP", "XLA's GFLOP")


def cells(entry: dict[str, Any]) -> list[str]:
    """One entry of `compare` as the table's texts."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        entry["name"],
        str(entry["tokens"]),
        str(entry["vocabulary"]),
        number(entry["block"], "d"),
        number(entry["median_seconds"], ".3f"),
        number(entry["spread_seconds"], ".3f"),
        number(entry["to_tiled_ce"], ".2f"),
        f"{entry['temp_bytes'] / 2**20:.1f}",
        f"{entry['flops'] / 1e9:.4g}",
        number(entry["xla_flops"] and entry["xla_flops"] / 1e9, ".4g"),
    ]


def show(report: dict[str, Any], console: Console) -> None:
    titles = {"loss": "the loss alone: value and gradients", "step": "the whole step"}
    for group, title in titles.items():
        entries = [entry for entry in report["rows"] if entry["group"] == group]
        if not entries:
            continue
        table = Table(title=f"{title}, D {entries[0]['width']}, E {entries[0]['teacher_width']}", title_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for before, entry in zip([entries[0], *entries], entries, strict=False):
            if (before["tokens"], before["vocabulary"]) != (entry["tokens"], entry["vocabulary"]):
                table.add_section()
            table.add_row(*cells(entry))
        console.print(table)
    for entry in report["rows"]:
        if entry.get("to_ce_and_logits") is not None:
            console.print(
                f"{entry['name']}: {entry['to_ce_and_logits']:.3f} x (CE step + teacher forward to logits), "
                f"{entry['to_ce_and_hidden']:.3f} x (CE step + teacher forward to hidden states)"
            )
    if any(entry["median_seconds"] is None for entry in report["rows"]):
        why = "it needs more memory than is available" if report["rounds"] else "--rounds is 0"
        console.print(f"-: not run, since {why}")
    rounds = report["rounds"]
    timing = f" Median and spread (slowest less fastest) of {rounds} rounds." if rounds else ""
    console.print(
        f"{report['machine']['cpu_cores']} CPU cores, {report['machine']['device']}.{timing} GFLOP is counted from "
        "shapes, for the loss of a distillation 2 N V (3 D + E); XLA's count takes the body of each loop once."
    )


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "jaxlib", "flax")}
    return {
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "load_at_start": os.getloadavg()[0],
    }


def write(path: Path, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Puts what is measured so far into the report and its file: a run that is cut short leaves the shapes before."""
    report["rows"] = compare(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


# Command line ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage before it."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def whole(text: str, least: int = 1) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Measures the distillation loss and the whole step on this machine.")
    sizes: dict[str, Any] = {"type": whole, "metavar": "N"}
    parser.add_argument("--tokens", nargs="+", default=[1024], help="tokens of a batch (default 1024)", **sizes)
    parser.add_argument("--vocabulary", nargs="+", default=[32768], help="vocabulary sizes (default 32768)", **sizes)
    parser.add_argument("--width", default=512, help="the student's width (default 512)", **sizes)
    parser.add_argument("--teacher-width", default=512, help="the teacher's, in the loss rows (default 512)", **sizes)
    parser.add_argument("--block-mib", default=256, help="kd_block_mib, the budget of a block (default 256)", **sizes)
    rounds: dict[str, Any] = {"type": functools.partial(whole, least=0), "metavar": "N", "default": 5}
    parser.add_argument("--rounds", help="timed rounds after one to warm up; 0 only compiles (default 5)", **rounds)
    parser.add_argument("--only", choices=("loss", "step"), help="only these rows")
    parser.add_argument("--full", action="store_true", help="2048 and 8192 tokens by 32768 and 131072: hours on CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench", help="folder of benchmark.json (runs/bench)")
    options = parser.parse_args(argv)
    if options.full:
        options.tokens, options.vocabulary = [2048, 8192], [32768, 131072]
    for tokens in options.tokens:
        if tokens % TILES:
            parser.error(f"argument --tokens: {tokens}: expected a multiple of {TILES}, for upstream's tiling")
    if options.width % 8 and options.only != "loss":
        parser.error(f"argument --width: {options.width}: expected a multiple of 8, for the student's 4 heads")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out}: is no folder")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    jax.config.update("jax_enable_compilation_cache", False)  # a program from a cache has no analysis
    report: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "block_mib": options.block_mib}
    with upstream.silence():  # importing the engine takes seconds, and says much
        upstream.pre_train.vocab_tiling_nnx_loss  # noqa: B018
    rows: list[Row] = []
    path = options.out / "benchmark.json"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        tempfile.TemporaryDirectory() as folder,
    ):
        if options.only != "step":
            for tokens, vocabulary in [(n, v) for n in options.tokens for v in options.vocabulary]:
                title = f"loss, N {tokens}, V {vocabulary}"
                rows += measure(loss_programs(options, tokens, vocabulary), options.rounds, title, bar)
                write(path, report, rows)
        if options.only != "loss":
            programs = step_programs(options, options.tokens[0], options.vocabulary[0], folder)
            rows += measure(programs, options.rounds, "step", bar)
            write(path, report, rows)
    show(report, console)
    console.print(f"written: {path}", soft_wrap=True)
    return report


if __name__ == "__main__":
    with errors_as_lines(refused=ConfigError):
        main()
