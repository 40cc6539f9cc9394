"""Computes a teacher's targets once, for all the students that will learn from them.

    python MaxText/cache_teacher.py <config>.yml kd_cache_path=<folder> kd_teacher_parameters_path=<checkpoint> ...

The story: configuration, teacher, what will be written, the rows of each split, the table. The config is the student's:
its data, its mesh, its teacher. The same command goes on where it was killed. With kd_cache_verify=true nothing is
written: rows taken at random are computed again and compared. docs/cache.md says what to use when.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app
from etils import epy
from jax.experimental import multihost_utils

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher
from MaxText.console import RunError, duration, end_with, say, waiting

with epy.lazy_imports():
    from MaxText.cache import lock, manifest, shards
    from MaxText.data import coverage, iterators, once, pipelines, templates, tokens
    from MaxText.loop import caching, verifying
    from MaxText.models import student as student_lib
    from MaxText.models import teacher as teacher_lib
    from MaxText.models import vocabularies


def main(argv: Sequence[str]) -> int:
    """Returns 1 where a cache that is compared is not what its teacher says, else 0."""
    # 1. Configuration.
    run = resolve.initialize([*argv, "use_kd=true"], writes_cache=True)
    config, kd = run.student, run.kd
    once.check(config)
    checkpoint = teacher_lib.find_checkpoint(kd.kd_teacher_parameters_path)
    teacher_config = resolve_teacher(run, checkpoint.scan_layers)
    vocabularies.check_same_tokens(config, kd)
    recorder = upstream.start_engine(config)
    tokens.check_fits(config)
    templates.check(config)
    if warning := pipelines.taken_for_padding(config):
        say(f"warning: {warning}")

    with upstream.monitored(config, recorder), iterators.closed_at_the_end():
        # 2. Teacher: restored on the run's mesh.
        with student_lib.refusals_as_config_errors(config):
            mesh = upstream.maxtext_utils.get_mesh_from_config(config)
        with waiting("restoring the teacher"):
            teacher = teacher_lib.load(teacher_config, checkpoint, mesh, kd.kd_teacher_dtype, kd.kd_vocab_size)
        contents = caching.contents_of(config, kd, teacher)
        folder, step = Path(kd.kd_cache_path), caching.jitted_step(config, kd, teacher, mesh)
        if kd.kd_cache_verify:
            return verifying.verify(config, kd, folder, step, contents)

        with lock.writing_alone(folder) if jax.process_index() == 0 else contextlib.nullcontext():
            # 3. What will be written.
            on_one_process(lambda: manifest.begin(folder, contents))
            say(caching.header(config, kd, teacher, mesh, contents))
            for line in coverage.report(config, mesh):
                say(line)

            # 4. The rows.
            for split, reader in once.opened(config, mesh).items():
                begun = time.monotonic()
                caching.write_split(config, kd, split, reader, step, folder)
                barrier(f"{split} is written")
                on_one_process(functools.partial(finish, folder, split))
                say(f"   {split:>5}  done in {duration(time.monotonic() - begun)}")

    # 5. The table.
    if jax.process_index() == 0:
        caching.show(manifest.read(folder))
    return 0


def finish(folder: Path, split: str) -> None:
    manifest.finish(folder, split, shards.all_shards(folder, split))


def on_one_process(action: Any) -> None:
    """The first process acts; the others wait for it."""
    if jax.process_index() == 0:
        action()
    barrier("one process has acted")


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def command_line(argv: Sequence[str]) -> None:
    """`main`, with what ended it early as one message at the end of the output; status 2 for bad input, else 1."""
    try:
        status = main(argv)
    except (ConfigError, RunError) as error:
        if upstream.is_verbose() and error.__cause__ is not None:
            raise
        end_with(error, 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on after the last file that is whole")
    sys.exit(status)


if __name__ == "__main__":
    app.run(command_line)
