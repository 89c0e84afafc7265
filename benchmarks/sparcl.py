"""What SparCL saves of training's FLOPs, and of its time.

FLOPs: a ResNet-18 for 32x32 images and the network of the claim, all passes of DER++, beside the dense one; 30 % of the
examples go in the first two fifths of the epochs. Bars: 5, 10 and 15 times fewer at 75 %, 90 % and 95 % sparsity.

Time: masks of single weights save none, and may cost at most 5 % of a dense DER++ step, gradient masks drawn up every
30 steps included. Where dead weights can be left out (whole filters of convolutions, linear layers) the tables say what
a layer gains, forward and backward, and which layers gain nothing. There is no bar: the gain is used where it is one.

Peer: a step of avalanche-lib's ``DER`` strategy (DER++), where that is installed, without evaluation and loggers, at
least 1.5 times as long as ours. Its step is another one: one draw from the memory serves both terms, in one pass over
two batches, where ours makes three passes over a batch each, as the paper's. The time an example takes stands beside.

CPU time of one thread (wall time on a GPU, where there is one), interleaved, medians of the rounds' ratios.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, compare, interleaved, ratio, verdict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torchvision.models import resnet18

from paperworks.data import LabelledData, load
from paperworks.efficient import (
    DynamicDataRemoval,
    DynamicGradientMask,
    Replay,
    ReservoirBuffer,
    SparseExecution,
    SparsityMask,
    TrainingMeter,
    der_pp_loss,
    forward_flops,
    learn_tasks,
    single_head_cross_entropy,
    split_by_class,
    training_flops,
)
from paperworks.nn.backbones import CifarResNet, ConvNet, mlp
from paperworks.train import Trainer

ROUNDS = 7
torch.set_num_threads(1)
torch.manual_seed(0)


def cifar_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def convnet() -> nn.Module:
    return ConvNet(1, 10, (32, 32, 64, 64), (1, 1, 2, 1))


def flops() -> bool:
    epochs, removal, kept = 50, DynamicDataRemoval(10_000), []
    for epoch in range(epochs):
        removal.on_epoch(epoch)
        kept.append(len(removal.active_indices()) / removal.n)
    seen, met = statistics.mean(kept), True
    print(f"data removal leaves {seen:.3f} of the examples over {epochs} epochs")
    for name, make, shape in [("ResNet-18", cifar_resnet18, (3, 32, 32)), ("convnet", convnet, (1, 8, 8))]:
        for sparsity, bar in [(0.75, 5.0), (0.9, 10.0), (0.95, 15.0)]:
            model = make()
            dense, mask = 3 * forward_flops(model, shape)[""], SparsityMask(model, sparsity)
            q = 1 - 0.8 * (1 - sparsity)
            thinned, whole = training_flops(model, shape, mask, q), training_flops(model, shape, mask)
            cost = seen * (29 * thinned + whole) / 30
            share = f"{mask.overall_density():.3f} of all weights live"
            met &= verdict(f"FLOPs: dense / {name} at {sparsity}, {share}", dense / cost, at_least=bar)
    return met


# A DER++ step, with and without masks.


def der_step(model: nn.Module, shape: tuple[int, ...], mask: SparsityMask | None) -> Callable[[], None]:
    """30 steps, so that one gradient mask is drawn up."""
    draw = torch.Generator().manual_seed(0)
    buffer = ReservoirBuffer(200, draw)
    optimizer = SGD(model.parameters(), lr=1e-3)
    x, y = torch.rand(32, *shape, device=DEVICE), torch.randint(2, (32,), device=DEVICE)
    buffer.add(x, y, torch.zeros(32, 10, device=DEVICE))
    gradients = DynamicGradientMask(mask, 0.8) if mask else None

    def steps() -> None:
        for _ in range(30):
            optimizer.zero_grad()
            logits = model(x)
            loss = single_head_cross_entropy(logits, y, (0, 1))
            first, _, remembered = buffer.draw(32)
            second, targets, _ = buffer.draw(32)
            (loss + der_pp_loss(model(first), remembered, model(second), targets)).backward()
            if mask and gradients:
                gradients.apply()
            optimizer.step()
            if mask:
                mask.apply_weights()
            buffer.add(x, y, logits)

    return steps


def masking() -> bool:
    met = True
    for name, make, shape in [
        ("ResNet-20, 32x32", lambda: CifarResNet(20), (3, 32, 32)),
        ("convnet", convnet, (1, 8, 8)),
    ]:
        dense, masked = make().to(DEVICE), make().to(DEVICE)
        steps = der_step(masked, shape, SparsityMask(masked, 0.75))
        value, base = compare(steps, der_step(dense, shape, None), 5 if "20" in name else 21)
        met &= verdict(f"a masked DER++ step of {name} / dense ({base / 30:.1f} ms)", value, at_most=1.05)
    return met


# Dead weights that are left out.


def real_sparsity() -> None:
    for granularity, make, shape, sparsities in [
        ("element", partial(mlp, 784, (1024, 1024, 1024), 10), (32, 1, 28, 28), (0.75, 0.9, 0.95)),
        ("filter", lambda: CifarResNet(8, 64), (16, 3, 32, 32), (0.75, 0.9, 0.95)),
        ("element", lambda: CifarResNet(8, 16), (16, 3, 32, 32), (0.95,)),
    ]:
        for sparsity in sparsities:
            model = make().to(DEVICE)
            execution = SparseExecution(model, SparsityMask(model, sparsity, granularity=granularity), shape)
            table, used = execution.table, execution.used
            print(
                f"\n{type(model).__name__}, {granularity} masks at {sparsity}: {len(used)} of {len(table)} layers gain"
            )
            print(table.drop(columns="density").round(2).to_string())
            if not used:
                continue
            x, y = torch.rand(shape, device=DEVICE), torch.randint(10, shape[:1], device=DEVICE)
            step = partial(training_step, model, SGD(model.parameters(), lr=1e-3), x, y)
            times = interleaved(
                {"dense": partial(step, execution, []), "sparse": partial(step, execution, used)}, ROUNDS
            )
            verdict("a whole training step: dense / sparse", ratio(times["dense"], times["sparse"]))


def training_step(
    model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor, execution: SparseExecution, layers: list[str]
) -> None:
    execution.use(layers)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# The peer.

EPOCHS, BATCH = 5, 16


def ours(make: Callable[[], nn.Module], data: LabelledData) -> float:
    """Seconds a step of the second task."""
    replay = Replay(ReservoirBuffer(200, torch.Generator().manual_seed(0)), batch_size=BATCH)
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    marks: list[tuple[float, int]] = []

    def trainer(task: int, joined: list) -> Trainer:
        marks.append((meter.seconds, meter.steps))
        return Trainer(EPOCHS, interventions=joined, batch_size=BATCH)

    meter = TrainingMeter(tuple(data.inputs.shape[1:]), replay=replay, clock=clock)
    learn_tasks(
        make(),
        split_by_class(data, data, [(0, 1), (2, 3)]),
        trainer=trainer,
        optimizer=partial(SGD, lr=0.03),
        replay=replay,
        interventions=[meter],
    )
    seconds, steps = marks[1]
    return (meter.seconds - seconds) / (meter.steps - steps)


def avalanche(make: Callable[[], nn.Module], data: LabelledData) -> float:
    from avalanche.benchmarks import nc_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised.der import DER

    class Examples(torch.utils.data.TensorDataset):
        targets = data.targets.tolist()

    examples = as_classification_dataset(Examples(data.inputs, data.targets))
    stream = nc_benchmark(
        examples, examples, n_experiences=5, task_labels=False, fixed_class_order=list(range(10))
    ).train_stream
    model = make()
    strategy = DER(
        model=model,
        optimizer=SGD(model.parameters(), lr=0.03),
        mem_size=200,
        batch_size_mem=BATCH,
        train_mb_size=BATCH,
        train_epochs=EPOCHS,
        device=DEVICE,
        evaluator=EvaluationPlugin(loggers=[]),
    )
    strategy.train(stream[0])
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    begun, before = clock(), strategy.clock.train_iterations
    strategy.train(stream[1])
    return (clock() - begun) / (strategy.clock.train_iterations - before)


def peer() -> bool:
    data, met = load("digits", limit=1200), True
    networks = {"MLP": partial(mlp, 64, (256, 256), 10), "convnet": convnet}
    try:
        import avalanche as _  # noqa: F401
    except ImportError as error:
        print(f"avalanche-lib is not installed ({error}): no peer but our own dense DER++")
        for name, make in networks.items():
            print(f"our DER++ step of the {name}: {1e3 * ours(make, data):.2f} ms")
        return True
    for name, make in networks.items():
        avalanche(make, data), ours(make, data)
        rounds = [(avalanche(make, data), ours(make, data)) for _ in range(5)]
        value = statistics.median(theirs / mine for theirs, mine in rounds)
        base = 1e3 * statistics.median(mine for _, mine in rounds)
        met &= verdict(f"a DER++ step of the {name}: avalanche-lib / ours ({base:.1f} ms)", value, at_least=1.5)
        verdict("    the same, by example", value * 3 / 2)
    return met


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    results = [flops(), masking(), peer()]
    real_sparsity()
    sys.exit(not all(results))
