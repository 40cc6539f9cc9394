"""Laws of the data recipes (docs/data.md): the loss counts the tokens of the text, not padding, not what is cut off.

Every run is the trainer with a teacher, by command line, offline, through MaxText's own pipelines. Tokens are letters,
so that what must be counted follows from the text alone. The recipes' keys stand here as in docs/data.md.
"""

import io
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import prepare_text
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from array_record.python.array_record_data_source import ArrayRecordDataSource
from conftest import Result, execute
from letters import LETTERS, save_letters
from maxtext.input_pipeline.protos import example_pb2

pytestmark = pytest.mark.e2e

LENGTH, BATCH, STEPS = 32, 4, 3


def texts_of(count: int, seed: int) -> list[str]:
    """Words of 4 to 50 letters: some longer than a row, most shorter."""
    generator = random.Random(seed)
    return ["".join(generator.choices(LETTERS, k=generator.randint(4, 50))) for _ in range(count)]


TRAIN, HELD_OUT = texts_of(60, 1), texts_of(10, 2)


# What must be counted, from the text ----------------------------------------------------------------------------------


def in_rows(lengths: list[int]) -> list[int]:
    """Tokens with a target in rows of their own: what fits, but for the last of it, which has none."""
    return [min(length, LENGTH) - 1 for length in lengths]


def first_fit(lengths: list[int], steps: int) -> list[int]:
    """Tokens with a target in each step's batch, whose rows are packed by first fit.

    A document goes into the first of BATCH rows with room for it; where there is none the batch is full.
    """
    batches, rows = [], [0] * BATCH
    for length in (min(length, LENGTH) for length in lengths):
        if all(row + length > LENGTH for row in rows):
            batches.append(rows)
            rows = [0] * BATCH
        room = next(index for index, row in enumerate(rows) if row + length <= LENGTH)
        rows = [row + length * (index == room) for index, row in enumerate(rows)]
    return [sum(max(row - 1, 0) for row in batch) for batch in batches[:steps]]


def by_step(counts: list[int]) -> list[int]:
    return [sum(counts[step * BATCH : (step + 1) * BATCH]) for step in range(STEPS)]


def with_marks(texts: list[str]) -> list[int]:
    """Tokens of each text between the beginning-of-text and end-of-text marks."""
    return [len(text) + 2 for text in texts]


def with_end(texts: list[str]) -> list[int]:
    """Tokens of each text and the end-of-text mark; this Hugging Face tokenizer has no other."""
    return [len(text) + 1 for text in texts]


# The tokenizers, the data and the run ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model whose tokens are letters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS] * 10), model_writer=model, model_type="char", vocab_size=64,
        hard_vocab_limit=False, add_dummy_prefix=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "letters.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="session")
def letters_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    save_letters(path)
    return str(path)


@pytest.fixture(scope="session")
def student(train: Callable[..., Result], teacher: str) -> Callable[..., Result]:
    """student(name, key=value, ...): a few steps against the teacher, rows in the order of the data."""

    def run(name: str, **keys: Any) -> Result:
        common: dict[str, Any] = {
            "use_kd": True,
            "kd_teacher_parameters_path": teacher,
            "steps": STEPS,
            "per_device_batch_size": BATCH,
            "max_target_length": LENGTH,
            "enable_data_shuffling": False,
            "enable_checkpointing": False,
        }
        return train(name, **common | keys)

    return run


def counted(result: Result) -> list[float]:
    """The tokens that the loss was divided by, step by step."""
    assert all(loss > 0 for loss in result.column("learning/kd_loss"))
    return result.column("learning/total_weights")


def evaluated(result: Result) -> float:
    """The tokens of every evaluation: the same data each time."""
    assert all(kl > 0 for kl in result.column("evaluation/kl_t1"))
    first, *others = result.column("evaluation/total_weights")
    assert others and set(others) == {first}
    return first


def in_file_order(pattern: str) -> list[str]:
    """The texts of ArrayRecord files, in the order in which the pipeline finds them."""
    source = ArrayRecordDataSource(sorted(str(file) for file in pathlib.Path("/").glob(pattern.lstrip("/"))))
    records = source.__getitems__(range(len(source)))
    return [example_pb2.Example.FromString(r).features.feature["text"].bytes_list.value[0].decode() for r in records]


# grain ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What scripts/prepare_text.py makes of the texts."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "texts.txt").write_text("\n".join(TRAIN))
    prepare_text.main([str(folder / "texts.txt"), "--out", str(folder / "out"), "--eval-fraction", "0.2"])
    return folder / "out"


@pytest.fixture(scope="session")
def grain_keys(prepared: pathlib.Path, letters_model: str) -> dict[str, Any]:
    return {
        "dataset_type": "grain",
        "grain_file_type": "arrayrecord",
        "grain_train_files": f"{prepared}/train-*.arrayrecord",
        "grain_eval_files": f"{prepared}/eval-*.arrayrecord",
        "grain_worker_count": 0,
        "grain_worker_count_eval": 0,
        "tokenizer_type": "sentencepiece",
        "tokenizer_path": letters_model,
    }


def test_grain_counts_each_text_in_a_row_of_its_own(student, grain_keys) -> None:
    result = student("grain", packing=False, eval_interval=1, **grain_keys)
    train, held_out = (in_file_order(grain_keys[f"grain_{split}_files"]) for split in ("train", "eval"))
    assert counted(result) == by_step(in_rows(with_marks(train)))
    assert evaluated(result) == sum(in_rows(with_marks(held_out)))  # the last, incomplete batch too
    assert len(held_out) % BATCH


@pytest.mark.slow
def test_grain_packs_texts_into_rows(student, grain_keys) -> None:
    result = student("grain_packed", packing=True, **grain_keys)
    assert counted(result) == first_fit(with_marks(in_file_order(grain_keys["grain_train_files"])), STEPS)


@pytest.mark.slow
def test_grain_reads_with_worker_processes_what_it_reads_without(student, grain_keys) -> None:
    keys = grain_keys | {"packing": True, "eval_interval": 1}
    alone, worked = (
        student(f"grain_workers_{n}", **keys | {"grain_worker_count": n, "grain_worker_count_eval": n}) for n in (0, 1)
    )
    assert counted(worked) == counted(alone)
    assert worked.column("learning/kd_loss") == alone.column("learning/kd_loss")
    assert evaluated(worked) == evaluated(alone)


@pytest.mark.slow
def test_grain_cuts_long_texts_into_several_rows_if_asked(student, grain_keys) -> None:
    result = student("grain_chunks", packing=False, use_truncation=False, **grain_keys)
    lengths = with_marks(in_file_order(grain_keys["grain_train_files"]))
    chunks = [min(LENGTH, length - start) for length in lengths for start in range(0, length, LENGTH)]
    assert counted(result) == by_step(in_rows(chunks))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The texts as files of other formats: train.parquet, eval.json and so on -> their paths."""
    folder = tmp_path_factory.mktemp("files")
    for split, texts in (("train", TRAIN), ("eval", HELD_OUT)):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{split}.parquet")
        (folder / f"{split}.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {file.name: str(file) for file in folder.iterdir()}


@pytest.mark.slow
def test_grain_reads_parquet_in_a_worker_process(student, files, letters_model) -> None:
    result = student(
        "grain_parquet", packing=False, eval_interval=2, dataset_type="grain", grain_file_type="parquet",
        grain_train_files=files["train.parquet"], grain_eval_files=files["eval.parquet"], grain_worker_count=1,
        grain_worker_count_eval=1, tokenizer_type="sentencepiece", tokenizer_path=letters_model,
    )  # fmt: skip
    assert counted(result) == by_step(in_rows(with_marks(TRAIN)))
    assert evaluated(result) == sum(in_rows(with_marks(HELD_OUT)))


# hf -------------------------------------------------------------------------------------------------------------------


def hf_keys(kind: str, files: dict[str, str], tokenizer: str) -> dict[str, Any]:
    return {
        "dataset_type": "hf",
        "hf_path": kind,
        "hf_train_files": files[f"train.{kind}"],
        "hf_eval_files": files[f"eval.{kind}"],
        "hf_eval_split": "train",  # what datasets calls files that are given by name
        "tokenizer_type": "huggingface",
        "tokenizer_path": tokenizer,
    }


def test_hf_counts_each_text_in_a_row_of_its_own(student, files, letters_folder) -> None:
    result = student("hf", packing=False, **hf_keys("json", files, letters_folder), grain_worker_count=0)
    assert counted(result) == by_step(in_rows(with_end(TRAIN)))


@pytest.mark.slow
def test_hf_evaluates_the_rows_of_a_last_batch_that_is_not_full(student, files, letters_folder) -> None:
    result = student("hf_eval", packing=False, eval_interval=2, **hf_keys("json", files, letters_folder))
    assert len(HELD_OUT) % BATCH
    assert evaluated(result) == sum(in_rows(with_end(HELD_OUT)))


@pytest.mark.slow
def test_hf_packs_texts_of_parquet_into_rows(student, files, letters_folder) -> None:
    result = student("hf_packed", packing=True, **hf_keys("parquet", files, letters_folder), grain_worker_count=0)
    assert counted(result) == first_fit(with_end(TRAIN), STEPS)


# tfds -----------------------------------------------------------------------------------------------------------------

WRITE_TFDS = """
import json, sys
import tensorflow_datasets as tfds

identity = tfds.core.dataset_info.DatasetIdentity(name="letters", version="1.0.0", data_dir=sys.argv[1], module_name="")
info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))
splits = json.loads(sys.argv[2])
writer = tfds.core.SequentialWriter(ds_info=info, max_examples_per_shard=1000)
writer.initialize_splits(list(splits))
for split, texts in splits.items():
    writer.add_examples({split: [{"text": text} for text in texts]})
writer.close_all()
"""


@pytest.fixture(scope="session")
def tfds_keys(tmp_path_factory: pytest.TempPathFactory, letters_model: str) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "write.py").write_text(WRITE_TFDS)
    splits = json.dumps({"train": TRAIN, "validation": HELD_OUT})
    (folder / "letters/1.0.0").mkdir(parents=True)
    result = execute([str(folder / "write.py")], [str(folder / "letters/1.0.0"), splits], folder)
    assert result.status == 0, result.output[-4000:]
    return {
        "dataset_type": "tfds",
        "dataset_path": folder,
        "dataset_name": "letters:1.0.0",
        "eval_dataset_name": "letters:1.0.0",
        "train_split": "train",
        "eval_split": "validation",
        "tokenizer_type": "sentencepiece",
        "tokenizer_path": letters_model,
    }


def shifted(texts: list[str]) -> list[int]:
    """tfds cuts one token later than the others do, since it shifts before it fills the rows."""
    return [min(length, LENGTH + 1) - 1 for length in with_marks(texts)]


@pytest.mark.slow
def test_tfds_counts_each_text_in_a_row_of_its_own(student, tfds_keys) -> None:
    result = student("tfds", packing=False, eval_interval=1, **tfds_keys)
    assert counted(result) == by_step(shifted(TRAIN))
    assert evaluated(result) == sum(shifted(HELD_OUT))


@pytest.mark.slow
def test_tfds_packs_neighbouring_texts_into_rows(student, tfds_keys) -> None:
    rows = [0]
    for length in shifted(TRAIN):
        if rows[-1] + length > LENGTH:
            rows.append(0)
        rows[-1] += length
    assert counted(student("tfds_packed", packing=True, **tfds_keys)) == by_step(rows)


# synthetic ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_synthetic_data_counts_every_position(student) -> None:
    result = student("synthetic", dataset_type="synthetic", eval_interval=1, eval_steps=2)
    assert counted(result) == [BATCH * LENGTH] * STEPS
    assert evaluated(result) == 2 * BATCH * LENGTH
