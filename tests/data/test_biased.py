import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paperworks.data import DatasetNotFound, LabelledData
from paperworks.data.biased import (
    SourcedData,
    confounded_split,
    digit_styles,
    leave_one_source_out,
    load_folders,
    load_mixbasic,
    merge,
    mixed_folds,
    printed_digits,
    segment_digits,
)
from paperworks.errors import UserError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def crossed(classes, sources, each):
    """Labels and sources with ``each`` examples of every pair."""
    cells = torch.arange(classes * sources).repeat_interleave(each)
    return cells // sources, cells % sources


def small(n, classes=("a", "b"), fill=0.5, name="set"):
    return LabelledData(torch.full((n, 1, 4, 4), fill), torch.arange(n) % len(classes), tuple(classes), name)


# confounded_split


@pytest.mark.parametrize(("bias", "at_home"), [(1.0, 100), (0.95, 95), (0.9, 90), (1 / 3, 33)])
def test_the_home_source_gives_its_share_of_each_class(bias, at_home):
    labels, sources = crossed(6, 3, 200)
    parts = confounded_split(labels, sources, bias, seeded())
    cells = (labels * 3 + sources)[parts.train].bincount(minlength=18).view(6, 3)
    assert parts.home.tolist() == [0, 0, 1, 1, 2, 2]
    per_class = cells.sum(1)
    assert (per_class == per_class[0]).all()
    share = cells[torch.arange(6), parts.home] / per_class
    torch.testing.assert_close(share, torch.full((6,), at_home / 100), atol=0.01, rtol=0)


def test_held_out_examples_are_in_style_at_home_and_out_of_style_elsewhere():
    labels, sources = crossed(6, 3, 40)
    parts = confounded_split(labels, sources, 0.95, seeded())
    assert (parts.home[labels[parts.in_style]] == sources[parts.in_style]).all()
    assert (parts.home[labels[parts.out_of_style]] != sources[parts.out_of_style]).all()
    assert (labels * 3 + sources)[torch.cat(parts[1:3])].bincount(minlength=18).tolist() == [10] * 18


@settings(max_examples=40, deadline=None)
@given(
    bias=st.floats(0.2, 1),
    each=st.integers(8, 60),
    num_classes=st.integers(3, 6),
    num_sources=st.integers(2, 3),
    seed=st.integers(0, 10),
)
def test_parts_are_disjoint_and_as_large_as_the_cells_allow(bias, each, num_classes, num_sources, seed):
    labels, sources = crossed(num_classes, num_sources, each)
    parts = confounded_split(labels, sources, bias, seeded(seed))
    used = torch.cat(parts[:3])
    assert len(used.unique()) == len(used)
    again = confounded_split(labels, sources, bias, seeded(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    left = each - round(0.25 * each)
    cells = (labels * num_sources + sources)[parts.train].bincount(minlength=num_classes * num_sources)
    assert cells.max() >= left - 2 * num_sources  # some cell is (nearly) used up
    assert cells.max() <= left


def test_homes_can_be_given():
    labels, sources = crossed(3, 3, 20)
    parts = confounded_split(labels, sources, 1.0, seeded(), home=[2, 0, 1])
    assert (sources[parts.train] == torch.tensor([2, 0, 1])[labels[parts.train]]).all()


def test_a_source_without_training_example_is_named():
    labels, sources = crossed(2, 3, 20)
    with pytest.raises(UserError, match=r"source 2 has no training example: with bias=1.0"):
        confounded_split(labels, sources, 1.0, seeded())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": 1.5}, "bias must be from 0 to 1, got 1.5"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1"),
        ({"sources": torch.zeros(120, dtype=torch.int64)}, "at least 2 sources, got 1"),
        ({"labels": -torch.ones(120, dtype=torch.int64)}, "labels"),
        ({"home": [0, 1]}, "home must name a source for each of the 4 classes, got 2"),
        ({"home": [0, 1, 2, 3]}, r"home\[3\] is 3, expected 0 to 2"),
    ],
)
def test_bad_arguments_of_confounded_split(changed, message):
    labels, sources = crossed(4, 3, 10)
    arguments = {"labels": labels, "sources": sources, "bias": 0.9, "generator": seeded()} | changed
    with pytest.raises(UserError, match=message):
        confounded_split(**arguments)


def test_a_class_that_is_missing_in_its_home_is_named():
    labels, sources = crossed(3, 3, 10)
    keep = ~((labels == 1) & (sources == 1))
    with pytest.raises(UserError, match="class 1 has 0 examples of source 1 left to train on"):
        confounded_split(labels[keep], sources[keep], 1.0, seeded())


# merging and protocols


def test_merge_keeps_every_example_and_its_source():
    merged = merge({"x": small(4, fill=0.1), "y": small(6, fill=0.9)})
    assert merged.sources.tolist() == [0] * 4 + [1] * 6
    assert merged.source_names == ("x", "y")
    torch.testing.assert_close(merged.inputs.mean((1, 2, 3)), 0.1 + 0.8 * merged.sources)
    image, target, source = merged.subset(torch.tensor([5, 0])).dataset()[0]
    assert (float(image.mean()), int(target), int(source)) == (pytest.approx(0.9), 1, 1)


def test_merge_goes_by_class_names_not_numbers():
    parts = {"x": small(4, ("a", "b", "c")), "y": small(4, ("c", "b", "a"))}
    merged = merge(parts, classes=["c", "a"])
    assert merged.data.classes == ("c", "a")
    assert merged.targets.tolist() == [1, 0, 1, 0, 1, 0]
    assert merged.sources.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({"x": small(4)}, {}, "at least 2 sources"),
        ({"x": small(4), "y": small(4, ("a",))}, {}, "source 'y' has no class 'b'"),
        ({"x": small(4), "y": small(6, ("a", "b", "z"))}, {}, "only source 'y' has class 'z'"),
        ({"x": small(4), "y": small(4)}, {"classes": []}, "at least one class"),
        ({"x": small(4), "y": small(4, ("a", "b"))}, {"classes": ["q"]}, "source 'x' has no class 'q'"),
    ],
)
def test_sets_that_cannot_be_merged(parts, options, message):
    with pytest.raises(UserError, match=message):
        merge(parts, **options)


def test_images_of_different_size_cannot_be_merged():
    large = LabelledData(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), ("a", "b"), "large")
    with pytest.raises(UserError, match=r"\[1, 4, 4\], of 'y' \[1, 8, 8\]"):
        merge({"x": small(2), "y": large})


def test_a_source_without_example_is_named():
    with pytest.raises(UserError, match="source 'y' has no example"):
        SourcedData(small(4), torch.zeros(4, dtype=torch.int64), ("x", "y"))
    with pytest.raises(UserError, match="source 'x' has no example"):
        merge({"x": small(4), "y": small(4)}).subset(torch.tensor([5]))
    with pytest.raises(UserError, match=r"sources\[2\] is 5, expected 0 to 1"):
        SourcedData(small(4), torch.tensor([0, 1, 5, 0]), ("x", "y"))
    with pytest.raises(UserError, match="sources must have length 4"):
        SourcedData(small(4), torch.tensor([0, 1]), ("x", "y"))


def test_mixed_folds_hold_every_example_once_and_every_cell_in_each():
    data = merge({"x": small(12), "y": small(12)})
    folds = mixed_folds(data, 3, seed=0)
    tests = torch.cat([test for _, test in folds])
    assert tests.sort().values.tolist() == list(range(24))
    for train, test in folds:
        assert not set(train.tolist()) & set(test.tolist())
        assert data.cells()[test].bincount(minlength=4).tolist() == [2] * 4
    with pytest.raises(UserError, match="folds must be at least 2"):
        mixed_folds(data, 1, seed=0)


def test_the_cross_dataset_protocol_tests_on_the_source_it_did_not_train_on():
    data = merge({"x": small(4), "y": small(6), "z": small(2)})
    seen = {name: (train, test) for name, train, test in leave_one_source_out(data)}
    assert {name: len(test) for name, (_, test) in seen.items()} == {"x": 4, "y": 6, "z": 2}
    assert all(not (data.sources[train] == data.sources[test][0]).any() for train, test in seen.values())


# digits


def test_digit_styles_are_balanced_and_the_style_can_be_read_off_a_pixel_statistic(tmp_path):
    data = digit_styles(seeded(), num_classes=4, per_class=20, root=tmp_path)
    assert data.source_names == ("scan", "segments", "print")  # there is no MNIST in an empty folder
    assert data.inputs.shape == (240, 1, 16, 16)
    assert data.cells().bincount().tolist() == [20] * 12
    brightness = torch.stack([data.inputs[data.sources == m].mean() for m in range(3)])
    assert brightness[0] > 1.5 * brightness[1:].max()


def test_digit_styles_are_the_same_for_the_same_seed(tmp_path):
    first, again, other = (digit_styles(seeded(s), per_class=3, root=tmp_path) for s in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize("draw", [printed_digits, segment_digits])
def test_generated_digits_vary_yet_look_alike_within_a_class(draw):
    data = draw(30, 16, seeded())
    means = torch.stack([data.inputs[data.targets == k].mean(0) for k in range(10)])
    assert data.inputs.std(0).mean() > 0.05
    nearest = torch.cdist(data.inputs.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == data.targets).float().mean() > 0.6


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"num_classes": 11}, {"per_class": 175}, {"image_size": 4}])
def test_bad_arguments_of_digit_styles(options):
    with pytest.raises(UserError, match=next(iter(options))):
        digit_styles(seeded(), **options)


# folders


def write_images(folder, names, side=4, value=128):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (side, side), (value, value, value)).save(folder / name)


def test_folders_of_sources_are_merged(tmp_path):
    for source in ("north", "south"):
        for k in ("cat", "dog"):
            write_images(tmp_path / source / k, ["1.png", "2.png"], value=50 if source == "north" else 200)
    data = load_folders(tmp_path, image_size=8, grayscale=True)
    assert data.source_names == ("north", "south")
    assert data.data.classes == ("cat", "dog")
    assert data.inputs.shape == (8, 1, 8, 8)
    torch.testing.assert_close(data.inputs.amax((1, 2, 3)), (50 + 150 * data.sources) / 255)


def test_a_folder_with_one_source_is_an_error(tmp_path):
    write_images(tmp_path / "north" / "cat", ["1.png"])
    with pytest.raises(UserError, match="at least 2 sources, found north"):
        load_folders(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        load_folders(tmp_path / "north" / "cat" / "1.png")


# Mix-Basic


@pytest.fixture
def mixbasic(tmp_path):
    root = tmp_path / "MixBasic"
    names = {"CKPlus": "S005_001_00000009", "MMI": "S001_001", "OuluCASIA": "P001_Anger_007"}
    for source, name in names.items():
        write_images(root / source / "images", [f"{name}.png"])
    emotions = zip(names.items(), ("Disgust", "Fear", "Surprise"), strict=True)
    labels = {f"{source.lower()}_{name}": emotion for (source, name), emotion in emotions}
    (root / "emotion_labels.pkl").write_bytes(pickle.dumps(labels))
    lines = "\n".join(f"MixBasic/{source}/images/{name}.png" for source, name in names.items())
    (root / "train_ids_bias90v2.csv").write_text(lines + "\n")
    return root


def test_mixbasic_is_read_in_its_official_layout(mixbasic):
    data = load_mixbasic(mixbasic, bias=90, fold=2, image_size=16)
    assert data.inputs.shape == (3, 3, 16, 16)
    assert data.source_names == ("CKPlus", "MMI", "OuluCASIA")
    assert data.sources.tolist() == [0, 1, 2]
    assert [data.data.classes[k] for k in data.targets] == ["Disgust", "Fear", "Surprise"]
    assert data.data.name == "mixbasic/bias90v2/train"


def test_what_is_wrong_with_a_mixbasic_folder_is_named(mixbasic, tmp_path):
    with pytest.raises(DatasetNotFound, match="ask for CK\\+, MMI and Oulu-CASIA from their owners"):
        load_mixbasic(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train_ids_bias100v1.csv cannot be read"):
        load_mixbasic(mixbasic)
    with pytest.raises(UserError, match="got 'train', 95, 1"):
        load_mixbasic(mixbasic, bias=95)
    (mixbasic / "train_ids_bias90v1.csv").write_text("MixBasic/MMI/images/unknown.png\n")
    with pytest.raises(UserError, match=r"line 1: emotion_labels.pkl has None for 'mmi_unknown'"):
        load_mixbasic(mixbasic, bias=90)
    (mixbasic / "train_ids_bias90v1.csv").write_text("unknown.png\n")
    with pytest.raises(UserError, match=r"line 1: 'unknown.png' is not"):
        load_mixbasic(mixbasic, bias=90)
    (mixbasic / "train_ids_bias90v1.csv").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        load_mixbasic(mixbasic, bias=90)


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [pickle.dumps({"a": Harmful()}), b"", pickle.dumps(["Fear"])])
def test_labels_that_are_no_plain_dictionary_are_refused(mixbasic, content, capsys):
    (mixbasic / "emotion_labels.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"emotion_labels.pkl .*dictionary of emotions"):
        load_mixbasic(mixbasic, bias=90, fold=2)
    assert "code ran" not in capsys.readouterr().out
