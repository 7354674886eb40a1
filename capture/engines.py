"""The four steps of structure from motion, by pycolmap or by a COLMAP executable of any version since 3.8.

Each step is a process of its own, given as a list of words, never through a shell. What it says goes to a log
file; how far it is is read from there or from its database.
"""

import importlib.util
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils.files import DataError
from utils.terminal import progress

MAX_FEATURES = 4096  # of a photo; COLMAP's 8192 take up to 1.7 times as long to match, and place no better
TOLERANCE = 1e-6  # of global bundle adjustment, the original's
WORKER = Path(__file__).with_name("worker.py")


class Engine:
    """Steps by pycolmap. Paths: the photos as they are prepared, the database, what is said."""

    def __init__(self, photos: Path, database: Path, log: Path, gpu: bool):
        self.photos, self.database, self.log, self.gpu = photos, database, log, gpu
        self.took: dict[str, float] = {}  # seconds of each step
        self.name = self._check()

    def _check(self) -> str:
        if importlib.util.find_spec("pycolmap") is None:
            raise DataError(
                "pycolmap is not installed: `make setup-capture` installs it. "
                "Or give --colmap_executable with a COLMAP of your own"
            )
        from importlib.metadata import version

        return f"pycolmap {version('pycolmap')}"

    def features(self, groups: list[list[str]], model: str, threads: int, max_size: int) -> None:
        self._step(
            "features",
            photos=self.photos,
            database=self.database,
            groups=groups,
            model=model,
            threads=threads,
            max_size=max_size,
            max_features=MAX_FEATURES,
            gpu=self.gpu,
            watch=("Finding features", sum(map(len, groups)), self._rows("keypoints")),
        )

    def match(self, matcher: str, vocab_tree: str, pairs: int) -> None:
        self._step(
            "match",
            database=self.database,
            matcher=matcher,
            vocab_tree=vocab_tree,
            gpu=self.gpu,
            watch=("Matching pairs", pairs, self._rows("matches")),
        )

    def reconstruct(self, mapper: str, count: int, models: Path, seed: int) -> None:
        models.mkdir(parents=True)
        self._step(
            "reconstruct",
            database=self.database,
            photos=self.photos,
            output=models,
            mapper=mapper,
            tolerance=TOLERANCE,
            seed=seed,
            watch=("Registering photos", count, self._registered),
        )

    def undistort(self, model: Path, output: Path, threads: int, count: int) -> None:
        self._step(
            "undistort",
            photos=self.photos,
            model=model,
            output=output,
            threads=threads,
            watch=("Undistorting", count, lambda: _files(output / "images")),
        )

    def _step(self, step: str, watch: tuple, **options) -> None:
        words = json.dumps(options, default=str)
        self._run([sys.executable, str(WORKER), step, words], step, watch)

    def _run(self, words: list[str], name: str, watch: tuple) -> None:
        start = time.monotonic()
        run(words, name, self.log, *watch)
        self.took[watch[0]] = self.took.get(watch[0], 0.0) + time.monotonic() - start

    # How far a step is

    def _rows(self, table: str) -> Callable[[], int]:
        def count() -> int:
            try:
                with sqlite3.connect(
                    f"{self.database.resolve().as_uri()}?mode=ro", uri=True, timeout=0.1
                ) as db:
                    return db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
            except sqlite3.Error:
                return 0

        return count

    def _registered(self) -> int:
        """The largest model so far, as the log says: `Registering image #12 (34)` and newer forms of it."""
        said = r"Registering (?:image|frame) #\d+ \((?:num_reg_frames=)?(\d+)\)"
        counts = re.findall(said, _of_this_step(self.log))
        return max(map(int, counts), default=0)


class Executable(Engine):
    """Steps by a COLMAP executable, whose options changed their names over time: its own help is asked."""

    def __init__(self, executable: str, *arguments):
        self.executable = executable
        super().__init__(*arguments)

    def _check(self) -> str:
        found = re.search(r"COLMAP (\d[\w.]*)", self._help("help"))
        if found is None:
            raise DataError(f"{self.executable}: does not answer `help` as COLMAP does")
        return found.group(0)

    def features(self, groups: list[list[str]], model: str, threads: int, max_size: int) -> None:
        known = self._help("feature_extractor", "-h")
        options = ["--database_path", self.database, "--image_path", self.photos]
        options += ["--ImageReader.camera_model", model, "--ImageReader.single_camera", "1"]
        options += self._known(known, ("FeatureExtraction", "SiftExtraction"), "use_gpu", int(self.gpu))
        options += self._known(known, ("FeatureExtraction", "SiftExtraction"), "num_threads", threads)
        options += self._known(known, ("FeatureExtraction", "SiftExtraction"), "max_image_size", max_size)
        options += self._known(known, ("SiftExtraction",), "max_num_features", MAX_FEATURES)
        total = sum(map(len, groups))
        names = self.log.with_name("photos.txt")
        for group in groups:
            names.write_text("".join(f"{name}\n" for name in group), encoding="utf-8")
            watch = ("Finding features", total, self._rows("keypoints"))
            self._command("feature_extractor", [*options, "--image_list_path", names], *watch)

    def match(self, matcher: str, vocab_tree: str, pairs: int) -> None:
        command = f"{matcher}_matcher"
        known = self._help(command, "-h")
        options = ["--database_path", self.database]
        options += self._known(known, ("FeatureMatching", "SiftMatching"), "use_gpu", int(self.gpu))
        if matcher == "sequential":
            options += ["--SequentialMatching.overlap", 10]
            if vocab_tree:
                options += ["--SequentialMatching.loop_detection", 1]
                options += ["--SequentialMatching.vocab_tree_path", vocab_tree]
        if matcher == "vocab_tree":
            options += ["--VocabTreeMatching.vocab_tree_path", vocab_tree]
        self._command(command, options, "Matching pairs", pairs, self._rows("matches"))

    def reconstruct(self, mapper: str, count: int, models: Path, seed: int) -> None:
        models.mkdir(parents=True)
        options = ["--database_path", self.database, "--image_path", self.photos, "--output_path", models]
        watch = ("Registering photos", count, self._registered)
        if mapper == "global":
            self._command("global_mapper", options, *watch)
            return
        options += self._known(self._help("mapper", "-h"), ("", "Mapper"), "random_seed", seed)
        options += ["--Mapper.ba_global_function_tolerance", TOLERANCE]
        self._command("mapper", options, *watch)

    def undistort(self, model: Path, output: Path, threads: int, count: int) -> None:
        known = self._help("image_undistorter", "-h")
        options = ["--image_path", self.photos, "--input_path", model, "--output_path", output]
        options += ["--output_type", "COLMAP"]
        options += self._known(known, ("",), "jpeg_quality", 95) + self._known(
            known, ("",), "num_threads", threads
        )
        watch = ("Undistorting", count, lambda: _files(output / "images"))
        self._command("image_undistorter", options, *watch)

    def _command(
        self, command: str, options: list, description: str, total: int, done: Callable[[], int]
    ) -> None:
        self._run([self.executable, command, *map(str, options)], command, (description, total, done))

    def _known(self, known: str, groups: tuple[str, ...], name: str, value) -> list:
        """The option under the first of its names that this version has; nothing if it has none."""
        for option in (f"--{group}.{name}" if group else f"--{name}" for group in groups):
            if re.search(rf"{re.escape(option)}\b", known):
                return [option, str(value)]
        return []

    def _help(self, *words: str) -> str:
        try:
            result = subprocess.run(
                [self.executable, *words], capture_output=True, text=True, errors="replace", timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"{self.executable}: cannot be run as COLMAP ({error})") from None
        return result.stdout + result.stderr


def run(
    words: list[str], name: str, log: Path, description: str, total: int, done: Callable[[], int]
) -> None:
    """Run a program with a progress bar. It is ended when we are; when it fails, its last words are told."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(words)}\n")
        file.flush()
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            with progress(total=total, desc=description) as bar:
                while process.poll() is None:
                    time.sleep(0.3)
                    bar.update(min(max(done(), bar.n), total) - bar.n)
                if process.returncode == 0:
                    bar.update(min(max(done(), bar.n), total) - bar.n)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        lines = [line for line in _of_this_step(log).splitlines()[1:] if line.strip()]
        told = "\n  ".join(line[:300] for line in lines[-5:])
        raise DataError(f"{name} ended with {process.returncode}; its last words, in {log}:\n  {told}")


def _of_this_step(log: Path) -> str:
    """The end of the log: the command, and what it said."""
    return log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*")) if folder.is_dir() else 0
