"""Files of a split: each row once, in order, whatever happens while they are written."""

import os
import resource
import subprocess
import sys
from unittest import mock

import pytest
import teacher_rows
from conftest import ROOT

from MaxText.cache import manifest, shards
from MaxText.cache.reading import Rows
from MaxText.config.keys import ConfigError
from MaxText.console import RunError

ROWS = teacher_rows.some(11)
TRAIN = "train"


def writer(folder, **changed):
    return shards.Writer(folder, TRAIN, **{"batches_per_shard": 3} | changed)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_row_is_there_once_in_order(tmp_path):
    found = Rows(teacher_rows.cache(tmp_path, ROWS))
    assert [shard.rows for shard in found.shards] == [3, 3, 3, 2]
    for ours, theirs in zip(map(found.__getitem__, range(11)), ROWS, strict=True):
        teacher_rows.assert_same(ours, theirs)


def test_a_shard_ends_with_a_batch(tmp_path):
    whole = writer(tmp_path, batches_per_shard=2)
    for number in range(1, 6):
        whole.write([b"a", b"b"], [1, 2], {"batches": number})
    assert (whole.rows, whole.batches) == (10, 4)  # written, and in whole shards
    whole.close()
    assert [shard.rows for shard in shards.all_shards(tmp_path, TRAIN)] == [4, 4, 2]
    assert (whole.rows, whole.tokens, whole.position) == (10, 15, {"batches": 5})


def test_a_host_that_is_ahead_goes_back_to_the_others(tmp_path):
    ahead = writer(tmp_path / "ahead")
    teacher_rows.write(ahead, ROWS)
    ahead.go_back_to(3)
    assert (ahead.rows, ahead.batches) == (3, 3)
    teacher_rows.write(ahead, ROWS, ahead.rows)
    ahead.close()
    teacher_rows.cache(tmp_path / "whole", ROWS)
    assert files(tmp_path / "ahead" / TRAIN) == files(tmp_path / "whole" / TRAIN)


KILLED = """
import os, pathlib, sys, teacher_rows
from MaxText.cache import shards
writer = shards.Writer(pathlib.Path(sys.argv[1]), "train", batches_per_shard=3)
teacher_rows.write(writer, teacher_rows.some(11)[: int(sys.argv[2])], writer.rows)
os.kill(os.getpid(), 9)
"""


def test_killed_and_begun_again_it_ends_with_the_same_bytes(tmp_path):
    teacher_rows.cache(tmp_path / "whole", ROWS)
    killed = tmp_path / "killed"
    manifest.begin(killed, teacher_rows.contents())
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    for rows in (2, 8):
        status = subprocess.run([sys.executable, "-c", KILLED, killed, str(rows)], env=environment).returncode
        assert status == -9
        assert any(file.suffix == ".partial" for file in (killed / TRAIN).iterdir())
    again = writer(killed)
    assert (again.rows, again.position) == (6, {"batches": 6})
    teacher_rows.write(again, ROWS, again.rows)
    again.close()
    manifest.finish(killed, TRAIN, shards.all_shards(killed, TRAIN))
    assert files(killed) == files(tmp_path / "whole")


@pytest.mark.parametrize("at", ["write_whole", "pathlib.Path.replace"])
def test_a_shard_that_has_not_its_name_yet_is_written_again(tmp_path, at):
    """Killed where what stands beside it is written, or where it is renamed."""
    teacher_rows.cache(tmp_path / "whole", ROWS[:3])
    where = at if "." in at else f"MaxText.cache.shards.{at}"
    killed = writer(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt), mock.patch(where, side_effect=KeyboardInterrupt):
        teacher_rows.write(killed, ROWS[:3])
    again = writer(tmp_path / "killed")
    assert (again.rows, again.position, files(tmp_path / "killed")) == (0, None, {})
    teacher_rows.write(again, ROWS[:3])
    assert files(tmp_path / "killed" / TRAIN) == files(tmp_path / "whole" / TRAIN)


def test_hosts_write_beside_each_other(tmp_path):
    manifest.begin(tmp_path, teacher_rows.contents())
    for host in range(2):
        own = writer(tmp_path, host=host, hosts=2)
        teacher_rows.write(own, ROWS[host::2])
        own.close()
    found = Rows(manifest_of(tmp_path))
    assert [shard.name.split(".")[0] for shard in found.shards] == [
        f"rows-0000{index}-host-00{host}-of-002" for index in range(2) for host in range(2)
    ]
    order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9]
    for place, index in enumerate(order):
        teacher_rows.assert_same(found[place], ROWS[index])


def manifest_of(folder):
    manifest.finish(folder, TRAIN, shards.all_shards(folder, TRAIN))
    return folder


def test_as_many_hosts_go_on_as_began(tmp_path):
    begun = writer(tmp_path, hosts=2)
    teacher_rows.write(begun, ROWS[:3])
    with pytest.raises(ConfigError, match="2 processes began to write it, 1 would go on"):
        writer(tmp_path)


def test_one_host_leaves_alone_what_another_is_writing(tmp_path):
    first = writer(tmp_path, hosts=2)
    teacher_rows.write(first, ROWS[:4])
    before = set(files(tmp_path))
    writer(tmp_path, host=1, hosts=2)
    assert set(files(tmp_path)) == before


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_shard_that_was_lost_is_named_before_others_are_written(tmp_path):
    folder = teacher_rows.cache(tmp_path, ROWS)
    (folder / TRAIN / "rows-00001-host-000-of-001.arrayrecord").unlink()
    with pytest.raises(ConfigError, match=r"rows-00001.*is missing, rows-00002.* was written after it"):
        writer(folder)


def test_a_shard_that_was_cut_is_named_before_others_are_written(tmp_path):
    folder = teacher_rows.cache(tmp_path, ROWS)
    shard = folder / TRAIN / "rows-00001-host-000-of-001.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"rows-00001.*has .* bytes, .*json says"):
        writer(folder)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_what_stands_beside_a_shard_is_named_where_it_cannot_be_read(tmp_path, content):
    folder = teacher_rows.cache(tmp_path, ROWS)
    beside = folder / TRAIN / "rows-00001-host-000-of-001.json"
    if content is None:
        beside.unlink()
    else:
        beside.write_text(content)
    with pytest.raises(ConfigError, match=r"rows-00001.*json: is missing or damaged"):
        writer(folder)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/train: cannot be written"):
        writer(tmp_path / "file")


@pytest.fixture
def little_space():
    """Files of 100 kB at most, as a full disk would have it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path, little_space):
    begun = writer(tmp_path)
    with pytest.raises(RunError, match=f"{tmp_path}/train: cannot be written .*File too large.*goes on"):
        begun.write([bytes(200_000)] * 3, [0] * 3, {"batches": 3})


def test_a_shard_that_did_not_keep_what_was_written_is_no_shard(tmp_path):
    begun = writer(tmp_path)
    with mock.patch("MaxText.cache.shards.array_record_module.ArrayRecordReader") as reader:
        reader.return_value.num_records.return_value = 2
        with pytest.raises(RunError, match="2 of 3 rows were written"):
            teacher_rows.write(begun, ROWS[:3])
    assert writer(tmp_path).rows == 0


def test_a_folder_that_goes_away_is_one_error(tmp_path):
    begun = writer(tmp_path)
    (tmp_path / TRAIN).rmdir()
    with pytest.raises(RunError, match=r"train: cannot be written .No such file"):
        teacher_rows.write(begun, ROWS)
