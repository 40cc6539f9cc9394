"""How much of the text a run never reads: what its pipeline cuts off documents, measured on a sample of them.

The sample is read by the run's own pipeline, into rows so much longer that hardly a document is cut. Left out on
purpose: data that is given as tokens, and pipelines that read elsewhere or in parts, of which it is only said that
they cut.
"""

import contextlib
from typing import Any

import jax
import numpy as np

from MaxText import upstream
from MaxText.data import pipelines

DOCUMENTS = 256  # in a sample, or fewer if they are long
TOKENS = 1 << 20
# What reads documents whole, by the setting that cuts them.
REMEDIES = {"use_truncation=True": "use_truncation=false reads them whole"} | dict.fromkeys(
    ("dataset_type=hf", "dataset_type=tfds"), "dataset_type=grain with use_truncation=false reads them whole"
)
NONE = np.array([], int)
LONGER = 32  # the rows of the sample; what is longer still counts as that


def cut_by(config: Any) -> str:
    """The setting by which a run's pipeline cuts documents to a row, as key=value; "" if it reads them whole."""
    kind = config.dataset_type
    if kind in ("hf", "tfds") and not (config.use_dpo or config.use_sft):
        return f"dataset_type={kind.value}"
    if kind not in ("grain", "hf") or config.grain_file_type in ("mmap", "mmap_npy") or not config.tokenize_train_data:
        return ""
    if config.use_dpo or config.use_sft:
        return "use_dpo=True" if config.use_dpo else "use_sft=True"
    return "use_truncation=True" if config.use_truncation else ""


def report(config: Any, mesh: Any) -> list[str]:
    """What is never read, in sentences for the head of a run; none where all of it is."""
    lines = []
    if setting := cut_by(config):
        length = f"max_target_length={config.max_target_length}"
        cut = f"{setting} cuts each document after {length} tokens"
        remedy = REMEDIES.get(setting, "raise max_target_length")
        lengths, targets = sample(config, mesh) if jax.process_index() == 0 else (NONE, NONE)
        if not lengths.size:
            lines.append(f"warning: {cut}, what lies beyond is never read; {remedy}")
        elif share := 1 - np.minimum(lengths, config.max_target_length).sum() / lengths.sum():
            lines.append(
                f"warning: {cut}: of {lengths.sum():,} tokens in a sample of {len(lengths)} documents "
                f"{100 * share:.1f} % are never read; {remedy}"
            )
        else:
            lines.append(f"    text  {cut}; of a sample of {len(lengths)} none is longer")
        if idle := int(np.count_nonzero(targets == 0)):
            lines.append(
                f"warning: {idle} of {len(targets)} have no target within {length}: nothing is learnt from them"
            )
    loaded, used = config.global_batch_size_to_load, config.global_batch_size_to_train_on
    if config.per_device_batch_size < 1 and config.expansion_factor_real_data <= 1:
        rows = f"a step reads {loaded} rows, one for each device, and trains on {used} of them"
        lines.append(f"warning: per_device_batch_size={config.per_device_batch_size:g}: {rows}; the rest is never seen")
    return lines


def sample(config: Any, mesh: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each of some documents, as this host gives them, and how many of them are targets in a row.

    None where it cannot be tried.
    """
    if config.colocated_python_data_input or config.grain_use_elastic_iterator or config.expansion_factor_real_data > 1:
        return NONE, NONE
    alone = upstream.with_settings(
        config,
        max_target_length=LONGER * config.max_target_length,
        packing=False,
        num_epoch=1,
        eval_interval=-1,
        global_batch_size_to_load=mesh.size,
        grain_worker_count=0,
        enable_data_shuffling=config.enable_data_shuffling and config.dataset_type == "grain",  # others fill a buffer
    )
    lengths: list[int] = []
    targets: list[int] = []
    # Whatever is wrong with the data is said by the run itself, when it comes there.
    with contextlib.suppress(Exception), pipelines.mended(alone):
        batches, _ = upstream.input_pipeline_interface.create_data_iterator(alone, mesh)
        for batch in batches.local_iterator:
            found = np.count_nonzero(batch["inputs_segmentation"], axis=1)
            in_row = np.count_nonzero(batch["targets_segmentation"][:, : config.max_target_length - 1], axis=1)
            lengths += found[found > 0].tolist()
            targets += in_row[found > 0].tolist()
            if len(lengths) >= DOCUMENTS or sum(lengths) >= TOKENS:
                break
        upstream.multihost_dataloading._close_iterator(batches.local_iterator)
    return np.array(lengths, int), np.array(targets, int)
