from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from paperworks.errors import UserError
from paperworks.train import Batches, Stream

quick = settings(max_examples=60)
sizes, per_process, worlds = st.integers(1, 50), st.integers(1, 8), st.integers(1, 4)
seeds = st.integers(0, 2**32)


def numbers(size):
    return TensorDataset(torch.arange(size))


@quick
@given(size=sizes, batch_size=st.integers(1, 60), seed=seeds, shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(size, batch_size, seed, shuffle, epoch):
    batches = Batches(size, batch_size, seed=seed, shuffle=shuffle)
    batches.epoch = epoch
    rows = list(batches)
    assert len(rows) == len(batches)
    assert all(len(row) == batch_size for row in rows[:-1])
    flat = [*chain(*rows)]
    assert sorted(flat) == list(range(size))
    assert shuffle or flat == list(range(size))


@quick
@given(size=st.integers(4, 50), share=per_process, world=worlds, seed=seeds, drop_last=st.booleans())
def test_processes_share_the_batches_of_one(size, share, world, seed, drop_last):
    if drop_last and size - size % world < share * world:
        return
    options = {"batch_size": share * world, "seed": seed, "drop_last": drop_last}
    alone = list(Batches(size, **options))
    shares = [list(Batches(size, **options, rank=rank, world=world)) for rank in range(world)]
    for together, *parts in zip(alone, *shares, strict=False):
        joined = [*chain(*parts)]
        assert len({len(part) for part in parts}) == 1
        assert len(joined) == len(set(joined))
        assert set(joined) <= set(together)
        assert len(together) - len(joined) < world
    assert len(shares[0]) in (len(alone), len(alone) - 1)


@quick
@given(size=sizes, share=per_process, world=worlds)
def test_without_shuffling_every_example_is_in_one_process(size, share, world):
    shares = [Batches(size, share * world, shuffle=False, rank=rank, world=world) for rank in range(world)]
    assert sorted(index for part in shares for row in part for index in row) == list(range(size))
    assert all(len(part) == len(list(part)) for part in shares)
    assert all(row for part in shares for row in part)


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        batches = Batches(30, 30, seed=seed)
        batches.epoch = epoch
        return next(iter(batches))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1) != order(1, 0)


def test_order_ignores_the_global_generator():
    torch.manual_seed(0)
    first = list(Batches(30, 7))
    torch.manual_seed(1)
    assert list(Batches(30, 7)) == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0, "batch_size": 1}, "dataset is empty"),
        ({"size": 5, "batch_size": 0}, "positive multiple"),
        ({"size": 5, "batch_size": -2}, "positive multiple"),
        ({"size": 5, "batch_size": 3, "world": 2}, "positive multiple of the 2"),
        ({"size": 5, "batch_size": 6, "drop_last": True}, "do not fill one batch of 6"),
        ({"size": 1, "batch_size": 2, "world": 2}, "1 examples"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        Batches(**arguments)


@quick
@given(size=sizes, batch_size=st.integers(1, 12), seed=seeds)
def test_a_stream_passes_over_the_data_again_and_again(size, batch_size, seed):
    stream = Stream(numbers(size), batch_size, seed=seed)
    for _ in range(3):
        seen = torch.cat([next(stream)[0] for _ in range(size // min(batch_size, size))])
        assert len(seen.unique()) == len(seen)
        assert len(seen) > size - batch_size


@quick
@given(taken=st.integers(0, 12), seed=seeds)
def test_a_stream_continues_after_the_batch_at_which_it_was_saved(taken, seed):
    stream = Stream(numbers(11), 3, seed=seed)
    for _ in range(taken):
        next(stream)
    saved = stream.state_dict()
    expected = [next(stream)[0].tolist() for _ in range(7)]
    again = Stream(numbers(11), 3, seed=seed)
    again.load_state_dict(saved)
    assert [next(again)[0].tolist() for _ in range(7)] == expected


def test_a_stream_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = Stream(numbers(6), 2)
    for _ in range(7):
        next(stream)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_of_examples_that_are_no_tensors():
    class Words(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return f"word {index}", index

    words, indices = next(Stream(Words(), 4))
    assert list(words) == [f"word {index}" for index in indices]
