"""The rooms of the house: who may use whom, and how long a function may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [  # from the top down: a room uses rooms below it, and itself
    {"train", "render", "metrics", "convert", "view", "export", "report", "full_eval"},  # command lines
    {"training"},
    {"strategies"},
    {"per_view"},
    {"gaussian_renderer"},
    {"scene"},
    {"distributed"},
    {"arguments", "utils"},  # these two know nobody
]
BESIDE = {"baselines", "benchmarks", "capture", "sample_scene", "tools", "viewer"}
CLOSED = {"arguments", "utils"}
LONGEST = 60  # lines of a function; a table of data may be longer


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


HOUSE = {room for rooms in ROOMS for room in rooms} | BESIDE


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def product() -> dict[str, Path]:
    """Module -> file, of all Python files of the product."""
    paths = [p for p in ROOT.glob("*.py")] + [p for room in HOUSE for p in (ROOT / room).rglob("*.py")]
    return {module_name(path): path for path in paths}


FILES = product()


def imports(module: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of the house that a file imports, and whether it does so as it is loaded itself: imports inside
    functions and for type checkers come later, or never."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    package = module.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{name}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name in FILES]
            found = modules if len(modules) == len(inner) else [name, *modules]
        else:
            continue
        yield from ((name, id(node) not in later) for name in found if name.split(".")[0] in HOUSE)


def may_use(room: str, other: str) -> bool:
    if room == other:
        return True
    if room in CLOSED or other in ROOMS[0]:
        return other in ROOMS[0] and room in BESIDE
    if room in BESIDE:
        return True
    if other in BESIDE:  # a command line may be the way into what is beside the house
        return level(room) == 0
    return level(other) > level(room)


def arrows_up() -> list[str]:
    found = []
    for module, path in FILES.items():
        room = module.split(".")[0]
        for target, _ in imports(module, path):
            if not may_use(room, target.split(".")[0]):
                found.append(f"{module} imports {target}")
    return found


def circle() -> list[str]:
    """Modules that need each other to be loaded, if there are any."""
    needs = {
        module: sorted(
            {target for target, now in imports(module, path) if now and target in FILES} - {module}
        )
        for module, path in FILES.items()
    }
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for target in needs[module]:
            if found := walk(target, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in needs if (found := walk(module, []))), [])


def test_all_rooms_are_seen():
    seen = {module.split(".")[0] for module in FILES}
    assert {"train", "training", "strategies", "per_view", "gaussian_renderer", "scene", "utils"} <= seen
    assert seen - HOUSE == set(), "a file at the top or a folder that has no room yet"
    arrows = {
        (m.split(".")[0], target.split(".")[0]) for m, p in FILES.items() for target, _ in imports(m, p)
    }
    assert {("train", "training"), ("training", "scene"), ("scene", "utils")} <= arrows


def test_no_arrow_goes_up():
    assert not arrows_up()


def test_no_modules_import_each_other_in_a_circle():
    assert not circle()


def test_a_wrong_arrow_and_a_circle_would_be_seen(tmp_path, monkeypatch):
    module = tmp_path / "scene" / "wrong.py"
    module.parent.mkdir()
    module.write_text("def f():\n    from training.run import Run\n\n    return Run\n")
    monkeypatch.setitem(FILES, "scene.wrong", module)
    assert arrows_up() == ["scene.wrong imports training.run"]
    module.write_text("from scene import wrong_too\n")
    other = tmp_path / "scene" / "wrong_too.py"
    other.write_text("import scene.wrong\n")
    monkeypatch.setitem(FILES, "scene.wrong_too", other)
    assert {"scene.wrong", "scene.wrong_too"} <= set(circle())


# Lengths


def functions() -> Iterator[tuple[str, int, ast.AST]]:
    native = (ROOT / "submodules/diff-gaussian-rasterization").glob("*/*.py")
    for path in [*FILES.values(), *native]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}: {node.name}", node.end_lineno - node.lineno + 1, node


def is_a_table(function: ast.FunctionDef) -> bool:
    """Hardly more than literals and calls with literals, one below the other: no loop, no branch."""
    control = (ast.For, ast.While, ast.If, ast.Try, ast.With)
    return not any(isinstance(node, control) for node in ast.walk(function))


def test_functions_fit_on_a_screen():
    lengths = sorted(length for _, length, _ in functions())
    assert len(lengths) > 500
    long = [f"{name} ({n} lines)" for name, n, node in functions() if n > LONGEST and not is_a_table(node)]
    assert not long
    median, p90 = lengths[len(lengths) // 2], lengths[len(lengths) * 9 // 10]
    assert median <= 8 and p90 <= 21, (median, p90)


@pytest.mark.parametrize("word", ["signal", "lock", "out_of_memory", "socket", "chkpnt"])
def test_train_is_the_method_and_nothing_else(word):
    """From `def train` to its end."""
    (train,) = [
        node
        for node in ast.parse(FILES["train"].read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]
    assert train.end_lineno - train.lineno + 1 <= LONGEST
    assert word not in ast.unparse(train)
