"""Frames of real files, and which decoder reads them."""

from functools import partial

import numpy as np
import pytest
from clips import STEP, write_clip
from transformers import LlavaOnevisionVideoProcessor

from fsr_hf.processing import video_files
from fsr_hf.processing.processing_fsr_llava_video import sample_frames
from fsr_hf.processing.video_files import read_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clip") / "grey.mp4"))


@pytest.fixture
def without_torchcodec(monkeypatch, request):
    """As on a machine where torchcodec is missing, or finds no FFmpeg."""

    def fetch_videos(self, file, sample_indices_fn=None):
        raise request.param("no decoder")

    monkeypatch.setattr(LlavaOnevisionVideoProcessor, "fetch_videos", fetch_videos)


def numbers(frames) -> list[int]:
    return (np.asarray(frames).reshape(len(frames), -1).mean(1) / STEP).round().astype(int).tolist()


@pytest.mark.parametrize("without_torchcodec", [ImportError, RuntimeError], indirect=True)
def test_pyav_reads_where_torchcodec_cannot(without_torchcodec, clip):
    choose = partial(sample_frames, num_frames=4)
    frames, metadata = read_video(LlavaOnevisionVideoProcessor(), clip, choose)
    assert numbers(frames) == [0, 3, 6, 9] and frames.shape == (4, 96, 128, 3)
    assert metadata.frames_indices == [0, 3, 6, 9] and metadata.total_num_frames == 10 and metadata.fps == 4
    assert numbers(read_video(LlavaOnevisionVideoProcessor(), clip)[0]) == [*range(10)]


def test_whatever_decodes_here_reads_a_file(clip):
    frames, metadata = read_video(LlavaOnevisionVideoProcessor(), clip, partial(sample_frames, fps=2))
    assert numbers(frames) == [0, 2, 4, 6, 8] and metadata.duration == 2.5


def test_what_transformers_uses_comes_first(monkeypatch, clip):
    monkeypatch.setattr(LlavaOnevisionVideoProcessor, "fetch_videos", lambda *args, **kwargs: (args[1], kwargs))
    assert read_video(LlavaOnevisionVideoProcessor(), clip, len) == (clip, {"sample_indices_fn": len})


@pytest.mark.parametrize("without_torchcodec", [ImportError], indirect=True)
def test_refusals(without_torchcodec, clip, tmp_path, monkeypatch):
    processor = LlavaOnevisionVideoProcessor()
    with pytest.raises(ValueError, match=r"how many frames.*mp4"):
        read_video(processor, str(write_clip(tmp_path / "grey.webm")))
    monkeypatch.setattr(video_files, "is_av_available", lambda: False)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(processor, clip)
