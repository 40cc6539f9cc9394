"""Reading a cache: rows by their number, from any process, and an error that names the file where there is none."""

import json
import pickle
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import teacher_rows
from conftest import ROOT

from MaxText import cache
from MaxText.cache import manifest, row, shards
from MaxText.cache.decoding import StudentRows
from MaxText.cache.reading import Rows
from MaxText.config.keys import ConfigError
from MaxText.console import RunError

ROWS = teacher_rows.some(7)
original = manifest.sha256


def shard(number):
    return f"rows-0000{number}-host-000-of-001.arrayrecord"


SHARD = shard(1)


@pytest.fixture
def folder(tmp_path):
    return teacher_rows.cache(tmp_path / "cache", ROWS)


def test_rows_are_read_as_they_were_written(folder):
    for found, expected in zip(cache.rows(folder), ROWS, strict=True):
        teacher_rows.assert_same(found, expected)
        sums = np.add.reduceat(found.weights, found.offsets[:-1][found.counts_at])
        np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_rows_are_read_by_their_number_in_another_process(folder):
    copy = pickle.loads(pickle.dumps(Rows(folder)))
    for index in (6, 0, np.int64(3)):
        teacher_rows.assert_same(copy[index], ROWS[index])
    for index in (-1, 7):
        with pytest.raises(IndexError):
            copy[index]


def test_grain_reads_rows_in_any_order_as_a_batch_has_them(folder):
    import grain

    rows = StudentRows(folder, "train", slots=9, vocabulary=teacher_rows.VOCABULARY)
    shuffled = list(grain.MapDataset.source(rows).shuffle(seed=1).to_iter_dataset())
    first = [int(each["inputs"][0]) for each in shuffled]
    assert first != [int(each.inputs[0]) for each in ROWS]
    assert sorted(first) == sorted(int(each.inputs[0]) for each in ROWS)
    assert {name: array.shape for name, array in shuffled[0].items()} == {
        **dict.fromkeys(row.TOKENS, (24,)),
        **dict.fromkeys(("teacher_ids", "teacher_log_weights"), (24, 9)),
        **dict.fromkeys(("teacher_target_log_prob", "teacher_entropy"), (24,)),
    }


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_hosts_have_the_same_number_of_rows_and_together_each_row_once(folder, hosts):
    """A host with a batch less would leave the others waiting in their last step."""
    import grain

    rows = StudentRows(folder, "train", first=5, hosts=hosts, slots=9, vocabulary=teacher_rows.VOCABULARY)
    shuffled = grain.MapDataset.source(rows).shuffle(seed=1)
    shares = [list(shuffled[host::hosts]) for host in range(hosts)]
    assert {len(share) for share in shares} == {-(-5 // hosts)}
    read = [row for share in shares for row in share if row["targets_segmentation"].any()]
    assert sorted(int(row["inputs"][0]) for row in read) == sorted(int(each.inputs[0]) for each in ROWS[:5])
    assert len({tuple((name, x.shape, x.dtype) for name, x in row.items()) for share in shares for row in share}) == 1


def test_a_worker_that_decodes_imports_no_engine():
    code = (
        "import MaxText.cache.decoding, sys; sys.exit(any(name in sys.modules for name in ('jax', 'maxtext', 'grain')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_manifest_says_what_there_is(folder):
    teacher_rows.cache(folder, ROWS[:2], "eval")
    found = manifest.read(folder)
    assert found.contents == teacher_rows.contents()
    assert {name: (split.rows, split.tokens) for name, split in found.splits.items()} == {
        "train": (7, 7 * 17),
        "eval": (2, 2 * 17),
    }
    for name, split in found.splits.items():
        size = sum(file.stat().st_size for file in (folder / name).glob("*.arrayrecord"))
        assert split.bytes == size and split.bytes_per_token == round(size / split.tokens, 2)


def test_every_file_is_read_to_verify_it(folder):
    assert manifest.verify_checksums(folder) == manifest.read(folder)


def test_of_several_hosts_each_reads_its_own_files_and_together_they_read_all(folder):
    read = []
    with mock.patch.object(manifest, "sha256", side_effect=lambda file: read.append(file.name) or original(file)):
        for host in range(2):
            manifest.verify_checksums(folder, host, 2)
            read.append(None)
    assert read == [shard(0), shard(2), None, shard(1), None]


# What is refused ----------------------------------------------------------------------------------------------------


def test_no_cache_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"manifest.json: is missing; .* is no cache"):
        cache.rows(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 1}', '{"version": 1, "contents": {}}'])
def test_what_is_no_manifest_is_named(folder, content):
    (folder / manifest.NAME).write_text(content)
    with pytest.raises(ConfigError, match=r"manifest.json: is no manifest of a cache"):
        cache.rows(folder)


def test_a_manifest_of_another_version_is_refused_by_both_numbers(folder):
    found = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).write_text(json.dumps(found | {"version": 2}))
    with pytest.raises(ConfigError, match=r"manifest.json: its format is version 2, this program reads version 1"):
        cache.rows(folder)


def test_a_cache_that_is_being_written_is_refused(tmp_path):
    manifest.begin(tmp_path, teacher_rows.contents())
    with pytest.raises(ConfigError, match=r"train: holds no complete rows$"):
        cache.rows(tmp_path)
    shards.Writer(tmp_path, "train", batches_per_shard=3)
    with pytest.raises(ConfigError, match=r"train: holds no complete rows; cache_teacher.py .* goes on"):
        cache.rows(tmp_path)


def test_a_missing_shard_is_named(folder):
    (folder / "train" / SHARD).unlink()
    with pytest.raises(ConfigError, match=f"{SHARD}: is missing, .*manifest.json names it"):
        cache.rows(folder)


def test_a_cut_shard_is_named(folder):
    cut(folder / "train" / SHARD)
    with pytest.raises(ConfigError, match=f"{SHARD}: has .* bytes, .*manifest.json says"):
        cache.rows(folder)


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def test_a_flipped_bit_is_found_with_its_file_and_row(folder):
    file = folder / "train" / SHARD
    content = bytearray(file.read_bytes())
    second = content.index(record_of(ROWS[4]))
    content[second + 100] ^= 4
    file.write_bytes(content)
    found = Rows(folder)
    teacher_rows.assert_same(found[3], ROWS[3])
    with pytest.raises(RunError, match=f"{SHARD}: row 1 is damaged .*cache the split anew"):
        found[4]
    with pytest.raises(RunError, match=f"{SHARD}: is damaged, its SHA-256 is not that of .*manifest.json"):
        manifest.verify_checksums(folder)


def record_of(each):
    from MaxText.cache.codec import encode

    return encode(each)


def test_a_shard_that_is_no_array_record_is_found_with_its_file(folder):
    file = folder / "train" / SHARD
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(RunError, match=f"{SHARD}: row 0 is damaged .the file holds 0 rows, its manifest says 3"):
        Rows(folder)[3]


OTHER = teacher_rows.TEACHER.model_copy(update={"fingerprint": "e" * 32})
CHANGES = {
    "teacher": ({"teacher": OTHER}, "teacher: /teacher at step 7 .fingerprint f+. there, .* e+. now"),
    "temperature": ({"temperature": 2.0}, "kd_temperature: 1.0 there, 2.0 now"),
    "draws": ({"draws": 24}, "kd_cache_draws: 8 there, 24 now"),
    "seed": ({"seed": 1}, "seed: 0 there, 1 now"),
    "data": ({"data": {"packing": False}}, "packing: True there, False now"),
    "row length": ({"row_length": 48}, "max_target_length: 24 there, 48 now"),
}  # fmt: skip


@pytest.mark.parametrize("changed, message", CHANGES.values(), ids=CHANGES)
def test_a_folder_with_another_cache_is_refused_by_what_differs(folder, changed, message):
    before = (folder / manifest.NAME).read_bytes()
    with pytest.raises(ConfigError, match=f"holds another cache .{message}"):
        manifest.begin(folder, teacher_rows.contents(**changed))
    assert (folder / manifest.NAME).read_bytes() == before


def test_the_same_cache_goes_on_where_its_teacher_has_moved(folder):
    moved = teacher_rows.TEACHER.model_copy(update={"path": "/elsewhere", "step": 0})
    assert manifest.begin(folder, teacher_rows.contents(teacher=moved)) == manifest.read(folder)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds thesis.tex and is no cache"):
        manifest.begin(tmp_path, teacher_rows.contents())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/cache: cannot be written"):
        manifest.begin(tmp_path / "file" / "cache", teacher_rows.contents())
