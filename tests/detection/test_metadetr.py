"""Codes of classes, places that choose among them, episodes, and what is found of many classes in few passes."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from torchvision.ops import box_convert, roi_align
from torchvision.transforms import v2

from paperworks.bench import Run, load_claim
from paperworks.detection import (
    CodeBook,
    CorrelationalAggregation,
    EpisodeSampler,
    MetaCriterion,
    MetaDetr,
    plain_detr,
)
from paperworks.detection.core import (
    CocoData,
    MSDeformAttn,
    Prediction,
    SetCriterion,
    Shot,
    SupportSet,
    Targets,
    TinyBackbone,
    check_shots,
    coco_targets,
    flat_targets,
    pack,
    sample_k_shot,
    to_coco,
)
from paperworks.detection.metadetr import (
    CosineClassifier,
    MetaPrediction,
    MetaTargets,
    MetaTask,
    augmented,
    episode_targets,
    finetuning_factor,
    inference_episodes,
    parameter_groups,
    prepare_finetuning,
    sample_episode,
    slot_codes,
)
from paperworks.detection.metadetr.aggregation import index_codes
from paperworks.errors import UserError
from paperworks.train import State, Trainer
from paperworks.worlds import FLAT_SHAPES, flat_scenes, write_coco
from stopping import Stop, StopAt


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(classes=7, slots=5, **changes):
    torch.manual_seed(0)
    sizes = {"d": 16, "heads": 2, "hidden": 32, "queries": 4, "encoders": 2, "decoders": 2}
    return MetaDetr(classes, slots, **sizes | changes).eval()


class Patches(nn.Module):
    """A backbone that does not look beyond its cells, so that a canvas around the picture cannot reach them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, 8)

    def forward(self, images):
        return [self.conv(images)]


def aggregation(slots=3, d=8, **changes):
    torch.manual_seed(1)
    return CorrelationalAggregation(d, slots, **changes)


@pytest.fixture(scope="module")
def scenes():
    return flat_scenes(24, size=32, classes=7, objects=(1, 2), radius=(6.0, 8.0), seed=0)


@pytest.fixture(scope="module")
def support(scenes):
    return SupportSet(list(zip(scenes.images, flat_targets(scenes), strict=True)))


def some_codes(count, d=16, seed=3):
    return torch.rand(count, d, generator=draw(seed))


def a_book(model, count=7):
    return CodeBook(tuple(range(count)), some_codes(count), ((),) * count, model.fingerprint)


# Aggregation.


def test_codes_of_slots():
    slots = slot_codes(2, 4)
    torch.testing.assert_close(slots[0], torch.tensor([1.0, 0, 1, 0]))
    torch.testing.assert_close(slots[1], torch.tensor([0.99995, 0.0099998, 0.540302, 0.841471]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("background", [True, False])
def test_a_place_with_one_class_and_no_background_takes_its_code(background):
    cam, codes = aggregation(1, background=background), some_codes(1, 8)
    x = 0.1 + torch.rand(2, 5, 8, generator=draw())
    with torch.no_grad():
        cam.project.weight.copy_(torch.eye(8))
        if background:
            cam.background.fill_(-1e9)
    y, tau, attention = cam(x, codes[None])
    torch.testing.assert_close(attention[..., 0], torch.ones(2, 5))
    torch.testing.assert_close(tau, slot_codes(1, 8).expand(2, 5, 8))
    expected = cam.merge(torch.cat([cam.agree(codes * x), cam.differ(x - codes), x], -1))
    torch.testing.assert_close(y, expected)


def test_places_that_cannot_tell_share_out_evenly():
    cam, codes = aggregation(3), some_codes(3, 8)
    nn.init.zeros_(cam.project.weight)
    x = torch.randn(2, 5, 8, generator=draw())
    y, tau, attention = cam(x, codes[None])
    torch.testing.assert_close(attention, torch.full((2, 5, 4), 0.25))
    torch.testing.assert_close(tau, (slot_codes(3, 8).sum(0) / 4).expand(2, 5, 8))
    g = codes.sum(0) / 4
    torch.testing.assert_close(y, cam.merge(torch.cat([cam.agree(g * x), cam.differ(x - g), x], -1)))


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_aggregation_place_by_place(seed):
    cam, codes = aggregation(3), some_codes(3, 8, seed)
    x = torch.randn(1, 4, 8, generator=draw(seed))
    y, tau, _ = cam(x, codes[None])
    w, z, slots = cam.project.weight, cam.background[0], slot_codes(3, 8)
    for place in range(4):
        q = w @ x[0, place]
        keys = [w @ torch.log(s / (1 - s)) for s in codes.clamp(1e-5, 1 - 1e-5)] + [z]
        a = torch.stack([q @ key / math.sqrt(8) for key in keys]).softmax(0)
        g = sum(a[k] * codes[k] for k in range(3))
        torch.testing.assert_close(tau[0, place], sum(a[k] * slots[k] for k in range(3)))
        parts = [cam.agree(g * x[0, place]), cam.differ(x[0, place] - g), x[0, place]]
        torch.testing.assert_close(y[0, place], cam.merge(torch.cat(parts)))


@settings(max_examples=10)
@given(st.permutations(range(4)))
def test_order_of_classes_is_told_by_slots_alone(order):
    cam, codes, x = aggregation(4), some_codes(4, 8), torch.randn(2, 5, 8, generator=draw())
    y, tau, attention = cam(x, codes[None])
    moved_y, moved_tau, moved = cam(x, codes[None, order])
    torch.testing.assert_close(moved_y, y)  # g knows no slots
    torch.testing.assert_close(moved[..., :4], attention[..., order])
    assert list(order) == [0, 1, 2, 3] or not torch.allclose(moved_tau, tau)
    cam.task_codes.copy_(cam.task_codes[order].clone())
    torch.testing.assert_close(cam(x, codes[None, order])[1], tau)


def test_the_sigmoid_is_undone_up_to_the_clamp():
    cam, v = aggregation(2).double(), torch.tensor([-20.0, -11.4, 0.3, 11.4, 20.0, 1, 2, 3], dtype=torch.float64)
    undone = torch.tensor([-11.512915, -11.4, 0.3, 11.4, 11.512915, 1, 2, 3], dtype=torch.float64)
    x = torch.randn(1, 5, 8, dtype=torch.float64, generator=draw())
    _, _, attention = cam(x, v.sigmoid()[None, None])
    logits = (x @ cam.project.weight.T) @ torch.stack([cam.project.weight @ undone, cam.background[0]]).T / math.sqrt(8)
    torch.testing.assert_close(attention, logits.softmax(-1), atol=1e-6, rtol=1e-5)


def test_matrices_begin_as_in_the_released_encoder():
    torch.manual_seed(0)
    model = MetaDetr(7, d=64)
    parts = (model.aggregate, model.first.feed, *(layer.feed for layer in model.encoder.layers))
    for p in (p for part in parts for p in part.parameters() if p.dim() > 1):
        bound = math.sqrt(6 / sum(p.shape))
        assert 0.9 * bound < p.abs().max() <= bound


def test_saturated_codes_in_half_precision():
    cam, codes = aggregation(2).bfloat16(), torch.tensor([[0.0] * 8, [1.0] * 8], dtype=torch.bfloat16)
    assert all(part.isfinite().all() for part in cam(torch.ones(1, 3, 8, dtype=torch.bfloat16), codes[None]))


def test_each_picture_may_have_codes_of_its_own():
    cam, x, codes = aggregation(2), torch.randn(3, 5, 8, generator=draw()), some_codes(6, 8).view(3, 2, 8)
    together = cam(x, codes)
    for k in range(3):
        for whole, part in zip(together, cam(x[k : k + 1], codes[k : k + 1]), strict=True):
            torch.testing.assert_close(whole[k : k + 1], part)


def test_gradients_of_aggregation():
    cam = aggregation(2, d=4).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, generator=draw(), requires_grad=True)
    codes = (0.2 + 0.6 * torch.rand(1, 2, 4, dtype=torch.float64, generator=draw())).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, codes: cam(x, codes)[:2], (x, codes))


# Codes.


def test_a_code_is_the_mean_of_its_box():
    model, boxes = tiny(), torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.5, 1.0]])
    images, pad = torch.rand(2, 3, 64, 48, generator=draw()), torch.ones(2, 64, 48, dtype=torch.bool)
    pad[0, :60, :33], pad[1, :20, :48] = False, False  # no multiples of the stride
    seen = model.attend(images, pad)
    pixels = box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([[33.0, 60, 33, 60], [48, 20, 48, 20]])
    regions = roi_align(seen.as_map(), [b[None] for b in pixels], 7, spatial_scale=1 / 8, aligned=True)
    torch.testing.assert_close(model.encode(images, boxes, pad), regions.mean((2, 3)).sigmoid())


def test_a_large_canvas_changes_no_code_and_no_find():
    model, images, boxes = tiny(backbone=Patches()), torch.rand(2, 3, 32, 32, generator=draw()), torch.tensor([0.5] * 4)
    model.group_norm = nn.Identity()  # which would look at all of the canvas
    large, pad = torch.zeros(2, 3, 48, 64), torch.ones(2, 48, 64, dtype=torch.bool)
    large[:, :, :32, :32], pad[:, :32, :32] = images, False
    boxes = boxes.expand(2, 4)
    torch.testing.assert_close(model.encode(images, boxes), model.encode(large, boxes, pad))
    book = a_book(model)
    for small, padded in zip(model.predict(images, book), model.predict((large, pad), book), strict=True):
        torch.testing.assert_close(small, padded, atol=1e-4, rtol=1e-4)


def test_the_mean_of_one_instance_shown_often_is_its_code(scenes):
    model, target = tiny(), Targets(torch.tensor([3]), torch.tensor([[0.5, 0.5, 0.5, 0.5]]), 4, (32, 32), (17,))
    once, often = (SupportSet([(scenes.images[0], target)] * times) for times in (1, 5))
    one, five = model.encode_classes(once), model.encode_classes(often)
    torch.testing.assert_close(one.codes, five.codes)
    torch.testing.assert_close(one.codes, model.encode(scenes.images[:1], target.boxes))
    assert one.classes == (3,)
    assert one.instances == five.instances == (((4, 17),),)
    flipped = model.encode_classes(once, draws=6, augment=v2.RandomHorizontalFlip(1.0))
    mirrored = model.encode(scenes.images[:1].flip(-1), target.boxes)
    torch.testing.assert_close(flipped.codes, mirrored)


def test_codes_of_pictures_of_one_size_do_not_depend_on_how_many_are_made_at_once(support):
    model = tiny()
    books = [model.encode_classes(support, draws=4, batch_size=size) for size in (1, 5, 64)]
    for book in books[1:]:
        torch.testing.assert_close(book.codes, books[0].codes)
    assert [len(keys) for keys in books[0].instances] == [min(4, support.count(label)) for label in range(7)]


def test_a_book_on_disk_finds_the_same(scenes, support, tmp_path):
    model = tiny()
    book = model.encode_classes(support)
    book.save(tmp_path / "classes.pt")
    again = CodeBook.load(tmp_path / "classes.pt")
    assert (again.classes, again.instances, again.fingerprint) == (book.classes, book.instances, book.fingerprint)
    for ours, theirs in zip(
        model.predict(scenes.images[:2], book), model.predict(scenes.images[:2], again), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_codes_of_other_weights_are_refused(scenes):
    model = tiny()
    book = a_book(model)
    with torch.no_grad():
        model.decoder.class_head.weight.add_(1.0)
    model.predict(scenes.images[:1], book)  # makes no codes
    with torch.no_grad():
        model.first.norm.weight.add_(1e-3)
    with pytest.raises(UserError, match="the codes were made with other weights"):
        model.predict(scenes.images[:1], book)


def test_codes_are_refused_after_a_step_of_any_optimizer(scenes):
    model = tiny()
    book = a_book(model)
    model.train().encode(scenes.images[:1], torch.full((1, 4), 0.5)).sum().backward()
    AdamW(model.first.parameters(), fused=True).step()  # which leaves the versions of weights alone
    with pytest.raises(UserError, match="the codes were made with other weights"):
        model.eval().predict(scenes.images[:1], book)


def test_bad_books(support, tmp_path):
    book = tiny().encode_classes(support)
    assert book.of([5, 2]).classes == (5, 2)
    assert torch.equal(book.of([5, 2]).codes, book.codes[[5, 2]])
    with pytest.raises(UserError, match=r"no support for class 9; there are codes of 0, 1, 2, 3, 4, 5, 6"):
        book.of([0, 9])
    (tmp_path / "text.pt").write_text("no book")
    with pytest.raises(UserError, match=r"text\.pt holds no code book"):
        CodeBook.load(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"nowhere\.pt cannot be read: No such file"):
        CodeBook.load(tmp_path / "nowhere.pt")


def test_the_classifier_is_a_cosine_with_norms():
    classifier, codes = CosineClassifier(8, 3), some_codes(4, 8)
    norms, rows = classifier.rows.parametrizations["weight"].parameters()
    with torch.no_grad():
        norms.copy_(torch.tensor([[1.0], [2.0], [0.5]]))
    expected = 10 * norms[:, 0] * F.cosine_similarity(codes[:, None], rows, dim=-1)
    torch.testing.assert_close(classifier(codes), expected, atol=1e-3, rtol=1e-3)
    before = rows.detach().clone()
    classifier.forget([2], draw())
    assert torch.equal(rows[:2], before[:2])
    assert not torch.equal(rows[2], before[2])
    assert norms[2] == 1.5  # the mean of the others


# Episodes.


@settings(max_examples=50)
@given(st.sets(st.integers(0, 8)), st.integers(1, 7), st.integers(0, 2**31))
def test_an_episode_has_each_class_once(present, size, seed):
    classes = range(9)
    episode = sample_episode(sorted(present), classes, size, draw(seed))
    assert len(set(episode)) == len(episode) == size
    shown = len(present & set(episode))
    assert max(0, size - (9 - len(present))) <= shown <= min(len(present), size)


def test_episodes_vary_in_how_much_they_show():
    generator = draw()
    episodes = [sample_episode([0, 1, 2], range(9), 4, generator) for _ in range(400)]
    shown = torch.tensor([len({0, 1, 2} & set(episode)) for episode in episodes]).bincount()
    assert (shown > 70).all()  # 100 each of 0 to 3, give or take three deviations
    slots = torch.tensor([episode.index(0) for episode in episodes if 0 in episode]).bincount(minlength=4)
    assert (slots > 0.15 * slots.sum()).all()


def test_targets_of_an_episode_are_slots():
    boxes = torch.rand(4, 4)
    whole = Targets(torch.tensor([6, 2, 5, 2]), boxes, 3, (10, 20), (11, 12, 13, 14))
    mine = episode_targets(whole, [2, 0, 6])
    assert mine.labels.tolist() == [2, 0, 0]
    assert torch.equal(mine.boxes, boxes[[0, 1, 3]])
    assert (mine.image_id, mine.size, mine.ids) == (3, (10, 20), (11, 12, 14))
    assert len(episode_targets(whole, [0, 1])) == 0


def test_episodes_at_inference():
    assert list(inference_episodes(7, 5)) == [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([2, 3, 4, 5, 6], [5, 6])]
    assert list(inference_episodes(3, 5)) == [([0, 1, 2], [0, 1, 2])]


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_class_is_asked_for_once(count, size):
    episodes = list(inference_episodes(count, size))
    assert [label for _, new in episodes for label in new] == list(range(count))
    assert len(episodes) == math.ceil(count / size)
    assert all(len(classes) == min(size, count) and set(new) <= set(classes) for classes, new in episodes)


def test_augmentation_moves_the_box_along_and_keeps_the_object():
    image = torch.zeros(3, 20, 40)
    image[:, 4:8, 2:12] = 1
    shot = Shot(image, torch.tensor([7 / 40, 6 / 20, 10 / 40, 4 / 20]), 1, (0, 0))
    flipped = augmented(shot, v2.RandomHorizontalFlip(1.0), draw())
    torch.testing.assert_close(flipped.box, torch.tensor([33 / 40, 0.3, 0.25, 0.2]))
    assert flipped.image[0, 4:8, 28:38].min() == 1
    for seed in range(20):
        cropped = augmented(shot, v2.RandomCrop((10, 10)), draw(seed))
        corners = box_convert(cropped.box[None], "cxcywh", "xyxy")[0] * 10
        x1, y1, x2, y2 = corners.round().int().tolist()
        assert (x2 - x1) * (y2 - y1) >= 8  # a fifth of 40
        assert cropped.image[0, y1:y2, x1:x2].min() == 1
    before = torch.get_rng_state()
    again = augmented(shot, v2.RandomCrop((10, 10)), draw(19))
    assert torch.equal(again.image, cropped.image)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="the augmentation left less than 20% of the pixels of an object of class 1"):
        augmented(shot, v2.Lambda(lambda x: v2.functional.crop(x, 15, 30, 5, 5)), draw())


# Training.


def a_batch(scenes, support):
    """Three pictures in two episodes of five classes."""
    state = State(None, None, None, None, None, epochs=1, total_steps=1)
    state.inputs, state.targets = scenes.images[:3], pack(flat_targets(scenes)[:3])
    EpisodeSampler(support, 5, 2).on_batch(state)
    return state.inputs, state.targets


def test_a_batch_becomes_pictures_times_episodes(scenes, support):
    task, wanted = a_batch(scenes, support)
    assert task.supports.shape == (10, 3, 32, 32)
    assert task.classes.shape == (2, 5)
    assert torch.equal(wanted.classes, task.classes.flatten())
    assert len(wanted) == 6
    for row, mine in enumerate(wanted.objects):
        whole, classes = flat_targets(scenes)[row // 2], task.classes[row % 2].tolist()
        kept = [label for label in whole.labels.tolist() if label in classes]
        assert [classes[slot] for slot in mine.labels.tolist()] == kept
    found = tiny()(task)
    assert found.layers[-1].logits.shape == (6, 4, 5)
    assert found.code_logits.shape == (10, 7)
    row, one = 3, tiny()
    codes = one.encode(task.supports, task.boxes)[5:]
    alone = one.search(one.attend(task.images[1:2], None), codes[None])[-1]
    torch.testing.assert_close(found.layers[-1].logits[row], alone.logits[0], atol=1e-5, rtol=1e-4)


def waves(*shape, phase=0.0):
    return (0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).sin().float().view(shape)


def test_the_released_model_with_these_weights_says_the_same():
    """Figures printed by ZhangGongjie/Meta-DETR, with its deformable attention in plain PyTorch and RoIAlign at stride
    8, on the same maps and codes of positions."""
    model = tiny(d=32, heads=4, queries=6, encoders=3)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * waves(*parameter.shape, phase=place))
    found = model(
        MetaTask(
            0.5 + 0.5 * waves(2, 3, 64, 48),
            torch.zeros(2, 64, 48, dtype=torch.bool),
            0.5 + 0.5 * waves(10, 3, 48, 64, phase=1.0),
            torch.zeros(10, 48, 64, dtype=torch.bool),
            0.4 + 0.1 * waves(10, 4),
            torch.tensor([[3, 1, 0, 5, 6], [2, 4, 6, 0, 1]]),
        )
    )
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=0)
    logits, boxes = found.layers[-1]
    close(logits[0, 0], torch.tensor([-2.462231, -1.921996, -0.443587, 1.267202, 2.386124]))
    close(logits[3, 5], torch.tensor([-2.476486, -1.879484, -0.365769, 1.341042, 2.418710]))
    close(boxes[0, 0], torch.tensor([0.447825, 0.580968, 0.740410, 0.667774]))
    close(boxes[3, 5], torch.tensor([0.451126, 0.435509, 0.738999, 0.667544]))
    expected = [-0.004939, 0.069382, 0.254272, 0.335791, 0.177161, -0.082367, -0.236942]
    close(found.code_logits[0], torch.tensor(expected))


def test_loss_of_slots_is_that_of_the_released_code():
    """Which spreads slots over all classes, fills up with −999999.99, and gathers them for the loss."""
    classes, slots, queries, total = torch.tensor([4, 1, 6]), 3, 5, 8
    generator = draw()
    layer = Prediction(
        torch.randn(2, queries, slots, generator=generator), torch.rand(2, queries, 4, generator=generator)
    )
    boxes = 0.2 + 0.3 * torch.rand(3, 4, generator=generator)
    wanted = [Targets(torch.tensor([0, 2]), boxes[:2]), Targets(torch.tensor([1]), boxes[2:])]
    spread = torch.full((2, queries, total), -999999.99)
    spread[..., classes] = layer.logits
    true = [Targets(classes[target.labels], target.boxes) for target in wanted]
    criterion = SetCriterion()
    onehot = torch.zeros_like(spread)
    for row, (found, mine) in enumerate(criterion.matcher(Prediction(spread, layer.boxes), true)):
        onehot[row, found, true[row].labels[mine]] = 1
    active, truth = spread[..., classes], onehot[..., classes]
    p = active.sigmoid()
    cross = F.binary_cross_entropy_with_logits(active, truth, reduction="none")
    focal = (0.25 * truth + 0.75 * (1 - truth)) * (truth * (1 - p) + (1 - truth) * p) ** 2 * cross
    theirs = focal.mean(1).sum() / 3 * queries
    torch.testing.assert_close(criterion.parts([layer], wanted)["class"], theirs, atol=1e-6, rtol=1e-6)


def test_an_episode_without_anything_to_find(scenes):
    codes = torch.randn(5, 7, generator=draw())
    layer = Prediction(torch.randn(2, 4, 5, generator=draw()), torch.rand(2, 4, 4, generator=draw()))
    nothing = [Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))] * 2
    parts = SetCriterion().parts([layer], nothing)
    assert parts["l1"] == parts["giou"] == 0
    p = layer.logits.sigmoid()
    torch.testing.assert_close(parts["class"], (0.75 * p**2 * -(1 - p).log()).sum(), rtol=1e-4, atol=1e-4)
    labels = torch.tensor([0, 1, 2, 3, 4])
    loss = MetaCriterion()(MetaPrediction([layer], codes), MetaTargets(nothing, labels))
    torch.testing.assert_close(loss, 2 * parts["class"] + 5 * F.cross_entropy(codes, labels))


def test_gradients_reach_supports_and_background(scenes, support):
    task, wanted = a_batch(scenes, support)
    model = tiny().train()
    nn.init.normal_(model.decoder.box_head[-1].weight)  # zero at first, and no gradient behind it
    supports = task.supports.clone().requires_grad_()
    found = model(task._replace(supports=supports))
    SetCriterion()(found.layers, wanted.objects).backward()
    assert supports.grad.abs().amax((1, 2, 3)).min() > 0
    assert model.aggregate.background.grad.abs().max() > 0
    assert {name for name, _ in model.named_buffers() if "codes" in name or "queries" in name} == {
        "aggregate.task_codes",
        "decoder.queries",
    }


def test_episodes_augment_and_differ_by_process(scenes, support):
    def shown(sampler):
        state = State(Fabric(accelerator="cpu"), tiny(), None, None, None, epochs=1, total_steps=1)
        state.inputs, state.targets = scenes.images[:3], pack(flat_targets(scenes)[:3])
        sampler.setup(state)
        sampler.on_batch(state)
        return state.inputs

    plain, flipped = (
        shown(EpisodeSampler(support, augment=augment)) for augment in (None, v2.RandomHorizontalFlip(1.0))
    )
    assert plain.classes.shape == flipped.classes.shape == (5, 5)
    assert any(torch.equal(plain.supports[0].flip(-1), image.flip(-1)) for image in scenes.images)
    assert any(torch.equal(flipped.supports[0].flip(-1), image) for image in scenes.images)

    class Second(EpisodeSampler):
        def setup(self, state):
            state.fabric = SimpleNamespace(global_rank=1)
            super().setup(state)

    assert not torch.equal(shown(Second(support)).classes, plain.classes)


def test_samplers_refuse_models_that_do_not_fit(scenes, support, tmp_path):
    with pytest.raises(UserError, match="size must be the model's 5 slots, or some are never trained, got 3"):
        fit(tiny(), scenes, EpisodeSampler(support, 3, 1), tmp_path)
    with pytest.raises(UserError, match="EpisodeSampler trains a MetaDetr, got Detr"):
        fit(plain_detr(7), scenes, EpisodeSampler(support, 5, 1), tmp_path)
    with pytest.raises(UserError, match="the model knows 6 classes, from 0, and there is support for 6"):
        fit(tiny(6), scenes, EpisodeSampler(support, 5, 1), tmp_path)


def test_pictures_of_unequal_sizes_in_an_episode():
    model = tiny(backbone=Patches())
    model.group_norm = nn.Identity()
    images, pad = torch.rand(2, 3, 32, 32, generator=draw()), torch.ones(2, 32, 32, dtype=torch.bool)
    pad[0, :, :16], pad[1, :16] = False, False
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.75], [0.5, 0.25, 0.5, 0.5]])
    found = model(MetaTask(images, pad, images, pad, boxes, torch.tensor([[3, 1]])))
    halves = images[:1, :, :, :16], images[1:, :, :16]
    codes = torch.cat([model.encode(half, box[None]) for half, box in zip(halves, boxes, strict=True)])
    for row, half in enumerate(halves):
        alone = model.search(model.attend(half, None), codes[None])[-1]
        torch.testing.assert_close(found.layers[-1].logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)


def fit(model, scenes, sampler, folder, stop=None):
    data = TensorDataset(scenes.images, pack(flat_targets(scenes)))
    trainer = Trainer(
        2, interventions=[sampler, StopAt(stop)], batch_size=6, clip_norm=0.1, checkpoint_dir=folder, checkpoint_every=2
    )
    groups = parameter_groups(model, 1e-3)
    return trainer.fit(model, data, loss=MetaCriterion(), optimizer=partial(lambda g, _: AdamW(g), groups))


def test_a_killed_training_ends_as_an_undisturbed_one(scenes, support, tmp_path):
    def parts():
        return tiny(), scenes, EpisodeSampler(support, 5, 1, augment=v2.RandomHorizontalFlip(), seed=3)

    undisturbed, *rest = parts()
    history = fit(undisturbed, *rest, tmp_path / "a")
    with pytest.raises(Stop):
        fit(*parts(), tmp_path / "b", stop=7)  # in the middle of the second epoch
    resumed, *rest = parts()
    assert fit(resumed, *rest, tmp_path / "b") == history
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, undisturbed.state_dict()[name]), name


def test_learning_brings_the_loss_down(scenes, support, tmp_path):
    history = fit(tiny(), scenes, EpisodeSampler(support, 5, 1), tmp_path)
    assert history[1]["train/loss"] < history[0]["train/loss"]


def test_rates_of_parameters():
    model = tiny()
    groups = {group["lr"]: group["params"] for group in parameter_groups(model, 1.0, backbone=0.1, pointing=0.01)}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert {id(p) for p in groups[0.1]} == {id(p) for p in model.backbone.parameters()}
    names = {name for name, p in model.named_parameters() if any(p is q for q in groups[0.01])}
    assert all("offsets" in name or "reference" in name for name in names)
    assert len(names) == 2 * (1 + 1 + 2) + 2


def test_fine_tuning_leaves_alone_where_to_look(scenes, support, tmp_path):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_finetuning(model, [5, 6], draw())
    _, directions = model.classifier.rows.parametrizations["weight"].parameters()
    old = before["classifier.rows.parametrizations.weight.original1"]
    assert torch.equal(directions[:5], old[:5])
    assert not torch.isclose(directions[5:], old[5:]).any()
    fit(model, scenes, EpisodeSampler(support, 5, 1), tmp_path)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if "offsets" in name or "reference" in name]
    assert {"aggregate.project.weight", "decoder.class_head.weight", "first.attention.value.weight"} <= moved


def test_the_plain_detector_forgets_that_new_classes_are_never_there():
    plain = plain_detr(4, d=16, heads=2, hidden=32)
    head = plain.decoder.class_head
    nn.init.constant_(head.weight, -9.0)
    nn.init.constant_(head.bias, -9.0)
    prepare_finetuning(plain, [1, 3], draw())
    assert (head.weight[[0, 2]] == -9).all()
    assert head.weight[[1, 3]].abs().max() <= 0.25
    torch.testing.assert_close(head.bias.detach(), torch.tensor([-9, -math.log(99), -9, -math.log(99)]))
    assert not [p for name, p in plain.named_parameters() if p.requires_grad and "offsets" in name]
    for model in (plain, tiny(4)):
        with pytest.raises(UserError, match="novel must be classes from 0 to 3, got 4, -1"):
            prepare_finetuning(model, [2, 4, -1])


def test_the_rate_of_fine_tuning():
    factors = [finetuning_factor(step, 500) for step in (0, 25, 50, 299, 300, 449, 450, 499)]
    assert factors == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01])


# Finding.


def test_classes_come_from_their_first_episode(scenes):
    model = tiny()
    book, images = a_book(model), scenes.images[:2]
    found = model.predict(images, book)
    assert found.logits.shape == (2, 8, 7)
    finite = found.logits.isfinite()
    assert finite[:, :4, :5].all()
    assert finite[:, 4:, 5:].all()
    assert finite.sum() == 2 * (4 * 5 + 4 * 2)
    seen = model.attend(images, None)
    for rows, classes, columns in ((slice(4), slice(0, 5), slice(0, 5)), (slice(4, 8), slice(2, 7), slice(3, 5))):
        alone = model.search(seen, book.codes[None, classes])[-1]
        torch.testing.assert_close(found.boxes[:, rows], alone.boxes)
        shown = found.logits[:, rows, 5:] if columns.start else found.logits[:, rows, :5]
        torch.testing.assert_close(shown, alone.logits[..., columns])


def test_detections_have_the_classes_of_the_book(scenes):
    model = tiny()
    book = a_book(model).of([6, 2, 4, 0, 5])
    first, _ = model.detect(scenes.images[:2], book, [(64, 96), (32, 32)], top=9)
    prediction = model.predict(scenes.images[:2], book)
    scores, places = prediction.logits[0].sigmoid().flatten().topk(9)
    torch.testing.assert_close(first.scores, scores)
    assert first.labels.tolist() == [book.classes[place % 5] for place in places.tolist()]
    box = box_convert(prediction.boxes[0, places[0] // 5], "cxcywh", "xyxy") * torch.tensor([96.0, 64, 96, 64])
    torch.testing.assert_close(first.boxes[0], box)
    assert all((found.scores > 0).all() for found in model.detect(scenes.images[:2], book))
    with pytest.raises(UserError, match="sizes must be those of 2 pictures, got 1"):
        model.detect(scenes.images[:2], book, [(32, 32)])


def test_boxes_are_of_pictures_without_their_padding(scenes):
    model = tiny()
    images, pad = torch.zeros(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.bool)
    images[:, :, :32, :32], pad[:, :32, :32] = scenes.images[:1], False
    book = a_book(model)
    default, told = (model.detect([images, pad], book, sizes)[0] for sizes in (None, [(32, 32)]))
    assert torch.equal(default.boxes, told.boxes)


def test_fewer_classes_than_slots(scenes):
    model = tiny()
    with pytest.warns(UserWarning, match="3 classes leave 2 of 5 slots empty"):
        found = model.predict(scenes.images[:1], a_book(model, 3))
    assert found.logits.shape == (1, 4, 3)
    assert model.predict(scenes.images[:1], a_book(model), episode_size=2).logits.shape == (1, 16, 7)
    with pytest.raises(UserError, match="episode_size must be 1 to 5, the slots of the model, got 6"):
        model.predict(scenes.images[:1], a_book(model), episode_size=6)


def test_looking_keeps_modes_and_statistics(scenes, support):
    model = tiny().train()
    model.backbone.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.predict(scenes.images[:1], model.encode_classes(support))
    assert [part.training for part in (model, model.decoder, model.backbone)] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_queries_are_codes_and_points_of_their_number():
    model = tiny()
    torch.testing.assert_close(model.decoder.queries, index_codes(4, 16))
    nn.init.zeros_(model.decoder.reference.weight)
    found = model.search(model.attend(torch.rand(1, 3, 32, 32, generator=draw()), None), some_codes(5)[None])
    half_size = 1 / (1 + math.exp(2))  # what the box head begins with
    for layer in found:
        torch.testing.assert_close(layer.boxes, torch.tensor([0.5, 0.5, half_size, half_size]).expand(1, 4, 4))
    assert not list(model.decoder.parameters(recurse=False))


def test_points_are_those_of_every_layer():
    layers = [m for m in tiny(points=3).modules() if isinstance(m, MSDeformAttn)]
    assert [layer.points for layer in layers] == [3] * 4


def test_the_plain_detector_is_the_same_without_aggregation():
    plain = plain_detr(7, d=16, heads=2, hidden=32, queries=4)
    assert plain(torch.rand(2, 3, 32, 32))[-1].logits.shape == (2, 4, 7)
    with_, without = (sum(p.numel() for p in m.parameters()) for m in (tiny(decoders=3, encoders=2), plain))
    own = sum(p.numel() for m in (tiny().aggregate, tiny().classifier) for p in m.parameters())
    assert with_ - own == without - 2 * 17  # two more logits


# Bad input.


def test_bad_sizes():
    with pytest.raises(UserError, match="d must be even, got 7"):
        aggregation(2, d=7)
    with pytest.raises(UserError, match="heads must be at least 1, got 0"):
        tiny(heads=0)
    with pytest.raises(UserError, match="d must be a multiple of heads and of 4, got 18 and 2"):
        tiny(d=18)
    with pytest.raises(UserError, match="decoders must be at least 1, got 0"):
        tiny(decoders=0)
    with pytest.raises(UserError, match="slots must be at least 1, got 0"):
        tiny(slots=0)
    with pytest.raises(UserError, match="task_codes=False tells no slots apart: it needs slots=1, got 5"):
        tiny(task_codes=False)
    with pytest.raises(UserError, match="an episode has at most 3 classes, got 4"):
        aggregation(3)(torch.zeros(1, 2, 8), some_codes(4, 8)[None])


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.0, 0.2], [0.9, 0.5, 0.4, 0.2], [0.5, math.nan, 0.1, 0.1]])
def test_bad_supports(box, scenes):
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], box])
    with pytest.raises(UserError, match=rf"support 1: box \({box[0]}, .*\) is not within its picture"):
        tiny().encode(scenes.images[:2], boxes)
    with pytest.raises(UserError, match=r"image 7, object 1: box .* is not within the picture"):
        SupportSet([(scenes.images[0], Targets(torch.tensor([0, 1]), boxes, 7, (32, 32)))])


def test_classes_without_support(support):
    with pytest.raises(UserError, match="no support for class 8; there are instances of 0, 1, 2, 3, 4, 5, 6"):
        tiny().encode_classes(support, [0, 8])
    with pytest.raises(UserError, match="an episode of 8 classes needs as many, and there is support for 7"):
        EpisodeSampler(support, 8)
    with pytest.raises(UserError, match="episodes must be at least 1, got 0"):
        EpisodeSampler(support, episodes=0)
    with pytest.raises(UserError, match="draws must be at least 1, got 0"):
        tiny().encode_classes(support, draws=0)
    with pytest.raises(UserError, match="classes must be some, each once, got 2, 2"):
        tiny().encode_classes(support, [2, 2])
    with pytest.raises(UserError, match="classes must be some, each once, got none"):
        tiny().encode_classes(support, [])
    model = tiny()
    empty = a_book(model).of([])
    with pytest.raises(UserError, match="the book has no class"):
        model.predict(torch.zeros(1, 3, 32, 32), empty)


def test_pictures_alone_are_no_task(unchecked):
    with pytest.raises(UserError, match="MetaDetr takes a MetaTask, which EpisodeSampler makes, got Tensor"):
        tiny()(torch.zeros(1, 3, 32, 32))


# Few shots.


def test_supports_leave_out_what_is_small_or_ignored(tmp_path):
    write_coco(tmp_path, flat_scenes(3, objects=(2, 2), radius=(8.0, 9.0), seed=1))
    content = json.loads((tmp_path / "annotations.json").read_text())
    rows = content["annotations"]
    rows[0]["ignore"] = 1
    rows[1]["bbox"][2:] = [2, 2]
    data = CocoData(content, tmp_path / "images")
    support = SupportSet(data)
    assert sum(support.count(label) for label in support.classes) == len(rows) - 2
    keys = {support.shot(label, k).key for label in support.classes for k in range(support.count(label))}
    assert keys == {(row["image_id"], row["id"]) for row in rows[2:]}
    with pytest.raises(UserError, match="no instance of 99999 pixels or more to support a class; pictures are 64x64"):
        SupportSet(data, least_area=99_999)
    again = json.loads((tmp_path / "annotations.json").read_text())
    again["annotations"] = [{**row, "category_id": 1} for row in content["annotations"]]
    again["categories"] = again["categories"][:1]
    few = sample_k_shot(again, len(rows) - 2, seed=0)
    assert {row["id"] for row in few["annotations"]} == {row["id"] for row in rows[2:]}
    with pytest.raises(
        UserError, match=rf"category 1 has {len(rows) - 2} usable instances, fewer than {len(rows)} shots"
    ):
        sample_k_shot(again, len(rows), seed=0)


def test_shots_of_public_files_are_exact_for_novel_classes_alone():
    content = to_coco(flat_targets(flat_scenes(200, classes=4, seed=0)), tuple(FLAT_SHAPES)[:4], [1, 3, 6, 10])
    few = sample_k_shot(content, 3, seed=0)
    besides = next(row for row in content["annotations"] if row["category_id"] == 1 and row not in few["annotations"])
    few = {**few, "annotations": [*few["annotations"], besides]}
    check_shots(few, 3, novel=[3, 6])
    with pytest.raises(UserError, match=r"expected 3 instances of every category, but not so for 1 \(4\)"):
        check_shots(few, 3)
    with pytest.raises(UserError, match=r"but not so for 1 \(4\)"):
        check_shots(few, 3, novel=[1])
    few["annotations"] = [row for row in few["annotations"] if row["category_id"] != 10]
    with pytest.raises(UserError, match=r"but not so for 10 \(0\)"):
        check_shots(few, 3, novel=[3, 6])


def test_annotation_ids_survive_the_round_trip():
    content = to_coco(flat_targets(flat_scenes(6, classes=4, seed=0)), tuple(FLAT_SHAPES)[:4], [1, 3, 6, 10])
    few = sample_k_shot(content, 1, seed=0)
    again = to_coco(coco_targets(few), tuple(FLAT_SHAPES)[:4], [1, 3, 6, 10])
    assert {row["id"] for row in again["annotations"]} == {row["id"] for row in few["annotations"]}
    kept = {row["id"]: row["category_id"] for row in again["annotations"]}
    assert kept == {row["id"]: row["category_id"] for row in few["annotations"]}


# The claim.


def trial(folder, arm="meta-detr", **overrides):
    pytest.importorskip("faster_coco_eval")
    claim, kept = load_claim("metadetr"), {}
    run = Run(seed=0, scale="smoke", device="cpu", data_root=None, folder=folder, keep=kept.__setitem__)
    return claim.trial(run, arm, claim.settings.at("smoke", overrides)), kept


@pytest.fixture
def own(tmp_path):
    write_coco(tmp_path / "set", flat_scenes(100, size=32, objects=(2, 3), radius=(4.0, 7.0), seed=0))
    return tmp_path / "set"


@pytest.mark.parametrize("arm", ["finetuned", "meta-detr", "nearest-code"])
def test_own_pictures(arm, own, tmp_path):
    figures, kept = trial(tmp_path / "run", arm, data=str(own), novel='["ring"]')
    assert 0 <= figures["novel_ap50"] <= 1
    shots = json.loads(kept["shots.json"])["picture and annotation of each shot"]
    assert [len(keys) for keys in shots.values()] == [5] * 12
    assert [name for name in kept if name.endswith(".png")]


def test_own_shots(own, tmp_path):
    file, both = tmp_path / "5shot.json", tmp_path / "both"
    content = json.loads((own / "annotations.json").read_text())
    few = sample_k_shot(content, 5, seed=9)
    file.write_text(json.dumps(few))
    with pytest.raises(
        UserError, match=r"5shot\.json has \d+ pictures that are measured on, e\.g\. .*: give DIR/train"
    ):
        trial(tmp_path / "run", data=str(own), novel='["ring"]', shots_file=str(file))
    shutil.copytree(own, both / "train")
    write_coco(both / "val", flat_scenes(9, size=32, objects=(4, 4), radius=(4.0, 6.0), seed=1))
    _, kept = trial(tmp_path / "run", data=str(both), novel='["ring"]', shots_file=str(file))
    keys = json.loads(kept["shots.json"])["picture and annotation of each shot"]
    assert {tuple(key) for rows in keys.values() for key in rows} == {
        (row["image_id"], row["id"]) for row in few["annotations"]
    }
    few["annotations"] = few["annotations"][:-1]
    file.write_text(json.dumps(few))
    with pytest.raises(UserError, match="expected 5 instances of every category"):
        trial(tmp_path / "again", data=str(both), novel='["ring"]', shots_file=str(file))


def test_own_pictures_need_novel_classes(own, tmp_path):
    with pytest.raises(UserError, match="novel must name categories"):
        trial(tmp_path / "run", data=str(own))
    with pytest.raises(UserError, match=r"unknown category 'rings'\. Did you mean 'ring'"):
        trial(tmp_path / "run", data=str(own), novel='["rings"]')
    with pytest.raises(UserError, match="slots must be at most the 11 base classes, got 12"):
        trial(tmp_path / "run", data=str(own), novel='["ring"]', slots="12")
    with pytest.raises(UserError, match="shots must have 5 among them, got 1, 3"):
        trial(tmp_path / "run", shots="[1, 3]")


def test_nothing_in_a_find_depends_on_neighbours_in_the_batch(scenes):
    model = tiny(backbone=TinyBackbone(16))
    together = model.predict(scenes.images[:3], a_book(model))
    alone = model.predict(scenes.images[1:2], a_book(model))
    torch.testing.assert_close(together.boxes[1:2], alone.boxes, atol=1e-5, rtol=1e-4)
