"""This project's keys: their types and ranges, and the error that names a wrong one.

Left out on purpose: their meaning and defaults, which stand in MaxText/configs/base.yml; what a key means together with
others (checks.py).
"""

import contextlib
import functools
import os
from typing import Any, Literal, Self

import pydantic

from MaxText import upstream


class ConfigError(Exception):
    """Input that cannot be trained on. Its text names the key, the value and what is allowed."""


class KDKeys(pydantic.BaseModel):
    """The keys of distillation. MaxText/configs/base.yml holds their meaning and their defaults."""

    use_kd: bool
    kd_alpha: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_alpha_schedule: Literal["constant", "linear", "cosine", "wsd"]
    kd_alpha_start: float | None = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_alpha_end: float | None = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_temperature: float = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_temperature_schedule: Literal["constant", "linear", "cosine", "wsd"]
    kd_temperature_start: float | None = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_temperature_end: float | None = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
    kd_jsd_beta: float = pydantic.Field(gt=0, lt=1, allow_inf_nan=False)
    kd_skew: float = pydantic.Field(ge=0, lt=1, allow_inf_nan=False)
    kd_top_k: int = pydantic.Field(ge=0)
    kd_top_p: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_truncation_strategy: Literal["renormalize", "other_bucket", "renormalize_teacher"]
    kd_positions: float | Literal["all"]
    kd_teacher_parameters_path: str
    kd_teacher_model_name: str
    kd_teacher_overrides: dict[str, Any]
    kd_teacher_dtype: Literal["", "bfloat16", "float16", "float32"]
    kd_teacher_tokenizer_path: str
    kd_vocab_size: int = pydantic.Field(ge=0)
    kd_mtp_alpha: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)
    kd_embedding_std: float | None = pydantic.Field(gt=0, allow_inf_nan=False)
    kd_block_mib: int = pydantic.Field(ge=0)
    kd_teacher_max_ce: float = pydantic.Field(ge=0, allow_inf_nan=False)
    kd_cache_path: str
    kd_cache_mode: Literal["sample", "top_k"]
    kd_cache_draws: int = pydantic.Field(ge=1, le=65535)
    kd_cache_rows: int = pydantic.Field(ge=0)
    kd_cache_verify: bool
    kd_allow_change: bool

    @pydantic.field_validator(
        "kd_alpha", "kd_temperature", "kd_top_k", "kd_top_p", "kd_block_mib", "kd_teacher_max_ce", "kd_vocab_size",
        "kd_mtp_alpha", "kd_cache_draws", "kd_cache_rows", "kd_embedding_std",
        "kd_alpha_start", "kd_alpha_end", "kd_temperature_start", "kd_temperature_end", "kd_jsd_beta", "kd_skew",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _true_is_no_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a number is expected")
        return value

    @pydantic.field_validator("kd_positions", mode="before")
    @classmethod
    def _is_all_or_a_share(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all":  # from the environment numbers come as texts
            with contextlib.suppress(ValueError):
                value = float(value)
        if value != "all" and not (isinstance(value, float) and 0 < value < 1):
            raise ValueError("all is expected, or a share of the positions, above 0 and below 1")
        return value

    @pydantic.field_validator(
        "kd_teacher_parameters_path", "kd_teacher_model_name", "kd_teacher_dtype", "kd_teacher_overrides",
        "kd_teacher_tokenizer_path", "kd_cache_path", mode="before",
    )  # fmt: skip
    @classmethod
    def _none_is_empty(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """`key=` on the command line arrives as None."""
        return value if value is not None else {} if info.field_name == "kd_teacher_overrides" else ""

    @pydantic.field_validator("kd_cache_path")
    @classmethod
    def _with_the_home_folder(cls, value: str) -> str:
        """In a yml file no shell has looked at a ~."""
        return os.path.expanduser(value)


class RotaryKeys(pydantic.BaseModel):
    """The keys of MaxText/configs/base.yml that are a model's: how Llama 3's positions are scaled."""

    rope_llama3_factor: float = pydantic.Field(ge=1, allow_inf_nan=False)
    rope_llama3_low_freq_factor: float = pydantic.Field(gt=0, allow_inf_nan=False)
    rope_llama3_high_freq_factor: float = pydantic.Field(gt=0, allow_inf_nan=False)
    rope_llama3_original_length: int = pydantic.Field(gt=0)

    @pydantic.model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        low, high = self.rope_llama3_low_freq_factor, self.rope_llama3_high_freq_factor
        if low >= high:
            raise ValueError(f"rope_llama3_low_freq_factor={low:g}: below rope_llama3_high_freq_factor, {high:g}")
        return self


class Distillation(KDKeys, frozen=True, extra="forbid"):
    """The settings of a run's distillation, checked and frozen."""

    @property
    def truncates(self) -> bool:
        return self.kd_top_k > 0 or 0 < self.kd_top_p < 1

    @property
    def is_cached(self) -> bool:
        """Whether the student learns from stored targets."""
        return self.use_kd and bool(self.kd_cache_path)

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs, in the step or for evaluations alone."""
        return self.use_kd and bool(self.kd_teacher_parameters_path)

    @property
    def distils(self) -> bool:
        """Whether the train step takes a divergence."""
        return self.use_kd and (self.kd_alpha > 0 or self.kd_alpha_schedule != "constant")

    @property
    def chooses_positions(self) -> bool:
        """Whether the divergence is taken at some positions alone."""
        return self.distils and self.kd_positions != "all"

    @property
    def teacher_in_step(self) -> bool:
        """Whether the train step runs the teacher; where there is one, evaluation always does."""
        return self.distils and not self.is_cached

    def warnings(self) -> list[str]:
        if not (self.distils and self.truncates and self.kd_truncation_strategy == "renormalize"):
            return []
        found = []
        if self.kd_top_k == 1:
            found.append(
                "kd_top_k=1 with kd_truncation_strategy=renormalize: one token is kept, the divergence is always 0."
            )
        if {self.kd_alpha_start, self.kd_alpha, self.kd_alpha_end} <= {1, None}:
            found.append(
                "kd_alpha=1 with kd_truncation_strategy=renormalize: nothing sees the probability that the student "
                "puts outside the kept tokens. Use other_bucket, or kd_alpha < 1."
            )
        return found


@functools.cache
def config_class() -> type[pydantic.BaseModel]:
    """MaxText's configuration with our keys, and with `model_name` open to presets that upstream does not list."""
    bases = (KDKeys, RotaryKeys, upstream.types.MaxTextConfig)
    return pydantic.create_model("DistillationConfig", __base__=bases, model_name=str)


def environment_keys(schema: type[pydantic.BaseModel]) -> dict[str, str]:
    """Settings given as environment variables M_<KEY>, which upstream reads too."""
    return {k: os.environ[f"M_{k.upper()}"] for k in schema.model_fields if f"M_{k.upper()}" in os.environ}


def describe(error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        key = ".".join(map(str, item["loc"]))
        lines.append(f"{key}={item['input']!r}: {message}" if key else message)
    return "\n".join(lines)
