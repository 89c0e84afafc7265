"""Sequence classifiers to attack: small ones, over one-hot rows."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SequenceLSTM(nn.Module):
    r"""A bidirectional LSTM with attention, over the embeddings $e_j = \frac1m \sum_v \mathrm{relu}(Z_{jv} W_v)$.

    Gradients mislead on it: the values that a feature has not lie at the kink of their ReLU, so that the gradient
    tells which features matter, but not which value to give them.
    """

    def __init__(self, n_values: int, num_classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_values, hidden))
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.attention = nn.Sequential(nn.Linear(2 * hidden, 64), nn.ReLU(), nn.Linear(64, 1))
        self.head = nn.Linear(2 * hidden, num_classes)

    def forward(self, z: Float[Tensor, "batch features values"]) -> Float[Tensor, "batch classes"]:
        states, _ = self.lstm((z.unsqueeze(-1) * self.weight).relu().mean(2))
        weights = self.attention(states).softmax(1)
        return self.head((weights * states).sum(1))


class SequenceConv(nn.Module):
    """Two convolutions along the sequence and a linear layer: smooth, so that gradients are a good guide."""

    def __init__(self, n_features: int, n_values: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(n_values, width, 7, padding=3),
            nn.ReLU(),
            nn.Conv1d(width, width, 7, padding=3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(width * n_features, num_classes),
        )

    def forward(self, z: Float[Tensor, "batch features values"]) -> Float[Tensor, "batch classes"]:
        return self.body(z.transpose(1, 2))
