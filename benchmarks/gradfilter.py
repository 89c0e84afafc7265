"""What filtering the gradients of convolutions gains, beside PyTorch's exact backward pass (oneDNN on CPUs).

Layers: 3x3 convolutions with stride 1, both gradients. Bars: a backward pass at least 2.5 times (patches of 2) and 4
times (patches of 4) as fast as the exact one, forward and backward together at least 1.5 times. What bounds it: two
matrix products on the patch grid, one reading of the output's gradient, one writing of the input's and one of the
weights'; all are timed in the same rounds, and the last column is how many times that bound our backward pass takes.
The rest goes into pooling, spreading, and the change of layout where maps are not channels-last.

Steps: a whole training step (forward, loss, backward, SGD) of a CIFAR ResNet-18 with all its convolutions filtered, at
least 1.5 times as fast as the exact one. With only its last four convolutions and the classifier learning, the exact
forward pass of the frozen layers bounds the gain: arithmetic says at most 1.4. Layers picked by ``auto`` must not make
a step slower (0.95, for the noise); of a network of 1x1 and depthwise convolutions it picks none at this size.

CPU time of one thread (wall time on a GPU, where there is one), interleaved, medians of the rounds' ratios.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, interleaved, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torchvision.models import mobilenet_v2, resnet18

from paperworks.efficient import apply_gradient_filter, filtered_conv2d, freeze_except

ROUNDS = 9
SHAPES = [(8, 128, 28), (32, 128, 28), (8, 256, 14), (32, 256, 14), (8, 256, 28), (8, 512, 14), (32, 512, 14)]
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
BARS = {2: 2.5, 4: 4.0}
torch.set_num_threads(1)
torch.manual_seed(0)


def together(*parts: list[float]) -> list[float]:
    return [sum(times) for times in zip(*parts, strict=True)]


def layer(images: int, channels: int, side: int, memory_format: torch.memory_format) -> dict[str, list[float]]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format)

    x, weight, g = (
        tensor(images, channels, side, side),
        tensor(channels, channels, 3, 3),
        tensor(images, channels, side, side),
    )
    leaves = (x.requires_grad_(), weight.requires_grad_())
    forwards = {"exact": partial(F.conv2d, *leaves, padding=1)}
    forwards |= {f"{patch}": partial(filtered_conv2d, *leaves, padding=1, patch=patch) for patch in BARS}
    functions: dict[str, Callable[[], object]] = {"maps": g.clone, "weights": partial(torch.zeros_like, weight)}
    for name, forward in forwards.items():
        functions[f"forward {name}"] = forward
        functions[f"backward {name}"] = partial(torch.autograd.grad, forward(), leaves, g, retain_graph=True)
    for patch in BARS:
        rows = torch.randn(images * (-(-side // patch)) ** 2, channels, device=DEVICE)
        square = torch.randn(channels, channels, device=DEVICE)
        functions[f"products {patch}"] = partial(products, rows, square)
    low = (x.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_())
    functions["backward bf16"] = partial(
        torch.autograd.grad, F.conv2d(*low, padding=1), low, g.bfloat16(), retain_graph=True
    )
    return interleaved(functions, ROUNDS)


def products(rows: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    return rows @ square, rows.t() @ rows


def layers() -> bool:
    met = []
    print("exact backward in ms; how many times as fast a patch size is; × is our backward over what bounds it")
    print(f"{'layer':32} {'exact':>8} {'bf16':>6}", *(f"| r={r}: backward    both  ×" for r in BARS))
    for name, memory_format in FORMATS.items():
        for images, channels, side in SHAPES:
            times = layer(images, channels, side, memory_format)
            exact = times["backward exact"]
            cells = [
                f"[{images}, {channels}, {side}, {side}] {name}".ljust(32),
                f"{1e3 * statistics.median(exact):8.1f}",
            ]
            cells.append(f"{ratio(exact, times['backward bf16']):6.1f}")
            for patch, bar in BARS.items():
                ours = times[f"backward {patch}"]
                backward = ratio(exact, ours)
                step = ratio(together(times["forward exact"], exact), together(times[f"forward {patch}"], ours))
                bound = ratio(ours, together(times[f"products {patch}"], times["maps"], times["weights"]))
                met += [backward >= bar, step >= 1.5]
                cells.append(f"|      {backward:9.1f} {step:7.2f} {bound:4.1f}")
            print(*cells, flush=True)
    print(f"bars {BARS} for the backward pass, 1.5 for both: {'met' if all(met) else 'MISSED'}")
    return all(met)


def cifar_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def once() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return once


def steps() -> bool:
    met = True
    images, side = (16, 32) if DEVICE == "cpu" else (256, 32)
    x, y = torch.rand(images, 3, side, side, device=DEVICE), torch.randint(10, (images,), device=DEVICE)

    def prepared(make: Callable[[], nn.Module], memory_format: torch.memory_format, last: int, **options: object):
        model = make().to(DEVICE, memory_format=memory_format).train()
        convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        if last:
            freeze_except(model, [*convs[-last:], "fc"])
        if options:
            apply_gradient_filter(model, f"last:{last}" if last else "all", **options)
        return step(model, x.contiguous(memory_format=memory_format), y)

    auto = {"auto": True, "input_shape": tuple(x.shape)}
    for name, make, last, options, bar in [
        ("ResNet-18, all convolutions, r=2", cifar_resnet18, 0, {"patch": 2}, 1.5),
        ("ResNet-18, all convolutions, r=4", cifar_resnet18, 0, {"patch": 4}, 1.5),
        ("ResNet-18, the last four learn, r=2", cifar_resnet18, 4, {"patch": 2}, None),
        ("ResNet-18, what auto picks, r=2", cifar_resnet18, 0, {"patch": 2, **auto}, 1.5),
        ("MobileNetV2, auto picks nothing, r=2", partial(mobilenet_v2, num_classes=10), 0, {"patch": 2, **auto}, 0.95),
    ]:
        for kind, memory_format in FORMATS.items():
            exact, ours = prepared(make, memory_format, last), prepared(make, memory_format, last, **options)
            times = interleaved({"exact": exact, "ours": ours}, ROUNDS)
            value, base = ratio(times["exact"], times["ours"]), 1e3 * statistics.median(times["exact"])
            verdict = "" if bar is None else f"at least {bar}  {'met' if value >= bar else 'MISSED'}"
            print(
                f"a step of {name:36} {kind:14} {base:8.1f} ms exact, {value:5.2f} times as fast  {verdict}", flush=True
            )
            met &= bar is None or value >= bar
    return met


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not all([layers(), steps()]))
