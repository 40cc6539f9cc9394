"""Submits a run to a TPU cluster of GKE: checks it on this machine, then has xpk create the workload.

    python scripts/submit_xpk.py --cluster NAME --tpu-type v5litepod-256 --num-slices 2 --config configs/my.yml \\
        --docker-image IMAGE --output gs://bucket/runs kd_alpha=0.5

runs `python MaxText/train.py configs/my.yml ...` on every host. --dry-run prints the call of xpk instead,
--render-jobset a JobSet for `kubectl apply -f -` on a cluster that xpk did not make. The workload's name is the run's
name: submitted again under the same name, a run goes on where its newest checkpoint stands. What is needed on the
cluster's side, and what happens on preemption: docs/cluster.md.
"""

import argparse
import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.config.presets import suggestion
from MaxText.config.teacher import resolve_teacher

ROOT = Path(__file__).resolve().parents[1]
XPK_VENV = ROOT / ".venv-xpk/bin"  # its dependencies are not ours: docs/cluster.md makes it
TEMPLATE = ROOT / "deploy/jobset.yaml"

# Of a workload and of a cluster: xpk's rule. It leaves room for what JobSet appends within Kubernetes' 63 characters.
NAME, NAME_LENGTH = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?"), 40
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
GRACE_SECONDS = 300  # between SIGTERM and kill -9: the step at hand and its checkpoint must fit

# MaxText's name of a TPU's generation -> the label cloud.google.com/gke-tpu-accelerator of its nodes. Source: the table
# of xpk (core/system_characteristics.py); tests/commands/test_submit.py holds these, hosts and topologies to it.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
UNKNOWN_TO_XPK = {"v5e-1", "v5e-4"}  # slices of one host that its table leaves out


@dataclasses.dataclass(frozen=True)
class Slice:
    """One TPU slice, as MaxText, GKE and xpk call it."""

    name: str
    accelerator: str
    topology: str
    hosts: int
    chips_per_host: int

    @property
    def xpk_type(self) -> str:
        return self.name.replace("v5e-", "v5litepod-")


def find_slice(tpu_type: str) -> Slice:
    """The slice that xpk calls `tpu_type`; MaxText's own name (v5e-256 for v5litepod-256) will do, too.

    Raises:
      ConfigError: there is no such slice.
    """
    name = tpu_type.replace("v5litepod-", "v5e-")
    known = {key: spec for key, spec in upstream.topologies().items() if spec.platform == "tpu"}
    if name not in known:
        near = suggestion(name, known)
        raise ConfigError(f"--tpu-type={tpu_type}: no such TPU slice{near}")
    topology = known[name].topology_name.partition(":")[2]
    chips_per_host = math.prod(known[name].chips_per_host_bounds)
    hosts = math.prod(map(int, topology.split("x"))) // chips_per_host
    return Slice(name, ACCELERATORS[name.partition("-")[0]], topology, hosts, chips_per_host)


# Checks ---------------------------------------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    """What can be said of the options before the engine is imported.

    Raises:
      ConfigError: an option's value is not allowed.
    """
    for option, value in (("--cluster", args.cluster), ("--workload", args.workload)):
        if value is not None and (not NAME.fullmatch(value) or len(value) > NAME_LENGTH):
            raise ConfigError(
                f"{option}={value}: at most {NAME_LENGTH} lower-case letters, digits and hyphens, the first a letter "
                "and the last no hyphen"
            )
    if args.num_slices < 1:
        raise ConfigError(f"--num-slices={args.num_slices}: at least 1")
    if args.max_restarts < 0:
        raise ConfigError(f"--max-restarts={args.max_restarts}: at least 0")
    for variable in args.env:
        if not VARIABLE.fullmatch(variable):
            raise ConfigError(f"--env={variable}: NAME=VALUE is expected")
        # xpk writes it into YAML between double quotes, as it is.
        if not args.render_jobset and re.search(r'["\\\n]', variable):
            raise ConfigError(f"--env={variable}: xpk passes no double quote, backslash or line end")
    if args.render_jobset and not args.docker_image:
        raise ConfigError("--render-jobset: needs --docker-image, the image that holds this repository")
    if not args.render_jobset and not args.cluster:
        raise ConfigError("--cluster: xpk needs the name of the cluster")
    if not Path(args.config).resolve().is_relative_to(ROOT):
        raise ConfigError(f"--config={args.config}: outside of this repository, so the image does not hold it")
    for override in args.overrides:
        if "\n" in override:
            raise ConfigError(f"{override!r}: a line end cannot be passed on")
        if override.startswith("run_name="):
            raise ConfigError(f"{override}: the run takes the workload's name; set --workload")
        if override.startswith("base_output_directory=") and args.output:
            raise ConfigError(f"{override} --output={args.output}: set one of the two")


def check_settings(config: str, overrides: Sequence[str], tpu: Slice, num_slices: int) -> None:
    """Resolves all settings for the cluster's devices, of which none need be here, and refuses what train.py would.

    Left out: the teacher's checkpoint and the data, which this machine may not be able to read.

    Raises:
      ConfigError: the run would not start.
    """
    devices = [f"compile_topology={tpu.name}", f"compile_topology_num_slices={num_slices}"]
    run = resolve.initialize(["train.py", config, *overrides, *devices])
    if run.kd.use_kd:
        resolve_teacher(run, scan_layers=None)
    check_mesh(run.student, upstream.topologies()[tpu.name].devices_per_slice, num_slices)
    if run.student.hardware != "tpu":
        raise ConfigError(f"hardware={run.student.hardware!r}: the run is for a TPU; set hardware=tpu")
    if run.student.skip_jax_distributed_system and tpu.hosts * num_slices > 1:
        raise ConfigError(
            f"skip_jax_distributed_system=True: each of the {tpu.hosts * num_slices} hosts would train by itself; "
            "allowed is False"
        )
    for key in ("base_output_directory", "kd_teacher_parameters_path"):
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


# What is submitted ----------------------------------------------------------------------------------------------------


def run_overrides(args: argparse.Namespace) -> list[str]:
    output = [f"base_output_directory={args.output}"] if args.output else []
    return [*args.overrides, f"run_name={args.workload}", *output]


def train_command(args: argparse.Namespace) -> list[str]:
    """The command of one host, in the repository's root."""
    config = Path(args.config).resolve().relative_to(ROOT).as_posix()
    return ["bash", "deploy/restartable.sh", "python", "MaxText/train.py", config, *run_overrides(args)]


def xpk_call(args: argparse.Namespace, tpu: Slice) -> list[str]:
    """The call of xpk that creates the workload.

    xpk restarts on the statuses of signals alone. 1 is added: so end hosts that lost another host, and runs whose disk
    was full. 2, input that is refused, and 0 are not restarted.
    """
    # Without exec a shell of xpk's would get SIGTERM in the trainer's place.
    call = ["xpk", "workload", "create", f"--command=exec {shlex.join(train_command(args))}"]
    call += [f"--cluster={args.cluster}", f"--workload={args.workload}"]
    call += [f"--tpu-type={tpu.xpk_type}", f"--num-slices={args.num_slices}"]
    call += [f"--max-restarts={args.max_restarts}", "--restart-on-exit-codes=1"]
    call += [f"--termination-grace-period-seconds={GRACE_SECONDS}"]
    if args.docker_image:
        call += [f"--docker-image={args.docker_image}"]
    else:
        call += [f"--base-docker-image={args.base_docker_image}", f"--script-dir={ROOT}"]
    for option in ("project", "zone"):
        if value := getattr(args, option):
            call += [f"--{option}={value}"]
    return call + [f"--env={variable}" for variable in args.env]


def render_jobset(args: argparse.Namespace, tpu: Slice) -> str:
    """The JobSet, in YAML."""
    variables = (variable.partition("=") for variable in args.env)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        dataclasses.asdict(tpu),
        name=args.workload,
        num_slices=args.num_slices,
        max_restarts=args.max_restarts,
        grace_seconds=GRACE_SECONDS,
        image=args.docker_image,
        command=train_command(args),
        env=[{"name": name, "value": value} for name, _, value in variables],
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cluster", help="the cluster's name; not needed with --render-jobset")
    parser.add_argument("--tpu-type", required=True, help="one slice: v5litepod-256, v6e-64, v5p-128 ...")
    parser.add_argument("--num-slices", type=int, default=1, help="default 1")
    parser.add_argument("--config", required=True, help="the run's yml, in this repository")
    parser.add_argument("--workload", help="its name, and run_name; default: the config's file name")
    image = parser.add_mutually_exclusive_group(required=True)
    image.add_argument("--docker-image", help="an image of docker/Dockerfile.tpu, used as it is")
    image.add_argument("--base-docker-image", help="such an image, on which xpk puts this working tree first")
    parser.add_argument("--output", help="base_output_directory, gs://...; default: the config's")
    parser.add_argument("--max-restarts", type=int, default=10, help="after preemptions and failures; default 10")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="HF_TOKEN, LIBTPU_INIT_ARGS ..."
    )
    parser.add_argument("--project", help="default: gcloud's")
    parser.add_argument("--zone", help="default: gcloud's")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="check, and print the call of xpk")
    instead.add_argument("--render-jobset", action="store_true", help="check, and print a JobSet")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run, as train.py takes them")
    args = parser.parse_intermixed_args(argv)
    if args.workload is None:
        args.workload = Path(args.config).stem.lower().replace("_", "-").replace(".", "-")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator of this machine is none of the run's
    check_options(args)
    tpu = find_slice(args.tpu_type)
    if args.num_slices > 1 and tpu.hosts == 1:
        raise ConfigError(
            f"--num-slices={args.num_slices} --tpu-type={args.tpu_type}: GKE joins slices of several hosts only"
        )
    if not args.render_jobset and tpu.name in UNKNOWN_TO_XPK:
        raise ConfigError(f"--tpu-type={args.tpu_type}: xpk does not know it; --render-jobset does")
    check_settings(args.config, run_overrides(args), tpu, args.num_slices)
    if args.render_jobset:
        print(render_jobset(args, tpu), end="")
        return 0
    call = xpk_call(args, tpu)
    if args.dry_run:
        print(shlex.join(call))
        return 0
    program = shutil.which("xpk", path=os.pathsep.join([str(XPK_VENV), os.environ.get("PATH", "")]))
    if program is None:
        raise ConfigError("xpk is neither in .venv-xpk nor on PATH: docs/cluster.md installs it")
    return subprocess.run([program, *call[1:]], cwd=ROOT).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; `xpk workload list` tells whether it was submitted")
