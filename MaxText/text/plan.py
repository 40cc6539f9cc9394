"""What a preparation is asked for, and where each document belongs by that.

Each document gets two hashes. That of its text alone decides whether it is held out, so the split is the same whatever
the order of the inputs, the seed and the number of shards, and a text that occurs twice lies on one side. That of seed,
line and text is its place in the shuffled order; a shard is a range of places.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

PLACES = 1 << 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for."""

    inputs: tuple[Path, ...]
    out: Path
    text_key: str
    sample_by: str
    shards: int
    eval_fraction: float
    seed: int

    @property
    def work(self) -> Path:
        return self.out / ".work"

    @property
    def bad_lines(self) -> Path:
        return self.out / "bad_lines.txt"

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    @property
    def shard_counts(self) -> dict[str, int]:
        """Split -> number of shards; those of evaluation are about as large as those of training."""
        return {"train": self.shards, "eval": math.ceil(self.shards * self.eval_fraction)}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which bytes come out, beside the inputs' contents."""
        names = ("text_key", "sample_by", "shards", "eval_fraction", "seed")
        return {"inputs": sorted(map(str, self.inputs))} | {name: getattr(self, name) for name in names}

    def shard_names(self, split: str) -> list[str]:
        count = self.shard_counts[split]
        return [f"{split}-{index:05d}-of-{count:05d}.arrayrecord" for index in range(count)]

    def split_of(self, text: bytes) -> str:
        """ "eval" for the share --eval-fraction of all texts, by the text alone."""
        held_out = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < self.eval_fraction * PLACES
        return "eval" if held_out else "train"

    def place_of(self, text: bytes, line: int) -> int:
        """Where in the shuffled order the text stands, in [0, PLACES). The line keeps copies of one text apart."""
        key = f"{self.seed} {line}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key).digest())
