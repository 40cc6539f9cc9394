"""Texts whose tokens are letters, in every format that a pipeline reads: what must be counted follows from the text."""

import json
import pathlib
import random
from collections.abc import Iterable

import pyarrow
import pyarrow.parquet
import tokenizers
import transformers
from array_record.python import array_record_module
from maxtext.input_pipeline.protos import example_pb2

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts_of(count: int, seed: int, longest: int = 50) -> list[str]:
    """Words of 4 letters and more."""
    generator = random.Random(seed)
    return ["".join(generator.choices(LETTERS, k=generator.randint(4, longest))) for _ in range(count)]


def save_letters(folder: pathlib.Path) -> None:
    """A tokenizer of Hugging Face's kind with a token for each purpose but the beginning of a text."""
    save_tokenizer(folder, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def save_tokenizer(folder: pathlib.Path, special: Iterable[str] = ("<pad>", "<unk>", "<eos>"), **roles: str) -> str:
    """A Hugging Face tokenizer: the special tokens, then the letters; roles as pad_token="<pad>". Returns its path."""
    vocabulary = {token: number for number, token in enumerate([*special, *LETTERS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=roles.get("unk_token")))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **roles).save_pretrained(folder)
    return str(folder)


def write_array_record(path: pathlib.Path, texts: list[str]) -> str:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        example = example_pb2.Example()
        example.features.feature["text"].bytes_list.value.append(text.encode())
        writer.write(example.SerializeToString())
    writer.close()
    return str(path)


def write_parquet(path: pathlib.Path, texts: list[str | None]) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return str(path)


def write_json(path: pathlib.Path, texts: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_tfds(folder: pathlib.Path, splits: dict[str, list[str]]) -> None:
    """The data set `letters:1.0.0` below the folder."""
    import tensorflow_datasets as tfds

    place = folder / "letters/1.0.0"
    place.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="letters", version="1.0.0", data_dir=str(place), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))
    writer = tfds.core.SequentialWriter(ds_info=info, max_examples_per_shard=1000)
    writer.initialize_splits(list(splits))
    for split, texts in splits.items():
        writer.add_examples({split: [{"text": text} for text in texts]})
    writer.close_all()
