import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.data import LabelledData, few_label, split
from paperworks.errors import UserError

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def targets_of(counts):
    return torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])


@quick
@given(counts=st.lists(st.integers(9, 40), min_size=2, max_size=3), parts=st.integers(1, 3), seed=seeds)
def test_parts_are_disjoint_cover_and_keep_the_proportions(counts, parts, seed):
    targets = targets_of(counts)
    indices = split(targets, (1 / parts,) * parts, seed)
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(len(targets)))
    for index in indices:
        drawn = targets[index].bincount(minlength=len(counts))
        expected = torch.tensor(counts) * len(index) / len(targets)
        # Each part is proportional in what the earlier ones left, so that they may differ by one each.
        assert ((drawn - expected).abs() <= parts).all()


@quick
@given(seed=seeds, stratify=st.booleans())
def test_sizes_are_exact_and_what_is_over_is_in_no_part(seed, stratify):
    targets = targets_of([30, 20, 10])
    train, test = split(targets, (31, 12), seed, stratify=stratify)
    assert (len(train), len(test)) == (31, 12)
    assert len(torch.cat([train, test]).unique()) == 43


def test_a_half_of_balanced_classes_is_balanced():
    train, test = split(targets_of([10, 10, 10]), (0.5, 0.5), seed=0)
    assert targets_of([10, 10, 10])[train].bincount().tolist() == [5, 5, 5]
    assert len(test) == 15


def test_the_seed_decides_and_the_order_is_random():
    targets = targets_of([50, 50])
    first, again, other = (split(targets, (0.8, 0.2), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, first.sort().values)


def test_a_set_is_split_as_its_targets_are():
    targets = targets_of([8, 8])
    data = LabelledData(torch.zeros(16, 2), targets, ("a", "b"), "toy")
    for of_set, of_targets in zip(split(data, (12, 4), 5), split(targets, (12, 4), 5), strict=True):
        assert torch.equal(of_set, of_targets)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "sizes must be positive"),
        ((0.5, 0.0), "sizes must be positive"),
        ((-3,), "sizes must be positive"),
        ((9, 8), "add up to 17, but there are 16"),
        ((0.9, 0.2), "add up to 1.1, more than 1"),
        ((0.99, 0.01), "fraction 0.01 of 16 examples is none"),
        ((15, 1), "cannot hold all 2 classes"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        split(targets_of([8, 8]), sizes, 0)


def test_sizes_and_fractions_do_not_mix():
    with pytest.raises((UserError, TypeError)):  # beartype refuses it first, where it is on
        split(targets_of([8, 8]), (8, 0.5), 0)


def test_a_class_too_small_to_stratify_is_named():
    targets = targets_of([8, 1])
    with pytest.raises(UserError, match=r"class 1 has 1 example\(s\), too few to stratify 2 parts"):
        split(targets, (0.5, 0.5), 0)
    data = LabelledData(torch.zeros(9, 2), targets, ("common", "rare"), "toy")
    with pytest.raises(UserError, match="class 'rare' has 1"):
        split(data, (0.5, 0.5), 0)
    assert len(split(targets, (0.5, 0.5), 0, stratify=False)) == 2


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(UserError, match="seed"):
        split(targets_of([8, 8]), (0.5,), -1)


@quick
@given(counts=st.lists(st.integers(4, 12), min_size=2, max_size=4), per_class=st.integers(1, 4), seed=seeds)
def test_few_label_draws_the_same_number_of_every_class(counts, per_class, seed):
    targets = targets_of(counts)
    labelled, unlabelled = few_label(targets, generator(seed), per_class=per_class)
    assert targets[labelled].bincount().tolist() == [per_class] * len(counts)
    assert sorted([*labelled.tolist(), *unlabelled.tolist()]) == list(range(len(targets)))
    assert torch.equal(few_label(targets, generator(seed), per_class=per_class)[0], labelled)


def test_few_label_by_fraction():
    labelled, _ = few_label(targets_of([20, 10]), generator(0), fraction=0.1)
    assert targets_of([20, 10])[labelled].tolist() == [0, 0, 1]


def test_few_label_draws_every_example_alike():
    drawn = torch.cat([few_label(targets_of([5, 5]), generator(seed), per_class=1)[0] for seed in range(1000)])
    # 200 expected of each; five standard deviations of a binomial are 63.
    assert ((drawn.bincount(minlength=10) - 200).abs() < 63).all()


def test_few_label_names_the_class_that_is_too_small():
    labels = targets_of([20, 4])
    with pytest.raises(UserError, match="class 'jump' has 4 examples, of which 0 would be labelled"):
        few_label(labels, generator(0), fraction=0.1, classes=["run", "jump"])
    with pytest.raises(UserError, match="class 'fly' has 0 examples, of which 1 would be labelled"):
        few_label(labels, generator(0), per_class=1, classes=["run", "jump", "fly"])
    with pytest.raises(UserError, match="class 'jump' has 4 examples, of which 5 would be labelled"):
        few_label(LabelledData(torch.zeros(24, 1), labels, ("run", "jump"), "moves"), generator(0), per_class=5)
    with pytest.raises(UserError, match="give either fraction or per_class"):
        few_label(labels, generator(0))
    with pytest.raises(UserError, match=r"fraction must be in \(0, 1\], got 2.0"):
        few_label(labels, generator(0), fraction=2.0)
    with pytest.raises(UserError, match="per_class must be at least 1, got 0"):
        few_label(labels, generator(0), per_class=0)
