"""Laws of a batch that is made ahead: it is the one that would have come, and a position knows nothing of it."""

import threading

import grain.python as grain
import pytest

from MaxText.data import ahead


class Numbers:
    """A source of the numbers below `end`, of which one is damaged."""

    def __init__(self, end, damaged=None):
        self.end, self.damaged = end, damaged

    def __len__(self):
        return self.end

    def __getitem__(self, index):
        if index == self.damaged:
            raise RuntimeError(f"row {index} is damaged")
        return index


def numbers(end=6, damaged=None, made=lambda number: number):
    dataset = grain.MapDataset.source(Numbers(end, damaged)).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return ahead.Ahead(iter(dataset), made)


def taken(iterator, count):
    """So many, with a request for the next one after each, as the loop has it."""
    found = []
    for _ in range(count):
        found.append(next(iterator))
        iterator.start_prefetch()
    return found


def test_a_position_is_that_of_the_last_one_taken_and_reading_goes_on_there():
    first = numbers()
    before = first.get_state()
    assert taken(first, 2) == [0, 1]
    position = first.get_state()
    first.coming.result()  # 2 has been read
    assert first.get_state() == position != before
    assert taken(first, 3) == [2, 3, 4]
    first.set_state(position)
    assert taken(first, 3) == [2, 3, 4]
    again = numbers()
    again.set_state(position)
    assert list(again) == [2, 3, 4, 5]


def test_each_comes_once_and_in_order_however_often_it_is_asked_for_ahead():
    asked = numbers()
    found = []
    for number in asked:
        found.append(number)
        for _ in range(number % 3):
            asked.start_prefetch()
    assert found == list(range(6))
    with pytest.raises(StopIteration):
        next(asked)


def test_the_next_one_is_made_by_another_thread_while_nobody_asks_for_it():
    threads = []
    iterator = numbers(made=lambda number: threads.append(threading.current_thread()) or number)
    next(iterator)
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
    iterator.start_prefetch()
    iterator.coming.result()
    assert len(threads) == 2


def test_what_is_wrong_with_one_is_said_when_it_is_asked_for():
    iterator = numbers(damaged=2)
    assert taken(iterator, 2) == [0, 1]
    with pytest.raises(RuntimeError, match="row 2 is damaged"):
        next(iterator)


def test_closed_it_leaves_no_thread():
    iterator = numbers()
    taken(iterator, 2)
    (thread,) = iterator.thread._threads
    assert thread.is_alive()
    iterator.close()
    assert not thread.is_alive()
