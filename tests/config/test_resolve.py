"""Laws of the configuration: which file wins, what the teacher takes from the student's run, what is refused."""

import copy
import os
import pathlib

import pytest
import yaml
from conftest import ROOT, SMOKE

from MaxText import upstream
from MaxText.config import files, resolve
from MaxText.config.checks import REFUSED_WITH_KD
from MaxText.config.keys import ConfigError, KDKeys, RotaryKeys
from MaxText.config.resolve import Run
from MaxText.config.teacher import resolve_teacher, shared_keys

ENTRY = ["train.py", SMOKE, "run_name=test"]
KD = ["use_kd=true", "kd_teacher_parameters_path=anywhere"]


def initialize(*arguments: str) -> Run:
    return resolve.initialize([*ENTRY, *arguments])


OURS = {*KDKeys.model_fields, *RotaryKeys.model_fields}


def test_base_yml_holds_every_key_of_ours_with_a_comment_and_nothing_unknown():
    text = (ROOT / "MaxText/configs/base.yml").read_text()
    keys = yaml.safe_load(text)
    assert set(keys) - {"base_config", "log_config"} == OURS
    for block in text.split("\n\n")[2:]:
        assert block.startswith("#"), f"no comment above {block!r}"


def test_the_defaults_are_those_of_the_table_in_the_readme():
    lines = (ROOT / "MaxText/configs/base.yml").read_text().splitlines()
    defaults = dict(line.split(": ", 1) for line in lines if line.startswith(("kd_", "use_kd", "rope_")))
    readme = (ROOT / "README.md").read_text()
    assert set(defaults) == OURS
    for key, default in defaults.items():
        assert f"| `{key}` | `{default}` |" in readme


def test_a_file_may_name_settings_that_nobody_has_set(tmp_path):
    (tmp_path / "mine.yml").write_text(f"base_config: {SMOKE}\ndata_shuffle_seed: ${{sliding_window_size}}7\n")
    default = yaml.safe_load(pathlib.Path(upstream.base_yml()).read_text())["sliding_window_size"]
    run = resolve.initialize(["train.py", str(tmp_path / "mine.yml"), "run_name=test", *KD])
    assert run.student.data_shuffle_seed == int(f"{default}7")
    assert resolve_teacher(run, None).data_shuffle_seed == int(f"{default}7")


def test_a_rule_for_an_axis_replaces_that_axis_rules_and_no_others():
    rules = initialize(*KD).student.logical_axis_rules
    changed = initialize(*KD, "logical_axis_rules=[['mlp', ['data']]]").student.logical_axis_rules
    assert changed == (*(rule for rule in rules if rule[0] != "mlp"), ("mlp", ("data",)))


RULES = [["mlp", ["data"]]]


@pytest.mark.parametrize(
    ("preset", "file", "words", "environment"),
    [
        ("llama2-7b", {}, [], {}),
        ("llama2-7b", {}, [f"logical_axis_rules={RULES}"], {}),
        ("llama2-7b", {"logical_axis_rules": RULES}, [], {}),  # which then are all, but for the preset's
        ("llama2-7b", {"override_logical_axis_rules": True}, [], {}),
        ("llama2-7b", {}, [], {"M_OVERRIDE_LOGICAL_AXIS_RULES": "true"}),
        ("deepseek3-671b-2dfsdp", {}, [], {}),  # whose rules are all that there are
    ],
    ids=str,
)
def test_rules_of_a_preset_are_added_or_win_as_the_engine_has_it(
    preset, file, words, environment, monkeypatch, tmp_path
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"base_config": "base.yml"} | file))
    words = [str(tmp_path / "mine.yml"), "run_name=test", "hardware=cpu", "skip_jax_distributed_system=true", *words]
    words += [f"model_name={preset}", "override_model_config=true"]
    engines = upstream.pyconfig._initialize_pydantic(["", *words])
    expected = upstream.pyconfig.HyperParameters(engines).logical_axis_rules
    assert resolve.initialize(["train.py", *words]).student.logical_axis_rules == expected
    assert expected != initialize().student.logical_axis_rules


def test_a_run_leaves_the_defaults_of_the_next_as_they_are():
    before = copy.deepcopy(files.plain_defaults())
    resolve_teacher(initialize(*KD, "logical_axis_rules=[['mlp', ['data']]]", "ici_fsdp_parallelism=1"), None)
    assert files.plain_defaults() == before


def test_the_command_line_wins_over_the_users_file_and_that_over_the_base(tmp_path):
    (tmp_path / "mine.yml").write_text("base_config: middle.yml\nkd_alpha: 0.25\n")
    (tmp_path / "middle.yml").write_text("base_config: base.yml\nkd_alpha: 0.1\nkd_temperature: 3.0\nrun_name: x\n")
    argv = ["train.py", str(tmp_path / "mine.yml"), "hardware=cpu", "skip_jax_distributed_system=true"]
    run = resolve.initialize(argv)
    assert (run.kd.kd_alpha, run.kd.kd_temperature, run.kd.kd_top_k) == (0.25, 3.0, 0)
    assert resolve.initialize([*argv, "kd_alpha=0.75"]).kd.kd_alpha == 0.75
    assert not run.student.log_config


def test_a_circle_of_files_is_an_error(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yml").write_text(f"base_config: {other}.yml\n")
    with pytest.raises(ConfigError, match="circle"):
        resolve.initialize(["train.py", str(tmp_path / "a.yml")])


def test_the_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        initialize().kd.kd_alpha = 1.0


def test_a_teacher_of_the_same_architecture_differs_by_its_overrides_alone():
    run = initialize(*KD, "base_mlp_dim=96", "override_model_config=true", "kd_teacher_overrides={base_emb_dim: 128}")
    teacher = resolve_teacher(run, scan_layers=False)
    assert (teacher.emb_dim, teacher.mlp_dim, teacher.num_decoder_layers) == (128, 96, 2)
    assert (run.student.emb_dim, run.student.scan_layers, teacher.scan_layers) == (64, True, False)


def test_a_teacher_without_a_preset_of_its_own_has_what_the_students_preset_set(tmp_path):
    text = "base_config: base.yml\nmodel_name: tiny-qwen3\nnormalization_layer_epsilon: 0.001\nhardware: cpu\n"
    (tmp_path / "mine.yml").write_text(text + "run_name: x\nskip_jax_distributed_system: true\n")
    run = resolve.initialize(["train.py", str(tmp_path / "mine.yml"), *KD])
    teacher = resolve_teacher(run, scan_layers=True)
    assert run.student.normalization_layer_epsilon == teacher.normalization_layer_epsilon == 1e-6
    assert teacher.emb_dim == run.student.emb_dim


def test_a_teacher_with_a_preset_takes_nothing_of_the_students_architecture():
    changed = ("base_emb_dim=32", "base_num_decoder_layers=7", "rope_max_timescale=5000", "override_model_config=true")
    run = initialize(*KD, *changed, "kd_teacher_model_name=tiny-qwen3", "per_device_batch_size=2", "dtype=bfloat16")
    teacher = resolve_teacher(run, scan_layers=True)
    assert (teacher.emb_dim, teacher.num_decoder_layers, teacher.use_qk_norm) == (96, 3, True)
    assert teacher.rope_max_timescale != 5000
    assert (teacher.per_device_batch_size, teacher.max_target_length, str(teacher.dtype)) == (2, 32, "bfloat16")
    assert not teacher.enable_dropout and not teacher.enable_checkpointing and teacher.mtp_num_layers == 0


def test_what_is_shared_with_the_teacher_says_nothing_of_a_model():
    types = upstream.types
    architecture = (types.ModelArchitecture, types.MlaAttention, types.PositionalEmbedding, types.Rope, types.YarnRope,
                    types.DeepSeekMoE, types.Qwen3Next, types.MTP, types.AttentionIndexer)  # fmt: skip
    for group in architecture:
        assert not shared_keys() & set(group.model_fields)
    assert not shared_keys() & {"scan_layers", "vocab_size", "num_experts", "weight_dtype", "quantization"}
    assert {"context_parallel_load_balance", "mesh_axes", "per_device_batch_size"} <= shared_keys()


DATA = {
    "grain": ("grain_train_files=train*.arrayrecord", "grain_eval_files=eval*.arrayrecord"),
    "hf": ("hf_path=parquet", "hf_train_files=train.parquet", "hf_eval_files=eval.parquet"),
    "tfds": ("dataset_path=data", "dataset_name=mine:1.0.0", "eval_dataset_name=mine:1.0.0"),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_teacher_with_a_preset_reads_the_students_batches_whatever_they_come_from(kind):
    run = initialize(*KD, "kd_teacher_model_name=tiny-qwen3", f"dataset_type={kind}", *DATA[kind], "eval_interval=5")
    assert resolve_teacher(run, scan_layers=True).dataset_type == run.student.dataset_type == kind


def test_the_environment_of_the_student_does_not_reshape_the_teacher(monkeypatch):
    monkeypatch.setenv("M_BASE_EMB_DIM", "32")
    run = resolve.initialize([*ENTRY, *KD, "override_model_config=true", "kd_teacher_model_name=tiny-qwen3"])
    assert resolve_teacher(run, scan_layers=True).emb_dim == 96


def test_what_the_environment_says_of_the_run_holds_for_the_teacher_too(monkeypatch):
    monkeypatch.setenv("M_REMAT_POLICY", "minimal")
    run = initialize(*KD, "kd_teacher_model_name=tiny-qwen3")
    assert resolve_teacher(run, scan_layers=True).remat_policy == run.student.remat_policy == "minimal"


def test_a_cache_may_lie_below_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of_mine")
    run = resolve.initialize([*ENTRY, *KD, "kd_cache_path=~/cache"], writes_cache=True)
    assert run.kd.kd_cache_path == "/home/of_mine/cache"


def test_a_share_of_the_positions_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("M_KD_POSITIONS", "0.25")
    assert initialize(*KD).kd.kd_positions == 0.25


@pytest.mark.parametrize("key", ["kd_alpha", "kd_temperature", "kd_top_k", "kd_top_p", "kd_block_mib"])
def test_true_is_no_number(key):
    with pytest.raises(ConfigError, match=f"{key}=True: a number is expected"):
        initialize(f"{key}=true")


def test_an_evaluation_that_would_never_end_is_refused():
    with pytest.raises(ConfigError, match="eval_steps=-1"):
        initialize("eval_interval=2", "eval_steps=-1")


@pytest.fixture(scope="module")
def untouched():
    return initialize()


@pytest.mark.parametrize("key", sorted(REFUSED_WITH_KD))
def test_every_refused_option_is_a_key_of_the_engine_with_its_default_allowed(untouched, key):
    value = getattr(untouched.student, key)
    assert getattr(value, "value", value) in REFUSED_WITH_KD[key]


def test_presets_of_ours_are_found_from_any_folder(tmp_path):
    (tmp_path / "mine.yml").write_text("base_config: base.yml\nmodel_name: tiny-qwen3\nrun_name: x\nhardware: cpu\n")
    run = resolve.initialize(["train.py", str(tmp_path / "mine.yml"), "skip_jax_distributed_system=true"])
    assert run.student.emb_dim == 96


def test_a_preset_beside_the_config_wins(tmp_path):
    (tmp_path / "models").mkdir()
    preset = pathlib.Path(ROOT / "MaxText/configs/models/tiny-qwen3.yml").read_text()
    (tmp_path / "models/tiny-qwen3.yml").write_text(preset.replace("base_emb_dim: 96", "base_emb_dim: 112"))
    (tmp_path / "mine.yml").write_text("base_config: base.yml\nmodel_name: tiny-qwen3\nrun_name: x\nhardware: cpu\n")
    run = resolve.initialize(["train.py", str(tmp_path / "mine.yml"), "skip_jax_distributed_system=true"])
    assert run.student.emb_dim == 112


def test_what_libraries_say_while_devices_are_found_stays_off_the_screen_on_cpus(tmp_path, monkeypatch, capfd):
    resolve_config = upstream.resolve_config

    def noisy(*arguments, **overrides):
        os.write(2, b"could not determine TPU accelerator type\n")
        return resolve_config(*arguments, **overrides)

    monkeypatch.setattr(upstream, "resolve_config", noisy)
    resolve.initialize(["train.py", SMOKE, f"base_output_directory={tmp_path}"])
    assert capfd.readouterr().err == ""
