"""Do teacher and student count the same tokens? Their tokenizers, compared id by id before anything is trained.

Two tokenizers of one size fit each other's shapes and nothing else: the teacher reads noise, and teaches it. Left out
on purpose: how text is cut into the tokens; tokenizers with the same tokens under the same ids are taken to agree.
"""

from typing import Any

from MaxText import upstream
from MaxText.config.keys import ConfigError, Distillation
from MaxText.console import first_line

SHOWN = 3  # ids that differ are named up to so many


def check_same_tokens(config: Any, kd: Distillation) -> None:
    """Compares the tokenizers at kd_teacher_tokenizer_path and tokenizer_path up to kd_vocab_size, if that is set.

    Args:
      config: MaxText's configuration of the student.
      kd: the distillation settings; without kd_teacher_tokenizer_path nothing is compared.

    Raises:
      ConfigError: a tokenizer cannot be loaded, or an id is not the same token's in both.
    """
    if not kd.kd_teacher_tokenizer_path:
        return
    kind = getattr(config.tokenizer_type, "value", config.tokenizer_type)
    student = tokens_of("tokenizer_path", config.tokenizer_path, kind, config.hf_access_token)
    teacher = tokens_of("kd_teacher_tokenizer_path", kd.kd_teacher_tokenizer_path, kind, config.hf_access_token)
    ids = sorted(student.keys() | teacher.keys())
    compared = [i for i in ids if not kd.kd_vocab_size or i < kd.kd_vocab_size]
    different = [i for i in compared if student.get(i) != teacher.get(i)]
    if different:
        named = "; ".join(
            f"id {i} is {teacher.get(i, 'not there')!r} to the teacher, {student.get(i, 'not there')!r} to the student"
            for i in different[:SHOWN]
        )
        raise ConfigError(
            f"kd_teacher_tokenizer_path={kd.kd_teacher_tokenizer_path!r} tokenizer_path={config.tokenizer_path!r}: "
            f"{len(different)} of {len(compared)} ids differ: {named}. Teacher and student need one tokenizer; the ids "
            f"below {different[0]} agree (kd_vocab_size={different[0]} would distil those alone)"
        )


def tokens_of(key: str, path: str, kind: str, access_token: str) -> dict[int, str | bytes]:
    """Token id -> the token, as the tokenizer itself spells it."""
    try:
        loaded = upstream.tokenizer.build_tokenizer(path, kind, False, False, access_token)
    except (ValueError, TypeError, OSError, AssertionError) as error:
        raise ConfigError(f"{key}={path!r}: no tokenizer of tokenizer_type={kind} ({first_line(error)})") from error
    return TOKENS[kind](loaded)


TOKENS = {
    "sentencepiece": lambda loaded: dict(
        enumerate(loaded._tokenizer_model.IdToPiece(list(range(loaded._tokenizer_model.GetPieceSize()))))
    ),
    "huggingface": lambda loaded: {i: token for token, i in loaded.tokenizer.get_vocab().items()},
    "tiktoken": lambda loaded: {
        i: loaded.model.decode_single_token_bytes(i)
        for i in {*loaded.model._mergeable_ranks.values(), *loaded.special_tokens.values()}
    },
}
