"""What a program for a TPU costs, part by part, with the bodies of its loops counted as often as they run.

The compiler estimates the cycles of each of its operations, and knows how often most loops run. It does not know how
often a loop runs whose end depends on the data: whoever asks says that. Left out on purpose: what waits for what. The
cycles of a device's operations add up, for it runs one after the other; what comes over the network is told apart by
whether something is computed meanwhile.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from MaxText.compiled import traffic
from MaxText.compiled.text import Computation, Instruction, Program


@dataclasses.dataclass
class Work:
    """Of one device.

    cycles: by the compiler's estimate.
    memory: bytes of the large memory, read and written, by shapes.
    received: bytes that come over the network.
    waited: those of them that nothing is computed beside.
    kernels: calls of programs that the compiler has no estimate for, by name.
    """

    cycles: float = 0
    memory: float = 0
    received: float = 0
    waited: float = 0
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Work", times: int = 1) -> None:
        self.cycles += times * other.cycles
        self.memory += times * other.memory
        self.received += times * other.received
        self.waited += times * other.waited
        for name, calls in other.kernels.items():
            self.kernels[name] += times * calls


@dataclasses.dataclass
class Account:
    """A program's work.

    parts: part -> its work.
    loops: part -> rounds of its loops that stand in no other, in the program's order; each with those of a loop of
      unknown end within it, if there is one.
    """

    parts: dict[str, Work] = dataclasses.field(default_factory=lambda: collections.defaultdict(Work))
    loops: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    @property
    def total(self) -> Work:
        whole = Work()
        for work in self.parts.values():
            whole.add(work)
        return whole

    def add(self, part: str, work: Work, times: int = 1) -> None:
        self.parts[part].add(work, times)

    def take(self, other: "Account", times: int = 1) -> None:
        """What another computation does, so many times, and its loops."""
        for part, work in other.parts.items():
            self.add(part, work, times)
        for part, loops in other.loops.items():
            self.loops[part] += loops


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a program's text is to be read.

    part_of: place in the Python program -> part; "" where it does not tell, and what runs the operation counts.
    rest: the part of what nothing tells of.
    rounds: part -> how often its loop of unknown end runs, then such a loop within it, and so on. Without it: once.
    """

    part_of: Callable[[str], str]
    rest: str
    rounds: Mapping[str, Sequence[int]]


def account(program: Program, reading: Reading) -> Account:
    """What the program costs."""
    return _Reader(program, reading).read(program.computations[program.entry], reading.rest, None)


@dataclasses.dataclass(frozen=True)
class _Reader:
    program: Program
    reading: Reading

    def read(self, where: Computation, part: str, depth: int | None) -> Account:
        """`part` is that of what runs the computation; `depth`, of loops of unknown end around it; None in no loop."""
        found = Account()
        seen: set[str] = set()  # collectives that are fused with several operations, by what those have in common
        for item in where.instructions.values():
            own = self.reading.part_of(item.place) or part
            if item.operation == "while":
                self.read_loop(item, where, own, depth, found)
            elif item.operation in ("conditional", "call"):
                branches = [self.read(self.program.computations[name], own, depth) for name in item.called]
                longest = max(branches, key=lambda branch: branch.total.cycles)
                found.take(longest)
            else:
                found.add(own, self.alone(item, where, seen))
        return found

    def read_loop(self, loop: Instruction, where: Computation, part: str, depth: int | None, found: Account) -> None:
        known, inner = self.program.rounds(loop, where), depth or 0
        rounds = known
        if rounds is None:
            said = self.reading.rounds.get(part, ())
            rounds = said[inner] if inner < len(said) else 1
            inner += 1
        body = self.read(self.program.computations[loop.attribute("body")], part, inner)
        if depth is None or known is None:
            within = [each for loops in body.loops.values() for each in loops]
            body.loops = {part: [(rounds, *each) for each in within or [()]]}
        found.take(body, rounds)

    def alone(self, item: Instruction, where: Computation, seen: set[str]) -> Work:
        """Of an instruction that runs no other computation but fused ones."""
        work = Work(item.cycles, traffic.memory(item, where, self.program))
        if item.attribute("custom_call_target") == '"tpu_custom_call"' and not item.cycles:
            work.kernels[item.name.rstrip(".0123456789")] += 1
        inner = [(item, where)]
        if item.operation in ("fusion", "async-start"):
            called = self.program.computations[item.called[0]]
            inner = [(found, called) for found in called.instructions.values()]
        for found, place in inner:
            received = traffic.received(found, place)
            chain = re.search(r'chain_id="(\w+)"', found.attributes)
            if chain and chain[0] in seen:
                continue
            work.received += received
            if chain:
                seen.add(chain[0])
            elif not (found.operation.endswith("-start") or item.operation == "async-start"):
                work.waited += received
        return work
