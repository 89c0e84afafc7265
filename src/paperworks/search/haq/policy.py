"""Policies: bits for the weights and activations of every layer, and how they are made to fit a budget.

A policy is an integer array ``[layers, 2]`` of weight and activation bits, or ``[layers, 1]`` of weight bits where
activations are left alone. A cost table is ``[layers, 8, 8]``, indexed ``[layer, weight bits − 1, activation
bits − 1]``, or ``[layers, 8]``; a policy costs the sum over its layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike

from paperworks.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
ENDS = (0, -1)
"""The first and the last layer, which stay at 8 bits, as in the released code."""

Policy = Int64[np.ndarray, "layers columns"]
Table = Float[np.ndarray, "layers 8 *activation_bits"]


def bits_of_action(action: float, min_bits: int = MIN_BITS, max_bits: int = MAX_BITS) -> int:
    r"""The bits that an action in [0, 1] stands for (paper, section 3: action space), in equal intervals.

    $$b = \operatorname{round}\left(b_\min - \tfrac12 + a \, (b_\max - b_\min + 1)\right)$$

    The ends are clipped into the range, where rounding to even would leave it.
    """
    bits = round(min_bits - 0.5 + float(action) * (max_bits - min_bits + 1))
    return min(max(bits, min_bits), max_bits)


def check_policy(policy: ArrayLike, layers: int) -> Policy:
    """A policy as an integer array ``[layers, 1 or 2]``.

    Raises:
        UserError: If it is not one for that many layers, or its bits are no integers from 2 to 8.
    """
    array = np.asarray(policy)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] != layers or array.shape[1] not in (1, 2):
        raise UserError(f"policy must be [{layers}, 2] or [{layers}, 1], a row a layer, got {list(array.shape)}")
    for column, name in enumerate(("weight_bits", "activation_bits")[: array.shape[1]]):
        for layer, bits in enumerate(array[:, column].tolist()):
            if bits != int(bits) or not MIN_BITS <= bits <= MAX_BITS:
                raise UserError(f"{name} must be an integer in [{MIN_BITS}, {MAX_BITS}], got {bits} for layer {layer}")
    return array.astype(np.int64)


def check_table(table: Any) -> Table:
    """A cost table as floats.

    Raises:
        UserError: If it is not ``[layers, 8, 8]`` or ``[layers, 8]``, or a cost is negative or not finite.
    """
    array = np.asarray(table, dtype=np.float64)
    if array.ndim not in (2, 3) or not array.shape[0] or set(array.shape[1:]) != {MAX_BITS}:
        raise UserError(f"a cost table must be [layers, 8, 8] or [layers, 8], got {list(array.shape)}")
    if bad := np.argwhere(~np.isfinite(array) | (array < 0)).tolist():
        raise UserError(f"costs must be finite and not negative, got {array[tuple(bad[0])]} at {bad[0]}")
    return array


def policy_cost(table: Table, policy: Policy) -> float:
    """The sum of what the layers cost."""
    return float(_costs(table, policy).sum())


def uniform_policy(table: Table, target: float, pinned: Sequence[int] = ENDS) -> Policy:
    """The most bits that all layers can have alike within ``target``; pinned layers have 8.

    Raises:
        UserError: If not even 2 bits fit.
    """
    for bits in range(MAX_BITS, MIN_BITS - 1, -1):
        policy = fixed_policy(table, bits, pinned)
        if policy_cost(table, policy) <= target:
            return policy
    raise _unreachable(table, target, MIN_BITS, pinned)


def fixed_policy(table: Table, bits: int, pinned: Sequence[int] = ENDS) -> Policy:
    """The same bits everywhere, but 8 in pinned layers."""
    policy = np.full((len(table), table.ndim - 1), bits, dtype=np.int64)
    policy[list(pinned)] = MAX_BITS
    return policy


def costliest_first(table: Table, target: float, pinned: Sequence[int] = ENDS) -> Policy:
    """A rule of thumb: from 8 bits, take one from the layer that costs most, until ``target`` is met.

    Where a layer has two numbers of bits, the one that saves more is lowered.

    Raises:
        UserError: If ``target`` cannot be met.
    """
    policy = fixed_policy(table, MAX_BITS)
    free = _free(table, pinned)
    while policy_cost(table, policy) > target:
        costs = np.where(free & (policy > MIN_BITS).any(1), _costs(table, policy), -1.0)
        layer = int(costs.argmax())
        if costs[layer] < 0:
            raise _unreachable(table, target, MIN_BITS, pinned)
        lowered = [policy[layer] - one for one in np.eye(policy.shape[1], dtype=np.int64)]
        allowed = [row for row in lowered if row.min() >= MIN_BITS]
        policy[layer] = min(allowed, key=lambda row: float(table[layer][tuple(row - 1)]))
    return policy


def enforce_budget(
    policy: Policy, table: Table, target: float, *, min_bits: int = MIN_BITS, pinned: Sequence[int] = ENDS
) -> Policy:
    """Lower bits until a policy costs no more than ``target``: the paper's constraint on the actions.

    Pinned layers get 8 bits first. Then sweeps run from the last layer to the first and take one bit from a layer's
    activations and one from its weights, where there are more than ``min_bits``, and stop as soon as it fits.

    Args:
        policy: What the agent chose; not changed.
        table: Costs.
        target: Largest cost, in the table's unit.
        min_bits: Fewest bits.
        pinned: Layers that keep 8 bits.

    Raises:
        UserError: If even ``min_bits`` everywhere would cost more.
    """
    policy = policy.copy()
    policy[list(pinned)] = MAX_BITS
    free = np.flatnonzero(_free(table, pinned))[::-1].tolist()
    columns = range(policy.shape[1] - 1, -1, -1)
    costs = _costs(table, policy)
    total = costs.sum()
    while total > target:
        if (policy[free] <= min_bits).all():
            raise _unreachable(table, target, min_bits, pinned)
        for layer in free:
            for column in columns:
                if policy[layer, column] <= min_bits:
                    continue
                policy[layer, column] -= 1
                costs[layer] = table[layer][tuple(policy[layer] - 1)]
                total = costs.sum()
                if total <= target:
                    return policy
    return policy


def least_cost(table: Table, min_bits: int = MIN_BITS, pinned: Sequence[int] = ENDS) -> float:
    """What ``min_bits`` everywhere but in pinned layers costs."""
    return policy_cost(table, fixed_policy(table, min_bits, pinned))


def _costs(table: Table, policy: Policy) -> Float[np.ndarray, "layers"]:
    return table[np.arange(len(table)), *(policy.T - 1)]


def _free(table: Table, pinned: Sequence[int]) -> np.ndarray:
    free = np.ones(len(table), dtype=bool)
    free[list(pinned)] = False
    return free


def _unreachable(table: Table, target: float, min_bits: int, pinned: Sequence[int]) -> UserError:
    full, least = (policy_cost(table, fixed_policy(table, bits, pinned)) for bits in (MAX_BITS, min_bits))
    return UserError(
        f"budget of {target / full:.4g} of the 8-bit cost is out of reach: "
        f"{min_bits} bits wherever they may be lowered cost {least / full:.4g}"
    )
