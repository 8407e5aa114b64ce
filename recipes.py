"""Find a recipe by the name in its runspec header, and say what starts it.

A recipe is a script under <repo_root>/src/*/recipes or src/*/steps with a PEP 723 block that holds [tool.runspec]: its
name ("nano3/sft"), image, launch mode, configs and resources.
"""

import difflib
import re
import shlex
import string
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transport import COLLECTIONS, Refusal

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

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def stage(self) -> str:
        return self.name.split("/", 1)[1]


# ---------------------------------------------------------------- find

HEADER = re.compile(rb"^# /// script[ \t]*\r?\n((?:#[^\n]*\n)*?)# ///[ \t]*\r?$", re.MULTILINE)
OPEN_HEADER = re.compile(rb"^# /// script[ \t]*\r?\n(?:#[^\n]*\n)*?# \[tool\.runspec", re.MULTILINE)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "": {"schema": (str,), "docs": (str,), "name": (str,), "image": (str,), "setup": (str,), "run": (dict,),
         "config": (dict,), "resources": (dict,), "env": (dict,)},
    "run": {"launch": (str,), "cmd": (str,), "workdir": (str,)},
    "config": {"dir": (str,), "default": (str,), "format": (str,)},
    "resources": {"nodes": (int,), "gpus_per_node": (int, str)},
}
WORDS = {str: "a string", int: "a whole number", dict: "a table"}


def scan(root: Path, word: bytes = b"") -> tuple[dict[str, Recipe], list[Refusal]]:
    """All recipes under root by name, and what is wrong with headers that cannot be used; with a word, only of scripts
    that hold it."""
    by_name: dict[str, list[Recipe]] = {}
    found: dict[str, Recipe] = {}
    problems: list[Refusal] = []
    for collection in COLLECTIONS:
        for path in sorted(root.glob("src/*/%s/**/*.py" % collection)):
            try:
                recipe = read_header(root, path, word)
                if recipe:
                    by_name.setdefault(recipe.name, []).append(recipe)
            except Refusal as problem:
                problems.append(problem)
    for name, candidates in sorted(by_name.items()):
        try:
            found[name] = _choose(candidates)
        except Refusal as problem:
            problems.append(problem)
    return found, problems


def find(root: Path, name: str) -> Recipe:
    """The recipe of that name. Raises Refusal that names the nearest ones, or a header that may have hidden it."""
    found, problems = scan(root, name.encode())  # the others need not be read as TOML
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
    hidden = "; or mend %s" % problems[0].what if problems else ""  # the header that may have hidden it
    family = name.split("/")[0]
    families = sorted({recipe.family for recipe in found.values()})
    if family not in families:
        raise Refusal("there is no family %r" % family, "did you mean %s?%s" % (nearest(family, families), hidden))
    stages = [recipe.stage for recipe in found.values() if recipe.family == family]
    raise Refusal("%s has no stage %r" % (family, name[len(family) + 1:]),
                  "did you mean %s?%s" % (nearest(name[len(family) + 1:], stages), hidden))


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words most like `word`, or all of them where none is alike."""
    return " or ".join(difflib.get_close_matches(word, list(known), 3, 0.5) or sorted(known))


def _choose(candidates: list[Recipe]) -> Recipe:
    """Where two scripts carry one name, src/starter yields; otherwise it is an error that names both."""
    others = [recipe for recipe in candidates if not recipe.script.startswith("src/starter/")] or candidates
    if len(others) > 1:
        raise Refusal("two scripts are named %s: %s" % (others[0].name, " and ".join(r.script for r in others)),
                      "rename one of them")
    return others[0]


def read_header(root: Path, path: Path, word: bytes = b"") -> Recipe | None:
    """The Recipe of one script; None if it has no runspec header, or not that word. Raises Refusal that names file and
    line."""
    script = path.relative_to(root).as_posix()
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        return None
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (script, error.strerror), "make it readable, or remove it") from None
    if b"[tool.runspec" not in data or word not in data:
        return None
    match = HEADER.search(data)
    if match is None:
        begun = OPEN_HEADER.search(data)
        if begun:
            raise Refusal("%s:%d: the runspec header does not end" % (script, data[: begun.start()].count(b"\n") + 1),
                          "end it with a line `# ///`; each line of it begins with #")
        return None
    first = data[: match.start(1)].count(b"\n")  # lines before the block's own
    text = "\n".join(line[2:] if line.startswith("# ") else line.lstrip("#")
                   for line in match.group(1).decode("utf-8", "replace").split("\n"))
    try:
        tool = tomllib.loads(text).get("tool")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError that is not TOML's own
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        raise Refusal("%s:%d: the runspec header is not TOML: %s" % (
            script, first + int(at.group(1)) if at else first, str(error)[: at.start() if at else None]),
            "mend the block between `# /// script` and `# ///`") from None
    spec = tool.get("runspec") if isinstance(tool, dict) else None
    if not isinstance(spec, dict):
        return None
    _check_fields(spec, script, lambda table, key: _line_of(text, table, key) + first)
    run, config, resources = spec.get("run", {}), spec.get("config", {}), spec.get("resources", {})
    return Recipe(spec["name"], root, script, spec.get("image"), run.get("launch", "torchrun"), run.get("cmd"),
                  run.get("workdir"), path.parent / config.get("dir", "./config"), config.get("default", "default"),
                  resources.get("nodes", 1), resources.get("gpus_per_node", 8),
                  spec.get("env", {}))


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


def _check_fields(spec: dict[str, Any], script: str, line: Any) -> None:
    for table, fields in FIELDS.items():
        for key, value in (spec if not table else spec.get(table, {})).items():
            if key not in fields:
                raise Refusal("%s:%d: the header has an unknown field %r" % (script, line(table, key), key),
                              "did you mean %s?" % nearest(key, list(fields)))
            if not isinstance(value, fields[key]) or isinstance(value, bool):
                raise Refusal("%s:%d: the header's %s is %r" % (script, line(table, key), key, value),
                              "it must be " + " or ".join(WORDS[kind] for kind in fields[key]))
    _check_values(spec, script, line)


def _check_values(spec: dict[str, Any], script: str, line: Any) -> None:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", spec.get("name", "")):
        raise Refusal("%s:%d: the header's name is %r" % (script, line("", "name"), spec.get("name", "")),
                      'it must be like "family/stage"')
    launch = spec.get("run", {}).get("launch", "torchrun")
    if launch not in LAUNCH_MODES:
        raise Refusal("%s:%d: launch mode %r is not known" % (script, line("run", "launch"), launch),
                      "use one of " + ", ".join(LAUNCH_MODES))
    gpus = spec.get("resources", {}).get("gpus_per_node", 8)
    if (gpus != "gpu" and not (isinstance(gpus, int) and gpus >= 0)) or spec.get("resources", {}).get("nodes", 1) < 1:
        raise Refusal("%s:%d: resources are %r" % (script, line("", "resources"), spec["resources"]),
                      'nodes must be 1 or more, gpus_per_node 0 or more or "gpu"')
    for name, value in spec.get("env", {}).items():
        if not variable(name, value):
            raise Refusal("%s:%d: the header's env.%s is %r" % (script, line("env", name), name, value),
                          "mend it: " + VARIABLE)


VARIABLE = "its name has letters, digits and _, and it is a string, a number or true or false, without NUL"


def variable(name: Any, value: Any) -> bool:
    """Whether an environment can hold it."""
    return bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name))) and isinstance(value, (str, int, float)) \
        and "\0" not in str(value)


# ---------------------------------------------------------------- command

SCRIPT_AT, CONFIG_AT = '"$AIRLIFT_CODE"/', '"$AIRLIFT_CONFIG"'


def command(recipe: Recipe, settings: dict[str, Any], args: list[str], cloud: bool) -> tuple[str, str, list[str]]:
    """(what bash runs in the pod, the tool it starts with, things to say): run_command, else cmd, else by mode."""
    script = SCRIPT_AT + shlex.quote(recipe.script)
    notes: list[str] = []
    template = settings.get("run_command") or recipe.cmd
    if template:
        text = _fill(template, script, CONFIG_AT)
        workdir = settings.get("workdir") or recipe.workdir
        if cloud and not settings.get("run_command") and not workdir and template.split()[:2] == ["uv", "run"]:
            notes.append("`%s` needs a project and the network; the pod runs plain python" % template)
            text = "python %s --config %s" % (script, CONFIG_AT)
    elif recipe.launch == "torchrun":
        text = ("torchrun --nnodes %s --node-rank \"$NODE_RANK\" --nproc-per-node %s --rdzv-backend static"
                " --rdzv-endpoint \"$MASTER_ADDR:$MASTER_PORT\" --rdzv-conf timeout=%d %s --config %s"
                % (settings["nodes"], settings["nproc"], settings["rendezvous_timeout"], script, CONFIG_AT))
    else:
        text = "python %s --config %s" % (script, CONFIG_AT)
    tool = re.match(r"[\w./-]+(?=\s|$)", text)
    return " ".join([text, *map(shlex.quote, args)]), tool.group(0) if tool else "", notes


def _fill(template: str, script: str, config: str) -> str:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if names - {"script", "config"}:
            raise ValueError("it names {%s}" % sorted(names - {"script", "config"})[0])
        return template.format(script=script, config=config)
    except (ValueError, LookupError) as error:  # LookupError: {script:{width}}
        raise Refusal("the command %r cannot be filled in: %s" % (template, error),
                      "only {script} and {config} are filled in; double other braces") from None
