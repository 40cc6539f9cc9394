"""Laws of the files of a run's data: a copy of them is the same data, others are not, and a resumed run is told."""

import json
import shutil
import types
from typing import Any

import pytest
from conftest import SMOKE
from etils import epath

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.data import files
from MaxText.loop import manifest


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    return resolve.initialize(["train.py", SMOKE, f"base_output_directory={folder}"])


@pytest.fixture
def shards(tmp_path: Any) -> Any:
    folder = tmp_path / "first"
    folder.mkdir()
    for number in range(3):
        (folder / f"train-{number}.arrayrecord").write_bytes(bytes(10 + number))
    (folder / "eval.arrayrecord").write_bytes(bytes(5))
    return folder


def with_data(config: Any, folder: Any, **keys: Any) -> Any:
    keys = {"grain_train_files": f"{folder}/train-*", "grain_eval_files": f"{folder}/eval*", "eval_interval": 1} | keys
    kind = type(config.dataset_type)
    return upstream.with_settings(config, dataset_type=kind("grain"), **keys)


TRAIN = {f"train-{number}.arrayrecord": 10 + number for number in range(3)}


def test_files_are_known_by_name_and_size_wherever_they_lie(smoke, shards, tmp_path) -> None:
    expected = {"train": TRAIN, "eval": {"eval.arrayrecord": 5}}
    assert files.listed(with_data(smoke.student, shards)) == expected
    moved = shutil.copytree(shards, tmp_path / "second")
    assert files.listed(with_data(smoke.student, moved)) == expected
    assert files.listed(with_data(smoke.student, moved, eval_interval=-1)) == expected | {"eval": {}}
    assert files.listed(smoke.student) == {"train": {}, "eval": {}}
    mixture = f"{shards}/train-0*,0.5;{moved}/train-1*,0.5"
    found = files.listed(with_data(smoke.student, shards, grain_train_files=mixture))["train"]
    assert found == {"first/train-0.arrayrecord": 10, "second/train-1.arrayrecord": 11}
    hf = type(smoke.student.dataset_type)("hf")
    keys = {"dataset_type": hf, "hf_path": "json", "hf_train_files": f"{shards}/*-2*", "hf_eval_files": None}
    assert files.listed(upstream.with_settings(smoke.student, **keys))["train"] == {"train-2.arrayrecord": 12}


@pytest.fixture
def begun(smoke: Any, shards: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """begun(folder, allow=..): goes on with a run that began on the shards, with those in the folder."""
    steps = iter([None, 3, 3, 3])
    engine = types.SimpleNamespace(latest_step=lambda manager: next(steps))
    monkeypatch.setattr(manifest, "upstream", types.SimpleNamespace(checkpointing=engine))
    run = tmp_path / "run"
    run.mkdir()

    def go(folder: Any, allow: bool = False, **keys: Any) -> None:
        config = with_data(smoke.student, folder, checkpoint_dir=str(run / "checkpoints"), **keys)
        kd = smoke.kd.model_copy(update={"kd_allow_change": allow})
        manifest.keep(config, kd, None, types.SimpleNamespace(checkpoint_manager=object(), cached=None))

    go(shards)
    go.file = epath.Path(run / manifest.NAME)  # type: ignore[attr-defined]
    return go


def test_a_resumed_run_is_refused_other_files_unless_allowed(begun, shards, tmp_path, capsys) -> None:
    other = shutil.copytree(shards, tmp_path / "other")
    begun(other)
    (other / "train-1.arrayrecord").write_bytes(bytes(99))
    (other / "train-2.arrayrecord").rename(other / "train-7.arrayrecord")
    what = "training files: 3 of 4 differ, the first is train-1.arrayrecord: 11 bytes before, 99 bytes now"
    with pytest.raises(ConfigError, match=what):
        begun(other)
    begun(other, allow=True)
    assert f"warning: kd_allow_change=true: {what}" in capsys.readouterr().out
    assert json.loads(begun.file.read_text())["data"]["train"]["train-7.arrayrecord"] == 12


def test_an_evaluation_that_is_begun_or_left_off_is_no_other_data(begun, shards, tmp_path) -> None:
    other = shutil.copytree(shards, tmp_path / "other")
    (other / "eval.arrayrecord").write_bytes(bytes(6))
    with pytest.raises(ConfigError, match=r"evaluation files: 1 of 1 differ, the first is eval.arrayrecord: 5 bytes"):
        begun(other)
    begun(shards, eval_interval=-1)
    begun(other)


def test_a_manifest_older_than_the_list_of_files_is_held_to_the_rest(begun, shards) -> None:
    begun.file.write_text(json.dumps({"settings": {"use_kd": False}}))
    begun(shards)
    assert json.loads(begun.file.read_text())["data"]["train"] == TRAIN


def test_evaluations_that_are_begun_or_left_off_are_no_other_files() -> None:
    """A cache that no evaluation reads is listed without a split for them."""
    alone, both = {"train": {"a": "0" * 64}}, {"train": {"a": "0" * 64}, "eval": {"b": "1" * 64}}
    for before, now in ((alone, alone), (alone, both), (both, alone), (both, both)):
        assert files.differences(before, now) == []
    (line,) = files.differences(both, both | {"eval": {"b": "2" * 64}})
    assert line.startswith("evaluation files: 1 of 1 differ")
