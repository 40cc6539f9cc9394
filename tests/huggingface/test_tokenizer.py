"""Laws of a tokenizer beside a student: by what begins and ends a text, the folder and the tokenizer agree."""

import json
import pathlib

import pytest
import tokenizers
import transformers
from etils import epath

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.huggingface import tokenizer

ASSETS = pathlib.Path(upstream.globals.MAXTEXT_PKG_DIR) / "assets/tokenizers"
TOKENS = {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 3}


def save(folder: pathlib.Path) -> None:
    """A tokenizer whose special tokens have other ids than any class of transformers' gives them."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "<unk>", "<pad>", "<begin>", "<end>"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    special = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)


def student(folder: pathlib.Path) -> epath.Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return epath.Path(folder)


def test_a_folder_of_hugging_faces_says_which_tokens_begin_and_end_a_text(tmp_path):
    save(tmp_path / "tokens")
    (tmp_path / "tokens/config.json").write_text("the teacher's")
    out = student(tmp_path / "out")
    assert tokenizer.copy_beside(str(tmp_path / "tokens"), out) == TOKENS
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == 5


@pytest.mark.parametrize(
    ("file", "name", "tokens"),
    [
        ("tokenizer.llama2", "tokenizer.model", (1, 2, None)),
        ("tokenizer.gemma", "tokenizer.model", (2, 1, 0)),
        ("tokenizer_llama3.tiktoken", "tokenizer_llama3.tiktoken", (128000, 128001, None)),
    ],
)
def test_a_file_of_a_tokenizer_says_it_too(file, name, tokens, tmp_path):
    out = student(tmp_path / "out")
    assert tuple(tokenizer.copy_beside(str(ASSETS / file), out).values()) == tokens
    assert {path.name for path in out.iterdir()} == {"config.json", name}


def test_what_is_no_tokenizer_is_refused_by_its_path(tmp_path):
    (tmp_path / "text.model").write_text("no tokenizer")
    (tmp_path / "empty").mkdir()
    for name in ("text.model", "empty"):
        with pytest.raises(ConfigError, match=rf"tokenizer '{tmp_path / name}': cannot be read"):
            tokenizer.copy_beside(str(tmp_path / name), student(tmp_path / f"{name}_out"))


@pytest.mark.parametrize(
    ("beside", "stops"),
    [
        (None, 5),
        ({"eos_token_id": 5}, 5),
        ({"eos_token_id": [9, 5], "temperature": 0.6}, [9, 5]),
        ({"eos_token_id": [9, 8]}, [5, 9, 8]),
        ({"eos_token_id": 9}, [5, 9]),
        ({"eos_token_id": None}, 5),
    ],
    ids=["none", "the same", "one of them", "others", "another", "null"],
)
def test_a_server_stops_at_what_ends_a_text_and_at_what_the_teacher_stopped_at(beside, stops, tmp_path):
    if beside is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(beside))
    assert tokenizer.generation_config(epath.Path(tmp_path), TOKENS) == (beside or {}) | TOKENS | {
        "eos_token_id": stops
    }


def test_a_token_that_a_tokenizer_has_not_is_left_as_it_was(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [8, 9]}))
    none = dict.fromkeys(TOKENS)
    assert tokenizer.generation_config(epath.Path(tmp_path), none) == {"bos_token_id": 7, "eos_token_id": [8, 9]}
