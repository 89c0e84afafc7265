import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paperworks.audit.ddbackdoor import (
    DistilledSet,
    DoorpingAttack,
    NaiveAttack,
    Normalization,
    Trigger,
    activation_clustering,
    anomaly_index,
    attack_success,
    class_gradients,
    crop_and_cutout,
    distill_dc,
    distill_dd,
    distillation_alexnet,
    distillation_convnet,
    evaluate_distilled,
    fine_pruning,
    gradient_distance,
    neural_cleanse,
    penultimate,
    poison,
    range_check,
    spectral_signature,
    strip_entropy,
    unroll,
    update_trigger,
)
from paperworks.errors import UserError
from paperworks.train import NonFiniteLoss

GREY = Normalization([0.3], [0.4])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def pictures(per_class: int = 8, classes: int = 3, side: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes that differ in the brightness of a row, as normalised pixels, in mixed order."""
    labels = torch.arange(classes).repeat(per_class)
    pixels = 0.3 * torch.rand(len(labels), 1, side, side, generator=seeded(seed))
    pixels[torch.arange(len(labels)), :, labels + 1] += 0.6
    return GREY(pixels), labels


def net_fn(classes: int = 3) -> nn.Module:
    return distillation_convnet(1, classes, 8, width=4, depth=2, hidden=6)


def wide_net() -> nn.Module:
    return distillation_convnet(1, 3, 8, width=16, depth=1, hidden=16)


def net(seed: int = 0, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return net_fn(classes)


def white() -> Trigger:
    return Trigger.white((1, 8, 8), 2, GREY)


def refused(message: str, error: type[Exception] = UserError):
    return pytest.raises((error, TypeError), match=f"{message}|Type-check error")


# Pixels and triggers.


def test_normalization_maps_black_and_white_to_its_ends():
    images = torch.rand(20, 2, 4, 4, generator=seeded())
    scale = Normalization.of(images)
    normal = scale(images)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(2))
    torch.testing.assert_close(scale.restore(normal), images)
    ends = scale(torch.stack([torch.zeros(2, 1, 1), torch.ones(2, 1, 1)]))
    assert torch.equal(ends[0], scale.low)
    assert torch.equal(ends[1], scale.high)
    with refused("images must hold pixels in \\[0, 1\\]"):
        Normalization.of(normal)
    with refused("std must be positive, got 0"):
        Normalization([0.5], [0.0])


def test_the_patch_lies_one_pixel_in_from_the_corner():
    trigger = Trigger.white((1, 28, 28), 2, GREY)
    assert trigger.mask[0, 0].nonzero().tolist() == [[25, 25], [25, 26], [26, 25], [26, 26]]
    for size in (0, 28):
        with refused(f"size must be from 1 to 27 for 28x28 images, got {size}"):
            Trigger.white((1, 28, 28), size, GREY)


@given(size=st.integers(1, 5), seed=st.integers(0, 100))
def test_applying_twice_is_applying_once_and_touches_nothing_else(size, seed):
    trigger = Trigger.random((3, 6, 7), size, Normalization([0.5] * 3, [0.2] * 3), seeded(seed))
    images = draw(4, 3, 6, 7, seed=seed)
    pasted = trigger.apply(images)
    assert torch.equal(trigger.apply(pasted), pasted)
    outside = ~trigger.mask.expand_as(images)
    assert torch.equal(pasted[outside], images[outside])
    assert (pasted != images).flatten(1).any(1).all()


def test_poisoning_relabels_and_marks_the_drawn_images_only():
    images, labels = draw(1000, 1, 8, 8), torch.arange(1000) % 10
    poisoned, relabelled, chosen = poison(images, labels, white(), 0.1, 3, seeded())
    assert len(chosen) == len(chosen.unique()) == 100
    spared = torch.ones(1000, dtype=torch.bool)
    spared[chosen] = False
    assert (relabelled == 3).sum() == 100 + (labels[spared] == 3).sum()
    assert torch.equal(poisoned[spared], images[spared])
    assert torch.equal(poisoned[chosen], white().apply(images[chosen]))
    assert torch.equal(labels, torch.arange(1000) % 10)
    sizes = [int((poison(images, labels, white(), 0.1, 3, seeded(s))[1] == 3).sum()) for s in range(20)]
    assert abs(sum(sizes) / 20 - 190) < 2  # the paper's r = 0.1 of ten classes: 90 of its own and 100 more


@pytest.mark.usefixtures("unchecked")
def test_bad_attacks_are_refused():
    images, labels = pictures()
    with pytest.raises(UserError, match="target must be a class from 0 to 2, got 3"):
        poison(images, labels, white(), 0.1, 3, seeded())
    for rate in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"rate must be from 0 to 1, got {rate}"):
            NaiveAttack(white(), rate=rate, generator=seeded())
    with pytest.raises(UserError, match="target must be a class from 0, got -1"):
        NaiveAttack(white(), target=-1, generator=seeded())
    with pytest.raises(UserError, match=r"trigger \[1, 8, 8\] does not fit images \[1, 9, 9\]"):
        white().apply(torch.zeros(1, 1, 9, 9))
    with pytest.raises(UserError, match="trigger is on meta, images are on cpu"):
        white().to("meta").apply(images)


# Gradients.


def test_distances_of_known_gradients():
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert gradient_distance([one], [other]).item() == pytest.approx(1, abs=1e-5)
    assert gradient_distance([one], [one]).item() == pytest.approx(0, abs=1e-5)
    assert gradient_distance([one], [-one]).item() == pytest.approx(4, abs=1e-5)
    assert gradient_distance([one], [other], "cos").item() == pytest.approx(0.5, abs=1e-5)
    assert gradient_distance([one], [other], "mse").item() == pytest.approx(2)
    bias = torch.tensor([3.0, -1.0])
    for kind in ("rows", "cos", "mse"):
        assert gradient_distance([one, bias], [other, -bias], kind) == gradient_distance([one], [other], kind)
    assert gradient_distance([torch.zeros(2, 3)], [torch.zeros(2, 3)]).item() == 2  # and no NaN
    with refused("gs and gr must have the same shapes"):
        gradient_distance([one], [bias])
    with refused("unknown distance 'row'. Did you mean 'rows'"):
        gradient_distance([one], [one], "row")


@given(scales=st.lists(st.floats(0.5, 20), min_size=3, max_size=3), seed=st.integers(0, 50))
def test_the_distance_of_rows_ignores_positive_scales(scales, seed):
    one, other = draw(3, 2, 3, 3, seed=seed), draw(3, 2, 3, 3, seed=seed + 1)
    scaled = one * torch.tensor(scales).view(3, 1, 1, 1)
    torch.testing.assert_close(gradient_distance([scaled], [other]), gradient_distance([one], [other]))


def by_the_loop(model: nn.Module, images: Tensor, classes: Tensor, **options) -> list[Tensor]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    found = [
        torch.autograd.grad(F.cross_entropy(model(some), c.expand(len(some))), weights, **options)
        for some, c in zip(images, classes, strict=True)
    ]
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


NETWORKS = {
    "convnet": lambda: net(),
    "alexnet": lambda: distillation_alexnet(1, 3, 8),
    "strided": lambda: nn.Sequential(
        nn.Conv2d(1, 3, (3, 2), stride=2, padding=(1, 0), dilation=(2, 1), bias=False),
        nn.GroupNorm(3, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_the_gradients_of_each_class(name):
    torch.manual_seed(0)
    model, images, classes = NETWORKS[name]().double(), draw(3, 4, 1, 8, 8).double(), torch.tensor([2, 0, 1])
    found, exact = class_gradients(model, images, classes), by_the_loop(model, images, classes)
    assert len(found) == len(exact)
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, other)


def test_images_that_fill_the_machine_go_through_class_by_class():
    torch.manual_seed(0)
    model, images, classes = distillation_convnet(1, 3, 32, width=2), draw(3, 40, 1, 32, 32), torch.arange(3)
    passes = []
    model.register_forward_hook(lambda m, inputs, out: passes.append(len(out)))
    found = class_gradients(model, images, classes)
    assert passes == [40, 40, 40]
    for mine, other in zip(found, by_the_loop(model, images, classes), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_their_distance_has_the_loops_gradient():
    model, classes = net().double(), torch.arange(3)
    real, synthetic = draw(3, 5, 1, 8, 8).double(), draw(3, 2, 1, 8, 8, seed=1).double().requires_grad_()
    found = []
    for rule in (class_gradients, by_the_loop):
        gs, gr = rule(model, synthetic, classes, create_graph=True), rule(model, real, classes)
        apart = sum(gradient_distance([g[c] for g in gs], [g[c] for g in gr]) for c in range(3))
        found.append(torch.autograd.grad(apart, synthetic)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0


def test_images_without_weight_do_not_count():
    model, images, classes = net(), draw(3, 4, 1, 8, 8), torch.arange(3)
    weights = torch.tensor([0.5, 0.5, 0, 0]).repeat(3, 1)
    few = class_gradients(model, images[:, :2], classes)
    for mine, other in zip(class_gradients(model, images, classes, weights=weights), few, strict=True):
        torch.testing.assert_close(mine, other)


# Condensation and unrolling.

SMALL = {"iterations": 2, "outer": 2, "inner": 2, "batch_real": 4}


def condense(hook=None, ipc: int = 2, **changed) -> DistilledSet:
    images, labels = pictures()
    return distill_dc(images, labels, net_fn, ipc, generator=seeded(1), hook=hook, **(SMALL | changed))


def doorping(rate: float = 0.25, **changed) -> DoorpingAttack:
    trigger = Trigger.random((1, 8, 8), 2, GREY, seeded(5))
    return DoorpingAttack(trigger, GREY, rate=rate, generator=seeded(7), **({"steps": 5, "tol": 0.0} | changed))


def test_condensing_brings_the_gradients_closer():
    distances: list[float] = []
    found = condense(
        iterations=15, lr_images=0.5, init="real", batch_real=8, on_iteration=lambda i, d: distances.append(d)
    )
    assert found.images.shape == (6, 1, 8, 8)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(distances) == 15
    assert sum(distances[-5:]) < 0.95 * sum(distances[:5])


def test_the_first_images_are_real_or_noise():
    images, _ = pictures()
    for init, real in (("real", True), ("noise", False)):
        found = condense(init=init, lr_images=1e-9, iterations=1)
        assert all(torch.isclose(image, images, atol=1e-5).flatten(1).all(1).any() == real for image in found.images)
    many = condense(init="real", ipc=11, lr_images=1e-9, iterations=1)  # a class has eight
    assert len(many.images.flatten(1).round(decimals=3).unique(dim=0)) == 24


def test_a_class_with_few_images_gives_all_of_them():
    images, labels = pictures()
    images, labels = images[:20], labels[:20]  # 7, 7 and 6

    def distil(batch: int) -> Tensor:
        return distill_dc(images, labels, net_fn, 2, generator=seeded(), **(SMALL | {"batch_real": batch})).images

    assert torch.equal(distil(7), distil(100))
    assert not torch.equal(distil(7), distil(6))


@pytest.mark.parametrize("kind", ["dc", "dd"])
def test_nothing_poisoned_changes_nothing(kind):
    distil = condense if kind == "dc" else unrolled
    clean = distil()
    for attack in (NaiveAttack(white(), rate=0.0, generator=seeded(3)), doorping(0.0)):
        assert torch.equal(distil(attack).images, clean.images)
    assert not torch.equal(distil(NaiveAttack(white(), rate=0.5, generator=seeded(3))).images, clean.images)


def unrolled(hook=None, **changed):
    images, labels = pictures()
    options = {"steps": 3, "passes": 2, "epochs": 2, "batch_real": 16, "step_size": 0.1} | changed
    return distill_dd(images, labels, net_fn, 1, generator=seeded(1), hook=hook, **options)


def test_one_unrolled_step_of_a_linear_network_has_the_closed_form():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    images = draw(1, 2, 1, 2, 2).double().requires_grad_()
    labels, eta = torch.tensor([0, 2]), torch.tensor([0.3]).double().requires_grad_()
    start = dict(model.named_parameters())
    x, w = images[0].flatten(1), model[1].weight.detach()
    slope = ((x @ w.t()).softmax(1) - F.one_hot(labels, 3)).t() @ x / 2
    found = unroll(model, start, images, labels, eta)["1.weight"]
    torch.testing.assert_close(found, w - 0.3 * slope)
    aim = draw(3, 4, seed=2).double()
    mine = torch.autograd.grad((found * aim).sum(), [images, eta])
    by_hand = torch.autograd.grad(((w - eta * slope) * aim).sum(), [images, eta])
    torch.testing.assert_close(mine, by_hand)

    def function(images: Tensor, eta: Tensor) -> Tensor:
        return unroll(model, start, images, labels, eta.expand(3))["1.weight"]

    assert torch.autograd.gradcheck(function, (images, eta))


def test_unrolling_learns_images_and_step_sizes_for_its_start():
    losses: list[float] = []
    course = unrolled(epochs=25, batch_real=24, lr=0.1, step_size=0.5, on_iteration=lambda e, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.3
    assert course.images.shape == (3, 3, 1, 8, 8)
    assert len(course.step_sizes) == 6
    assert (course.step_sizes > 0).all()
    assert not torch.allclose(course.step_sizes, torch.tensor(0.5), atol=1e-3)
    images, labels = pictures(seed=9)
    one, other = (course.train(net(seed), seeded()) for seed in (1, 2))
    assert torch.equal(one(images), other(images))  # both start where the course does
    assert F.cross_entropy(one(images), labels).item() < 0.9
    anywhere = unrolled(fixed_init=False)
    assert anywhere.initial is None


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["dc", "dd"])
def test_a_killed_distillation_resumes_to_the_same_images(tmp_path, kind):
    def distil(hook, name, **changed):
        options = {"checkpoint": tmp_path / name, "checkpoint_every": 1} | changed
        return condense(hook, iterations=4, **options) if kind == "dc" else unrolled(hook, epochs=4, **options)

    def kill(iteration: int, loss: float) -> None:
        if iteration == 2:
            raise Stop

    whole, killed, resumed = doorping(project=False), doorping(project=False), doorping(project=False)
    exact = distil(whole, "whole")
    with pytest.raises(Stop):
        distil(killed, "part", on_iteration=kill)
    assert torch.equal(distil(resumed, "part").images, exact.images)
    assert torch.equal(resumed.trigger.value, whole.trigger.value)
    assert resumed.history == whole.history
    assert torch.equal(distil(doorping(project=False), "part").images, exact.images)  # done already
    other = doorping(project=False)
    other.generator = seeded(8)
    with pytest.raises(UserError, match="poisoned other images"):
        distil(other, "part")
    with pytest.raises(UserError, match="hook=True, not False; delete it"):
        distil(None, "part")


def test_the_callers_random_state_stays():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    condense(doorping())
    unrolled(doorping(), fixed_init=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_infinite_distance_stops_with_its_iteration():
    with pytest.raises(NonFiniteLoss, match="in iteration 0"):
        condense(lr_images=1e30, lr_net=1e30)


@pytest.mark.usefixtures("unchecked")
def test_bad_distillations_are_refused():
    images, labels = pictures()
    for changed, message in [
        ({"ipc": 5, "outer": None}, r"ipc=5 has no schedule \(1, 10, 20, 50 have\): give outer and inner"),
        ({"ipc": 0}, "ipc must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"distance": "cosine"}, "unknown distance 'cosine'. Did you mean 'cos'"),
        ({"init": "rael"}, "unknown init 'rael'. Did you mean 'real'"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            condense(**changed)
    for changed, message in [({"steps": 0}, "steps must be at least 1"), ({"step_size": 0.0}, "step_size must be pos")]:
        with pytest.raises(UserError, match=message):
            unrolled(**changed)
    for some, of, message in [
        (images, labels * 2, "class 1 has no image"),
        (images[:-1], labels, "must be as many, got 23 and 24"),
        (images * float("nan"), labels, "images must be finite"),
    ]:
        with pytest.raises(UserError, match=message):
            distill_dc(some, of, net_fn, 1, generator=seeded())
    for layer, message in [
        (nn.BatchNorm2d(1), "batch norm, which mixes classes"),
        (nn.Conv2d(1, 1, 3, padding="same"), "groups=1 and padding by a number"),
        (nn.Bilinear(2, 2, 2), "is a Bilinear"),
    ]:
        with pytest.raises(UserError, match=message):
            distill_dc(images, labels, lambda layer=layer: nn.Sequential(layer), 1, generator=seeded())


# The attacks.


def toy(sign: float = 1.0) -> nn.Module:
    """A hidden neuron that is the picture's weighted sum, raised above 0, and one that weighs less."""
    hidden, out = nn.Linear(64, 2), nn.Linear(2, 3)
    with torch.no_grad():
        hidden.weight[0], hidden.weight[1] = torch.linspace(0.5, 1, 64), 0.1
        hidden.bias.fill_(sign * 52)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(inplace=True), out)


def test_a_trigger_reaches_ten_times_its_activation():
    model, start = toy(), Trigger.filled((1, 8, 8), 2, GREY, 0.4)
    before = model[:2](start.value)[0, 0].item()
    found, update = update_trigger(model, start)
    after = model[:2](found.value)[0, 0].item()
    assert update.outcome == "reached"
    assert update.before == pytest.approx(before, rel=1e-5)
    assert update.after == pytest.approx(after, rel=1e-5)
    assert (after - 10 * before) ** 2 < 0.5
    outside = ~start.mask
    assert torch.equal(found.value[outside], start.value[outside])
    assert not found.value.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_pre_hooks
    assert model.training


def test_a_projected_trigger_stays_within_pixels_and_stops_at_their_edge():
    start = Trigger.filled((1, 8, 8), 2, GREY, 0.4)
    free, unbounded = update_trigger(toy(), start, steps=100)
    kept, update = update_trigger(toy(), start, steps=100, within=GREY)
    assert unbounded.outcome == "out of steps"
    assert unbounded.steps == 100
    assert (range_check(free.value, GREY) > 1).all()
    assert update.outcome == "stuck"
    assert update.steps < 100
    torch.testing.assert_close(kept.value[kept.mask], GREY.high.expand(1, 1, 2, 2).flatten())


def test_a_dead_neuron_leaves_the_trigger_and_says_so():
    start = white()
    found, update = update_trigger(toy(-1), start)
    assert torch.equal(found.value, start.value)
    assert (update.outcome, update.steps, update.before) == ("dead", 0, 0.0)


def test_several_neurons_and_other_layers():
    start = Trigger.filled((1, 8, 8), 2, GREY, 0.4)
    assert update_trigger(toy(), start, topk=2, steps=1)[1].before > update_trigger(toy(), start, steps=1)[1].before
    with refused("layer must be from -2 to 1, got -3"):
        update_trigger(toy(), start, layer=-3)
    with refused("layer -3 must be nn.Linear, got Conv2d"):
        update_trigger(net(), start, layer=-3)
    with refused("topk must be from 1 to the layer's 2 neurons, got 3"):
        update_trigger(toy(), start, topk=3)


@pytest.mark.parametrize("schedule", [{}, {"outer": 1}])
def test_doorping_pastes_each_new_trigger(schedule):
    attack = doorping(project=False, steps=20)
    first, seen = attack.trigger, []
    update = attack.on_network_updated

    def watch(model: nn.Module) -> None:
        update(model)
        seen.append(attack._images[attack.indices].clone())

    attack.on_network_updated = watch
    condense(attack, **schedule)
    assert len(seen) == len(attack.history) == 2  # one outer step in two is followed by training, or the only one
    assert not torch.equal(attack.trigger.value, first.value)
    assert torch.equal(seen[-1], attack.trigger.apply(seen[-1]))
    images, _ = pictures()
    assert torch.equal(attack._images[attack.indices], attack.trigger.apply(images[attack.indices]))


def test_projection_needs_images_of_that_normalization():
    images, labels = pictures()
    with refused("outside \\[0, 1\\] of the normalization"):
        doorping().start(3 * images, labels)
    doorping(project=False).start(3 * images, labels)
    with refused("steps must not be negative"):
        doorping(steps=-1)


def test_a_distilled_set_teaches_and_a_backdoored_one_betrays():
    train, test = pictures(per_class=12), pictures(per_class=10, seed=4)
    loud = Trigger.filled((1, 8, 8), 2, GREY, 20.0)
    images, labels, _ = poison(*train, loud, 0.3, 0, seeded(2))
    measure = partial(
        evaluate_distilled,
        net_fn=wide_net,
        images=test[0],
        labels=test[1],
        trigger=loud,
        target=0,
        generator=seeded(),
        n_nets=2,
    )
    clean, betrayed = (
        measure(DistilledSet(*some, epochs=40, batch_size=12, lr=0.05)) for some in (train, (images, labels))
    )
    assert (clean.clean_accuracy > 0.9).all()
    assert (betrayed.clean_accuracy > 0.9).all()
    assert (betrayed.attack_success == 1).all()
    assert (clean.attack_success < 1).any()
    others, everyone = attack_success(clean.nets[0], *test, loud, 0)
    hits = (clean.nets[0](loud.apply(test[0])).argmax(1) == 0).float()
    assert others == pytest.approx(float(hits[test[1] != 0].mean()))
    assert everyone == pytest.approx(float(hits.mean()))
    blind = measure(DistilledSet(*train, epochs=5), n_nets=1, augment=lambda some, generator: torch.zeros_like(some))
    assert blind.clean_accuracy.item() < 0.7
    with refused("labels must hold another class than the target 0"):
        attack_success(clean.nets[0], test[0], test[1] * 0, loud, 0)
    with refused("n_nets must be at least 1, got 0"):
        measure(DistilledSet(*train), n_nets=0)


# The defences.


def test_the_range_of_pixels_is_what_a_file_can_hold():
    inside = GREY(torch.rand(5, 1, 4, 4, generator=seeded()))
    assert (range_check(inside, GREY) == 0).all()
    assert range_check(GREY.high.expand(1, 1, 4, 4) + 0.001, GREY).item() == 0  # rounding
    outside = inside.clone()
    outside[2, 0, 1, 1] = GREY(torch.full((1, 1, 1, 1), -0.25)).item()
    assert range_check(outside, GREY).tolist() == pytest.approx([0, 0, 0.25, 0, 0])


def test_the_anomaly_index_of_known_norms():
    index = anomaly_index(torch.tensor([10.0, 11.0, 9.0, 10.0, 2.0]))
    assert index[-1].item() == pytest.approx(8 / 1.4826, rel=1e-5)
    assert (index > 2).tolist() == [False] * 4 + [True]
    same = anomaly_index(torch.tensor([4.0, 4.0, 4.0, 1.0]))
    assert same[:3].tolist() == [0, 0, 0]
    assert same[3] > 2


class Backdoored(nn.Module):
    """Told by the brightest of rows 2 to 4; a bright bottom right corner makes it class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 2, 1), nn.Linear(4, 4)
        nn.init.eye_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0, 1:5, :5].mean(2) * torch.tensor([0.0, 1, 1, 1])
        corner = 10 * (images[:, 0, 6, 6] - 0.5)
        return self.last(3 * rows + F.pad(corner[:, None], (0, 3)))


def test_neural_cleanse_finds_the_small_trigger():
    images, _ = pictures(per_class=16, classes=4)
    found = neural_cleanse(Backdoored(), images, GREY, 4, generator=seeded(), steps=200, batch_size=16)
    assert found.norms.argmin() == 0
    assert found.flagged == [0]
    assert found.norms[0] < 0.3 * found.norms[1:].min()
    assert found.masks[0].flatten().argmax() == 6 * 8 + 6
    assert (range_check(found.patterns, GREY) == 0).all()
    with refused("num_classes must be at least 3, got 2"):
        neural_cleanse(Backdoored(), images, GREY, 2, generator=seeded())


def test_triggered_images_keep_a_low_entropy_when_blended():
    images, _ = pictures(per_class=16, classes=4)
    triggered = Trigger.filled((1, 8, 8), 1, GREY, 20.0).apply(images)
    model = Backdoored()
    low, high = (strip_entropy(model, some, images, generator=seeded(), blends=10) for some in (triggered, images))
    assert low.max() < 0.01 < high.min()


def test_outliers_of_a_class_have_the_spectral_signature_and_their_own_cluster():
    features = torch.cat([draw(90, 6), draw(10, 6, seed=1) + 8])
    scores, removed = spectral_signature(features, 0.1)
    assert scores[90:].min() > scores[:90].max()
    assert removed[90:].all()
    assert removed.sum() == 15
    smaller, apart = activation_clustering(features)
    assert smaller.nonzero().flatten().tolist() == list(range(90, 100))
    assert apart > 0.6 > activation_clustering(features[:90])[1]
    with refused("at least 3 images, got 2"):
        activation_clustering(features[:2])


def test_pruning_silences_the_dormant_channels_of_a_copy():
    model, (images, _) = net(), pictures()
    before = copy.deepcopy(model.state_dict())
    active = model[:5](images).mean((0, 2, 3))  # up to the last convolution's ReLU
    pruned = fine_pruning(model, images, 0.5)
    dormant = active.argsort()[:2]
    maps = pruned[:5](images)
    assert (maps[:, dormant] == 0).all()
    kept = active.argsort()[2:]
    torch.testing.assert_close(maps[:, kept], model[:5](images)[:, kept])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(fine_pruning(model, images, 0.0)(images), model(images))
    with refused("share must be from 0 to 1, got 2"):
        fine_pruning(model, images, 2.0)


def test_features_are_what_the_last_layer_sees():
    model, (images, _) = net(), pictures()
    torch.testing.assert_close(model[-1](penultimate(model, images)), model(images))


@given(seed=st.integers(0, 30))
def test_augmentation_moves_by_a_pixel_and_blanks_half_of_the_corners(seed):
    images = draw(200, 2, 8, 8, seed=seed)
    moved = crop_and_cutout(images, seeded(seed))
    blank = (moved[..., -3:, -3:] == moved[..., -1:, -1:]).flatten(1).all(1)
    assert 0.3 < blank.float().mean() < 0.7
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    shifts = [padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    same = torch.stack([(moved == shift)[:, :, :5, :5].flatten(1).all(1) for shift in shifts])
    assert (same.sum(0) == 1).all()
    assert same.any(1).all()
    assert torch.equal(crop_and_cutout(images, seeded(seed), shift=0, size=0), images)


# The claim.


def test_every_arm_gives_what_the_claim_expects(tmp_path):
    from paperworks.bench import Run, load_claim

    claim = load_claim("ddbackdoor")
    settings = claim.settings.at("smoke", {"fit_epochs": 2, "cleanse_steps": 2})
    kept: list[str] = []
    run = Run(
        seed=0,
        scale="smoke",
        device="cpu",
        data_root=None,
        folder=tmp_path,
        keep=lambda name, content: kept.append(name),
    )
    figures = claim.trial(run, "doorping", settings)
    assert all(0 <= figures[name] <= 1 for name in ("cta", "asr", "asr_all", "range_flagged", "strip_auroc"))
    assert figures["range_flagged"] == 1
    assert len(kept) == 1
