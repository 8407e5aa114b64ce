"""The house: what may import what, that a newcomer finds the tests of a module, and that nothing points outside."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from layout import REPO

FLAT = [path for path in REPO.glob("*.py") if path.name != "conftest.py"]
FILES = sorted([*FLAT, *(path for folder in ("backends", "profiles", "pod") for path in (REPO / folder).rglob("*.py"))])


def name_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def room(module: str) -> str:
    """The room of the house that a module lies in."""
    if module.startswith("backends."):
        return "common" if module.split(".")[1] == "common" else "executors"
    return module.split(".")[0]


# From the ground up. Each room knows only those before it, and a few know themselves.
ROOMS = ("transport", "pod", "screen", "state", "runs", "recipes", "closure", "bundle", "profiles", "start", "wheels", "configs", "archive", "jobs", "backends",
         "common", "executors", "prepare", "commands", "launch")
OF_SEVERAL = ("pod", "common")  # whose modules import each other


def ours(name: str) -> str:
    """The module of ours that an imported name is, or lies in; "" for others."""
    parts = name.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES), "")


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@functools.cache
def parsed(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, inside: bool = True, types: bool = False) -> Iterator[str]:
    """The full names that a module imports; those inside its functions too, or not; those that only types need, or
    not."""
    package = MODULES[module].name == "__init__.py"

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                here = module.split(".")
                base = here[:len(here) + package - child.level] if child.level else []
                start = ".".join([*base, *filter(None, [child.module])])
                yield from (start + "." + alias.name for alias in child.names)
            elif for_types(child):
                yield from walk(child) if types else (name for other in child.orelse for name in walk(other))
            elif inside or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child)

    return walk(parsed(module))


def needs(module: str) -> set[str]:
    return {ours(name) for name in imports(module)} - {"", module}


def test_every_module_has_its_place() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    below = set(ROOMS[:ROOMS.index(room(module))])
    if room(module) in OF_SEVERAL:
        below.add(room(module))
    assert {other for other in needs(module) if room(other) not in below} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ("transport", "pod")])
def test_what_is_shipped_needs_nothing_of_ours_and_nothing_from_pypi(module: str) -> None:
    """But Ray, which the image has."""
    assert {room(other) for other in needs(module)} <= {room(module)} & {"pod"}
    found = {name.split(".")[0] for name in imports(module) if not ours(name)}
    assert found - sys.stdlib_module_names <= ({"ray"} if room(module) == "pod" else set())


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("backends")])
def test_executors_know_none_of_each_other_and_nobody_knows_them(module: str) -> None:
    """They are loaded by their name in backends.BACKENDS."""
    assert {other for other in needs(module) if room(other) == "executors"} == set()


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: needs(module) for module in MODULES}
    while graph:
        leaves = {module for module, wanted in graph.items() if not wanted & graph.keys()}
        assert leaves, "a circle among %s" % ", ".join(sorted(graph))
        graph = {module: wanted for module, wanted in graph.items() if module not in leaves}


def test_nemo_run_is_imported_where_it_is_needed_and_never_at_start_up() -> None:
    at_once = {module for module in MODULES for name in imports(module, inside=False, types=True)
               if name.split(".")[0] == "nemo_run"}
    assert at_once == {"backends.common.nemo"}
    assert {module for module in MODULES for name in imports(module, inside=False)
            if ours(name) == "backends.common.nemo"} == set()
    slow = "nemo_run", "leptonai", "requests", "omegaconf", "yaml", "torch"
    done = subprocess.run([sys.executable, "-c", "import sys, launch; print([m for m in %r if m in sys.modules])" % (slow,)],
                          cwd=REPO, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---------------------------------------------------------------- the tests

ELSEWHERE = {"backends.common.slurm_prepare": "repositories", "backends.common.lepton_client": "lepton",
             "backends.common.lepton_logs": "lepton", "backends.common.placing": "dgxcloud", "backends.common.lepton_ray": "ray",
             "backends.common.runai_client": "dgxcloud", "backends.common": "common"}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "pod"])
def test_a_newcomer_finds_the_tests_of_a_module(module: str) -> None:
    """By the module's name, or by what another's file says of itself."""
    name = module.split(".")[-1]
    file = REPO / "tests" / ("test_%s.py" % ELSEWHERE.get(module, name))
    assert file.is_file() and (module not in ELSEWHERE or name in str(ast.get_docstring(ast.parse(file.read_text()))))


# ---------------------------------------------------------------- what is named is there

SAID = re.compile(r"(?<![\w/.<>~$}{%-])((?:[\w.-]+/)+[\w-]+\.(?:py|md|toml|conf))\b")
OUTSIDE = re.compile(r"(?<![\w/.-])(facts|prototypes)/|\bDESIGN\b")  # of the place where Airlift was designed
THEIRS = ("packaging/git.py", "execution/slurm.py", "execution/lepton.py", "execution/dgxcloud.py",  # nemo-run's
          "src/nemotron/")


def texts() -> Iterator[tuple[str, str]]:
    """Every text of the repository, by its path; this file is not among them."""
    kept = [REPO / name for name in (".ci", "backends", "benchmarks", "pod", "profiles", "src", "tests")]
    for path in [*REPO.iterdir(), *(path for folder in kept for path in folder.rglob("*"))]:
        if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__) and path.suffix != ".lock":
            try:
                yield path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_nothing_points_out_of_the_repository() -> None:
    found = ["%s: %s" % (name, line.strip()) for name, text in texts() for line in text.splitlines()
             if OUTSIDE.search(line)]
    assert found == []


def test_a_file_that_is_named_is_there() -> None:
    """In the launcher, the profiles and what people read; tests and recipes make up names."""
    gone = []
    for name, text in texts():
        if not name.startswith(("tests/", "src/")):
            gone += ["%s: %s" % (name, said) for said in SAID.findall(text)
                     if not said.startswith(THEIRS) and not (REPO / said).exists()
                     and ((REPO / "pod").is_dir() or not said.startswith("pod/"))]
    assert gone == []
