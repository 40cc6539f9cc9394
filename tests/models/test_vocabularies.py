"""Laws of a vocabulary shared in part: padding changes nothing, and another tokenizer is refused."""

import types

import jax
import lab as lab_lib
import maxtext
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.models import vocabularies

pytestmark = pytest.mark.e2e

TRUNCATION = {"kd_top_k": 8, "kd_truncation_strategy": "other_bucket", "kd_temperature": 2}


@pytest.fixture(scope="module")
def padded_teacher(teacher, tmp_path_factory):
    """padded_teacher(tokens): the teacher with so many rows per token; those it did not have before are loud noise."""

    def made(tokens):
        path = tmp_path_factory.mktemp("padded")
        params = ocp.load(f"{teacher}/5", checkpointable_name="items")["params"]
        table = params["params"]
        noise = np.random.default_rng(0).normal(0, 30, (max(tokens, 256), 64)).astype(np.float32)

        def fit(rows):
            return np.concatenate([np.asarray(rows), noise[len(rows) :]])[:tokens]

        table["token_embedder"]["embedding"] = fit(table["token_embedder"]["embedding"])
        table["decoder"]["logits_dense"]["kernel"] = fit(np.asarray(table["decoder"]["logits_dense"]["kernel"]).T).T
        upstream.checkpointing.save_params_to_path(str(path / "params_only"), params)
        return str(path / "params_only/items")

    return made


def sums_and_gradient(lab, batch):
    (_, sums), gradient = lab.sums_and_gradient(batch)
    return jax.device_get((sums, nnx.to_pure_dict(gradient)))


@pytest.mark.parametrize("tokens", (300, pytest.param(240, marks=pytest.mark.slow)))
def test_padding_of_the_teachers_vocabulary_changes_nothing(tmp_path, teacher, padded_teacher, tokens):
    keys = TRUNCATION | {"kd_vocab_size": 240}
    batch = lab_lib.padded_batch(vocabulary=240)
    expected = sums_and_gradient(lab_lib.make(tmp_path, teacher, **keys), batch)
    got = sums_and_gradient(lab_lib.make(tmp_path, padded_teacher(tokens), **keys), batch)
    assert float(expected[0]["kd_sum"]) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, expected)


def test_distillation_sees_nothing_of_the_tokens_that_are_not_shared(tmp_path, teacher):
    lab = lab_lib.make(tmp_path, teacher, kd_alpha=1, kd_vocab_size=240)
    _, gradient = sums_and_gradient(lab, lab_lib.padded_batch(vocabulary=240))
    columns = np.abs(gradient["decoder"]["logits_dense"]["kernel"]).max(axis=0)
    assert np.all(columns[240:] == 0) and np.all(columns[:240] > 0)


@pytest.mark.slow
def test_a_student_of_another_padding_that_knows_what_its_teacher_knows_has_nothing_to_learn(tmp_path, padded_teacher):
    keys = TRUNCATION | {"kd_vocab_size": 240, "vocab_size": 240, "override_model_config": "true"}
    lab = lab_lib.make(tmp_path, padded_teacher(300), **keys, load_parameters_path=padded_teacher(240))
    sums, _ = sums_and_gradient(lab, lab_lib.padded_batch(vocabulary=240))
    assert abs(float(sums["kd_sum"] / sums["n"])) < 1e-5 < float(sums["ce_sum"] / sums["n"])


TOKENIZERS = f"{maxtext.__path__[0]}/assets/tokenizers"


def compare(kind, teachers, students, shared=0):
    config = types.SimpleNamespace(tokenizer_path=f"{TOKENIZERS}/{students}", tokenizer_type=kind, hf_access_token="")
    kd = types.SimpleNamespace(kd_teacher_tokenizer_path=f"{TOKENIZERS}/{teachers}", kd_vocab_size=shared)
    vocabularies.check_same_tokens(config, kd)


@pytest.mark.parametrize(
    ("kind", "path"),
    (
        ("sentencepiece", "tokenizer.llama2"),
        ("tiktoken", "tokenizer_llama3.tiktoken"),
        ("huggingface", "qwen3-tokenizer"),
    ),
)
def test_a_tokenizer_is_its_own_equal(kind, path):
    compare(kind, path, path)


def test_the_first_ids_that_differ_are_named():
    # Mistral's third tokenizer puts its control tokens before the pieces of the first.
    with pytest.raises(ConfigError) as refused:
        compare("sentencepiece", "tokenizer.mistral-v3", "tokenizer.mistral-v1")
    message = str(refused.value)
    assert "id 3 is '[INST]' to the teacher, '<0x00>' to the student" in message
    assert "kd_vocab_size=3 would" in message
    compare("sentencepiece", "tokenizer.mistral-v3", "tokenizer.mistral-v1", shared=3)
