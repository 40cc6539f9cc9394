"""The contract with the engine: what upstream.py and its users rely on, so that an upgrade fails here by name."""

import ast
import importlib.metadata
import inspect
import operator
import textwrap

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, SMOKE
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.config import resolve

# What is called -> the names of the arguments that are given by position; after "|", of those given by keyword.
CALLS = {
    "attentions.Attention.init_rotary_embedding": "self",
    "checkpoint_context.build_context": (
        "| use_ocdbt use_zarr3 checkpoint_storage_concurrent_gb partial_load enable_single_replica_ckpt_restoring"
    ),
    "checkpointing._handle_post_checkpoint_preemption": "checkpoint_manager step force_ckpt_save",
    "checkpointing._should_save_checkpoint_at_step": "checkpoint_manager step config force",
    "checkpointing.all_steps": "checkpoint_manager",
    "checkpointing.latest_step": "checkpoint_manager",
    "checkpointing.maybe_save_checkpoint": "checkpoint_manager state config data_iterator step",
    "checkpointing.save_checkpoint": "checkpoint_manager step state config data_iterator | force",
    "checkpointing.wait_until_finished": "checkpoint_manager",
    "data_processing_utils.get_local_batch_size": "config",
    "data_processing_utils.get_tokenizer_and_pad_id": "config | add_bos add_eos",
    "data_processing_utils.validate_and_configure_sft_columns": "data_columns tokenizer_model chat_template",
    "gcs_utils.gcs_glob_pattern": "pattern",
    "gcs_utils.upload_dump": "| local_dir target_dir module_name delete_local_after all_host_upload",
    "goodput.create_goodput_recorder": "config",
    "goodput.maybe_monitor_goodput": "config",
    "goodput.maybe_record_goodput": "recorder event_name *args",
    "goodput.record_goodput": "recorder event_name",
    "gradient_accumulation.gradient_accumulation_loss_and_grad": (
        "_loss_fn config model params params_shardings data dropout_rng"
    ),
    "grain_data_processing._apply_mapdataset_transforms": (
        "dataset shuffle shuffle_seed num_epoch dataloading_host_index dataloading_host_count grain_num_threads "
        "grain_prefetch_buffer_size"
    ),
    "grain_data_processing.find_data_files": "data_file_pattern",
    "hf_data_processing._get_pad_id": "tokenizer",
    "hf_utils.apply_hook_fns": "weight target_shape hook_fns",
    "hf_utils.nesting_depth": "hf_source_keys",
    "hf_utils.process_maxtext_param": (
        "maxtext_param_key maxtext_param_weight param_map hook_fn_map hf_shape_map maxtext_config"
    ),
    "hf_utils.save_weight_files": "shards index local_dir_to_save_to output_dir_final",
    "hf_utils.shard_checkpoint": "weights_dict",
    "hf_utils.validate_and_filter_param_map_keys": "param_map_keys maxtext_state_keys",
    "input_pipeline_interface.create_data_iterator": "config mesh",
    "input_pipeline_utils.ParseFeatures": "data_columns tokenize",
    "input_pipeline_utils.get_tokenizer": "tokenizer_path tokenizer_type add_bos add_eos hf_access_token",
    "instruction_data_processing.convert_to_conversational_format": (
        "| dataset data_columns formatting_func_path formatting_func_kwargs"
    ),
    "instruction_data_processing.load_chat_template_from_file": "template_path",
    "max_utils.add_text_to_summary_writer": "key value summary_writer",
    "max_utils.bootstrap_transformer_engine_cgemm": "config",
    "max_utils.calculate_num_params_from_pytree": "params",
    "max_utils.fill_unspecified_mesh_axes": "parallelism_vals target_product parallelism_type",
    "max_utils.l2norm_pytree": "x",
    "max_utils.maybe_get_transformer_engine_context": "config",
    "max_utils.parse_libtpu_flags_to_dict": "flags_str",
    "maxtext_utils.add_config_to_summary_writer": "config summary_writer",
    "maxtext_utils.apply_gradient_clipping": "raw_grads state clipping_threshold",
    "maxtext_utils.calculate_tflops_training_per_device": "config | log",
    "maxtext_utils.calculate_tokens_training_per_device": "config",
    "maxtext_utils.collect_intermediates_by_suffix": "intermediate_outputs *suffix_keys",
    "maxtext_utils.get_abstract_state": "config mesh init_state_fn is_training",
    "maxtext_utils.get_functional_eval_with_signature": "eval_step data_sharding state_mesh_shardings model config",
    "maxtext_utils.get_functional_train_with_signature": (
        "train_step data_sharding state_mesh_shardings model config params_shardings"
    ),
    "maxtext_utils.get_mesh_from_config": "config devices",
    "maxtext_utils.get_shaped_batch": "config | batch_sharding is_eval",
    "maxtext_utils.maybe_dump_jaxpr": "config p_train_step train_step_inputs",
    "metric_logger.MetricLogger": "| config learning_rate_schedule start_step",
    "metric_logger.MetricLogger._accumulate_eval_metrics": "self metrics",
    "metric_logger.MetricLogger._finalize_eval_metrics": "self train_step",
    "metric_logger.MetricLogger._flush_one_buffered_entry": "self entry",
    "metric_logger.MetricLogger._is_profiler_boundary_step": "self step",
    "metric_logger.MetricLogger._log_eval_metrics": "self metrics step",
    "metric_logger.MetricLogger._log_training_metrics": "self metrics step",
    "metric_logger.MetricLogger._maybe_abort_after_write_metrics": "self metrics",
    "metric_logger.MetricLogger.buffer_and_write_metrics": "self metrics step step_time_delta | is_training",
    "metric_logger.MetricLogger.flush_metrics_and_cleanup": "self",
    "metric_logger.MetricLogger.record_train_metrics": "self metrics step | step_time",
    "metric_logger.MetricLogger.reset_eval_metrics": "self",
    "metric_logger.MetricLogger.write_metrics": "self metrics step metric_type",
    "metric_logger.MetricLogger.write_metrics_locally": "self metrics step",
    "metric_logger.MetricLogger.write_setup_info_to_tensorboard": "self params",
    "metric_logger.record_activation_metrics": "output_metrics intermediate_outputs config",
    "model_creation_utils.create_nnx_abstract_model": "config mesh",
    "moe.GateLogit.__call__": "self inputs",
    "moe.finalize_deferred_intermediates": "intermediate_outputs config",
    "moe.load_balance_updates_from_counts": "expert_counts num_experts rate",
    "moe.uses_megatron_seq_aux_loss": "config",
    "multi_token_prediction.roll_and_mask": "x",
    "multi_token_prediction.roll_and_mask_by_segment": "x segment_ids",
    "normalizations.RMSNorm.__call__": "self x",
    "nnx_decoders.NNXDecoder.apply_output_head": ("self shared_embedding y deterministic model_mode normalize_y"),
    "optimizers._get_path_mask_fn": "patterns match_returns_true",
    "pre_train.build_eval_graphdef": "config jit_model state",
    "pre_train.eval_step": "model config state data dropout_rng",
    "pre_train.get_first_step": "model state",
    "pre_train.run": "config recorder",
    "pre_train.train_step": "model config state_mesh_shardings params_shardings state data dropout_rng",
    "profiler.Profiler": "config | offset_step",
    "profiler.Profiler.deactivate": "self",
    "profiler.Profiler.maybe_activate_profiler": "self step state",
    "profiler.Profiler.maybe_deactivate_profiler": "self step state",
    "pyconfig.HyperParameters": "pydantic_config",
    "pyconfig._apply_rules": "base_rules new_rules config",
    "pyconfig._initialize_pydantic": "argv | config_class **kwargs",
    "pyconfig._load_config": "config_name",
    "pyconfig._prepare_for_pydantic": "raw_keys | config_class",
    "qk_clip_utils.apply_qk_clip_nnx": "state intermediate_outputs config",
    "qk_clip_utils.calculate_max_logit_metric": "intermediate_outputs",
    "sharding.create_sharding": "mesh logical_names",
    "sharding.get_input_data_sharding": "config mesh | rules",
    "sharding.maybe_shard_with_name": "inputs named_sharding | shard_mode",
    "sharding.maybe_update_params_sharding_with_opt": "config state_mesh_shardings",
    "to_maxtext.get_maxtext_model_info": "config",
    "train_state_nnx.TrainStateNNX.__init__": "self model optimizer",
    "train_state_nnx.TrainStateNNX.apply_gradients": "self grads | **kwargs",
    "train_state_nnx.to_checkpoint_dict": "state",
    "train_utils.create_training_optimizer": "config model | mesh",
    "train_utils.jit_train_step": (
        "config model state state_mesh_shardings data_sharding train_step params_shardings | mesh"
    ),
    "train_utils.maybe_apply_dcn_throttling": "config",
    "train_utils.maybe_cleanup_dcn_throttling": "config",
    "train_utils.prepare_before_run_start": (
        "config state learning_rate_schedule start_step mesh data_loader shaped_batch"
    ),
    "train_utils.setup_train_loop": "config recorder",
    "train_utils.validate_completed_steps": "completed_steps config_steps",
    "train_utils.validate_train_config": "config",
}

# What is read.
NAMES = [
    "accelerator_to_spec_map.UserFacingNameToSystemCharacteristics",
    "embeddings.LLaMARotaryEmbedding._apply_scaling_factor",
    "example_pb2.Example",
    "exceptions.StopTraining",
    "globals.MAXTEXT_CONFIGS_DIR",
    "goodput.GoodputEvent.STEP",
    "goodput.RECORD_JOB_END_TIME",
    "goodput.RECORD_JOB_START_TIME",
    "hf_model_configs.HF_MODEL_CONFIGS",
    "hf_shape.HF_SHAPE",
    "hf_utils.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "max_utils.maybe_initialize_jax_distributed_system.__code__",
    "metric_logger.MetadataKey.PER_DEVICE_TFLOPS",
    "metric_logger.MetadataKey.PER_DEVICE_TOKENS",
    "input_pipeline_utils.ShiftData",
    "input_pipeline_utils.add_segmentation_and_position",
    "model_creation_utils.get_nnx_create_model_fn",
    "moe.MoEBiasVar",
    "param_mapping.HOOK_FNS",
    "param_mapping.PARAM_MAPPING",
    "pre_train.VertexTensorboardManager",
    "pre_train._TF_AVAILABLE",
    "pre_train.tf",
    "pre_train.vocab_tiling_nnx_loss",
    "to_maxtext.LazyTensor",
    "types.DcnParallelism",
    "types.IciParallelism",
    "types.MaxTextConfig",
    "types.ShardMode.AUTO",
    "types.TeCommGemmOverlapPolicy.DISABLED",
]

# Whose source says what no signature does -> pieces of it.
SOURCES = {
    # Each attention makes its positions by this method, of its own configuration.
    "attentions.Attention.__init__": ["self.rotary_embedding = self.init_rotary_embedding()"],
    "attentions.Attention.init_rotary_embedding": ["rotary_embedding = LLaMARotaryEmbedding(", "self.config"],
    # What Llama3Scaling's defaults say, and where the subclass is asked.
    "embeddings.LLaMARotaryEmbedding": [
        "timescale = 1.0 / jax.vmap(self._apply_scaling_factor)(1.0 / timescale)",
        "scale_factor = 8\n", "low_freq_factor = 1\n", "high_freq_factor = 4\n", "old_context_len = 8192 ",
    ],
    # Each pipeline finds by these names, when it is made, what data/pipelines.py puts in their place.
    "grain_data_processing.get_datasets": ["files = find_data_files(", "data_files = find_data_files("],
    "grain_data_processing.pretrain_preprocessing_pipeline": [
        "data_processing_utils.get_tokenizer_and_pad_id(config)", "data_processing_utils.format_and_batch(",
    ],
    "grain_data_processing.sft_preprocessing_pipeline": [
        "data_processing_utils.get_tokenizer_and_pad_id(config)", "data_processing_utils.format_and_batch(",
        "data_processing_utils.validate_and_configure_sft_columns(", "_format_chat_template_grain,",
        "_tokenize_sft_chunks,", 'tokenizer_model = getattr(tokenizer_model, "tokenizer", tokenizer_model)',
    ],
    "input_pipeline_utils.SFTPromptMasking.map": [
        'self.unk_id] * len(text) if self.completion_only and element["is_prompt"][i] else text',
    ],
    "data_processing_utils.format_and_batch": [
        "input_pipeline_utils.ShiftData(ignored_ids=[pad_id], axis=0)",
        "input_pipeline_utils.ShiftData(ignored_ids=[pad_id], axis=1)",
        'if config.add_bos and hasattr(tokenizer_model, "bos_id")',
    ],
    "hf_data_processing.preprocessing_pipeline": [
        "_get_pad_id(tokenizer)", "_get_training_objective_transform(", "input_pipeline_utils.apply_chat_template,",
        "input_pipeline_utils.tokenization,", "instruction_data_processing.convert_to_conversational_format(",
        "data_processing_utils.validate_and_configure_sft_columns(data_column_names, tokenizer, chat_template)",
    ],
    "hf_data_processing._get_training_objective_transform": [
        "input_pipeline_utils.ShiftData(ignored_ids=[pad_id, bos_token_id], axis=1)",
    ],
    "tfds_data_processing.preprocessing_pipeline": [
        "input_pipeline_utils.get_tokenizer(", "pad_id = tokenizer_model.pad_id",
        "input_pipeline_utils.add_segmentation_and_position(x, data_column_names, padding_token=pad_id)",
    ],
    # A cache is read by the names that these are looked up by, and by these keys (data/cached.py).
    "grain_data_processing._get_pipeline_fn": ["return pretrain_preprocessing_pipeline"],
    "grain_data_processing.make_grain_train_iterator": [
        "get_datasets,", 'split="train",', "dataloading_host_index=shard_index", "num_epoch=config.num_epoch",
        "shuffle=config.enable_data_shuffling", "preprocessing_fn(dataset=train_ds)",
    ],
    # Rows are filled with the id of padding, in segments and positions as well.
    "input_pipeline_utils.PadOrTrimToMaxLength.map": ["self._pad_text(element[key], self.max_length, self.pad_id)"],
    # A config is resolved through a loader that can be replaced, and defaults can be laid beneath what it makes of it.
    "pyconfig._initialize_pydantic": [
        "_load_config(", "pydantic_kwargs = _prepare_for_pydantic(raw_keys_dict, config_class=config_class)",
        "env_key in os.environ", "original_value = raw_keys_dict.get(k)",
        "merged_rules = _apply_rules(base_rules, model_rules, model_cfg_oc)",
        'final_config["logical_axis_rules"] = merged_rules',
    ],
    # Accumulation reads what our loss gives, calls it with its five positions and is_train, and adds up the rest.
    "gradient_accumulation.gradient_accumulation_loss_and_grad": [
        *(f'aux["{key}"]' for key in ("xent_sum", "total_weights", "moe_lb_loss", "indexer_loss", "mtp_loss")),
        "is_train=True", "jnp.sum(x, axis=0)",
    ],
    # Both say how their function is jitted, in this order.
    "maxtext_utils.get_functional_eval_with_signature": [
        "return functional_eval, in_shardings, out_shardings, static_argnums, donate_argnums",
    ],
    "maxtext_utils.get_functional_train_with_signature": [
        "return functional_train, in_shardings, out_shardings, static_argnums, donate_argnums",
    ],
    # The logger's buffer holds (kind, step, metrics, time).
    "metric_logger.MetricLogger.buffer_and_write_metrics": [
        'self.buffered_metrics.append(("train", step, metrics, step_time_delta))',
        "self._flush_one_buffered_entry(self.buffered_metrics.pop(0))",
        "self._pending_eval_step_count += 1",
    ],
    "metric_logger.MetricLogger._flush_one_buffered_entry": [
        "self.write_metrics(metrics, step)", "self._accumulate_eval_metrics(", 'metric_type="running_eval"',
    ],
    "metric_logger.MetricLogger._accumulate_eval_metrics": [
        f"evaluation/{name}" for name in ("total_loss", "total_weights", "z_loss", "moe_lb_loss", "mtp_loss")
    ],
    "metric_logger.MetricLogger.record_train_metrics": [
        f'"{name}"' for name in ("learning/current_learning_rate", "perf/step_time_seconds", "perf/per_device_tflops",
                                 "perf/per_device_tokens", "perf/per_device_tflops_per_sec",
                                 "perf/per_device_tokens_per_sec")
    ],
    # A model is made by what one function gives, of which the set-up asks one for all of its makings.
    "model_creation_utils.create_nnx_abstract_model": [
        "_create_model = get_nnx_create_model_fn(", "nnx.eval_shape(_create_model)", "return _create_model, ",
    ],
    "train_utils.setup_train_loop": [
        "_create_model_partial, model = model_creation_utils.create_nnx_abstract_model(config, mesh, devices)",
        "model = _create_model_partial()", "nnx.eval_shape(init_state_fn)",
    ],
    # Training checkpoints keep variables that are no parameters under nnx_aux.
    "train_state_nnx.to_checkpoint_dict": ['linen_dict["nnx_aux"] = aux'],
}  # fmt: skip


# The modules that conversion alone uses.
CONVERSION = {"hf_model_configs", "hf_shape", "hf_utils", "param_mapping", "to_maxtext"}


def engine(name):
    """The engine's object of that name, as it is reached through upstream.py."""
    try:
        return operator.attrgetter(name)(upstream)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{name} is gone: {error}")


def test_the_engine_is_the_pinned_one():
    assert importlib.metadata.version("maxtext") == "0.2.5"


@pytest.mark.e2e
@pytest.mark.parametrize("name", CALLS)
def test_a_call_finds_the_arguments_it_gives(name):
    given, _, by_keyword = (part.split() for part in CALLS[name].partition("|"))
    parameters = inspect.signature(engine(name)).parameters
    kinds = inspect.Parameter
    starred = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}
    named = {starred.get(parameter.kind, "") + key: parameter for key, parameter in parameters.items()}
    positional = [key for key, parameter in named.items() if parameter.kind not in (kinds.KEYWORD_ONLY,)]
    assert positional[: len(given)] == given, f"{name}: its parameters are now {list(named)}"
    assert set(by_keyword) <= set(named), f"{name}: its parameters are now {list(named)}"
    asked = [key for key, p in named.items() if p.default is p.empty and not key.startswith("*")]
    assert set(asked) <= {*given, *by_keyword}, f"{name} asks for more: {asked}"


@pytest.mark.e2e
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_read_is_there(name):
    engine(name)


@pytest.mark.e2e
@pytest.mark.parametrize("name", SOURCES)
def test_a_function_does_within_itself_what_is_relied_on(name):
    source = inspect.getsource(engine(name))
    missing = [piece for piece in SOURCES[name] if piece not in source]
    assert not missing, f"{name} no longer holds {missing}"


FILES = [*ROOT.glob("MaxText/**/*.py"), *ROOT.glob("scripts/**/*.py")]


def uses(file):
    """The chains in a file that begin at `upstream.`, or in upstream.py at any module."""
    modules = {name.split(".")[0] for name in (*CALLS, *NAMES)}
    for node in ast.walk(ast.parse(file.read_text())):
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if file.name == "upstream.py" or chain.startswith("upstream."):
            parts = chain.removeprefix("upstream.").split(".")
            if len(parts) > 1 and parts[0] in modules and all(part.isidentifier() for part in parts):
                yield ".".join(parts)


def test_the_tables_name_every_use_of_the_engine():
    def covered(use):
        return any(f"{name}.".startswith(f"{use}.") or use.startswith(f"{name}.") for name in (*CALLS, *NAMES))

    missing = {f"{file.name}: {use}" for file in FILES for use in uses(file) if not covered(use)}
    assert not missing


def test_what_conversion_no_longer_uses_is_in_no_table():
    used = {use for file in FILES for use in uses(file) if use.split(".")[0] in CONVERSION}
    named = {name for name in (*CALLS, *NAMES) if name.split(".")[0] in CONVERSION}
    assert not {name for name in named if not any(f"{name}.".startswith(f"{use}.") for use in used)}


@pytest.mark.e2e
def test_the_set_up_returns_what_is_unpacked_in_that_order():
    tree = ast.parse(textwrap.dedent(inspect.getsource(upstream.train_utils.setup_train_loop)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    names = [[item.id for item in value.elts] for value in returned if isinstance(value, ast.Tuple)]
    assert names[-1] == [
        "init_rng", "checkpoint_manager", "state_mesh_shardings", "model", "mesh", "learning_rate_schedule",
        "data_iterator", "data_loader", "rampup_manager", "eval_data_iterator", "train_state",
    ]  # fmt: skip


@pytest.mark.e2e
def test_a_decoder_that_tiles_the_vocabulary_reports_hidden_states_and_no_logits(tmp_path):
    config = resolve.initialize(["train.py", SMOKE, f"base_output_directory={tmp_path}"]).student
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    shape = (config.micro_batch_size_to_train_on, config.max_target_length)
    tokens = jnp.ones(shape, jnp.int32)

    def call(settings):
        model = upstream.model_creation_utils.create_nnx_abstract_model(settings, mesh)[0]()
        output = model(tokens, tokens, decoder_segment_ids=tokens, enable_dropout=False)
        reported = nnx.pop(model, nnx.Intermediate).to_pure_dict()
        return output, reported.get("decoder", {}).get("hidden_states")

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        logits, hidden = jax.eval_shape(lambda: call(config))
        assert logits.shape == (*shape, config.vocab_size) and hidden is None
        logits, hidden = jax.eval_shape(lambda: call(upstream.with_vocab_tiling(config)))
    assert logits is None
    assert [x.shape for x in hidden] == [(*shape, config.emb_dim)]


def test_a_topology_has_a_platform_a_name_and_a_size():
    spec = upstream.topologies()["v5e-16"]
    assert (spec.platform, spec.topology_name, spec.devices_per_slice) == ("tpu", "v5e:4x4", 16)
