"""Every claim on images or texts also takes the user's own: three classes, unequal sizes, and a file that is broken."""

import pytest
import torch
from PIL import Image

from paperworks.bench import Run, load_claim
from paperworks.errors import UserError

COUNTS = {"cat": 150, "frog": 90, "truck": 60}


def write_classes(folder, draw, counts=COUNTS):
    for k, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            side = 18 if i % 5 else 20
            pixels = torch.randint(0, 128, (side, side, 3), generator=draw, dtype=torch.uint8)
            pixels[..., k] += 100
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:03}.png")
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a class")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    write_classes(folder := tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("places"), torch.Generator().manual_seed(0)
    for place in ("day", "dusk", "night"):
        write_classes(folder / place, draw, {name: count // 3 for name, count in COUNTS.items()})
    return folder


def measure(slug, arm, folder, **settings):
    claim = load_claim(slug)
    run = Run(seed=0, scale="smoke", device="cpu", data_root=None, folder=folder, keep=lambda name, content: None)
    return claim.trial(run, arm, claim.settings.at("smoke", settings))


CASES = [
    ("logitclip", "logitclip", "photos", {}),
    ("rmix", "rmix", "photos", {}),
    ("sent", "sent", "photos", {}),
    ("sent", "small-loss", "photos", {}),
    ("gradfilter", "r2", "photos", {"sizes": "[100, 100, 99]"}),
    ("ddg", "ddg", "places", {}),
    ("iern", "iern", "places", {}),
]


@pytest.mark.parametrize(("slug", "arm", "source", "settings"), CASES, ids=[f"{slug}-{arm}" for slug, arm, *_ in CASES])
def test_own_images(slug, arm, source, settings, request, tmp_path):
    settings = {"data": str(request.getfixturevalue(source)), "image_size": "16"} | settings
    with pytest.raises(UserError, match=r"broken\.png.*skip_broken"):
        measure(slug, arm, tmp_path / "strict", **settings)
    with pytest.warns(UserWarning, match=r"skipped.*broken\.png"):
        metrics = measure(slug, arm, tmp_path / "lenient", **settings, skip_broken="true")
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


@pytest.mark.filterwarnings("ignore:skipped")
def test_generalisation_needs_domains_to_train_on(places, tmp_path):
    (two := tmp_path / "two").mkdir()
    for place in ("day", "night"):
        (two / place).symlink_to(places / place)
    with pytest.raises(UserError, match="at least 3 domains, two of them to train on, got day, night"):
        measure("ddg", "erm", tmp_path / "run", data=str(two), skip_broken="true")


def test_own_texts(tmp_path):
    lines = ["text,label"]
    for label, count in (("world", 300), ("sports", 200), ("business", 120)):
        lines += [f"{label} news number {i} of today,{label}" for i in range(count)]
    table = tmp_path / "news.csv"
    table.write_text("\n".join(lines))
    metrics = measure("sent", "all", tmp_path / "run", data=str(table))
    assert metrics["symmetric_accuracy"] > 0.4
    table.write_text("\n".join([*lines, "a line without a label"]))
    with pytest.raises(UserError, match="label column 'label' is empty in row 621"):
        measure("sent", "all", tmp_path / "again", data=str(table))
