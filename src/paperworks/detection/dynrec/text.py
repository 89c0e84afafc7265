"""Words as numbers, and a small encoder of them."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from paperworks.detection.dynrec.blocks import ReasoningBlock
from paperworks.errors import UserError

PAD, UNKNOWN = 0, 1


class Vocabulary:
    """The words that are known, lower case; 0 fills up and 1 stands for all others.

    Args:
        texts: Whose words these are, in the order in which they first occur.
        drop: Words that are passed over wherever they come, such as articles.

    Attributes:
        words: All of them, ``<pad>`` and ``<unk>`` first.
        unknown: How often each word that is not among them has come since.
    """

    def __init__(self, texts: Iterable[str], drop: Collection[str] = ()) -> None:
        self.drop = frozenset(drop)
        found = dict.fromkeys(word for text in texts for word in self._split(text))
        self.words = ["<pad>", "<unk>", *found]
        self.unknown: Counter[str] = Counter()
        self._places = {word: place for place, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(
        self, texts: Sequence[str], max_words: int
    ) -> tuple[Int64[Tensor, "texts words"], Bool[Tensor, "texts words"]]:
        """Numbers of words, filled up to the longest text, and a mask that is true where they are words.

        Words that are not known are counted in ``unknown``, with a warning.

        Args:
            texts: At least one.
            max_words: Longest text that is taken.

        Raises:
            UserError: If there is no text, or one has no word or more than ``max_words``.
        """
        if not texts:
            raise UserError("there is no text to encode")
        rows = [self._split(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise UserError(f"expression {text!r} has no word")
            if len(row) > max_words:
                raise UserError(f"expression {text!r} has {len(row)} words, more than max_words={max_words}")
        tokens = torch.full((len(rows), max(map(len, rows))), PAD)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor([self._places.get(word, UNKNOWN) for word in row])
        strange = Counter(word for row in rows for word in row if word not in self._places)
        if strange:
            self.unknown += strange
            shown = ", ".join(f"{word} ({number})" for word, number in strange.most_common(5))
            warnings.warn(f"{strange.total()} words are read as <unk>: {shown}", stacklevel=2)
        return tokens, tokens != PAD

    def _split(self, text: str) -> list[str]:
        return [word for word in split_words(text) if word not in self.drop]


def split_words(text: str) -> list[str]:
    """Lower-case words of letters and digits; all else only separates them."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


class TextEncoder(nn.Module):
    """Learned codes of words and of their places, then pre-norm transformer layers.

    In its stead anything will do that maps numbers of words and their mask to ``[batch, words, d]``: a BERT, say.

    Args:
        vocabulary: Number of words that are known.
        d: Channels.
        heads: Of attention.
        max_words: Longest text.
        layers: How many.
        hidden: Of the feed-forward blocks; twice d by default.
    """

    def __init__(
        self, vocabulary: int, d: int = 64, heads: int = 4, max_words: int = 20, layers: int = 1, hidden: int = 0
    ) -> None:
        super().__init__()
        self.max_words = max_words
        self.words = nn.Embedding(vocabulary, d, padding_idx=PAD)
        self.places = nn.Parameter(torch.randn(max_words, d))
        self.layers = nn.ModuleList(ReasoningBlock(d, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(
        self, tokens: Int64[Tensor, "batch words"], mask: Bool[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words d"]:
        if tokens.shape[1] > self.max_words:
            raise UserError(f"expressions of {tokens.shape[1]} words, more than max_words={self.max_words}")
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, ~mask)
        return self.norm(x)
