"""TPU slices, as MaxText, GKE and xpk call them."""

import dataclasses
import math

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.config.presets import suggestion

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
