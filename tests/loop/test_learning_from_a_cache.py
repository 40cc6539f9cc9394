"""Laws of a student that learns from stored targets: it learns what the live teacher would teach it, and says what not.

Caches that only have to be read are made of random numbers (teacher_rows.py).
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
from itertools import product
from unittest import mock

import caches
import conftest
import jax
import jax.numpy as jnp
import lab as lab_lib
import letters
import numpy as np
import pytest
import teacher_rows
import token_rows
from conftest import TRAIN, execute, few, run_in_this_process
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import train as trainer
from MaxText import train_compile, upstream
from MaxText.cache import codec, manifest, quantiser
from MaxText.config import resolve
from MaxText.config.checks import check_kd
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher
from MaxText.data import cached, evaluation
from MaxText.loop import caching, header, step, targets
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

# Under plain gradient descent at rate 1 what a parameter moves by is its gradient.
DESCENT = {"opt_type": "sgd", "learning_rate": 1, "warmup_steps_fraction": 0, "gradient_clipping_threshold": 0}
MICROBATCHES = {"gradient_accumulation_steps": 2, "per_device_batch_size": 2}
DENSE_TEACHER = {"kd_teacher_model_name": "tiny-llama"}


# A step ---------------------------------------------------------------------------------------------------------------


def two_documents_a_row():
    batch = lab_lib.padded_batch()
    second = np.arange(32) >= np.array([[5], [9], [14], [20]])
    for name in ("inputs_segmentation", "targets_segmentation"):
        batch[name] = jnp.where(batch[name] > 0, batch[name] + second, 0)
    return batch


def with_targets(lab, batch, **kept):
    """The batch with what the teacher says of it: as it is stored, but not rounded."""
    kd = lab.run.kd.model_copy(update=kept)
    keyed = batch | {targets.ROW_KEY: jnp.zeros(len(batch["targets"]), jnp.uint32)}
    with jax.set_mesh(lab.student.mesh):
        said = targets.jitted(lab.run.student, kd, lab.teacher, lab.student.mesh)(lab.teacher.state, keyed)
    log_weights = jnp.zeros(said.ids.shape) if said.log_probs is None else said.log_probs
    tail = {} if said.log_tail is None else {"teacher_log_tail": said.log_tail}
    return batch | tail | {
        "teacher_ids": said.ids,
        "teacher_log_weights": log_weights,
        "teacher_target_log_prob": said.target_log_prob,
        "teacher_entropy": said.entropy,
    }  # fmt: skip


def taught(lab, temperature=1.0):
    """The lab's models, of which the teacher's targets stand in the batch."""
    return dataclasses.replace(lab.models, teacher_config=None, teacher=None, stored_temperature=temperature)


def stepped(lab, models, teacher, batch):
    """The metrics of a step, what it moves the parameters by, and the sums of an evaluation before it."""

    def both(state, teacher):
        after, output = step.train_step(models, lab.student.params_shardings, state, teacher, batch)
        evaluated = step.eval_step(models, state, teacher, batch)
        params = [nnx.filter_state(each["model"], nnx.Param) for each in (state, after)]
        return output["scalar"], jax.tree.map(jnp.subtract, *params), evaluated["scalar"]

    return jax.device_get(lab.under(both, lab.student.state, teacher))


CASES = [
    pytest.param({}, id="dense", marks=pytest.mark.slow),
    pytest.param(MICROBATCHES | {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}, id="microbatches and MTP"),
    pytest.param(conftest.EXPERTS | DENSE_TEACHER, id="experts", marks=pytest.mark.slow),
    pytest.param({"z_loss_multiplier": 0.1}, id="z-loss", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("keys", CASES)
def test_all_of_the_vocabulary_stored_teaches_what_the_live_teacher_does(keys, teacher, tmp_path):
    lab = lab_lib.make(tmp_path, teacher, eval_interval=3, eval_steps=1, **DESCENT | keys)
    batch = two_documents_a_row()
    stored = with_targets(lab, batch, kd_cache_mode="top_k", kd_top_k=caches.VOCABULARY)
    live = stepped(lab, lab.models, lab.teacher.state, batch)
    found = stepped(lab, taught(lab), None, stored)
    assert found[0].keys() == live[0].keys()
    unknown = {f"evaluation/{name}_sum" for name in ("agreement", "reverse_kl_t1", "jsd_t1")}
    assert live[2].keys() - found[2].keys() == unknown
    for ours, theirs in ((found[0], live[0]), (found[2], live[2])):
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found[1], live[1])


@pytest.mark.slow
def test_conditioned_on_what_is_stored_a_student_may_learn_at_another_temperature(teacher, tmp_path):
    keys = {"kd_top_k": 16, "kd_truncation_strategy": "renormalize", "kd_temperature": 2}
    lab = lab_lib.make(tmp_path, teacher, eval_interval=3, eval_steps=1, **DESCENT | keys)
    batch = two_documents_a_row()
    stored = with_targets(lab, batch, kd_cache_mode="top_k", kd_temperature=1.0)
    live = stepped(lab, lab.models, lab.teacher.state, batch)
    found = stepped(lab, taught(lab), None, stored)
    # What is stored says nothing of the mass of 16 tokens at another temperature.
    assert live[0].keys() - found[0].keys() == {"learning/kd_kept_mass"}
    for name, value in found[0].items():
        np.testing.assert_allclose(value, live[0][name], rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found[1], live[1])


def test_what_stored_targets_cannot_tell_is_absent(teacher, tmp_path):
    lab = lab_lib.make(tmp_path, teacher, eval_interval=3, eval_steps=1)
    batch = two_documents_a_row()

    def sums(models, state, stored):
        trained = step.train_step(models, lab.student.params_shardings, state, None, stored)[1]
        return trained["scalar"], step.eval_step(models, state, None, stored)["scalar"]

    def names(temperature, **kept):
        stored = with_targets(lab, batch, **kept)
        return [
            {name.rpartition("/")[2] for name in found}
            for found in jax.eval_shape(functools.partial(sums, taught(lab, temperature)), lab.student.state, stored)
        ]

    with jax.set_mesh(lab.student.mesh), logical_axis_rules(lab.run.student.logical_axis_rules):
        draws = names(1.0, kd_cache_mode="sample")
        some = names(1.0, kd_cache_mode="top_k", kd_top_k=8)
        elsewhere = names(2.0, kd_cache_mode="top_k", kd_top_k=caches.VOCABULARY)
    assert [found & {"kd_kept_mass", "kept_mass_sum", "kl_t1_sum", "agreement_sum"} for found in draws] == [
        set(),
        {"kl_t1_sum"},
    ]
    assert [found & {"kd_kept_mass", "kept_mass_sum", "kl_t1_sum", "agreement_sum"} for found in some] == [
        {"kd_kept_mass"},
        {"kept_mass_sum"},
    ]
    assert [found & {"kd_kept_mass", "kept_mass_sum", "kl_t1_sum", "agreement_sum"} for found in elsewhere] == [
        set(),
        set(),
    ]


# Runs -----------------------------------------------------------------------------------------------------------------

LENGTHS = [33, 20, 9, 2, 31, 12, 25, 7, 18, 33, 28, 16]


@pytest.fixture(scope="module")
def data(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("data")
    return token_rows.KEYS | {
        "grain_train_files": token_rows.write(folder / "train.arrayrecord", LENGTHS, seed=0),
        "grain_eval_files": token_rows.write(folder / "eval.arrayrecord", [14, 33, 6, 22, 30], seed=1),
        "eval_interval": 2,
        "eval_steps": -1,
        "use_kd": "true",
        "kd_teacher_parameters_path": teacher,
        "learning_rate_schedule_steps": 6,
        "num_epoch": 2,
    }


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A cache of the whole vocabulary, and the keys that learn from it."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert caches.write(folder, data, **caches.WHOLE)[0] == 0
    return caches.students(data, folder)


def learn(folder, keys, **more):
    return run_in_this_process(caches.arguments(keys | more, folder), folder / "run")


def test_a_teacher_beside_the_cache_serves_evaluations_alone_and_they_say_the_same(data, whole, teacher, tmp_path):
    off = {"enable_checkpointing": "false", "steps": 3}
    alone = learn(tmp_path / "alone", whole, **off)
    beside = learn(tmp_path / "beside", whole, **off, kd_teacher_parameters_path=teacher)
    assert alone.column("learning/loss") == beside.column("learning/loss")
    assert {row["perf/per_device_teacher_tflops"] for row in alone.rows() + beside.rows()} == {0.0}
    live, stored = beside.rows("evaluation/"), alone.rows("evaluation/")
    assert len(stored) == 2
    for ours, theirs in zip(stored, live, strict=True):
        unknown = ("top1_agreement", "reverse_kl_t1", "jsd_t1")
        assert theirs.keys() - ours.keys() == {f"evaluation/{name}" for name in unknown}
        assert ours["evaluation/ce_loss"] == pytest.approx(theirs["evaluation/ce_loss"], rel=1e-6)
        assert ours["evaluation/teacher_ce_loss"] == pytest.approx(theirs["evaluation/teacher_ce_loss"], abs=5e-3)
        for name in ("evaluation/kl_t1", "evaluation/kd_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=2 * quantiser.BOUND)
    assert "the 256 likeliest tokens a position, stored in" in alone.output


def test_a_run_goes_on_with_a_moved_cache_and_not_with_that_of_another_teacher(whole, tmp_path):
    keys = whole | {"checkpoint_period": 1}
    uninterrupted = learn(tmp_path / "whole", keys, steps=4)
    learn(tmp_path / "cut", keys, steps=2)
    moved = shutil.copytree(whole["kd_cache_path"], tmp_path / "moved")
    file = moved / manifest.NAME
    text = file.read_text()
    file.write_text(re.sub(r'"fingerprint": "\w+"', f'"fingerprint": "{"0" * 32}"', text))
    with pytest.raises(ConfigError, match=r"(?s)kd_allow_change=False.*teacher: .* now"):
        learn(tmp_path / "cut", keys, steps=4, kd_cache_path=moved)
    # As large as it was, but made anew.
    file.write_text(re.sub(r'"sha256": "\w{8}', f'"sha256": "{"0" * 8}', text))
    with pytest.raises(ConfigError, match=r"(?s)kd_allow_change=False.*training files: 1 of 1 differ.*SHA-256 0{8}"):
        learn(tmp_path / "cut", keys, steps=4, kd_cache_path=moved)
    file.write_text(text)
    resumed = learn(tmp_path / "cut", keys, steps=4, kd_cache_path=moved)
    assert "(resumed)" in resumed.output
    assert resumed.column("learning/loss") == uninterrupted.column("learning/loss")


# The trainer, killed when it is to write the n-th row of its metrics.
KILLED = """
import os, runpy

from MaxText.loop import metrics

left = [{at}]
write = metrics.MetricLogger.write_metrics_locally

def counted(*arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    write(*arguments)

metrics.MetricLogger.write_metrics_locally = counted
runpy.run_path("MaxText/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_losses_of_a_run_that_was_not(whole, tmp_path):
    random = np.random.default_rng(0)
    keys = whole | {"checkpoint_period": 2, "steps": 60, "num_epoch": 25, "learning_rate_schedule_steps": 60}
    keys |= {"eval_interval": -1}
    uninterrupted = learn(tmp_path / "whole", keys)
    for kill in range(8):
        script = tmp_path / f"killed{kill}.py"
        script.write_text(KILLED.format(at=random.integers(1, 8)))
        result = execute([str(script)], caches.arguments(keys, tmp_path / "killed"), tmp_path)
        assert result.status == -9, result.output
    resumed = learn(tmp_path / "killed", keys)
    assert [row["step"] for row in resumed.rows()] == list(range(60))
    assert resumed.column("learning/loss") == uninterrupted.column("learning/loss")


def test_another_teacher_beside_the_cache_is_refused(whole, tmp_path):
    run = resolve.initialize(["train.py", *caches.arguments(whole | {"kd_teacher_parameters_path": "/t"}, tmp_path)])
    found = cached.find(run.student, run.kd)
    cached.check_same_teacher(run.kd, found, found.contents.teacher.fingerprint)
    with pytest.raises(ConfigError, match=r"kd_teacher_parameters_path='/t': .*kd_cache_path=.*kd_teacher_dtype"):
        cached.check_same_teacher(run.kd, found, "0" * 32)


# Rows -----------------------------------------------------------------------------------------------------------------

ROWS = 11
OWN = {"vocab_size": caches.VOCABULARY, "row_length": 32, "tokenizer": ""}
READING = {"enable_checkpointing": "false", "kd_alpha": 0.5, "grain_worker_count": 0}


def made(folder, splits=("train", "eval"), **changed):
    """A cache of 8 draws, or of the 8 likeliest tokens, of `ROWS` rows, whose first token is the row's number."""
    generator = np.random.default_rng(0)
    of = teacher_rows.random_top_k if changed.get("mode") == "top_k" else teacher_rows.random_draws
    rows = []
    for number in range(ROWS):
        tokens = teacher_rows.packed(generator, [9, 12], padding=11, vocabulary=caches.VOCABULARY)
        tokens["inputs"][0] = number
        rows.append(of(generator, tokens, vocabulary=caches.VOCABULARY))
    for split in splits:
        teacher_rows.cache(folder, rows, split, **OWN | changed)
    return folder


TOP_8 = {"mode": "top_k", "draws": 0, "top_k": 8, "log_prob_bound": quantiser.BOUND}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return made(tmp_path_factory.mktemp("drawn") / "cache")


@pytest.fixture(scope="module")
def likeliest(tmp_path_factory):
    return made(tmp_path_factory.mktemp("likeliest") / "cache", **TOP_8)


@pytest.mark.parametrize(("batch", "epochs", "rows"), few(((4, 1, 0), (8, 3, 9)), product((4, 8), (1, 3), (0, 9))))
def test_each_row_is_read_once_an_epoch_in_an_order_of_the_seed(batch, epochs, rows, drawn):
    expected = list(range(rows or ROWS))
    orders = []
    for seed in (0, 1):
        keys = READING | {"per_device_batch_size": batch, "num_epoch": epochs, "data_shuffle_seed": seed}
        found = caches.read(drawn, keys, kd_cache_rows=rows)
        counts = np.concatenate([(each["targets_segmentation"] != 0).any(axis=1) for each in found])
        numbers = np.concatenate([each["inputs"][:, 0] for each in found])
        assert len(counts) == -(-epochs * len(expected) // batch) * batch
        assert counts.tolist() == [True] * (epochs * len(expected)) + [False] * (len(counts) - epochs * len(expected))
        order = numbers[counts].reshape(epochs, -1)
        assert [sorted(epoch.tolist()) for epoch in order] == [expected] * epochs
        orders.append(order.tolist())
    assert orders[0] != orders[1]


def test_a_run_is_told_that_its_evaluations_read_less_than_it_asks_for(drawn, tmp_path):
    def told(**keys):
        keys = {"use_kd": "true", "kd_cache_path": drawn, "eval_interval": 2} | keys
        run = resolve.initialize(["train.py", *caches.arguments(keys, tmp_path)])
        return cached.evaluated_on_less(run.student, cached.find(run.student, run.kd))

    assert "eval_steps=3: 12 rows are asked for" in told(eval_steps=3) and f"{drawn} holds 11" in told(eval_steps=3)
    assert told(eval_steps=2) == told(eval_steps=-1) == told(eval_steps=3, eval_interval=-1) == ""


def test_a_host_without_a_row_of_evaluation_has_batches_like_the_others(drawn, monkeypatch):
    _, iterator = caches.opened(drawn, READING, per_device_batch_size=4, eval_interval=1, grain_worker_count_eval=0)
    full = iterator.dataloader
    like = {name: (array.shape, array.dtype) for name, array in next(iter(full)).items()}
    others_have_rows = iter([True, False])
    monkeypatch.setattr(evaluation, "any_host", lambda has: next(others_have_rows))
    (batch,) = evaluation.FullBatches([], full.empty)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == like
    assert not batch["targets_segmentation"].any()


# Errors ---------------------------------------------------------------------------------------------------------------


def refusal(keys):
    """What a run says that is refused before its first step."""
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ConfigError) as raised:
        trainer.main(["train.py", *keys])
    return str(raised.value)


REFUSED = [
    ("drawn", {"kd_temperature": 2}, r"kd_temperature=2: {cache} was made with 1 \(draws"),
    ("drawn", {"max_target_length": 16}, "max_target_length=16: {cache} was made with 32; set that, or cache anew"),
    ("drawn", {"vocab_size": 300, "override_model_config": "true"}, "vocab_size=300: {cache} was made with 256"),
    ("drawn", {"kd_vocab_size": 200}, "kd_vocab_size=200: {cache} was made with 0"),
    ("drawn", {"kd_divergence": "jsd"}, "kd_divergence=jsd: {cache} holds draws, .*forward_kl alone"),
    ("drawn", {"kd_top_k": 5}, "kd_top_k=5: {cache} holds draws, .* allowed is 0"),
    ("drawn", {"kd_top_p": 0.9}, "kd_top_p=0.9: not supported together with kd_cache_path=.*allowed is 0"),
    ("drawn", {"kd_mtp_alpha": 0.5, "mtp_num_layers": 1}, "kd_mtp_alpha=0.5: not supported .*allowed is 0"),
    (
        "drawn",
        {"kd_temperature_schedule": "linear", "kd_temperature_end": 2},
        "kd_temperature_schedule=linear: .*allowed is constant",
    ),
    ("drawn", {"kd_cache_verify": "true"}, "kd_cache_verify=True: .*allowed is False"),
    ("drawn", {"kd_cache_rows": ROWS + 1}, "kd_cache_rows=12: {cache} holds 11 rows"),
    ("drawn", {"per_device_batch_size": 16}, "global_batch_size_to_load=16: {cache} holds 11 rows"),
    ("drawn", {"per_device_batch_size": 16, "kd_cache_rows": 4}, "global_batch_size_to_load=16: {cache} holds 11 rows"),
    ("drawn", {"kd_cache_path": "gs://bucket/cache"}, "kd_cache_path='gs://bucket/cache': a folder is expected"),
    ("drawn", {"kd_cache_path": "/nowhere"}, "/nowhere/manifest.json: is missing; /nowhere is no cache"),
    (
        "drawn",
        {"kd_cache_path": "", "kd_cache_rows": 3, "kd_teacher_parameters_path": "/t"},
        "kd_cache_rows=3: belongs",
    ),
    ("likeliest", {"kd_top_k": 9}, "kd_top_k=9: {cache} holds 8 tokens a position at most"),
    (
        "likeliest",
        {"kd_temperature": 2, "kd_truncation_strategy": "other_bucket"},
        "kd_temperature=2: {cache} was made with 1 .*other_bucket needs the mass outside",
    ),
    ("likeliest", {"kd_temperature": 2, "kd_truncation_strategy": "renormalize_teacher"}, "kd_temperature=2: {cache}"),
]


@pytest.mark.parametrize(("kind", "keys", "message"), REFUSED)
def test_what_a_cache_cannot_teach_is_refused_by_name(kind, keys, message, request, tmp_path):
    folder = request.getfixturevalue(kind)
    line = caches.arguments({"use_kd": "true", "kd_cache_path": folder} | keys, tmp_path)
    assert re.search(message.format(cache=re.escape(f"kd_cache_path={folder}")), refusal(line))


def test_a_step_that_is_compiled_for_draws_takes_the_forward_kl_alone():
    kd = check_kd({"use_kd": True, "kd_cache_path": "/cache", "kd_divergence": "tvd"})
    with pytest.raises(ConfigError, match="kd_divergence=tvd: kd_cache_path=/cache holds draws"):
        cached.assumed(None, kd)


def test_the_likeliest_tokens_that_are_stored_are_the_truncation_that_a_run_tells_of(likeliest, drawn, tmp_path):
    def told(folder, **keys):
        line = caches.arguments({"use_kd": "true", "kd_cache_path": folder} | keys, tmp_path)
        run = resolve.initialize(["train.py", *line])
        kd = cached.learned_from(run.kd, cached.find(run.student, run.kd))
        return header.loss_text(kd), kd.warnings()

    assert "over the whole vocabulary" in told(drawn)[0]
    assert "over the teacher's top 8 (renormalize)" in told(likeliest)[0]
    assert "over the teacher's top 5 (renormalize)" in told(likeliest, kd_top_k=5)[0]
    assert "nothing sees the probability" in told(likeliest, kd_alpha=1)[1][0]


def test_a_folder_that_holds_no_cache_is_named_by_its_key(tmp_path):
    line = caches.arguments(caches.students(READING, tmp_path / "none"), tmp_path)
    run = resolve.initialize(["train.py", *line])
    with pytest.raises(ConfigError, match=r"^kd_cache_path=.*none: .*manifest.json: is missing"):
        cached.find(run.student, run.kd)


def test_a_cache_that_does_not_tell_what_its_teacher_was_computed_with_is_read(likeliest, tmp_path):
    folder = shutil.copytree(likeliest, tmp_path / "cache")
    edited(folder, lambda found: found["contents"].pop("computed_with"))
    line = caches.arguments(caches.students(READING, folder), tmp_path)
    run = resolve.initialize(["train.py", *line])
    assert cached.find(run.student, run.kd).contents.computed_with == {}


def edited(folder, change):
    file = folder / manifest.NAME
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def without_eval(folder):
    edited(folder, lambda found: found["splits"].pop("eval"))


def of_another_version(folder):
    edited(folder, lambda found: found.update(version=99))


def of_another_tokenizer(folder):
    edited(folder, lambda found: found["contents"].update(tokenizer="0" * 32))


def shard_of(folder):
    return sorted((folder / "train").glob("*.arrayrecord"))[1]


def cut(folder):
    shard = shard_of(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


DAMAGED = [
    (without_eval, r"{folder}/eval: holds no complete rows"),
    (of_another_version, r"manifest\.json: its format is version 99, this program reads version \d+; cache anew"),
    (of_another_tokenizer, r"tokenizer_path='.*letters': kd_cache_path=.* was made with another tokenizer"),
    (lambda folder: shard_of(folder).unlink(), r"rows-00001-.*\.arrayrecord: is missing"),
    (cut, r"rows-00001-.*\.arrayrecord: has [\d,]+ bytes, .*manifest.json says"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_cache_that_is_not_whole_is_refused_and_its_file_named(change, message, drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / "cache")
    change(folder)
    letters.save_letters(tmp_path / "letters")
    keys = {"use_kd": "true", "kd_cache_path": folder, "eval_interval": 2, "tokenizer_path": tmp_path / "letters"}
    assert re.search(message.format(folder=folder), refusal(caches.arguments(keys, tmp_path)))


def flip(folder):
    """In one row of the second shard, a bit."""
    shard = shard_of(folder)
    content = bytearray(shard.read_bytes())
    record = codec.encode(caches.rows(folder)[4])
    content[content.index(record) + len(record) // 2] ^= 4
    shard.write_bytes(bytes(content))


CACHING_REFUSED = [
    ({"kd_cache_path": ""}, "kd_cache_path='': caching needs it, the folder to write"),
    ({"kd_teacher_parameters_path": ""}, "kd_teacher_parameters_path='': caching needs it, the teacher"),
    ({"kd_top_p": 0.5}, "kd_top_p=0.5: .*allowed is 0"),
    ({"kd_top_k": 5}, "kd_cache_mode=sample kd_top_k=5"),
    ({"kd_cache_mode": "top_k"}, "kd_cache_mode=top_k kd_top_k=0"),
    ({"kd_cache_path": "gs://bucket/x"}, "kd_cache_path='gs://bucket/x': a folder is expected"),
    ({"kd_temperature_schedule": "linear", "kd_temperature_end": 2}, "kd_temperature_schedule=linear: .*constant"),
    ({"kd_cache_draws": 0}, "kd_cache_draws=.*0"),
    ({"dataset_type": "synthetic", "eval_interval": -1}, "dataset_type=synthetic: all rows are alike"),
]


@pytest.mark.parametrize(("keys", "message"), CACHING_REFUSED)
def test_what_cannot_be_cached_is_refused_by_name(keys, message, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        caches.write(tmp_path / "cache", data | keys if keys.get("kd_cache_path") is None else data, **keys)
    assert not (tmp_path / "cache").exists()


OTHERS = [
    ({"data_shuffle_seed": 1}, r"seed: 0 there, 1 now"),
    ({"kd_temperature": 2}, r"kd_temperature: 1\.0 there, 2\.0 now"),
    ({"kd_cache_draws": 24}, "kd_cache_draws: 50 there, 24 now"),
    ({"kd_cache_mode": "top_k", "kd_top_k": 5}, "kd_cache_mode: 'sample' there, 'top_k' now"),
    ({"max_target_length": 16}, "max_target_length: 32 there, 16 now"),
    ({"vocab_size": 300, "override_model_config": "true"}, "vocab_size: 256 there, 300 now"),
    ({"per_device_batch_size": 8}, "global_batch_size_to_load: 4 there, 8 now"),
    ({"packing": "true"}, "packing: False there, True now"),
    ({"train_data_columns": "['summary']"}, r"train_data_columns: \['text'\] there, \['summary'\] now"),
    ({"kd_teacher_model_name": "tiny-qwen3"}, "kd_teacher_model_name: 'tiny-llama' there, 'tiny-qwen3' now"),
    (
        {"kd_teacher_overrides": "{rope_max_timescale: 500000}"},
        r"kd_teacher_overrides: \{\} there, \{'rope_max_timescale': 500000\} now",
    ),
    ({"tokenizer_type": "huggingface", "tokenizer_path": "letters"}, "tokenizer: .* there, .* now"),
    ({"fingerprint": "1" * 32}, "teacher: /t at step 5 .* there, /t at step 5 .* now"),
]


def contents(keys, tmp_path, fingerprint="0" * 32, **changed):
    line = caches.arguments(keys | {"kd_cache_path": tmp_path / "cache"} | changed, tmp_path)
    run = resolve.initialize(["cache_teacher.py", *line], writes_cache=True)
    teacher = {"path": "/t", "step": 5, "fingerprint": fingerprint}
    with mock.patch.object(caching.run_manifest, "identity", return_value=teacher):
        return caching.contents_of(run.student, run.kd, None)


@pytest.fixture(scope="module")
def before(data, tmp_path_factory):
    return contents(data, tmp_path_factory.mktemp("before"))


@pytest.mark.parametrize(("changed", "message"), OTHERS)
def test_in_a_folder_that_holds_another_cache_none_goes_on(changed, message, before, data, tmp_path):
    letters.save_letters(tmp_path / "letters")
    if "tokenizer_path" in changed:
        changed = changed | {"tokenizer_path": tmp_path / "letters"}
    manifest.begin(tmp_path / "cache", before)
    manifest.begin(tmp_path / "cache", before)
    with pytest.raises(ConfigError, match=rf"kd_cache_path=.*holds another cache \({message}"):
        manifest.begin(tmp_path / "cache", contents(data, tmp_path, **changed))


def command(program, keys, folder):
    result = execute(list(program), caches.arguments(keys, folder), folder)
    assert "Traceback" not in result.output
    assert result.output.count("error: ") == 1, result.output
    return result.status, result.output


def test_a_command_ends_in_one_message_and_a_status_that_tells_bad_input_from_damage(data, drawn, tmp_path):
    student = {"use_kd": "true", "enable_checkpointing": "false", "steps": 3}
    assert command(caches.PROGRAM, data, tmp_path)[0] == 2
    status, output = command(TRAIN, student | {"kd_cache_path": drawn, "kd_temperature": 2}, tmp_path)
    assert status == 2 and "kd_temperature=2" in output
    damaged = shutil.copytree(drawn, tmp_path / "damaged")
    flip(damaged)
    status, output = command(TRAIN, student | {"kd_cache_path": damaged}, tmp_path)
    assert status == 1, output
    assert re.search(r"rows-00001-.*\.arrayrecord: row \d is damaged", output)


# Compiled elsewhere ---------------------------------------------------------------------------------------------------


def argument_bytes(**keys):
    """Of a step that is compiled without data, cache and checkpoint."""
    run = train_compile.initialize(["", conftest.SMOKE, *(f"{key}={value}" for key, value in keys.items())])
    upstream.start_engine(run.student)
    mesh = upstream.maxtext_utils.get_mesh_from_config(run.student)
    stored = cached.assumed(run.student, run.kd)
    student = dataclasses.replace(train_compile.abstract_student(run.student, mesh), cached=stored)
    teacher = None
    if run.kd.has_teacher:
        config = resolve_teacher(run, run.student.scan_layers)
        teacher = teacher_lib.abstract(config, mesh, run.kd.kd_teacher_dtype)
    traced = train_compile.trace(run.student, cached.learned_from(run.kd, stored), student, teacher)
    return sum(aval.size * aval.dtype.itemsize for aval in jax.tree.leaves(traced.in_avals) if not is_key(aval))


def is_key(aval):
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)


def test_a_step_from_a_cache_holds_the_targets_and_no_teacher():
    tokens, plain = 4 * 32, argument_bytes(use_kd="false")
    draws, largest = {"kd_cache_draws": 50}, {"kd_cache_mode": "top_k", "kd_top_k": 50}
    for beside, mode, floats in (("not-read", draws, 2), ("", largest, 3)):
        keys = mode | {"use_kd": "true", "kd_cache_path": "not-read", "kd_teacher_parameters_path": beside}
        assert argument_bytes(**keys) - plain == tokens * (50 * (4 + 4) + floats * 4)
