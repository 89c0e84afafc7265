import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from paperworks.data import load
from paperworks.errors import UserError


def picture(value, size=(6, 4), mode="RGB"):
    return Image.new(mode, size, value)


def encoded(value, form="PNG", **options):
    buffer = io.BytesIO()
    picture(value, **options).save(buffer, form)
    return buffer.getvalue()


def save(path, value, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value, **options))
    return path


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"cat": (255, 0, 0), "ant": (0, 51, 0)}.items():
        for i in range(3):
            save(tmp_path / "pets" / name / f"{i}.png", colour)
    return tmp_path / "pets"


def test_class_folders_are_classes_in_order(folder):
    data = load(folder)
    assert data.classes == ("ant", "cat")
    assert data.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.inputs.shape == (6, 3, 4, 6)
    assert data.inputs[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 0])
    assert data.inputs[5, :, 0, 0].tolist() == [1, 0, 0]
    assert data.name == "pets"


def test_size_and_grayscale(folder):
    data = load(folder, image_size=3, grayscale=True)
    assert data.inputs.shape == (6, 1, 3, 3)
    assert data.inputs[5].unique().tolist() == pytest.approx([76 / 255])  # 0.299 of red


def test_the_centre_is_cut_out(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255  # white square in the middle of a wide image
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    assert load(tmp_path, image_size=4).inputs.min() == 1


def test_split_folders_share_one_numbering(tmp_path):
    for path in ("train/a", "train/b", "test/b"):
        save(tmp_path / path / "x.png", (9, 9, 9))
    assert load(tmp_path, split="train").targets.tolist() == [0, 1]
    test = load(tmp_path, split="test")
    assert test.targets.tolist() == [1]
    assert test.classes == ("a", "b")
    assert test.name == f"{tmp_path.name}/test"
    assert len(load(tmp_path)) == 3
    with pytest.raises(UserError, match="no split 'val', only: test, train"):
        load(tmp_path, split="val")


def test_hidden_folders_are_no_classes(folder):
    (folder / ".cache").mkdir()
    assert load(folder).classes == ("ant", "cat")


@pytest.mark.filterwarnings("ignore:.*skipped 1 of 2")
def test_limit_reads_only_what_was_drawn(folder):
    (folder / "ant" / "0.png").write_bytes(b"broken")
    sizes = [len(load(folder, limit=2, seed=seed, skip_broken=True)) for seed in range(12)]
    assert set(sizes) == {1, 2}  # one of each class; the broken one counts only where it was drawn


def test_broken_images_are_all_found_and_the_first_five_named(folder):
    whole = encoded((1, 2, 3), size=(64, 64))
    (folder / "ant" / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "1.png").write_bytes(b"")
    (folder / "cat" / "2.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="3 of 6 images cannot be read") as caught:
        load(folder)
    message = str(caught.value)
    assert "0.png" in message
    assert "1.png (empty)" in message
    assert "2.png (not an image)" in message
    assert "skip_broken" in message
    for i in range(10, 15):
        (folder / "ant" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="8 of 11 images") as caught:
        load(folder)
    assert str(caught.value).count(".png") == 5
    assert "\n" not in str(caught.value)


def test_broken_images_can_be_skipped_with_a_warning(folder):
    whole = encoded((1, 2, 3), size=(64, 64))
    (folder / "ant" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"skipped 1 of 6 images that cannot be read.*1\.png"):
        data = load(folder, skip_broken=True)
    assert data.targets.tolist() == [0, 0, 1, 1, 1]
    assert len(data.inputs) == 5


def test_nothing_but_broken_images_is_an_error_even_if_they_may_be_skipped(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images"):
        load(tmp_path, skip_broken=True)


def test_deep_pixels_are_refused_not_clipped(folder):
    save(folder / "cat" / "deep.png", 40_000, mode="I;16")
    with pytest.raises(UserError, match=r"deep\.png \(pixels of mode I"):
        load(folder)


def test_images_of_different_sizes_are_named(folder):
    save(folder / "cat" / "9.png", (0, 0, 0), size=(5, 5))
    with pytest.raises(UserError, match=r"0\.png is 6x4 and .*9\.png is 5x5 pixels: set image_size"):
        load(folder)
    assert load(folder, image_size=4).inputs.shape == (7, 3, 4, 4)


def test_folders_without_images_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither class folders .* nor parquet files"):
        load(tmp_path / "empty")
    (folder / "bee").mkdir()
    (folder / "bee" / "notes.txt").write_text("none yet")
    with pytest.raises(UserError, match="bee holds no images"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "label"}, "applies to tables"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"split": "train"}, "no split 'train'"),
    ],
)
def test_arguments_that_do_not_apply_are_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        load(folder, **options)


def write_parquet(path, labels, column="label", names=None, images=None):
    images = images or [
        {"bytes": encoded((k * 51 if k in range(6) else 0, 0, 0)), "path": f"{i}.png"} for i, k in enumerate(labels)
    ]
    table = pa.table({"img": images, column: labels})
    if names:
        info = {"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_hub_parquet_by_split_in_several_files(tmp_path):
    for i, labels in enumerate(([0, 1], [2, 1])):
        write_parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", labels, names=["x", "y", "z"])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [1], names=["x", "y", "z"])
    train, test = load(tmp_path, split="train"), load(tmp_path, split="test")
    assert train.targets.tolist() == [0, 1, 2, 1]
    assert train.inputs[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 0.4, 0.2])
    assert test.classes == train.classes == ("x", "y", "z")
    assert len(load(tmp_path)) == 5


def test_labels_without_names_name_themselves_alike_in_all_splits(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["dog", "cat"])
    write_parquet(tmp_path / "test.parquet", ["dog"])
    test = load(tmp_path, split="test")
    assert test.classes == ("cat", "dog")
    assert test.targets.tolist() == [1]


def test_one_parquet_file_and_its_label_column(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [3, 5], column="coarse")
    assert load(path).classes == ("3", "5")
    with pytest.raises(UserError, match=r"no column 'coarze'\. Did you mean 'coarse'"):
        load(path, target="coarze")


def test_labels_that_the_names_do_not_cover_are_located(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1], names=["x", "y"])
    write_parquet(tmp_path / "test.parquet", [0, -1], names=["x", "y"])
    assert len(load(tmp_path, split="train")) == 2
    with pytest.raises(UserError, match=r"column 'label'\[1\] is -1, expected 0 to 1"):
        load(tmp_path, split="test")


def test_broken_parquet_rows_and_files_are_named(tmp_path):
    images = [{"bytes": encoded((0, 0, 0)), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    write_parquet(tmp_path / "train.parquet", [0, 1], images=images)
    with pytest.raises(UserError, match=r"row 1 \(b\.png\) \(empty\)"):
        load(tmp_path)
    (tmp_path / "test.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=r"test\.parquet cannot be read as parquet"):
        load(tmp_path)


def test_a_folder_of_parquet_tables_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1.0], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="no column of images"):
        load(tmp_path)
    pq.write_table(pa.table({"img": [{"bytes": b"", "path": ""}]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="needs one of labels"):
        load(tmp_path)


def test_inputs_are_float32_in_the_unit_interval(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(noise).save(tmp_path / "a" / "x.png")
    inputs = load(tmp_path).inputs
    assert inputs.dtype == torch.float32
    assert torch.equal((inputs[0] * 255).round().byte(), torch.from_numpy(noise).permute(2, 0, 1))
