"""The only door to MaxText's internals: what this project takes from the package `maxtext`, in one place.

An upgrade of the engine is a diff of this file; tests/test_upstream.py names what each use relies on. The engine takes
some ten seconds to import, so its modules are imported when first touched: a misspelt key is reported at once.
Left out on purpose: everything that is a choice of this project (losses, teacher, metrics, loop).
"""

# ruff: noqa: F401  the modules are here for others to reach

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import absl.logging
import omegaconf
import pydantic
from etils import epy

# The engine imports TensorFlow and transformers for its input pipelines; neither's greetings concern the user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

with epy.lazy_imports():
    import pathwaysutils
    from maxtext.checkpoint_conversion import to_maxtext
    from maxtext.checkpoint_conversion.utils import hf_model_configs, hf_shape, param_mapping
    from maxtext.checkpoint_conversion.utils import utils as hf_utils
    from maxtext.common import checkpoint_context, checkpointing, goodput, metric_logger, profiler, train_state_nnx
    from maxtext.configs import pyconfig, types
    from maxtext.input_pipeline import (
        data_processing_utils,
        grain_data_processing,
        hf_data_processing,
        input_pipeline_interface,
        input_pipeline_utils,
        instruction_data_processing,
        multihost_dataloading,
        tfds_data_processing,
        tokenizer,
    )
    from maxtext.input_pipeline.protos import example_pb2
    from maxtext.layers import attentions, embeddings, moe, multi_token_prediction, nnx_decoders, normalizations
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train as pre_train
    from maxtext.utils import (
        accelerator_to_spec_map,
        exceptions,
        gcs_utils,
        globals,
        gradient_accumulation,
        max_utils,
        maxtext_utils,
        model_creation_utils,
        qk_clip_utils,
        sharding,
        train_utils,
    )


def prepare_runtime() -> None:
    """What upstream's `train.initialize` sets before the configuration is resolved and a device is touched."""
    import jax

    pathwaysutils.initialize()
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    flag = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"
    if flag.split("=")[0] not in os.environ.get("LIBTPU_INIT_ARGS", ""):
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flag}"


def resolve_config(
    defaults: dict[str, Any],
    files: omegaconf.DictConfig,
    preset_folder: str,
    arguments: list[str],
    config_class: type,
    **overrides: Any,
) -> Any:
    """Resolves layers of settings into MaxText's configuration object.

    Args:
      defaults: what holds where nothing is said. Upstream merges yml files, arguments and preset five times over: the
        thousand keys that none of them may change are laid beneath when it is done.
      files: the yml files, already merged; upstream would look for them only beside each other and in its own package.
      preset_folder: a folder whose `models/` is searched before upstream's for `<model_name>.yml`.
      arguments: `key=value` of the command line.
      config_class: the pydantic model that the settings must satisfy.
      **overrides: settings that win over all others.

    Raises:
      pydantic.ValidationError: a value of the wrong type or outside its range.
      ValueError: what upstream's own validation refuses.
    """
    anchor = os.path.join(preset_folder, "base.yml")  # upstream derives the preset's folder from this name
    prepare = pyconfig._prepare_for_pydantic

    rules = "logical_axis_rules"
    # OmegaConf makes nodes of nodes of 80 rules, five times over. Preset and arguments add to them, which can be done
    # at the end; files, and what the environment says of it, have another way.
    are_added = not any(rules in name.lower() for name in (*files, *os.environ))

    def is_merged(key: str) -> bool:
        """What the environment sets is of the type that is there."""
        return (key == rules and not are_added) or f"M_{key.upper()}" in os.environ

    base = omegaconf.OmegaConf.merge({key: value for key, value in defaults.items() if is_merged(key)}, files)

    def on_defaults(raw_keys: dict[str, Any], **settings: Any) -> dict[str, Any]:
        if are_added:
            raw_keys[rules] = pyconfig._apply_rules(defaults[rules], raw_keys[rules], raw_keys)
        return prepare(defaults | raw_keys, **settings)

    with (
        mock.patch.object(pyconfig, "_load_config", lambda _: base),
        mock.patch.object(pyconfig, "_prepare_for_pydantic", on_defaults),
    ):
        resolved = pyconfig._initialize_pydantic(["", anchor, *arguments], config_class=config_class, **overrides)
    return pyconfig.HyperParameters(resolved)


def is_about_the_cluster(error: Exception) -> bool:
    """Whether `error` was raised where `resolve_config` joins the other hosts."""
    joining = max_utils.maybe_initialize_jax_distributed_system.__code__
    return any(frame.f_code is joining for frame, _ in traceback.walk_tb(error.__traceback__))


def with_settings(config: Any, **changed: Any) -> Any:
    """The same settings but for these, which nothing checks or derives others from."""
    return pyconfig.HyperParameters(config._pydantic_config.model_copy(update=changed))


def with_vocab_tiling(config: Any) -> Any:
    """The same settings, under which a decoder reports its last hidden states instead of projecting them.

    Any number above 1 does; upstream tiles by it, this project's loss does not read it.
    """
    return with_settings(config, num_vocab_tiling=2)


def without_mesh_axes(config: Any, names: set[str]) -> Any:
    """The same settings, under which arrays are not sharded along the logical axes of these names, nowhere."""
    rules = {
        key: [(name, () if name in names else axes) for name, axes in getattr(config, key)]
        for key in ("logical_axis_rules", "logical_axis_rules_for_eval")
    }
    return with_settings(config, **rules)


def preset_folders() -> list[str]:
    """The folders of MaxText's own that hold model presets."""
    return [os.path.join(globals.MAXTEXT_CONFIGS_DIR, "models")]


def base_yml() -> str:
    return os.path.join(globals.MAXTEXT_CONFIGS_DIR, "base.yml")


def known_keys(config_class: type[pydantic.BaseModel]) -> set[str]:
    """Every key a yml or the command line may hold: the fields of the model and of the models nested in it."""
    keys = set(config_class.model_fields)
    for field in config_class.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            keys |= known_keys(field.annotation)
    return keys


# The engine's voice ---------------------------------------------------------------------------------------------------


class OneLine(logging.Formatter):
    """The message alone: no prefix of absl's, and no traceback, of which orbax logs one per array it cannot write."""

    def formatException(self, ei: Any) -> str:
        return ""


def set_verbose(verbose: bool) -> None:
    """Shows upstream's messages as it writes them, or only errors, a line each."""
    absl.logging.set_verbosity(absl.logging.INFO if verbose else absl.logging.ERROR)
    if not verbose:
        absl.logging.get_absl_handler().setFormatter(OneLine("%(message)s"))


def is_verbose() -> bool:
    return absl.logging.get_verbosity() >= absl.logging.INFO


def quietly() -> contextlib.AbstractContextManager[None]:
    """Around what is only worth hearing with log_config=true."""
    return contextlib.nullcontext() if is_verbose() else silence()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards what is written to the process's output, by C++ libraries too. Exceptions pass."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(os.devnull, "w"))
        for descriptor in (1, 2):
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(sink.fileno(), descriptor)
        yield
        sys.stdout.flush()
        sys.stderr.flush()


def ignore_closed_loops() -> None:
    """Of a restore that failed, Orbax's readers may yet call back into an event loop that it has closed. What Python
    would print of that, a traceback in the middle of the message, says nothing."""
    print_others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_others(unraisable)

    sys.unraisablehook = hook


# Rotary positions -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """How `rope_type: llama3.1` stretches rotary positions; by default as MaxText's class has it built in.

    A frequency that turns at most `low_freq_factor` times in `original_length` tokens is divided by `factor`, one that
    turns `high_freq_factor` times or more is kept, and between the two the share that is kept grows in a straight line.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def of(cls, config: Any) -> "Llama3Scaling":
        return cls(
            config.rope_llama3_factor,
            config.rope_llama3_low_freq_factor,
            config.rope_llama3_high_freq_factor,
            config.rope_llama3_original_length,
        )


@functools.cache
def scaled_rotary_embedding() -> type:
    """The engine's class of Llama's rotary positions, with constants of its own in `scaling`."""
    import jax.numpy as jnp

    class ScaledRotaryEmbedding(embeddings.LLaMARotaryEmbedding):
        scaling: Llama3Scaling

        def _apply_scaling_factor(self, freq: Any) -> Any:
            low, high = self.scaling.low_freq_factor, self.scaling.high_freq_factor
            turns = self.scaling.original_length * freq / (2 * jnp.pi)
            kept = jnp.clip((turns - low) / (high - low), 0, 1)
            return freq * (kept + (1 - kept) / self.scaling.factor)

    return ScaledRotaryEmbedding


@functools.cache
def scale_rotary_positions_as_configured() -> None:
    """From here on each attention that is built scales positions by its own configuration (rope_llama3_*).

    In the engine's class, for the rest of the process: the engine builds models in many places, and one that was
    forgotten would be another model without a word. Where the constants are those built in, the engine's own code runs.
    """
    built_in = attentions.Attention.init_rotary_embedding

    @functools.wraps(built_in)
    def init_rotary_embedding(self: Any) -> Any:
        made = built_in(self)
        if type(made) is embeddings.LLaMARotaryEmbedding and Llama3Scaling.of(self.config) != Llama3Scaling():
            made.__class__ = scaled_rotary_embedding()
            made.scaling = Llama3Scaling.of(self.config)
        return made

    attentions.Attention.init_rotary_embedding = init_rotary_embedding


# A run ----------------------------------------------------------------------------------------------------------------

# Options whose branches live in upstream's loop; with use_kd=false that loop runs them, with use_kd=true they are
# refused (config/checks.py). Each entry: key -> the values that do not need it.
OWN_LOOP: dict[str, tuple] = {
    "elastic_enabled": (False,),
    "enable_diloco": (False,),
    "enable_mllog": (False,),
    "log_required_ragged_buffer_factor": (False,),
    "moe_dropless_fallback": ("none", "layer", "", None),
    "te_moe_block": (False,),
    "warmup_programs_in_init": (False,),
}


def needs_own_loop(config: Any) -> str:
    """The first option that only upstream's loop serves, as key=value; "" for none."""
    for key, without in OWN_LOOP.items():
        value = getattr(config, key)
        if getattr(value, "value", value) not in without:
            return f"{key}={value}"
    return ""


def start_engine(config: Any) -> Any:
    """Imports the engine and sets what upstream's `train.initialize` sets after the configuration -> goodput recorder.

    The imports greet at length (TensorFlow, transformers, the stubs of Google Cloud's services).
    """
    import jax

    with quietly():
        pre_train.train_step  # noqa: B018  the first touch imports
        input_pipeline_interface.create_data_iterator  # noqa: B018
        if pre_train._TF_AVAILABLE:  # TensorFlow reads data; left alone it would also take the GPU's memory
            pre_train.tf.config.set_visible_devices([], "GPU")
    jax.config.update("jax_use_shardy_partitioner", config.shardy)
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", config.remove_size_one_mesh_axis_from_type)
    os.environ["TFDS_DATA_DIR"] = config.dataset_path or ""
    if config.use_vertex_tensorboard or os.environ.get("UPLOAD_DATA_TO_TENSORBOARD"):
        pre_train.VertexTensorboardManager().configure_vertex_tensorboard(config)
    if config.te_comm_gemm_overlap != types.TeCommGemmOverlapPolicy.DISABLED:
        max_utils.bootstrap_transformer_engine_cgemm(config)
    return goodput.create_goodput_recorder(config)


@contextlib.contextmanager
def monitored(config: Any, recorder: Any) -> Iterator[None]:
    """The contexts upstream runs a job in: goodput, TransformerEngine's mesh, throttling between slices."""
    goodput.record_goodput(recorder, goodput.RECORD_JOB_START_TIME)
    with goodput.maybe_monitor_goodput(config), max_utils.maybe_get_transformer_engine_context(config):
        train_utils.maybe_apply_dcn_throttling(config)
        try:
            yield
            goodput.record_goodput(recorder, goodput.RECORD_JOB_END_TIME)
        finally:
            train_utils.maybe_cleanup_dcn_throttling(config)


@contextlib.contextmanager
def models_traced_once() -> Iterator[None]:
    """The making of a model is traced once; where the engine makes the same model again, its equations are repeated.

    `setup_train_loop` makes it four times: for the optimizer, the state's shapes, its values and its graph. The program
    that draws the values is the one it would be, since the equations are inlined.
    """
    from flax import nnx

    function_for = model_creation_utils.get_nnx_create_model_fn

    def traced_once(*arguments: Any, **named: Any) -> Any:
        return nnx.jit(function_for(*arguments, **named), inline=True)

    with mock.patch.object(model_creation_utils, "get_nnx_create_model_fn", traced_once):
        yield


EMBEDDING_STD = 1.0  # that the engine draws every model's embedding table with, `models.Transformer`


def tflops_per_step(config: Any, teacher_config: Any | None) -> float:
    """TFLOPs per device of one step: the student's, and a teacher's forward pass, a third of what training it costs."""
    total, _, _ = maxtext_utils.calculate_tflops_training_per_device(config, log=False)
    if teacher_config is not None:
        total += maxtext_utils.calculate_tflops_training_per_device(teacher_config, log=False)[0] / 3
    return total


class Phases(NamedTuple):
    """The steps of each phase of the learning rate."""

    warmup: int
    stable: int
    decay: int


def wsd_phases(config: Any) -> Phases:
    """Where `create_learning_rate_schedule` puts warm-up, stable phase and decay for lr_schedule_type=wsd."""
    steps = config.learning_rate_schedule_steps
    warmup, decay = int(steps * config.warmup_steps_fraction), int(steps * config.wsd_decay_steps_fraction)
    return Phases(warmup, steps - warmup - decay, decay)


def is_data_failure(reason: Exception) -> bool:
    """Whether upstream's loader stopped the training because reading failed, rather than because the data ended."""
    return str(reason).startswith("`next(self.data_iterator)` failed")


def is_end_of_data(reason: Exception) -> bool:
    """Whether upstream's loader stopped the training because there is no more data."""
    return str(reason).startswith("You may have run out of training data")


def is_termination(reason: Exception) -> bool:
    """Whether a signal stopped the training: upstream's loop on several hosts, or ours."""
    return "SIGTERM" in str(reason)


def save_is_due(manager: Any, config: Any, step: int) -> bool:
    """Whether `maybe_save_checkpoint` would save this step. All hosts ask, or none."""
    return checkpointing._should_save_checkpoint_at_step(manager, step, config, False)


def save_last_step(manager: Any, state: Any, config: Any, data_iterator: Any) -> None:
    """Saves the step that was completed last, if it is not saved.

    `maybe_save_checkpoint` without a step is for that, too, but leaves out step 0 and, where checkpoints are
    continuous, whatever is a multiple of checkpoint_period.
    """
    checkpointing.wait_until_finished(manager)
    step = int(state.optimizer.step) - 1
    if step >= 0 and step not in checkpointing.all_steps(manager):
        checkpointing.save_checkpoint(manager, step, state, config, data_iterator, force=True)
        checkpointing.wait_until_finished(manager)


def stop_if_told(manager: Any, step: int) -> None:
    """Raises StopTraining after the step on which the hosts have agreed, one of them having had a termination signal.

    `maybe_save_checkpoint` asks, too. The step is agreed on once: hosts that do not ask at each of them may miss it.
    """
    checkpointing._handle_post_checkpoint_preemption(manager, step, False)


def plain_steps(config: Any, student: Any, data: Any, eval_data: Any, jit: Callable) -> tuple[Any, Any]:
    """The engine's own steps for training and evaluation, jitted as its `jit_train_and_eval_step` does, by our `jit`.

    Args:
      student: the student's graph, state, shardings and mesh (models/student.py).
      data, eval_data: how their batches are laid out.
      jit: jax.jit, with what the run has to say to the compiler.
    """
    graphdef, shardings = student.graphdef, student.state_shardings
    if config.compiled_trainstep_file:
        arguments = (graphdef, student.state, shardings, data, pre_train.train_step, student.params_shardings)
        return train_utils.jit_train_step(config, *arguments, mesh=student.mesh), None

    def jitted(function: Any, given: Any, returned: Any, static: Any, donated: Any) -> Any:
        places = {"in_shardings": given, "out_shardings": returned}
        return jit(function, **places, static_argnums=static, donate_argnums=donated)

    train_step = maxtext_utils.get_functional_train_with_signature(
        pre_train.train_step, data, shardings, graphdef, config, student.params_shardings
    )
    if not student.eval_data_iterator:
        return jitted(*train_step), None
    eval_graphdef = pre_train.build_eval_graphdef(config, graphdef, student.state) or graphdef
    eval_step = maxtext_utils.get_functional_eval_with_signature(
        pre_train.eval_step, eval_data, shardings, eval_graphdef, config
    )
    return jitted(*train_step), jitted(*eval_step)


def dump_hlo_once(config: Any, start_step: int, step: int, state: Any) -> None:
    """Uploads XLA's dump after the step that `dump_step` names (the first by default), when its compilation is over."""
    if not config.dump_hlo or step != (config.dump_step if config.dump_step >= 0 else start_step):
        return
    import jax

    jax.block_until_ready(state)
    where = {"local_dir": config.dump_hlo_local_dir, "target_dir": config.dump_hlo_gcs_dir}
    how = {"delete_local_after": config.dump_hlo_delete_local_after, "all_host_upload": config.dump_hlo_upload_all}
    gcs_utils.upload_dump(**where, **how, module_name=config.dump_hlo_module_name)


# Compilation without the hardware -------------------------------------------------------------------------------------


def topologies() -> dict[str, Any]:
    """The names that compile_topology may take -> platform, devices per slice and what libtpu calls them."""
    return accelerator_to_spec_map.UserFacingNameToSystemCharacteristics


def load_libtpu() -> None:
    """Lets jax load libtpu where there is no TPU: it takes no lock, and its search for a host stays off the screen."""
    import jax

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    with quietly():
        prepare_runtime()
        jax.devices()


def topology_devices(name: str, slices: int) -> list[Any]:
    """The devices of a topology, as libtpu describes them; none of them need exist."""
    from jax.experimental.topologies import get_topology_desc

    spec = topologies()[name]
    with quietly():
        return get_topology_desc(
            platform=spec.platform,
            topology_name=spec.topology_name,
            chip_config_name=spec.chip_config_name,
            chips_per_host_bounds=spec.chips_per_host_bounds,
            num_slices=slices,
            wrap=spec.wrap,
        ).devices


def abstract_train_state(config: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """What `setup_train_loop` makes of a fresh run, as shapes -> graph, state, shardings."""
    from flax import nnx
    from flax.core.spmd import logical_axis_rules

    with models_traced_once():
        create_model, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    _, optimizer = train_utils.create_training_optimizer(config, model, mesh=mesh)

    def create() -> Any:
        fresh = create_model()
        return train_state_nnx.TrainStateNNX(fresh, nnx.Optimizer(fresh, optimizer, wrt=nnx.Param))

    state, _, shardings = maxtext_utils.get_abstract_state(config, mesh, create, True)
    with logical_axis_rules(config.logical_axis_rules):
        graphdef = nnx.graphdef(nnx.eval_shape(create))
    return graphdef, state, shardings
