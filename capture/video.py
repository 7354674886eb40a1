"""Frames of a video, chosen by sharpness: the video is cut into equal stretches, and each lends its best."""

import os
from pathlib import Path

from PIL import Image

from utils.files import DataError
from utils.image import sharpness
from utils.terminal import progress

ENDINGS = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp"}


def extract_frames(video: Path, folder: Path, count: int) -> list[Path]:
    """Write about `count` frames as folder/frame_00001.jpg and so on."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # we say ourselves what is wrong
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{video}: reading videos needs the package opencv-python-headless; "
            "`make setup-capture` installs it"
        ) from None
    capture = cv2.VideoCapture(str(video))  # turns frames upright by itself
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    if total < 2:
        raise DataError(f"{video}: cannot be read as a video")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("frame_*.jpg"):
        old.unlink()

    # The header's number of frames can be wrong, so stretches end by time, and the last is what is left.
    stretch = max(total / count, 1.0)
    written, best, best_sharpness = [], None, -1.0
    with progress(total=total, desc="Looking for sharp frames") as bar:
        for number in range(1 << 30):
            there, frame = capture.read()
            if number and (not there or number >= (len(written) + 1) * stretch) and best is not None:
                path = folder / f"frame_{len(written) + 1:05d}.jpg"
                Image.fromarray(best[..., ::-1]).save(path, quality=95, subsampling=0)
                written.append(path)
                best, best_sharpness = None, -1.0
            if not there:
                break
            value = sharpness(frame)
            if value > best_sharpness:
                best, best_sharpness = frame, value
            bar.update()
    capture.release()
    if not written:
        raise DataError(f"{video}: has no frame that can be decoded")
    return written
