"""Simulated hardware: what each layer costs at each number of weight and activation bits.

No device is measured here. The models are analytic: a matrix unit beside a memory that works at the same time.
"""

import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from paperworks.errors import UserError, nearest, unknown

from .layers import LayerProfile
from .policy import MAX_BITS, Table, check_table

Objective = Literal["latency", "energy"]
Grid = Float[np.ndarray, "layers 8 8"]
DEVICES = Path(__file__).parent / "devices"


@runtime_checkable
class Hardware(Protocol):
    """Anything that can tell what layers cost."""

    def table(self, layers: Sequence[LayerProfile]) -> Table:
        """Costs ``[layers, 8, 8]`` by weight and activation bits, or ``[layers, 8]`` by weight bits alone."""


@dataclass(frozen=True, kw_only=True)
class _Accelerator(ABC):
    array: tuple[float, float, float]
    bandwidth: float
    batch: int = 1
    frequency: float = 200.0
    mac_energy: float = 0.05
    memory_energy: float = 20.0
    static_power: float = 0.1
    objective: Objective = "latency"

    def __post_init__(self) -> None:
        if len(self.array) != 3 or not all(_is_number(side) and side > 0 for side in self.array):
            raise UserError(f"array must be three positive numbers, got {self.array!r}")
        for name in ("bandwidth", "batch", "frequency"):
            if not (_is_number(value := getattr(self, name)) and value > 0):
                raise UserError(f"{name} must be a positive number, got {value!r}")
        for name in ("mac_energy", "memory_energy", "static_power"):
            if not (_is_number(value := getattr(self, name)) and 0 <= value < math.inf):
                raise UserError(f"{name} must be a number of at least 0, got {value!r}")
        if self.objective not in get_args(Objective):
            raise unknown("objective", self.objective, get_args(Objective))

    @abstractmethod
    def passes(self, weight_bits: np.ndarray, activation_bits: np.ndarray) -> np.ndarray:
        """Cycles that a product of these bits occupies its cell."""

    def compute_cycles(self, layers: Sequence[LayerProfile]) -> Grid:
        """Cycles of the array for a batch."""
        M, N, K = (_column(layers, name) for name in ("rows", "columns", "inner"))
        tiles = np.ceil(M / self.array[0]) * np.ceil(self.batch * N / self.array[1]) * np.ceil(K / self.array[2])
        return tiles * self.passes(*_bits())

    def memory_bits(self, layers: Sequence[LayerProfile]) -> Grid:
        """Bits of weights and inputs that a batch fetches."""
        w, a = _bits()
        return _column(layers, "weights") * w + self.batch * _column(layers, "activations") * a

    def cycles(self, layers: Sequence[LayerProfile]) -> Grid:
        """Cycles for a batch: of the array or the memory, whichever is busy longer."""
        return np.maximum(self.compute_cycles(layers), self.memory_bits(layers) / self.bandwidth)

    def table(self, layers: Sequence[LayerProfile]) -> Grid:
        """Latency in µs, or energy in nJ, of a batch."""
        microseconds = self.cycles(layers) / self.frequency
        if self.objective == "latency":
            return microseconds
        w, a = _bits()
        macs = self.batch * _column(layers, "macs")
        picojoules = self.mac_energy * w * a * macs + self.memory_energy * self.memory_bits(layers)
        return picojoules / 1e3 + self.static_power * 1e3 * microseconds


@dataclass(frozen=True, kw_only=True)
class BitSerial(_Accelerator):
    r"""A simulated matrix unit that multiplies bit by bit, as BISMO does.

    With a layer's matrices of $M \times K$ and $K \times BN$ numbers for a batch of $B$, $W$ weights of $w$ bits and
    $A$ inputs an example of $a$ bits,

    $$\text{compute} = \left\lceil\frac{M}{D_m}\right\rceil \left\lceil\frac{BN}{D_n}\right\rceil
      \left\lceil\frac{K}{D_k}\right\rceil w a, \qquad \text{memory} = \frac{W w + B A a}{\text{bandwidth}}$$

    cycles, of which the greater is the latency. Energy is that of all products, of all bits fetched and of standing
    by meanwhile.

    Args:
        array: $D_m, D_n, D_k$: output channels, output pixels and products that are computed each cycle.
        bandwidth: Bits a cycle.
        batch: $B$, examples at a time.
        frequency: MHz.
        mac_energy: pJ a product of one bit by one bit.
        memory_energy: pJ a bit fetched.
        static_power: W.
        objective: Whether ``table`` tells ``"latency"`` in µs or ``"energy"`` in nJ, of a batch.

    Raises:
        UserError: If a number is out of range.
    """

    def passes(self, weight_bits: np.ndarray, activation_bits: np.ndarray) -> np.ndarray:
        return weight_bits * activation_bits


@dataclass(frozen=True, kw_only=True)
class BitFusion(_Accelerator):
    r"""A simulated matrix unit of 2-bit bricks that fuse into multipliers of 2, 4 or 8 bits, as BitFusion does.

    Like ``BitSerial``, but with bits rounded up to 2, 4 or 8 where they are computed with, and

    $$f(w, a) = \lceil w \rceil_2 \, \lceil a \rceil_2 / 4$$

    in place of $w a$. Memory holds the bits as they are.
    """

    def passes(self, weight_bits: np.ndarray, activation_bits: np.ndarray) -> np.ndarray:
        w, a = (2.0 ** np.ceil(np.log2(np.maximum(bits, 2))) for bits in (weight_bits, activation_bits))
        return w * a / 4


class LookupTable:
    """Costs that somebody measured or simulated for the layers of one network.

    Args:
        costs: ``[layers, 8, 8]``, indexed ``[layer, weight bits − 1, activation bits − 1]``, or ``[layers, 8]``.

    Raises:
        UserError: If the shape is another, or a cost is negative or not finite.
    """

    def __init__(self, costs: ArrayLike) -> None:
        self.costs = check_table(costs)

    def table(self, layers: Sequence[LayerProfile]) -> Table:
        """The costs.

        Raises:
            UserError: If the model has another number of layers.
        """
        if len(layers) != len(self.costs):
            raise UserError(f"the cost table has {len(self.costs)} layers, but the model has {len(layers)}")
        return self.costs


class ModelSize:
    """The bytes of the weights. Activations cost nothing and are left alone."""

    def table(self, layers: Sequence[LayerProfile]) -> Float[np.ndarray, "layers 8"]:
        """Bytes by weight bits."""
        return _column(layers, "weights")[:, 0] * np.arange(1, MAX_BITS + 1) / 8


KINDS: dict[str, type[BitSerial] | type[BitFusion]] = {"bit-serial": BitSerial, "bit-fusion": BitFusion}


def load_hardware(source: str | Path, **changed: Any) -> BitSerial | BitFusion:
    """A simulated device from its description.

    Args:
        source: ``"edge"``, ``"cloud"`` or ``"fusion"``, or the path of a TOML file like theirs, which lie in
            the folder ``DEVICES``.
        **changed: What to change in it, e.g. ``bandwidth=128`` or ``objective="energy"``.

    Raises:
        UserError: If there is no such device, or its description lacks something or is not understood.
    """
    presets = {path.stem: path for path in sorted(DEVICES.glob("*.toml"))}
    path = presets.get(str(source), Path(source))
    if not path.is_file():
        raise UserError(f"no device or file {str(source)!r}.{nearest(str(source), presets)}")
    try:
        described = tomllib.loads(path.read_text("utf-8")) | changed
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    kind = described.pop("kind", None)
    if kind not in KINDS:
        raise unknown(f"kind in {path.name}", kind, KINDS)
    known = [field.name for field in fields(KINDS[kind])]
    for name in described:
        if name not in known:
            raise unknown(f"entry in {path.name}", name, known)
    for name in ("array", "bandwidth"):
        if name not in described:
            raise UserError(f"{path.name} lacks {name!r}")
    if isinstance(described["array"], list):
        described["array"] = tuple(described["array"])
    return KINDS[kind](**described)


def _bits() -> tuple[np.ndarray, np.ndarray]:
    bits = np.arange(1, MAX_BITS + 1, dtype=np.float64)
    return bits[:, None], bits[None, :]


def _column(layers: Sequence[LayerProfile], name: str) -> np.ndarray:
    return np.array([getattr(layer, name) for layer in layers], dtype=np.float64)[:, None, None]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
