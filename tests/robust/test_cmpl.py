import math
import os
import socket
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from paperworks.errors import UserError
from paperworks.nn.resnet3d import resnet3d
from paperworks.robust import LogitClip
from paperworks.robust.cmpl import (
    CMPL,
    OPERATIONS,
    ClipAugment,
    CMPLModule,
    Cutout,
    RandAugment,
    RandomContrast,
    RandomFlip,
    RandomInvert,
    RandomNoise,
    RandomResizedCrop,
    RandomShift,
    cross_pseudo_label_loss,
)
from paperworks.robust.cmpl.transforms import check_clips
from paperworks.train import Intervention, Trainer
from stopping import Stop, StopAt


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


F_WEAK = logits_of((0.9, 0.05, 0.05), (0.5, 0.3, 0.2))
A_WEAK = logits_of((0.1, 0.85, 0.05), (0.05, 0.05, 0.9))


# The loss


def test_each_network_learns_from_the_other():
    f, a = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    weak = [F_WEAK.clone().requires_grad_(), A_WEAK.clone().requires_grad_()]
    (loss_f, loss_a), stats = cross_pseudo_label_loss(weak, [f, a], 0.8)
    assert loss_a.item() == pytest.approx(0.549306, abs=1e-6)  # ln 3 / 2: F is sure of the first clip only
    assert loss_f.item() == pytest.approx(1.098612, abs=1e-6)
    assert stats.mask_rate.tolist() == [0.5, 1.0]
    assert stats.confidence.tolist() == pytest.approx([0.7, 0.875])
    assert stats.agreement == 0
    assert stats.precision is None
    loss_a.backward()
    expected = torch.tensor([[1 / 3 - 1, 1 / 3, 1 / 3], [0.0, 0.0, 0.0]]) / 2
    assert torch.allclose(a.grad, expected)
    assert f.grad is None or not f.grad.any()
    assert all(logits.grad is None or not logits.grad.any() for logits in weak)


def test_the_labels_are_the_teachers():
    strong = [logits_of((0.2, 0.3, 0.5), (0.6, 0.3, 0.1)), torch.zeros(2, 3)]
    (loss_f, _), _ = cross_pseudo_label_loss([F_WEAK, A_WEAK], strong, 0.8)
    assert loss_f.item() == pytest.approx(-(math.log(0.3) + math.log(0.1)) / 2)  # A says 1, 2


def random_logits(models=2, batch=7, classes=4, seed=0, scale=3.0):
    return list(scale * torch.randn(models, batch, classes, generator=generator(seed)))


def fixmatch(weak, strong, threshold):
    """The formula, written out."""
    terms = []
    for w, s in zip(weak.softmax(1), strong.log_softmax(1), strict=True):
        terms.append(-s[w.argmax()] if w.max() >= threshold else torch.tensor(0.0))
    return torch.stack(terms).mean()


@given(st.integers(0, 50), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_one_network_or_a_shared_one_is_fixmatch(seed, threshold):
    (weak,), (strong,) = random_logits(1, seed=seed), random_logits(1, seed=seed + 1000)
    expected = fixmatch(weak, strong, threshold)
    (single,), stats = cross_pseudo_label_loss([weak], [strong], threshold)
    assert torch.allclose(single, expected)
    assert stats.agreement == 1
    shared, _ = cross_pseudo_label_loss([weak, weak], [strong, strong], threshold)
    assert torch.allclose(shared, expected.repeat(2))
    own, _ = cross_pseudo_label_loss(random_logits(seed=seed), [strong, strong], threshold, "self")
    assert torch.allclose(own[0], fixmatch(random_logits(seed=seed)[0], strong, threshold))


@given(st.integers(0, 50), st.integers(2, 4))
@settings(deadline=None, max_examples=30)
def test_networks_teach_in_a_ring(seed, models):
    weak, strong = random_logits(models, seed=seed), random_logits(models, seed=seed + 1000)
    losses, stats = cross_pseudo_label_loss(weak, strong, 0.7)
    for n in range(models):
        teacher = weak[(n + 1) % models].softmax(1)
        errors = F.cross_entropy(strong[n], teacher.argmax(1), reduction="none")
        assert losses[n] == pytest.approx(((teacher.amax(1) >= 0.7) * errors).mean().item(), abs=1e-5)
    order = list(reversed(range(models))) if models == 2 else [*range(1, models), 0]
    turned, moved = cross_pseudo_label_loss([weak[n] for n in order], [strong[n] for n in order], 0.7)
    assert torch.allclose(turned, losses[order])
    assert torch.allclose(moved.mask_rate, stats.mask_rate[order])
    assert moved.agreement == stats.agreement


def test_threshold_at_its_ends():
    weak, strong = random_logits(), random_logits(seed=1)
    none, stats = cross_pseudo_label_loss(weak, strong, 1.5)
    assert (none == 0).all()
    assert (stats.mask_rate == 0).all()
    every, stats = cross_pseudo_label_loss(weak, strong, 0.0)
    assert (stats.mask_rate == 1).all()
    assert every[0] == pytest.approx(F.cross_entropy(strong[0], weak[1].argmax(1)).item(), abs=1e-6)
    exactly = torch.zeros(1, 4)  # confidence is 0.25 without rounding
    assert cross_pseudo_label_loss([exactly], [exactly], 0.25)[1].mask_rate == 1
    assert cross_pseudo_label_loss([exactly], [exactly], 0.2500001)[1].mask_rate == 0


def test_precision_counts_used_labels_and_truth_changes_no_loss():
    weak, strong = [F_WEAK, A_WEAK], [torch.zeros(2, 3)] * 2
    losses, stats = cross_pseudo_label_loss(weak, strong, 0.8, truth=torch.tensor([0, 1]))
    assert stats.precision.tolist() == [1.0, 0.0]
    assert torch.equal(losses, cross_pseudo_label_loss(weak, strong, 0.8)[0])
    _, stats = cross_pseudo_label_loss(weak, strong, 0.95, truth=torch.tensor([0, 1]))
    assert stats.precision.isnan().all()


def test_gradients_of_the_loss():
    weak = [logits.double() for logits in random_logits()]
    strong = [logits.double().requires_grad_() for logits in random_logits(seed=1)]
    assert torch.autograd.gradcheck(lambda *s: cross_pseudo_label_loss(weak, s, 0.6)[0], strong)


def test_half_precision_logits_are_taken_in_float32():
    weak, strong = random_logits(scale=20), random_logits(seed=1)
    losses, _ = cross_pseudo_label_loss([w.bfloat16() for w in weak], [s.bfloat16() for s in strong])
    assert losses.dtype == torch.float32


def test_labels_of_another_model_than_ones_own_make_the_difference():
    weak, strong = [F_WEAK, A_WEAK], [F_WEAK, A_WEAK]
    crossed, _ = cross_pseudo_label_loss(weak, strong, 0.8)
    own, _ = cross_pseudo_label_loss(weak, strong, 0.8, "self")
    assert own[0] == pytest.approx(-math.log(0.9) / 2)
    assert crossed[0] == pytest.approx(-(math.log(0.05) + math.log(0.2)) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cross_pseudo_label_loss([], []), "logits_weak is empty"),
        (
            lambda x: cross_pseudo_label_loss([x, x[:, :2]], [x, x]),
            r"logits_weak\[1\] has shape \[2, 2\], expected \[batch, classes\] = \[2, 3\]",
        ),
        (lambda x: cross_pseudo_label_loss([x], [x[:1]]), r"got \[1, 2, 3\] and \[1, 1, 3\]"),
        (lambda x: cross_pseudo_label_loss([x, x], [x]), r"got \[2, 2, 3\] and \[1, 2, 3\]"),
        (lambda x: cross_pseudo_label_loss([x], [x], -0.1), "threshold must be at least 0, got -0.1"),
        (lambda x: cross_pseudo_label_loss([x], [x], math.nan), "threshold must be at least 0, got nan"),
        (lambda x: cross_pseudo_label_loss([x], [x * math.nan]), r"logits_strong\[0\] is not finite for clip 0"),
        (
            lambda x: cross_pseudo_label_loss([x, torch.stack([x[0], x[1] / 0])], [x, x]),
            r"logits_weak\[1\] is not finite for clip 1",
        ),
    ],
)
def test_bad_logits(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.ones(2, 3))


# Augmentation

STRONG = (
    *(RandomContrast(), RandomInvert(0.5), RandomNoise(), Cutout(), RandomShift(2), RandomFlip(), RandomResizedCrop()),
    *(RandAugment(4, [name]) for name in OPERATIONS),
    RandAugment(3),
)


def name_of(transform):
    return "-".join([type(transform).__name__, *list(getattr(transform, "operations", []))[:1]])


@pytest.mark.parametrize("transform", STRONG, ids=name_of)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_static_clip_stays_static(transform, channels):
    image = torch.rand(16, channels, 1, 9, 12, generator=generator())
    clips = image.expand(-1, -1, 5, -1, -1).contiguous()
    before = clips.clone()
    out = transform(clips, generator(1))
    assert out.shape == clips.shape
    assert torch.equal(clips, before)
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.allclose(out, out[:, :, :1].expand_as(out), atol=1e-6)


@pytest.mark.parametrize("transform", STRONG, ids=name_of)
def test_the_same_seed_gives_the_same_view_and_another_seed_another(transform):
    clips = torch.rand(16, 3, 4, 12, 12, generator=generator())
    one, two, other = (transform(clips, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    if name_of(transform) not in ("RandAugment-identity", "RandAugment-autocontrast", "RandAugment-equalize"):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("transform", STRONG, ids=name_of)
def test_clips_do_not_see_each_other(transform):
    # Statistics (means, histograms) are a clip's own: the other clips of the batch change nothing.
    clips = torch.rand(8, 1, 3, 10, 10, generator=generator())
    others = clips.clone()
    others[1:] = torch.rand(7, 1, 3, 10, 10, generator=generator(5))
    assert torch.allclose(transform(clips, generator(3))[0], transform(others, generator(3))[0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("brightness", lambda x, m: v2.functional.adjust_brightness(x, 0.05 + 0.9 * m)),
        ("color", lambda x, m: v2.functional.adjust_saturation(x, 0.05 + 0.9 * m)),
        ("contrast", lambda x, m: v2.functional.adjust_contrast(x, 0.05 + 0.9 * m)),
        ("sharpness", lambda x, m: v2.functional.adjust_sharpness(x, 0.05 + 0.9 * m)),
        ("solarize", v2.functional.solarize),
        ("autocontrast", lambda x, m: v2.functional.autocontrast(x)),
        ("rotate", lambda x, m: affine(x, angle=60 * m - 30)),
        ("translate_x", lambda x, m: affine(x, translate=[(0.6 * m - 0.3) * 12, 0])),
        ("translate_y", lambda x, m: affine(x, translate=[0, (0.6 * m - 0.3) * 10])),
    ],
)
def test_operations_are_torchvisions(name, theirs):
    images = torch.rand(6, 3, 1, 10, 12, generator=generator())
    magnitude = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
    ours = OPERATIONS[name](images, magnitude)
    for k in range(6):
        expected = theirs(images[k, :, 0], magnitude[k].item())
        if name.startswith("translate"):  # a translation by +x looks x to the right
            expected = theirs(images[k, :, 0], 1 - magnitude[k].item())
        assert torch.allclose(ours[k, :, 0], expected, atol=2e-3), k


def affine(image, angle=0.0, translate=(0.0, 0.0)):
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.functional.affine(image, angle, list(translate), 1.0, [0.0, 0.0], interpolation=bilinear)


def test_posterize_keeps_four_to_eight_bits():
    ramp = torch.arange(256.0).div(255).view(1, 1, 1, 16, 16).repeat(2, 1, 1, 1, 1)
    out = OPERATIONS["posterize"](ramp, torch.tensor([0.0, 1.0]))
    assert out[0].unique().numel() == 16
    assert torch.allclose(out[1], ramp[1])
    theirs = v2.functional.posterize((ramp[0] * 255).round().byte(), 4)
    assert torch.equal((out[0] * 255).round().byte(), theirs)


def test_equalize_spreads_the_values_of_the_whole_clip():
    clips = 0.4 + 0.2 * torch.rand(3, 1, 4, 16, 16, generator=generator()) ** 0.5
    out = OPERATIONS["equalize"](clips, torch.zeros(3))
    assert out.amin((1, 2, 3, 4)).tolist() == [0, 0, 0]
    assert out.amax((1, 2, 3, 4)).tolist() == [1, 1, 1]
    assert out.mean().item() == pytest.approx(0.5, abs=0.06)
    flat, spread = clips[0].flatten(), out[0].flatten()
    assert (spread[flat.argsort()].diff() >= -1e-6).all()
    same = torch.full((1, 1, 2, 4, 4), 0.3)
    assert torch.equal(OPERATIONS["equalize"](same, torch.zeros(1)), same)


def test_crop_is_a_part_of_the_frame_at_its_scale():
    ramp = torch.linspace(0, 1, 64)[None, :].repeat(64, 1).expand(50, 1, 2, 64, 64)
    out = RandomResizedCrop(scale=(0.25, 0.25), ratio=(1.0, 1.0))(ramp, generator())
    inner = out[..., 8:-8].diff(dim=-1) * 63
    assert torch.allclose(inner, torch.full_like(inner, 0.5), atol=1e-3)  # half as wide: half the slope
    assert out.min() < 0.1
    assert out.max() > 0.9
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))(ramp, generator())
    assert torch.allclose(whole, ramp, atol=1e-5)


def test_shift_moves_whole_pixels_and_repeats_the_border():
    clips = torch.rand(200, 2, 3, 6, 7, generator=generator())
    out = RandomShift(1)(clips, generator(1))
    padded = F.pad(clips.flatten(1, 2), (1, 1, 1, 1), mode="replicate").view(200, 2, 3, 8, 9)
    seen = set()
    for k in range(200):
        windows = {(y, x): padded[k, :, :, y : y + 6, x : x + 7] for y in range(3) for x in range(3)}
        found = [place for place, window in windows.items() if torch.equal(out[k], window)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 9


def test_flip_invert_noise_and_cutout_do_what_they_say():
    clips = torch.rand(400, 1, 2, 8, 8, generator=generator())
    flipped = RandomFlip(0.5)(clips, generator())
    assert (flipped == clips.flip(-1)).flatten(1).all(1).float().mean() == pytest.approx(0.5, abs=0.1)
    inverted = RandomInvert(0.3)(clips, generator()) == 1 - clips
    assert inverted.flatten(1).all(1).float().mean() == pytest.approx(0.3, abs=0.08)
    noise = RandomNoise(0.25)(torch.full((400, 1, 2, 16, 16), 0.5), generator()) - 0.5
    assert noise.flatten(1).std(1).mean() == pytest.approx(0.125, abs=0.02)
    cut = (Cutout(0.5)(clips, generator()) == 0.5).flatten(1).float().mean(1)
    assert cut.max() <= 0.25 + 0.15  # pixels are counted by their centres
    assert 0.03 < cut.mean() < 0.1


def test_one_clip_or_a_batch_and_a_strong_view_is_more_than_a_weak_one():
    clips = torch.rand(4, 3, 2, 8, 8, generator=generator())
    augment = ClipAugment()
    assert augment.weak(clips[0], generator()).shape == (3, 2, 8, 8)
    weak, strong = augment.weak(clips, generator(2)), augment.strong(clips, generator(2))
    assert torch.equal(weak, RandomResizedCrop()(clips, generator(2)))
    assert not torch.equal(weak, strong)
    plain = ClipAugment(weak_transforms=(), strong_transforms=())
    assert torch.equal(plain.strong(clips, generator()), clips)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_clips(torch.zeros(3, 8, 8)), r"expected floating-point \[B, C, T, H, W\], got .* \[3, 8, 8\]"),
        (lambda: check_clips(torch.zeros(1, 1, 2, 4, 4).byte()), "got torch.uint8"),
        (lambda: RandAugment(operations=["rotat"]), "unknown operation 'rotat'. Did you mean 'rotate'"),
        (lambda: RandAugment(operations=[]), "operations not empty"),
        (lambda: RandomResizedCrop(scale=(0.5, 2.0)), r"scale must be a range within \(0, 1\]"),
        (lambda: RandomResizedCrop(ratio=(2.0, 1.0)), "ratio must be a range of positive numbers"),
    ],
)
def test_bad_augmentation(make, message):
    with pytest.raises(UserError, match=message):
        make()


# The module


def network(seed=0, width=4, channels=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(channels, width, 3, (1, 2, 2), 1, bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def clips_and_labels(n=6, seed=0):
    clips = torch.rand(n, 1, 3, 6, 6, generator=generator(seed))
    return clips, torch.randint(3, (n,), generator=generator(seed + 1))


def test_the_step_is_the_formula_in_one_forward_a_network():
    primary, auxiliary = network(0), network(1, width=2)
    labelled, (weak, _), (strong, _) = clips_and_labels(4), clips_and_labels(6, 2), clips_and_labels(6, 3)
    calls = []
    for model in (primary, auxiliary):
        model.register_forward_hook(lambda module, inputs, outputs: calls.append(len(inputs[0])))
    loss, stats = CMPLModule(primary, auxiliary, threshold=0.34, unlabelled_weight=0.5).training_step(
        labelled, weak, strong
    )
    assert calls == [16, 16]
    everything = torch.cat([labelled[0], weak, strong])
    f, a = primary(everything), auxiliary(everything)  # batch statistics over all three kinds of clips
    unlabelled, expected = cross_pseudo_label_loss([f[4:10], a[4:10]], [f[10:], a[10:]], 0.34)
    supervised = F.cross_entropy(f[:4], labelled[1]) + F.cross_entropy(a[:4], labelled[1])
    assert torch.allclose(loss, supervised + 0.5 * unlabelled.sum())
    assert torch.equal(stats.mask_rate, expected.mask_rate)
    apart = F.cross_entropy(primary(labelled[0]), labelled[1])
    assert not torch.allclose(apart, F.cross_entropy(f[:4], labelled[1]))


def test_predictions_are_the_primary_networks():
    primary, auxiliary = network(0), network(1)
    module = CMPLModule(primary, auxiliary).eval()
    clips, _ = clips_and_labels()
    assert torch.equal(module.predict(clips), primary(clips))
    assert torch.equal(module(clips), primary(clips))


def test_a_network_that_teaches_itself_is_fixmatch():
    model = network()
    labelled, (weak, _), (strong, _) = clips_and_labels(4), clips_and_labels(6, 2), clips_and_labels(6, 3)
    loss, _ = CMPLModule(model, threshold=0.34).training_step(labelled, weak, strong)
    shared, _ = CMPLModule(model, model, threshold=0.34).training_step(labelled, weak, strong)
    assert torch.allclose(shared, 2 * loss)
    assert len(list(CMPLModule(model, model).parameters())) == len(list(model.parameters()))


def test_nothing_passes_a_threshold_of_one_and_training_is_supervised():
    model, reference = network(), network()
    labelled, (weak, _), (strong, _) = clips_and_labels(4), clips_and_labels(6, 2), clips_and_labels(6, 3)
    CMPLModule(model, threshold=1.0).training_step(labelled, weak, strong)[0].backward()
    F.cross_entropy(reference(torch.cat([labelled[0], weak, strong]))[:4], labelled[1]).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CMPLModule(network(), threshold=1.01), r"threshold must be in \[0, 1\], got 1.01"),
        (lambda: CMPLModule(network(), threshold=-0.1), r"threshold must be in \[0, 1\], got -0.1"),
        (lambda: CMPLModule(network(), unlabelled_weight=-1.0), "unlabelled_weight must be at least 0"),
        (lambda: CMPL(None, torch.zeros(3, 1, 2, 4, 4), batch_size=4), "holds 3 clips, less than one batch of 4"),
        (lambda: CMPL(None, torch.zeros(3, 1, 2, 4, 4), batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: CMPL(None, torch.zeros(3, 1, 2, 4, 4), batch_size=2, threshold=2.0), "threshold must be in"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_clips_must_fit_each_other():
    module = CMPLModule(network())
    labelled, (weak, _) = clips_and_labels(4), clips_and_labels(6)
    with pytest.raises(UserError, match=r"weak and strong views must be of the same clips.*\[6, 1, 3, 6, 6\] and \[5,"):
        module.training_step(labelled, weak, weak[:5])
    with pytest.raises(UserError, match=r"unlabelled clips are \[1, 2, 6, 6\], labelled ones \[1, 3, 6, 6\]"):
        module.training_step(labelled, weak[:, :, :2], weak[:, :, :2])


def test_images_are_no_clips():
    images = TensorDataset(torch.zeros(4, 1, 6, 6), torch.zeros(4).long())
    method = CMPL(None, torch.zeros(6, 1, 3, 6, 6), batch_size=6)
    trainer = Trainer(1, interventions=[method], batch_size=4, accelerator="cpu")
    with pytest.raises(UserError, match=r"labelled clips: expected .*\[B, C, T, H, W\], got .* \[4, 1, 6, 6\]"):
        trainer.fit(network(), images, loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.1))


def test_networks_must_have_the_same_classes():
    other = network()
    other[-1] = nn.Linear(4, 5)
    labelled, (weak, _) = clips_and_labels(4), clips_and_labels(6)
    with pytest.raises(UserError, match=r"logits_weak\[1\] has shape \[6, 5\]"):
        CMPLModule(network(), other).training_step(labelled, weak, weak)


# The intervention


class Hidden(Dataset):
    """Clips whose labels exist, but are not handed out."""

    def __init__(self, clips, labels):
        self.clips, self.labels = clips, labels

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return self.clips[index]


def train(tmp_path=None, *, auxiliary=True, unlabelled=None, interventions=(), epochs=3, **options):
    data = TensorDataset(*clips_and_labels(10))
    unlabelled = clips_and_labels(14, 5)[0] if unlabelled is None else unlabelled
    second = network(1, width=2) if auxiliary else None
    method = CMPL(second, unlabelled, batch_size=6, **{"threshold": 0.34, "seed": 3, **options})
    trainer = Trainer(
        epochs=epochs,
        interventions=[*interventions, method],
        batch_size=4,
        accelerator="cpu",
        checkpoint_dir=tmp_path,
        checkpoint_every=1,
    )
    primary = network(0)
    history = trainer.fit(
        primary,
        data,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 9),
    )
    return primary, second, history


def weights(*models):
    states = [model.state_dict().values() for model in models if model is not None]
    return torch.cat([tensor.flatten() for state in states for tensor in state])


def test_training_moves_both_networks_and_records_what_happened():
    primary, auxiliary, history = train()
    assert not torch.equal(weights(primary), weights(network(0)))
    assert not torch.equal(weights(auxiliary), weights(network(1, width=2)))
    for row in history:
        names = {"mask_rate", "auxiliary_mask_rate", "confidence", "auxiliary_confidence", "agreement"}
        assert names <= row.keys()
        assert all(0 <= row[name] <= 1 for name in names)
        assert row["confidence"] >= 1 / 3
    _, _, history = train(auxiliary=False)
    assert "auxiliary_mask_rate" not in history.last
    assert history.last["agreement"] == 1


def test_a_step_in_the_trainer_is_the_modules_step():
    (clips, labels), unlabelled = clips_and_labels(4), clips_and_labels(6, 5)[0]
    plain = ClipAugment(weak_transforms=(), strong_transforms=())
    primary, auxiliary = network(0), network(1)
    method = CMPL(auxiliary, unlabelled, batch_size=6, augment=plain, threshold=0.34, unlabelled_weight=0.7)
    trainer = Trainer(1, interventions=[method], batch_size=4, accelerator="cpu")
    trainer.fit(primary, TensorDataset(clips, labels), loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.5))
    ours = CMPLModule(network(0), network(1), threshold=0.34, unlabelled_weight=0.7)
    optimizer = SGD(ours.parameters(), lr=0.5)
    ours.training_step((clips, labels), unlabelled, unlabelled)[0].backward()
    optimizer.step()
    assert torch.allclose(weights(primary, auxiliary), weights(ours.primary, ours.auxiliary), atol=1e-6)


def test_both_networks_and_both_views_see_the_same_clips():
    seen = []

    class Watch(Intervention):
        def compute_loss(self, state, next):
            seen.append(state.inputs)
            return next(state)

    method_order = [Watch()]
    second = network(1)
    second.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    data = TensorDataset(*clips_and_labels(4))
    plain = ClipAugment(weak_transforms=(), strong_transforms=())
    method = CMPL(second, clips_and_labels(6, 5)[0], batch_size=6, augment=plain)
    Trainer(1, interventions=[*method_order, method], batch_size=4, accelerator="cpu").fit(
        network(0), data, loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.1)
    )
    primary_sees, auxiliary_sees = seen
    assert torch.equal(primary_sees, auxiliary_sees)
    assert torch.equal(primary_sees[4:10], primary_sees[10:])


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, step, auxiliary):
    undisturbed = train(auxiliary=auxiliary, interventions=[StopAt()])
    with pytest.raises(Stop):
        train(tmp_path, auxiliary=auxiliary, interventions=[StopAt(step)])
    resumed = train(tmp_path, auxiliary=auxiliary, interventions=[StopAt()])
    assert torch.equal(weights(*undisturbed[:2]), weights(*resumed[:2]))
    assert undisturbed[2] == resumed[2]


def test_hidden_labels_cannot_matter():
    clips, labels = clips_and_labels(14, 5)
    noise = torch.randint(3, labels.shape, generator=generator(99))
    assert not torch.equal(labels, noise)
    one, two = train(unlabelled=Hidden(clips, labels)), train(unlabelled=Hidden(clips, noise))
    assert torch.equal(weights(*one[:2]), weights(*two[:2]))
    assert torch.equal(weights(*one[:2]), weights(*train(unlabelled=clips)[:2]))


def test_a_dataset_that_hands_out_labels_is_refused():
    with pytest.raises(UserError, match=r"must yield clips alone, .* got a (list|tuple) of 2: leave labels out"):
        train(unlabelled=TensorDataset(*clips_and_labels(14)))


def test_seed_decides_order_and_augmentation():
    one, two = train(seed=1), train(seed=2)
    assert not torch.equal(weights(*one[:2]), weights(*two[:2]))


def test_the_rest_of_the_chain_sees_the_labelled_logits_of_both_networks():
    shapes = []

    class Spy(LogitClip):
        def compute_loss(self, state, next):
            shapes.append((tuple(state.outputs.shape), len(state.targets)))
            return super().compute_loss(state, next)

    data = TensorDataset(*clips_and_labels(8))
    method = CMPL(network(1), clips_and_labels(6, 5)[0], batch_size=6)
    Trainer(1, interventions=[method, Spy(tau=1.0)], batch_size=4, accelerator="cpu").fit(
        network(0), data, loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.1)
    )
    assert shapes == [((4, 3), 4)] * 4


def test_it_trains_residual_networks_on_colour_clips():
    clips = torch.rand(8, 3, 4, 16, 16, generator=generator())
    auxiliary = resnet3d(10, 2, 3)
    before = weights(auxiliary)
    method = CMPL(auxiliary, clips, batch_size=4, threshold=0.0)
    Trainer(1, interventions=[method], batch_size=4, accelerator="cpu").fit(
        resnet3d(10, 4, 3),
        TensorDataset(clips, torch.arange(8) % 3),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(SGD, lr=0.01),
    )
    assert weights(auxiliary).isfinite().all()
    assert not torch.equal(weights(auxiliary), before)


def _share(rank, port, folder):
    if port:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        torch.set_num_threads(1)
    primary, auxiliary = network(0), network(1, width=2)
    primary[1], auxiliary[1] = nn.Identity(), nn.Identity()  # BatchNorm would see a process's clips alone
    plain = ClipAugment(weak_transforms=(), strong_transforms=())
    method = CMPL(auxiliary, clips_and_labels(14, 5)[0], batch_size=6, augment=plain, threshold=0.34)
    parallel = {"devices": 2, "strategy": "ddp"} if port else {}
    trainer = Trainer(2, interventions=[method], batch_size=4, accelerator="cpu", drop_last=True, **parallel)
    data = TensorDataset(*clips_and_labels(10))
    history = trainer.fit(primary, data, loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.1))
    torch.save((weights(primary, auxiliary), dict(history.last)), folder / f"{port > 0}{rank}.pt")


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_share, (port, tmp_path), nprocs=2)
    _share(0, 0, tmp_path)
    alone, expected = torch.load(tmp_path / "False0.pt")
    for rank in range(2):
        parameters, figures = torch.load(tmp_path / f"True{rank}.pt")
        assert torch.allclose(parameters, alone, atol=1e-6)
        assert figures == pytest.approx(expected, abs=1e-6)
