"""Laws of what reaches the step: the documents, all of them or cut where that is said, and each target once.

The iterators are those of a run, opened in this process. From their batches the documents are put together again, and
compared with a plain reading: the letters of a text and its marks.
"""

import io
import itertools
import pickle
from glob import glob
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import transformers
from conftest import SMOKE, few
from letters import LETTERS, save_tokenizer, texts_of, write_array_record, write_json, write_parquet, write_tfds
from reading import pieces_of, rows_of, with_keys

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.data import coverage, pipelines, tokens
from MaxText.data import rows as rows_lib

LENGTH, BATCH = 32, 4
# Words up to three rows long, one of a single letter; the held-out ones are no multiple of any batch.
TRAIN = [*texts_of(37, seed=1, longest=90), "q", "a" * LENGTH, "b" * (2 * LENGTH)]
HELD_OUT = texts_of(10, seed=2, longest=90)

# A tokenizer's special tokens, in the order of their ids, and their roles.
TOKENIZERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "a pad of its own": (
        ["<pad>", "<unk>", "<bos>", "<eos>"],
        {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "pad is the end": (["<eos>", "<bos>"], {"pad_token": "<eos>", "bos_token": "<bos>", "eos_token": "<eos>"}),
    "pad is a letter": ([], {}),  # upstream falls back to id 0
    "one token is everything": (["<s>"], dict.fromkeys(("pad_token", "unk_token", "bos_token", "eos_token"), "<s>")),
}

OWN = next(iter(TOKENIZERS))
SPLITS = {"train": TRAIN, "eval": HELD_OUT}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Texts and tokenizers, as files."""
    path = tmp_path_factory.mktemp("letters")
    for split, texts in SPLITS.items():
        write_array_record(path / f"{split}.arrayrecord", texts)
        write_parquet(path / f"{split}.parquet", [*texts])
        write_json(path / f"{split}.json", [*texts])
    for name, (special, roles) in TOKENIZERS.items():
        save_tokenizer(path / name, special, **roles)
    return path


@pytest.fixture(scope="session")
def config_of(folder: Any) -> Any:
    """config_of(accumulation, evaluation batch, key=value, ..): a run's configuration; batches are resolved once."""
    made: dict[tuple[int, int], Any] = {}

    def make(accumulation: int = 1, evaluated: int = BATCH, **keys: Any) -> Any:
        if (accumulation, evaluated) not in made:
            arguments = {
                "base_output_directory": folder,
                "metrics_file": "",
                "per_device_batch_size": BATCH,
                "max_target_length": LENGTH,
                "gradient_accumulation_steps": accumulation,
                "eval_per_device_batch_size": evaluated,
                "dataset_type": "grain",
                "grain_train_files": folder / "train.parquet",
                "grain_eval_files": folder / "eval.parquet",
                "grain_file_type": "parquet",
                "grain_worker_count": 0,
                "grain_worker_count_eval": 0,
                "tokenizer_type": "huggingface",
                "tokenizer_path": folder / "a pad of its own",
                "enable_data_shuffling": False,
                "eval_interval": 1,
            }
            run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in arguments.items())])
            made[accumulation, evaluated] = run.student
        return with_keys(made[accumulation, evaluated], **keys)

    return make


def keys_of(pipeline: str, folder: Any) -> dict[str, Any]:
    kind, _, form = pipeline.partition(" ")
    if kind == "hf":
        files = {"hf_path": form, "hf_train_files": folder / f"train.{form}", "hf_eval_files": folder / f"eval.{form}"}
        keys: dict[str, Any] = {"dataset_type": "hf", "hf_eval_split": "train", **files}
    elif kind == "tfds":
        names = {"dataset_name": "letters:1.0.0", "eval_dataset_name": "letters:1.0.0", "eval_split": "eval"}
        keys = {"dataset_type": "tfds", "dataset_path": folder / "tfds", **names}
    else:
        files = {f"grain_{split}_files": folder / f"{split}.{form}" for split in ("train", "eval")}
        keys = {"dataset_type": "grain", "grain_file_type": form, **files}
    return {key: str(value) for key, value in keys.items()}


def documents(texts: list[str], tokenizer: str, bos: bool = True, eos: bool = True) -> list[tuple[int, ...]]:
    """The tokens of the texts by a plain reading: marks where the tokenizer has them."""
    special, roles = TOKENIZERS[tokenizer]
    ids = {token: number for number, token in enumerate([*special, *LETTERS])}
    begin = (ids[roles["bos_token"]],) if bos and "bos_token" in roles else ()
    end = (ids[roles["eos_token"]],) if eos and "eos_token" in roles else ()
    return [(*begin, *(ids[letter] for letter in text), *end) for text in texts]


def in_rows(document: tuple[int, ...], cut: bool) -> list[tuple[int, ...]]:
    starts = range(0, len(document), LENGTH)
    return [document[start : start + LENGTH] for start in starts][: 1 if cut else None]


def assert_read(
    rows: dict[str, np.ndarray], expected: list[tuple[int, ...]], joined: bool = False, within: bool = False
) -> None:
    """The rows hold these pieces, and every token but the first of its row is a target of the one before it.

    Args:
      joined: pieces may be cut anew where a row ends, in their order.
      within: nor is the first token of a piece.
    """
    found = pieces_of(rows)
    pieces = [piece for row in found for piece in row]
    if joined:
        assert list(itertools.chain(*pieces)) == list(itertools.chain(*expected))
    else:
        assert sorted(pieces) == sorted(expected)
    text = rows["inputs_segmentation"] != 0
    counts = rows["targets_segmentation"] != 0
    follows = text[:, 1:] & ~(within & (rows["inputs_position"][:, 1:] == 0))
    assert (counts[:, :-1] == follows).all() and not counts[:, -1].any()
    assert (rows["targets"][:, :-1] == rows["inputs"][:, 1:])[counts[:, :-1]].all()
    assert counts.sum() == sum(len(piece) for piece in pieces) - (len(pieces) if within else len(found))
    assert not rows["inputs"][~text].any() and rows["targets"].min() >= 0


BATCHES = [(1, BATCH), (2, BATCH), (1, 2), (2, 2)]
PACKINGS = ["", "first_fit", "best_fit", "concat_then_split"]


GRAIN = [*itertools.product(["grain parquet", "grain arrayrecord"], PACKINGS, [True, False])]


@pytest.mark.parametrize(("pipeline", "packing", "cut"), few(GRAIN[:9], GRAIN))
def test_grain_reads_each_document_once_whatever_the_batch(pipeline, packing, cut, config_of, folder) -> None:
    keys = keys_of(pipeline, folder) | {"packing": bool(packing), "use_truncation": cut}
    keys |= {"grain_packing_type": packing} if packing else {}
    for batch in BATCHES:
        config = config_of(*batch, **keys)
        for split, texts in SPLITS.items():
            pieces = [piece for text in documents(texts, OWN) for piece in in_rows(text, cut)]
            assert_read(rows_of(config, split), pieces, joined=packing == "concat_then_split", within=split == "eval")


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("pipeline", ["hf json", "hf parquet"])
def test_hf_reads_the_first_row_of_each_document_once(pipeline, packing, config_of, folder) -> None:
    for batch in BATCHES:
        config = config_of(*batch, packing=packing, **keys_of(pipeline, folder))
        for split, texts in SPLITS.items():
            pieces = documents([text[: LENGTH - 2] for text in texts], OWN)  # what is cut ends in its mark all the same
            assert_read(rows_of(config, split), pieces, within=True)


@pytest.fixture(scope="session")
def tfds_folder(folder: Any) -> Any:
    write_tfds(folder / "tfds", SPLITS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("tokenizer", [OWN, "pad is the end"])
def test_tfds_reads_the_first_row_of_each_document_once(tokenizer, packing, config_of, tfds_folder) -> None:
    """It shifts first: a row holds one token more of a text, and no target of another."""
    for batch in BATCHES:
        keys = keys_of("tfds", tfds_folder) | {"packing": packing, "tokenizer_path": str(tfds_folder / tokenizer)}
        for split, texts in SPLITS.items():
            if packing and split == "train":  # of which a last batch that is not full is left out
                continue
            rows = rows_of(config_of(*batch, **keys), split)
            whole = documents(texts, tokenizer)
            pieces = [piece for row in pieces_of(rows) for piece in row]
            assert sorted(pieces) == sorted(document[:-1][:LENGTH] for document in whole)
            counts = rows["targets_segmentation"] != 0
            assert counts.sum() == sum(min(len(document) - 1, LENGTH) for document in whole)
            assert (counts == (rows["inputs_segmentation"] != 0)).all()
            assert min(rows["inputs"].min(), rows["targets"].min()) >= 0


# Padding is a position ------------------------------------------------------------------------------------------------

PIPELINES = ["grain parquet", "hf json"]


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("tokenizer", [name for name in TOKENIZERS if name != OWN])
def test_no_token_is_taken_for_padding(tokenizer, pipeline, packing, config_of, folder) -> None:
    keys = keys_of(pipeline, folder) | {"packing": packing, "tokenizer_path": str(folder / tokenizer)}
    marks = ("bos_token" in TOKENIZERS[tokenizer][1]) + ("eos_token" in TOKENIZERS[tokenizer][1])
    for split, texts in SPLITS.items():
        cut = [text[: LENGTH - marks] for text in texts]
        if pipeline.startswith("grain"):
            keys |= {"use_truncation": False}
            cut = texts
        pieces = [piece for text in documents(cut, tokenizer) for piece in in_rows(text, cut=False)]
        within = split == "eval" or (pipeline.startswith("hf") and marks == 2)
        assert_read(rows_of(config_of(**keys), split), pieces, within=within)


def test_a_mark_that_the_tokenizer_lacks_is_not_written(config_of, folder, tmp_path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS] * 10), model_writer=model, model_type="char", vocab_size=64, minloglevel=2,
        hard_vocab_limit=False, add_dummy_prefix=False, unk_id=0, bos_id=-1, eos_id=1,
    )  # fmt: skip
    (tmp_path / "letters.model").write_bytes(model.getvalue())
    keys = keys_of("grain parquet", folder) | {"tokenizer_path": str(tmp_path / "letters.model")}
    rows = rows_of(config_of(**keys, tokenizer_type="sentencepiece", use_truncation=False, packing=False), "train")
    lengths = [len(piece) for row in pieces_of(rows) for piece in row]
    assert sum(lengths) == sum(len(text) + 1 for text in TRAIN)
    counted = rows["inputs_segmentation"] != 0
    assert counted[counted.any(axis=1), 0].all()  # each begins where its row does, behind nothing


def test_worker_processes_are_given_what_this_one_has() -> None:
    tokens_of_a_row = np.array([[5, 6, 2, 7, -1]], np.int32)
    text = {"": tokens_of_a_row, "_segmentation": (tokens_of_a_row >= 0).astype(np.int32)}
    text["_position"] = np.arange(5)[None]
    row = {f"{side}{part}": array for side in ("inputs", "targets") for part, array in text.items()}
    step = rows_lib.NextTokens([rows_lib.PAD, 7], vocab_size=8)
    here, there = step.map(row), pickle.loads(pickle.dumps(step)).map(row)
    assert all((there[name] == here[name]).all() for name in here)
    assert here["targets"].tolist() == [[6, 2, 7, 0, 0]] and here["targets_segmentation"].tolist() == [[1, 1, 1, 0, 0]]


TURNS = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>{% endif %}"


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("tokenizer", [OWN, "pad is the end"])
def test_both_ends_of_a_turn_are_targets(tokenizer, pipeline, packing, config_of, folder, tmp_path) -> None:
    """Two turns, as SmolLM2's tokenizer marks them: each begins with its bos and ends in its eos, which is its pad."""
    said = [["ab", "cde", "f", "gh"], ["i", "j", "klm", "n"]] * 2
    roles = ["user", "assistant"] * 2
    messages = [[dict(role=r, content=c) for r, c in zip(roles, turns, strict=True)] for turns in said]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "train.parquet")
    keys = keys_of(pipeline.replace("json", "parquet"), tmp_path) | {
        "use_sft": True,
        "train_data_columns": ["messages"],
    }
    keys |= {"packing": packing, "tokenizer_path": str(folder / tokenizer), "chat_template": TURNS, "eval_interval": -1}
    for completions in (True, False):
        rows = rows_of(config_of(**keys, sft_train_on_completion_only=completions), "train")
        pieces = [piece for row in pieces_of(rows) for piece in row]
        assert sorted(map(len, pieces)) == sorted(sum(len(turn) + 2 for turn in turns) for turns in said)
        counted = int((rows["targets_segmentation"] != 0).sum())
        if completions:  # the answer, and that it ends
            assert counted == sum(len(turn) + 1 for turns in said for turn in turns[1::2])
        else:
            assert counted == sum(map(len, pieces)) - len(said)


def test_files_are_read_in_the_order_of_their_names(config_of, tmp_path) -> None:
    for number in (3, 0, 7, 4, 1, 6, 2, 5):
        write_parquet(tmp_path / f"{number}.parquet", [LETTERS[number]])
        write_array_record(tmp_path / f"{number}.arrayrecord", [LETTERS[number]])
    expected = documents([*LETTERS[: 2 * BATCH]], OWN)
    for form in ("arrayrecord", "parquet"):
        keys = keys_of(f"grain {form}", tmp_path) | {"grain_train_files": f"{tmp_path}/*.{form}", "eval_interval": -1}
        keys |= {"packing": False, "grain_num_threads": 1}
        with mock.patch("glob.glob", lambda pattern: sorted(glob(pattern), reverse=True)):
            rows = rows_of(config_of(**keys), "train")
        assert [piece for row in pieces_of(rows) for piece in row] == expected
    keys = keys_of("hf parquet", tmp_path) | {"hf_train_files": f"{tmp_path}/*.parquet", "eval_interval": -1}
    rows = rows_of(config_of(**keys, packing=False), "train")
    assert [piece for row in pieces_of(rows) for piece in row] == expected


# What is never read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_run_says_how_large_a_share_of_its_text_is_cut_off(pipeline, config_of, folder, monkeypatch) -> None:
    mesh = upstream.maxtext_utils.get_mesh_from_config(config_of())
    lengths = [len(text) + 2 for text in TRAIN]
    share = 1 - sum(min(length, LENGTH) for length in lengths) / sum(lengths)
    [line] = coverage.report(config_of(**keys_of(pipeline, folder)), mesh)
    setting = "use_truncation=True" if pipeline.startswith("grain") else "dataset_type=hf"
    assert line.startswith(f"warning: {setting} cuts each document after max_target_length={LENGTH} tokens")
    assert (
        f"of {sum(lengths):,} tokens in a sample of {len(TRAIN)} documents {100 * share:.1f} % are never read" in line
    )
    [line] = coverage.report(config_of(**keys_of(pipeline, folder), max_target_length=LENGTH * 3), mesh)
    assert not line.startswith("warning") and "none is longer" in line
    monkeypatch.setattr(coverage, "DOCUMENTS", 8)
    assert "a sample of 8 documents" in coverage.report(config_of(**keys_of(pipeline, folder)), mesh)[0]


def test_a_run_that_reads_all_of_its_text_says_nothing_of_it(config_of, folder) -> None:
    mesh = upstream.maxtext_utils.get_mesh_from_config(config_of())
    assert coverage.report(config_of(**keys_of("grain parquet", folder), use_truncation=False), mesh) == []
    assert coverage.report(config_of(dataset_type="synthetic"), mesh) == []


def test_data_that_cannot_be_sampled_is_said_to_be_cut_all_the_same(config_of, folder) -> None:
    mesh = upstream.maxtext_utils.get_mesh_from_config(config_of())
    [line] = coverage.report(config_of(**keys_of("grain parquet", folder) | {"grain_train_files": "none"}), mesh)
    assert line.startswith("warning: use_truncation=True cuts each document") and "%" not in line


def test_rows_that_are_read_and_not_trained_on_are_said(config_of) -> None:
    half = {"per_device_batch_size": 0.5, "global_batch_size_to_load": 4, "global_batch_size_to_train_on": 2}
    [line] = coverage.report(config_of(dataset_type="synthetic", **half), None)
    assert line.startswith(
        "warning: per_device_batch_size=0.5: a step reads 4 rows, one for each device, and trains on 2"
    )


# Tokens that the model has no row for ---------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_by_name(config_of, folder) -> None:
    largest = len(TOKENIZERS[OWN][0]) + len(LETTERS) - 1
    tokens.check_fits(config_of(vocab_size=largest + 1))
    for kind in ("grain", "hf"):
        with pytest.raises(ConfigError) as refused:
            tokens.check_fits(config_of(vocab_size=largest, dataset_type=kind))
        for part in (f"tokenizer_path='{folder / OWN}'", f"largest id is {largest} ('z')", f"vocab_size={largest + 1}"):
            assert part in str(refused.value)
    tokens.check_fits(config_of(vocab_size=largest, dataset_type="synthetic"))
    tokens.check_fits(config_of(vocab_size=largest, grain_file_type="mmap"))


def test_a_special_token_beyond_the_vocabulary_is_refused_in_the_text(config_of, folder, tmp_path, capsys) -> None:
    """As Gemma 3's tokenizer has one for images that its models of text have no row for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / OWN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_parquet(tmp_path / "train.parquet", ["abc", "<image>"])
    keys = keys_of("grain parquet", tmp_path) | {"tokenizer_path": str(tmp_path / "tokenizer"), "eval_interval": -1}
    size = len(tokenizer) - 1
    config = config_of(**keys, vocab_size=size)
    tokens.check_fits(config)
    assert f"warning: vocab_size={size} has no place for '<image>'" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"token {size}, beyond vocab_size={size}"):
        rows_of(config, "train")


def test_data_without_text_is_warned_of_where_its_padding_is_a_token(config_of, folder) -> None:
    given = {"tokenize_train_data": False}
    assert not pipelines.taken_for_padding(config_of(**given))
    for name, token in (("pad is the end", "<eos>"), ("pad is a letter", "a")):
        keys = {"tokenizer_path": str(folder / name)}
        assert f"token 0 ({token!r}) is taken for padding" in pipelines.taken_for_padding(config_of(**given, **keys))
        assert not pipelines.taken_for_padding(config_of(**keys))
    assert "mmap_eod_id=5" in pipelines.taken_for_padding(config_of(grain_file_type="mmap", mmap_eod_id=5))
