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
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from MaxText import console
from MaxText.cluster.checks import check_settings
from MaxText.cluster.slices import UNKNOWN_TO_XPK, find_slice
from MaxText.cluster.submission import Submission
from MaxText.config.files import ROOT
from MaxText.config.keys import ConfigError

XPK_VENV = ROOT / ".venv-xpk/bin"  # its dependencies are not ours: docs/cluster.md makes it

# Of a workload and of a cluster: xpk's rule. It leaves room for what JobSet appends within Kubernetes' 63 characters.
NAME, NAME_LENGTH = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?"), 40
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


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
    parser.add_argument(
        "--cache-teacher", action="store_true", help="run MaxText/cache_teacher.py, once for many students"
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
    names = {field.name for field in dataclasses.fields(Submission)}
    submission = Submission(tpu=tpu, **{name: value for name, value in vars(args).items() if name in names})
    check_settings(submission.config, submission.settings, tpu, submission.num_slices, args.cache_teacher)
    if args.render_jobset:
        print(submission.jobset, end="")
        return 0
    call = submission.xpk_call
    if args.dry_run:
        print(shlex.join(call))
        return 0
    program = shutil.which("xpk", path=os.pathsep.join([str(XPK_VENV), os.environ.get("PATH", "")]))
    if program is None:
        raise ConfigError("xpk is neither in .venv-xpk nor on PATH: docs/cluster.md installs it")
    return subprocess.run([program, *call[1:]], cwd=ROOT).returncode


if __name__ == "__main__":
    with console.errors_as_lines(refused=ConfigError, hint="; `xpk workload list` tells whether it was submitted"):
        sys.exit(main())
