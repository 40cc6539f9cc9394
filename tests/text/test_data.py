"""Laws of the data recipes (docs/data.md): the loss counts the tokens of the text, not padding, not what is cut off.

Every run is the trainer with a teacher, by command line, offline, through MaxText's own pipelines. Tokens are letters,
so that what must be counted follows from the text alone. The recipes' keys stand here as in docs/data.md. What the
pipelines give, each with packing and without, is held to the text in tests/data/test_counts.py, without a run.
"""

import io
import pathlib
from collections.abc import Callable
from typing import Any

import prepare_text
import pytest
import sentencepiece
from array_record.python.array_record_data_source import ArrayRecordDataSource
from conftest import Result
from letters import LETTERS, save_letters, texts_of, write_json
from maxtext.input_pipeline.protos import example_pb2

pytestmark = pytest.mark.e2e

LENGTH, BATCH, STEPS = 32, 4, 3


TRAIN, HELD_OUT = texts_of(60, 1), texts_of(10, 2)


# What must be counted, from the text ----------------------------------------------------------------------------------


def in_rows(lengths: list[int]) -> list[int]:
    """Tokens with a target in rows of their own: what fits, but for the last of it, which has none."""
    return [min(length, LENGTH) - 1 for length in lengths]


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
    """student(name, key=value, ...): a few steps against the teacher, rows in the order of the data.

    In a process of its own, of which the pipelines' processes are children, and whose end is theirs.
    """

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
        return train(name, program=("MaxText/train.py",), **common | keys)

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
def test_grain_reads_with_worker_processes_what_it_reads_without(student, grain_keys) -> None:
    keys = grain_keys | {"packing": True, "eval_interval": 1}
    alone, worked = (
        student(f"grain_workers_{n}", **keys | {"grain_worker_count": n, "grain_worker_count_eval": n}) for n in (0, 1)
    )
    assert counted(worked) == counted(alone)
    assert worked.column("learning/kd_loss") == alone.column("learning/kd_loss")
    assert evaluated(worked) == evaluated(alone)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The texts as files of other formats: train.parquet, eval.json and so on -> their paths."""
    folder = tmp_path_factory.mktemp("files")
    for split, texts in (("train", TRAIN), ("eval", HELD_OUT)):
        write_json(folder / f"{split}.json", [*texts])
    return {file.name: str(file) for file in folder.iterdir()}


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


@pytest.mark.slow
def test_hf_counts_each_text_in_a_row_of_its_own(student, files, letters_folder) -> None:
    result = student("hf", packing=False, **hf_keys("json", files, letters_folder), grain_worker_count=0)
    assert counted(result) == by_step(in_rows(with_end(TRAIN)))


# synthetic ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_synthetic_data_counts_every_position(student) -> None:
    result = student("synthetic", dataset_type="synthetic", eval_interval=1, eval_steps=2)
    assert counted(result) == [BATCH * LENGTH] * STEPS
    assert evaluated(result) == 2 * BATCH * LENGTH
