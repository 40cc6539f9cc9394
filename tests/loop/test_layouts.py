"""Laws of layouts: however a run lies on its devices, it trains the same student from the same teacher.

Devices are simulated on the CPU. What MaxText cannot lay out on simulated devices: parallelism over slices (dcn_*; a
CPU device has no slice_index).
"""

import numpy as np
import pytest
import token_rows
from conftest import few
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream

pytestmark = pytest.mark.e2e

TERMS = ("loss", "kd_loss", "ce_loss", "raw_grad_norm", "total_weights")
FSDP_OFF = {"ici_fsdp_parallelism": 1}  # by default it takes the devices that the other axes leave


def assert_same_run(run, expected):
    for name in (f"learning/{term}" for term in TERMS):
        np.testing.assert_allclose(run.column(name), expected.column(name), rtol=5e-4, err_msg=name)


# name -> (devices, keys). The global batch is eight rows throughout, of unlike lengths unless a model has experts.
LAYOUTS = {
    "data": (4, FSDP_OFF | {"ici_data_parallelism": 4}),
    "data, optimizer sharded (ZeRO-1)": (
        4,
        FSDP_OFF | {"ici_data_parallelism": 4, "shard_optimizer_over_data": "true"},
    ),
    "fsdp": (4, {}),
    "context, balanced": (4, {"ici_context_parallelism": 2}),
    "context, as it comes": (4, {"ici_context_parallelism": 2, "context_parallel_load_balance": "false"}),
    "tensor": (2, FSDP_OFF | {"ici_tensor_parallelism": 2}),
    "tensor along the sequence": (4, {"ici_tensor_sequence_parallelism": 2}),
    "fsdp, transposed": (4, {"ici_fsdp_transpose_parallelism": 2}),
    "data, fsdp and tensor": (8, {"ici_data_parallelism": 2, "ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2}),
    "data, microbatches": (
        4,
        FSDP_OFF | {"ici_data_parallelism": 4, "gradient_accumulation_steps": 2, "per_device_batch_size": 1},
    ),
    "fsdp, tensor, microbatches": (
        4,
        {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2}
        | {"gradient_accumulation_steps": 2, "per_device_batch_size": 1},
    ),
    "nothing kept for the backward pass": (1, {"remat_policy": "full"}),
    "products kept for the backward pass": (1, {"remat_policy": "minimal"}),
}
DEFAULT = ("fsdp, tensor, microbatches",)
STEPS = 3


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """Rows of 1 to 32 tokens: no two devices, and no two microbatches, have as many."""
    lengths = np.random.default_rng(0).integers(1, 33, 16 * (STEPS + 1)).tolist()
    return token_rows.KEYS | {
        "grain_train_files": token_rows.write(tmp_path_factory.mktemp("rows") / "train", lengths, seed=2)
    }


@pytest.fixture(scope="module")
def distil(train, teacher, padded):
    """distil(name, devices, key=value, ...): a few steps on eight rows, from the tiny teacher."""

    def run(name, devices=1, **keys):
        keys = padded | keys
        keys = {"use_kd": "true", "kd_teacher_parameters_path": teacher, "kd_top_k": 8, "steps": STEPS} | keys
        keys = {"enable_checkpointing": "false", "per_device_batch_size": 8 / devices} | keys
        return train(f"layout_{name}", devices=devices, **keys)

    return run


@pytest.fixture(scope="module")
def one_device(distil):
    return distil("one_device")


@pytest.mark.parametrize("layout", few(DEFAULT, LAYOUTS))
def test_a_layout_agrees_with_one_device(distil, one_device, layout):
    devices, keys = LAYOUTS[layout]
    run = distil(f"{list(LAYOUTS).index(layout)}", devices, **keys)
    assert_same_run(run, one_device)


@pytest.mark.slow
def test_the_share_of_positions_that_is_taught_is_of_all_devices_tokens(distil):
    devices, keys = LAYOUTS[DEFAULT[0]]
    some = {"kd_positions": 0.3, "kd_embedding_std": 3}  # begins surer of some positions than of others
    expected = distil("some_positions", **some)
    assert_same_run(distil(f"some_positions_on_{devices}", devices, **some, **keys), expected)


@pytest.mark.slow
def test_microbatches_of_packed_rows_agree_with_one_batch(distil):
    packed = {"packing": "true"}
    microbatches = {"gradient_accumulation_steps": 4, "per_device_batch_size": 2}
    assert_same_run(distil("packed_microbatches", **packed, **microbatches), distil("packed", **packed))


@pytest.mark.slow
def test_a_student_whose_layers_lie_apart_agrees_with_one_device(distil):
    apart = {"scan_layers": "false"}  # other weights from the same seed than with layers in one array
    assert_same_run(distil("apart", 4, **apart), distil("apart_on_one_device", **apart))


@pytest.mark.slow
def test_a_teacher_whose_heads_the_layout_does_not_divide_is_laid_out_by_itself(teacher, distil, tmp_path):
    params = ocp.load(f"{teacher}/5", checkpointable_name="items")["params"]
    attention = params["params"]["decoder"]["layers"]["self_attention"]
    for side in ("key", "value"):
        attention[side]["kernel"] = attention[side]["kernel"][:, :, :1]  # the first head of each layer
    upstream.checkpointing.save_params_to_path(str(tmp_path / "one_head"), params)
    keys = {"kd_teacher_parameters_path": tmp_path / "one_head/items"}
    keys |= {"kd_teacher_overrides": "{base_num_kv_heads: 1}"}
    keys |= {"dataset_type": "synthetic"}
    layout = FSDP_OFF | {"ici_tensor_parallelism": 2, "ici_data_parallelism": 2}
    shared = distil("shared_heads", 4, **keys, **layout, eval_interval=2, eval_steps=1)
    assert "the teacher's 4 query and 1 key-value heads do not divide by 2" in shared.output
    assert_same_run(shared, distil("whole_heads", **keys))


# A mixture of experts: load-balancing losses are means over each device's tokens, and agree where rows are alike full.
EXPERT_LAYOUTS = {
    "expert": (4, FSDP_OFF | {"ici_expert_parallelism": 4}),
    "expert and fsdp": (4, {"ici_expert_parallelism": 2, "ici_fsdp_parallelism": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_a_layout_of_experts_agrees_with_one_device(distil, layout):
    devices, keys = EXPERT_LAYOUTS[layout]
    experts = {"model_name": "deepseek3-mini", "kd_teacher_model_name": "tiny-llama"}
    experts |= {"sparse_matmul": "false", "megablox": "false", "dataset_type": "synthetic"}
    run = distil(f"experts_{list(EXPERT_LAYOUTS).index(layout)}", devices, **experts, **keys)
    assert_same_run(run, distil("experts_on_one_device", **experts))
