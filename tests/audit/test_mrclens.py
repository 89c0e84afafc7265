import dataclasses
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, minimize

from paperworks.audit.mrclens import (
    CUES,
    Answer,
    Cue,
    CueProbe,
    Example,
    MRCDataset,
    SentenceReader,
    SyntheticMRC,
    audit,
    balancing_weights,
    bootstrap_ci,
    cue_statistic,
    permutation_pvalue,
    predict_gap,
    reader_data,
    shared_hits,
    split_sentences,
)
from paperworks.audit.mrclens.candidates import FAR, Candidates
from paperworks.audit.mrclens.ranking import Ranker
from paperworks.audit.mrclens.statistics import holm, index_divergence
from paperworks.audit.mrclens.text import DATE, NAME, NUMBER, PLACE, asked_type, word_type, words
from paperworks.commands.mrclens import mrclens
from paperworks.data import data_root
from paperworks.errors import UserError

XQUAD = data_root() / "questions" / "xquad.en.json"
needs_xquad = pytest.mark.skipif(not XQUAD.exists(), reason="XQuAD is not in the data root")

HAND = Example("q", "Ann lives in Rome. Bob works in Oslo.", "Where does Bob work?", (Answer("Oslo", 32),))


@pytest.fixture(scope="module")
def xquad():
    return MRCDataset.load(XQUAD)


@pytest.fixture(scope="module")
def planted():
    """A set in which the type asked for is nearly always enough."""
    return SyntheticMRC(300, wh_type=0.9, seed=3)


@pytest.fixture(scope="module")
def report(planted):
    return audit(planted, seed=1)


def squad(*qas, context="Ann lives in Rome. Bob works in Oslo.", **article):
    return {"data": [{"paragraphs": [{"context": context, "qas": list(qas)}], **article}]}


def qa(id="q", text="Oslo", start=32, question="Where does Bob work?"):
    return {"id": id, "question": question, "answers": [{"text": text, "answer_start": start}]}


def shuffled(data, seed=0):
    return MRCDataset(random.Random(seed).sample(list(data), len(data)), data.name)


def oracle(example):
    """Scores the right sentence above all others."""
    ends = np.cumsum([len(sentence) + 1 for sentence in split_sentences(example.context)])
    right = np.searchsorted(ends, example.answers[0].start, side="right")
    return [float(k == right) for k in range(len(ends))]


# Text


def test_sentences_end_before_a_capital_and_keep_their_text():
    text = 'It rose by 3.5 points. "Why?" he asked. Then 20 fell! (None e.g. mine) came.'
    parts = ["It rose by 3.5 points.", '"Why?" he asked.', "Then 20 fell!", "(None e.g. mine) came."]
    assert split_sentences(text.replace('"', "“")) == [part.replace('"', "“") for part in parts]
    assert split_sentences("one") == ["one"]


@given(st.text(alphabet=" .!?Ab1(\n", max_size=40))
def test_sentences_hold_every_word(text):
    assert [word for sentence in split_sentences(text) for word in words(sentence)] == words(text)


@pytest.mark.parametrize(
    ("question", "type"),
    [
        ("when did it end", DATE),
        ("who won", NAME),
        ("to whom was it given", NAME),
        ("where is it", PLACE),
        ("how many were there", NUMBER),
        ("how did it end", 0),
        ("in what year did it end", DATE),
        ("which city is it in", PLACE | NAME),
        ("what happened", 0),
        ("name it", 0),
    ],
)
def test_question_words_ask_for_types(question, type):
    assert asked_type(question.split()) == type


def test_words_have_types_by_themselves():
    assert [word_type(word) for word in ("1999", "1990s", "May", "may", "7th", "42", "seven", "house")] == [
        *[DATE] * 3,
        0,
        *[NUMBER] * 3,
        0,
    ]


def test_names_and_places_are_told_by_capitals_and_what_stands_before():
    example = Example("q", "The old Emil Meyer met her in New York. Rome fell.", "Where?", (Answer("Rome", 40),))
    c = Candidates(MRCDataset([example]))
    types = dict(zip([c.words.names[k] for k in c.words.lower[c.texts.surfaces]], c.token_type, strict=True))
    expected = {"emil": NAME, "meyer": NAME, "new": PLACE, "york": PLACE, "rome": 0, "the": 0, "old": 0}
    assert {word: types[word] for word in expected} == expected


# Cues


def test_the_hand_example():
    assert CUES["overlap"].score(HAND).tolist() == [0, 1]
    assert CUES["wh_type"].score(HAND).tolist() == [1, 1]
    assert CUES["position"].score(HAND).tolist() == [0, -1]
    assert CUES["length"].score(HAND).tolist() == [4, 4]
    assert CUES["proximity"].score(HAND).tolist() == [-FAR, -3]  # Bob works in Oslo
    assert cue_statistic(MRCDataset([HAND]), "overlap").accuracy == 1
    assert cue_statistic(MRCDataset([HAND]), "wh_type").accuracy == 0.5


def test_repeated_and_stop_words_count_once_and_never():
    example = dataclasses.replace(
        HAND, context="Bob and Bob do. Bob works where Oslo does.", answers=(Answer("Oslo", 32),)
    )
    assert CUES["overlap"].score(example).tolist() == [1, 1]


def overlap_by_hand(example):
    from paperworks.audit.mrclens.text import STOP_WORDS

    asked = {word.lower() for word in words(example.question)} - STOP_WORDS
    return [len(asked & {word.lower() for word in words(text)}) for text in split_sentences(example.context)]


def test_vectorised_overlap_is_the_set_intersection(planted):
    own = Cue.of("own", "question-passage", "", overlap_by_hand)
    c = Candidates(planted)
    assert np.array_equal(CUES["overlap"].features(c)[:, 0], own.features(c)[:, 0])


@needs_xquad
def test_vectorised_overlap_is_the_set_intersection_in_small_blocks(xquad, monkeypatch):
    monkeypatch.setattr("paperworks.audit.mrclens.candidates._TABLE_BYTES", 1)
    c = Candidates(xquad)
    assert np.array_equal(c.matches.overlap, np.concatenate([overlap_by_hand(example) for example in c.examples]))


def test_answers_are_found_inside_texts_only():
    data = MRCDataset(
        [dataclasses.replace(HAND, context="In Rome. Oslo, New York! New. York Oslo", answers=(Answer("Rome", 3),))]
    )
    texts, answers = Candidates(data).occurrences(["Rome Oslo", "new york", "Oslo", "in", "nowhere", "1 2 3 4 5 6"])
    assert list(zip(texts.tolist(), answers.tolist(), strict=True)) == [(1, 1), (1, 2), (3, 2)]


def test_frequency_counts_other_passages():
    def example(id, context, answer):
        return Example(id, context, "Who?", (Answer(answer, context.index(answer)),))

    data = [example(f"{k}", f"It was {k} Meyer. It was {k} Silva.", "Meyer") for k in range(3)]
    scores = CUES["frequency"].features(Candidates(MRCDataset(data)))[:, 0]
    assert np.allclose(scores, [np.log(3), 0] * 3)  # twice elsewhere, its own does not count


def test_a_cue_of_ones_own_is_checked():
    bad = Cue.of("bad", "passage", "", lambda example: [1.0])
    with pytest.raises(UserError, match=r"cue 'bad' gave \[1.0\] for question q, expected 2 finite scores"):
        bad.score(HAND)
    with pytest.raises(UserError, match="question q has fewer than two candidates"):
        CUES["option_length"].score(HAND)


# Statistics


def test_ties_are_shared():
    hits, ties = shared_hits(np.array([1.0, 1, 0, 3, 2, 2, 2]), np.array([0, 3, 5, 7]), np.array([0, 1, 1]))
    assert hits.tolist() == [0.5, 0, 0.5]
    assert ties.tolist() == [2, 1, 2]


@given(st.integers(0, 30))
@settings(max_examples=20)
def test_a_constant_counts_what_a_guess_does(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, 30)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    hits, ties = shared_hits(np.zeros(starts[-1]), starts, rng.integers(sizes))
    assert np.allclose(hits, 1 / sizes)
    assert permutation_pvalue(hits, ties, sizes, 99, rng) == 1


def test_grouped_permutations_have_the_distribution_of_single_ones():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 6, 60)
    ties = np.minimum(rng.integers(1, 4, 60), sizes)
    totals = ((rng.random((40_000, 60)) < ties / sizes) / ties).sum(1)
    for hits in (np.full(60, 0.35), np.full(60, 0.4)):
        grouped = permutation_pvalue(hits, ties, sizes, 40_000, np.random.default_rng(1))
        assert grouped == pytest.approx(np.mean(totals >= hits.sum() - 1e-9), abs=0.012)


def test_pvalues_are_uniform_without_a_bias():
    rng = np.random.default_rng(0)
    pvalues = []
    for _ in range(300):
        sizes = rng.integers(2, 7, 80)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        hits, ties = shared_hits(rng.random(starts[-1]), starts, rng.integers(sizes))
        pvalues.append(permutation_pvalue(hits, ties, sizes, 199, rng))
    assert np.mean(np.array(pvalues) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(pvalues) == pytest.approx(0.5, abs=0.06)


def test_intervals_are_wider_by_passage_than_by_question():
    rng = np.random.default_rng(0)
    hits = np.repeat(rng.random(100) < 0.5, 5).astype(float)[:, None]  # questions on a passage stand and fall together
    chance = np.full(500, 0.2)
    grouped = bootstrap_ci(hits, chance, np.repeat(np.arange(100), 5), 500, np.random.default_rng(0))[0]
    single = bootstrap_ci(hits, chance, np.arange(500), 500, np.random.default_rng(0))[0]
    assert (grouped[1] - grouped[0]) / (single[1] - single[0]) == pytest.approx(5**0.5, rel=0.15)
    assert grouped[0] < (hits.mean() - 0.2) / 0.8 < grouped[1]


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]


def test_divergence_of_places():
    sizes = np.array([2, 4] * 200)
    uniform = np.array([0, 1, 1, 3, 0, 0, 1, 2] * 50)  # half of the twos each, a quarter of the fours each
    assert index_divergence(uniform, sizes) == pytest.approx(0, abs=1e-9)
    assert index_divergence(np.zeros(400, int), sizes) == pytest.approx(np.log(1 / 0.375))


@given(st.integers(0, 50))
@settings(max_examples=30)
def test_weights_take_the_advantage_away(seed):
    rng = np.random.default_rng(seed)
    chance = 1 / rng.integers(2, 7, 200)
    hits = rng.choice([0, 0.5, 1], 200, p=[0.3, 0.1, 0.6])
    weights = balancing_weights(hits, chance, 1e9)
    assert weights.mean() == pytest.approx(1)
    assert (weights * (hits - chance)).sum() == pytest.approx(0, abs=1e-9)
    clipped = balancing_weights(hits, chance, 1.5)
    assert clipped.mean() == pytest.approx(1)
    assert clipped.max() <= 1.5 + 1e-9
    assert np.allclose(balancing_weights(chance, chance), 1)
    with pytest.raises(UserError, match="never worse, or never better"):
        balancing_weights(np.ones(200), chance)


def test_newton_finds_what_a_general_optimizer_finds():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 6, 50)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    x = rng.normal(size=(starts[-1], 3)) * [1, 10, 0.1]
    gold = rng.integers(sizes)
    z = x / x.std(0)

    def loss(w):
        parts = np.split(z @ w, starts[1:-1])
        return 0.5 * w @ w + 10 * sum(np.logaddexp.reduce(s) - s[k] for s, k in zip(parts, gold, strict=True))

    expected = minimize(loss, np.zeros(3), tol=1e-10).x
    ranker = Ranker.fit(x, starts, gold)
    assert np.allclose(ranker.weights * x.std(0), expected, atol=1e-4)
    assert np.allclose(Ranker.fit(x, starts, gold, start=np.ones(3)).weights, ranker.weights, atol=1e-6)
    assert check_grad(loss, lambda w: np.zeros(3), expected) < 1e-3  # a minimum
    constant = Ranker.fit(np.concatenate([x, np.ones((len(x), 1))], 1), starts, gold)
    assert np.allclose(constant.weights, [*ranker.weights, 0], atol=1e-8)


# The audit


def test_a_cue_that_is_the_answer_solves_everything(planted):
    found = audit(planted, [Cue.of("answer", "answer", "", oracle)], draws=999)["answer"]
    assert (found.statistic, found.accuracy, found.advantage, found.low, found.high) == (1, 1, 1, 1, 1)
    assert found.p == 1 / 1000
    assert (found.biased, found.severity) == (True, "high")


def test_a_constant_cue_solves_nothing(planted):
    constant = Cue.of("constant", "answer", "", lambda example: [7.0] * 5)
    found = audit(planted, [constant])["constant"]
    assert found.statistic == pytest.approx(found.chance, abs=1e-12)
    assert found.advantage == pytest.approx(0, abs=1e-12)
    assert (found.p, found.biased) == (1, False)


def test_planted_cues_are_found_and_others_stay():
    clean = audit(SyntheticMRC(600, seed=5), ["position", "overlap", "wh_type"])
    assert clean["overlap"].accuracy == clean["wh_type"].accuracy == 0.5
    assert clean["position"].accuracy == pytest.approx(0.2, abs=0.04)
    assert clean.biased == ["overlap", "wh_type"]  # each solves half by itself
    for cue, knob, expected in (("position", 0.6, 0.6), ("overlap", 0.9, 0.95), ("wh_type", 0.9, 0.95)):
        found = audit(SyntheticMRC(600, seed=6, **{cue: knob}), ["position", "overlap", "wh_type"])
        assert found[cue].accuracy == pytest.approx(expected, abs=0.04)
        assert cue in found.biased
        for other in {"position", "overlap", "wh_type"} - {cue}:
            assert found[other].accuracy == pytest.approx(clean[other].accuracy, abs=0.08)


def last(data):
    """The same questions with the answer's sentence moved to the end."""
    moved = []
    for example in data:
        sentences = split_sentences(example.context)
        right = int(np.argmax(oracle(example)))
        sentences.append(sentences.pop(right))
        text, answer = " ".join(sentences), example.answers[0].text
        moved.append(dataclasses.replace(example, context=text, answers=(Answer(answer, text.rindex(answer)),)))
    return MRCDataset(moved)


def test_a_probe_finds_answers_at_the_end_where_the_statistic_does_not(planted):
    found = audit(last(planted), ["position"])["position"]
    assert found.statistic == 0
    assert found.accuracy == 1
    assert found.divergence == pytest.approx(np.log(5))


@pytest.mark.parametrize("sets", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_no_cue_is_flagged_without_one(sets):
    flagged = {"position": 0, "length": 0}
    for seed in range(sets):
        for cue in audit(SyntheticMRC(120, seed=seed), list(flagged), draws=999, resamples=200).biased:
            flagged[cue] += 1
    assert max(flagged.values()) <= 0.03 * sets


def test_order_changes_nothing(planted, report):
    other = audit(shuffled(planted), seed=1)
    assert other.tags() == report.tags()
    for one, two in zip(report.findings, other.findings, strict=True):
        assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(two), abs=1e-9)


def test_duplicates_change_little(planted, report):
    twice = [*planted, *(dataclasses.replace(example, id=f"{example.id}'") for example in planted)]
    other = audit(MRCDataset(twice), ["position", "overlap", "wh_type"], n=800, seed=1)
    for found in other.findings:
        once = report[found.cue]
        assert found.statistic == pytest.approx(once.statistic)
        assert found.accuracy == pytest.approx(once.accuracy, abs=0.03)
        assert (found.low, found.high) == pytest.approx((once.low, once.high), abs=0.03)


def test_the_seed_alone_draws(planted, report):
    assert audit(planted, seed=1).to_json() == report.to_json()
    assert audit(planted, ["position"], seed=2)["position"] != report["position"]


def test_cues_are_measured_together(report):
    together = report.combined["sentence"]
    assert together.accuracy >= max(found.accuracy for found in report.findings) - 0.01
    assert together.low <= together.advantage <= together.high
    both = audit(report.data, ["overlap", "rare_overlap", "wh_type"])
    assert both["overlap"].conditional == pytest.approx(0, abs=0.01)  # its kin says the same
    assert both["wh_type"].conditional > 0.2


def test_progress_runs_from_nothing_to_the_end(planted):
    seen = []
    audit(planted, ["position", "overlap"], progress=lambda fraction, text: seen.append((fraction, text)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] <= 1
    assert "cue overlap" in [text for _, text in seen]


def test_few_questions_get_statistics_and_no_verdict():
    found = audit(SyntheticMRC(40, wh_type=1))
    assert found["wh_type"].statistic == 1
    assert {f.biased for f in found.findings} == {None}
    assert found.biased == []
    assert "40 usable questions" in found.notes[-1]
    json.loads(found.to_json())
    assert found.split("wh_type").biased == [example.id for example in found.data]
    assert "no verdict" in found.to_markdown()
    assert "<table>" in found.to_html()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cues": ["overlp"]}, "unknown cue 'overlp'. Did you mean 'overlap'?"),
        ({"cues": ["overlap", "overlap"]}, "cues must be different"),
        ({"cues": []}, "at least one, got none"),
        ({"cues": ["option_length"]}, "cue 'option_length' ranks options: synthetic"),
        ({"n": 5}, "n must be at least 20, got 5"),
        ({"draws": 3}, "draws must be at least 99, got 3"),
    ],
)
def test_bad_arguments_are_named(planted, arguments, message):
    with pytest.raises(UserError) as caught:
        audit(planted, **arguments)
    assert message in str(caught.value)


def test_probe_fits_one_set_and_is_tested_on_another():
    train, test = SyntheticMRC(200, position=0.7, seed=1), SyntheticMRC(500, position=0.7, seed=2)
    assert CueProbe("position").fit(train).evaluate(test).accuracy == pytest.approx(0.7, abs=0.07)
    with pytest.raises(UserError, match="cue 'passage_only' is a probe by itself"):
        CueProbe("passage_only")
    with pytest.raises(UserError, match=r"before CueProbe\.fit"):
        CueProbe("position").evaluate(test)


# Splits and weights


def test_splits_keep_every_question_and_its_place(planted, report):
    split = report.split()
    ids = [example.id for example in planted]
    assert sorted(split.biased + split.anti) == sorted(ids)
    assert split.anti == [id for id in ids if id in set(split.anti)]
    tags, biased = report.tags(), set(report.biased)
    assert all(biased & set(tags[id]) for id in split.biased)
    assert not any(biased & set(tags[id]) for id in split.anti)
    assert planted.subset(split.biased)[0].id == split.biased[0]
    with pytest.raises(UserError, match="unknown cue of this report 'overlpa'"):
        report.split("overlpa")


@needs_xquad
def test_weights_and_subsamples_balance_a_cue(xquad):
    found = audit(xquad, ["overlap", "position"], resamples=99)
    for cue in ("overlap", "position"):
        weights, ranking = found.balance(cue), found.ranked[cue]
        assert list(weights) == [example.id for example in xquad]
        ranked = np.array([weights[xquad[int(row)].id] for row in ranking.rows])
        assert ranked @ ranking.hits / ranked.sum() == pytest.approx(ranked @ ranking.chance / ranked.sum(), abs=0.03)
    kept = xquad.subset(found.subsample("overlap"))
    assert 0.2 < len(kept) / len(xquad) < 0.5
    rest = cue_statistic(kept, "overlap")
    assert rest.accuracy == pytest.approx(rest.chance, abs=0.08)


def test_gap_is_what_a_follower_loses():
    # A tenth of the questions go against the position, which alone is flagged.
    found = audit(SyntheticMRC(600, position=0.9, seed=2), ["position", "length"])
    gap = predict_gap(found)["position"]
    assert gap.biased == 1
    assert gap.anti == 0
    assert gap.drop == 1
    assert gap.gain == pytest.approx(0.7, abs=0.05)
    assert predict_gap(audit(SyntheticMRC(200), ["position", "length"])) == {}


def test_what_cannot_be_balanced_says_so(report, tmp_path):
    with pytest.raises(UserError, match="wh_type is never worse, or never better, than a guess"):
        report.balance("wh_type")  # where it does not point right, it is a tie
    names = {path.name for path in report.export(tmp_path)}
    assert "balanced.json" not in names
    assert "tags.csv" in names


# Files


def test_squad_round_trip(tmp_path):
    original = squad(qa("a"), qa("b", "Rome", 13, "Where does Ann live?"), title="towns") | {"version": "1.1"}
    data = MRCDataset.from_squad(original)
    assert data.to_squad() == original
    data.save(tmp_path / "x.json")
    assert MRCDataset.load(tmp_path / "x.json").examples == data.examples


@needs_xquad
def test_xquad_round_trip_and_subset(xquad):
    original = json.loads(XQUAD.read_text("utf-8"))
    assert xquad.to_squad()["data"] == original["data"]
    assert [example.id for example in xquad.subset({xquad[7].id, xquad[3].id})] == [xquad[3].id, xquad[7].id]


def test_squad_2_has_impossible_questions():
    qas = [qa("a") | {"is_impossible": False}, {"id": "b", "question": "Why?", "answers": [], "is_impossible": True}]
    original = squad(*qas, title="") | {"version": "v2.0"}
    data = MRCDataset.from_squad(original)
    assert [example.impossible for example in data] == [False, True]
    assert data.to_squad() == original


def test_words_that_give_impossible_questions_away():
    examples = []
    for k, example in enumerate(SyntheticMRC(300)):
        examples.append(example)
        question = example.question.replace("?", " never?")
        examples.append(dataclasses.replace(example, id=f"n{k}", question=question, answers=(), impossible=True))
    found = audit(MRCDataset(examples))
    assert found["impossible_words"].accuracy > 0.95
    assert "impossible_words" in found.biased
    assert "300 questions are marked impossible" in found.notes[0]
    assert found["position"].questions == 300
    examples = [dataclasses.replace(e, question=e.question.replace(" never", "")) for e in examples]
    assert audit(MRCDataset(examples), ["impossible_words"]).biased == []


def race(n, seed=0):
    rng, articles = random.Random(seed), []
    for k in range(n):
        label = rng.randrange(4)
        options = [f"word{rng.randrange(50)}" for _ in range(4)]
        options[label] += " because of this and that"
        article = f"Story {k} tells of word{k % 50}."
        articles.append({"article": article, "questions": ["Why?"], "options": [options], "answers": ["ABCD"[label]]})
    return articles


def test_multiple_choice_from_a_list_a_folder_or_lines(tmp_path):
    articles = race(80)
    (tmp_path / "race.json").write_text(json.dumps(articles))
    (tmp_path / "race.jsonl").write_text("\n".join(map(json.dumps, articles)))
    (tmp_path / "high").mkdir()
    for k, article in enumerate(articles):
        (tmp_path / "high" / f"{k:03}.txt").write_text(json.dumps(article))
    sets = [MRCDataset.load(tmp_path / name) for name in ("race.json", "race.jsonl", "high")]
    for data in sets:
        assert [(e.question, e.options, e.label) for e in data] == [(e.question, e.options, e.label) for e in sets[0]]
    found = audit(sets[0])
    assert {f.unit for f in found.findings} == {"option"}
    assert found["option_length"].accuracy == 1
    assert found["option_only"].biased
    assert not found["option_position"].biased
    found.data.save(tmp_path / "again.json")
    assert MRCDataset.load(tmp_path / "again.json").examples == found.data.examples
    with pytest.raises(UserError, match="multiple choice, which SQuAD's format cannot hold"):
        found.data.to_squad()


def test_mrqa(tmp_path):
    context = HAND.context
    line = {
        "context": context,
        "qas": [
            {
                "qid": "q",
                "question": HAND.question,
                "answers": ["oslo"],
                "detected_answers": [{"text": "oslo", "char_spans": [[32, 35]]}],
            }
        ],
    }
    content = "\n".join([json.dumps({"header": {"dataset": "x"}}), json.dumps(line)])
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert MRCDataset.load(tmp_path / "x.jsonl.gz").examples == [HAND]
    line["qas"][0]["detected_answers"][0]["char_spans"] = [[32, 99]]
    (tmp_path / "y.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"y\.jsonl: line 1: qas\[0\]: .* \[32, 99\] lies outside its context"):
        MRCDataset.from_mrqa(tmp_path / "y.jsonl")


def test_misplaced_answers_are_listed_and_repaired_when_asked():
    content = squad(
        qa("a"), qa("moved", start=3), qa("case", text="oslo"), qa("lost", text="Paris"), qa("far", start=999)
    )
    with pytest.raises(UserError) as caught:
        MRCDataset.from_squad(content)
    message = "the dict: 4 questions with an answer that does not stand at its start: moved, case, lost, far"
    assert str(caught.value).startswith(message)
    data = MRCDataset.from_squad(content, repair=True)
    assert data.repaired == {"moved": "moved", "case": "moved", "lost": "lost", "far": "moved"}
    assert [example.answers for example in data] == [*[(Answer("Oslo", 32),)] * 3, (), (Answer("Oslo", 32),)]
    notes = audit(data).notes
    assert notes[0].startswith("3 answers did not stand at their start")
    assert notes[1].startswith("1 questions have answers that occur nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "x.json is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("[1]", "x.json: expected an object with 'data', got a list"),
        ('{"data": {}}', "x.json: data is an object, expected a list"),
        ('{"data": [{}]}', "x.json: data[0] has no 'paragraphs'"),
        ('{"data": []}', "x.json holds no questions"),
        (json.dumps(squad({"id": "q"})), "x.json: data[0]: paragraphs[0]: qas[0] has no 'question'"),
        (json.dumps(squad(qa(start="3"))), "answers[0]: answer_start is text, expected a whole number"),
        (json.dumps(squad(qa(start=True))), "answers[0]: answer_start is true or false, expected a whole number"),
        (json.dumps(squad(qa(), qa())), "x.json: 1 question with an id that occurs twice: q"),
        (json.dumps(squad(qa(question=" "))), "x.json: 1 question with an empty passage or question: q"),
        (json.dumps([race(1)[0] | {"answers": ["E"]}]), "a label that is no index of an option: 0#0"),
        (json.dumps([race(1)[0] | {"answers": []}]), "1 questions, 1 lists of options, 0 answers, 1 ids"),
        ('{"data": ' + "1" * 5000 + "}", "x.json cannot be read as JSON"),
        ("[" * 100_000, "x.json is nested too deeply"),
        (b"\xff\xfe", "x.json is not UTF-8 text"),
        (json.dumps(squad(qa(id="\ud800"))), "x.json holds half of a surrogate pair"),
    ],
)
def test_bad_files_get_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        MRCDataset.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_input(tmp_path, planted):
    with pytest.raises(UserError, match="there is no file"):
        MRCDataset.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"unknown format 'sqad'. Did you mean 'squad'"):
        MRCDataset.load(tmp_path / "none.json", "sqad")
    with pytest.raises(UserError, match=r"holds no .txt or .json files"):
        MRCDataset.load(tmp_path)
    (tmp_path / "x.json.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot read"):
        MRCDataset.load(tmp_path / "x.json.gz")
    with pytest.raises(UserError, match="has no question nope"):
        planted.subset(["nope"])
    with pytest.raises(UserError, match="overlap must be between 0 and 1, got 2"):
        SyntheticMRC(5, overlap=2)
    alone = [dataclasses.replace(HAND, context="Bob works in Oslo", answers=(Answer("Oslo", 13),))]
    with pytest.raises(UserError, match="no question whose answer stands in a passage of two sentences"):
        audit(MRCDataset(alone))


# Real data


@needs_xquad
def test_xquad_has_the_known_statistics(xquad):
    found = audit(xquad)
    count, usable = len(xquad), found.profile.questions
    assert count == 1190
    assert usable == 1190 - 34
    assert found.notes == ["34 questions are left out because their passage has one sentence."]

    def whole(value):
        """With the passages of one sentence, for which any ranking is right."""
        return (value * usable + 34) / count

    assert whole(found["overlap"].statistic) == pytest.approx(0.778, abs=0.02)
    assert whole(found["position"].statistic) == pytest.approx(0.316, abs=0.005)
    assert whole(found["overlap"].chance) == pytest.approx(0.251, abs=0.005)
    assert whole(found.profile.candidates) == pytest.approx(5.11, abs=0.01)
    assert found.profile.quarters == pytest.approx([0.347, 0.253, 0.222, 0.178], abs=0.002)
    counted = {word: found.profile.wh_words[word] for word in ("what", "how", "who", "when", "which", "where")}
    assert counted == {"what": 676, "how": 140, "who": 121, "when": 86, "which": 83, "where": 45}
    assert found["overlap"].severity == "high"
    assert found["passage_only"].biased is False


# The reader


def test_reader_ignores_empty_places_and_what_it_may_not_see():
    data = SyntheticMRC(6)
    (inputs, _), vocabulary = reader_data(data).dataset.tensors, reader_data(data).vocabulary
    assert inputs.shape[:2] == (6, 6)
    torch.manual_seed(0)
    question, passage, both = (SentenceReader(len(vocabulary), sees) for sees in ("question", "passage", "both"))
    other = inputs.clone()
    other[:, 1:] = other[:, 1:].flip(1)
    assert torch.allclose(question(inputs), question(other))
    assert not torch.allclose(both(inputs), both(other))
    other = inputs.clone()
    other[:, 0] = inputs[0, 0]
    assert torch.allclose(passage(inputs), passage(other))
    padded = torch.cat([inputs, torch.zeros_like(inputs[:, :2])], 1)
    assert torch.allclose(both(padded)[:, :5], both(inputs))
    assert (both(padded)[:, 5:] == -torch.inf).all()
    unknown = reader_data(data, {}).dataset.tensors[0]
    assert torch.equal(unknown, (inputs > 0).long())  # known or not, a word is there


def test_reader_sees_what_it_is_told(unchecked):
    with pytest.raises(UserError, match="unknown value of sees 'al'"):
        SentenceReader(3, "al")


# The command line


@pytest.fixture
def scan(capsys):
    def run(*arguments):
        mrclens.main(["scan", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_scan_prints_and_writes(scan, tmp_path):
    SyntheticMRC(400, position=0.8, seed=1).save(tmp_path / "set.json")
    out = scan(
        *(tmp_path / "set.json", "--cue", "position", "--cue", "length", "--json", tmp_path / "r.json"),
        *(
            "--html",
            tmp_path / "r.html",
            "--markdown",
            tmp_path / "r.md",
            "--export",
            tmp_path / "out",
            "--examples",
            "2",
        ),
    )
    assert "solvable: high" in out
    assert out.count("[position]") == 2
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["biased"] == ["position"]
    assert len(found["examples"]) == 400
    assert "| position | passage |" in (tmp_path / "r.md").read_text()
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page
    parts = {name: MRCDataset.load(tmp_path / "out" / f"{name}.json") for name in ("biased", "anti-biased", "balanced")}
    assert len(parts["biased"]) + len(parts["anti-biased"]) == 400
    assert cue_statistic(parts["anti-biased"], "position").accuracy == 0
    assert cue_statistic(parts["balanced"], "position").advantage < 0.15
    lines = (tmp_path / "out" / "tags.csv").read_text().splitlines()
    assert lines[0] == "id,weight,biased,position,length"
    assert len(lines) == 401
    with pytest.raises(UserError, match=r"holds biased.json, .* already: choose another folder"):
        scan(tmp_path / "set.json", "--cue", "position", "--export", tmp_path / "out")


def test_scan_escapes_what_a_set_holds(scan, tmp_path):
    examples = [
        dataclasses.replace(example, id=f"<b>{example.id}", question=f"[red]{example.question}<script>")
        for example in SyntheticMRC(200, position=1)
    ]
    MRCDataset(examples).save(tmp_path / "set.json")
    out = scan(tmp_path / "set.json", "--cue", "position", "--html", tmp_path / "r.html")
    assert "[red]" in out
    assert "<script>" not in (tmp_path / "r.html").read_text()


def test_scan_refuses_in_one_line(scan, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        scan(tmp_path / "none.json")
    SyntheticMRC(60).save(tmp_path / "set.json")
    with pytest.raises(UserError, match=r"there is no folder .* to write r.json to"):
        scan(tmp_path / "set.json", "--json", Path(tmp_path) / "none" / "r.json")
