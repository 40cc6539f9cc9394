"""A tokenizer's files beside a model, and the tokens that begin, end and fill a text, by what the tokenizer says."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.console import first_line

FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
         "vocab.*", "merges.txt", "*.model", "chat_template*")  # fmt: skip
GENERATION = "generation_config.json"


def copy_files(source: epath.Path, target: epath.Path) -> None:
    """A teacher's, with the model's config.json: by it transformers knows which tokenizer it is."""
    target.mkdir(exist_ok=True)
    for pattern in FILES:
        for file in source.glob(pattern):
            if file.is_file():
                (target / file.name).write_bytes(file.read_bytes())


def copy_beside(path: str, folder: epath.Path) -> dict[str, int | None]:
    """Copies a tokenizer's folder, or its one file, beside a student, whose config.json is there.

    Args:
      path: the folder (of Hugging Face's kind), or the file (a SentencePiece model or tiktoken's); local or gs://.
      folder: the student's.

    Returns:
      As config.json calls them, the tokens that begin, end and fill a text; of what it has none, None.

    Raises:
      ConfigError: it is no tokenizer.
    """
    given = epath.Path(path)
    if given.is_dir():
        for pattern in FILES:
            for file in given.glob(pattern):
                if file.name != "config.json":  # the student's own
                    (folder / file.name).write_bytes(file.read_bytes())
        return special_tokens(path, folder, "huggingface")
    kind = "tiktoken" if "tiktoken" in given.name else "sentencepiece"
    file = folder / ("tokenizer.model" if kind == "sentencepiece" else given.name)
    file.write_bytes(given.read_bytes())
    return special_tokens(path, file, kind)


def special_tokens(path: str, local: epath.Path, kind: str) -> dict[str, int | None]:
    try:
        with upstream.silence():
            loaded = upstream.tokenizer.build_tokenizer(str(local), kind, False, False, "")
    except (ValueError, TypeError, OSError, AssertionError) as error:
        raise ConfigError(f"tokenizer {path!r}: cannot be read ({first_line(error)})") from error
    found = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id, "pad_token_id": loaded.pad_id}
    return {name: None if number is None or number < 0 else number for name, number in found.items()}


def generation_config(folder: epath.Path, tokens: dict[str, int | None]) -> dict[str, Any]:
    """What a server goes by: the tokenizer's own generation_config.json, if it has one, and its tokens.

    A chat ends by more than one token; whichever the tokenizer ends a text with is among them.
    """
    file = folder / GENERATION
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{GENERATION} of the tokenizer: cannot be read ({first_line(error)})") from error
    stops = found.get("eos_token_id")
    end = tokens["eos_token_id"]
    listed = stops if isinstance(stops, list) else [stops]
    known: dict[str, Any] = {name: number for name, number in tokens.items() if number is not None}
    if stops is not None and end is not None:
        known["eos_token_id"] = stops if end in listed else [end, *listed]
    return found | known
