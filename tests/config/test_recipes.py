"""Laws of the recipes in configs/: each says what it costs and where that is from, and its step can be built."""

import json
import re

import pytest
import yaml
from conftest import ROOT, WITHOUT_LIBTPU, call_apart, execute

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
    for entry in ("command", "fits?", "hardware", "cost", "tokens", "expect"):
        assert re.search(rf"^#   {re.escape(entry)} +\S", header, re.MULTILINE), entry
    assert f"configs/{recipe}" in header
    assert re.search(r"\d GB a chip.*\d ms", " ".join(header.split())), "the cost of a step, as compiled"
    assert re.search(rf"^#   hardware +TPU {topology(recipe)},", header, re.MULTILINE)


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
        assert coverage.cut_by(initialized(recipe).student) == "", recipe
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


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(WITHOUT_LIBTPU, reason="libtpu is not installed (bash setup.sh tpu)")
@pytest.mark.parametrize("recipe", ("qwen3-4b-to-0.6b.yml", "qwen3-1.7b-recovery.yml"))
def test_a_recipe_fits_as_it_says(recipe, tmp_path):
    file = tmp_path / "metrics.jsonl"
    arguments = [f"configs/{recipe}", f"compile_topology={topology(recipe)}", f"metrics_file={file}"]
    result = execute(["MaxText/train_compile.py"], arguments, tmp_path)
    assert result.status == 0, result.output[-4000:]
    row, said = json.loads(file.read_text()), re.search(r"([\d.]+) GB a chip", text(recipe))
    assert row["compile/fits"] == 1
    assert row["compile/total_bytes"] / 1e9 == pytest.approx(float(said[1]), rel=0.1)
