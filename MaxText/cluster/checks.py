"""What can be said of a run before it is sent to a cluster, on a machine that has none of its devices."""

import os
from collections.abc import Sequence
from typing import Any

from MaxText import upstream
from MaxText.cluster.slices import Slice
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher


def check_settings(
    config: str, overrides: Sequence[str], tpu: Slice, num_slices: int, cache_teacher: bool = False
) -> None:
    """Resolves all settings for the cluster's devices, of which none need be here, and refuses what the program would:
    train.py, or cache_teacher.py.

    Left out: the teacher's checkpoint and the data, which this machine may not be able to read.

    Raises:
      ConfigError: the run would not start.
    """
    devices = [f"compile_topology={tpu.name}", f"compile_topology_num_slices={num_slices}"]
    forced = ["use_kd=true"] if cache_teacher else []
    run = resolve.initialize(["program", config, *overrides, *devices, *forced], writes_cache=cache_teacher)
    if run.kd.has_teacher:
        resolve_teacher(run, scan_layers=None)
    check_mesh(run.student, upstream.topologies()[tpu.name].devices_per_slice, num_slices)
    if run.student.hardware != "tpu":
        raise ConfigError(f"hardware={run.student.hardware!r}: the run is for a TPU; set hardware=tpu")
    if run.student.skip_jax_distributed_system and tpu.hosts * num_slices > 1:
        raise ConfigError(
            f"skip_jax_distributed_system=True: each of the {tpu.hosts * num_slices} hosts would train by itself; "
            "allowed is False"
        )
    for key in ("base_output_directory", "kd_teacher_parameters_path", "kd_cache_path"):
        path = str(run.user.get(key) or "")
        if not ("://" in path or os.path.isabs(path)) and (path or key == "base_output_directory"):
            raise ConfigError(
                f"{key}={path!r}: a host's own folder is lost with it; gs:// is expected, or an absolute path on a "
                "mounted file system"
            )


def check_mesh(student: Any, devices_per_slice: int, num_slices: int) -> None:
    """The engine looks at the axes of the mesh only where their devices are."""
    meshes = [("ICI", student.ici_parallelism, devices_per_slice)]
    if num_slices > 1:
        meshes.append(("DCN", student.dcn_parallelism, num_slices))
    for kind, parallelism, count in meshes:
        try:
            upstream.max_utils.fill_unspecified_mesh_axes(list(parallelism), count, kind)
        except AssertionError as error:
            axes = f"{kind.lower()}_*_parallelism={list(parallelism)}"
            raise ConfigError(f"{axes}: {' '.join(str(error).split())}") from None
