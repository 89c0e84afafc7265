"""Arms that differ between scales, and arms that somebody chose: what is measured, what is judged, where it goes."""

import json
from pathlib import Path

import pytest

from paperworks.bench import Bound, Gain, Settings, claim, load_claim
from paperworks.bench.report import methods_table
from paperworks.bench.results import read_all
from paperworks.catalog import catalog
from paperworks.errors import UserError

NUDGE = ("check", "nudge", "--executor", "serial")
LEFT_OUT = "score: only − none (needs none; judged at full)"


def arms_of(path):
    return list(json.loads(Path(path).read_text())["arms"])


def test_a_scale_measures_its_arms_and_says_what_it_does_not_judge(paperworks):
    done = paperworks(*NUDGE)
    assert done.code == 0, done.err
    assert done.err == "measuring 4 trials of nudge (quick)\n"
    *rows, left, last = done.out.splitlines()
    assert [row.split()[-1] for row in rows[1:]] == ["holds", "fails"]
    assert left == f"nudge: not judged: {LEFT_OUT}"
    assert last == "nudge (quick, 2 seeds): fails (2 of 3 expectations). Report: results/nudge/quick.html"
    assert arms_of("results/nudge/quick.json") == ["only", "twice"]
    assert f"Not judged: {LEFT_OUT}." in Path("results/nudge/quick.html").read_text()
    assert f"nudge (quick, 2 seeds): not judged: {LEFT_OUT}\n" in paperworks("report").out
    (found,) = json.loads(paperworks("report", "--json").out)
    assert found["unjudged"] == [{"names": ["score: only − none"], "missing": ["none"], "scales": ["full"]}]
    assert "fails (quick, 2 seeds, 2 of 3 expectations) |" in methods_table(read_all(Path("results")))
    assert paperworks(*NUDGE).out == done.out  # also of what is stored


def test_full_judges_all(paperworks):
    done = paperworks(*NUDGE, "--scale", "full")
    assert done.err == "measuring 20 trials of nudge (full)\n"
    assert "not judged" not in done.out
    assert done.out.splitlines()[-1] == "nudge (full, 5 seeds): fails. Report: results/nudge/full.html"
    assert json.loads(Path("results/nudge/full.json").read_text())["unjudged"] == []


def test_show_tells_the_arms_of_each_scale(paperworks):
    paperworks(*NUDGE)
    out = paperworks("show", "nudge").out
    assert "Arms at smoke: only\nArms at quick: only, twice\nArms at full: none, only, twice, idle\n" in out
    assert "  score: only − none: not judged (needs none)\n" in out
    assert "\nArms: base, base.2, better\n" in paperworks("show", "tiny").out


@pytest.mark.parametrize("slug", ["nudge", *(card.slug for card in catalog().values() if card.claim)])
def test_arms_are_shown_as_they_are_declared(slug):
    declared = load_claim(slug).arms_at
    shown = catalog()[slug].claim_arms
    assert {scale: arms for scales, arms in shown.items() for scale in scales} == declared


def test_arms_that_are_computed_are_not_shown(monkeypatch, tmp_path):
    (tmp_path / "odd.py").write_text("@claim('odd', arms=[f'{k}' for k in range(3)], expects=[])\ndef trial(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    card = catalog()["tiny"]
    assert type(card)(**{**vars(card), "claim": "odd"}).claim_arms == {}


# Arms that were chosen.


def test_other_arms_of_any_scale_can_be_chosen(paperworks):
    paperworks(*NUDGE)
    before = {path: path.read_bytes() for path in Path("results/nudge").iterdir()}
    done = paperworks(*NUDGE, "--arms", "twice, none,only")
    assert done.code == 0, done.err
    assert done.err == "4 of 6 trials are stored in paperworks-runs\nmeasuring 2 trials of nudge (quick)\n"
    assert "not judged" not in done.out
    folder = Path("results/nudge/none,only,twice")
    assert done.out.splitlines()[-1] == f"nudge (quick, 2 seeds): fails. Report: {folder}/quick.html"
    assert arms_of(folder / "quick.json") == ["none", "only", "twice"]
    assert (
        "paperworks check nudge --scale quick --seeds 2 --arms none,only,twice" in (folder / "quick.html").read_text()
    )
    assert (folder / "quick-expectations.png").exists()
    assert {path: path.read_bytes() for path in before} == before  # the scale's own result stays
    assert [(s.slug, s.chosen) for s in read_all(Path("results"))] == [("nudge", [])]
    assert paperworks(*NUDGE).out.splitlines()[-1].endswith("results/nudge/quick.html")


def test_the_scale_s_own_arms_are_its_own_result(paperworks):
    assert paperworks(*NUDGE, "--arms", "twice,only").out == paperworks(*NUDGE).out
    assert sorted(path.name for path in Path("results/nudge").iterdir() if path.is_dir()) == []


def test_arms_of_which_nothing_is_expected_get_no_verdict(paperworks):
    done = paperworks(*NUDGE, "--arms", "idle")
    assert done.code == 0, done.err
    left, last = done.out.splitlines()
    assert "two and two (needs twice, only; judged at quick, full)" in left
    assert last == "nudge (quick, 2 seeds): no verdict. Report: results/nudge/idle/quick.html"
    assert json.loads(Path("results/nudge/idle/quick.json").read_text())["verdict"] is None
    page = Path("results/nudge/idle/quick.html").read_text()
    assert not [word for word in ('"verdict holds', '"verdict fails', "None") if word in page]


def test_the_page_judges_the_scale_s_own_arms(paperworks):
    pytest.importorskip("fastapi")
    from paperworks.app.checks import standing
    from paperworks.app.orders import Orders
    from paperworks.app.project import Project
    from paperworks.app.runs import Runs
    from paperworks.app.site import Site

    site = Site(Project(), Runs("paperworks-runs"), Orders(Path("orders")))

    def stands():
        (run,) = site.runs.of("nudge")
        run.changed = 0.0  # long ago
        now = standing(site, run)
        return now["state"], now["done"], now["total"], now["arms"], run.summary and list(run.summary.arms)

    paperworks(*NUDGE, "--arms", "only,none", "--seeds", 1)
    assert stands() == ("stopped", 2, 3, ["only", "twice", "none"], None)
    paperworks(*NUDGE)
    assert stands() == ("done", 5, 5, ["only", "twice", "none"], ["only", "twice"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nudge", "--arms", "onyl"], "unknown arm 'onyl'. Did you mean 'only'?"),
        (["nudge", "--arms", ""], "unknown arm ''. Choose from: none, only, twice, idle"),
        (["nudge", "tiny", "--arms", "only"], "--arms goes with one method"),
        (["--all", "--arms", "only"], "--arms goes with one method"),
    ],
)
def test_arms_that_cannot_be_chosen(paperworks, arguments, words):
    done = paperworks("check", *arguments)
    assert done.code == 2
    assert done.line.startswith(f"error: {words}")


# Where they are declared.


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"smoke": ["a"], "full": ["a"]}, "arms must name the scales smoke, quick, full, got smoke, full"),
        ({}, "arms must name the scales smoke, quick, full, got none"),
        ({"smoke": ["a"], "quik": ["a"], "full": ["a"]}, "got smoke, quik, full"),
        ({"smoke": ["a"], "quick": ["c"], "full": ["a", "b"]}, "arms of scale quick must be among full's and in "),
        ({"smoke": ["a"], "quick": ["b", "a"], "full": ["a", "b"]}, "and in their order, a, b"),
        ({"smoke": ["b"], "quick": ["a"], "full": ["a", "b"]}, "the claim of slug expects nothing of the arms of "),
    ],
    ids=str,
)
def test_arms_of_scales_are_checked(arms, words):
    with pytest.raises(UserError) as caught:
        claim("slug", arms=arms, expects=[Bound("m", "a", at_least=0)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_expectation_is_judged_where_all_its_arms_are():
    @claim(
        "slug",
        arms={"smoke": "abc", "quick": "ab", "full": "abc"},
        expects=[Bound("m", "a", at_least=0), Gain("m", "c", over="a")],
    )
    def trial(run, arm, settings: Settings): ...

    assert trial.arms == ("a", "b", "c")
    assert [len(trial.judged(trial.arms_at[scale])) for scale in ("smoke", "quick", "full")] == [2, 1, 2]
    assert trial.choose(["c", "a", "c"]) == ("a", "c")
