"""Dead weights that are really left out: where that pays, layer by layer, and where it does not."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paperworks.errors import UserError, unknown
from paperworks.nn import keeping_modes, removing

from .masks import SparsityMask

Kernel = Literal["sliced", "csr", "none"]


class SparseExecution:
    """Runs masked layers without their dead weights, forward and backward.

    Two kernels exist. ``"sliced"``: a convolution or linear layer under a mask of whole filters runs as a smaller
    dense one. ``"csr"``: a linear layer under any other mask runs as products of sparse matrices, in the forward pass
    and for both gradients. Convolutions under masks of single weights or columns have none (``"none"``): a sparse
    product with unfolded inputs takes several times as long as the dense convolution.

    Outputs are those of the dense layer, and so are gradients but for dead weights, which get zero. Kernels follow
    the mask when it changes. ``remove`` brings the plain layers back.

    Args:
        model: The masked model.
        mask: Its mask.
        batch_shape: Shape of a batch, for measuring and for the shapes inside.
        layers: ``"auto"`` measures each layer and takes its kernel only where forward and backward pass together
            are at least ``gain`` times as fast; or the names of layers, taken as told.
        gain: Smallest gain that counts as one.
        rounds: Times each layer is measured.

    Attributes:
        table: One row a masked layer: ``kernel``, ``density``, ``dense_ms`` and ``sparse_ms`` of a forward and
            backward pass (CPU time on a CPU), ``gain``, and whether the kernel is ``used``.

    Raises:
        UserError: If a layer that is named has no kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparsityMask,
        batch_shape: Sequence[int],
        layers: Literal["auto"] | Sequence[str] = "auto",
        *,
        gain: float = 1.1,
        rounds: int = 7,
    ) -> None:
        self.mask = mask
        self.used: list[str] = []
        self._modules = {name: model.get_submodule(name) for name in mask.names}
        self._kernels = {name: _kernel(module, mask) for name, module in self._modules.items()}
        self._sparse: dict[str, Callable[[Tensor], Tensor]] = {
            name: (_Sliced if kernel == "sliced" else _Csr)(self._modules[name], mask, mask.names.index(name))
            for name, kernel in self._kernels.items()
            if kernel != "none"
        }
        shapes = _input_shapes(model, self._modules, batch_shape)
        rows = [self._row(name, shapes.get(name), rounds) for name in mask.names]
        self.table = pd.DataFrame(rows, index=pd.Index(mask.names, name="layer"))
        self.use(list(self.table.index[self.table.gain >= gain]) if layers == "auto" else list(layers))

    def use(self, layers: Sequence[str]) -> None:
        """Run exactly these layers by their kernels."""
        for name in layers:
            if name not in self._kernels:
                raise unknown("masked layer", name, self._kernels)
            if self._kernels[name] == "none":
                raise UserError(f"layer {name!r} has no sparse kernel: {self.mask.granularity} masks of convolutions")
        self.remove()
        for name in layers:
            self._modules[name].forward = self._sparse[name]  # an instance's forward hides its class's
        self.used = list(layers)
        self.table["used"] = self.table.index.isin(self.used)

    def remove(self) -> None:
        """Run all layers dense again."""
        for module in self._modules.values():
            vars(module).pop("forward", None)
        self.used = []

    def _row(self, name: str, shape: Sequence[int] | None, rounds: int) -> dict[str, Any]:
        module, kernel, density = self._modules[name], self._kernels[name], self.mask.density(name)
        dense, sparse = float("nan"), float("nan")
        if kernel != "none" and shape is not None:
            x = torch.randn(*shape, device=cast(Tensor, module.weight).device, requires_grad=True)
            forms: dict[str, Callable[[Tensor], Tensor]] = {
                "dense": partial(type(module).forward, module),
                "sparse": self._sparse[name],
            }
            times = [{form: _milliseconds(run, x, module) for form, run in forms.items()} for _ in range(rounds + 1)]
            dense, sparse = (statistics.median(row[form] for row in times[1:]) for form in forms)
        row = {"kernel": kernel, "density": density, "dense_ms": dense, "sparse_ms": sparse, "gain": dense / sparse}
        return row | {"used": False}


def _kernel(module: nn.Module, mask: SparsityMask) -> Kernel:
    if mask.granularity == "filter":
        plain = isinstance(module, nn.Linear) or (cast(nn.Conv2d, module).groups == 1)
        return "sliced" if plain and getattr(module, "padding_mode", "zeros") == "zeros" else "none"
    return "csr" if isinstance(module, nn.Linear) else "none"


def _input_shapes(model: nn.Module, modules: dict[str, nn.Module], batch_shape: Sequence[int]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.setdefault(name, list(inputs[0].shape))

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    parameter = next(model.parameters())
    with removing(hooks), keeping_modes(model), torch.no_grad():
        model.eval()(torch.zeros(*batch_shape, device=parameter.device, dtype=parameter.dtype))
    return shapes


def _milliseconds(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> float:
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    if x.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if x.is_cuda else time.process_time
    begun = clock()
    y = run(x)
    torch.autograd.grad(y, wanted, y.detach())
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - begun)


class _Sliced:
    """The live filters as a smaller dense layer; dead ones put out their bias."""

    def __init__(self, module: nn.Module, mask: SparsityMask, index: int) -> None:
        self.module, self.mask, self.index, self.version = module, mask, index, -1

    def __call__(self, x: Tensor) -> Tensor:
        if self.version != self.mask.version:
            self.live = self.mask.masks[self.index].flatten().nonzero()[:, 0]
            self.version = self.mask.version
        module, weight = self.module, cast(Tensor, self.module.weight)
        small = weight.index_select(0, self.live)
        if isinstance(module, nn.Linear):
            part, channels = F.linear(x, small), -1
        else:
            conv = cast(nn.Conv2d, module)
            part, channels = F.conv2d(x, small, None, conv.stride, conv.padding, conv.dilation), -3
        shape = list(part.shape)
        shape[channels] = len(weight)
        y = part.new_zeros(shape).index_copy_(part.ndim + channels, self.live, part)
        bias = cast(Tensor | None, module.bias)
        return y if bias is None else y + bias.view(-1, *[1] * (-channels - 1))


class _Csr:
    """A linear layer as sparse products."""

    def __init__(self, module: nn.Module, mask: SparsityMask, index: int) -> None:
        self.module, self.mask, self.index, self.version = module, mask, index, -1

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = cast(Tensor, self.module.weight), cast(Tensor | None, self.module.bias)
        if self.version != self.mask.version:
            self.pattern = _Pattern(self.mask.masks[self.index].expand_as(weight) != 0)
            self.version = self.mask.version
        y = _SparseProduct.apply(x.flatten(0, -2).to(weight.dtype), weight, self.pattern)
        y = y.reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class _Pattern:
    """Where the live entries of a matrix are, for it and for its transpose."""

    def __init__(self, live: Tensor) -> None:
        self.shape = live.shape
        self.flat = live.flatten().nonzero()[:, 0]
        self.rows, self.columns = _starts(live), self.flat % live.shape[1]
        turned = live.t().flatten().nonzero()[:, 0]
        self.turned_rows, self.turned_columns = _starts(live.t()), turned % live.shape[0]
        # Where the transpose's entries stand among the matrix's.
        place = torch.empty(live.numel(), dtype=torch.long, device=live.device)
        place[self.flat] = torch.arange(len(self.flat), device=live.device)
        self.turned = place[self.turned_columns * live.shape[1] + turned // live.shape[0]]

    def matrix(self, values: Tensor) -> Tensor:
        return _csr(self.rows, self.columns, values, self.shape)

    def transpose(self, values: Tensor) -> Tensor:
        return _csr(self.turned_rows, self.turned_columns, values.index_select(0, self.turned), self.shape[::-1])


def _starts(live: Tensor) -> Tensor:
    counts = live.sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, tuple(shape), check_invariants=False)


class _SparseProduct(torch.autograd.Function):
    """x Wᵀ with the dead entries of W left out, of its gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pattern: _Pattern) -> Tensor:
        values = weight.flatten().index_select(0, pattern.flat)
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        with _full_precision(x):
            return (pattern.matrix(values) @ x.t()).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, values), pattern = ctx.saved_tensors, ctx.pattern
        grad_x = grad_weight = None
        with _full_precision(x):
            if ctx.needs_input_grad[0]:
                grad_x = (pattern.transpose(values) @ grad.t()).t()
            if ctx.needs_input_grad[1]:
                # beta=0 leaves what the matrix held out of the sum.
                sampled = torch.sparse.sampled_addmm(pattern.matrix(values), grad.t(), x, beta=0.0)
                grad_weight = values.new_zeros(pattern.shape.numel())
                grad_weight = grad_weight.scatter_(0, pattern.flat, sampled.values()).view(pattern.shape)
        return grad_x, grad_weight, None


def _full_precision(x: Tensor) -> torch.autocast:
    """There are no sparse products of half precision."""
    return torch.autocast(x.device.type, enabled=False)
