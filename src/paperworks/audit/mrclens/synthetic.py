"""A generator of reading-comprehension sets with biases of known strength."""

import numpy as np

from paperworks.audit.mrclens.data import MRCDataset
from paperworks.audit.mrclens.example import Answer, Example
from paperworks.errors import UserError


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


PERSONS = _list(
    """
    Ann Bob Carla David Emma Felix Greta Hugo Irene Jonas Karin Leon Maria Nils Olga Paul Rosa Simon Tina Uwe
    Vera Walter Xenia Yusuf Zoe Amir Birgit Chen Dora Emil
    """
)
_CITIES = _list(
    """
    Rome Oslo Paris Cairo Lima Delhi Tokyo Quito Berlin Madrid Vienna Athens Dublin Havana Lisbon Moscow Nairobi Prague
    Seoul Warsaw
    """
)
_FRIENDS = _list(
    """
    Alvarez Becker Costa Dubois Eriksen Fischer Garcia Hansen Ivanov Jensen Kovacs Lopez Meyer Novak Okafor Petrov
    Quinn Rossi Silva Tanaka
    """
)
RELATIONS = (
    ("Where does {} live?", "{} lives in {}.", _CITIES),
    ("When did {} retire?", "{} retired after {}.", tuple(str(year) for year in range(1960, 2000, 2))),
    ("Who does {} dine with?", "{} dines with {}.", _FRIENDS),
    ("How much does {} weigh?", "{} weighs about {}.", tuple(str(weight) for weight in range(41, 81, 2))),
)
SENTENCES = 5


def SyntheticMRC(  # noqa: N802 — what it makes is a set
    n: int, *, position: float = 0.0, overlap: float = 0.0, wh_type: float = 0.0, seed: int = 0
) -> MRCDataset:
    """Questions on passages of five sentences "person verb value", with biases that are as strong as is asked.

    Without any, one other sentence is about the person asked for and another one holds the relation asked for, so that
    both are needed. Questions share no verb form with sentences, so that ``overlap`` sees the person alone. The four
    relations have values of four types, and sentences of four words.

    Args:
        n: How many questions, each on its own passage.
        position: The answer stands in the first sentence this often, else in any other; 0 means anywhere, uniformly.
        overlap: How often no other sentence is about the person asked for.
        wh_type: How often no other sentence holds the relation asked for.
        seed: Draws everything.

    Raises:
        UserError: If ``n`` is not positive or a strength is not a probability.
    """
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}")
    for name, strength in (("position", position), ("overlap", overlap), ("wh_type", wh_type)):
        if not 0 <= strength <= 1:
            raise UserError(f"{name} must be between 0 and 1, got {strength}")
    rng = np.random.default_rng(seed)
    strengths = (position, overlap, wh_type)
    return MRCDataset([_example(k, rng, *strengths) for k in range(n)], f"synthetic {strengths}")


def _example(number: int, rng: np.random.Generator, position: float, overlap: float, wh_type: float) -> Example:
    asked, *others = (int(k) for k in rng.permutation(len(PERSONS))[:SENTENCES])
    relation = int(rng.integers(len(RELATIONS)))
    rest = [k for k in range(len(RELATIONS)) if k != relation]
    # In order: the answer, who shares its person, who shares its relation, and two that share nothing with it.
    people = [asked, others[0] if rng.random() < overlap else asked, *others[1:]]
    relations = [relation, *(int(k) for k in rng.choice(rest, SENTENCES - 1))]
    if rng.random() >= wh_type:
        relations[2] = relation
    place = int(rng.integers(SENTENCES))
    if position > 0:
        place = 0 if rng.random() < position else int(rng.integers(1, SENTENCES))
    order = [int(k) for k in 1 + rng.permutation(SENTENCES - 1)]
    order.insert(place, 0)
    values = [str(rng.choice(RELATIONS[k][2])) for k in relations]
    sentences = [RELATIONS[relations[k]][1].format(PERSONS[people[k]], values[k]) for k in order]
    start = sum(len(sentence) + 1 for sentence in sentences[:place]) + sentences[place].rindex(values[0])
    question = RELATIONS[relation][0].format(PERSONS[asked])
    return Example(f"q{number}", " ".join(sentences), question, (Answer(values[0], start),))
