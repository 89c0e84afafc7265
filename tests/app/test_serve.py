"""The page over HTTP: what it shows, starts and stops, and what it refuses."""

import base64
import html
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from paperworks.app.audits import LARGEST, shown_name
from paperworks.app.orders import Order, Orders
from paperworks.app.project import Project
from paperworks.app.serve import serve
from paperworks.app.site import create_app
from paperworks.bench import load_claim
from paperworks.bench.check import Plan, Records
from paperworks.bench.report import publish
from paperworks.bench.store import Store
from paperworks.catalog import catalog
from paperworks.cli import main
from paperworks.errors import UserError

HOST = "http://localhost"
SMOKE = {"scale": "smoke"}


@pytest.fixture
def client():
    """A browser on the page of this folder."""
    with TestClient(create_app(Project()), base_url=HOST, headers={"Origin": HOST}) as found:
        yield found


@pytest.fixture
def measured():
    """Measures and publishes ``tiny`` in this process, as the command line does."""

    def run(**plan):
        plan = Plan(executor="serial", **plan)
        tiny = load_claim("tiny")
        records = Records(plan, plan.trials(tiny))
        for _ in records.measure():
            pass
        publish(tiny, records, Path("results"))
        return records

    return run


def text(answer):
    """What people read of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", answer.text)).split())


def pills(answer):
    return re.findall(r'<span class="pill ([a-z-]+)"', answer.text)


def start(client, form=SMOKE, slug="tiny"):
    answer = client.post(f"/methods/{slug}/check", data=form, follow_redirects=False)
    assert answer.status_code == 303, text(answer)
    return answer.headers["location"]


def ends(client, address):
    """Reads a run's events to their end; returns the page that is there then."""
    events = client.get(f"{address}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    assert events.text.endswith("event: end\ndata: \n\n")
    return client.get(address)


# What it shows.


def test_the_gallery_has_every_method(client):
    page = client.get("/")
    assert page.status_code == 200
    assert re.findall(r'<h2><a href="/methods/([^"]+)"', page.text) == list(catalog())
    assert "49 methods" not in page.text or len(catalog()) == 49


def test_the_gallery_is_searched_without_script_too(client, measured):
    measured()

    def shown(**query):
        page = client.get("/", params=query)
        return [
            s
            for a, s in re.findall(r'<li class="card[^"]*"([^>]*)>.*?/methods/([^"]+)"', page.text, re.S)
            if "hidden" not in a
        ]

    assert shown(q="one everything tests") == ["tiny"]
    assert shown(q="FIGURES much") == ["nudge"]
    assert shown(family="tests") == ["tiny", "nudge", "heavy"]
    assert shown(family="tests", verdict="holds") == ["tiny"]
    assert shown(q="no such words") == []


def test_a_method_s_page_has_card_claim_imports_and_result(client, measured):
    measured()
    page = client.get("/methods/tiny")
    for part in (
        "Adds one to everything.",
        "One is added.",
        "from tinyclaims.tiny import Tiny",
        "paperworks check tiny",
    ):
        assert part in text(page)
    assert pills(page)[0] == "holds"
    assert 'placeholder="1 · 3 · 4"' in page.text  # epochs at the three scales
    figure = re.search(r'src="(/figures/tiny/[^"]+a-picture[^"]+)"', page.text)[1]
    assert client.get(figure).content.startswith(b"\x89PNG")


def test_what_people_named_is_text(client, measured):
    measured()
    for address in ("/", "/methods/tiny", "/runs", "/compare?run=result:tiny/quick"):
        page = client.get(address)
        assert page.status_code == 200
        assert "<method>" not in page.text
        assert "<b>one" not in page.text
        assert "alert(1)</script>" not in page.text
    assert "&lt;script&gt;alert(1)" in page.text  # the name of an expectation
    query = client.get("/", params={"q": '"><script>alert(1)</script>'})
    assert "<script>alert" not in query.text


def test_a_planned_method_and_one_whose_extra_is_missing_have_pages(client):
    planned = next(card for card in catalog().values() if not card.built)
    assert pills(client.get(f"/methods/{planned.slug}"))[0] == "planned"
    heavy = client.get("/methods/heavy")
    assert heavy.status_code == 200
    assert "pip install 'paperworks[graphs]'" in text(heavy)


@pytest.mark.parametrize(
    "address", ["/methods/tinny", "/runs/tiny/quick/0123456789ab", "/runs/a/b/c", "/combine/x", "/no"]
)
def test_what_is_not_there_is_said_so(client, address):
    page = client.get(address)
    assert page.status_code == 404
    assert "<h1>Not Found</h1>" in page.text


# Runs.


def test_a_check_runs_to_its_verdict_which_the_command_line_sees(client, capsys):
    address = start(client)
    page = ends(client, address)
    assert pills(page)[0] == "undecided"  # one seed
    assert "3 of 3 trials" in text(page)
    assert "smoke run shows that the code works" in text(page)
    assert json.loads(Path("results/tiny/smoke.json").read_text())["seeds"] == 1
    with pytest.raises(SystemExit):
        main(["report", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["slug"] == "tiny"
    assert address in client.get("/runs").text
    assert address in client.get("/methods/tiny").text


def test_what_the_command_line_measured_is_here(client, measured):
    measured()
    address = re.search(r'href="(/runs/tiny/quick/[0-9a-f]{12})"', client.get("/runs").text)[1]
    page = client.get(address)
    assert pills(page)[0] == "holds"
    assert "polyline" in page.text  # its curves
    assert "/cancel" not in page.text


def test_a_run_of_the_command_line_is_watched_as_it_goes(client):
    trial = Plan().trials(load_claim("tiny"))[0]
    live = {"key": trial.key, "code": trial.code, "fraction": 0.25, "text": "epoch 1/3", "curves": {}}
    live["training"] = {"train/loss": [[1, 0.5], [2, 0.25]]}
    store = Store("paperworks-runs")

    def writes(pid):
        store.write(f"live/{trial.key}.json", json.dumps(live | trial.identity | {"pid": pid}).encode())

    writes(os.getpid())
    address = re.search(r'href="(/runs/tiny/quick/[0-9a-f]{12})"', client.get("/runs").text)[1]
    page = client.get(address)
    for part in ("running", "0 of 6 trials", "25 %", "epoch 1/3", "train/loss", "Started from a command line"):
        assert part in text(page)
    assert "/cancel" not in page.text
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    writes(gone.pid)
    assert client.get(address).status_code == 404  # a killed process leaves its file


def test_cancel_keeps_what_was_measured_and_resume_goes_on(client, monkeypatch, until, trials):
    monkeypatch.setenv("TINY_FAULT", "sleep@better-1")  # the last
    address = start(client, {"scale": "quick", "set-epochs": "2"})
    records = Path("paperworks-runs/tiny/quick")
    until(lambda: len(list(records.glob("*.json"))) >= 4)
    page = client.get(address)
    assert "Cancel" in text(page)
    assert f"epochs={2}" in text(page)
    client.post(f"{address}/cancel")
    page = ends(client, address)
    assert "stopped" in pills(page)
    kept = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert 4 <= len(kept) < 6
    assert not list(Path("paperworks-runs").rglob("*.partial"))
    begun = len(trials())
    monkeypatch.delenv("TINY_FAULT")
    assert "Resume" in text(page)
    client.post(f"{address}/resume")
    page = ends(client, address)
    assert pills(page)[0] == "holds"
    assert len(trials()) == begun + 6 - len(kept)
    assert kept.items() <= {path.name: path.read_bytes() for path in records.glob("*.json")}.items()


@pytest.mark.slow
def test_runs_wait_for_each_other_and_one_that_waits_is_cancelled_at_once(client, monkeypatch, until):
    monkeypatch.setenv("TINY_FAULT", "sleep")
    first, second = start(client), start(client, SMOKE | {"set-shift": "2"})
    until(lambda: "Cancel" in text(client.get(first)) and "running" in pills(client.get(first)))
    assert pills(client.get(second)) == ["waiting"]
    client.post(f"{second}/cancel")
    assert pills(client.get(second)) == ["stopped"]
    client.post(f"{first}/cancel")
    assert "stopped" in pills(ends(client, first))
    assert not list(Path("paperworks-runs").glob("tiny/*/*.json"))


@pytest.mark.slow
def test_two_browsers_that_start_the_same_run_start_it_once(client, trials):
    with ThreadPoolExecutor(8) as browsers:
        addresses = set(browsers.map(lambda _: start(client), range(8)))
    assert len(addresses) == 1
    assert pills(ends(client, addresses.pop()))[0] == "undecided"
    assert len(trials()) == 3


@pytest.mark.slow
def test_a_run_that_fails_says_why(client, monkeypatch):
    monkeypatch.setenv("TINY_FAULT", "user@better-0")
    page = ends(client, start(client))
    assert "failed" in pills(page)
    assert "error: tiny, arm better, seed 0: the moon is full" in text(page)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"set-epochs": "many"}, "setting epochs='many': input should be a valid integer"),
        ({"set-epochs": "0"}, "greater than or equal to 1"),
        ({"set-epoch": "3"}, "unknown setting 'epoch'. Did you mean 'epochs'?"),
        ({"seeds": "0"}, "seeds must be at least 1, got 0"),
        ({"seeds": "-1"}, "seeds must be a number"),
        ({"scale": "smok"}, "unknown scale 'smok'. Did you mean 'smoke'?"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"set-data": "/etc/passwd"}, "'/etc/passwd' is outside this folder"),
        ({"set-data": "a/../../b.csv"}, "is outside this folder"),
        ({"set-data": "~/b.csv"}, "is outside this folder"),
        ({"set-data": "leads-out/b.csv"}, "is outside this folder"),
        ({"set-data": "https://example.org/b.csv"}, "is outside this folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_the_form_keeps_it(client, form, message, tmp_path_factory):
    Path("leads-out").symlink_to(tmp_path_factory.mktemp("outside"))
    page = client.post("/methods/tiny/check", data=SMOKE | form)
    assert page.status_code == 422
    assert message in text(page)
    for name, value in form.items():
        if name in ("set-epochs", "set-data", "seeds"):
            assert f'name="{name}"' in page.text
            assert f'value="{value}"' in page.text
    assert not list(Path("paperworks-runs").rglob("orders/*.json"))


def test_forms_with_odd_fields_are_refused_or_ignored(client):
    assert client.post("/methods/../check").status_code == 404
    assert client.post("/methods/tiny/check", files={"scale": ("a", b"smoke"), "x": ("b", b"")}).status_code == 400
    assert client.post("/methods/tiny/check", data={f"set-{k}": "1" for k in range(400)}).status_code == 400
    many = client.post("/methods/tiny/check", data={"--store": "/tmp/x", "store": "/tmp/x", "scale": "wrong"})
    assert many.status_code == 422
    page = client.post("/runs/tiny/smoke/0123456789ab/cancel")
    assert page.status_code == 404


def test_compare_says_what_differs(client, measured):
    measured()
    measured(overrides={"shift": 0.25})
    runs = re.findall(r'name="run" value="([^"]+)"', client.get("/runs").text)
    assert len(runs) == 2  # the published result is one of them
    page = client.get("/compare", params={"run": [*runs, "result:tiny/quick"]})
    assert page.status_code == 200
    assert re.findall(r'<tr class="changed"><th scope="row">([^<]+)', page.text) == ["shift"]
    assert {"holds", "fails"} <= set(pills(page))
    assert "better · B" in text(page)
    assert client.get("/compare", params={"run": "result:tiny/full"}).status_code == 404
    assert client.get("/compare", params={"run": "../../etc"}).status_code == 404
    assert client.get("/compare", params={"run": [f"{k}/b/c" for k in range(7)]}).status_code == 422


@pytest.mark.slow
def test_combine_shows_how_methods_meet(client):
    page = client.get("/combine")
    assert 'value="nudge"' in page.text
    assert '<option value="nudge"' not in page.text  # it hosts nobody
    form = {"scale": "quick", "on": "tiny", "method": ["tiny", "nudge"]}
    answer = client.post("/combine", data=form, follow_redirects=False)
    assert answer.status_code == 303
    page = ends(client, answer.headers["location"])
    assert "8 of 8 trials" in text(page)
    for part in ("tiny × nudge on Tiny", "+1.25", "+2.25", "+0.25", "without nudge", "with tiny"):
        assert part in text(page)
    found = re.findall(r'href="(/combine/[^"]+)"', client.get("/combine").text)
    assert len(found) == 1
    assert "tiny × nudge on tiny" in text(client.get(found[0]))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"on": "tiny", "method": ["tiny"]}, "at least two methods"),
        ({"on": "nudge", "method": ["tiny", "nudge"]}, "nudge has no training that others can join"),
        ({"on": "", "method": []}, "unknown method ''"),
        ({"on": "tiny", "method": ["tiny", "nudg"]}, "Did you mean 'nudge'?"),
    ],
)
def test_a_combination_that_makes_no_sense_is_one_line(client, form, message):
    page = client.post("/combine", data=form)
    assert page.status_code == 422
    assert message in text(page)


# MRCLens.


def test_a_squad_file_is_audited(client, squad):
    answer = client.post("/mrclens", files={"file": ("a <i>set</i>.json", squad.read_bytes())}, follow_redirects=False)
    assert answer.status_code == 303, text(answer)
    page = ends(client, answer.headers["location"])
    assert "a <i>set</i>.json" not in page.text
    assert "a <i>set</i>.json" in html.unescape(page.text) or "i>.json" in text(page)
    assert "240 questions" in text(page)
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page.text, re.S) if ">position<" in row)
    assert "solvable: high" in row
    assert "<b>blue" not in page.text
    files = re.findall(r'href="(/mrclens/[0-9a-f]{16}/files/[^"]+)"', page.text)
    report = client.get(next(file for file in files if file.endswith("report.json")))
    assert "position" in report.json()["biased"]
    assert report.headers["content-disposition"].startswith("attachment")
    kept = client.get(next(file for file in files if file.endswith("biased.json"))).json()
    assert len(kept["data"][0]["paragraphs"]) > 100
    client.post(f"{answer.headers['location']}/delete")
    assert client.get(answer.headers["location"]).status_code == 404
    assert not list(Path("paperworks-runs/serve/mrclens").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"{}", "only a SQuAD file that ends in .json"),
        ("a.json", b"PK\x03\x04", "does not hold a JSON object"),
        ("a.json", b"", "does not hold a JSON object"),
        ("", b"{}", "choose a SQuAD file first"),
        ("a.json", b"{" + b" " * LARGEST, "is larger than 20 MB"),
    ],
)
def test_an_upload_of_the_wrong_kind_is_refused_at_once(client, name, content, message):
    page = client.post("/mrclens", files={"file": (name, io.BytesIO(content))})
    assert page.status_code in (400, 422)
    assert message in text(page) or name == ""
    assert not list(Path("paperworks-runs/serve/mrclens").iterdir())


@pytest.mark.slow
def test_a_malformed_set_is_one_line(client):
    answer = client.post("/mrclens", files={"file": ("a.json", b'{"data":' + b"[" * 100_000)}, follow_redirects=False)
    page = ends(client, answer.headers["location"])
    assert "failed" in pills(page)
    line = re.search(r'<p class="error"[^>]*>([^<]+)</p>', page.text)[1]
    assert "Traceback" not in line
    assert os.getcwd() not in line


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd.json", "passwd.json"),
        ("C:\\x\\a.json", "a.json"),
        ("a\x00\x1b[31m.json", "a[31m.json"),
        ("..", "a file"),
        ("a" * 500 + ".json", "a" * 115 + ".json"),
    ],
)
def test_uploaded_names_are_last_parts_that_can_be_seen(name, shown):
    assert shown_name(name) == shown


# Files.


ODD = ["../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "....//secret.png", "a%00.png", "a\\..\\secret.png"]
THERE = ["leads-out.png", "quick.json", ".hidden.png", "folder.png"]


@pytest.mark.parametrize("name", [*ODD, *THERE])
def test_only_published_figures_are_served(client, measured, name, tmp_path_factory):
    measured()
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(b"secret")
    for path in (Path("secret.png"), Path("results/secret.png"), Path("results/tiny/.hidden.png")):
        path.write_bytes(b"secret")
    Path("results/tiny/leads-out.png").symlink_to(outside)
    Path("results/tiny/folder.png").mkdir()
    for address in (f"/figures/tiny/{name}", f"/static/{name}", f"/figures/../{name}", f"/figures/%2e%2e/{name}"):
        answer = client.get(address)
        assert answer.status_code in (400, 404), address
        assert b"secret" not in answer.content


def test_a_damaged_record_or_result_does_not_break_the_pages(client, measured):
    measured()
    record = next(Path("paperworks-runs/tiny/quick").glob("better-seed1*.json"))
    record.write_text(record.read_text()[:100])
    Path("paperworks-runs/tiny/quick/odd.json").write_text("[]")
    Path("results/tiny/full.json").write_text('{"slug": "tiny"}')
    Path("results/combine").mkdir()
    Path("results/combine/odd.json").write_text("nothing")
    for address in ("/", "/methods/tiny", "/runs", "/combine"):
        assert client.get(address).status_code == 200
    assert "2 records are damaged" in text(client.get("/runs"))
    assert "5/6" in text(client.get("/runs"))


# Who may ask.


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "evil.example:7860", "[::1", "a b"])
def test_a_name_from_elsewhere_is_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:7860", "[::1]:7860", "192.168.1.5"])
def test_addresses_and_localhost_are_known(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:81"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {},
    ],
)
@pytest.mark.parametrize("address", ["/methods/tiny/check", "/combine", "/mrclens", "/runs/tiny/smoke/x/cancel"])
def test_only_our_own_pages_change_something(client, headers, address):
    del client.headers["origin"]
    assert client.post(address, data=SMOKE, headers=headers).status_code == 403
    assert not list(Path("paperworks-runs").rglob("orders/*.json"))


def test_a_browser_without_origin_but_of_the_same_site_may(client):
    del client.headers["origin"]
    page = client.post("/methods/tiny/check", data={"scale": "wrong"}, headers={"Sec-Fetch-Site": "same-origin"})
    assert page.status_code == 422


@pytest.mark.parametrize("method", ["put", "delete", "patch"])
def test_other_methods_are_not_allowed(client, method):
    assert getattr(client, method)("/runs").status_code == 405


def test_every_answer_has_the_security_headers(client):
    for address in ("/", "/methods/tiny", "/no", "/static/page.js", "/static/style.css"):
        headers = client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    refused = client.get("/", headers={"Host": "evil.example"})
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_nothing_is_asked_of_another_host():
    for path in (Path(__file__).parents[2] / "src" / "paperworks" / "app").rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            found = re.findall(r"https?://[^\s\"']+", path.read_text())
            assert not found, path


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_limited(client, chunked):
    def body():
        for _ in range(40):
            yield b"x" * 10_000

    content = body() if chunked else b"".join(body())
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/methods/tiny/check", content=content, headers=headers).status_code == 413


def test_user_and_password_are_asked_of_everybody():
    with TestClient(create_app(Project(), auth="me:päss"), base_url=HOST, headers={"Origin": HOST}) as client:
        for address in ("/", "/static/style.css", "/runs", "/no"):
            answer = client.get(address)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic")
        assert client.post("/methods/tiny/check", data=SMOKE).status_code == 401
        for wrong in ("me:pass", "me:", ":päss", "me:päss "):
            given = base64.b64encode(wrong.encode()).decode()
            assert client.get("/", headers={"Authorization": f"Basic {given}"}).status_code == 401
        given = base64.b64encode("me:päss".encode()).decode()
        assert client.get("/", headers={"Authorization": f"Basic {given}"}).status_code == 200
        assert client.get("/", headers={"Authorization": f"Bearer {given}"}).status_code == 401


# Servers.


def test_a_second_server_on_the_same_folder_says_so():
    with Project().alone("http://127.0.0.1:7860"):
        with pytest.raises(UserError, match=r"served at http://127.0.0.1:7860 already"), Project().alone("elsewhere"):
            pass
        with Project(store="other").alone("elsewhere"):
            pass
    with Project().alone("again"):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "give --auth user:password as well"),
        (["--host", "::"], "give --auth user:password as well"),
        (["--auth", "nobody"], "--auth takes user:password"),
        (["--auth", ":x"], "--auth takes user:password"),
        (["--host", "no.such.host.invalid", "--auth", "a:b"], "cannot serve at no.such.host.invalid"),
        (["--port", "70000"], "70000"),
    ],
)
def test_serve_refuses_what_is_unsafe_or_cannot_be(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_said_so(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit):
        main(["serve", "--port", str(other.getsockname()[1])])
    assert "the port is taken; --port 0 takes a free one" in capsys.readouterr().err


@pytest.mark.slow
def test_serve_says_where_it_is_and_ends_with_ctrl_c():
    command = [sys.executable, "-m", "paperworks", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
        second = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert second.returncode == 2
        assert f"served at {address} already" in second.stderr
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit) as ended:
        main(["serve"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: paperworks serve needs fastapi: pip install 'paperworks[app]'\n"


def test_beyond_loopback_there_is_a_warning(monkeypatch):
    monkeypatch.setattr("paperworks.app.serve._Server.run", lambda server, sockets: None)
    told = []
    serve(Project(), host="0.0.0.0", port=0, auth="me:secret", say=told.append)
    assert [line.split(":")[0] for line in told] == ["warning"]
    serve(Project(), port=0, say=told.append)
    assert len(told) == 1


def test_a_fault_of_ours_is_a_page_without_its_traceback(monkeypatch):
    monkeypatch.setattr("paperworks.app.runs.Runs.all", lambda runs: 1 / 0)
    with TestClient(create_app(Project()), base_url=HOST, raise_server_exceptions=False) as client:
        page = client.get("/runs")
    assert page.status_code == 500
    assert "That is a fault of ours" in text(page)
    assert "ZeroDivisionError" not in page.text


ORDER = Order("tiny/smoke/x", ("check", "tiny", "--scale=smoke"), {}, ("base",), 1)


@pytest.mark.slow
def test_a_server_that_starts_again_finds_what_still_runs(monkeypatch, until, tmp_path):
    monkeypatch.setenv("TINY_FAULT", "sleep")
    first = Orders(tmp_path / "orders")
    first.start(ORDER)
    live = Path("paperworks-runs/live")
    until(lambda: live.is_dir() and list(live.glob("*.json")))
    second = Orders(tmp_path / "orders")  # the first server was killed; its process was not
    assert second.get(ORDER.run).status == "running"
    second.cancel(ORDER.run)
    until(lambda: second.get(ORDER.run).status == "stopped")
    assert not list(live.glob("*.json"))
    second.close()
    first.close()


def test_an_order_whose_process_is_gone_is_stopped(tmp_path):
    orders = Orders(tmp_path / "orders")
    orders.close()
    path = tmp_path / "orders" / "tiny--smoke--x.json"
    path.write_text(json.dumps(vars(ORDER) | {"status": "running", "pid": 2**22 + 1}))
    (tmp_path / "orders" / "odd.json").write_text("{")
    again = Orders(tmp_path / "orders")
    assert [order.status for order in again.all()] == ["stopped"]
    again.close()


@pytest.mark.slow
def test_closing_stops_what_runs(monkeypatch, until, tmp_path):
    monkeypatch.setenv("TINY_FAULT", "sleep")
    orders = Orders(tmp_path / "orders")
    orders.start(ORDER)
    until(lambda: list(Path("paperworks-runs").glob("live/*.json")))
    pid = orders.get(ORDER.run).pid
    orders.close()
    assert orders.get(ORDER.run).status == "stopped"
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    assert not [state for state, _, group, *_ in stats if int(group) == pid and state != "Z"]


def test_a_process_that_does_not_stop_is_killed(until, tmp_path):
    orders = Orders(tmp_path / "orders", patience=0.5)
    script = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    Path("paperworks.py").write_text(script)  # found before the package, in this folder
    orders.start(ORDER)
    until(lambda: "deaf" in orders.output(ORDER.run))
    orders.cancel(ORDER.run)
    until(lambda: orders.get(ORDER.run).status == "stopped", 10)
    orders.close()


def test_pages_answer_while_runs_are_read_and_written(client, measured):
    """Many readers, one writer: every answer is whole."""
    measured(seeds=1)
    ended = threading.Event()
    answers = []

    def read():
        while not ended.is_set():
            answers.extend(client.get(address).status_code for address in ("/", "/runs", "/methods/tiny"))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for seeds in (2, 3, 4):
        measured(seeds=seeds)
    ended.set()
    for reader in readers:
        reader.join()
    assert set(answers) == {200}
