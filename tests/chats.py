"""Conversations whose tokens are letters: what must be counted follows from what is said, without any template."""

import json
import pathlib

import pyarrow
import pyarrow.parquet
from letters import LETTERS, save_tokenizer

LENGTH = 32  # of the rows that some of these conversations exceed
DEFAULT = "defaults"  # what the template says for a system that says nothing
ROLES = ["<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<system>" + DEFAULT + "<eos>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", *ROLES]
IDS = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}

# Each a list of what is said, by user and assistant in turn; behind a system prompt, where the first role is that.
SAID: list[list[tuple[str, str]]] = [
    [("user", "ab"), ("assistant", "cde")],
    [("user", "f"), ("assistant", "gh"), ("user", "i"), ("assistant", "jkl")],
    [("system", "m"), ("user", "no"), ("assistant", "p"), ("user", "q"), ("assistant", "r")],
    [("user", "s" * LENGTH), ("assistant", "tu")],  # no answer within the row
    [("user", "v"), ("assistant", "")],
    [("user", "w"), ("assistant", "x" * LENGTH)],  # an answer that the row cuts
    [("user", "y"), ("assistant", "z"), ("user", "aa")],  # nobody answers
]


def plain(said: list[tuple[str, str]], system: str = DEFAULT) -> tuple[list[int], list[bool]]:
    """The tokens to the end of the last answer, and which of them are answers."""
    said = said if said[0][0] == "system" else [("system", system), *said]
    last = max(at for at, (role, _) in enumerate(said) if role == "assistant")
    tokens, answers = [], []
    for role, content in said[: last + 1]:
        tokens += [IDS[f"<{role}>"], *(IDS[letter] for letter in content), IDS["<eos>"]]
        answers += [False, *[role == "assistant"] * (len(content) + 1)]
    return tokens, answers


def messages_of(said: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def write_chats(folder: pathlib.Path, saids: list[list[tuple[str, str]]], name: str = "messages") -> None:
    """As Parquet and as lines of JSON."""
    rows = [messages_of(said) for said in saids]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), folder / f"{name}.parquet")
    (folder / f"{name}.json").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def save_chat_tokenizer(folder: pathlib.Path, **roles: str) -> str:
    return save_tokenizer(folder, SPECIAL, **roles, additional_special_tokens=SPECIAL)
