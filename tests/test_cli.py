"""The command line beyond measuring: how it answers, and how it ends."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from paperworks import __version__
from paperworks.catalog import FAMILIES, catalog
from paperworks.cli import main


@pytest.fixture
def paperworks(capsys, monkeypatch, tmp_path):
    """Runs the command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code, *capsys.readouterr()

    return run


def test_help_names_every_command_and_option(paperworks):
    code, out, err = paperworks("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in ("list", "show", "check", "combine", "report"))
    assert paperworks("-h")[1] == out
    _, out, _ = paperworks("check", "--help")
    options = (
        "--scale --seeds --set --device --executor --workers --threads --store --results --data-root --fresh --all"
    )
    assert all(f"  {option}" in out for option in options.split())


def test_version(paperworks):
    assert paperworks("--version") == (0, f"paperworks {__version__}\n", "")


def test_list_groups_methods_by_family(paperworks):
    code, out, _ = paperworks("list")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines() if line and line[0] != " "][:-1] == list(FAMILIES)
    assert out.splitlines()[-1].startswith(f"{len(catalog())} methods, ")
    _, out, _ = paperworks("list", "--family", "robust")
    assert "logitclip" in out
    assert "koopman" not in out
    _, out, _ = paperworks("list", "--family", "robust", "--json")
    assert {card["family"] for card in json.loads(out)} == {"robust"}


def test_show_prints_the_lines_to_import(paperworks):
    code, out, _ = paperworks("show", "logitclip")
    assert code == 0
    statement = out[out.index("  from ") : out.index("\n\nClaim")]
    exec(dedent(statement), names := {})
    assert {"LogitClip", "clip_logits"} <= names.keys()
    assert "ICML 2023. https" in " ".join(out.split())
    assert "arxiv.org/abs/2212.04055" in out
    assert "paperworks check logitclip" in out


@pytest.mark.parametrize("content", ["{", "[1]", '{"scale": "quick"}', '"text"'])
def test_show_passes_over_a_damaged_result(paperworks, content):
    Path("results/logitclip").mkdir(parents=True)
    Path("results/logitclip/quick.json").write_text(content)
    code, out, err = paperworks("show", "logitclip")
    assert (code, err) == (0, "")
    assert "Measured" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], "unknown command 'chek'. Did you mean 'check'?"),
        (["list", "--family", "robst"], "unknown family 'robst'. Did you mean 'robust'?"),
        (["list", "--jsno"], "no such option --jsno. Did you mean '--json'?"),
        (["list", "robust"], "Got unexpected extra argument (robust)"),
        (["show"], "Missing argument 'SLUG'"),
        (["show", "logitclp"], "unknown method 'logitclp'. Did you mean 'logitclip'?"),
        (["show", "R-Mix"], "unknown method 'R-Mix'. Did you mean 'rmix'?"),
        (["show", "LOGITCLIP"], "unknown method 'LOGITCLIP'. Did you mean 'logitclip'?"),
        (["list", "--family", "Robust"], "unknown family 'Robust'. Did you mean 'robust'?"),
        (["worlds", "--out", "/proc/sheet.png"], "/proc/sheet.png: No such file or directory"),
        (["show", "<script>"], "unknown method '<script>'. Choose from: "),
        (["--debgu", "list"], "no such option --debgu. Did you mean '--debug'?"),
        (["report"], "there is no folder results; run `paperworks check SLUG` first or give --results"),
        (["combine", "logitclip", "--on", "logitclip"], "combine needs at least two methods"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(paperworks, arguments, words):
    code, out, err = paperworks(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1


def test_nothing_asked_is_answered_with_help(paperworks):
    code, out, err = paperworks()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: paperworks")
    assert "..." not in err.replace("[ARGS]...", "")  # no command's line is cut


def test_debug_may_stand_anywhere(paperworks):
    for arguments in (["--debug", "show", "logitclp"], ["show", "logitclp", "--debug"]):
        code, _, err = paperworks(*arguments)
        assert code == 2
        assert "Traceback" in err
        assert err.endswith("error: unknown method 'logitclp'. Did you mean 'logitclip'?\n")


def test_show_lists_settings(paperworks):
    code, out, _ = paperworks("show", "logitclip", "--settings")
    assert code == 0
    (row,) = [line for line in out.splitlines() if line.startswith("epochs ")]
    assert len(row.split()) > 4


def test_a_broken_pipe_is_no_fault():
    listed = subprocess.run(
        f"{sys.executable} -m paperworks list --json | head -c 20",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stderr == ""
    assert len(listed.stdout) == 20


def test_a_method_that_is_a_tool_has_a_command_of_its_own(paperworks, monkeypatch):
    card = replace(catalog()["mrclens"], command="toolbox.tool")
    monkeypatch.setitem(catalog(), "mrclens", card)
    monkeypatch.delitem(sys.modules, "toolbox", raising=False)
    out = paperworks("--help")[1]
    assert card.summary.split()[0] in out[out.index("\n  mrclens ") :]
    assert "toolbox" not in sys.modules
    assert paperworks("mrclens", "double", "21") == (0, "42\n", "")
    assert "Usage: paperworks mrclens" in paperworks("mrclens", "--help")[1]
    assert paperworks("mrclenz")[2] == "error: unknown command 'mrclenz'. Did you mean 'mrclens'?\n"
