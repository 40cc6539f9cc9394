"""Rows as a teacher would have them, made of random numbers."""

import pathlib

import numpy as np

from MaxText.cache import codec, manifest, row, shards
from MaxText.cache.manifest import Contents, Teacher
from MaxText.cache.quantiser import BOUND

VOCABULARY = 151_936
TEACHER = Teacher(path="/teacher", step=7, fingerprint="f" * 32)


def contents(**changed) -> Contents:
    settings = {"teacher": TEACHER, "tokenizer": "t", "vocab_size": VOCABULARY, "kd_vocab_size": 0, "temperature": 1.0,
                "mode": "sample", "draws": 8, "top_k": 0, "log_prob_bound": None, "row_length": 24, "seed": 0,
                "data": {"packing": True}}  # fmt: skip
    return Contents(**settings | changed)


def top_k_contents(number: int, **changed) -> Contents:
    return contents(mode="top_k", draws=0, top_k=number, log_prob_bound=BOUND, **changed)


def packed(generator: np.random.Generator, lengths: list[int], padding: int = 0, vocabulary: int = VOCABULARY) -> dict:
    """Tokens of documents of these lengths in one row, as packing leaves them."""
    segments = np.concatenate([np.repeat(np.arange(len(lengths)) + 1, lengths), np.zeros(padding, int)])
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding, int)])
    stream = generator.integers(0, vocabulary, len(segments) + 1) * np.append(segments != 0, padding == 0)
    return {
        "inputs": stream[:-1], "targets": stream[1:], "inputs_position": positions, "targets_position": positions,
        "inputs_segmentation": segments, "targets_segmentation": segments,
    }  # fmt: skip


def scattered(generator: np.random.Generator, length: int) -> dict:
    """Any numbers in every array, below 0 too: nothing follows from anything."""
    whole = {name: generator.integers(-(2**31), 2**31, length) for name in row.TOKENS}
    return whole | {"targets_segmentation": generator.integers(0, 2, length) * whole["targets_segmentation"]}


def drawn(generator: np.random.Generator, tokens: dict, ids: np.ndarray) -> row.Row:
    return row.of_draws(tokens, ids, *numbers(generator, len(tokens["inputs"])))


def random_draws(
    generator: np.random.Generator, tokens: dict, number: int = 8, vocabulary: int = VOCABULARY
) -> row.Row:
    return drawn(generator, tokens, generator.integers(0, vocabulary, (len(tokens["inputs"]), number)))


def random_top_k(
    generator: np.random.Generator, tokens: dict, number: int = 8, vocabulary: int = VOCABULARY
) -> row.Row:
    length = len(tokens["inputs"])
    ids = np.array([np.sort(generator.choice(vocabulary, number, replace=False)) for _ in range(length)], int)
    log_probs = np.log(generator.dirichlet(np.full(number + 1, 0.3), length)).astype(np.float32)
    return row.of_top_k(tokens, ids.reshape(length, number), log_probs[:, 1:], log_probs[:, 0],
                        *numbers(generator, length))  # fmt: skip


def numbers(generator: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the targets, and entropies."""
    return -generator.exponential(2, length).astype(np.float32), generator.uniform(0, 6, length).astype(np.float32)


def zipf_draws(generator: np.random.Generator, length: int, number: int, power: float) -> row.Row:
    """Systematic draws from peaked distributions over ids that are as frequent as words are.

    At each position, ids of the unigram distribution share the mass by a power of their rank, which is `power` at the
    median. With 2.05 a position has as many of 50 draws' ids as SmolLM2-135M's distributions have (13.1), and a row of
    1,024 tokens about as many ids in all.
    """
    support = np.sort(frequent(generator, (length, 200)), axis=1)
    ranks = generator.permuted(np.tile(np.arange(1.0, 201), (length, 1)), axis=1)
    mass = ranks ** -np.exp(generator.normal(np.log(power), 0.5, (length, 1)))
    ends = np.cumsum(mass, axis=1) / mass.sum(axis=1, keepdims=True)
    points = (generator.random((length, 1)) + np.arange(number)) / number
    place = np.minimum((points[:, :, None] > ends[:, None, :]).sum(axis=2), 199)
    ids = np.take_along_axis(support, place, axis=1)
    return drawn(generator, read_on(ids[np.arange(length), generator.integers(0, number, length)]), ids)


def zipf_top_k(generator: np.random.Generator, length: int, number: int) -> row.Row:
    """The most likely of ids that are as frequent as words are, their probabilities powers of their rank."""
    ids = [
        generator.choice(np.unique(more), number, replace=False) for more in frequent(generator, (length, 2 * number))
    ]
    ranks = generator.permuted(np.tile(np.arange(1.0, number + 1), (length, 1)), axis=1)
    power = np.exp(generator.normal(np.log(1.4), 0.3, (length, 1)))
    log_probs = -power * np.log(ranks) + generator.normal(0, 0.3, ranks.shape)
    log_tail = -power[:, 0] * np.log(number / 8)
    total = np.logaddexp(np.logaddexp.reduce(log_probs, axis=1), log_tail)
    tokens = read_on(np.array([each[0] for each in ids]))
    return row.of_top_k(tokens, np.sort(ids, axis=1), (log_probs.T - total).T.astype(np.float32),
                        (log_tail - total).astype(np.float32), *numbers(generator, length))  # fmt: skip


def frequent(generator: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    """Ids by Zipf's law, which says nothing about what number a frequent one has."""
    ends = np.cumsum((np.arange(VOCABULARY) + 10.0) ** -1.2)
    places = np.searchsorted(ends, ends[-1] * generator.random(shape))
    return np.random.default_rng(0).permutation(VOCABULARY)[places]


def read_on(targets: np.ndarray) -> dict:
    """One document's tokens, of what follows each."""
    tokens = packed(np.random.default_rng(0), [len(targets)])
    return tokens | {"inputs": np.roll(targets, 1), "targets": targets}


def assert_same(found: row.Row, expected: row.Row) -> None:
    """To the bit, types too."""
    pairs = [(getattr(found, name), getattr(expected, name)) for name in vars(expected) if name != "teacher"]
    assert type(found.teacher) is type(expected.teacher)
    pairs += [
        (np.asarray(value), np.asarray(vars(expected.teacher)[name])) for name, value in vars(found.teacher).items()
    ]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes()


def cache(
    folder: pathlib.Path, rows: list[row.Row], split: str = "train", per_shard: int = 3, **changed
) -> pathlib.Path:
    """A complete cache of these rows, as it is written a row at a time."""
    manifest.begin(folder, contents(**changed))
    writer = shards.Writer(folder, split, batches_per_shard=per_shard)
    write(writer, rows)
    writer.close()
    manifest.finish(folder, split, shards.all_shards(folder, split))
    return folder


def write(writer: shards.Writer, rows: list[row.Row], first: int = 0) -> None:
    for place, each in enumerate(rows[first:], first):
        writer.write([codec.encode(each)], [int(each.counts_at.sum())], {"batches": place + 1})


def some(count: int, seed: int = 0) -> list[row.Row]:
    generator = np.random.default_rng(seed)
    return [random_draws(generator, packed(generator, [9, 8], padding=7)) for _ in range(count)]
