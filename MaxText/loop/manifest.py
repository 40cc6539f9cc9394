"""The manifest of a run: <run>/distillation.json, beside the checkpoints, says what the student learns from.

A resumed run whose teacher, loss or data is another would go on without a word, and its curve would tell of two runs.
So the manifest holds the teacher's identity, the kd_* settings and the names and sizes of the files of the data, or the
checksums of those of a cache, and a run that is resumed with others is refused.
docs/design/restarts.md defines the fingerprint and what counts. Left out on purpose: MaxText's own keys, which a
resumed run may change as it always could.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from MaxText import upstream
from MaxText.config.files import CONFIGS, load_yml
from MaxText.config.keys import ConfigError, Distillation
from MaxText.console import say
from MaxText.data import files
from MaxText.data.cached import Cached
from MaxText.models.teacher import EPHEMERAL, Teacher

NAME = "distillation.json"
# Keys that change neither the loss nor what is evaluated; the teacher's path is told apart by what lies there.
FREE = {"kd_block_mib", "kd_allow_change", "kd_teacher_max_ce", "kd_teacher_parameters_path",
        "kd_teacher_tokenizer_path", "kd_cache_path"}  # fmt: skip

Manifest = dict[str, Any]


def keep(config: Any, kd: Distillation, teacher: Teacher | None, student: Any) -> None:
    """Compares a resumed run with its manifest and writes the manifest: before the first step, by the first process.

    Args:
      config: MaxText's configuration of the student.
      kd: the distillation settings.
      teacher: None where none runs.
      student: its checkpoint manager (None: nothing is saved, and nothing can be resumed), and its cache.

    Raises:
      ConfigError: the run began with another teacher or other settings, and kd_allow_change is false; or the manifest
        can be neither read nor written.
    """
    manager = student.checkpoint_manager
    if manager is None:
        return
    file = epath.Path(config.checkpoint_dir).parent / NAME
    now, before = describe(kd, teacher, student.cached), None
    now |= {"data": files.listed(config)} if student.cached is None else {"cache": student.cached.files}
    if upstream.checkpointing.latest_step(manager) is not None:
        before = read(file, kd)
        changes = differences(before, now)
        if changes and not kd.kd_allow_change:
            listed = "\n".join(f"  {change}" for change in changes)
            raise ConfigError(
                f"kd_allow_change=False: {config.run_name} began otherwise than it would go on ({file}):\n{listed}\n"
                "Set back what changed, take another run_name, or allow the change with kd_allow_change=true."
            )
        for change in changes:
            say(f"warning: kd_allow_change=true: {change}")
        if not changes and before is not None and place(before) != place(now):
            say(f"warning: the teacher has moved, its parameters are the same: {place(before)} -> {place(now)}")
    if now != before and jax.process_index() == 0:
        write(file, now)


def describe(kd: Distillation, teacher: Teacher | None, cached: Cached | None = None) -> Manifest:
    """The settings, and the teacher that the student learns from: the one whose targets were stored, if any were."""
    settings = {key: value for key, value in kd.model_dump(mode="json").items() if key not in FREE}
    if cached is not None and cached.contents is not None:
        return {"settings": settings, "teacher": cached.contents.teacher.model_dump()}
    if teacher is None or teacher.checkpoint is None:
        return {"settings": {"use_kd": False}}
    return {"settings": settings, "teacher": identity(teacher)}


def identity(teacher: Teacher) -> dict[str, Any]:
    assert teacher.checkpoint is not None
    root, step = str(teacher.checkpoint.root), teacher.checkpoint.step
    return {"path": root, "step": step, "fingerprint": fingerprint(teacher.state)}


def differences(before: Manifest | None, now: Manifest) -> list[str]:
    """What changed, a line each: key, value before, value now."""
    if before is None:
        missing = "no distillation.json: the run began with use_kd=false, or before this trainer wrote one"
        return [f"use_kd: {missing}; true now"] if now["settings"]["use_kd"] else []
    # A manifest may be older than a list of files.
    lists = [name for name in ("data", "cache") if name in before and name in now]
    return of_distillation(before, now) + [
        line for name in lists for line in files.differences(before[name], now[name])
    ]


def of_distillation(before: Manifest, now: Manifest) -> list[str]:
    old, new = before["settings"], now["settings"]
    if old["use_kd"] != new["use_kd"] or not new["use_kd"]:
        return [f"use_kd: {old['use_kd']} before, {new['use_kd']} now"] if old["use_kd"] != new["use_kd"] else []
    defaults = load_yml(str(CONFIGS / "base.yml"))  # for keys that are younger than the manifest
    changed = {key: (old.get(key, defaults.get(key)), value) for key, value in new.items()}
    lines = [f"{key}: {was!r} before, {value!r} now" for key, (was, value) in changed.items() if was != value]
    # Held in another type the same parameters have other bits; the type is named above.
    same_type = old.get("kd_teacher_dtype") == new.get("kd_teacher_dtype")
    if same_type and before["teacher"]["fingerprint"] != now["teacher"]["fingerprint"]:
        was, value = (f"{place(m)} (fingerprint {m['teacher']['fingerprint']})" for m in (before, now))
        lines.append(f"teacher: {was} before, {value} now")
    return lines


def place(manifest: Manifest) -> str | None:
    return manifest["teacher"]["path"] if "teacher" in manifest else None


# The file -----------------------------------------------------------------------------------------------------------


def read(file: epath.Path, kd: Distillation) -> Manifest | None:
    """The manifest; None where there is none, or none that can be read and the user lets it be written anew."""
    try:
        found = json.loads(file.read_text()) if file.exists() else None
        if found is not None and found["settings"]["use_kd"]:
            place(found), found["teacher"]["fingerprint"]
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        if kd.kd_allow_change:
            return None
        raise ConfigError(
            f"{file}: is no manifest of a distillation run ({error or type(error).__name__}); kd_allow_change=true "
            "writes it anew"
        ) from error


def write(file: epath.Path, manifest: Manifest) -> None:
    """Writes all of it or nothing."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror or error})") from error


# The teacher's identity ---------------------------------------------------------------------------------------------


def fingerprint(state: nnx.State) -> str:
    """128 bits of SHA-256 over names, shapes, types and sums of all persistent arrays; their layout does not matter."""
    arrays = {
        "/".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(state)
        if not isinstance(leaf, EPHEMERAL)
    }
    sums = jax.device_get({name: sums_of(array) for name, array in arrays.items()})
    lines = [f"{name} {array.shape} {array.dtype} {sums[name].tolist()}\n" for name, array in sorted(arrays.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def sums_of(array: jax.Array) -> jax.Array:
    """`digest` on the array's devices, the result on each of them."""
    replicated = None
    if isinstance(array.sharding, NamedSharding):
        replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
    return jax.jit(digest, out_shardings=replicated)(array)


def digest(array: jax.Array) -> jax.Array:
    """Two sums mod 2^32 over the elements, each a mix of an element's bits with its place in the array.

    Integer sums do not depend on their order, so neither on how the array is sharded; for a given place the mix is one
    to one, so that no single changed element goes unseen, and its place is in it, so that no exchange does.
    """
    kind = np.dtype(f"uint{8 * array.dtype.itemsize}") if array.dtype != np.bool_ else None
    bits = (array if kind is None else jax.lax.bitcast_convert_type(array, kind)).astype(np.uint32)
    index = jnp.zeros(array.shape, np.uint32)
    for axis, size in enumerate(array.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(np.uint32, array.shape, axis)
    return jnp.stack([jnp.sum(mix(bits ^ mix(index + np.uint32(salt))), dtype=np.uint32) for salt in (1, 0x9E3779B9)])


def mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: a bijection of 32 bits in which each depends on all."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
