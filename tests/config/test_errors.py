"""Bad input: no training step, one message that names the key; typed on the command line, status 2 and no traceback.

Every case is seen by the trainer in this process; a few, from the first look at the arguments to the first step, are
typed.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import shutil

import maxtext
import numpy as np
import pytest
from conftest import ROOT, SMOKE, execute
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import train as trainer
from MaxText.config.checks import REFUSED_WITH_KD
from MaxText.config.keys import ConfigError

pytestmark = pytest.mark.e2e

KD = ["use_kd=true", "kd_teacher_parameters_path={teacher}"]

# name -> (arguments, what the message must hold)
CASES: dict[str, tuple[list[str], list[str]]] = {
    "no teacher path": (["use_kd=true"], ["kd_teacher_parameters_path=''", "gs://"]),
    "path that does not exist": (
        ["use_kd=true", "kd_teacher_parameters_path=/no/such/teacher"],
        ["kd_teacher_parameters_path='/no/such/teacher'", "no such path"],
    ),
    "path that is no checkpoint": (
        ["use_kd=true", "kd_teacher_parameters_path={empty}"],
        ["kd_teacher_parameters_path=", "no MaxText checkpoint", "<step>/items"],
    ),
    "checkpoint without parameters": (
        ["use_kd=true", "kd_teacher_parameters_path={without_params}"],
        ["kd_teacher_parameters_path=", "no model parameters", "no `params` in it"],
    ),
    "teacher with a number that is none": (
        ["use_kd=true", "kd_teacher_parameters_path={poisoned}"],
        ["kd_teacher_parameters_path=", "on the first training batch is nan", "the teacher is broken"],
    ),
    "checkpoint whose arrays are cut off": (
        ["use_kd=true", "kd_teacher_parameters_path={truncated}"],
        ["kd_teacher_parameters_path=", "truncated", "cannot be re"],
    ),
    "checkpoint without its index": (
        ["use_kd=true", "kd_teacher_parameters_path={without_index}"],
        ["kd_teacher_parameters_path=", "no MaxText checkpoint"],
    ),
    "checkpoint whose index is unreadable": (
        ["use_kd=true", "kd_teacher_parameters_path={unreadable_index}"],
        ["kd_teacher_parameters_path=", "no MaxText checkpoint"],
    ),
    "checkpoint without its manifest": (
        ["use_kd=true", "kd_teacher_parameters_path={without_manifest}"],
        ["kd_teacher_parameters_path=", "incomplete", "manifest.ocdbt"],
    ),
    "teacher of other shapes": (
        [*KD, "kd_teacher_overrides={base_mlp_dim: 96}"],
        ["decoder/layers/mlp/wi_0/kernel", "(64, 2, 128) stored", "(64, 2, 96)", "kd_teacher_overrides"],
    ),
    "teacher of another family": (
        [*KD, "kd_teacher_model_name=tiny-qwen3"],
        ["does not hold the configured teacher", "stored, the model has", "more", "kd_teacher_model_name"],
    ),
    "unknown teacher preset": (
        [*KD, "kd_teacher_model_name=qwen3-0.7b"],
        ["kd_teacher_model_name='qwen3-0.7b'", "qwen3-0.6b"],
    ),
    "adapters": (["lora.enable_lora=true"], ["lora.enable_lora=True", "makes no adapters", "allowed is False"]),
    "frozen parameters that lie where their moments do": (
        [*KD, "shard_optimizer_over_data=true", "trainable_parameters_mask=['norm']"],
        ["trainable_parameters_mask=['norm'] shard_optimizer_over_data=True", "one of the two"],
    ),
    "no rows": ([*KD, "per_device_batch_size=0"], ["per_device_batch_size=0: a number above 0"]),
    "no positions": ([*KD, "max_target_length=0"], ["max_target_length=0: a number above 0"]),
    "a mesh of other devices": (
        [*KD, "ici_tensor_parallelism=3"],
        ["ici_*_parallelism=[", "3", " devices: Unspecified value unable to be determined with the given ICI"],
    ),
    "a pattern that is none": (
        [*KD, "trainable_parameters_mask=['layers/', '(']"],
        ["trainable_parameters_mask=['layers/', '(']", "'(' is no regular expression"],
    ),
    "a pattern of no parameter": (
        [*KD, "trainable_parameters_mask=['layers', 'attn']"],
        ["trainable_parameters_mask=", "'attn' names none of the student's parameters"],
    ),
    "unknown student preset": (["model_name=tiny-lama"], ["model_name='tiny-lama'", "tiny-llama"]),
    "alpha above 1": ([*KD, "kd_alpha=1.5"], ["kd_alpha=1.5", "less than or equal to 1"]),
    "alpha below 0": ([*KD, "kd_alpha=-0.1"], ["kd_alpha=-0.1", "greater than or equal to 0"]),
    "temperature 0": ([*KD, "kd_temperature=0"], ["kd_temperature=0", "greater than 0"]),
    "temperature negative": ([*KD, "kd_temperature=-1"], ["kd_temperature=-1", "greater than 0"]),
    "top_k negative": ([*KD, "kd_top_k=-1"], ["kd_top_k=-1", "greater than or equal to 0"]),
    "top_k above the vocabulary": ([*KD, "kd_top_k=257"], ["kd_top_k=257", "256"]),
    "top_p above 1": ([*KD, "kd_top_p=1.01"], ["kd_top_p=1.01", "less than or equal to 1"]),
    "top_p negative": ([*KD, "kd_top_p=-0.5"], ["kd_top_p=-0.5", "greater than or equal to 0"]),
    "both truncations": ([*KD, "kd_top_k=4", "kd_top_p=0.9"], ["kd_top_k=4", "kd_top_p=0.9", "one of the two"]),
    "unknown strategy": (
        [*KD, "kd_truncation_strategy=bucket"],
        ["kd_truncation_strategy='bucket'", "renormalize", "other_bucket", "renormalize_teacher"],
    ),
    "unknown divergence": ([*KD, "kd_divergence=kl"], ["kd_divergence='kl'", "forward_kl", "skew_reverse_kl", "tvd"]),
    "beta of 0": ([*KD, "kd_divergence=jsd", "kd_jsd_beta=0"], ["kd_jsd_beta=0", "greater than 0"]),
    "beta of 1": ([*KD, "kd_divergence=jsd", "kd_jsd_beta=1"], ["kd_jsd_beta=1", "less than 1"]),
    "beta that nothing reads": ([*KD, "kd_jsd_beta=0.1"], ["kd_jsd_beta=0.1: kd_divergence=forward_kl", "to jsd"]),
    "skew of 1": ([*KD, "kd_divergence=skew_kl", "kd_skew=1"], ["kd_skew=1", "less than 1"]),
    "skew below 0": ([*KD, "kd_divergence=skew_kl", "kd_skew=-0.1"], ["kd_skew=-0.1", "greater than or equal to 0"]),
    "skew that nothing reads": (
        [*KD, "kd_divergence=jsd", "kd_skew=0.2"],
        ["kd_skew=0.2: kd_divergence=jsd", "skew_kl or skew_reverse_kl"],
    ),
    "terms of the student where the teacher keeps nothing": (
        [*KD, "kd_divergence=reverse_kl", "kd_top_k=4", "kd_truncation_strategy=renormalize_teacher"],
        ["kd_truncation_strategy=renormalize_teacher kd_divergence=reverse_kl", "other_bucket", "skew_kl"],
    ),
    "unknown teacher dtype": ([*KD, "kd_teacher_dtype=int4"], ["kd_teacher_dtype='int4'", "bfloat16"]),
    "misspelt key": (["kd_aplha=0.5"], ["kd_aplha=0.5", "did you mean kd_alpha"]),
    "misspelt key of MaxText": (["per_device_batch_sise=8"], ["did you mean per_device_batch_size"]),
    "misspelt teacher override": (
        [*KD, "kd_teacher_overrides={base_emb_dimm: 64}"],
        ["kd_teacher_overrides", "base_emb_dimm", "base_emb_dim"],
    ),
    "a word for alpha": ([*KD, "kd_alpha=half"], ["kd_alpha='half'", "number"]),
    "a word for steps": (["steps=many"], ["steps='many'", "integer"]),
    "no key=value": ([*KD, "kd_alpha"], ["kd_alpha", "key=value"]),
    "other vocabulary": (
        [*KD, "kd_teacher_overrides={vocab_size: 512}"],
        ["vocab_size is 512", "the student's 256", "kd_vocab_size"],
    ),
    "more shared tokens than the student has": ([*KD, "kd_vocab_size=257"], ["kd_vocab_size=257", "256"]),
    "more shared tokens than the teacher has": (
        [*KD, "vocab_size=512", "override_model_config=true", "kd_vocab_size=300"],
        ["kd_vocab_size=300", "at most the teacher's vocabulary, 256", "decoder/logits_dense/kernel"],
    ),
    "top_k above the shared tokens": (
        [*KD, "kd_vocab_size=200", "kd_top_k=201"],
        ["kd_top_k=201", "kd_vocab_size, 200"],
    ),
    "another tokenizer": (
        [
            *KD,
            "tokenizer_path={tokenizers}/tokenizer.llama2",
            "kd_teacher_tokenizer_path={tokenizers}/tokenizer.mistral-v1",
        ],
        ["kd_teacher_tokenizer_path=", "tokenizer_path=", "ids differ", "to the teacher", "kd_vocab_size="],
    ),
    "no tokenizer": (
        [*KD, "tokenizer_path={tokenizers}/tokenizer.llama2", "kd_teacher_tokenizer_path={empty}"],
        ["kd_teacher_tokenizer_path=", "tokenizer_type=sentencepiece"],
    ),
    "a tokenizer and none to compare it with": (
        [*KD, "kd_teacher_tokenizer_path={tokenizers}/tokenizer.llama2"],
        ["tokenizer_path=", "no tokenizer of tokenizer_type=sentencepiece"],
    ),
    "distilled MTP heads that are not there": ([*KD, "kd_mtp_alpha=0.5"], ["kd_mtp_alpha=0.5", "mtp_num_layers=0"]),
    "distilled MTP heads without a teacher in the step": (
        [*KD, "kd_mtp_alpha=0.5", "kd_alpha=0", "mtp_num_layers=1"],
        ["kd_mtp_alpha=0.5", "kd_alpha=0"],
    ),
    "table without deviation": (["kd_embedding_std=0"], ["kd_embedding_std=0", "greater than 0"]),
    "scale of a table that is restored": (
        ["kd_embedding_std=0.02", "load_parameters_path={teacher}"],
        ["kd_embedding_std=0.02", "load_parameters_path=", "restored, not drawn"],
    ),
    "scale of a table that only upstream draws": (
        ["kd_embedding_std=0.02", "enable_diloco=true"],
        ["kd_embedding_std=0.02", "enable_diloco=True", "MaxText's own loop"],
    ),
    "MTP's alpha above 1": ([*KD, "kd_mtp_alpha=1.5"], ["kd_mtp_alpha=1.5", "less than or equal to 1"]),
    "teacher that cannot be built": (
        [*KD, "kd_teacher_overrides={base_num_kv_heads: 3}"],
        ["the teacher (model 'tiny-llama') cannot be built", "num_kv_heads"],
    ),
    "other batch": ([*KD, "kd_teacher_overrides={max_target_length: 16}"], ["max_target_length", "16", "32"]),
    "metrics file in no folder": (["metrics_file=/dev/null/metrics.jsonl"], ["metrics_file='/dev/null/metrics.jsonl'"]),
    "a run that went further": (
        ["run_name=teacher", "base_output_directory={again}", "steps=3"],
        ["already exists at step 5"],
    ),
    "no grain data": (
        ["dataset_type=grain", "grain_train_files=/no/such/*.arrayrecord", "grain_file_type=arrayrecord"],
        ["dataset_type='grain'", "grain_train_files='/no/such/*.arrayrecord'", "No files found"],
    ),
    "no hf data": (
        ["dataset_type=hf", "hf_path=parquet", "hf_train_files=/no/such.parquet", "tokenizer_path=anywhere"],
        ["dataset_type='hf'", "hf_path='parquet'", "hf_train_files='/no/such.parquet'", "Unable to find"],
    ),
    "hf data that can be read once only": (
        [
            "dataset_type=hf",
            "hf_path=parquet",
            "hf_train_files=a.parquet",
            "hf_eval_files=b.parquet",
            "eval_interval=2",
            "grain_worker_count=0",
            "tokenizer_path=anywhere",
        ],
        ["grain_worker_count=0", "dataset_type=hf"],
    ),
    "a run that would go on as another model": (
        [
            "base_output_directory={again}",
            "run_name=teacher",
            "override_model_config=true",
            "base_mlp_dim=96",
            "steps=9",
        ],
        ["run_name=teacher", "decoder/layers/mlp/wi_0/kernel is (64, 2, 128)", "(64, 2, 96)"],
    ),
    "a run that would go on with another optimizer": (
        ["base_output_directory={again}", "run_name=teacher", "opt_type=sgd", "steps=9"],
        ["run_name=teacher", "optimizer", "opt_state/1/count", "not there"],
    ),
    "the state of another model": (
        ["run_name=foreign", "load_full_state_path={teacher}/5/items", "override_model_config=true", "base_mlp_dim=96"],
        ["load_full_state_path=", "decoder/layers/mlp/wi_0/kernel is (64, 2, 128)", "(64, 2, 96)"],
    ),
    "parameters of 8 bits": (["weight_dtype=float8_e4m3fn"], ["weight_dtype=float8_e4m3fn", "kd_teacher_overrides"]),
    "no tfds data": (
        ["dataset_type=tfds", "dataset_path=/no/such", "dataset_name=c4/en:3.1.0"],
        ["dataset_type='tfds'", "dataset_path='/no/such'", "dataset_name='c4/en:3.1.0'"],
    ),
}

DAMAGED = ("truncated", "without_index", "without_manifest", "unreadable_index")  # copies of the teacher

# What the distillation step does not carry: key -> a value to be refused. Some lack what the engine would ask for
# besides; the refusal comes first.
REFUSED = {
    "attention_type": "block_diffusion",
    "compiled_trainstep_file": "/no/such/step.pickle",
    "dcn_pipeline_parallelism": "2",
    "elastic_enabled": "true",
    "enable_diloco": "true",
    "enable_mllog": "true",
    "ici_pipeline_parallelism": "2",
    "log_required_ragged_buffer_factor": "true",
    "log_moe_bias_norms": "true",
    "log_step_diagnostics": "true",
    "moe_dropless_fallback": "step",
    "moe_log_max_load_ratio": "true",
    "optimizer_memory_host_offload": "true",
    "parameter_memory_host_offload": "true",
    "quantization": "fp8",
    "shard_mode": "explicit",
    "te_moe_block": "true",
    "training_objective": "block_diffusion",
    "use_dpo": "true",
    "use_indexer": "true",
    "use_multimodal": "true",
    "use_tunix_gradient_accumulation": "true",
    "warmup_programs_in_init": "true",
}


@pytest.fixture(scope="module")
def folders(teacher, tmp_path_factory):
    """What stands in braces in the arguments, and `out` for a run's output."""
    base = tmp_path_factory.mktemp("errors")
    names = {name: base / name for name in ("empty", "out", *DAMAGED, "without_params", "poisoned")}
    names |= {"teacher": pathlib.Path(teacher), "runs": pathlib.Path(teacher).parents[1]}
    names["tokenizers"] = pathlib.Path(maxtext.__path__[0]) / "assets/tokenizers"
    names["again"] = base / "again"  # the teacher's run, for cases that go on with it
    shutil.copytree(names["runs"] / "teacher", names["again"] / "teacher")
    names["empty"].mkdir()
    for name in DAMAGED:
        shutil.copytree(names["teacher"] / "5", names[name] / "5")
    # A third of the bytes are parameters, wherever they lie: a tenth of each file does not hold them.
    for file in (names["truncated"] / "5/items").glob("ocdbt.process_*/d/*"):
        os.truncate(file, file.stat().st_size // 10)
    (names["without_index"] / "5/items/_METADATA").unlink()
    (names["without_manifest"] / "5/items/manifest.ocdbt").unlink()
    (names["unreadable_index"] / "5/items/_METADATA").write_text("{")
    ocp.save_checkpointables(names["without_params"], {"items": {"opt_state": {"mu": np.ones(4)}}})
    params = ocp.load(names["teacher"] / "5", checkpointable_name="items")["params"]
    params["params"]["decoder"]["decoder_norm"]["scale"] *= np.nan
    ocp.save_checkpointables(names["poisoned"], {"items": {"params": params}})
    return names


def filled_in(folders, arguments):
    """The arguments with what stands in braces, and a folder for the output."""
    arguments = [re.sub(r"\{(\w+)\}", lambda m: str(folders[m[1]]), a) for a in arguments]
    if not any(a.startswith("base_output_directory=") for a in arguments):
        arguments.append(f"base_output_directory={folders['out']}")
    return arguments


def refusal(folders, arguments, config=SMOKE):
    """The message that a run with bad input is refused with."""
    arguments = ["train.py", config, *filled_in(folders, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(ConfigError) as raised:
        trainer.main(arguments)
    assert not any(line.startswith("step ") for line in output.getvalue().splitlines())
    assert len(str(raised.value).splitlines()) <= 8 and len(str(raised.value)) < 2000
    return str(raised.value)


# One per place where a run is refused: the arguments, the teacher's checkpoint, the data, the first step.
TYPED = ("misspelt key", "checkpoint whose arrays are cut off", "no grain data", "teacher with a number that is none")


@pytest.mark.parametrize("case", [case for case in CASES if case not in TYPED])
def test_bad_input_ends_with_a_message(folders, case):
    arguments, parts = CASES[case]
    message = refusal(folders, arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("case", TYPED)
def test_a_command_with_bad_input_ends_with_its_message_and_status_2(folders, case):
    arguments, parts = CASES[case]
    result = execute(["MaxText/train.py"], [SMOKE, *filled_in(folders, arguments)], folders["out"])
    assert result.status == 2, result.output[-3000:]
    assert "Traceback" not in result.output
    assert not any(line.startswith("step ") for line in result.output.splitlines())
    message = result.output[result.output.rindex("error: ") :]
    assert len(message.splitlines()) <= 8 and all(part in message for part in parts)


@pytest.mark.parametrize("key", REFUSED)
def test_an_option_that_distillation_does_not_carry_is_refused_by_name(folders, key):
    message = refusal(folders, [*KD, f"{key}={REFUSED[key]}"])
    assert f"{key}=" in message
    assert "use_kd=true" in message
    assert "allowed is" in message


def test_a_tracker_that_is_not_installed_is_named(folders, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else there(name, *rest)
    )
    assert "enable_wandb=True: the package wandb is not installed" in refusal(folders, ["enable_wandb=true"])


def test_every_option_that_is_refused_by_name_is_tried_here():
    assert REFUSED_WITH_KD.keys() <= REFUSED.keys()


def test_an_option_is_refused_wherever_it_was_set(folders, tmp_path):
    (tmp_path / "models").mkdir()
    preset = (ROOT / "MaxText/configs/models/tiny-llama.yml").read_text()
    (tmp_path / "models/mine.yml").write_text(f"{preset}\nlog_moe_bias_norms: true\n")
    (tmp_path / "mine.yml").write_text(f"base_config: {SMOKE}\nmodel_name: mine\n")
    message = refusal(folders, KD, config=str(tmp_path / "mine.yml"))
    assert "log_moe_bias_norms=True: not supported together with use_kd=true; allowed is False" in message


def test_a_command_without_arguments_says_what_it_takes(tmp_path):
    result = execute(["MaxText/train.py"], [], tmp_path, 1)
    assert (result.status, result.output) == (
        2,
        "error: nothing to train: python MaxText/train.py <config>.yml key=value ...\n",
    )


def test_a_machine_on_its_own_that_looks_for_others_is_told_so(tmp_path):
    arguments = [SMOKE, f"base_output_directory={tmp_path}", "skip_jax_distributed_system=false"]
    result = execute(["MaxText/train.py"], arguments, tmp_path)
    assert result.status == 2
    message = result.output[result.output.index("error: ") :]
    assert len(message.splitlines()) == 1
    assert "hardware, skip_jax_distributed_system: found no cluster to join" in message
    assert "hardware=cpu skip_jax_distributed_system=true" in message


def test_settings_that_teach_nothing_are_warned_of(folders, capsys):
    # An unreadable state to begin with ends it, after the warnings.
    message = {"load_full_state_path": "/no/such/state", "kd_top_k": 1, "kd_alpha": 1}
    keys = [f"{key}={value}" for key, value in message.items()]
    with pytest.raises(ConfigError):
        trainer.main(["train.py", SMOKE, *filled_in(folders, [*KD, *keys])])
    said = capsys.readouterr().out
    assert "warning: kd_top_k=1" in said and "warning: kd_alpha=1" in said
