"""Laws of evaluation data: all of it counts, once, whatever the batch, the pipeline and the number of hosts.

25 documents of 2 to 26 letters, each with an end-of-text mark: 350 targets in rows of their own.
"""

import json

import absl.flags
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SMOKE
from letters import save_letters

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.data import evaluation

DOCUMENTS = ["abcdefghijklmnopqrstuvwxyz"[: length + 1] for length in range(1, 26)]
TARGETS = sum(map(len, DOCUMENTS))  # with the mark, less the first token of each


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """dataset_type -> the keys that read the documents for evaluation."""
    folder = tmp_path_factory.mktemp("documents")
    save_letters(folder / "tokenizer")
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), folder / "text.parquet")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    common = {"tokenizer_type": "huggingface", "tokenizer_path": folder / "tokenizer", "base_output_directory": folder,
              "max_target_length": 32, "add_bos": "false", "eval_interval": 1, "packing": "false", "run_name": "a",
              "enable_checkpointing": "false", "metrics_file": ""}  # fmt: skip
    parquet = folder / "text.parquet"
    grain = {"dataset_type": "grain", "grain_file_type": "parquet", "grain_worker_count": 0,
             "grain_worker_count_eval": 0, "grain_train_files": parquet, "grain_eval_files": parquet}  # fmt: skip
    hf = {"dataset_type": "hf", "hf_path": "json", "hf_train_files": folder / "text.jsonl",
          "hf_eval_files": folder / "text.jsonl", "hf_eval_split": "train"}  # fmt: skip
    return {"grain": common | grain, "hf": common | hf}


def batches(keys: dict, **more) -> list[dict[str, np.ndarray]]:
    """The evaluation's batches as they reach the step."""
    arguments = [f"{key}={value}" for key, value in (keys | more).items()]
    config = resolve.initialize(["train.py", SMOKE, *arguments]).student
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    if not absl.flags.FLAGS.is_parsed():  # as app.run does
        absl.flags.FLAGS(["test"])
    with evaluation.read_whole():
        _, iterator = upstream.input_pipeline_interface.create_data_iterator(config, mesh)
    shapes = upstream.maxtext_utils.get_shaped_batch(config, is_eval=True)
    found = list(iterator)
    for batch in found:  # of the shapes that the step is compiled for
        assert {key: x.shape for key, x in batch.items()} == {key: x.shape for key, x in shapes.items()}
    used = [{key: x[: config.micro_batch_size_to_eval_on] for key, x in batch.items()} for batch in found]
    return jax.tree.map(np.asarray, used)


SIZES = [
    {"per_device_batch_size": 4},
    {"per_device_batch_size": 4, "gradient_accumulation_steps": 4},
    {"per_device_batch_size": 4, "eval_per_device_batch_size": 2},
    {"per_device_batch_size": 2, "eval_per_device_batch_size": 32},
]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("kind", "sizes"), [*(("grain", sizes) for sizes in SIZES), ("hf", SIZES[1])])
def test_every_target_of_the_evaluation_data_counts_once(kind, packing, sizes, keys):
    found = batches(keys[kind], packing=packing, **sizes)
    count = sum(int((batch["targets_segmentation"] != 0).sum()) for batch in found)
    assert count == TARGETS
    letters = sum((batch["targets"] * (batch["targets_segmentation"] != 0)).sum() for batch in found)
    vocabulary = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=3)}
    assert letters == sum(sum(vocabulary[letter] for letter in text[1:]) + 2 for text in DOCUMENTS)


def test_a_host_whose_data_has_ended_goes_along_with_rows_that_do_not_count(monkeypatch):
    answers = iter([True, True, True, False])
    monkeypatch.setattr(evaluation, "any_host", lambda has: next(answers))
    names = ("targets", "targets_segmentation", "inputs_segmentation")
    empty, one = dict.fromkeys(names, np.zeros((2, 3), np.int32)), dict.fromkeys(names, np.ones((1, 3), np.int32))
    counts = [int((b["targets_segmentation"] != 0).sum()) for b in evaluation.FullBatches([one], empty)]
    assert counts == [3, 0, 0]
    answers = iter([True, False])
    assert [b["targets"].shape for b in evaluation.FullBatches([], empty)] == [(2, 3)]


def test_hosts_without_data_of_their_own_take_no_part_in_an_evaluation(keys):
    with pytest.raises(ConfigError, match=r"expansion_factor_real_data=2\.0 eval_interval=1"):
        batches(keys["grain"], expansion_factor_real_data=2)
