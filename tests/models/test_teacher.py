"""Laws of the teacher's checkpoint: what is found, what is restored, and that all of it is."""

import shutil
import sys
import types
from unittest import mock

import jax
import lab as lab_lib
import numpy as np
import pytest
import uvloop
from conftest import EXPERTS
from flax import nnx
from flax.core.spmd import logical_axis_rules
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def makings():
    """The names of the models that making the lab has made, one for each time."""
    return []


@pytest.fixture(scope="module")
def lab(teacher, tmp_path_factory, makings):
    engine = upstream.model_creation_utils
    function_for = engine.get_nnx_create_model_fn

    def counted(config, *arguments, **named):
        create = function_for(config, *arguments, **named)
        return lambda *inputs, **given: (makings.append(config.model_name), create(*inputs, **given))[1]

    with mock.patch.object(engine, "get_nnx_create_model_fn", counted):
        return lab_lib.make(tmp_path_factory.mktemp("lab"), f"{teacher}/5/items")


def test_a_distillation_makes_each_of_its_models_once(lab, makings):
    assert len(makings) == 2


def test_a_checkpoints_folder_means_its_newest_step(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "run")
    shutil.copytree(f"{teacher}/5", tmp_path / "run/12")
    assert teacher_lib.find_checkpoint(str(tmp_path / "run")).step == 12
    assert teacher_lib.find_checkpoint(f"{tmp_path}/run/5/items").step == 5
    assert teacher_lib.find_checkpoint(f"{tmp_path}/run/5").step == 5


def test_of_the_readers_of_a_failed_restore_only_other_errors_are_heard(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    with pytest.raises(ConfigError), teacher_lib.unreadable_as_config_error("cannot be restored"):
        raise OSError("cut off")
    loop = uvloop.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as late:
        loop.call_soon_threadsafe(print)
    for error in (late.value, RuntimeError("another")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert heard == ["another"]


def test_the_restored_teacher_is_the_trained_one_bit_for_bit(lab, teacher):
    stored = ocp.load(f"{teacher}/5", checkpointable_name="items")["params"]["params"]
    restored = nnx.filter_state(lab.teacher.state, nnx.Param).to_pure_dict()
    jax.tree.map(np.testing.assert_array_equal, stored, restored)


def test_a_parameters_only_checkpoint_is_the_same_teacher(lab, tmp_path, teacher):
    stored = ocp.load(f"{teacher}/5", checkpointable_name="items")["params"]
    teacher_lib.upstream.checkpointing.save_params_to_path(str(tmp_path / "params_only"), stored)
    second = lab_lib.make(tmp_path, str(tmp_path / "params_only" / "items"))
    leaves = [jax.tree.leaves(nnx.filter_state(made.teacher.state, nnx.Param)) for made in (lab, second)]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_the_teacher_is_held_as_asked(lab, tmp_path, teacher):
    asked = lab_lib.make(tmp_path, teacher, kd_teacher_dtype="bfloat16")
    for made, dtype in ((lab, "float32"), (asked, "bfloat16")):
        held = jax.tree.leaves(nnx.filter_state(made.teacher.state, nnx.Param))
        assert {str(leaf.dtype) for leaf in held} == {dtype}


@pytest.mark.parametrize(
    ("names", "scanned"),
    [
        (["decoder/layers/mlp/wi_0/kernel"], True),
        (["decoder/layers_0/mlp/wi_0/kernel"], False),
        (["decoder/moe_layers/gate/kernel", "decoder/dense_layers/mlp/wo/kernel"], True),
        (["decoder/dense_layers_0/mlp/wo/kernel", "decoder/moe_layers_0/gate/kernel"], False),
        (["decoder/layers/layers_5/mlp/wo/kernel", "vision_encoder/layers_0/kernel"], True),  # blocks of unlike layers
    ],
)
def test_the_names_below_the_decoder_tell_whether_layers_are_scanned(names, scanned):
    arrays = {tuple(name.split("/")): ((), (), None) for name in names}
    assert teacher_lib.Checkpoint(root=None, step=None, arrays=arrays).scan_layers is scanned


@pytest.fixture
def experts_apart(train, teacher):
    """Like `experts`, in one batch and with layers that are no one array."""
    keys = EXPERTS | {"scan_layers": "false", "use_kd": "true", "kd_teacher_model_name": "tiny-llama"}
    return train("experts_apart", **keys, kd_teacher_parameters_path=teacher)


@pytest.mark.parametrize("name", ["experts", pytest.param("experts_apart", marks=pytest.mark.slow)])
def test_router_biases_come_back_although_they_are_no_parameters(request, tmp_path, name):
    moe = request.getfixturevalue(name)
    for row in moe.rows():
        parts = 0.5 * row["learning/ce_loss"] + 0.5 * row["learning/kd_loss"] + row["learning/moe_lb_loss"]
        assert row["learning/loss"] == pytest.approx(parts, rel=1e-5)
    checkpoints = moe.folder / "checkpoints"
    held = {"kd_teacher_model_name": "deepseek3-mini", "kd_teacher_dtype": "bfloat16"}
    lab = lab_lib.make(tmp_path, str(checkpoints), **EXPERTS | {"model_name": "tiny-llama"}, **held)
    leaves = nnx.to_flat_state(lab.teacher.state)
    assert {leaf.get_value().dtype for _, leaf in leaves if isinstance(leaf, nnx.Param)} == {
        np.dtype(jax.numpy.bfloat16)
    }
    restored = {path: np.asarray(leaf.get_value()) for path, leaf in leaves if "bias" in path}
    stored = nnx.traversals.flatten_mapping(
        ocp.load(checkpoints / "5", checkpointable_name="items")["nnx_aux"]["model"]
    )
    biases = {path: value for path, value in stored.items() if path[-1] == "bias"}
    assert len(biases) == (1 if name == "experts" else 2)
    for path, value in biases.items():
        assert np.any(value) and np.max(np.abs(value)) <= 6 * 0.0101  # six steps of the update rate at most
        np.testing.assert_array_equal(restored[path], value)  # in float32, whatever parameters are held in


@pytest.mark.slow
def test_a_teacher_of_8_bits_keeps_the_scales_of_its_weights(lab, teacher, tmp_path):
    stored = nnx.traversals.flatten_mapping(ocp.load(f"{teacher}/5", checkpointable_name="items")["params"]["params"])
    quantised = {}
    for path, weight in stored.items():
        quantised[path] = weight
        if path[-1] == "kernel":  # as large as 8 bits go, layer by layer where layers are stacked (along axis 1)
            others = (0, *range(2, weight.ndim)) if "layers" in path else None
            scale = np.abs(weight).max(axis=others, keepdims=True) / 448
            quantised[path] = (weight / scale).astype(jax.numpy.float8_e4m3fn)
            quantised[(*path[:-1], "kernel_scale")] = scale.reshape(-1 if "layers" in path else ())
    tree = {"params": nnx.traversals.unflatten_mapping(quantised)}
    teacher_lib.upstream.checkpointing.save_params_to_path(str(tmp_path / "saved"), tree)
    overrides = "{weight_dtype: float8_e4m3fn, unquantized_modules: [token_embedder]}"
    eighth = lab_lib.make(tmp_path, str(tmp_path / "saved/items"), kd_teacher_overrides=overrides)

    def ce(lab):
        batch = lab.student.data_loader.load_next_batch()
        with jax.set_mesh(lab.student.mesh), logical_axis_rules(lab.run.student.logical_axis_rules):
            _, metrics = lab.steps().train(jax.tree.map(jax.numpy.copy, lab.student.state), batch)
        return float(metrics["scalar"]["learning/teacher_ce_loss"])

    assert ce(eighth) == pytest.approx(ce(lab), rel=0.02)
