"""Laws of a teacher's stored targets as a user meets them: written by cache_teacher.py, learned from by train.py.

The data are rows of random tokens, of which each is told from the others. Programs run in the test's process; what is
killed, has several devices, or tells by its status is one of its own.
"""

import contextlib
import io

import pytest
import token_rows
from conftest import SMOKE, Result, run_in_this_process

from MaxText import cache_teacher
from MaxText.cache import reading

pytestmark = pytest.mark.e2e

PROGRAM = ["MaxText/cache_teacher.py"]
VOCABULARY = 256  # of tiny-llama
LENGTHS = [33, 20, 9, 2, 31, 12, 25, 7, 18, 33, 28]  # two batches of four, and one that is not full
EVAL_LENGTHS = [14, 33, 6, 22, 30]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Keys of rows to train on and to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    return token_rows.KEYS | {
        "grain_train_files": token_rows.write(folder / "train.arrayrecord", LENGTHS, seed=0),
        "grain_eval_files": token_rows.write(folder / "eval.arrayrecord", EVAL_LENGTHS, seed=1),
        "eval_interval": 2,
        "eval_steps": -1,
    }


@pytest.fixture(scope="module")
def keys(data, teacher):
    """Keys of a distillation on that data, whose checkpoints nobody needs."""
    kd = {"use_kd": "true", "kd_teacher_parameters_path": teacher}
    return data | kd | {"enable_checkpointing": "false", "learning_rate_schedule_steps": 6}


def arguments(keys, folder):
    keys = {"base_output_directory": folder, "run_name": "run"} | keys
    return [SMOKE, *(f"{key}={value}" for key, value in keys.items())]


def write(folder, keys, **more):
    """The status and the output of the caching of `keys`, in this process, into `folder`."""
    line = ["cache_teacher.py", *arguments(keys | {"kd_cache_path": folder} | more, folder.parent)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = cache_teacher.main(line)
    return status, output.getvalue()


def learn(folder, keys, **more) -> Result:
    """A run of `keys` in this process, whose folder is `folder`."""
    return run_in_this_process(arguments(keys | more, folder) , folder / "run")


def from_cache(keys, cache):
    return {key: value for key, value in keys.items() if not key.startswith("kd_teacher_p") and "_files" not in key} | {"kd_cache_path": cache}


WHOLE = {"kd_cache_mode": "top_k", "kd_top_k": VOCABULARY}


def test_a(keys, tmp_path):
    import time
    t=time.time()
    print(write(tmp_path / "cache", keys, **WHOLE))
    print("wrote", time.time()-t); t=time.time()
    print(len(list(reading.rows(tmp_path/"cache"))))
    live = learn(tmp_path / "live", keys)
    print("live", time.time()-t); t=time.time()
    stored = learn(tmp_path / "stored", from_cache(keys, tmp_path / "cache"))
    print("stored", time.time()-t); t=time.time()
    print(live.output); print(stored.output)
    for a, b in zip(live.rows("e"), stored.rows("e")): print(a); print(b)
    for a, b in zip(live.rows(), stored.rows()): print(a); print(b)
