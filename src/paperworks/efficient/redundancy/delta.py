"""Delta inference (R5): of a video, only what changed since the frame before is computed."""

from types import TracebackType

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperworks.errors import UserError

from .layers import BackOff, check_convolution, replace_layers
from .patches import Patches, kernel_rows

DENSE_ABOVE = 0.2
"""Share of outputs from which the whole convolution is faster: the crossover of a 64→128 layer on a CPU."""
PER_OUTPUT = 3.3
"""Time of an output that is gathered and computed by itself, over its share of a whole convolution; on CPUs."""
OVERHEAD = 25.0
"""Output channels whose convolution takes as long as looking for changes and copying do beside it; on CPUs."""


def reached(conv: nn.Conv2d, change: Bool[Tensor, "n height width"]) -> Bool[Tensor, "n rows columns"]:
    """The outputs of a convolution that look at a changed pixel."""
    ones = torch.ones(1, 1, *conv.kernel_size, device=change.device)
    return F.conv2d(change[:, None].float(), ones, None, conv.stride, conv.padding, conv.dilation)[:, 0] > 0


def delta_cost(out_channels: int, active: float) -> float:
    """Predicted time of a delta convolution over the whole one's, for a share of active outputs."""
    return PER_OUTPUT * active + OVERHEAD / out_channels


class DeltaConv2d(nn.Module):
    r"""A convolution that remembers its last input and output and recomputes only where the input changed.

    It keeps the *effective* input $\hat x$, and the output $y = \mathrm{conv}(\hat x)$ at all times. With a new $x$,
    the pixels with $\max_c |x - \hat x| > \tau$ are written into $\hat x$, and the outputs that look at them are
    computed anew. So $|x - \hat x| \le \tau$ everywhere, in every frame: errors do not add up, and $\tau = 0$ is exact.
    (CBinfer, Cavigelli & Benini 2019; DeltaCNN, Parger et al. 2022.)

    Where more than ``dense_above`` of the outputs would change, the whole convolution is computed. After that,
    it looks for changes again after 1, 2, 4 … 32 frames, so that a moving camera costs little more than no delta.

    Args:
        layer: An ungrouped convolution with zero padding; its parameters are used, not copied.
        tau: $\tau$, in the units of this layer's input.
        dense_above: See above; 1 never computes all.

    Attributes:
        recomputed: Outputs computed in the last frame.
        outputs: Outputs in a frame.

    Raises:
        UserError: If an argument is out of range; when called, if the shape of the input changed.
    """

    def __init__(self, layer: nn.Conv2d, tau: float = 0.0, dense_above: float = DENSE_ABOVE) -> None:
        super().__init__()
        self.layer = check_convolution(layer, "DeltaConv2d")
        _check_tau(tau)
        if not 0 <= dense_above <= 1:
            raise UserError(f"dense_above must be from 0 to 1, got {dense_above}")
        self.tau, self.dense_above = tau, dense_above
        self.reset()
        self.train(layer.training)

    def reset(self) -> None:
        """Forget the last frame: the next is another video's."""
        self._pixels: Tensor | None = None  # the effective input with its padding, channels last
        self._shape = torch.Size()
        self._back_off = BackOff()
        self.recomputed = self.outputs = 0

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "n c height width"]) -> Float[Tensor, "n m rows columns"]:
        if self.outputs and x.shape != self._shape:
            raise UserError(f"the input is {list(x.shape)}, the frame before was {list(self._shape)}: call reset()")
        patches = Patches.of(self.layer, x.shape)
        self._shape, self.outputs = x.shape, patches.outputs
        if self._back_off.resting():
            self._pixels = None
            return self._dense(x)
        if self._pixels is None:
            return self._remember(x, patches)
        top, left = patches.padding
        before = self._pixels.view(patches.images, *patches.image, -1)
        inside = before[:, top : top + x.shape[2], left : left + x.shape[3]]
        now = x.permute(0, 2, 3, 1)
        torch.sub(now, inside, out=self._difference)
        change = ~(self._difference.abs_().amax(-1) <= self.tau)  # NaN has changed
        active = reached(self.layer, change)
        count = int(active.sum())
        few = count <= self.dense_above * patches.outputs
        self._back_off.report(few)
        if not few:
            return self._remember(x, patches)
        if count:
            inside[change] = now[change]
            outputs = active.flatten().nonzero()[:, 0]
            rows, bias = patches.gather(self._pixels, outputs), self.layer.bias
            product = rows @ self._weight if bias is None else torch.addmm(bias, rows, self._weight)
            self._rows.index_copy_(0, outputs, product)
        self.recomputed = count
        return patches.unflatten(self._rows.clone())  # a copy, since what follows may work in place

    def _remember(self, x: Tensor, patches: Patches) -> Tensor:
        y = self._dense(x)
        self._pixels, self._weight = patches.pixels(x).clone(), kernel_rows(self.layer.weight)
        self._rows = y.permute(0, 2, 3, 1).reshape(patches.outputs, -1).clone()
        self._difference = x.new_empty(x.shape[0], *x.shape[2:], x.shape[1])
        return y

    def _dense(self, x: Tensor) -> Tensor:
        self.recomputed = self.outputs
        return self.layer(x)


class DeltaSession:
    """Runs a model over the frames of one video, its convolutions as ``DeltaConv2d``; a context.

    All other layers are computed as they are. Grouped convolutions stay as they are too.

    Args:
        model: A model in evaluation mode that maps frames ``[n, channels, height, width]``; n > 1 are videos side
            by side.
        tau: Threshold of change, the same for all layers. 0 is exact.
        dense_above: As for ``DeltaConv2d``.

    Attributes:
        layers: The delta layers by name.

    Raises:
        UserError: If an argument is out of range, the model is in training mode, or none of its layers can be
            computed so; when called, if the number or size of frames changed.

    Example:
        >>> with DeltaSession(model, tau=0.02) as session:
        ...     for clip in clips:
        ...         session.reset()
        ...         outputs = [session(frame[None]) for frame in clip]
    """

    def __init__(self, model: nn.Module, tau: float = 0.0, dense_above: float = DENSE_ABOVE) -> None:
        _check_tau(tau)
        if model.training:
            raise UserError("a delta session needs the model in evaluation mode: call model.eval() first")
        names = [name for name, module in model.named_modules() if _suits(module)]
        if not names:
            raise UserError(f"{type(model).__name__} has no nn.Conv2d that could be computed by differences")
        self.model = model
        self._replaced = replace_layers(model, names, lambda conv: DeltaConv2d(conv, tau, dense_above))
        self.layers = {name: layer for name, layer in self._replaced.layers.items() if isinstance(layer, DeltaConv2d)}
        self._frames, self._shape = 0, torch.Size()

    def reset(self) -> None:
        """Begin another video."""
        self._frames = 0
        for layer in self.layers.values():
            layer.reset()

    @torch.no_grad()
    def __call__(self, frame: Float[Tensor, "n c height width"]) -> Tensor:
        """The model's output for the next frame."""
        if self._frames:
            check_frame(self._frames, frame.shape, self._shape)
        output = self.model(frame)
        self._frames, self._shape = self._frames + 1, frame.shape
        return output

    @property
    def recomputed(self) -> float:
        """Share of the convolutions' outputs that were computed in the last frame."""
        return sum(layer.recomputed for layer in self.layers.values()) / max(
            1, sum(layer.outputs for layer in self.layers.values())
        )

    def close(self) -> None:
        """Put the original convolutions back."""
        self._replaced.restore()

    def __enter__(self) -> "DeltaSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _suits(module: nn.Module) -> bool:
    try:
        check_convolution(module, "DeltaConv2d")
    except UserError:
        return False
    return True


def _check_tau(tau: float) -> None:
    if not tau >= 0:
        raise UserError(f"tau must be at least 0, got {tau}")


def check_frame(number: int, now: torch.Size, before: torch.Size) -> None:
    """Raise ``UserError`` unless frame ``number`` is of the same shape as those before."""
    if now[0] != before[0]:
        raise UserError(f"frame {number} is a batch of {now[0]}, the session's is {before[0]}: reset() begins anew")
    if now != before:
        raise UserError(f"frame {number} is {now[-1]}x{now[-2]}, clip is {before[-1]}x{before[-2]}")
