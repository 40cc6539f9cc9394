"""Laws of the recipes in configs/: each says what it costs and where that is from, and its step can be built."""

import json
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT, WITHOUT_LIBTPU, Result, call_apart, execute, run_in_this_process
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import train_compile, upstream
from MaxText.config import resolve
from MaxText.config.teacher import resolve_teacher
from MaxText.data import coverage
from MaxText.models import teacher as teacher_lib

SHARED = "recipe.yml"
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yml") if path.name not in (SHARED, "smoke.yml"))
DEVICES = 64  # of the largest topology that a recipe names


def text(recipe):
    return (ROOT / "configs" / recipe).read_text()


def topology(recipe):
    return re.search(r"TOPOLOGY=(\S+)", text(recipe))[1]


def initialized(recipe, *arguments):
    given = ["train.py", str(ROOT / "configs" / recipe), "base_output_directory=runs", "hardware=cpu", *arguments]
    return resolve.initialize([*given, "skip_jax_distributed_system=true"])


def test_there_are_recipes_and_each_leads_to_the_shared_settings():
    assert len(RECIPES) >= 7
    for recipe in RECIPES:
        base = re.search(r"^base_config: (\S+)$", text(recipe), re.MULTILINE)[1]
        assert base == SHARED or base in RECIPES, recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_what_a_user_asks_first(recipe):
    header = text(recipe).split("base_config")[0]
    for entry in ("command", "fits?", "hardware", "cost", "tokens", "begins", "expect"):
        assert re.search(rf"^#   {re.escape(entry)} +\S", header, re.MULTILINE), entry
    assert f"configs/{recipe}" in header
    assert re.search(r"\d GB a chip.*\d ms", " ".join(header.split())), "the cost of a step, as compiled"
    assert re.search(rf"^#   hardware +TPU {topology(recipe)},", header, re.MULTILINE)


def begins_fresh(recipe):
    """By its header, whose command must agree."""
    word = re.search(r"^#   begins +(\w+)", text(recipe), re.MULTILINE)[1]
    assert word in ("fresh", "cut", "trained")
    assert (word != "fresh") == ("load_parameters_path=" in text(recipe).split("#   fits?")[0])
    return word == "fresh"


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_the_first_cross_entropy_to_expect(recipe):
    """That of a fresh student is log(vocabulary) and what logits of a deviation of about one add to it."""
    vocabulary = initialized(recipe).student.vocab_size
    header = " ".join(line.lstrip("# ") for line in text(recipe).split("base_config")[0].splitlines())
    guessing = re.search(r"guessing has ([\d.]+)", header)
    assert float(guessing[1]) == pytest.approx(math.log(vocabulary), abs=0.05)
    named = re.search(r"expect +a first cross-entropy (?:of|below) ([\d.]+)", header)
    assert named, "no first cross-entropy"
    if begins_fresh(recipe):
        assert math.log(vocabulary) <= float(named[1]) < math.log(vocabulary) + 1
    else:
        assert float(named[1]) < math.log(vocabulary)


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_teacher_fits_its_student(recipe):
    run = initialized(recipe)
    teacher = resolve_teacher(run, scan_layers=True)
    assert run.kd.use_kd and teacher.vocab_size == run.student.vocab_size
    tokens = re.search(r"([\d,]+) a step", text(recipe))
    if tokens:
        devices = int(topology(recipe).rpartition("-")[2])
        a_step = run.student.per_device_batch_size * run.student.max_target_length * devices
        assert int(tokens[1].replace(",", "")) == a_step


def blocks(document):
    """The yml of a document: of README the student's, of docs/data.md those that read by grain."""
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return [text for text in found if "dataset_type: grain" in text]


@pytest.mark.e2e
def test_recipes_and_documents_read_all_of_a_document(tmp_path):
    for recipe in RECIPES:
        config = initialized(recipe).student  # a conversation is never read on in the next row
        assert coverage.cut_by(config) == ("use_sft=True" if config.use_sft else ""), recipe
    for document, count in (("README.md", 1), ("docs/data.md", 2)):
        texts = blocks(document)
        assert len(texts) == count
        for text in texts:
            config = yaml.safe_load(text) | {"base_config": "base.yml", "base_output_directory": str(tmp_path)}
            (tmp_path / "student.yml").write_text(yaml.safe_dump(config))
            arguments = ["hardware=cpu", "skip_jax_distributed_system=true", "metrics_file="]
            run = resolve.initialize(["train.py", str(tmp_path / "student.yml"), *arguments])
            assert coverage.cut_by(run.student) == "", text
    for config in ("teacher", "student"):
        run = resolve.initialize(["train.py", str(ROOT / f"configs/demo/{config}.yml")])
        assert coverage.cut_by(run.student) == "", config


def lower(recipe):
    """In a process with as many devices as the recipe's topology has: its step, traced and lowered, on shapes alone."""
    run = train_compile.initialize(
        ["", str(ROOT / "configs" / recipe), "hardware=cpu", "base_output_directory=runs", "attention=dot_product"]
    )
    upstream.start_engine(run.student)
    mesh = upstream.maxtext_utils.get_mesh_from_config(run.student)
    student = train_compile.abstract_student(run.student, mesh)
    teacher = teacher_lib.abstract(resolve_teacher(run, True), mesh, run.kd.kd_teacher_dtype)
    program = train_compile.trace(run.student, run.kd, student, teacher).lower().as_text()
    assert "stablehlo.while" in program
    length, vocabulary = run.student.max_target_length, run.student.vocab_size
    tokens = run.student.micro_batch_size_to_train_on * length
    assert f"x{length}x{vocabulary}x" not in program and f"<{tokens}x{vocabulary}x" not in program


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_step_can_be_lowered(recipe, tmp_path):
    call_apart(lower, recipe, devices=int(topology(recipe).rpartition("-")[2]), folder=tmp_path)


# What is shrunk of a recipe: depth, vocabulary, and what is within its layers. Its width, heads, head, beginning,
# learning rate, clipping and loss stay, and the schedules, of a hundred steps.
VOCABULARY = 512
SHRUNK: dict[str, Any] = {
    "override_model_config": "true",
    "vocab_size": VOCABULARY,
    "base_num_decoder_layers": 2,
    "base_mlp_dim": 256,
    "dtype": "float32",
    "attention": "dot_product",
    "ici_data_parallelism": 1,
    "ici_fsdp_parallelism": 1,
    "dataset_type": "synthetic",
    "per_device_batch_size": 4,
    "max_target_length": 32,
    "eval_interval": -1,
    "steps": 10,
    "learning_rate_schedule_steps": 100,
}
# A Gemma's token just read echoes in its logits by sqrt(width / (1 + 2 layers)): of two layers it must be narrow, too.
# The recovery's student is trained first, which at its own width takes a minute more.
NARROW = {
    "gemma3-12b-to-4b.yml": {"base_emb_dim": 256, "base_num_decoder_layers": 6},
    "qwen3-1.7b-recovery.yml": {"base_emb_dim": 512},
}
EXPERTS = {"num_experts": 4, "base_moe_mlp_dim": 64, "sparse_matmul": "false", "megablox": "false"}


@pytest.fixture(scope="module")
def knowing(train):
    """A tiny teacher that has learned the one batch of random tokens which there is."""
    keys = {"override_model_config": "true", "vocab_size": VOCABULARY, "steps": 60, "checkpoint_period": 60}
    return train("knowing", **keys).folder / "checkpoints"


def ten_steps(recipe: str, teacher: pathlib.Path, folder: pathlib.Path, **keys: Any) -> Result:
    keys = SHRUNK | NARROW.get(recipe, {}) | {"kd_teacher_parameters_path": teacher} | keys
    if initialized(recipe).student.num_experts > 1:
        keys |= EXPERTS
    if "kd_teacher_overrides" not in keys:
        keys |= {"kd_teacher_model_name": "tiny-llama", "kd_teacher_overrides": f"{{vocab_size: {VOCABULARY}}}"}
    keys |= {"hardware": "cpu", "skip_jax_distributed_system": "true", "enable_checkpointing": "false"}
    keys |= {"base_output_directory": folder, "run_name": "run", "metrics_file": folder / "metrics.jsonl"}
    arguments = [str(ROOT / "configs" / recipe), *(f"{key}={value}" for key, value in keys.items())]
    return run_in_this_process(arguments, folder)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_student_begins_near_guessing_and_learns_from_its_first_steps(recipe, knowing, train, tmp_path):
    guessing = math.log(VOCABULARY)
    if begins_fresh(recipe):
        ce = ten_steps(recipe, knowing, tmp_path).column("learning/ce_loss")
        assert ce[0] == pytest.approx(guessing, abs=1)
    else:
        teacher, pruned = cut_student(train, recipe, tmp_path)
        overrides = {key: SHRUNK[key] for key in ("vocab_size", "base_num_decoder_layers", "base_mlp_dim")}
        overrides |= NARROW.get(recipe, {})
        given = {"kd_teacher_overrides": json.dumps(overrides), "load_parameters_path": pruned}
        given["kd_teacher_model_name"] = yaml.safe_load(text(recipe))["model_name"]  # what it was cut from
        ce = ten_steps(recipe, teacher, tmp_path, **given).column("learning/ce_loss")
        assert ce[0] < guessing
    assert len(ce) == 10 and ce[-1] < ce[0] - 0.1 and max(ce) < ce[0] + 0.1


def cut_student(train: Any, recipe: str, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The recipe's model, having learned the batch, and the same without the smaller half of each layer's matrices."""
    name = yaml.safe_load(text(recipe))["model_name"]
    own = (
        SHRUNK
        | NARROW.get(recipe, {})
        | {"model_name": name, "steps": 40, "learning_rate": 1e-3, "kd_embedding_std": 0.02}
    )
    trained = train(f"to_cut_{name}", **own)
    tree = ocp.load(trained.folder / "checkpoints/39", checkpointable_name="items")["params"]

    def without_the_small(path: Any, x: Any) -> Any:
        value = np.asarray(x)
        is_matrix = any(getattr(part, "key", "") == "layers" for part in path) and value.ndim > 2
        return np.where(np.abs(value) < np.quantile(np.abs(value), 0.9), 0, value) if is_matrix else value

    cut = jax.tree_util.tree_map_with_path(without_the_small, tree)
    upstream.checkpointing.save_params_to_path(str(folder / "cut"), cut)
    return trained.folder / "checkpoints", folder / "cut/items"


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(WITHOUT_LIBTPU, reason="libtpu is not installed (bash setup.sh tpu)")
def test_a_recipe_fits_as_it_says(tmp_path):
    """Of the flagship alone: compiling one takes a minute."""
    recipe = "qwen3-4b-to-0.6b.yml"
    file = tmp_path / "metrics.jsonl"
    arguments = [f"configs/{recipe}", f"compile_topology={topology(recipe)}", f"metrics_file={file}"]
    result = execute(["MaxText/train_compile.py"], arguments, tmp_path)
    assert result.status == 0, result.output[-4000:]
    row, said = json.loads(file.read_text()), re.search(r"([\d.]+) GB a chip", text(recipe))
    assert row["compile/fits"] == 1
    assert row["compile/total_bytes"] / 1e9 == pytest.approx(float(said[1]), rel=0.1)
