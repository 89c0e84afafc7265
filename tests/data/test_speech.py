import math

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from paperworks.data.root import DatasetNotFound
from paperworks.data.speech import index_librispeech, load_spoken_digits, log_mel, mel_filters
from paperworks.errors import UserError


def tone(hertz, seconds=0.5, rate=8000):
    return np.sin(2 * math.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path):
    for digit, speaker in [(0, "ann"), (0, "bob"), (7, "ann")]:
        wave = (tone(300 + 100 * digit) * 2**14).astype(np.int16)
        wavfile.write(tmp_path / f"{digit}_{speaker}_0.wav", 8000, wave)
    return tmp_path


def test_filters_are_triangles_that_overlap_by_half():
    filters = mel_filters(40, 129, 8000)
    assert filters.shape == (40, 129)
    assert (filters >= 0).all()
    wide = mel_filters(10, 4001, 8000)
    inner = wide[:, wide.argmax(1)[0] + 1 : wide.argmax(1)[-1]]  # from the first peak to the last
    assert torch.allclose(inner.sum(0), torch.ones(inner.shape[1]), atol=1e-4)
    assert torch.allclose(wide.amax(1), torch.ones(10), atol=2e-2)


@pytest.mark.parametrize("hertz", [200, 1000, 3000])
def test_a_tone_is_loudest_in_the_band_around_it(hertz):
    picture = log_mel(torch.from_numpy(tone(hertz)).float())
    band = int(picture.mean(1).argmax())
    weight = mel_filters(40, 129, 8000)[band]
    assert abs(int(weight.argmax()) * 8000 / 256 - hertz) < 120


def test_twice_the_amplitude_is_four_times_the_power():
    wave = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(log_mel(2 * wave) - log_mel(wave), torch.tensor(math.log(4)), atol=1e-3)


def test_batches_are_what_single_waves_are():
    waves = torch.randn(2, 3, 2000, generator=torch.Generator().manual_seed(0))
    pictures = log_mel(waves)
    assert pictures.shape == (2, 3, 40, 16)
    assert torch.allclose(pictures[1, 2], log_mel(waves[1, 2]), atol=1e-4)


def test_spoken_digits_are_read_with_their_speakers(folder):
    clips = load_spoken_digits(folder)
    assert clips.inputs.shape == (3, 1, 40, 50)
    assert clips.targets.tolist() == [0, 0, 7]
    assert [clips.names[k] for k in clips.speakers] == ["ann", "bob", "ann"]
    assert torch.allclose(clips.inputs.mean((1, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.equal(clips.inputs[0], clips.inputs[1])
    assert load_spoken_digits(folder.name, bands=20, frames=10, root=folder.parent).inputs.shape == (3, 1, 20, 10)


def test_wave_formats_agree(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    forms = [(wave * 2**15).astype(np.int16), wave.astype(np.float32), (wave * 128 + 128).astype(np.uint8)]
    for index, samples in enumerate(forms):
        wavfile.write(tmp_path / f"1_ann_{index}.wav", 8000, samples)
    fine, real, coarse = load_spoken_digits(tmp_path).inputs
    assert torch.allclose(fine, real, atol=0.01)
    assert torch.corrcoef(torch.stack([coarse.flatten(), real.flatten()]))[0, 1] > 0.99


def test_bad_recordings(tmp_path):
    with pytest.raises(DatasetNotFound, match=r"nothing at .*free-spoken-digit-dataset"):
        load_spoken_digits(tmp_path / "none")
    with pytest.raises(DatasetNotFound, match=r"digit_speaker_index\.wav"):
        load_spoken_digits(tmp_path)
    file = tmp_path / "1_ann_0.wav"
    for samples, rate, message in [
        (np.zeros(100, np.int16), 16000, "has 16000 Hz"),
        (np.zeros((100, 2), np.int16), 8000, r"shape \[100, 2\], expected mono"),
        (np.zeros(0, np.int16), 8000, "holds no sound"),
    ]:
        wavfile.write(file, rate, samples)
        with pytest.raises(UserError, match=message):
            load_spoken_digits(tmp_path)
    file.write_bytes(b"no sound at all")
    with pytest.raises(UserError, match="is not a WAV file"):
        load_spoken_digits(tmp_path)


def test_librispeech_is_listed(tmp_path):
    chapter = tmp_path / "dev-clean" / "84" / "121123"
    chapter.mkdir(parents=True)
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO\n84-121123-0001 DO YOU HEAR\n")
    with pytest.raises(UserError, match=r"84-121123-0000\.flac, which is not there"):
        index_librispeech(tmp_path / "dev-clean")
    for k in range(2):
        (chapter / f"84-121123-000{k}.flac").touch()
    found = index_librispeech("dev-clean", root=tmp_path)
    assert [(u.speaker, u.chapter, u.transcript) for u in found] == [
        ("84", "121123", "GO"),
        ("84", "121123", "DO YOU HEAR"),
    ]
    assert found[1].file.name == "84-121123-0001.flac"
    with pytest.raises(UserError, match="the layout of LibriSpeech"):
        index_librispeech(chapter)
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000\n")
    with pytest.raises(UserError, match="'84-121123-0000' has no transcript"):
        index_librispeech(tmp_path / "dev-clean")
