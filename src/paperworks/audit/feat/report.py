"""What attacks found, in the words of the table."""

from collections.abc import Sequence

import pandas as pd

from paperworks.errors import UserError

from .attacks import AttackResult


def changes_table(
    results: Sequence[AttackResult],
    features: Sequence[str] | None = None,
    values: Sequence[Sequence[str]] | None = None,
) -> pd.DataFrame:
    """The changes that made the classifier err, one a line; ``value_counts("feature")`` shows where it is weak.

    Args:
        results: Of ``attack_batch``. Rows whose attack had no success are left out.
        features: A name for each feature; its number by default.
        values: The names of each feature's values; their codes by default.

    Returns:
        Columns ``row`` (the place in ``results``), ``feature``, ``before``, ``after``, ``margin`` and ``queries``.

    Raises:
        UserError: If there are not as many names as features or values.
    """
    n = len(results[0].x_adv) if results else 0
    for what, names in (("features", features), ("values", values)):
        if results and names is not None and len(names) != n:
            raise UserError(f"{what} must have an entry for each of {n} features, got {len(names)}")
    lines = []
    for row, result in enumerate(results):
        for feature, before, after in result.changed if result.success else ():
            if values is not None and max(before, after) >= len(values[feature]):
                raise UserError(
                    f"values[{feature}] names {len(values[feature])} values, not value {max(before, after)}"
                )
            named = (before, after) if values is None else (values[feature][before], values[feature][after])
            name = feature if features is None else features[feature]
            lines.append((row, name, *named, result.margin, result.queries))
    return pd.DataFrame(lines, columns=["row", "feature", "before", "after", "margin", "queries"])
