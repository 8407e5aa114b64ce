"""Find a recipe by the name in its runspec header.

A recipe is a script under <repo_root>/src/*/recipes or src/*/steps with a PEP 723 block that contains [tool.runspec]:
its name ("nano3/sft"), image, launch mode, configs and resources.
"""

import difflib
import glob
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transport import COLLECTIONS, Refusal, never_source

LAUNCH_MODES = ("torchrun", "ray", "direct", "python")


@dataclass(frozen=True)
class Recipe:
    """One header. `script` is relative to `root`, posix; `config_dir` is absolute."""

    name: str
    root: Path
    script: str
    image: str | None
    launch: str
    cmd: str | None
    workdir: str | None
    config_dir: Path
    config_default: str
    nodes: int
    gpus_per_node: int | str  # "gpu": as many as the pod has
    env: dict[str, Any]  # NAME -> string, number or boolean
    needs: tuple[str, ...] = ()  # the packages that its block names as dependencies, which uv installs

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def stage(self) -> str:
        return self.name.split("/", 1)[1]


# A header, and its last line if it has one. No line of it begins with `# ///`, so that each is looked at once.
HEADER = re.compile(rb"^# /// script[ \t]*\r?\n((?:(?!# ///)#[^\n]*\n)*)(# ///[ \t]*\r?$)?", re.MULTILINE)
MAX_SCRIPT, MAX_HEADER = 1 << 20, 1 << 13  # bytes that are searched for a header, and of a header
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "": {"schema": (str,), "docs": (str,), "name": (str,), "image": (str,), "setup": (str,), "run": (dict,),
         "config": (dict,), "resources": (dict,), "env": (dict,)},
    "run": {"launch": (str,), "cmd": (str,), "workdir": (str,)},
    "config": {"dir": (str,), "default": (str,), "format": (str,)},
    "resources": {"nodes": (int,), "gpus_per_node": (int, str)},
}
TYPES = {str: "a string", int: "a whole number", dict: "a table"}


def scan(root: Path, text: bytes = b"") -> tuple[dict[str, Recipe], list[Refusal]]:
    """All recipes under root by name, and the problems of headers that cannot be used; only scripts that contain
    `text`. Where two scripts have the same name, the one in src/starter yields; otherwise it is a problem."""
    by_name: dict[str, list[Recipe]] = {}
    found: dict[str, Recipe] = {}
    problems: list[Refusal] = []
    for path in _scripts(root, problems):
        try:
            recipe = read_header(root, path, text)
            if recipe:
                by_name.setdefault(recipe.name, []).append(recipe)
        except Refusal as problem:
            problems.append(problem)
    for name, candidates in sorted(by_name.items()):
        others = [recipe for recipe in candidates if not recipe.script.startswith("src/starter/")] or candidates
        if len(others) > 1:
            scripts = " and ".join(recipe.script for recipe in others)
            problems.append(Refusal("two scripts are named %s: %s" % (name, scripts), "rename one of them"))
        else:
            found[name] = others[0]
    return found, problems


def _scripts(root: Path, problems: list[Refusal]) -> Iterable[Path]:
    """The files among which recipes are, by the same rule as for what ships. A folder that leads out of the tree would
    be searched for hours."""
    tops = [top for collection in COLLECTIONS for top in sorted(root.glob("src/*/" + collection))]
    for top in [top for top in tops if not never_source(top.parent.name, str(top.parent))]:
        if not inside(top, root):
            problems.append(Refusal("%s is a link that leaves the tree" % top, "put a copy in its place"))
            continue
        scripts: list[Path] = []
        for folder, folders, names in os.walk(top, onerror=lambda error: problems.append(
                Refusal("%s cannot be read: %s" % (error.filename, error.strerror), "make it readable"))):
            folders[:] = [name for name in folders if not never_source(name, os.path.join(folder, name))]
            scripts += [Path(folder, name) for name in names if name.endswith(".py") and not never_source(name)]
        yield from sorted(scripts)


def source_tree(named: str | Path | None, own: Path) -> Path:
    """The tree that was named, else the one that a person stands in: the nearest folder upwards with recipes or steps;
    else `own`, the launcher's."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return Path(named or own).resolve()
    trees = (folder for folder in (here, *here.parents) for name in COLLECTIONS if any(folder.glob("src/*/" + name)))
    return Path(named or next(trees, own)).resolve()


def others_near(recipe: Recipe) -> list[Path]:
    """Source trees above a starter recipe's tree and beside it that have recipes of its family, too."""
    pattern = "src/*/recipes/" + glob.escape(recipe.family)
    found = [*recipe.root.parent.glob("*/" + pattern), *(f for up in recipe.root.parents for f in up.glob(pattern))]
    trees = {path.parents[3] for path in found} - {recipe.root}
    return sorted(trees) if recipe.script.startswith("src/starter/") else []


def inside(path: Path, root: Path) -> bool:
    """Whether a path leads to something in the tree, links followed."""
    return path.resolve().is_relative_to(root.resolve())


def find(root: Path, name: str) -> Recipe:
    """The recipe of that name. Raises Refusal that names similar ones, and a broken header that may be the cause."""
    found, problems = scan(root, name.encode())  # the others need not be parsed
    if name not in found:
        found, problems = scan(root)
    if name in found:
        return found[name]
    for problem in problems:
        if problem.what.startswith("two scripts are named %s:" % name) or not found:
            raise problem
    if not found:
        raise Refusal("there is no recipe under %s/src/*/recipes or steps" % root,
                      "name the source tree with --repo-root")
    hidden = "; or fix %s" % problems[0].what if problems else ""
    family, _, stage = name.partition("/")
    families = sorted({recipe.family for recipe in found.values()})
    if family not in families:
        raise Refusal("there is no family %r" % family, "did you mean %s?%s" % (nearest(family, families), hidden))
    stages = [recipe.stage for recipe in found.values() if recipe.family == family]
    configs = sorted(root.glob("src/*/recipes/%s/*%s/config/default.yaml" % tuple(map(glob.escape, (family, stage)))))
    others = [each for each in found.values() if each.family == "steps" and stage in each.stage.split("/")]
    if configs and others:  # as nano3/eval of Nemotron's, which its own launcher gives to another program
        raise Refusal("%s/%s has configs, and no recipe of its own" % (family, stage),
                      "launch: %s %s -c %s" % (others[0].family, others[0].stage, configs[0]))
    raise Refusal("%s has no stage %r" % (family, stage), "did you mean %s?%s" % (nearest(stage, stages), hidden))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like `name`, or all of them where none is similar."""
    return " or ".join(difflib.get_close_matches(name, list(known), 3, 0.5) or sorted(known))


def read_header(root: Path, path: Path, text: bytes = b"") -> Recipe | None:
    """The Recipe of a script; None if it has no runspec header, or not `text`. Raises Refusal with file and line."""
    script = path.relative_to(root).as_posix()
    data = _beginning(path, script)
    headers = HEADER.finditer(data) if b"[tool.runspec" in data and text in data else ()
    match = next((header for header in headers if b"[tool.runspec" in header.group(1)), None)
    if match is None:
        return None
    first = data[: match.start(1)].count(b"\n")  # lines before the block's own
    if not match.group(2):
        raise Refusal("%s:%d: the runspec header does not end" % (script, first),
                      "end it with a line `# ///`; each line of it begins with #")
    if len(match.group(1)) > MAX_HEADER:
        raise Refusal("%s:%d: the runspec header has more than %d bytes" % (script, first, MAX_HEADER), "shorten it")
    toml = "\n".join(line[2:] if line.startswith("# ") else line.lstrip("#")
                   for line in match.group(1).decode("utf-8", "replace").split("\n"))
    try:
        block = tomllib.loads(toml)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError that is not TOML's own
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        raise Refusal("%s:%d: the runspec header is not TOML: %s" % (
            script, first + int(at.group(1)) if at else first, str(error)[: at.start() if at else None]),
            "fix the block between `# /// script` and `# ///`") from None
    tool, needs = block.get("tool"), block.get("dependencies")
    spec = tool.get("runspec") if isinstance(tool, dict) else None
    if not isinstance(spec, dict):
        return None

    def problem(table: str, key: str, what: str, fix: str) -> Refusal:
        return Refusal("%s:%d: %s" % (script, _line_of(toml, table, key) + first, what), fix)

    _check_fields(spec, problem)
    run, config, resources = spec.get("run", {}), spec.get("config", {}), spec.get("resources", {})
    return Recipe(spec["name"], root, script, spec.get("image"), run.get("launch", "torchrun"), run.get("cmd"),
                  run.get("workdir"), path.parent / config.get("dir", "./config"), config.get("default", "default"),
                  resources.get("nodes", 1), resources.get("gpus_per_node", 8), spec.get("env", {}),
                  tuple(map(str, needs)) if isinstance(needs, list) else ())


def _beginning(path: Path, script: str) -> bytes:
    """What is searched for a header, without a BOM; nothing of a folder, or of what has no end, like a FIFO."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with open(path, "rb") as file:
            data = file.read(MAX_SCRIPT)
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (script, error.strerror), "make it readable, or remove it") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and "runspec".encode("utf-16-le") in data[1:]:
        raise Refusal("%s:1: a script in UTF-16, which Python does not run" % script, "save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def _line_of(text: str, table: str, key: str) -> int:
    """The line where the key of [tool.runspec.<table>] stands, else that of the table, else the first."""
    here, best, wanted = "", 1, (table + "." + key).strip(".")
    for number, line in enumerate(text.split("\n"), 1):
        opened = re.match(r"\s*\[([^\]]*)\]", line)
        if opened:
            here = opened.group(1).replace("tool.runspec", "").strip(". ")
            best = number if here in (table, key) and best == 1 else best
        full = (here + "." + re.sub(r"[\"']", "", line.partition("=")[0]).strip()).strip(".")
        if not opened and (full + ".").startswith(wanted + "."):
            return number
    return best


def _check_fields(spec: dict[str, Any], problem: Callable[[str, str, str, str], Refusal]) -> None:
    for table, fields in FIELDS.items():
        for key, value in (spec if not table else spec.get(table, {})).items():
            if key not in fields:
                raise problem(table, key, "the header has an unknown field %r" % key,
                              "did you mean %s?" % nearest(key, list(fields)))
            if not isinstance(value, fields[key]) or isinstance(value, bool):
                raise problem(table, key, "the header's %s is %r" % (key, value),
                              "it must be " + " or ".join(TYPES[kind] for kind in fields[key]))
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", spec.get("name", "")):
        raise problem("", "name", "the header's name is %r" % spec.get("name", ""), 'it must be like "family/stage"')
    launch = spec.get("run", {}).get("launch", "torchrun")
    if launch not in LAUNCH_MODES:
        raise problem("run", "launch", "launch mode %r is not known" % launch, "use one of " + ", ".join(LAUNCH_MODES))
    gpus = spec.get("resources", {}).get("gpus_per_node", 8)
    if (gpus != "gpu" and not (isinstance(gpus, int) and gpus >= 0)) or spec.get("resources", {}).get("nodes", 1) < 1:
        raise problem("", "resources", "resources are %r" % spec["resources"],
                      'nodes must be 1 or more, gpus_per_node 0 or more or "gpu"')
    for name, value in spec.get("env", {}).items():
        if not variable(name, value):
            raise problem("env", name, "the header's env.%s is %r" % (name, value), VARIABLE)


VARIABLE = "a name may have letters, digits and _; a value must be a string, number, true or false, and without NUL"


def variable(name: Any, value: Any) -> bool:
    """Whether an environment variable can have that name and value."""
    return bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name))) and isinstance(value, (str, int, float)) \
        and "\0" not in str(value)
