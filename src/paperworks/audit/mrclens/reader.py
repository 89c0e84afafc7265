"""A small reader, trained on everything: the expensive way of finding out what a set can be solved by."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paperworks.audit.mrclens.candidates import Candidates, Texts
from paperworks.audit.mrclens.data import MRCDataset
from paperworks.errors import UserError, unknown

PLACES = 10
UNKNOWN = 1
Sees = Literal["both", "question", "passage"]


class ReaderData(NamedTuple):
    """A set as tensors: word ids ``[questions, 1 + sentences, words]``, the question first, 0 where there is none.

    Attributes:
        dataset: Pairs of those and the sentence that holds the answer.
        vocabulary: Lower-case words and their ids, from 2; 1 is any other word.
    """

    dataset: TensorDataset
    vocabulary: dict[str, int]


def reader_data(data: MRCDataset, vocabulary: dict[str, int] | None = None) -> ReaderData:
    """Encode the questions of a set whose answer stands in a passage of several sentences.

    Args:
        data: The set.
        vocabulary: That of the training set; other words become 1. By default every word of this set.

    Raises:
        UserError: If no question is usable.
    """
    c = Candidates(data)
    if not len(c):
        raise UserError(f"{data.name} has no question whose answer stands in a passage of two sentences or more")
    known = {name: k for k, name in enumerate(c.words.names, UNKNOWN + 1)} if vocabulary is None else vocabulary
    ids = np.array([known.get(name, UNKNOWN) for name in c.words.names], np.int64)[c.words.lower]
    width = int(max(c.questions.lengths.max(), c.texts.lengths.max()))
    inputs = np.zeros((len(c), 1 + int(c.sizes.max()), width), np.int64)
    inputs[:, 0] = _padded(c.questions, ids, width)
    inputs[c.owner, 1 + c.index] = _padded(c.texts, ids, width)[c.text_of]
    return ReaderData(TensorDataset(torch.from_numpy(inputs), torch.from_numpy(c.gold)), known)


def _padded(texts: Texts, ids: np.ndarray, width: int) -> np.ndarray:
    table = np.zeros((len(texts.lengths), width), np.int64)
    place = np.arange(len(texts.surfaces)) - np.repeat(texts.starts[:-1], texts.lengths)
    table[np.repeat(np.arange(len(table)), texts.lengths), place] = ids[texts.surfaces]
    return table


class SentenceReader(nn.Module):
    r"""Finds the sentence that holds the answer: an MLP of $[\bar q \odot \bar s,\ \bar s - \bar q,\ place]$.

    $\bar q$ and $\bar s$ are mean embeddings of the question's and the sentence's words. Seeing the question or the
    passage alone, it is one of the baselines of Kaushik and Lipton (2018).

    Args:
        words: Size of the vocabulary.
        sees: ``"both"``, or ``"question"`` (and how many sentences there are), or ``"passage"``.
        dim: Size of an embedding.
        hidden: Units of the MLP.

    Raises:
        UserError: For another value of ``sees``.
    """

    def __init__(self, words: int, sees: Sees = "both", dim: int = 48, hidden: int = 64) -> None:
        super().__init__()
        if sees not in ("both", "question", "passage"):
            raise unknown("value of sees", sees, ("both", "question", "passage"))
        self.sees = sees
        self.embedding = nn.Embedding(UNKNOWN + 1 + words, dim, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(2 * dim + PLACES, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, inputs: Int64[Tensor, "batch texts words"]) -> Float[Tensor, "batch sentences"]:
        """Logits of the sentences; minus infinity where there is none."""
        count = (inputs > 0).sum(2)
        means = self.embedding(inputs).sum(2) / count.clamp(min=1)[..., None]
        q, s = means[:, :1], means[:, 1:]
        if self.sees == "question":
            s = torch.zeros_like(s)
        elif self.sees == "passage":
            q = torch.zeros_like(q)
        places = torch.arange(s.shape[1], device=s.device).clamp(max=PLACES - 1)
        place = F.one_hot(places, PLACES).to(s.dtype).expand(len(s), -1, -1)
        logits = self.mlp(torch.cat([q * s, s - q, place], 2))[..., 0]
        return logits.masked_fill(count[:, 1:] == 0, -torch.inf)
