"""The contract with the engine: what upstream.py and its users rely on, so that an upgrade fails here by name."""

import importlib.metadata
import inspect

import pytest

from MaxText import upstream


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_engine_is_the_pinned_one():
    assert importlib.metadata.version("maxtext") == "0.2.5"


def test_configuration_is_resolved_through_a_loader_that_can_be_replaced():
    assert parameters(upstream.pyconfig._load_config) == ["config_name"]
    assert parameters(upstream.pyconfig._initialize_pydantic) == ["argv", "config_class", "kwargs"]
    assert "_load_config(" in inspect.getsource(upstream.pyconfig._initialize_pydantic)


@pytest.mark.e2e
def test_the_step_finds_the_functions_it_calls_with_the_arguments_it_gives():
    upstream_names = {
        upstream.gradient_accumulation.gradient_accumulation_loss_and_grad: [
            "_loss_fn", "config", "model", "params", "params_shardings", "data", "dropout_rng"],
        upstream.maxtext_utils.apply_gradient_clipping: ["raw_grads", "state", "clipping_threshold"],
        upstream.qk_clip_utils.apply_qk_clip_nnx: ["state", "intermediate_outputs", "config"],
        upstream.multi_token_prediction.calculate_mtp_loss: ["intermediate_outputs", "config"],
        upstream.moe.finalize_deferred_intermediates: ["intermediate_outputs", "config"],
        upstream.pre_train.train_step: [
            "model", "config", "state_mesh_shardings", "params_shardings", "state", "data", "dropout_rng"],
    }  # fmt: skip
    for function, expected in upstream_names.items():
        assert parameters(function) == expected, function


@pytest.mark.e2e
def test_gradient_accumulation_reads_the_keys_that_our_loss_gives():
    source = inspect.getsource(upstream.gradient_accumulation.gradient_accumulation_loss_and_grad)
    for key in ("xent_sum", "total_weights", "moe_lb_loss", "indexer_loss", "mtp_loss"):
        assert f'aux["{key}"]' in source


@pytest.mark.e2e
def test_the_logger_has_the_hooks_that_ours_overrides():
    logger = upstream.metric_logger.MetricLogger
    for name in ("write_metrics", "write_metrics_locally", "write_setup_info_to_tensorboard", "_log_eval_metrics",
                 "_accumulate_eval_metrics", "_finalize_eval_metrics", "_log_training_metrics"):  # fmt: skip
        assert callable(getattr(logger, name))


@pytest.mark.e2e
def test_training_checkpoints_keep_other_variables_under_nnx_aux():
    from maxtext.common import train_state_nnx

    assert 'linen_dict["nnx_aux"] = aux' in inspect.getsource(train_state_nnx.to_checkpoint_dict)


@pytest.mark.e2e
def test_shapes_of_a_train_state_come_from_functions_that_take_what_we_give():
    assert parameters(upstream.maxtext_utils.get_abstract_state) == ["config", "mesh", "init_state_fn", "is_training"]
    assert parameters(upstream.train_utils.create_training_optimizer) == ["config", "model", "mesh"]
    assert parameters(upstream.train_state_nnx.TrainStateNNX.__init__)[1:3] == ["model", "optimizer"]
    spec = upstream.topologies()["v5e-16"]
    assert (spec.platform, spec.topology_name, spec.devices_per_slice) == ("tpu", "v5e:4x4", 16)
