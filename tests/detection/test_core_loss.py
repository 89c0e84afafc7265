"""Matching, losses, post-processing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paperworks.detection.core import HungarianMatcher, Prediction, SetCriterion, Targets, pack, post_process, unpack
from paperworks.detection.core.matcher import Objects, focal_class_cost, giou_cost, l1_cost, softmax_class_cost
from paperworks.errors import UserError


def draw(seed):
    return torch.Generator().manual_seed(seed)


def some_boxes(n, generator):
    sides = 0.1 + 0.4 * torch.rand(n, 2, generator=generator)
    return torch.cat([sides / 2 + torch.rand(n, 2, generator=generator) * (1 - sides), sides], 1)


def problem(seed, counts=(3, 0, 1), queries=5, classes=4):
    g = draw(seed)
    logits = torch.randn(len(counts), queries, classes, generator=g)
    boxes = torch.stack([some_boxes(queries, g) for _ in counts])
    targets = [
        Targets(torch.randint(classes, (n,), generator=g), some_boxes(n, g), image_id=k) for k, n in enumerate(counts)
    ]
    return Prediction(logits, boxes), targets


def given_cost(table):
    return HungarianMatcher({"table": (lambda prediction, objects: table.T, 1.0)})


def test_a_small_assignment():
    table = torch.tensor([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]])
    prediction, targets = problem(0, counts=(3,), queries=3)
    ((queries, objects),) = given_cost(table)(prediction, targets)
    assert dict(zip(queries.tolist(), objects.tolist(), strict=True)) == {0: 1, 1: 0, 2: 2}
    assert table[queries, objects].sum() == 5


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_the_matcher_agrees_with_transformers(seed, counts):
    """With no object in one picture, or more objects than queries in another."""
    loss = pytest.importorskip("transformers.loss.loss_deformable_detr")
    prediction, targets = problem(seed, counts=counts)
    theirs = loss.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)(
        {"logits": prediction.logits, "pred_boxes": prediction.boxes},
        [{"class_labels": target.labels, "boxes": target.boxes} for target in targets],
    )
    for (queries, objects), (their_queries, their_objects) in zip(
        HungarianMatcher()(prediction, targets), theirs, strict=True
    ):
        assert torch.equal(queries, their_queries)
        assert torch.equal(objects, their_objects)


@given(st.integers(0, 2**31))
def test_renaming_queries_renames_the_match_and_the_order_of_objects_does_not_matter(seed):
    prediction, targets = problem(seed)
    order = torch.randperm(5, generator=draw(seed))
    shuffled = Prediction(prediction.logits[:, order], prediction.boxes[:, order])
    for before, after in zip(
        HungarianMatcher()(prediction, targets), HungarianMatcher()(shuffled, targets), strict=True
    ):
        pairs = [dict(zip(objects.tolist(), queries.tolist(), strict=True)) for queries, objects in (before, after)]
        assert {k: int(order[q]) for k, q in pairs[1].items()} == pairs[0]
    turned = [Targets(t.labels.flip(0), t.boxes.flip(0), t.image_id) for t in targets]
    criterion = SetCriterion()
    torch.testing.assert_close(criterion([prediction], targets), criterion([prediction], turned))
    torch.testing.assert_close(criterion([prediction], targets), criterion([shuffled], targets))


def test_costs_by_hand():
    logits = torch.tensor([[[0.0, 2.0]]])
    prediction = Prediction(logits, torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))
    target = Objects.of([Targets(torch.tensor([1]), torch.tensor([[2.5, 0.5, 1.0, 1.0]]))])
    p = 1 / (1 + math.exp(-2))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    assert float(focal_class_cost(prediction, target)) == pytest.approx(focal, abs=1e-5)
    assert float(softmax_class_cost(prediction, target)) == pytest.approx(-math.exp(2) / (1 + math.exp(2)))
    assert float(l1_cost(prediction, target)) == pytest.approx(2)
    assert float(giou_cost(prediction, target)) == pytest.approx(1 / 3)
    same = Objects.of([Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 1.0, 1.0]]))])
    assert float(giou_cost(prediction, same)) == pytest.approx(-1)


def test_a_cost_that_is_not_finite_is_named():
    prediction, targets = problem(0)
    bad = Prediction(prediction.logits, prediction.boxes * math.nan)
    with pytest.raises(UserError, match="the l1 cost of the matcher is not finite"):
        HungarianMatcher()(bad, targets)
    with pytest.raises(UserError, match="costs must name at least one"):
        HungarianMatcher({})


def test_losses_agree_with_transformers():
    module = pytest.importorskip("transformers.loss.loss_deformable_detr")
    prediction, targets = problem(5)
    matcher = module.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    theirs = module.DeformableDetrImageLoss(
        matcher=matcher, num_classes=4, focal_alpha=0.25, losses=["labels", "boxes"]
    )(
        {"logits": prediction.logits, "pred_boxes": prediction.boxes},
        [{"class_labels": target.labels, "boxes": target.boxes} for target in targets],
    )
    ours = SetCriterion().parts([prediction], targets)
    torch.testing.assert_close(ours["class"], theirs["loss_ce"])
    torch.testing.assert_close(ours["l1"], theirs["loss_bbox"])
    torch.testing.assert_close(ours["giou"], theirs["loss_giou"])


def test_every_layer_counts_and_is_matched_anew():
    (first, targets), (second, _) = problem(1), problem(2)
    criterion = SetCriterion()
    torch.testing.assert_close(
        criterion([first, second], targets), criterion([first], targets) + criterion([second], targets)
    )
    torch.testing.assert_close(SetCriterion(aux=False)([first, second], targets), criterion([second], targets))


def test_pictures_without_objects_learn_that():
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    boxes = torch.rand(2, 3, 4, requires_grad=True)
    empty = [Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))] * 2
    loss = SetCriterion()([Prediction(logits, boxes)], empty)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 24 * 0.75 * 0.25 * math.log(2))
    assert (logits.grad > 0).all()
    assert not boxes.grad.any()


def test_packed_targets_are_the_same_targets():
    prediction, targets = problem(3, counts=(3, 0, 1))
    packed = pack(targets)
    assert packed.shape == (3, 3, 5)
    back = unpack(packed)
    assert all(
        torch.equal(a.labels, b.labels) and torch.equal(a.boxes, b.boxes) for a, b in zip(targets, back, strict=True)
    )
    assert SetCriterion()([prediction], packed) == SetCriterion()([prediction], targets)
    assert pack([targets[1]]).shape == (1, 1, 5)


def test_the_loss_teaches():
    prediction, targets = problem(4)
    logits, boxes = nn.Parameter(prediction.logits), nn.Parameter(prediction.boxes.logit())
    optimizer, losses = torch.optim.Adam([logits, boxes], lr=0.1), []
    for _ in range(150):
        loss = SetCriterion()([Prediction(logits, boxes.sigmoid())], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]
    found = post_process(Prediction(logits.detach(), boxes.detach().sigmoid()), [(10, 20)] * 3, top=3)
    assert sorted(found[0].labels.tolist()) == sorted(targets[0].labels.tolist())
    assert found[1].scores.max() < 0.2


def test_one_query_may_give_several_classes():
    logits = torch.tensor([[[3.0, 2.0], [-1.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.25, 0.5, 0.5]]])
    (found,) = post_process(Prediction(logits, boxes), [(10, 20)], top=3)
    assert found.labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    expected = [[0.0, 2.5, 20.0, 7.5], [0.0, 2.5, 20.0, 7.5], [0.0, 0.0, 10.0, 5.0]]
    torch.testing.assert_close(found.boxes, torch.tensor(expected))


@pytest.mark.usefixtures("unchecked")
def test_targets_that_cannot_be_learned():
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    Targets(torch.tensor([1]), box).check(2)
    for label, change, message in (
        (2, 0, "image 7, object 0: label 2 is not 0 to 1"),
        (0, torch.tensor([[0.5, 0, 0, 0]]), r"image 7, object 0: box \(1, 0.5, 0.2, 0.2\) is not within"),
        (0, torch.tensor([[0, 0, -0.2, 0]]), "is not within the picture"),
        (0, torch.tensor([[math.nan, 0, 0, 0]]), "is not within the picture"),
    ):
        with pytest.raises(UserError, match=message):
            Targets(torch.tensor([label]), box + change, image_id=7).check(2)
    with pytest.raises(UserError, match="2 labels and 1 boxes"):
        Targets(torch.tensor([1, 1]), box).check(2)
