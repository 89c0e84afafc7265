"""``paperworks check``: what it prints and writes, in series and in processes, and how it ends when things go wrong."""

import json
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest

from paperworks.bench.check import Plan, Records
from paperworks.cli import main

TINY = ("check", "tiny", "--executor", "serial")
PROCESSES = ("check", "tiny", "--executor", "processes", "--workers", "2")


def test_a_check_ends_with_a_table_a_verdict_and_a_page(paperworks):
    done = paperworks(*TINY)
    assert done.code == 0
    assert done.err == "measuring 6 trials of tiny (quick)\n"
    rows = done.out.splitlines()
    assert rows[1].split()[:5] == ["tiny", "score:", "better", "−", "base"]
    assert [row.split()[-1] for row in rows[1:4]] == ["holds"] * 3
    assert rows[4:] == ["tiny (quick, 2 seeds): holds. Report: results/tiny/quick.html"]
    assert sorted(path.name for path in Path().iterdir()) == ["paperworks-runs", "results"]
    page = Path("results/tiny/quick.html")
    drawn = page.stat().st_mtime_ns
    again = paperworks(*TINY)
    assert (again.code, again.err) == (0, "6 of 6 trials are stored in paperworks-runs\n")
    assert again.out == done.out
    assert page.stat().st_mtime_ns == drawn


def test_one_seed_leaves_everything_undecided(paperworks):
    done = paperworks(*TINY, "--scale", "smoke", "--set", "epochs=2", "--results", "[/red]")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "tiny (smoke, 1 seed): undecided. Report: [/red]/tiny/epochs=2/smoke.html"
    summary = json.loads(Path("[/red]/tiny/epochs=2/smoke.json").read_text())
    assert (summary["seeds"], summary["settings"]["epochs"]) == (1, 2)
    assert [(e["low"], e["high"]) for e in summary["expectations"]] == [(None, None), (0.0, None), (None, None)]


def test_changed_settings_leave_the_claim_s_own_result_alone(paperworks):
    assert paperworks(*TINY).code == 0
    own = Path("results/tiny/quick.json").read_bytes()
    for value in ("2", "4"):
        assert paperworks(*TINY, "--set", f"epochs={value}").code == 0
    assert Path("results/tiny/quick.json").read_bytes() == own
    assert sorted(path.name for path in Path("results/tiny").iterdir() if path.is_dir()) == ["epochs=2", "epochs=4"]
    shown = [line.split()[0] for line in paperworks("report").out.splitlines()]
    assert (shown.count("epochs=2"), shown.count("epochs=4")) == (1, 1)
    found = json.loads(paperworks("report", "--json").out)
    assert [summary.get("changed") for summary in found] == [None, {"epochs": 2}, {"epochs": 4}]
    assert "epochs" not in paperworks("show", "tiny").out
    long = paperworks(*TINY, "--set", f"data={'x/' * 200}").out.split()[-1]
    assert len(Path(long).parent.name) < 80


def test_several_checks_that_end_at_once_share_a_folder_of_results(forked, paperworks):
    assert forked(*[partial(main, [*TINY, "--scale", "smoke"])] * 4) == [0, 0, 0, 0]
    assert json.loads(paperworks("report", "--json").out)[0]["slug"] == "tiny"
    assert not [path for path in Path("results").rglob("*") if path.suffix == ".partial"]


# Processes.


def until(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_check_keeps_what_was_measured_and_goes_on(paperworks, start, monkeypatch, stored, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "sleep@base.2-0")  # one process sleeps, the other measures the rest
    check = start(*PROCESSES)
    until(lambda: len(stored()) >= 3 or check.poll() is not None)
    os.killpg(check.pid, signal.SIGKILL)
    kept = stored()
    assert kept.items() <= undisturbed.items()
    assert 3 <= len(kept) < 6
    monkeypatch.delenv("TINY_FAULT")
    done = paperworks(*PROCESSES)
    assert done.code == 0, done.err
    assert done.err.startswith(f"{len(kept)} of 6 trials are stored in paperworks-runs\n")
    assert stored() == undisturbed  # processes give the numbers of one


def test_ctrl_c_ends_with_one_line(start, monkeypatch, stored, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "sleep@base.2-0")
    check = start(*PROCESSES)
    until(lambda: len(stored()) >= 3 or check.poll() is not None)
    os.killpg(check.pid, signal.SIGINT)  # as a terminal does
    _, err = check.communicate(timeout=120)
    assert check.returncode == 130, err
    assert err.split("\n\n") == ["measuring 6 trials of tiny (quick)", "interrupted; what was measured is stored\n"]
    assert stored().items() <= undisturbed.items()  # workers are killed, whatever they were writing


def test_leaving_in_the_middle_says_nothing(tiny, stored, undisturbed):
    plan = Plan(executor="processes", workers=2)
    measuring = Records(plan, plan.trials(tiny)).measure()
    with warnings.catch_warnings(action="error"):
        next(measuring)
        measuring.close()
    assert 1 <= len(stored()) <= len(undisturbed)


def test_a_killed_process_is_one_line_and_loses_only_its_trial(paperworks, monkeypatch, stored, undisturbed):
    monkeypatch.setenv("TINY_FAULT", "kill@better-1")  # the last
    done = paperworks(*PROCESSES)
    assert done.code == 1
    assert [line.split()[0] for line in done.err.splitlines()] == ["measuring", "fault:"]
    assert stored().items() <= undisturbed.items()
    assert len(stored()) >= 4


@pytest.mark.slow
def test_ray_gives_the_same_numbers(paperworks, stored, undisturbed):
    ray = pytest.importorskip("ray")
    try:
        done = paperworks("check", "tiny", "--executor", "ray", "--workers", 2)
    finally:
        ray.shutdown()
    assert done.code == 0, done.err
    assert stored() == undisturbed


# Errors in trials.


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("user", 2, "error: tiny, arm base, seed 1: the moon is full"),
        ("nan", 2, "error: tiny, arm base, seed 1: the metric size is nan"),
        ("diverge", 2, "error: tiny, arm base, seed 1: the loss is nan at epoch 2, batch 0 (both from 0)"),
        ("bug", 1, "fault: TrialFailed: tiny, arm base, seed 1: ZeroDivisionError: a slip of the pen (--debug"),
        ("text", 1, "fault: TrialFailed: tiny, arm base, seed 1: TypeError: "),
        ("interrupt", 130, "interrupted; what was measured is stored"),
    ],
)
def test_an_error_in_a_trial_is_one_line(paperworks, monkeypatch, stored, undisturbed, kind, code, line):
    monkeypatch.setenv("TINY_FAULT", f"{kind}@base-1")
    done = paperworks(*TINY)
    assert done.code == code
    first, last = filter(None, done.err.splitlines())
    assert first == "measuring 6 trials of tiny (quick)"
    assert last.startswith(line)
    assert stored().keys() == {("base", 0), ("base.2", 0), ("better", 0)}
    assert stored().items() <= undisturbed.items()


def test_debug_shows_where(paperworks, monkeypatch):
    monkeypatch.setenv("TINY_FAULT", "bug@base-0")
    done = paperworks("--debug", *TINY)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "tiny.py" in done.err
    done = paperworks("--debug", "check", "tinny")
    assert done.code == 2
    assert "Traceback" in done.err


# Stores and results that cannot be used.


def test_damage_in_the_store_is_told(paperworks):
    paperworks(*TINY)
    for path in Path("paperworks-runs/tiny/quick").glob("base*.json"):
        path.write_bytes(path.read_bytes()[:99])
    err = paperworks(*TINY).err.splitlines()
    assert err[0].startswith("measuring again: tiny/quick/base-seed0-")
    assert err[0].endswith(".json (and 3 more): the record is truncated or none")
    assert err[1:] == ["2 of 6 trials are stored in paperworks-runs", "measuring 4 trials of tiny (quick)"]


@pytest.mark.parametrize("option", ["--store", "--results"])
def test_a_file_where_a_folder_should_be(paperworks, option):
    Path("file").touch()
    done = paperworks(*TINY, "--scale", "smoke", option, "file")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: cannot ")
    assert "file" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_a_damaged_result_is_written_anew(paperworks):
    paperworks(*TINY, "--scale", "smoke")
    path = Path("results/tiny/smoke.json")
    whole = path.read_bytes()
    for damaged in (whole[:100], whole.replace(b'"undecided"', b'"holds"'), b"\xff"):
        path.write_bytes(damaged)
        assert paperworks(*TINY, "--scale", "smoke").code == 0
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


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tinny"], "unknown method 'tinny'. Did you mean 'tiny'?"),
        ([], "name the methods to check, or give --all"),
        (["tiny", "--all"], "name the methods to check, or give --all"),
        (["heavy"], "heavy needs a_package_that_nobody_has: pip install 'paperworks[graphs]'"),
        (["tiny", "--scale", "quik"], "unknown scale 'quik'. Did you mean 'quick'?"),
        (["tiny", "--executor", "procesess"], "unknown executor 'procesess'. Did you mean 'processes'?"),
        (["tiny", "--device", "gpu"], "unknown device 'gpu'. "),
        (["tiny", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["tiny", "--seeds", "two"], "Invalid value for '--seeds': 'two' is not a valid integer"),
        (["tiny", "--workers", "0"], "workers must be at least 1, got 0"),
        (["tiny", "--threads", "0"], "threads must be at least 1, got 0"),
        (["tiny", "--set", "epoch=2"], "unknown setting 'epoch'. Did you mean 'epochs'?"),
        (["tiny", "--set", "epochs"], "--set takes KEY=VALUE, got 'epochs'"),
        (["tiny", "--set", "=2"], "--set takes KEY=VALUE, got '=2'"),
        (["tiny", "--set", "epochs=many"], "setting epochs='many': input should be a valid integer"),
        (["tiny", "--set", "epochs=2.5"], "setting epochs='2.5': input should be a valid integer"),
        (["tiny", "--set", "epochs=0"], "setting epochs='0': input should be greater than or equal to 1"),
        (["tiny", "--set", "shift=nan"], "setting shift='nan': input should be a finite number"),
        (["tiny", "--set", "rates=[0.1"], "setting rates='[0.1': input should be a valid tuple"),
        (["tiny", "--set", 'rates=["a"]'], "setting rates.0='a': input should be a valid number"),
        (["tiny", "--set", "rates=[]"], "setting rates=[]: tuple should have at least 1 item"),
        (["tiny", "--store", ""], "--store must name a folder or URL, got nothing"),
        (["tiny", "--data-root", "nowhere"], "there is no folder nowhere (--data-root or PAPERWORKS_DATA)"),
        (["tiny", "--store", "nowhere://x"], "cannot open the store 'nowhere://x'"),
        (["tiny", "--sed", "3"], "no such option --sed. Did you mean '--seeds'?"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_code_2(paperworks, arguments, words):
    done = paperworks("check", *arguments)
    assert done.code == 2
    assert done.line.startswith(f"error: {words}")
    assert not Path("paperworks-runs").exists()


def test_a_missing_ray_names_the_extra(paperworks, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = paperworks("check", "tiny", "--executor", "ray")
    assert done.code == 2
    assert done.err.splitlines()[-1] == "error: the executor 'ray' needs ray: pip install 'paperworks[ray]'"
