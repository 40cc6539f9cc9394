"""Laws of preparing text: nothing is lost unsaid, the split depends on the text alone, no half shard looks whole."""

import gzip
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepare_text
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from maxtext.input_pipeline.protos import example_pb2

from MaxText.text import buckets, preparation
from MaxText.text import documents as reader
from MaxText.text import record as memory
from MaxText.text import shards as writer

# Text that breaks what is written carelessly: letters of other scripts, a quote, a tab, the separator of Unicode.
TEXTS = [f"document {number} of 'ünïcode' 数\t\u2028{'x' * (number % 40)}" for number in range(600)]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """prepare(INPUT, ..., out=name, options...) is the command in an empty folder, where the inputs lie -> --out."""
    monkeypatch.chdir(tmp_path)

    def run(*inputs: str, out: str = "out", options: str = "") -> Path:
        prepare_text.main([*inputs, "--out", out, *options.split()])
        return tmp_path / out

    return run


def write_jsonl(name: str, texts: list[str]) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split's shards, in order."""
    found = []
    for shard in sorted(folder.glob(f"{split}-*.arrayrecord")):
        source = ArrayRecordDataSource(str(shard))
        for record in source.__getitems__(range(len(source))):
            found.append(example_pb2.Example.FromString(record).features.feature["text"].bytes_list.value[0].decode())
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.arrayrecord")}


# What comes out -----------------------------------------------------------------------------------------------------


def test_every_document_of_every_format_comes_out_once_and_unchanged(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS[:200])
    with gzip.open("b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in TEXTS[200:350])
    table = pyarrow.table({"n": list(range(150)), "text": TEXTS[350:500]})
    pyarrow.parquet.write_table(table, "c.parquet", row_group_size=40)
    Path("d.txt").write_text("".join(f"{text}\r\n" for text in TEXTS[500:]), newline="")
    out = prepare("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt", options="--shards 3 --eval-fraction 0.2")
    train, held_out = documents(out, "train"), documents(out, "eval")
    assert Counter(train + held_out) == Counter(TEXTS)
    assert not set(train) & set(held_out)
    assert 80 < len(held_out) < 160  # 120, give or take four standard deviations


def test_the_split_depends_on_the_text_alone(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS[:300])
    write_jsonl("b.jsonl", TEXTS[300:])
    write_jsonl("reversed.jsonl", TEXTS[::-1])
    one = prepare("a.jsonl", "b.jsonl", out="one", options="--eval-fraction 0.3")
    other = prepare("reversed.jsonl", out="other", options="--eval-fraction 0.3 --seed 5 --shards 7")
    assert set(documents(one, "eval")) == set(documents(other, "eval"))


def test_a_larger_share_holds_out_more_of_the_same(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS)
    few = prepare("a.jsonl", out="few", options="--eval-fraction 0.1")
    more = prepare("a.jsonl", out="more", options="--eval-fraction 0.2")
    assert set(documents(few, "eval")) < set(documents(more, "eval"))


def test_copies_of_a_text_lie_on_one_side_of_the_split(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS + TEXTS)
    out = prepare("a.jsonl", options="--eval-fraction 0.5")
    train, held_out = documents(out, "train"), documents(out, "eval")
    assert not set(train) & set(held_out)
    assert set(Counter(train + held_out).values()) == {2}
    assert sum(one == other for one, other in itertools.pairwise(train)) < 10  # not beside each other


def test_the_order_is_a_shuffle_that_the_seed_decides(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS)
    orders = [
        documents(prepare("a.jsonl", out=f"seed{seed}", options=f"--seed {seed} --eval-fraction 0"), "train")
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    for order in (*orders, [orders[1][orders[0].index(text)] for text in TEXTS]):
        places = [TEXTS.index(text) for text in order]
        rising = sum(one < other for one, other in itertools.pairwise(places))
        assert 250 < rising < 350  # 299.5, give or take seven standard deviations
        assert abs(sum(places[:300]) / 300 - 299.5) < 50  # five standard deviations: the first half is a fair sample


def test_shards_are_even_and_cut_the_order_that_one_shard_holds(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS)
    one = prepare("a.jsonl", out="one", options="--eval-fraction 0.1")
    many = prepare("a.jsonl", out="many", options="--eval-fraction 0.1 --shards 4")
    assert documents(many, "train") == documents(one, "train")
    manifest = json.loads((many / "manifest.json").read_text())
    counts = [entry["documents"] for entry in manifest["shards"] if entry["split"] == "train"]
    assert len(counts) == 4
    assert max(counts) < 1.4 * min(counts)


def test_inputs_in_any_order_give_the_same_bytes(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", TEXTS[:300])
    write_jsonl("b.jsonl", TEXTS[200:])
    one = prepare("a.jsonl", "b.jsonl", out="one", options="--shards 2")
    other = prepare("b.jsonl", "a.jsonl", out="other", options="--shards 2")
    assert shards(one) == shards(other)


def test_small_buckets_and_buffers_change_nothing(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl("a.jsonl", TEXTS)
    whole = prepare("a.jsonl", out="whole", options="--shards 2")
    monkeypatch.setattr(memory, "BUCKET_BYTES", 1000)
    monkeypatch.setattr(buckets, "BUFFER_BYTES", 500)
    assert shards(prepare("a.jsonl", out="parts", options="--shards 2")) == shards(whole)


def test_memory_does_not_grow_with_the_text(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BUCKET_BYTES", 1 << 20)
    monkeypatch.setattr(buckets, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "LARGEST_DOCUMENT", 1 << 20)
    text = "".join(random.Random(0).choices("abcdefgh ", k=10_000))
    write_jsonl("a.jsonl", [f"{number}{text}" for number in range(3000)])
    Path("long.txt").write_text(3000 * text)
    tracemalloc.start()
    prepare("a.jsonl", "long.txt", options="--shards 2 --max-bad 1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20  # of twice 30 MB, the second in one line


@pytest.mark.parametrize(("sample_by", "expected"), [
    ("line", ["one", "two", "three", " four"]), ("paragraph", ["one\ntwo", "three\n four"]),
    ("document", ["one\ntwo\n\n \nthree\n four"]),
])  # fmt: skip
def test_a_txt_is_cut_as_asked(prepare: Callable[..., Path], sample_by: str, expected: list[str]) -> None:
    Path("a.txt").write_text("\none\ntwo\n\n \nthree\n four\n")
    out = prepare("a.txt", options=f"--sample-by {sample_by} --eval-fraction 0")
    assert sorted(documents(out, "train")) == sorted(expected)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_a_byte_order_mark_is_no_part_of_the_first_document(
    prepare: Callable[..., Path], suffix: str, sample_by: str
) -> None:
    lines = ["", "", '{"text": "é"}']  # blank lines first: the mark makes no text of them
    data = "\n".join(lines).encode("utf-8-sig")
    Path(f"a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    out = prepare(f"a{suffix}", options=f"--eval-fraction 0 --sample-by {sample_by}")
    assert documents(out, "train") == [lines[-1] if "txt" in suffix else "é"]


def test_the_order_of_the_inputs_leaves_no_trace(prepare: Callable[..., Path]) -> None:
    for name in "abc":
        write_jsonl(f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
        with Path(f"{name}.jsonl").open("a") as file:
            file.write("{\n")
    one = prepare("a.jsonl", "b.jsonl", "c.jsonl", out="one", options="--max-bad 3")
    other = prepare("c.jsonl", "a.jsonl", "b.jsonl", out="other", options="--max-bad 3")
    for name in ("bad_lines.txt", "manifest.json"):
        assert (one / name).read_text() == (other / name).read_text().replace("other/", "one/")


def test_the_manifest_tells_what_went_in_and_what_came_out(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", [*TEXTS, "", " \n"])
    out = prepare("a.jsonl", options="--shards 2 --seed 3 --eval-fraction 0.1")
    manifest = json.loads((out / "manifest.json").read_text())
    [entry] = manifest["inputs"]
    content = Path("a.jsonl").read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (entry["documents"], entry["blank"], entry["bad"]) == (600, 2, 0)
    assert manifest["settings"]["seed"] == 3
    for split in ("train", "eval"):
        texts = documents(out, split)
        assert manifest[split]["documents"] == len(texts)
        assert manifest[split]["text_bytes"] == sum(len(text.encode()) for text in texts)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in shards(out).items()}
    assert {entry["name"]: entry["sha256"] for entry in manifest["shards"]} == digests
    assert not (out / ".work").exists()


# Bad input ----------------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "cut o', "no JSON"), (b"[1]", "a JSON object is expected, not list"), (b'"text"', "not str"),
    (b'{"txt": "x"}', "has no 'text'; its keys: 'txt'"), (b'{"text": 5}', "'text' is no text but int"),
    (b'{"text": null}', "'text' is null"), (b'{"text": "\xff"}', "no UTF-8 at byte 11"),
    (b'{"text": "\\ud800"}', "half a surrogate"), (b'{"text": "' + b"x" * 5000 + b'"}', "longer than 4096 bytes"),
    (b"[" * 4000, "no JSON"),
]  # fmt: skip


@pytest.fixture
def damaged(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """A jsonl file whose every second line is bad."""
    monkeypatch.setattr(reader, "LARGEST_DOCUMENT", 4096)
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    Path("a.jsonl").write_bytes(b"\n".join(line for pair in zip(good, BAD_LINES) for line in (pair[0], pair[1][0])))  # noqa: B905
    return "a.jsonl"


def test_bad_lines_are_named_and_fail_the_preparation(prepare: Callable[..., Path], damaged: str) -> None:
    with pytest.raises(
        SystemExit, match=r"--max-bad 0: 10 bad lines in out/bad_lines.txt, the first: a.jsonl:2: no JSON"
    ):
        prepare(damaged)
    lines = Path("out/bad_lines.txt").read_text().splitlines()
    assert len(lines) == len(BAD_LINES)
    for number, (line, (_, why)) in enumerate(zip(lines, BAD_LINES, strict=True), start=1):
        assert line.startswith(f"a.jsonl:{2 * number}: ")
        assert why in line
    assert not shards(Path("out"))


def test_what_was_read_is_not_read_again_when_bad_lines_are_allowed(
    prepare: Callable[..., Path], damaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="bad_lines"):
        prepare(damaged, options="--eval-fraction 0.5")
    monkeypatch.delattr(reader, "read")
    out = prepare(damaged, options="--max-bad 10 --eval-fraction 0.5")
    assert Counter(documents(out, "train") + documents(out, "eval")) == Counter(TEXTS[: len(BAD_LINES)])


def test_bad_rows_of_parquet_and_txt_are_named(prepare: Callable[..., Path]) -> None:
    binary = pyarrow.array([b"good", b"\xff", None], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    Path("b.txt").write_bytes(b"good\n\xc3(\n")
    out = prepare("a.parquet", "b.txt", options="--max-bad 3 --eval-fraction 0")
    assert Path("out/bad_lines.txt").read_text() == (
        "a.parquet:2: no UTF-8 at byte 1\na.parquet:3: 'text' is null\nb.txt:2: no UTF-8 at byte 1\n"
    )
    assert documents(out, "train") == ["good", "good"]


def make_inputs() -> None:
    write_jsonl("good.jsonl", TEXTS)
    write_jsonl("few.jsonl", TEXTS[:3])
    Path("notes.md").write_text("x")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(Path("good.jsonl").read_bytes())[:-900])
    Path("plain.jsonl.gz").write_text("x")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "body": ["x"]}), "other.parquet")
    Path("cut.parquet").write_bytes(Path("other.parquet").read_bytes()[:-10])
    long = " ".join(TEXTS)
    pyarrow.parquet.write_table(pyarrow.table({"text": [long[i:] for i in range(50)]}), "rotten.parquet")
    rotten = bytearray(Path("rotten.parquet").read_bytes())
    rotten[len(rotten) // 3 : len(rotten) // 3 + 200] = b"\xff" * 200
    Path("rotten.parquet").write_bytes(rotten)
    Path("empty.txt").write_text("")
    Path("blank.txt").write_text("\n \n\n")
    Path("void.jsonl").write_text('\n{"text": ""}\n{"text": null}\n')
    Path("nothing.txt.gz").write_bytes(gzip.compress(b""))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "none.parquet")
    Path("wide.txt").write_text("wide", encoding="utf-16")
    Path("wide.jsonl").write_text('{"text": "wide"}', encoding="utf-16")
    Path("linked.jsonl").symlink_to("good.jsonl")
    Path("second.jsonl").hardlink_to("good.jsonl")
    Path("theirs").mkdir()
    Path("theirs/train-00000-of-00001.arrayrecord").write_text("precious")


@pytest.mark.parametrize(("command", "message"), [
    ("missing.jsonl", "missing.jsonl: no such file"), ("notes.md", "unknown kind of file; allowed are .txt"),
    ("good.jsonl good.jsonl", "good.jsonl: is named twice"), ("theirs", "theirs: is a folder; name the files in it"),
    ("good.jsonl few.jsonl {here}/good.jsonl", "error: good.jsonl and {here}/good.jsonl: are one file"),
    ("theirs/../good.jsonl good.jsonl", "theirs/../good.jsonl and good.jsonl: are one file"),
    ("good.jsonl linked.jsonl", "good.jsonl and linked.jsonl: are one file"),
    ("second.jsonl good.jsonl", "second.jsonl and good.jsonl: are one file"),
    ("empty.txt", "error: empty.txt: holds no document, there is no text in it"),
    ("nothing.txt.gz", "nothing.txt.gz: holds no document, there is no text in it"),
    ("none.parquet", "none.parquet: holds no document, there is no text in it"),
    ("blank.txt", "blank.txt: holds no document, only 3 blank lines"),
    ("void.jsonl --max-bad 1 --shards 3", "void.jsonl: holds no document, only 2 blank and 1 bad lines"),
    ("empty.txt blank.txt", "blank.txt: holds no document, only 3 blank lines; empty.txt: holds no document, there"),
    ("wide.txt", "wide.txt: by its byte order mark this is UTF-16 or UTF-32; UTF-8 is expected"),
    ("wide.jsonl --max-bad 1", "wide.jsonl: by its byte order mark this is UTF-16"),
    ("good.jsonl --shards 0", "--shards 0: allowed is 1 or more"),
    ("good.jsonl --eval-fraction 1", "--eval-fraction 1.0: allowed is 0 or more and less than 1"),
    ("good.jsonl --eval-fraction nan", "--eval-fraction nan: allowed is"),
    ("few.jsonl --eval-fraction 0.000001", "none of 3 documents is held out"),
    ("few.jsonl --eval-fraction 0 --shards 9", "--shards 9: 3 documents leave"),
    ("cut.jsonl.gz", "cut.jsonl.gz: damaged or cut off after "), ("plain.jsonl.gz", "plain.jsonl.gz: damaged"),
    ("cut.parquet", "cut.parquet: damaged"), ("rotten.parquet", "rotten.parquet: damaged"),
    ("other.parquet", "--text-key text: other.parquet has no such column; it has n, body"),
    ("other.parquet --text-key n", "--text-key n: in other.parquet this column is int64"),
    ("good.jsonl --out theirs", "--out theirs: holds shards of another origin"),
])  # fmt: skip
def test_bad_input_is_one_message_and_no_shard(
    prepare: Callable[..., Path], capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    make_inputs()
    here = str(Path.cwd())
    with pytest.raises(SystemExit) as end:
        prepare_text.main(["--out", "out", *command.format(here=here).split()])
    assert end.value.code not in (0, None)
    assert message.format(here=here) in f"{end.value.code} {capsys.readouterr().err}"
    assert not shards(Path("out"))
    assert Path("theirs/train-00000-of-00001.arrayrecord").read_text() == "precious"


def test_an_input_without_a_document_is_named_where_others_have_some(
    prepare: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    make_inputs()
    prepare("good.jsonl", "blank.txt", "void.jsonl", options="--max-bad 1")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: blank.txt: holds no document, only 3 blank lines",
        "note: void.jsonl: holds no document, only 2 blank and 1 bad lines",
    ]


# Interruptions ------------------------------------------------------------------------------------------------------


def test_an_interrupted_preparation_ends_in_the_same_bytes(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice: while the second of three inputs is read, and in the middle of the second shard."""
    inputs = [write_jsonl(f"{name}.jsonl", TEXTS[start::3]) for start, name in enumerate("abc")]
    whole = prepare(*inputs, out="whole", options="--shards 3")
    monkeypatch.setattr(buckets, "BUFFER_BYTES", 100)  # so that the interrupted input has left something behind
    read, write_rows = reader.read, writer.write_rows
    reads = []

    def read_half(path, *rest):
        reads.append(path.name)
        for number, record in enumerate(read(path, *rest)):
            if path.name == "b.jsonl" and number == 100:
                raise KeyboardInterrupt
            yield record

    def write_half(path, rows):
        rows = list(rows)
        if path.name.startswith("train-00001"):
            write_rows(path, rows[: len(rows) // 2])
            raise KeyboardInterrupt
        write_rows(path, rows)

    monkeypatch.setattr(reader, "read", read_half)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        prepare(*inputs, options="--shards 3")
    assert not shards(Path("out"))

    monkeypatch.setattr(reader, "read", lambda path, *rest: reads.append(path.name) or read(path, *rest))
    monkeypatch.setattr(writer, "write_rows", write_half)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        prepare(*inputs, options="--shards 3")
    assert set(shards(Path("out"))) == {"train-00000-of-00003.arrayrecord"}

    monkeypatch.setattr(writer, "write_rows", write_rows)
    assert shards(prepare(*inputs, options="--shards 3")) == shards(whole)
    assert reads == ["a.jsonl", "b.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.e2e
def test_a_killed_preparation_leaves_only_whole_shards_and_goes_on(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", [f"{number} " + "text " * 200 for number in range(8000)])
    options = "--shards 12 --eval-fraction 0.1"
    whole = shards(prepare("a.jsonl", out="whole", options=options))
    command = [sys.executable, prepare_text.__file__, "a.jsonl", "--out", "out", *options.split()]
    for under_way in (".work/state.json", "train-00000*", "train-00004*"):
        with subprocess.Popen(command) as process:
            while not any(Path("out").glob(under_way)):
                assert process.poll() is None
            process.kill()
        assert process.returncode == -signal.SIGKILL
        found = shards(Path("out"))
        assert len(found) < len(whole)
        assert all(whole[name] == data for name, data in found.items())
    assert shards(prepare("a.jsonl", options=options)) == whole


def test_an_ordinary_preparation_says_three_lines(prepare: Callable[..., Path], capfd: pytest.CaptureFixture) -> None:
    write_jsonl("a.jsonl", TEXTS)
    manifest = json.loads((prepare("a.jsonl", options="--shards 2 --eval-fraction 0.1") / "manifest.json").read_text())
    train, held_out = manifest["train"], manifest["eval"]
    assert train["documents"] + held_out["documents"] == len(TEXTS)
    said = capfd.readouterr()
    assert said.out.splitlines() == [
        f"train  {train['documents']} documents, {train['text_bytes']:,} bytes  out/train-*.arrayrecord",
        f" eval  {held_out['documents']} documents, {held_out['text_bytes']:,} bytes  out/eval-*.arrayrecord",
        "left out: 0 bad lines (out/bad_lines.txt), 0 blank",
    ]
    assert said.err == ""


def test_a_finished_preparation_is_kept(prepare: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    write_jsonl("a.jsonl", TEXTS)
    out = prepare("a.jsonl")
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    prepare("a.jsonl")
    assert "finished earlier and kept" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def nothing() -> None:
    """No change."""


def one_letter() -> None:
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("document 0", "Document 0"))


@pytest.mark.parametrize(("change", "inputs", "options", "said"), [
    (lambda: write_jsonl("a.jsonl", TEXTS[1:]), "ab", "", "a.jsonl has changed"),
    (one_letter, "ab", "", "a.jsonl has changed"), (nothing, "abc", "", "c.jsonl was not among the inputs"),
    (nothing, "a", "", "b.jsonl was among the inputs"), (nothing, "ab", "--seed 1", "--seed was 0"),
    (nothing, "ab", "--eval-fraction 0.1", "--eval-fraction was 0.01"),
    (lambda: next(Path("out").glob("train-*")).write_bytes(b"half"), "ab", "", "remove out and begin again"),
])  # fmt: skip
def test_finished_shards_are_never_overwritten(
    prepare: Callable[..., Path], change: Callable[[], Any], inputs: str, options: str, said: str
) -> None:
    for name, texts in zip("abc", (TEXTS, ["b"], ["c"]), strict=True):
        write_jsonl(f"{name}.jsonl", texts)
    out = prepare("a.jsonl", "b.jsonl")
    change()
    before = shards(out)
    with pytest.raises(SystemExit, match=said):
        prepare(*(f"{name}.jsonl" for name in inputs), options=options)
    assert shards(out) == before


def test_an_input_is_known_by_any_spelling_and_as_a_copy(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    a, b = write_jsonl("a.jsonl", TEXTS[::2]), write_jsonl("b.jsonl", TEXTS[1::2])
    whole = shards(prepare(a, b, out="whole", options="--shards 3"))
    write_rows = writer.write_rows
    monkeypatch.setattr(writer, "write_rows", interrupt)
    with pytest.raises(SystemExit, match="interrupted"):
        prepare(a, b, options="--shards 3")
    monkeypatch.setattr(writer, "write_rows", write_rows)
    monkeypatch.delattr(reader, "read")
    Path("link").symlink_to(".")
    out = prepare(str(Path(a).resolve()), f"link/{b}", options="--shards 3")
    assert shards(out) == whole
    assert "going on: 2 inputs read, 0 shards written" in capsys.readouterr().out
    os.utime(a, (0, 0))  # as a copy may have it
    prepare(f"link/{a}", b, options="--shards 3")
    assert "finished earlier and kept" in capsys.readouterr().out


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_no_shard_of_another_preparation_is_left_beside_the_new_ones(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a shard's name and its place in the state; then started with other options."""
    write_jsonl("a.jsonl", TEXTS)
    save, names = preparation.save, []

    def save_until_the_first_shard(path, content):
        if content.get("shards"):
            names.extend(shards(Path("out")))
            raise KeyboardInterrupt
        save(path, content)

    monkeypatch.setattr(preparation, "save", save_until_the_first_shard)
    with pytest.raises(SystemExit, match="interrupted"):
        prepare("a.jsonl", options="--shards 3 --eval-fraction 0")
    assert names == ["train-00000-of-00003.arrayrecord"]
    monkeypatch.setattr(preparation, "save", save)
    Path("out/train-of-others.arrayrecord").write_text("precious")
    with pytest.raises(SystemExit, match=r"--out out: holds shards of another origin \(train-of-others"):
        prepare("a.jsonl", options="--shards 2 --eval-fraction 0")
    assert Path("out/train-of-others.arrayrecord").read_text() == "precious"
    Path("out/train-of-others.arrayrecord").unlink()
    out = prepare("a.jsonl", options="--shards 2 --eval-fraction 0")
    assert Counter(documents(out, "train")) == Counter(TEXTS)


def test_a_shard_that_was_lost_meanwhile_is_written_again(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_jsonl("a.jsonl", TEXTS)
    options = "--shards 3 --eval-fraction 0"

    def write_the_first(path, rows, write_rows=writer.write_rows):
        write_rows(path, rows) if "00000" in path.name else interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_rows", write_the_first)
        with pytest.raises(SystemExit, match="interrupted"):
            prepare("a.jsonl", options=options)
    Path("out/train-00000-of-00003.arrayrecord").unlink()
    out = prepare("a.jsonl", options=options)
    assert "starting afresh: out/train-00000-of-00003.arrayrecord is missing" in capsys.readouterr().out
    assert Counter(documents(out, "train")) == Counter(TEXTS)


def test_an_input_that_changes_while_it_is_read_is_refused(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl("a.jsonl", TEXTS)
    read = reader.read

    def read_while_another_writes(path, *rest):
        yield from read(path, *rest)
        write_jsonl("a.jsonl", TEXTS[1:])

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read", read_while_another_writes)
        with pytest.raises(SystemExit, match=r"a\.jsonl: has changed while it was read"):
            prepare("a.jsonl")
    out = prepare("a.jsonl")
    assert Counter(documents(out, "train") + documents(out, "eval")) == Counter(TEXTS[1:])


def test_an_input_that_changed_meanwhile_is_read_again(prepare: Callable[..., Path]) -> None:
    write_jsonl("a.jsonl", ["", *TEXTS, "{"])
    Path("a.jsonl").write_text(Path("a.jsonl").read_text() + "{\n")
    with pytest.raises(SystemExit, match=r"a\.jsonl:603: no JSON"):
        prepare("a.jsonl")
    write_jsonl("a.jsonl", TEXTS)
    out = prepare("a.jsonl")
    assert Counter(documents(out, "train") + documents(out, "eval")) == Counter(TEXTS)
    assert not (out / "bad_lines.txt").read_text()


def test_two_processes_do_not_write_into_one_folder(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl("a.jsonl", TEXTS)
    write_rows = writer.write_rows

    def write_while_another_tries(path, rows):
        with pytest.raises(SystemExit, match="--out out: another process is writing there"):
            prepare("a.jsonl")
        write_rows(path, rows)

    monkeypatch.setattr(writer, "write_rows", write_while_another_tries)
    prepare("a.jsonl")
