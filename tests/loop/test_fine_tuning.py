"""Laws of fine-tuning with a teacher: answers alone are learnt, by cross-entropy and KL, whatever shares their row."""

import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
from chats import LENGTH, SAID, TEMPLATE, plain, save_chat_tokenizer, write_chats
from flax import nnx
from reading import rows_of, with_keys

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The settings of a run on conversations."""
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder, SAID, "train")
    write_chats(folder, SAID[:3], "eval")
    save_chat_tokenizer(folder / "tokenizer", pad_token="<eos>", bos_token="<user>", eos_token="<eos>")
    (folder / "letters.jinja").write_text(TEMPLATE)
    return {
        "use_sft": "true",
        "sft_train_on_completion_only": "true",
        "dataset_type": "grain",
        "grain_file_type": "parquet",
        "grain_train_files": folder / "train.parquet",
        "grain_eval_files": folder / "eval.parquet",
        "grain_worker_count": 0,
        "grain_worker_count_eval": 0,
        "train_data_columns": "['messages']",
        "eval_data_columns": "['messages']",
        "tokenizer_type": "huggingface",
        "tokenizer_path": folder / "tokenizer",
        "chat_template_path": folder / "letters.jinja",
        "enable_data_shuffling": "false",
        "num_epoch": 10,
        "max_target_length": LENGTH,
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory, teacher, keys):
    keys = keys | {"packing": "false", "per_device_batch_size": len(SAID)}
    folder = tmp_path_factory.mktemp("lab")
    return lab_lib.make(folder, teacher, kd_alpha=0.7, kd_temperature=2, **keys)


def batch_of(lab, **keys):
    """All conversations, in one batch."""
    read = rows_of(with_keys(lab.run.student, num_epoch=1, **keys), "train")
    return {name: jnp.asarray(value) for name, value in read.items()}


def sums_of(lab, batch):
    (_, sums), gradient = lab.sums_and_gradient(batch)
    return sums, gradient


def test_cross_entropy_and_kl_are_means_over_the_answers_alone(lab):
    batch = batch_of(lab)
    answers = np.zeros(batch["inputs"].shape, bool)
    for row, said in enumerate(SAID):
        tokens, is_answer = plain(said)
        assert np.asarray(batch["inputs"])[row, : len(tokens)].tolist() == tokens[:LENGTH]
        answers[row, : min(len(tokens), LENGTH) - 1] = is_answer[1:LENGTH]  # at the token before it
    models = lab.models

    def log_probabilities(state, teacher):
        found = []
        for model, config in (
            (nnx.merge(models.student, state).model, models.config),
            (nnx.merge(models.teacher, teacher, copy=True), models.teacher_config),
        ):
            (hidden,) = lab_lib.step.forward(model, config, batch, enable_dropout=False)["decoder"]["hidden_states"]
            found.append(model.logits_from_hidden_states_for_vocab_tiling(hidden, True, "train"))
        return found

    logits, target = (
        np.asarray(x, np.float64) for x in lab.under(log_probabilities, lab.student.state, lab.teacher.state)
    )
    labels = np.roll(np.asarray(batch["inputs"]), -1, axis=1)
    ce = -np.take_along_axis(np.log(softmax(logits)), labels[..., None], -1)[..., 0]
    p, q = softmax(target / 2), softmax(logits / 2)
    kl = 4 * np.sum(p * (np.log(p) - np.log(q)), axis=-1)
    sums, _ = sums_of(lab, batch)
    assert float(sums["n"]) == answers.sum()
    assert float(sums["ce_sum"]) == pytest.approx(ce[answers].sum(), rel=1e-5)
    assert float(sums["kd_sum"]) == pytest.approx(kl[answers].sum(), rel=1e-5)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_the_labels_of_a_prompt_change_nothing_to_the_bit(lab):
    batch = batch_of(lab)
    prompts = (batch["inputs_segmentation"] != 0) & (batch["targets_segmentation"] == 0)
    assert int(prompts.sum()) > 50
    first, second = (
        sums_of(lab, batch | {"targets": jnp.where(prompts, label, batch["targets"])}) for label in (7, 11)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
def test_packed_conversations_have_the_loss_and_gradient_of_those_apart(lab, packing):
    apart, gradient = sums_of(lab, batch_of(lab))
    batch = batch_of(lab, packing=True, grain_packing_type=packing)
    assert int(batch["inputs_segmentation"].max()) > 1
    together, same = sums_of(lab, batch)
    assert float(together["n"]) == float(apart["n"]) > 0
    for name in ("ce_sum", "kd_sum", "objective"):
        assert float(together[name]) == pytest.approx(float(apart[name]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, same)


def test_a_run_is_fine_tuned_on_answers_and_evaluated_on_them(train, teacher, keys):
    run = train(
        "tuned", **keys, use_kd="true", kd_teacher_parameters_path=teacher, per_device_batch_size=len(SAID), steps=4,
        packing="false", eval_interval=4, load_parameters_path=f"{teacher}/5/items",
    )  # fmt: skip
    counted = [sum(plain(said)[1][:LENGTH]) for said in SAID]
    assert run.column("learning/total_weights") == [sum(counted)] * 4
    assert run.column("evaluation/total_weights") == [sum(counted[:3])] * 2
    kd, ce = run.column("learning/kd_loss"), run.column("learning/ce_loss")
    assert kd[0] == pytest.approx(0, abs=1e-6)  # the student begins as its teacher
    assert ce[0] == pytest.approx(run.column("learning/teacher_ce_loss")[0], abs=1e-6) and ce[-1] < ce[0] - 0.5
