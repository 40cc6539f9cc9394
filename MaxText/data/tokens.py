"""What tokens a run's tokenizer has, and whether the model's table has a row for each of them.

Left out on purpose: data that is given as tokens, which no tokenizer vouches for; its ids are looked at as it is read
(rows.py).
"""

import contextlib
import hashlib
import os
from typing import Any

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.console import first_line, say


def load(key: str, path: str, kind: str, access_token: str) -> Any:
    """MaxText's tokenizer of tokenizer_type `kind`; ConfigError if there is none at `path`."""
    try:
        return upstream.tokenizer.build_tokenizer(path, kind, False, False, access_token)
    except (ValueError, TypeError, OSError, AssertionError) as error:
        raise ConfigError(f"{key}={path!r}: no tokenizer of tokenizer_type={kind} ({first_line(error)})") from error


def of_run(config: Any) -> tuple[str, Any]:
    """The tokenizer that a run's pipeline loads, and its tokenizer_type: the pipeline of hf knows but one.

    None where there is no tokenizer: the pipeline says so, after what it finds wrong with the data.
    """
    kind = "huggingface" if config.dataset_type == "hf" else config.tokenizer_type.value
    with contextlib.suppress(ConfigError):
        return kind, load("tokenizer_path", config.tokenizer_path, kind, config.hf_access_token)
    return kind, None


# tokenizer_type -> what gives token id -> the token, as the tokenizer itself spells it.
SPELLED = {
    "sentencepiece": lambda loaded: dict(
        enumerate(loaded._tokenizer_model.IdToPiece(list(range(loaded._tokenizer_model.GetPieceSize()))))
    ),
    "huggingface": lambda loaded: {i: token for token, i in loaded.tokenizer.get_vocab().items()},
    "tiktoken": lambda loaded: {
        i: loaded.model.decode_single_token_bytes(i)
        for i in {*loaded.model._mergeable_ranks.values(), *loaded.special_tokens.values()}
    },
}


def identity(config: Any) -> str:
    """A hash of the tokens that a run's tokenizer has, by their ids; "" where there is no tokenizer.

    It does not depend on the pipeline that reads with it: a folder is a Hugging Face tokenizer.
    """
    kind, loaded = of_run(config)
    if loaded is None and os.path.isdir(config.tokenizer_path):
        kind = "huggingface"
        with contextlib.suppress(ConfigError):
            loaded = load("tokenizer_path", config.tokenizer_path, kind, config.hf_access_token)
    if loaded is None:
        return ""
    tokens = sorted(SPELLED[kind](loaded).items())
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:32]


def check_fits(config: Any) -> None:
    """Compares the tokenizer of a run that tokenises with vocab_size.

    Special tokens that the pipeline itself never adds may lie beyond: Gemma 3's stands for an image, and models of
    text have no row for it. A text that holds one after all is refused as it is read.

    Raises:
      ConfigError: a token beyond the table may be read.
    """
    megatron = config.dataset_type == "grain" and config.grain_file_type in ("mmap", "mmap_npy")
    if config.dataset_type in ("synthetic", "olmo_grain") or megatron or not config.tokenize_train_data:
        return
    kind, loaded = of_run(config)
    if loaded is None:
        return
    tokens = SPELLED[kind](loaded)
    beyond = sorted(i for i in tokens if i >= config.vocab_size)
    if not beyond:
        return
    added = {loaded.bos_id, loaded.eos_id}
    special = loaded.tokenizer.added_tokens_decoder if kind == "huggingface" else {}
    if all(i in special and special[i].special and i not in added for i in beyond):
        named = ", ".join(repr(tokens[i]) for i in beyond[:3])
        say(f"warning: vocab_size={config.vocab_size} has no place for {named}: a text that holds it is refused")
        return
    raise ConfigError(
        f"tokenizer_path={config.tokenizer_path!r}: its largest id is {beyond[-1]} ({tokens[beyond[-1]]!r}), but "
        f"vocab_size={config.vocab_size}: set vocab_size={beyond[-1] + 1} or more, or take the model's own tokenizer"
    )
