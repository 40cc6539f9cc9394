"""Laws of config.json: what transformers reads of it is what MaxText is told, and nothing of it is lost unsaid."""

from typing import Any

import pytest
import transformers
from golden import make as golden

from MaxText.config.keys import ConfigError
from MaxText.huggingface.architecture import architecture

Values = dict[str, Any]


def read(name: str, **changed: Any) -> transformers.PreTrainedConfig:
    """The golden model's configuration with other values; None removes one."""
    values = golden.read(name)[0] | changed
    return transformers.AutoConfig.for_model(**{key: value for key, value in values.items() if value is not None})


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
