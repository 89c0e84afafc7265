import json
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from paperworks.data import DatasetNotFound, locate
from paperworks.errors import MissingExtra, UserError
from paperworks.search import haq
from paperworks.search.haq import (
    DEVICES,
    BitFusion,
    BitSerial,
    DDPGAgent,
    LookupTable,
    ModelSize,
    PolicyResult,
    QuantizationProblem,
    SharedWeights,
    bits_of_action,
    calibrate,
    clip_threshold,
    cluster_weights,
    costliest_first,
    enforce_budget,
    export_torchao,
    fake_quantize_activation,
    fake_quantize_weight,
    fixed_policy,
    greedy_sensitivity,
    kmeans_quantize,
    load_hardware,
    policy_cost,
    profile_layers,
    quantize_model,
    quantized_layers,
    random_search,
    restore_model,
    search,
    uniform_policy,
)
from paperworks.search.haq.agent import Transitions
from paperworks.train import Trainer


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refused(message: str):
    return pytest.raises(UserError, match=message)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 16, 1),
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


IMAGES = draw(16, 1, 8, 8).abs()


# Quantizers.


def test_weights_are_rounded_to_the_grid():
    rounded = fake_quantize_weight(torch.tensor([-1, -0.4, 0.3, 0.9]), 3, 1.0)
    torch.testing.assert_close(rounded, torch.tensor([-1, -1 / 3, 1 / 3, 1]))


def test_activations_are_rounded_to_the_grid():
    x = torch.tensor([-1, 0.9, 1.1, 5.2, 9])
    torch.testing.assert_close(fake_quantize_activation(x, 2, 6.0), torch.tensor([0.0, 0, 2, 6, 6]))
    torch.testing.assert_close(fake_quantize_activation(x, 3, 6.0, signed=True), torch.tensor([0.0, 0, 2, 6, 6]))
    assert fake_quantize_activation(torch.tensor([-4.0]), 2, 6.0, signed=True) == -6


@given(st.integers(2, 8), st.floats(0.1, 4), st.integers(0, 2**31))
def test_rounding_is_to_few_values_idempotent_and_near(bits: int, clip: float, seed: int):
    x = draw(300, seed=seed)
    weight = fake_quantize_weight(x, bits, clip)
    assert len(weight.unique()) <= 2**bits - 1
    torch.testing.assert_close(fake_quantize_weight(weight, bits, clip), weight)
    scale = clip / (2 ** (bits - 1) - 1)
    assert ((weight - x.clamp(-clip, clip)).abs() <= scale / 2 + 1e-5).all()
    for signed in (False, True):
        activation = fake_quantize_activation(x, bits, clip, signed=signed)
        assert len(activation.unique()) <= 2**bits
        torch.testing.assert_close(fake_quantize_activation(activation, bits, clip, signed=signed), activation)


def test_many_bits_change_nothing():
    x = draw(100)
    torch.testing.assert_close(fake_quantize_weight(x, 24), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(fake_quantize_activation(x.abs(), 24, 6.0), x.abs(), atol=1e-6, rtol=0)
    assert not fake_quantize_weight(torch.zeros(5), 2).any()


def test_gradients_pass_straight_through_inside_and_to_the_clip_outside():
    x = torch.tensor([-7.0, -1.0, 0.3, 2.0, 9.0], requires_grad=True)
    clip = torch.tensor(6.0, requires_grad=True)
    fake_quantize_activation(x, 4, clip).backward(torch.tensor([1.0, 2, 3, 4, 5]))
    assert x.grad.tolist() == [0, 0, 3, 4, 0]
    assert clip.grad == 5
    x.grad = clip.grad = None
    fake_quantize_activation(x, 4, clip, signed=True).backward(torch.tensor([1.0, 2, 3, 4, 5]))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    assert clip.grad == 5 - 1
    x.grad = None
    fake_quantize_weight(x, 4, 6.0).backward(torch.tensor([1.0, 2, 3, 4, 5]))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_few_bits_clip_outliers_and_many_do_not():
    values = torch.cat([draw(10_000), torch.tensor([25.0])])
    assert clip_threshold(values, 5) == 25
    for bits in (2, 3, 4):
        assert 1 < clip_threshold(values, bits) < 6
    assert clip_threshold(values, 2) < clip_threshold(values, 4)


def test_clips_ignore_zeros_and_small_samples_keep_their_maximum():
    values = draw(5000).abs()
    padded = torch.cat([values, torch.zeros(20_000)])
    assert clip_threshold(padded, 3, signed=False) == clip_threshold(values, 3, signed=False)
    assert clip_threshold(torch.tensor([0.5, -2.0]), 2) == 2
    assert clip_threshold(torch.zeros(10), 2) == 0


@pytest.mark.parametrize("bits", [1, 25, 2.5, True])
def test_bits_that_are_no_integer_in_range_are_refused(bits, unchecked):
    for function in (fake_quantize_weight, partial(fake_quantize_activation, clip=1.0), clip_threshold):
        with refused(r"bits must be an integer in \[2, 24\], got"):
            function(draw(3), bits=bits)


def test_bad_clips_and_values_are_refused():
    with refused("clip must be a positive number, got -1"):
        fake_quantize_weight(draw(3), 4, -1.0)
    with refused("clip must be a positive number, got nan"):
        fake_quantize_activation(draw(3), 4, float("nan"))
    with refused("values must be finite"):
        clip_threshold(torch.tensor([1.0, float("inf")]), 4)


# Shared weights.


def test_kmeans_finds_the_centroids_there_are():
    weight = torch.tensor([[1.0, 1.1, 5.0], [5.1, -3.0, 1.0]])
    clusters = kmeans_quantize(weight, 2)
    assert clusters.weight.shape == weight.shape
    assert len(clusters.weight.unique()) <= 4
    assert (clusters.weight - weight).abs().max() < 0.11
    torch.testing.assert_close(kmeans_quantize(weight, 8).weight, weight)
    with refused(r"bits must be an integer in \[1, 8\], got 9"):
        kmeans_quantize(weight, 9)


def test_shared_weights_of_a_few_bits_are_nearer_than_linear_ones():
    weight = draw(2000)
    shared = (kmeans_quantize(weight, 3).weight - weight).square().mean()
    linear = min((fake_quantize_weight(weight, 3, c) - weight).square().mean() for c in (1.5, 2.0, 2.5, 3.0))
    assert shared < linear


def test_fine_tuning_moves_each_cluster_as_one():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    labels = cluster_weights(model, {"1": 2})
    before = model[1].weight.detach().clone()
    assert len(before.unique()) == 4
    data = TensorDataset(IMAGES, torch.arange(16) % 3)
    trainer = Trainer(2, interventions=[SharedWeights(labels)], batch_size=8, accelerator="cpu")
    trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    after = model[1].weight.detach()
    assert not torch.allclose(before, after)
    for label in range(4):
        assert len(after[labels["1"] == label].unique()) <= 1
    with refused("unknown layer 'fc'"):
        cluster_weights(model, {"fc": 2})


# Layers.


def test_profiles_are_those_of_a_network_counted_by_hand():
    first, depthwise, pointwise, linear = profile_layers(network(), IMAGES)
    assert (first.name, first.rows, first.inner, first.columns, first.activations) == ("0", 4, 9, 16, 64)
    assert (depthwise.depthwise, depthwise.stride, depthwise.kernel, depthwise.weights) == (True, 1, 3, 36)
    assert (depthwise.macs, depthwise.positions) == (4 * 9 * 16, 16)
    assert (pointwise.depthwise, pointwise.macs, pointwise.activations) == (False, 16 * 4 * 16, 64)
    assert (linear.stride, linear.kernel, linear.macs, linear.columns) == (0, 1, 48, 1)


def test_profiles_follow_the_order_of_use_and_add_up_what_is_used_twice():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.idle = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(self.first(x)))

    model = Backwards().train()
    profiles = profile_layers(model, draw(5, 7, 4))
    assert [(p.name, p.columns, p.positions) for p in profiles] == [("first", 14, 14), ("last", 7, 7)]
    assert model.last.training
    with refused("ReLU uses no plain"):
        profile_layers(nn.ReLU(), draw(2, 3))


# Quantized models.


def test_a_quantized_model_computes_with_rounded_weights_and_inputs_and_is_restored():
    model, policy = network(), [[8, 8], [3, 4], [2, 5], [8, 8]]
    before, exact = {k: v.clone() for k, v in model.state_dict().items()}, model(IMAGES)
    ranges = calibrate(model, IMAGES)
    assert quantize_model(model, policy, ranges) == ["0", "3", "5", "8"]
    layers = quantized_layers(model)
    assert len(layers["5"].quantized_weight.unique()) <= 3
    x = draw(2, 4, 4, 4).abs()
    inputs = fake_quantize_activation(x, 5, ranges["5"].activation[5])
    expected = F.conv2d(inputs, fake_quantize_weight(model[5].weight, 2, ranges["5"].weight[2]), model[5].bias)
    torch.testing.assert_close(model[5](x), expected)
    assert not torch.allclose(model(IMAGES), exact)
    restore_model(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert type(model[5]) is nn.Conv2d
    assert not model[5]._forward_pre_hooks
    torch.testing.assert_close(model(IMAGES), exact, rtol=0, atol=0)


def test_negative_inputs_are_kept_and_weights_alone_leave_inputs_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    ranges = calibrate(model, x := draw(50, 4))
    assert ranges["0"].signed
    quantize_model(model, [[8]], ranges)
    torch.testing.assert_close(model(x), F.linear(x, model[0].quantized_weight, model[0].bias))
    assert not model[0].activation_clip.requires_grad


def test_the_fused_path_of_transformers_does_not_bypass_quantization():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = draw(2, 5, 8)
    with torch.no_grad():
        exact = model(x)
        quantize_model(model, [[2], [2]], calibrate(model, x, ["linear1", "linear2"]))
        assert not torch.allclose(model(x), exact, atol=1e-3)


def test_training_learns_weights_and_clips():
    model = network()
    quantize_model(model, [[8, 8], [4, 4], [4, 4], [8, 8]], calibrate(model, IMAGES))
    clip, weight = model[5].activation_clip.item(), model[5].weight.detach().clone()
    data = TensorDataset(IMAGES, torch.arange(16) % 3)
    trainer = Trainer(2, batch_size=8, accelerator="cpu")
    history = trainer.fit(model, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    assert model[5].activation_clip.item() != clip
    assert not torch.equal(model[5].weight, weight)
    restore_model(model)


def test_a_clip_that_training_makes_negative_does_no_harm():
    model = network()
    quantize_model(model, [[8, 8], [4, 4], [4, 4], [8, 8]], calibrate(model, IMAGES))
    with torch.no_grad():
        model[5].activation_clip.fill_(-3)
    assert model(IMAGES).isfinite().all()


def test_a_dead_layer_is_warned_of_and_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    with pytest.warns(UserWarning, match="layer '2' gets nothing but zeros"):
        ranges = calibrate(model, draw(8, 4))
    quantize_model(model, [[4, 4], [4, 4]], ranges)
    assert model[2].activation_bits is None
    assert model(draw(8, 4)).isfinite().all()


def test_policies_that_do_not_fit_are_refused_and_change_nothing():
    model = network()
    ranges = calibrate(model, IMAGES)
    with refused(r"weight_bits must be an integer in \[2, 8\], got 9 for layer 1"):
        quantize_model(model, [[8, 8], [9, 4], [4, 4], [8, 8]], ranges)
    with refused(r"activation_bits must be an integer in \[2, 8\], got 4.5 for layer 2"):
        quantize_model(model, [[8, 8], [4, 4], [4, 4.5], [8, 8]], ranges)
    with refused(r"policy must be \[4, 2\] or \[4, 1\], a row a layer, got \[3, 2\]"):
        quantize_model(model, [[8, 8]] * 3, ranges)
    assert not quantized_layers(model)
    quantize_model(model, [[8, 8]] * 4, ranges)
    with refused("unknown plain layer '0'"):
        quantize_model(model, [[8, 8]] * 4, ranges)
    with refused("unknown layer 'fc'"):
        calibrate(network(), IMAGES, ["fc"])


# Simulated hardware.


LAYERS = profile_layers(network(), IMAGES)


def test_without_a_memory_bound_only_arithmetic_counts_and_the_reverse():
    arithmetic = BitSerial(array=(2, 8, 4), bandwidth=np.inf, frequency=1)
    tiles = [np.ceil(each.rows / 2) * np.ceil(each.columns / 8) * np.ceil(each.inner / 4) for each in LAYERS]
    for w, a in ((8, 8), (3, 5)):
        assert arithmetic.table(LAYERS)[:, w - 1, a - 1].tolist() == [tile * w * a for tile in tiles]
    memory = BitSerial(array=(np.inf,) * 3, bandwidth=16, batch=4, frequency=1)
    expected = [(each.weights * 3 + 4 * each.activations * 5) / 16 for each in LAYERS]
    assert memory.table(LAYERS)[:, 2, 4].tolist() == expected


def test_half_the_bits_take_a_quarter_of_arithmetic_and_half_of_memory():
    for hardware, factor in (
        (BitSerial(array=(8, 8, 8), bandwidth=np.inf), 4),
        (BitSerial(array=(np.inf,) * 3, bandwidth=64), 2),
        (BitFusion(array=(8, 8, 8), bandwidth=np.inf), 4),
    ):
        table = hardware.table(LAYERS)
        np.testing.assert_allclose(table[:, 7, 7], factor * table[:, 3, 3])


def test_bits_that_fuse_are_rounded_up_to_powers_of_two():
    fused = BitFusion(array=(1, 1, 1), bandwidth=np.inf, frequency=1).table(LAYERS)[0] / LAYERS[0].macs
    assert fused[1, 1] == 1
    assert fused[7, 7] == 16
    assert fused[2, 4] == fused[3, 7] == 8
    assert fused[0, 0] == fused[1, 1]


def test_energy_is_that_of_products_traffic_and_waiting():
    device = {"array": (8, 8, 8), "bandwidth": 64, "frequency": 100, "batch": 2}
    energy = BitSerial(**device, mac_energy=0.1, memory_energy=3, static_power=0.5, objective="energy")
    layer, latency = LAYERS[2], BitSerial(**device).table(LAYERS)[2, 3, 5]
    picojoules = 0.1 * 4 * 6 * 2 * layer.macs + 3 * (4 * layer.weights + 2 * 6 * layer.activations)
    assert energy.table(LAYERS)[2, 3, 5] == pytest.approx(picojoules / 1e3 + 500 * latency)


@pytest.mark.parametrize("name", ["edge", "cloud", "fusion"])
def test_costs_of_the_devices_grow_with_bits(name):
    for objective in ("latency", "energy"):
        table = load_hardware(name, objective=objective).table(LAYERS)
        assert (table > 0).all()
        assert (np.diff(table, axis=1) >= 0).all()
        assert (np.diff(table, axis=2) >= 0).all()
    assert policy_cost(table, fixed_policy(table, 4)) < policy_cost(table, fixed_policy(table, 8))


def test_size_is_that_of_weights_alone():
    table = ModelSize().table(LAYERS)
    assert table.shape == (4, 8)
    assert policy_cost(table, np.full((4, 1), 4)) == sum(layer.weights for layer in LAYERS) / 2


def test_a_device_is_described_by_a_file(tmp_path, unchecked):
    text = (DEVICES / "edge.toml").read_text("utf-8")
    file = tmp_path / "mine.toml"
    file.write_text(text.replace("batch = 1 ", "batch = 3 "))
    assert load_hardware(file).batch == 3
    assert load_hardware("edge", bandwidth=7).bandwidth == 7
    for broken, message in (
        (text.replace("bit-serial", "bit-cereal"), "unknown kind in mine.toml 'bit-cereal'. Did you mean 'bit-serial'"),
        (text.replace("bandwidth", "bandwith"), "unknown entry in mine.toml 'bandwith'. Did you mean 'bandwidth'"),
        (text.replace("array =", "# array ="), "mine.toml lacks 'array'"),
        (text.replace("[8, 8, 8]", "[8, 8]"), "array must be three positive numbers"),
        (text.replace("64", "-64"), "bandwidth must be a positive number, got -64"),
        ("kind = [", "mine.toml is not TOML"),
    ):
        file.write_text(broken)
        with refused(message):
            load_hardware(file)
    with refused("no device or file 'egde'. Did you mean 'edge'"):
        load_hardware("egde")
    with refused("unknown objective 'latencey'. Did you mean 'latency'"):
        load_hardware("edge", objective="latencey")
    with refused("static_power must be a number of at least 0, got -1"):
        load_hardware("edge", static_power=-1)


def test_tables_of_the_wrong_kind_are_refused():
    table = np.ones((4, 8, 8))
    assert LookupTable(table).table(LAYERS).shape == (4, 8, 8)
    with refused("the cost table has 3 layers, but the model has 4"):
        LookupTable(table[:3]).table(LAYERS)
    with refused(r"a cost table must be \[layers, 8, 8\] or \[layers, 8\], got \[4, 8, 7\]"):
        LookupTable(table[..., :7])
    for value in (-1, np.nan, np.inf):
        table[1, 2, 3] = value
        with refused(r"costs must be finite and not negative, got .* at \[1, 2, 3\]"):
            LookupTable(table)


PUBLISHED = """88 77 56 46 56 57 56 74 46 46 77 56 46 73 57 47 73 57 47 77 47 47 64 67 47 74 67 57 74 67 57 74 67 67 64
    57 67 64 57 67 77 47 77 77 47 77 77 47 77 77 47 77 88"""


def test_the_authors_table_has_its_sums():
    try:
        table = LookupTable(np.load(locate("tables/haq_mobilenetv2_latency.npy"))).costs
    except DatasetNotFound:
        pytest.skip("the authors' latency table is not on this machine")
    for weights, activations, total in (
        (8, 8, 39_624_933),
        (6, 6, 26_653_434),
        (4, 4, 15_716_150),
        (2, 2, 7_063_425),
        (2, 8, 27_525_175),
        (8, 2, 10_823_107),
    ):
        assert policy_cost(table, np.full((53, 2), (weights, activations))) == total
    published = np.array([[int(bits) for bits in pair] for pair in PUBLISHED.split()])
    assert policy_cost(table, published) == 23_634_821
    published[0, 1] = 7  # what the release charges for the first layer's activations
    assert policy_cost(table, published) == 23_433_397


# Policies and budgets.


def test_actions_map_to_bits_in_equal_intervals():
    assert [bits_of_action(a) for a in (0, 0.5, 1)] == [2, 5, 8]
    mapped = [bits_of_action(a) for a in (np.arange(7000) + 0.5) / 7000]
    assert mapped == sorted(mapped)
    assert all(abs(mapped.count(bits) - 1000) <= 1 for bits in range(2, 9))
    assert (bits_of_action(0, 1, 7), bits_of_action(1, 1, 7)) == (1, 7)


PRODUCTS = np.outer(np.arange(1, 9), np.arange(1, 9))[None] * np.array([1.0, 2, 1])[:, None, None]


def test_the_budget_is_enforced_from_the_last_layer_to_the_first():
    policy = np.array([[8, 8], [6, 6], [8, 8]])
    fitted = enforce_budget(policy, PRODUCTS, 0.7 * 256)
    assert fitted.tolist() == [[8, 8], [5, 5], [8, 8]]
    assert policy_cost(PRODUCTS, fitted) == 178
    assert policy.tolist() == [[8, 8], [6, 6], [8, 8]]


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([1, 2]), st.floats(0.05, 1.0))
def test_a_fitted_policy_meets_the_budget_by_lowering_only(seed, layers, columns, budget):
    rng = np.random.default_rng(seed)
    table = rng.uniform(0.1, 1, (layers,) + (8,) * columns).cumsum(1).cumsum(-1)
    policy = rng.integers(2, 9, (layers, columns))
    target = budget * policy_cost(table, fixed_policy(table, 8))
    if policy_cost(table, fixed_policy(table, 2)) > target:
        for function in (enforce_budget, costliest_first, uniform_policy):
            with refused("out of reach"):
                function(*([policy] if function is enforce_budget else []), table, target)
        return
    fitted = enforce_budget(policy, table, target)
    assert policy_cost(table, fitted) <= target
    assert (fitted[[0, -1]] == 8).all()
    assert (fitted[1:-1] <= policy[1:-1]).all()
    assert fitted.min() >= 2
    for made in (costliest_first(table, target), uniform_policy(table, target)):
        assert policy_cost(table, made) <= target
        assert (made[[0, -1]] == 8).all()
    bits = uniform_policy(table, target)[1:-1]
    if bits.size and bits[0, 0] < 8:
        assert policy_cost(table, fixed_policy(table, int(bits[0, 0]) + 1)) > target


def test_the_rule_of_thumb_lowers_what_costs_most():
    policy = costliest_first(PRODUCTS, 64 + 64 + 2 * 40)
    assert policy.tolist()[1] in ([8, 5], [5, 8])


# The problem.


def score_of_weights(model: nn.Module) -> float:
    """High where the second layer is exact; cheap, and the same each time."""
    layer = model[3]
    return 1 / (1 + float((getattr(layer, "quantized_weight", layer.weight).detach() - REFERENCE).abs().sum()))


REFERENCE = network()[3].weight.detach()


def problem(evaluate=score_of_weights, hardware=None, budget=0.6, **options) -> QuantizationProblem:
    hardware = hardware or load_hardware("edge")
    return QuantizationProblem(network(), evaluate, IMAGES, hardware, budget, **options)


def test_a_score_leaves_the_model_as_it_was_whatever_evaluate_does():
    model = network()
    model[1].train()
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]

    def ruin(quantized: nn.Module) -> float:
        quantized.train()
        quantized(IMAGES)
        with torch.no_grad():
            for parameter in quantized.parameters():
                parameter.add_(1)
        return 0.5

    found = QuantizationProblem(model, ruin, IMAGES, load_hardware("edge"), 0.6)
    assert found.score([[8, 8], [3, 3], [3, 3], [8, 8]]) == 0.5

    def interrupt(quantized: nn.Module) -> float:
        ruin(quantized)
        raise KeyboardInterrupt

    found.evaluate = interrupt
    with pytest.raises(KeyboardInterrupt):
        found.score([[8, 8], [3, 3], [4, 3], [8, 8]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not quantized_layers(model)


def test_a_policy_is_scored_once():
    calls = []

    def count(model: nn.Module) -> float:
        calls.append(model)
        return 0.25

    found = problem(count)
    policy = [[8, 8], [3, 3], [3, 3], [8, 8]]
    assert found.score(policy) == found.score(np.array(policy)) == 0.25
    assert len(calls) == 2  # with the unquantized model
    assert found.reward(0.24) == pytest.approx(-0.1)


def test_weights_alone_may_be_shared():
    seen = []

    def distinct(model: nn.Module) -> float:
        seen.append([len(model[i].weight.unique()) for i in (0, 3, 5, 8)])
        return 0.5

    found = problem(distinct, ModelSize(), quantizer="kmeans")
    found.score([[8], [2], [3], [8]])
    assert seen[-1][1:3] == [4, 8]
    assert found.cost([[4]] * 4) == 0.5
    with refused("policy must have weight bits alone for each layer, got \\[4, 2\\]"):
        found.score([[8, 8]] * 4)
    with refused("quantizer='kmeans' leaves activations alone"):
        problem(quantizer="kmeans")


def test_problems_that_make_no_sense_are_refused(unchecked):
    with refused("budget=0.01 of the 8-bit cost is out of reach: with 2 bits wherever they may be lowered it costs 0."):
        problem(budget=0.01)
    with refused(r"budget must be a fraction in \(0, 1\]"):
        problem(budget=1.5)
    with refused("min_bits must be from 2 to 8, got 1"):
        problem(min_bits=1)
    with refused("unknown quantizer 'kmean'. Did you mean 'kmeans'"):
        problem(quantizer="kmean")
    with refused("evaluate must return a finite number, got nan for the unquantized model"):
        problem(lambda model: float("nan"))
    with refused("ReLU uses no plain"):
        QuantizationProblem(nn.ReLU(), score_of_weights, IMAGES, load_hardware("edge"), 0.6)


def test_a_log_of_another_model_or_with_damage_is_refused(tmp_path):
    log = tmp_path / "scores.jsonl"
    problem(log=log).score([[8, 8], [3, 3], [3, 3], [8, 8]])
    assert len(problem(log=log).scores) == 1
    half = log.read_text() + '{"policy": [8, 8'
    log.write_text(half)
    resumed = problem(log=log)
    resumed.score([[8, 8], [2, 2], [2, 2], [8, 8]])
    assert len(problem(log=log).scores) == 2
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{}", lines[2]]) + "\n")
    with refused("scores.jsonl, line 2 is damaged"):
        problem(log=log)
    log.write_text(lines[0].replace("linear", "kmeans") + "\n")
    with refused("holds scores of another model"):
        problem(log=log)


# The environment.


def test_the_environment_is_a_gymnasium_environment():
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(haq.QuantizationEnv(problem()), skip_render_check=True)
        check_env(haq.QuantizationEnv(problem(hardware=ModelSize())), skip_render_check=True)


def test_an_episode_observes_layers_and_ends_with_the_reward():
    pytest.importorskip("gymnasium")
    env = haq.QuantizationEnv(found := problem(budget=1.0))
    observation, _ = env.reset(seed=0)
    #             dw, c_in, c_out, stride, k, weights, positions, index, last action, weight or not
    assert observation.tolist() == pytest.approx([0, 0, 1 / 13, 1, 1, 0, 1, 0, 1, 1], abs=1e-6)
    actions = [0.5, 0.0, 0.2, 0.9, 1.0, 0.4, 0.1, 0.7]
    chosen = [bits_of_action(action) for action in actions]
    for step, action in enumerate(actions):
        before = observation
        observation, reward, done, truncated, info = env.step(np.array([action]))
        if step < 7:
            assert (reward, done, truncated, info) == (0.0, False, False, {})
            assert observation[-2] == pytest.approx(chosen[step] / 8)
            assert observation[-1] == step % 2
    assert done
    assert observation.tolist() == before.tolist()
    expected = [[8, 8], chosen[2:4], chosen[4:6], [8, 8]]
    assert info["policy"] == expected
    assert reward == pytest.approx(10 * (found.score(expected) - found.original))
    assert env.history == [info]


def test_constant_features_stay_as_they_are():
    pytest.importorskip("gymnasium")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    env = haq.QuantizationEnv(QuantizationProblem(model, lambda m: 0.5, draw(4, 4), load_hardware("edge"), 1.0))
    observation, _ = env.reset()
    assert observation[:8].tolist() == [0, 4, 4, 0, 1, 16, 1, 0]
    assert env.observation_space.contains(observation)


# The agent.


def test_targets_centre_the_reward_by_a_moving_average():
    agent = DDPGAgent(2, 10, gamma=0.5)
    with torch.no_grad():
        for parameter in agent.target_critic.parameters():
            parameter.zero_()
        agent.target_critic.value[-1].bias.fill_(4.0)
    batch = Transitions(
        draw(3, 2), torch.rand(3, 1), torch.tensor([[1.0], [2], [6]]), draw(3, 2), torch.tensor([[0.0], [0], [1]])
    )
    assert agent.targets(batch).flatten().tolist() == [1 - 3 + 2, 2 - 3 + 2, 6 - 3]
    batch = batch._replace(rewards=batch.rewards + 2)
    assert agent.targets(batch).flatten().tolist() == [3 - 4 + 2, 4 - 4 + 2, 8 - 4]  # 3 + (5 - 3) / 2 = 4


def test_targets_follow():
    agent = DDPGAgent(2, 10, tau=1.0)
    with torch.no_grad():
        agent.actor[0].weight.add_(1)
    agent.follow()
    assert torch.equal(agent.target_actor[0].weight, agent.actor[0].weight)
    agent.tau = 0.25
    before = agent.target_critic.state.weight.clone()
    with torch.no_grad():
        agent.critic.state.weight.add_(1)
    agent.follow()
    torch.testing.assert_close(agent.target_critic.state.weight, before + 0.25)


def test_episodes_are_stored_with_their_last_reward_and_the_oldest_are_forgotten():
    agent = DDPGAgent(1, 5)
    states = np.arange(3, dtype=np.float32)[:, None]
    agent.remember(states, np.array([0.1, 0.2, 0.3]), 7.0, states[-1])
    assert agent.size == 3
    assert agent._memory.next_states[:3].flatten().tolist() == [1, 2, 2]
    assert agent._memory.last[:3].flatten().tolist() == [0, 0, 1]
    assert agent._memory.rewards[:3].flatten().tolist() == [7, 7, 7]
    agent.remember(states + 10, np.array([0.4, 0.5, 0.6]), 8.0, states[-1] + 10)
    assert agent.size == 5
    assert agent._memory.states.flatten().tolist() == [12, 1, 2, 10, 11]


def test_exploration_stays_within_bounds_around_the_actor():
    agent = DDPGAgent(2, 10)
    state = np.zeros(2, dtype=np.float32)
    mean = agent.act(state)
    drawn = np.array([agent.act(state, 0.5) for _ in range(300)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.std() > 0.2
    near = np.array([agent.act(state, 0.01) for _ in range(50)])
    assert abs(near - mean).max() < 0.05
    with refused("tau must be in"):
        DDPGAgent(2, 10, tau=1.5)
    with refused("capacity must be at least 1, got 0"):
        DDPGAgent(2, 0)


def play_toy(seed: int, episodes: int = 120, steps: int = 2) -> int:
    """Bits that the actor chooses at last where only the first action counts and 5 bits are best."""
    agent = DDPGAgent(2, 128 * steps, hidden=(64, 64), actor_lr=1e-3, seed=seed)
    states = np.stack([np.arange(steps) / steps, np.ones(steps)], 1).astype(np.float32)
    for episode in range(episodes):
        sigma = 0.5 * 0.99 ** (episode - 20)
        actions = np.array([agent.random() if episode < 20 else agent.act(state, sigma) for state in states])
        agent.remember(states, actions, -abs(bits_of_action(actions[0]) - 5.0), states[-1])
        for _ in range(steps if episode >= 20 else 0):
            agent.update()
    return bits_of_action(agent.act(states[0]))


def test_the_agent_finds_the_action_that_counts():
    assert [play_toy(seed) for seed in range(5)].count(5) >= 4


# Searches.


def test_the_same_seed_gives_the_same_history_also_from_a_log(tmp_path):
    pytest.importorskip("gymnasium")
    look = partial(search, episodes=8, warmup=3, updates=2, seed=1)
    whole = look(problem())
    assert whole == look(problem())
    assert whole != search(problem(), 8, warmup=3, updates=2, seed=2)
    assert len(whole.history) == 8
    assert whole.best.score == max(found.score for found in whole.history)
    assert all(found.cost <= 0.6 for found in whole.history)

    calls = []

    def killed(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score_of_weights(model)

    with pytest.raises(KeyboardInterrupt):
        look(problem(killed, log=tmp_path / "log.jsonl"))
    done = len(problem(log=tmp_path / "log.jsonl").scores)
    assert done == 3
    calls = [1] * 10
    assert look(problem(killed, log=tmp_path / "log.jsonl")) == whole
    assert len(calls) - 10 == 1 + len({str(found.policy) for found in whole.history}) - done


@pytest.mark.parametrize("device", ["edge", "cloud", "fusion"])
def test_every_search_reports_policies_within_the_budget(device):
    found = problem(hardware=load_hardware(device), budget=0.75)
    for result in (random_search(found, 12), greedy_sensitivity(found)):
        assert result.best.cost <= 0.75
        assert result.best.score == found.score(result.policy)
        assert result.policy[[0, -1]].tolist() == [[8, 8], [8, 8]]
    assert len(greedy_sensitivity(found).history) == 2 + 4 * 6
    assert random_search(found, 3, seed=1) == random_search(found, 3, seed=1)


def test_greedy_spares_the_layer_that_matters():
    result = greedy_sensitivity(problem())
    weights = result.policy[:, 0]
    assert weights[1] > weights[2]


def test_a_search_over_weights_alone_takes_one_step_a_layer():
    pytest.importorskip("gymnasium")
    result = search(problem(hardware=ModelSize()), 4, warmup=2)
    assert result.policy.shape == (4, 1)
    assert greedy_sensitivity(problem(hardware=ModelSize())).policy.shape == (4, 1)


def test_stable_baselines3_runs_on_the_environment():
    pytest.importorskip("stable_baselines3")
    state = torch.get_rng_state()
    result = search(problem(), 4, agent="sb3", warmup=2)
    assert len(result.history) == 4
    assert result == search(problem(), 4, agent="sb3", warmup=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_results_are_saved(tmp_path):
    result = random_search(problem(), 3)
    result.save(tmp_path / "result.json")
    assert PolicyResult.load(tmp_path / "result.json") == result
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with refused("other.json holds no result of a search"):
        PolicyResult.load(tmp_path / "other.json")


def test_searches_refuse_what_they_cannot_do(unchecked):
    with refused("unknown agent 'sb4'. Did you mean 'sb3'"):
        search(problem(), 3, agent="sb4")
    with refused("episodes and updates must be at least 1"):
        search(problem(), 0)
    with refused("sigma must be positive"):
        search(problem(), 3, sigma=0)
    with refused("evaluations must be at least 1, got 0"):
        random_search(problem(), 0)


# Export.


def test_exported_weights_are_those_that_were_scored():
    pytest.importorskip("torchao")
    model = network()
    quantize_model(model, [[8], [3], [2], [5]], calibrate(model, IMAGES))
    with torch.no_grad():
        expected = model(IMAGES)
        exported = export_torchao(model)
        for name, layer in quantized_layers(model).items():
            weight = exported.get_submodule(name).weight
            assert torch.equal(weight.dequantize(), layer.quantized_weight)
            assert int(weight.qdata.abs().max()) < 2 ** (layer.weight_bits - 1)
        torch.testing.assert_close(exported(IMAGES), expected)
    assert len(quantized_layers(model)) == 4
    assert type(exported[0]) is nn.Conv2d


def test_bits_that_torchao_has_not_are_refused_by_name(unchecked):
    pytest.importorskip("torchao")
    model = network()
    with refused("Sequential has no quantized layer: call quantize_model first"):
        export_torchao(model)
    quantize_model(model, [[8, 8], [3, 5], [2, 8], [8, 8]], calibrate(model, IMAGES))
    with refused("layer '3': activations of 5 bits cannot be exported to torchao, which has 8"):
        export_torchao(model)
    with refused("unknown activations 'int4'"):
        export_torchao(model, "int4")
    exported = export_torchao(model, "float")
    assert exported[3].weight.activation_quantization is None
    restore_model(model)
    quantize_model(model, [[8, 8], [3, 8], [2, 8], [8, 8]], calibrate(model, IMAGES))
    exported = export_torchao(model)
    assert exported[3].weight.activation_quantization is not None
    with torch.no_grad():
        torch.testing.assert_close(exported(IMAGES), model(IMAGES), atol=0.05, rtol=0.05)


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    model = network()
    quantize_model(model, [[8]] * 4, calibrate(model, IMAGES))
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"export_torchao needs torchao: pip install 'paperworks\[export\]'"):
        export_torchao(model)
    monkeypatch.delitem(sys.modules, "paperworks.search.haq.env", raising=False)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingExtra, match=r"HAQ's search needs gymnasium: pip install 'paperworks\[agents\]'"):
        search(problem(), 1)
