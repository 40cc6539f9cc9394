"""Laws of data that cannot be read: the message names the file, and the row or what is wrong with it."""

import types
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from letters import write_array_record, write_json, write_parquet

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.data import faults
from MaxText.loop import failures
from MaxText.models.student import refusals_as_config_errors

TEXTS = ["abcdefghij" * 12] * 600  # several chunks of an ArrayRecord


def config_of(form: str, files: Any, dataset_type: str = "grain", **keys: Any) -> Any:
    patterns = {"grain_train_files": str(files), "grain_eval_files": str(files), "hf_train_files": str(files)}
    settings = {"dataset_type": dataset_type, "grain_file_type": form, "hf_path": form, "hf_data_dir": None,
                "hf_eval_files": str(files), "hf_name": None, "grain_train_mixture_config_path": "", "eval_interval": 1,
                "train_data_columns": ["text"], "eval_data_columns": ["text"], "base_output_directory": ""}  # fmt: skip
    return types.SimpleNamespace(**settings | patterns | keys)


def test_a_damaged_file_is_named(tmp_path) -> None:
    for number in range(3):
        path = write_array_record(tmp_path / f"{number}.arrayrecord", TEXTS)
    config = config_of("arrayrecord", tmp_path / "*.arrayrecord")
    assert faults.named(config, RuntimeError()) == ""
    whole = (tmp_path / "1.arrayrecord").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:5000] + bytes(2000) + whole[7000:]):
        (tmp_path / "1.arrayrecord").write_bytes(broken)
        message = faults.named(config, RuntimeError())
        assert message.startswith(f"{tmp_path}/1.arrayrecord: is damaged or was cut short"), path
    half = write_parquet(tmp_path / "half.parquet", [*TEXTS])
    (tmp_path / "half.parquet").write_bytes((tmp_path / "half.parquet").read_bytes()[:300])
    assert faults.named(config_of("parquet", half), OSError()).startswith(f"{half}: is damaged or no Parquet")


@pytest.mark.parametrize("kind", ["grain", "hf"])
def test_a_null_text_is_named_by_file_and_row(kind, tmp_path) -> None:
    texts = ["a"] * 300 + [None] + ["b"] * 3
    for form, write in (("parquet", write_parquet), ("json", write_json)):
        write(tmp_path / f"0.{form}", ["c", "d"])
        null = write(tmp_path / f"1.{form}", texts)
        message = faults.named(config_of(form, tmp_path / f"*.{form}", kind), ValueError("TextEncodeInput must be ..."))
        assert message.startswith(f"{null}: the text of row 300 (the first is 0) is null, in column 'text'")
        assert (
            faults.named(config_of(form, null, kind, train_data_columns=["other"], eval_interval=-1), ValueError())
            == ""
        )


def test_a_conversation_in_which_nothing_is_said_is_named(tmp_path) -> None:
    said = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", None)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": said}), tmp_path / "turns.parquet")
    config = config_of("parquet", tmp_path / "turns.parquet", train_data_columns=["messages"])
    assert "turns.parquet: the text of row 1 (the first is 0) is null" in faults.named(config, TypeError())


def test_a_run_is_told_what_is_wrong_with_its_data(tmp_path) -> None:
    null = write_parquet(tmp_path / "null.parquet", [None])
    config = config_of("parquet", null)
    with pytest.raises(failures.RunError, match=r"evaluation data could not be read .*row 0 .*is null"):
        list(failures.batches(config, (np.zeros(int("x")) for _ in range(1))))
    half = write_array_record(tmp_path / "half.arrayrecord", TEXTS)
    (tmp_path / "half.arrayrecord").write_bytes((tmp_path / "half.arrayrecord").read_bytes()[:70_000])
    datasets = upstream.grain_data_processing.get_datasets
    with (
        pytest.raises(ConfigError, match=r"half.arrayrecord: is damaged or was cut short"),
        refusals_as_config_errors(config_of("arrayrecord", half)),
    ):
        datasets(half, "arrayrecord", False, 0, 1, 1, 0, 1, 0, 1, 1, 1)
