"""What XLA is told when a step is compiled: the flags of the chip (MaxText/configs/flags), and the run's own.

They are given to jax.jit, so that training, caching and train_compile compile the same program, wherever they are
started. Left out on purpose: LIBTPU_INIT_ARGS, which a process's environment holds and no configuration.
"""

from typing import Any

import jax

from MaxText import upstream
from MaxText.chips import Chip, chip_of
from MaxText.config.files import CONFIGS, load_yml
from MaxText.config.keys import ConfigError

FLAGS = CONFIGS / "flags"  # a file per chip, by its name


def compiler_options(config: Any, mesh: jax.sharding.Mesh, *, distils: bool) -> dict[str, str] | None:
    """As jax.jit takes them: then the program that is compiled ahead is the one that runs.

    Args:
      config: its compile_xla_flags win over the chip's, flag by flag.
      mesh: whose devices it is compiled for.
      distils: False for the engine's own runs, which have their own flags alone.
    """
    chip = chip_of(mesh)
    given = of_chip(chip) if distils and chip is not None else ""
    return (parsed(given) | parsed(config.compile_xla_flags)) or None


def of_chip(chip: Chip) -> str:
    """Its flags in one line; "" without a file."""
    file = FLAGS / f"{chip.name}.yml"
    return str(load_yml(str(file)).compile_xla_flags) if file.exists() else ""


def parsed(flags: str) -> dict[str, str]:
    try:
        return upstream.max_utils.parse_libtpu_flags_to_dict(flags)
    except ValueError as error:
        raise ConfigError(f"compile_xla_flags={flags!r}: {error}") from error
