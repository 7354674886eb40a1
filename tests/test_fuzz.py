"""Files from others with random damage: read, or refused in a line that names the file. Nothing else happens:
no crash, no code, no memory beyond what the file has.

TILESPLAT_FUZZ=10000 takes that many of each kind.
"""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData

from arguments import (
    ConfigError,
    ModelParams,
    OptimizationParams,
    PipelineParams,
    RunParams,
    parse_cfg_args,
    saved_options,
)
from per_view import Exposure
from scene.folder import ModelFolder
from scene.formats.ply import load_ply, read_points, save_ply
from tests.test_checkpoint import fresh, original_checkpoint, toy_training
from tests.test_data_fuzz import spoiled
from tests.test_gaussians import make_model
from training import checkpoint
from training.report import RunHistory, Scores
from utils.files import DataError

CASES = int(os.environ.get("TILESPLAT_FUZZ", 150))
ROOM = 250 << 20  # bytes for one file of some thousand; 130 MB are what PyTorch imports for odd tensors
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_resume", "tests.test_fuzz", "torch.utils.tensorboard"])
HOWS = ["cut", "bytes", "bytes", "bytes", "extremes", "words", "words", "empty", "other", "longer"]
CPU = torch.device("cpu")
GROUPS = (ModelParams, OptimizationParams, PipelineParams, RunParams)


# A kind of file: make(folder) writes a good one and returns its path, read(path) is what programs do with it.


def make_ply(folder: Path, form: str, degree: int) -> Path:
    """Properties in another order than ours."""
    path = folder / "m.ply"
    save_ply(make_model(7, sh_degree=degree), path)
    data = PlyData.read(str(path))
    table = data["vertex"].data
    names = random.Random(degree).sample(table.dtype.names, len(table.dtype.names))
    data["vertex"].data = table[names].astype([(name, "f4") for name in names])
    data.text, data.byte_order = form == "ascii", {"big": ">"}.get(form, "<" if form == "little" else "=")
    data.write(str(path))
    return path


def read_ply(path: Path) -> None:
    with contextlib.suppress(DataError):
        read_points(path)
    model = load_ply(path)
    assert all(len(value) == len(model) for value in model.params.values())


def make_cfg_args(folder: Path) -> Path:
    ModelFolder(folder).write_options([group() for group in GROUPS])
    (folder / "config.json").unlink()
    return folder / "cfg_args"


def make_config(folder: Path) -> Path:
    ModelFolder(folder).write_options([group() for group in GROUPS])
    return folder / "config.json"


def read_options(path: Path) -> None:
    saved_options(path.parent, GROUPS)


def make_exposures(folder: Path) -> Path:
    Exposure(["a", "b"], torch.device("cpu")).save(ModelFolder(folder), 1)
    return folder / "exposure.json"


def read_exposures(path: Path) -> None:
    Exposure.read(path, torch.device("cpu"))


def make_checkpoint(folder: Path) -> Path:
    parts = fresh()
    toy_training(1, 3, **parts)
    waiting = [(3, {"loss": torch.tensor(0.5), "l1": torch.tensor(0.25)})]
    history = RunHistory(smooth={"loss": 0.1, "l1": 0.2}, waiting=waiting)
    checkpoint.save(folder / "c.pth", 3, parts | {"history": history}, CPU)
    return folder / "c.pth"


def make_original_checkpoint(folder: Path) -> Path:
    original_checkpoint(folder / "c.pth")
    return folder / "c.pth"


def read_checkpoint(path: Path) -> None:
    """What was accepted can be gone on from."""
    parts = fresh()
    done = checkpoint.load(path, parts | {"history": RunHistory()}, CPU)
    check_statistics(path, parts)
    if done < 1000:
        toy_training(done + 1, done + 2, **parts)


def check_statistics(path: Path, parts: dict) -> None:
    """As a run does when it has loaded a checkpoint."""
    try:
        parts["adc"].check(parts["gaussians"])
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


KINDS = {
    f"ply, {form}, SH degree {degree}": (lambda folder, f=form, d=degree: make_ply(folder, f, d), read_ply)
    for form, degree in [("ascii", 1), ("little", 3), ("little", 0), ("big", 2)]
} | {
    "cfg_args": (make_cfg_args, read_options),
    "config.json": (make_config, read_options),
    "exposure.json": (make_exposures, read_exposures),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "checkpoint of the original": (make_original_checkpoint, read_checkpoint),
}


# Checkpoints that are whole files, but say odd things

HUGE, EMPTY = torch.zeros(1).expand(10**10, 3), torch.empty(20, 3, device="meta")
ODD = [
    None, -1, 0, 1, 3, 2**31, 2**70, -0.5, math.nan, math.inf, True, "x", "", b"x", [], {}, (), [1, 2],
    {"a": 1}, torch.zeros(0), torch.zeros(()), torch.ones(20), torch.ones(20, 3), HUGE, EMPTY,
    torch.ones(20, 3).long(), torch.ones(20, 3).double(), torch.ones(20, 3).to_sparse(),
    torch.full((20, 3), math.nan), torch.zeros(1).expand(20, 3), torch.ones(3, 20).T,
]  # fmt: skip


def odd_checkpoint(state: dict, chance: random.Random) -> dict:
    """One or two places of the nested state hold something else, or nothing."""
    state = copy.deepcopy(state)
    for _ in range(chance.choice([1, 1, 2])):
        node, key = state, chance.choice(list(state))
        while isinstance(node[key], dict | list) and node[key] and chance.random() < 0.85:
            node = node[key]
            key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        if chance.random() < 0.15:
            del node[key]
        else:
            node[key] = chance.choice(ODD)
        if not state:
            break
    return state


# The damage, in a process of its own


def forbid_other_processes(event: str, arguments) -> None:
    if event.split(".")[0] in ("subprocess", "pty") or event in (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
    ):
        os.write(2, f"{event}: code was run\n".encode())
        os._exit(3)


def memory(forget_peak: bool = False) -> int:
    """Bytes: the most that this process had resident since its peak was forgotten."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def damage(kind: str, folder: Path, cases: int) -> None:
    sys.stdout = sys.stderr = open(folder / "said.txt", "w")  # noqa: SIM115
    try:
        torch.set_num_threads(1)
        np.seterr(all="ignore")
        make, read = (make_checkpoint, read_checkpoint) if kind == "odd" else KINDS[kind]
        path = make(folder)
        whole = path.read_bytes()
        state = torch.load(path, weights_only=True) if kind == "odd" else None
        read(path)
        sys.addaudithook(forbid_other_processes)
        refused = grown = 0
        for case in range(cases):
            chance = random.Random(case)
            if state is not None:
                torch.save(odd_checkpoint(state, chance), path)
            else:
                path.write_bytes(spoiled(whole, chance.choice(HOWS), case))
            before = memory(forget_peak=True)
            try:
                read(path)
            except (DataError, ConfigError) as error:
                refused += 1
                assert str(path) in str(error), f"case {case} does not name the file: {error}"
                assert len(str(error)) < 1010, f"case {case}: a message, not a dump: {error}"
            except BaseException:
                print(f"case {case}:")
                raise
            grown = max(grown, memory() - before)
            assert grown < ROOM, f"case {case}: memory grew by {grown} bytes"
        (folder / "result.json").write_text(json.dumps({"refused": refused, "grown": grown}))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@pytest.mark.parametrize("kind", [*KINDS, "odd"])
def test_damaged_files(kind, tmp_path):
    process = PROCESSES.Process(target=damage, args=(kind, tmp_path, CASES))
    process.start()
    process.join(60 + CASES * 0.1)
    assert process.exitcode == 0, (
        f"exit code {process.exitcode}: " + (tmp_path / "said.txt").read_text()[-3000:]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    print(f"{kind}: {CASES} files, {result['refused']} refused, {result['grown'] / 1e6:.1f} MB")
    assert 0.3 * CASES < result["refused"], "damage that is never noticed is none"


# Lies that take aim


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(
    "elements",
    [
        "element vertex 99999999999\nproperty float x\n",
        "element other 99999999999\nelement vertex 1\nproperty float x\n",
        "element vertex 1000000000\nproperty list uchar float x\n",
        "element face 3000000000\nproperty list uint uint i\nelement vertex 1\nproperty float x\n",
    ],
)
def test_headers_that_promise_too_much(form, elements, tmp_path):
    path = tmp_path / "lies.ply"
    path.write_bytes(f"ply\nformat {form} 1.0\n{elements}end_header\n".encode() + b"1 " * 100)
    with pytest.raises(DataError, match="lies.ply: cannot be read as PLY .its header promises"):
        load_ply(path)


def test_configurations_are_never_evaluated(tmp_path):
    for text in (
        "Namespace(sh_degree=__import__('os').system('touch /tmp/was_run'))",
        "Namespace(sh_degree=[x for x in ().__class__.__base__.__subclasses__()])",
        "Namespace(sh_degree=9**9**9)",
        "Namespace(sh_degree=" + "[" * 5000 + "]" * 5000 + ")",
        "Namespace(sh_degree=" + "-" * 100_000 + "1)",
        "Namespace(sh_degree=" + "'a'" * 10_000 + "+1)",
        "(lambda: 1)()",
        "Namespace.__class__(a=1)",
    ):
        with pytest.raises(ConfigError):
            parse_cfg_args(text)


def test_compressed_checkpoints_are_refused(tmp_path):
    """A small file that becomes a large one."""
    path = make_checkpoint(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "zeros": torch.zeros(25_000_000)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 1e6
    with pytest.raises(DataError, match="bomb.pth: cannot be read as a checkpoint .it has compressed parts"):
        checkpoint.read(tmp_path / "bomb.pth")


def shared(levels: int, kind: type):
    """A few bytes in a file, and 2^levels values for who walks through it."""
    value = kind([1])
    for _ in range(levels):
        value = kind([value, value])
    return value


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def numpy_scalar(code: str, data: bytes) -> Call:
    return Call(np.float64(0).__reduce__()[0], np.dtype(code), data)


def tuple_as_key() -> bytes:
    """To look it up, Python would hash 2^60 tuples."""
    return b"\x80\x02}" + pickle.dumps(shared(60, tuple), protocol=2)[2:-1] + b"K\x01s."


def colliding_keys() -> bytes:
    """Each of them would be compared with all before it."""
    numbers = [(2**61 - 1) * n for n in range(1, 50_000)]
    return b"\x80\x02}(" + b"".join(b"\x8a\x0b" + n.to_bytes(11, "little") + b"N" for n in numbers) + b"u."


FLOATS = torch.arange(24.0).reshape(2, 3, 4)
HOSTILE = {
    "shared lists": lambda: shared(60, list),
    "shared tuples": lambda: shared(60, tuple),
    "a number of 2 GB": lambda: numpy_scalar("V2000000000", b""),
    "2 GB of bytes": lambda: Call(bytearray, 2_000_000_000),
    "a NumPy array": lambda: np.zeros(3),
    "a NumPy object": lambda: numpy_scalar("O", b"12345678"),
    "a negative tensor": lambda: torch._neg_view(FLOATS),
    "a conjugate tensor": lambda: torch.view_as_complex(FLOATS[..., :2].contiguous()).conj(),
    "a sparse tensor": lambda: FLOATS[0].to_sparse(),
    "a compressed tensor": lambda: FLOATS[0].to_sparse_csr(),
    "a nested tensor": lambda: torch.nested.nested_tensor([FLOATS[0], FLOATS[1]]),
    "a quantized tensor": lambda: torch.quantize_per_tensor(FLOATS, 0.1, 0, torch.qint8),
    "a tensor without numbers": lambda: torch.empty(10**12, device="meta"),
    "a tensor of one number": lambda: torch.zeros(1).expand(10**10),
    "a tensor with overlaps": lambda: torch.zeros(1000).as_strided((900, 100), (1, 1)),
    "a tensor with a step of 0": lambda: torch.zeros(4).as_strided((4, 1000), (1, 0)),
    "one tensor twice": lambda: [FLOATS] * 2,
    "two tensors, one memory": lambda: [FLOATS[0], FLOATS[1]],
    "a module": lambda: torch.nn.Linear(2, 2),
    "a set": lambda: {1, 2},
    "a large integer": lambda: 10**5000,
}  # fmt: skip


@contextlib.contextmanager
def within(seconds: float, room: int):
    """Fails if the block takes longer or more memory."""

    def late(*_):
        raise AssertionError(f"took more than {seconds} s")

    before = memory(forget_peak=True)
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert memory() - before < room, f"took {memory() - before:,} bytes"


@pytest.mark.filterwarnings("ignore")  # that kinds of tensors are in beta
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles(hostile, protocol, tmp_path):
    """As a value that nobody asks for, and in the place of a parameter."""
    state = torch.load(make_checkpoint(tmp_path), weights_only=True)
    path = tmp_path / "hostile.pth"
    for at in (state, state["parts"]["gaussians"]["params"]):
        old = at.get("means")
        at["means"] = hostile()
        torch.save(state, path, pickle_protocol=protocol)
        at["means"] = old
        with within(5, 30 << 20), pytest.raises(DataError, match="hostile.pth: cannot be read"):
            checkpoint.load(path, fresh() | {"history": RunHistory()}, CPU)


def test_the_original_s_numbers_may_not_be_anything(tmp_path):
    original_checkpoint(tmp_path / "c.pth")
    state, iteration = torch.load(tmp_path / "c.pth", weights_only=False)
    for extent in (numpy_scalar("V2000000000", b""), numpy_scalar("f8", b"1"), numpy_scalar("f8", b"1" * 80)):
        torch.save(((*state[:-1], extent), iteration), tmp_path / "c.pth")
        with within(5, 30 << 20), pytest.raises(DataError, match="c.pth"):
            checkpoint.load(tmp_path / "c.pth", fresh(), CPU)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place in the memo that is far away
        b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",  # a million lists, one in the other
        b"\x80\x02" + b"(" * 10**6,
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2^63 bytes
        b"\x80\x05\x96\xff\xff\xff\x7f\x00\x00\x00\x00.",  # 2 GB of bytes that are not there
        b"\x80\x02]q\x00h\x00a.",  # a list in itself
        tuple_as_key(),
        colliding_keys(),
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85Rb.",
        b"aeu.", b"R.", b"Q.", b"0.", b"", b"h\x07.", b"N\x86.",
    ],
)  # fmt: skip
def test_hostile_programs(program, tmp_path):
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("c/data.pkl", program)
    with within(10, max(30 << 20, 200 * len(program))), pytest.raises(DataError, match="c.pth"):
        checkpoint.load(path, fresh() | {"history": RunHistory()}, CPU)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p["random"]["numpy"].__setitem__(2, 5_000_000.0), "must be at 0 to 624, got 5000000.0"),
        (lambda p: p["random"]["numpy"].__setitem__(1, torch.arange(5)), "must be 624 integers"),
        (lambda p: p["history"]["scores"].update(test={}), "scores of 'test' must not be empty"),
        (
            lambda p: p["history"]["scores"]["test"][3].update(psnr="x"),
            "scores must be numbers named views, l1",
        ),
        (lambda p: p["history"]["scores"]["test"][3].pop("l1"), "scores must be numbers named views, l1"),
        (lambda p: p["history"].update(seconds=math.nan), "seconds must be a number of seconds, got nan"),
        (
            lambda p: p["gaussians"]["moments"]["means"].update(step=torch.tensor(3, dtype=torch.uint8)),
            "step",
        ),
    ],
)
def test_what_would_end_a_run_later(spoil, message, tmp_path):
    """Positions beyond NumPy's state are read by it, tables without a row have no last one."""
    scores = {"test": {3: Scores(1, 0.1, math.inf, 20.0)}}
    parts = fresh()
    toy_training(1, 3, **parts)
    checkpoint.save(tmp_path / "c.pth", 3, parts | {"history": RunHistory(scores=scores)}, CPU)
    again = fresh() | {"history": RunHistory()}
    assert checkpoint.load(tmp_path / "c.pth", again, CPU) == 3 and again["history"].scores == scores
    state = torch.load(tmp_path / "c.pth", weights_only=True)
    spoil(state["parts"] | {"random": state["random"]})
    torch.save(state, tmp_path / "c.pth")
    parts = fresh() | {"history": RunHistory()}
    before = parts["gaussians"].means.clone()
    with pytest.raises(DataError, match=f"c.pth: does not fit this run: .*{message}"):
        checkpoint.load(tmp_path / "c.pth", parts, CPU)
    assert torch.equal(parts["gaussians"].means, before)
