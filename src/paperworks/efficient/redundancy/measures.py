"""How redundant data are: one measure a class of the taxonomy, each a share from 0 (none) to 1 (all)."""

import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError

from .clusters import check_bits, cluster, projections, signatures
from .duplicates import near_duplicates

_COMPARED = 4096  # vectors compared with their centroids


class LshRedundancy(NamedTuple):
    """What hashing finds: ``redundancy`` is 1 - ``cluster_ratio``; ``error`` is what sharing centroids costs."""

    redundancy: float
    cluster_ratio: float
    error: float


class ChannelRedundancy(NamedTuple):
    """``redundancy`` is 1 - ``effective_rank`` / C; ``correlated`` the share of pairs of channels with |ρ| > 0.95."""

    redundancy: float
    effective_rank: float
    correlated: float


class ZeroRedundancy(NamedTuple):
    """Shares of values, of pixels (in all channels) and of tiles (with their surroundings) that are zero."""

    values: float
    pixels: float
    tiles: float


class TemporalRedundancy(NamedTuple):
    """Shares of frames and of pixels that stay what they were, and the mean absolute change of a value."""

    frames: float
    pixels: float
    mean_change: float


class TokenRedundancy(NamedTuple):
    """``redundancy`` is the mean cosine of a token and its nearest; ``mergeable`` the share of tokens above 0.9."""

    redundancy: float
    mergeable: float


class DuplicateRedundancy(NamedTuple):
    """Shares of samples that repeat an earlier one exactly, or nearly (which includes exactly)."""

    exact: float
    near: float


class ValueRedundancy(NamedTuple):
    """``redundancy`` is 1 - entropy / 8 bits; ``compressed`` the size after zlib over the size before."""

    redundancy: float
    compressed: float


def spectral_redundancy(images: Float[Tensor, "*batch height width"]) -> float:
    r"""Share of the images' energy that half the resolution keeps (R1).

    $$1 - \frac{\sum_{|f_y| > 1/4 \,\lor\, |f_x| > 1/4} |\hat x(f)|^2}{\sum_f |\hat x(f)|^2},$$

    with frequencies in cycles a pixel, Nyquist being 1/2, of images without their mean under a Hann window. A
    constant image is redundant wholly.
    """
    check_finite(images, "images")
    height, width = images.shape[-2:]
    centred = (images - images.mean((-2, -1), keepdim=True)).float()
    window = torch.hann_window(height, device=images.device)[:, None] * torch.hann_window(width, device=images.device)
    energy = torch.fft.fft2(centred * window).abs().square().reshape(-1, height, width).sum(0)
    high = torch.fft.fftfreq(height).abs().gt(0.25)[:, None] | torch.fft.fftfreq(width).abs().gt(0.25)
    total = float(energy.sum())
    # What rounding leaves of a constant image is no energy.
    negligible = 1e-12 * float(images.double().square().sum()) * height * width
    return 1.0 - float(energy[high.to(energy.device)].sum()) / total if total > negligible else 1.0


def lsh_redundancy(
    rows: Float[Tensor, "n k"], bits: int = 12, block: int | None = None, seed: int = 0
) -> LshRedundancy:
    r"""How many vectors share their signature with others (R2; Ning & Shen 2019).

    Columns are cut in blocks of $L$; a vector's signature in a block is the signs of its projections, less their
    mean, on $H$ random directions. Vectors with equal signatures are a cluster. The cluster ratio is
    $u = n_c / N$, the mean over blocks, and the error $\lVert X - X_c \rVert / \lVert X - \bar x \rVert$ of putting
    centroids in the places of (some 4,096 of) the vectors. Deep Reuse costs $H/M + u$ of a product with $M$ columns.

    Args:
        rows: Vectors, e.g. the patches that a convolution looks at.
        bits: $H$, up to 62.
        block: $L$, a divisor of $k$; by default all columns.
        seed: Draws the directions.

    Raises:
        UserError: If an argument is out of range, or a value is not finite.
    """
    check_finite(rows, "rows")
    check_bits(bits)
    n, k = rows.shape
    block = k if block is None else block
    check_block(block, k)
    lost, found, some = 0.0, 0, slice(None, None, max(1, n // _COMPARED))
    for start in range(0, k, block):
        part = rows[:, start : start + block]
        clusters = cluster(signatures(part @ projections(block, bits, seed + start).to(part)))
        lost += float((part[some] - clusters.mean(part)[clusters.ids[some]]).square().sum())
        found += clusters.number
    ratio = found / (n * (k // block))
    spread = float((rows[some] - rows.mean(0)).square().sum())
    negligible = 1e-12 * float(rows[some].square().sum())  # what rounding leaves of equal rows
    return LshRedundancy(1 - ratio, ratio, (lost / spread) ** 0.5 if spread > negligible else 0.0)


def zero_redundancy(maps: Float[Tensor, "n c height width"], tile: int = 8, halo: int = 1) -> ZeroRedundancy:
    """How much of feature maps is zero (R3).

    Args:
        maps: Feature maps.
        tile: Side of a tile in pixels; those at the border may be smaller.
        halo: How many pixels around a tile must be zero too: half the kernel that reads the maps.
    """
    check_finite(maps, "maps")
    zero = maps == 0
    pixels = zero.all(1)
    spread = F.max_pool2d((~pixels).float()[:, None], 2 * halo + 1, stride=1, padding=halo)
    active = F.max_pool2d(spread, tile, ceil_mode=True)
    return ZeroRedundancy(share(zero), share(pixels), 1 - float(active.mean()))


def temporal_redundancy(clip: Float[Tensor, "frames *rest"], tau: float = 0.0) -> TemporalRedundancy:
    r"""How much of a clip stays what it was (R4, R5).

    Args:
        clip: Frames ``[t, channels, height, width]``, or any data whose first axis is time.
        tau: A pixel has changed if $\max_c |x_t - x_{t-1}| > \tau$; a frame if the mean over its values of
            $|x_t - x_{t-1}|$ is above it.
    """
    check_finite(clip, "clip")
    if tau < 0:
        raise UserError(f"tau must be at least 0, got {tau}")
    if len(clip) < 2:
        raise UserError(f"clip must have at least 2 frames, got {len(clip)}")
    change = (clip[1:] - clip[:-1]).abs()
    pixels = change.amax(1) if change.ndim > 2 else change
    means = change.flatten(1).mean(1)
    return TemporalRedundancy(share(means <= tau), share(pixels <= tau), float(means.mean()))


def channel_redundancy(activations: Float[Tensor, "n c *space"]) -> ChannelRedundancy:
    r"""How few directions the channels span (R6).

    The effective rank is $\exp H(\lambda / \sum \lambda)$ for the eigenvalues $\lambda$ of the channels' covariance
    (Roy & Vetterli 2007); it is 0 where nothing varies.
    """
    check_finite(activations, "activations")
    rows = activations.movedim(1, -1).reshape(-1, activations.shape[1])
    rows = rows - rows.mean(0)
    covariance = (rows.T @ rows).double() / len(rows)
    channels = len(covariance)
    values = torch.linalg.eigvalsh(covariance).clamp_min(0)
    total = values.sum()
    if total <= 1e-12 * activations.square().mean():  # what rounding leaves of constant channels
        return ChannelRedundancy(1.0, 0.0, 1.0)
    rank = float(torch.special.entr(values / total).sum().exp())
    deviations = covariance.diagonal().sqrt()
    correlation = covariance / torch.outer(deviations, deviations).clamp_min(1e-20)
    pairs = torch.ones_like(covariance).triu(1).bool()
    correlated = share(correlation[pairs].abs() > 0.95) if channels > 1 else 0.0
    return ChannelRedundancy(1 - rank / channels, rank, correlated)


def token_redundancy(tokens: Float[Tensor, "n t d"]) -> TokenRedundancy:
    """How alike tokens are (R7): alternate tokens are set A and B, and each of A looks for its nearest in B (ToMe)."""
    check_finite(tokens, "tokens")
    if tokens.shape[1] < 2:
        raise UserError(f"tokens must be at least 2 an example, got {tokens.shape[1]}")
    unit = F.normalize(tokens, dim=-1)
    nearest = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(2)
    mergeable = float((nearest > 0.9).sum()) / (tokens.shape[0] * tokens.shape[1])
    return TokenRedundancy(float(nearest.clamp(0, 1).mean()), mergeable)


def attention_redundancy(attention: Float[Tensor, "n heads queries keys"]) -> float:
    r"""How unevenly attention falls on tokens (R7): $1 - H(a) / \log T$ of the attention $a_j$ received by token j."""
    check_finite(attention, "attention")
    received = attention.sum((1, 2))
    received = received / received.sum(1, keepdim=True)
    length = received.shape[1]
    if length < 2:
        return 0.0
    entropy = torch.special.entr(received).sum(1)
    return 1 - float(entropy.mean()) / float(torch.tensor(float(length)).log())


def duplicate_redundancy(samples: Float[Tensor, "n *shape"], threshold: float = 0.99) -> DuplicateRedundancy:
    """How many samples could be left out, as ``deduplicate`` finds them (R8)."""
    check_finite(samples, "samples")
    groups = (near_duplicates(samples), near_duplicates(samples, threshold))
    exact, near = (1 - int(group.max() + 1) / len(samples) for group in groups)
    return DuplicateRedundancy(exact, max(exact, near))


def value_redundancy(values: Float[Tensor, "*shape"]) -> ValueRedundancy:
    """How few of the 256 levels between the least and the largest value are used, and how predictably (R9)."""
    check_finite(values, "values")
    low, high = values.min(), values.max()
    scale = 255 / (high - low) if high > low else torch.zeros(())
    levels = ((values - low) * scale).round().to(torch.uint8).flatten()
    counts = torch.bincount(levels.int(), minlength=256).double()
    entropy = float(torch.special.entr(counts / counts.sum()).sum() / torch.log(torch.tensor(2.0)))
    content = levels.cpu().numpy().tobytes()
    return ValueRedundancy(1 - entropy / 8, len(zlib.compress(content, 1)) / len(content))


def share(mask: Tensor) -> float:
    """Share of a mask that is true."""
    return float(mask.float().mean())


def check_finite(values: Tensor, name: str) -> None:
    """Raise ``UserError`` unless there are values and all of them are finite."""
    if not values.numel():
        raise UserError(f"{name} must not be empty, got shape {list(values.shape)}")
    if not values.sum().isfinite() and not values.isfinite().all():
        raise UserError(f"{name} must be finite, got {int((~values.isfinite()).sum())} values that are NaN or infinite")


def check_block(block: int, columns: int) -> None:
    """Raise ``UserError`` unless blocks divide the columns."""
    if block < 1 or columns % block:
        raise UserError(f"block must divide the {columns} columns, got {block}: pad the columns, or choose a divisor")
