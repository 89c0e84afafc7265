"""What IERN costs: strata in one pass beside the reference's loop, its step beside the reference's order and plain CE.

Prediction: 512 channels, 7x7 maps, 3 strata. The reference concatenates emotion and prototype and runs the
reconstructor once a stratum; ours runs it once on all strata, and computes the prototypes' half of its first
convolution once for all images. Bars: 1.05 times as fast on a CPU, 1.2 times on a GPU. Counting 3x3 convolutions of an
image, the encoder is 5, the loop's reconstructors 3 x 8 and ours 1 + 3 x 6: arithmetic says 1.21.

Step: ResNet-50, 128x128 images. The reference's third step goes back through the base and throws that away, and its
fourth computes gradients of the reconstructor that are not used. Bar: ours at least 1.25 times as fast. The cost over a
plain cross-entropy step of the same base, encoder and head has no bar; it stands beside the ratio of their arithmetic.

CPU time of one thread (a GPU is used where there is one), interleaved, medians of the rounds' ratios.
"""

import sys
from collections.abc import Callable

import torch
from timing import DEVICE, interleaved, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.flop_counter import FlopCounterMode

from paperworks.robust.iern import IERN, Optimizers, confusion_loss, resnet_base

ROUNDS = 9 if DEVICE == "cuda" else 5
CLASSES, SOURCES, SIDE = 6, 3, 128
BATCH = 32 if DEVICE == "cuda" else 4
torch.set_num_threads(1)
torch.manual_seed(0)


def arithmetic(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Concatenating(nn.Module):
    """The reconstructor as the reference has it: one convolution over the concatenation."""

    def __init__(self, model: IERN) -> None:
        super().__init__()
        R = model.reconstructor
        self.first = nn.Conv2d(2 * R.emotion.in_channels, R.emotion.out_channels, 3, padding=1, device=DEVICE)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([R.emotion.weight, R.context.weight], dim=1))
            self.first.bias.copy_(R.emotion.bias)
        self.blocks = R.blocks

    def forward(self, emotion: Tensor, context: Tensor) -> Tensor:
        return self.blocks(self.first(torch.cat([emotion, context], dim=1)))


def averaged_loop(model: IERN, R: nn.Module, emotion: Tensor) -> Tensor:
    prototypes = model.bank.prototypes()
    return torch.stack([model.head(R(emotion, z.expand_as(emotion))) for z in prototypes]).mean(0)


@torch.no_grad()
def prediction(batch: int) -> bool:
    model = IERN(nn.Identity(), CLASSES, SOURCES).to(DEVICE).eval()
    R = Concatenating(model)
    features = torch.randn(batch, 512, 7, 7, device=DEVICE)
    functions = {
        "loop": lambda: averaged_loop(model, R, model.emotion_encoder(features)),
        "ours": lambda: model.adjust(features),
    }
    torch.testing.assert_close(functions["loop"](), functions["ours"](), atol=1e-3, rtol=1e-3)
    times, bar = interleaved(functions, ROUNDS), 1.2 if DEVICE == "cuda" else 1.05
    gain = ratio(times["loop"], times["ours"])
    flops = {name: arithmetic(function) for name, function in functions.items()}
    print(
        f"adjusting {batch:3} images: ours {1e3 * min(times['ours']):7.1f} ms, the loop takes {gain:.2f} times that "
        f"(at least {bar}; arithmetic {flops['loop'] / flops['ours']:.2f})"
    )
    return gain >= bar


def build() -> IERN:
    return IERN(resnet_base("resnet50"), CLASSES, SOURCES, feature_size=SIDE // 32).to(DEVICE)


def reference_step(model: IERN, R: nn.Module, optimizers: Optimizers, x: Tensor, y: Tensor, d: Tensor) -> None:
    """The reference's order: the graph of the base is kept and walked twice; a loop over concatenations."""
    f = model.base(x)
    e, c = model.emotion_encoder(f), model.context_encoder(f)
    told = F.cross_entropy(model.emotion_discriminator(e.detach()), y)
    optimizers.discriminators.zero_grad()
    ((told + F.cross_entropy(model.source_discriminator(c.detach()), d)) / 2).backward()
    optimizers.discriminators.step()

    for network in (model.emotion_discriminator, model.source_discriminator):
        network.requires_grad_(False)
    confused = (confusion_loss(model.emotion_discriminator(c)) + confusion_loss(model.source_discriminator(e))) / 2
    optimizers.features.zero_grad()
    (confused + model.bank.center_loss(c, d) + F.mse_loss(R(e, c), f)).backward(retain_graph=True)
    optimizers.features.step()
    for network in (model.emotion_discriminator, model.source_discriminator):
        network.requires_grad_(True)

    optimizers.classifier.zero_grad()
    F.cross_entropy(averaged_loop(model, R, model.emotion_encoder(f)), y).backward()
    optimizers.classifier.step()


def training() -> bool:
    x = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE)
    y, d = torch.arange(BATCH, device=DEVICE) % CLASSES, torch.arange(BATCH, device=DEVICE) % SOURCES
    ours, theirs, plain = build(), build(), build()
    own = ours.optimizers()
    R = Concatenating(theirs)
    theirs.reconstructor = R  # its optimizer then holds what the reference's does
    for network in (theirs, R):
        network.requires_grad_(True)
    others = theirs.optimizers()
    classifier = nn.Sequential(plain.base, plain.emotion_encoder, plain.head)
    optimizer = Adam(classifier.parameters(), 1e-4)

    def cross_entropy() -> None:
        optimizer.zero_grad()
        F.cross_entropy(classifier(x), y).backward()
        optimizer.step()

    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.training_step(x, y, d, own),
        "reference": lambda: reference_step(theirs, R, others, x, y, d),
        "plain": cross_entropy,
    }
    times = interleaved(functions, ROUNDS)
    flops = {name: arithmetic(function) for name, function in functions.items()}
    gain, cost = ratio(times["reference"], times["ours"]), ratio(times["ours"], times["plain"])
    print(
        f"step of {BATCH} images: ours {1e3 * min(times['ours']):7.1f} ms, the reference's order takes {gain:.2f} "
        f"times that (at least 1.25; arithmetic {flops['reference'] / flops['ours']:.2f}); "
        f"ours takes {cost:.2f} plain steps (arithmetic {flops['ours'] / flops['plain']:.2f})"
    )
    return gain >= 1.25


if __name__ == "__main__":
    met = [prediction(1), prediction(8), prediction(32), training()]
    sys.exit(0 if all(met) else 1)
