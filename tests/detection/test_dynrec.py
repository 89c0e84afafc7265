import contextlib
import json
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW

from paperworks.detection.dynrec import (
    DynamicReasoner,
    FixedReasoner,
    FlatScene,
    FlatThing,
    GridTokens,
    GroundingLoss,
    PonderLoss,
    ReinforcedHalting,
    TextEncoder,
    Vocabulary,
    draw_scenes,
    episode_reward,
    expressions2d,
    flat_expressions,
    greedy_steps,
    halting_distribution,
    labelled_scenes,
    load_ref_reasoning,
    load_refer,
    locate,
    paired_iou,
    pick,
    ponder_loss,
    rec_accuracy,
    reinforce_loss,
    sample_steps,
    step_losses,
)
from paperworks.errors import UserError
from paperworks.train import Intervention, State, Trainer

REWARDS = torch.tensor([[-1.0, 1.0, 0.95]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reasoner(
    steps: int = 4, seed: int = 0, kind: type[DynamicReasoner] = DynamicReasoner, **options
) -> DynamicReasoner:
    torch.manual_seed(seed)
    d = 16
    stem = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
    model = kind(GridTokens(stem, 8, d), TextEncoder(20, d, 2), steps, d=d, heads=2, **options)
    for part in (model.policy.net[-1].weight, model.policy.net[-1].bias):  # as if it had learned when to stop
        nn.init.normal_(part, std=1.5)
    return model.eval()


def inputs(batch: int = 6, words: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, words + 1, (batch,), generator=generator)
    lengths[0] = words
    mask = torch.arange(words) < lengths[:, None]
    tokens = torch.randint(2, 20, (batch, words), generator=generator) * mask
    return torch.rand(batch, 3, 24, 24, generator=generator), tokens, mask


def some_boxes(batch: int = 6) -> Tensor:
    return torch.cat(
        [torch.rand(batch, 2, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25, torch.full((batch, 2), 0.3)], 1
    )


# When to stop.


def test_halting_distribution_of_known_logits():
    assert halting_distribution(torch.zeros(1, 3)).tolist() == [[0.5, 0.25, 0.25]]
    torch.testing.assert_close(halting_distribution(torch.full((1, 3), 50.0)), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(halting_distribution(torch.full((1, 3), -50.0)), torch.tensor([[0.0, 0.0, 1.0]]))


@settings(max_examples=30)
@given(st.lists(st.floats(-80, 80), min_size=1, max_size=7))
def test_halting_distribution_sums_to_one_and_ignores_the_last_logit(logits):
    p = halting_distribution(torch.tensor([logits]))
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(p, halting_distribution(torch.tensor([[*logits[:-1], 3.0]])))


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.3, -1.0, 0.7, 0.0]])
    steps = sample_steps(logits.expand(20_000, 4), torch.Generator().manual_seed(0))
    share = torch.bincount(steps - 1, minlength=4) / 20_000
    assert (share - halting_distribution(logits)[0]).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_greedy_stop_is_the_first_beyond_one_half():
    logits = torch.tensor([[-1.0, 2.0, 3.0], [1.0, -1.0, 0.0], [-1.0, 0.0, -9.0]])
    assert greedy_steps(logits).tolist() == [2, 1, 3]


# What it earns.


def test_reward_by_hand():
    ious = torch.tensor([[0.2, 0.5, 0.9]], requires_grad=True)
    reward = episode_reward(ious, lam=0.05, immediate=0.5)
    expected = [-1, 0.5 * 0.3 - 0.05 + 1, 0.5 * 0.7 - 0.1 + 1]
    assert reward[0].tolist() == pytest.approx(expected)
    assert not reward.requires_grad
    signed = episode_reward(ious, lam=0, immediate=0.5, sign=True, gamma=0.5)
    assert signed[0].tolist() == pytest.approx([-1, 0.5 + 0.5, 0.5 + 0.25 + 0.25])


def test_an_overlap_of_exactly_one_half_is_a_hit():
    box, half = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.625, 0.5, 0.25]])
    assert paired_iou(box, half).tolist() == [0.5]
    assert rec_accuracy(half, box) == 1
    assert rec_accuracy(half, box, thr=0.51) == 0
    assert float(episode_reward(torch.tensor([[0.5]]))) == 1


def test_exact_expectation_by_hand_and_its_gradient():
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = reinforce_loss(logits, REWARDS, "exact")
    assert -loss.item() == pytest.approx(-0.0125)
    loss.backward()
    # dP/dl: (1/4, -1/8, -1/8) of the first, (0, 1/8, -1/8) of the second
    expected = [-(-0.25 - 0.125 - 0.125 * 0.95), -(0.125 - 0.125 * 0.95), 0]
    assert logits.grad[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("baseline", "value"), [("self_critical", None), ("value", 0.0), ("value", -0.7)])
def test_the_sampled_estimator_has_the_gradient_of_the_expectation(baseline, value):
    draws, start = 20_000, torch.tensor([[0.4, -0.6, 0.1]])
    exact = start.clone().requires_grad_()
    reinforce_loss(exact, REWARDS, "exact").backward()
    many = start.repeat(draws, 1).requires_grad_()
    values = None if value is None else torch.full((draws, 3), value)
    loss = reinforce_loss(many, REWARDS.expand(draws, 3), baseline, torch.Generator().manual_seed(0), values)
    loss.backward()
    each = many.grad * draws
    error = each.std(0) / math.sqrt(draws)
    assert ((each.mean(0) - exact.grad[0]).abs() <= 4 * error + 1e-7).all()


def test_the_value_head_learns_what_is_earned():
    values = torch.zeros(4, 3, requires_grad=True)
    reinforce_loss(torch.zeros(4, 3), torch.full((4, 3), 2.0), "value", torch.Generator(), values).backward()
    assert (values.grad[:, 0] == -1).all()  # d (v - 2)^2 / dv / 4, for the first step is always taken
    assert (values.grad[:, 2] == 0).all()


def test_where_stopping_earns_the_same_everywhere_nothing_is_learned():
    logits = draw(50, 4).requires_grad_()
    reinforce_loss(logits, torch.full((50, 4), 0.7), "self_critical", torch.Generator().manual_seed(0)).backward()
    assert torch.count_nonzero(logits.grad) == 0


def learned_steps(lam: float, ious: Tensor, baseline: str = "exact") -> float:
    logits = torch.zeros_like(ious, requires_grad=True)
    optimizer, generator = torch.optim.Adam([logits], lr=0.3), torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        reinforce_loss(logits, episode_reward(ious, lam), baseline, generator).backward()
        optimizer.step()
    return greedy_steps(logits).float().mean().item()


def test_the_price_of_a_step_decides_how_many_are_taken():
    rising = torch.tensor([[0.1, 0.3, 0.45, 0.6, 0.9], [0.55, 0.6, 0.7, 0.8, 0.95], [0.0, 0.1, 0.5, 0.55, 0.6]])
    steps = [learned_steps(lam, rising) for lam in (0.0, 0.06, 0.5, 10.0)]
    assert steps[0] == 5
    assert steps[-1] == 1
    assert steps == sorted(steps, reverse=True)
    assert learned_steps(10.0, rising, "self_critical") == 1


def test_ponder_loss_pays_for_the_expected_loss_and_the_distance_to_the_prior():
    losses = torch.tensor([[3.0, 1.0, 2.0]])
    assert ponder_loss(torch.zeros(1, 3), losses, prior=0.5).item() == pytest.approx(0.5 * 3 + 0.25 + 0.25 * 2)
    sure = ponder_loss(torch.tensor([[60.0, 0.0, 0.0]]), losses, prior=0.5, beta=1.0)
    assert sure.item() == pytest.approx(3 + math.log(2), abs=1e-5)


def test_policy_losses_refuse_what_is_missing(unchecked):
    with pytest.raises(UserError, match="Did you mean 'self_critical'"):
        reinforce_loss(torch.zeros(1, 3), REWARDS, "self-critical")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs a generator"):
        reinforce_loss(torch.zeros(1, 3), REWARDS)
    with pytest.raises(UserError, match="needs values"):
        reinforce_loss(torch.zeros(1, 3), REWARDS, "value", torch.Generator())
    with pytest.raises(UserError, match="gamma must be in"):
        episode_reward(torch.zeros(1, 3), gamma=0)
    with pytest.raises(UserError, match="lam and immediate must not be negative"):
        ReinforcedHalting(lam=-1)
    with pytest.raises(UserError, match="prior must be between"):
        PonderLoss(prior=1)(reasoner()(inputs()), some_boxes())


# The reasoner.

VARIANTS = [{"block": b, "head": h} for b in ("transformer", "sub-query") for h in ("pointer", "place", "box")]


@pytest.mark.parametrize("options", VARIANTS)
def test_early_exit_gives_what_all_steps_give(options):
    model, batch = reasoner(**options), inputs(12)
    with torch.no_grad():  # half of them stop at once
        model.policy.net[-1].bias[0] -= model(batch).stop_logits[:, 0].median()
    found = model.infer(batch)
    with torch.no_grad():
        expected = pick(model(batch))
    assert len(set(found.steps.tolist())) > 1, "the test needs examples that stop at different steps"
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-5, rtol=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    mixed = model.infer(tuple(part[order] for part in batch))
    torch.testing.assert_close(mixed.boxes, found.boxes[order], atol=1e-5, rtol=0)
    halves = [model.infer(tuple(part[rows] for part in batch)) for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat([half.boxes for half in halves]), found.boxes, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([half.steps for half in halves]), found.steps)


def test_a_fixed_reasoner_is_a_dynamic_one_that_is_stopped():
    dynamic, batch = reasoner(4), inputs()
    fixed = reasoner(4, kind=FixedReasoner)
    found = fixed.infer(batch)
    assert found.steps.tolist() == [4] * 6
    torch.testing.assert_close(found.boxes, dynamic.infer(batch, stop=4).boxes)
    with torch.no_grad():
        torch.testing.assert_close(dynamic.infer(batch, stop=2).boxes, dynamic(batch).boxes[:, 1], atol=1e-5, rtol=0)
    each = torch.tensor([1, 2, 3, 4, 2, 1])
    assert torch.equal(dynamic.infer(batch, stop=each).steps, each)
    with pytest.raises(UserError, match="stop must be 1 to max_steps=4, got 5"):
        dynamic.infer(batch, stop=5)


def test_inference_leaves_the_mode_as_it_was():
    model = reasoner().train()
    model.infer(inputs())
    assert model.training


@pytest.mark.parametrize("options", VARIANTS)
def test_padding_of_words_and_picture_changes_nothing(options):
    model = reasoner(**options)
    pictures, tokens, mask = inputs()
    with torch.no_grad():
        plain = model((pictures, tokens, mask))
        longer = [torch.cat([part, part.new_zeros(6, 3)], 1) for part in (tokens, mask)]
        longer[0][:, 5:] = 7  # whatever stands there
        pad = torch.ones(6, 32, 40, dtype=torch.bool)
        pad[:, :24, :24] = False
        wider = torch.full((6, 3, 32, 40), 9.0)
        wider[:, :, :24, :24] = pictures
        padded = model(((wider, pad), *longer))
    torch.testing.assert_close(padded.boxes, plain.boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.stop_logits, plain.stop_logits, atol=1e-5, rtol=1e-4)


def test_words_matter():
    model, (pictures, tokens, mask) = reasoner(), inputs()
    with torch.no_grad():
        one, other = model((pictures, tokens, mask)), model((pictures, (tokens % 18 + 2) * mask, mask))
    assert (one.scores - other.scores).abs().max() > 1e-3


def test_the_policy_does_not_touch_the_block_unless_it_may():
    for detach in (True, False):
        model = reasoner(detach_state=detach)
        out = model(inputs())
        reinforce_loss(out.stop_logits, draw(6, 4), "exact").backward()
        moved = any(p.grad is not None and p.grad.any() for p in model.block.parameters())
        assert moved is not detach
        assert all(p.grad is not None for p in model.policy.net.parameters())


def test_sub_queries_discount_words_that_were_used():
    model, batch = reasoner(block="sub-query"), inputs()
    _, state, _ = model._begin(batch)
    for _ in range(2):
        before = state.used
        state = model.block.step(state)
        assert (state.used >= before).all()
        assert not state.used[~batch[2]].any()


def test_the_pointer_learns_the_place_nearest_to_the_box():
    model, boxes = reasoner(), some_boxes()
    out = model(inputs())
    losses = step_losses(out, boxes)
    assert losses.shape == (6, 4)
    cell = ((boxes[:, 1] * 3).long() * 3 + (boxes[:, 0] * 3).long())[:, None].expand(-1, 4)
    missed = -out.scores.log_softmax(-1).gather(2, cell[..., None])[..., 0]
    rest = losses - missed
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))  # the box of that place, whatever the step
    assert GroundingLoss("last")(out, boxes).item() == pytest.approx(losses[:, -1].mean().item())


def test_a_pointer_to_places_sees_nothing_of_their_contents():
    for head, told in (("pointer", False), ("place", True)):
        model, batch = reasoner(head=head), inputs()
        places, state, _ = model._begin(batch)
        other = places._replace(features=places.features.roll(1, 1))
        with torch.no_grad():
            assert torch.equal(model._look(state, places)[1], model._look(state, other)[1]) is told


def test_gain_sharpens_attention_at_the_start():
    torch.manual_seed(0)
    even = reasoner().block.qkv.weight
    sharp = reasoner(gain=4.0).block.qkv.weight
    torch.testing.assert_close(sharp[:32], 4 * even[:32])
    assert torch.equal(sharp[32:], even[32:])


def test_bad_reasoners_and_inputs_are_refused(unchecked):
    with pytest.raises(UserError, match="max_steps must be at least 1, got 0"):
        reasoner(0)
    with pytest.raises(UserError, match=r"unknown head 'points'\. Did you mean 'pointer'"):
        reasoner(head="points")
    pictures, tokens, mask = inputs()
    mask[2] = False
    with pytest.raises(UserError, match="expression 2 of the batch has no word"):
        reasoner()((pictures, tokens, mask))
    with pytest.raises(UserError, match="21 words, more than max_words=20"):
        reasoner()((pictures, torch.ones(6, 21, dtype=torch.int64), torch.ones(6, 21, dtype=torch.bool)))


# Words.


def test_words_become_numbers_and_strange_ones_are_reported():
    vocabulary = Vocabulary(["the red disc", "the ring"])
    tokens, mask = vocabulary.encode(["The ring!", "red disc the ring"], 4)
    assert tokens.tolist() == [[2, 5, 0, 0], [3, 4, 2, 5]]
    assert mask.sum(1).tolist() == [2, 4]
    with pytest.warns(UserWarning, match=r"3 words are read as <unk>: blue \(2\), cup \(1\)"):
        tokens, _ = vocabulary.encode(["blue blue cup"], 4)
    assert tokens.tolist() == [[1, 1, 1]]
    assert vocabulary.unknown == {"blue": 2, "cup": 1}
    with pytest.raises(UserError, match="expression ' !' has no word"):
        vocabulary.encode([" !"], 4)
    short = Vocabulary(["the red disc"], drop=["the"])
    assert short.words == ["<pad>", "<unk>", "red", "disc"]
    assert short.encode(["the disc", "the red disc"], 2)[0].tolist() == [[3, 0], [2, 3]]
    with pytest.raises(UserError, match="expression 'the' has no word"):
        short.encode(["the"], 2)
    with pytest.raises(UserError, match="has 3 words, more than max_words=2"):
        vocabulary.encode(["the red disc"], 2)


# Generated data.


def scene(*things: tuple[str, str, float, float]) -> FlatScene:
    return FlatScene(tuple(FlatThing(shape, colour, x, y, 6.0) for shape, colour, x, y in things))


def test_each_phrase_singles_its_target_out_and_its_last_anchor_decides():
    said = 0
    for place, some in enumerate(labelled_scenes(30, seed=3, things=(8, 8))):
        for hops in (0, 1, 2):
            for expression in expressions2d(some, hops, count=3, seed=place):
                said += 1
                assert locate(expression.program, some) == expression.target
                assert sum(step[0] == "relate" for step in expression.program) == expression.hops == hops
                assert expression.text.count(" the ") == hops
                if hops:
                    assert len(ends(expression.program, some)) > 1
    assert said > 100


def test_in_half_planes_the_relation_is_still_needed():
    said = 0
    for place, some in enumerate(labelled_scenes(20, seed=3)):
        for expression in expressions2d(some, 1, count=3, relations="half-plane", seed=place):
            said += 1
            program = expression.program
            assert locate(program, some, relations="half-plane") == expression.target
            last = max(k for k, step in enumerate(program) if step[0] == "relate")
            with pytest.raises(UserError, match="ambiguous"):
                locate(program[last + 1 :], some)
    assert said > 30


def test_next_is_a_neighbouring_cell_and_only_the_chain_leads_there():
    said = 0
    for place, some in enumerate(
        labelled_scenes(90, seed=3, things=(9, 9), colours=("red", "green", "blue", "yellow"))
    ):
        for hops in (0, 1, 2, 3):
            for expression in expressions2d(some, hops, count=2, relations="next", seed=place):
                said += 1
                assert locate(expression.program, some) == expression.target
                assert expression.text.count(" next to the ") == expression.hops == hops
                colours = [step[2] for step in expression.program if step[0] == "filter"]
                of_colour = [{k for k, thing in enumerate(some.things) if thing.colour == name} for name in colours]
                assert len(of_colour[0]) == 1, "the anchor is the only one of its colour"
                assert all(len(places) > 1 for places in of_colour[1:])
                away, fitting = of_colour[0], set(range(9))
                for places in of_colour[1:]:
                    away, fitting = touching(some, away), touching(some, fitting) & places
                if hops > 1:
                    assert len(away & fitting) > 1, "neither the way's length nor the colours along it would do"
    assert said > 100


def touching(some: FlatScene, places: set[int]) -> set[int]:
    gaps = some.boxes[:, :2].mul(3).floor()
    return {k for k in range(len(gaps)) for at in places if (gaps[k] - gaps[at]).abs().sum() == 1}


def ends(program, some: FlatScene) -> set[int]:
    """What the same words would mean with each other thing at the end of the chain."""
    rest = program[next(k for k, step in enumerate(program) if step[0] == "relate") :]
    found = set()
    for thing in some.things:
        with contextlib.suppress(UserError):
            found.add(locate((("filter", "colour", thing.colour), ("filter", "shape", thing.shape), *rest), some))
    return found


def test_phrases_by_hand(unchecked):
    some = scene(("disc", "red", 8, 10), ("square", "blue", 24, 12), ("disc", "red", 8, 50), ("ring", "green", 24, 48))
    texts = {expression.text for expression in expressions2d(some, 1, count=50, seed=0)}
    assert {"the disc left of the square", "the red thing left of the green thing"} <= texts
    assert all(" left of " in text for text in texts)  # no disc is anywhere else beside the square or the ring
    easy = {expression.text for expression in expressions2d(some, 1, count=50, relations="half-plane", seed=0)}
    assert "the disc above the ring" in easy  # the whole half-plane, and one end will do
    assert "the disc left of the square" not in easy  # both are
    nouns = {"the square", "the blue thing", "the ring", "the green thing"}
    assert {expression.text for expression in expressions2d(some, 0, count=50)} == nouns
    assert expressions2d(FlatScene(()), 0) == []
    assert locate((("filter", "shape", "square"), ("relate", "left"), ("filter", "colour", "red")), some) == 0
    with pytest.raises(UserError, match="must single one thing out, and fits 2"):
        locate((("filter", "colour", "red"),), some)
    with pytest.raises(UserError, match="unknown step 'relate near'"):
        locate((("filter", "colour", "blue"), ("relate", "near")), some)
    with pytest.raises(UserError, match="unknown relations 'near'"):
        expressions2d(some, 1, relations="near")  # type: ignore[arg-type]
    twins = scene(("disc", "red", 10, 10), ("disc", "red", 10, 12))
    assert expressions2d(twins, 0) == []


def test_things_lie_within_their_boxes_in_their_colours():
    scenes = labelled_scenes(5, seed=1, shapes=("square",), colours=("red",))
    images = draw_scenes(scenes, noise=0)
    for some, image in zip(scenes, images, strict=True):
        red = (image[0] > 0.7) & (image[1] < 0.3)
        assert red.any()
        for cx, cy, w, h in (some.boxes * 64).tolist():
            assert red[int(cy), int(cx)]
            red[int(cy - h / 2) : int(cy + h / 2) + 1, int(cx - w / 2) : int(cx + w / 2) + 1] = False
        assert not red.any()


def test_scenes_refuse_what_does_not_fit():
    with pytest.raises(UserError, match="unknown shape 'circle'"):
        labelled_scenes(1, shapes=("circle",))
    with pytest.raises(UserError, match="within the 4 cells"):
        labelled_scenes(1, cells=2, things=(1, 5))
    with pytest.raises(UserError, match="hops must be at least 0"):
        expressions2d(labelled_scenes(1)[0], -1)


def small_data():
    return flat_expressions(labelled_scenes(80, seed=0), {0: 30, 1: 20}, seed=0)


def test_batches_keep_texts_boxes_and_pictures_together():
    data, vocabulary = small_data()
    again, _ = small_data()
    assert again.texts == data.texts
    assert torch.equal(again.images, data.images)
    (pictures, tokens, mask), boxes = data.batch([3, 0])
    assert torch.equal(pictures[0], data.images[data.picture[3]])
    assert tokens.shape[1] == mask.sum(1).max()
    assert " ".join(vocabulary.words[token] for token in tokens[0, : mask[0].sum()]) == data.texts[3]
    assert torch.equal(boxes, data.boxes[[3, 0]])
    with pytest.raises(UserError, match=r"example 0: box \(1, 0.5, 0.5, 0.5\) is not within the picture"):
        type(data)(
            data.images,
            data.picture[:1],
            data.tokens[:1],
            data.mask[:1],
            torch.tensor([[1, 0.5, 0.5, 0.5]]),
            data.hops[:1],
            ("a",),
        )


# Training.


class Stop(Exception):
    pass


class StopAt(Intervention):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_batch(self, state: State) -> None:
        if state.step == self.step:
            raise Stop


def train(folder=None, stop=None, loss=None, epochs: int = 2, **options) -> tuple[dict[str, Tensor], list]:
    data, _ = small_data()
    torch.manual_seed(0)
    model = DynamicReasoner(GridTokens(nn.Conv2d(3, 16, 16, 16), 16, 16), TextEncoder(20, 16, 2), 3, d=16, heads=2)
    trainer = Trainer(
        epochs,
        interventions=[ReinforcedHalting(**options), StopAt(stop)] if loss is None else [],
        accelerator="cpu",
        checkpoint_dir=folder,
        checkpoint_every=1,
    )
    loader = data.loader(16, shuffle=True, generator=torch.Generator().manual_seed(0))
    history = trainer.fit(model, loader, loss=loss or GroundingLoss(), optimizer=partial(AdamW, lr=1e-3))
    return model.state_dict(), history


@pytest.mark.parametrize("options", [{"baseline": "self_critical"}, {"supervise": "sampled", "baseline": "value"}])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, options):
    undisturbed, history = train(tmp_path / "a", **options)
    with pytest.raises(Stop):
        train(tmp_path / "b", stop=5, **options)
    resumed, _ = train(tmp_path / "b", **options)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    assert "policy/steps" not in history[0]
    assert 1 <= history[1]["policy/steps"] <= 3


def test_the_policy_changes_nothing_else():
    one, _ = train(start=0, baseline="exact")
    other, _ = train(start=0.9, baseline="exact")
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("policy"))
    assert not torch.equal(one["policy.net.2.weight"], other["policy.net.2.weight"])


def test_pondering_trains_too():
    _, history = train(loss=PonderLoss(), epochs=6)
    assert history[-1]["train/loss"] < history[0]["train/loss"]


# Official collections.


def write_refer(folder, refs, box=(10, 20, 30, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2) if not isinstance(refs, bytes) else refs)
    content = {
        "images": [{"id": 7, "width": 100, "height": 80, "file_name": "7.jpg"}],
        "annotations": [{"id": 5, "image_id": 7, "category_id": 1, "bbox": list(box)}],
        "categories": [],
    }
    (folder / "instances.json").write_text(json.dumps(content))


REF = {
    "ref_id": 1,
    "ann_id": 5,
    "image_id": 7,
    "category_id": 1,
    "split": "testA",
    "sentences": [{"sent_id": 2, "sent": "man left", "raw": "Man, left"}, {"sent_id": 3, "sent": "a man", "raw": ""}],
}


def test_refcoco_is_read(tmp_path):
    write_refer(tmp_path / "refcoco", [REF])
    first, second = load_refer(tmp_path)
    assert (first.text, first.image, first.box, first.split, first.size) == (
        "Man, left",
        "7.jpg",
        (10, 20, 30, 40),
        "testA",
        (100, 80),
    )
    assert (second.text, second.info["sent_id"], second.info["ref_id"]) == ("a man", 3, 1)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_refcoco_refuses_code_and_what_is_broken(tmp_path, capsys, unchecked):
    folder = tmp_path / "refcoco"
    write_refer(folder, [Evil()])
    with pytest.raises(UserError, match="print, and only plain data is read"):
        load_refer(tmp_path)
    assert capsys.readouterr().out == ""
    write_refer(folder, b"no pickle")
    with pytest.raises(UserError, match="is no pickle of references"):
        load_refer(tmp_path)
    write_refer(folder, [{**REF, "ann_id": 6}])
    with pytest.raises(UserError, match=r"does not fit instances.json: 6 is missing"):
        load_refer(tmp_path)
    write_refer(folder, [REF], box=(80, 20, 30, 40))
    with pytest.raises(UserError, match=r"reference 1: box .* is not within its picture"):
        load_refer(tmp_path)
    with pytest.raises(UserError, match="unknown split of refcoco 'umd'"):
        load_refer(tmp_path, "refcoco", "umd")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_refer(tmp_path, "refcocog", "umd")


def test_ref_reasoning_is_read(tmp_path):
    file = tmp_path / "val_expressions.json"
    row = {"image_id": "23", "expression": "the cup on the table", "bbox": [1, 2, 3, 4], "count": 2}
    file.write_text(json.dumps({"e1": row}))
    (found,) = load_ref_reasoning(file)
    assert (found.text, found.image, found.box, found.split) == (row["expression"], "23.jpg", (1, 2, 3, 4), "val")
    assert found.info == {"id": "e1", "image_id": "23", "count": 2}
    file.write_text(json.dumps({"e1": {"image_id": "23", "expression": "a"}}))
    with pytest.raises(UserError, match="expression e1 has no bbox"):
        load_ref_reasoning(file)
