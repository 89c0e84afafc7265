import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from paperworks.bench import Bound, Close, Gain, Ratio
from paperworks.bench.expectations import overall, t_interval
from paperworks.errors import UserError

values = st.lists(st.floats(-100, 100), min_size=2, max_size=8)
pairs = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=8)
bars = st.floats(-200, 200)
ORDER = {"fails": 0, "undecided": 1, "holds": 2}


def table(a, b=None):
    arms = {"a": a} if b is None else {"a": a, "b": b}
    return {arm: {"m": np.array(column, dtype=float)} for arm, column in arms.items()}


@given(values=values, level=st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_is_students(values, level):
    mean, low, high = t_interval(values, level)
    assert mean == pytest.approx(np.mean(values))
    if np.std(values) > 1e-9:
        result = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert (low, high) == pytest.approx((result.low, result.high), rel=1e-6, abs=1e-9)


def test_an_interval_by_hand():
    half = 4.30265272991 * 1 / math.sqrt(3)  # t of 97.5 % with two degrees of freedom
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half))
    assert t_interval([5, 5, 5]) == (5, 5, 5)
    assert t_interval([5]) == (5, -math.inf, math.inf)


@given(a=values, bar=bars)
def test_a_verdict_says_where_the_interval_lies(a, bar):
    verdict = Bound("m", "a", at_least=bar).judge(table(a))
    expected = "holds" if verdict.low >= bar else "fails" if verdict.high < bar else "undecided"
    assert verdict.verdict == expected
    assert verdict.low <= verdict.estimate <= verdict.high
    assert (verdict.bar, verdict.direction, verdict.unit) == (bar, "at least", "value")


@given(pairs=pairs, bars=st.tuples(bars, bars))
def test_a_higher_bar_never_helps(pairs, bars):
    a, b = zip(*pairs, strict=True)
    low, high = sorted(bars)
    for make in (
        lambda bar: Gain("m", "a", over="b", at_least=bar),
        lambda bar: Ratio("m", "a", over="b", at_least=bar),
        lambda bar: Bound("m", "a", at_least=bar),
        lambda bar: Close("m", "a", to="b", within=200 - bar),
    ):
        easy, hard = (ORDER[make(bar).judge(table(a, b)).verdict] for bar in (low, high))
        assert easy >= hard


@given(pairs=pairs, bar=bars)
def test_at_most_mirrors_at_least(pairs, bar):
    a, b = zip(*pairs, strict=True)
    one = Gain("m", "a", over="b", at_least=bar).judge(table(a, b))
    other = Gain("m", "b", over="a", at_most=-bar).judge(table(a, b))
    assert one.verdict == other.verdict
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert other.direction == "at most"


@given(pairs=pairs, factor=st.floats(0.01, 100))
def test_a_ratio_knows_no_unit_and_no_order(pairs, factor):
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    plain = Ratio("m", "a", over="b").estimate(table(a, b))
    assert Ratio("m", "a", over="b").estimate(table(factor * a, factor * b)) == pytest.approx(plain, rel=1e-6)
    turned = Ratio("m", "b", over="a").estimate(table(a, b))
    assert turned == pytest.approx((1 / plain[0], 1 / plain[2], 1 / plain[1]), rel=1e-6)


def test_pairing_takes_out_what_seeds_share():
    hard, easy = [0.1, 0.5, 0.9], [0.15, 0.56, 0.95]
    assert Gain("m", "a", over="b").judge(table(easy, hard)).verdict == "holds"
    assert Gain("m", "a", over="b").estimate(table(easy, hard))[0] == pytest.approx(0.16 / 3)
    assert Ratio("m", "a", over="b").estimate(table([2, 8], [1, 2]))[0] == pytest.approx(math.sqrt(8))


def test_defaults_and_labels():
    assert (Gain("m", "a", over="b").at_least, Ratio("m", "a", over="b").at_least) == (0, 1)
    assert Gain("m", "a", over="b", at_most=1).at_least is None
    assert Close("m", "a", to="b", within=0.01).at_least == -0.01
    assert [e.label for e in (Gain("m", "a", over="b"), Ratio("m", "a", over="b"), Bound("m", "a", at_least=1))] == [
        "m: a − b",
        "m: a / b",
        "m: a",
    ]
    assert Gain("m", "a", over="b", name="gain").judge(table([1, 2], [0, 0])).name == "gain"
    assert Gain("m", "a", over="b").arms == ("a", "b")


def test_one_seed_is_undecided_unless_the_ratio_cannot_fall_short():
    for expectation in (Gain("m", "a", over="b"), Bound("m", "a", at_most=3), Ratio("m", "a", over="b")):
        assert expectation.judge(table([2], [1])).verdict == "undecided"


def test_a_claim_holds_if_all_of_it_does():
    def verdicts(*expected):
        bars = {"holds": -9, "undecided": 2, "fails": 9}
        judged = [Bound("m", "a", at_least=bars[e]).judge(table([1, 2, 3])) for e in expected]
        assert [j.verdict for j in judged] == list(expected)
        return overall(judged)

    assert verdicts("holds", "holds") == "holds"
    assert verdicts("holds", "undecided") == "undecided"
    assert verdicts("undecided", "fails", "holds") == "fails"
    assert verdicts() is None


def test_bad_expectations():
    with pytest.raises(UserError, match="Bound needs at_least or at_most"):
        Bound("m", "a")
    with pytest.raises(UserError, match="not both"):
        Gain("m", "a", over="b", at_least=1, at_most=2)
    with pytest.raises(UserError, match="within must not be negative"):
        Close("m", "a", to="b", within=-0.1)
    with pytest.raises(UserError, match="expects the metric 'n', but arm 'a' gave m"):
        Bound("n", "a", at_least=0).judge(table([1]))
    for a in ([0.0, 1.0], [-1.0, 1.0]):
        with pytest.raises(UserError, match="m: a / b: a ratio needs positive values"):
            Ratio("m", "a", over="b").judge(table(a, [1.0, 1.0]))
