"""Configuration: base.yml, the user's yml and the command line -> student, teacher and distillation settings.

Whatever is wrong with the input is found here and raised as ConfigError: one message with key, value and what is
allowed. Left out on purpose: what only the teacher's checkpoint can tell (teacher.py).
"""

import contextlib
import dataclasses
import difflib
import os
import pathlib
from typing import Any, Literal

import omegaconf
import pydantic
import yaml

from MaxText import upstream

CONFIGS = pathlib.Path(__file__).resolve().parent / "configs"

# Upstream branches its train step and its loop on these; under use_kd those are ours, and what ours does not carry is
# refused by name. Each entry: key -> the values that are fine.
REFUSED_WITH_KD: dict[str, tuple] = {
    "attention_type": ("global", "local_sliding", "chunk", "mla", "full", "compressed"),
    "compiled_trainstep_file": ("",),
    "dcn_pipeline_parallelism": (1,),
    "elastic_enabled": (False,),
    "enable_diloco": (False,),
    "enable_mllog": (False,),
    "ici_pipeline_parallelism": (1,),
    "log_required_ragged_buffer_factor": (False,),
    "log_moe_bias_norms": (False,),
    "log_step_diagnostics": (False,),
    "moe_dropless_fallback": ("none", "", None),
    "moe_log_max_load_ratio": (False,),
    "optimizer_memory_host_offload": (False,),
    "parameter_memory_host_offload": (False,),
    "shard_mode": ("auto",),
    "te_moe_block": (False,),
    "training_objective": ("causal_lm",),
    "use_dpo": (False,),
    "use_indexer": (False,),
    "use_multimodal": (False,),
    "use_tunix_gradient_accumulation": (False,),
    "warmup_programs_in_init": (False,),
}

# The keys that say where the data lies, by dataset_type.
DATA_KEYS: dict[str, tuple[str, ...]] = {
    "grain": ("grain_file_type", "grain_train_files", "grain_eval_files", "grain_train_mixture_config_path"),
    "hf": ("hf_path", "hf_name", "hf_data_dir", "hf_train_files", "hf_eval_files"),
    "olmo_grain": ("olmo_index_path",),
    "tfds": ("dataset_path", "dataset_name", "eval_dataset_name"),
    "c4_mlperf": ("dataset_path", "dataset_name", "eval_dataset_name"),
}


class ConfigError(Exception):
    """Input that cannot be trained on. Its text names the key, the value and what is allowed."""


class KDKeys(pydantic.BaseModel):
    """The keys of MaxText/configs/base.yml, which holds their meaning and their defaults."""

    use_kd: bool
    kd_alpha: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_alpha_schedule: Literal["constant", "linear", "cosine", "wsd"]
    kd_alpha_start: float | None = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_alpha_end: float | None = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_temperature: float = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_temperature_schedule: Literal["constant", "linear", "cosine", "wsd"]
    kd_temperature_start: float | None = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_temperature_end: float | None = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_top_k: int = pydantic.Field(ge=0)
    kd_top_p: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_truncation_strategy: Literal["renormalize", "other_bucket", "renormalize_teacher"]
    kd_teacher_parameters_path: str
    kd_teacher_model_name: str
    kd_teacher_overrides: dict[str, Any]
    kd_teacher_dtype: Literal["", "bfloat16", "float16", "float32"]
    kd_teacher_tokenizer_path: str
    kd_vocab_size: int = pydantic.Field(ge=0)
    kd_mtp_alpha: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_block_mib: int = pydantic.Field(gt=0)
    kd_teacher_max_ce: float = pydantic.Field(ge=0, allow_inf_nan=False)
    kd_allow_change: bool

    @pydantic.field_validator(
        "kd_alpha", "kd_temperature", "kd_top_k", "kd_top_p", "kd_block_mib", "kd_teacher_max_ce", "kd_vocab_size",
        "kd_mtp_alpha",
        "kd_alpha_start", "kd_alpha_end", "kd_temperature_start", "kd_temperature_end", mode="before",
    )  # fmt: skip
    @classmethod
    def _true_is_no_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a number is expected")
        return value

    @pydantic.field_validator(
        "kd_teacher_parameters_path", "kd_teacher_model_name", "kd_teacher_dtype", "kd_teacher_overrides",
        "kd_teacher_tokenizer_path", mode="before",
    )  # fmt: skip
    @classmethod
    def _none_is_empty(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """`key=` on the command line arrives as None."""
        return value if value is not None else {} if info.field_name == "kd_teacher_overrides" else ""


class Distillation(KDKeys, frozen=True, extra="forbid"):
    """The settings of a run's distillation, checked and frozen."""

    @property
    def truncates(self) -> bool:
        return self.kd_top_k > 0 or 0 < self.kd_top_p < 1

    @property
    def teacher_in_step(self) -> bool:
        """Whether the train step runs the teacher; evaluation always does under use_kd."""
        return self.use_kd and (self.kd_alpha > 0 or self.kd_alpha_schedule != "constant")

    def warnings(self) -> list[str]:
        if not (self.teacher_in_step and self.truncates and self.kd_truncation_strategy == "renormalize"):
            return []
        found = []
        if self.kd_top_k == 1:
            found.append("kd_top_k=1 with kd_truncation_strategy=renormalize: one token is kept, the KL is always 0.")
        if {self.kd_alpha_start, self.kd_alpha, self.kd_alpha_end} <= {1, None}:
            found.append(
                "kd_alpha=1 with kd_truncation_strategy=renormalize: nothing sees the probability that the student "
                "puts outside the kept tokens. Use other_bucket, or kd_alpha < 1."
            )
        return found


def config_class() -> type[pydantic.BaseModel]:
    """MaxText's configuration with the kd_* keys, and with `model_name` open to presets that upstream does not list."""
    return pydantic.create_model("DistillationConfig", __base__=(KDKeys, upstream.types.MaxTextConfig), model_name=str)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's settings before the teacher's are derived.

    Attributes:
      student: MaxText's configuration of the student and of everything that is not a model.
      kd: the distillation settings.
      user: what the user set, from yml files and command line, without the defaults beneath.
    """

    student: Any
    kd: Distillation
    user: dict[str, Any]


def initialize(argv: list[str]) -> Run:
    """Resolves `argv` = [program, [config.yml], key=value ...].

    Raises:
      ConfigError: on any input that cannot be trained on.
    """
    arguments = list(argv[1:])
    if not arguments:
        raise ConfigError(f"nothing to train: python {argv[0]} <config>.yml key=value ...")
    path = arguments.pop(0) if arguments[0].endswith((".yml", ".yaml")) else str(CONFIGS / "base.yml")
    malformed = [a for a in arguments if "=" not in a]
    if malformed:
        raise ConfigError(f"{malformed[0]!r}: arguments are key=value, after at most one config.yml")
    base, user_files = load_layers(path)
    command_line = omegaconf.OmegaConf.from_cli(arguments)
    user = resolved_keys(base, omegaconf.OmegaConf.merge(user_files, command_line))
    schema = config_class()
    check_keys(user, schema)
    if check_kd(user | environment_keys(KDKeys)).use_kd:  # before the engine finds another fault with the same keys
        check_refused(refusable(user | environment_keys(schema), schema))
    merged = omegaconf.OmegaConf.merge(base, user_files)
    output = user.get("base_output_directory")
    if output and "M_BASE_OUTPUT_DIRECTORY" not in os.environ:  # checkpoints want an absolute path
        arguments = [a for a in arguments if not a.startswith("base_output_directory=")]
        arguments.append(f"base_output_directory={absolute(str(output))}")
    student_preset = str(user.get("model_name", "default"))
    folder = preset_folder("model_name", student_preset, pathlib.Path(path).parent)
    upstream.set_verbose(merged_flag(base, user, "log_config"))
    upstream.prepare_runtime()
    student = resolve("", merged, folder, arguments, schema)
    check_run(student)
    kd = Distillation(**{key: getattr(student, key) for key in KDKeys.model_fields})
    if kd.use_kd:
        check_teacher_keys(kd, student, schema, pathlib.Path(path).parent)
    # What the environment set (M_<KEY>) is the user's word, too.
    user |= {key: getattr(student._pydantic_config, key) for key in environment_keys(schema)}
    return Run(student=student, kd=kd, user=user | {"config_folder": str(pathlib.Path(path).parent)})


# The yml files ------------------------------------------------------------------------------------------------------


def load_layers(path: str) -> tuple[omegaconf.DictConfig, omegaconf.DictConfig]:
    """Loads `path` and the files its `base_config` leads to -> (defaults, the user's files merged).

    A relative `base_config` is looked for beside the file that names it, then in MaxText/configs, then in upstream's
    configs. The defaults are upstream's base.yml under ours, whatever the user's files name.
    """
    ours = CONFIGS / "base.yml"
    defaults = omegaconf.OmegaConf.merge(load_yml(upstream.base_yml()), load_yml(str(ours)))
    user = omegaconf.OmegaConf.create()
    seen: set[pathlib.Path] = set()
    current: pathlib.Path | None = pathlib.Path(path)
    while current is not None and current.resolve() not in (ours, pathlib.Path(upstream.base_yml()).resolve()):
        if current.resolve() in seen:
            raise ConfigError(f"base_config={str(current)!r}: the files name each other in a circle")
        seen.add(current.resolve())
        layer = load_yml(str(current))
        user = omegaconf.OmegaConf.merge(layer, user)
        name = layer.get("base_config")
        current = find_base(name, current) if name else None
    return defaults, user


def find_base(name: str, named_by: pathlib.Path) -> pathlib.Path:
    candidates = [folder / name for folder in (named_by.parent, CONFIGS, pathlib.Path(upstream.base_yml()).parent)]
    for candidate in candidates:
        if candidate.is_file() and candidate.resolve() != named_by.resolve():
            return candidate
    raise ConfigError(f"base_config={name!r} in {named_by}: no such file; looked at {', '.join(map(str, candidates))}")


def load_yml(path: str) -> omegaconf.DictConfig:
    try:
        loaded = omegaconf.OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path}: not a readable yml file ({error})") from None
    if not isinstance(loaded, omegaconf.DictConfig):
        raise ConfigError(f"{path}: a config file holds `key: value` lines")
    return loaded


def merged_flag(base: omegaconf.DictConfig, user: dict[str, Any], key: str) -> bool:
    return str(user.get(key, base[key])).lower() == "true"


def resolved_keys(base: omegaconf.DictConfig, user: omegaconf.DictConfig) -> dict[str, Any]:
    """The user's keys with their interpolations, which may name keys of `base`, filled in."""
    try:
        everything = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.merge(base, user), resolve=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    return {str(key): everything[key] for key in user}


def absolute(path: str) -> str:
    """A local path from the root; a path with a scheme (gs://) as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def environment_keys(schema: type[pydantic.BaseModel]) -> dict[str, str]:
    """Settings given as environment variables M_<KEY>, which upstream reads too."""
    return {k: os.environ[f"M_{k.upper()}"] for k in schema.model_fields if f"M_{k.upper()}" in os.environ}


# Checks -------------------------------------------------------------------------------------------------------------


def check_keys(user: dict[str, Any], schema: type[pydantic.BaseModel], inside: str = "") -> None:
    known = upstream.known_keys(schema)
    for key in user:
        if key not in known:
            raise ConfigError(f"{inside}{key}={user[key]!r}: no such key{suggestion(str(key), known)}")


def suggestion(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_kd(user: dict[str, Any]) -> KDKeys:
    """Checks the kd_* keys alone: their errors need neither the engine nor a device."""
    defaults = load_yml(str(CONFIGS / "base.yml"))
    values = {key: user.get(key, defaults[key]) for key in KDKeys.model_fields}
    try:
        kd = Distillation(**values)
    except pydantic.ValidationError as error:
        raise ConfigError(describe(error)) from None
    if kd.kd_top_k > 0 and kd.kd_top_p > 0:
        raise ConfigError(f"kd_top_k={kd.kd_top_k} kd_top_p={kd.kd_top_p}: set one of the two and leave the other 0")
    if kd.use_kd and not kd.kd_teacher_parameters_path:
        raise ConfigError(
            "kd_teacher_parameters_path='': use_kd=true needs the teacher's checkpoint, a local path or gs://"
        )
    for quantity in ("kd_alpha", "kd_temperature"):
        check_schedule_keys(quantity, kd)
    return kd


# The form of a schedule -> which of its _start and _end it reads: at least one of them, and of linear and cosine all.
SCHEDULE_KEYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("end",),
    "cosine": ("end",),
    "wsd": ("start", "end"),
}


def check_schedule_keys(quantity: str, kd: KDKeys) -> None:
    form = getattr(kd, f"{quantity}_schedule")
    given = [part for part in ("start", "end") if getattr(kd, f"{quantity}_{part}") is not None]
    for part in given:
        if part not in SCHEDULE_KEYS[form]:
            readers = " or ".join(name for name, parts in SCHEDULE_KEYS.items() if part in parts)
            key = f"{quantity}_{part}"
            raise ConfigError(
                f"{key}={getattr(kd, key)}: {quantity}_schedule={form} does not read it; it belongs to {readers}"
            )
    if SCHEDULE_KEYS[form] and not given:
        needed = " or ".join(f"{quantity}_{part}" for part in SCHEDULE_KEYS[form])
        raise ConfigError(f"{quantity}_schedule={form}: needs {needed}")


def check_schedule_phases(quantity: str, kd: KDKeys, student: Any) -> None:
    """wsd follows the phases of the learning rate; each that it moves in must exist."""
    key = f"{quantity}_schedule"
    if getattr(kd, key) != "wsd":
        return
    kind = student.lr_schedule_type
    if getattr(kind, "value", kind) != "wsd":
        raise ConfigError(
            f"{key}=wsd lr_schedule_type={getattr(kind, 'value', kind)}: the learning rate has no such phases; set "
            f"lr_schedule_type=wsd, or {key} to linear or cosine"
        )
    phases = upstream.wsd_phases(student)
    for part, name, steps, fraction in (
        ("start", "warm-up", phases.warmup, "warmup_steps_fraction"),
        ("end", "decay", phases.decay, "wsd_decay_steps_fraction"),
    ):
        moved = f"{quantity}_{part}"
        if getattr(kd, moved) is not None and steps == 0:
            raise ConfigError(
                f"{moved}={getattr(kd, moved)} {fraction}={getattr(student, fraction)}: the learning rate's {name} has "
                f"no step out of {student.learning_rate_schedule_steps} (learning_rate_schedule_steps)"
            )


def refusable(settings: dict[str, Any], schema: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The settings of REFUSED_WITH_KD, as their key's type; where a value is of another, the engine says so."""
    found = {}
    for key in settings.keys() & REFUSED_WITH_KD.keys():
        kind: Any = schema.model_fields[key].annotation
        with contextlib.suppress(pydantic.ValidationError):
            found[key] = pydantic.TypeAdapter(kind).validate_python(settings[key])
    return found


def check_refused(settings: dict[str, Any]) -> None:
    for key, fine in REFUSED_WITH_KD.items():
        value = settings.get(key, fine[0])
        value = getattr(value, "value", value)
        if value not in fine:
            allowed = [repr(other) for other in fine if other not in ("", None)] or [repr(fine[0])]
            raise ConfigError(
                f"{key}={value!r}: not supported together with use_kd=true; allowed is {' or '.join(allowed)}"
            )


def check_run(student: Any) -> None:
    if "://" in (student.metrics_file or ""):
        raise ConfigError(f"metrics_file={student.metrics_file!r}: a local path is expected")
    if student.dataset_type == "synthetic" and student.eval_interval > 0 and student.eval_steps <= 0:
        raise ConfigError(f"eval_steps={student.eval_steps}: synthetic data never ends; set the batches to evaluate on")
    if student.dataset_type == "hf" and student.eval_interval > 0 and student.grain_worker_count == 0:
        raise ConfigError("grain_worker_count=0: with dataset_type=hf evaluation data is read once only; 1 is allowed")
    if student.elastic_enabled and not student.use_kd:
        raise ConfigError("elastic_enabled=True: run it by MaxText's own program, maxtext.trainers.pre_train.train")


def check_teacher_keys(kd: Distillation, student: Any, schema: type[pydantic.BaseModel], folder: pathlib.Path) -> None:
    check_keys(kd.kd_teacher_overrides, schema, inside="kd_teacher_overrides: ")
    if kd.kd_teacher_model_name:
        preset_folder("kd_teacher_model_name", kd.kd_teacher_model_name, folder)
    if kd.kd_vocab_size > student.vocab_size:
        raise ConfigError(f"kd_vocab_size={kd.kd_vocab_size}: at most the student's vocab_size, {student.vocab_size}")
    if kd.kd_top_k > (kd.kd_vocab_size or student.vocab_size):
        shared = f"kd_vocab_size, {kd.kd_vocab_size}" if kd.kd_vocab_size else f"vocab_size, {student.vocab_size}"
        raise ConfigError(f"kd_top_k={kd.kd_top_k}: at most {shared}")
    if kd.kd_mtp_alpha > 0 and student.mtp_num_layers == 0:
        raise ConfigError(
            f"kd_mtp_alpha={kd.kd_mtp_alpha} mtp_num_layers=0: the student has no MTP head to distil into"
        )
    if kd.kd_mtp_alpha > 0 and not kd.teacher_in_step:
        raise ConfigError(f"kd_mtp_alpha={kd.kd_mtp_alpha} kd_alpha=0: kd_alpha=0 leaves the teacher out of the step")
    for quantity in ("kd_alpha", "kd_temperature"):
        check_schedule_phases(quantity, kd, student)
    check_refused({key: getattr(student, key) for key in REFUSED_WITH_KD})
    if student.lora.enable_lora:
        raise ConfigError("lora.enable_lora=True: not supported together with use_kd=true; allowed is False")
    if student.quantization and "fp8" in student.quantization:
        raise ConfigError(
            f"quantization={student.quantization!r}: fp8 keeps a state of its own that use_kd=true does not carry; "
            "allowed is '' or an int8 recipe"
        )


def resolve(
    who: str, base: omegaconf.DictConfig, folder: str, arguments: list[str], schema: type, **overrides: Any
) -> Any:
    try:
        return upstream.resolve_config(base, folder, arguments, schema, **overrides)
    except pydantic.ValidationError as error:
        raise ConfigError(who + describe(error)) from None
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        if upstream.is_about_the_cluster(error):
            raise ConfigError(
                f"hardware, skip_jax_distributed_system: found no cluster to join ({error}). One machine without TPUs "
                "is hardware=cpu skip_jax_distributed_system=true or hardware=gpu; of several, each must be told of "
                "the others (README_ORIGINAL.md)."
            ) from error
        raise ConfigError(f"{who}{error}") from None


def describe(error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        key = ".".join(map(str, item["loc"]))
        lines.append(f"{key}={item['input']!r}: {message}" if key else message)
    return "\n".join(lines)


def data_settings(config: Any) -> str:
    """What says where the data lies, as key=value ...: for errors about it."""
    kind = getattr(config.dataset_type, "value", config.dataset_type)
    values = {"dataset_type": kind} | {key: getattr(config, key) for key in DATA_KEYS.get(kind, ())}
    return " ".join(f"{key}={value!r}" for key, value in values.items() if value)


# Presets ------------------------------------------------------------------------------------------------------------


def preset_places(config_folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of presets in the order in which they are searched: beside the config, ours, upstream's."""
    ours = [folder / "models" for folder in (config_folder, config_folder.parent, CONFIGS)]
    return [*ours, *map(pathlib.Path, upstream.preset_folders())]


def preset_file(name: str, config_folder: pathlib.Path) -> pathlib.Path | None:
    name = name.replace("-Instruct", "")  # upstream: an instruct model has the architecture of its base
    files = (folder / f"{name}.yml" for folder in preset_places(config_folder))
    return next((file for file in files if file.is_file()), None)


def preset_folder(key: str, name: str, config_folder: pathlib.Path) -> str:
    """The folder whose `models/` holds the preset `name`.

    Raises:
      ConfigError: no preset has that name; the message lists near ones.
    """
    if name == "default":
        return str(CONFIGS)
    file = preset_file(name, config_folder)
    if file is None:
        known = {other.stem for folder in preset_places(config_folder) for other in folder.glob("*.yml")}
        raise ConfigError(f"{key}={name!r}: no such model preset{suggestion(name, known)}")
    return str(file.parent.parent)


def preset_keys(name: str, config_folder: pathlib.Path) -> set[str]:
    """The keys that the preset `name` sets."""
    file = preset_file(name, config_folder)
    return {str(key) for key in load_yml(str(file))} if file else set()


# The teacher's configuration ----------------------------------------------------------------------------------------


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


def teacher_config(run: Run, scan_layers: bool | None) -> Any:
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
    user = {key: value for key, value in run.user.items() if key in upstream.known_keys(schema)}
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
    base, _ = load_layers(str(CONFIGS / "base.yml"))
    preset = preset_folder("kd_teacher_model_name", str(settings.get("model_name", "default")), folder)
    # The student's M_<KEY> variables are already in what the teacher shares; they must not reshape the teacher.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("M_")}
    with upstream.mock.patch.dict(os.environ, kept, clear=True):
        teacher = resolve("the teacher's settings: ", base, preset, [], schema, **settings)
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
