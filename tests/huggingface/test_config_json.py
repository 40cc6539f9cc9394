"""Laws of config.json: what transformers reads of it is what MaxText is told, and nothing of it is lost unsaid."""

import copy
import functools
import json
from typing import Any

import pytest
import transformers
from golden import make as golden

from MaxText.config.keys import ConfigError
from MaxText.huggingface import presets, shapes
from MaxText.huggingface.architecture import architecture, configuration, spelled
from MaxText.huggingface.families import family_of

Values = dict[str, Any]


def read(name: str, **changed: Any) -> transformers.PreTrainedConfig:
    """The golden model's configuration with other values; None removes one."""
    removed = {key for key, value in changed.items() if value is None}
    values = golden.read(name)[0] | changed
    return transformers.AutoConfig.for_model(**{key: values[key] for key in values.keys() - removed})


def published(**scaling: Any) -> Values:
    """Llama 3.1's rotary positions in the words of transformers 4, as they are published."""
    of_all = {name: value for name, value in golden.LLAMA31.items() if name not in ("rope_theta", "rope_type")}
    return {"rope_parameters": None, "rope_theta": golden.LLAMA31["rope_theta"], "rope_scaling": of_all | scaling}


# Into MaxText ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("rope_type",), ("type",), ("type", "rope_type")], ids=" and ".join)
def test_a_scaling_is_the_same_by_its_old_name_its_new_one_and_both(names):
    found = architecture(read("llama3.1", **published(**dict.fromkeys(names, "llama3"))))
    assert found == architecture(read("llama3.1"))
    assert found["rope_type"] == "llama3.1"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama3.1", published(type="linear", rope_type="llama3")),
        ("gemma3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}}),
    ],
    ids=["llama", "gemma"],
)
def test_a_scaling_whose_two_names_differ_is_refused(name, changed):
    """Of the second transformers 5 reads rope_type as default, and 4 as linear."""
    with pytest.raises(ConfigError, match=r"type='linear' beside rope_type='(llama3|default)'"):
        architecture(read(name, **changed))


def test_a_factor_without_a_kind_of_scaling_scales_nothing():
    positions = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    plain = architecture(read("gemma3", rope_parameters=None, **positions))
    assert architecture(read("gemma3", rope_parameters=None, rope_scaling={"factor": 8.0}, **positions)) == plain
    assert architecture(read("gemma3")) == plain | {"rope_linear_scaling_factor": 8.0}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama3", {"rope_parameters": None, "rope_theta": 26583.5}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 26583.5}}),
        ("deepseek3", {"rope_parameters": {"rope_type": "default", "rope_theta": 26583.5}}),
        ("gemma3", {"rope_parameters": None, "rope_theta": 26583.5, "rope_local_base_freq": 1e4}),
        ("gemma3", {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 26583.5}),
    ],
    ids=["llama", "qwen", "deepseek", "gemma's global layers", "gemma's local layers"],
)
def test_a_base_of_rotary_positions_that_maxtext_would_round_is_refused(name, changed):
    with pytest.raises(ConfigError, match=r"rope_theta=26583\.5: MaxText's timescales .* whole numbers"):
        architecture(read(name, **changed))


# Out of MaxText -------------------------------------------------------------------------------------------------------

PLAIN = {"rope_scaling": None}
# By which names transformers 4 reads what 5 calls otherwise, as its 4.55 documents its configurations.
OLDER: dict[str, Values] = {
    "llama3": PLAIN | {"rope_theta": 500000.0},
    "llama3.1": {"rope_theta": 500000.0}
    | {"rope_scaling": {name: value for name, value in golden.LLAMA31.items() if name != "rope_theta"}},
    "llama3.2": {"rope_theta": 500000.0}
    | {"rope_scaling": {name: value for name, value in golden.LLAMA32.items() if name != "rope_theta"}},
    "mistral": PLAIN | {"rope_theta": 1000000.0},
    "mixtral": PLAIN | {"rope_theta": 1000000.0, "num_local_experts": 4},
    "qwen2": PLAIN | {"rope_theta": 1000000.0, "use_sliding_window": False},
    "qwen3": PLAIN | {"rope_theta": 1000000.0, "use_sliding_window": False},
    "qwen3_moe": PLAIN | {"rope_theta": 1000000.0, "num_experts": 4},
    "deepseek2": {
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 24.0, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.9}
        | {"mscale_all_dim": 0.9, "original_max_position_embeddings": 64},
    },
    "deepseek3": PLAIN | {"rope_theta": 50000.0, "n_routed_experts": 8},
    "gemma2": PLAIN | {"rope_theta": 10000.0},
    "gemma3": {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@functools.cache
def exported(name: str) -> transformers.PreTrainedConfig:
    """What an export of the golden model would write, by way of MaxText's configuration."""
    preset = next(iter(presets.candidates(read(name))))
    return configuration(shapes.maxtext_config(preset, presets.choose(read(name), preset)[1], True))


@pytest.mark.e2e  # for the engine that it imports
@pytest.mark.parametrize("name", OLDER)
def test_a_configuration_comes_back_from_maxtexts_keys(name):
    assert architecture(exported(name)) == architecture(read(name))


@pytest.mark.e2e  # for the engine that it imports
@pytest.mark.parametrize("name", OLDER)
def test_config_json_says_the_same_to_both_spellings_and_leaves_no_default_to_a_release(name, tmp_path):
    made = copy.deepcopy(exported(name))
    made.dtype = "bfloat16"
    written = spelled(made)
    old = OLDER[name] | {"torch_dtype": "bfloat16"}
    assert {key: written[key] for key in old} == old
    types = {key: type(value) for key, value in (written["rope_scaling"] or {}).items()}  # 4 warns of whole numbers
    assert types == {key: type(value) for key, value in (old["rope_scaling"] or {}).items()}
    family = family_of(made)
    of_the_model = {*family.keys.values(), *family.built_in, "max_position_embeddings", "model_type", "architectures"}
    assert of_the_model <= written.keys()
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == made.to_dict() | {"_name_or_path": ""}
