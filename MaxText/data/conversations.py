"""A conversation becomes tokens as its template writes it whole; and which of them are answers.

MaxText's pipelines write and tokenise a conversation turn by turn: what a template puts at the beginning, a system
prompt of its own or a mark, stands before each turn then, and each piece is tokenised as if it began a text. Here the
template writes the conversation once, its text is tokenised once, and an answer is what follows where the template
would let the model speak, to the end of its turn (pipelines.py puts this in the place of MaxText's own).

An answer counts if the template writes the conversation up to it as it did when it was the last. Some do not: Qwen3's
own leaves out of earlier answers what the model has thought, so that of several only the last is written as the model
would have said it. Such a template is told at the head of a run (templates.py).

Left out on purpose: what follows the last answer, where nothing is to be learnt. Worker processes import this module,
so it imports no engine.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]

# The columns that hold a conversation: its messages, or what one says and what the other answers.
COLUMNS = (("messages",), ("prompt", "completion"), ("question", "answer"))
SPEAKERS = {"prompt": "user", "question": "user", "completion": "assistant", "answer": "assistant"}
NOT_MESSAGES = "a conversation is a list of messages, each with a role and a content; found {!r}"


class Piece(NamedTuple):
    """Tokens in a row, and whether they are an answer."""

    tokens: list[int]
    is_answer: bool


def pieces(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    """The tokens of a conversation to the end of its last answer, cut where answers begin and end.

    Args:
      tokenizer: Hugging Face's, with a chat template; one that knows where in the text its tokens lie.
      messages: in their order, as the template takes them.
    """
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return []
    text = written(tokenizer, messages[: answers[-1] + 1])
    cuts = []
    for at in answers:
        through = written(tokenizer, messages[: at + 1])
        if text.startswith(through) and is_asked(tokenizer, messages[:at], text):
            asked = written(tokenizer, messages[:at], add_generation_prompt=True)
            cuts += [shared(text, asked), len(through)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    found, begin = [], 0
    for number, cut in enumerate([*cuts, len(text)]):
        end = begin
        while end < len(ends) and ends[end] <= cut:  # what reaches beyond belongs to the answer that begins there
            end += 1
        found.append(Piece(encoded["input_ids"][begin:end], is_answer=number % 2 == 1))
        begin = end
    return [piece for piece in found if piece.tokens]


def is_asked(tokenizer: Any, before: Sequence[Message], text: str) -> bool:
    """Whether what stands before an answer tells where the model begins to speak.

    Nothing does not: templates write no conversation of no message. Another answer does if it is written in `text` as
    it was when it was the last.
    """
    if not before or before[-1]["role"] != "assistant":
        return bool(before)
    return text.startswith(written(tokenizer, before))


def written(tokenizer: Any, messages: Sequence[Message], **more: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **more)


def shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    differs = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def messages_of(row: dict[str, Any], columns: Sequence[str]) -> list[Message]:
    """The messages in the columns of a row.

    Raises:
      ValueError: they are none.
    """
    if list(columns) == ["messages"]:
        found = row["messages"]
    else:
        found = []
        for column in sorted(columns, key=lambda name: SPEAKERS[name] == "assistant"):
            said = row[column]
            found += [{"role": SPEAKERS[column], "content": said}] if isinstance(said, str) else list(said)
    if isinstance(found, str) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
        raise ValueError(NOT_MESSAGES.format(found))
    return list(found)


TURN: list[Message] = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def earlier_answers_are_lost(tokenizer: Any) -> bool:
    """Whether the template writes an answer otherwise once another turn follows.

    Raises:
      ValueError: it does so with a question, once it is answered.
    """
    alone = written(tokenizer, TURN)
    asked = written(tokenizer, TURN[:1], add_generation_prompt=True)
    if "one" not in alone[: shared(alone, asked)]:
        raise ValueError("it writes a question otherwise once it is answered")
    return not written(tokenizer, TURN * 2).startswith(alone)


def answers_end_in_a_mark(tokenizer: Any) -> bool:
    return not written(tokenizer, TURN).rstrip().endswith("two")


# In the place of the engine's functions of these arguments ------------------------------------------------------------


def as_pieces(example: dict[str, Any], tokenizer_model: Any, data_column_name: str) -> dict[str, Any]:
    """`apply_chat_template`: the pieces in the place of a column, as tokens."""
    found = pieces(tokenizer_model, example[data_column_name])
    example["is_prompt"] = [not piece.is_answer for piece in found]
    example[data_column_name] = [piece.tokens for piece in found]
    return example


def columns_as_pieces(element: dict[str, Any], data_columns: Sequence[str], tokenizer_model: Any) -> dict[str, Any]:
    """`_format_chat_template_grain`: the pieces in the place of the first column."""
    first = {data_columns[0]: messages_of(element, data_columns)}
    return as_pieces(first, tokenizer_model, data_columns[0])


def already_tokens(element: dict[str, Any], **_: Any) -> dict[str, Any]:
    """`_tokenize_sft_chunks` and `tokenization`, with nothing left to do."""
    return element


def as_messages(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {"messages": messages_of(row, columns)}
