"""From a command to records, verdicts and a page; faults, bad input and kills on the way."""

import json
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from paperworks.catalog import catalog
from paperworks.cli import main

TINY = ("check", "tiny", "--executor", "serial")


def records(store="paperworks-runs"):
    """What was measured, by trial."""
    found = {}
    for path in Path(store).glob("tiny/*/*.json"):
        record = json.loads(path.read_text())
        found[record["arm"], record["seed"]] = record["metrics"], record["curves"], record["artefacts"]
    return found


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Counts the trials that are begun, in whatever process."""
    path = tmp_path / "trials.txt"
    monkeypatch.setenv("TINY_TRIALS", str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def undisturbed(paperworks):
    assert paperworks(*TINY, "--store", "undisturbed").code == 0
    return records("undisturbed")


def leftovers():
    """Files that only a fault may leave in a store."""
    return [p for p in Path("paperworks-runs").rglob("*") if p.suffix in (".partial", ".pt") or p.parent.name == "live"]


# What a check gives.


def test_a_check_measures_every_arm_at_every_seed(paperworks, trials):
    done = paperworks(*TINY)
    assert done.code == 0
    assert sorted(trials()) == [f"{arm} {seed}" for arm in ("base", "base.2", "better") for seed in (0, 1)]
    assert "tiny: holds. Report: results/tiny/quick.html" in done.out
    assert "measuring 6 trials of tiny (quick)" in done.err
    summary = json.loads(Path("results/tiny/quick.json").read_text())
    assert [e["verdict"] for e in summary["expectations"]] == ["holds", "holds", "holds"]


def test_the_same_numbers_in_series_and_in_processes(paperworks, undisturbed):
    done = paperworks("check", "tiny", "--executor", "processes", "--workers", 2)
    assert done.code == 0, done.err
    assert records() == undisturbed


@pytest.mark.slow
def test_the_same_numbers_on_ray(paperworks, undisturbed):
    ray = pytest.importorskip("ray")
    try:
        done = paperworks("check", "tiny", "--executor", "ray", "--workers", 2)
    finally:
        ray.shutdown()
    assert done.code == 0, done.err
    assert records() == undisturbed


def test_a_second_check_reuses_what_is_stored(paperworks, trials):
    paperworks(*TINY)
    page = Path("results/tiny/quick.html")
    before = page.stat().st_mtime_ns
    again = paperworks(*TINY)
    assert again.code == 0
    assert "6 of 6 trials are stored" in again.err
    assert len(trials()) == 6
    assert page.stat().st_mtime_ns == before
    assert paperworks(*TINY, "--seeds", 3).code == 0
    assert len(trials()) == 9
    assert "8 of 9" not in paperworks(*TINY, "--seeds", 1).err
    assert len(trials()) == 9


def test_fresh_measures_again(paperworks, trials):
    paperworks(*TINY)
    before = records()
    assert paperworks(*TINY, "--fresh").code == 0
    assert len(trials()) == 12
    assert records() == before


def test_other_settings_are_other_trials(paperworks, trials):
    paperworks(*TINY, "--seeds", 1)
    paperworks(*TINY, "--seeds", 1, "--set", "shift=0.25")
    assert len(trials()) == 6
    summary = json.loads(Path("results/tiny/quick.json").read_text())
    assert summary["settings"]["shift"] == 0.25


def test_scales_have_their_own_seeds_settings_and_files(paperworks, trials):
    paperworks(*TINY, "--scale", "smoke")
    assert sorted(trials()) == ["base 0", "base.2 0", "better 0"]
    summary = json.loads(Path("results/tiny/smoke.json").read_text())
    assert summary["settings"]["epochs"] == 1
    assert {e["verdict"] for e in summary["expectations"]} == {"undecided"}
    assert [e["low"] for e in summary["expectations"]] == [None, 0.0, None]


def test_nothing_is_left_but_records_and_results(paperworks):
    paperworks(*TINY)
    assert not leftovers()
    assert sorted(p.name for p in Path().iterdir()) == ["paperworks-runs", "results"]


# Kills.


def test_killed_in_a_trial(paperworks, forked, monkeypatch, trials, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "kill@better-0")
    assert forked(partial(main, TINY)) == [-signal.SIGKILL]
    kept = records()
    assert set(kept) == {("base", 0), ("base.2", 0)}
    assert [path.name for path in leftovers() if path.suffix == ".pt"] == ["checkpoint.pt"]
    monkeypatch.delenv("TINY_FAULT")
    begun = len(trials())
    done = paperworks(*TINY)
    assert "2 of 6 trials are stored" in done.err
    assert len(trials()) == begun + 4
    assert records() == undisturbed
    assert not leftovers()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("name", ["base-seed1", "a-picture.png"])
def test_killed_while_a_file_of_the_store_is_written(paperworks, forked, monkeypatch, undisturbed, moment, name):
    done = getattr(os, moment)

    def interrupted():
        def replaced(file, *target):
            path = os.readlink(f"/proc/self/fd/{file}") if moment == "fsync" else file
            if name in str(path) and "tiny/quick" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            done(file, *target)

        monkeypatch.setattr(os, moment, replaced)
        main(TINY)

    assert forked(interrupted) == [-signal.SIGKILL]
    assert len(records()) < 6
    again = paperworks(*TINY)
    assert again.code == 0
    assert "measuring again" not in again.err  # nothing half-written was taken for a record
    assert records() == undisturbed


def test_a_killed_worker_loses_only_its_trial(paperworks, monkeypatch, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "kill@better-1")  # the last
    done = paperworks("check", "tiny", "--executor", "processes", "--workers", 2)
    assert done.code == 1
    assert len([line for line in done.err.splitlines() if line.startswith("fault:")]) == 1
    assert "Traceback" not in done.err
    kept = records()
    assert kept.items() <= undisturbed.items()
    assert len(kept) >= 4
    monkeypatch.delenv("TINY_FAULT")
    assert paperworks(*TINY).code == 0
    assert records() == undisturbed


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_check_with_processes_keeps_what_was_measured(paperworks, start, monkeypatch, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "sleep@base.2-0")  # one worker sleeps, the other measures the rest
    check = start("check", "tiny", "--executor", "processes", "--workers", 2)
    until(lambda: len(records()) >= 3 or check.poll() is not None)
    check.kill()
    os.killpg(check.pid, signal.SIGKILL)
    kept = records()
    assert kept.items() <= undisturbed.items()
    assert len(kept) >= 3
    monkeypatch.delenv("TINY_FAULT")
    done = paperworks(*TINY)
    assert f"{len(kept)} of 6 trials are stored" in done.err
    assert records() == undisturbed


def test_ctrl_c_ends_with_one_line(paperworks, start, monkeypatch, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "sleep@base.2-0")
    check = start("check", "tiny", "--executor", "processes", "--workers", 2)
    until(lambda: len(records()) >= 3 or check.poll() is not None)
    os.killpg(check.pid, signal.SIGINT)  # as a terminal does
    _, err = check.communicate(timeout=30)
    assert check.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[1:] == ["interrupted; what was measured is stored"]
    monkeypatch.delenv("TINY_FAULT")
    assert paperworks(*TINY).code == 0
    assert records() == undisturbed


def test_ctrl_c_in_series(paperworks, monkeypatch, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "interrupt@better-0")
    done = paperworks(*TINY)
    assert done.code == 130
    assert done.err.strip().splitlines()[-1] == "interrupted; what was measured is stored"
    assert "Traceback" not in done.err
    monkeypatch.delenv("TINY_FAULT")
    assert "2 of 6" in paperworks(*TINY).err
    assert records() == undisturbed


# Two at once.


def test_two_checks_on_one_store(forked, trials, undisturbed):
    def check(folder):
        main([*TINY, "--results", folder])

    begun = len(trials())
    assert forked(partial(check, "one"), partial(check, "two")) == [0, 0]
    assert records() == undisturbed
    assert len(trials()) == begun + 6  # the one that comes second to a trial waits for its record
    one, two = (json.loads(Path(folder, "tiny/quick.json").read_text()) for folder in ("one", "two"))
    assert one == two
    assert not leftovers()


def test_two_checks_with_one_folder_of_results(forked, paperworks):
    assert forked(*[partial(main, TINY)] * 4) == [0, 0, 0, 0]
    assert paperworks("report", "--json").code == 0
    assert not [p for p in Path("results").rglob("*") if p.suffix == ".partial"]


# Records and stores that cannot be used.


def change(path, **changed):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changed))


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
        (lambda p: p.write_bytes(next(q for q in p.parent.glob("base-seed0*.json")).read_bytes()), "another trial"),
        (lambda p: next(p.parent.glob("base-seed1*/../base-seed0*/*.png"), p).unlink(), "picture"),
        (lambda p: next(p.parent.glob("base-seed0*/*.safetensors")).write_bytes(b"other"), "weights"),
    ],
    ids=["half", "empty", "binary", "list", "null", "edited", "version", "format", "swapped", "gone", "replaced"],
)
def test_a_damaged_record_is_reported_and_measured_again(paperworks, undisturbed, damage, reason):
    paperworks(*TINY)
    damage(next(Path("paperworks-runs/tiny/quick").glob("base-seed1*.json")))
    done = paperworks(*TINY)
    assert done.code == 0
    assert re.search(rf"measuring again: .*{reason}", done.err), done.err
    assert "5 of 6 trials are stored" in done.err
    assert records() == undisturbed
    assert "6 of 6" in paperworks(*TINY).err


def test_records_of_another_text_of_the_claim_are_measured_again(paperworks, monkeypatch, trials):
    paperworks(*TINY)
    monkeypatch.setattr("paperworks.bench.claim.__version__", "another")
    done = paperworks(*TINY)
    assert "measured by another text of the claim" in done.err
    assert len(trials()) == 12


def test_the_checkpoint_of_another_text_of_the_claim_is_not_resumed(paperworks, forked, monkeypatch, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "kill@base-1")

    def earlier():
        monkeypatch.setattr("paperworks.bench.claim.__version__", "another")
        monkeypatch.setattr("torch.optim.SGD.step", lambda *_: None)  # as if the claim had been wrong then
        main(TINY)

    assert forked(earlier) == [-signal.SIGKILL]
    monkeypatch.delenv("TINY_FAULT")
    paperworks(*TINY)
    assert records() == undisturbed


def test_fresh_does_not_resume(paperworks, forked, monkeypatch, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "kill@base-0")

    def earlier():
        monkeypatch.setattr("torch.optim.SGD.step", lambda *_: None)
        main(TINY)

    assert forked(earlier) == [-signal.SIGKILL]
    monkeypatch.delenv("TINY_FAULT")
    paperworks(*TINY, "--fresh")
    assert records() == undisturbed


def test_a_store_that_cannot_be_written(paperworks, trials):
    Path("file").touch()
    for store in ("file", "file/below", "/proc/store"):
        done = paperworks(*TINY, "--store", store)
        assert done.code == 2
        assert re.search(rf"^error: cannot (read|write to) the store {store}: ", done.err.splitlines()[-1])
        assert "Traceback" not in done.err
    assert not trials()


def test_a_store_that_becomes_full(paperworks, monkeypatch, undisturbed):
    done, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        done(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        ended = paperworks(*TINY)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].endswith("No space left on device")
    assert "Traceback" not in ended.err
    assert not [p for p in Path("paperworks-runs").rglob("*.partial")]
    kept = records()
    assert kept.items() <= undisturbed.items()
    assert paperworks(*TINY).code == 0
    assert records() == undisturbed


def test_results_that_cannot_be_written(paperworks):
    Path("file").touch()
    done = paperworks(*TINY, "--results", "file")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: cannot write file/tiny/quick")


def test_any_url_that_fsspec_opens_is_a_store(paperworks, trials):
    store = "memory://of-a-test"
    assert paperworks(*TINY, "--store", store).code == 0
    assert "6 of 6" in paperworks(*TINY, "--store", store).err
    assert len(trials()) == 6
    assert not Path("paperworks-runs").exists()


# Results that were damaged.


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b.replace(b'"holds"', b'"fails"'), lambda b: b"\xff"])
def test_a_damaged_result_is_written_anew(paperworks, damage):
    paperworks(*TINY)
    path = Path("results/tiny/quick.json")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    done = paperworks(*TINY)
    assert done.code == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"slug": "tiny"}', b"\xff\xfe"])
def test_a_damaged_result_is_named_by_report(paperworks, content):
    Path("results/tiny").mkdir(parents=True)
    Path("results/tiny/quick.json").write_bytes(content)
    done = paperworks("report", "--json")
    assert done.code == 2
    assert done.line.startswith("error: results/tiny/quick.json is no result: ")
    assert done.line.endswith("check tiny again")
    assert paperworks("show", "tiny").code == 0


# Errors in trials.


@pytest.mark.parametrize("executor", ["serial", "processes"])
@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("user", 2, "error: tiny, arm base, seed 1: the moon is full"),
        (
            "bug",
            1,
            "fault: TrialFailed: tiny, arm base, seed 1: ZeroDivisionError: a slip of the pen (--debug shows where)",
        ),
    ],
)
def test_an_error_in_a_trial_is_one_line(paperworks, monkeypatch, kind, code, line, executor):
    monkeypatch.setenv("TINY_FAULT", f"{kind}@base-1")
    done = paperworks("check", "tiny", "--executor", executor, "--workers", 2)
    assert (done.code, done.err.splitlines()[-1]) == (code, line)
    assert len(done.err.splitlines()) == 2  # the first says what is measured
    assert set(records()) >= {("base", 0), ("base.2", 0), ("better", 0)}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "the metric size is nan"),
        ("text", "the metric size must be a number, got 'large'"),
        ("diverge", "the loss is nan at epoch 2, batch 0"),
    ],
)
def test_figures_that_are_none_are_named(paperworks, monkeypatch, kind, words):
    monkeypatch.setenv("TINY_FAULT", f"{kind}@base-0")
    done = paperworks(*TINY)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: tiny, arm base, seed 0: {words}")
    assert not records()


def test_debug_shows_where(paperworks, monkeypatch):
    monkeypatch.setenv("TINY_FAULT", "bug@base-0")
    done = paperworks("--debug", *TINY)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "tiny.py" in done.err
    done = paperworks("--debug", "check", "tinny")
    assert done.code == 2
    assert "Traceback" in done.err


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "tinny"], "unknown method 'tinny'. Did you mean 'tiny'?"),
        (["check"], "name the methods to check, or give --all"),
        (["check", "tiny", "--all"], "name the methods to check, or give --all"),
        (["check", "heavy"], "heavy needs a_package_that_nobody_has: pip install 'paperworks[graphs]'"),
        (["check", "tiny", "--scale", "quik"], "unknown scale 'quik'. Did you mean 'quick'?"),
        (["check", "tiny", "--executor", "procesess"], "unknown executor 'procesess'. Did you mean 'processes'?"),
        (["check", "tiny", "--device", "gpu"], "unknown device 'gpu'."),
        (["check", "tiny", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["check", "tiny", "--seeds", "two"], "Invalid value for '--seeds'"),
        (["check", "tiny", "--workers", "0"], "workers must be at least 1, got 0"),
        (["check", "tiny", "--threads", "0"], "threads must be at least 1, got 0"),
        (["check", "tiny", "--set", "epoch=2"], "unknown setting 'epoch'. Did you mean 'epochs'?"),
        (["check", "tiny", "--set", "epochs"], "--set takes KEY=VALUE, got 'epochs'"),
        (["check", "tiny", "--set", "=2"], "--set takes KEY=VALUE"),
        (["check", "tiny", "--set", "epochs=many"], "setting epochs='many': input should be a valid integer"),
        (["check", "tiny", "--set", "epochs=2.5"], "setting epochs='2.5': input should be a valid integer"),
        (["check", "tiny", "--set", "epochs=0"], "setting epochs='0': input should be greater than or equal to 1"),
        (["check", "tiny", "--set", "shift=nan"], "setting shift='nan': input should be a finite number"),
        (["check", "tiny", "--set", "rates=[0.1"], "setting rates='[0.1': input should be a valid tuple"),
        (["check", "tiny", "--set", 'rates=["a"]'], "setting rates.0='a': input should be a valid number"),
        (["check", "tiny", "--set", "rates=[]"], "setting rates=[]: "),
        (["check", "tiny", "--store", "nowhere://x"], "cannot open the store 'nowhere://x'"),
        (["check", "tiny", "--sed", "3"], "no such option --sed. Did you mean '--seeds'?"),
        (["chek", "tiny"], "unknown command 'chek'. Did you mean 'check'?"),
        (["list", "--family", "robst"], "unknown family 'robst'. Did you mean 'robust'?"),
        (["show", "tinny"], "unknown method 'tinny'"),
        (["report", "--results", "nowhere"], "there is no folder nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(paperworks, arguments, words):
    done = paperworks(*arguments)
    assert done.code == 2
    assert words in done.line
    assert done.line.startswith("error: ")
    assert not Path("paperworks-runs").exists()


def test_a_planned_method_says_so(paperworks):
    planned = next((card.slug for card in catalog().values() if not card.built), None)
    if planned is None:
        pytest.skip("every method is built")
    done = paperworks("check", planned)
    assert (done.code, done.line) == (2, f"error: {planned} is planned and not built yet: there is no claim to check")


def test_a_missing_ray_names_the_extra(paperworks, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = paperworks("check", "tiny", "--executor", "ray")
    assert done.code == 2
    assert done.err.splitlines()[-1] == "error: the executor 'ray' needs ray: pip install 'paperworks[ray]'"
