"""The runs that a sweep file asks for: every point of its grid with every seed. The file's format: docs/sweeps.md."""

import dataclasses
import fnmatch
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import omegaconf
import pydantic

from MaxText.config.checks import check_kd, check_keys
from MaxText.config.files import ROOT, load_layers, load_yml, resolved_keys
from MaxText.config.keys import ConfigError, config_class, describe

PYTHON = sys.executable.removeprefix(f"{ROOT}/")
SEED_KEYS = ("init_weights_seed", "data_shuffle_seed")

layers = functools.cache(load_layers)  # a second each


class Sweep(pydantic.BaseModel, extra="forbid"):
    """A sweep file; docs/sweeps.md says what its keys mean."""

    config: str
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]]
    keys: dict[str, Any] = {}
    exclude: list[dict[str, Any]] = []
    seeds: list[int] = [0]


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of the grid with one seed; `keys` is what the point sets."""

    point: str
    seed: int
    config: str
    keys: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.point}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={text(value)}" for key, value in (self.keys | dict.fromkeys(SEED_KEYS, self.seed)).items()]

    @property
    def settings(self) -> dict[str, Any]:
        return settings(self.config, tuple(f"{key}={text(value)}" for key, value in self.keys.items()))

    def command(self, out: Path) -> list[str]:
        metrics = f"metrics_file={out / self.name}/metrics.jsonl"
        places = [f"run_name={self.name}", f"base_output_directory={out}", metrics]
        return [PYTHON, "MaxText/train.py", self.config, *self.overrides, *places]

    def submission(self, options: Sequence[str]) -> list[str]:
        name = self.name.lower().replace(".", "-").replace("_", "-")  # as Kubernetes wants it
        named = [f"--config={self.config}", f"--workload={name}"]
        return [PYTHON, "scripts/submit_xpk.py", *options, *named, *self.overrides]


@functools.cache
def settings(config: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What yml files and overrides set, with the engine's defaults of what is read here."""
    defaults, files = layers(str(ROOT / config))
    user = omegaconf.OmegaConf.merge(files, omegaconf.OmegaConf.from_dotlist(list(overrides)))
    return {key: defaults[key] for key in ("steps", "eval_interval")} | resolved_keys(defaults, user)


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def load(path: Path, overrides: Sequence[str]) -> list[Run]:
    """The runs of a sweep file, in its order, with `overrides` in each.

    Raises:
      ConfigError: the file is not one, or the trainer would refuse a run.
    """
    keys = omegaconf.OmegaConf.to_container(load_yml(str(path)))
    if missing := {"config", "grid"} - keys.keys():
        raise ConfigError(f"{path}: is no sweep: no {' and no '.join(sorted(missing))} in it (docs/sweeps.md)")
    try:
        sweep = Sweep.model_validate(keys)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None
    parts = {"grid": sweep.grid, "seeds": sweep.seeds} | {f"grid.{key}": values for key, values in sweep.grid.items()}
    if empty := next((f"{name}={part}" for name, part in parts.items() if not part), ""):
        raise ConfigError(f"{path}: {empty}: asks for no run")
    common = sweep.keys | omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.from_dotlist(list(overrides)))
    runs = []
    for corner in itertools.product(*(axis(key, values) for key, values in sweep.grid.items())):
        keys = {key: value for _, part in corner for key, value in part.items()}
        if not any(excluded.items() <= keys.items() for excluded in sweep.exclude):
            point = "-".join(label for label, _ in corner)
            runs += [Run(point, seed, sweep.config, common | keys) for seed in sweep.seeds]
    if not runs:
        raise ConfigError(f"{path}: exclude leaves no run")
    check(path, runs)
    return runs


def axis(key: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """An axis of the grid as (label, keys) of each of its values."""
    if isinstance(values, dict):
        return list(values.items())
    return [(f"{key.removeprefix('kd_')}{text(value)}", {key: value}) for value in values]


def check(path: Path, runs: list[Run]) -> None:
    schema, names = config_class(), [run.name for run in runs]
    for run in {run.point: run for run in runs}.values():
        try:
            if key := next((key for key in SEED_KEYS if key in run.keys), ""):
                raise ConfigError(f"{key}={run.keys[key]}: is set to each of seeds")
            check_keys(run.settings, schema)
            check_kd(run.settings)
            for key, why in (("steps", "whole numbers from 1 on"), ("eval_interval", "evaluations are compared")):
                if not isinstance(run.settings[key], int) or run.settings[key] <= 0:
                    raise ConfigError(f"{key}={run.settings[key]}: {why}")
            if names.count(run.name) > 1:
                raise ConfigError("two points or seeds have one name")
        except ConfigError as error:
            raise ConfigError(f"{path}: {run.point}: {error}") from None


def select(runs: list[Run], patterns: Sequence[str]) -> list[Run]:
    """Those whose name, or whose point's, matches a pattern; all where there is none."""
    if not patterns:
        return runs
    chosen = [run for run in runs if any(fnmatch.fnmatch(name, p) for name in (run.name, run.point) for p in patterns)]
    if not chosen:
        raise ConfigError(f"--only {' '.join(patterns)}: none of {', '.join(dict.fromkeys(r.point for r in runs))}")
    return chosen
