"""Configuration: base.yml, the user's yml and the command line -> student and distillation settings.

Whatever is wrong with the input is found here and raised as ConfigError: one message with key, value and what is
allowed. The teacher's settings follow (teacher.py), once its checkpoint has told how its layers are stored.
"""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import omegaconf
import pydantic

from MaxText import upstream
from MaxText.config.checks import check_kd, check_keys, check_refused, check_run, check_teacher_keys, refusable
from MaxText.config.data import cached_data
from MaxText.config.files import (
    CONFIGS,
    absolute,
    keys_named_by,
    load_layers,
    merged_flag,
    plain_defaults,
    resolved_keys,
)
from MaxText.config.keys import ConfigError, Distillation, KDKeys, config_class, describe, environment_keys
from MaxText.config.presets import preset_folder


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


def initialize(argv: list[str], *, writes_cache: bool = False) -> Run:
    """Resolves `argv` = [program, [config.yml], key=value ...].

    Args:
      argv: the command line.
      writes_cache: for the program that makes the cache at kd_cache_path, and does not learn from it.

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
    given_keys = omegaconf.OmegaConf.merge(user_files, command_line)
    user = resolved_keys(base, given_keys)
    files = omegaconf.OmegaConf.merge(keys_named_by(base, given_keys), user_files)
    schema = config_class()
    check_keys(user, schema)
    given = check_kd(user | environment_keys(KDKeys), writes_cache=writes_cache)
    if given.use_kd:  # before the engine finds another fault with the same keys
        check_refused(refusable(user | environment_keys(schema), schema))
    stored = cached_data(given.kd_cache_path) if given.is_cached and not writes_cache else {}
    user |= stored
    output = user.get("base_output_directory")
    if output and "M_BASE_OUTPUT_DIRECTORY" not in os.environ:  # checkpoints want an absolute path
        arguments = [a for a in arguments if not a.startswith("base_output_directory=")]
        arguments.append(f"base_output_directory={absolute(str(output))}")
    student_preset = str(user.get("model_name", "default"))
    folder = preset_folder("model_name", student_preset, pathlib.Path(path).parent)
    upstream.set_verbose(merged_flag(base, user, "log_config"))
    upstream.prepare_runtime()
    on_cpu = str((user | environment_keys(schema)).get("hardware", base["hardware"])) == "cpu"
    # The first touch of devices: where libtpu is installed, it tells at length that there is no TPU.
    with upstream.quietly() if on_cpu else contextlib.nullcontext():
        student = resolved("", files, folder, arguments, schema, **stored)
    check_run(student)
    # Below one row a device MaxText reads a row for each and evaluates on a part of them.
    rows = student.global_batch_size_to_load_eval
    student = upstream.with_settings(student, global_batch_size_to_eval_on=rows, micro_batch_size_to_eval_on=rows)
    kd = Distillation(**{key: getattr(student, key) for key in KDKeys.model_fields})
    if kd.use_kd:
        check_teacher_keys(kd, student, schema, pathlib.Path(path).parent)
    # What the environment set (M_<KEY>) is the user's word, too.
    user |= {key: getattr(student._pydantic_config, key) for key in environment_keys(schema)}
    return Run(student=student, kd=kd, user=user | {"config_folder": str(pathlib.Path(path).parent)})


def resolved(
    who: str, files: omegaconf.DictConfig, folder: str, arguments: list[str], schema: type, **overrides: Any
) -> Any:
    try:
        config = upstream.resolve_config(plain_defaults(), files, folder, arguments, schema, **overrides)
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
    if upstream.Llama3Scaling.of(config) != upstream.Llama3Scaling():
        with upstream.quietly():  # the first touch imports
            upstream.scale_rotary_positions_as_configured()
    return config
