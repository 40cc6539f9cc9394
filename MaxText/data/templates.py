"""The chat template of a run that learns from conversations: which one, and whether answers can be found in it."""

import hashlib
import os
from typing import Any

import jinja2

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.console import first_line, say
from MaxText.data import conversations, tokens


def reads_conversations(config: Any) -> bool:
    """Whether a run's data are conversations of text, which are read here and not by MaxText (pipelines.py)."""
    return config.use_sft and not config.use_multimodal and config.dataset_type in ("grain", "hf")


def named(config: Any) -> str:
    """The template that a run's settings name; "" for the tokenizer's own.

    A path is taken from where the run is started, or else, as MaxText has it, from where its package lies.

    Raises:
      ConfigError: there is none at chat_template_path.
    """
    path = config.chat_template_path
    if config.chat_template or not path:
        return config.chat_template
    load = upstream.instruction_data_processing.load_chat_template_from_file
    found = load(os.path.abspath(os.path.expanduser(path))) or load(path)
    if not found:
        raise ConfigError(
            f"chat_template_path={path!r}: holds no template; a file of Jinja (.jinja, .j2, .txt) is expected, or "
            ".json with the key chat_template"
        )
    return found


def identity(config: Any) -> str:
    """A hash of the template that writes a run's conversations; "" where none does."""
    if not reads_conversations(config):
        return ""
    template = named(config)
    if not template and (loaded := tokens.of_run(config)[1]) is not None:
        template = loaded.tokenizer.chat_template
    return hashlib.sha256(repr(template).encode()).hexdigest()[:32]


def check(config: Any) -> None:
    """Says what a run's template does to conversations that their reader would not expect.

    Raises:
      ConfigError: conversations cannot be read with these settings.
    """
    if config.use_sft and config.dataset_type in ("tfds", "c4_mlperf", "olmo_grain"):
        kind = config.dataset_type.value
        raise ConfigError(f"dataset_type={kind}: use_sft=true is read by grain and hf; {kind} takes it for plain text")
    if not reads_conversations(config):
        return
    for key in ("train_data_columns", *(("eval_data_columns",) if config.eval_interval > 0 else ())):
        columns = list(getattr(config, key))
        if not config.formatting_func_path and set(columns) not in map(set, conversations.COLUMNS):
            allowed = " or ".join(str(list(names)) for names in conversations.COLUMNS)
            raise ConfigError(f"{key}={columns}: use_sft=true reads conversations from {allowed}")
    where = f"tokenizer_path={config.tokenizer_path!r}"
    kind, loaded = tokens.of_run(config)
    if kind != "huggingface":
        raise ConfigError(f"tokenizer_type={kind}: use_sft=true needs a chat template; allowed is huggingface")
    if loaded is None:  # the pipeline says so, after what it finds wrong with the data
        return
    tokenizer = loaded.tokenizer
    if template := named(config):
        where, tokenizer.chat_template = "the chat template that is named", template
    if not tokenizer.chat_template:
        raise ConfigError(f"{where} has no chat template: set chat_template (Jinja) or chat_template_path")
    if not tokenizer.is_fast:
        raise ConfigError(f"{where} does not tell where its tokens lie in a text: take one with a tokenizer.json")
    try:
        writes_otherwise = conversations.earlier_answers_are_lost(tokenizer)
        is_ended = conversations.answers_end_in_a_mark(tokenizer)
    except (ValueError, jinja2.TemplateError) as error:
        raise ConfigError(
            f"{where}: no conversation can be read with this chat template ({first_line(error)})"
        ) from None
    if writes_otherwise:
        say(
            f"warning: {where}: its chat template writes an answer otherwise once another turn follows: of a "
            "conversation of several turns only the last answer is a target; set chat_template to one that does not"
        )
    if not is_ended:
        say(f"warning: {where}: its chat template ends no answer in a mark: nothing teaches the student to stop")
