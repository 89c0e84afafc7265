"""What there is against such backdoors: checks of networks, inputs and data, and training that disturbs triggers.

None of them was made for distilled data. What each finds here is measured with the method's claim.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Adam

from paperworks.audit.ddbackdoor.evaluate import logits
from paperworks.audit.ddbackdoor.pixels import Images, Normalization
from paperworks.audit.robustar import last_layer
from paperworks.errors import UserError


def range_check(
    images: Images, normalization: Normalization, *, tolerance: float = 0.5 / 255
) -> Float[Tensor, "batch"]:
    """How far each image leaves the pixels from 0 to 1, as a share of that range; 0 within the tolerance.

    Nothing that leaves it can come from a picture file.

    Args:
        images: Normalised images.
        normalization: How they were normalised.
        tolerance: In pixels from 0 to 1; the default is half a level of 8 bits.
    """
    pixels = normalization.restore(images)
    excess = torch.maximum(-pixels, pixels - 1).flatten(1).amax(1)
    return torch.where(excess > tolerance, excess, 0.0)


@dataclass(frozen=True, eq=False)
class ReverseEngineered:
    """What Neural Cleanse found.

    Attributes:
        masks: For each class the smallest mask that sends images there.
        patterns: What shows through the mask, normalised.
        norms: Sum of each mask; the image's area for a class that no mask reached.
        index: Anomaly index of each class; above 2 is suspicious.
    """

    masks: Float[Tensor, "classes 1 height width"]
    patterns: Float[Tensor, "classes channels height width"]
    norms: Float[Tensor, "classes"]
    index: Float[Tensor, "classes"]

    @property
    def flagged(self) -> list[int]:
        """Classes that are suspicious."""
        return [k for k, index in enumerate(self.index.tolist()) if index > 2]


def anomaly_index(norms: Float[Tensor, "classes"]) -> Float[Tensor, "classes"]:
    r"""How unusually small each norm $m$ is; above 2 is suspicious.

    $$(\operatorname{median} - m) / (1.4826 \, \mathrm{MAD})$$

    Where more than half of the norms are the same, each smaller one is infinitely unusual.
    """
    below = norms.quantile(0.5) - norms
    return torch.where(below == 0, 0.0, below / (1.4826 * below.abs().quantile(0.5)))


def neural_cleanse(
    net: nn.Module,
    images: Images,
    normalization: Normalization,
    num_classes: int,
    *,
    generator: torch.Generator,
    steps: int = 500,
    batch_size: int = 32,
    lr: float = 0.1,
    weight: float = 1e-3,
    success: float = 0.99,
) -> ReverseEngineered:
    r"""Search the smallest mask and pattern that send images to each class (Wang et al., S&P 2019).

    $$\min_{m, p} \; \mathrm{CE}\big((1 - m) \circ x + m \circ p, \, c\big) + \lambda_c \lVert m \rVert_1$$

    for all classes $c$ at once, $m$ in [0, 1] and $p$ within the range of pixels. After five steps in a row with
    success, $\lambda_c$ grows by half; after five without, it falls to 0.54 of itself. The smallest mask with success
    is kept. A backdoored class needs an unusually small one. Triggers that no pixel can show are out of its reach.

    Args:
        net: The network, in evaluation mode.
        images: Clean ones, normalised.
        normalization: How.
        num_classes: Number of classes.
        generator: Draws start and batches.
        steps: Steps of Adam.
        batch_size: Images a step, each towards every class.
        lr: Adam's learning rate, with betas 0.5 and 0.9.
        weight: First $\lambda_c$.
        success: Share of a batch that must arrive.

    Raises:
        UserError: If there are fewer than three classes, for which no class could stand out.
    """
    if num_classes < 3:
        raise UserError(f"num_classes must be at least 3, got {num_classes}")
    channels, height, width = images.shape[1:]
    device, C = images.device, num_classes
    low, high = normalization.low.to(images), normalization.high.to(images)

    def leaf(channels: int) -> Tensor:
        return torch.randn(C, channels, height, width, generator=generator).to(images).requires_grad_()

    raw_mask, raw_pattern = leaf(1), leaf(channels)
    optimizer = Adam([raw_mask, raw_pattern], lr, betas=(0.5, 0.9))
    weights, streak = torch.full((C,), weight, device=device), torch.zeros(C, device=device)
    norms = torch.full((C,), float(height * width), device=device)
    masks = torch.ones(C, 1, height, width, device=device)
    patterns = torch.zeros(C, channels, height, width, device=device)
    targets = torch.arange(C, device=device)[:, None].expand(C, min(batch_size, len(images)))
    for _ in range(steps):
        some = images[torch.randperm(len(images), generator=generator)[:batch_size].to(device)]
        mask, pattern = raw_mask.sigmoid(), low + (high - low) * raw_pattern.sigmoid()
        blended = (1 - mask[:, None]) * some + (mask * pattern)[:, None]
        out = net(blended.flatten(0, 1))
        size = mask.flatten(1).sum(1)
        loss = F.cross_entropy(out, targets.flatten()) * C + (weights * size).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=[raw_mask, raw_pattern])
        with torch.no_grad():
            there = (out.argmax(1).view(targets.shape) == targets).float().mean(1) >= success
            better = there & (size < norms)
            norms[better], masks[better], patterns[better] = size[better], mask[better], pattern[better]
            streak = torch.where(there, streak.clamp(min=0) + 1, streak.clamp(max=0) - 1)
            weights[streak >= 5] *= 1.5
            weights[streak <= -5] *= 1.5**-1.5
            streak[streak.abs() >= 5] = 0
        optimizer.step()
    return ReverseEngineered(masks, patterns, norms, anomaly_index(norms))


@torch.no_grad()
def strip_entropy(
    net: nn.Module,
    images: Images,
    clean: Float[Tensor, "others channels height width"],
    *,
    generator: torch.Generator,
    blends: int = 100,
) -> Float[Tensor, "batch"]:
    r"""Mean entropy, in nats, of predictions for each image blended with clean ones (Gao et al., ACSAC 2019).

    Both weigh a half. A trigger decides through every blend: low entropy is suspicious.

    Args:
        net: The network, in evaluation mode.
        images: To be checked.
        clean: To blend with.
        generator: Draws the clean ones, for each image its own.
        blends: Blends of an image.
    """
    drawn = torch.randint(len(clean), (len(images), blends), generator=generator).to(images.device)
    entropies = []
    for image, others in zip(images, drawn, strict=True):
        log_p = F.log_softmax(net((image + clean[others]) / 2), 1)
        entropies.append(-(log_p.exp() * log_p).sum(1).mean())
    return torch.stack(entropies)


def penultimate(net: nn.Module, images: Images) -> Float[Tensor, "batch features"]:
    """What a network's last linear layer is given, which the next two look at."""
    return torch.cat([last_layer(net, part)[0] for part in torch.split(images, 1024)])


def spectral_signature(
    features: Float[Tensor, "batch width"], rate: float
) -> tuple[Float[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """Squared projection onto the top singular vector of one class's centred features (Tran et al., NeurIPS 2018).

    Args:
        features: Of images with one label.
        rate: Share of them that may be poisoned.

    Returns:
        A score of each, large for suspicious ones, and which to remove: the top 1.5 ``rate``.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"rate must be from 0 to 1, got {rate}")
    centred = features - features.mean(0)
    top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    scores = (centred @ top).square()
    removed = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    removed[scores.topk(min(len(scores), round(1.5 * rate * len(scores)))).indices] = True
    return scores, removed


def activation_clustering(
    features: Float[Tensor, "batch width"], *, seed: int = 0
) -> tuple[Bool[Tensor, "batch"], float]:
    """Two clusters of one class's features in 10 principal components (Chen et al., SafeAI 2019).

    Args:
        features: Of images with one label.
        seed: Of k-means.

    Returns:
        Who is in the smaller cluster, the suspicious one, and the silhouette of the two, from -1 to 1: near 1 for two
        clearly apart, which clean classes should not have.

    Raises:
        UserError: If there are fewer than three images.
    """
    # Imported here as it takes a second, which who distils need not wait for.
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    if len(features) < 3:
        raise UserError(f"features must be those of at least 3 images, got {len(features)}")
    reduced = PCA(min(10, *features.shape), random_state=seed).fit_transform(features.cpu().numpy())
    clusters = KMeans(2, n_init=5, random_state=seed).fit_predict(reduced)
    apart = float(silhouette_score(reduced, clusters)) if 0 < clusters.sum() < len(clusters) else 0.0
    smaller = clusters == (clusters.mean() < 0.5)
    return torch.from_numpy(smaller).to(features.device), apart


@torch.no_grad()
def fine_pruning(net: nn.Module, images: Images, share: float = 0.5) -> nn.Module:
    """A copy of a network without its last convolution's channels that clean images excite least (Liu et al. 2018).

    Without the fine-tuning that should follow: who has only distilled images has no clean ones to do it with.

    Args:
        net: The network.
        images: Clean ones, normalised.
        share: Share of the channels that are pruned.

    Raises:
        UserError: If there is no convolution, or ``share`` is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share must be from 0 to 1, got {share}")
    pruned = copy.deepcopy(net).eval()
    convs = [module for module in pruned.modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        raise UserError("the network has no nn.Conv2d whose channels could be pruned")
    excited: list[Tensor] = []
    watch = convs[-1].register_forward_hook(lambda m, inputs, out: excited.append(out.relu().mean((2, 3))))
    logits(pruned, images)
    watch.remove()
    dormant = torch.cat(excited).mean(0).argsort()[: round(share * convs[-1].out_channels)]
    convs[-1].weight[dormant] = 0
    if convs[-1].bias is not None:
        convs[-1].bias[dormant] = 0
    return pruned


def crop_and_cutout(
    images: Images, generator: torch.Generator, *, shift: int = 1, size: int = 3
) -> Float[Tensor, "batch channels height width"]:
    """Move each image by up to ``shift`` pixels, and blank the bottom right corner of every second one.

    For ``evaluate_distilled(augment=…)``: a patch in the corner can then decide less. What moves in at an
    edge repeats it; what is blanked takes the image's mean.

    Args:
        images: A batch.
        generator: Draws both.
        shift: Pixels at most.
        size: Side of the corner; of a patch, what it takes up with its margin.

    Raises:
        UserError: If either leaves nothing of an image.
    """
    side = min(images.shape[-2:])
    if not (0 <= shift < side and 0 <= size < side):
        raise UserError(f"shift and size must be from 0 to {side - 1}, got {shift} and {size}")
    n, device = len(images), images.device
    rows, columns = (
        torch.arange(length).clamp(0, length - 1) + torch.randint(-shift, shift + 1, (n, 1), generator=generator)
        for length in images.shape[-2:]
    )
    rows, columns = rows.clamp(0, images.shape[-2] - 1).to(device), columns.clamp(0, images.shape[-1] - 1).to(device)
    at = torch.arange(n, device=device)[:, None, None]
    moved = images.movedim(1, -1)[at, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
    if size:
        cut = (torch.rand(n, generator=generator) < 0.5).to(device)
        corner = moved[..., -size:, -size:]
        corner[cut] = moved[cut].mean((2, 3), keepdim=True).expand_as(corner[cut])
    return moved
