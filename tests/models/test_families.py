"""Laws of each family of decoders, as student and as teacher, on MaxText's own presets, shrunk.

    python tests/models/test_families.py        holds every family to every law and then writes the README's section

What sets a family apart stays: soft caps, tied heads, norms, biases, routing, attention patterns and their cycles of
layers. Left out on purpose: what a preset is at its own size, and dropless kernels for experts, which are a TPU's.
"""

import collections
import dataclasses
import functools
import pathlib
import sys
import tempfile
from typing import Any

import jax
import lab as lab_lib
import numpy as np
import pytest
from conftest import ROOT, SMOKE, few
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import train, upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher
from MaxText.loop import step
from MaxText.models import heads
from MaxText.models import student as student_lib
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

README = ROOT / "README.md"
HEADING = "## Families of decoders\n"


@dataclasses.dataclass(frozen=True)
class Family:
    """A preset of MaxText's, what the laws see in it, and the keys that shrink it beyond SHRUNK."""

    preset: str
    has: str
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)


# A window is shorter than the rows, which have 32 tokens; warm-up would make the first update 0.
SHRUNK = {
    "override_model_config": "true",
    "vocab_size": 256,
    "base_num_decoder_layers": 2,
    "base_emb_dim": 32,
    "base_mlp_dim": 32,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 1,
    "head_dim": 16,
    "warmup_steps_fraction": 0,
}
FULL_HEADS = {"base_num_kv_heads": 2}
WINDOW = {"sliding_window_size": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 32,
    "load_balance_loss_weight": 0.01,
    "sparse_matmul": "false",
    "megablox": "false",
}
LATENT = FULL_HEADS | {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = EXPERTS | LATENT | {"first_num_dense_layers": 1, "base_num_decoder_layers": 3}

FAMILIES = {
    "Llama 2": Family("llama2-7b", "untied head, every head has keys of its own", FULL_HEADS),
    "Llama 3": Family("llama3-8b", "untied head, grouped-query attention"),
    "Llama 3.2": Family("llama3.2-1b", "tied head, positions scaled by a factor of its own (`rope_llama3_factor`)"),
    "Mistral": Family("mistral-7b", "untied head, grouped-query attention"),
    "Gemma": Family("gemma-2b", "tied head, multi-query attention"),
    "Gemma 2": Family(  # caps as low as the logits of a narrow model
        "gemma2-2b",
        "tied head, soft caps on logits and attention, local and global layers in turn",
        WINDOW | {"final_logits_soft_cap": 3.0, "attn_logits_soft_cap": 3.0},
    ),
    "Gemma 3": Family(
        "gemma3-4b", "tied head, five local layers to a global one", WINDOW | {"base_num_decoder_layers": 7}
    ),
    "Qwen 2.5": Family("qwen2.5-1.5b", "tied head, biases in attention"),
    "Qwen 3": Family("qwen3-0.6b", "tied head, norms on queries and keys"),
    "Qwen 3 MoE": Family("qwen3-30b-a3b", "untied head, experts with renormalised weights", EXPERTS),
    "Mixtral": Family("mixtral-8x7b", "untied head, experts", EXPERTS),
    "DeepSeek V2": Family("deepseek2-16b", "latent attention, a dense layer before experts, shared experts", DEEPSEEK),
    "DeepSeek V3": Family(
        "deepseek3-671b",
        "as V2, with router biases that are no parameters",
        DEEPSEEK | {"q_lora_rank": 16, "routed_bias_update_rate": 0.01},
    ),
    "gpt-oss": Family(
        "gpt-oss-20b", "attention sinks, experts with biases, a window in every other layer", EXPERTS | WINDOW
    ),
    "OLMo 3": Family(
        "olmo3-7b",
        "norms after the blocks, three windows to a global layer",
        FULL_HEADS | WINDOW | {"base_num_decoder_layers": 4},
    ),
    "Llama 4": Family(
        "llama4-17b-16e",
        "one expert of many beside a shared one, chunked attention, layers without positions",
        EXPERTS | {"num_experts_per_tok": 1, "chunk_attn_window_size": 8, "base_num_decoder_layers": 4},
    ),
}
DEFAULT = ("Gemma 2",)  # that of Llama is the smoke run's

# Families that are refused as students -> preset, and the setting of it that the error names.
REASONS = {
    "DeepSeek V3.2": ("deepseek3.2-671b", "use_indexer"),
    "DeepSeek V4": ("deepseek4-284b", "use_indexer"),
}

Variables = dict[str, dict[str, Any]]  # MaxText's type of variable -> nested arrays, as its checkpoints hold them


class Specimen:
    """A family's student, and the teacher restored from what that student saved."""

    def __init__(self, family: Family, folder: pathlib.Path):
        saved = folder / "saved"
        keys = {"model_name": family.preset, "use_kd": "true", "kd_teacher_parameters_path": saved / "items"}
        keys |= {"base_output_directory": folder, "metrics_file": "", "enable_checkpointing": "false"}
        keys |= SHRUNK | family.keys
        run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in keys.items())])
        student = student_lib.set_up(run.student, upstream.start_engine(run.student))
        student.state = moved(student)
        self.saved = variables(nnx.merge(student.graphdef, student.state).model)
        upstream.checkpointing.save_params_to_path(str(saved), self.saved)
        checkpoint = teacher_lib.find_checkpoint(run.kd.kd_teacher_parameters_path)
        config = resolve_teacher(run, checkpoint.scan_layers)
        teacher = teacher_lib.load(config, checkpoint, student.mesh, run.kd.kd_teacher_dtype, run.kd.kd_vocab_size)
        self.lab = lab_lib.Lab(run, student, teacher)
        self.batch = lab_lib.padded_batch()

    def compiled(self, jitted: Any, *arguments: Any) -> Any:
        with jax.set_mesh(self.lab.student.mesh), logical_axis_rules(self.lab.run.student.logical_axis_rules):
            return jitted.lower(*arguments).compile()

    @functools.cached_property
    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """[N, V] of the family's own forward pass, and as the blockwise loss projects them."""
        student, models, batch = self.lab.student, self.lab.models, self.batch

        def both(state):
            own = nnx.merge(student.graphdef, state, copy=True).model(
                decoder_input_tokens=batch["inputs"],
                decoder_positions=batch["inputs_position"],
                decoder_segment_ids=batch["inputs_segmentation"],
                enable_dropout=False,
            )
            model = nnx.merge(models.student, state, copy=True).model
            reported = step.forward(model, models.config, batch, enable_dropout=False)
            hidden = heads.flat(heads.normed_hidden_states(model, reported, enable_dropout=False))
            return heads.flat(own), heads.project(*heads.head_of(model), hidden)

        own, projected = self.compiled(jax.jit(both), student.state)(student.state)
        return np.asarray(own), np.asarray(projected)

    @functools.cached_property
    def steps(self) -> list[dict[str, float]]:
        """Metrics of three steps on one batch: student and teacher are equal in the first, and then no more."""
        lab, config = self.lab, self.lab.run.student
        sharding = upstream.sharding.get_input_data_sharding(config, lab.student.mesh, rules=config.logical_axis_rules)
        (jitted, _), _ = train.jit_steps(config, lab.run.kd, lab.student, lab.teacher, sharding, None)
        state = jax.tree.map(jax.numpy.copy, lab.student.state)  # a step donates what it is given
        train_step = self.compiled(jitted, state, lab.teacher.state, self.batch)
        rows = []
        for _ in range(3):
            state, metrics = train_step(state, lab.teacher.state, self.batch)
            rows.append({name: float(value) for name, value in metrics["scalar"].items()})
        return rows


def moved(student: student_lib.Student) -> nnx.State:
    """The state with the model's variables off their initial values: scales of ones and biases of zeros hide errors."""
    random = np.random.default_rng(0)
    train_state = nnx.merge(student.graphdef, student.state, copy=True)
    for _, variable in nnx.to_flat_state(nnx.state(train_state.model, nnx.Not(nnx.RngState))):
        value = variable.get_value()
        noise = (0.1 * random.standard_normal(value.shape)).astype(value.dtype)
        variable.set_value(jax.device_put(np.asarray(value) + noise, value.sharding))
    return nnx.state(train_state)


def variables(model: nnx.Module) -> Variables:
    found: dict[str, nnx.State] = collections.defaultdict(dict)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        kind = "params" if isinstance(variable, nnx.Param) else type(variable).__name__
        found[kind][path] = np.asarray(variable.get_value())
    return {kind: nnx.traversals.unflatten_mapping(arrays) for kind, arrays in found.items()}


@pytest.fixture(scope="module", params=few(DEFAULT, FAMILIES))
def specimen(request, tmp_path_factory):
    return Specimen(FAMILIES[request.param], tmp_path_factory.mktemp("family"))


def test_the_loss_projects_what_the_family_projects(specimen):
    own, projected = specimen.logits
    assert own.shape == (4 * 32, 256) and np.std(own) > 0.1
    np.testing.assert_allclose(projected, own, rtol=1e-5, atol=1e-5)


def test_a_family_distils_with_finite_loss_and_gradients(specimen):
    for metrics in specimen.steps:  # the gradient's norm is finite if all of it is
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        assert metrics["learning/raw_grad_norm"] > 0
    assert all(metrics["learning/kd_loss"] > 1e-3 for metrics in specimen.steps[1:])


def test_a_family_loses_nothing_against_itself(specimen):
    assert specimen.steps[0]["learning/kd_loss"] == pytest.approx(0, abs=1e-6)


def test_what_a_student_saved_comes_back_as_the_teacher_bit_for_bit(specimen):
    teacher = specimen.lab.teacher
    restored = variables(nnx.merge(teacher.graphdef, teacher.state))
    assert jax.tree.structure(restored) == jax.tree.structure(specimen.saved)
    jax.tree.map(np.testing.assert_array_equal, restored, specimen.saved)


LAWS = (
    test_the_loss_projects_what_the_family_projects,
    test_a_family_distils_with_finite_loss_and_gradients,
    test_a_family_loses_nothing_against_itself,
    test_what_a_student_saved_comes_back_as_the_teacher_bit_for_bit,
)


@pytest.mark.parametrize("name", REASONS)
def test_a_family_whose_step_is_not_carried_is_refused_by_name(name):
    preset, key = REASONS[name]
    keys = {"model_name": preset, "use_kd": "true", "kd_teacher_parameters_path": "x"}
    with pytest.raises(ConfigError, match=f"^{key}=True: not supported together with use_kd=true"):
        resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in keys.items())])


# The README's section -------------------------------------------------------------------------------------------------


def section() -> str:
    rows = [f"| {name} | `{family.preset}` | {family.has} | yes | yes |" for name, family in FAMILIES.items()]
    rows += [
        f"| {name} | `{preset}` | | no: `{key}=true` is refused under `use_kd=true` | not tried |"
        for name, (preset, key) in REASONS.items()
    ]
    default = ", ".join(DEFAULT)
    return f"""\
{HEADING}
<!-- Made by `python tests/models/test_families.py`, which holds every family to every law first: do not edit. -->

Each preset (MaxText's; Llama 3.2's is ours) is shrunk to a few layers and a vocabulary of 256, with what is peculiar to
it kept, and held to four laws on CPU in float32 (`tests/models/test_families.py`):

1. the blockwise loss projects the logits that the family's own forward pass has, to 1e-5;
2. train steps against a teacher of the family have finite losses and gradients;
3. against a teacher with the student's own parameters kd_loss is 0, to 1e-6;
4. what the student saved is restored as the teacher bit for bit, biases of routers included.

| family | preset | what is peculiar | student | teacher |
|---|---|---|---|---|
{chr(10).join(rows)}

`make test` holds {default} to them, `make test-slow` the rest. Not shown here: presets at their own
size, other presets of MaxText's, TPU kernels, and experts other than by dense products (`sparse_matmul=false`). A
teacher may be of another family than its student: they share a vocabulary, nothing else.
"""


def test_the_readme_says_what_the_list_of_families_renders():
    assert section() in README.read_text(), "run python tests/models/test_families.py"


def main() -> None:
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            specimen = Specimen(family, pathlib.Path(folder))
            for law in LAWS:
                law(specimen)
        print(name, flush=True)
    before, _, after = README.read_text().partition(HEADING)
    _, limits, after = after.partition("\n## Limits\n")
    README.write_text(before + section() + limits + after)


if __name__ == "__main__":
    sys.exit(main())
