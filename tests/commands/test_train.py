"""Laws of the trainer, seen from the command line: what a user types, and the rows it leaves."""

import os

import jax
import numpy as np
import pytest
from conftest import ROOT, SMOKE, TRAIN, execute
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream
from MaxText.config import resolve
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

UPSTREAM = ("-m", "maxtext.trainers.pre_train.train")


@pytest.fixture(scope="module")
def plain(train):
    return train("plain", eval_interval=3, eval_steps=2)


def test_without_kd_the_losses_are_upstreams(plain, tmp_path):
    # Upstream's program, which knows neither our presets nor our keys: the preset is spelled out.
    preset = dict(line.split(": ", 1) for line in yml_lines("MaxText/configs/models/tiny-llama.yml"))
    settings = dict(line.split(": ", 1) for line in yml_lines("configs/smoke.yml"))
    settings |= preset | {"model_name": "default", "run_name": "upstream", "base_config": "base.yml"}
    settings |= {"base_output_directory": str(tmp_path), "metrics_file": str(tmp_path / "metrics.jsonl")}
    config = tmp_path / "upstream.yml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    theirs = execute(list(UPSTREAM), [str(config)], tmp_path)
    assert theirs.status == 0, theirs.output[-4000:]
    assert len(theirs.rows()) == 6
    np.testing.assert_allclose(plain.column("learning/loss"), theirs.column("learning/loss"), rtol=1e-6)
    np.testing.assert_allclose(plain.column("learning/grad_norm"), theirs.column("learning/grad_norm"), rtol=1e-6)


def test_alpha_zero_trains_as_without_kd_and_evaluates_against_the_teacher(plain, train, teacher):
    zero = train(
        "alpha_zero", use_kd="true", kd_alpha=0, kd_teacher_parameters_path=teacher, eval_interval=3, eval_steps=2
    )
    np.testing.assert_allclose(zero.column("learning/loss"), plain.column("learning/loss"), rtol=1e-5)
    assert not any(key in row for row in zero.rows() for key in ("learning/kd_loss", "learning/teacher_ce_loss"))
    assert all(
        row["evaluation/kl_t1"] > 0 and row["evaluation/teacher_ce_loss"] > 0 for row in zero.rows("evaluation/")
    )


KD = dict(
    use_kd="true",
    kd_alpha=0.7,
    kd_temperature=2,
    kd_top_k=8,
    kd_truncation_strategy="other_bucket",
    z_loss_multiplier=1e-3,
    eval_interval=2,
    eval_steps=2,
    checkpoint_period=2,
    max_num_checkpoints_to_keep=10,
)


@pytest.fixture(scope="module")
def kd_run(train, teacher):
    """In a process of its own, which is all that it writes."""
    return train("kd", program=TRAIN, kd_teacher_parameters_path=teacher, **KD, enable_tensorboard="true")


def test_the_loss_is_the_sum_of_its_logged_parts_at_every_step(kd_run):
    rows = kd_run.rows()
    assert [row["step"] for row in rows] == list(range(6))
    for row in rows:
        parts = 0.3 * row["learning/ce_loss"] + 0.7 * row["learning/kd_loss"] + row["learning/z_loss"]
        assert row["learning/loss"] == pytest.approx(parts, rel=1e-5)
        assert row["learning/z_loss"] > 0 and 0 < row["learning/kd_kept_mass"] < 1


def test_each_evaluation_leaves_one_row_and_the_run_ends_with_one(kd_run):
    rows = kd_run.rows("evaluation/")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row in rows:
        assert row["evaluation/total_weights"] == 2 * 4 * 32
        assert row["evaluation/kl_t1"] > 0 and row["evaluation/reverse_kl_t1"] > 0 and row["evaluation/jsd_t1"] > 0
        assert 0 <= row["evaluation/top1_agreement"] <= 1
        assert row["evaluation/teacher_ce_loss"] > 0


def test_tensorboard_holds_the_same_scalars(kd_run):
    (events,) = (kd_run.folder / "tensorboard").rglob("events.*")
    for name in ("learning/kd_loss", "learning/ce_loss", "learning/kd_kept_mass", "evaluation/kl_t1"):
        assert name.encode() in events.read_bytes()


def test_the_student_learns_from_the_teacher(kd_run):
    kl = kd_run.column("evaluation/kl_t1")
    assert kl[-1] < kl[0]


def test_the_console_says_what_is_trained_from_what_and_stays_quiet_otherwise(kd_run):
    lines = kd_run.output.splitlines()
    assert any(line.startswith(" teacher  tiny-llama") for line in lines)
    assert any("0.3 CE + 0.7 T^2 KL" in line and "top 8 (other_bucket)" in line for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 6 and all(word in steps[-1] for word in ("ce", "kd", "lr", "tok/s", "TFLOP/s", "left"))
    noise = [line for line in lines if line not in steps and not line.startswith((" ", "eval after", "checkpoints:"))]
    assert noise == []


def test_no_checkpoint_of_the_student_holds_the_teacher(kd_run, plain):
    def index(folder):
        tree = ocp.metadata(folder / "checkpoints/5", checkpointable_name="items").metadata
        return sorted(ocp_paths(tree))

    assert index(kd_run.folder) == index(plain.folder)


def test_a_resumed_run_equals_the_uninterrupted_one_and_loses_no_row(kd_run, train, teacher):
    keys = KD | {"kd_teacher_parameters_path": teacher, "learning_rate_schedule_steps": 6}
    train("broken", **keys, steps=4)
    again = train("broken", **keys)
    assert "(resumed)" in again.output
    assert [row["step"] for row in again.rows()] == list(range(6))
    np.testing.assert_allclose(again.column("learning/loss"), kd_run.column("learning/loss"), rtol=1e-6)


def test_relative_paths_are_taken_from_the_working_folder(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = resolve.initialize(["train.py", SMOKE, "base_output_directory=out", "run_name=relative"])
    assert run.student.checkpoint_dir == f"{tmp_path}/out/relative/checkpoints/"
    found = teacher_lib.find_checkpoint(os.path.relpath(teacher))
    assert found.root == teacher_lib.find_checkpoint(str(teacher)).root


def test_a_teacher_of_another_family_teaches(train, tmp_path):
    other = resolve.initialize(["train.py", SMOKE, "model_name=tiny-qwen3", "scan_layers=false"]).student
    mesh = upstream.maxtext_utils.get_mesh_from_config(other)
    _, shapes = upstream.model_creation_utils.create_nnx_abstract_model(other, mesh)
    random = np.random.default_rng(0)
    params = nnx.state(shapes, nnx.Param).to_pure_dict()
    params = jax.tree.map(lambda x: random.normal(scale=0.1, size=x.shape).astype(x.dtype), params)
    upstream.checkpointing.save_params_to_path(str(tmp_path / "qwen"), {"params": params})
    student = train(
        "student_of_qwen",
        use_kd="true",
        kd_teacher_model_name="tiny-qwen3",
        kd_teacher_parameters_path=tmp_path / "qwen/items",
        kd_teacher_dtype="bfloat16",
    )
    assert " teacher  tiny-qwen3, 3 layers x 96" in student.output and "held in bfloat16" in student.output
    assert np.all(np.isfinite(student.column("learning/kd_loss")))


@pytest.mark.parametrize(
    "strategy",
    ["other_bucket", *(pytest.param(name, marks=pytest.mark.slow) for name in ("renormalize", "renormalize_teacher"))],
)
def test_a_student_restored_from_its_teacher_starts_at_kd_zero(train, teacher, strategy):
    keys = dict(use_kd="true", kd_teacher_parameters_path=teacher, load_parameters_path=f"{teacher}/5/items", steps=1)
    result = train(f"itself_{strategy}", **keys, kd_top_k=8, kd_truncation_strategy=strategy)
    (row,) = result.rows()
    if (
        strategy == "renormalize_teacher"
    ):  # -log of the kept mass at each position; its mean is at least -log of the mean
        assert row["learning/kd_loss"] >= -np.log(row["learning/kd_kept_mass"]) - 1e-5
    else:
        assert abs(row["learning/kd_loss"]) < 1e-5
    assert row["learning/ce_loss"] == pytest.approx(row["learning/teacher_ce_loss"], rel=1e-5)


def yml_lines(path):
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


def ocp_paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return [(jax.tree_util.keystr(path), tuple(leaf.shape)) for path, leaf in leaves]
