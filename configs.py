"""Compile a recipe's config: YAML, read with OmegaConf as NVIDIA's launcher does.

`defaults:` merges parents, KEY=VALUE overrides are applied, `${run.…}` is replaced as text, paths of this machine
become places in the pod, and the rest, without `run`, is what the script gets. Other interpolations are left to the
pod.
"""

import difflib
import functools
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import screen
import state
from profiles import UNREAD_KEYS
from recipes import Recipe, inside, nearest, read_header
from transport import Refusal


@dataclass(frozen=True)
class Config:
    """A compiled config."""

    path: Path  # of the YAML
    text: str  # what the script reads
    run: dict[str, Any]  # its run section
    yaml: dict[str, Any]  # the same before the profile
    notes: tuple[str, ...]
    recipe: Recipe  # with the script of run.train_script, if that is set
    shown: str  # the text with *** for what is named like a secret
    missing: tuple[str, ...]  # keys that are ???, and need a value
    unread: tuple[str, ...]  # what it refers to and nothing sets


def is_path(name: str) -> bool:
    """Whether `-c name` is a file's path."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def config_file(recipe: Recipe, name: str | None) -> Path:
    """The YAML for `-c name`: a path if it holds `/` or ends in .yaml or .yml, else a file of the config folder."""
    if not name:  # the header's default may be a file name, too
        name = recipe.config_default
        if (recipe.config_dir / name).is_file():
            return recipe.config_dir / name
    if is_path(name):
        if not Path(name).is_file():
            raise Refusal("there is no config file %s" % name,
                          "give the path of a file, or the name of a config in %s" % recipe.config_dir)
        return Path(name)
    if own := _own_file(recipe, name):
        return own
    known = [path.stem for path in recipe.config_dir.glob("*.y*ml")]
    raise Refusal("%s has no config %r in %s" % (recipe.name, name, recipe.config_dir),
                  "did you mean %s?" % nearest(name, known) if known else "create one there")


def has(recipe: Recipe, name: str) -> bool:
    """Whether a recipe has a config of that name; a file's path is for any."""
    return is_path(name) or _own_file(recipe, name) is not None


def _own_file(recipe: Recipe, name: str) -> Path | None:
    """The file of a recipe's config of that name, if there is one."""
    files = (recipe.config_dir / (name + suffix) for suffix in (".yaml", ".yml"))
    return next((file for file in files if file.is_file()), None)


def known_keys(recipe: Recipe, name: str | None) -> set[str]:
    """The top-level keys of a config, run.KEY for each of its run, and what every config can have; before any override.
    Raises Refusal as compile_config does."""
    omegaconf = _omegaconf()
    config = omegaconf.OmegaConf.to_container(_load_config(omegaconf, recipe, name, config_file(recipe, name)))
    run = config.get("run")
    own = run if isinstance(run, dict) else ()
    return {"run", "run.env", "run.wandb", *map(str, config), *map("run.{}".format, own)}


def compile_config(recipe: Recipe, name: str | None, overrides: list[str], settings: Any,
                   wandb: dict[str, Any] | None = None, artifacts: dict[str, Any] | None = None,
                   others: dict[str, Any] | None = None) -> Config:
    """Read, merge and override the YAML. `settings(recipe, env, forced)` returns its run.env merged with the profile;
    `forced` are the KEY=VALUE overrides of run.env. `wandb` replaces run.wandb; the YAML's artifacts win over
    `artifacts`; `others` are more that ${run.env.KEY} may name. Raises Refusal for a bad file, a cycle in `defaults:`,
    or a bad override."""
    omegaconf = _omegaconf()
    path = config_file(recipe, name)
    loaded, notes = _load_config(omegaconf, recipe, name, path), list[str]()
    dotted = _dotted(omegaconf, loaded, overrides, notes)
    plain = omegaconf.OmegaConf.to_container(_override(omegaconf, loaded, dotted), resolve=False)
    run = yaml = _table(plain.pop("run", None), "run", path)
    forced = omegaconf.OmegaConf.to_container(dotted).get("run") or {}
    yaml_env = _table(run.get("env"), "run.env", path)
    recipe = with_script(recipe, run.get("train_script"), path)
    env = settings(recipe, yaml_env, forced.get("env") or {})
    if wandb:
        public = {key: value for key, value in wandb.items() if not screen.secret_name(key)}
        run = run | {"wandb": public | _table(forced.get("wandb"), "run.wandb", path)}
    if artifacts:
        plain["artifacts"] = artifacts | _table(plain.get("artifacts"), "artifacts", path)
    run = run | {"env": env, "recipe": {"name": recipe.name, "script": recipe.script}}
    # ${run.env.KEY} may also name keys that this executor does not use, but none that would tell the job a credential.
    public = {key: value for key, value in (others or {}).items()
              if not screen.secret_name(key) and screen.hide(str(value)) == str(value)}
    known = run | {"env": public | yaml_env | {key: value for key, value in env.items() if key not in UNREAD_KEYS}}
    plain = places(_replace_run(plain, _replace_run(known, known)), recipe.root)
    kept = {key: value for key, value in run.items() if is_artifact(value)}
    plain |= {"run": kept} if kept else {}
    text, masked = dump(plain), screen.masked(plain)
    missing = sorted(set(re.findall(r"\$\{(run\.[^}:]+)\}", text)))
    notes += ["the config refers to ${%s}, which is not set anywhere" % reference for reference in missing]
    notes += ["run.%s has no effect; write run.env.%s" % (key, key) for key in ENV_KEYS if key in run]
    return Config(path, text, run, yaml, tuple(notes), recipe, text if masked == plain else dump(masked),
                  (*_missing(plain), *_missing(env, "run.env.")), tuple(missing))


ENV_KEYS = ("container_image", "container", "nodes", "gpus_per_node", "nproc_per_node", "ntasks_per_node", "mounts",
            "env_vars", "startup_commands", "run_command", "workdir")  # of run.env, often written one level too high


def with_script(recipe: Recipe, script: Any, path: Path) -> Recipe:
    """The recipe with another script and its header, but the same name and configs. Raises Refusal."""
    if script is None:
        return recipe
    place = posixpath.normpath(str(script).replace("${oc.env:PWD}/", "").removeprefix(str(recipe.root) + "/"))
    if not isinstance(script, str) or not place.startswith("src/") or not (recipe.root / place).is_file():
        raise Refusal("%s: run.train_script is %r, which does not exist" % (path, script),
                      "name a script below %s/src, like %s" % (recipe.root, recipe.script))
    other = read_header(recipe.root, recipe.root / place)
    if other is None:
        return replace(recipe, script=place)
    return replace(other, name=recipe.name, image=other.image or recipe.image, config_dir=recipe.config_dir,
                   config_default=recipe.config_default)


def _table(value: Any, name: str, path: Path) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise Refusal("%s: %s is %r, not a table" % (path, name, value),
                      "fix the config's %s section" % name.split(".")[0])
    return value or {}


def _omegaconf() -> Any:
    try:
        with screen.step("import omegaconf"):
            import omegaconf
    except ImportError:
        raise Refusal("omegaconf, which reads the configs, is not installed for %s" % sys.executable,
                      "run `make setup`, or pip install -r requirements.txt with that Python") from None
    return omegaconf


def _load_config(omegaconf: Any, recipe: Recipe, name: str | None, path: Path) -> Any:
    """A config and its parents. Only one that the person named may lie outside of the tree, and name others there."""
    own = name and is_path(name) and not Path(os.path.abspath(path)).is_relative_to(recipe.root)
    return _load(omegaconf, path, (), None if own else recipe.root)


DEEPEST = 500  # levels: libyaml's own recursion ends the process at some ten thousand


def _require_shallow(path: Path) -> None:
    """Raises Refusal for a config whose brackets or dashes nest deeper than any person writes."""
    text = path.read_bytes() if path.is_file() else b""
    depth = 0
    for match in re.finditer(rb"[][{}]", text):
        depth += 1 if match.group() in b"[{" else -1
        if depth > DEEPEST:
            break
    if depth > DEEPEST or b"- " * DEEPEST in text:
        raise Refusal("%s is not a config: it nests more than %d levels deep" % (path, DEEPEST), "fix the YAML")


def _load(omegaconf: Any, path: Path, seen: tuple[Path, ...], root: Path | None) -> Any:
    """`root`: the tree that the file must lie in, links followed; None for a file of the person's own."""
    if root and not inside(path, root):
        raise Refusal("%s lies outside of the source tree, and %s it" % (
            path, "defaults: of %s names" % seen[-1] if seen else "the tree leads to"),
            "copy it into the tree, or name it yourself with -c")
    state.require_small(path)
    _require_shallow(path)
    if path.resolve() in seen:
        raise Refusal("the defaults: of configs form a cycle: " + " -> ".join(p.name for p in (*seen, path.resolve())),
                      "remove one of them from the defaults: that names it")
    try:
        config = omegaconf.OmegaConf.load(path)
        if not omegaconf.OmegaConf.is_dict(config):
            raise ValueError("it is a list, not a table of settings")
    except FileNotFoundError:
        raise Refusal("%s is named in defaults: of %s, but does not exist" % (path, seen[-1]),
                      "fix the defaults:") from None
    except UnicodeDecodeError:
        raise Refusal("%s is not a config: it is not UTF-8" % path, "save it as UTF-8") from None
    except Exception as error:  # YAML's and OmegaConf's errors share no base class
        raise Refusal("%s is not a config: %s" % (path, _short(error)), "fix the YAML") from None
    parents = omegaconf.OmegaConf.to_container(config, resolve=False).get("defaults")
    names = [parents] if isinstance(parents, str) else parents if isinstance(parents, list) else []
    if not names or not all(isinstance(item, str) for item in names):
        return config  # a list of tables is the script's own, as in Hydra
    merged = omegaconf.OmegaConf.create()
    for item in names:
        if item != "_self_":
            parent = path.parent / (item if Path(item).suffix else item + ".yaml")
            merged = _merge(omegaconf, merged, _load(omegaconf, parent, (*seen, path.resolve()), root), parent)
    del config["defaults"]
    return _merge(omegaconf, merged, config, path)


def _short(error: Exception) -> str:
    """An error of YAML or OmegaConf in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark and problem:
        return "line %d: %s" % (mark.line + 1, screen.one_line(str(problem)))
    if type(error).__name__ == "GrammarParseError":
        where = getattr(error, "full_key", "") or "a value"
        return "%s has a ${ that cannot be parsed; write a literal one as \\${" % where
    return screen.one_line(str(error))


def _merge(omegaconf: Any, below: Any, above: Any, path: Path) -> Any:
    try:
        return omegaconf.OmegaConf.merge(below, above)
    except Exception as error:
        raise Refusal("%s cannot be merged with its defaults: %s" % (path, screen.one_line(str(error))),
                      "a table cannot replace a list, nor a list a table") from None


def _missing(value: Any, where: str = "") -> Iterator[str]:
    """The keys whose value is `???`, which says that a person must give one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if item == "???":
            yield where + str(key)
        yield from _missing(item, "%s%s." % (where, key))


# Numbers as a person means them: 12:30:45 is a time and 0755 a mode, not the number that YAML 1.1 makes of them.
NUMBERS = {"int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
           "float": re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
                               r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$")}


@functools.cache
def _loader() -> Any:
    """A reader of YAML like OmegaConf's, without dates, but with NUMBERS."""
    import yaml
    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, NUMBERS.get(tag.rpartition(":")[2], pattern)) for tag, pattern in known if "timestamp" not in tag]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    return Loader


def _dotted(omegaconf: Any, config: Any, overrides: list[str], notes: list[str]) -> Any:
    """The KEY=VALUE overrides as a config; `+` or `++` before a key says that it may be new. Raises Refusal for what is
    none, and for a new key that looks like a misspelt one. Notes name new keys, and texts that YAML changes."""
    import yaml
    result, there = omegaconf.OmegaConf.create(), omegaconf.OmegaConf.to_container(config, resolve=False)
    for override in overrides:
        key, _, text = override.partition("=")
        if not re.fullmatch(r"(\+\+?)?[^=+~.\s]+(\.[^=+~.\s]+)*", key):
            raise Refusal("the override '%s=' names no setting" % key, "overrides are KEY=VALUE with dots between "
                          "names; + before a key says that it is new, and none can be removed with ~")
        try:
            value = yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader
            omegaconf.OmegaConf.update(result, key.lstrip("+"), value)
        except Exception as error:
            raise Refusal("the override %r cannot be parsed: %s" % (override, _short(error)),
                          "its value is read as YAML; put a text in quotes, like: 'key=\"[text\"'") from None
        if _looks_other(text.strip(), value):
            notes.append("%s is read as %s; if you mean the text: '%s=\"%s\"'" % (
                override, str(value).lower() if isinstance(value, bool) else value, key, text))
        if not key.startswith(("+", "run.")):
            notes += _new(there, key)
    return result


def _looks_other(text: str, value: Any) -> bool:
    """Whether a value that YAML makes of a text looks like another one: yes, 1_000, 0x1F, 3.10."""
    if isinstance(value, bool):
        return text.lower() not in ("true", "false")
    if isinstance(value, float):
        return "_" in text or bool(re.search(r"\.[0-9]+0$", text))
    return isinstance(value, int) and str(value) != text.lstrip("+")


def _new(config: dict[str, Any], key: str) -> list[str]:
    """A note if a dotted key is new to the config. Raises Refusal where it looks like one that is there."""
    here: Any = config
    for number, part in enumerate(parts := re.split(r"[.\[]", key)):
        if not isinstance(here, dict):
            return []  # a list's item, or below a value that is no table
        if part not in here:
            close = difflib.get_close_matches(part, map(str, here), 1, 0.8)
            if close:
                right = ".".join([*parts[:number], close[0], *parts[number + 1:]])
                raise Refusal("the config has no key %s" % key,
                              "did you mean %s? if it is to be new: +%s=..." % (right, key))
            return ["%s is new: the config has no such key" % key]
        here = here[part]
    return []


def _override(omegaconf: Any, config: Any, dotted: Any) -> Any:
    try:
        return omegaconf.OmegaConf.merge(config, dotted)
    except Exception as error:
        raise Refusal("an override does not fit the config: " + screen.one_line(str(error)),
                      "overrides are KEY=VALUE with dots between names") from None


def is_artifact(value: Any) -> bool:
    """Whether a value of `run` is a reference like nano3-sft-data:latest, which the script resolves in the pod."""
    if not isinstance(value, str) or "/" in value or "nvcr" in value.lower() or "docker" in value.lower():
        return False
    name, colon, version = value.rpartition(":")
    return "Artifact" in value or bool(colon and "." not in name and re.match(r"v|latest$|\d+$", version))


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


MAX_TEXT = 16 << 20  # characters of a compiled config


def _replace_run(value: Any, run: dict[str, Any]) -> Any:
    """`${run.a.b}` replaced by that value: as text within a string, with its type where it is the whole string. Raises
    Refusal where a few references, or YAML's aliases, make gigabytes."""
    size = 0

    def count(text: str) -> None:
        nonlocal size
        size += len(text)
        if size > MAX_TEXT:
            raise Refusal("the config is larger than 16 MiB once its references are filled in", "shorten it")

    def lookup(reference: str, default: str) -> Any:
        here: Any = run
        for part in reference.split("."):
            if not isinstance(here, dict) or part not in here:
                return default
            here = here[part]
        count(str(here))
        return here

    def text(match: re.Match[str]) -> str:
        found = lookup(match.group(1), match.group(0))
        return "" if found is None else str(found)

    def change(item: str) -> Any:
        count(item)
        whole = re.fullmatch(r"\$\{run\.([^}$]+)\}", item)
        return lookup(whole.group(1), item) if whole else re.sub(r"\$\{run\.([^}]+)\}", text, item)

    return _map_strings(value, change)


def places(value: Any, root: Path) -> Any:
    """Paths of this machine and of NVIDIA's layout as /nemo_run/code/… and /nemo_run/…, which the pod replaces."""

    def change(item: str) -> str:
        item = item.replace("${oc.env:PWD}", "/nemo_run/code")
        item = re.sub(r"^\$\{oc\.env:NEMO_RUN_DIR[^}]*\}", "/nemo_run", item)
        prefix = _root_prefix(item, str(root))
        item = "/nemo_run/code" + item[len(prefix):] if prefix else item
        return re.sub(r"(?<![\w./}-])/nemo_run(?:/[^\s:,'\"]*)?/\.\.(?:/[^\s:,'\"]*)?",
                      lambda match: posixpath.normpath(match.group(0)), item)

    return _map_strings(value, change)


def _root_prefix(path: str, root: str) -> str:
    """The beginning of a path that leads to root, maybe through links; "" for a path outside it."""
    if path.startswith("/") and not path.startswith("/nemo_run"):
        for component in re.finditer(r"/+[^/]+", path):
            try:
                if os.path.realpath(path[:component.end()], strict=True) == root:
                    return path[:component.end()]
            except (OSError, ValueError):  # it does not exist, or is not a path
                return ""
    return ""


def shown(text: str) -> str:
    """A compiled config with *** for what is named like a secret. Raises Refusal for what is none."""
    omegaconf = _omegaconf()
    try:
        config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text), resolve=False)
    except Exception as error:  # whatever a YAML of anyone's brings about
        raise Refusal("the config cannot be read: %s" % screen.one_line(str(error))[:200], "it is none") from None
    masked = screen.masked(config)
    return screen.hide(text if masked == config else dump(masked))


def with_run(text: str, section: dict[str, Any]) -> str:
    """A compiled config with a run section, as a config that compiles to the same again."""
    omegaconf = _omegaconf()
    config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text), resolve=False)
    return dump(config | {"run": section | config.get("run", {})})


def dump(value: Any) -> str:
    """YAML that OmegaConf and PyYAML read alike: what one of them would take for a number is quoted, what is not
    printable is escaped (PyYAML does not read back the U+0085 that it writes), and each string that contains a place
    is in double quotes, so that the pod can insert any path."""
    import yaml
    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        numeric = re.fullmatch(r"[-+]?[0-9.][0-9_.]*([eE][-+]?[0-9]+)?", text)
        style = '"' if numeric or "/nemo_run" in text or not text.isprintable() else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    # After an escaped line end, a place would look like part of a longer name to the pod; YAML reads `\/` as `/`.
    return re.sub(r"((?<!\\)(?:\\\\)*\\[nrt])/nemo_run", r"\1\\/nemo_run", text)
