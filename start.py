"""The command that starts a recipe in its pod, and what uv needs for it.

A recipe may want `uv run`, which installs what it needs first. That can be done where the pod has uv and reaches an
index, which only the pod knows: before the recipe, uv prepares its environment there, and where it cannot, `uv` becomes
a function of the shell that starts plain python, which then needs an image with everything in it. (On a cloud the
command is plain python, and `python` becomes a function where uv can.) Four kinds:

  - `uv run ...` by the header: with the project beside src, whose pyproject.toml ships, and uv.lock if it fits
  - `uv run --no-project ...`: with the dependencies that the script's own block names (PEP 723)
  - `uv run ...` with a workdir: with the project that the image has there
  - a stage with a project of its own and a run_uv.py (Nemotron's embed and rerank), which then starts the script
"""

import re
import shlex
import shutil
import string
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from profiles import CLOUDS
from recipes import Recipe
from transport import LOCK, Refusal

SCRIPT_AT, CONFIG_AT = '"$AIRLIFT_CODE"/', '"$AIRLIFT_CONFIG"'
PROJECT = "pyproject.toml"


class Start(NamedTuple):
    """How a recipe is started."""

    command: str  # what bash runs
    tool: str  # the program that it begins with, "" if not known
    setup: list[str]  # what bash runs before it, after the user's own
    notes: list[str]


def start(recipe: Recipe, settings: dict[str, Any], args: list[str], executor: str, cluster: str = "") -> Start:
    """By run_command, else by the header's cmd, else by launch mode. `cluster` as in jobs.Description. Raises
    Refusal."""
    template, script = settings.get("run_command") or recipe.cmd, SCRIPT_AT + shlex.quote(recipe.script)
    way = None if settings.get("run_command") else _by_uv(recipe, settings, cluster)
    if way and not recipe.cmd:
        script = '"$AIRLIFT_START"'
    if way and template and way.swapped and executor in CLOUDS:
        text = _fill("python " + template[template.index("{script}"):], script, CONFIG_AT)
        way = way._replace(plain=":", used=way.swapped)
    elif template:
        text = _fill(template, script, CONFIG_AT)
    elif recipe.launch == "torchrun":
        text = ("torchrun --nnodes %s --node-rank \"$NODE_RANK\" --nproc-per-node %s --rdzv-backend static"
                " --rdzv-endpoint \"$MASTER_ADDR:$MASTER_PORT\" --rdzv-conf timeout=%d %s --config %s"
                % (settings["nodes"], settings["nproc"], settings["rendezvous_timeout"], script, CONFIG_AT))
    else:
        text = "python %s --config %s" % (script, CONFIG_AT)
    tool = "".join(re.findall(r"^[\w./-]+(?=\s|$)", text))
    absent = executor == "local" and not settings.get("startup_commands") and not shutil.which(
        "uv", path=settings.get("env_vars", {}).get("PATH"))
    setup, notes = ([way.setup()], [way.note(absent)]) if way else ([], [])
    setup = [each for each in setup if each != ":"]
    return Start(" ".join([text, *map(shlex.quote, args)]), tool if tool != "uv" or not way else "", setup, notes)


class _Way(NamedTuple):
    """One of the four kinds. What bash runs is without line ends, since it also stands on the screen."""

    what: str  # it is called
    source: str  # of what uv installs
    ready: str  # what bash runs to see whether uv can; "" where it needs no look
    plain: str  # what it runs for plain python
    used: str = ":"  # and for uv
    never: str = ""  # why plain python is certain
    swapped: str = ""  # what it runs for uv where the command is plain python, as on a cloud it is unless uv can

    def setup(self) -> str:
        """What decides in the pod."""
        if self.never:
            return self.plain
        why = "there is no uv in this pod", "uv cannot install %s here, see above" % self.source
        none, cannot = ("{ echo %s; %s; }" % (shlex.quote("airlift: %s: plain python starts the recipe" % each),
                                              self.plain) for each in why)
        ready = "elif ! %s; then %s; " % (self.ready, cannot) if self.ready else ""
        return "if ! command -v uv >/dev/null; then %s; %selse %s; fi" % (none, ready, self.used)

    def note(self, absent: bool) -> str:
        """For the dry run; `absent`: this machine is to start it, and has no uv."""
        if self.never:
            return "`%s` needs a project and the network, and %s: plain python starts the recipe" % (
                self.what, self.never)
        if not self.ready:
            return "`%s` starts the recipe where the pod has uv, else plain python" % self.what
        return ("`%s` needs %s and the network: it starts the recipe where the pod's uv can install all that this "
                "names, else plain python, for which the image must have it%s" % (
                    self.what, self.source, "; there is no uv on this machine" * absent))


# A copy, for uv writes there, and its environment beside it; what starts the pods of a Ray cluster is in that, too.
OWN_PROJECT = (
    '{ { [ -n "${UV_PROJECT:-}" ] || { '
    'export UV_PROJECT="${AIRLIFT_CONFIG%%/*}/project" UV_PROJECT_ENVIRONMENT="${AIRLIFT_CONFIG%%/*}/uv"; '
    'mkdir -p "$UV_PROJECT" && ln -sfn "$AIRLIFT_CODE"/* "$UV_PROJECT" && rm -f "$UV_PROJECT"/uv.lock && '
    '{ [ ! -e "$AIRLIFT_CODE"/uv.lock ] || cp "$AIRLIFT_CODE"/uv.lock "$UV_PROJECT"; }; }; } && '
    "airlift_bin=$(uv run %s python -c 'import os, sys; print(os.path.dirname(sys.executable))'); }")
ITS_PATH = '[ ! -d "$airlift_bin" ] || export PATH="$airlift_bin:$PATH"'


def _by_uv(recipe: Recipe, settings: dict[str, Any], cluster: str) -> _Way | None:
    """How uv starts the recipe by its header, or its stage's project; None where it does not."""
    never = "the nodes of a Ray cluster of the platform have what the image has" if cluster == "platform" else ""
    found = re.match(r"(uv run\b(.*?))\s(python3?\s+)?\{script\}", recipe.cmd or "")
    folder, own = Path(recipe.script).parent, SCRIPT_AT + shlex.quote(recipe.script)
    if found:
        what, options, python = found.group(1), found.group(2).strip(), found.group(3)
        plain = "uv() { unset -f uv; unset UV_PROJECT; shift %d; %s\"$@\"; }; export -f uv" % (
            len(what.split()) - 1, "" if python else "python ")
        swapped = "python() { unset -f python; %s %s\"$@\"; }; export -f python" % (what, python or "")
        if settings.get("workdir") or recipe.workdir:
            return _Way(what, "", "", plain)
        if "--no-project" in options.split():
            source = "the script's own dependencies (%s)" % ", ".join(map(package, recipe.needs))
            return _Way(what, source, "uv sync -q --script " + own, plain, swapped=swapped)
        if not (recipe.root / PROJECT).is_file():
            return _Way(what, "", "", plain, never="there is no %s beside src" % PROJECT, swapped=swapped)
        return _Way(what, "the project in " + PROJECT, OWN_PROJECT % options, plain, ITS_PATH, never,
                    "%s; %s" % (ITS_PATH, swapped))
    if recipe.cmd is None and (recipe.root / folder / "run_uv.py").is_file() and \
            entry_point(recipe.root / folder / PROJECT) == Path(recipe.script).name:
        project, wrapper = (SCRIPT_AT + shlex.quote((folder / name).as_posix()) for name in (PROJECT, "run_uv.py"))
        return _Way("run_uv.py", "the %s of its stage" % PROJECT,
                    "uv pip compile -q -o /dev/null %s >/dev/null" % project,
                    "export AIRLIFT_START=" + own, "export AIRLIFT_START=" + wrapper, never)
    return None


def package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement.strip())[0]


def _toml(path: Path) -> dict[str, Any]:
    """A pyproject.toml; {} where there is none that can be read: uv says what is wrong with it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def entry_point(path: Path) -> str:
    """The script that a stage's project starts, by [tool.nemotron] in its pyproject.toml."""
    try:
        return str(_toml(path)["tool"]["nemotron"]["entry-point"])
    except (KeyError, TypeError):
        return ""


def project_files(recipe: Recipe, settings: dict[str, Any], setup: list[str]) -> tuple[str, ...]:
    """What ships of the project beside src: its pyproject.toml; where the recipe's command, or one before it, lets uv
    install it, its lock and the files that its [project] names. With a workdir that is the image's project."""
    own = settings.get("run_command") or ("" if settings.get("workdir") or recipe.workdir else recipe.cmd)
    commands, root = "\n".join([*setup, own or ""]), recipe.root
    found: list[str] = [PROJECT]
    if re.search(r"\buv (run|sync|export)\b(?!.*--no-project)|\bcurator_runtime\b", commands):
        project = _toml(root / PROJECT).get("project")
        for value in [project.get(key) for key in ("readme", "license")] if isinstance(project, dict) else []:
            name = value.get("file") if isinstance(value, dict) else value
            found += [str(name)] * (isinstance(name, str) and "/" not in name and (root / name).is_file())
        found.append(LOCK)
    return tuple(name for name in found if (root / name).is_file())


def _fill(template: str, script: str, config: str) -> str:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if names - {"script", "config"}:
            raise ValueError("it names {%s}" % sorted(names - {"script", "config"})[0])
        return template.format(script=script, config=config)
    except (ValueError, LookupError) as error:  # LookupError: {script:{width}}
        raise Refusal("the command %r cannot be filled in: %s" % (template, error),
                      "only {script} and {config} are filled in; double other braces") from None
