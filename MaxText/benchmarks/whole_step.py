"""The whole step: a Llama-like student of width D and a teacher of width 2 D, both with random values.

Beside it stand what it is made of: upstream's step on cross-entropy, and a forward pass of the teacher. And the two
halves that a cache makes of it: the teacher's targets, and the step that learns from them.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import train_compile, upstream
from MaxText.benchmarks import loss, programs
from MaxText.benchmarks.programs import Program, Row, Sizes
from MaxText.config import resolve
from MaxText.config.resolve import Run
from MaxText.config.teacher import resolve_teacher
from MaxText.data import cached
from MaxText.loop import step, targets
from MaxText.models import heads, teacher
from MaxText.models import student as student_lib

SEQUENCE = 512  # positions of a row, at most


def run_settings(sizes: Sizes, tokens: int, vocabulary: int, smoke: Path, folder: str, **keys: Any) -> Run:
    """The smoke configuration with a student of the wanted width; the teacher is twice as wide."""
    length = math.gcd(tokens, SEQUENCE)
    width = sizes.width
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
        "kd_alpha": programs.ALPHA,
        "kd_temperature": programs.TEMPERATURE,
        "kd_block_mib": sizes.block_mib,
        "dtype": sizes.dtype,
    }
    return resolve.initialize(["train.py", str(smoke), *(f"{key}={value}" for key, value in keys.items())])


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


def step_programs(sizes: Sizes, tokens: int, vocabulary: int, smoke: Path, folder: str) -> Iterator[Program]:
    """Each row of the whole step, compiled when it is asked for.

    Args:
      sizes, tokens, vocabulary: of the models and of the batch.
      smoke: the configuration that the run is made of.
      folder: for what a run writes.
    """
    plain = run_settings(sizes, tokens, vocabulary, smoke, folder, use_kd="false", num_vocab_tiling=programs.TILES)
    run = run_settings(sizes, tokens, vocabulary, smoke, folder, use_kd="true")
    config, rules = run.student, run.student.logical_axis_rules
    recorder = upstream.start_engine(config)
    student = student_lib.set_up(config, recorder)
    guide, dense_graph = random_teacher(resolve_teacher(run, config.scan_layers), student.mesh)
    batch = random_batch(config)
    shape = (tokens, vocabulary, sizes.width, 2 * sizes.width)
    student_flops = 1e12 * upstream.tflops_per_step(config, None)
    teacher_flops = 1e12 * upstream.tflops_per_step(config, guide.config) - student_flops

    def updating(row: Row, traced: Any, state: nnx.State, *constants: Any, batch: step.Batch = batch) -> Program:
        """A train step that goes on from the state it returned: the one it was given is donated."""
        held = [jax.tree.map(jnp.copy, state)]
        compiled = traced.lower().compile()

        def call() -> Any:
            held[0], output = compiled(held[0], *constants, batch)
            return held[0], output

        return Program(programs.analysed(row, compiled), call)

    ce_student = student_lib.set_up(plain.student, recorder)
    ce_row = Row("step", programs.STEP_CE, *shape, flops=student_flops)
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

    head_flops = 2 * tokens * vocabulary * 2 * sizes.width
    for name, graphdef, flops in (
        (programs.TEACHER_LOGITS, dense_graph, teacher_flops),
        (programs.TEACHER_HIDDEN, guide.graphdef, teacher_flops - head_flops),
    ):
        jitted = jax.jit(functools.partial(forward, graphdef, name == programs.TEACHER_LOGITS))
        with jax.set_mesh(student.mesh), logical_axis_rules(rules):
            compiled = jitted.lower(guide.state, batch).compile()
        row = Row("step", name, *shape, flops=flops)
        yield Program(programs.analysed(row, compiled), functools.partial(compiled, guide.state, batch))

    for kept in programs.truncations(vocabulary):
        if kept.strategy != "renormalize":  # the loss rows show what the strategies cost
            continue
        changed = {"kd_top_k": kept.top_k, "kd_top_p": kept.top_p, "kd_truncation_strategy": kept.strategy}
        kd = run.kd.model_copy(update=changed)
        block = heads.walk_of(student.mesh, config, guide.config, kd).block
        row = Row("step", f"{programs.STEP_KD}, {kept.name}", *shape, flops=student_flops + teacher_flops, block=block)
        yield updating(row, train_compile.trace(config, kd, student, guide), student.state, guide.state)

    for kept in programs.stored(vocabulary):
        if kept.strategy != "renormalize":
            continue
        changed = {
            "kd_top_k": kept.top_k,
            "kd_cache_draws": programs.DRAWS,
            "kd_cache_mode": "top_k" if kept.top_k else "sample",
        }
        kd = run.kd.model_copy(update=changed)
        block = heads.walk_of(student.mesh, config, None, kd).block
        keyed = batch | {targets.ROW_KEY: jnp.arange(batch["targets"].shape[0], dtype=jnp.uint32)}
        with jax.set_mesh(student.mesh):
            compiled = targets.jitted(config, kd, guide, student.mesh).lower(guide.state, keyed).compile()
        row = Row("step", f"{programs.CACHING}, {kept.name}", *shape, flops=teacher_flops, block=block)
        yield Program(programs.analysed(row, compiled), functools.partial(compiled, guide.state, keyed))

        kd = kd.model_copy(update={"kd_cache_path": "unread", "kd_teacher_parameters_path": ""})
        learner = dataclasses.replace(student, cached=cached.assumed(config, kd))
        stored = loss.stored_targets(kept, batch["targets"].shape, vocabulary)
        numbers: dict[str, Any] = {
            "teacher_ids": stored.ids,
            "teacher_log_weights": stored.log_weights,
            "teacher_target_log_prob": stored.target_log_prob,
            "teacher_entropy": stored.entropy,
        } | ({"teacher_log_tail": stored.log_tail} if kept.top_k else {})
        row = Row("step", f"{programs.STEP_STORED}, {kept.name}", *shape, flops=student_flops, block=block)
        traced = train_compile.trace(config, kd, learner, None)
        yield updating(row, traced, student.state, None, batch=batch | numbers)
