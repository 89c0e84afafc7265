"""What each technique against redundancy gains beside the dense layer or model, in interleaved rounds on one thread.

Deep reuse: at least 1.6 times as fast as a 64→512 convolution on a photograph's features with 12 bits. Delta: at least
2.5 times as fast as a 64→128 convolution where 2 % of the pixels change, and it falls back above 20 %. Tiles: at least
twice where 6 % of them are active. Pruning to half the tokens: at least 1.4 times as fast as PyTorch's fused encoder,
1.2 times for one of width 64. On data that do not repeat, no layer may take more than 1.05 times as long as the dense.

The bound of each is printed beside it: the product of the centroids, of the active outputs or tiles, of the kept tokens
alone. The profiler may take 3 times the forward pass that it observes. Gates have no bar: they gain in wide layers.

CPU time (wall time on a GPU, where there is one), medians of the rounds' ratios.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from timing import DEVICE, interleaved, ratio, verdict
from torch import Tensor, nn
from torchvision.models import resnet18

from paperworks.efficient import (
    ChannelGate,
    DeltaConv2d,
    RedundancyProfiler,
    ReuseConv2d,
    TileSkipConv2d,
    TokenMerger,
    TokenPruner,
)
from paperworks.efficient.redundancy.reuse import predicted_cost

ROUNDS = 9
torch.set_num_threads(1)
torch.manual_seed(0)


def conv(*channels: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(*channels, 3, padding=1, **options).eval().to(DEVICE)  # type: ignore[arg-type]


def photograph_features(side: int = 96) -> Tensor:
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    return conv(3, 64)(F.interpolate(photograph, (side, side), mode="area").to(DEVICE)).relu()


def gain(dense: Callable[[], object], **others: Callable[[], object]) -> dict[str, float]:
    """How many times as fast as the dense one each is."""
    times = interleaved({"dense": dense, **others}, ROUNDS)
    print(f"  dense {1e3 * statistics.median(times['dense']):.2f} ms")
    return {name: ratio(times["dense"], times[name]) for name in others}


def reuse() -> list[bool]:
    met, x = [], photograph_features()
    for out in (128, 256, 512):
        layer = conv(64, out)
        for bits in (8, 12, 16, 20):
            ours = ReuseConv2d.from_layer(layer, bits, auto=False)
            y = ours(x)
            error = float((y - layer(x)).norm() / (layer(x) - layer(x).mean((0, 2, 3), keepdim=True)).norm())
            rows = torch.randn(round(ours.cluster_ratio * 96 * 96), 576, device=DEVICE)
            weight = layer.weight.flatten(1).T.contiguous()
            found = gain(partial(layer, x), ours=partial(ours, x), bound=partial(torch.mm, rows, weight))
            cost = predicted_cost(bits, out, ours.cluster_ratio)
            known = f"u {ours.cluster_ratio:.2f}, error {error:.2f}, bound {found['bound']:.0f}"
            name = f"reuse 64→{out}, {bits} bits, {known}"
            met.append(verdict(name, found["ours"], at_least=1.6 if (out, bits) == (512, 12) else None))
            print(f"  predicted {1 / cost:.2f}")
    return met


def delta() -> list[bool]:
    met, layer = [], conv(64, 128)
    before = photograph_features().contiguous(memory_format=torch.channels_last)
    for share in (0.0, 0.005, 0.02, 0.1, 0.2, 0.3):
        side, after = round((share * 96 * 96) ** 0.5), before.clone()
        after[:, :, :side, :side] += 1
        ours, frames = DeltaConv2d(layer, dense_above=1.0), [before, after]

        def run(function: Callable[[Tensor], Tensor], frames: list[Tensor] = frames) -> None:
            for frame in frames:
                function(frame)

        found = gain(partial(run, layer), ours=partial(run, ours))
        bar = 2.5 if share == 0.02 else None
        met.append(verdict(f"delta 64→128, {100 * share:g} % of the pixels change", found["ours"], at_least=bar))
    return met


def tiles() -> list[bool]:
    layer, x = conv(64, 64), torch.zeros(4, 64, 96, 96, device=DEVICE)
    x[:, :, 40:48, 40:48] = 1
    ours = TileSkipConv2d(layer)
    found = gain(partial(layer, x), ours=partial(ours, x))
    return [verdict(f"tiles 64→64, {100 * ours.active:.0f} % active", found["ours"], at_least=2.0)]


def fall_back() -> list[bool]:
    """Many calls, so that looking in vain is spread as in use."""
    layer, met = conv(64, 128), []
    inputs = [torch.randn(1, 64, 96, 96, device=DEVICE) for _ in range(2)]

    def calls(function: Callable[[Tensor], Tensor]) -> None:
        for number in range(64):
            function(inputs[number % 2])

    for name, ours in {
        "reuse": ReuseConv2d.from_layer(layer, 20),
        "delta": DeltaConv2d(layer),
        "tiles": TileSkipConv2d(layer),
    }.items():
        times = interleaved({"dense": partial(calls, layer), "ours": partial(calls, ours)}, 3)
        met.append(
            verdict(
                f"{name} on data that do not repeat, over dense", ratio(times["ours"], times["dense"]), at_most=1.05
            )
        )
    return met


def tokens() -> list[bool]:
    met = []
    for batch, length, width, heads, layers, keep in [
        (128, 17, 64, 4, 4, (0.7, 0.45, 0.3, 0.2)),
        (32, 65, 192, 3, 4, (0.7, 0.45, 0.3, 0.2)),
        (32, 197, 192, 3, 4, (0.7, 0.45, 0.3, 0.2)),
    ]:
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval().to(DEVICE)
        x = torch.randn(batch, length, width, device=DEVICE)
        pruner, merger = TokenPruner(encoder, keep), TokenMerger(encoder, length // 7)
        short = x[:, : length // 2].contiguous()
        found = gain(
            partial(encoder, x), pruned=partial(pruner, x), merged=partial(merger, x), bound=partial(encoder, short)
        )
        name = f"{batch}x{length} tokens of {width}"
        met.append(
            verdict(
                f"pruned to half, {name}, bound {found['bound']:.1f}",
                found["pruned"],
                at_least=1.4 if width > 64 else 1.2,
            )
        )
        met.append(verdict(f"merged, {name}", found["merged"]))
    return met


def gates() -> list[bool]:
    met = []
    for channels, side in ((64, 8), (128, 28), (256, 28)):
        layer, x = conv(channels, channels), torch.randn(1, channels, side, side, device=DEVICE)
        x[:, ::2] = 0  # as behind another gate
        found = gain(partial(layer, x), ours=partial(ChannelGate(layer), x))
        met.append(verdict(f"half the channels, {channels} on {side}x{side}, one image", found["ours"]))
    return met


def profiler() -> list[bool]:
    model, batches = resnet18().eval().to(DEVICE), list(torch.rand(16, 16, 3, 112, 112, device=DEVICE))
    run = partial(RedundancyProfiler(model).run, batches)
    times = interleaved({"forward": lambda: [model(x) for x in batches], "profiler": run}, 3)
    value = ratio(times["profiler"], times["forward"])
    return [verdict("profiler of ResNet-18 on 256 images, over its forward pass", value, at_most=3)]


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}; times as fast as dense, unless said otherwise")
    with torch.no_grad():
        parts = [part() for part in (reuse, delta, tiles, fall_back, tokens, gates, profiler)]
    sys.exit(not all(met for part in parts for met in part))
