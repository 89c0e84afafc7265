"""Ranking logistic regression: learns how much each feature of a candidate speaks for it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import solve

PENALTY = 10.0  # C: weak, as features are few
STEPS = 50  # of Newton's method, which needs about ten


@dataclass(frozen=True)
class Ranker:
    """A linear score of candidates, $s = w \\cdot \\varphi$.

    Attributes:
        weights: One a feature.
    """

    weights: Float[np.ndarray, " features"]

    @classmethod
    def fit(
        cls,
        features: Float[np.ndarray, "pairs features"],
        starts: Int[np.ndarray, " ends"],
        gold: Int[np.ndarray, " questions"],
        penalty: float = PENALTY,
        *,
        start: Float[np.ndarray, " features"] | None = None,
    ) -> "Ranker":
        r"""Minimise $\tfrac12 \lVert w' \rVert^2 + C \sum_i -\ln \mathrm{softmax}_k(w \cdot \varphi_{ik})_{gold_i}$.

        By Newton's method: the problem is convex. The softmax runs over the candidates of one question; $w'$ are the
        weights of features scaled to unit variance.

        Args:
            features: $\varphi$, one row a candidate.
            starts: Where each question's candidates begin, and the last one's end.
            gold: The right candidate of each question.
            penalty: $C$; the larger, the weaker the penalty.
            start: Weights to begin at, which saves time and does not change where it ends.
        """
        spread = features.std(0)
        scale = np.where(spread > 1e-9, spread, np.inf)  # a constant feature gets no weight
        x = features / scale
        owner, right = np.repeat(np.arange(len(gold)), np.diff(starts)), starts[:-1] + gold
        target = x[right].sum(0)

        def probabilities(w: np.ndarray) -> tuple[float, np.ndarray]:
            scores = x @ w
            scores -= np.maximum.reduceat(scores, starts[:-1])[owner]
            odds = np.exp(scores)
            total = np.add.reduceat(odds, starts[:-1])
            return 0.5 * w @ w + penalty * (np.log(total).sum() - scores[right].sum()), odds / total[owner]

        w = np.zeros(x.shape[1]) if start is None else start * np.where(spread > 1e-9, spread, 0.0)
        loss, p = probabilities(w)
        for _ in range(STEPS):
            gradient = w + penalty * (x.T @ p - target)
            if np.abs(gradient).max() < 1e-6:
                break
            weighted = p[:, None] * x
            means = np.add.reduceat(weighted, starts[:-1])
            step = solve(np.eye(len(w)) + penalty * (x.T @ weighted - means.T @ means), gradient, assume_a="pos")
            length = 1.0
            while (new := probabilities(w - length * step))[0] > loss and length > 1e-6:
                length /= 2  # Newton's steps may be too long far from the optimum
            w, (loss, p) = w - length * step, new
        return cls(w / scale)

    def scores(self, features: Float[np.ndarray, "pairs features"]) -> Float[np.ndarray, " pairs"]:
        """One score a candidate."""
        return features @ self.weights
