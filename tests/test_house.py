"""Floors, budgets and manners of the source, read from its syntax trees; nothing is imported.

A failure here says which file breaks which rule. The rule may be changed, in this file and in words, when the code
shows a better way.
"""

from __future__ import annotations

import ast
import functools
import gc
import pathlib
import re
import sys
import tokenize
import tomllib
import warnings
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

FLOORS = (
    ("types", "core"),
    ("nn", "grpo", "weights"),
    ("data", "train"),
    ("imagine", "world", "policy", "reward", "sim"),
    ("learner", "evaluate", "bridge"),
    ("run", "report"),
    ("pace", "export", "plan"),
    ("audit",),
    ("studies", "play", "label"),
    ("cli",),
)
"""Imports go down only; rooms on one floor do not see each other. Doors, configs, notebooks and tests stand above;
``cli`` only leads to them, and stands in the package because an installed command has to."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PREPARES = 2
"""``data_prep`` may import up to this floor."""

CONFINED = {
    "torch": ("wovr_jax/bridge/", "data_prep/", "tests/", "launch/benchmarks/rival.py"),
    "diffusers": ("tests/", "launch/benchmarks/rival.py"),
    "tensorflow_datasets": ("data_prep/", "tests/"),
    "libero": ("wovr_jax/sim/libero/", "tests/"),
    "robosuite": ("wovr_jax/sim/libero/", "tests/"),
    "mujoco": ("wovr_jax/sim/libero/", "tests/"),
    "ml_collections": ("configs/common.py", "tests/"),
    "absl": ("wovr_jax/data/stream.py",),
    "gymnasium": ("wovr_jax/export/gym_env.py", "tests/"),
}
"""Heavy or outside packages, and the only places that may import them."""

FILE_LINES, FILE_LINES_AT_MOST = 400, 500
FUNCTION_LINES, LOOP_LINES = 60, 90
LONG_FUNCTIONS: dict[str, str] = {}
"""``file:function`` -> why it may have LOOP_LINES lines: it is a loop or a loss. The list may only shrink."""

BUDGET = {"modules": 77, "code lines": 9361}
"""What has to be in your head to read the training entry, LIBERO included: modules that are not empty, and their lines
without docstrings, comments and blanks. It goes down or stays. What does not belong to training finds its own door."""


def python_files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SOURCES = python_files("wovr_jax", "launch", "configs", "data_prep", "tests")


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    # A collection in mid-parse may print the traceback of a task that another test left; for its carets Python 3.11
    # parses too, and takes the two for one: "AST constructor recursion depth mismatch".
    gc.disable()
    try:
        return ast.parse(path.read_text(), filename=name_of(path))
    finally:
        gc.enable()


def module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: pathlib.Path) -> frozenset[str]:
    """Dotted names that ``path`` imports anywhere, inside functions too; of ``from a import b`` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import; write the whole name"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def room(dotted: str) -> str | None:
    """``world`` of ``wovr_jax.world.dit``; None outside the package or for the package itself."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "wovr_jax" and len(parts) > 1 else None


def rooms_seen(path: pathlib.Path) -> set[str]:
    """Rooms that ``path`` imports, itself excluded; a name imported from ``wovr_jax`` is a room only if it has one."""
    return {seen for dotted in imports(path) if (seen := room(dotted)) in FLOOR and seen != room(module(path))}


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    return {module(path): path for path in SOURCES if not name_of(path).startswith("tests/")}


def neighbours(path: pathlib.Path) -> set[str]:
    """Modules of the project that ``path`` imports directly, and the packages they lie in."""
    whole = {dotted for dotted in imports(path) if dotted in modules()}
    return {".".join(dotted.split(".")[: i + 1]) for dotted in whole for i in range(dotted.count(".") + 1)} & set(
        modules()
    )


def closure(start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(neighbours(modules()[name]))
    return found


# ---------------------------------------------------------------- floors


def test_every_room_has_a_floor():
    found = {seen for name in modules() if (seen := room(name))}
    assert found <= set(FLOOR), f"give {sorted(found - set(FLOOR))} a floor in FLOORS (and no room is called utils)"


@pytest.mark.parametrize("path", python_files("wovr_jax"), ids=name_of)
def test_imports_go_down(path):
    here = room(module(path))
    if here is None:
        assert not rooms_seen(path), "wovr_jax/__init__.py imports nothing"
        return
    wrong = {seen for seen in rooms_seen(path) if FLOOR[seen] >= FLOOR[here]}
    assert not wrong, f"{name_of(path)} (floor {FLOOR[here]}) imports {sorted(wrong)}, which is not below it"
    above = {dotted for dotted in imports(path) if dotted.split(".")[0] in ("launch", "configs", "data_prep", "tests")}
    assert not above, f"{name_of(path)} imports {sorted(above)}: the package stands without them"


def test_data_prep_stays_low_and_is_imported_by_nobody():
    for path in python_files("data_prep"):
        high = {seen for seen in rooms_seen(path) if FLOOR[seen] > PREPARES}
        assert not high, f"{name_of(path)} imports {sorted(high)}; data_prep may use floors 0 to {PREPARES}"
    for path in SOURCES:
        if not name_of(path).startswith(("data_prep/", "tests/")):
            assert not any(dotted.split(".")[0] == "data_prep" for dotted in imports(path)), name_of(path)


def test_a_config_is_data():
    for path in python_files("configs"):
        allowed = {"__future__", "configs"} | (
            {*sys.stdlib_module_names, "ml_collections"} if path.stem == "common" else set()
        )
        wrong = {dotted for dotted in imports(path) if dotted.split(".")[0] not in allowed}
        assert not wrong, f"{name_of(path)} imports {sorted(wrong)}; a config imports configs.common only"


@pytest.mark.parametrize("package", CONFINED)
def test_confined(package):
    for path in SOURCES:
        if package in {dotted.split(".")[0] for dotted in imports(path)}:
            assert name_of(path).startswith(CONFINED[package]), (
                f"{name_of(path)} imports {package}; only {CONFINED[package]} may"
            )


def test_no_circles():
    """No module reaches itself: there is one order in which to read everything."""
    for name, path in modules().items():
        inside = {seen for seen in neighbours(path) if not name.startswith(f"{seen}.") and seen != name}
        around = [seen for seen in inside if name in closure(seen)]
        assert not around, f"{name} and {around} import each other"


def test_no_two_packages_import_each_other():
    sees: dict[str, set[str]] = {}
    for path in python_files("wovr_jax"):
        if here := room(module(path)):
            sees.setdefault(here, set()).update(rooms_seen(path))
    mutual = {(a, b) for a in sees for b in sees[a] if a in sees.get(b, ()) and a < b}
    assert not mutual


def test_the_training_entry_fits_in_a_head():
    reached = {name for name in closure("launch.train") if modules()[name].stat().st_size}
    assert "wovr_jax.sim.libero.arena" in reached, "LIBERO is part of training and has to be counted"
    count = {"modules": len(reached), "code lines": sum(code_lines(modules()[name]) for name in reached)}
    assert all(count[what] <= BUDGET[what] for what in BUDGET), f"launch/train.py reaches {count}, budget {BUDGET}"


def code_lines(path: pathlib.Path) -> int:
    """Lines of a file without its docstrings, comments and blanks."""
    bodies = (getattr(node, "body", None) for node in ast.walk(tree(path)))
    statements = (statement for body in bodies if isinstance(body, list) for statement in body)
    texts = (s for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
    told = {line for text in texts for line in range(text.lineno, text.end_lineno + 1)}
    with path.open("rb") as file:
        code = [token for token in tokenize.tokenize(file.readline) if token.type not in NO_CODE]
    return len({line for token in code for line in range(token.start[0], token.end[0] + 1)} - told)


NO_CODE = {
    tokenize.ENCODING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_size(path):
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES_AT_MOST, f"{name_of(path)} has {lines} lines; split it"
    if lines > FILE_LINES:
        warnings.filterwarnings("always", message="house:")
        warnings.warn(f"house: {name_of(path)} has {lines} lines, more than {FILE_LINES}", stacklevel=1)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_function_size(path):
    for qualified, node in functions(tree(path)):
        name, lines = f"{name_of(path)}:{qualified}", node.end_lineno - node.lineno + 1 - docstring_lines(node)
        limit = LOOP_LINES if name in LONG_FUNCTIONS else FUNCTION_LINES
        assert lines <= limit, f"{name} has {lines} lines without its docstring, more than {limit}"


def test_the_list_of_long_functions_only_shrinks():
    long = {
        f"{name_of(path)}:{qualified}"
        for path in SOURCES
        for qualified, node in functions(tree(path))
        if node.end_lineno - node.lineno + 1 - docstring_lines(node) > FUNCTION_LINES
    }
    assert set(LONG_FUNCTIONS) <= long, f"no longer long: {sorted(set(LONG_FUNCTIONS) - long)}"


def functions(node: ast.AST, above: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield above + child.name, child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{above}{child.name}." if named else above)


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


# ---------------------------------------------------------------- manners


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stat().st_size], ids=name_of)
def test_modules_begin_alike(path):
    assert ast.get_docstring(tree(path)), f"{name_of(path)} has no docstring"
    if len(tree(path).body) > 1 and name_of(path).startswith(("wovr_jax/", "launch/", "data_prep/")):
        assert "__future__.annotations" in imports(path), f"{name_of(path)} lacks from __future__ import annotations"


def test_the_package_prints_to_stderr_only():
    """Results on stdout belong to the doors, and a list of them to the command that leads there."""
    for path in set(python_files("wovr_jax")) - {ROOT / "wovr_jax" / "cli.py"}:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert any(keyword.arg == "file" for keyword in node.keywords), f"{name_of(path)}:{node.lineno} prints"


def test_a_door_shadows_no_standard_module():
    taken = {path.stem for path in python_files("launch")} & set(sys.stdlib_module_names)
    assert not taken, f"launch/{sorted(taken)} would hide standard modules from programs started there"


def test_no_machine_paths():
    """Absolute folders of somebody's machine, in anything that is text and ours."""
    machine = re.compile(r"(?<![\w.:/<>-])/(?:home|root|Users|mnt|work|opt|scratch)/\w")
    folders = ("wovr_jax", "launch", "configs", "data_prep", "tests", "docs", "notebooks", ".ci")
    kinds = (".py", ".md", ".toml", ".txt", ".sh", ".svg", ".ipynb", ".json", "")
    texts = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in kinds
    ]
    # In a worktree .git is a file, with the path of the repository in it.
    texts += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in kinds and path.name != ".git"]
    for path in texts:
        hit = machine.search(path.read_text(errors="ignore"))
        assert not hit, f"{name_of(path)} contains {hit and hit[0]}..."


# ---------------------------------------------------------------- packaging and README


def requirement_names(lines: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines if line and line[0].isalnum())
    return {found[0].lower().replace("_", "-") for found in names if found}


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run, dev = ((ROOT / file).read_text().splitlines() for file in ("requirements.txt", "requirements-dev.txt"))
    for line in run + dev:
        assert not line[:1].isalnum() or "==" in line, f"not an exact version: {line}"
    extras = project["optional-dependencies"]
    shipped = project["dependencies"] + extras["formats"] + extras["serve"]
    assert requirement_names(shipped) <= requirement_names(run)
    assert requirement_names(extras["dev"]) <= requirement_names(dev)


def test_the_package_imports_only_what_it_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = requirement_names(project["dependencies"] + extras["formats"] + extras["serve"])
    known_as = {"pillow": "pil", "orbax-checkpoint": "orbax"}
    allowed = (
        {known_as.get(name, name) for name in declared} | {"wovr-jax", "array-record"} | set(sys.stdlib_module_names)
    )
    for path in python_files("wovr_jax"):
        found = {dotted.split(".")[0] for dotted in imports(path)} - set(CONFINED) - set(sys.stdlib_module_names)
        wrong = {name for name in found if name.lower().replace("_", "-") not in allowed}
        assert not wrong, f"{name_of(path)} imports {sorted(wrong)}, which pyproject.toml does not declare"


def test_the_readme_speaks_of_what_is_there():
    text = (ROOT / "README.md").read_text()
    files = re.findall(r"(?:launch|configs)/[\w/]+\.(?:py|sh)", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text) for link in link if link]
    for name in {*files, *(link for link in links if "://" not in link)}:
        assert (ROOT / name).exists(), f"README.md names {name}, which is not there"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", text)) <= targets
    assert any("make pace" in line for line in text.splitlines()[:25]), "the command stands before line 25"


def test_the_docs_link_to_what_is_there():
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), (
                f"docs/{page.name} links to {link}, which is not there"
            )
