"""Profiles: where and how jobs run. Each is a TOML file in this folder; `load` returns one, checked and resolved.

The sections of an env.toml, the file of NVIDIA's launcher, are profiles, too: the file that NEMOTRON_ENV_FILE names,
else the nearest one from the working directory upwards to the first pyproject.toml, if it was allowed once by its path:
anybody may have put it there. A section wins over a file of the same name here. [wandb], [artifacts], [cache] and [cli]
are not profiles; the first two go into the recipe's config.

`extends = "parent"` merges tables deeply and replaces lists. `[stages.rl]` and `[stages."data/prep"]` override keys for
the stages with that prefix, the longest prefix last. `${env:NAME}` reads the launcher's environment. Every key has a
type and the executors it is for; an unknown key, a wrong type, or a key of another executor is an error. An env.toml is
shared with other tools: there, unknown keys and those of another executor are notes.
"""

import contextlib
import datetime
import difflib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import screen
import state
from recipes import VARIABLE, nearest, variable
from transport import LIMITS, Refusal

FOLDER = Path(__file__).parent
NOT_PROFILES = ("wandb", "artifacts", "cache", "cli")
CLOUDS = ("lepton", "dgxcloud")


@dataclass(frozen=True)
class Key:
    """One key of a profile."""

    kind: str  # of its value, one of those in must_be()
    about: str = ""  # its meaning, for the README's table
    executors: tuple[str, ...] = ()  # those it is for; () for all
    alias: str = ""  # the key that it is another name for
    default: Any = None


_REMOTE = ("docker", "slurm", *CLOUDS)
_DOCKER, _SLURM, _LEPTON, _RUNAI = ("docker",), ("slurm",), ("lepton",), ("dgxcloud",)
KEYS: dict[str, Key] = {
    # every executor
    "executor": Key("str", "the platform: local, docker, slurm, lepton or dgxcloud"),
    "extends": Key("str", "the profile that this one starts from"),
    "stages": Key("table", "overrides for stages that begin with a prefix: [stages.rl], [stages.\"data/prep\"]"),
    "nodes": Key("int", "number of nodes; each runs one pod"),
    "gpus_per_node": Key("count", "GPUs of each pod; 0 for none"),
    "nproc_per_node": Key("count", "processes that torchrun starts in each pod; gpus_per_node if left out"),
    "nprocs_per_node": Key("count", alias="nproc_per_node"),
    "ntasks_per_node": Key("count", alias="nproc_per_node"),
    "env_vars": Key("env table", "environment variables of the recipe; they win over those that Airlift sets"),
    "secrets": Key("env table", "NAME = a secret of the platform (lepton:…, runai:…), \"env\" or \"login\""),
    "startup_commands": Key("str list", "shell commands that run before the recipe, in the same shell"),
    "pip_extras": Key("str list", "packages that pip installs in the pod before the recipe; this needs the network"),
    "wheels": Key("str list", "wheels that are sent, as *.whl, and folders of wheels that the pods see; see Packages"),
    "run_command": Key("str", "the command that starts the recipe; {script} and {config} are filled in"),
    "workspace": Key("str", "the folder where outputs are kept, as the pod sees it"),
    "run_dir": Key("str", "the folder for outputs, in place of <workspace>/<family>"),
    "workdir": Key("str", "the folder in which the recipe is started; work/ in the run root if left out"),
    "sandbox": Key("table", "NeMo-Gym's sandbox: container, and port and command where they differ from its own"),
    "repo_root": Key("str", "the source tree; the one you stand in, or the launcher's own, if left out"),
    "notify": Key("str", "a command that is run here when a launch that is followed has ended; on Slurm with --detach, "
                  "by the job; see Every day"),
    "exclude": Key("str list", "patterns of files that are not sent, in addition to .airliftignore"),
    "include": Key("str list", "patterns of files that are sent all the same, whatever would leave them out"),
    "scope": Key("str", "what is sent: the recipe's family, or only what the script imports", default="family"),
    "compression": Key("str", "compression of the source archive; chosen for the executor if left out"),
    "unpack": Key("str", "where the source is unpacked: in each pod, or once on the workspace", default="local"),
    "keep": Key("int", "how many trees stay on the workspace with unpack = \"shared\"", default=5),
    "rendezvous_timeout": Key("int", "seconds that pods wait for each other", default=1800),
    "chunk_bytes": Key("int", "characters per chunk, in place of the executor's default", ("local", "docker", *CLOUDS)),
    # every executor but this machine
    "container_image": Key("str", "the container image; the one in the recipe's header if left out", _REMOTE),
    "container": Key("str", executors=_REMOTE, alias="container_image"),
    "mounts": Key("mounts", "folders for the pod: \"SRC:DST\"; on Lepton tables with path, mount_path, from", _REMOTE),
    "git_mirrors": Key("table", "URL prefix = prefix of its mirror, for ${auto_mount:…} repositories", _REMOTE),
    "auto_mount": Key("str", "\"image\": use the repositories inside the image, clone none", _REMOTE),
    "persistent_cache": Key("str", "a folder that keeps the caches of vLLM, DeepGEMM and FlashInfer", _REMOTE),
    "retries": Key("whole", "how often a job is started again; see Retries", ("slurm", *CLOUDS), default=0),
    "custom_spec": Key("table", "fields to merge into the platform's job specification", CLOUDS),
    "ca_bundle": Key("str", "certificate file of a private certificate authority", CLOUDS),
    # both clouds: how a job is placed, and how it is found
    "priority": Key("str", "the platform's own word for it: mid-4000 on Lepton, medium-high on run:AI", CLOUDS),
    "queue_priority": Key("str", executors=CLOUDS, alias="priority"),
    "preemptible": Key("bool", "whether jobs of higher priority may take this job's nodes", CLOUDS),
    "can_be_preempted": Key("bool", executors=CLOUDS, alias="preemptible"),
    "image_pull_secrets": Key("str list", "names of secrets for the image's registry; on run:AI, runai:NAME is a "
                              "credential of yours", CLOUDS),
    "segments": Key("int", "NVLink domains that the nodes are divided into; see Placement", CLOUDS),
    "labels": Key("names table", "labels of the job, in addition to airlift-run and airlift-tree", CLOUDS),
    "host_network": Key("bool", "whether pods use the network of their nodes; on Lepton only for Ray clusters", CLOUDS),
    "security": Key("table", "the platform's security context: runAsUid, …; on Lepton no_specific_user, privileged",
                    CLOUDS),
    # Docker
    "runtime": Key("str", "Docker's runtime, like nvidia", _DOCKER),
    "ipc_mode": Key("str", "IPC mode of the container, like host", _DOCKER),
    "shm_size": Key("str", "size of /dev/shm, like 16g", _DOCKER),
    # Slurm
    "account": Key("str", "the Slurm account that is charged; your default one if left out", _SLURM),
    "partition": Key("str", "the partition that jobs run in; the default one if left out", _SLURM),
    "run_partition": Key("str", "the partition of launches that follow their job", _SLURM),
    "batch_partition": Key("str", "the partition of launches with --detach", _SLURM),
    "tunnel": Key("str", "how sbatch is reached: on this machine, or on a login node by ssh", _SLURM, default="local"),
    "host": Key("str", "the login node, or its alias in ~/.ssh/config, with tunnel = \"ssh\"", _SLURM),
    "user": Key("str", "the user name on the login node; ssh's own choice if left out", _SLURM),
    "port": Key("int", "the ssh port of the login node; ssh's own choice if left out", _SLURM),
    "identity": Key("str", "file of the ssh private key; ssh's own choice if left out", _SLURM),
    "remote_job_dir": Key("str", "a folder that all nodes see, for the jobs' files; also the workspace; ~ is your home"
                          " on the cluster", _SLURM, default="~/airlift"),
    "time": Key("str", "time limit of the job", _SLURM, default="04:00:00"),
    "mem": Key("str", "memory per node, like 64G", _SLURM),
    "exclusive": Key("bool", "whether the job gets its nodes for itself", _SLURM),
    "cpus_per_task": Key("int", "CPUs of each pod", _SLURM),
    "continuations": Key("whole", "how often a job that reaches its time limit is continued; see Long jobs", _SLURM,
                         default=0),
    "grace": Key("int", "seconds before the time limit at which the recipe gets SIGTERM, with continuations", _SLURM,
                 default=120),
    "sbatch": Key("table", "other options of sbatch: qos, reservation, constraint, gres, mail-type and so on", _SLURM),
    "srun": Key("table", "other options of srun", _SLURM),
    "setup_lines": Key("str", "shell lines of the batch script, before srun", _SLURM),
    "lustre_mount": Key("str", "a file system that the container sees under the same path", _SLURM),
    "sif_dir": Key("str", "a folder of images that the container sees under the same path", _SLURM),
    "squash_partition": Key("str", "the partition where enroot converts images of registries, once each", _SLURM),
    "squash_time": Key("str", "time limit of that conversion", _SLURM, default="01:00:00"),
    "fresh_image": Key("bool", "whether the image is converted again, since its tag may have moved", _SLURM),
    # DGX Cloud Lepton
    "node_group": Key("str", "name of the node group", _LEPTON),
    "resource_shape": Key("str", "resource shape of each pod, like gpu.8xh100-80gb", _LEPTON),
    "head_resource_shape": Key("str", "resource shape of a separate Ray head; without it a node is the head", _LEPTON),
    "ray_version": Key("str", "version of Ray in the image, for a Ray recipe on several nodes", _LEPTON),
    "existing_ray_cluster": Key("str", "a running Ray cluster for Ray recipes, in place of a new one", _LEPTON),
    "node_reservation": Key("str", "id of a node reservation", _LEPTON),
    "shared_memory_size": Key("int", "size of /dev/shm in MiB", _LEPTON),
    "nemo_run_dir": Key("str", "the workspace, where `workspace` is not set", _LEPTON),
    "pre_launch_commands": Key("str list", "shell commands that run before startup_commands", _LEPTON),
    "can_preempt": Key("bool", "whether this job may take the nodes of jobs with lower priority", _LEPTON),
    "start_at": Key("time", "when the job may start, at the earliest", _LEPTON),
    "visibility": Key("str", "who sees the job in the workspace", _LEPTON),
    "rdma": Key("bool", "whether the pods of a Ray cluster get the RDMA devices", _LEPTON),
    # DGX Cloud run:AI
    "base_url": Key("str", "URL of the control plane, ending in /api/v1", _RUNAI),
    "kube_apiserver_url": Key("str", "URL of the Kubernetes API, for logs", _RUNAI),
    "client_id": Key("str", "id of the service account that signs in (before run:AI 3.0: of the application)", _RUNAI),
    "app_id": Key("str", executors=_RUNAI, alias="client_id"),
    "client_secret": Key("str", "its secret; better written as ${env:NAME}", _RUNAI),
    "app_secret": Key("str", executors=_RUNAI, alias="client_secret"),
    "project_name": Key("str", "name of the project", _RUNAI),
    "pvc_nemo_run_dir": Key("str", "the workspace, a folder on one of the pvcs", _RUNAI),
    "pvcs": Key("table list", "volumes of the pods: claimName, path, existingPvc", _RUNAI),
    "preemptibility": Key("str", "run:AI's own word, in place of preemptible", _RUNAI),
    "node_pools": Key("str list", "names of node pools, the preferred one first", _RUNAI),
    "node_type": Key("str", "the group of nodes that the pods may run on", _RUNAI),
    "tolerations": Key("table list", "taints that are tolerated: key, operator, value, effect, seconds", _RUNAI),
    "annotations": Key("names table", "annotations of the pods", _RUNAI),
    "topology": Key("str", "node label of the topology level that all pods must share", _RUNAI),
    "mnnvl": Key("str", "multi-node NVLink; the platform prefers it if left out", _RUNAI),
    "extended_resources": Key("names table", "other resources of each pod, like \"rdma/ib\" = 1", _RUNAI),
    "distributed_framework": Key("str", "kind of distributed job; only PyTorch tells pods their rank", _RUNAI,
                                 default="PyTorch"),
    "dgxcloud_max_args_chars": Key("int", "most characters of arguments that the API takes", _RUNAI,
                                   default=LIMITS["dgxcloud"].args),
}
# Keys of NVIDIA's launcher that are refused, and why.
REFUSED = {
    "launcher": "the recipe's header says how it is launched; remove it",
    **dict.fromkeys(("packager", "packager_include_pattern", "packager_subpath", "packager_include_submodules",
                     "packager_relative_path"), "Airlift packs the tree itself; exclude and scope say what is sent"),
}
# Keys without effect here. They are refused, too, but an env.toml is shared with NVIDIA's launcher: there, a note.
UNUSED = {
    **dict.fromkeys(("build_partition", "build_time", "build_cache_dir", "build_image", "build_include_gpus",
                     "build_gpus_per_node"), "images are used as they are, and never built"),
    "code_src_dir": "the source travels with the job",
    "apptainer": "the image must have it, or startup_commands install it",
}
ELSEWHERE = ("skypilot", "kubeflow")  # executors of NVIDIA's launcher that Airlift does not have
REQUIRED = {
    "local": (), "docker": (), "slurm": (),
    "lepton": ("node_group", "resource_shape"),
    "dgxcloud": ("base_url", "client_id", "client_secret", "project_name"),
}
CHOICES = {"compression": ("xz", "gz"), "unpack": ("local", "shared"), "scope": ("family", "imports"),
           "tunnel": ("local", "ssh"), "auto_mount": ("image",), "visibility": ("public", "private"),
           "preemptibility": ("preemptible", "non-preemptible", "semi-preemptible"),
           "mnnvl": ("none", "preferred", "required")}
# A checkout is not trusted: who we are, whom we talk to, which secrets are sent, and what is done outside of the
# container comes from profiles and the command line, never from a YAML.
PROFILES_ONLY = ("base_url", "kube_apiserver_url", "client_id", "client_secret", "project_name", "ca_bundle", "tunnel",
                 "host", "user", "port", "identity", "remote_job_dir", "setup_lines", "git_mirrors", "secrets",
                 "image_pull_secrets", "existing_ray_cluster", "custom_spec", "runtime", "ipc_mode", "lustre_mount",
                 "pvcs", "sbatch", "srun", "include", "wheels", "labels", "annotations", "tolerations", "host_network",
                 "security", "visibility", "extended_resources", "notify")
UNREAD_KEYS = ("client_secret", "custom_spec", "git_mirrors", "setup_lines")  # may hold secrets; no config reads them
# Text for a shell or a platform, which may use ${ itself; in any other key a ${ that is left over is a mistake.
FREE_TEXT = ("startup_commands", "pre_launch_commands", "setup_lines", "run_command", "env_vars", "custom_spec",
             "notify")
# A name of a label, an annotation or a resource, as Kubernetes has them.
NAMED = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
UNREAD = re.compile(r"\$\{(?!auto_mount:)[^}\s]*\}?")


@dataclass(frozen=True)
class Profile:
    """A resolved profile."""

    name: str
    executor: str
    files: tuple[str, ...]  # the TOML files it came from
    keys: dict[str, Any]
    stage: dict[str, Any]  # the keys of matching [stages.…]
    unset: tuple[str, ...]  # variables that ${env:NAME} reads and that are not set
    notes: tuple[str, ...] = ()
    others: dict[str, Any] = field(default_factory=dict)  # keys of an env.toml that are not ours; configs may read them

    @property
    def settings(self) -> dict[str, Any]:
        """The settings for that stage, before recipe and command line."""
        return defaults(self.executor) | self.keys | self.stage

    def require_set(self) -> None:
        """Raises Refusal if the profile reads a variable that is not set: a dry run may, a launch may not."""
        if self.unset:
            raise Refusal("profile %s reads %s, which %s not set" % (
                self.name, ", ".join(self.unset), "is" if len(self.unset) == 1 else "are"),
                "export %s, or write the value into %s" % ("it" if len(self.unset) == 1 else "them", self.files[0]))


def defaults(executor: str) -> dict[str, Any]:
    """The settings of an executor without any profile. On this machine outputs are kept in any case."""
    found = {name: key.default for name, key in KEYS.items()
             if key.default is not None and (not key.executors or executor in key.executors)}
    return found | ({"workspace": "output"} if executor == "local" else {})


PINNED: list[Path] = []
BESIDE: list[Path] = []  # the env.toml of the source tree that is named, if one is; used where none is found upwards


@contextlib.contextmanager
def pinned(file: str | None) -> Iterator[None]:
    """Within it, that file is the env.toml, whatever the working directory: the one that a run was launched with."""
    PINNED.extend([Path(file)] if file else [])
    try:
        yield
    finally:
        del PINNED[:]


def env_file() -> Path | None:
    """The env.toml in use. Raises Refusal if NEMOTRON_ENV_FILE names one that does not exist."""
    if PINNED:
        return PINNED[0]
    named = os.environ.get("NEMOTRON_ENV_FILE")
    if named:
        path = Path(os.path.expanduser(named))
        if not path.is_file():
            raise Refusal("NEMOTRON_ENV_FILE names %s, which does not exist" % named, "correct it, or unset it")
        return path.resolve()
    found = found_file()
    return found if found and str(found) in allowed() else None


def found_file() -> Path | None:
    """The env.toml that is found upwards from the working directory, whoever put it there."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the working directory was removed
        return None
    for folder in (here, *here.parents):
        if (folder / "env.toml").is_file():
            return (folder / "env.toml").resolve()
        if (folder / "pyproject.toml").exists():
            break
    return next((path.resolve() for path in BESIDE if path.is_file()), None)


def allowed() -> set[str]:
    """The paths that allow() was given. Raises Refusal."""
    path = state.folder(make=False) / "allowed.json"
    try:
        return set(map(str, json.loads(state.read(path))))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError):
        raise Refusal("%s cannot be read" % path, "remove it, and allow your env.toml again") from None


def allow(path: Path) -> str:
    """Use that env.toml from now on, also after changes. One sentence about its profiles."""
    found = [name for name, keys in _read(path).items() if isinstance(keys, dict) and name not in NOT_PROFILES]
    state.write(state.folder() / "allowed.json", json.dumps(sorted({*allowed(), str(path)}), indent=1).encode())
    replaced = [name for name in found if (FOLDER / (name + ".toml")).exists()]
    instead = "; they replace the shipped " + ", ".join(replaced) if replaced else ""
    return "%s is used from now on; its profiles: %s%s" % (path, ", ".join(found) or "none", instead)


def not_used() -> list[str]:
    """A note about an env.toml that was found, and which this person has not allowed."""
    path = found_file()
    return ["%s is not used, since anybody may have put it there; if it is yours: python launch.py allow %s" % (
        path, shlex.quote(str(path)))] if path and env_file() is None else []


def sections() -> dict[str, dict[str, Any]]:
    """The sections of env.toml, {} without one. Raises Refusal for a key outside of them."""
    path = env_file()
    found = _read(path) if path and str(path) != os.devnull else {}
    for name, section in found.items():
        if not isinstance(section, dict):
            raise Refusal("%s: the key %s is in no section" % (path, name), "move it below the [name] of a profile")
    return found


def section(name: str, dry: bool = False) -> dict[str, Any]:
    """env.toml's [wandb] or [artifacts], or {}. Raises Refusal for a variable that is not set, except in a dry run."""
    unset: list[str] = []
    found = resolve(sections().get(name, {}), unset)
    if unset and not dry:
        raise Refusal("[%s] of %s reads %s, which is not set" % (name, env_file(), unset[0]),
                      "export it, or write the value there")
    return dict(found)


def names() -> list[str]:
    """The names of the profiles of this folder and of env.toml."""
    return sorted({path.stem for path in FOLDER.glob("*.toml")} | (set(sections()) - set(NOT_PROFILES)))


def load(name: str, stage: str = "") -> Profile:
    """The profile of that name for a stage. Raises Refusal that names file, key and similar known ones."""
    layers = _layers(name, ())
    unset: list[str] = []
    keys: dict[str, Any] = {}
    for table, _ in reversed(layers):
        keys = merge(keys, table)
    stages = keys.pop("stages", {})
    keys = _values(keys, keys, unset)
    executor = keys.get("executor")
    if executor is None:
        raise Refusal("profile %s has no executor" % name, "add executor = one of " + ", ".join(LIMITS))
    if executor in ELSEWHERE:
        raise Refusal("profile %s: executor %s is not supported" % (name, executor), "use one of " + ", ".join(LIMITS))
    if not isinstance(executor, str) or executor not in LIMITS:
        raise Refusal("profile %s: executor %r is not known" % (name, executor),
                      "did you mean %s?" % nearest(str(executor), LIMITS))
    notes = not_used()
    others = {key: value for key, value in keys.items() if key not in KEYS}
    keys = _checked(keys, executor, "profile " + name, layers, notes)
    overrides = _overrides(stages, stage, "profile " + name, executor, layers, unset, notes)
    whole = keys | overrides
    unset += ["the value of " + key for key in (*REQUIRED[executor], "remote_job_dir") if whole.get(key) == ""]
    missing = [key for key in REQUIRED[executor] if key not in whole]
    if missing:
        raise Refusal("profile %s lacks %s" % (name, ", ".join(missing)), "executor %s needs it; see profiles/%s.toml"
                      % (executor, executor))
    return Profile(name, executor, tuple(str(path) for _, path in layers), keys, overrides, tuple(dict.fromkeys(unset)),
                   tuple(dict.fromkeys(notes)), others)


Layers = list[tuple[dict[str, Any], Path]]  # a profile's table and those that it extends, nearest first, with files


def _overrides(stages: Any, stage: str, profile: str, executor: str, layers: Layers, unset: list[str], notes: list[str]
               ) -> dict[str, Any]:
    """What the tables [stages.PREFIX] set for a stage. All are checked; variables of other stages may be unset."""
    if not isinstance(stages, dict):
        raise Refusal("%s: stages is %r" % (profile, stages), "write tables like [stages.rl]")
    overrides: dict[str, Any] = {}
    for prefix in sorted(stages, key=len):
        table, where = stages[prefix], "%s: stages.%s" % (profile, prefix)
        if not isinstance(table, dict):
            raise Refusal("%s is %r" % (where, table), "write a table [stages.%s]" % prefix)
        nested = [key for key, value in table.items() if isinstance(value, dict) and key not in KEYS]
        if nested:
            raise Refusal("%s has no key %r" % (where, nested[0]),
                          'for stages below it write [stages."%s/%s"]' % (prefix, nested[0]))
        for key in ("executor", "extends", "stages", "repo_root"):
            if key in table:
                raise Refusal("%s sets %s" % (where, key), "set it at the top of the profile")
        parts = [(_table(_table(layer.get("stages")).get(prefix)), path) for layer, path in layers]
        matches = (stage + "/").startswith(prefix.strip("/") + "/")
        found = _values(table, table, unset if matches else [])
        checked = _checked(found, executor, where.replace(":", ",", 1), parts, notes if matches else [])
        overrides = merge(overrides, checked) if matches else overrides
    return overrides


PATHS = ("repo_root", "workspace", "ca_bundle")


def anchor(table: dict[str, Any], executor: str, base: Path | None = None, *keys: str) -> None:
    """Make relative paths of this machine absolute: they begin at launch.py's folder, or at env.toml's."""
    for key in keys or PATHS:
        if key in table and (key != "workspace" or executor == "local"):
            table[key] = _here(table[key], base)
    if isinstance(table.get("wheels"), list):
        table["wheels"] = [_here(word, base) if str(word).endswith(".whl") else word for word in table["wheels"]]


def _here(path: str, base: Path | None) -> str:
    return os.path.normpath((base or FOLDER.parent) / os.path.expanduser(path))


def _layers(name: str, seen: tuple[str, ...]) -> Layers:
    if name in seen:
        raise Refusal("profiles extend each other in a cycle: " + " -> ".join((*seen, name)), "remove one extends")
    if name not in names():
        subject = "profile %s extends %r, which" % (seen[-1], name) if seen else "profile %r" % name
        read = ", ".join(filter(None, [str(FOLDER / "*.toml"), str(env_file() or "")]))
        raise Refusal("%s does not exist" % subject, [
            *not_used(), "did you mean %s? (read: %s)" % (nearest(name, names()), read)][0])
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
    state.require_small(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (path, error.strerror), "make it readable, or remove it") from None
    except UnicodeDecodeError:
        raise Refusal("%s is not TOML: it is not UTF-8" % path, "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also for numbers and nesting without bounds
        raise Refusal("%s is not TOML: %s" % (path, error), "fix the file") from None


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _canonical(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The table without aliases. Tables are merged after that, so that a child's `container` replaces the image."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        name = KEYS[key].alias or key if key in KEYS else key
        if name in result:
            raise Refusal("%s: %s is set twice, once as an alias" % (where, name), "keep one of them")
        result[name] = value
    return result


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: tables are merged deeply, everything else, lists included, is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def _values(table: dict[str, Any], keys: dict[str, Any], unset: list[str]) -> dict[str, Any]:
    """A profile's table with references read: `${KEY}`, another key of it, and variables, which may give numbers. A
    number whose variable is not set is left out, for a dry run."""
    def named(match: re.Match[str]) -> str:
        found = keys.get(match.group(1))
        return str(found) if isinstance(found, (str, int, float)) else match.group(0)

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(item) for item in value]
        for _ in range(10 * isinstance(value, str)):  # a key may name another; those that go round stay, and are told
            if "${" not in value or len(value) > 1 << 16:
                break
            value = re.sub(r"\$\{(\w+)\}", named, value)
        return value

    result = {}
    for key, value in table.items():
        found = resolve(value if key in FREE_TEXT else own(value), unset)
        kind = KEYS[key].kind if key in KEYS and isinstance(found, str) and found != value else ""
        if kind in ("int", "whole", "count", "bool"):
            if found.startswith("<unset "):
                continue
            whole = re.fullmatch(r"[0-9]{1,9}", found)
            found = int(found) if whole else {"true": True, "false": False}.get(found.lower(), found)
        result[key] = found.isoformat() if isinstance(found, datetime.datetime) else found
    return result


def resolve(value: Any, unset: list[str]) -> Any:
    """Variables read in every string of a table, as _read_variables does."""
    if isinstance(value, dict):
        return {key: resolve(item, unset) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, unset) for item in value]
    return _read_variables(value, unset) if isinstance(value, str) else value


REFERENCE = re.compile(r"\$\{(?:oc\.)?env:([A-Za-z_][A-Za-z0-9_]*)([,}])")


def _read_variables(text: str, unset: list[str]) -> str:
    """`${env:NAME}` and `${oc.env:NAME[,default]}` replaced; a default may be quoted, and read variables itself. A
    variable that is not set becomes <unset NAME>; values are not searched for variables again."""
    if text.count("${") > 100:
        raise Refusal("a value reads more than 100 variables: %s..." % text[:60], "write the text itself")
    result, at = "", 0
    while match := REFERENCE.search(text, at):
        name, end, default = match.group(1), match.end(), None
        if match.group(2) == ",":
            depth = 1
            while end < len(text) and depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            if depth:  # no closing brace
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


def _checked(table: dict[str, Any], executor: str, where: str, layers: Layers, notes: list[str]) -> dict[str, Any]:
    """The table that was merged from `layers`, with paths of this machine absolute. Raises Refusal for an unknown key,
    a wrong type or a key of another executor."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        known, path = KEYS.get(key), next(path for layer, path in layers if key in layer)
        foreign = known is not None and bool(known.executors) and executor not in known.executors
        if path.parent != FOLDER and (key in UNUSED or foreign):
            why = UNUSED.get(key) or "it is for " + ", ".join(known.executors if known else ())
            notes.append("%s: %s has no effect: %s" % (where, key, why))
            continue
        if key in REFUSED or key in UNUSED:
            raise Refusal("%s: %s is not supported" % (where, key), REFUSED.get(key) or UNUSED[key] + "; remove it")
        if known is None and path.parent == FOLDER:
            here = [name for name, one in KEYS.items() if not one.executors or executor in one.executors]
            raise Refusal("%s: there is no key %r" % (where, key), "did you mean %s?" % nearest(key, here))
        if known is None:
            close = difflib.get_close_matches(key, KEYS, 1, 0.8)
            meant = "; did you mean %s?" % close[0] if close else ""
            notes.append("%s: %s is no key of Airlift's, and has no effect%s" % (where, key, meant))
            continue
        if foreign:
            raise Refusal("%s: %s is not for executor %s" % (where, key, executor),
                          "it is for %s; remove it" % ", ".join(known.executors))
        expected = must_be(key, value)
        if expected:
            shown = "***" if screen.secret_name(key) or isinstance(value, dict) else repr(value)
            raise Refusal("%s: %s is %s" % (where, key, shown), "it must be " + expected)
        unread = UNREAD.search(repr(value)) if key not in FREE_TEXT else None
        if unread:
            raise Refusal("%s: %s contains %s, which is not replaced" % (where, key, unread.group(0)),
                          "${env:NAME}, ${oc.env:NAME,default} and ${KEY} are; write anything else as plain text")
        result[key] = value
        if key in PATHS:
            anchor(result, executor, FOLDER.parent if path.parent == FOLDER else path.parent, key)
    return result


def moment(value: Any) -> int | None:
    """A time with its zone in seconds since 1970; None for anything else."""
    try:
        found = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return int(found.timestamp()) if found.tzinfo else None


def must_be(key: str, value: Any) -> str:
    """What the value of that key must be, or "" where it is right."""
    if key in CHOICES and value not in CHOICES[key]:
        return " or ".join(CHOICES[key])
    whole = isinstance(value, int) and not isinstance(value, bool)
    is_table, is_list = isinstance(value, dict), isinstance(value, list)
    odd = ", ".join(str(name) for name in value if not variable(name, value[name])) if is_table else ""
    lines = isinstance(value, str) and key not in FREE_TEXT and re.search(r"[\0-\x1f\x7f]", value)
    expected, right = {
        "str": ("a string" + " without control characters" * bool(lines), isinstance(value, str) and not lines),
        "int": ("a whole number, 1 or more", whole and value >= 1),
        "whole": ("a whole number, 0 or more", whole and value >= 0),
        "count": ('a whole number, 0 or more, or "gpu"', (whole and value >= 0) or value == "gpu"),
        "bool": ("true or false", isinstance(value, bool)),
        "str list": ("a list of strings", is_list and all(isinstance(item, str) for item in value)),
        "table": ("a table", is_table),
        "env table": ("a table of variables" + ("; see %s: %s" % (odd, VARIABLE) if odd else ""), is_table and not odd),
        "names table": ("a table of texts or numbers; a name has letters, digits, . _ -, and perhaps a domain/",
                        is_table and all(NAMED.fullmatch(str(name)) and isinstance(item, (str, int))
                                         for name, item in value.items())),
        "time": ('a time with its zone, like "2026-12-01T08:00:00Z"', moment(value) is not None),
        "table list": ("a list of tables", is_list and all(isinstance(item, dict) for item in value)),
        "mounts": ("a list of strings or tables", is_list and all(isinstance(item, (str, dict)) for item in value)),
    }[KEYS[key].kind]
    return "" if right else expected


def overview() -> Iterator[tuple[str, str, str]]:
    """(name, executor, first comment of its file) of every profile; executor "?" where it cannot be loaded."""
    for name in names():
        executor, first = "?", "# from %s" % env_file()
        try:
            if name not in sections() or name in NOT_PROFILES:
                first = (FOLDER / (name + ".toml")).read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
            executor = load(name).executor
        except (Refusal, OSError):
            pass  # a launch says why
        yield name, executor, first.lstrip("# ") if first.startswith("#") else ""


def table() -> str:
    """The README's table of keys, in Markdown."""
    rows = ["| key | value | for | meaning |", "|---|---|---|---|"]
    for name, key in KEYS.items():
        kind = " or ".join("`%s`" % choice for choice in CHOICES.get(name, ())) or must_be(name, None)
        about = "another name for `%s`" % key.alias if key.alias else key.about
        about += " (default: %s)" % key.default if key.default is not None else ""
        rows.append("| `%s` | %s | %s | %s |" % (name, kind, ", ".join(key.executors) or "all", about))
    return "\n".join(rows) + "\n"
