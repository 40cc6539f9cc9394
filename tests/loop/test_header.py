"""Laws of what a run says before its first step."""

import pytest

from MaxText.config.checks import check_kd
from MaxText.loop import header


@pytest.mark.parametrize(
    ("keys", "text"),
    (
        ({}, "KL(teacher || student)"),
        ({"kd_divergence": "reverse_kl"}, "KL(student || teacher)"),
        ({"kd_divergence": "jsd", "kd_jsd_beta": 0.3}, "JSD(teacher, student) with a beta of 0.3"),
        ({"kd_divergence": "skew_kl"}, "KL(teacher || 0.1 teacher + 0.9 student)"),
        ({"kd_divergence": "skew_reverse_kl", "kd_skew": 0.2}, "KL(student || 0.8 teacher + 0.2 student)"),
        ({"kd_divergence": "tvd"}, "TVD(teacher, student)"),
    ),
    ids=str,
)
def test_the_loss_is_told_with_its_divergence(keys, text):
    kd = check_kd({"use_kd": True, "kd_teacher_parameters_path": "/teacher", **keys})
    assert header.loss_text(kd) == f"0.5 CE + 0.5 T^2 {text} over the whole vocabulary, T = 1"


def test_the_share_of_positions_that_is_taught_is_told():
    kd = check_kd({"use_kd": True, "kd_teacher_parameters_path": "/teacher", "kd_positions": 0.2})
    assert "over the whole vocabulary at the 20% of positions of highest entropy, T = 1" in header.loss_text(kd)
