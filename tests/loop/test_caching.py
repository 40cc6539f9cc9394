"""Laws of the program that stores a teacher's targets: each row once, whatever happens to it.

The data are rows of random tokens, of which each is told from the others. What is killed, or has several devices, is a
process of its own.
"""

import dataclasses
import os
import random
import shutil
from unittest import mock

import caches
import jax.numpy as jnp
import letters
import numpy as np
import pytest
import teacher_rows
import test_processes
import token_rows
from conftest import execute

from MaxText.cache import lock, manifest, quantiser, reading, row, shards
from MaxText.config.keys import ConfigError, Distillation
from MaxText.console import RunError
from MaxText.data import evaluation
from MaxText.distill.targets import Targets
from MaxText.loop import caching, targets, verifying

pytestmark = pytest.mark.e2e

LENGTHS = [33, 20, 9, 2, 31, 12, 25, 7, 18, 33, 28]  # two batches of four, and one that is not full
EVAL_LENGTHS = [14, 33, 6, 22, 30]
ONE_BATCH = 4 * 32  # tokens


@pytest.fixture(scope="module")
def keys(tmp_path_factory, teacher):
    """Keys of a distillation of 50 draws, on rows to train on and to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    return token_rows.KEYS | {
        "grain_train_files": token_rows.write(folder / "train.arrayrecord", LENGTHS, seed=0),
        "grain_eval_files": token_rows.write(folder / "eval.arrayrecord", EVAL_LENGTHS, seed=1),
        "eval_interval": 2,
        "eval_steps": -1,
        "kd_teacher_parameters_path": teacher,
        "enable_checkpointing": "false",
    }


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """A shard is of one batch."""
    with mock.patch.object(caching, "TOKENS_PER_SHARD", ONE_BATCH):
        yield


@pytest.fixture(scope="module")
def cache(keys, tmp_path_factory):
    """A cache that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert caches.write(folder, keys)[0] == 0
    return folder


# Each row once --------------------------------------------------------------------------------------------------------


def test_every_row_of_both_splits_is_stored_once_the_last_batch_of_them_not_full(cache):
    for split, lengths in (("train", LENGTHS), ("eval", EVAL_LENGTHS)):
        found = caches.rows(cache, split)
        counted = sorted(int(each.counts_at.sum()) for each in found)
        assert counted == sorted(min(length, 32) - 1 for length in lengths)
        assert len({each.inputs.tobytes() for each in found}) == len(lengths)
    assert [shard.rows for shard in manifest.read(cache).splits["train"].shards] == [4, 4, 3]


FAKE = Distillation.model_construct(
    use_kd=True, kd_cache_rows=0, kd_teacher_max_ce=0, kd_vocab_size=0, kd_teacher_parameters_path="t"
)


def numbered(sizes, length=6):
    """A reader of batches with so many rows that count, each of another token, and of four rows in all."""
    number, batches = 0, []
    for size in sizes:
        batch = {name: np.zeros((4, length), np.int32) for name in row.TOKENS}
        for place in range(size):
            number += 1
            batch["inputs"][place] = number
            batch["targets_segmentation"][place] = 1
        batches.append(batch)
    return evaluation.FullBatches(batches, batches[0], evaluation.all_of_it)


def said_of(batch):
    """A teacher that draws what it reads."""
    shape = batch["inputs"].shape
    ids = np.broadcast_to(batch["inputs"][..., None], (*shape, 2))
    return Targets(jnp.asarray(ids), None, None, jnp.zeros(shape), jnp.zeros(shape))


def stored_numbers(folder, sizes, limit=0, split="train", eval_steps=-1, said_of=said_of):
    """The numbers of the rows in `folder` when so many have been asked for."""
    config = mock.Mock(vocab_size=caches.VOCABULARY, eval_steps=eval_steps, global_batch_size_to_load_eval=4)
    manifest.begin(folder, teacher_rows.contents(draws=2))
    kd = FAKE.model_copy(update={"kd_cache_rows": limit})
    with mock.patch.object(caching, "TOKENS_PER_SHARD", 2 * 4 * 6):  # two batches
        caching.write_split(config, kd, split, numbered(sizes), said_of, folder)
    manifest.finish(folder, split, shards.all_shards(folder, split))
    return [int(each.inputs[0]) for each in reading.rows(folder, split)]


SIZES = [4, 0, 3, 4, 4, 2]  # 17 rows, one batch without any


def test_as_many_rows_are_stored_as_are_asked_for_and_going_on_adds_the_others(tmp_path):
    assert stored_numbers(tmp_path / "whole", SIZES) == list(range(1, 18))
    for first in range(1, 17):
        folder = tmp_path / str(first)
        assert stored_numbers(folder, SIZES, first) == list(range(1, first + 1))
        assert stored_numbers(folder, SIZES, max(first - 3, 1)) == list(range(1, first + 1))  # what is there stays
        assert stored_numbers(folder, SIZES, first + 2) == list(range(1, min(first + 2, 17) + 1))
        assert stored_numbers(folder, SIZES) == list(range(1, 18))


def test_of_evaluation_data_what_evaluations_read_is_stored_and_more_where_they_read_more(tmp_path):
    """Whatever is asked for of the rows to train on."""
    of_evaluation = {"split": "eval", "limit": 2}
    assert stored_numbers(tmp_path, [4, 4, 4, 2], **of_evaluation, eval_steps=2) == list(range(1, 9))
    assert stored_numbers(tmp_path, [4, 4, 4, 2], **of_evaluation, eval_steps=1) == list(range(1, 9))
    assert stored_numbers(tmp_path, [4, 4, 4, 2], **of_evaluation, eval_steps=3) == list(range(1, 13))
    assert stored_numbers(tmp_path, [4, 4, 4, 2], **of_evaluation, eval_steps=-1) == list(range(1, 15))


def test_a_cache_that_was_killed_while_rows_were_added_to_it_is_one_that_goes_on(tmp_path):
    def killed(batch):
        raise KeyboardInterrupt

    for limit in (5, 7):  # a batch of which rows were left out is given up to go on, a whole one is not
        folder = tmp_path / str(limit)
        stored_numbers(folder, SIZES, limit)
        with pytest.raises(KeyboardInterrupt):
            stored_numbers(folder, SIZES, limit + 6, said_of=killed)
        if limit == 5:
            with pytest.raises(ConfigError, match=r"train: holds no complete rows; cache_teacher.py .* goes on"):
                reading.rows(folder)
        else:
            assert len(list(reading.rows(folder))) == limit
        assert stored_numbers(folder, SIZES, limit + 6) == list(range(1, limit + 7))


def test_a_host_that_was_ahead_and_one_that_had_its_share_go_on_together(tmp_path, monkeypatch):
    """Each with its own data, and answers of the other in the place of the network's."""
    ends = {}
    for host in range(2):
        writer = shards.Writer(tmp_path, "train", batches_per_shard=2, host=host, hosts=2)
        for number in range(1, 5 + 2 * host):
            writer.write([b"row"], [1], {"batches": number})
        writer.close()
        ends[host] = writer
    monkeypatch.setattr(
        caching, "common", lambda number, largest=False: (max if largest else min)(number, ends[0].batches)
    )
    caching.go_back(ends[1])
    assert ends[1].batches == ends[0].batches == 4


# One at a time, killed and gone on ------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_is_refused_and_its_process_named(keys, tmp_path):
    folder = tmp_path / "cache"
    with (
        lock.writing_alone(folder),
        pytest.raises(ConfigError, match=rf"kd_cache_path={folder}: process {os.getpid()} is writing it"),
    ):
        caches.write(folder, keys)
    assert caches.files(folder) == {}


# The program, killed when it is to do the n-th thing to the cache's files.
KILLED = """
import os, pathlib, runpy

from MaxText.cache import manifest, shards
from MaxText.loop import caching

caching.TOKENS_PER_SHARD = {tokens}
left = [{at}]

def counted(owner, name, counts=lambda *arguments: True):
    original = getattr(owner, name)

    def call(*arguments, **keys):
        left[0] -= counts(*arguments)
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return original(*arguments, **keys)

    setattr(owner, name, call)

counted(shards.Unfinished, "write")
counted(shards.Unfinished, "complete")
counted(shards, "write_whole")
counted(manifest, "write_whole")
counted(pathlib.Path, "replace", lambda path, target: path.suffix in (".tmp", ".partial"))
runpy.run_path("MaxText/cache_teacher.py", run_name="__main__")
"""
OF_MANIFEST, OF_SHARD = 2, 5  # things that are done to its files
MOMENTS = 3 * OF_MANIFEST + (3 + 2) * OF_SHARD


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """killed(folder, keys, at): a caching that is killed when it is to do the `at`-th thing to its files."""
    base = tmp_path_factory.mktemp("programs")

    def run(folder, keys, at):
        script = base / f"killed_at_{at}.py"
        script.write_text(KILLED.format(at=at, tokens=ONE_BATCH))
        line = caches.arguments(keys | {"kd_cache_path": folder}, folder.parent)
        result = execute([str(script)], line, folder.parent)
        assert result.status == -9, result.output

    return run


@pytest.fixture
def read_batches(monkeypatch):
    """The numbers of batches that have been read of the data for training, whether they were used or not."""
    counts = []
    original = evaluation.FullBatches.__iter__

    def counting(self):
        for batch in original(self):
            counts.append(int((batch["targets_segmentation"] != 0).sum()))
            yield batch

    monkeypatch.setattr(evaluation.FullBatches, "__iter__", counting)
    return counts


def test_killed_and_begun_again_it_ends_with_the_same_bytes_and_reads_no_row_again(
    cache, keys, killed, read_batches, tmp_path
):
    folder = tmp_path / "cache"
    killed(folder, keys, OF_MANIFEST + 2 * OF_SHARD + 2)
    assert len(list((folder / "train").glob("*.arrayrecord"))) == 2
    assert caches.write(folder, keys)[0] == 0
    assert caches.files(folder) == caches.files(cache)
    assert len(read_batches) == 1 + 2  # the one that was left, and the two for evaluations


def interrupted(folder, keys, shard):
    """A caching that ends where it would complete this shard."""

    def stop(self):
        if self.shard.name.startswith(shard):
            raise KeyboardInterrupt
        return complete(self)

    complete = shards.Unfinished.complete
    with pytest.raises(KeyboardInterrupt), mock.patch.object(shards.Unfinished, "complete", stop):
        caches.write(folder, keys)


def test_where_a_pipeline_cannot_go_on_in_its_middle_rows_are_read_again_and_skipped(keys, read_batches, tmp_path):
    letters.save_letters(tmp_path / "tokenizer")
    lines = ["abcdefghijklmnopqrstuvwxyz"[:length] for length in range(2, 13)]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    keys = {"dataset_type": "hf", "grain_worker_count": 0, "hf_path": "json", "hf_train_files": tmp_path / "text.jsonl",
            "packing": "false", "tokenizer_type": "huggingface", "tokenizer_path": tmp_path / "tokenizer",
            "add_bos": "false", "kd_teacher_parameters_path": keys["kd_teacher_parameters_path"]}  # fmt: skip
    assert caches.write(tmp_path / "whole", keys)[0] == 0
    found = caches.rows(tmp_path / "whole")
    assert len(found) == len(lines) == len({each.inputs.tobytes() for each in found})
    interrupted(tmp_path / "cache", keys, "rows-00002")
    read_batches.clear()
    assert caches.write(tmp_path / "cache", keys)[0] == 0
    assert caches.files(tmp_path / "cache") == caches.files(tmp_path / "whole")
    assert len(read_batches) == 3


@pytest.mark.slow
@pytest.mark.parametrize("at", random.Random(0).sample(range(1, MOMENTS + 1), 8))
def test_it_may_be_killed_at_any_moment(at, cache, keys, killed, tmp_path):
    folder = tmp_path / "cache"
    killed(folder, keys, at)
    assert caches.write(folder, keys)[0] == 0
    assert caches.files(folder) == caches.files(cache)


@pytest.mark.slow
def test_packed_rows_go_on_as_they_were_packed(keys, tmp_path):
    lengths = np.random.default_rng(0).integers(2, 25, 60).tolist()
    file = token_rows.write(tmp_path / "documents.arrayrecord", lengths, seed=2)
    keys = keys | {"packing": "true", "grain_train_files": file, "eval_interval": -1}
    assert caches.write(tmp_path / "whole", keys)[0] == 0

    interrupted(tmp_path / "cache", keys, "rows-00001")
    assert caches.write(tmp_path / "cache", keys)[0] == 0
    assert caches.files(tmp_path / "cache") == caches.files(tmp_path / "whole")
    found = caches.rows(tmp_path / "cache")
    assert sum(int(each.counts_at.sum()) for each in found) == sum(lengths) - len(found)  # between documents too
    assert max(int(each.segmentation.max()) for each in found) > 1


# Layouts --------------------------------------------------------------------------------------------------------------

LAYOUTS = [{"ici_fsdp_parallelism": 4}, {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2}]


def by_tokens(rows):
    """Rows by what they are of, wherever in the cache they stand."""
    return {each.inputs.tobytes(): each for each in rows}


def assert_same_records(found, expected):
    """The same targets of the same rows; what is measured in nats may differ by the order of additions."""
    assert found.keys() == expected.keys()
    for key, ours in found.items():
        theirs = expected[key]
        assert not verifying.others(ours, theirs).any()
        if isinstance(theirs.teacher, row.TopK):  # rounded, and so to a neighbouring step at most
            for name in ("log_probs", "log_tail"):
                pair = (getattr(each.teacher, name) for each in (ours, theirs))
                np.testing.assert_allclose(*pair, atol=1.01 * quantiser.STEP, rtol=0)
        np.testing.assert_allclose(ours.target_log_prob, theirs.target_log_prob, atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["fsdp", "tensor"])
def test_on_four_devices_the_same_is_stored_as_on_one(layout, cache, keys, tmp_path):
    batch = {"per_device_batch_size": 1, "kd_cache_path": tmp_path / "cache"}
    result = execute(caches.PROGRAM, caches.arguments(keys | layout | batch, tmp_path), tmp_path, devices=4)
    assert result.status == 0, result.output
    for split in ("train", "eval"):
        assert_same_records(by_tokens(caches.rows(tmp_path / "cache", split)), by_tokens(caches.rows(cache, split)))


@pytest.mark.slow
def test_on_four_devices_the_same_likeliest_tokens_are_stored_as_on_one(keys, tmp_path):
    keys = keys | {"kd_cache_mode": "top_k", "kd_top_k": 16, "eval_interval": -1}
    assert caches.write(tmp_path / "one", keys)[0] == 0
    more = {"per_device_batch_size": 1, "kd_cache_path": tmp_path / "four", "ici_fsdp_parallelism": 4}
    result = execute(caches.PROGRAM, caches.arguments(keys | more, tmp_path), tmp_path, devices=4)
    assert result.status == 0, result.output
    assert_same_records(*(by_tokens(caches.rows(tmp_path / name)) for name in ("four", "one")))


@pytest.mark.slow
def test_two_processes_store_what_one_does_and_both_compare_it(cache, keys, tmp_path):
    own = {"per_device_batch_size": 1, "kd_cache_path": tmp_path / "cache", "run_name": "both"}
    arguments = [f"{key}={value}" for key, value in (keys | own).items()]
    test_processes.two_processes(tmp_path, *arguments, program=caches.PROGRAM)
    for split in ("train", "eval"):
        assert_same_records(by_tokens(caches.rows(tmp_path / "cache", split)), by_tokens(caches.rows(cache, split)))
    told, _ = test_processes.two_processes(tmp_path, *arguments, "kd_cache_verify=true", program=caches.PROGRAM)
    assert "the cache is what its teacher says" in told


# Compared with its teacher --------------------------------------------------------------------------------------------


def rewritten(folder, split, number, change):
    """The cache, of which one row is another, as if it had been written so."""
    found = caches.rows(folder, split)
    found[number] = change(found[number])
    before = manifest.read(folder)
    for file in (folder / split).iterdir():
        file.unlink()
    teacher_rows.cache(folder, found, split, **before.contents.model_dump(exclude_none=True))


def another_count(stored):
    counts = stored.teacher.counts.copy()
    place = np.flatnonzero(counts > 1)[0]
    ids = np.repeat(stored.ids, counts)
    changed = np.searchsorted(np.cumsum(counts), np.cumsum(counts)[place] - 1, side="right")
    assert changed == place and ids.size
    counts[place] -= 1
    neighbour = place + 1 if place + 1 < len(counts) else place - 1
    counts[neighbour] += 1
    return dataclasses.replace(stored, teacher=dataclasses.replace(stored.teacher, counts=counts))


def another_log_prob(stored):
    values = stored.target_log_prob.copy()
    values[np.flatnonzero(stored.counts_at)[0]] += np.float16(0.05)
    return dataclasses.replace(stored, target_log_prob=values)


def test_a_comparison_finds_one_number_that_is_another(cache, keys, tmp_path):
    status, output = caches.write(shutil.copytree(cache, tmp_path / "same"), keys, kd_cache_verify="true")
    assert status == 0 and "the cache is what its teacher says" in output
    for change in (another_count, another_log_prob):
        folder = shutil.copytree(cache, tmp_path / change.__name__)
        rewritten(folder, "train", 5, change)
        status, output = caches.write(folder, keys, kd_cache_verify="true")
        assert status == 1 and "THE CACHE IS NOT WHAT ITS TEACHER SAYS" in output


def test_a_host_whose_own_files_are_sound_does_not_go_on_where_another_found_damage(tmp_path, monkeypatch):
    folder = teacher_rows.cache(tmp_path / "cache", teacher_rows.some(4))
    assert verifying.sound(folder) == manifest.read(folder)
    monkeypatch.setattr(evaluation, "any_host", lambda has: True)
    with pytest.raises(RunError, match=f"{folder}: is damaged; another process names the file"):
        verifying.sound(folder)


def test_where_a_rows_draws_begin_is_a_function_of_the_seed_and_of_all_its_numbers():
    batch = {name: np.zeros((3, 5), np.int32) for name in row.TOKENS}
    batch["inputs"][1, 4] = 1
    offsets = np.asarray(targets.offsets_of(0, jnp.asarray(caching.row_keys(batch)), 64))
    assert np.all((offsets >= 0) & (offsets < 1)) and len(np.unique(offsets[0])) > 60
    np.testing.assert_array_equal(offsets[0], offsets[2])  # the same row, elsewhere in the batch
    assert not np.any(offsets[0] == offsets[1])
    assert not np.any(offsets == targets.offsets_of(1, jnp.asarray(caching.row_keys(batch)), 64))
    for name in row.TOKENS:
        other = batch | {name: batch[name] + np.eye(3, 5, dtype=np.int32)}
        assert not np.any(caching.row_keys(other)[[0, 2]] == caching.row_keys(batch)[[0, 2]])


def test_each_batch_comes_back_once_and_in_order_while_later_ones_are_computed():
    launched, packed = [], []

    def step(batch):
        launched.append(batch)
        return -batch

    def reads():
        for number in range(1, 6):
            yield caching.once.Read(number, {"batches": number})

    for read, found in caching.launched_ahead(reads(), step):
        assert found == -read.batch
        packed.append(read.batch)
        assert len(launched) == min(len(packed) + caching.AHEAD, 5)
    assert packed == launched == [1, 2, 3, 4, 5]
