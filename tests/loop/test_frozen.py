"""Laws of frozen parameters (trainable_parameters_mask): they stay as they are, and cost no state and no reduction."""

import functools
import re

import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
import yaml
from conftest import ROOT, call_apart, few
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.data import cached
from MaxText.loop.step import train_step
from MaxText.models import frozen

pytestmark = pytest.mark.e2e

# The two uses, and what is frozen by each.
USES = {
    "embeddings stay": ("['layers/', 'decoder_norm']", ("embedding", "logits_dense"), 1),
    "norms and attention alone": ("['norm', 'self_attention']", ("mlp", "embedding", "logits_dense"), 2),
}


@pytest.fixture(scope="module", params=few(("norms and attention alone",), USES))
def case(request, tmp_path_factory, teacher):
    """A laboratory, what is frozen in it, and its state after three steps."""
    mask, names, microbatches = USES[request.param]
    keys = {"trainable_parameters_mask": mask, "gradient_accumulation_steps": microbatches, "per_device_batch_size": 2}
    folder = tmp_path_factory.mktemp("frozen")
    lab = lab_lib.make(folder, teacher, **keys, adam_weight_decay=0.1, gradient_clipping_threshold=0.5)
    lab.student.state = jax.jit(with_a_negative_zero)(lab.student.state)
    state = jax.tree.map(jnp.copy, lab.student.state)  # a step donates it
    before = arrays(state)
    metrics = []
    batch = lab_lib.padded_batch(rows=2 * microbatches)
    steps = lab.steps()
    with jax.set_mesh(lab.student.mesh), logical_axis_rules(lab.run.student.logical_axis_rules):
        for _ in range(3):
            state, found = steps.train(state, batch)
            metrics.append(found["scalar"])
    return lab, names, before, arrays(state), state, metrics, batch


def with_a_negative_zero(state):
    """In each array, which adding nothing makes a positive one."""
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(-0.0) if is_float(x) else x, state)


def is_float(x):
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 0


def arrays(state):
    """Path -> the bytes of each of the model's parameters."""
    params = nnx.as_pure(nnx.state(state.model, nnx.Param))
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x).copy() for path, x in found}


def is_frozen(name, names):
    return any(part in name for part in names)


def test_frozen_parameters_are_the_same_to_the_bit_and_the_others_learn(case):
    _, names, before, after, *_ = case
    assert sum(is_frozen(name, names) for name in before) >= 2
    for name, value in before.items():
        same = value.tobytes() == after[name].tobytes()
        assert same == is_frozen(name, names), name


def test_the_optimizer_keeps_two_moments_of_each_trained_parameter_and_of_no_other(case):
    _, names, before, _, state, *_ = case
    trained = sum(value.size for name, value in before.items() if not is_frozen(name, names))
    held = sum(x.size for x in jax.tree.leaves(nnx.as_pure(state.optimizer.opt_state)) if is_float(x))
    assert held == 2 * trained


def test_the_norm_by_which_gradients_are_clipped_is_that_of_what_is_trained(case):
    lab, names, _, _, _, metrics, batch = case
    count = lab.run.student.gradient_accumulation_steps
    parts = [lab.sums_and_gradient({key: value[i::count] for key, value in batch.items()}) for i in range(count)]
    n = sum(float(sums["n"]) for (_, sums), _ in parts) if count > 1 else 1.0  # one batch divides by itself
    shares = [jax.device_get(nnx.as_pure(share)) for _, share in parts]
    gradient = jax.tree.map(lambda *shares: sum(shares) / n, *shares)
    found = jax.tree_util.tree_leaves_with_path(gradient)
    squares = {jax.tree_util.keystr(path, simple=True, separator="/"): float(np.sum(x**2)) for path, x in found}
    trained = sum(value for name, value in squares.items() if not is_frozen(name, names)) ** 0.5
    assert trained < 0.95 * sum(squares.values()) ** 0.5
    assert float(metrics[0]["learning/raw_grad_norm"]) == pytest.approx(trained, rel=1e-3)


def test_a_pattern_that_names_no_parameter_is_refused(case):
    lab = case[0]
    config = upstream.with_settings(lab.run.student, trainable_parameters_mask=["norm", "attn"])
    with pytest.raises(ConfigError, match="'attn' names none of the student's parameters, such as "):
        frozen.check(config, nnx.state(lab.student.state.model, nnx.Param))
    assert "% of them are trained" in frozen.check(lab.run.student, nnx.state(lab.student.state.model, nnx.Param))


def test_a_frozen_routers_bias_stays_where_balancing_would_move_it(tmp_path, teacher):
    """It moves by the experts' loads, and not by a gradient; here it is a parameter, as for all but DeepSeek V3."""
    preset = yaml.safe_load((ROOT / "MaxText/configs/models/deepseek3-mini.yml").read_text())
    # Two layers of experts and nothing else, since compiling is what this takes.
    preset |= {"first_num_dense_layers": 0, "base_num_decoder_layers": 2, "base_mlp_dim": 64, "shared_experts": 0}

    def moved(name, mask):
        keys = preset | {"mlp_activations": '["silu","linear"]', "override_model_config": "true"}
        keys |= {"sparse_matmul": "false", "megablox": "false"}
        keys |= {"kd_teacher_model_name": "tiny-llama", "trainable_parameters_mask": mask}
        lab = lab_lib.make(tmp_path / name, teacher, **keys)
        run = functools.partial(train_step, lab.models, lab.student.params_shardings)
        after, _ = lab.under(run, lab.student.state, lab.teacher.state, lab_lib.padded_batch())
        before, after = arrays(lab.student.state), arrays(after)
        return [(after[path] != before[path]).any() for path in before if path.endswith("gate/bias")]

    assert moved("trained", "[]") == [True] and moved("frozen", "['embedding']") == [False]


def reduced(folder, teacher):
    """On four devices that differ in their data: what is added up over them, with the head frozen and without."""
    shapes, products = {}, {}
    for name, mask in (("frozen", "['layers/']"), ("trained", "[]")):
        keys = {"trainable_parameters_mask": mask, "ici_data_parallelism": 4, "ici_fsdp_parallelism": 1}
        lab = lab_lib.make(folder, teacher, **keys)
        config, mesh = lab.run.student, lab.student.mesh
        data = upstream.sharding.get_input_data_sharding(config, mesh, rules=config.logical_axis_rules)
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            (step, arguments), _ = lab_lib.train.jit_steps(config, lab.run.kd, lab.student, lab.teacher, data, data)
            batch = cached.shaped_batch(config, None, batch_sharding=data)
            text = step.lower(lab.student.state, *arguments, batch).compile().as_text()
        lines = [line for line in text.splitlines() if re.search(r"= .*(all-reduce|reduce-scatter)", line)]
        shapes[name] = re.findall(r"f32\[([\d,]+)\]", "\n".join(line.split(" all-reduce(")[0] for line in lines))
        products[name] = len(re.findall(rf"= f32\[{config.emb_dim},{config.vocab_size}\]\S* dot\(", text))
    head = {f"{config.emb_dim},{config.vocab_size}", f"{config.vocab_size},{config.emb_dim}"}
    assert head & set(shapes["trained"]), shapes
    assert not head & set(shapes["frozen"]) and shapes["frozen"], shapes
    assert products["trained"] and not products["frozen"], products  # nor is it computed


def test_no_gradient_of_a_frozen_head_is_added_up_over_devices(tmp_path, teacher):
    call_apart(reduced, tmp_path, teacher, devices=4, folder=tmp_path)
