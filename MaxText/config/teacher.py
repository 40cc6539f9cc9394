"""The teacher's configuration: its preset, what it shares with the student's run, and kd_teacher_overrides."""

import os
import pathlib
from typing import Any

import omegaconf

from MaxText import upstream
from MaxText.config.keys import ConfigError, KDKeys, config_class
from MaxText.config.presets import preset_folder, preset_keys
from MaxText.config.resolve import Run, resolved


def shared_keys() -> set[str]:
    """The runtime keys that a teacher with a preset of its own takes from the student's run.

    They say how a batch is laid out over devices and with which kernels it is computed; none says what a model is.
    """
    types = upstream.types
    groups = (
        types.HardwareAndMesh, types.LayoutAndSharding, types.DcnParallelism, types.IciParallelism,
        types.PipelineParallelism, types.OrbaxStorage, types.SplashAttention, types.MoEKernels, types.AOT,
        # Attention kernels ask which pipeline packed a batch, and upstream checks that its files are named.
        types.DatasetGeneral, types.GrainDataset, types.HfDataset, types.TfdsDataset, types.OlmoGrainDataset,
    )  # fmt: skip
    layers = {"scan_layers", "param_scan_axis", "inhomogeneous_layer_cycle_interval", "num_layers_per_pipeline_stage",
              "num_pipeline_repeats", "pipeline_parallel_layers"}  # fmt: skip
    single = {"run_name", "base_output_directory", "max_target_length", "gradient_accumulation_steps", "steps",
              "dtype", "matmul_precision", "activations_in_float32", "attention", "remat_policy"}  # fmt: skip
    return {key for group in groups for key in group.model_fields} - layers | single


def resolve_teacher(run: Run, scan_layers: bool | None) -> Any:
    """MaxText's configuration of the teacher.

    Args:
      run: the run's settings.
      scan_layers: how the teacher's checkpoint holds its layers; None where it does not tell.

    Raises:
      ConfigError: the teacher's settings are invalid, or do not fit the student's batch and vocabulary.
    """
    schema = config_class()
    name = run.kd.kd_teacher_model_name
    folder = pathlib.Path(run.user["config_folder"])
    known = upstream.known_keys(schema)
    user = {key: value for key, value in run.user.items() if key in known}
    if not name:  # the student's preset wins over its yml; what it set is the teacher's as well
        by_preset = preset_keys(run.student.model_name, folder) & set(user)
        user |= {key: getattr(run.student._pydantic_config, key) for key in by_preset}
    if name:
        shared = shared_keys() | ({"logical_axis_rules"} if "logical_axis_rules" in user else set())
        user = {key: value for key, value in user.items() if key in shared} | {"model_name": name}
    not_the_teachers = set(KDKeys.model_fields) | {"base_config", "load_parameters_path", "load_full_state_path",
                                                   "quantization", "metrics_file", "jax_cache_dir"}  # fmt: skip
    user = {key: value for key, value in user.items() if key not in not_the_teachers}
    fixed = {"enable_dropout": False, "dropout_rate": 0.0, "mtp_num_layers": 0, "mtp_eval_target_module": 0,
             "enable_checkpointing": False, "enable_tensorboard": False, "override_model_config": True,
             "skip_jax_distributed_system": True, "jax_cache_dir": "", "log_config": False}  # fmt: skip
    if scan_layers is not None:
        fixed["scan_layers"] = scan_layers
    if run.kd.kd_teacher_dtype:
        fixed["weight_dtype"] = run.kd.kd_teacher_dtype
    settings = user | fixed | dict(run.kd.kd_teacher_overrides)
    if run.kd.kd_vocab_size:  # its tables are cut or filled up to the student's when they are restored
        settings["vocab_size"] = run.student.vocab_size
    preset = preset_folder("kd_teacher_model_name", str(settings.get("model_name", "default")), folder)
    # The student's M_<KEY> variables are already in what the teacher shares; they must not reshape the teacher.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("M_")}
    with upstream.mock.patch.dict(os.environ, kept, clear=True):
        teacher = resolved("the teacher's settings: ", omegaconf.DictConfig({}), preset, [], schema, **settings)
    check_fit(run, teacher)
    return teacher


def check_fit(run: Run, teacher: Any) -> None:
    student = run.student
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"kd_teacher_model_name={run.kd.kd_teacher_model_name!r}: the teacher's vocab_size is "
            f"{teacher.vocab_size}, the student's {student.vocab_size}. If both have one tokenizer and differ in "
            "padding alone, set kd_vocab_size to the number of its tokens; else set vocab_size, or "
            f"kd_teacher_overrides='{{vocab_size: {student.vocab_size}}}'"
        )
    laid_out = ("mesh_axes", "ici_parallelism", "dcn_parallelism", "max_target_length", "micro_batch_size_to_train_on",
                "context_parallel_load_balance", "shard_mode", "num_slices")  # fmt: skip
    for key in laid_out:
        if getattr(teacher, key) != getattr(student, key):
            raise ConfigError(
                f"kd_teacher_overrides: the teacher's {key} would be {getattr(teacher, key)!r}, the student's is "
                f"{getattr(student, key)!r}; one batch serves both"
            )
