"""The student: its train state on the run's mesh, and everything that feeds and saves it, as upstream sets it up."""

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from MaxText import upstream
from MaxText.config.data import data_settings
from MaxText.config.keys import ConfigError
from MaxText.data import faults, pipelines
from MaxText.data.cached import Cached, read_instead
from MaxText.models import fresh, frozen, resumed


@dataclasses.dataclass
class Student:
    """What upstream's set-up makes: the train state on its shards, and everything that feeds and saves it.

    Attributes:
      origin: the setting, key=value, by which parameters were restored; "" for a fresh student.
    """

    graphdef: nnx.GraphDef
    state: nnx.State
    state_shardings: nnx.State
    params_shardings: nnx.State
    mesh: jax.sharding.Mesh
    learning_rate_schedule: Callable[[Any], Any]
    start_step: int
    origin: str
    data_loader: Any
    data_iterator: Any
    rampup_manager: Any
    eval_data_iterator: Any
    checkpoint_manager: Any
    cached: Cached | None = None  # where its teacher's targets come with the data


def set_up(config: Any, recorder: Any, cached: Cached | None = None) -> Student:
    """Builds or restores the student's train state and opens the data: documents, or the rows of a cache.

    A student that nothing is restored into has its embedding table at kd_embedding_std.

    Raises:
      ConfigError: upstream refuses the settings, the data or the checkpoint.
    """
    with (
        misfits_by_name(config),
        refusals_as_config_errors(config),
        pipelines.mended(config),
        read_instead(config, cached),
        upstream.models_traced_once(),
    ):
        upstream.train_utils.validate_train_config(config)
        (_, manager, shardings, model, mesh, schedule, iterator, loader, rampup, eval_iterator, train_state) = (
            upstream.train_utils.setup_train_loop(config, recorder)
        )
        start_step = upstream.pre_train.get_first_step(model, train_state)
        upstream.train_utils.validate_completed_steps(start_step, config.steps)
    graphdef, state = nnx.split(train_state)
    params_shardings, shardings = upstream.sharding.maybe_update_params_sharding_with_opt(config, shardings)
    # A restored state is not always on the shardings the step is compiled for: it would be compiled twice.
    state = jax.tree.map(on_sharding, state, shardings)
    origin = fresh.origin(config, manager)
    frozen.check(config, nnx.state(state.model, nnx.Param))
    return Student(
        graphdef=graphdef,
        state=state if origin else fresh.with_table_at(state, fresh.table_std(config)),
        state_shardings=shardings,
        params_shardings=params_shardings,
        mesh=mesh,
        learning_rate_schedule=schedule,
        start_step=start_step,
        origin=origin,
        data_loader=loader,
        data_iterator=iterator,
        rampup_manager=rampup,
        eval_data_iterator=eval_iterator,
        checkpoint_manager=manager,
        cached=cached,
    )


def on_sharding(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array laid out so; `jax.device_put` alone refuses random keys that lie on the devices of several hosts."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) and not x.is_fully_addressable:
        return jax.jit(lambda key: key, out_shardings=sharding)(x)
    return jax.device_put(x, sharding)


@contextlib.contextmanager
def misfits_by_name(config: Any) -> Iterator[None]:
    """Where a run is refused because it would go on from another model's state, one array of that is named."""
    try:
        yield
    except ConfigError as error:
        misfit = ""
        with contextlib.suppress(Exception):  # what cannot be compared was refused for what it is
            misfit = resumed.misfit(config)
        if misfit:
            raise ConfigError(misfit) from error
        raise


@contextlib.contextmanager
def refusals_as_config_errors(config: Any) -> Iterator[None]:
    """What upstream raises while it sets up a run is about the user's input; log_config=true shows its traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError, OSError, NotImplementedError) as error:
        upstream.ignore_closed_loops()
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        passed = (frame.f_globals.get("__name__", "") for frame in frames)
        about = fault = ""
        if any(frame.f_code.co_name == "fill_unspecified_mesh_axes" for frame in frames):
            axes = f"ici_*_parallelism={config.ici_parallelism} dcn_*_parallelism={config.dcn_parallelism}"
            about, fault = f"{axes}, {jax.device_count()} devices: ", " ".join(str(error).split())
        elif any(name.startswith("maxtext.input_pipeline") for name in passed):
            about, fault = f"{data_settings(config)}: ", faults.named(config, error)
        elif str(getattr(error, "filename", "")).startswith(config.base_output_directory or "\0"):
            about = f"base_output_directory={config.base_output_directory!r}: "
        what = fault or str(error) or type(error).__name__
        raise ConfigError(f"{about}{what} (log_config=true shows where)") from error
