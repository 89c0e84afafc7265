"""Records are whole or absent, and what is not the trial's own record is reported and measured again."""

import json
import os
import pickle
import re
import signal
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from paperworks.bench import load_claim
from paperworks.bench.check import Plan, Records
from paperworks.bench.measure import TrialFailed, measure
from paperworks.bench.store import Store, Trial
from paperworks.errors import MissingExtra, UserError

ALL = [(arm, seed) for seed in (0, 1) for arm in ("base", "base.2", "better")]


@pytest.fixture
def check(tiny):
    """Measures what is not stored, as ``paperworks check tiny`` does."""

    def run(**plan):
        plan = Plan(executor="serial", **plan)
        found = Records(plan, plan.trials(tiny))
        for _ in found.measure():
            pass
        return found

    return run


def test_a_second_check_reuses_what_is_stored(check, trials, stored):
    check()
    before = stored()
    check()
    assert sorted(trials()) == sorted(f"{arm} {seed}" for arm, seed in ALL)
    check(seeds=3)
    check(seeds=1)
    assert len(trials()) == 9
    check(fresh=True)
    assert len(trials()) == 15
    assert before.items() <= stored().items()


def test_other_settings_scales_and_data_are_other_trials(check, trials):
    check()
    for plan in ({"overrides": {"shift": 0.25}}, {"scale": "full", "seeds": 2}, {"data_root": "elsewhere"}):
        begun = len(trials())
        check(**plan)
        assert len(trials()) == begun + 6


def test_nothing_else_is_left(check, leftovers):
    check()
    assert not leftovers()
    assert [path.name for path in Path().iterdir()] == ["paperworks-runs"]


def test_any_url_that_fsspec_opens_is_a_store(check, trials):
    check(store="memory://of-a-test")
    assert not check(store="memory://of-a-test").pending
    assert len(trials()) == 6
    assert not Path("paperworks-runs").exists()


def test_what_is_stored_is_text_numbers_and_tensors(check, tiny):
    found = check(seeds=1)
    record = json.loads(next(Path("paperworks-runs/tiny/quick").glob("base-seed0*.json")).read_text())
    assert record["metrics"].keys() == {"score", "size"}
    assert len(record["curves"]["train/loss"]) == 3
    assert record["settings"] == {"epochs": 3, "shift": 1.0, "data": "noise", "rates": [0.1, 0.2]}
    assert record["versions"].keys() >= {"paperworks", "python", "torch"}
    assert record["threads"] == 1
    assert record["cpu_seconds"] > 0
    first = found.of(tiny)[0]
    assert first["artefacts"].keys() == {"a-picture.png", "weights.safetensors"}
    assert found.artefact(first, "a-picture.png").startswith(b"\x89PNG")


# Kills.


def test_killed_in_a_trial(check, forked, monkeypatch, trials, stored, undisturbed, leftovers):
    monkeypatch.setenv("TINY_FAULT", "kill@better-0")
    assert forked(check) == [-signal.SIGKILL]
    assert set(stored()) == {("base", 0), ("base.2", 0)}
    assert [path.name for path in leftovers() if path.suffix == ".pt"] == ["checkpoint.pt"]
    monkeypatch.delenv("TINY_FAULT")
    begun = len(trials())
    check()
    assert len(trials()) == begun + 4
    assert stored() == undisturbed
    assert not leftovers()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("name", ["base-seed1", "a-picture.png"])
def test_killed_while_a_file_is_written(check, forked, monkeypatch, stored, undisturbed, moment, name):
    done = getattr(os, moment)

    def interrupted():
        def replaced(file, *target):
            path = os.readlink(f"/proc/self/fd/{file}") if moment == "fsync" else file
            if name in str(path) and "tiny/quick" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            done(file, *target)

        monkeypatch.setattr(os, moment, replaced)
        check()

    assert forked(interrupted) == [-signal.SIGKILL]
    assert len(stored()) < 6
    assert not check().damaged  # nothing half-written was taken for a record
    assert stored() == undisturbed


@pytest.mark.parametrize(("fresh", "version"), [(False, "another"), (True, None)])
def test_what_is_measured_anew_resumes_no_checkpoint(
    check, forked, monkeypatch, stored, undisturbed, leftovers, fresh, version
):
    monkeypatch.setenv("TINY_FAULT", "kill@base-0")

    def earlier():  # as if the claim had been wrong then
        if version:
            monkeypatch.setattr(import_module("paperworks.bench.claim"), "__version__", version)
        monkeypatch.setattr("torch.optim.SGD.step", lambda *_: None)
        check()

    assert forked(earlier) == [-signal.SIGKILL]
    assert "checkpoint.pt" in [path.name for path in leftovers()]
    monkeypatch.delenv("TINY_FAULT")
    check(fresh=fresh)
    assert stored() == undisturbed


# Two at once.


def test_two_checks_on_one_store(check, forked, trials, stored, undisturbed, leftovers):
    begun = len(trials())
    assert forked(check, check) == [0, 0]
    assert stored() == undisturbed
    assert len(trials()) == begun + 6  # the one that comes second to a trial waits for its record
    assert not leftovers()


def test_two_that_measure_anew_do_not_disturb_each_other(check, forked, stored, undisturbed, leftovers):
    assert forked(*[partial(check, fresh=True)] * 3) == [0, 0, 0]
    assert stored() == undisturbed
    assert not leftovers()


# Damage.


def change(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:300]), "truncated"),
        (lambda p: p.write_bytes(b""), "truncated"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "truncated"),
        (lambda p: p.write_text("[1, 2]"), "truncated"),
        (lambda p: p.write_text("null"), "truncated"),
        (lambda p: change(p, metrics={"score": 9.0, "size": 1.0}), "edited"),
        (lambda p: change(p, paperworks="0.0.0"), "another version"),
        (lambda p: change(p, format=99), "another version"),
        (lambda p: p.write_bytes(next(p.parent.glob("base-seed1*.json")).read_bytes()), "another trial"),
        (lambda p: (p.with_suffix("") / "a-picture.png").unlink(), "a-picture.png is gone"),
        (lambda p: (p.with_suffix("") / "weights.safetensors").write_bytes(b""), "weights.safetensors is not the one"),
    ],
    ids=["half", "empty", "binary", "list", "null", "edited", "version", "format", "swapped", "gone", "replaced"],
)
def test_damage_is_reported_and_measured_again(check, undisturbed, stored, damage, reason):
    check()
    path = next(Path("paperworks-runs/tiny/quick").glob("base-seed0*.json"))
    damage(path)
    found = check()
    ((said, paths),) = found.damaged.items()
    assert reason in said
    assert paths == [str(path.relative_to("paperworks-runs"))]
    assert [(trial.arm, trial.seed) for trial in found.pending] == [("base", 0)]
    assert stored() == undisturbed
    assert not check().damaged


def test_records_of_another_text_of_the_claim_are_measured_again(check, monkeypatch):
    check()
    monkeypatch.setattr(import_module("paperworks.bench.claim"), "__version__", "another")
    (reason,) = check().damaged
    assert reason == "measured by other code of the claim"


@pytest.mark.parametrize("store", ["file", "file/below", "/proc/store"])
def test_a_store_that_cannot_be_written(check, trials, store):
    Path("file").touch()
    with pytest.raises(UserError, match=rf"cannot (read|write to) the store {store}: "):
        check(store=store)
    assert not trials()


def test_a_store_that_becomes_full(check, monkeypatch, stored, undisturbed):
    done, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        done(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            check()
    assert not [*Path("paperworks-runs").rglob("*.partial")]
    assert 0 < len(stored()) < 6
    check()
    assert stored() == undisturbed


# Trials and their errors travel between processes.


def test_errors_survive_the_way_between_processes():
    for error in (
        UserError("a line"),
        TrialFailed("tiny, arm base"),
        MissingExtra("ray", "ray", "the executor 'ray'"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_a_record_goes_to_the_store_wherever_the_trial_runs(tiny, monkeypatch, tmp_path, stored):
    plan = Plan(scale="smoke")
    records = Records(plan, plan.trials(tiny))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    measure(records.trials[0], records.store.address)
    monkeypatch.chdir(tmp_path)
    assert ("base", 0) in stored()


def test_keys_name_files_and_differ_with_what_is_measured():
    trial = Trial("tiny", "combine:a+b", 0, "quick", {"lr": 0.1})
    others = [
        Trial("tiny", "combine:a+b", 0, "quick", {"lr": 0.2}),
        Trial("tiny", "combine:a+b", 0, "full", {"lr": 0.1}),
        Trial("tiny", "combine:a+b", 1, "quick", {"lr": 0.1}),
        Trial("tiny", "combine:a+b", 0, "quick", {"lr": 0.1}, device="cuda"),
        Trial("tiny", "combine:a+b", 0, "quick", {"lr": 0.1}, data_root="/data"),
        Trial("other", "combine:a+b", 0, "quick", {"lr": 0.1}),
    ]
    keys = {trial.key, *(other.key for other in others)}
    assert len(keys) == 7
    assert all(re.fullmatch(r"[\w+.-]+", key) for key in keys)
    store = Store("runs")
    assert store.scratch(trial) != store.scratch(Trial("tiny", "combine:a+b", 0, "quick", {"lr": 0.1}, code="new"))


def test_a_finished_check_needs_no_writing(check, monkeypatch):
    check()
    monkeypatch.setattr(Store, "write", lambda *_: pytest.fail("written"))
    assert not check().pending


@pytest.mark.parametrize("url", ["paperworks-runs", "memory://listed"])
def test_a_listing_names_the_records_and_tells_when_one_changes(check, url):
    store = Store(url)
    assert store.listing("tiny", "quick") == {}
    check(store=url, seeds=1)
    before = store.listing("tiny", "quick")
    assert before.keys() == {store.path(trial) for trial in Plan(seeds=1).trials(load_claim("tiny"))}
    check(store=url, seeds=1)
    assert store.listing("tiny", "quick") == before
    check(store=url, seeds=1, fresh=True)
    after = store.listing("tiny", "quick")
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert all(abs(changed - time.time()) < 60 for changed, _ in after.values())


def test_a_live_trial_says_which_it_is(check, monkeypatch, tiny):
    told, write = [], Store.write

    def noted(store, path, content, **options):
        if path.startswith("live/"):
            told.append(json.loads(content))
        write(store, path, content, **options)

    monkeypatch.setattr(Store, "write", noted)
    check(seeds=1)
    for trial in Plan(seeds=1).trials(tiny):
        live = next(live for live in told if live["key"] == trial.key)
        assert {name: live[name] for name in vars(trial)} == vars(trial)
        assert (live["fraction"], live["pid"]) == (0.0, os.getpid())
