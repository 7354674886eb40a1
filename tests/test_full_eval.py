"""full_eval.py: which runs a command means, and a table that does not depend on interruptions."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import arguments
import full_eval
from benchmarks.published import PUBLISHED, SETS
from tests import tiny_scenes
from training import resume

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--device cpu --iterations 60 --checkpoint_every 10 --N_rand 64 --coarse_iters 20 --pg_scale 5"
SHORT += " --random_init 2000 --num_voxels_coarse 4000 --num_voxels 8000 --rgbnet_width 8"


def jobs(*words: object) -> list[full_eval.Job]:
    return full_eval.jobs(full_eval.parse([str(word) for word in words]))


def test_standard_sets_are_trained_as_published(tmp_path):
    for scene in ("garden", "bonsai", "notes"):
        (tmp_path / "360" / scene).mkdir(parents=True)
    (tmp_path / "synthetic/lego").mkdir(parents=True)
    found = jobs("-m360", tmp_path / "360", "--nerfsynthetic", tmp_path / "synthetic")
    flags = {job.scene: job.train_flags() for job in found}
    assert list(flags) == ["garden", "bonsai", "lego"]
    assert flags["garden"][-2:] == ["-i", "images_4"] and flags["bonsai"][-2:] == ["-i", "images_2"]
    assert flags["lego"][-1] == "-w" and all("--eval" in words for words in flags.values())


def test_rows_are_all_combinations(tmp_path):
    (tmp_path / "a").mkdir()
    found = jobs(
        "--scenes", f"{tmp_path}/a:-w", "--methods", "gaussians", "dvgo", "--presets", "published", "mcmc",
        "--settings", "=", "aa=--antialiasing", "--seeds", "0", "1", "--flags=--iterations 9", "-o", tmp_path,
    )  # fmt: skip
    assert len(found) == len({job.folder for job in found}) == (2 + 1) * 2 * 2
    assert next(job for job in found if job.preset and job.setting and job.seed).flags == [
        "-w", "--strategy", "mcmc", "--antialiasing", "--iterations", "9",
    ]  # fmt: skip


def test_presets_are_those_of_train_py(tmp_path):
    (tmp_path / "a").mkdir()
    for name in set(arguments.PRESETS) - {"published"}:
        (job,) = jobs("--scenes", tmp_path / "a", "--presets", name)
        assert job.flags == ["--preset", name]


def test_a_matrix_says_the_same_as_flags(tmp_path):
    (tmp_path / "a").mkdir()
    matrix = tmp_path / "m.json"
    matrix.write_text(json.dumps({"scenes": [f"{tmp_path}/a"], "methods": ["nerf"], "seeds": [3]}))
    assert jobs("--matrix", matrix) == jobs("--scenes", tmp_path / "a", "--methods", "nerf", "--seeds", 3)
    assert jobs("--matrix", matrix, "--seeds", 4)[0].seed == 4


def test_what_is_wrong_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "m.json").write_text('{"scene": []}')
    with pytest.raises(SystemExit):
        full_eval.main(["--matrix", str(tmp_path / "m.json")])
    assert "scene is not an option" in capsys.readouterr().err
    for wrong in ({"scenes": "a"}, {"seeds": ["1"]}, {"flags": 3}, {"llff": ["a"]}):
        (tmp_path / "m.json").write_text(json.dumps(wrong))
        with pytest.raises(SystemExit):
            full_eval.main(["--matrix", str(tmp_path / "m.json")])
        assert f"{next(iter(wrong))} must be as on the command line" in capsys.readouterr().err
    for words, reason in (
        ([], "nothing to run"),
        (["--scenes", tmp_path / "b"], "must be the folder of a data set"),
        (["-db", tmp_path], "must have scenes of Deep Blending, such as drjohnson"),
        (["--scenes", tmp_path / "a", "--presets", "quick"], "must be name=flags or published"),
        (["--scenes", tmp_path / "a", tmp_path / "a"], "two rows have the folder"),
    ):
        assert full_eval.main([str(word) for word in words]) == 1
        assert reason in capsys.readouterr().err


def test_published_scores_are_of_scenes_that_are_known():
    for data_set, scene, _ in PUBLISHED:
        assert scene == "mean" or scene in SETS[data_set].scenes
    values = [PUBLISHED["mipnerf360", scene, "gaussians"] for scene in SETS["mipnerf360"].scenes]
    means = [sum(column) / len(values) for column in zip(*values)]
    assert means == pytest.approx(PUBLISHED["mipnerf360", "mean", "gaussians"], abs=6e-3)


def test_means_stand_beside_published_ones(tmp_path):
    scenes = SETS["deepblending"].scenes
    for scene in scenes:
        (tmp_path / scene).mkdir()
    found = jobs("-db", tmp_path)
    for k, job in enumerate(found):
        job.row = {"PSNR": 28.0 + 2 * k, "SSIM": 0.9, "LPIPS": None}
    head, *lines = full_eval.rows(found)
    mean = dict(zip(head, lines[-1]))
    assert mean["scene"] == "mean of Deep Blending" and mean["PSNR"] == 29 and mean["LPIPS"] is None
    assert mean["published PSNR"] == 29.41
    found[0].row = {}
    assert len(full_eval.rows(found)) == 3  # no mean of a part


def test_each_gpu_gets_a_run(monkeypatch):
    monkeypatch.setattr(full_eval.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert full_eval.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert full_eval.gpus() == ["3", "GPU-5a"]
    monkeypatch.setattr(full_eval.torch.cuda, "device_count", lambda: 0)
    assert full_eval.gpus() == [None]


def scores(folder: Path) -> list[list[str]]:
    """The table without what depends on how busy the machine is."""
    with open(folder / "table.csv", newline="") as file:
        return [[cell for name, cell in row.items() if name not in ("training s", "ms a view", "peak MB")]
                for row in csv.DictReader(file)]  # fmt: skip


def killed(command: list[str], run: Path, how: signal.Signals) -> None:
    """Start it, and kill it as soon as this run has a checkpoint: any, for one makes room for the next."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not any(run.glob("chkpnt*.pth")) and time.monotonic() < end:
            assert process.poll() is None, "it ended too soon to be killed"
            time.sleep(0.02)
        assert any(run.glob("chkpnt*.pth"))
        process.send_signal(how)


def test_killed_twice_it_ends_with_the_same_table(tmp_path, capsys):
    """And a run that fails leaves the others."""
    data, bad = tiny_scenes.blender_scene(tmp_path / "one"), tmp_path / "bad"
    bad.mkdir()
    same = ["--methods", "gaussians", "dvgo", f"--flags={SHORT}", "--scenes", str(data)]
    assert full_eval.main([*same, str(bad), "-o", str(tmp_path / "whole")]) == 1
    said = capsys.readouterr()
    assert "2 of 4 runs failed" in said.err and "bad_gaussians_seed0.log" in said.err
    assert "| one   | gaussians |" in said.out and len(scores(tmp_path / "whole")) == 4
    cut = tmp_path / "cut"
    command = [sys.executable, "full_eval.py", *same, "-o", str(cut)]
    killed(command, cut / "one_gaussians_seed0", signal.SIGTERM)
    killed(command, cut / "one_dvgo_seed0", signal.SIGKILL)
    assert resume.is_busy(cut / "one_dvgo_seed0"), "nobody has told this run"
    before = (cut / "one_gaussians_seed0.json").read_bytes()
    assert full_eval.main([*same, "-o", str(cut)]) == 0
    assert "one dvgo seed 0: the run that an earlier call started is still at it" in capsys.readouterr().out
    assert (cut / "one_gaussians_seed0.json").read_bytes() == before, "what had ended is not done again"
    assert scores(cut) == scores(tmp_path / "whole")[:2]
    assert (cut / "table.md").read_text().count("\n") == 4
    pages = re.findall(r'href="([^"]+)"', page := (cut / "report.html").read_text())
    assert pages == ["one_gaussians_seed0/report.html", "one_dvgo_seed0/report.html"]
    assert all((cut / name).is_file() for name in pages)
    psnr = json.loads((cut / "one_dvgo_seed0/results.json").read_text())["ours_60"]["PSNR"]
    assert f"<td>{psnr:.3f}</td>" in page and page.count("<img") == 3, "photo, gaussians, dvgo"
    assert "http" not in re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", page)
    assert full_eval.main([*same, "--settings", "=-w", "-o", str(cut)]) == 1
