"""Bad input, typed on the command line: status 2, no training step, no traceback, one message that names the key."""

import concurrent.futures
import os
import re

import pytest
from conftest import SMOKE, execute

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
        ["vocab_size is 512", "the student's 256"],
    ),
    "other batch": ([*KD, "kd_teacher_overrides={max_target_length: 16}"], ["max_target_length", "16", "32"]),
    "block diffusion": ([*KD, "training_objective=block_diffusion", "block_diffusion_mask_id=1"], ["diffusion"]),
    "elastic": ([*KD, "elastic_enabled=true", "enable_single_controller=true"], ["elastic_enabled"]),
    "diloco": ([*KD, "enable_diloco=true", "ici_diloco_parallelism=1"], ["diloco"]),
    "indexer": ([*KD, "use_indexer=true"], ["indexer"]),
    "ready-made step": ([*KD, "compiled_trainstep_file=/tmp/step.pickle"], ["compiled_trainstep_file"]),
    "dropless retry": ([*KD, "moe_dropless_fallback=step"], ["moe_dropless_fallback"]),
    "lora": ([*KD, "lora.enable_lora=true"], ["lora"]),
    "fp8": ([*KD, "quantization=fp8"], ["quantization", "fp8"]),
    "tunix accumulation": ([*KD, "use_tunix_gradient_accumulation=true"], ["use_tunix_gradient_accumulation"]),
    "dpo": ([*KD, "use_dpo=true", "packing=false"], ["use_dpo"]),
    "metrics file in no folder": (["metrics_file=/dev/null/metrics.jsonl"], ["metrics_file='/dev/null/metrics.jsonl'"]),
    "a run that is over": (["run_name=teacher", "base_output_directory={runs}"], ["already exists at step 5"]),
    "no data": (
        ["dataset_type=grain", "grain_train_files=/no/such/*.arrayrecord", "grain_file_type=arrayrecord"],
        ["/no/such/"],
    ),
}


@pytest.fixture(scope="module")
def results(teacher, tmp_path_factory):
    """Every case, run two at a time: each spends its time on imports."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "empty").mkdir()
    names = {"teacher": teacher, "empty": str(folder / "empty"), "runs": os.path.dirname(os.path.dirname(teacher))}

    def run(case):
        arguments = [re.sub(r"\{(teacher|empty|runs)\}", lambda m: names[m[1]], a) for a in CASES[case][0]]
        base = (
            [] if any(a.startswith("base_output_directory") for a in arguments) else [f"base_output_directory={folder}"]
        )
        return execute(["MaxText/train.py"], [SMOKE, *base, *arguments], folder)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_a_message(results, case):
    result = results[case]
    assert result.status == 2, result.output[-3000:]
    assert "Traceback" not in result.output
    assert not any(line.startswith("step ") for line in result.output.splitlines())
    last = result.output[result.output.rindex("error: ") :]
    assert len(last.splitlines()) <= 8
    for part in CASES[case][1]:
        assert part in last


def test_settings_that_teach_nothing_are_warned_of(train, teacher):
    keys = dict(use_kd="true", kd_teacher_parameters_path=teacher, steps=1)
    result = train("one_token", **keys, kd_top_k=1, kd_alpha=1)
    assert "warning: kd_top_k=1" in result.output
    assert "warning: kd_alpha=1" in result.output
