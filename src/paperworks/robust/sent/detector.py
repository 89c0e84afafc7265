"""The detector: a binary classifier that tells right labels from wrong ones by model-based features."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from paperworks.errors import UserError


class OneClassError(UserError):
    """All transferred labels are right, or all are wrong: there is nothing to tell apart."""


class NoisyLabelDetector(ClassifierMixin, BaseEstimator):
    """Learns which labels are clean from examples of both, as a scikit-learn classifier.

    Features are standardised by the training set's mean and deviation, those of the transferred clean set:
    never by those of the noisy set. The last of the two ``classes_`` (True) is "clean".

    Args:
        estimator: A classifier with ``predict_proba``; ``MLPClassifier((32,))`` is the other one that the
            method names. By default ``LogisticRegression(C=0.3, class_weight="balanced")``.
        threshold: Probability above which a label is kept; ``"cv"`` chooses the one with the largest
            balanced accuracy in cross-validation on the training set.
        calibrate: Calibrate the probabilities (Platt's sigmoid, in cross-validation on the training set).
            Balanced class weights and small training sets skew them, which matters where they serve as
            weights.
        folds: Folds of these cross-validations.

    Attributes:
        classes_: False (wrong) and True (clean), or the two labels given.
        threshold_: The threshold in use.
        pipeline_: The fitted scaler and classifier.

    Example:
        >>> detector = NoisyLabelDetector().fit(features_of_transferred, is_clean)
        >>> clean_probability = detector.predict_proba(features_of_noisy)[:, 1]
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        threshold: Any = 0.5,
        calibrate: Any = False,
        folds: Any = 5,
    ) -> None:
        self.estimator, self.threshold, self.calibrate, self.folds = estimator, threshold, calibrate, folds

    def fit(self, X: Any, y: Any) -> "NoisyLabelDetector":
        """Learn from features ``[m, d]`` and whether each label is clean ``[m]``.

        Raises:
            OneClassError: If all labels are clean, or none is.
            UserError: If the threshold is out of range.
        """
        if self.threshold != "cv" and not (isinstance(self.threshold, int | float) and 0 <= self.threshold < 1):
            raise UserError(f"threshold must be from 0 to below 1, or 'cv', got {self.threshold!r}")
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) == 1:
            raise OneClassError(
                f"the detector got only 1 class ({self.classes_[0]}), expected clean and wrong labels: nothing to tell "
                "apart. The noise that was transferred may be none, or not the noise of the large set"
            )
        if len(self.classes_) > 2:
            raise UserError(
                "Only binary classification is supported. The labels are clean or wrong, "
                f"got {len(self.classes_)} classes"
            )
        plain = make_pipeline(StandardScaler(), self._classifier())
        fewest = int(min((y == label).sum() for label in self.classes_))
        choose, self.pipeline_, self.threshold_ = self.threshold == "cv", plain, self.threshold
        if self.calibrate:
            # Where the threshold is chosen as well, a fold's labels are missing in the inner cross-validation.
            inside = fewest - -(-fewest // self.folds) if choose else fewest
            self.pipeline_ = CalibratedClassifierCV(plain, cv=self._folds(inside))
        if choose:
            self.threshold_ = self._best_threshold(X, y, self._folds(fewest))
        self.pipeline_.fit(X, y)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each of ``classes_``, ``[n, 2]``."""
        check_is_fitted(self)
        return self.pipeline_.predict_proba(validate_data(self, X, reset=False))

    def predict(self, X: Any) -> np.ndarray:
        """Whether the probability of "clean" exceeds the threshold."""
        is_clean = self.predict_proba(X)[:, 1] > self.threshold_
        return self.classes_[is_clean.astype(int)]

    def _classifier(self) -> Any:
        if self.estimator is not None:
            return clone(self.estimator)
        return LogisticRegression(C=0.3, class_weight="balanced", max_iter=1000)

    def _folds(self, fewest: int) -> int:
        if fewest < 2:
            raise UserError("cross-validation needs at least 2 labels of each kind in every fold: too few are given")
        return min(self.folds, fewest)

    def _best_threshold(self, X: np.ndarray, y: np.ndarray, folds: int) -> float:
        held_out = cross_val_predict(clone(self.pipeline_), X, y, cv=folds, method="predict_proba")[:, 1]
        false_clean, true_clean, thresholds = roc_curve(y == self.classes_[1], held_out)
        # The curve keeps scores that reach its threshold, `predict` those that exceed ours.
        return float(np.nextafter(thresholds[np.argmax(true_clean - false_clean)], 0))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
