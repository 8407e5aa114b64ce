"""What every executor shares: Job, the table of executors, and the file that remembers a run.

A backend is a module with seven functions:

    check(job, plan)                    raises Refusal for what the platform would refuse, without asking it
    submit(run, job, plan, attached)    start the job; what the others need is in run.record, saved before it is sent
    follow(run) -> Status               pass logs on until the job ends; run.ranks says whose
    logs(run)                           print the logs that there are, and return
    status(run) -> Status               ask the platform
    cancel(run) -> str                  end the job; one sentence that says what was done
    probe(settings, job) -> findings    what can be asked before a launch (checks.py); `job` None: of the profile alone

and a set CAN of what it supports ("detach", "ray"). Backends import nothing of each other. A new executor is one file
here and one line in BACKENDS and transport.LIMITS.
"""

import difflib
import hashlib
import importlib
import json
import os
import posixpath
import re
import secrets
import shlex
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles import CLOUDS, KEYS, Profile, anchor, merge, resolve, wrong
from recipes import Recipe, nearest, places
from transport import Refusal, Tree

BACKENDS = {"local": "backends.local", "docker": "backends.docker", "slurm": "backends.slurm",
            "lepton": "backends.lepton", "dgxcloud": "backends.dgxcloud"}


@dataclass(frozen=True)
class Job:
    """One launch, complete: what the backend asks the platform for, and what pod.py is told (`description`)."""

    run: str  # our own short id
    name: str  # "nano3/sft"
    executor: str
    nodes: int
    gpus_per_node: int | str
    nproc: int | str
    image: str | None
    settings: dict[str, Any]  # the profile's keys after all that overrides them
    description: dict[str, Any]  # JSON-able; pod.py reads it
    secrets: dict[str, str]  # NAME -> "env", "lepton:…" or "runai:…"; never a value
    notes: tuple[str, ...] = ()


FINAL = ("done", "failed", "cancelled")
GONE = "the platform no longer knows it"  # a detail
ENDED_ALREADY = "it had already ended (%s); nothing was done"  # what cancel says


@dataclass(frozen=True)
class Status:
    """`state` is one of waiting, running, done, failed, cancelled; `detail` is the platform's own word; `exit_code` is
    the recipe's, None where it is not known."""

    state: str
    detail: str = ""
    exit_code: int | None = None


def await_end(ask: Callable[[], Status], pause: float = 0.5, seconds: float = 60.0) -> Status:
    """The Status once the job has ended, or as it is after `seconds`; asked for with pauses between."""
    deadline = time.monotonic() + seconds
    while (status := ask()).state not in FINAL and time.monotonic() <= deadline:
        time.sleep(pause)
    return status


def backend(executor: str) -> Any:
    """The module of an executor, imported now. Raises Refusal where there is none yet."""
    if executor not in BACKENDS:
        raise Refusal("executor %s can plan (--dry-run) but not launch in this version" % executor,
                      "use one of " + ", ".join(BACKENDS))
    return importlib.import_module(BACKENDS[executor])


def require(job: Job, attached: bool) -> None:
    """The one check of what a backend can do. Raises Refusal."""
    can = backend(job.executor).CAN
    wants = {"detach": not attached, "ray": job.description["launch"] == "ray" and job.nodes > 1}
    for feature, wanted in wants.items():
        if wanted and feature not in can:
            words = {"detach": "--detach", "ray": "a Ray recipe on %d nodes" % job.nodes}
            raise Refusal("%s is not supported by executor %s" % (words[feature], job.executor),
                          {"detach": "launch without it", "ray": "use --nodes 1, or another executor"}[feature])


# ---------------------------------------------------------------- who wins

YAML_WINS = ("container_image", "nodes", "gpus_per_node", "ntasks_per_node", "nproc_per_node")
COUNTS = ("nodes", "gpus_per_node", "nproc_per_node")
PROFILES_OWN = ("executor", "extends", "stages", "repo_root")


def settle(recipe: Recipe, profile: Profile, nodes: int | None, yaml: dict[str, Any], forced: dict[str, Any],
           notes: list[str], dry: bool = True) -> dict[str, Any]:
    """The settings of a job. Lowest first: header, the rest of the YAML's run.env, profile, the five keys that the YAML
    owns, [stages.…], KEY=VALUE (`forced`), --nodes. env_vars merge; mounts of YAML and profile add up."""
    yaml, forced = _read(yaml, recipe, notes, dry), _read(forced, recipe, [], dry)
    unknown = sorted(str(key) for key in yaml if key not in KEYS)
    if unknown:
        notes.append("run.env holds %s, which Airlift does not use" % ", ".join(unknown))
    profiles_own = [key for key in PROFILES_OWN if key in yaml]
    if profiles_own:
        notes.append("run.env holds %s, which only a profile can set" % ", ".join(profiles_own))
    mine = {key: value for key, value in yaml.items() if key in KEYS and key not in PROFILES_OWN}
    usable = {key: value for key, value in mine.items()
              if not KEYS[key].executors or profile.executor in KEYS[key].executors}
    for key, value in usable.items():
        problem = "" if value is None or KEYS[key].kind == "count" or key == "nodes" else wrong(key, value)
        if problem:
            raise Refusal("run.env.%s is %s" % (key, "***" if isinstance(value, dict) else repr(value)),
                          "it must be " + problem)
    header = {"nodes": recipe.nodes, "gpus_per_node": recipe.gpus_per_node, "container_image": recipe.image,
              "workdir": recipe.workdir, "rendezvous_timeout": 1800}
    owned = {key: value for key, value in usable.items() if key in YAML_WINS}
    rest = {key: value for key, value in usable.items() if key not in owned}
    layers = [header, rest, profile.keys, owned, profile.stage,
              {key: value for key, value in forced.items() if key in usable}, {"nodes": nodes} if nodes else {}]
    settings: dict[str, Any] = {}
    for layer in layers:
        settings = merge(settings, {KEYS[key].alias or key: value for key, value in layer.items() if value is not None})
    settings["env_vars"] = {"%s" % name: _text(value) for layer in ({"env_vars": recipe.env}, *layers)
                            for name, value in (layer.get("env_vars") or {}).items()}
    foreign = sorted(key for key in forced if key in mine and key not in usable)
    if foreign:
        notes.append("run.env holds %s, which is not for executor %s" % (", ".join(foreign), profile.executor))
    misspelt = [key for key in forced if key in unknown and difflib.get_close_matches(key, KEYS, 1, 0.75)]
    if misspelt:
        raise Refusal("there is no key run.env.%s" % misspelt[0], "did you mean %s?" % nearest(misspelt[0], KEYS))
    theirs, ours = yaml.get("mounts") or [], profile.keys.get("mounts") or []
    if wrong("mounts", theirs):
        raise Refusal("run.env.mounts is %r" % (theirs,), "it must be " + wrong("mounts", theirs))
    if "mounts" in profile.stage or "mounts" in forced:  # nothing is added to those
        theirs, ours = [], settings.get("mounts") or []
    settings["mounts"] = _mounts(theirs, ours, profile.executor, notes)
    for key in COUNTS:
        if key in settings:
            settings[key] = _count(key, settings[key])
    anchor(settings, profile.executor)
    gpus = settings["gpus_per_node"]
    settings["nproc"] = settings.get("nproc_per_node", gpus) or 1
    return settings


def _mounts(yaml: list[Any], ours: list[Any], executor: str, notes: list[str]) -> list[Any]:
    """The mounts of YAML and profile. A cloud has no hosts to bind from: a string that the YAML brings is named as not
    mounted there, one in the profile is refused; ${auto_mount:…} entries are cloned in the pod."""
    if executor == "local":
        notes += ["%s is not mounted: local pods see this machine as it is" % mount for mount in yaml]
        return []
    if executor in CLOUDS:
        def can(mount: Any) -> bool:
            return _auto(mount) or (executor == "lepton" and isinstance(mount, dict))

        notes += ["%s is not mounted: %s has no hosts to mount from" % (mount, executor)
                  for mount in yaml if not can(mount)]
        yaml = [mount for mount in yaml if can(mount)]
        bad = [mount for mount in ours if not can(mount)]
        if bad:
            fix = "write a table with path, mount_path and from" if executor == "lepton" else "volumes are pvcs there"
            raise Refusal("the mount %s cannot be had on %s" % (bad[0], executor), fix)
    return yaml + ours


def _read(table: dict[str, Any], recipe: Recipe, notes: list[str], dry: bool) -> dict[str, Any]:
    """A run.env with variables of this machine read; the working directory and NEMO_RUN_DIR are those of the pod.
    Raises Refusal for one that is not set, unless it is only for show."""
    unset: list[str] = []
    result = {key: value if re.search(r"env:(PWD|NEMO_RUN_DIR)\b", str(value)) else resolve(value, unset)
              for key, value in table.items() if key != "env_vars"}
    if "env_vars" in table:
        result["env_vars"] = resolve(places(table["env_vars"], recipe.root), unset)
        for name, value in (result["env_vars"] if isinstance(result["env_vars"], dict) else {}).items():
            if isinstance(value, str) and "${" in value:
                notes.append("env_vars.%s is sent as it is written, %s: only a config is resolved in the pod"
                             % (name, value))
    if unset and not dry:
        raise Refusal("run.env reads %s, which is not set here" % ", ".join(dict.fromkeys(unset)),
                      "export it, or override what reads it")
    notes += ["run.env reads %s, which is not set here" % name for name in dict.fromkeys(unset)]
    return result


def _auto(mount: Any) -> bool:
    return isinstance(mount, str) and mount.strip().startswith("${auto_mount:")


def clones(settings: dict[str, Any], executor: str) -> tuple[list[dict[str, str]], list[str]]:
    """The repositories that a pod without bind mounts clones for itself, and what to say. Raises Refusal."""
    found, notes = [], []
    for mount in settings.get("mounts") or []:
        if _auto(mount) and executor in ("docker", *CLOUDS):
            from backends.repositories import parse

            repository = parse(mount, settings.get("git_mirrors", {}))
            if repository and settings.get("auto_mount") == "image":
                notes.append("%s is used as the image has it" % repository.target)
            elif repository:
                found.append({"url": repository.url, "ref": repository.ref, "target": repository.target})
                notes.append("each pod clones %s at %s to %s" % (repository.url, repository.ref, repository.target))
    return found, notes


CACHES = {"VLLM_CACHE_ROOT": "vllm_compile_cache", "DG_JIT_CACHE_DIR": "vllm_compile_cache/deep_gemm",
          "FLASHINFER_CUBIN_DIR": "flashinfer_cubins", "FLASHINFER_WORKSPACE_BASE": "flashinfer_workspace"}


def caches(settings: dict[str, Any]) -> dict[str, str]:
    """What persistent_cache sets: NAME -> folder, which pod.py makes."""
    base = settings.get("persistent_cache")
    return {name: posixpath.join(base, folder) for name, folder in CACHES.items()} if base else {}


def require_image(job: Job) -> None:
    """Raises Refusal."""
    if not job.image:
        raise Refusal("the job has no image", "set container_image in the profile, or image in the recipe's header")


def setup_commands(settings: dict[str, Any]) -> list[str]:
    """What runs before the recipe, in its shell. pip_extras is the profile's own word that the network may be used."""
    extras = settings.get("pip_extras") or []
    pip = ["python3 -m pip install --quiet " + " ".join(map(shlex.quote, extras))] if extras else []
    return pip + settings.get("pre_launch_commands", []) + settings.get("startup_commands", [])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _count(key: str, value: Any) -> int | str:
    """A count from YAML, where "8" means 8. Raises Refusal for anything else."""
    if value == "gpu" and key != "nodes":
        return "gpu"
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < (1 if key == "nodes" else 0):
        raise Refusal("%s is %r" % (key, value), "it must be a whole number, " + (
            "1 or more" if key == "nodes" else '0 or more, or "gpu"'))
    return value


def workspace(settings: dict[str, Any]) -> str | None:
    """Where outputs are kept, as the pod sees it: the first that is set of the keys below, else the first mount."""
    for key in ("workspace", "nemo_run_dir", "pvc_nemo_run_dir", "remote_job_dir"):
        if settings.get(key):
            return str(settings[key])
    for mount in settings.get("mounts") or []:
        if isinstance(mount, dict) and mount.get("mount_path"):
            return str(mount["mount_path"])
        if isinstance(mount, str) and ":" in mount and not mount.startswith("${"):
            return mount.split(":")[1]
    return next((str(volume["path"]) for volume in settings.get("pvcs") or [] if volume.get("path")), None)


def lies_on(place: str, mounts: Iterable[str]) -> bool:
    """Whether a path is one of the mounts' or below it."""
    return any(place == mount.rstrip("/") or place.startswith(mount.rstrip("/") + "/") for mount in mounts)


def not_kept(settings: dict[str, Any], executor: str) -> str:
    """What to say where what a job writes goes with its pod; "" where it is kept."""
    base = workspace(settings)
    if base is None:
        return "no workspace is set: what the job writes stays in the pod and goes with it"
    mounts = [str(mount.get("mount_path")) if isinstance(mount, dict) else str(mount).split(":")[1]
              for mount in settings.get("mounts") or [] if isinstance(mount, dict) or ":" in mount]
    if executor in ("docker", "lepton") and not settings.get("existing_ray_cluster") and not lies_on(base, mounts):
        return "the workspace %s is on none of the mounts: what the job writes stays in the pod and goes with it" % base
    return ""


def run_root(settings: dict[str, Any], family: str) -> str | None:
    """<workspace>/<family>, or run_dir: the same for every launch of the family. None: outputs stay in the pod."""
    base = workspace(settings)
    if base and not base.startswith(("/", "<unset ")):
        raise Refusal("the workspace is %r" % base, "it must be an absolute path, as the pod sees it")
    if settings.get("run_dir"):
        return posixpath.join(base or "/", settings["run_dir"])
    return posixpath.join(base, family) if base else None


def unpacking(settings: dict[str, Any]) -> dict[str, Any]:
    """What pod.py must know to unpack: into each pod, or once onto storage that all pods see. Raises Refusal."""
    if settings.get("unpack", "local") == "local":
        return {"unpack": "local"}
    base = workspace(settings)
    if base is None:
        raise Refusal('unpack = "shared" needs a workspace that all pods see',
                      "set workspace in the profile, or leave unpack out")
    return {"unpack": "shared", "shared": posixpath.join(base, ".airlift"), "keep": settings.get("keep", 5)}


def environment(settings: dict[str, Any], run: dict[str, Any], name: str, executor: str) -> dict[str, str]:
    """The recipe's environment that follows from workspace and run.wandb; the user's env_vars come last."""
    env: dict[str, str] = {}
    base = workspace(settings)
    if base and executor != "local":
        env["HF_HOME"] = posixpath.join(base, "hf")
    env |= caches(settings)
    wandb = run.get("wandb")
    if isinstance(wandb, dict):
        names = {"entity": "WANDB_ENTITY", "project": "WANDB_PROJECT", "name": "WANDB_NAME", "run_name": "WANDB_NAME",
                 "group": "WANDB_GROUP", "job_type": "WANDB_JOB_TYPE"}
        env |= {names[key]: str(value) for key, value in wandb.items() if key in names and value}
        tags = wandb.get("tags")
        if tags:
            env["WANDB_TAGS"] = ",".join(map(str, tags)) if isinstance(tags, list) else str(tags)
        if wandb.get("project"):
            env = {"WANDB_ENABLED": "true", "WANDB_JOB_TYPE": name, "WANDB_NAME": name.replace("/", "-")} | env
    return env | settings["env_vars"]


TOKENS = ("HF_TOKEN", "WANDB_API_KEY", "NGC_API_KEY")
REFERENCES = {"lepton": (r"env|lepton:[\w.-]+", ', or "lepton:name" for a secret of the workspace'),
              "dgxcloud": (r"env|runai:[\w.-]+/[\w.-]+", ', or "runai:credential/key"')}


def check_secrets(wanted: dict[str, Any], executor: str, plain: Any = ()) -> tuple[dict[str, str], list[str]]:
    """[secrets] of a profile and what to say about it; `plain` is the recipe's environment besides. Raises Refusal for
    a reference that this executor lacks."""
    pattern, example = REFERENCES.get(executor, ("env", ""))
    notes = []
    for name, source in wanted.items():
        if not isinstance(source, str) or not re.fullmatch(pattern, source):
            raise Refusal("secrets.%s is not a reference that %s has" % (name, executor), 'write "env"' + example)
        if source == "env":
            notes.append("%s is sent by value, in %s" % (name, "a private file that goes when the job is over"
                                                          if executor == "slurm" else "the job's environment"))
    notes += ["%s is set here but not sent; name it under [secrets] to send it" % name
              for name in TOKENS if os.environ.get(name) and name not in wanted and name not in plain]
    notes += ["%s is sent as a plain variable; under [secrets] it would stay out of files and records" % name
              for name in TOKENS if name in plain and plain[name] and name not in wanted]
    return dict(wanted), notes


def secret_values(job: Job, dry: bool) -> dict[str, str]:
    """The values of secrets sent by value. Raises Refusal for one that is not set, unless it is only for show."""
    names = [name for name, source in job.secrets.items() if source == "env"]
    unset = [name for name in names if name not in os.environ]
    if unset and not dry:
        raise Refusal("secret %s is not set here" % ", ".join(unset), "export it, or take it out of [secrets]")
    return {name: os.environ.get(name, "<unset %s>" % name) for name in names}


def is_cloud(executor: str) -> bool:
    return executor in CLOUDS


# ---------------------------------------------------------------- runs


@dataclass
class Run:
    """The file of one run: what status, logs and cancel need. No secret and no chunk is ever in it."""

    run: str
    recipe: str
    profile: str
    executor: str
    nodes: int
    sha256: str
    started: float = field(default_factory=time.time)
    job_exit_code: int | None = None
    ended: list[str] | None = None  # state and detail, once it is over for good: platforms forget
    record: dict[str, Any] = field(default_factory=dict)  # the backend's own
    carries: dict[str, str] = field(default_factory=dict, repr=False)  # fingerprints(); kept in a file beside

    @property
    def starts(self) -> int:
        """How often the job may be started in all."""
        return 1 + int(self.record.get("retries", 0))

    @property
    def ranks(self) -> list[int]:
        """The ranks whose logs are to be shown."""
        return self.record.get("ranks") or [0]

    def seen_running(self) -> None:
        """Remember when the job was first seen to run."""
        self.record.setdefault("running_since", time.time())

    def save(self) -> None:
        if self.carries:
            self._write(".files", zlib.compress(json.dumps(self.carries).encode(), 9))
            self.carries = {}
        fields = {name: value for name, value in self.__dict__.items() if name != "carries"}
        self._write(".json", json.dumps(fields, indent=1).encode())

    def files(self) -> dict[str, str]:
        """What the run carries, as fingerprints() gave it. Raises Refusal where that was not kept."""
        path = home() / "runs" / (self.run + ".files")
        try:
            return dict(json.loads(zlib.decompress(path.read_bytes())))
        except (OSError, ValueError, zlib.error):
            raise Refusal("what run %s carries cannot be read: %s" % (self.run, path),
                          "only runs of this version keep it") from None

    def _write(self, suffix: str, data: bytes) -> None:
        folder = home() / "runs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, private = tempfile.mkstemp(dir=folder)  # 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.rename(private, folder / (self.run + suffix))

    def forget(self) -> None:
        for suffix in (".json", ".files"):
            (home() / "runs" / (self.run + suffix)).unlink(missing_ok=True)


def fingerprints(tree: Tree) -> dict[str, str]:
    """path -> SHA-256 of a file (and " x" where it may be run), or "-> target" of a link."""
    return {entry.path: "-> %s" % os.fsdecode(entry.data) if entry.link else
            hashlib.sha256(entry.data).hexdigest() + " x" * entry.executable for entry in tree.entries}


def status(run: Run) -> Status:
    """The platform's word, or how the run ended where that is known. Raises Refusal if it cannot be read."""
    if run.ended:
        return Status(run.ended[0], run.ended[1], run.job_exit_code)
    found: Status = backend(run.executor).status(run)
    keep_end(run, found)
    return found


def keep_end(run: Run, found: Status) -> None:
    """Remember a Status that is final in the run's file."""
    if found.state in FINAL and found.detail != GONE:
        run.ended, run.job_exit_code = [found.state, found.detail], found.exit_code
        run.save()


def load_run(run: str) -> Run:
    """Raises Refusal for a run that was not launched from this account."""
    path = home() / "runs" / (run + ".json")
    if not re.fullmatch(r"[a-z0-9]+", run) or not path.is_file():
        raise Refusal("there is no run %r" % run, "python launch.py status lists them")
    try:
        return Run(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise Refusal("the file of run %s cannot be read: %s" % (run, path), "remove it") from None


def all_runs() -> tuple[list[Run], list[Refusal]]:
    """Newest first; and what is wrong with files that cannot be read."""
    found, problems = [], []
    for path in (home() / "runs").glob("*.json"):
        try:
            found.append(load_run(path.stem))
        except Refusal as problem:
            problems.append(problem)
    return sorted(found, key=lambda run: -run.started), problems


def home() -> Path:
    """Airlift's own state: AIRLIFT_HOME, else <XDG_STATE_HOME or ~/.local/state>/airlift."""
    if os.environ.get("AIRLIFT_HOME"):
        return Path(os.environ["AIRLIFT_HOME"])
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "airlift"


def new_run_id() -> str:
    """Six letters and digits, a letter first, so that names of jobs can begin or end with it."""
    return secrets.choice("abcdefghjkmnpqrstuvwxyz") + "".join(
        secrets.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(5))
