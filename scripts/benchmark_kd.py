"""Measures the distillation loss and the whole step: time in paired rounds, XLA's memory and FLOPs beside it.

    make bench                                                the default sizes: some 10 minutes on 2 cores (estimated)
    python scripts/benchmark_kd.py --full                     the whole grid; what does not fit in memory is not timed
    python scripts/benchmark_kd.py --only loss --tokens 512 --rounds 3
    python scripts/benchmark_kd.py --full --rounds 0          memory and FLOPs alone: compiled, not run

All rows of one shape take turns, round by round, in one process: a drift of the machine hits all alike, and ratios are
medians of the ratios within each round. No token is masked. On a TPU or GPU the default sizes are those of real models,
in bfloat16; where torch and liger_kernel are installed too, Liger's fused loss is measured first, on the same GPU. The
table is printed and everything that was measured, each round's seconds included, is written to <out>/benchmark.json.

What the loss rows compute: the sum's value and its gradients for the hidden states [N, D] and the head [D, V]. What
the step rows compute: a Llama-like student of width D and a teacher of width 2 D, both with random values.
Left out on purpose: more than one device.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from MaxText import upstream
from MaxText.benchmarks.loss import loss_programs, peers
from MaxText.benchmarks.programs import TILES, Row, Sizes
from MaxText.benchmarks.table import machine, show, write
from MaxText.benchmarks.timing import measure
from MaxText.benchmarks.whole_step import step_programs
from MaxText.config.keys import ConfigError
from MaxText.console import errors_as_lines

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS_ON_CPU: dict[str, Any] = {
    "tokens": [1024],
    "vocabulary": [32768],
    "width": 512,
    "teacher_width": 512,
    "dtype": "float32",
}
DEFAULTS: dict[str, Any] = {  # Llama 3.1 8B teaches Llama 3.2 1B
    "tokens": [8192],
    "vocabulary": [128256],
    "width": 2048,
    "teacher_width": 4096,
    "dtype": "bfloat16",
}


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
    several = sizes | {"nargs": "+"}
    parser.add_argument("--tokens", help="tokens of a batch (1024; 8192 on accelerators)", **several)
    parser.add_argument("--vocabulary", help="vocabulary sizes (32768; 128256)", **several)
    parser.add_argument("--width", help="the student's width (512; 2048)", **sizes)
    parser.add_argument("--teacher-width", help="the teacher's, in the loss rows (512; 4096)", **sizes)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="computed in (float32; bfloat16)")
    ceiling: dict[str, Any] = {"type": functools.partial(whole, least=0), "metavar": "N", "default": 0}
    parser.add_argument("--block-mib", help="kd_block_mib, a block's ceiling; 0 as the trainer chooses", **ceiling)
    rounds: dict[str, Any] = {"type": functools.partial(whole, least=0), "metavar": "N", "default": 5}
    parser.add_argument("--rounds", help="timed rounds after one to warm up; 0 only compiles (default 5)", **rounds)
    parser.add_argument("--only", choices=("loss", "step"), help="only these rows")
    parser.add_argument("--full", action="store_true", help="2048 and 8192 tokens by 32768 and 131072: hours on CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench", help="folder of benchmark.json (runs/bench)")
    options = parser.parse_args(argv)
    for name, default in (DEFAULTS_ON_CPU if jax.devices()[0].platform == "cpu" else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
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
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others are measured on the same GPU
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    jax.config.update("jax_enable_compilation_cache", False)  # a program from a cache has no analysis
    report: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "block_mib": options.block_mib}
    report["dtype"] = options.dtype
    with upstream.silence():  # importing the engine takes seconds, and says much
        upstream.pre_train.vocab_tiling_nnx_loss  # noqa: B018
    sizes = Sizes(options.width, options.teacher_width, options.block_mib, options.dtype)
    rows: list[Row] = []
    path = options.out / "benchmark.json"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        tempfile.TemporaryDirectory() as folder,
    ):
        if options.only != "step":
            for tokens, vocabulary in [(n, v) for n in options.tokens for v in options.vocabulary]:
                rows += peers(sizes, tokens, vocabulary, options.rounds)
                title = f"loss, N {tokens}, V {vocabulary}"
                rows += measure(loss_programs(sizes, tokens, vocabulary), options.rounds, title, bar)
                write(path, report, rows)
        if options.only != "loss":
            smoke = ROOT / "configs/smoke.yml"
            programs = step_programs(sizes, options.tokens[0], options.vocabulary[0], smoke, folder)
            rows += measure(programs, options.rounds, "step", bar)
            write(path, report, rows)
    show(report, console)
    console.print(f"written: {path}", soft_wrap=True)
    return report


if __name__ == "__main__":
    with errors_as_lines(refused=ConfigError):
        main()
