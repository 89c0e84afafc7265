"""Speech: spoken digits as log-mel pictures, and the index of LibriSpeech's folders."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from scipy.io import wavfile
from torch import Tensor

from paperworks.data.root import DatasetNotFound, locate
from paperworks.errors import UserError

RATE = 8000  # Hz, of every file of the Free Spoken Digit Dataset
_HOW = "Get the folder recordings/ of github.com/Jakobovski/free-spoken-digit-dataset."


class SpokenDigits(NamedTuple):
    """Recordings of single digits.

    Attributes:
        inputs: Log-mel pictures, standardised by the mean and deviation of each.
        targets: The digit.
        speakers: Who speaks, an index into ``names``.
        names: The speakers' names.
    """

    inputs: Float32[Tensor, "n 1 bands frames"]
    targets: Int64[Tensor, " n"]
    speakers: Int64[Tensor, " n"]
    names: tuple[str, ...]


class Utterance(NamedTuple):
    """One sentence of LibriSpeech: its file and what is said."""

    file: Path
    speaker: str
    chapter: str
    transcript: str


def mel_filters(bands: int, bins: int, rate: int) -> Float32[Tensor, "bands bins"]:
    r"""Triangular filters, equally wide on the mel scale $2595 \log_{10}(1 + f / 700)$, from 0 Hz to ``rate
    / 2``.

    Args:
        bands: How many filters.
        bins: Frequencies of the spectrum, from 0 to ``rate / 2``.
        rate: Samples a second.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    below, centre, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - below) / (centre - below)
    falling = (above - frequencies) / (above - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(
    waves: Float[Tensor, "*batch samples"],
    *,
    rate: int = RATE,
    bands: int = 40,
    window: int = 256,
    hop: int = 128,
    floor: float = 1e-6,
) -> Float[Tensor, "*batch bands frames"]:
    """Logarithm of the power in mel bands, one column every ``hop`` samples.

    Args:
        waves: Samples in [-1, 1].
        rate: Samples a second.
        bands: Mel bands.
        window: Length of the Hann window, in samples (32 ms at 8 kHz).
        hop: Samples from one frame to the next (16 ms at 8 kHz).
        floor: Power that is added before the logarithm.
    """
    flat = waves.reshape(-1, waves.shape[-1])
    hann = torch.hann_window(window, device=waves.device, dtype=waves.dtype)
    spectrum = torch.stft(flat, window, hop, window=hann, return_complex=True, pad_mode="constant").abs().square()
    filters = mel_filters(bands, window // 2 + 1, rate).to(waves)
    mel = (filters @ spectrum + floor).log()
    return mel.view(*waves.shape[:-1], *mel.shape[-2:])


def load_spoken_digits(
    source: str | Path = "spoken-digits", *, bands: int = 40, frames: int = 50, root: str | Path | None = None
) -> SpokenDigits:
    """Read ``{digit}_{speaker}_{index}.wav`` files: the Free Spoken Digit Dataset, or recordings named like it.

    A clip shorter than ``frames`` frames of 16 ms is followed by silence, a longer one (one in fifty, at 50
    frames) is cut.

    Args:
        source: The folder, as given or inside the data root.
        bands: Mel bands.
        frames: Columns of each picture.
        root: The data root (see ``data_root``).

    Raises:
        UserError: If the folder is not there or holds no such file, or a file is no mono WAV of 8 kHz.
    """
    folder = locate(source, root, how=_HOW)
    files = sorted(folder.glob("[0-9]_*_*.wav"))
    if not files:
        raise DatasetNotFound(f"{folder} holds no file called digit_speaker_index.wav. {_HOW}")
    hop = 128
    # Frames are centred on samples 0, hop, 2 hop …: these many samples make these many frames.
    samples = (frames - 1) * hop
    waves = torch.zeros(len(files), samples)
    for row, file in enumerate(files):
        wave = _read_wave(file)[:samples]
        waves[row, : len(wave)] = torch.from_numpy(wave)
    pictures = log_mel(waves, bands=bands, hop=hop).unsqueeze(1)
    deviation, mean = torch.std_mean(pictures, dim=(1, 2, 3), keepdim=True)
    parts = [file.stem.split("_") for file in files]
    names = tuple(sorted({part[1] for part in parts}))
    return SpokenDigits(
        inputs=(pictures - mean) / deviation.clamp(min=1e-6),
        targets=torch.tensor([int(part[0]) for part in parts]),
        speakers=torch.tensor([names.index(part[1]) for part in parts]),
        names=names,
    )


def index_librispeech(source: str | Path, *, root: str | Path | None = None) -> list[Utterance]:
    """List the utterances of a LibriSpeech split: ``speaker/chapter/*.flac`` beside ``*.trans.txt``.

    The audio itself is for ``soundfile`` or torchaudio to decode.

    Args:
        source: The split's folder, for instance ``LibriSpeech/dev-clean``, as given or inside the data root.
        root: The data root (see ``data_root``).

    Raises:
        UserError: If the folder is not there, holds no transcripts, or an utterance has no audio.
    """
    folder = locate(source, root, how="Get LibriSpeech from openslr.org/12.")
    utterances = []
    for transcripts in sorted(folder.glob("*/*/*.trans.txt")):
        chapter = transcripts.parent
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, transcript = line.partition(" ")
            file = chapter / f"{name}.flac"
            if not transcript.strip():
                raise UserError(f"{transcripts}: {name!r} has no transcript")
            if not file.exists():
                raise UserError(f"{transcripts} names {file.name}, which is not there")
            utterances.append(Utterance(file, chapter.parent.name, chapter.name, transcript))
    if not utterances:
        raise UserError(f"{folder} holds no speaker/chapter/*.trans.txt, the layout of LibriSpeech")
    return utterances


def _read_wave(file: Path) -> Float32[np.ndarray, " samples"]:
    try:
        rate, wave = wavfile.read(file)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} is not a WAV file: {error}") from error
    if rate != RATE or wave.ndim != 1:
        raise UserError(f"{file} has {rate} Hz and shape {list(wave.shape)}, expected mono of {RATE} Hz")
    if not wave.size:
        raise UserError(f"{file} holds no sound")
    if wave.dtype == np.uint8:  # the one unsigned format: silence is 128
        wave = wave.astype(np.int16) - 128
        return (wave / 128).astype(np.float32)
    full = np.iinfo(wave.dtype).max + 1 if np.issubdtype(wave.dtype, np.integer) else 1
    return (wave / full).astype(np.float32)
