"""Laws of a student cut from its teacher: nothing is changed but what is left out, and that is what matters least."""

import json
import shlex
import shutil
from typing import Any

import cuts
import numpy as np
import pytest
from conftest import execute, few

from MaxText.checkpoints import reading, stacked_arrays, writing
from MaxText.config.keys import ConfigError
from MaxText.console import RunError
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

# Preset -> keys of it, and the layers that add nothing where these are planted. (Of Gemma 3 eight: a cycle of six and
# two; the global layer is the sixth, and has to be the student's sixth.)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tiny-llama": ({}, (2,)),
    "tiny-qwen3": ({}, (0, 3)),
    "mistral-7b": ({}, (1,)),
    "qwen2.5-1.5b": ({}, (1,)),
    "gemma-2b": ({}, (1,)),
    "gemma2-2b": ({"sliding_window_size": 8, "final_logits_soft_cap": 3.0, "attn_logits_soft_cap": 3.0}, (2,)),
    "gemma3-4b": ({"sliding_window_size": 8, "base_num_decoder_layers": 8}, (6,)),
    "mixtral-8x7b": (cuts.EXPERTS, (1,)),
    "qwen3-30b-a3b": (cuts.EXPERTS, (1,)),
}
DEFAULT = ("tiny-qwen3",)
EACH = few(DEFAULT, FAMILIES)
OF_EXPERTS = ("mixtral-8x7b", "qwen3-30b-a3b")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("cut")


@pytest.fixture(scope="module")
def trained(once, train):
    """The `checkpoints` folder of the tiny teacher that other tests share."""
    runs = once("dense", lambda folder: train("teacher", init_weights_seed=7, base_output_directory=folder))
    return runs / "teacher/checkpoints"


@pytest.fixture(scope="module")
def settings(base):
    """Of a training whose rows the teacher reads."""
    return [*cuts.rows(base), "sparse_matmul=false", "megablox=false"]


@pytest.fixture(scope="module")
def teacher(base):
    return cuts.write(base / "teacher", "tiny-llama")


# What is left is the teacher's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", few(("importance",), ("first", "uniform", "importance")))
def test_a_student_of_the_teachers_own_sizes_is_the_teacher_bit_for_bit(by, teacher, settings, tmp_path):
    cuts.cut(teacher, tmp_path / "out", "--layers", "4", "--by", by, *(settings if by == "importance" else []))
    cuts.assert_equal(cuts.arrays(tmp_path / "out"), cuts.arrays(teacher))


@pytest.mark.parametrize("name", ["tiny-llama", pytest.param("gemma3-4b", marks=pytest.mark.slow)])
def test_layers_apart_and_stacked_again_are_the_teacher_bit_for_bit(name, tmp_path):
    whole = cuts.write(tmp_path / "teacher", name, **FAMILIES[name][0])
    layers = str(json.loads((whole / "conversion.json").read_text())["overrides"]["base_num_decoder_layers"])
    cuts.cut(whole, tmp_path / "apart", "--layers", layers, "--by", "first", "--scan-layers", "false")
    assert not teacher_lib.find_checkpoint(str(tmp_path / "apart")).scan_layers
    cuts.cut(tmp_path / "apart", tmp_path / "again", "--layers", layers, "--by", "first", "--scan-layers", "true")
    cuts.assert_equal(cuts.arrays(tmp_path / "again"), cuts.arrays(whole))


def test_what_is_kept_stands_in_every_array_where_the_record_says(teacher, tmp_path):
    sizes = ("--layers", "3", "--emb", "20", "--heads", "2", "--kv-heads", "2", "--mlp", "17")
    record = cuts.cut(teacher, tmp_path / "out", *sizes, "--by", "uniform")
    kept, whole, found = record["kept"], cuts.arrays(teacher), cuts.arrays(tmp_path / "out")
    assert kept["layers"] == [0, 2, 3] and kept["heads"]["2/self_attention"] == [0, 2]
    layers = ("decoder", "layers")
    for place, layer in enumerate(kept["layers"]):
        attention, mlp = f"{layer}/self_attention", f"{layer}/mlp"
        emb, heads, groups, neurons = (
            kept["emb"],
            kept["heads"][attention],
            kept["kv_heads"][attention],
            kept["mlp"][mlp],
        )
        assert all(each == sorted(set(each)) for each in (emb, heads, groups, neurons))
        wanted = {
            ("self_attention", "query", "kernel"): np.ix_(emb, [layer], heads, range(16)),
            ("self_attention", "key", "kernel"): np.ix_(emb, [layer], groups, range(16)),
            ("self_attention", "value", "kernel"): np.ix_(emb, [layer], groups, range(16)),
            ("self_attention", "out", "kernel"): np.ix_(heads, [layer], range(16), emb),
            ("mlp", "wi_0", "kernel"): np.ix_(emb, [layer], neurons),
            ("mlp", "wi_1", "kernel"): np.ix_(emb, [layer], neurons),
            ("mlp", "wo", "kernel"): np.ix_(neurons, [layer], emb),
            ("pre_self_attention_layer_norm", "scale"): np.ix_(emb, [layer]),
            ("post_self_attention_layer_norm", "scale"): np.ix_(emb, [layer]),
        }
        assert len(wanted) == sum(path[:2] == layers for path in found)
        for part, region in wanted.items():
            expected = np.asarray(whole[layers + part])[region]
            np.testing.assert_array_equal(np.asarray(found[layers + part])[:, place : place + 1], expected)
    table = ("token_embedder", "embedding")
    np.testing.assert_array_equal(found[table], np.asarray(whole[table])[:, kept["emb"]])
    head = ("decoder", "logits_dense", "kernel")
    np.testing.assert_array_equal(found[head], np.asarray(whole[head])[kept["emb"]])


def live(dead: cuts.Dead, width: str, layer: int | None, size: int) -> list[int]:
    return [i for i in range(size) if i not in dead.of(width, layer, size)]


@pytest.mark.parametrize("name", EACH)
def test_importance_leaves_out_what_adds_nothing_and_the_logits_stay(name, settings, tmp_path):
    """Layers, channels, groups of heads, neurons and experts are planted; norms over fewer channels give the same."""
    changed, layers = FAMILIES[name]
    dead = cuts.Dead(layers, widths=True)
    whole = cuts.write(tmp_path / "teacher", name, dead, **changed)
    sizes = cuts.SIZES | changed
    count, live_sizes = sizes["base_num_decoder_layers"], cuts.LIVE
    options = ["--layers", str(count - len(layers)), "--emb", str(live_sizes["emb"]), "--kv-heads", "1", "--heads", "2"]
    options += ["--experts", "3"] if name in OF_EXPERTS else ["--mlp", str(live_sizes["mlp"])]
    kept = cuts.cut(whole, tmp_path / "out", *options, *settings)["kept"]
    assert kept["layers"] == [layer for layer in range(count) if layer not in layers]
    assert kept["emb"] == live(dead, "emb", None, 32)
    for width, size in (("kv_heads", 2), ("mlp", 40), ("experts", 4)):
        for module, indices in kept[width].items():
            assert indices == live(dead, width, int(module.partition("/")[0]), size), (width, module)
    assert bool(kept["experts"]) == (name in OF_EXPERTS) != bool(kept["mlp"])
    expected = cuts.logits(whole)
    assert np.std(expected) > 0.5
    # What a norm's epsilon is of a token's mean square, another factor for each token would have to undo.
    bound = 1e-4 if name in ("gemma2-2b", "gemma3-4b") else 1e-5  # theirs is ten times that of the others here
    np.testing.assert_allclose(cuts.logits(tmp_path / "out"), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["tiny-llama", pytest.param("gemma2-2b", marks=pytest.mark.slow)])
def test_neurons_whose_output_is_0_are_no_loss_by_any_number_of_layers(name, settings, tmp_path):
    """Where no channel goes no norm is touched."""
    dead = cuts.Dead(widths=True)
    whole = cuts.write(tmp_path / "teacher", name, dead, **FAMILIES[name][0])
    record = cuts.cut(whole, tmp_path / "out", "--mlp", "30", *settings)
    assert record["norm_factors"] == {}
    np.testing.assert_allclose(cuts.logits(tmp_path / "out"), cuts.logits(whole), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_whose_parts_stand_in_another_order_is_cut_alike(settings, tmp_path):
    generator = np.random.default_rng(1)
    orders: dict[Any, np.ndarray] = {}

    def order(width: str, layer: int | None) -> np.ndarray:
        if width == "heads":  # queries go with their keys
            return (order("kv_heads", layer)[:, None] * 2 + np.array([1, 0])).reshape(-1)
        key = width, None if width == "emb" else layer
        return orders.setdefault(key, generator.permutation({"emb": 32, "kv_heads": 2, "mlp": 40}[width]))

    plain = cuts.write(tmp_path / "plain", "tiny-qwen3")
    turned = cuts.write(tmp_path / "turned", "tiny-qwen3", order=order)
    np.testing.assert_allclose(cuts.logits(turned), cuts.logits(plain), rtol=0, atol=1e-4)
    sizes = ["--layers", "3", "--emb", "20", "--heads", "1", "--kv-heads", "1", "--mlp", "17"]
    a, b = (
        cuts.cut(teacher, tmp_path / f"{teacher.name}_cut", *sizes, *settings)["kept"] for teacher in (plain, turned)
    )
    assert a["layers"] == b["layers"]
    assert a["emb"] == sorted(order("emb", None)[b["emb"]])
    for width in ("heads", "kv_heads", "mlp"):
        for module, indices in a[width].items():
            layer = int(module.partition("/")[0])
            assert indices == sorted(order(width, layer)[b[width][module]]), (width, module)
    logits = [cuts.logits(tmp_path / f"{name}_cut") for name in ("plain", "turned")]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)


# However it is written ------------------------------------------------------------------------------------------------

SIZES = ("--layers", "3", "--emb", "20", "--mlp", "17")


@pytest.fixture(scope="module")
def uninterrupted(teacher, settings, base):
    return base / "whole", cuts.cut(teacher, base / "whole", *SIZES, *settings)


def test_no_more_is_in_memory_than_a_layer_of_an_array_or_the_table(
    teacher, uninterrupted, settings, tmp_path, monkeypatch
):
    """Also where all layers of an array are too much for one batch; the student is the same."""
    read, largest = reading.Reader.read, []

    def measured(*arguments: Any) -> np.ndarray:
        found = read(*arguments)
        largest.append(found.nbytes)
        return found

    def never(_: Any) -> np.ndarray:
        raise AssertionError("an array is in memory whole")

    monkeypatch.setattr(reading.Reader, "read", measured)
    monkeypatch.setattr(writing, "BATCH", 0)
    monkeypatch.setattr(stacked_arrays.Stacked, "whole", never)
    cuts.cut(teacher, tmp_path / "out", *SIZES, *settings)
    assert max(largest) == 256 * 32 * 4  # of 4 layers, a kernel has 32 x 4 x 40 numbers, and queries have 32 x 4 x 64
    cuts.assert_equal(cuts.arrays(tmp_path / "out"), cuts.arrays(uninterrupted[0]))


@pytest.mark.parametrize("change", ["none", pytest.param("sizes", marks=pytest.mark.slow)])
def test_an_interrupted_cut_looks_like_none_and_goes_on_to_the_same_student(
    change, teacher, uninterrupted, settings, tmp_path, monkeypatch
):
    """It fails in its third write; the second time the teacher reads no row, if the command is the same."""
    monkeypatch.setattr(writing, "BATCH", 10_000)
    write, out = writing.ocp.partial.save, tmp_path / "out"
    writes: list[int] = []

    def failing(path: Any, tree: Any, **options: Any) -> None:
        if len(writes) == 2:
            raise OSError(28, "No space left on device")
        writes.append(len(tree))
        write(path, tree, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writing.ocp.partial, "save", failing)
        with pytest.raises(RunError, match=r"No space left on device.*goes on from here"):
            cuts.cut(teacher, out, *(SIZES if change == "none" else ("--layers", "2")), *settings)
    with pytest.raises(ConfigError, match="no MaxText checkpoint"):
        teacher_lib.find_checkpoint(str(out))
    if change == "none":
        monkeypatch.setattr("MaxText.pruning.calibration.measure", None)
    assert cuts.cut(teacher, out, *SIZES, *settings) == uninterrupted[1]
    cuts.assert_equal(cuts.arrays(out), cuts.arrays(uninterrupted[0]))
    assert (out / "cut.json").read_bytes() == (uninterrupted[0] / "cut.json").read_bytes()
    assert {path.name for path in out.iterdir()} == {"0", "cut.json"}


def test_the_last_checkpoint_of_a_run_is_a_teacher_when_its_name_is_given(trained, tmp_path):
    options = ["--model-name", "tiny-llama", "--layers", "1", "--by", "first"]
    cuts.cut(trained, tmp_path / "out", *options)
    whole = cuts.arrays(trained, step=5)
    for path, array in cuts.arrays(tmp_path / "out").items():
        expected = whole[path][:, :1] if path[1] == "layers" else whole[path]
        np.testing.assert_array_equal(array, expected, err_msg="/".join(path))


def test_the_tokenizer_comes_along(teacher, tmp_path):
    whole = shutil.copytree(teacher, tmp_path / "teacher")
    (whole / "tokenizer").mkdir()
    (whole / "tokenizer/tokenizer.json").write_text("{}")
    cuts.cut(whole, tmp_path / "out", "--layers", "1", "--by", "first")
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_text() == "{}"


# In words that a user types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_that_is_printed_trains_the_student(apart, teacher, train, tmp_path, capsys):
    """Of the teacher's own sizes, so that it has nothing to learn; and of others."""
    for layers in (4, 2):
        stored = ["--scan-layers", "false"] if apart else []
        cuts.cut(teacher, tmp_path / f"out{layers}", "--layers", str(layers), "--by", "first", *stored)
        line = next(line for line in capsys.readouterr().out.splitlines() if "MaxText/train.py" in line)
        given = dict(word.split("=", 1) for word in shlex.split(line)[3:])
        row = train(f"cut{layers}{apart}", **given, steps=1, enable_checkpointing="false").rows()[0]
        assert row["learning/teacher_ce_loss"] > 1
        assert (abs(row["learning/kd_loss"]) < 1e-6) == (layers == 4)


# What goes wrong ------------------------------------------------------------------------------------------------------

# Options -> what the message must hold.
BAD: dict[str, tuple[list[str], list[str]]] = {
    "no such teacher": (["--teacher", "/no/such", "--layers", "1"], ["--teacher '/no/such'", "no such path"]),
    "nothing to cut": ([], ["nothing to cut", "--target", "--kv-heads"]),
    "more layers": (["--layers", "5"], ["--layers=5", "the teacher has 4", "1 to 4"]),
    "no layers": (["--layers", "0"], ["--layers=0", "1 to 4"]),
    "wider": (["--emb", "33"], ["--emb=33", "the teacher has 32"]),
    "more neurons": (["--mlp", "41"], ["--mlp=41", "1 to 40"]),
    "experts of a dense model": (["--experts", "2"], ["--experts=2", "1 to 1"]),
    "heads that are no multiple": (["--heads", "3"], ["--heads=3", "no multiple of 2 key-value heads"]),
    "larger groups": (["--kv-heads", "1"], ["--heads=4 --kv-heads=1", "4 query heads", "at most 2 heads"]),
    "preset of another head": (["--target", "qwen3-0.6b"], ["--target='qwen3-0.6b'", "decoder_block"]),
    "preset of another width of heads": (["--target", "llama3.1-8b"], ["head_dim=128", "the teacher 16"]),
    "no such preset": (["--target", "tiny-lama"], ["--target='tiny-lama'", "did you mean tiny-llama"]),
    "no such model": (["--model-name", "tiny-lama", "--layers", "1"], ["--model-name='tiny-lama'"]),
    "another model": (["--model-name", "tiny-llama", "--layers", "1"], ["--teacher", "does not hold", "--overrides"]),
    "overrides that are none": (["--overrides", "3", "--layers", "1"], ["--overrides='3'", "a mapping"]),
    "override that is no key": (["--overrides", "{base_embdim: 3}", "--layers", "1"], ["base_embdim"]),
    "a decoder of other axes": (["--model-name", "deepseek3-mini", "--layers", "1"], ["decoder_block=deepseek"]),
    "fused projections": (["--overrides", "{fused_qkv: true}", "--layers", "1"], ["fused_qkv=True", "cannot be cut"]),
    "importance without rows": (["--layers", "1", "--by", "importance"], ["--by importance", "key=value"]),
    "rows that are all alike": (
        ["--layers", "1", "--by", "importance", "dataset_type=synthetic", "hardware=cpu"], ["dataset_type=synthetic"]
    ),
    "no rows": (["--layers", "1", "--rows", "0"], ["--rows=0", "1 up"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case, teacher, tmp_path):
    options, words = BAD[case]
    way = [] if "--by" in options else ["--by", "first"]
    with pytest.raises(ConfigError) as raised:
        cuts.cut(teacher, tmp_path / "out", *way, *options)
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_which_nothing_tells_what_it_is_wants_a_name(teacher, tmp_path):
    shutil.copytree(teacher / "0", tmp_path / "0")
    with pytest.raises(ConfigError, match="--model-name: which model is it"):
        cuts.cut(tmp_path / "0", tmp_path / "out", "--layers", "1", "--by", "first")


def test_an_output_with_anything_in_it_is_left_alone(teacher, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for output, words in ((tmp_path, "is not empty"), (teacher, "a checkpoint already")):
        with pytest.raises(ConfigError, match=words):
            cuts.cut(teacher, output, "--layers", "1", "--by", "first")


def test_a_cut_that_is_refused_ends_with_one_line_and_status_2(teacher, tmp_path):
    arguments = ["--teacher", str(teacher), "--output", str(tmp_path / "out"), "--layers", "9"]
    result = execute(["scripts/init_student.py"], arguments, tmp_path / "log")
    assert (result.status, result.output) == (2, "error: --layers=9: the teacher has 4; allowed is 1 to 4\n")
