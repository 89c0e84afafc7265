import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from paperworks.data import DatasetNotFound, load
from paperworks.errors import UserError

real = pytest.mark.skipif(not os.environ.get("PAPERWORKS_DATA"), reason="PAPERWORKS_DATA is not set")


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1797, 1, 8, 8), 10),
        ("iris", (150, 4), 3),
        ("wine", (178, 13), 3),
        ("breast_cancer", (569, 30), 2),
    ],
)
def test_bundled_sets(name, shape, classes):
    data = load(name)
    assert data.inputs.shape == shape
    assert data.num_classes == classes
    assert data.targets.unique().tolist() == list(range(classes))
    assert data.name == name


def test_digits_are_scaled_and_can_be_enlarged():
    data = load("digits", limit=50)
    assert data.inputs.min() == 0
    assert data.inputs.max() == 1
    large = load("digits", limit=50, image_size=16, grayscale=True)
    assert large.inputs.shape == (50, 1, 16, 16)
    assert large.inputs.max() <= 1
    assert large.targets.equal(data.targets)


def test_limit_is_stratified_and_seeded():
    data = load("iris", limit=30, seed=1)
    assert data.targets.bincount().tolist() == [10, 10, 10]
    assert load("iris", limit=30, seed=1).inputs.equal(data.inputs)
    assert not load("iris", limit=30, seed=2).inputs.equal(data.inputs)


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root, part, n, folder="MNIST", packed=True):
    images = np.arange(n * 784, dtype=np.uint32).astype(np.uint8).reshape(n, 28, 28)
    labels = (np.arange(n) % 10).astype(np.uint8)
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        data, name = idx(array), f"{part}-{kind}-ubyte"
        (raw / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return images, labels


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_mnist_is_read_as_it_was_written(tmp_path, name, folder, packed):
    images, labels = write_mnist(tmp_path, "train", 20, folder, packed)
    write_mnist(tmp_path, "t10k", 10, folder, packed)
    before = sorted(tmp_path.rglob("*"))
    train = load(name, split="train", root=tmp_path)
    assert torch.equal((train.inputs[:, 0] * 255).round().byte(), torch.from_numpy(images))
    assert train.targets.tolist() == labels.tolist()
    assert train.num_classes == 10
    assert train.name == f"{name}/train"
    assert len(load(name, root=tmp_path)) == 30
    assert load(name, split="test", root=tmp_path, image_size=32).inputs.shape == (10, 1, 32, 32)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked into the data root


def test_plain_mnist_is_what_torchvision_reads(tmp_path):
    from torchvision.datasets import MNIST

    for part, n in (("train", 20), ("t10k", 10)):
        write_mnist(tmp_path, part, n, packed=False)
    theirs, ours = MNIST(tmp_path, train=False), load("mnist", split="test", root=tmp_path)
    assert torch.equal(theirs.data / 255, ours.inputs[:, 0])
    assert torch.equal(theirs.targets, ours.targets)


def test_a_split_of_mnist_that_is_absent_is_named(tmp_path):
    write_mnist(tmp_path, "t10k", 10)
    assert len(load("mnist", split="test", root=tmp_path)) == 10
    with pytest.raises(UserError, match="no split 'train', only: test"):
        load("mnist", split="train", root=tmp_path)
    with pytest.raises(UserError, match=r"'all' needs train and test; .* holds only test"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: gzip.compress(data)[:-20], "is damaged"),
        (lambda data: data, "is damaged"),  # called .gz but not packed
        (lambda data: gzip.compress(data[:-5]), "cut short"),
        (lambda data: gzip.compress(b"<html>" + data), "is not an IDX file"),
        (lambda data: gzip.compress(b""), "is not an IDX file.*nothing"),
        (lambda data: gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))), "holds an array"),
    ],
)
def test_damaged_mnist_files_are_named(tmp_path, damage, message):
    images, _ = write_mnist(tmp_path, "t10k", 10)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(idx(images)))
    with pytest.raises(UserError, match=message) as caught:
        load("mnist", split="test", root=tmp_path)
    assert str(path) in str(caught.value)


def test_mnist_labels_out_of_range_are_located(tmp_path):
    write_mnist(tmp_path, "t10k", 10)
    labels = np.array([0, 1, 2, 77, 4, 5, 6, 7, 8, 9], np.uint8)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(UserError, match=r"targets\[3\] is 77, expected 0 to 9"):
        load("mnist", split="test", root=tmp_path)


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-10 in the official layout, whose checksums torchvision is told not to compare."""
    from torchvision import datasets

    official = datasets.CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    batches = {name: rng.integers(0, 256, (10, 3072), dtype=np.uint8) for name, _ in official.train_list}
    batches["test_batch"] = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    for name, data in batches.items():
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10}))
    monkeypatch.setattr(official, "train_list", [[name, None] for name, _ in official.train_list])
    monkeypatch.setattr(official, "test_list", [["test_batch", None]])
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": None})
    return tmp_path, batches


def test_official_cifar10(cifar):
    root, batches = cifar
    test = load("cifar10", split="test", root=root)
    pixels = torch.from_numpy(batches["test_batch"]).view(10, 3, 32, 32)
    assert torch.equal((test.inputs * 255).round().byte(), pixels)
    assert test.classes == tuple(CIFAR10)
    assert test.name == "cifar10/test"
    assert len(load("cifar10", split="train", root=root)) == 50
    gray = load("cifar10", root=root, grayscale=True, image_size=16)
    assert gray.inputs.shape == (60, 1, 16, 16)
    torch.testing.assert_close(
        load("cifar10", split="test", root=root, grayscale=True).inputs[:, 0],
        torch.einsum("nchw,c->nhw", test.inputs, torch.tensor([0.299, 0.587, 0.114])),
    )


def test_damaged_cifar_is_refused_before_it_is_unpickled(cifar, monkeypatch):
    root, _ = cifar
    monkeypatch.undo()  # the real checksums
    with pytest.raises(UserError, match="incomplete or damaged"):
        load("cifar10", root=root)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_a_set_that_is_not_there_says_where_to_get_it(tmp_path, name):
    with pytest.raises(DatasetNotFound, match=r"https?://") as caught:
        load(name, root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "PAPERWORKS_DATA" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("cifar", {}, "unknown data set 'cifar'. Did you mean 'cifar10'"),
        ("fashon-mnist", {}, "Did you mean 'fashion-mnist'"),
        ("some/where", {}, "nothing at .*some/where"),
        ("table.csv", {}, "nothing at .*table.csv"),
        ("digits", {"split": "test"}, "digits has no split 'test', only: all; paperworks.data.split"),
        ("digits", {"target": "label"}, "digits has no columns"),
        ("wine", {"image_size": 8}, "wine is a table"),
        ("digits", {"limit": 5}, "cannot hold all 10 classes"),
    ],
)
def test_bad_requests_are_named(tmp_path, source, options, message):
    with pytest.raises(UserError, match=message) as caught:
        load(source, root=tmp_path, **options)
    assert "\n" not in str(caught.value)


@real
def test_real_mnist_test_split():
    data = load("mnist", split="test")
    assert data.inputs.shape == (10_000, 1, 28, 28)
    assert data.targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@real
def test_real_cifar10_says_that_it_is_read_from_jpegs():
    data = load("cifar10", split="train", limit=500, seed=0)
    assert data.targets.bincount().tolist() == [50] * 10
    assert data.inputs.shape == (500, 3, 32, 32)
    assert data.classes == tuple(CIFAR10)
    assert data.name in ("cifar10/train", "cifar10-jpeg/train")


@real
def test_real_table():
    data = load("graphs/bail.csv", target="RECID")
    assert data.inputs.shape == (18_876, 18)
    assert data.classes == ("0", "1")
