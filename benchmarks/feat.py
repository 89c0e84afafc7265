"""What attacking many rows in lock-step gains over one after the other, and FEAT's queries beside greedy search's.

The victim is an LSTM with attention over 60 bases, trained on UCI's splice junctions where they are on this machine,
else on generated ones. Bars: 64 rows at a time at least 8 times as fast as one at a time, with the same results; greedy
search among all features, in chunks of 512 rows, at least 20 times as fast as asking about one row after the other;
and at least 2.5 times as many queries of greedy search as of FEAT. What bounds it: the victim's forward passes on full
chunks and its gradients on full batches, of which lock-step may take 1.5 times as long. On a CPU this misses the first
two bars: a row in a full chunk costs a tenth of a pass of one, by arithmetic, and FEAT alone asks about a dozen rows at
once already and keeps its gradients.

CPU time of one thread (wall time on a GPU, where there is one), medians of interleaved rounds' ratios.
"""

import sys
from functools import partial

import numpy as np
import torch
from timing import DEVICE, interleaved, ratio, verdict
from torch.nn import functional as F

from paperworks.audit import AttackResult, CategoricalProblem, attack_batch, load_splice
from paperworks.audit.feat import SequenceLSTM
from paperworks.claims.audit.feat import junctions
from paperworks.data import DatasetNotFound

ROUNDS, ATTACKED, SINGLY, CHUNK = 3, 64, 2, 512
torch.set_num_threads(1)
torch.manual_seed(0)


def victim() -> tuple[SequenceLSTM, torch.Tensor, torch.Tensor, torch.Tensor]:
    try:
        table, name = load_splice(), "splice junctions"
    except DatasetNotFound:
        table, name = junctions(3000, torch.Generator().manual_seed(0)), "generated junctions"
    order = torch.randperm(len(table.rows))
    train, test = order[:2500], order[2500:]
    model = SequenceLSTM(max(table.n_values), 3).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(25):
        for part in train[torch.randperm(len(train))].split(128):
            optimizer.zero_grad()
            inputs = F.one_hot(table.rows[part], max(table.n_values)).float().to(DEVICE)
            F.cross_entropy(model(inputs), table.targets[part].to(DEVICE)).backward()
            optimizer.step()
    model.eval()
    test = test[table.within(table.allowed())[test]]
    with torch.no_grad():
        predicted = model(F.one_hot(table.rows[test], max(table.n_values)).float().to(DEVICE)).argmax(1).cpu()
    right = test[predicted == table.targets[test]]
    print(f"{name}: the victim is right about {len(right) / len(test):.0%}")
    return model, table.rows[right[:ATTACKED]], table.targets[right[:ATTACKED]], table.allowed()


def same(one: list[AttackResult], other: list[AttackResult]) -> float:
    return float(np.mean([torch.equal(a.x_adv, b.x_adv) for a, b in zip(one, other, strict=True)]))


def main() -> bool:
    model, x, y, allowed = victim()
    problem = CategoricalProblem(model, allowed.shape[1], allowed)
    singly = CategoricalProblem(model, allowed.shape[1], allowed, chunk=1)
    met = []
    for method in ("feat", "ompgs", "ucb"):
        together = partial(attack_batch, method, problem, x, y, 2)
        alone = partial(attack_batch, method, problem, x, y, 2, lockstep=1)
        times = interleaved({"together": together, "alone": alone}, ROUNDS)
        name = f"{method}: 64 rows at a time over one at a time"
        met.append(verdict(name, ratio(times["alone"], times["together"]), at_least=8 if method == "feat" else None))
        met.append(verdict(f"{method}: rows with the same result", same(together(), alone()), at_least=0.98))

    few = (x[:SINGLY], y[:SINGLY], 2)
    chunked = partial(attack_batch, "fsgs", problem, x, y, 2)
    one_row = partial(attack_batch, "fsgs", singly, *few, lockstep=1)
    times = interleaved({"chunked": chunked, "one row": one_row}, ROUNDS)
    a_row = ratio(times["one row"], times["chunked"]) * ATTACKED / SINGLY
    met.append(verdict("fsgs: in chunks over one row a forward pass", a_row, at_least=20))

    found = {method: attack_batch(method, problem, x, y, 2) for method in ("feat", "fsgs")}
    queries = {method: np.array([result.queries for result in results]) for method, results in found.items()}
    won = {method: np.array([result.success for result in results]) for method, results in found.items()}
    met.append(verdict("queries of fsgs over feat", queries["fsgs"].mean() / queries["feat"].mean(), at_least=2.5))
    both = won["fsgs"] & won["feat"]
    verdict("the same, where both succeed", queries["fsgs"][both].mean() / queries["feat"][both].mean())
    print(f"success: feat {won['feat'].mean():.2f}, fsgs {won['fsgs'].mean():.2f}")

    rows, labels = x.repeat_interleave(16, 0)[:CHUNK], y.repeat_interleave(16)[:CHUNK]
    forwards = sum(result.queries - result.gradients for result in found["feat"])
    gradients = sum(result.gradients for result in found["feat"])

    def bound() -> None:
        for start in range(0, forwards, CHUNK):
            problem.margin(rows[: min(CHUNK, forwards - start)], labels[: min(CHUNK, forwards - start)])
        for start in range(0, gradients, ATTACKED):
            problem.gradient(x[: min(ATTACKED, gradients - start)], y[: min(ATTACKED, gradients - start)])

    times = interleaved({"ours": partial(attack_batch, "feat", problem, x, y, 2), "bound": bound}, ROUNDS)
    met.append(verdict("feat over its bound: the same queries in full chunks", ratio(*times.values()), at_most=1.5))
    return all(met)


if __name__ == "__main__":
    print(f"{DEVICE}, PyTorch {torch.__version__}")
    sys.exit(not main())
