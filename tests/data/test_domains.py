import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import RandomHorizontalFlip

from paperworks.data import LabelledData, load
from paperworks.data.domains import ANGLES, DomainData, DomainFolders, rotate, rotated
from paperworks.errors import UserError

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


def images(n=60, side=8):
    generator = torch.Generator().manual_seed(0)
    return LabelledData(
        torch.rand(n, 1, side, side, generator=generator), torch.arange(n) % 3, ("a", "b", "c"), "noise"
    )


@pytest.fixture
def folders(tmp_path):
    for domain in ("art", "photo", "sketch"):
        for name, colour in COLOURS.items():
            (folder := tmp_path / domain / name).mkdir(parents=True)
            for i in range(2 if domain == "art" else 3):
                Image.new("RGB", (12, 8), colour).save(folder / f"{i}.jpg")
    (tmp_path / ".cache").mkdir()
    return tmp_path


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_no_image_is_in_two_domains(count, seed):
    domains = rotated(images(), [11.0 * k for k in range(count)], seed=seed)
    assert sorted(domains.source.tolist()) == list(range(60))
    sizes = domains.domains.bincount(minlength=count)
    assert sizes.max() - sizes.min() <= 1


def test_each_domain_is_turned_by_its_own_angle():
    data = images()
    domains = rotated(data, (0.0, 90.0), seed=1)
    upright, turned = domains.domains == 0, domains.domains == 1
    source = data.inputs[domains.source]
    torch.testing.assert_close(domains.data.inputs[upright], source[upright])
    torch.testing.assert_close(domains.data.inputs[turned], source[turned].rot90(1, (-2, -1)), atol=1e-5, rtol=0)
    assert torch.equal(domains.data.targets, data.targets[domains.source])
    assert domains.domain_names == ("0", "90")


def test_rotation_stays_in_range_and_fills_corners_with_black():
    turned = rotate(torch.ones(1, 3, 8, 8), 45.0)
    assert turned.min() == 0
    assert turned.max() <= 1
    assert turned[0, :, 0, 0].eq(0).all()


def test_one_domain_is_left_out():
    everything = rotated(load("digits", limit=120), seed=0)
    train, test = everything.leave_out("75")
    assert len(train) == 100
    assert set(train.domains.tolist()) == {0, 1, 2, 3, 4}
    assert set(test.domains.tolist()) == {5}
    image, target, domain = train.dataset()[3]
    assert torch.equal(image, train.data.inputs[3])
    assert (target, domain) == (train.data.targets[3], train.domains[3])


def test_the_seed_deals():
    first, again, other = (rotated(images(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.data.inputs, again.data.inputs)
    assert not torch.equal(first.source, other.source)


@pytest.mark.parametrize(
    ("angles", "message"),
    [
        ((0.0,), "two different"),
        ((0.0, 15.0, 15.0), "two different"),
        ([float(k) for k in range(61)], "too few for 61 domains"),
    ],
)
def test_impossible_angles_are_refused(angles, message):
    with pytest.raises(UserError, match=message):
        rotated(images(), angles)


def test_tables_are_not_rotated():
    with pytest.raises(UserError, match="only images can be rotated"):
        rotated(load("iris"))


def test_an_unknown_domain_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"unknown domain '76'\. Did you mean '75'"):
        rotated(images(), ANGLES).leave_out("76")


def test_labels_and_domains_of_different_length_are_refused():
    with pytest.raises(UserError, match="got 60, 59 and 60"):
        DomainData(images(), torch.zeros(59, dtype=torch.int64), ("x",), torch.arange(60))
    with pytest.raises(UserError, match="must be 0 to 0"):
        DomainData(images(), torch.ones(60, dtype=torch.int64), ("x",), torch.arange(60))


def test_folders_are_domains_of_classes(folders):
    data = DomainFolders(folders, image_size=8)
    assert data.domain_names == ("art", "photo", "sketch")
    assert data.classes == ("cat", "dog")
    assert len(data) == 4 + 6 + 6
    for index, (image, target, domain) in enumerate(data):
        assert image.shape == (3, 8, 8)
        assert image.argmax(0).eq(2 * target).all()  # red cats, blue dogs
        assert (target, domain) == (data.targets[index], data.domains[index])
    assert data[-1][2] == 2
    with pytest.raises(IndexError):
        data[16]


def test_folders_feed_loaders_and_leave_one_out(folders):
    train, test = DomainFolders(folders, 8, transform=RandomHorizontalFlip(1.0)).leave_out("photo")
    domains = torch.cat([domains for _, _, domains in DataLoader(train, batch_size=4)])
    assert sorted(domains.tolist()) == [0] * 4 + [2] * 6
    assert {domain for _, _, domain in test} == {1}


def test_folders_fit_in_memory(folders):
    data = DomainFolders(folders, image_size=4).in_memory()
    assert data.data.inputs.shape == (16, 3, 4, 4)
    assert data.data.classes == ("cat", "dog")


def test_a_corrupt_file_is_named(folders):
    (folders / "photo" / "dog" / "1.jpg").write_bytes(b"no picture")
    data = DomainFolders(folders, image_size=8)
    broken = next(i for i in range(len(data)) if data.domains[i] == 1 and data.targets[i] == 1) + 1
    data[broken - 1]
    with pytest.raises(UserError, match=r"photo/dog/1\.jpg cannot be read"):
        data[broken]
    with pytest.warns(UserWarning, match=r"skipped: .*photo/dog/1\.jpg"):
        rest = data.in_memory(skip_broken=True)
    assert (len(rest), rest.data.targets.bincount().tolist()) == (15, [8, 7])


def test_a_class_that_a_domain_lacks_is_named(folders):
    for file in (folders / "sketch" / "cat").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="sketch/cat holds no images"):
        DomainFolders(folders)
    (folders / "sketch" / "cat").rmdir()
    with pytest.raises(UserError, match="domain 'sketch' has no folder of class 'cat'"):
        DomainFolders(folders)


def test_folders_need_two_domains(folders):
    with pytest.raises(UserError, match="at least two folders of domains, got 0"):
        DomainFolders(folders / "art" / "cat")
    with pytest.raises(UserError, match="not a folder"):
        DomainFolders(folders / "arts")
