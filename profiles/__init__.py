"""Profiles: where and how jobs run. One TOML file each in this folder; `load` gives one, checked and resolved.

An env.toml, as NVIDIA's launcher has it, holds profiles as well, one section each: NEMOTRON_ENV_FILE names it, else it
is looked for from the working directory upwards to the first pyproject.toml. A section there wins over a file of the
same name here. Its [wandb], [artifacts], [cache] and [cli] are no profiles; the first two go into the recipe's config.

`extends = "parent"` merges tables deeply and replaces lists. `[stages.rl]` and `[stages."data/prep"]` override for the
stages with that prefix, longest last. `${env:NAME}` reads the environment of the launcher. Every key has a type and the
executors that it is for; an unknown key, a wrong type, or a key of another executor is an error.
"""

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import VARIABLE, nearest, variable
from transport import LIMITS, Refusal

FOLDER = Path(__file__).parent
NOT_PROFILES = ("wandb", "artifacts", "cache", "cli")
CLOUDS = ("lepton", "dgxcloud")


@dataclass(frozen=True)
class Key:
    """One key of a profile: what its value must be, what it says, the executors it is for (none: all), the key it is an
    alias of, and what counts where it is left out."""

    kind: str  # one of those in wrong()
    about: str = ""
    executors: tuple[str, ...] = ()
    alias: str = ""
    default: Any = None


_REMOTE = ("docker", "slurm", *CLOUDS)
_DOCKER, _SLURM, _LEPTON, _RUNAI = ("docker",), ("slurm",), ("lepton",), ("dgxcloud",)
KEYS: dict[str, Key] = {
    # every executor
    "executor": Key("str", "local, docker, slurm, lepton or dgxcloud"),
    "extends": Key("str", "the profile that this one begins from"),
    "stages": Key("table", "overrides for stages with a prefix: [stages.rl], [stages.\"data/prep\"]"),
    "nodes": Key("int", "pods of a job"),
    "gpus_per_node": Key("count", "GPUs of a pod; 0: none"),
    "nproc_per_node": Key("count", "processes of a pod under torchrun; gpus_per_node if left out"),
    "nprocs_per_node": Key("count", alias="nproc_per_node"),
    "ntasks_per_node": Key("count", alias="nproc_per_node"),
    "env_vars": Key("env table", "the recipe's environment; it wins over what Airlift sets itself"),
    "secrets": Key("env table", "NAME = a reference (lepton:…, runai:…) or \"env\""),
    "startup_commands": Key("str list", "run in the recipe's shell before it"),
    "pip_extras": Key("str list", "installed in the pod with pip before the recipe: this needs the network"),
    "run_command": Key("str", "what starts the recipe, with {script} and {config}"),
    "workspace": Key("str", "where outputs are kept, as the pod sees it"),
    "run_dir": Key("str", "in place of <workspace>/<family>"),
    "workdir": Key("str", "where the recipe is started; the code root if left out"),
    "repo_root": Key("str", "the source tree; the launcher's own folder if left out"),
    "exclude": Key("str list", "patterns that do not ship, besides .airliftignore"),
    "scope": Key("str", "what ships: the recipe's family, or only what the script imports", default="family"),
    "compression": Key("str", "of the tar"),
    "unpack": Key("str", "each pod its own tree, or one tree on the workspace for all", default="local"),
    "keep": Key("int", "how many shared trees stay", default=5),
    "rendezvous_timeout": Key("int", "seconds that pods wait for each other", default=1800),
    "chunk_bytes": Key("int", "characters of a chunk, in place of the executor's own", ("local", "docker", *CLOUDS)),
    # every executor but this machine
    "container_image": Key("str", "the image; the recipe's header has one", _REMOTE),
    "container": Key("str", executors=_REMOTE, alias="container_image"),
    "mounts": Key("mounts", "\"SRC:DST\", or on Lepton tables with path, mount_path and from", _REMOTE),
    "git_mirrors": Key("table", "URL prefix = URL prefix, for ${auto_mount:…} repositories", _REMOTE),
    "auto_mount": Key("str", "\"image\": use the copies inside the image", _REMOTE),
    "persistent_cache": Key("str", "a folder for vLLM's, DeepGEMM's and FlashInfer's caches", _REMOTE),
    "retries": Key("whole", "further starts after a node fails or the job is preempted; see Retries",
                   ("slurm", *CLOUDS), default=0),
    "custom_spec": Key("table", "fields for the platform's own job specification", CLOUDS),
    "ca_bundle": Key("str", "a private certificate authority's file", CLOUDS),
    # Docker
    "runtime": Key("str", "Docker's runtime, like nvidia", _DOCKER),
    "ipc_mode": Key("str", "like host", _DOCKER),
    "shm_size": Key("str", "like 16g", _DOCKER),
    # Slurm
    "account": Key("str", "who pays", _SLURM),
    "partition": Key("str", "where jobs run", _SLURM),
    "run_partition": Key("str", "in its place, when attached", _SLURM),
    "batch_partition": Key("str", "in its place, with --detach", _SLURM),
    "tunnel": Key("str", "how the cluster is reached", _SLURM, default="local"),
    "host": Key("str", "the login node, with tunnel = \"ssh\"", _SLURM),
    "user": Key("str", "on that host", _SLURM),
    "port": Key("int", "of its sshd (22)", _SLURM),
    "identity": Key("str", "the private key's file", _SLURM),
    "remote_job_dir": Key("str", "on storage that all nodes see; also the workspace", _SLURM),
    "time": Key("str", "the job's limit", _SLURM, default="04:00:00"),
    "mem": Key("str", "memory of a node", _SLURM),
    "exclusive": Key("bool", "whole nodes", _SLURM),
    "cpus_per_task": Key("int", "CPUs of a pod", _SLURM),
    "setup_lines": Key("str", "lines for the batch script, before srun", _SLURM),
    "lustre_mount": Key("str", "a file system that is mounted into the container at its own path", _SLURM),
    "sif_dir": Key("str", "a folder of images, mounted at its own path", _SLURM),
    "squash_partition": Key("str", "where enroot squashes images of registries, once each", _SLURM),
    # DGX Cloud Lepton
    "node_group": Key("str", "the node group's name", _LEPTON),
    "resource_shape": Key("str", "like gpu.8xh100-80gb", _LEPTON),
    "head_resource_shape": Key("str", "of a Ray head besides the nodes; left out: one of the nodes", _LEPTON),
    "ray_version": Key("str", "the Ray in the image, for a Ray recipe on several nodes", _LEPTON),
    "existing_ray_cluster": Key("str", "a Ray cluster to run Ray recipes on, in place of a new one", _LEPTON),
    "node_reservation": Key("str", "a reservation's id", _LEPTON),
    "shared_memory_size": Key("int", "MiB of /dev/shm", _LEPTON),
    "image_pull_secrets": Key("str list", "names of registry secrets", _LEPTON),
    "nemo_run_dir": Key("str", "the workspace", _LEPTON),
    "pre_launch_commands": Key("str list", "as startup_commands, before them", _LEPTON),
    "queue_priority": Key("str", "like mid-4000", _LEPTON),
    "can_be_preempted": Key("bool", "jobs of higher priority may take the nodes", _LEPTON),
    "can_preempt": Key("bool", "the job may take the nodes of others", _LEPTON),
    # DGX Cloud run:AI
    "base_url": Key("str", "the control plane, ending in /api/v1", _RUNAI),
    "kube_apiserver_url": Key("str", "the Kubernetes API, for logs", _RUNAI),
    "client_id": Key("str", "an application's id", _RUNAI),
    "app_id": Key("str", executors=_RUNAI, alias="client_id"),
    "client_secret": Key("str", "its secret; better as ${env:NAME}", _RUNAI),
    "app_secret": Key("str", executors=_RUNAI, alias="client_secret"),
    "project_name": Key("str", "the project", _RUNAI),
    "pvc_nemo_run_dir": Key("str", "the workspace, on one of the pvcs", _RUNAI),
    "pvcs": Key("table list", "volumes: claimName, path, existingPvc", _RUNAI),
    "distributed_framework": Key("str", "the kind of distributed job; only PyTorch tells pods their rank", _RUNAI,
                                 default="PyTorch"),
    "dgxcloud_max_args_chars": Key("int", "characters of arguments that the API takes", _RUNAI,
                                   default=LIMITS["dgxcloud"].args),
}
# Keys of NVIDIA's launcher that are refused, and why.
REFUSED = {
    "launcher": "the recipe's header says how it is launched; take it out",
    **dict.fromkeys(("packager", "packager_include_pattern", "packager_subpath", "packager_include_submodules",
                     "packager_relative_path"), "Airlift packs the tree itself; exclude and scope say what ships"),
}
# Those that change nothing here: refused too, but in an env.toml, which NVIDIA's launcher reads as well, only named.
UNUSED = {
    **dict.fromkeys(("build_partition", "build_time", "build_cache_dir", "build_image", "build_include_gpus",
                     "build_gpus_per_node"), "images are used as they are named, and never built"),
    "code_src_dir": "the source travels with the job",
}
# Executors of NVIDIA's launcher that have none here.
ELSEWHERE = ("skypilot", "kubeflow")
REQUIRED = {
    "local": (), "docker": (), "slurm": ("account", "partition", "remote_job_dir"),
    "lepton": ("node_group", "resource_shape"),
    "dgxcloud": ("base_url", "client_id", "client_secret", "project_name"),
}
CHOICES = {"compression": ("xz", "gz"), "unpack": ("local", "shared"), "scope": ("family", "imports"),
           "tunnel": ("local", "ssh"), "auto_mount": ("image",)}
SECRET_KEYS = ("client_secret", "app_secret")  # never shown
# Text of a shell or of a platform, where ${ is its own affair; elsewhere one that is left was meant to be replaced.
FREE_TEXT = ("startup_commands", "pre_launch_commands", "setup_lines", "run_command", "env_vars", "custom_spec")
UNREAD = re.compile(r"\$\{(?!auto_mount:)[^}\s]*\}?")


@dataclass(frozen=True)
class Profile:
    """A resolved profile. `files` are the TOML files it came from; `stage` holds the keys of matching [stages.…]."""

    name: str
    executor: str
    files: tuple[str, ...]
    keys: dict[str, Any]
    stage: dict[str, Any]
    unset: tuple[str, ...]  # variables that ${env:NAME} asked for and that are not set
    notes: tuple[str, ...] = ()  # things to say

    @property
    def settings(self) -> dict[str, Any]:
        """What counts for that stage where neither recipe nor command line say more."""
        return defaults(self.executor) | self.keys | self.stage

    def require_set(self) -> None:
        """Raises Refusal if the profile reads a variable that is not set: fine for a dry run, not for a launch."""
        if self.unset:
            raise Refusal("profile %s reads %s, which %s not set" % (
                self.name, ", ".join(self.unset), "is" if len(self.unset) == 1 else "are"),
                "export it, or write the value into %s" % self.files[0])


def defaults(executor: str) -> dict[str, Any]:
    """The defaults of the executor's keys."""
    return {name: key.default for name, key in KEYS.items()
            if key.default is not None and (not key.executors or executor in key.executors)}


PINNED: list[Path] = []


@contextlib.contextmanager
def pinned(file: str | None) -> Iterator[None]:
    """Within it that file is the env.toml, wherever we are: the one that a run was launched with."""
    PINNED.extend([Path(file)] if file else [])
    try:
        yield
    finally:
        del PINNED[:]


def env_file() -> Path | None:
    """The env.toml that counts here. Raises Refusal if NEMOTRON_ENV_FILE names one that is not there."""
    if PINNED:
        return PINNED[0]
    named = os.environ.get("NEMOTRON_ENV_FILE")
    if named:
        path = Path(os.path.expanduser(named))
        if not path.is_file():
            raise Refusal("NEMOTRON_ENV_FILE names %s, which is not there" % named, "mend it, or unset it")
        return path.resolve()
    try:
        here = Path.cwd()
    except FileNotFoundError:  # a folder that was removed has nothing above it
        return None
    for folder in (here, *here.parents):
        if (folder / "env.toml").is_file():
            return folder / "env.toml"
        if (folder / "pyproject.toml").exists():
            break
    return None


def sections() -> dict[str, dict[str, Any]]:
    """The sections of env.toml, {} without one. Raises Refusal for what is not a section."""
    path = env_file()
    found = _read(path) if path else {}
    for name, section in found.items():
        if not isinstance(section, dict):
            raise Refusal("%s: %s stands in no section" % (path, name), "put it below a [profile]")
    return found


def section(name: str, dry: bool = False) -> dict[str, Any]:
    """env.toml's [wandb] or [artifacts], with variables read; {} where there is none. Raises Refusal for a variable
    that is not set, unless it is only for show."""
    unset: list[str] = []
    found = resolve(sections().get(name, {}), unset)
    if unset and not dry:
        raise Refusal("[%s] of %s reads %s, which is not set" % (name, env_file(), unset[0]),
                      "export it, or write it there")
    return dict(found)


def names() -> list[str]:
    """The profiles of this folder and of env.toml."""
    return sorted({path.stem for path in FOLDER.glob("*.toml")} | (set(sections()) - set(NOT_PROFILES)))


def load(name: str, stage: str = "") -> Profile:
    """The profile of that name for a stage. Raises Refusal that names file, key and the nearest known word."""
    layers = _layers(name, ())
    unset: list[str] = []
    keys: dict[str, Any] = {}
    for table, _ in reversed(layers):
        keys = merge(keys, table)
    stages = keys.pop("stages", {})
    keys = resolve(keys, unset)
    executor = keys.get("executor")
    if executor is None:
        raise Refusal("profile %s names no executor" % name, "add executor = one of " + ", ".join(LIMITS))
    if executor in ELSEWHERE:
        raise Refusal("profile %s: executor %s is not supported" % (name, executor), "use one of " + ", ".join(LIMITS))
    if not isinstance(executor, str) or executor not in LIMITS:
        raise Refusal("profile %s: executor %r is not known" % (name, executor),
                      "did you mean %s?" % nearest(str(executor), LIMITS))
    if not isinstance(stages, dict):
        raise Refusal("profile %s: stages is %r" % (name, stages), "write tables like [stages.rl]")
    notes: list[str] = []
    keys = _checked(keys, executor, "profile " + name, layers, notes)
    overrides: dict[str, Any] = {}
    for prefix in sorted(stages, key=len):
        if not isinstance(stages[prefix], dict):
            raise Refusal("profile %s: stages.%s is %r" % (name, prefix, stages[prefix]),
                          "write a table [stages.%s]" % prefix)
        nested = [key for key, value in stages[prefix].items() if isinstance(value, dict) and key not in KEYS]
        if nested:
            raise Refusal("profile %s: stages.%s has no key %r" % (name, prefix, nested[0]),
                          'for stages below it write [stages."%s/%s"]' % (prefix, nested[0]))
        for key in ("executor", "extends", "stages", "repo_root"):
            if key in stages[prefix]:
                raise Refusal("profile %s: stages.%s sets %s" % (name, prefix, key), "set it at the top of the profile")
        parts = [(_table(_table(table.get("stages")).get(prefix)), path) for table, path in layers]
        matches = (stage + "/").startswith(prefix.strip("/") + "/")
        where = "profile %s, stages.%s" % (name, prefix)
        found = resolve(stages[prefix], unset if matches else [])  # another stage's variables need not be set
        checked = _checked(found, executor, where, parts, notes if matches else [])
        if matches:
            overrides = merge(overrides, checked)
    missing = [key for key in REQUIRED[executor] if not (overrides.get(key) or keys.get(key))]
    if missing:
        raise Refusal("profile %s lacks %s" % (name, ", ".join(missing)), "executor %s needs it; see profiles/%s.toml"
                      % (executor, executor))
    return Profile(name, executor, tuple(str(path) for _, path in layers), keys, overrides, tuple(dict.fromkeys(unset)),
                   tuple(dict.fromkeys(notes)))


PATHS = ("repo_root", "workspace", "ca_bundle")


def anchor(table: dict[str, Any], executor: str, base: Path | None = None, *keys: str) -> None:
    """Relative paths of this machine begin at launch.py's folder, or at env.toml's."""
    for key in keys or PATHS:
        if key in table and (key != "workspace" or executor == "local"):
            table[key] = os.path.normpath((base or FOLDER.parent) / os.path.expanduser(table[key]))


def _layers(name: str, seen: tuple[str, ...]) -> list[tuple[dict[str, Any], Path]]:
    """The profile's own table and those that it extends, nearest first, each with its file."""
    if name in seen:
        raise Refusal("profiles extend each other in a circle: " + " -> ".join((*seen, name)), "take one extends out")
    if name not in names():
        asked = "profile %s extends %r, which" % (seen[-1], name) if seen else "profile %r" % name
        raise Refusal("%s is not there" % asked, "did you mean %s?" % nearest(name, names()))
    in_env = name in sections() and name not in NOT_PROFILES
    path = env_file() if in_env else FOLDER / (name + ".toml")
    assert path is not None
    keys = _canonical(dict(sections()[name]) if in_env else _read(path), "profile " + name)
    if isinstance(keys.get("stages"), dict):
        keys["stages"] = {prefix: _canonical(part, "profile %s, stages.%s" % (name, prefix))
                          if isinstance(part, dict) else part for prefix, part in keys["stages"].items()}
    parent = keys.pop("extends", None)
    if parent is None:
        return [(keys, path)]
    if not isinstance(parent, str):
        raise Refusal("%s: extends is %r" % (path, parent), 'write extends = "name"')
    return [(keys, path), *_layers(parent, (*seen, name))]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (path, error.strerror), "make it readable, or remove it") from None
    except UnicodeDecodeError:
        raise Refusal("%s is not TOML: it is not UTF-8" % path, "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # not TOML, a number or a nesting beyond all bounds
        raise Refusal("%s is not TOML: %s" % (path, error), "mend the file") from None


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _canonical(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Aliases under their own names, before tables are merged: a child's `container` replaces a parent's image."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        name = KEYS[key].alias or key if key in KEYS else key
        if name in result:
            raise Refusal("%s: %s is set twice, once as an alias" % (where, name), "keep one of them")
        result[name] = value
    return result


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables deeply, everything else (lists too) replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def resolve(value: Any, unset: list[str]) -> Any:
    """Variables read in every string of a table, as _read_variables does."""
    if isinstance(value, dict):
        return {key: resolve(item, unset) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, unset) for item in value]
    return _read_variables(value, unset) if isinstance(value, str) else value


REFERENCE = re.compile(r"\$\{(?:oc\.)?env:([A-Za-z_][A-Za-z0-9_]*)([,}])")


def _read_variables(text: str, unset: list[str]) -> str:
    """`${env:NAME}` and `${oc.env:NAME[,default]}` replaced; a default may be quoted, and read variables itself. One
    that is not set shows as <unset NAME>. What was read is not read again."""
    if text.count("${") > 100:
        raise Refusal("a value reads more than 100 variables: %s..." % text[:60], "write it out")
    result, at = "", 0
    while match := REFERENCE.search(text, at):
        name, end, default = match.group(1), match.end(), None
        if match.group(2) == ",":
            depth = 1
            while end < len(text) and depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            if depth:  # it never ends
                break
            default = text[match.end():end - 1]
        if name in os.environ:
            value = os.environ[name]
        elif default is not None:
            plain = _read_variables(default, unset).strip()
            value = plain[1:-1] if len(plain) > 1 and plain[0] == plain[-1] in "'\"" else plain
        else:
            unset.append(name)
            value = "<unset %s>" % name
        result, at = result + text[at:match.start()] + value, end
    return result + text[at:]


def _checked(table: dict[str, Any], executor: str, where: str, layers: list[tuple[dict[str, Any], Path]],
             notes: list[str]) -> dict[str, Any]:
    """The table, with paths of this machine whole. Raises Refusal for an unknown key, a wrong type or executor.
    `layers` are the tables that it was merged from, nearest first, with their files."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        known, path = KEYS.get(key), next(path for layer, path in layers if key in layer)
        foreign = known is not None and bool(known.executors) and executor not in known.executors
        if path.parent != FOLDER and (key in UNUSED or foreign):
            why = UNUSED.get(key) or "it is for " + ", ".join(known.executors if known else ())
            notes.append("%s: %s is not used: %s" % (where, key, why))
            continue
        if key in REFUSED or key in UNUSED:
            raise Refusal("%s: %s is not supported" % (where, key),
                          REFUSED.get(key) or UNUSED[key] + "; take it out")
        if known is None:
            raise Refusal("%s: there is no key %r" % (where, key), "did you mean %s?" % nearest(key, KEYS))
        if foreign:
            raise Refusal("%s: %s is not for executor %s" % (where, key, executor),
                          "it is for %s; take it out" % ", ".join(known.executors))
        problem = wrong(key, value)
        if problem:
            shown = "***" if key in SECRET_KEYS or isinstance(value, dict) else repr(value)
            raise Refusal("%s: %s is %s" % (where, key, shown), "it must be " + problem)
        unread = UNREAD.search(repr(value)) if key not in FREE_TEXT else None
        if unread:
            raise Refusal("%s: %s holds %s, which nothing replaces" % (where, key, unread.group(0)),
                          "a profile reads ${env:NAME} and ${oc.env:NAME,default}; write the rest out")
        result[key] = value
        if key in PATHS:
            anchor(result, executor, FOLDER.parent if path.parent == FOLDER else path.parent, key)
    return result


def wrong(key: str, value: Any) -> str:
    """What the value of that key should have been, or "" where it is right."""
    if key in CHOICES and value not in CHOICES[key]:
        return " or ".join(CHOICES[key])
    whole = isinstance(value, int) and not isinstance(value, bool)
    table = value if isinstance(value, dict) else {}
    odd = ", ".join(str(name) for name in table if not variable(name, table[name]))
    good = {
        "str": ("a string", isinstance(value, str)),
        "int": ("a whole number, 1 or more", whole and value >= 1),
        "whole": ("a whole number, 0 or more", whole and value >= 0),
        "count": ('a whole number, 0 or more, or "gpu"', (whole and value >= 0) or value == "gpu"),
        "bool": ("true or false", isinstance(value, bool)),
        "str list": ("a list of strings", isinstance(value, list) and all(isinstance(item, str) for item in value)),
        "table": ("a table", isinstance(value, dict)),
        "env table": ("a table of variables" + ("; see %s: %s" % (odd, VARIABLE) if odd else ""),
                      isinstance(value, dict) and not odd),
        "table list": ("a list of tables", isinstance(value, list) and all(isinstance(item, dict) for item in value)),
        "mounts": ("a list of strings or tables",
                   isinstance(value, list) and all(isinstance(item, (str, dict)) for item in value)),
    }
    expected, right = good[KEYS[key].kind]
    return "" if right else expected


def overview() -> Iterator[tuple[str, str, str]]:
    """(name, executor, what its file says of it in its first comment) of every profile; "?" where it does not load."""
    for name in names():
        executor, first = "?", "# from %s" % env_file()
        try:
            if name not in sections() or name in NOT_PROFILES:
                first = (FOLDER / (name + ".toml")).read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
            executor = load(name).executor
        except (Refusal, OSError):
            pass  # `?` says it; a launch says why
        yield name, executor, first.lstrip("# ") if first.startswith("#") else ""


def table() -> str:
    """The README's table of keys, in Markdown."""
    kinds = {"str": "string", "int": "number", "whole": "number", "count": "number or \"gpu\"", "bool": "true, false",
             "table": "table", "env table": "table", "str list": "list of strings", "table list": "list of tables",
             "mounts": "list"}
    rows = ["| key | value | for | what it says |", "|---|---|---|---|"]
    for name, key in KEYS.items():
        kind = " or ".join("`%s`" % choice for choice in CHOICES[name]) if name in CHOICES else kinds[key.kind]
        about = "another name for `%s`" % key.alias if key.alias else key.about
        about += " (default: %s)" % key.default if key.default is not None else ""
        rows.append("| `%s` | %s | %s | %s |" % (name, kind, ", ".join(key.executors) or "all", about))
    return "\n".join(rows) + "\n"
