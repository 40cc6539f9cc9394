"""A tokenizer whose tokens are letters, so that what must be counted follows from the text alone."""

import pathlib

import tokenizers
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_letters(folder: pathlib.Path) -> None:
    """A Hugging Face tokenizer whose tokens are letters."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<unk>", "<eos>", *LETTERS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
