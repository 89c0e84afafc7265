import html
import io
import os
import re
import shutil
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

gr = pytest.importorskip("gradio", reason="the extra app is not installed")
from gradio_client import Client, handle_file  # noqa: E402

from paperworks.app.robustar import serve  # noqa: E402
from paperworks.audit.robustar import RobustarProject  # noqa: E402
from paperworks.commands.robustar import make_classifier, open_project, robustar  # noqa: E402
from paperworks.errors import UserError  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GREEN, CORNER = (0, 160, 0), (250, 240, 0)
ODD = "<img src=x onerror=document.title='pwned'>&amp;.png"


def picture(label: str, index: int) -> np.ndarray:
    image = np.full((16, 16, 3), GREEN, np.uint8)
    image[8:, 8:] = 40 + 10 * index
    image[:4, :4] = CORNER if label == "day" else (0, 0, 90)
    return image


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustar") / "project"
    for split, count in (("train", 35), ("test", 3)):
        for label in ("day", "night"):
            for index in range(count):
                write(folder / split / label / f"{index:02d}.png", picture(label, index % 20))
    write(folder / "train/day" / ODD, picture("day", 0))
    return folder


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 2))


@contextmanager
def served(project: RobustarProject, auth=None):
    started, seen = threading.Event(), []

    def ready(server, address):
        seen.extend([server, address])
        started.set()

    thread = threading.Thread(target=serve, args=(project, "127.0.0.1", 0, auth, ready))
    thread.start()
    assert started.wait(60)
    while not seen[0].started:
        time.sleep(0.05)
    yield seen[1]
    seen[0].should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def project(root):
    return RobustarProject(root, network())


@pytest.fixture(scope="module")
def address(project):
    with served(project) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture
def clean(project):
    yield project
    project.tasks.cancel()
    if project.tasks.last:
        project.tasks.last.wait(30)
    project.clear_masks()
    project.clear_masks(proposals=True)


def call(client, name, *args):
    return client.predict(*args, api_name=f"/{name}")


def drawn(tmp_path, mask: np.ndarray, factor: int = 32) -> dict:
    """What the editor sends: the mask painted on a layer."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (255, 0, 80, 255)
    write(tmp_path / "layer.png", layer.repeat(factor, 0).repeat(factor, 1))
    return {"background": None, "layers": [handle_file(str(tmp_path / "layer.png"))], "composite": None}


def wait(client, *states: str) -> str:
    for _ in range(600):
        if (said := call(client, "status")[0]) and any(state in said for state in states):
            return said
        time.sleep(0.1)
    raise AssertionError(said)


# The API.


def test_a_page_of_images(client):
    gallery, number, names, found = call(client, "images", "train", "all classes", "all", 2)
    assert (number, found) == (2, "71 images, 2 pages")
    assert len(gallery) == len(names) == 11
    assert names[-1] == "train/night/34.png"
    assert gallery[-1]["caption"] == "night/34.png"
    with Image.open(gallery[-1]["image"]) as small:
        assert small.size == (160, 160)


def test_an_image_with_its_probabilities(client):
    editor, _, said, note = call(client, "open", "train/day/00.png")
    with Image.open(editor["background"]) as large:
        assert large.size == (512, 512)
    assert {row["label"] for row in said["confidences"]} == {"day", "night"}
    assert note == ""
    assert call(client, "predict", "train/day/00.png")["label"] in ("day", "night")


def test_what_is_painted_is_saved_pixel_by_pixel(client, clean, root, tmp_path):
    mask = np.random.default_rng(0).random((16, 16)) < 0.3
    assert call(client, "save_mask", "train/day/00.png", drawn(tmp_path, mask)) == "saved the mask of train/day/00.png"
    assert (np.asarray(Image.open(root / "paired/day/00.png.png")) == mask * 255).all()
    call(client, "delete_mask", "train/day/00.png")
    assert not (root / "paired/day/00.png.png").exists()


def test_pixels_of_like_colour_are_marked(client, clean):
    editor = call(client, "mark_colour", "train/day/00.png", None, 3, 40, 40)
    alpha = np.asarray(Image.open(editor["layers"][0]))[..., 3] > 0
    expected = np.zeros((16, 16), bool)
    expected[:4, :4] = True
    assert (alpha[::32, ::32] == expected).all()


def test_explanations(client):
    with Image.open(call(client, "explain", "test/day/00.png", "smooth")) as shown:
        assert shown.size == (512, 512)
    helpful, harmful = call(client, "influence", "test/day/00.png")
    assert len(helpful) == len(harmful) == 8
    assert re.fullmatch(r"-\S+ train/\S+", helpful[0]["caption"])


def test_proposals_training_and_cancelling(client, clean, root, tmp_path):
    call(client, "propose", "saliency", 0, 3)
    assert wait(client, "done", "failed") == "propose: done"
    assert call(client, "images", "proposed", "all classes", "all", 1)[3] == "4 images, 1 pages"
    call(client, "load_proposal", "train/day/01.png")
    mask = np.zeros((16, 16), bool)
    mask[:4, :4] = True
    call(client, "save_mask", "train/day/01.png", drawn(tmp_path, mask))
    assert call(client, "train", 100_000, 0.001, 0.1, "random_pure", 64).startswith("train: running")
    with pytest.raises(Exception, match=r"train: running .*wait for it or cancel it first"):
        call(client, "propose", "saliency", 0, 3)
    call(client, "cancel")
    assert wait(client, "cancelled", "done") == "train: cancelled"
    call(client, "train", 2, 0.01, 0.1, "random_pure", 64)
    assert wait(client, "done", "failed") == "train: done"
    _, table, checkpoints, *_ = call(client, "status")
    assert [row[0] for row in table["data"]] == ["0000", "0001"]
    assert (root / "checkpoints/0001.pt").exists()
    assert call(client, "use", "0000") == "checkpoint 0000 is in use"
    assert checkpoints["value"] == "0001"


def test_masks_go_out_and_come_in(client, clean, tmp_path):
    call(client, "save_mask", "train/day/02.png", drawn(tmp_path, np.ones((16, 16), bool)))
    archive = call(client, "export_masks")
    assert zipfile.ZipFile(archive).namelist() == ["paired/day/02.png.png"]
    with pytest.raises(Exception, match="type: clear all"):
        call(client, "clear_masks", "yes")
    assert call(client, "clear_masks", "clear all") == "moved 1 masks to the trash"
    assert call(client, "import_masks", handle_file(archive), False).startswith("accepted 1, refused 0")
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(Exception, match="not a ZIP archive"):
        call(client, "import_masks", handle_file(str(tmp_path / "no.zip")), False)
    assert "nothing" in call(client, "skipped")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "train/../../x.png", "train/day", "", "train/day/nope.png"]
)
@pytest.mark.parametrize("endpoint", ["open", "predict", "influence", "load_proposal", "clear_drawing", "delete_mask"])
def test_only_images_of_the_project_are_opened(client, endpoint, name):
    with pytest.raises(Exception, match="the project has no image"):
        call(client, endpoint, name)


def test_drawings_are_parsed_safely(client, clean, tmp_path, root):
    write(tmp_path / "small.png", np.zeros((20, 20, 4), np.uint8))
    Image.new("RGB", (512, 512)).save(tmp_path / "photo.jpg")
    (tmp_path / "junk.png").write_bytes(b"\x89PNG\r\n\x1a\njunk")
    for file, message in (
        ("small.png", "must be 512x512 pixels, got 20x20"),
        ("photo.jpg", "a layer of the drawing is not a PNG image"),
        ("junk.png", "a layer of the drawing is not a PNG image"),
    ):
        layers = {"background": None, "layers": [handle_file(str(tmp_path / file))], "composite": None}
        with pytest.raises(Exception, match=message):
            call(client, "save_mask", "train/day/00.png", layers)
    assert not (root / "paired/day/00.png.png").exists()


def test_messages_are_text(client):
    with pytest.raises(Exception, match="the project has no image") as caught:
        call(client, "open", "<script>alert(1)</script>")
    assert "<script>" not in str(caught.value)
    assert html.escape("<script>") in str(caught.value)


def fetch(address: str, path: str = "/", **headers: str) -> tuple[int, bytes]:
    try:
        with urlopen(Request(address + path, headers=headers), timeout=20) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def test_no_file_but_thumbnails_is_served(address, client, project, root):
    thumbnail = project.thumbnail("train/day/00.png")
    assert fetch(address, f"/gradio_api/file={quote(str(thumbnail))}")[0] == 200
    for path in (
        root / "train/day/00.png",
        root / ".robustar/facts.sqlite",
        thumbnail.parent / "../facts.sqlite",
        root.parent / "project",
        Path("/etc/passwd"),
        Path(__file__),
    ):
        assert fetch(address, f"/gradio_api/file={quote(str(path))}")[0] in (403, 404), path
    link = project.thumbnails / "link.webp"
    link.symlink_to("/etc/passwd")
    try:
        status, content = fetch(address, f"/gradio_api/file={quote(str(link))}")
        assert status in (403, 404) or b"root:" not in content
    finally:
        link.unlink()


def test_names_from_elsewhere_are_refused(address):
    assert fetch(address)[0] == 200
    assert fetch(address, Host="evil.example")[0] == 400


def test_uploads_are_limited_in_size(address, monkeypatch):
    boundary = "b"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.zip"\r\n\r\n'
        + bytes(65 * 2**20)
        + b"\r\n--b--\r\n"
    )
    request = Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with pytest.raises((HTTPError, OSError)) as caught:
        urlopen(request, timeout=60)
    assert getattr(caught.value, "code", 413) == 413


def test_a_password_keeps_others_out(tmp_path):
    for label in ("day", "night"):
        write(tmp_path / "train" / label / "0.png", picture(label, 0))
    with served(RobustarProject(tmp_path, network()), ("ada", "secret")) as address:
        assert fetch(address, "/config")[0] == 401
        assert fetch(address, "/gradio_api/info")[0] == 401
        with pytest.raises(Exception, match="Could not login"):
            Client(address, auth=("ada", "wrong"), verbose=False)
        assert call(Client(address, auth=("ada", "secret"), verbose=False), "predict", "train/day/0.png")


def test_a_second_server_and_a_taken_port_are_clear_errors(address, project, root, tmp_path):
    with pytest.raises(UserError, match="another server works on"):
        serve(RobustarProject(root, network()), "127.0.0.1", 0)
    write(tmp_path / "train/day/0.png", picture("day", 0))
    write(tmp_path / "train/night/0.png", picture("day", 0))
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use"):
        serve(RobustarProject(tmp_path, network()), "127.0.0.1", int(address.rpartition(":")[2]))


def test_two_people_at_once(client, clean, address, tmp_path):
    other, errors = Client(address, verbose=False), []

    def person(client, value, folder):
        folder.mkdir()
        layers = drawn(folder, np.full((16, 16), value))
        try:
            for index in range(6):
                call(client, "save_mask", f"train/day/0{index % 3}.png", layers)
                call(client, "open", f"train/day/0{index % 3}.png")
        except Exception as error:
            errors.append(error)

    people = [
        threading.Thread(target=person, args=(one, value, tmp_path / str(value)))
        for one, value in ((client, True), (other, False))
    ]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    assert errors == []
    assert len(clean.masks()) == 3
    assert all(mask.all() or not mask.any() for mask in clean.masks().values())


# The command.


def test_beyond_loopback_a_password_is_needed(root):
    result = CliRunner().invoke(robustar, ["serve", str(root), "--model", "resnet18", "--host", "0.0.0.0"])
    assert "--host 0.0.0.0 opens the page to others: give --auth USER:PASSWORD" in str(result.exception)
    for wrong in ("ada", "ada:", ":secret"):
        result = CliRunner().invoke(robustar, ["serve", str(root), "--model", "resnet18", "--auth", wrong])
        assert "--auth must be USER:PASSWORD" in str(result.exception)


def test_models_are_made_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "project"
    for label in ("day", "night"):
        write(root / "train" / label / "00.png", picture(label, 0))
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\ndef make(n): return nn.Sequential(nn.Flatten(), nn.Linear(768, n))\n"
    )
    options = {"weights": None, "image_size": None, "channels": "3", "mean": "0", "std": "1", "device": "cpu"}
    project = open_project(root, model="mynet:make", **options)
    assert set(project.predict("train/day/00.png")) == {"day", "night"}
    assert make_classifier("squeezenet1_0", 3)(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(UserError, match=r"--model 'resnet8' is no classifier of torchvision. Did you mean 'resnet18'"):
        make_classifier("resnet8", 2)
    with pytest.raises(UserError, match="cannot import nowhere: No module named 'nowhere'"):
        make_classifier("nowhere:make", 2)
    torch.save({"a": torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=r"wrong\.pt holds no weights of this model"):
        open_project(root, model="mynet:make", **options | {"weights": tmp_path / "wrong.pt"})
    with pytest.raises(UserError, match="--mean must be numbers with commas between, got 'a,b'"):
        open_project(root, model="mynet:make", **options | {"mean": "a,b"})


# In a browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(browser, address, width=1280, scheme="light"):
    """A page of its own, on which nothing may go wrong and nothing may be fetched from elsewhere."""
    context = browser.new_context(viewport={"width": width, "height": 1500}, color_scheme=scheme)
    page, outside, errors = context.new_page(), [], []
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or outside.append(r.url))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#gallery button img", timeout=60_000)
    yield page
    assert outside == []
    assert errors == []
    context.close()


def choose(page, name: str) -> None:
    page.locator("#current textarea, #current input").fill(name)
    page.locator("#current textarea, #current input").press("Enter")
    page.wait_for_function("document.querySelector('#editor canvas') !== null", timeout=60_000)


def canvas_frame(page) -> tuple[float, float, float]:
    """Where the picture lies on the screen: left, top, and pixels of the screen a pixel of the image."""
    place = page.locator("#editor canvas").first.bounding_box()
    for _ in range(100):
        shot = np.asarray(Image.open(io.BytesIO(page.screenshot(clip=place))).convert("RGB")).astype(int)
        rows, columns = np.nonzero(np.abs(shot - GREEN).max(2) < 8)
        if len(rows) > 1000:
            # Green reaches the right edge of the upper half and the bottom edge of the left half.
            right, bottom, top, left = columns.max() + 1, rows.max() + 1, rows.min(), columns.min()
            return place["x"] + left, place["y"] + top, (right - left + bottom - top) / 32
        page.wait_for_timeout(200)
    raise AssertionError("the picture does not appear")


@pytest.mark.browser
def test_what_the_mouse_paints_is_in_the_mask_file(browser, address, clean, root):
    mask_file = root / "paired/night/03.png.png"
    with visiting(browser, address) as page:
        choose(page, "train/night/03.png")
        canvas_frame(page)
        page.get_by_label("Brush", exact=True).click()
        page.wait_for_timeout(500)
        left, top, scale = canvas_frame(page)

        def at(column: int, row: int) -> tuple[float, float]:
            return left + (column + 0.5) * scale, top + (row + 0.5) * scale

        page.mouse.move(*at(5, 6))
        page.mouse.down()
        page.mouse.move(*at(9, 6), steps=12)
        page.mouse.up()
        page.wait_for_timeout(500)
        if shots := os.environ.get("PAPERWORKS_SCREENSHOTS"):
            page.screenshot(path=Path(__file__).parents[2] / shots / "robustar-1280-light.png")
        page.get_by_role("button", name="Save mask").click()
        page.wait_for_function("document.querySelector('#said textarea, #said input').value.startsWith('saved')")
        # and it goes on with the next image
        page.wait_for_function("document.querySelector('#current textarea, #current input').value.endsWith('04.png')")
    expected = np.zeros((16, 16), bool)
    expected[6, 5:10] = True
    assert np.argwhere(np.asarray(Image.open(mask_file)) == 255).tolist() == np.argwhere(expected).tolist()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_follows_the_colour_scheme(browser, address, width, scheme):
    with visiting(browser, address, width, scheme) as page:
        choose(page, "train/day/00.png")
        canvas_frame(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        edges = page.locator("#gallery button img").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().right)"
        )
        assert max(edges) <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        level = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert level > 200 if scheme == "light" else level < 60


@pytest.mark.browser
def test_names_are_shown_as_text(browser, address, clean):
    with visiting(browser, address) as page:
        choose(page, f"train/day/{ODD}")
        canvas_frame(page)
        assert page.get_by_text(ODD.partition(".")[0][:20]).count() >= 1
        choose(page, "<img src=x onerror=document.title='pwned'>")
        page.get_by_text("the project has no image").wait_for()
        assert page.title() == "Robustar"
        assert page.locator("img[src='x']").count() == 0
