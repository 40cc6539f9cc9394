"""Laws of an end that comes too early: the data's, before the schedule's."""

import types

import numpy as np

from MaxText.loop import ending


def said(schedule, start=0, done=91, last=None, **keys):
    config = {"steps": 200, "learning_rate_schedule_steps": 200, "global_batch_size_to_train_on": 4, "num_epoch": 1}
    config |= {"enable_rampup_batch_size": False}
    return ending.data_has_ended(types.SimpleNamespace(**config | keys), schedule, start, done, 94_000.0, last)


def falling(step):
    return 1e-3 * (1 - step / 200)


def test_the_end_of_the_data_is_said_in_words():
    [line, warning] = said(falling)
    assert line == (
        "training stopped: the training data has ended before step 92 of 200: "
        "92 steps, 368 rows, 94,000 tokens read, 1 epoch (num_epoch) in all"
    )
    assert warning.startswith("warning: the learning rate has not reached its end: 5.45e-04 at step 91, planned was ")
    assert "5.00e-06 at step 199" in warning and "steps=92" in warning


def test_a_resumed_run_says_since_when_it_has_counted():
    assert "12 steps, 48 rows, 94,000 tokens read since step 80, 3 epochs" in said(falling, start=80, num_epoch=3)[0]


def test_rows_that_fill_up_the_last_batch_are_not_read():
    segments = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    assert "92 steps, 366 rows" in said(falling, last={"inputs_segmentation": segments})[0]


def test_a_learning_rate_that_has_nowhere_to_go_is_not_warned_of():
    assert len(said(lambda step: 1e-3)) == 1
    assert len(said(falling, learning_rate_schedule_steps=92)) == 1


def test_data_without_a_batch_ends_before_the_first_step():
    assert "before step 0 of 200: 0 steps, 0 rows" in said(falling, done=-1)[0]
