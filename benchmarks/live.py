"""What looking at a run costs it: nobody there, a page at rest, a page that moves; by turns.

    python -m benchmarks.live -s data/fox --iterations 3000 --seconds 120

Each turn trains once, in this process, always with the same seed. The page is a process that asks view.py for
what a browser asks for: the state of the run once a second, and pictures of a window of 1280x720. Seconds are
those of the optimization loop; core seconds are all that train.py and view.py computed in the meantime.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import train
from arguments import number
from scene.folder import ModelFolder
from training.table import Cell, to_markdown
from utils.files import read_json

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1280, 720  # of the window
WARM_UP = 50  # iterations
HEAD = ["way", "turns", "loop s, least", "median", "more", "core s of train.py", "of view.py", "pictures"]


class Way(NamedTuple):
    name: str
    flags: tuple[str, ...] = ()
    page: bool = False
    moves: bool = False


WAYS = (
    Way("no viewer", ("--disable_viewer",)),
    Way("nobody looks"),
    Way("--view, no browser", ("--view",)),
    Way("a page at rest", page=True),
    Way("a page that moves", page=True, moves=True),
)


class Turn(NamedTuple):
    loop: float
    own: float  # seconds of cores
    served: float
    pictures: int


def look(address: str, moves: bool, seen) -> None:
    """What the page asks for, until it is ended: see server.js."""
    url, token = address.split("?")
    told, picture = 0.0, 0.0  # when it is time for the next
    size = f"w={WIDTH // 2}&h={HEIGHT // 2}&still=0" if moves else f"w={WIDTH}&h={HEIGHT}&still=1"
    while True:
        with suppress(OSError):  # between two runs nobody answers
            if time.monotonic() >= told:
                told = time.monotonic() + 1
                urllib.request.urlopen(f"{url}state?{token}").read()
            if time.monotonic() >= picture:
                camera = seen.value % 7 if moves else 0
                asked = f"frame?{token}&camera={camera}&{size}&source=training"
                with urllib.request.urlopen(url + asked) as reply:
                    reply.read()
                    picture = time.monotonic() + (0.0 if moves else float(reply.headers["X-Next"]))
                seen.value += 1
        time.sleep(0.005 if moves else 0.05)


@contextmanager
def page(address: str, moves: bool) -> Iterator:
    """A process of its own; gives the number of its pictures."""
    spawn = multiprocessing.get_context("spawn")
    seen = spawn.Value("i", 0)
    client = spawn.Process(target=look, args=(address, moves, seen), daemon=True)
    client.start()
    try:
        yield seen
    finally:
        client.kill()
        client.join()


@contextmanager
def served(folder: Path) -> Iterator[tuple[int, str]]:
    """view.py's process and address."""
    command = [sys.executable, ROOT / "view.py", "-m", folder, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.pid, re.findall(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.wait()


def cores(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def trained(folder: Path, flags: list[str]) -> float:
    """Seconds of the loop."""
    assert train.main(["-m", str(folder), "--port", "0", "--overwrite", "--quiet", *flags]) == 0
    return read_json(ModelFolder(folder).summary)["optimization_seconds"]


def turn(way: Way, folder: Path, flags: list[str], pid: int, address: str) -> Turn:
    with page(address, way.moves) if way.page else nullcontext() as seen:
        own, others = cores(os.getpid()), cores(pid)
        loop = trained(folder, [*way.flags, *flags])
        return Turn(loop, cores(os.getpid()) - own, cores(pid) - others, seen.value if seen else 0)


def row(way: Way, turns: list[Turn], base: list[Turn]) -> list[Cell]:
    """Medians. More: than without a viewer, in the same round."""
    more = statistics.median(100 * (t.loop / b.loop - 1) for t, b in zip(turns, base))
    loop, own, others, pictures = (statistics.median(part) for part in zip(*turns))
    least = f"{min(t.loop for t in turns):.3f}"
    computed = f"{own:.2f}", f"{others:.2f}"
    return [way.name, len(turns), least, f"{loop:.3f}", f"{more:+.1f} %", *computed, f"{pictures:.0f}"]


def turns_of(source: str, iterations: int, seconds: float, flags: list[str]) -> dict[Way, list[Turn]]:
    found: dict[Way, list[Turn]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name, "m"), time.monotonic()
        trained(folder, ["-s", source, "--iterations", str(WARM_UP), "--disable_viewer", *flags])
        flags = ["-s", source, "--iterations", str(iterations), *flags]
        with served(folder) as view:
            for way in cycle(WAYS):
                started = time.monotonic()
                found[way].append(turn(way, folder, flags, *view))
                print(way.name, *(f"{part:.3f}" for part in found[way][-1]), flush=True)
                if 2 * time.monotonic() - started - begun > seconds:
                    return found
    return found


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("-s", "--source_path", required=True)
    parser.add_argument("--iterations", type=number(int, 1, 10**9), default=3000)
    parser.add_argument("--seconds", type=number(float, 1, 86400), default=120.0, help="turns end before")
    parser.add_argument("--json", type=Path, help="a file for all turns")
    args, flags = parser.parse_known_args()
    os.environ["BROWSER"] = "true"  # the program that does nothing
    found = turns_of(args.source_path, args.iterations, args.seconds, flags)
    if args.json:
        args.json.write_text(json.dumps({way.name: turns for way, turns in found.items()}))
    rows = [row(way, turns, found[WAYS[0]]) for way, turns in found.items() if turns]
    print("\n" + to_markdown([HEAD, *rows]))


if __name__ == "__main__":
    main()
