"""Key frames (R4): a frame that differs little from the last one computed takes its output."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.errors import UserError

from .delta import check_frame


class KeyFrameRunner:
    r"""Runs a model over the frames of one video, and only on those that differ from the last *key frame*.

    The output of frame $t$ is that of key frame $k$ while $\overline{(x_t - x_k)^2} < \tau$; otherwise $t$ becomes the
    key frame (the difference detector of NoScope, Kang et al. 2017). A share $s$ of frames skipped is $1 / (1 - s)$
    times as fast, less the detector.

    Args:
        model: Maps frames ``[n, channels, height, width]``; for n > 1, one difference over all of them counts.
        tau: Threshold; 0 computes every frame. ``calibrate`` finds one.

    Attributes:
        computed: Frames given to the model so far.
        seen: All frames so far.

    Raises:
        UserError: If ``tau`` is negative; when called, if the size of the frames changed.

    Example:
        >>> runner = KeyFrameRunner(model)
        >>> runner.calibrate(clip, disagreement=0.01)
        >>> outputs = [runner(frame[None]) for frame in other_clip]
    """

    def __init__(self, model: Callable[[Tensor], Tensor], tau: float = 0.0) -> None:
        if not tau >= 0:
            raise UserError(f"tau must be at least 0, got {tau}")
        self.model, self.tau = model, tau
        self.reset()

    def reset(self) -> None:
        """Begin another video."""
        self._key: Tensor | None = None
        self.computed = self.seen = 0

    @torch.no_grad()
    def __call__(self, frame: Float[Tensor, "n c height width"]) -> Tensor:
        """The output for the next frame."""
        if self._key is not None:
            check_frame(self.seen, frame.shape, self._key.shape)
        self.seen += 1
        if self._key is None or not float((frame - self._key).square().mean()) < self.tau:
            self._key, self._output = frame.clone(), self.model(frame)
            self.computed += 1
        return self._output.clone()

    @torch.no_grad()
    def calibrate(
        self, clip: Float[Tensor, "frames c height width"], disagreement: float = 0.01, margin: float = 0.5
    ) -> float:
        """Set ``tau`` to the largest value that disagrees with the model on at most a share of a clip's frames, less
        a margin.

        Outputs ``[1, classes]`` disagree if their largest class differs. The thresholds that are tried are quantiles
        of the frames' differences from those 1, 2, 4, 8 … frames before.

        Args:
            clip: A video like those to come.
            disagreement: Share of frames.
            margin: What the largest threshold is multiplied by, as the next video's objects may be smaller.

        Returns:
            The threshold.

        Raises:
            UserError: If the clip has fewer than 2 frames, or a share is not in [0, 1].
        """
        if len(clip) < 2:
            raise UserError(f"clip must have at least 2 frames, got {len(clip)}")
        if not 0 <= disagreement <= 1:
            raise UserError(f"disagreement must be from 0 to 1, got {disagreement}")
        if not 0 <= margin <= 1:
            raise UserError(f"margin must be from 0 to 1, got {margin}")
        answers = torch.cat([self.model(frame[None]).argmax(1) for frame in clip])
        steps = [2**power for power in range(len(clip).bit_length()) if 2**power < len(clip)]
        differences = torch.cat([(clip[step:] - clip[:-step]).square().flatten(1).mean(1) for step in steps])
        self.tau = 0.0
        for tau in sorted(set(differences.quantile(torch.linspace(0, 1, 41)).tolist()), reverse=True):
            keys = key_frames(clip, tau)
            if float((answers[torch.tensor(keys)] != answers).float().mean()) <= disagreement:
                self.tau = margin * tau
                break
        self.reset()
        return self.tau


def key_frames(clip: Iterable[Float[Tensor, "c height width"]], tau: float) -> list[int]:
    """The key frame whose output each frame of a clip takes."""
    keys: list[int] = []
    key: Tensor | None = None
    for number, frame in enumerate(clip):
        if key is None or not float((frame - key).square().mean()) < tau:
            key, last = frame, number
        keys.append(last)
    return keys
