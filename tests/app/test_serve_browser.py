"""The page in Chromium: as people meet it, by mouse and by keyboard, wide and narrow, light and dark.

With ``PAPERWORKS_SCREENSHOTS=docs/screenshots`` the pages are also photographed for the docs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
expect = sync_api.expect

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "bench" / "plugin"
PATIENCE = 120_000  # ms; machines that test are busy
SHOTS = os.environ.get("PAPERWORKS_SCREENSHOTS")
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@contextmanager
def serving(folder, *options, **environment):
    """The server in a folder, as one starts it; gives its address."""
    command = [sys.executable, "-m", "paperworks", "serve", "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment
    with (folder / "server.log").open("w+") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            line = server.stdout.readline()
            assert "http://" in line, log.read()
            yield re.search(r"http://[\d.:]+", line)[0]
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)
            server.kill()
            server.communicate()
            log.seek(0)
            assert "Traceback" not in log.read()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server with the results of the repository, and the claims of tests/bench/plugin, one trial of which sleeps."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "results", folder / "results")
    with serving(folder, PYTHONPATH=str(PLUGIN), TINY_FAULT="sleep@better-1") as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens pages; in the end none may have complained, asked another host, or failed to load something."""
    contexts, faults = [], []

    def asked(request):
        if not request.url.startswith((address, "data:", "blob:")):
            faults.append(f"asked {request.url}")

    def failed(request):
        if request.resource_type != "eventsource" and "ERR_ABORTED" not in (request.failure or ""):
            faults.append(f"failed {request.url} {request.failure}")

    def visit(path="/", width=1280, scheme="light", **options):
        height = 800 if width > 600 else 844
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", asked)
        page.on("requestfailed", failed)
        page.goto(address + path)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults


def cards(page):
    return page.locator("[data-cards] > li:visible h2").all_inner_texts()


def pill(page, text):
    return page.locator(f".pill.{text}").first


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_page_fits(visit, width, scheme):
    page = visit("/", width, scheme)
    origin = page.url.rstrip("/")
    compared = "/compare?run=result:logitclip/quick&run=result:rmix/quick"
    for path in ("/", "/methods/logitclip", "/methods/tiny", "/runs", "/combine", "/mrclens", compared):
        page.goto(origin + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} scrolls sideways"
        assert page.locator("h1").count() == 1
        for image in page.locator("img").all():
            image.scroll_into_view_if_needed()
            page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")


def test_the_gallery_is_searched_as_one_types(visit):
    page = visit()
    everything = cards(page)
    assert len(everything) == 52
    page.keyboard.press("/")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type("noisy LABELS")
    found = cards(page)
    assert "LogitClip" in found
    assert 0 < len(found) < 20
    expect(page.locator("[data-count]")).to_have_text(f"{len(found)} methods")
    page.reload()
    assert cards(page) == found  # the server shows the same
    page.locator("label", has_text="fails").click()
    assert set(cards(page)) < set(found)
    page.fill("#q", "no such words")
    assert cards(page) == []
    expect(page.get_by_text("Nothing here goes by that")).to_be_visible()
    page.get_by_role("link", name="Show all methods").click()
    assert cards(page) == everything


def test_everything_is_reached_by_keyboard(visit):
    reach = """() => {
      const seen = [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')].filter(
        e => e.checkVisibility() && !e.disabled && !(e.type === 'radio' && !e.checked));
      return seen.map((e, k) => (e.dataset.reach = k, k)).length;
    }"""
    for path in ("/methods/logitclip", "/runs", "/combine", "/mrclens"):
        page = visit(path)
        count = page.evaluate(reach)
        reached = set()
        for _ in range(count + 5):
            page.keyboard.press("Tab")
            at = page.evaluate("document.activeElement.dataset.reach")
            if at is None:
                continue
            reached.add(int(at))
            marked = page.evaluate("""() => {
              const ring = e => e && getComputedStyle(e).outlineStyle !== 'none';
              const at = document.activeElement;
              return ring(at) || ring(at.nextElementSibling);  // of a hidden radio, its label
            }""")
            assert marked, page.evaluate("document.activeElement.outerHTML")
        assert reached == set(range(count)), path
    page = visit("/")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the content
    page.keyboard.press("Tab")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # the verdicts are one group
    assert "verdict=holds" in page.url


def test_light_and_dark_can_be_chosen_and_stay(visit):
    page = visit("/", scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(colour)
    assert dark != light
    page.goto(page.url + "methods/rmix")
    assert page.evaluate(colour) == dark


def test_the_snippet_is_copied(visit):
    page = visit("/methods/logitclip", permissions=["clipboard-read", "clipboard-write"])
    page.locator("section", has=page.locator("#import")).get_by_role("button", name="Copy").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("from paperworks.robust import (\n    LogitClip,")
    assert "paperworks" in copied


def test_a_smoke_check_runs_to_its_verdict(visit):
    page = visit("/methods/tiny")
    page.locator("label", has_text="smoke").click()
    page.get_by_role("button", name="Run the check").click()
    expect(page.locator("h1")).to_have_text("Tiny <method>")
    expect(page.locator("#verdict")).to_be_visible(timeout=PATIENCE)  # without a touch: the page follows the run
    expect(pill(page, "undecided")).to_be_visible()
    expect(page.locator("progress")).to_have_js_property("value", 1)
    assert page.locator(".plot polyline").count() == 3
    page.goto(page.url.split("/runs")[0] + "/methods/tiny")
    expect(page.locator("#runs")).to_be_visible()


def test_a_run_is_cancelled_resumed_and_cancelled_again(visit):
    page = visit("/methods/tiny")
    page.get_by_role("button", name="Run the check").click()  # quick: its last trial sleeps
    expect(page.locator(".cell.done")).to_have_count(5, timeout=PATIENCE)
    expect(page.locator(".cell.now")).to_have_count(1)
    other = visit("/" + page.url.split("/", 3)[3])  # a second browser sees it
    expect(other.locator(".cell.done")).to_have_count(5)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=PATIENCE)
    expect(other.get_by_role("button", name="Resume")).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".cell.done")).to_have_count(5)
    other.get_by_role("button", name="Resume").click()
    expect(other.locator(".cell.now")).to_have_count(1, timeout=PATIENCE)
    other.get_by_role("button", name="Cancel").click()
    expect(other.get_by_role("button", name="Resume")).to_be_visible(timeout=PATIENCE)


def test_results_are_compared(visit):
    page = visit("/runs")
    button = page.locator("[data-compare-button]")
    expect(button).to_be_disabled()
    page.locator('input[value="result:logitclip/quick"]').check()
    page.locator('input[value="result:rmix/quick"]').check()
    expect(button).to_have_text("Compare 2 runs")
    button.click()
    expect(page.locator("h1")).to_have_text("Compare")
    expect(page.locator("h2")).to_have_text(["LogitClip", "R-Mix"])


def test_two_methods_meet_in_a_picture(visit):
    page = visit("/combine")
    page.get_by_role("checkbox", name="Tiny <method>").check()
    page.get_by_role("checkbox", name="Nudge").check()
    page.get_by_label("On the data and training of").select_option("tiny")
    page.locator("label", has_text="smoke").click()
    page.get_by_role("spinbutton", name="Seeds").fill("2")
    page.get_by_role("button", name="Run the combination").click()
    expect(page.locator(".meet")).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".meet figcaption")).to_have_text("tiny × nudge")
    assert page.locator(".meet circle").count() == 4


def test_a_squad_file_is_uploaded_and_its_findings_are_read(visit, squad):
    page = visit("/mrclens")
    page.get_by_label("SQuAD v1.1 or v2.0").set_input_files(squad)
    page.get_by_role("button", name="Audit it").click()
    expect(page.locator(".findings")).to_be_visible(timeout=PATIENCE)
    row = page.locator(".findings tr", has_text="position").first
    expect(row.locator(".pill")).to_have_text("solvable: high")
    with page.expect_download() as download:
        page.get_by_role("link", name="report.json").click()
    assert "position" in json.loads(Path(download.value.path()).read_text())["biased"]


def test_robustar_is_part_of_the_page(chromium, tmp_path):
    """Its own tests draw pixel by pixel; here its page works behind our guard."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))\n"
    )
    for label in ("day", "night"):
        for k in range(3):
            path = tmp_path / "images" / "train" / label / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (0, 60 * k, 90)).save(path)
    faults = []
    options = ("--robustar", "images", "--robustar-model", "net:make")
    with serving(tmp_path, *options) as address:
        page = chromium.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or faults.append(r.url))
        page.goto(address)
        page.get_by_role("link", name="Robustar", exact=True).first.click()
        page.locator("#gallery button img").first.wait_for()
        name = page.locator("#current textarea, #current input")
        name.fill("train/night/1.png")
        name.press("Enter")
        canvas = page.locator("#editor canvas").first
        canvas.wait_for()
        page.get_by_label("Brush", exact=True).click()
        page.wait_for_timeout(1000)
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2, steps=8)
        page.mouse.up()
        page.wait_for_timeout(500)
        page.get_by_role("button", name="Save mask").click()
        page.wait_for_function("document.querySelector('#said textarea, #said input').value.startsWith('saved')")
        page.close()
    with Image.open(tmp_path / "images/paired/night/1.png.png") as mask:
        assert 0 < sum(value == 255 for value in mask.getdata()) < 256
    assert not faults


@pytest.mark.timeout(900)
@pytest.mark.skipif(not SHOTS, reason="PAPERWORKS_SCREENSHOTS names no folder")
def test_screenshots(chromium, tmp_path, squad):
    """The library's own methods, of which one is run."""
    folder = ROOT / SHOTS
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page, name, whole=False):
        shot = Image.open(BytesIO(page.screenshot(full_page=whole))).convert("RGB")
        shot.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            folder / f"{name}.png", optimize=True
        )

    def opened(path, width=1280, scheme="light"):
        viewport = {"width": width, "height": 800 if width > 600 else 844}
        context = chromium.new_context(viewport=viewport, color_scheme=scheme)
        page = context.new_page()
        page.set_default_timeout(3 * PATIENCE)
        page.goto(address + path)
        return page

    real = Path(os.environ.get("PAPERWORKS_DATA", "")) / "questions" / "xquad.en.json"
    shutil.copytree(ROOT / "results", tmp_path / "results")
    with serving(tmp_path) as address:
        for path, name in (("/", "gallery"), ("/methods/logitclip", "method")):
            for width, scheme in VIEWS:
                shoot(opened(path, width, scheme), f"{name}-{width}-{scheme}")
        page = opened("/methods/logitclip")
        page.get_by_role("spinbutton", name="Seeds").fill("3")
        page.get_by_role("button", name="Run the check").click()
        page.locator(".cell.done").first.wait_for()
        page.locator(".plot").first.wait_for()
        shoot(page, "running-1280-light")
        shoot(opened(page.url.removeprefix(address), 390, "dark"), "running-390-dark")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Resume").wait_for()
        page = opened("/methods/logitclip")
        page.locator("label", has_text="smoke").click()
        page.get_by_role("spinbutton", name="Seeds").fill("3")
        page.get_by_role("button", name="Run the check").click()
        page.locator("#verdict").wait_for()
        shoot(page, "run-1280-light")
        page = opened("/combine")
        for name in ("LogitClip", "R-Mix"):
            page.get_by_role("checkbox", name=name).check()
        page.get_by_label("On the data and training of").select_option("logitclip")
        page.locator("label", has_text="smoke").click()
        page.get_by_role("spinbutton", name="Seeds").fill("3")
        shoot(page, "combine-1280-light")
        page.get_by_role("button", name="Run the combination").click()
        page.locator(".meet").wait_for()
        published = sorted((tmp_path / "results" / "combine").glob("logitclip--*-quick-*.json"))
        shoot(opened(f"/combine/{published[-1].stem}", scheme="dark"), "combination-1280-dark")
        compared = "/compare?run=result:logitclip/quick&run=result:rmix/quick"
        shoot(opened(compared), "compare-1280-light")
        page = opened("/mrclens")
        page.get_by_label("SQuAD v1.1 or v2.0").set_input_files(real if real.is_file() else squad)
        page.get_by_role("button", name="Audit it").click()
        page.locator(".findings").wait_for()
        shoot(page, "mrclens-1280-light")
        shoot(opened(page.url.removeprefix(address), 390, "dark"), "mrclens-390-dark")
        shoot(opened("/runs", 1280), "runs-1280-light")
