"""Small video files: frames that are grey, from black to white."""

from pathlib import Path

import av
import numpy as np


__all__ = ["STEP", "write_clip"]

STEP = 25  # from the grey of a frame to that of the next


def write_clip(file: Path, num_frames: int = 10, rate: int = 4, size: tuple[int, int] = (96, 128)) -> Path:
    """A file of `num_frames` frames, `rate` a second; the name says what kind."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libvpx" if file.suffix == ".webm" else "mpeg4", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            frame = np.full((*size, 3), STEP * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file
