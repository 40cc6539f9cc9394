"""Laws of what a teacher's parts are worth: what is measured is what the model does, of the tokens that count."""

import cuts
import jax
import numpy as np
import pytest
from rich.console import Console

from MaxText.huggingface import shapes
from MaxText.models import teacher as teacher_lib
from MaxText.pruning import calibration, cutting, observed, target
from MaxText.pruning.structure import structure_of

pytestmark = pytest.mark.e2e

SCALE = ("pre_self_attention_layer_norm", "scale")


class Reading:
    """A teacher, and what is measured of it on rows."""

    def __init__(self, folder, settings, by_loss=False):
        self.checkpoint = cutting.find_teacher(str(folder))
        model = target.teacher_of(self.checkpoint.root, "", None)
        config = shapes.maxtext_config(model.preset, model.overrides, self.checkpoint.scan_layers)
        self.structure = structure_of(config)
        self.seen = {}
        kept = calibration.scored

        def noting(total, worth):
            self.seen = total
            return kept(total, worth)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "scored", noting)
            asked = calibration.Asked(settings, 11, by_loss)
            self.found = calibration.measure(model, self.checkpoint, self.structure, asked, Console(quiet=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def settings(base):
    return cuts.rows(base)


@pytest.fixture(scope="module")
def whole(base, settings):
    return Reading(cuts.write(base / "teacher", "tiny-llama"), settings, by_loss=True)


def test_the_first_norm_is_seen_as_float64_has_it_over_the_tokens_that_count(whole, base, settings):
    """Which tokens these are, the rows' lengths tell: the first of each, to the last but one."""
    from array_record.python import array_record_module
    from maxtext.input_pipeline.protos import example_pb2

    reader = array_record_module.ArrayRecordReader(str(base / "rows.arrayrecord"))
    rows = [example_pb2.Example.FromString(record) for record in reader.read_all()]
    tokens = [list(row.features.feature["text"].int64_list.value)[:32] for row in rows]
    read = np.array([token for row in tokens for token in row[:-1]])
    arrays = cuts.arrays(base / "teacher")
    x = np.asarray(arrays["token_embedder", "embedding"], np.float64)[read]
    unscaled = np.square(x) / (np.square(x).mean(-1, keepdims=True) + 1e-7)
    scale = np.asarray(arrays["decoder", "layers", *SCALE], np.float64)[:, 0]
    assert whole.found.tokens == len(read)
    np.testing.assert_allclose(whole.found.unscaled[0, SCALE], unscaled.mean(0), rtol=1e-5)
    squares = whole.seen[0, SCALE[:1], "squares"]
    np.testing.assert_allclose(squares, (unscaled * np.square(scale)).sum(0), rtol=1e-5)


def test_layers_apart_are_seen_as_stacked_ones(whole, base, settings):
    apart = Reading(cuts.write(base / "apart", "tiny-llama", scanned=False), settings)
    assert apart.seen.keys() == whole.seen.keys()
    for name, value in whole.seen.items():
        np.testing.assert_allclose(apart.seen[name], value, rtol=1e-4, atol=1e-4, err_msg=str(name))


def test_what_a_layer_is_worth_by_loss_is_what_the_student_without_it_loses(whole, base, settings, tmp_path):
    for layer in (0, 2):
        kept = {"kept": whole_but(layer), "norm_factors": {}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cutting, "decided", lambda *_, kept=kept: kept)
            cuts.cut(base / "teacher", tmp_path / str(layer), "--layers", "3", "--by", "first")
        without = Reading(tmp_path / str(layer), settings)
        assert without.found.ce - whole.found.ce == pytest.approx(whole.found.scored.layers[layer], abs=1e-4)
    assert np.std(whole.found.scored.layers) > 1e-2


def whole_but(layer):
    kept = [other for other in range(4) if other != layer]
    return {
        "layers": kept,
        "emb": list(range(32)),
        "heads": {f"{other}/self_attention": list(range(4)) for other in kept},
        "kv_heads": {f"{other}/self_attention": list(range(2)) for other in kept},
        "mlp": {f"{other}/mlp": list(range(40)) for other in kept},
        "experts": {},
    }


def test_a_layer_that_turns_its_input_around_is_the_farthest_and_one_that_does_nothing_the_nearest():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    distances = [observed.cosine_distance(x, y)[0, 0] for y in (x, 3 * x, jax.numpy.zeros_like(x), -x)]
    np.testing.assert_allclose(distances, [0, 0, 0.5, 2], atol=1e-6)


def test_no_more_rows_are_read_than_asked_by_a_machine_with_fewer_devices_than_the_settings_want(settings, base):
    asked = calibration.Asked([*settings, "ici_fsdp_parallelism=32"], 5, False)
    checkpoint = teacher_lib.find_checkpoint(str(base / "teacher"))
    model = target.teacher_of(checkpoint.root, "", None)
    structure = structure_of(shapes.maxtext_config(model.preset, model.overrides, True))
    assert calibration.measure(model, checkpoint, structure, asked, Console(quiet=True)).rows == 5
