"""Files of splats: headers to the byte, errors within half a step, other programs' files, hostile files."""

import gzip
import json
import math
import os
import random
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plyfile import PlyData

from arguments import PipelineParams
from gaussian_renderer import render
from scene import formats
from scene.formats import arrays, gltf, sog, spz
from scene.gaussian_model import GaussianModel
from tests.test_data_fuzz import spoiled
from utils.files import DataError
from utils.geometry import focal_from_fov
from utils.sh import C0, basis

MODELS = Path(os.environ.get("TILESPLAT_MODELS", "no such folder"))  # models that others trained
CASES = int(os.environ.get("TILESPLAT_FUZZ", 40))
ENDINGS = [".spz", ".compressed.ply", ".sog", ".splat", ".glb"]


def cloud(count=300, degree=3, seed=0, opacity=4.0, scale=(-6.0, 1.0), antialiased=False) -> GaussianModel:
    """Within what all formats can hold."""
    g = torch.Generator().manual_seed(seed)
    low, high = scale
    params = {
        "means": 3 * torch.randn(count, 3, generator=g),
        "sh_dc": torch.rand(count, 1, 3, generator=g) * 4 - 2,
        "sh_rest": torch.rand(count, (degree + 1) ** 2 - 1, 3, generator=g) - 0.5,
        "opacity_logits": opacity * torch.randn(count, 1, generator=g),
        "log_scales": low + (high - low) * torch.rand(count, 3, generator=g),
        "raw_quats": 3 * torch.randn(count, 4, generator=g),
    }
    params["means"][:, 0] = torch.linspace(-5, 5, count)[torch.randperm(count, generator=g)]
    model = GaussianModel(params, degree, degree)
    model.antialiased = antialiased
    return model


def round_trip(model, folder: Path, ending: str, **options) -> GaussianModel:
    formats.write(model, folder / f"a{ending}", **options)
    return formats.read(folder / f"a{ending}")


def in_order(model: GaussianModel, like: GaussianModel) -> arrays.Splats:
    """The rows in the order of `like`: formats sort. Rows are told apart by their first coordinate."""
    splats = arrays.from_model(model, Path("x"))
    order = torch.argsort(torch.argsort(like.means[:, 0]))
    return splats.rows(torch.argsort(model.means[:, 0])[order].numpy())


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max(initial=0))


def turn_between(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of components; q and -q are one rotation."""
    return float(np.minimum(np.abs(a - b).max(1, initial=0), np.abs(a + b).max(1, initial=0)).max(initial=0))


@settings(max_examples=25, deadline=None)
@given(
    count=st.sampled_from([0, 1, 255, 256, 257]),
    degree=st.integers(0, 3),
    seed=st.integers(0, 99),
    version=st.sampled_from([2, 3]),
    scale=st.sampled_from([(-6, 1), (-12, 8)]),
    opacity=st.sampled_from([1, 400]),
)
def test_spz_within_half_a_step(tmp_path_factory, count, degree, seed, version, scale, opacity):
    model = cloud(count, degree, seed, opacity, scale)
    if count:
        model.raw_quats.data[0] = 0
    path = tmp_path_factory.mktemp("spz")
    back = arrays.from_model(round_trip(model, path, ".spz", version=version), path)
    truth = arrays.from_model(model, path)
    farthest = float(np.abs(truth.means).max(initial=0))
    assert worst(back.means, truth.means) <= farthest * 2**-22
    assert worst(back.opacities, truth.opacities) <= 0.5 / 255 + 2e-6
    assert worst(back.sh_dc, truth.sh_dc) <= 0.5 / (255 * 0.15) + 1e-5
    assert worst(back.sh_rest, truth.sh_rest) <= 0.5 / 128 + 1e-6
    inside = np.clip(truth.log_scales, -10, 255 / 16 - 10)
    assert worst(back.log_scales, inside) <= 0.5 / 16 + 1e-5
    assert turn_between(back.quats, truth.quats) <= (0.0025 if version == 3 else 0.12)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_compressed_ply_within_half_a_step(tmp_path, count, degree):
    model = cloud(count, degree)
    back = in_order(round_trip(model, tmp_path, ".compressed.ply"), model)
    truth = arrays.from_model(model, tmp_path)
    size = float(np.ptp(truth.means, axis=0).max()) if count else 0.0
    assert worst(back.means, truth.means) <= 0.5 * size / 1023 + 1e-5
    assert worst(back.log_scales, truth.log_scales) <= 0.5 * 7 / 1023 + 1e-5
    assert worst(back.sh_dc, truth.sh_dc) <= 0.5 * 4 / 255 + 1e-5
    assert worst(back.opacities, truth.opacities) <= 0.5 / 255 + 2e-6
    assert worst(back.sh_rest, truth.sh_rest) <= 0.5 / 32 + 1e-6
    assert turn_between(back.quats, truth.quats) <= 0.003
    assert formats.read(tmp_path / "a.compressed.ply").sh_degree == degree


def test_compressed_ply_leaves_out_sh_that_its_bytes_would_spoil(tmp_path):
    """A byte is 1/64 off at least, so degrees of a hundredth of that are better not there."""
    model = cloud(300, 3)
    model.params["sh_rest"].data[:, 3:] *= 1e-3
    back = in_order(round_trip(model, tmp_path, ".compressed.ply"), model)
    assert back.sh_degree == 1
    assert worst(back.sh_rest, model.params["sh_rest"].detach().numpy()[:, :3]) <= 0.5 / 32 + 1e-6
    model.params["sh_rest"].data[:] = 0
    assert round_trip(model, tmp_path, ".compressed.ply").sh_degree == 0


def test_compressed_ply_keeps_places_in_front_of_a_background(tmp_path):
    """A step is a share of a chunk's box: where chunks jump between near and far, steps are large."""
    model = cloud(10_000, 0)
    g, near = torch.Generator().manual_seed(5), torch.arange(10_000) % 10 > 0
    model.means.data[:] = torch.randn(10_000, 3, generator=g) * torch.where(near, 1.0, 50.0)[:, None]
    found = round_trip(model, tmp_path, ".compressed.ply").means.detach()
    error = torch.cdist(model.means.detach(), found).amin(1)
    assert error[near].median() < 0.001 and error.max() < 0.5


@pytest.mark.parametrize("count", [1, 300])
def test_splat_within_half_a_step(tmp_path, count):
    model = cloud(count, 0)
    back = in_order(round_trip(model, tmp_path, ".splat"), model)
    truth = arrays.from_model(model, tmp_path)
    assert worst(back.means, truth.means) == 0
    assert worst(back.log_scales, truth.log_scales) <= 1e-5
    inside = np.clip(truth.sh_dc, -0.5 / C0, 0.5 / C0)
    assert worst(back.sh_dc, inside) <= 0.5 / 255 / C0 + 1e-5
    assert turn_between(back.quats, truth.quats) <= 1.6 / 128
    assert (tmp_path / "a.splat").stat().st_size == 32 * count


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_glb_keeps_floats(tmp_path, degree):
    model = cloud(257, degree, antialiased=True)
    back = round_trip(model, tmp_path, ".glb")
    truth, got = (arrays.from_model(m, tmp_path) for m in (model, back))
    for name in ("means", "sh_dc", "sh_rest", "quats"):
        assert worst(getattr(truth, name), getattr(got, name)) <= 1e-7, name
    assert worst(truth.log_scales, got.log_scales) <= 2e-6
    assert worst(truth.opacities, got.opacities) <= 2e-6
    assert back.antialiased


@pytest.mark.parametrize("count", [0, 1, 255, 1000, 2100])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_sog_within_its_steps(tmp_path, count, degree):
    model = cloud(count, degree)
    back = in_order(round_trip(model, tmp_path, ".sog"), model)
    truth = arrays.from_model(model, tmp_path)
    assert worst(back.means, truth.means) <= 1e-3 * (1 + np.abs(truth.means).max(initial=0))
    assert worst(back.opacities, truth.opacities) <= 0.5 / 255 + 2e-6
    assert worst(back.log_scales, truth.log_scales) <= 2 * 7 / 255  # k-means has no even steps
    assert worst(back.sh_dc, truth.sh_dc) <= 2 * 4 / 255
    assert turn_between(back.quats, truth.quats) <= 0.012
    if count == 0 or degree == 0:
        assert back.sh_rest.size == 0
    elif count <= 1024:  # each splat has an entry of the palette
        assert worst(back.sh_rest, truth.sh_rest) <= 1 / 200
    else:
        assert np.mean((back.sh_rest - truth.sh_rest) ** 2) < 0.8 * truth.sh_rest.var()


def test_sog_in_a_folder(tmp_path):
    model = cloud(300, 3)
    whole = round_trip(model, tmp_path, ".sog")
    zipfile.ZipFile(tmp_path / "a.sog").extractall(tmp_path / "folder")
    parts = formats.read(tmp_path / "folder/meta.json")
    assert all(torch.equal(whole.params[name], parts.params[name]) for name in whole.params)


@pytest.mark.parametrize("ending", [".ply", ".spz", ".compressed.ply", ".sog", ".glb"])
@pytest.mark.parametrize("antialiased", [False, True])
def test_antialiasing_survives(tmp_path, ending, antialiased):
    assert round_trip(cloud(antialiased=antialiased), tmp_path, ending).antialiased is antialiased


def test_headers_to_the_byte(tmp_path):
    model = cloud(3, 1, antialiased=True)
    model.means.data.clamp_(-0.9, 0.9)[0, 0] = 0.9
    formats.write(model, tmp_path / "a.spz")
    raw = gzip.decompress((tmp_path / "a.spz").read_bytes())
    assert raw[:16] == struct.pack("<IIIBBBB", 0x5053474E, 3, 3, 1, 23, 1, 0)
    assert len(raw) == 16 + 3 * (9 + 1 + 3 + 3 + 4 + 9)
    formats.write(model, tmp_path / "a.glb")
    data = (tmp_path / "a.glb").read_bytes()
    assert struct.unpack_from("<4sII", data) == (b"glTF", 2, len(data)) and data[16:20] == b"JSON"
    formats.write(model, tmp_path / "a.compressed.ply")
    header = (tmp_path / "a.compressed.ply").read_bytes().partition(b"end_header\n")[0].split(b"\n")
    assert header[:4] == [b"ply", b"format binary_little_endian 1.0", b"comment SplatRenderMode: mip",
                          b"element chunk 1"]  # fmt: skip
    assert header[22:27] == [b"element vertex 3"] + [
        b"property uint packed_" + n for n in (b"position", b"rotation", b"scale", b"color")
    ]
    formats.write(model, tmp_path / "a.sog")
    with zipfile.ZipFile(tmp_path / "a.sog") as archive:
        meta = json.loads(archive.read("meta.json"))
        assert archive.read("quats.webp")[12:16] == b"VP8L"
    assert meta["version"] == 2 and meta["count"] == 3 and meta["shN"]["bands"] == 1


def test_spz_of_one_known_splat(tmp_path):
    """Every byte by hand: x right, y up, z back."""
    values = dict(
        means=[[1.0, 0.5, -0.25]], sh_dc=[[[0.0, 1.0, -4.0]]], sh_rest=[[[0.25] * 3, [0.5] * 3, [-1.0] * 3]],
        opacity_logits=[[0.0]], log_scales=[[0.0, -2.0, -20.0]], raw_quats=[[0.0, 0.0, 2.0, 0.0]],
    )  # fmt: skip
    model = GaussianModel({name: torch.tensor(v) for name, v in values.items()}, 1, 1)
    formats.write(model, tmp_path / "a.spz")
    raw = gzip.decompress((tmp_path / "a.spz").read_bytes())
    f = 1 << 22
    assert raw[:16] == struct.pack("<IIIBBBB", 0x5053474E, 3, 1, 1, 22, 0, 0)
    expected = b"".join(struct.pack("<i", v)[:3] for v in (f, -f // 2, f // 4))
    expected += bytes([128, 128, 166, 0, 160, 128, 0])
    expected += struct.pack("<I", 1 << 30)  # of (x, y, z, w) y was the largest
    expected += bytes([96] * 3 + [64] * 3 + [0] * 3)  # signs - - +
    assert raw[16:] == expected


def test_signs_of_sh_when_the_scene_is_turned():
    about_x = "- - +  - + + - +  - + - - + - +"
    about_z = "- + -  + - + - +  - + - + - + -"
    for signs, expected in (((1, -1, -1), about_x), ((-1, -1, 1), about_z)):
        got = arrays.flip_signs(np.array(signs))
        assert "".join("-+"[int(s > 0)] for s in got) == expected.replace(" ", "")


def test_a_flip_turns_colors_and_shapes(tmp_path):
    """Seen from a turned direction, a turned splat looks as before."""
    splats = arrays.from_model(cloud(20), tmp_path)
    for signs in (spz.AXES, gltf.AXES):
        turned = splats.flipped(signs)
        d = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
        before = (basis(3, d)[:, 1:, None] * torch.from_numpy(splats.sh_rest)).sum(1)
        after = (basis(3, d * torch.tensor(signs))[:, 1:, None] * torch.from_numpy(turned.sh_rest)).sum(1)
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ending", ENDINGS)
def test_not_a_number_is_refused(tmp_path, ending):
    model = cloud(20)
    model.log_scales.data[13, 1] = float("nan")
    with pytest.raises(DataError, match=rf"a{ending}: splat 13 has a number"):
        formats.write(model, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("how", ["cut", "bytes", "extremes", "empty", "other", "longer"])
def test_hostile_files(tmp_path, ending, how):
    """Read, or refused in a line that names the file."""
    model = cloud(300, 1 if ending != ".splat" else 0)
    formats.write(model, tmp_path / f"good{ending}")
    good = (tmp_path / f"good{ending}").read_bytes()
    path = tmp_path / f"bad{ending}"
    for case in range(CASES // 4 + 1):
        path.write_bytes(spoiled(good, how, case))
        try:
            read = formats.read(path)
            assert read.finite().all()
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_spoiled_inside_of_compression(tmp_path):
    model = cloud(300, 1)
    formats.write(model, tmp_path / "good.spz")
    good = gzip.decompress((tmp_path / "good.spz").read_bytes())
    for case in range(CASES):
        chance = random.Random(case)
        bad = bytearray(good)
        for _ in range(3):
            bad[chance.randrange(20)] = chance.randrange(256)
        (tmp_path / "bad.spz").write_bytes(gzip.compress(bytes(bad)))
        try:
            assert formats.read(tmp_path / "bad.spz").finite().all()
        except DataError as error:
            assert "bad.spz" in str(error) and "\n" not in str(error)


WRONG = [None, -1, 1e400, 2**70, "x", [], {}, True, [[]], 0.5, "../../etc/passwd", 2**31]


def spoil_a_value(data, chance: random.Random):
    """One value somewhere in a JSON document becomes something else."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = chance.choice(keys)
        if not isinstance(data[key], (dict, list)) or not data[key] or chance.random() < 0.2:
            data[key] = chance.choice(WRONG)
            return
        data = data[key]


def refused_or_read(path: Path) -> None:
    try:
        assert formats.read(path).finite().all()
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_spoiled_meta_of_sog(tmp_path):
    formats.write(cloud(300, 1), tmp_path / "a.sog")
    zipfile.ZipFile(tmp_path / "a.sog").extractall(tmp_path)
    good = (tmp_path / "meta.json").read_text()
    for case in range(5 * CASES):
        meta = json.loads(good)
        spoil_a_value(meta, random.Random(case))
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        refused_or_read(tmp_path / "meta.json")


def test_spoiled_json_of_glb(tmp_path):
    formats.write(cloud(300, 1), tmp_path / "a.glb")
    data = (tmp_path / "a.glb").read_bytes()
    end = 20 + struct.unpack_from("<I", data, 12)[0]
    for case in range(5 * CASES):
        scene = json.loads(data[20:end])
        spoil_a_value(scene, random.Random(case))
        text = json.dumps(scene).encode()
        (tmp_path / "b.glb").write_bytes(
            data[:12] + struct.pack("<I", len(text)) + data[16:20] + text + data[end:]
        )
        refused_or_read(tmp_path / "b.glb")


def test_a_bomb_is_refused(tmp_path):
    """2 billion splats promised, and a stream that would become them: no room is made."""
    header = struct.pack("<IIIBBBB", 0x5053474E, 3, 2**31, 3, 12, 0, 0)
    (tmp_path / "a.spz").write_bytes(gzip.compress(header + bytes(50_000_000)))
    with pytest.raises(DataError, match=r"must hold 2,147,483,648 splats by its header, but has"):
        formats.read(tmp_path / "a.spz")


def test_unknown_ending(tmp_path):
    with pytest.raises(DataError, match=r"a\.obj: must end in one of \.compressed\.ply"):
        formats.read(tmp_path / "a.obj")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_is_not_there(tmp_path, ending):
    with pytest.raises((DataError, FileNotFoundError), match="gone"):
        formats.read(tmp_path / f"gone{ending}")


def test_spz_4(tmp_path):
    pytest.importorskip("zstandard")
    model = cloud(300, 3, antialiased=True)
    three, four = (round_trip(model, tmp_path, ".spz", version=version) for version in (3, 4))
    assert four.antialiased and all(torch.equal(three.params[n], four.params[n]) for n in three.params)


# Files of other programs, and other programs on our files


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the models that others trained")
def test_biker_is_the_same_in_both_formats():
    pytest.importorskip("zstandard")
    packed = formats.read(MODELS / "biker.compressed.ply")
    other = formats.read(MODELS / "biker.spz")
    assert len(packed) == len(other) == 152_746
    a, b = (np.sort(m.means.detach().numpy(), axis=0) for m in (packed, other))
    assert worst(a, b) < 2e-3  # the 12-bit grid is 0.00024, a chunk's step up to 0.003
    assert worst(a.mean(0), b.mean(0)) < 1e-4
    assert abs(packed.opacities.mean() - other.opacities.mean()) < 1e-3
    assert (packed.log_scales.mean(0) - other.log_scales.mean(0)).abs().max() < 2e-3


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the models that others trained")
@pytest.mark.parametrize(
    "ending, options, least, most_bytes",
    [
        (".spz", {"quality": "small"}, 34, 32),
        (".spz", {"quality": "best"}, 48, 51),
        (".compressed.ply", {}, 40, 62),
        (".sog", {}, 36, 40),
        (".glb", {}, 90, 241),
    ],
)
def test_pictures_of_a_real_model(tmp_path, ending, options, least, most_bytes):
    """PSNR of the converted model's picture against that of the PLY, from farther than the near plane."""
    model = formats.read(MODELS / "plush_dog_29999_clean.ply")
    camera = far_camera(model)
    picture = drawn(model, camera)
    assert picture.std() > 0.1, "a blank picture would pass"
    error = (drawn(round_trip(model, tmp_path, ending, **options), camera) - picture).square().mean()
    assert -10 * error.log10() >= least
    assert (tmp_path / f"a{ending}").stat().st_size <= most_bytes * len(model)


def far_camera(model: GaussianModel) -> SimpleNamespace:
    view = torch.eye(4)
    view[:3, 3] = torch.tensor([0.0, 0.0, 1.0]) - model.means.detach().median(0).values
    focal = focal_from_fov(math.radians(16), 400)
    K = torch.tensor([[focal, 0, 200], [0, focal, 200], [0, 0, 1]])
    return SimpleNamespace(world_to_camera=view, K=K, width=400, height=400)


@torch.no_grad()
def drawn(model: GaussianModel, camera: SimpleNamespace) -> torch.Tensor:
    return render(camera, model, PipelineParams(), torch.zeros(3)).image.clamp(0, 1)


def decoded_by_another(path: Path, kind: str, folder: Path) -> GaussianModel:
    forge = pytest.importorskip("gaussforge").GaussForge()
    result = forge.convert(path.read_bytes(), kind, "ply")
    assert "error" not in result, result
    (folder / "theirs.ply").write_bytes(result["data"])
    return formats.read(folder / "theirs.ply")


@pytest.mark.parametrize(
    "ending, kind",
    [(".spz", "spz"), (".compressed.ply", "compressed.ply"), (".sog", "sog"), (".splat", "splat")],
)
def test_another_decoder_reads_the_same(tmp_path, ending, kind):
    model = cloud(700, 3 if ending != ".splat" else 0, opacity=1)
    ours = round_trip(model, tmp_path, ending)
    theirs = arrays.from_model(decoded_by_another(tmp_path / f"a{ending}", kind, tmp_path), tmp_path)
    if ending == ".spz":  # it does not turn the axes, so it sees those of the file
        theirs = theirs.flipped(spz.AXES)
    ours = arrays.from_model(ours, tmp_path)
    for name, most in [("means", 2e-5), ("log_scales", 1e-3), ("sh_dc", 1e-4), ("opacities", 1e-3)]:
        assert worst(getattr(ours, name), getattr(theirs, name)) <= most, name
    assert turn_between(ours.quats, theirs.quats) <= 2e-3
    assert ours.sh_rest.shape == theirs.sh_rest.shape and worst(ours.sh_rest, theirs.sh_rest) <= 1e-2


def test_codebook_is_ascending_and_near():
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    codebook = sog._codebook_for(values)
    assert np.all(np.diff(codebook) >= 0) and len(codebook) == 256
    assert np.abs(codebook[sog._nearest(codebook, values)] - values).mean() < 0.01


def test_compressed_ply_under_the_name_of_ply(tmp_path):
    formats.write(cloud(), tmp_path / "a.compressed.ply")
    os.rename(tmp_path / "a.compressed.ply", tmp_path / "b.ply")
    assert "packed_color" in PlyData.read(str(tmp_path / "b.ply"))["vertex"].data.dtype.names
    assert len(formats.read(tmp_path / "b.ply")) == 300
