"""How the loss walks over a device's tokens: in blocks of how many, alone or together with other devices.

A block reads both heads, and reads and writes the float32 gradient of the student's. So it has to be so large that its
products take much longer than that; beyond it a larger block only holds more. Over the axes that shard the tokens the
heads may be gathered once, or each block's hidden states: what takes longer by more than a tenth is not done, and of
two that take about as long the second is, which holds no whole head.
"""

# N tokens of a device, n those of them in a block, D and E the student's and the teacher's width, V vocabulary (or one
# device's share of it), G devices that may have their blocks together

import dataclasses
from typing import NamedTuple

from MaxText.chips import Chip

MIB = 2**20

_HEADS_SHARE = 0.15  # of a block's time that the traffic of the heads would take, next to that of the products
_LEFT_TO_LOSS = 16  # a chip's memory, divided by it, is what a block may hold
_WITHOUT_CHIP = 256 * MIB  # likewise where the chip is not known; on a CPU small blocks stay in its cache
_LANES, _SUBLANES = 128, 8


class Heads(NamedTuple):
    """What is projected. A width is 0 where there is no such model.

    logit_bytes: of a block's memory per token and vocabulary entry: the copies of logits that are held at once.
    """

    vocabulary: int
    student_width: int
    teacher_width: int
    logit_bytes: int

    @property
    def flops(self) -> int:
        """Per token and vocabulary entry."""
        return 2 * (3 * self.student_width + self.teacher_width)

    @property
    def bytes_per_block(self) -> int:
        """Per vocabulary entry: the student's head twice, its gradient in float32 with a block's share of it, the
        teacher's head."""
        return (4 + 8) * self.student_width + 2 * self.teacher_width


@dataclasses.dataclass(frozen=True)
class Walk:
    """A way to walk.

    pool: devices that have their blocks together; 1 for each alone.
    block: n.
    rounds: blocks of all N tokens.
    flops, memory, network: of a device; FLOPs, bytes of its memory that are read and written, bytes that it receives.
    """

    pool: int
    block: int
    rounds: int
    flops: float
    memory: float
    network: float

    def seconds(self, chip: Chip) -> float:
        """At least, where nothing that is received comes while something is computed."""
        computing = max(self.flops / chip.flops, self.memory / chip.bandwidth)
        return chip.devices * (computing + self.network / chip.network)


def plan(heads: Heads, tokens: int, pool: int, chip: Chip | None, ceiling: int) -> Walk:
    """The way to take.

    Args:
      heads: of one device, before any pooling.
      tokens: N.
      pool: G; 1 where there is nobody to walk with.
      chip: None where it is not known.
      ceiling: bytes that a block may hold; 0 to choose.
    """
    alone, together = (_walk(heads, tokens, devices, pool, chip, ceiling) for devices in (1, pool))
    if chip is None:
        return together if together.network <= alone.network else alone
    return together if together.seconds(chip) <= 1.1 * alone.seconds(chip) else alone


def _walk(heads: Heads, tokens: int, pool: int, stored_on: int, chip: Chip | None, ceiling: int) -> Walk:
    """`stored_on`: devices over which the heads are sharded."""
    vocabulary, student, teacher, logit_bytes = heads
    ceiling = ceiling or (int(chip.memory / chip.devices / _LEFT_TO_LOSS) if chip else _WITHOUT_CHIP)
    most = ceiling // (logit_bytes * vocabulary)
    if chip is not None:
        enough = chip.ridge * heads.bytes_per_block / (_HEADS_SHARE * heads.flops)
        most = min(most, _up(int(enough / pool), _LANES))
    block = balanced(tokens, most)
    rounds = -(-tokens // block)
    by_logits = 22 * tokens * vocabulary  # written and read three times each, and the gradient, in bfloat16
    by_heads = rounds * vocabulary / pool * heads.bytes_per_block
    if stored_on == 1:
        network = 0.0
    elif pool == 1:  # both heads come, and the gradient of one is added up in float32
        network = vocabulary * (2 * (student + teacher) + 4 * student)
    else:  # hidden states come, and gradients of the student's, which are added up and not scattered
        network = pool * tokens * (2 * (student + teacher) + 8 * student)
    return Walk(pool, block, rounds, tokens * vocabulary * heads.flops, by_logits + by_heads, network)


def balanced(tokens: int, most: int) -> int:
    """Tokens of a block, `most` at most, such that few are walked over in vain in the last one."""
    step = _LANES if most >= _LANES else _SUBLANES
    most = max(step, most - most % step)
    if tokens <= most:
        return tokens
    fewest = -(-tokens // most)
    blocks = (_up(-(-tokens // rounds), step) for rounds in range(fewest, fewest + fewest // 4 + 2))
    return min(blocks, key=lambda block: (-(-tokens // block) * block, -block))


def _up(number: int, step: int) -> int:
    return max(1, -(-number // step)) * step
