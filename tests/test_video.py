"""Films: they hold the frames that went in, at their times, in Pillow's eyes and in a browser's."""

import base64
import io
import os
import struct
import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence

from utils import video
from utils.files import DataError


def frames(count: int, width: int = 64, height: int = 48):
    """A bright bar that moves over a gradient: every frame is told from the others."""
    y, x = np.mgrid[0:height, 0:width]
    for k in range(count):
        at = (k + 0.5) * width / count
        bar = 160 * np.exp(-(((x - at) / 6) ** 2))
        yield np.stack([40 + bar, 60 + 60 * y / height, 50 + 80 * x / width], -1).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.std() > 10
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean())))


def as_avif(mp4: bytes) -> bytes:
    """The header as it was: then Pillow decodes it."""
    data = mp4.replace(b"ftypiso6", b"ftypavis", 1).replace(b"vide", b"pict", 1)
    return data.replace(b"free", b"meta", 1)


def decoded(path) -> list[np.ndarray]:
    data = path.read_bytes()
    film = Image.open(io.BytesIO(as_avif(data) if path.suffix == ".mp4" else data))
    return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]


@pytest.mark.parametrize("size", [(64, 48), (121, 77)])
@pytest.mark.parametrize("ending, least", [("mp4", 33), ("webp", 33), ("gif", 25)])
def test_every_frame_is_there(tmp_path, ending, least, size):
    path = tmp_path / f"a.{ending}"
    video.write(frames(12, *size), 12, path, 24, "av1")
    found = decoded(path)
    assert len(found) == 12
    for shown, truth in zip(found, frames(12, *size)):
        assert psnr(shown, truth) >= least


@pytest.mark.parametrize("fps", [24, 29.97, 60])
def test_the_clock_of_an_mp4(tmp_path, fps):
    video.write(frames(5), 5, tmp_path / "a.mp4", fps, "av1")
    data = (tmp_path / "a.mp4").read_bytes()
    boxes = {name: data[start:end] for name, start, end in video._boxes(data, 0, len(data))}
    assert boxes[b"ftyp"][:4] == b"iso6" and boxes[b"hdlr"][8:12] == b"vide" and b"meta" not in boxes
    for name in (b"mvhd", b"mdhd"):
        clock, duration = struct.unpack(">IQ", boxes[name][20:32])  # version 1
        assert boxes[name][0] == 1 and duration / clock == pytest.approx(5 / fps, rel=1e-6)
    assert struct.unpack(">Q", boxes[b"tkhd"][28:36]) == struct.unpack(">Q", boxes[b"elst"][8:16]) == (5000,)


def test_a_single_frame_is_a_film_of_its_length(tmp_path):
    video.write(frames(1), 1, tmp_path / "a.mp4", 30, "av1")
    first, *rest = decoded(tmp_path / "a.mp4")
    assert len(rest) == 1 and psnr(first, rest[0]) > 40
    assert psnr(first, next(frames(1))) > 33
    for ending in ("webp", "gif"):
        video.write(frames(1), 1, tmp_path / f"a.{ending}", 30)
        assert len(decoded(tmp_path / f"a.{ending}")) == 1


def test_frames_are_not_kept(tmp_path):
    """At no time are many of them alive."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    class Told(np.ndarray):
        def __hash__(self):
            return id(self)

    def counted():
        nonlocal most
        for frame in frames(60):
            told = frame.view(Told)
            alive.add(told)
            most = max(most, len(alive))
            yield told

    video.write(counted(), 60, tmp_path / "a.mp4", 24, "av1")
    assert 0 < most <= 4


def test_targets(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"a.avi: must end in one of .mp4"):
        video.check_target(tmp_path / "a.avi", "auto")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match="needs the program ffmpeg"):
        video.check_target(tmp_path / "a.mp4", "h264")
    video.check_target(tmp_path / "a.mp4", "auto")
    video.check_target(tmp_path / "frames", "auto")


def fake_ffmpeg(folder, code: str, monkeypatch) -> None:
    path = folder / "ffmpeg"
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_ffmpeg_gets_every_frame(tmp_path, monkeypatch):
    code = "open(sys.argv[-1], 'wb').write(' '.join(sys.argv).encode() + b'|' + sys.stdin.buffer.read())"
    fake_ffmpeg(tmp_path, code, monkeypatch)
    assert video.chosen_codec("auto") == "h264"
    video.write(frames(4, 65), 4, tmp_path / "a.mp4", 29.97)
    told, raw = (tmp_path / "a.mp4").read_bytes().split(b"|", 1)
    assert b"-s 65x48" in told and b"-r 29.97" in told and b"libx264" in told
    assert raw == b"".join(frame.tobytes() for frame in frames(4, 65))


def test_ffmpeg_that_fails_is_told(tmp_path, monkeypatch):
    fake_ffmpeg(tmp_path, "sys.exit('Unknown encoder libx264')", monkeypatch)
    with pytest.raises(DataError, match="ffmpeg did not write it: Unknown encoder"):
        video.write(frames(30, 640, 480), 30, tmp_path / "a.mp4", 24)
    assert not (tmp_path / "a.mp4").exists()


SEEK = """async ([data, time]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const video = document.createElement('video');
  const done = what => new Promise((yes, no) => {
    video.addEventListener(what, yes, {once: true}); video.onerror = () => no(video.error.message); });
  const loaded = done('loadeddata');
  video.src = URL.createObjectURL(new Blob([bytes], {type: 'video/mp4'}));
  await loaded;
  const sought = done('seeked'); video.currentTime = time; await sought;
  const canvas = document.createElement('canvas');
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext('2d');
  for (let tries = 0; tries < 200; tries++) {  // a busy machine shows the picture after it says so: black
    context.drawImage(video, 0, 0);
    if (context.getImageData(0, 0, canvas.width, canvas.height).data.some((v, i) => i % 4 < 3 && v)) break;
    await new Promise(yes => setTimeout(yes, 20));
  }
  return [video.duration, canvas.toDataURL().split(',')[1]];
}"""


@pytest.mark.parametrize("fps, size", [(24, (64, 48)), (29.97, (121, 77))])
def test_chromium_plays_and_seeks(browser, tmp_path, fps, size):
    video.write(frames(24, *size), 24, tmp_path / "a.mp4", fps, "av1")
    data = base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    truth = list(frames(24, *size))
    page = browser.new_page()
    for k in (0, 5, 11, 23):
        duration, picture = page.evaluate(SEEK, [data, (k + 0.5) / fps])
        assert abs(duration - 24 / fps) < 1 / fps
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
        scores = [psnr(shown, frame) for frame in truth]
        assert int(np.argmax(scores)) == k and scores[k] >= 33
