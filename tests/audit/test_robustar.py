import io
import os
import re
import shutil
import signal
import threading
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD

from paperworks.audit.robustar import (
    FILLS,
    PROPOSERS,
    Background,
    Busy,
    OcclusionProposer,
    PairedImages,
    PairedTraining,
    Preprocess,
    RobustarProject,
    SaliencyOutsideObject,
    TaskManager,
    consistency,
    estimate_foreground,
    fill_masked,
    last_layer,
    last_layer_influence,
    lissa_influence,
    mask_from_white,
    paired_loss,
    saliency,
    saliency_share,
    shrink_mask,
    superpixels,
)
from paperworks.audit.robustar.masks import MaskFolder, StoredMask
from paperworks.errors import UserError
from paperworks.nn import mlp
from paperworks.train import NonFiniteLoss, Trainer
from stopping import Stop, StopAt


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise_image(height: int = 12, width: int = 9, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def refused(message: str):
    return pytest.raises(UserError, match=re.escape(message))


# Fills.


@given(mode=st.sampled_from(FILLS), seed=st.integers(0, 2**20))
def test_fills_leave_the_rest_bit_by_bit(mode, seed):
    image, mask = noise_image(seed=seed), rng(seed).random((12, 9)) < 0.4
    filled = fill_masked(image, mask, mode, rng(seed))
    assert (filled[~mask] == image[~mask]).all()
    assert filled.dtype == np.uint8
    again = fill_masked(image, mask, mode, rng(seed))
    assert (filled == again).all()


def test_each_fill_is_what_it_says():
    image, everything = noise_image(40, 40), np.ones((40, 40), bool)
    filled = {mode: fill_masked(image, everything, mode, rng(1)) for mode in FILLS}
    assert not filled["pure_black"].any()
    for mode, low, high in (("noise", 0, 255), ("noise_weak", 64, 191), ("noise_minor", 96, 159)):
        assert (filled[mode].min(), filled[mode].max()) == (low, high)
    assert len(np.unique(filled["random_pure"].reshape(-1, 3), axis=0)) == 1
    rows = np.flatnonzero(filled["hstrips"].any((1, 2)))
    assert rows.tolist() == [i for i in range(40) if i % 5 < 2]
    columns = np.flatnonzero(filled["vstrips"].any((0, 2)))
    assert columns.tolist() == rows.tolist()


def test_mixture_uses_every_other_fill():
    image, everything = noise_image(10, 10), np.ones((10, 10), bool)
    draw = rng(0)
    black = sum(not fill_masked(image, everything, "mixture", draw).any() for _ in range(200))
    assert 10 < black < 60  # one in seven


def test_fills_refuse_what_does_not_fit(unchecked):
    with refused("mask must be of the image's size 9x12, got 12x9"):
        fill_masked(noise_image(), np.ones((9, 12), bool), "noise", rng())
    with refused("unknown fill 'pure_blak'. Did you mean 'pure_black'?"):
        fill_masked(noise_image(), np.ones((12, 9), bool), "pure_blak", rng())


# Paired loss.

A, B = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])


def test_consistency_is_the_mean_or_the_sum_of_squared_distances():
    assert consistency(A, B).item() == 2.5
    assert consistency(A, B, "sum").item() == 5.0


def test_without_masks_the_loss_is_twice_the_cross_entropy():
    y = torch.tensor([0, 1])
    assert paired_loss(A, A, y).item() == 2 * F.cross_entropy(A, y).item()


def test_paired_loss_has_the_right_gradient():
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: paired_loss(a, b, torch.tensor([0, 1, 3]), 0.3), (a, b))


def test_paired_loss_refuses_what_does_not_fit():
    with refused("lam must be 0 or more and finite, got nan"):
        paired_loss(A, B, torch.tensor([0, 1]), float("nan"))
    with refused("unknown reduction 'men'. Did you mean 'mean'?"):
        PairedTraining(reduction="men")


# Paired data and training.


def test_unmarked_images_are_their_own_partners_and_marked_ones_change_inside_the_mask():
    images, mask = [noise_image(8, 8, seed) for seed in range(2)], np.zeros((8, 8), bool)
    mask[:3, :3] = True
    data = PairedImages(images, [0, 1], [None, mask], fill="pure_black")
    x, y, partner = data[0]
    assert y == 0
    assert torch.equal(x, partner)
    x, _, partner = data[1]
    assert not partner[:, :3, :3].any()
    assert torch.equal(partner[:, 3:], x[:, 3:])
    partner, _ = PairedImages(images, [0, 1], [None, mask], fill="pure_black", replace=True)[1]
    assert not partner[:, :3, :3].any()


def test_both_of_a_pair_are_cropped_and_flipped_alike():
    from torchvision.transforms import v2

    image = np.repeat(np.arange(144, dtype=np.uint8).reshape(12, 12, 1), 3, 2)
    mask = np.zeros((12, 12), bool)
    mask[5, 5] = True
    transform = v2.Compose([v2.ToImage(), v2.RandomCrop(8), v2.RandomHorizontalFlip()])
    data = PairedImages([image], [0], [mask], transform, "pure_black")
    torch.manual_seed(0)
    crops = set()
    for _ in range(20):
        x, _, partner = data[0]
        assert (x != partner).any(0).sum() <= 1
        crops.add(x.flatten()[0].item())
    assert len(crops) > 5


def small_data(marked: bool = True) -> PairedImages:
    digits = load_digits()
    images = [np.repeat(im.astype(np.uint8)[..., None] * 15, 3, 2) for im in digits.images[:96]]
    mask = np.zeros((8, 8), bool)
    mask[0] = True
    return PairedImages(
        images, digits.target[:96].tolist(), [mask if marked and i % 3 == 0 else None for i in range(96)]
    )


def fit(data, interventions, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    trainer = Trainer(2, interventions=interventions, batch_size=32, accelerator="cpu", **options)
    trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    return model


def test_the_intervention_takes_the_same_steps_as_the_formula():
    data = small_data()
    x, y, partner = (
        torch.stack(p) if isinstance(p[0], torch.Tensor) else torch.tensor(p) for p in zip(*data, strict=True)
    )
    torch.manual_seed(0)
    model = mlp(192, (16,), 10)
    steps = [model, mlp(192, (16,), 10)]
    steps[1].load_state_dict(model.state_dict())
    trainer = Trainer(1, interventions=[PairedTraining(0.2)], batch_size=96, accelerator="cpu")
    fixed = torch.utils.data.TensorDataset(x, y, partner)
    trainer.fit(steps[0], fixed, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    paired_loss(steps[1](x), steps[1](partner), y, 0.2).backward()
    SGD(steps[1].parameters(), lr=0.1).step()
    for ours, theirs in zip(steps[0].parameters(), steps[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_batch_mixes_the_statistics_of_batch_norm_and_two_passes_do_not():
    one, two = (fit(small_data(), [PairedTraining(one_batch=how)])[2].num_batches_tracked for how in (True, False))
    assert (one, two) == (6, 12)


def test_training_without_partners_says_what_it_needs():
    plain = torch.utils.data.TensorDataset(torch.zeros(32, 3, 8, 8), torch.zeros(32).long())
    with refused("paired training needs data of (image, target, partner)"):
        fit(plain, [PairedTraining()])


def test_a_killed_training_resumes_to_the_same_weights(tmp_path):
    def run(folder, stop=None):
        interventions = [PairedTraining(), StopAt(stop)]
        return fit(small_data(), interventions, checkpoint_dir=tmp_path / folder, checkpoint_every=1).state_dict()

    undisturbed = run("a")
    with pytest.raises(Stop):
        run("b", stop=4)
    resumed = run("b")
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


# Influence.


class Fitted:
    """A softmax regression on digits, trained to the minimum of its damped loss, in double precision."""

    def __init__(self, n: int = 120, damping: float = 0.05, leave_out: int | None = None) -> None:
        digits = load_digits(n_class=4)
        x = torch.tensor(digits.data / 16)[:, ::5]
        y = torch.tensor(digits.target)
        keep = [i for i in range(n) if i != leave_out]
        self.x, self.y, self.test_x, self.test_y = x[keep], y[keep], x[n : n + 5], y[n : n + 5]
        self.damping = damping
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(x.shape[1], 4)).double()
        nn.init.zeros_(self.model[1].weight)
        nn.init.zeros_(self.model[1].bias)
        optimizer = torch.optim.LBFGS(
            self.model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x), self.y)
            # The penalty keeps its size when one example is left out, as influence supposes.
            loss = loss * len(keep) / n + damping / 2 * sum(p.square().sum() for p in self.model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)

    def losses(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.test_x), self.test_y, reduction="none").detach()

    def influence(self, **options) -> torch.Tensor:
        probs, test_probs = (self.model(x).softmax(1).detach() for x in (self.x, self.test_x))
        options = {"damping": self.damping, "tolerance": 1e-8} | options
        return last_layer_influence(self.x, probs, self.y, self.test_x, test_probs, self.test_y, **options)

    def exact(self) -> torch.Tensor:
        """By the definition: autograd's gradients and Hessian, and an inverse."""
        flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])

        def loss(w, x, y):
            weight, bias = w[:-4].view(4, -1), w[-4:]
            return F.cross_entropy(x @ weight.t() + bias, y)

        hessian = torch.autograd.functional.hessian(lambda w: loss(w, self.x, self.y), flat)
        inverse = torch.linalg.inv(hessian + self.damping * torch.eye(len(flat)))
        gradient = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        single = (
            gradient(flat, self.x[:, None], self.y[:, None]),
            gradient(flat, self.test_x[:, None], self.test_y[:, None]),
        )
        return -single[1] @ inverse @ single[0].t()


def test_last_layer_influence_is_that_of_the_inverse_hessian():
    fitted = Fitted()
    torch.testing.assert_close(fitted.influence(), fitted.exact(), rtol=1e-5, atol=1e-7)
    loose = fitted.influence(tolerance=1e-2)
    assert all(spearmanr(a, b)[0] > 0.999 for a, b in zip(loose, fitted.exact(), strict=True))


def test_influence_predicts_what_leaving_an_example_out_does():
    fitted, n = Fitted(), 120
    predicted = -fitted.influence() / n
    left_out = range(0, n, 4)
    change = torch.stack([Fitted(leave_out=i).losses() - fitted.losses() for i in left_out], 1)
    for row, truth in zip(predicted[:, ::4], change, strict=True):
        assert spearmanr(row, truth)[0] > 0.9
        assert (row * truth).sum() > 0  # the sign: negative influence is helpful


def test_a_duplicated_example_counts_twice():
    fitted = Fitted()
    doubled = fitted.influence()
    phi, y = torch.cat([fitted.x, fitted.x]), torch.cat([fitted.y, fitted.y])
    probs, test_probs = (fitted.model(x).softmax(1).detach() for x in (phi, fitted.test_x))
    both = last_layer_influence(
        phi, probs, y, fitted.test_x, test_probs, fitted.test_y, damping=fitted.damping, tolerance=1e-8
    )
    torch.testing.assert_close(both[:, :120] + both[:, 120:], 2 * doubled, rtol=1e-5, atol=1e-8)


def test_lissa_converges_to_the_damped_inverse():
    fitted, damping, scale = Fitted(), 0.025, 2.0
    found = lissa_influence(
        fitted.model, (fitted.x, fitted.y), (fitted.test_x, fitted.test_y),
        damping=damping, scale=scale, depth=300, batch_size=120,
    )  # fmt: skip
    exact = fitted.influence(damping=damping * scale)
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_lissa_on_single_examples_ranks_alike_and_can_be_kept_to_a_layer():
    fitted = Fitted()
    found = lissa_influence(
        fitted.model, (fitted.x, fitted.y), (fitted.test_x, fitted.test_y),
        parameters=["1.weight"], damping=0.005, scale=10.0, depth=300,
    )  # fmt: skip
    exact = fitted.influence()
    assert all(spearmanr(a, b)[0] > 0.9 for a, b in zip(found, exact, strict=True))


def test_influence_refuses_what_does_not_fit():
    fitted = Fitted(n=20)
    data = (fitted.x, fitted.y), (fitted.test_x, fitted.test_y)
    with refused("damping must be positive, got 0"):
        fitted.influence(damping=0)
    with refused("influence is not solved to 1e-12 in 1 iterations"):
        fitted.influence(tolerance=1e-12, max_iterations=1)
    with refused("the model has no trainable parameter 'head'"):
        lissa_influence(fitted.model, *data, parameters=["head"])
    with refused("LiSSA diverged: scale 1e-06 is below the largest curvature"):
        lissa_influence(fitted.model, *data, scale=1e-6, depth=120)
    with refused("lissa needs 0 <= damping < 1"):
        lissa_influence(fitted.model, *data, damping=1.0)


def test_the_last_layer_is_found_by_what_it_gives():
    model = mlp(12, (5,), 3)
    x = torch.rand(4, 3, 2, 2)
    features, logits = last_layer(model, x)
    assert features.shape == (4, 5)
    torch.testing.assert_close(model[-1](features), logits)
    with refused("needs a model that ends in nn.Linear"):
        last_layer(nn.Sequential(model, nn.ReLU()), x)


# Saliency and proposals.


class Corner(nn.Module):
    """Two classes told apart by the brightness of the top left 4x4 corner."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        corner = self.weight * (x[:, :, :4, :4].mean((1, 2, 3)) - 0.5)
        return torch.stack([-corner, corner], 1)


@pytest.mark.parametrize("kind", ["gradient", "smooth", "guided"])
def test_saliency_lies_where_the_model_looks(kind):
    maps = saliency(Corner(), torch.rand(2, 3, 16, 16), kind=kind, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(2, 16, 16, dtype=torch.bool)
    inside[:, :4, :4] = True
    torch.testing.assert_close(saliency_share(maps, inside), torch.ones(2))
    assert saliency_share(torch.zeros(2, 16, 16), inside).tolist() == [0, 0]


def test_saliency_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 2)).train()
    model[3].eval()  # frozen
    x = torch.rand(2, 3, 8, 8)
    guided, plain = saliency(model, x, kind="guided"), saliency(model, x)
    assert [part.training for part in model] == [True, True, True, False]
    assert model[1].inplace
    assert not model[1]._backward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(guided, plain)


def test_saliency_refuses_what_does_not_fit():
    with refused("unknown saliency 'smoth'. Did you mean 'smooth'?"):
        saliency(Corner(), torch.rand(1, 3, 8, 8), kind="smoth")
    with refused("saliency of kind 'smooth' needs a generator"):
        saliency(Corner(), torch.rand(1, 3, 8, 8), kind="smooth")


def scene(side: int = 32) -> np.ndarray:
    """An object on grey, and a bright corner."""
    image = np.full((side, side, 3), 120, np.uint8)
    image[12:22, 12:22] = (200, 30, 30)
    image[:4, :4] = 255
    return image


def test_the_foreground_is_what_differs_from_the_border():
    found = estimate_foreground(scene())
    assert found[12:22, 12:22].all()
    assert found.sum() <= 100 + 16
    assert (PROPOSERS["background"](scene(), Corner(), Preprocess()) == ~found).all()


def test_superpixels_keep_to_edges():
    labels = superpixels(scene(), 16)
    inside = set(np.unique(labels[13:21, 13:21]))
    outside = set(np.unique(labels[24:, 24:]))
    assert not inside & outside
    assert 4 <= len(np.unique(labels)) <= 36


def test_proposals_find_the_corner_that_the_model_uses():
    model, nothing = Corner(), lambda image: np.zeros(image.shape[:2], bool)
    true = np.zeros((32, 32), bool)
    true[:4, :4] = True
    salient = SaliencyOutsideObject(foreground=nothing)(scene(), model, Preprocess())
    assert (salient & true).sum() / (salient | true).sum() > 0.9
    occluded = OcclusionProposer(segments=64, top=1)(scene(), model, Preprocess())
    assert (occluded & true).sum() / (occluded | true).sum() > 0.9
    assert Background(nothing)(scene(), model, Preprocess()).all()


# Masks.


@given(seed=st.integers(0, 2**20), factor=st.integers(1, 40))
def test_a_mask_enlarged_and_reduced_is_the_same(seed, factor):
    mask = rng(seed).random((8, 8)) < 0.3
    assert (shrink_mask(mask.repeat(factor, 0).repeat(factor, 1), factor) == mask).all()


def test_a_block_is_masked_if_any_of_it_is():
    mask = np.zeros((8, 8), bool)
    mask[3, 7] = True
    assert np.argwhere(shrink_mask(mask, 4)).tolist() == [[0, 1]]
    with refused("a mask of 8x8 is not 3 times as large as its image"):
        shrink_mask(mask, 3)


def test_white_pictures_are_read_by_the_exact_rule_and_natural_white_warns(unchecked):
    original = noise_image()
    original[original == 255] = 254
    edited = original.copy()
    edited[2:4, 2:4] = 255
    edited[5, 5] = (255, 255, 254)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.argwhere(mask_from_white(edited, original)).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    original[2, 2] = 255
    with pytest.warns(UserWarning, match="1 pixels are white in the image itself"):
        assert not mask_from_white(edited, original)[2, 2]
    with refused("the edited picture is 9x6 pixels, its image 9x12"):
        mask_from_white(edited[:6], original)


# Projects.


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tiny_image(label: str, index: int) -> np.ndarray:
    """Bright or dark, with a corner that tells it too."""
    base = 150 if label == "day" else 90
    image = (base + rng(index).integers(-40, 40, (16, 16, 3))).astype(np.uint8)
    image[:4, :4] = 250 if label == "day" else 5
    return image


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        for label in ("day", "night"):
            for index in range(count):
                write(tmp_path / "project" / split / label / f"{index}.png", tiny_image(label, index))
    return tmp_path / "project"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 2))


def opened(root: Path, **options) -> RobustarProject:
    return RobustarProject(root, network(), **options)


def corner_mask() -> np.ndarray:
    mask = np.zeros((16, 16), bool)
    mask[:4, :4] = True
    return mask


def test_images_are_found_paged_and_filtered(root):
    project = opened(root)
    assert project.classes == ["day", "night"]
    page = project.images("train", page=2, per_page=5)
    assert (page.total, page.pages, page.number) == (12, 3, 2)
    assert [entry.name for entry in page.entries][:2] == ["train/day/5.png", "train/night/0.png"]
    assert project.images("train", page=99, per_page=5).number == 3
    assert project.images("test", label="night").total == 3
    assert project.images("test", correct=True).total == project.images("test", correct=False).total == 0
    project.predict_all("test")
    right = project.images("test", correct=True).entries
    assert len(right) + project.images("test", correct=False).total == 6
    assert all(max(p := project.predict(e.name), key=p.get) == e.label for e in right)
    with refused("unknown view 'tran'. Did you mean 'train'?"):
        project.images("tran")
    with refused("unknown class 'nigth'. Did you mean 'night'?"):
        project.images(label="nigth")


def test_masks_make_the_round_trip_and_what_they_replace_is_kept(root):
    project, name = opened(root), "train/day/1.png"
    first, second = corner_mask(), ~corner_mask()
    assert project.load_mask(name) is None
    project.save_mask(name, first)
    assert (np.asarray(Image.open(root / "paired/day/1.png.png")) == first * 255).all()
    project.save_mask(name, second)
    assert (opened(root).load_mask(name) == second).all()
    (kept,) = (root / ".robustar/trash").glob("*/paired/day/1.png.png")
    assert (np.asarray(Image.open(kept)) == first * 255).all()
    assert [e.name for e in project.images("annotated").entries] == [name]
    assert project.clear_masks() == 1
    assert project.load_mask(name) is None
    assert len(list((root / ".robustar/trash").glob("*/paired/day/1.png.png"))) == 2


def test_images_of_one_stem_have_masks_of_their_own(root):
    write(root / "train/day/1.bmp", tiny_image("day", 1))
    project = opened(root)
    project.save_mask("train/day/1.bmp", corner_mask())
    assert project.load_mask("train/day/1.png") is None


def test_masks_of_another_size_or_split_are_refused(root, unchecked):
    project = opened(root)
    with refused("the mask of train/day/1.png must be 16x16 pixels as its image, got 15x16"):
        project.save_mask("train/day/1.png", corner_mask()[:, :15])
    with refused("masks are for training images, got one of test"):
        project.save_mask("test/day/1.png", corner_mask())


def test_a_mask_is_not_applied_to_an_image_that_changed(root):
    project, name = opened(root), "train/day/1.png"
    project.save_mask(name, corner_mask())
    assert list(project.masks()) == [name]
    write(root / name, tiny_image("night", 1))
    assert project.stale() == {name: "the image changed after it was annotated"}
    assert project.masks() == {}
    x, _, partner = project.paired_data()[1]
    assert torch.equal(x, partner)
    with refused("no training image has a mask that applies"):
        project.train(epochs=1)


def test_damaged_masks_and_images_are_listed_and_left_out(root):
    (root / "train/day/2.png").write_bytes((root / "train/day/2.png").read_bytes()[:200])
    (root / "train/day/notes.txt").write_text("hello")
    (root / "train/day/3.png").write_bytes(b"")
    project = opened(root)
    project.save_mask("train/day/0.png", corner_mask())
    project.save_mask("train/day/1.png", corner_mask())
    (root / "paired/day/0.png.png").write_bytes(b"junk")
    assert list(project.masks()) == ["train/day/1.png"]
    assert "cannot be read" in project.stale()["train/day/0.png"]
    assert len(project.paired_data()) == 10
    assert "truncated" in project.skipped["train/day/2.png"]
    assert project.skipped["train/day/3.png"] == "empty"
    assert "not an image file" in project.skipped["train/day/notes.txt"]
    with refused("train/day/2.png cannot be read"):
        project.read("train/day/2.png")


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "train/../../outside.png", "/etc/passwd", "train/day/../../../outside.png", "", "\0", "a" * 5000,
     "train/day", "paired/day/0.png.png", ".robustar/facts.sqlite", "train\\day\\0.png"],
)  # fmt: skip
def test_nothing_but_images_of_the_project_is_read_or_written(root, name):
    write(root.parent / "outside.png", tiny_image("day", 0))
    project = opened(root)
    before = sorted(root.parent.rglob("*"))
    for attempt in (project.read, project.predict, project.thumbnail, partial(project.save_mask, mask=corner_mask()),
                    project.load_mask, project.delete_mask, project.saliency, project.influence):  # fmt: skip
        with refused("the project has no image"):
            attempt(name)
    assert sorted(root.parent.rglob("*")) == before


def test_links_out_of_the_project_are_not_followed(root):
    outside = root.parent / "outside"
    write(outside / "secret.png", tiny_image("day", 0))
    (root / "train/day/link.png").symlink_to(outside / "secret.png")
    (root / "train/elsewhere").symlink_to(outside)
    project = opened(root)
    assert project.skipped["train/day/link.png"] == "a link out of the project"
    assert project.skipped["train/elsewhere/secret.png"] == "a link out of the project"
    assert project.classes == ["day", "night"]
    (root / "train/day/0.png").unlink()
    (root / "train/day/0.png").symlink_to(outside / "secret.png")
    with refused("train/day/0.png is a link out of the project"):
        project.read("train/day/0.png")
    (root / "paired").symlink_to(outside)
    with refused("paired has a link out of the project"):
        project.save_mask("train/day/1.png", corner_mask())
    (root / "checkpoints").symlink_to(outside)
    with refused("checkpoints is a link out of the project"):
        project.checkpoints()
    for name in ("trash", "thumbnails"):
        shutil.rmtree(root / ".robustar" / name, ignore_errors=True)
        (root / ".robustar" / name).symlink_to(outside)
        with refused(f"{name} is a link: state must lie in the project itself"):
            opened(root)
        (root / ".robustar" / name).unlink()
    assert [path.name for path in outside.iterdir()] == ["secret.png"]


def test_odd_names_are_names(root):
    odd = [
        "<img src=x onerror=alert(1)>.png",
        "-rf.png",
        "ключ ☃.png",
        "a\nb.png",
        "%2e%2e.png",
        "'; DROP.png",
    ]
    for name in odd:
        write(root / "train/day" / name, tiny_image("day", 7))
    project = opened(root)
    listed = {entry.path.name for entry in project.images("train", label="day").entries}
    for name in odd:
        assert name in listed
        project.save_mask(f"train/day/{name}", corner_mask())
        assert (project.load_mask(f"train/day/{name}") == corner_mask()).all()
        project.thumbnail(f"train/day/{name}")
        project.predict(f"train/day/{name}")
    long = "x" * 250 + ".png"
    write(root / "train/day" / long, tiny_image("day", 7))
    project.refresh()
    with refused("cannot be written: File name too long"):
        project.save_mask(f"train/day/{long}", corner_mask())


def test_masks_go_out_and_come_in_as_an_archive(root, tmp_path):
    project = opened(root)
    project.save_mask("train/day/1.png", corner_mask())
    archive = project.export_masks()
    project.clear_masks()
    report = project.import_masks(archive)
    assert (report.accepted, report.refused) == (1, {})
    assert (project.load_mask("train/day/1.png") == corner_mask()).all()


def archive_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archives_are_read_with_distrust(root, tmp_path, unchecked):
    def png(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    project = opened(root)
    good = png(corner_mask().astype(np.uint8) * 255)
    bomb = b"\0" * (40 * 2**20)
    report = project.import_masks(
        archive_of(**{
            "paired/day/0.png.png": good,
            "paired/day/1.png.png": b"GIF89a not a png",
            "paired/day/2.png.png": png(np.zeros((5, 5), np.uint8)),
            "paired/night/0.png.png": bomb,
            "../../evil.png": good,
            "/etc/evil.png": good,
        })
    )  # fmt: skip
    assert report.accepted == 1
    assert list(project.masks()) == ["train/day/0.png"]
    assert set(report.refused.values()) == {
        "not an image of PNG",
        "the mask of train/day/2.png must be 16x16 pixels as its image, got 5x5",
        f"{len(bomb)} bytes unpacked, at most {2**25} are read",
        "no training image of this name",
    }
    assert not list(tmp_path.rglob("evil.png"))
    with refused("not a ZIP archive"):
        project.import_masks(b"no archive")
    edited = tiny_image("day", 3)
    edited[edited == 255] = 254
    edited[8:, 8:] = 255
    assert project.import_masks(archive_of(**{"paired/day/3.png": png(edited)}), white=True).accepted == 1
    assert np.argwhere(project.load_mask("train/day/3.png")).min() == 8


def test_projects_refuse_what_is_none(root, tmp_path):
    with refused("there is no folder"):
        opened(root / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused("holds no training images (train/<class>/<image>)"):
        opened(tmp_path / "empty")
    write(root / "test/nigth/0.png", tiny_image("day", 0))
    with refused("class folder 'nigth' is not among the classes. Did you mean 'night'?"):
        opened(root)
    with refused("the model gives [1, 2] for 1 images of 3 classes"):
        opened(root, classes=["day", "night", "nigth"]).predict("train/day/0.png")


def test_predictions_follow_the_image_and_the_model(root):
    project, name = opened(root), "train/day/0.png"
    first = project.predict(name)
    assert sum(first.values()) == pytest.approx(1)
    assert project.predict(name) == first
    write(root / name, tiny_image("night", 3))
    changed = project.predict(name)
    assert changed != first
    (root / ".robustar/facts.sqlite").write_bytes(b"junk" * 1000)
    for extra in (root / ".robustar").glob("facts.sqlite-*"):
        extra.unlink()
    with pytest.warns(UserWarning, match="facts.sqlite is damaged"):
        again = opened(root)
    assert again.predict(name) == changed


def test_influence_names_training_images_by_sign(root):
    found = opened(root).influence("test/day/0.png", top=3)
    values = [value for _, value in found.helpful]
    assert len(values) == 3
    assert all(value < 0 for value in values)
    assert values == sorted(values)
    assert all(value > 0 for _, value in found.harmful)
    assert all(name.startswith("train/day/") for name, _ in found.helpful)


def test_proposals_stay_apart_until_accepted(root):
    project = opened(root)
    project.save_mask("train/day/0.png", corner_mask())
    assert project.propose("saliency", 0, 2) == 2
    assert project.images("proposed").total == 2
    assert list(project.masks()) == ["train/day/0.png"]
    proposal = project.load_mask("train/day/1.png", proposal=True)
    project.save_mask("train/day/1.png", proposal)
    assert project.images("proposed").total == 1
    with refused("start and end must be 0 <= start <= end < 12 (or end -1), got 5 and 4"):
        project.propose("saliency", 5, 4)
    with refused("unknown proposer 'salency'. Did you mean 'saliency'?"):
        project.propose("salency")


def test_training_leaves_the_old_checkpoint_and_puts_a_better_one_beside_it(root):
    model, images = network(), [tiny_image(label, i) for label in ("day", "night") for i in range(6)]
    x, y = torch.stack([Preprocess()(image) for image in images]), torch.arange(2).repeat_interleave(6)
    optimizer = SGD(model.parameters(), lr=0.05)
    for _ in range(30):  # which makes the corners matter
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    project = RobustarProject(root, model)
    for entry in project.images("train").entries:
        project.save_mask(entry.name, corner_mask())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    before, after = project.train(epochs=15, lr=0.02, batch_size=4)
    assert project.checkpoints() == ["0000", "0001"]
    assert (before.checkpoint, after.checkpoint) == ("0000", "0001")
    assert after.accuracy >= before.accuracy
    assert after.saliency_in_masks < 0.8 * before.saliency_in_masks
    reopened = opened(root)
    assert reopened.checkpoint == "0001"
    project.use("0000")
    assert all(torch.equal(project.model.state_dict()[name], value) for name, value in old.items())
    assert project.predict("test/day/0.png") != reopened.predict("test/day/0.png")
    with refused("unknown checkpoint '0009'"):
        project.use("0009")
    with refused("checkpoint 0001 is of another model"):
        RobustarProject(root, mlp(768, (4,), 2))


def test_a_loss_that_is_not_finite_or_a_cancelled_training_changes_nothing(root):
    project = opened(root)
    project.save_mask("train/day/0.png", corner_mask())
    old = {name: value.clone() for name, value in project.model.state_dict().items()}
    with pytest.raises(NonFiniteLoss):
        project.train(epochs=3, lr=1e30)
    task = project.tasks.start("train", lambda task: project.train(task, epochs=10_000, lr=0.01))
    while task.fraction == 0 and task.state == "running":
        time.sleep(0.01)
    with pytest.raises(Busy, match=r"train: running \(\d+%.*\): wait for it or cancel it first"):
        project.tasks.start("propose", lambda task: None)
    task.cancel()
    assert task.wait(20)
    assert task.state == "cancelled"
    assert project.checkpoints() == []
    assert all(torch.equal(project.model.state_dict()[name], value) for name, value in old.items())


def test_a_task_that_fails_says_why():
    tasks = TaskManager()

    def work(task):
        raise OSError("disk\nfull")

    task = tasks.start("save", work)
    assert task.wait(5)
    assert str(task) == "save: failed (OSError: disk full)"


def test_two_people_at_once_do_not_corrupt_a_project(root):
    project = opened(root)
    errors = []

    def person(seed):
        draw = rng(seed)
        try:
            for _ in range(15):
                name = f"train/day/{draw.integers(3)}.png"
                project.save_mask(name, np.full((16, 16), draw.random() < 0.5))
                mask = project.load_mask(name)
                assert mask is None or mask.all() or not mask.any()
                project.saliency(name, "guided")
                project.predict_all("test")
                if draw.random() < 0.2:
                    project.delete_mask(name)
        except Exception as error:
            errors.append(error)

    people = [threading.Thread(target=person, args=(seed,)) for seed in range(4)]
    for thread in people:
        thread.start()
    for thread in people:
        thread.join()
    assert errors == []
    assert project.stale() == {}
    assert not list(root.rglob("*.partial"))


def test_a_server_killed_in_mid_save_loses_no_accepted_mask(root):
    project = opened(root)
    entry, folder = project.entry("train/day/0.png"), MaskFolder(root, "paired", root / ".robustar" / "trash")
    folder.save(entry, StoredMask(np.ones((400, 400), bool), "save 0"))
    for pause in (0.05, 0.09, 0.13):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            for i in range(1, 10**6):
                folder.save(entry, StoredMask(np.full((400, 400), i % 2 == 0), f"save {i}"))
                os.write(writing, f"{i}\n".encode())
        os.close(writing)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading) as pipe:
            acknowledged = max([0, *map(int, pipe.read().split())])
        stored = folder.load(entry)
        number = int(stored.image_digest.removeprefix("save "))
        assert number >= acknowledged
        assert stored.mask.all() if number % 2 == 0 else not stored.mask.any()
    assert len(list((root / ".robustar/trash").glob("*/paired/day/0.png.png"))) >= acknowledged
    assert project.images("annotated").total == 1  # what a kill left half-written is not taken for a mask


def test_a_second_server_is_told(root):
    with opened(root).locked():
        second = opened(root)
        with refused(f"another server works on {root}"), second.locked():
            pass
        second.save_mask("train/day/0.png", corner_mask())
    with second.locked():
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_clear_error(root):
    project = opened(root)
    (root / "paired").mkdir()
    (root / "paired").chmod(0o500)
    try:
        with refused("cannot be written: Permission denied"):
            project.save_mask("train/day/0.png", corner_mask())
    finally:
        (root / "paired").chmod(0o700)


def test_preprocessing_scales_greys_and_normalises():
    x = Preprocess((8, 6), 1, (0.5,), (0.25,))(np.full((16, 12, 3), 255, np.uint8))
    torch.testing.assert_close(x, torch.full((1, 8, 6), 2.0))
    assert repr(Preprocess((8, 6))) != repr(Preprocess((6, 8)))
    with refused("image_size must be positive, got (0, 4)"):
        Preprocess((0, 4))


# The claim.


def test_the_scene_plants_squares_of_the_class_colour():
    from paperworks.bench.run import Run
    from paperworks.claims.audit.robustar import RobustarSettings, make_scene

    run = Run(
        seed=0, scale="smoke", device="cpu", data_root=None, folder=Path("unused"), keep=lambda name, content: None
    )
    settings = RobustarSettings.at("smoke", {"sizes": (400, 200)})
    found = make_scene(run, settings)
    assert (found.train.colours == found.train.targets).float().mean() > 0.9
    assert (found.unbiased.colours == found.unbiased.targets).float().mean() < 0.25
    assert (found.train.masks.sum((1, 2)) == 9).all()
    outside = ~found.unbiased.masks.numpy()
    assert (found.unbiased.pixels[outside] == found.biased.pixels[outside]).all()
    squares = {tuple(found.train.pixels[i][found.train.masks[i].numpy()].flatten()) for i in range(400)}
    assert len(squares) == 10
