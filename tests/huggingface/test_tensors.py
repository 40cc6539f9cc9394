"""Laws of stored tensors: what transformers would load is what is converted, and what nothing is made of is named."""

import json
import pathlib

import numpy as np
import pytest
import transformers
from golden import make as golden
from safetensors.numpy import load_file, save_file

from MaxText.config.keys import ConfigError
from MaxText.huggingface import tensors, weights

TIED = transformers.LlamaConfig(tie_word_embeddings=True)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Numbers = dict[str, np.ndarray]


def numbers(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).normal(size=(6, 4)).astype(np.float32)


def stored(folder: pathlib.Path, found: Numbers) -> dict[str, tensors.Tensor]:
    save_file(found, folder / "model.safetensors")
    return tensors.stored_tensors(folder)


def indexed(folder: pathlib.Path) -> Numbers:
    """A model in two files, with an index -> its tensors."""
    return golden.write("llama3", folder, files=2)


# Files ----------------------------------------------------------------------------------------------------------------


def test_two_models_in_one_folder_are_one_if_they_are_the_same(tmp_path):
    """In float32 here and bfloat16 there: the numbers count."""
    written = indexed(tmp_path)
    save_file({name: value.astype(np.float32) for name, value in written.items()}, tmp_path / "model.safetensors")
    assert tensors.stored_tensors(tmp_path).keys() == written.keys()


@pytest.mark.parametrize("change", ["a number", "a tensor less", "a tensor more"])
def test_a_whole_model_beside_the_index_of_another_is_refused_by_both_names(change, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SLAB", 100)
    written = indexed(tmp_path)
    if change == "a number":
        written[HEAD][-1, -1] += 1
    if change == "a tensor less":
        del written[HEAD]
    if change == "a tensor more":
        written["another"] = numbers("another")
    save_file(written, tmp_path / "model.safetensors")
    differs = "another" if change == "a tensor more" else HEAD
    words = rf"model.safetensors and .*index.json: two models, which are not the same \({differs} for one"
    with pytest.raises(ConfigError, match=words):
        tensors.stored_tensors(tmp_path)


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    indexed(tmp_path)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    right = load_file(tmp_path / where[HEAD])[HEAD]
    for other in set(where.values()) - {where[HEAD]}:
        save_file(load_file(tmp_path / other) | {HEAD: right + 1}, tmp_path / other)
    np.testing.assert_array_equal(tensors.stored_tensors(tmp_path)[HEAD].read(), right.astype(np.float32))


def test_a_tensor_in_another_file_than_the_index_names_is_not_there(tmp_path):
    indexed(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    (other,) = set(held["weight_map"].values()) - {held["weight_map"][HEAD]}
    held["weight_map"][HEAD] = other
    index.write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=rf"index.json: names tensors that are not there: {HEAD}"):
        tensors.stored_tensors(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": ["model.safetensors"]}', '{"weight_map": null}'])
def test_an_index_of_another_form_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=r"model.safetensors.index.json: cannot be read"):
        tensors.stored_tensors(tmp_path)


# The head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(TABLE,), (TABLE, HEAD), (HEAD,)], ids=" and ".join)
def test_a_tied_model_is_its_table_by_whichever_name_it_is_stored(names, tmp_path):
    table = numbers("table")
    config, kept = tensors.with_its_head(TIED, stored(tmp_path, dict.fromkeys(names, table)))
    assert config.tie_word_embeddings and kept.keys() == {TABLE} and tensors.unused(kept, kept.values()) == []
    np.testing.assert_array_equal(kept[TABLE].read(), table)


def test_a_head_that_is_another_matrix_than_the_table_is_kept_whatever_config_json_says(tmp_path):
    both = stored(tmp_path, {TABLE: numbers("table"), HEAD: numbers("head")})
    config, kept = tensors.with_its_head(TIED, both)
    assert (config.tie_word_embeddings, kept) == (False, both)
    assert TIED.tie_word_embeddings  # and is left as it was


def test_a_head_that_config_json_leaves_alone_is_the_models_even_if_it_is_the_table(tmp_path):
    untied = transformers.LlamaConfig(tie_word_embeddings=False)
    both = stored(tmp_path, {TABLE: numbers("table"), HEAD: numbers("table")})
    assert tensors.with_its_head(untied, both) == (untied, both)


# What is left ---------------------------------------------------------------------------------------------------------


def test_what_nothing_is_made_of_is_named(tmp_path):
    used, bias, surplus = (f"model.layers.{end}" for end in ("0.mlp.weight", "0.mlp.bias", "1.mlp.weight"))
    angles = "model.layers.0.self_attn.rotary_emb.inv_freq"  # early models store what follows from config.json
    found = stored(tmp_path, {name: numbers(name) for name in (used, bias, surplus, angles)})
    assert tensors.unused(found, [found[used]]) == [bias, surplus]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_the_language_model_alone_has_to_be_used(prefix, tmp_path):
    names = [f"{prefix}norm.weight", f"{prefix}bias", "model.vision_tower.patch", "multi_modal_projector.weight"]
    found = stored(tmp_path, {name: numbers(name) for name in names})
    assert tensors.unused(found, [found[names[0]]]) == [names[1]]


def test_an_array_that_no_tensor_stands_for_is_refused_by_its_name():
    tables = weights.Tables(names={"params-a": "a", ("params-b", "params-c"): ["b"]}, hooks={}, shapes={})
    with pytest.raises(ConfigError, match=r"^params-d: Hugging Face's model of this kind has no such tensor"):
        tables.parameters({"params-a", "params-b", "params-d"})
