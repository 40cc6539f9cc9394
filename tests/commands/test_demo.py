"""Laws of the demo: of the corpus it trains on, and of what it says about the runs."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import carry
import corpus as build_corpus
import plan as demo
import plot as plot_demo
import pytest
import results as outcome
import sentencepiece
from array_record.python.array_record_data_source import ArrayRecordDataSource
from maxtext.input_pipeline.protos import example_pb2

PACKAGES = ("asyncio", "email", "json", "logging", "unittest", "xml/dom", "copy_of_email")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few packages of the standard library, with traps: a copied package, a file not in UTF-8, generated ones."""
    root = tmp_path_factory.mktemp("library")
    for package in PACKAGES:
        for source in (build_corpus.STANDARD_LIBRARY / package.removeprefix("copy_of_")).glob("*.py"):
            (root / package).mkdir(parents=True, exist_ok=True)
            (root / package / source.name).write_bytes(source.read_bytes())
    (root / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    for folder in ("encodings", "test"):
        (root / folder).mkdir()
        (root / folder / "left_out.py").write_text("GENERATED = 1\n")
    return root


@pytest.fixture(scope="module")
def corpus(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus.build(folder, library)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))


def rows_of(path: Path) -> list[str]:
    source = ArrayRecordDataSource(str(path))
    examples = [example_pb2.Example.FromString(source[index]) for index in range(len(source))]
    return [example.features.feature["text"].bytes_list.value[0].decode() for example in examples]


def line_runs(rows: list[str]) -> set[tuple[str, ...]]:
    """All runs of three lines with at least 100 characters, by another route than the builder's."""
    texts = [[line.strip() for line in row.split("\n") if line.strip()] for row in rows]
    runs = {run for lines in texts for run in zip(lines, lines[1:], lines[2:], strict=False)}
    return {run for run in runs if sum(map(len, run)) >= 100}


def test_training_and_evaluation_share_no_passage(corpus: Path) -> None:
    train, evaluation = rows_of(corpus / "train.arrayrecord"), rows_of(corpus / "eval.arrayrecord")
    assert len(train) > 500
    assert len(evaluation) > 50
    assert not line_runs(train) & line_runs(evaluation)
    assert len(set(train)) == len(train)
    assert not set(train) & set(evaluation)


def test_a_file_is_either_in_training_or_in_evaluation(library: Path) -> None:
    held_out = [build_corpus.is_evaluation(name) for name in build_corpus.read_sources(library)]
    assert 0 < sum(held_out) < len(held_out) / 4


def test_small_data_is_a_part_of_the_training_rows(corpus: Path) -> None:
    small = rows_of(corpus / "train_small.arrayrecord")
    assert len(small) == build_corpus.SMALL_ROWS
    assert set(small) < set(rows_of(corpus / "train.arrayrecord"))


def test_unreadable_and_generated_files_and_tests_are_left_out(library: Path) -> None:
    names = set(build_corpus.read_sources(library))
    assert "json/decoder.py" in names
    assert not names & {"latin.py", "encodings/left_out.py", "test/left_out.py"}


def test_the_same_sources_give_the_same_bytes(corpus: Path, library: Path, tmp_path: Path) -> None:
    build_corpus.build(tmp_path, library)
    for path in sorted(corpus.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_a_corpus_is_kept_until_its_sources_change(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "library/json"
    source.mkdir(parents=True)
    for path in (library / "json").glob("*.py"):
        (source / path.name).write_bytes(path.read_bytes())
    first = build_corpus.build(tmp_path / "corpus", tmp_path / "library")
    written = (tmp_path / "corpus/train.arrayrecord").stat().st_mtime_ns
    assert build_corpus.build(tmp_path / "corpus", tmp_path / "library") == first
    assert (tmp_path / "corpus/train.arrayrecord").stat().st_mtime_ns == written
    (source / "more.py").write_text("answer = 42\n")
    assert build_corpus.build(tmp_path / "corpus", tmp_path / "library")["identity"] != first["identity"]


@pytest.mark.parametrize("text", ["def f(x):\n\n    return  x\t# é\n", "  \n\n\t\n", "\r\n日本 \x00", "a  b   c    d"])
def test_the_tokenizer_gives_every_text_back(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_row_is_longer_than_the_model_reads(corpus: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    rows = rows_of(corpus / "train.arrayrecord") + rows_of(corpus / "eval.arrayrecord")
    lengths = [len(tokens) for tokens in tokenizer.encode(rows)]
    assert max(lengths) <= build_corpus.ROW_TOKENS
    assert sum(lengths) / len(lengths) > 0.8 * build_corpus.ROW_TOKENS
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(rows)] == rows


@pytest.mark.parametrize(
    ("ce", "kd", "expected"),
    [
        (4.3, 4.0, "0.300 nats better, 60% of the way to the teacher's 3.800"),
        (4.3, 3.7, "0.600 nats better."),
        (4.0, 4.3, "0.300 nats WORSE."),
        (4.3, 4.29, "equal within the spread of seeds"),
        (4.29, 4.3, "equal within the spread of seeds"),
    ],
)
def test_the_verdict_follows_the_numbers(ce: float, kd: float, expected: str) -> None:
    sentence = outcome.verdict(ce, kd, 3.8)
    assert all(text in sentence for text in (expected, f"{ce:.3f}", f"{kd:.3f}"))


def metrics(final_ce: float) -> outcome.Rows:
    speeds = (1, 100, 300)  # the second hundred tokens took 1 s, the third a third of it
    training = [
        {"step": step, "learning/loss": 5.0, "perf/per_device_tokens_per_sec": speed}
        for step, speed in enumerate(speeds)
    ]
    evaluations = [
        {
            "step": step,
            "evaluation/ce_loss": final_ce + 2 - step,
            "evaluation/kl_t1": 0.5,
            "evaluation/top1_agreement": 0.25,
        }
        for step in range(3)
    ]
    return [*training, *evaluations]


def test_a_summary_is_of_the_last_evaluation() -> None:
    expected = {"ce": 0.0, "perplexity": 1.0, "tokens_per_second": 150, "kl": 0.5, "agreement": 0.25}
    assert outcome.summary(metrics(0.0)) == expected


def test_half_a_row_at_the_end_of_the_metrics_is_not_read(tmp_path: Path) -> None:
    run = dataclasses.replace(demo.TEACHER, out=tmp_path)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1')
    assert carry.read_metrics(run) == [{"step": 0}]


def test_a_run_is_made_again_when_the_corpus_the_trainer_or_its_teacher_changes() -> None:
    def fingerprints(identity: str, planned: Iterable[carry.Run] = demo.RUNS) -> list[str]:
        return [carry.fingerprint(run, [identity, "trainer"]) for run in planned]

    first = fingerprints("one")
    assert len(set(first)) == len(demo.RUNS)
    assert fingerprints("one") == first
    assert not set(fingerprints("two")) & set(first)
    assert not {carry.fingerprint(run, ["one", "another trainer"]) for run in demo.RUNS} & set(first)
    other = carry.Run("teacher", "teacher", "configs/demo/teacher.yml", ("steps=1",))

    def taught_by_the_other(run: carry.Run) -> carry.Run:
        after = tuple(other if each is demo.TEACHER else taught_by_the_other(each) for each in run.after)
        return dataclasses.replace(run, after=after)

    assert not set(fingerprints("one", map(taught_by_the_other, demo.RUNS[1:]))) & set(first)


def test_an_edit_of_the_trainer_changes_its_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(carry, "ROOT", tmp_path)
    (tmp_path / "MaxText/distill").mkdir(parents=True)
    source = tmp_path / "MaxText/distill/loss.py"
    source.write_text("SIGN = 1\n")
    first = carry.trainer_identity()
    assert carry.trainer_identity() == first
    source.write_text("SIGN = -1\n")
    assert carry.trainer_identity() != first


def test_the_students_differ_in_what_they_learn_from_alone() -> None:
    def differences(one: carry.Run, other: carry.Run) -> set[str]:
        keys = one.settings.keys() | other.settings.keys()
        return {key for key in keys if one.settings.get(key) != other.settings.get(key)} - {"run_name", "metrics_file"}

    assert differences(demo.STUDENT_CE, demo.STUDENT_KD) == differences(demo.SMALL_CE, demo.SMALL_KD) == {"kd_alpha"}
    assert differences(demo.STUDENT_KD, demo.SMALL_KD) == {"grain_train_files"}
    assert differences(demo.STUDENT_KD, demo.STUDENT_CACHED) == {"kd_cache_path"}


def test_the_cache_holds_the_rows_that_a_student_reads() -> None:
    settings = demo.STUDENT_CACHED.settings
    assert demo.CACHE.settings["kd_cache_path"] == settings["kd_cache_path"]
    assert demo.CACHE.settings["kd_cache_rows"] == settings["steps"] * settings["per_device_batch_size"]


def test_the_teacher_of_the_students_is_the_one_that_was_trained() -> None:
    overrides = demo.STUDENT_KD.settings["kd_teacher_overrides"]
    assert overrides == {key: demo.TEACHER.settings[key] for key in overrides}
    shapes = {key for key in demo.STUDENT_KD.settings if key.startswith("base_")} - {
        "base_config",
        "base_output_directory",
    }
    assert shapes == set(overrides)


def test_the_table_shows_what_was_measured() -> None:
    results = {run.title: outcome.summary(metrics(0.5)) for run in demo.RUNS[:3]}
    columns = {column.header: list(column.cells) for column in outcome.table("", results).columns}
    assert columns["CE"] == ["0.500"] * 3
    assert columns["agreement"] == ["25.0%"] * 3


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    plot_demo.plot({run.name: metrics(4.0) for run in demo.RUNS}, tmp_path / "demo.png")
    data = (tmp_path / "demo.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert len(data) > 10_000


def test_the_manifest_counts_what_was_written(corpus: Path) -> None:
    manifest = json.loads((corpus / "corpus.json").read_text())
    for split in ("train", "train_small", "eval"):
        assert manifest[split]["rows"] == len(rows_of(corpus / f"{split}.arrayrecord"))
