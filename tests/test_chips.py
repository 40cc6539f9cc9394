"""Laws of the table of chips."""

import types

import numpy as np
import pytest

from MaxText import upstream
from MaxText.chips import CHIPS, chip_of


def test_every_topology_of_the_engine_is_of_a_chip_in_the_table():
    kinds = {name.rpartition("-")[0] for name, spec in upstream.topologies().items() if spec.platform == "tpu"}
    tpus = [chip.name for kind, chip in CHIPS.items() if kind.startswith("TPU")]
    assert {"TPU7x" if name.startswith("TPU7x") else name for name in tpus} == {
        "TPU7x" if kind == "tpu7x" else kind for kind in kinds
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, name):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))
    chip = chip_of(mesh)
    assert (chip and chip.name) == name
