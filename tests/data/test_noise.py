import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperworks.data import cifar10_asymmetric_map, noisify, replace_inputs
from paperworks.errors import UserError

quick = settings(max_examples=40, deadline=None, derandomize=True)
rates = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(classes, n=200, seed=7):
    return torch.randint(classes, (n,), generator=generator(seed))


@quick
@given(
    kind=st.sampled_from(["symmetric", "pair", "instance"]),
    rate=rates,
    classes=st.integers(2, 12),
    seed=seeds,
)
def test_exactly_the_floor_of_rate_n_labels_change(kind, rate, classes, seed):
    clean = labels_of(classes)
    features = torch.randn(200, 3, generator=generator(1))
    noisy, is_noisy, _ = noisify(clean, kind, rate, classes, generator(seed), features=features)
    assert is_noisy.sum() == int(rate * 200)
    assert torch.equal(is_noisy, noisy != clean)
    assert noisy.min() >= 0
    assert noisy.max() < classes


@quick
@given(kind=st.sampled_from(["symmetric", "pair", "asymmetric", "instance"]), rate=rates, seed=seeds)
def test_transition_is_row_stochastic_and_reproduces_the_counts(kind, rate, seed):
    clean = labels_of(10)
    features = torch.randn(200, 2, 2, generator=generator(1))
    noisy, _, transition = noisify(clean, kind, rate, 10, generator(seed), features=features)
    torch.testing.assert_close(transition.sum(1), torch.ones(10))
    for i in range(10):
        expected = noisy[clean == i].bincount(minlength=10) / (clean == i).sum()
        torch.testing.assert_close(transition[i], expected)


@quick
@given(kind=st.sampled_from(["symmetric", "pair", "asymmetric", "instance"]), seed=seeds)
def test_same_seed_same_noise_and_the_clean_labels_stay(kind, seed):
    clean = labels_of(10)
    kept, features = clean.clone(), torch.randn(200, 4, generator=generator(1))
    first = noisify(clean, kind, 0.5, 10, generator(seed), features=features)
    again = noisify(clean, kind, 0.5, 10, generator(seed), features=features)
    other = noisify(clean, kind, 0.5, 10, generator(seed + 1), features=features)
    assert torch.equal(first.noisy, again.noisy)
    assert not torch.equal(first.noisy, other.noisy)
    assert torch.equal(clean, kept)
    assert first.noisy.data_ptr() != clean.data_ptr()


def test_no_noise_gives_a_copy():
    clean = labels_of(4)
    noisy, is_noisy, transition = noisify(clean, "symmetric", 0.0, 4, generator())
    assert torch.equal(noisy, clean)
    assert not is_noisy.any()
    assert torch.equal(transition, torch.eye(4))
    noisy[0] = (noisy[0] + 1) % 4
    assert torch.equal(clean, labels_of(4))


def test_symmetric_is_uniform_over_the_other_classes():
    noisy = noisify(torch.zeros(60_000, dtype=torch.int64), "symmetric", 1.0, 4, generator()).noisy
    counts = noisy.bincount(minlength=4)
    assert counts[0] == 0
    # Three classes of 20 000 expected; five standard deviations of a binomial are 577.
    assert ((counts[1:] - 20_000).abs() < 577).all()


def test_pair_goes_to_the_next_class_and_round():
    noisy = noisify(torch.tensor([0, 1, 2]), "pair", 1.0, 3, generator()).noisy
    assert noisy.tolist() == [1, 2, 0]


def test_asymmetric_follows_cifar10s_map_and_leaves_the_rest_clean():
    clean = torch.arange(10).repeat(100)
    everything = noisify(clean, "asymmetric", 1.0, 10, generator())
    assert torch.equal(everything.noisy, cifar10_asymmetric_map()[clean])
    assert everything.is_noisy.float().mean() == 0.5
    part = noisify(clean, "asymmetric", 0.4, 10, generator())
    assert 100 < part.is_noisy.sum() < 300  # nominal 400, half of which meet a class outside the map
    for k in (0, 1, 6, 7, 8):
        assert not part.is_noisy[clean == k].any()


def test_the_map_names_the_classes_that_look_alike():
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    moved = {names[i]: names[j] for i, j in enumerate(cifar10_asymmetric_map().tolist()) if i != j}
    assert moved == {
        "truck": "automobile",
        "bird": "airplane",
        "deer": "horse",
        "cat": "dog",
        "dog": "cat",
    }


def test_instance_noise_depends_on_the_features():
    clean = torch.zeros(2000, dtype=torch.int64)
    features = torch.zeros(2000, 2)
    features[:1000, 0], features[1000:, 1] = 100.0, 100.0  # so sharp that each group takes one label
    noisy = noisify(clean, "instance", 1.0, 6, generator(3), features=features).noisy
    first, second = noisy[:1000].unique(), noisy[1000:].unique()
    assert len(first) == len(second) == 1
    assert first != second
    plain = noisify(clean, "instance", 1.0, 6, generator(3), features=torch.zeros(2000, 2)).noisy
    assert plain.bincount(minlength=6)[1:].min() > 300  # without information, uniform: 400 each


def test_a_transition_matrix_is_drawn_from():
    transition = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    clean = torch.arange(3).repeat(20_000)
    noisy, is_noisy, drawn = noisify(clean, "transition", None, 3, generator(), transition=transition)
    torch.testing.assert_close(drawn, transition, atol=0.02, rtol=0)
    assert drawn[0, 2] == 0
    assert not is_noisy[clean == 1].any()
    assert torch.equal(is_noisy, noisy != clean)


def test_dtype_is_kept_and_a_class_without_examples_has_the_identitys_row():
    noisy, _, transition = noisify(torch.tensor([0, 0], dtype=torch.int32), "pair", 1.0, 3, generator())
    assert noisy.dtype == torch.int32
    assert transition.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "symetric"}, "Did you mean 'symmetric'"),
        ({"rate": 1.2}, "rate must be from 0 to 1, got 1.2"),
        ({"rate": -0.1}, "rate must be from 0 to 1"),
        ({"rate": float("nan")}, "rate must be from 0 to 1, got nan"),
        ({"rate": None}, "rate must be from 0 to 1, got None"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"num_classes": 3}, r"labels\[3\] is 3, expected 0 to 2"),
        ({"labels": torch.tensor([0, -1])}, r"labels\[1\] is -1"),
        ({"kind": "asymmetric"}, "needs num_classes=10, got 4"),
        ({"kind": "instance"}, r"needs features of shape \[4, ...\], got none"),
        ({"kind": "instance", "features": torch.zeros(4, 2) / 0}, r"features\[0\]"),
        ({"kind": "transition", "transition": torch.eye(4)}, "rate must be None"),
        ({"kind": "transition", "rate": None}, r"shape \[4, 4\], got none"),
        ({"kind": "transition", "rate": None, "transition": torch.eye(3)}, r"shape \[4, 4\], got \[3, 3\]"),
        ({"kind": "transition", "rate": None, "transition": torch.eye(4) * 2}, r"transition\[0\].*sum to 1"),
        ({"transition": torch.eye(4)}, "transition belongs to kind='transition'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"labels": torch.arange(4), "kind": "symmetric", "rate": 0.5, "num_classes": 4}
    with pytest.raises(UserError, match=message):
        noisify(**{**arguments, **change}, generator=generator())


@quick
@given(rate=rates, seed=seeds)
def test_open_set_noise_puts_in_distinct_outliers(rate, seed):
    inputs, outliers = torch.zeros(50, 1, 2), torch.arange(1.0, 61).view(60, 1, 1).expand(60, 1, 2)
    mixed, replaced = replace_inputs(inputs, outliers, rate, generator(seed))
    assert replaced.sum() == int(rate * 50)
    assert torch.equal(mixed[~replaced], inputs[~replaced])
    used = mixed[replaced][:, 0, 0]
    assert len(used.unique()) == len(used)
    assert (used > 0).all()
    assert not inputs.any()


def test_open_set_noise_needs_enough_outliers_of_the_same_shape():
    inputs = torch.zeros(10, 3)
    with pytest.raises(UserError, match="replaces 5 inputs, but there are 4 outliers"):
        replace_inputs(inputs, torch.ones(4, 3), 0.5, generator())
    with pytest.raises(UserError, match=r"shape \[3\], got \[2\]"):
        replace_inputs(inputs, torch.ones(9, 2), 0.5, generator())
    with pytest.raises(UserError, match="rate"):
        replace_inputs(inputs, torch.ones(9, 3), 2.0, generator())
