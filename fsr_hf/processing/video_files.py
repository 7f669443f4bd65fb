"""Reading video files."""

from collections.abc import Callable
from typing import Any

from transformers.utils import is_av_available
from transformers.video_utils import VideoMetadata, load_video


__all__ = ["read_video"]


def read_video(
    video_processor: Any, file: str, sample_indices_fn: Callable | None = None
) -> tuple[Any, VideoMetadata]:
    """
    Frames of a video file, decoded by what the video processor uses, which is torchcodec. That needs FFmpeg on the
    machine: where it is missing, PyAV decodes, whose wheel brings FFmpeg along.

    Args:
        video_processor ([`BaseVideoProcessor`]):
            The video processor of a model.
        file (`str`):
            A path or a URL.
        sample_indices_fn (`Callable`, *optional*):
            `metadata=` ([`VideoMetadata`]) to the indices of the frames to take. All by default.

    Returns:
        `tuple`: frames `(frames, height, width, 3)` or `(frames, 3, height, width)`, and what is known of the video.

    Raises:
        `ImportError`: if there is no decoder.
        `ValueError`: if PyAV cannot tell how many frames the file has.
    """
    try:
        return video_processor.fetch_videos(file, sample_indices_fn=sample_indices_fn)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchcodec without FFmpeg, or a broken file
        if not is_av_available():
            raise ImportError(
                f"nothing here decodes the video {file}: install PyAV (`pip install av`), or torchcodec and FFmpeg."
            ) from error

    def choose(metadata: VideoMetadata, **kwargs: Any) -> list[int]:
        if not metadata.total_num_frames:
            raise ValueError(
                f"the video {file} does not say how many frames it has, as .webm and .mkv do not: install torchcodec "
                "and FFmpeg, or convert it to .mp4."
            )
        if sample_indices_fn is None:
            return list(range(metadata.total_num_frames))
        return sample_indices_fn(metadata=metadata, **kwargs)

    return load_video(file, backend="pyav", sample_indices_fn=choose)
