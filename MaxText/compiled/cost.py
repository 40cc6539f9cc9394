"""What a compiled step takes of each device, memory and time by part: lines to read, and a row of a metrics file."""

import math
from collections.abc import Mapping
from typing import Any

from MaxText.chips import Chip
from MaxText.compiled import text
from MaxText.compiled.account import Account, Reading, Work, account


class Cost:
    """Of one step.

    Attributes:
      chip: the chip it is compiled for; None where the table does not hold it.
      devices: how many devices the step runs on.
      flops: part -> FLOPs per device and step that the models' shapes ask for: recomputation and padding are not among
        them. All parts are in it, in the order in which they are shown.
      refusal: why XLA did not compile it; "" where it did.
      memory: bytes per device by kind: argument, output, alias, temp, code, peak; empty after a refusal.
      once: FLOPs and bytes of XLA's estimate per device, which counts the body of each loop once.
      account: by part, each loop's rounds counted as they typically are; None for other compilers than the TPU's.
      at_worst: likewise, with the most rounds that there can be.
    """

    def __init__(self, chip: Chip | None, devices: int, flops: Mapping[str, float]):
        self.chip, self.devices, self.flops = chip, devices, flops
        self.refusal = ""
        self.memory: dict[str, int] = {}
        self.once = {"flops": math.nan, "bytes accessed": math.nan}
        self.account: Account | None = None
        self.at_worst: Account | None = None

    def read(self, compiled: Any, typical: Reading, at_worst: Reading) -> None:
        found = compiled.memory_analysis()
        self.memory = {
            "argument": found.argument_size_in_bytes,
            "output": found.output_size_in_bytes,
            "alias": found.alias_size_in_bytes,
            "temp": found.temp_size_in_bytes,
            "code": found.generated_code_size_in_bytes,
            "peak": found.peak_memory_in_bytes,
        }
        estimate = compiled.cost_analysis()
        self.once = {name: estimate.get(name, math.nan) for name in self.once}
        if self.chip and self.chip.clock:
            program = text.parse(compiled.as_text())
            self.account, self.at_worst = account(program, typical), account(program, at_worst)

    @property
    def model_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total(self) -> int:
        """Bytes per device that the step holds at most; an output that is written over an argument counts once.

        An upper bound: what libtpu 0.0.50 calls temporary may hold arguments again that the step overwrites.
        """
        memory = self.memory
        return memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["code"]

    @property
    def available(self) -> float | None:
        return self.chip.memory / self.chip.devices if self.chip else None

    @property
    def fits(self) -> bool | None:
        """Whether XLA, which knows what the chip keeps for itself, compiled the step; None for chips unknown here."""
        return None if self.chip is None and not self.refusal else not self.refusal

    # Seconds ----------------------------------------------------------------------------------------------------------

    def at_peak(self, part: str) -> float:
        """Of a part's products."""
        assert self.chip is not None
        return self.flops[part] * self.chip.devices / self.chip.flops

    def estimated(self, work: Work) -> float:
        assert self.chip is not None
        return work.cycles / self.chip.clock

    def waiting(self, work: Work) -> float:
        """For the network at its full rate."""
        assert self.chip is not None
        return work.waited * self.chip.devices / self.chip.network

    def roofline(self) -> dict[str, float]:
        """That one step takes at least, by what bounds it."""
        if self.chip is None:
            return {}
        moved = self.account.total.memory if self.account else self.once["bytes accessed"]
        bounds = {"compute": self.model_flops * self.chip.devices / self.chip.flops}
        if not math.isnan(moved):
            bounds["memory"] = moved * self.chip.devices / self.chip.bandwidth
        return bounds

    # To read ----------------------------------------------------------------------------------------------------------

    def lines(self) -> list[tuple[str, str]]:
        """(title, text)."""
        return [*self.memory_lines(), *self.work_lines(), *self.part_lines()]

    def memory_lines(self) -> list[tuple[str, str]]:
        if self.refusal:
            return [("memory", f"does not fit: {self.refusal}")]
        memory = self.memory
        of = f" of {gigabytes(self.available)} on a {self.device_name}: fits" if self.available else ""
        return [
            ("memory", f"{gigabytes(self.total)} per device{of}"),
            ("arguments", f"{gigabytes(memory['argument'])} (parameters, optimizer, teacher, batch)"),
            ("outputs", f"{gigabytes(memory['output'])}, {gigabytes(memory['alias'])} of it in place of arguments"),
            ("temporary", gigabytes(memory["temp"])),
            ("program", gigabytes(memory["code"])),
            (
                "peak",
                f"{gigabytes(memory['peak'])} of arguments, outputs and temporaries at one time, by XLA's account",
            ),
        ]

    def work_lines(self) -> list[tuple[str, str]]:
        lines = [("FLOPs", f"{self.model_flops:.4g} per device and step, counted from the models' shapes")]
        if not self.refusal and self.account is None:
            flops, moved = self.once.values()
            lines.append(("", f"{flops:.4g} by XLA's estimate, which counts the body of each loop once"))
            lines.append(("bytes", f"{moved:.4g} accessed by the same estimate"))
        bounds = self.roofline()
        if bounds:
            slowest = max(bounds, key=lambda name: bounds[name])
            parts = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in bounds.items())
            lines.append(("at least", f"{1000 * bounds[slowest]:.1f} ms a step ({parts})"))
        return lines

    def part_lines(self) -> list[tuple[str, str]]:
        """The account by part."""
        if self.account is None or self.at_worst is None:
            return []
        total, worst = self.account.total, self.at_worst.total
        lines = [("estimate", f"{1000 * self.estimated(total):.1f} ms a step, by the compiler's cycles")]
        if worst.cycles > total.cycles:
            lines.append(("", f"{1000 * self.estimated(worst):.1f} ms with every search at its longest"))
        loops = (
            (part, " and ".join(" x ".join(map(str, each)) for each in of)) for part, of in self.account.loops.items()
        )
        lines.append(("loops", "rounds: " + "; ".join(f"{part} {rounds}" for part, rounds in loops)))
        lines.append(("parts", f"{'':16}{'at peak':>10}{'estimate':>12}{'memory':>12}{'network':>12}{'waited':>12}"))
        for part, work in [*((part, self.account.parts[part]) for part in self.flops), ("together", total)]:
            at_peak = self.at_peak(part) if work is not total else sum(map(self.at_peak, self.flops))
            times = f"{1000 * at_peak:7.1f} ms{1000 * self.estimated(work):9.1f} ms"
            moved = f"{gigabytes(work.memory, 2):>12}{gigabytes(work.received, 2):>12}"
            lines.append(("", f"{part:16}{times}{moved}{1000 * self.waiting(work):9.1f} ms"))
        if total.kernels:
            kernels = ", ".join(f"{name} ({calls} calls)" for name, calls in sorted(total.kernels.items()))
            lines.append(("", f"besides, without an estimate: {kernels}"))
        part = max(self.flops, key=self.beyond_peak)
        lines.append(("look at", f"{part}: {1000 * self.beyond_peak(part):.1f} ms beyond its products at peak"))
        return lines

    def beyond_peak(self, part: str) -> float:
        assert self.account is not None
        work = self.account.parts[part]
        return self.estimated(work) + self.waiting(work) - self.at_peak(part)

    @property
    def device_name(self) -> str:
        assert self.chip is not None
        return self.chip.name if self.chip.devices == 1 else f"core of {self.chip.name}"

    # To compare -------------------------------------------------------------------------------------------------------

    def row(self) -> dict[str, float | str]:
        row: dict[str, float | str] = {"devices": self.devices, "model_flops": self.model_flops}
        if self.memory:
            row |= {f"{kind}_bytes": value for kind, value in self.memory.items()} | {"total_bytes": self.total}
            row |= {"flops": self.once["flops"], "bytes_accessed": self.once["bytes accessed"]}
        if self.available:
            row["available_bytes"] = self.available
        if self.fits is not None:
            row["fits"] = float(self.fits)
        row |= {f"roofline_{name}_seconds": seconds for name, seconds in self.roofline().items()}
        if self.account is not None and self.at_worst is not None:
            row |= self.part_row("", self.account.total)
            row["most_estimated_seconds"] = self.estimated(self.at_worst.total)
            row["kernels"] = ", ".join(sorted(self.account.total.kernels))  # without an estimate
            for part, work in self.account.parts.items():
                row |= self.part_row(f"{part.replace(' ', '_')}_", work)
                row[f"{part.replace(' ', '_')}_peak_seconds"] = self.at_peak(part)
        return {f"compile/{name}": value for name, value in row.items()}

    def part_row(self, prefix: str, work: Work) -> dict[str, float]:
        return {
            f"{prefix}estimated_seconds": self.estimated(work),
            f"{prefix}memory_bytes": work.memory,
            f"{prefix}network_bytes": work.received,
            f"{prefix}waiting_seconds": self.waiting(work),
        }


def gigabytes(count: float, digits: int = 3) -> str:
    return f"{count / 1e9:.{digits}f} GB"
