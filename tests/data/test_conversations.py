"""Laws of conversations: what their template writes, whole, and of it the answers, to the end of their turns.

The expected tokens are those of a plain reading, made without a template: a role, the letters, a mark.
"""

import itertools
import json
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import transformers
from chats import LENGTH, SAID, TEMPLATE, messages_of, plain, save_chat_tokenizer, write_chats
from conftest import SMOKE, few
from reading import rows_of, with_keys

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.data import conversations, coverage, templates

BATCH = 4
# As some do, it writes the last answer otherwise than the ones before it.
FORGETFUL = TEMPLATE.replace("<{{ m.role }}>", "<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}z{% endif %}")

# Of a tokenizer the role of each of its marks.
MARKS: dict[str, dict[str, str]] = {
    "marks of their own": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
    "as SmolLM2 has them": {"pad_token": "<eos>", "bos_token": "<user>", "eos_token": "<eos>"},
    "pad is missing": {"eos_token": "<eos>"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("conversations")
    write_chats(path, SAID)
    pairs = [said for said in SAID if [role for role, _ in said] == ["user", "assistant"]]
    for names in (("prompt", "completion"), ("question", "answer")):
        columns = {name: [said[at][1] for said in pairs] for at, name in enumerate(names)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path / f"{names[0]}.parquet")
        rows = ({name: said[at][1] for at, name in enumerate(names)} for said in pairs)
        (path / f"{names[0]}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists = {name: [[m] for m in (messages_of(said)[at] for said in pairs)] for at, name in enumerate(names)}
    lists = {"prompt": lists["question"], "completion": lists["answer"]}
    pyarrow.parquet.write_table(pyarrow.table(lists), path / "lists.parquet")
    for name, roles in MARKS.items():
        save_chat_tokenizer(path / name, **roles)
    return path


@pytest.fixture(scope="module")
def config_of(folder: Any) -> Any:
    arguments = {
        "base_output_directory": folder,
        "metrics_file": "",
        "per_device_batch_size": BATCH,
        "max_target_length": LENGTH,
        "grain_worker_count": 0,
        "tokenizer_type": "huggingface",
        "enable_data_shuffling": False,
        "eval_interval": -1,
    }
    run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in arguments.items())])

    def make(pipeline: str = "grain parquet", data: str = "messages", **keys: Any) -> Any:
        kind, form = pipeline.split()
        file = str(folder / f"{data}.{form}")
        where = {"dataset_type": kind, "train_data_columns": ["messages"], "use_sft": True}
        where |= {"grain_train_files": file, "grain_file_type": form} if kind == "grain" else {}
        if kind == "hf":  # its training data loses what fills no batch, its evaluation data nothing
            where |= {"hf_path": form, "hf_train_files": file, "hf_eval_files": file, "hf_eval_split": "train"}
            where |= {"eval_interval": 1, "eval_data_columns": keys.get("train_data_columns", ["messages"])}
        keys = {
            "chat_template": TEMPLATE,
            "tokenizer_path": str(folder / "marks of their own"),
            "packing": False,
        } | keys
        return with_keys(run.student, **(where | {"sft_train_on_completion_only": True} | keys))

    return make


def read(config: Any) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Of each conversation its tokens, and which of them are targets, in order."""
    rows = rows_of(config, "train" if config.dataset_type == "grain" else "eval")
    found = []
    for inputs, segments, targets, counts in zip(
        *(rows[name] for name in ("inputs", "inputs_segmentation", "targets", "targets_segmentation")), strict=True
    ):
        assert (targets[:-1] == inputs[1:])[counts[:-1] != 0].all() and not counts[-1]
        for number in np.unique(segments[segments != 0]):
            at = np.flatnonzero(segments == number)
            is_target = [False, *(counts[at[:-1]] != 0).tolist()]
            assert not counts[at[-1]]  # the beginning of the next conversation is nothing to learn
            found.append((tuple(inputs[at].tolist()), tuple(is_target)))
    return sorted(found)


def expected(saids: list[list[tuple[str, str]]], completions: bool = True) -> list[Any]:
    found = []
    for said in saids:
        tokens, answers = plain(said)
        targets = answers if completions else [False, *[True] * (len(tokens) - 1)]
        found.append((tuple(tokens[:LENGTH]), tuple(targets[:LENGTH])))
    return sorted(found)


WAYS = [*itertools.product(["grain parquet", "hf json", "hf parquet"], MARKS, [False, True])]


@pytest.mark.parametrize(("pipeline", "marks", "packing"), few(WAYS[:13], WAYS))
def test_targets_are_the_answers_and_that_they_end_whatever_the_marks_are(
    marks, pipeline, packing, config_of, folder
) -> None:
    keys = {"packing": packing, "tokenizer_path": str(folder / marks)}
    for completions in (True, False):
        config = config_of(pipeline, **keys, sft_train_on_completion_only=completions)
        assert read(config) == expected(SAID, completions)


@pytest.mark.parametrize("pipeline", ["grain parquet", "hf parquet", "hf json"])
@pytest.mark.parametrize("data", ["prompt", "question", "lists"])
def test_columns_that_ask_and_answer_are_conversations_of_one_turn(data, pipeline, config_of) -> None:
    if data == "lists" and pipeline == "hf json":
        return
    columns = {"question": ["question", "answer"]}.get(data, ["prompt", "completion"])
    config = config_of(pipeline, data, train_data_columns=columns)
    assert read(config) == expected([said for said in SAID if len(said) == 2])


def test_a_template_that_rewrites_earlier_answers_has_the_last_as_target(config_of, capsys) -> None:
    """As Qwen3's, which writes what the model has thought in the last answer alone."""
    config = config_of(chat_template=FORGETFUL)
    templates.check(config)
    assert "only the last answer is a target" in capsys.readouterr().out
    found = dict(read(config))
    for said in SAID[:3]:
        tokens, _ = plain([*said[:-1], ("assistant", "z" + said[-1][1])])
        last = len(said[-1][1]) + 2  # with the mark and what the template adds
        assert found[tuple(tokens)] == tuple(at >= len(tokens) - last for at in range(len(tokens)))
    templates.check(config_of())
    assert not capsys.readouterr().out


def test_an_answer_with_which_a_conversation_begins_is_no_target(folder) -> None:
    said = [("assistant", "ab"), ("user", "c"), ("assistant", "de")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "marks of their own", chat_template=TEMPLATE)
    tokens, answers = plain(said)
    prompt, answer = conversations.pieces(tokenizer, messages_of(said))
    assert (prompt.tokens + answer.tokens, answer.is_answer) == (tokens, True)
    assert answer.tokens == tokens[-3:] and answers[-3:] == [True] * 3


def test_an_answer_behind_one_that_the_template_rewrites_is_no_target(folder) -> None:
    said = [("user", "a"), ("assistant", "bc"), ("assistant", "de")]
    messages = messages_of(said)
    read = transformers.AutoTokenizer.from_pretrained
    as_said = conversations.pieces(read(folder / "marks of their own", chat_template=TEMPLATE), messages)
    assert [len(piece.tokens) for piece in as_said if piece.is_answer] == [3, 3]
    rewritten = conversations.pieces(read(folder / "marks of their own", chat_template=FORGETFUL), messages)
    assert not any(piece.is_answer for piece in rewritten)


def test_a_real_tokenizer_reads_a_conversation_as_it_reads_its_text(config_of, tmp_path) -> None:
    """Qwen3's tokens under SmolLM2's roles and in SmolLM2's form: a system prompt that nobody gave, once."""
    assets = f"{upstream.globals.MAXTEXT_PKG_DIR}/assets/tokenizers/qwen3-tokenizer"
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets)
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    system = "You are a helpful assistant."
    answers = [" Seven, I think\u2026 or 8?", "na\u00efve \u65e5\u672c\n\n", "42"]
    said = [("user", f"{'x ' * at}Why?") for at in range(3)]
    turns = [turn for asked, answer in zip(said, answers, strict=True) for turn in (asked, ("assistant", answer))]
    written = f"<|im_start|>system\n{system}<|im_end|>\n"
    tokens, targets = tokenizer.encode(written, add_special_tokens=False), []
    targets = [False] * len(tokens)
    for role, content in turns:
        for text, counts in ((f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>\n", role == "assistant")):
            part = tokenizer.encode(text, add_special_tokens=False)
            tokens += part
            targets += [counts] * len(part)
    template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n" + system + "<|im_end|>\n{% endif %}{% for m in "
        "messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% endif %}"
    )
    write_chats(tmp_path, [turns], "train")
    keys = {"tokenizer_path": str(tmp_path / "tokenizer"), "chat_template": template, "vocab_size": 151936}
    keys |= {"grain_train_files": str(tmp_path / "train.parquet"), "max_target_length": 128}
    assert read(config_of(**keys)) == [(tuple(tokens), tuple(targets))]


def test_a_conversation_without_an_answer_is_an_empty_row(config_of, folder, tmp_path) -> None:
    write_chats(tmp_path, [[("user", "ab")], [("user", "c"), ("assistant", "d")]], "train")
    for packing in (False, True):
        config = config_of(grain_train_files=str(tmp_path / "train.parquet"), packing=packing)
        assert read(config) == expected([[("user", "c"), ("assistant", "d")]])


def test_conversations_whose_answer_lies_beyond_the_row_are_counted_at_the_head(config_of) -> None:
    mesh = upstream.maxtext_utils.get_mesh_from_config(config_of())
    cut, idle = coverage.report(config_of(), mesh)
    lengths = [len(plain(said)[0]) for said in SAID]
    share = 1 - sum(min(length, LENGTH) for length in lengths) / sum(lengths)
    assert f"of {sum(lengths)} tokens in a sample of {len(SAID)} documents {100 * share:.1f} % are never read" in cut
    assert idle.startswith(f"warning: 1 of {len(SAID)} have no target within max_target_length={LENGTH}")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset_type": "tfds"}, "dataset_type=tfds: use_sft=true is read by grain and hf"),
        ({"train_data_columns": ["text"]}, "train_data_columns=['text']: use_sft=true reads conversations from"),
        ({"tokenizer_type": "sentencepiece"}, "tokenizer_type=sentencepiece: use_sft=true needs a chat template"),
        ({"chat_template": ""}, "has no chat template: set chat_template"),
        (
            {"chat_template": "", "chat_template_path": "none.jinja"},
            "chat_template_path='none.jinja': holds no template",
        ),
        ({"chat_template": "{{ messages | length }}"}, "it writes a question otherwise once it is answered"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "no conversation can be read with this chat template (no)"),
    ],
)
def test_conversations_that_cannot_be_read_are_refused_by_the_key(keys, message, config_of) -> None:
    with pytest.raises(ConfigError) as refused:
        templates.check(config_of(**keys))
    assert message in str(refused.value)


def test_a_template_without_an_end_is_warned_of(config_of, capsys) -> None:
    templates.check(config_of(chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"))
    assert "nothing teaches the student to stop" in capsys.readouterr().out


def test_a_template_is_read_from_where_the_run_is_started(config_of, tmp_path, monkeypatch) -> None:
    (tmp_path / "of_mine.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    for pipeline in ("grain parquet", "hf parquet"):
        config = config_of(pipeline, chat_template="", chat_template_path="of_mine.jinja")
        assert read(config) == expected(SAID)


def test_another_template_has_another_identity_and_the_same_one_its_own_wherever_it_is_written(
    config_of, tmp_path
) -> None:
    (tmp_path / "of_mine.jinja").write_text(TEMPLATE)
    named = templates.identity(config_of())
    assert templates.identity(config_of(chat_template="", chat_template_path=str(tmp_path / "of_mine.jinja"))) == named
    assert templates.identity(config_of(chat_template=FORGETFUL)) != named
    assert templates.identity(config_of(use_sft=False)) == ""
