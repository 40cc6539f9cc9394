"""A run as it is sent to a cluster: the command of its hosts, the call of xpk, the JobSet."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from MaxText.cluster.slices import Slice
from MaxText.config.files import ROOT

TEMPLATE = ROOT / "deploy/jobset.yaml"
GRACE_SECONDS = 300  # between SIGTERM and kill -9: the step at hand and its checkpoint must fit


@dataclasses.dataclass(frozen=True)
class Submission:
    """What is asked for, in the words of the command's options.

    Attributes:
      config: the run's yml, in this repository.
      workload: its name, and run_name.
      overrides: settings of the run, as train.py takes them.
      output: base_output_directory; None for the config's.
      base_docker_image: where there is no docker_image, what xpk puts this working tree on.
      env: variables of every host, NAME=VALUE.
      cache_teacher: the teacher's targets are computed, instead of a student being trained.
    """

    tpu: Slice
    num_slices: int
    config: str
    workload: str
    overrides: Sequence[str]
    output: str | None
    max_restarts: int
    docker_image: str | None
    base_docker_image: str | None
    env: Sequence[str]
    cluster: str | None
    project: str | None
    zone: str | None
    cache_teacher: bool

    @property
    def settings(self) -> list[str]:
        """The run's settings, where it writes among them."""
        output = [f"base_output_directory={self.output}"] if self.output else []
        return [*self.overrides, f"run_name={self.workload}", *output]

    @property
    def command(self) -> list[str]:
        """The command of one host, in the repository's root."""
        config = Path(self.config).resolve().relative_to(ROOT).as_posix()
        program = "MaxText/cache_teacher.py" if self.cache_teacher else "MaxText/train.py"
        return ["bash", "deploy/restartable.sh", "python", program, config, *self.settings]

    @property
    def xpk_call(self) -> list[str]:
        """The call of xpk that creates the workload.

        xpk restarts on the statuses of signals alone. 1 is added: so end hosts that lost another host, and runs whose
        disk was full. 2, input that is refused, and 0 are not restarted.
        """
        # Without exec a shell of xpk's would get SIGTERM in the trainer's place.
        call = ["xpk", "workload", "create", f"--command=exec {shlex.join(self.command)}"]
        call += [f"--cluster={self.cluster}", f"--workload={self.workload}"]
        call += [f"--tpu-type={self.tpu.xpk_type}", f"--num-slices={self.num_slices}"]
        call += [f"--max-restarts={self.max_restarts}", "--restart-on-exit-codes=1"]
        call += [f"--termination-grace-period-seconds={GRACE_SECONDS}"]
        if self.docker_image:
            call += [f"--docker-image={self.docker_image}"]
        else:
            call += [f"--base-docker-image={self.base_docker_image}", f"--script-dir={ROOT}"]
        call += [f"--{option}={value}" for option, value in (("project", self.project), ("zone", self.zone)) if value]
        return call + [f"--env={variable}" for variable in self.env]

    @property
    def jobset(self) -> str:
        """The JobSet, in YAML."""
        variables = (variable.partition("=") for variable in self.env)
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        return environment.from_string(TEMPLATE.read_text()).render(
            dataclasses.asdict(self.tpu),
            name=self.workload,
            num_slices=self.num_slices,
            max_restarts=self.max_restarts,
            grace_seconds=GRACE_SECONDS,
            image=self.docker_image,
            command=self.command,
            env=[{"name": name, "value": value} for name, _, value in variables],
        )
