"""The chips that a step may run on, as their makers describe them.

What is not in the table, CPUs among it, is planned for by rules that need no numbers.
"""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, over the devices that jax sees of it.

    memory: bytes.
    flops: peak FLOP/s in bfloat16, dense.
    bandwidth: of the memory, in bytes/s.
    network: to the chips beside it (ICI, NVLink), all links together, in bytes/s.
    clock: Hz of the cycles that the TPU's compiler estimates; 0 where it is not known.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    network: float
    devices: int = 1
    clock: float = 0.0

    @property
    def ridge(self) -> float:
        """FLOPs of a byte of memory, above which a program is bound by arithmetic."""
        return self.flops / self.bandwidth


# How device_kind begins -> chip; the first that fits counts. Sources: the tables "key specifications" of
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; NVIDIA's data sheets of the SXM modules. A TPU's clock is its peak
# divided by what its matrix units do in a cycle (v4, v5e, v5p: 4 of 128 x 128 a core).
CHIPS = {
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9, clock=1.05e9),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, clock=1.5e9),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, clock=1.75e9),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1638e9, 448e9, clock=1.75e9),
    "TPU7x": Chip("TPU7x (Ironwood)", 192 * GIB, 2307e12, 7380e9, 1200e9, devices=2),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 40 * GIB, 312e12, 1555e9, 600e9),
    "NVIDIA A100": Chip("A100 80GB", 80 * GIB, 312e12, 2039e9, 600e9),
    "NVIDIA H100": Chip("H100", 80 * GIB, 989e12, 3350e9, 900e9),
    "NVIDIA H200": Chip("H200", 141 * GIB, 989e12, 4800e9, 900e9),
    "NVIDIA B200": Chip("B200", 180 * GIB, 2250e12, 8000e9, 1800e9),
}

# In the name of what begins like a chip of the table and is another: cards with another peak, and parts of a chip.
OTHERS = ("PCIE", "NVL", "MIG")


def chip_of(mesh: jax.sharding.Mesh) -> Chip | None:
    """That of the mesh's devices; None where the table does not hold it."""
    kind = mesh.devices.flat[0].device_kind
    if any(word in kind.upper() for word in OTHERS):
        return None
    return next((chip for start, chip in CHIPS.items() if kind.startswith(start)), None)
