import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset

from paperworks.data.noise import noisify
from paperworks.errors import UserError
from paperworks.robust.sent import (
    PADDING,
    SENT,
    DynamicsRecorder,
    NoisyLabelDetector,
    OneClassError,
    RecordDynamics,
    centroid_cosine,
    confident,
    confident_learning,
    estimate_transition,
    fit_with_trainer,
    label_statistics,
    predict_logits,
    small_loss,
    transcripts_match,
    transfer_noise,
    transfer_pseudo_label_noise,
)
from paperworks.train import Trainer

K = 10


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def digits():
    """Noisy inputs, their true labels, clean inputs and labels, test inputs and labels."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(y), generator=generator())
    noisy, clean, test = order[:1000], order[1000:1200], order[1200:]
    return x[noisy], y[noisy], x[clean], y[clean], x[test], y[test]


def network(width=64):
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, K))


FIT = partial(
    fit_with_trainer,
    optimizer=partial(Adam, lr=3e-3),
    trainer=partial(Trainer, batch_size=64, accelerator="cpu"),
)


def sent(**options):
    return SENT(network, K, **{"fit": FIT, "epochs": 5} | options)


# Noise transfer


def test_the_transition_of_one_hot_probabilities_is_the_confusion_matrix():
    true = torch.randint(4, (500,), generator=generator(1))
    drawn = noisify(true, "symmetric", 0.4, 4, generator(2))
    found = estimate_transition(nn.functional.one_hot(drawn.noisy, 4).float(), true)
    assert torch.allclose(found, drawn.transition, atol=1e-6)


@given(st.integers(2, 8), st.integers(1, 60), st.floats(0, 10), st.integers(0, 1000))
def test_transitions_are_row_stochastic(classes, m, smoothing, seed):
    probs = torch.rand(m, classes, generator=generator(seed)).softmax(1)
    labels = torch.randint(classes, (m,), generator=generator(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = estimate_transition(probs, labels, smoothing)
    assert (found >= 0).all()
    assert torch.allclose(found.sum(1), torch.ones(classes), atol=1e-5)


def test_a_class_without_clean_examples_gets_the_identity_and_a_warning():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    with pytest.warns(UserWarning, match=r"no example of class \[2\]"):
        found = estimate_transition(probs, torch.tensor([0, 1]), smoothing=1.0)
    assert found[2].tolist() == [0, 0, 1]
    assert torch.allclose(found[0], (probs[0] + 1 / 3) / 2)


def test_no_noise_changes_no_label():
    labels = torch.arange(20) % 4
    noisy, is_clean = transfer_noise(labels, transition=torch.eye(4), generator=generator())
    assert torch.equal(noisy, labels)
    assert is_clean.all()


def test_a_permutation_leaves_only_its_fixed_points_clean():
    labels = torch.arange(40) % 4
    swap = torch.eye(4)[[1, 0, 2, 3]]
    noisy, is_clean = transfer_noise(labels, transition=swap, generator=generator())
    assert torch.equal(is_clean, labels >= 2)
    assert torch.equal(noisy[labels == 0], torch.ones(10, dtype=torch.int64))


def test_noise_by_input_follows_each_example_s_distribution():
    labels = torch.tensor([0, 1, 2])
    certain = torch.eye(3)[[0, 2, 2]]
    noisy, is_clean = transfer_noise(labels, probs=certain, generator=generator())
    assert noisy.tolist() == [0, 2, 2]
    assert is_clean.tolist() == [True, False, True]
    many = torch.tensor([[0.2, 0.3, 0.5]]).expand(20000, 3)
    drawn = transfer_noise(torch.zeros(20000, dtype=torch.int64), probs=many, generator=generator()).noisy
    assert torch.allclose(drawn.bincount() / 20000, many[0], atol=0.015)


def test_pseudo_labels_come_from_teachers_that_did_not_see_the_example():
    inputs, labels = torch.arange(30.0)[:, None], torch.arange(30) % 3
    seen = []

    def fit_predict(x, y, held_out):
        assert torch.equal(y, x[:, 0].long() % 3)
        assert not set(x[:, 0].tolist()) & set(held_out[:, 0].tolist())
        assert len(y.unique()) == 3
        seen.extend(held_out[:, 0].tolist())
        return torch.where(held_out[:, 0] < 15, held_out[:, 0].long() % 3, 0)

    noisy, is_clean = transfer_pseudo_label_noise(fit_predict, inputs, labels, folds=4, generator=generator())
    assert sorted(seen) == list(range(30))
    assert torch.equal(noisy[:15], labels[:15])
    assert torch.equal(is_clean[15:], labels[15:] == 0)


def test_transcripts_are_clean_up_to_a_word_error_rate():
    clean = ["turn the light on", "good morning", "yes"]
    noisy = ["turn the lights on", "good morning", "no"]
    assert transcripts_match(noisy, clean).tolist() == [False, True, False]
    assert transcripts_match(noisy, clean, max_word_error=0.25).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, y: estimate_transition(p, y + 3), "labels"),
        (lambda p, y: estimate_transition(2 * p, y), r"probs\[0\] must be non-negative and sum to 1, its sum is 2"),
        (lambda p, y: estimate_transition(p * math.nan, y), r"probs\[0\]"),
        (lambda p, y: estimate_transition(p, y, smoothing=-1.0), "smoothing must not be negative, got -1"),
        (lambda p, y: transfer_noise(y, generator=generator()), "got none"),
        (lambda p, y: transfer_noise(y, transition=p[:3], probs=p, generator=generator()), "got both"),
        (lambda p, y: transfer_noise(y, transition=2 * torch.eye(3), generator=generator()), r"transition\[0\]"),
        (lambda p, y: transfer_noise(y + 3, probs=p, generator=generator()), "labels"),
        (
            lambda p, y: transfer_pseudo_label_noise(lambda *_: y, p, y, folds=9, generator=generator()),
            "folds must be from 2 to the 4 clean examples, got 9",
        ),
        (
            lambda p, y: transfer_pseudo_label_noise(lambda *_: p, p, y % 2, folds=2, generator=generator()),
            "fit_predict must return 2 class indices",
        ),
        (lambda p, y: transcripts_match(["a"], []), "got 1 and 0"),
        (lambda p, y: transcripts_match(["a"], [" "]), r"clean\[0\] is an empty transcript"),
    ],
)
def test_bad_noise(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.full((4, 3), 1 / 3), torch.tensor([0, 1, 2, 0]))


# Features


def test_statistics_by_hand():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(2, 3)
    found = label_statistics(logits, torch.tensor([0, 2]))
    expected = [[0.35667, 0.7, 0.2, 0.5, 0.80182], [2.30259, 0.1, 0.7, -0.6, 0.80182]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


@given(st.integers(2, 6), st.integers(0, 1000), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_statistics_do_not_depend_on_the_order_or_names_of_classes(classes, seed, dtype):
    logits = (5 * torch.randn(7, classes, generator=generator(seed))).to(dtype)
    labels = torch.randint(classes, (7,), generator=generator(seed))
    names = torch.randperm(classes, generator=generator(seed + 1))
    renamed = torch.empty_like(logits)
    renamed[:, names] = logits
    assert torch.allclose(label_statistics(logits, labels), label_statistics(renamed, names[labels]), atol=1e-4)


def test_statistics_of_certain_predictions_are_finite():
    found = label_statistics(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]))
    assert found.isfinite().all()
    assert found[0].tolist() == [20000, 0, 1, -1, 0]


def record(logits, labels, order=None):
    """A recorder filled from ``[epochs, n, classes]`` in two parts."""
    recorder = DynamicsRecorder(labels, logits.shape[-1], len(logits))
    order = torch.arange(len(labels)) if order is None else order
    for epoch in logits:
        for part in order.split(max(1, len(order) // 2)):
            recorder.update(part, epoch[part])
        recorder.end_epoch()
    return recorder


def test_features_are_epochs_in_order_then_the_label():
    logits, labels = torch.randn(3, 6, 4, generator=generator()), torch.arange(6) % 4
    recorder = record(logits, labels)
    features = recorder.features()
    assert features.shape == (6, 3 * 5 + 4)
    for epoch in range(3):
        assert torch.allclose(features[:, 5 * epoch : 5 * epoch + 5], label_statistics(logits[epoch], labels))
    assert torch.equal(features[:, 15:], nn.functional.one_hot(labels, 4).float())
    assert torch.equal(recorder.statistic("loss"), recorder.statistics[:, :, 0])


def test_summaries_count_agreement_and_measure_spread():
    logits, labels = torch.randn(4, 6, 3, generator=generator()), torch.arange(6) % 3
    features = record(logits, labels).features(summary=True)
    agree = (logits.argmax(-1) == labels).float().mean(0)
    spread = logits.softmax(-1).gather(-1, labels.expand(4, 6)[..., None])[..., 0].std(0, correction=0)
    assert torch.allclose(features[:, 20:22], torch.stack([agree, spread], 1), atol=1e-6)


@given(st.permutations(range(8)), st.integers(0, 100))
def test_permuting_examples_permutes_features(order, seed):
    logits, labels = torch.randn(2, 8, 3, generator=generator(seed)), torch.arange(8) % 3
    order = torch.tensor(order)
    whole = record(logits, labels).features(summary=True)
    assert torch.equal(record(logits[:, order], labels[order]).features(summary=True), whole[order])
    assert torch.equal(record(logits, labels, order).features(summary=True), whole)


def test_sequences_are_averaged_over_their_tokens():
    logits = torch.randn(2, 3, 5, 4, generator=generator())
    labels = torch.randint(4, (3, 5), generator=generator())
    labels[0, 2:] = PADDING
    logits[:, 0, 2:] = math.inf  # what a padded position says does not matter
    features = record(logits, labels).features()
    assert features.shape == (3, 10)
    one = label_statistics(logits[1, 0, :2], labels[0, :2]).mean(0)
    assert torch.allclose(features[0, 5:], one)
    assert torch.allclose(features[2, :5], label_statistics(logits[0, 2], labels[2]).mean(0))


def test_memory_does_not_grow_with_the_classes():
    recorder = DynamicsRecorder(torch.zeros(50, dtype=torch.int64), 5000, 4)
    recorder.update(slice(None), torch.zeros(50, 5000))
    assert sum(v.numel() for v in recorder.state_dict().values() if isinstance(v, torch.Tensor)) == 4 * 50 * 5


def test_recorder_refuses_what_would_mislead():
    recorder = DynamicsRecorder(torch.tensor([0, 1, 1]), 2, 1)
    with pytest.raises(UserError, match=r"logits must be \[2, 2\], got \[2, 3\]"):
        recorder.update(torch.tensor([0, 1]), torch.zeros(2, 3))
    broken = torch.tensor([[0.0, 1], [math.nan, 0], [0, -math.inf]])
    with pytest.raises(UserError, match=r"logits of 2 example\(s\) are not finite at epoch 0"):
        recorder.update(torch.arange(3), broken)
    recorder.update(torch.tensor([0, 2]), torch.zeros(2, 2))
    with pytest.raises(UserError, match="1 of 3 examples were not recorded at epoch 0"):
        recorder.end_epoch()
    with pytest.raises(UserError, match="only 0 of 1 epochs are recorded"):
        recorder.features()
    recorder.update(torch.tensor([1]), torch.zeros(1, 2))
    recorder.end_epoch()
    with pytest.raises(UserError, match="all 1 epochs are recorded already"):
        recorder.update(torch.tensor([1]), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("labels", "classes", "epochs", "message"),
    [
        ([0, 2], 2, 1, "labels"),
        ([0, 1], 1, 1, "num_classes must be at least 2"),
        ([0, 1], 2, 0, "epochs must be at least 1"),
        ([[0, 1], [PADDING, PADDING]], 2, 1, r"labels\[1\] is padding only"),
        ([[[0]]], 2, 1, r"labels must be \[n\] or \[n, tokens\]"),
    ],
)
def test_bad_recorders(labels, classes, epochs, message):
    with pytest.raises(UserError, match=message):
        DynamicsRecorder(torch.tensor(labels), classes, epochs)


def test_cosines_to_centroids_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0], [1.0, 1.0]])
    found = centroid_cosine(x, torch.tensor([0, 1, 1, 0]), 3)
    own = torch.tensor([1 + 0.5**0.5, 0.5**0.5])
    own = own / own.norm()
    expected = [[own[0], 0], [1, own[1]], [1, own[1]], [(own * 0.5**0.5).sum(), 0.5**0.5]]
    assert torch.allclose(found, torch.tensor(expected))


def test_recording_in_a_trainer_sees_what_evaluation_sees_and_changes_nothing():
    x, y, *_ = digits()
    data, models = TensorDataset(x[:200], y[:200]), []
    for interventions in ([], [RecordDynamics(x[:50], DynamicsRecorder(y[:50], K, 3))]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, K))
        trainer = Trainer(epochs=3, interventions=interventions, accelerator="cpu")
        trainer.fit(model, data, loss=nn.functional.cross_entropy, optimizer=partial(SGD, lr=0.1))
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    recorder = interventions[0].recorder
    last = label_statistics(models[1].eval()(x[:50]), y[:50])
    assert torch.allclose(recorder.statistics[-1], last, atol=1e-6)
    assert recorder.statistic("loss").mean(1).diff().max() < 0


def test_a_killed_run_resumes_its_recording(tmp_path):
    x, y, *_ = digits()
    data = TensorDataset(x[:200], y[:200])

    class KilledError(Exception):
        pass

    class Kill(RecordDynamics):
        def on_epoch_end(self, state):
            if state.epoch == 2:
                raise KilledError
            super().on_epoch_end(state)

        __name__ = "RecordDynamics"

    def run(kind, folder):
        torch.manual_seed(0)
        model, spy = network(), kind(x[:50], DynamicsRecorder(y[:50], K, 4))
        kind.__name__ = "RecordDynamics"
        trainer = Trainer(epochs=4, interventions=[spy], accelerator="cpu", checkpoint_dir=folder)
        trainer.fit(model, data, loss=nn.functional.cross_entropy, optimizer=partial(SGD, lr=0.1))
        return spy.recorder.statistics

    whole = run(RecordDynamics, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(Kill, tmp_path / "killed")
    assert torch.equal(run(RecordDynamics, tmp_path / "killed"), whole)


def test_a_recorder_of_another_length_is_refused():
    x, y, *_ = digits()
    with pytest.raises(UserError, match="inputs must be the recorder's 5 examples, got 6"):
        RecordDynamics(x[:6], DynamicsRecorder(y[:5], K, 2))
    spy = RecordDynamics(x[:5], DynamicsRecorder(y[:5], K, 2))
    with pytest.raises(UserError, match="the recorder expects 2 epochs, the run has 3"):
        Trainer(epochs=3, interventions=[spy], accelerator="cpu").fit(
            network(), TensorDataset(x, y), loss=nn.functional.cross_entropy, optimizer=partial(SGD, lr=0.1)
        )


# Training


def test_weights_count_as_copies_do():
    x, y, *_ = digits()
    x, y = x[:60], y[:60]
    plain = partial(fit_with_trainer, optimizer=partial(SGD, lr=0.5), trainer=partial(Trainer, accelerator="cpu"))
    models = []
    for inputs, labels, weights in [
        (x[:40], y[:40], None),
        (x, y, torch.cat([torch.full((40,), 1.5), torch.zeros(20)])),
    ]:
        torch.manual_seed(0)
        models.append(network())
        plain(models[-1], inputs, labels, epochs=5, seed=0, weights=weights)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_other_interventions_and_callbacks_take_part():
    x, y, *_ = digits()
    spy, calls = RecordDynamics(x[:9], DynamicsRecorder(y[:9], K, 2)), []
    FIT(network(), x, y, epochs=2, seed=0, interventions=[spy], after_epoch=lambda model: calls.append(model))
    assert spy.recorder.epoch == 2
    assert len(calls) == 2


def test_logits_are_predicted_in_evaluation_mode_and_in_parts():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), torch.randn(11, 4, generator=generator())
    model[0].eval()  # frozen
    found = predict_logits(model, x, batch_size=4)
    assert torch.allclose(found, model[0](x), atol=1e-6)
    assert [part.training for part in model] == [False, True]
    assert not found.requires_grad


# Detector


def examples(m=300, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.random(m) < 0.6
    return rng.normal(size=(m, 6)) + np.outer(y, [2, 1, 0, 0, 0, 0]), y


@parametrize_with_checks([NoisyLabelDetector(), NoisyLabelDetector(calibrate=True)])
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [None, MLPClassifier((32,), max_iter=60, random_state=0)])
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_detector_tells_clean_from_wrong(estimator):
    detector = NoisyLabelDetector(estimator).fit(*examples())
    x, y = examples(seed=1)
    assert roc_auc_score(y, detector.predict_proba(x)[:, 1]) > 0.9
    assert (detector.predict(x) == y).mean() > 0.8


def test_shuffled_labels_teach_nothing():
    x, y = examples(4000)
    shuffled = np.random.default_rng(1).permutation(y)
    detector = NoisyLabelDetector().fit(x[:1000], shuffled[:1000])
    assert abs(roc_auc_score(shuffled[1000:], detector.predict_proba(x[1000:])[:, 1]) - 0.5) < 0.05


def test_the_scale_of_features_is_learned_from_the_training_set_only():
    x, y = examples()
    detector = NoisyLabelDetector().fit(x, y)
    assert np.allclose(detector.pipeline_[0].mean_, x.mean(0))
    assert np.allclose(
        detector.predict_proba(x), NoisyLabelDetector().fit(100 * x + 7, y).predict_proba(100 * x + 7), atol=1e-4
    )
    one, all_of_them = detector.predict_proba(x[:1]), detector.predict_proba(x)
    assert np.allclose(one, all_of_them[:1])


def test_renamed_classes_leave_probabilities_unchanged():
    logits, labels = torch.randn(3, 200, 4, generator=generator()), torch.randint(4, (200,), generator=generator())
    is_clean = (torch.rand(200, generator=generator()) < logits.mean(0).softmax(1)[range(200), labels] + 0.3).numpy()
    names = torch.tensor([2, 0, 3, 1])
    renamed = torch.empty_like(logits)
    renamed[..., names] = logits
    found = []
    for z, y in [(logits, labels), (renamed, names[labels])]:
        features = record(z, y).features().numpy()
        found.append(NoisyLabelDetector().fit(features, is_clean).predict_proba(features))
    assert np.allclose(found[0], found[1], atol=1e-3)


def test_the_threshold_is_chosen_by_cross_validation():
    x, y = examples(600)
    skewed = x, y & (np.arange(600) % 7 == 0)  # clean labels are rare
    plain = MLPClassifier((4,), max_iter=200, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fixed = NoisyLabelDetector(plain).fit(*skewed)
        chosen = NoisyLabelDetector(plain, threshold="cv").fit(*skewed)
    assert fixed.threshold_ == 0.5
    assert 0 <= chosen.threshold_ < 0.4
    assert chosen.predict(x).mean() > fixed.predict(x).mean()


def test_calibrated_probabilities_have_the_mean_of_the_labels():
    x, y = examples(600)
    rare = y & (np.arange(600) % 7 == 0)
    skewed = NoisyLabelDetector().fit(x, rare).predict_proba(x)[:, 1].mean()
    calibrated = NoisyLabelDetector(calibrate=True).fit(x, rare).predict_proba(x)[:, 1].mean()
    assert abs(calibrated - rare.mean()) < 0.02 < abs(skewed - rare.mean())


def test_bad_detectors():
    x, y = examples()
    with pytest.raises(OneClassError, match=r"got only 1 class \(True\)"):
        NoisyLabelDetector().fit(x, np.ones_like(y))
    for threshold in (1.0, -0.1, "best", None):
        with pytest.raises(UserError, match="threshold must be from 0 to below 1, or 'cv'"):
            NoisyLabelDetector(threshold=threshold).fit(x, y)
    lonely = np.arange(len(y)) == 3
    for options in ({"calibrate": True}, {"threshold": "cv"}):
        with pytest.raises(UserError, match="cross-validation needs at least 2 labels of each kind"):
            NoisyLabelDetector(**options).fit(x, lonely)
    few = np.arange(len(y)) < 3
    assert NoisyLabelDetector(calibrate=True, threshold="cv").fit(x, few).predict(x).shape == y.shape


# Neighbours


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0.01, 1))
def test_small_loss_keeps_the_share_of_the_smallest(losses, keep):
    losses = torch.tensor(losses)
    kept = small_loss(losses, keep)
    assert kept.sum() == round(keep * len(losses))
    if kept.any() and not kept.all():
        assert losses[kept].max() <= losses[~kept].min()


def test_confidence_by_hand():
    probs = torch.tensor([[0.95, 0.05], [0.6, 0.4], [0.1, 0.9]])
    assert confident(probs).tolist() == [True, False, True]


def test_confident_learning_by_hand():
    # Thresholds: class 0: mean(.9, .6, .3) = .6; class 1: mean(.8, .2) = .5; class 2 has no labels.
    probs = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.3, 0.7, 0], [0.2, 0.8, 0], [0.4, 0.2, 0.4]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert confident_learning(probs, labels).tolist() == [True, True, False, True, True]


def test_bad_selections():
    for keep in (0.0, 1.5):
        with pytest.raises(UserError, match="keep must be above 0 and at most 1"):
            small_loss(torch.ones(3), keep)
    with pytest.raises(UserError, match="threshold must be from 0 to 1, got 2"):
        confident(torch.ones(2, 2), 2.0)
    with pytest.raises(UserError, match="labels"):
        confident_learning(torch.ones(2, 2), torch.tensor([0, 2]))


# The whole method


@pytest.fixture(scope="module")
def flipped():
    x, y, clean, clean_labels, test, test_labels = digits()
    return x, noisify(y, "pair", 0.4, K, generator()).noisy, clean, clean_labels, y, test, test_labels


@pytest.fixture(scope="module")
def fitted(flipped):
    return sent(epochs=15).fit(*flipped[:4])


def accuracy(model, x, y):
    return (predict_logits(model, x).argmax(1) == y).float().mean().item()


def test_it_finds_wrong_labels_and_learns_better_without_them(fitted, flipped):
    x, noisy, clean, clean_labels, true, test, test_labels = flipped
    right = noisy == true
    losses = fitted.recorder_.statistic("loss")[:, :1000]
    assert roc_auc_score(right, fitted.clean_probability_) > roc_auc_score(right, -losses.mean(0)) + 0.05
    assert right[fitted.selected_].float().mean() > 0.8
    assert abs(float(fitted.transition_.diag().mean()) - 0.6) < 0.15
    torch.manual_seed(0)
    everything = network()
    FIT(everything, torch.cat([x, clean]), torch.cat([noisy, clean_labels]), epochs=15, seed=0)
    assert accuracy(fitted.model_, test, test_labels) > accuracy(everything, test, test_labels) + 0.05
    assert torch.equal(fitted.predict(test), predict_logits(fitted.model_, test).argmax(1))


def test_every_example_has_a_probability_and_the_selection_is_its_threshold(fitted, flipped):
    assert fitted.clean_probability_.shape == flipped[1].shape
    assert torch.equal(fitted.selected_, fitted.clean_probability_ > fitted.detector_.threshold_)
    assert len(fitted.recorder_.labels) == 1200
    assert torch.equal(fitted.recorder_.labels[1000:], fitted.transferred_.noisy)
    assert torch.equal(fitted.transferred_.is_clean, fitted.transferred_.noisy == flipped[3])


def test_labels_given_are_not_changed(flipped):
    before = [part.clone() for part in flipped[:4]]
    sent(epochs=1).fit(*flipped[:4])
    assert all(torch.equal(a, b) for a, b in zip(before, flipped[:4], strict=True))


def test_the_same_seed_gives_the_same_everything_whatever_the_global_state(flipped):
    found = []
    for global_seed, seed in [(1, 0), (2, 0), (1, 3)]:
        torch.manual_seed(global_seed)
        found.append(sent(epochs=2, seed=seed).fit(*flipped[:4]))
    assert torch.equal(found[0].clean_probability_, found[1].clean_probability_)
    assert torch.equal(found[0].selected_, found[1].selected_)
    for a, b in zip(found[0].model_.parameters(), found[1].model_.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found[0].clean_probability_, found[2].clean_probability_)


def test_detection_alone_judges_as_the_whole_does(flipped):
    alone, whole = sent(epochs=2).detect(*flipped[:4]), sent(epochs=2).fit(*flipped[:4])
    assert torch.equal(alone.clean_probability_, whole.clean_probability_)
    assert not hasattr(alone, "model_")


def test_without_noise_nearly_everything_is_kept():
    x, y, clean, clean_labels, test, test_labels = digits()
    found = sent(epochs=15).fit(x, y, clean, clean_labels)
    assert found.selected_.float().mean() >= 0.9
    torch.manual_seed(0)
    everything = network()
    FIT(everything, torch.cat([x, clean]), torch.cat([y, clean_labels]), epochs=15, seed=0)
    assert accuracy(found.model_, test, test_labels) > accuracy(everything, test, test_labels) - 0.01


def test_a_known_transition_is_used_as_it_is(flipped):
    known = 0.6 * torch.eye(K) + 0.4 * torch.eye(K).roll(1, 1)
    found = sent(epochs=2, transition=known).detect(*flipped[:4])
    assert torch.equal(found.transition_, known)
    shift = (found.transferred_.noisy - flipped[3]) % K
    assert set(shift.tolist()) == {0, 1}


def test_noise_that_changes_nothing_is_refused_or_keeps_everything(flipped):
    with pytest.raises(OneClassError, match=r"changed none of the 200 clean labels.*keep_all_if_clean=True"):
        sent(transition=torch.eye(K)).fit(*flipped[:4])
    found = sent(epochs=1, transition=torch.eye(K), keep_all_if_clean=True).fit(*flipped[:4])
    assert found.selected_.all()
    assert (found.clean_probability_ == 1).all()
    assert found.detector_ is None
    with pytest.raises(OneClassError, match="changed all of the 200 clean labels"):
        sent(transition=torch.eye(K).roll(1, 1), keep_all_if_clean=True).fit(*flipped[:4])


def test_self_training_with_own_and_with_given_pseudo_labels():
    x, y, clean, clean_labels, *_ = digits()
    found = sent(noise="pseudo-labels", teacher_epochs=8).fit(x, None, clean, clean_labels)
    assert found.transition_ is None
    assert 0.3 < (found.noisy_labels_ == y).float().mean() < 1
    right = found.noisy_labels_ == y
    assert roc_auc_score(right, found.clean_probability_) > 0.7
    given = y.clone()
    given[:200] = (given[:200] + 1) % K
    assert sent(noise="pseudo-labels", epochs=2).fit(x, given, clean, clean_labels).noisy_labels_ is given


@pytest.mark.parametrize(
    "options",
    [{"instance": True}, {"soft": True}, {"summary": True}, {"smoothing": 2.0}, {"warmup_epochs": 3}],
    ids=lambda options: next(iter(options)),
)
def test_options_find_wrong_labels_too(flipped, options):
    found = sent(epochs=10, **options).fit(*flipped[:4])
    assert roc_auc_score(flipped[1] == flipped[4], found.clean_probability_) > 0.8
    assert (found.transition_ is None) == options.get("instance", False)


def test_embeddings_add_their_cosines(flipped):
    found = sent(epochs=3, embed=lambda model, x: model[:2](x).detach()).detect(*flipped[:4])
    assert found.detector_.n_features_in_ == 3 * 5 + K + 2


def test_rounds_estimate_and_label_anew(flipped):
    seen = []
    found = sent(epochs=20, rounds=2).fit(
        *flipped[:4], after_round=lambda s: seen.append((s.transition_, s.model_, s.selected_))
    )
    assert len(seen) == 2
    assert torch.allclose(seen[1][0].sum(1), torch.ones(K))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert found.model_ is seen[1][1]
    labels = []
    x, clean, clean_labels = flipped[0], flipped[2], flipped[3]
    sent(epochs=4, rounds=2, noise="pseudo-labels").fit(
        x, None, clean, clean_labels, after_round=lambda s: labels.append(s.noisy_labels_)
    )
    assert not torch.equal(*labels)


def test_any_loop_will_do(flipped):
    def fit(model, inputs, labels, *, epochs, seed, weights=None, after_epoch=None):
        optimizer = SGD(model.parameters(), lr=0.5)
        for _ in range(epochs):
            for part in torch.randperm(len(labels)).split(50):
                nn.functional.cross_entropy(model(inputs[part]), labels[part]).backward()
                optimizer.step()
                optimizer.zero_grad()
            if after_epoch is not None:
                after_epoch(model)

    found = [SENT(network, K, fit=fit, epochs=4).fit(*flipped[:4]) for _ in range(2)]
    assert torch.equal(found[0].selected_, found[1].selected_)

    def forgetful(*args, after_epoch=None, **options):
        fit(*args, **options)

    with pytest.raises(UserError, match=r"fit must call after_epoch\(model\) after every epoch, it did 0 times in 4"):
        SENT(network, K, fit=forgetful, epochs=4).fit(*flipped[:4])


def test_an_empty_selection_is_an_error(flipped):
    strict = NoisyLabelDetector(threshold=0.9999999)
    with pytest.raises(UserError, match=r"no label is kept \(0 % of 1000\).*threshold 1.*lower it"):
        sent(epochs=1, detector=strict).fit(*flipped[:4])


def test_a_model_that_breaks_is_named_by_its_epoch(flipped):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(64, K), 0

        def forward(self, x):
            self.calls += not self.training and len(x) == 1200
            return self.layer(x) * (math.nan if self.calls == 2 else 1)

    predict = partial(predict_logits, batch_size=5000)
    with pytest.raises(UserError, match=r"logits of 1200 example\(s\) are not finite at epoch 1"):
        SENT(Breaks, K, fit=FIT, predict_logits=predict, epochs=3).fit(*flipped[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, c, d: (x, y + 1, c, d), r"y_noisy\[\d+\] is 10, expected 0 to 9"),
        (lambda x, y, c, d: (x, y, c, d - 1), r"y_clean\[\d+\] is -1, expected 0 to 9"),
        (lambda x, y, c, d: (x, y[1:], c, d), r"label for each row of X_noisy \(1000\), got 999"),
        (lambda x, y, c, d: (x, y, c, d[1:]), r"label for each row of X_clean \(200\), got 199"),
        (lambda x, y, c, d: (x[:, :9], y, c, d), r"one shape, got \[1000, 9\] and \[200, 64\]"),
        (lambda x, y, c, d: (x, y, c[d > 3], d[d > 3]), "at least 2 examples of each class, got 0 of class 0"),
        (lambda x, y, c, d: (x, y, c[:0], d[:0]), "at least 2 examples of each class, got 0 of class 0"),
        (lambda x, y, c, d: (x, None, c, d), "y_noisy is None, which is for noise='pseudo-labels'"),
        (
            lambda x, y, c, d: (torch.cat([x, c[7:9]]), torch.cat([y, d[7:9]]), c, d),
            r"2 of 200 clean examples are in the noisy set too \(X_clean\[7\] is X_noisy\[1000\]\)",
        ),
    ],
)
def test_bad_sets(flipped, change, message):
    with pytest.raises(UserError, match=message):
        sent(epochs=1).fit(*change(*flipped[:4]))


def test_equal_inputs_can_be_allowed(flipped):
    x, y, clean, clean_labels = flipped[:4]
    both = torch.cat([x, clean[:3]]), torch.cat([y, clean_labels[:3]])
    found = sent(epochs=1).detect(*both, clean, clean_labels, allow_equal=True)
    assert len(found.clean_probability_) == 1003


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "pseudo"}, "unknown noise 'pseudo'. Did you mean 'pseudo-labels'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"warmup_epochs": 0}, "warmup_epochs must be at least 1, got 0"),
        ({"teacher_epochs": 0}, "teacher_epochs must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"transition": torch.eye(3)}, r"transition must be \[10, 10\], got \[3, 3\]"),
        ({"instance": True, "noise": "pseudo-labels"}, "describe corruption"),
        ({"transition": torch.eye(K), "noise": "pseudo-labels"}, "describe corruption"),
        ({"transition": torch.eye(K), "instance": True}, "instance=True is noise by input"),
        ({"rounds": 2, "instance": True}, "instance=True is noise by input"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SENT(**{"make_model": network, "num_classes": K} | options)
