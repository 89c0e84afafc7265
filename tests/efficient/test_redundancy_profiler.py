import json
import math

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paperworks.efficient
from paperworks.commands.redundancy import redundancy
from paperworks.efficient import (
    TAXONOMY,
    RedundancyProfiler,
    RedundancyReport,
    attention_redundancy,
    channel_redundancy,
    duplicate_redundancy,
    lsh_redundancy,
    spectral_redundancy,
    temporal_redundancy,
    token_redundancy,
    value_redundancy,
    zero_redundancy,
)
from paperworks.efficient.redundancy.report import INPUT, Row
from paperworks.errors import UserError
from paperworks.nn import ConvNet


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refused(message: str):
    """Expect our error, or beartype's where that is on and looks first."""
    return pytest.raises((UserError, TypeError), match=f"{message}|Type-check error")


# The taxonomy.


def test_each_class_names_its_techniques():
    assert list(TAXONOMY) == [f"R{number}" for number in range(1, 10)]
    for kind in TAXONOMY.values():
        names = [name for name in kind.technique.split(", ") if name]
        assert all(hasattr(paperworks.efficient, name) for name in names)
        assert bool(names) == (kind.scope != "report")


# Measures.


def test_spectral_redundancy_of_known_images():
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    assert spectral_redundancy(torch.full((3, 16, 16), 0.7)) == 1
    assert spectral_redundancy(checkerboard.float()) == pytest.approx(0, abs=1e-6)
    coarse = draw(4, 1, 32, 32)
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    assert spectral_redundancy(fine) > 0.9
    assert spectral_redundancy(draw(64, 32, 32)) == pytest.approx(0.25, abs=0.06)  # white noise, but for the bins


def test_the_number_of_clusters_of_independent_signs():
    found = lsh_redundancy(draw(1000, 64), bits=10)
    expected = 1024 * (1 - (1023 / 1024) ** 1000)
    assert found.cluster_ratio * 1000 == pytest.approx(expected, rel=0.03)
    assert found.redundancy == pytest.approx(1 - found.cluster_ratio)
    assert 0 < found.error < 1


def test_few_distinct_vectors_are_found():
    rows = draw(7, 9).repeat(20, 1)
    for block in (None, 3):
        found = lsh_redundancy(rows, bits=40, block=block)
        assert found.error == pytest.approx(0, abs=1e-5)
        assert found.cluster_ratio <= 7 / 140
    assert lsh_redundancy(rows, bits=40).cluster_ratio == 7 / 140
    none = lsh_redundancy(rows, bits=0)
    assert (none.cluster_ratio, none.error) == (1 / 140, pytest.approx(1))
    assert lsh_redundancy(rows[:1].expand(30, -1)) == (1 - 1 / 30, 1 / 30, 0)
    with refused("bits must be from 0 to 62, got 63"):
        lsh_redundancy(rows, bits=63)
    with refused("block must divide the 9 columns, got 4"):
        lsh_redundancy(rows, block=4)


def test_positive_vectors_are_told_apart():
    """After a ReLU all vectors lie in one orthant; without centring they would share few signatures."""
    assert lsh_redundancy(draw(500, 64).relu() + 5, bits=16).cluster_ratio > 0.9


@given(rank=st.integers(1, 6), seed=st.integers(0, 20))
def test_effective_rank_is_at_most_the_rank(rank, seed):
    activations = draw(200, rank, seed=seed) @ draw(rank, 8, seed=seed + 1)
    found = channel_redundancy(activations)
    assert 1 - 1e-4 <= found.effective_rank <= rank + 1e-4
    assert found.redundancy == pytest.approx(1 - found.effective_rank / 8)


def test_channels_that_are_the_same_or_white():
    same = channel_redundancy(draw(10, 1, 8, 8).expand(-1, 6, -1, -1))
    assert same.redundancy == pytest.approx(1 - 1 / 6, abs=1e-6)
    assert same.correlated == 1
    white = channel_redundancy(draw(5000, 6))
    assert white.redundancy < 0.01
    assert white.correlated == 0
    assert channel_redundancy(torch.ones(9, 4)) == (1, 0, 1)


def test_zeros_are_counted_with_their_surroundings():
    maps = torch.zeros(1, 2, 32, 32)
    assert zero_redundancy(maps) == (1, 1, 1)
    maps[0, 0, 12, 12] = 1
    assert zero_redundancy(maps) == pytest.approx((1 - 1 / 2048, 1 - 1 / 1024, 15 / 16))
    maps[0, 1, 7, 12] = 1
    assert zero_redundancy(maps).tiles == 14 / 16
    assert zero_redundancy(maps, halo=0).tiles == 14 / 16
    assert zero_redundancy(torch.ones(1, 1, 9, 9)) == (0, 0, 0)


def test_time_that_stands_still():
    still = draw(1, 3, 4, 4).expand(5, -1, -1, -1)
    assert temporal_redundancy(still) == (1, 1, 0)
    clip = still.clone()
    clip[2:, 0, 0, 0] += 1
    found = temporal_redundancy(clip)
    assert (found.frames, found.pixels) == (3 / 4, 63 / 64)
    assert found.mean_change == pytest.approx(1 / 48 / 4)
    assert temporal_redundancy(clip, tau=1.1) == (1, 1, found.mean_change)
    with refused("tau must be at least 0"):
        temporal_redundancy(clip, -1.0)
    with refused("at least 2 frames"):
        temporal_redundancy(clip[:1])


def test_tokens_that_are_the_same_or_orthogonal():
    assert token_redundancy(draw(2, 1, 8).expand(-1, 6, -1)) == pytest.approx((1, 0.5))
    assert token_redundancy(torch.eye(6)[None]) == (0, 0)
    with refused("at least 2"):
        token_redundancy(draw(2, 1, 8))
    even, peaked = torch.full((1, 2, 4, 4), 0.25), torch.zeros(1, 2, 4, 4)
    peaked[..., 1] = 1
    assert attention_redundancy(even) == pytest.approx(0, abs=1e-6)
    assert attention_redundancy(peaked) == pytest.approx(1)


def test_duplicates_and_values():
    x = draw(40, 3, 4)
    assert duplicate_redundancy(torch.cat([x, x])) == (0.5, 0.5)
    assert duplicate_redundancy(torch.cat([x, x + 1e-3])) == (0, 0.5)
    assert value_redundancy(torch.full((1000,), 3.0)).redundancy == 1
    noise = torch.randint(256, (100_000,), generator=torch.Generator().manual_seed(0)).float()
    found = value_redundancy(noise)
    assert found.redundancy == pytest.approx(0, abs=0.02)
    assert found.compressed == pytest.approx(1, abs=0.02)
    assert value_redundancy(torch.full((1000,), 3.0)).compressed < 0.1


@pytest.mark.parametrize("measure", [spectral_redundancy, lsh_redundancy, channel_redundancy, value_redundancy])
def test_bad_numbers_are_refused(measure):
    values = draw(8, 8)
    values[3, 3] = math.nan
    with refused("must be finite, got 1 values that are NaN or infinite"):
        measure(values)
    with refused("must not be empty"):
        measure(values[:0])


# The profiler.


class Sight(nn.Module):
    """A convolution, attention over its pixels, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(F.relu(self.stem(images)).flatten(2).transpose(1, 2)).mean(1))


def test_every_class_is_measured_where_it_can_occur():
    model = Sight()
    table = RedundancyProfiler(model).run(draw(20, 1, 8, 8), temporal=True).to_frame()
    kinds = {layer: list(rows["class"]) for layer, rows in table.groupby("layer", sort=False)}
    assert kinds == {
        INPUT: ["R1", "R4", "R8", "R9"],
        "stem": ["R2", "R3", "R5", "R6", "R9"],
        "encoder.layers.0.self_attn": ["R7", "R9"],
        "encoder.layers.0.linear1": ["R2", "R9"],
        "encoder.layers.0.linear2": ["R2", "R9"],
        "encoder.layers.1.self_attn": ["R7", "R9"],
        "encoder.layers.1.linear1": ["R2", "R9"],
        "encoder.layers.1.linear2": ["R2", "R9"],
        "head": ["R2", "R9"],
    }
    assert table["value"].between(0, 1).all()
    assert (table["cost"] >= 0).all()
    stem = table[table.layer == "stem"].iloc[0]
    assert (stem.macs, stem["bytes"]) == (20 * 64 * 16 * 9, 20 * 64 * 4)
    assert table[table.layer == "head"].iloc[0].macs == 20 * 16 * 4


def test_the_model_is_left_as_it_was():
    model = Sight().train()
    model.encoder.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    RedundancyProfiler(model).run(draw(3, 1, 8, 8))
    with pytest.raises(UserError):
        RedundancyProfiler(model).run(torch.full((3, 1, 8, 8), math.nan))
    assert modes == [module.training for module in model.modules()]
    assert fast == torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batches_are_one_set():
    model, x = ConvNet(1, 4, (8, 8), (1, 1)).eval(), draw(48, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, torch.zeros(48)), batch_size=16)
    whole = RedundancyProfiler(model, bits=4).run(x, temporal=True)
    parts = RedundancyProfiler(model, bits=4).run(loader, temporal=True)
    assert whole.examples == parts.examples == 48
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert (one.layer, one.kind, one.bytes, one.macs) == (other.layer, other.kind, other.bytes, other.macs)
        exact = one.kind in ("R1", "R3", "R4", "R5", "R8")
        assert one.value == pytest.approx(other.value, abs=1e-6 if exact else 0.05)
    again = RedundancyProfiler(model, bits=4).run(x, temporal=True)
    assert again.rows == whole.rows


def test_what_is_redundant_is_found():
    model = nn.Sequential(nn.Conv2d(3, 512, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(512, 4, 1))
    tile = draw(1, 3, 2, 2).repeat(1, 1, 16, 16)
    tile[..., 16:] = 0
    clip = tile.repeat(12, 1, 1, 1)
    clip[6:, :, 8, 8] += 1
    report = RedundancyProfiler(model).run(clip, temporal=True)
    values = {(row.layer, row.kind): row.value for row in report.rows}
    assert values["0", "R2"] > 0.95
    assert values["0", "R3"] == pytest.approx(0.25)  # half is empty, and half of that is next to what is not
    assert values["0", "R5"] == pytest.approx(1 - 1 / 11 / 1024)
    assert values[INPUT, "R4"] == 1
    assert values[INPUT, "R8"] == pytest.approx(10 / 12)
    assert values["0", "R6"] > 0.9  # of 512 channels 27 at most are independent
    advice = report.recommend().set_index("class")
    assert {"R2", "R4", "R5", "R8"} <= set(advice.index)
    assert advice.loc["R2", "layers"] == ["0"]
    assert (advice.gain >= 1).all()
    assert advice.gain.is_monotonic_decreasing


def test_narrow_layers_gain_nothing_from_reuse():
    """The memory traffic does not shrink with the channels."""
    wide, narrow = ([Row("a", "R2", 0.9, cost, 1, 100)] for cost in (0.4, 1.1))
    assert RedundancyReport("M", 1, wide).recommend().gain.tolist() == [pytest.approx(2.5)]
    assert RedundancyReport("M", 1, narrow).recommend().empty
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    costs = {row.kind: row.cost for row in RedundancyProfiler(model).run(torch.ones(2, 3, 16, 16)).rows}
    assert costs["R2"] > 1


def test_the_gain_of_the_model_follows_amdahl():
    rows = [Row("a", "R2", 0.9, 0.5, 1, 300), Row("b", "R2", 0.1, 0.95, 1, 100), Row("b", "R9", 0.9, 0.1, 1, 100)]
    (found,) = RedundancyReport("M", 1, rows).recommend().to_dict("records")
    assert (found["class"], found["layers"]) == ("R2", ["a"])
    assert found["gain"] == pytest.approx(1 / (1 - 0.75 * 0.5))
    with refused("min_gain must be at least 1"):
        RedundancyReport("M", 1, rows).recommend(0.5)


def test_what_cannot_be_profiled_is_refused():
    with refused("MaxPool2d has no nn.Conv2d"):
        RedundancyProfiler(nn.MaxPool2d(2))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with refused("unknown layer '3'"):
        RedundancyProfiler(model, ["3"])
    with refused("bits must be from 0 to 62, got 63"):
        RedundancyProfiler(model, bits=63)
    with refused("tau must be at least 0"):
        RedundancyProfiler(model, tau=-1.0)
    for empty in ([], torch.zeros(0, 1, 8, 8)):
        with refused("the data are empty"):
            RedundancyProfiler(model).run(empty)
    model[0].weight.data[0] = math.inf
    with pytest.raises(UserError, match="layer '1': its input must be finite"):
        RedundancyProfiler(model).run(draw(1, 1, 8, 8).abs())
    with pytest.raises(UserError, match="frame 12 is 64x48, clip is 64x64"):
        RedundancyProfiler(ConvNet(1, 2, (4,), (1,))).run([draw(12, 1, 64, 64), draw(1, 1, 48, 64)], temporal=True)


def test_grouped_convolutions_and_other_inputs_are_profiled_as_far_as_they_can():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.LazyLinear(3))
    report = RedundancyProfiler(model[:1]).run(draw(6, 4, 8, 8))
    assert [row.kind for row in report.rows if row.layer == "0"] == ["R6", "R9"]
    words = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    report = RedundancyProfiler(words).run(torch.randint(9, (5, 7)))
    assert [row.kind for row in report.rows] == ["R8", "R9", "R2", "R9"]


# The report.


def report() -> RedundancyReport:
    return RedundancyProfiler(ConvNet(1, 4, (8, 8), (1, 1))).run(draw(8, 1, 8, 8))


def test_reports_are_written_whole(tmp_path):
    found = report()
    found.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == found.to_dict()
    assert len(content["rows"]) == len(found.rows)
    found.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "data:image/png;base64," in page
    assert "http" not in page
    with refused("a report is written to .html or .json, got 'report.pdf'"):
        found.save(tmp_path / "report.pdf")


def test_the_picture_shows_each_value():
    found = report()
    figure = found.plot()
    assert len(figure.axes[0].texts) == len(found.rows)


# The command.


def call(*arguments: object):
    return CliRunner().invoke(redundancy, [str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynets.py").write_text(
        "from paperworks.nn import ConvNet\n"
        "def small(): return ConvNet(1, 10, (8, 8), (1, 1))\n"
        "def asks(width): return None\n"
        "number = 3\n"
    )
    return tmp_path


def test_a_model_is_profiled_from_the_command_line(here):
    from safetensors.torch import save_model

    save_model(ConvNet(1, 10, (8, 8), (1, 1)), here / "w.safetensors")
    done = call(
        *("profile", "mynets:small", "--data", "digits", "--limit", 40),
        *("--out", here / "r.html", "--weights", here / "w.safetensors"),
    )
    assert done.exit_code == 0, done.output
    assert "body.1.0" in done.output
    assert "R8" in done.output
    assert (here / "r.html").exists()


def test_a_folder_of_frames_is_profiled_as_a_clip(here):
    from PIL import Image

    (here / "frames").mkdir()
    for number in range(3):
        Image.new("L", (16, 16), 9 * number).save(here / "frames" / f"{number}.png")
    (here / "mynets3.py").write_text("from torch import nn\nnet = nn.Conv2d(3, 4, 3)\n")
    done = call("profile", "mynets3:net", "--clip", here / "frames", "--image-size", 16, "--limit", 3)
    assert done.exit_code == 0, done.output
    assert "R4" in done.output
    assert "R5" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mynets:smal", "--data", "digits"], "mynets has no 'smal'. Did you mean 'small'?"),
        (["mynets", "--data", "digits"], "a model must be package.module:callable"),
        (["no_such_module:net", "--data", "digits"], "cannot import no_such_module"),
        (["mynets:asks", "--data", "digits"], "mynets:asks cannot be made: asks() missing 1"),
        (["mynets:number", "--data", "digits"], "must return an nn.Module, got int"),
        (["mynets:small"], "give either --data or --clip"),
        (["mynets:small", "--data", "digits", "--out", "r.pdf"], "--out must end in .html or .json"),
        (["mynets:small", "--data", "digits", "--weights", "mynets.py"], "holds no weights of this model"),
        (["mynets:small", "--data", "wine"], "takes no batch of shape"),
        (["mynets:small", "--clip", "nowhere.mp4"], "there is no nowhere.mp4"),
    ],
)
def test_bad_arguments_get_one_line(here, arguments, message):
    error = call("profile", *arguments).exception
    assert isinstance(error, UserError), error
    assert message in str(error)
