"""Laws of conversion: a teacher from Hugging Face computes what transformers computes, a student goes back bit for bit.

Models are tiny and made here; what transformers computes with them is in tests/golden, since tests have no torch.
"""

import json
import math
import os
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any

import absl.logging
import convert_teacher
import export_student
import jax
import numpy as np
import pytest
import transformers
from conftest import EXPERTS, SMOKE, execute, few
from flax import nnx
from flax.core.spmd import logical_axis_rules
from golden import make as golden
from orbax.checkpoint.experimental import v1 as ocp
from safetensors.numpy import load_file, save_file

from MaxText import upstream
from MaxText.checkpoints import writing
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher
from MaxText.console import RunError
from MaxText.huggingface import presets, shapes
from MaxText.huggingface.architecture import architecture, configuration
from MaxText.huggingface.families import GROUPS
from MaxText.loop import step
from MaxText.models import heads
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

PRESETS = {
    "llama3": "llama3-8b",
    "llama3.1": "llama3.1-8b",
    "llama3.2": "llama3.2-1b",
    "llama3.2_bands": "llama3.2-1b",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "qwen2": "qwen2.5-7b",
    "qwen3": "qwen3-0.6b",
    "qwen3_moe": "qwen3-30b-a3b",
    "deepseek2": "deepseek2-16b",
    "deepseek3": "deepseek3-671b",
    "gemma2": "gemma2-2b",
    "gemma3": "gemma3-4b",
}
DEFAULT = ("llama3",)
FAMILIES = few(DEFAULT, PRESETS)
VOCABULARY = golden.SMALL["vocab_size"]

Record = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


def model(name: str, folder: pathlib.Path) -> pathlib.Path:
    golden.write(name, folder)
    return folder


def convert(source: pathlib.Path, output: pathlib.Path, preset: str, *options: str) -> Record:
    convert_teacher.main(["--hf", str(source), "--output", str(output), "--model-name", preset, *options])
    return json.loads((output / "conversion.json").read_text())


@pytest.fixture(scope="module")
def teachers(base):
    """name -> the folder of the converted teacher, made once."""

    def folder(name: str) -> pathlib.Path:
        if not (base / name / "0").exists():
            convert(model(name, base / f"{name}_hf"), base / name, PRESETS[name.removesuffix("_odd")])
        return base / name

    return folder


def arrays(folder: pathlib.Path) -> Any:
    return ocp.load(folder / "0", checkpointable_name="items")["params"]["params"]


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    return nnx.traversals.flatten_mapping(tree)


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def keys(record: Record) -> dict[str, Any]:
    """What the command line says of the teacher, as convert_teacher prints it."""
    changed = {**record["overrides"], "sparse_matmul": False, "megablox": False}  # experts' kernels are a TPU's
    listed = ", ".join(f"{key}: {json.dumps(value)}" for key, value in changed.items())
    return {"kd_teacher_model_name": record["model_name"], "kd_teacher_overrides": f"{{{listed}}}"}


def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """What the train step would compute with the teacher in `folder`: restored by name, its head applied to blocks."""
    rows, length = tokens.shape
    given = {"use_kd": "true", "kd_teacher_parameters_path": folder / "0/items", "vocab_size": VOCABULARY}
    given |= {"override_model_config": "true", "per_device_batch_size": rows, "max_target_length": length}
    given |= {"base_output_directory": folder, "metrics_file": "", "enable_checkpointing": "false"}
    given |= keys(json.loads((folder / "conversion.json").read_text()))
    run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in given.items())])
    checkpoint = teacher_lib.find_checkpoint(run.kd.kd_teacher_parameters_path)
    config = resolve_teacher(run, checkpoint.scan_layers)
    mesh = jax.sharding.Mesh(upstream.maxtext_utils.create_device_mesh(config), config.mesh_axes)
    teacher = teacher_lib.load(config, checkpoint, mesh, run.kd.kd_teacher_dtype, run.kd.kd_vocab_size)
    batch = {}
    for side in ("inputs", "targets"):
        batch[side], batch[f"{side}_segmentation"] = tokens.astype(np.int32), np.ones_like(tokens, np.int32)
        batch[f"{side}_position"] = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))

    def projected(state):
        restored = nnx.merge(teacher.graphdef, state, copy=True)
        reported = step.forward(restored, config, batch, enable_dropout=False)
        hidden = heads.normed_hidden_states(restored, reported, enable_dropout=False)
        return heads.project(*heads.head_of(restored), hidden)

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        return np.asarray(jax.jit(projected)(teacher.state))


# Into MaxText ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_teacher_has_the_logits_of_transformers(name, teachers):
    expected = np.load(golden.HERE / f"{name}.npz")
    assert np.std(expected["logits"]) > 0.5
    np.testing.assert_allclose(logits(teachers(name), expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_layers_stored_one_by_one_are_the_same_teacher(name, tmp_path):
    record = convert(model(name, tmp_path / "hf"), tmp_path / "mt", PRESETS[name], "--unscanned")
    assert record["model_name"] == PRESETS[name]
    assert not teacher_lib.find_checkpoint(str(tmp_path / "mt")).scan_layers
    expected = np.load(golden.HERE / f"{name}.npz")
    np.testing.assert_allclose(logits(tmp_path / "mt", expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_gemmas_table_is_exact_and_maxtexts_head_rounds_it_to_bfloat16(teachers):
    """Where sqrt(width) is no power of two. Should the head stop rounding, the bound below will say so."""
    folder = teachers("gemma3_odd")
    table = golden.weight("model.embed_tokens.weight", (VOCABULARY, 48), True).astype(np.float32)
    np.testing.assert_array_equal(arrays(folder)["token_embedder"]["embedding"], table * np.float32(math.sqrt(48)))
    expected = np.load(golden.HERE / "gemma3_odd.npz")
    found = logits(folder, expected["tokens"])
    assert 1e-3 < np.max(np.abs(found - expected["logits"])) < 2e-2
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (expected["logits"], found))
    assert np.max(np.sum(np.exp(p) * (p - q), -1)) < 2e-5


def test_several_files_and_several_writes_are_the_same_checkpoint(base, teachers, monkeypatch):
    golden.write("llama3", base / "files_hf", files=3)
    monkeypatch.setattr(writing, "BATCH", 20_000)
    monkeypatch.setattr(writing, "CHUNK", 4096)
    convert(base / "files_hf", base / "files", PRESETS["llama3"])
    assert_equal(arrays(base / "files"), arrays(teachers("llama3")))
    index = ocp.metadata(base / "files/0", checkpointable_name="items").metadata
    chunks = [
        leaf.storage_metadata.chunk_shape for leaf in jax.tree.leaves(index, is_leaf=lambda x: hasattr(x, "shape"))
    ]
    assert 512 < max(map(math.prod, chunks)) <= 1024  # of float32: no shard has to read a whole array


def test_bfloat16_is_the_float32_checkpoint_rounded_once(base, teachers):
    whole = arrays(teachers("gemma3"))
    convert(base / "gemma3_hf", base / "half", PRESETS["gemma3"], "--dtype", "bfloat16")
    assert_equal(arrays(base / "half"), jax.tree.map(lambda x: np.asarray(x).astype(jax.numpy.bfloat16), whole))


@pytest.mark.slow
def test_biases_of_routers_stay_in_float32(base, teachers):
    convert(
        teachers("deepseek3").with_name("deepseek3_hf"),
        base / "experts_half",
        PRESETS["deepseek3"],
        "--dtype",
        "bfloat16",
    )
    tree = ocp.load(base / "experts_half/0", checkpointable_name="items")["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(tree["params"])} == {np.dtype(jax.numpy.bfloat16)}
    (biases,) = jax.tree.leaves(tree["MoEBiasVar"])
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    np.testing.assert_array_equal(biases, [golden.weight(name, (8,), False) for name in names])


def test_the_language_model_of_a_model_that_sees_is_found(base, teachers):
    """As gemma-3-4b is published: the text's configuration within, its tensors under language_model.model."""
    seeing = base / "seeing_hf"
    seeing.mkdir()
    text = json.loads((teachers("gemma3").with_name("gemma3_hf") / "config.json").read_text())
    (seeing / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    stored = load_file(base / "gemma3_hf/model.safetensors")
    renamed = {f"language_model.{name}": value for name, value in stored.items()}
    save_file(renamed | {"vision_tower.patch": np.zeros(3, np.float32)}, seeing / "model.safetensors")
    convert(seeing, base / "seeing", PRESETS["gemma3"])
    assert_equal(arrays(base / "seeing"), arrays(teachers("gemma3")))


def rewrite(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


def test_a_tied_model_that_stores_its_head_alone_is_the_same_teacher(tmp_path):
    table = "model.embed_tokens.weight"
    written = golden.write("qwen3", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda held: {"lm_head.weight" if n == table else n: v for n, v in held.items()})
    record = convert(tmp_path / "hf", tmp_path / "mt", PRESETS["qwen3"])
    assert "logits_via_embedding" not in record["overrides"]
    np.testing.assert_array_equal(arrays(tmp_path / "mt")["token_embedder"]["embedding"], written[table])


def test_a_head_that_config_json_would_tie_is_kept_and_what_is_left_is_named(tmp_path, capsys):
    head = golden.weight("lm_head.weight", (VOCABULARY, 48), False)
    golden.write("qwen3", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda held: held | {"lm_head.weight": head, "model.layers.3.norm.weight": head})
    record = convert(tmp_path / "hf", tmp_path / "mt", PRESETS["qwen3"])
    assert record["overrides"]["logits_via_embedding"] is False
    np.testing.assert_array_equal(arrays(tmp_path / "mt")["decoder"]["logits_dense"]["kernel"], head.T)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("warning: tie_word_embeddings=true, but lm_head.weight is not the embeddings' table")
    assert said[1] == "warning: tensors that the model does not use (1): model.layers.3.norm.weight"


def test_the_tokenizer_comes_along(base):
    source = model("qwen3", base / "tokens_hf")
    tokenizer = pathlib.Path(upstream.globals.MAXTEXT_PKG_DIR) / "assets/tokenizers/qwen3-tokenizer"
    shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    convert(source, base / "tokens", PRESETS["qwen3"])
    assert {path.name for path in source.glob("*.json")} == {
        path.name for path in (base / "tokens/tokenizer").iterdir()
    }
    found = transformers.AutoTokenizer.from_pretrained(base / "tokens/tokenizer")
    assert found.decode(found.encode("a teacher")) == "a teacher"


# Presets --------------------------------------------------------------------------------------------------------------

# As published, with what a config.json leaves to transformers left out. MaxText's own table has the others.
GEMMA3 = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
LLAMA32 = {
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": golden.LLAMA32,
    "tie_word_embeddings": True,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": ("llama", {"rms_norm_eps": 1e-5}),
    "llama3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama3.2-1b": (
        "llama",
        LLAMA32 | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    ),
    "llama3.2-3b": (
        "llama",
        LLAMA32 | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    ),
    "smollm2-135m": ("llama", SMOLLM2),
    "smollm2-360m": (
        "llama",
        SMOLLM2
        | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
        | {"num_attention_heads": 15, "num_key_value_heads": 5},
    ),
    "smollm2-1.7b": (
        "llama",
        SMOLLM2
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "rope_theta": 130000}
        | {"num_attention_heads": 32, "num_key_value_heads": 32},
    ),
    "mistral-7b": ("mistral", {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "vocab_size": 32768}),
    "gemma3-4b": (
        "gemma3_text",
        GEMMA3 | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    ),
    "gemma3-12b": (
        "gemma3_text",
        GEMMA3
        | {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
        | {"num_attention_heads": 16, "num_key_value_heads": 8},
    ),
    "gemma3-27b": (
        "gemma3_text",
        GEMMA3
        | {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "query_pre_attn_scalar": 168}
        | {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128},
    ),
}
TABLED = [
    *("llama3.1-8b", "llama3.1-70b", "mixtral-8x7b", "mixtral-8x22b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b"),
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b"),
    *("qwen3-235b-a22b", "deepseek2-16b", "deepseek3-671b", "gemma2-2b", "gemma2-9b", "gemma2-27b"),
]


@pytest.mark.parametrize("name", [*WRITTEN, *TABLED])
def test_a_published_configuration_finds_its_preset(name):
    if name in WRITTEN:
        model_type, values = WRITTEN[name]
        config = transformers.AutoConfig.for_model(model_type, **values)
    else:
        config = upstream.hf_model_configs.HF_MODEL_CONFIGS[name]
    found, changed = presets.choose(config, "")
    assert (found, changed.keys() - {"vocab_size", *GROUPS}) == (name, set())


def test_presets_by_whose_names_maxtext_routes_otherwise_are_no_candidates(monkeypatch):
    """A DeepSeek V3 smaller than any preset; of those with its decoder block some are other architectures."""
    config = transformers.AutoConfig.for_model(**golden.read("deepseek3")[0])
    added = presets.presets() | {"moonlight-16b": presets.presets()["deepseek3-671b"]}
    monkeypatch.setattr(presets, "presets", lambda: added)
    found = presets.candidates(config)
    assert found and all(name.startswith(("deepseek3-", "kimi-k2-")) for name in found)
    assert not {"routed_bias", "use_indexer", "engram_layers"}.intersection(*found.values())
    with pytest.raises(ConfigError, match="'deepseek2-16b': is no deepseek_v3; presets of this family are"):
        presets.choose(config, "deepseek2-16b")


def test_a_plain_llama_fits_a_preset_of_scaled_ones_with_the_scaling_off():
    config = transformers.AutoConfig.for_model(**golden.read("llama3")[0])
    _, changed = presets.choose(config, "llama3.1-8b")
    assert changed["rope_use_scale"] is False and "rope_type" not in changed


# Out of MaxText -------------------------------------------------------------------------------------------------------


def export(name: str, run: pathlib.Path, output: pathlib.Path, *options: str) -> None:
    record = json.loads((run / "conversion.json").read_text())
    settings = [f"{key}={json.dumps(value)}" for key, value in record["overrides"].items()]
    arguments = ["--run", str(run), "--output", str(output), "--model-name", record["model_name"]]
    export_student.main([*arguments, *options, *settings])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_exported_again_is_the_original_bit_for_bit(name, teachers, tmp_path):
    export(name, teachers(name), tmp_path / "out", "--dtype", "bfloat16")
    config, _ = golden.read(name)
    original = load_file(teachers(name).with_name(f"{name}_hf") / "model.safetensors")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == original.keys()
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.architectures == config["architectures"]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (None, None)  # no tokenizer is at hand that would tell
    for tensor, value in original.items():
        if name == "gemma2" and "q_proj" in tensor:  # its configuration divides by sqrt(head_dim) instead
            np.testing.assert_allclose(exported[tensor], value.astype(np.float32) * math.sqrt(24 / 20), rtol=2**-8)
        else:
            assert exported[tensor].dtype == value.dtype, tensor
            np.testing.assert_array_equal(exported[tensor].view(np.uint16), value.view(np.uint16), err_msg=tensor)


def test_a_student_without_a_preset_is_exported_by_its_decoder_block_and_with_its_tokenizers_ends(
    teachers, tmp_path, capfd, caplog
):
    """As a server reads it: what ends a text is the tokenizer's, not the class's. The command says one line."""
    settings = architecture(transformers.AutoConfig.for_model(**golden.read("llama3")[0])) | {"decoder_block": "llama2"}
    (tmp_path / "student.yml").write_text(json.dumps(settings))
    tokenizer = pathlib.Path(upstream.globals.MAXTEXT_PKG_DIR) / "assets/tokenizers/tokenizer.gemma"
    run, out = str(teachers("llama3")), tmp_path / "out"
    absl.logging.set_verbosity(absl.logging.WARNING)  # as a command begins
    capfd.readouterr()
    caplog.clear()
    options = ["--dtype", "bfloat16", "--tokenizer", str(tokenizer)]
    export_student.main(["--run", run, "--output", str(out), *options, str(tmp_path / "student.yml")])
    said = capfd.readouterr()
    assert (
        said.err == ""
        and not caplog.records
        and said.out.splitlines()
        == [f"LlamaForCausalLM, 85,584 parameters in bfloat16 of step 0, 2048 positions: {out}"]
    )
    original = load_file(teachers("llama3").with_name("llama3_hf") / "model.safetensors")
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == original.keys()
    for tensor, value in original.items():
        np.testing.assert_array_equal(exported[tensor].view(np.uint16), value.view(np.uint16), err_msg=tensor)
    written, served = (json.loads((out / f"{name}config.json").read_text()) for name in ("", "generation_"))
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    assert written["model_type"] == "llama" and ends.items() <= written.items() and served == ends


def test_a_trained_student_is_exported_as_it_was_saved(teacher, base):
    student = pathlib.Path(teacher).parent
    evaluated = "eval_interval=500"  # as a student's yml has it, on data that the export does not open
    export_student.main(["--run", str(student), "--output", str(base / "student"), SMOKE, evaluated])
    stored = ocp.load(student / "checkpoints/5", checkpointable_name="items")["params"]["params"]
    exported = load_file(base / "student/model.safetensors")
    down = np.asarray(stored["decoder"]["layers"]["mlp"]["wo"]["kernel"])
    for layer in range(2):
        np.testing.assert_array_equal(exported[f"model.layers.{layer}.mlp.down_proj.weight"], down[:, layer].T)
    assert sum(value.size for value in exported.values()) == sum(x.size for x in jax.tree.leaves(stored))


@pytest.mark.slow
def test_biases_of_routers_which_are_no_parameters_are_exported_too(experts, base):
    settings = [f"{key}={value}" for key, value in EXPERTS.items()]
    export_student.main(["--run", str(experts.folder), "--output", str(base / "experts"), SMOKE, *settings])
    aux = ocp.load(experts.folder / "checkpoints/5", checkpointable_name="items")["nnx_aux"]["model"]
    (biases,) = jax.tree.leaves({key: value for key, value in flat(aux).items() if key[-2:] == ("gate", "bias")})
    assert biases.shape == (2, 4) and np.all(np.std(biases, axis=1) > 0)
    exported = load_file(base / "experts/model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer + 1}.mlp.gate.e_score_correction_bias"
        np.testing.assert_array_equal(exported[name], biases[layer])
    made = transformers.AutoConfig.from_pretrained(base / "experts")
    assert (made.model_type, made.rope_parameters["rope_type"], made.n_group) == ("deepseek_v3", "default", 1)
    assert made.num_mtp_layers == 0


# In words that a user types -------------------------------------------------------------------------------------------


# One of each kind of positions, of heads and of experts.
TYPED = (*DEFAULT, "llama3.1", "qwen3", "gemma3", "qwen3_moe", "deepseek3")


@pytest.mark.parametrize("name", few(DEFAULT, TYPED))
def test_a_student_that_begins_as_the_teacher_has_nothing_to_learn_from_it(name, train, base, capsys):
    """With the words that the conversion prints; tests/text/test_story.py types both commands."""
    source = model(name, base / f"{name}_typed_hf")
    convert(source, base / f"{name}_typed", PRESETS[name])
    lines = (line.strip() for line in capsys.readouterr().out.splitlines())
    teacher, student = (line for line in lines if line.startswith("python MaxText/train.py"))
    given = dict(word.split("=", 1) for word in teacher.partition(" use_kd=true ")[2].split(" ", 2))
    given |= dict(word.split("=", 1) for word in student.split()[3:])
    given["kd_teacher_overrides"] = given["kd_teacher_overrides"].strip("'")
    experts = {"sparse_matmul": "false", "megablox": "false"}
    row = train(f"{name}_begins", **(given | experts), use_kd="true", steps=1, enable_checkpointing="false").rows()[0]
    assert abs(row["learning/kd_loss"]) < 1e-4
    assert row["learning/ce_loss"] > 1


# What goes wrong ------------------------------------------------------------------------------------------------------


def without(folder: pathlib.Path, name: str) -> None:
    (folder / name).unlink()


def edited(folder: pathlib.Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def deepseek(folder: pathlib.Path, values: Record | None = None, **positions: Any) -> None:
    config, _ = golden.read("deepseek2")
    config["rope_parameters"] |= positions
    (folder / "config.json").write_text(json.dumps(config | (values or {})))


def expert(folder: pathlib.Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(golden.read("qwen3_moe")[0] | values))


def cut(folder: pathlib.Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


LINEAR = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
# What is done to a good folder of two files, options -> what the message must hold.
BAD: dict[str, tuple[Any, list[str], list[str]]] = {
    "no config": (lambda f: without(f, "config.json"), [], ["--hf", "no config.json"]),
    "config that is no json": (lambda f: (f / "config.json").write_text("{"), [], ["config.json"]),
    "unknown architecture": (lambda f: edited(f, model_type="gpt2"), [], ["model_type='gpt2'", "qwen3", "gemma2"]),
    "missing file": (
        lambda f: without(f, "model-00002-of-00002.safetensors"), [], ["index.json", "model-00002-of-00002"]
    ),
    "truncated file": (cut, [], ["model-00002-of-00002.safetensors", "cannot be read"]),
    "no safetensors": (lambda f: [file.unlink() for file in f.glob("model*")], [], ["no model.safetensors"]),
    "config of other shapes": (
        lambda f: edited(f, hidden_size=64), [], ["weights are not those of config.json", "(96, 48) stored", "(96, 64)"]
    ),
    "more layers than stored": (
        lambda f: edited(f, num_hidden_layers=4), [], ["model.layers.3", "not there", "and 4 more"]
    ),
    "scaling that MaxText has not": (
        lambda f: edited(f, rope_parameters=LINEAR), [], ["rope_parameters", "'linear'", "rope_type='llama3'"]
    ),
    "scaling of a part": (
        lambda f: edited(f, rope_parameters=golden.LLAMA31 | {"partial_rotary_factor": 0.5}), [],
        ["rope_parameters", "'partial_rotary_factor': 0.5", "no others"]
    ),
    "scaling whose bands cross": (
        lambda f: edited(f, rope_parameters=golden.LLAMA31 | {"low_freq_factor": 4.0}), [],
        ["rope_llama3_low_freq_factor=4: below rope_llama3_high_freq_factor, 4"]
    ),
    "scaling by halves": (
        lambda f: deepseek(f, factor=2.5), [], ["rope_parameters", "whole numbers", "mscale_all_dim"]
    ),
    "scaling of the turned part": (
        lambda f: deepseek(f, mscale=1.0), [], ["rope_parameters", "equal mscale and mscale_all_dim"]
    ),
    "scaling without ends": (lambda f: deepseek(f, truncate=False), [], ["rope_parameters", "YaRN"]),
    "experts chosen by groups of theirs": (
        lambda f: deepseek(f, {"topk_method": "group_limited_greedy"}), [], ["topk_method", "'greedy' built in"]
    ),
    "biases": (lambda f: edited(f, attention_bias=True), [], ["attention_bias=True", "False built in"]),
    "value of no allowed type": (
        lambda f: edited(f, intermediate_size=80.0), [], ["config.json", "'intermediate_size'", "got float"]
    ),
    "null where a flag stands": (
        lambda f: edited(f, tie_word_embeddings=None), [], ["config.json", "'tie_word_embeddings'", "expected bool"]
    ),
    "experts that are not renormalised": (
        lambda f: expert(f, norm_topk_prob=False), [], ["norm_topk_prob=False", "True built in"]
    ),
    "quantized": (
        lambda f: edited(f, quantization_config={"quant_method": "fp8"}), [], ["quantization_config", "original"]
    ),
    "no preset of this shape": (
        lambda f: None, ["--model-name", ""], ["no preset", "nearest", "tiny-llama", "--model-name", "base_emb_dim=48"]
    ),
    "preset of another family": (
        lambda f: None, ["--model-name", "qwen3-0.6b"], ["--model-name='qwen3-0.6b'", "is no llama", "llama3-8b"]
    ),
    "no such preset": (lambda f: None, ["--model-name", "llama3-9b"], ["--model-name='llama3-9b'", "did you mean"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case, tmp_path):
    spoil, options, words = BAD[case]
    golden.write("llama3", tmp_path / "hf", files=2)
    spoil(tmp_path / "hf")
    arguments = [
        "--hf",
        str(tmp_path / "hf"),
        "--output",
        str(tmp_path / "mt"),
        *(options or ["--model-name", "llama3-8b"]),
    ]
    with pytest.raises(ConfigError) as raised:
        convert_teacher.main(arguments)
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "mt").exists()


def test_an_output_with_anything_in_it_is_left_alone(tmp_path, teachers):
    (tmp_path / "mine").write_text("mine")
    for output, words in ((tmp_path, "is not empty"), (teachers("llama3"), "a checkpoint already")):
        with pytest.raises(ConfigError, match=words):
            convert(teachers("llama3").with_name("llama3_hf"), output, PRESETS["llama3"])
    with pytest.raises(ConfigError, match="is not empty"):
        export("llama3", teachers("llama3"), tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("change", ["none", "source", "options", "merge begun"])
def test_an_interrupted_conversion_looks_like_none_and_goes_on_with_the_same_source_and_options(
    change, tmp_path, teachers, monkeypatch
):
    """It fails in its third write, and leaves a fourth that is not whole."""
    monkeypatch.setattr(writing, "BATCH", 20_000)
    write = writing.ocp.partial.save
    written: list[int] = []  # arrays in each write

    def failing(path: Any, tree: Any, **options: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(path, tree, **options)
        written.append(len(jax.tree.leaves(tree)))

    source = shutil.copytree(teachers("llama3").with_name("llama3_hf"), tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(writing.ocp.partial, "save", failing)
        with pytest.raises(RunError, match=r"No space left on device.*goes on from here"):
            convert(source, tmp_path / "mt", PRESETS["llama3"])
    with pytest.raises(ConfigError, match="no MaxText checkpoint"):
        teacher_lib.find_checkpoint(str(tmp_path / "mt"))
    before, unfinished = sum(written), tmp_path / "mt" / writing.PARTIAL
    whole_write = min(unfinished.iterdir())
    cut_off = shutil.copytree(
        whole_write, unfinished / f"{whole_write.name}.orbax-checkpoint-tmp"
    )  # as a kill leaves it
    (cut_off / "commit_success.txt").unlink()
    for file in (cut_off / "state").glob("ocdbt.process_*/d/*"):
        os.truncate(file, file.stat().st_size // 2)

    options: list[str] = []
    if change == "source":
        (source / "config.json").touch()
    if change == "merge begun":  # Orbax moves files of a write up, one by one
        next(unfinished.glob("*/_CHECKPOINT_METADATA")).rename(unfinished / "_CHECKPOINT_METADATA")
    if change == "options":
        options = ["--dtype", "bfloat16"]
    written.clear()
    monkeypatch.setattr(
        writing.ocp.partial,
        "save",
        lambda path, tree, **options: (write(path, tree, **options), written.append(len(jax.tree.leaves(tree)))),
    )
    convert(source, tmp_path / "mt", PRESETS["llama3"], *options)
    whole = arrays(teachers("llama3"))
    assert before > 0 and sum(written) == len(jax.tree.leaves(whole)) - (before if change == "none" else 0)
    if change != "options":
        assert_equal(arrays(tmp_path / "mt"), whole)
    assert {path.name for path in (tmp_path / "mt").iterdir()} == {"0", "conversion.json", "tokenizer"}


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        ("/no/such/model", ["no such folder"]),
        ("nobody/no-such-model", ["no such folder", "on the hub", "cannot be fetched"]),
    ],
)
def test_a_model_that_is_nowhere_is_one_message(hf, words, tmp_path):
    with pytest.raises(ConfigError) as refused:
        convert_teacher.main(["--hf", hf, "--output", str(tmp_path / "mt")])
    assert all(word in str(refused.value) for word in (f"--hf '{hf}'", *words))


def test_a_conversion_that_is_refused_ends_with_one_message_and_status_2(tmp_path):
    arguments = ["--hf", "/no/such/model", "--output", str(tmp_path / "mt")]
    result = execute(["scripts/convert_teacher.py"], arguments, tmp_path / "log")
    assert result.status == 2 and "Traceback" not in result.output
    assert result.output.splitlines()[-1].startswith("error: --hf '/no/such/model': no such folder")


@pytest.mark.parametrize(
    ("preset", "changed", "words"),
    [
        ("tiny-llama", {"final_logits_soft_cap": 30.0}, "final_logits_soft_cap=30.0: Hugging Face's"),
        ("tiny-llama", {"mlp_activations": ["gelu", "linear"]}, "mlp_activations="),
        (
            "tiny-qwen3",
            {"normalization_layer_epsilon": 1e-5, "attn_logits_soft_cap": 50.0},
            "attn_logits_soft_cap=50.0",
        ),
        ("deepseek3-mini", {"routed_bias": False}, "routed_bias=False"),
        (
            "deepseek3-mini",
            {"rope_type": "default"},
            "rope_type='default': Hugging Face's model of this kind has 'yarn'",
        ),
        ("tiny-llama", {"rope_linear_scaling_factor": 4.0}, "rope_linear_scaling_factor=4.0"),
        pytest.param("tiny-llama", {"rope_min_timescale": 2}, "rope_min_timescale=2", marks=pytest.mark.slow),
        pytest.param("tiny-llama", {"moba": True}, "moba=True", marks=pytest.mark.slow),
        pytest.param(
            "tiny-llama",
            {"use_untrainable_positional_embedding": True},
            "use_untrainable_positional_embedding=True",
            marks=pytest.mark.slow,
        ),
        ("tiny-qwen3", {"use_qk_norm": False}, "use_qk_norm=False"),
        pytest.param(
            "mixtral-8x7b", {"routed_score_func": "softmax"}, "routed_score_func='softmax'", marks=pytest.mark.slow
        ),
        pytest.param(
            "gemma2-2b", {"local_rope_max_timescale": 500}, "local_rope_max_timescale=500", marks=pytest.mark.slow
        ),
        pytest.param(
            "gemma2-2b", {"logits_via_embedding": False}, "logits_via_embedding=False", marks=pytest.mark.slow
        ),
        ("gemma3-4b", {"normalization_layer_epsilon": 1e-3}, "normalization_layer_epsilon=0.001"),
    ],
    ids=str,
)
def test_what_no_config_json_can_say_is_refused(preset, changed, words):
    with pytest.raises(ConfigError, match=words):
        configuration(shapes.maxtext_config(preset, changed, True))


def test_a_student_whose_preset_maxtext_knows_by_another_name_is_refused():
    config = types.SimpleNamespace(decoder_block=types.SimpleNamespace(value="deepseek"), model_name="mine")
    with pytest.raises(ConfigError, match=r"model_name=mine: .* begin with deepseek2 or deepseek3 or kimi-k2"):
        configuration(config)


def test_an_export_of_other_settings_is_refused(teachers, tmp_path):
    run = str(teachers("llama3"))
    with pytest.raises(ConfigError, match=r"does not hold a tiny-llama.*\n.*stored, the model has"):
        export_student.main(["--run", run, "--output", str(tmp_path / "out"), "--model-name", "tiny-llama"])
    with pytest.raises(ConfigError, match="--model-name: which preset"):
        export_student.main(["--run", run, "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"^--run '/no/such/run': no such path"):
        export_student.main(["--run", "/no/such/run", "--output", str(tmp_path / "out"), "--model-name", "tiny-llama"])
    assert not list(tmp_path.iterdir())
