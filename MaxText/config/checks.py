"""What is wrong with settings that are each well formed: keys that nobody knows, values that do not go together.

Each check raises ConfigError, which names the key, the value and what is allowed. Left out on purpose: what only the
teacher's checkpoint can tell (models/teacher.py).
"""

import contextlib
import importlib.util
import pathlib
import re
from typing import Any

import pydantic

from MaxText import upstream
from MaxText.config.files import plain_defaults
from MaxText.config.keys import ConfigError, Distillation, KDKeys, describe
from MaxText.config.presets import preset_folder, suggestion

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


def check_keys(user: dict[str, Any], schema: type[pydantic.BaseModel], inside: str = "") -> None:
    known = upstream.known_keys(schema)
    for key in user:
        if key not in known:
            raise ConfigError(f"{inside}{key}={user[key]!r}: no such key{suggestion(str(key), known)}")


def check_kd(user: dict[str, Any], *, writes_cache: bool = False) -> Distillation:
    """Checks the kd_* keys alone: their errors need neither the engine nor a device."""
    defaults = plain_defaults()
    values = {key: user.get(key, defaults[key]) for key in KDKeys.model_fields}
    try:
        kd = Distillation(**values)
    except pydantic.ValidationError as error:
        raise ConfigError(describe(error)) from None
    if kd.kd_top_k > 0 and kd.kd_top_p > 0:
        raise ConfigError(f"kd_top_k={kd.kd_top_k} kd_top_p={kd.kd_top_p}: set one of the two and leave the other 0")
    if kd.use_kd and not kd.kd_teacher_parameters_path and not kd.kd_cache_path:
        raise ConfigError(
            "kd_teacher_parameters_path='': use_kd=true needs the teacher's checkpoint, a local path or gs://, or "
            "kd_cache_path, the folder of its stored targets"
        )
    if not kd.kd_cache_path and not writes_cache and (kd.kd_cache_rows or kd.kd_cache_verify):
        key = "kd_cache_rows" if kd.kd_cache_rows else "kd_cache_verify"
        raise ConfigError(f"{key}={getattr(kd, key)}: belongs to kd_cache_path, which is not set")
    check_divergence(kd, defaults)
    if writes_cache:
        check_caching(kd)
    elif kd.is_cached:
        check_cached(kd)
    for quantity in ("kd_alpha", "kd_temperature"):
        check_schedule_keys(quantity, kd)
    return kd


# A divergence's own number -> which of them read it.
DIVERGENCE_KEYS = {"kd_jsd_beta": ("jsd",), "kd_skew": ("skew_kl", "skew_reverse_kl")}
# Those that are sums over tokens of the teacher's: the others need a teacher with mass wherever the student has it.
OF_TEACHERS_TOKENS = ("forward_kl", "skew_kl")


def check_divergence(kd: KDKeys, defaults: dict[str, Any]) -> None:
    for key, readers in DIVERGENCE_KEYS.items():
        if kd.kd_divergence not in readers and (value := getattr(kd, key)) != defaults[key]:
            raise ConfigError(
                f"{key}={value}: kd_divergence={kd.kd_divergence} does not read it; it belongs to "
                f"{' or '.join(readers)}"
            )
    if kd.kd_truncation_strategy == "renormalize_teacher" and kd.kd_divergence not in OF_TEACHERS_TOKENS:
        raise ConfigError(
            f"kd_truncation_strategy=renormalize_teacher kd_divergence={kd.kd_divergence}: it has terms of the student "
            "outside the kept tokens, where that strategy leaves the teacher no mass; allowed is renormalize or "
            f"other_bucket, or kd_divergence={' or '.join(OF_TEACHERS_TOKENS)}"
        )


def check_caching(kd: KDKeys) -> None:
    """What a cache needs to be made."""
    for key, what in (("kd_cache_path", "the folder to write"), ("kd_teacher_parameters_path", "the teacher")):
        if not getattr(kd, key):
            raise ConfigError(f"{key}='': caching needs it, {what}")
    if "://" in kd.kd_cache_path:
        raise ConfigError(f"kd_cache_path={kd.kd_cache_path!r}: a folder is expected; a bucket must be mounted as one")
    if kd.kd_temperature_schedule != "constant":
        raise ConfigError(
            f"kd_temperature_schedule={kd.kd_temperature_schedule}: a cache is made at one temperature; allowed "
            "is constant"
        )
    if kd.kd_top_p:
        raise ConfigError(f"kd_top_p={kd.kd_top_p}: a cache holds draws or kd_top_k tokens; allowed is 0")
    if (kd.kd_top_k > 0) != (kd.kd_cache_mode == "top_k"):
        raise ConfigError(
            f"kd_cache_mode={kd.kd_cache_mode} kd_top_k={kd.kd_top_k}: top_k stores so many tokens a position, and "
            "sample leaves none out (kd_top_k=0)"
        )


def check_cached(kd: KDKeys) -> None:
    """What stored targets cannot serve."""
    if "://" in kd.kd_cache_path:
        raise ConfigError(f"kd_cache_path={kd.kd_cache_path!r}: a folder is expected; a bucket must be mounted as one")
    fine = {"kd_temperature_schedule": "constant", "kd_mtp_alpha": 0, "kd_top_p": 0, "kd_cache_verify": False}
    for key, allowed in fine.items():
        if (value := getattr(kd, key)) != allowed:
            raise ConfigError(
                f"{key}={value}: not supported together with kd_cache_path={kd.kd_cache_path!r}, whose targets are "
                f"stored; allowed is {allowed}"
            )


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
    for key in ("per_device_batch_size", "max_target_length"):
        if getattr(student, key) <= 0:
            raise ConfigError(f"{key}={getattr(student, key):g}: a number above 0 is expected")
    if "://" in (student.metrics_file or ""):
        raise ConfigError(f"metrics_file={student.metrics_file!r}: a local path is expected")
    if student.dataset_type == "synthetic" and student.eval_interval > 0 and student.eval_steps <= 0:
        raise ConfigError(f"eval_steps={student.eval_steps}: synthetic data never ends; set the batches to evaluate on")
    if student.dataset_type == "hf" and student.eval_interval > 0 and student.grain_worker_count == 0:
        raise ConfigError("grain_worker_count=0: with dataset_type=hf evaluation data is read once only; 1 is allowed")
    if student.expansion_factor_real_data > 1 and student.eval_interval > 0:
        raise ConfigError(
            f"expansion_factor_real_data={student.expansion_factor_real_data} eval_interval={student.eval_interval}: "
            "hosts that read no data cannot evaluate on it; allowed is one of the two"
        )
    if "float8" in str(student.weight_dtype):
        raise ConfigError(
            f"weight_dtype={student.weight_dtype}: MaxText trains no parameters of 8 bits; allowed is float32 or "
            "bfloat16 (a teacher may be held so: kd_teacher_overrides)"
        )
    if student.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("enable_wandb=True: the package wandb is not installed: pip install wandb")
    if student.lora.enable_lora:
        raise ConfigError(
            "lora.enable_lora=True: MaxText's pretraining, which use_kd=true goes on from, makes no adapters and would "
            "train nothing (docs/design/lora.md); allowed is False"
        )
    check_embedding_std(student)
    check_patterns(student)
    if student.elastic_enabled and not student.use_kd:
        raise ConfigError("elastic_enabled=True: run it by MaxText's own program, maxtext.trainers.pre_train.train")


def check_patterns(student: Any) -> None:
    """What is looked for in the paths of parameters must be regular expressions."""
    for key in ("trainable_parameters_mask", "adamw_mask"):
        for pattern in getattr(student, key):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"{key}={getattr(student, key)}: {pattern!r} is no regular expression ({error})"
                ) from None


def check_embedding_std(student: Any) -> None:
    """A scale that is asked for must be one that a table is given."""
    if student.kd_embedding_std is None:
        return
    given = f"kd_embedding_std={student.kd_embedding_std:g}"
    for key in ("load_parameters_path", "load_full_state_path"):
        if path := getattr(student, key):
            raise ConfigError(f"{given} {key}={path!r}: the student's embedding table is restored, not drawn")
    if not student.use_kd and (option := upstream.needs_own_loop(student)):
        raise ConfigError(f"{given} {option}: MaxText's own loop runs this, and draws the table itself")


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
    if kd.kd_mtp_alpha > 0 and not kd.distils:
        raise ConfigError(f"kd_mtp_alpha={kd.kd_mtp_alpha} kd_alpha=0: kd_alpha=0 leaves the teacher out of the step")
    for quantity in ("kd_alpha", "kd_temperature"):
        check_schedule_phases(quantity, kd, student)
    check_refused({key: getattr(student, key) for key in REFUSED_WITH_KD})
    if student.trainable_parameters_mask and student.shard_optimizer_over_data:
        raise ConfigError(
            f"trainable_parameters_mask={student.trainable_parameters_mask} shard_optimizer_over_data=True: parameters "
            "would lie where their moments do, which frozen ones have not; allowed is one of the two"
        )
    if student.quantization and "fp8" in student.quantization:
        raise ConfigError(
            f"quantization={student.quantization!r}: fp8 keeps a state of its own that use_kd=true does not carry; "
            "allowed is '' or an int8 recipe"
        )
