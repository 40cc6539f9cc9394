"""MaxText's input pipelines, mended: what they do to text without a word.

- Files are read in the order of their names; upstream's is the file system's.
- Padding is told by its position (rows.py); upstream takes every token with the id of padding for padding.
- A conversation is written by its template and tokenised, whole; upstream's does both turn by turn (conversations.py).
- The beginning of a conversation is no target of the one before it in a packed row.
- A mark that the tokenizer lacks is not written; upstream writes -1 for one that SentencePiece lacks.
- Evaluation data is read whole (evaluation.py).

Left out on purpose: what cannot be told by position, of which a run is warned: `taken_for_padding`.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from MaxText import upstream
from MaxText.data import conversations, evaluation, rows, templates, tokens


@contextlib.contextmanager
def mended(config: Any, *, each_row_once: bool = False) -> Iterator[None]:
    """Around what opens a run's data.

    Args:
      config: MaxText's configuration of the run.
      each_row_once: the data for training is read as evaluation data is, to its last row, and all hosts to the end.
    """
    by_position = not tells_padding_by_id(config)
    # All that is called is taken, and so imported, before any of it is replaced.
    find_data_files = upstream.grain_data_processing.find_data_files
    get_tokenizer_and_pad_id = upstream.data_processing_utils.get_tokenizer_and_pad_id
    get_pad_id = upstream.hf_data_processing._get_pad_id

    def files_in_order(*arguments: Any, **keys: Any) -> list[str]:
        return sorted(find_data_files(*arguments, **keys))

    def grain_tokenizer(settings: Any, **marks: Any) -> tuple[Any, int]:
        marks = {"add_bos": False, "add_eos": False} if settings.use_sft else marks
        tokenizer, pad_id = get_tokenizer_and_pad_id(settings, **marks)
        write_no_mark_it_lacks(tokenizer)
        if getattr(tokenizer, "bos_id", None) is None:  # concatenation asks for one where the attribute is there
            vars(tokenizer).pop("bos_id", None)
        return tokenizer, rows.PAD if by_position else pad_id

    def hf_padding(tokenizer: Any) -> int:
        return rows.PAD if by_position else get_pad_id(tokenizer)

    are_conversations = templates.reads_conversations(config)
    next_tokens = functools.partial(rows.NextTokens, vocab_size=config.vocab_size, within=are_conversations)
    with (
        mock.patch.object(upstream.grain_data_processing, "find_data_files", files_in_order),
        mock.patch.object(upstream.data_processing_utils, "get_tokenizer_and_pad_id", grain_tokenizer),
        mock.patch.object(upstream.hf_data_processing, "_get_pad_id", hf_padding),
        mock.patch.object(upstream.input_pipeline_utils, "ShiftData", next_tokens),
        mended_tfds(by_position) if config.dataset_type == "tfds" else contextlib.nullcontext(),
        whole_conversations(templates.named(config)) if are_conversations else contextlib.nullcontext(),
        evaluation.read_whole(training=each_row_once),
    ):
        yield


@contextlib.contextmanager
def mended_tfds(by_position: bool) -> Iterator[None]:
    """Of `mended` the part of tfds, whose module imports TensorFlow."""
    get_tokenizer = upstream.input_pipeline_utils.get_tokenizer
    preprocessing_pipeline = upstream.tfds_data_processing.preprocessing_pipeline

    def tokenizer_without_padding(*arguments: Any) -> Any:
        tokenizer = get_tokenizer(*arguments)
        write_no_mark_it_lacks(tokenizer)
        if by_position:
            tokenizer.pad_id = rows.PAD
        return tokenizer

    def filled_pipeline(*arguments: Any, **keys: Any) -> Any:
        return preprocessing_pipeline(*arguments, **keys).map(rows.without_padding_id)

    with (
        mock.patch.object(upstream.input_pipeline_utils, "get_tokenizer", tokenizer_without_padding),
        mock.patch.object(upstream.input_pipeline_utils, "add_segmentation_and_position", rows.with_segments),
        mock.patch.object(upstream.tfds_data_processing, "preprocessing_pipeline", filled_pipeline),
    ):
        yield


@contextlib.contextmanager
def whole_conversations(template: str) -> Iterator[None]:
    """Of `mended` the part of conversations, with the template that is named; "" for the tokenizer's."""
    configure = upstream.data_processing_utils.validate_and_configure_sft_columns
    convert = upstream.instruction_data_processing.convert_to_conversational_format

    def configure_as_named(columns: Any, tokenizer: Any, _: Any = None) -> None:
        configure(columns, tokenizer, template)

    def convert_columns(dataset: Any, data_columns: list[str], **formatting: Any) -> tuple[Any, list[str]]:
        if formatting["formatting_func_path"]:
            return convert(dataset=dataset, data_columns=data_columns, **formatting)
        if data_columns == ["messages"]:
            return dataset._resolve_features(), data_columns  # upstream looks at them; lines of JSON name none
        import datasets

        text = datasets.Value("string")
        features = datasets.Features({"messages": [{"content": text, "role": text}]})
        how = {"fn_kwargs": {"columns": data_columns}, "remove_columns": data_columns}
        return dataset.map(conversations.as_messages, **how, features=features), ["messages"]

    processing, utils = upstream.data_processing_utils, upstream.input_pipeline_utils
    grain_module = upstream.grain_data_processing
    with (
        mock.patch.object(processing, "validate_and_configure_sft_columns", configure_as_named),
        mock.patch.object(upstream.instruction_data_processing, "convert_to_conversational_format", convert_columns),
        mock.patch.object(utils, "apply_chat_template", conversations.as_pieces),
        mock.patch.object(utils, "tokenization", conversations.already_tokens),
        mock.patch.object(grain_module, "_format_chat_template_grain", conversations.columns_as_pieces),
        mock.patch.object(grain_module, "_tokenize_sft_chunks", conversations.already_tokens),
    ):
        yield


def write_no_mark_it_lacks(tokenizer: Any) -> None:
    """A SentencePiece model without a mark has -1 for its id, which upstream writes into the text."""
    for mark in ("bos", "eos"):
        if getattr(tokenizer, f"{mark}_id", None) == -1:
            setattr(tokenizer, f"add_{mark}", False)


def tells_padding_by_id(config: Any) -> bool:
    """Whether a pipeline has nothing to tell padding by but its id, or is made where nothing can be mended."""
    if config.dataset_type in ("synthetic", "olmo_grain"):  # which have no padding
        return False
    given = not config.tokenize_train_data or (config.eval_interval > 0 and not config.tokenize_eval_data)
    other = config.use_dpo or config.use_multimodal or config.training_objective != "causal_lm"
    megatron = config.dataset_type == "grain" and config.grain_file_type == "mmap"
    return given or other or megatron or config.dataset_type == "c4_mlperf" or config.colocated_python_data_input


def taken_for_padding(config: Any) -> str:
    """A warning that names the token of the data that is taken for padding, where that cannot be helped; or ""."""
    if not tells_padding_by_id(config):
        return ""
    if config.dataset_type == "grain" and config.grain_file_type == "mmap":
        if config.eod_mask_loss:
            return ""
        key = f"mmap_eod_id={config.mmap_eod_id}"
        return f"{key}: grain_file_type=mmap takes it for padding, so it is never a target; mmap_npy does not"
    kind, loaded = tokens.of_run(config)
    if loaded is None:
        return ""
    pad, *others = (getattr(loaded, f"{role}_id", None) for role in ("pad", "unk", "bos", "eos"))
    if pad is None:
        taken = others[0] if others[0] is not None or config.dataset_type != "grain" else 0
    else:
        taken = pad if pad in others else None
    if taken is None or taken < 0:
        return ""
    return (
        f"tokenizer_path={config.tokenizer_path!r} has no pad token of its own: token {taken} "
        f"({tokens.SPELLED[kind](loaded).get(taken)!r}) is taken for padding, so it is never a target (padding is told "
        "by its position in text alone that is tokenised here)"
    )
