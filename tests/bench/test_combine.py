import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperworks.bench.combine import effects
from paperworks.bench.expectations import t_interval

TINY = ("combine", "tiny", "nudge", "--on", "tiny", "--executor", "serial")


def cells(**values):
    """Cells by the letters of the methods that are present; ``none`` is without any."""
    return {frozenset(name.replace("none", "")): np.array(v, dtype=float) for name, v in values.items()}


def test_a_factorial_of_two_by_hand():
    found = effects(["a", "b"], cells(none=[10, 11], a=[13, 14], b=[12, 15], ab=[20, 18]))
    assert [effect.name for effect in found] == ["a", "b", "a × b"]
    by_seed = {
        "a": [((13 - 10) + (20 - 12)) / 2, ((14 - 11) + (18 - 15)) / 2],
        "b": [((12 - 10) + (20 - 13)) / 2, ((15 - 11) + (18 - 14)) / 2],
        "a × b": [((20 - 12) - (13 - 10)) / 2, ((18 - 15) - (14 - 11)) / 2],
    }
    for effect in found:
        assert (effect.estimate, effect.low, effect.high) == pytest.approx(t_interval(by_seed[effect.name]))


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8))
def test_effects_rebuild_the_cells(coefficients):
    """With effects coded ±1/2, y = mean + Σ effect · Π codes, exactly, in a full factorial."""
    methods = ["a", "b", "c"]
    terms = ["", "a", "b", "c", "ab", "ac", "bc", "abc"]

    def value(subset):
        signs = {m: 1 if m in subset else -1 for m in methods}
        return sum(c * np.prod([signs[m] for m in term]) / 2 for c, term in zip(coefficients, terms, strict=True))

    found = effects(methods, {frozenset(term): np.array([value(term)] * 2) for term in terms})
    assert [effect.estimate for effect in found] == pytest.approx(coefficients[1:], abs=1e-9)


def test_one_seed_has_no_interval():
    (effect, *_) = effects(["a", "b"], cells(none=[0], a=[1], b=[0], ab=[1]))
    assert (effect.estimate, effect.low, effect.high) == (1, None, None)


def test_combine_measures_all_subsets_and_their_effects(paperworks):
    done = paperworks(*TINY)
    assert done.code == 0, done.err
    assert done.err == "measuring 8 trials of tiny (quick)\n"
    rows = [row.split() for row in done.out.splitlines()]
    assert rows[1:5] == [
        ["none", "0.5", "±", "0.71"],
        ["nudge", "2.5", "±", "0.71"],
        ["tiny", "1.5", "±", "0.71"],
        ["tiny", "+", "nudge", "4", "±", "0.71"],
    ]
    assert rows[7:10] == [
        ["tiny", "+1.25", "+1.25", "…", "+1.25"],
        ["nudge", "+2.25", "+2.25", "…", "+2.25"],
        ["tiny", "×", "nudge", "+0.25", "+0.25", "…", "+0.25"],
    ]
    assert rows[-1] == ["Report:", "results/combine/tiny--tiny+nudge-quick-score.html"]
    found = json.loads(Path("results/combine/tiny--tiny+nudge-quick-score.json").read_text())
    assert found["cells"] == {"none": [0, 1], "nudge": [2, 3], "tiny": [1, 2], "tiny + nudge": [3.5, 4.5]}
    assert [effect["estimate"] for effect in found["effects"]] == [1.25, 2.25, 0.25]
    page = Path("results/combine/tiny--tiny+nudge-quick-score.html").read_text()
    assert "paperworks combine tiny nudge --on tiny --scale quick --seeds 2 --metric score" in page


def test_changed_settings_of_a_combination_are_told(paperworks):
    assert paperworks(*TINY).code == 0
    own = Path("results/combine/tiny--tiny+nudge-quick-score.json").read_bytes()
    page = Path(paperworks(*TINY, "--set", "epochs=2").out.split()[-1])
    assert page.name == "tiny--tiny+nudge-quick-score-epochs=2.html"
    assert "--seeds 2 --metric score --set epochs=2" in page.read_text()
    assert Path("results/combine/tiny--tiny+nudge-quick-score.json").read_bytes() == own


def test_combine_reuses_what_is_stored_and_takes_another_metric(paperworks):
    paperworks(*TINY, "--scale", "smoke")
    done = paperworks(*TINY, "--scale", "smoke", "--metric", "size/small")
    assert done.code == 0, done.err
    assert "4 of 4 trials are stored" in done.err
    assert [path.name for path in Path("results/combine").iterdir() if path.is_dir()] == []
    assert paperworks("report", "--json").out == "[]\n"  # a combination is no claim


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--on", "tiny"], "combine needs at least two methods"),
        (["tiny", "tiny", "--on", "tiny"], "combine needs each method once"),
        (["tiny", "nudge", "--on", "nudge"], "nudge has no training that others can join"),
        (["tiny", "nudg", "--on", "tiny"], "unknown method 'nudg'. Did you mean 'nudge'?"),
        (["tiny", "nudge", "--on", "tinny"], "unknown method 'tinny'. Did you mean 'tiny'?"),
        (["tiny", "nudge"], "Missing option '--on'"),
        (["tiny", "nudge", "--on", "tiny", "--set", "epoch=1"], "unknown setting 'epoch'"),
    ],
)
def test_bad_input_is_one_line(paperworks, arguments, words):
    done = paperworks("combine", *arguments)
    assert done.code == 2
    assert done.line.startswith(f"error: {words}")
    assert not Path("paperworks-runs").exists()


def test_an_unknown_metric_is_named(paperworks):
    done = paperworks(*TINY, "--scale", "smoke", "--metric", "scor")
    assert done.code == 2
    assert done.err.splitlines()[-1] == "error: unknown metric 'scor'. Did you mean 'score'?"
