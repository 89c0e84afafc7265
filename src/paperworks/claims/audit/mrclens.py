"""An audit that takes at most a tenth of a small reader's training time finds each planted bias of a
reading-comprehension set: the probe of its cue gains at least 20 points of accuracy, those of the other two cues move
by at most 8, and every set whose bias costs that reader 3 points or more on clean data is flagged.

Sets are generated: passages of five sentences "person verb value", in which another sentence is about the person
asked for and another one holds the relation asked for. A bias is that the answer stands in the first sentence (half or
nine tenths of the time), that no other sentence is about the person, or that none holds the relation (nine tenths or
always).

The least gain and the largest movement over the strengths are judged, against the audit of an unbiased set of the same
seed. The audit runs every cue on the whole training set, with probes fitted on 400 questions. The reader is trained on
the same set and tested on another of its kind and on an unbiased one: the difference is the drop. Nothing is tuned.

Times are CPU-seconds of the same trial (wall time on a GPU). The paper's own figures could not be read: this is a
reconstruction, measured against its promise.

What is known not to hold: a flagged cue is not always exploited. The reader hardly loses anything from a biased person
or from an answer that mostly stands first, and from the relation only where that is always enough. "Flagged" alone says
little here, as person and relation each solve half of the unbiased set too and are flagged there; it is the gain over
it that tells them apart. Cues that are kin move along with the planted one: ``rare_overlap`` with ``overlap``;
``question_only`` and ``uniqueness`` with ``wh_type``.
"""

import time
from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch.nn import functional as F
from torch.optim import Adam
from torchmetrics.classification import MulticlassAccuracy

from paperworks.audit.mrclens import (
    AuditReport,
    MRCDataset,
    SentenceReader,
    SyntheticMRC,
    audit,
    reader_data,
)
from paperworks.bench import Bound, Run, Settings, claim, scaled
from paperworks.data import locate

PLANTED = ("position", "overlap", "wh_type")
EXPLOITED = 0.03  # of a reader's accuracy


class MRCLensSettings(Settings):
    """What the arms share."""

    questions: int = scaled(smoke=200, quick=2000, full=8000, ge=100, description="questions in a training set")
    test: int = scaled(smoke=100, quick=2000, full=4000, ge=50, description="questions in each test set")
    n: int = Field(400, ge=20, description="questions that probes are fitted on")
    position: tuple[float, ...] = scaled(
        smoke=(0.9,), quick=(0.5, 0.9), full=(0.5, 0.7, 0.9, 1.0), min_length=1, description="strengths of that bias"
    )
    overlap: tuple[float, ...] = scaled(
        smoke=(1.0,), quick=(0.9, 1.0), full=(0.7, 0.8, 0.9, 1.0), min_length=1, description="strengths of that bias"
    )
    wh_type: tuple[float, ...] = scaled(
        smoke=(1.0,), quick=(0.9, 1.0), full=(0.7, 0.8, 0.9, 1.0), min_length=1, description="strengths of that bias"
    )
    epochs: int = scaled(smoke=2, quick=47, full=47, ge=1, description="the reader's passes; 47 make 1,500 steps")
    batch_size: int = Field(64, ge=1, description="questions a step")
    lr: float = Field(3e-3, gt=0, description="Adam's learning rate")
    data: str = scaled(
        smoke="", quick="", full="questions/xquad.en.json", description="a set to audit too, in the arm clean"
    )


def clock(run: Run) -> float:
    if run.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def probed(report: AuditReport) -> dict[str, float]:
    """Accuracy of each planted cue's probe."""
    return {cue: report[cue].accuracy or 0.0 for cue in PLANTED}


def drop(
    run: Run, settings: MRCLensSettings, name: str, data: MRCDataset, tests: Sequence[MRCDataset]
) -> tuple[float, float, float]:
    """A reader's accuracy on the test of its kind, what it loses on the clean one, and seconds to train it."""
    begun = clock(run)
    train, vocabulary = reader_data(data)
    torch.manual_seed(run.seed)
    model = SentenceReader(len(vocabulary))
    metrics = {"accuracy": MulticlassAccuracy(5, average="micro")}
    trainer = run.trainer(settings.epochs, name, batch_size=settings.batch_size, metrics=metrics)
    trainer.fit(model, train, loss=F.cross_entropy, optimizer=partial(Adam, lr=settings.lr))
    seconds = clock(run) - begun
    own, clean = (trainer.evaluate(model, reader_data(test, vocabulary).dataset)["eval/accuracy"] for test in tests)
    return own, own - clean, seconds


@claim(
    "mrclens",
    arms=["clean", *PLANTED],
    expects=[
        *(Bound("rise", cue, at_least=0.2) for cue in PLANTED),
        *(Bound("stray", cue, at_most=0.08) for cue in PLANTED),
        *(Bound("missed", cue, at_most=0) for cue in PLANTED),
        Bound("audits_a_training", "clean", at_least=10),
    ],
)
def trial(run: Run, arm: str, settings: MRCLensSettings) -> dict[str, float]:
    strengths: tuple[float, ...] = getattr(settings, arm) if arm in PLANTED else (0.0,)
    run.trainings = len(strengths)
    # Seeds of the three kinds of sets never meet.
    base = 10 * run.seed
    unbiased, clean_test = SyntheticMRC(settings.questions, seed=base), SyntheticMRC(settings.test, seed=base + 1)
    reference = probed(audit(unbiased, n=settings.n, seed=run.seed))
    rises, strays, ratios, missed = [], [], [], 0
    figures: dict[str, float] = {}
    for k, strength in enumerate(strengths):
        knob = {arm: strength} if arm in PLANTED else {}
        data = SyntheticMRC(settings.questions, seed=base + 2, **knob)
        begun = clock(run)
        report = audit(data, n=settings.n, seed=run.seed)
        seconds = clock(run) - begun
        moved = {cue: value - reference[cue] for cue, value in probed(report).items()}
        own_test = SyntheticMRC(settings.test, seed=base + 3, **knob)
        accuracy, loss, training = drop(run, settings, f"reader {k}", data, [own_test, clean_test])
        rises.append(moved.pop(arm, 0.0))
        strays.append(max(map(abs, moved.values())))
        ratios.append(training / seconds)
        missed += loss >= EXPLOITED and arm in PLANTED and not report[arm].biased
        curves = {"rise of the planted cue's probe": rises[-1], "drop of the reader": loss}
        run.log(strength, **curves)
        figures |= {f"accuracy_{strength:g}": accuracy, f"drop_{strength:g}": loss}
        figures |= {f"{cue}_{strength:g}": value for cue, value in probed(report).items()}
        if run.seed == 0 and k == len(strengths) - 1:
            run.figure("cues", report.figures()["cues"])
    figures |= {"rise": min(rises), "stray": max(strays), "missed": float(missed), "audits_a_training": min(ratios)}
    if settings.data and arm == "clean":
        figures |= real(run, settings)
    return figures


def real(run: Run, settings: MRCLensSettings) -> dict[str, float]:
    """Advantage of every cue on a set of the user's."""
    how = "Get xquad.en.json from github.com/google-deepmind/xquad, or name another set with data=."
    report = audit(MRCDataset.load(locate(settings.data, run.data_root, how=how)), n=settings.n, seed=run.seed)
    if run.seed == 0:
        run.figure("real", report.figures()["cues"])
    return {f"real_{found.cue}": found.advantage for found in report.findings if found.advantage is not None}
