"""Laws of writing a cache: the devices have work while the host packs."""

from MaxText.loop import caching


def test_each_batch_comes_back_once_and_in_order_while_later_ones_are_computed():
    launched, packed = [], []

    def step(batch):
        launched.append(batch)
        return -batch

    def reads():
        for number in range(1, 6):
            yield caching.once.Read(number, {"batches": number})

    for read, found in caching.launched_ahead(reads(), step):
        assert found == -read.batch
        packed.append(read.batch)
        assert len(launched) == min(len(packed) + caching.AHEAD, 5)
    assert packed == launched == [1, 2, 3, 4, 5]
