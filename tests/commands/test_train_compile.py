"""Laws of the compilation without hardware: what it reports, and what the compiled step holds and moves."""

import collections
import json
import math
import re

import jax
import pytest
from conftest import SMOKE, WITHOUT_LIBTPU, call_apart, execute
from flax import nnx

from MaxText import train_compile, upstream
from MaxText.compiled.cost import gigabytes
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher
from MaxText.loop import parts
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

PROGRAM = ["MaxText/train_compile.py"]
WIDTH, LENGTH = 64, 32  # of tiny-llama and of the smoke run


def abstract(**keys):
    """Run, student and teacher of the smoke run with `keys`, as `train_compile.main` has them before it traces."""
    run = train_compile.initialize(["", SMOKE, *(f"{key}={value}" for key, value in keys.items())])
    config = run.student
    upstream.start_engine(config)
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    student = train_compile.abstract_student(config, mesh)
    teacher = None
    if run.kd.use_kd:
        teacher_config = resolve_teacher(run, config.scan_layers)
        teacher = teacher_lib.abstract(teacher_config, mesh, run.kd.kd_teacher_dtype)
    return run, student, teacher


def compiled(**keys):
    run, student, teacher = abstract(**keys)
    return train_compile.trace(run.student, run.kd, student, teacher).lower().compile(), teacher


def parameter_bytes(teacher) -> int:
    """Per device. Unused random streams are no arguments of the compiled step."""
    state = nnx.filter_state(teacher.state, nnx.Param)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


# The compiled program, read from its text -----------------------------------------------------------------------------


def elements(shapes: str) -> int:
    """Of the largest array in a text that holds types as f32[4,32]."""
    sizes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", shapes)
    return max((math.prod(int(n) for n in size.split(",") if n) for size in sizes), default=0)


def computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            body = found.setdefault(header.group(1), [])
        elif " = " in line:
            body.append(line.strip())
    return found


def collectives(text: str) -> tuple[list[int], list[int]]:
    """Elements that collectives give, outside of loops and inside."""
    bodies = computations(text)
    inside: set[str] = set()
    todo = re.findall(r"\bbody=%?([\w.-]+)", text)
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            called = re.findall(
                r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)", "\n".join(bodies[name])
            )
            todo += called
    kinds = r"(?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    sizes: tuple[list[int], list[int]] = ([], [])
    for name, lines in bodies.items():
        for line in lines:
            if re.search(rf" {kinds}", line):
                sizes[name in inside].append(elements(re.split(rf" {kinds}", line)[0]))
    return sizes


def largest(text: str) -> int:
    return max(elements(line) for lines in computations(text).values() for line in lines)


# On the devices of this machine ---------------------------------------------------------------------------------------


def check_four_devices():
    """In a process with four devices: FSDP, the loss with heads sharded (pooled) and with heads gathered."""
    keys = {"per_device_batch_size": 16, "ici_fsdp_parallelism": 4, "kd_block_mib": 1}
    tokens = 16 * LENGTH
    for vocabulary, heads_are_gathered in ((8192, False), (1024, True)):
        size = {"override_model_config": "true", "vocab_size": vocabulary}
        kd, teacher = compiled(**keys, **size, use_kd="true")
        assert largest(kd.as_text()) < tokens * vocabulary

        outside, inside = collectives(kd.as_text())
        assert inside and max(inside) < WIDTH * vocabulary / 4, (vocabulary, inside)
        assert (max(outside) >= WIDTH * vocabulary) == heads_are_gathered, (vocabulary, outside)

        if not heads_are_gathered:
            without, _ = compiled(**keys, **size)
            assert largest(without.as_text()) >= tokens * vocabulary
            assert kd.memory_analysis().temp_size_in_bytes < without.memory_analysis().temp_size_in_bytes
            added = kd.memory_analysis().argument_size_in_bytes - without.memory_analysis().argument_size_in_bytes
            assert added == parameter_bytes(teacher), (added, parameter_bytes(teacher))


def test_the_compiled_step_holds_no_logits_of_all_tokens_and_moves_no_head_in_a_loop(tmp_path):
    call_apart(check_four_devices, devices=4, folder=tmp_path)


@pytest.fixture(scope="module")
def plain():
    """The bytes of the arguments without a teacher."""
    return compiled()[0].memory_analysis().argument_size_in_bytes


def test_a_teacher_adds_its_bytes_to_the_arguments_in_the_type_it_is_held_in(plain):
    step, teacher = compiled(use_kd="true", kd_teacher_dtype="bfloat16")
    whole, half = parameter_bytes(abstract(use_kd="true")[-1]), parameter_bytes(teacher)
    assert step.memory_analysis().argument_size_in_bytes - plain == half
    assert 1.99 < whole / half <= 2


def products_by_part(step) -> dict[str, int]:
    places = re.findall(r'op_name="([^"]*/dot_general)"', step.as_text())
    return collections.Counter(map(parts.part_of, places))


def test_alpha_zero_compiles_the_step_without_a_teacher(plain):
    zero, _ = compiled(use_kd="true", kd_alpha=0)
    assert zero.memory_analysis().argument_size_in_bytes == plain
    assert products_by_part(zero).keys() == {parts.FORWARD, parts.BACKWARD}


def test_each_product_of_the_step_is_of_a_part_that_has_flops():
    run, student, teacher = abstract(use_kd="true", kd_teacher_overrides="{base_num_decoder_layers: 3}")
    step = train_compile.trace(run.student, run.kd, student, teacher).lower().compile()
    asked = parts.flops(run.student, teacher.config, run.kd)
    assert products_by_part(step).keys() == {part for part, flops in asked.items() if flops > 0}
    assert sum(asked.values()) == pytest.approx(1e12 * upstream.tflops_per_step(run.student, teacher.config))


MORE = [pytest.param(keys, marks=pytest.mark.slow) for keys in ({}, {"use_kd": "false"})]


@pytest.mark.parametrize("keys", [{"kd_top_k": 8}, {"kd_top_p": 0.9}, *MORE], ids=str)
def test_the_step_can_be_lowered_for_cuda(keys):
    run, student, teacher = abstract(**({"use_kd": "true", "hardware": "gpu"} | keys))
    traced = train_compile.trace(run.student, run.kd, student, teacher)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in program and "tpu_custom_call" not in program


def test_the_row_in_the_metrics_file_is_what_is_printed(tmp_path, capsys):
    file = tmp_path / "new/folder/metrics.jsonl"
    arguments = ["", SMOKE, "use_kd=true", "kd_teacher_parameters_path=/no/such/teacher", f"metrics_file={file}"]
    assert train_compile.main(arguments) == 0
    printed = capsys.readouterr().out
    (row,) = map(json.loads, file.read_text().splitlines())
    for line, key in (("arguments", "argument"), ("outputs", "output"), ("temporary", "temp"), ("memory", "total")):
        expected = gigabytes(row[f"compile/{key}_bytes"])
        assert re.search(rf"^ *{line}  {re.escape(expected)}", printed, re.MULTILINE), (line, expected, printed)
    assert f"{row['compile/model_flops']:.4g} per device" in printed
    assert f"{row['compile/flops']:.4g} by XLA" in printed and f"{row['compile/bytes_accessed']:.4g}" in printed
    assert row["compile/alias_bytes"] > 0 and row["run_name"] == "student"


# For a TPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_LIBTPU, reason="libtpu is not installed (bash setup.sh tpu)")
@pytest.mark.parametrize(
    ("devices", "layout"),
    [
        (4, []),
        (8, ["compile_topology_num_slices=2", "dcn_data_parallelism=2", "ici_fsdp_parallelism=4"]),
        (8, ["compile_topology_num_slices=2", "dcn_fsdp_parallelism=2", "ici_tensor_parallelism=2"]),
    ],
    ids=str,
)
def test_the_step_compiles_for_a_topology_that_is_not_here(devices, layout, tmp_path):
    file = tmp_path / "metrics.jsonl"
    distil = ["use_kd=true", "compile_topology=v5e-4", "kd_top_k=8", f"metrics_file={file}"]
    result = execute(PROGRAM, [SMOKE, *distil, *layout], tmp_path)
    assert result.status == 0, result.output[-4000:]
    assert f"4 rows of {LENGTH} positions" in result.output
    assert f"{devices} x TPU v5 lite" in result.output and "on a v5e: fits" in result.output
    row = json.loads(file.read_text())
    assert row["compile/fits"] == 1 and row["compile/devices"] == devices
    assert 0 < row["compile/temp_bytes"] < row["compile/available_bytes"]
    assert row["compile/roofline_compute_seconds"] == pytest.approx(row["compile/model_flops"] / 197e12)
    names = ("teacher", "student_forward", "loss", "backward", "optimizer")
    for quantity in ("estimated_seconds", "network_bytes", "memory_bytes"):
        each = [row[f"compile/{name}_{quantity}"] for name in names]
        assert row[f"compile/{quantity}"] == pytest.approx(sum(each)) and sum(each) > 0, quantity
        assert min(each) > 0 or quantity == "network_bytes"  # of the teacher none, where each device holds all of it
    assert row["compile/most_estimated_seconds"] >= row["compile/estimated_seconds"] > 0
    assert re.search(r"loops  rounds: .*loss 1", result.output) and "look at  " in result.output


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_LIBTPU, reason="libtpu is not installed (bash setup.sh tpu)")
def test_a_step_that_is_too_large_says_so_and_ends_with_status_1(tmp_path):
    file = tmp_path / "metrics.jsonl"
    large = ["compile_topology=v5e-4", "override_model_config=true", "vocab_size=32768", "max_target_length=8192"]
    result = execute(PROGRAM, [SMOKE, *large, "per_device_batch_size=64", f"metrics_file={file}"], tmp_path)
    assert result.status == 1, result.output[-4000:]
    assert "does not fit: Ran out of memory" in result.output
    assert json.loads(file.read_text())["compile/fits"] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compile_topology=v5e-17"], ["compile_topology='v5e-17'", "v5e-16", "v6e"]),
        (["compile_topology_num_slices=two", "compile_topology=a3"], ["compile_topology_num_slices='two'", "integer"]),
        (["use_kd=true", "kd_aplha=1"], ["kd_aplha=1", "kd_alpha"]),
        *([(["compile_topology=v5e-16"], ["libtpu", "bash setup.sh tpu"])] if WITHOUT_LIBTPU else []),
    ],
    ids=str,
)
def test_bad_input_is_one_line_that_names_it(arguments, named):
    with pytest.raises(ConfigError) as refused:
        train_compile.main(["", SMOKE, *arguments])
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in named), message


def test_bad_input_ends_the_command_with_one_line_and_status_2(tmp_path):
    result = execute(PROGRAM, [SMOKE, "compile_topology=v5e-17"], tmp_path)
    assert result.status == 2, result.output[-4000:]
    assert "Traceback" not in result.output
    assert result.output.strip().splitlines()[-1].startswith("error: compile_topology='v5e-17'")
