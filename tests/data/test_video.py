import builtins
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from paperworks.data.video import Sampling, VideoSet, kinetics, read_clip, ucf101, video_folder, video_list
from paperworks.errors import MissingExtra, UserError

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")
SMALL = Sampling(frames=4, stride=2, size=8, grayscale=True)


def frames(folder, count=10, size=(8, 8), step=10):
    """A video as a folder of frames; frame k is grey of value k * step."""
    folder.mkdir(parents=True)
    for k in range(count):
        Image.new("L", size, k * step).save(folder / f"{k}.png")
    return folder


def video(path, count=10, size=16, step=10, codec="ffv1"):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for k in range(count):
            image = np.full((size, size, 3), k * step, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def shown(clip, step=10):
    """Which frames a clip of `frames` or `video` holds."""
    assert (clip == clip[:, :, :1, :1]).all()
    return (clip[0, :, 0, 0] * 255 / step).round().int().tolist()


@pytest.fixture
def actions(tmp_path):
    for action in ("jump", "run"):
        for k in range(3):
            frames(tmp_path / "set" / action / f"clip{k}")
    return tmp_path / "set"


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    folder = frames(tmp_path / "clip", count=11)
    assert shown(read_clip(folder, Sampling(frames=11, stride=1, size=8))) == list(range(11))


@needs_av
@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "ffv1"), (".avi", "mpeg4"), (".mp4", "mpeg4")])
def test_a_video_file_gives_the_frames_asked_for(tmp_path, suffix, codec):
    file = video(tmp_path / f"clip{suffix}", count=20, codec=codec)
    clip = read_clip(file, Sampling(frames=4, stride=3, size=16))
    assert clip.shape == (3, 4, 16, 16)
    assert clip.dtype == torch.float32
    wanted = torch.tensor([5, 8, 11, 14]) * 10 / 255
    assert (clip - wanted[:, None, None]).abs().max() < (1e-6 if codec == "ffv1" else 0.02)


@needs_av
def test_files_and_folders_of_the_same_frames_agree(tmp_path):
    file, folder = video(tmp_path / "clip.mkv"), frames(tmp_path / "clip", size=(16, 16))
    assert torch.equal(read_clip(file, SMALL), read_clip(folder, SMALL))


@given(st.integers(1, 60), st.integers(1, 10), st.integers(1, 5), st.integers(1, 4))
def test_positions_lie_in_the_video_in_order_and_spread(length, count, stride, clips):
    sampling = Sampling(frames=count, stride=stride, clips_per_video=clips)
    starts = []
    for clip in range(clips):
        positions = sampling.positions(length, clip)
        assert len(positions) == count
        assert positions == sorted(positions)
        assert 0 <= positions[0] <= positions[-1] < length
        starts.append(positions[0])
    assert starts == sorted(starts)


def test_the_only_clip_lies_in_the_middle_and_a_short_video_is_stretched():
    assert Sampling(frames=3, stride=2).positions(11, 0) == [3, 5, 7]
    assert Sampling(frames=3, stride=4).positions(5, 0) == [0, 2, 4]
    assert Sampling(frames=3, stride=4).positions(1, 0) == [0, 0, 0]


def test_frames_are_scaled_and_cut_to_the_square(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12, 0] = 255  # the central square is red
    Image.fromarray(image).save(folder / "0.png")
    clip = read_clip(folder, Sampling(frames=1, stride=1, size=4))
    assert clip.shape == (3, 1, 4, 4)
    assert (clip[0, :, :, 1:3] == 1).all()
    assert (clip[0] > 0.8).all()  # the margins bleed a little when scaled
    assert (clip[1:] == 0).all()


def test_class_folders(actions):
    data = video_folder(actions, sampling=SMALL)
    assert data.classes == ("jump", "run")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    clips, labels = next(iter(DataLoader(data, batch_size=6)))
    assert clips.shape == (6, 1, 4, 8, 8)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    loaded = data.load()
    assert torch.equal(loaded.inputs, clips)
    assert torch.equal(loaded.targets, labels)


def test_splits_share_one_numbering_of_the_classes(tmp_path):
    for part, action in (("train", "run"), ("train", "walk"), ("test", "walk")):
        frames(tmp_path / "set" / part / action / "clip")
    test = video_folder(tmp_path / "set", "test")
    assert test.classes == ("run", "walk")
    assert test.labels.tolist() == [1]
    assert len(video_folder(tmp_path / "set", "train")) == 2


def test_every_clip_of_a_video_goes_into_the_same_subset(actions):
    data = video_folder(actions, sampling=Sampling(frames=2, stride=1, size=8, clips_per_video=3))
    assert len(data) == 18
    part = data.subset(torch.tensor([4, 0]))
    assert part.targets.tolist() == [1, 1, 1, 0, 0, 0]
    assert [shown(part[k][0]) for k in range(3)] == [[1, 2], [4, 5], [7, 8]]
    assert data.subset(data.labels == 1).videos == data.videos[3:]


def test_unlabelled_clips_come_alone(actions):
    data = video_folder(actions, sampling=SMALL)
    alone = data.unlabelled()
    assert len(alone) == len(data)
    assert torch.equal(alone[2], data[2][0])
    assert not hasattr(alone, "labels")


def test_lists_give_labels_or_take_them_from_the_folder(actions, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("run/clip0 1\njump/clip2\n\n")
    data = video_list(listing, actions, ["jump", "run"])
    assert data.labels.tolist() == [1, 0]
    assert data.videos == (actions / "run/clip0", actions / "jump/clip2")


def test_ucf101_by_its_lists(tmp_path):
    for action in ("Archery", "Biking"):
        for k in (1, 2):
            frames(tmp_path / "UCF-101" / action / f"v_{action}_g0{k}_c01.avi")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\r\nBiking/v_Biking_g01_c01.avi 2\r\n")
    (lists / "testlist01.txt").write_text("Biking/v_Biking_g02_c01.avi\n")
    train = ucf101(tmp_path / "UCF-101", lists)
    assert train.classes == ("Archery", "Biking")
    assert train.labels.tolist() == [0, 1]
    assert ucf101(tmp_path / "UCF-101", lists, "test").labels.tolist() == [1]
    with pytest.raises(UserError, match=r"trainlist02.txt"):
        ucf101(tmp_path / "UCF-101", lists, fold=2)
    with pytest.raises(UserError, match="fold must be 1, 2 or 3, got 4"):
        ucf101(tmp_path / "UCF-101", lists, fold=4)
    with pytest.raises(UserError, match=r"unknown split 'tset'. Did you mean 'test'"):
        ucf101(tmp_path / "UCF-101", lists, "tset")
    (lists / "classInd.txt").write_text("0 Archery\n1 Biking\n")
    with pytest.raises(UserError, match="must number the classes"):
        ucf101(tmp_path / "UCF-101", lists)


@needs_av
def test_kinetics_by_its_table(tmp_path):
    video(tmp_path / "videos" / "air drumming" / "abc-d_12_000003_000013.mkv", count=4)
    video(tmp_path / "videos" / "xyz_000000_000010.mkv", count=4)
    table = tmp_path / "train.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\nair drumming,abc-d_12,3,13,train\n"
        "zumba,xyz,0,10,train\nzumba,gone,0,10,train\n"
    )
    with pytest.warns(UserWarning, match="lacks 1 of the 3 videos"):
        data = kinetics(tmp_path / "videos", table, SMALL)
    assert data.classes == ("air drumming", "zumba")
    assert data.labels.tolist() == [0, 1]
    assert shown(data[0][0]) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"holds none of the 3 videos .* such as gone_000000_000010.mp4"):
        kinetics(tmp_path / "empty", table)
    table.write_text("class,youtube_id,time_start,time_end\na,b,0,1\n")
    with pytest.raises(UserError, match="has no column 'label'"):
        kinetics(tmp_path / "videos", table)


@needs_av
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a video"),
        (b"no video" * 100, "cannot be read as a video"),
        (0.6, "is truncated: it holds 1[0-9] of 20 frames|cannot be read as a video"),
    ],
)
def test_a_broken_video_is_an_error_that_names_it(tmp_path, content, message):
    file = tmp_path / "run" / "bad.avi"
    if isinstance(content, float):
        whole = video(file, count=20, codec="mpeg4").read_bytes()
        content = whole[: int(content * len(whole))]
    else:
        file.parent.mkdir()
    file.write_bytes(content)
    data = video_folder(tmp_path)
    with pytest.raises(UserError, match=rf"bad.avi ({message})"):
        data[0]
    with pytest.raises(UserError, match=r"bad\.avi"):
        data.unlabelled()[0]


@needs_av
def test_a_file_without_pictures_is_named(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match=r"sound.mkv holds no video"):
        read_clip(tmp_path / "sound.mkv", SMALL)


def test_a_broken_frame_is_an_error_that_names_it(actions):
    (actions / "run" / "clip1" / "4.png").write_bytes(b"\x89PNG broken")
    data = video_folder(actions, sampling=SMALL)
    with pytest.raises(UserError, match=r"clip1.4\.png cannot be read as a frame"):
        data.load()


def test_pyav_is_asked_for_by_name(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.mp4").write_bytes(b"")
    genuine = builtins.__import__

    def without_av(name, *args, **keywords):
        if name == "av":
            raise ImportError(name)
        return genuine(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(MissingExtra, match=r"a.mp4 needs PyAV \(av\): pip install 'paperworks\[video\]'"):
        video_folder(tmp_path)[0]


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="missing is no folder"):
        video_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no class folders"):
        video_folder(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"class folder .*run holds no videos"):
        video_folder(tmp_path)
    frames(tmp_path / "run" / "clip")
    with pytest.raises(UserError, match="has no split 'train'"):
        video_folder(tmp_path, "train")
    with pytest.raises(UserError, match="holds no frames"):
        read_clip(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run/clip0 2", "line 1: label 2 is out of range, expected 0 to 1"),
        ("run/clip9 1", "line 1: there is no .*clip9"),
        ("rum/clip0", "line 1: 'rum' is none of the classes. Did you mean 'run'"),
        ("", "names no videos"),
    ],
)
def test_bad_lists(actions, tmp_path, line, message):
    listing = tmp_path / "list.txt"
    listing.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        video_list(listing, actions, ["jump", "run"])
    with pytest.raises(UserError, match="cannot read the list"):
        video_list(tmp_path / "absent.txt", actions, ["jump", "run"])


@pytest.mark.parametrize("name", ["frames", "stride", "size", "clips_per_video"])
def test_bad_sampling(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        Sampling(**{name: 0})


def test_labels_must_fit_the_videos(tmp_path):
    with pytest.raises(UserError, match="got 1 videos and 2 labels"):
        VideoSet((tmp_path,), torch.tensor([0, 1]), ("a", "b"), "set")
    with pytest.raises(UserError, match=r"labels\[0\] is 3"):
        VideoSet((tmp_path,), torch.tensor([3]), ("a", "b"), "set")
