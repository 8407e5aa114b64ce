"""Job: one complete launch, and how its settings, environment, secrets, mounts and paths are determined.

Precedence, lowest first (`settings_for`): header, the YAML's run.env, profile, the keys of run.env in YAML_WINS,
[stages.…], KEY=VALUE, --nodes.
"""

import difflib
import hashlib
import netrc
import os
import posixpath
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import screen
from configs import places
from pod.rank import RAY_LIMITS
from profiles import CLOUDS, KEYS, PROFILES_ONLY, UNUSED, Profile, anchor, defaults, merge, must_be, resolve
from recipes import Recipe, nearest
from transport import Refusal


class Description(TypedDict, total=False):
    """What the pod must know; it travels as JSON (pod/payload.py checks it)."""

    run: str  # the run's id
    recipe: str  # "nano3/sft"
    script: str  # relative to the code root
    launch: str  # the header's mode: torchrun, ray, direct or python
    nodes: int
    run_root: str | None  # None: outputs stay in the pod
    config: str  # YAML
    env: dict[str, str]  # the recipe's, by the user's word
    defaults: dict[str, str]  # what else it gets, where neither the user nor the pod's own environment has it
    pip: list[str]  # what pip installs first: the profile's own word that the network may be used
    install: list[str]  # what it installs from wheels alone, without a network
    links: list[str]  # folders with wheels: of the tree, or as the pods see them
    setup: list[str]  # commands that run before it, in its shell
    command: str  # what bash runs
    tool: str  # the program that it begins with, "" if not known
    workdir: str | None
    clones: list[dict[str, str]]  # repositories that the pod clones: url, ref, target
    folders: list[str]  # made before the recipe starts
    retries: int
    patience: int  # seconds that pods wait for each other
    cluster: str  # who makes the Ray cluster that it runs on: "pods", "platform", or "" for none
    secret: str  # by which pods that form a cluster know each other
    unpack: str  # "local" or "shared"
    shared: str  # the folder of shared trees
    keep: int  # how many of them stay
    made: Mapping[str, Any]  # how the run came about: an archive.Made


@dataclass(frozen=True)
class Job:
    """One complete launch: what the backend requests from the platform, and what the pod must know."""

    run_id: str
    name: str  # "nano3/sft"
    executor: str
    nodes: int
    gpus_per_node: int | str
    nproc: int | str
    image: str | None
    settings: dict[str, Any]  # by the keys of profiles.KEYS, after all overrides
    description: Description = field(repr=False)
    secrets: dict[str, str]  # NAME -> "env", "lepton:…" or "runai:…"; never a value
    notes: tuple[str, ...] = ()


YAML_WINS = ("container_image", "nodes", "gpus_per_node", "ntasks_per_node", "nproc_per_node")  # over the profile
COUNTS = ("nodes", "gpus_per_node", "nproc_per_node")
PROFILES_OWN = ("executor", "extends", "stages", "repo_root")  # which the command line cannot set either
PUBLIC = ("PWD", "NEMO_RUN_DIR", "USER", "HOME", "HOSTNAME")  # variables that any config may read


def settings_for(recipe: Recipe, profile: Profile, nodes: int | None, yaml: dict[str, Any], forced: dict[str, Any],
                 notes: list[str], dry: bool = True) -> dict[str, Any]:
    """The settings of a job, by the precedence at the top of this file. `yaml` is the config's run.env, `forced` are
    its KEY=VALUE overrides. env_vars are merged; mounts of YAML and profile are added up. Raises Refusal."""
    _check_variables(yaml, forced, notes)
    yaml, forced = _read(yaml, recipe, notes, dry), _read(forced, recipe, [], dry)
    usable = _usable(_trusted(yaml, forced, profile), forced, profile.executor, notes)
    header = {"nodes": recipe.nodes, "gpus_per_node": recipe.gpus_per_node, "container_image": recipe.image,
              "workdir": recipe.workdir}
    owned = {key: value for key, value in usable.items() if key in YAML_WINS}
    rest = {key: value for key, value in usable.items() if key not in owned}
    layers = [defaults(profile.executor), header, rest, profile.keys, owned, profile.stage,
              {key: value for key, value in forced.items() if key in usable}, {"nodes": nodes} if nodes else {}]
    settings: dict[str, Any] = {}
    for layer in layers:
        settings = merge(settings, {KEYS[key].alias or key: value for key, value in layer.items() if value is not None})
    settings["env_vars"] = {"%s" % name: str(value).lower() if isinstance(value, bool) else str(value)
                            for layer in ({"env_vars": recipe.env}, *layers)
                            for name, value in (layer.get("env_vars") or {}).items()}
    theirs, ours = yaml.get("mounts") or [], profile.keys.get("mounts") or []
    if must_be("mounts", theirs):
        raise Refusal("run.env.mounts is %r" % (theirs,), "it must be " + must_be("mounts", theirs))
    if "mounts" in profile.stage or "mounts" in forced:  # these replace all others
        theirs, ours = [], settings.get("mounts") or []
    settings["mounts"] = _mounts(theirs, ours, profile.executor, notes)
    if settings.get("pvcs"):  # with false, a misspelt claim would become a new, empty volume
        notes += ["the claim %s is taken as one that is there, since existingPvc is left out" % volume.get("claimName")
                  for volume in settings["pvcs"] if "existingPvc" not in volume]
        settings["pvcs"] = [{"existingPvc": True} | volume for volume in settings["pvcs"]]
    settings |= {key: _count(key, settings[key]) for key in COUNTS if key in settings}
    if profile.executor == "dgxcloud" and settings.get("segments"):  # KAI Scheduler's pytorch_grouper.go, November 2026
        notes.append("run:AI counts segments without the first pod: ranks 1 to %d are the first" % (
            settings["nodes"] // settings["segments"]))
    anchor(settings, profile.executor)
    if str(settings.get("remote_job_dir", "")).startswith("~/"):
        outputs = " and outputs" * (workspace(settings) == settings["remote_job_dir"])
        notes.append("the job's files%s go to %s in your home on the cluster; remote_job_dir names another folder that "
                     "all nodes see" % (outputs, settings["remote_job_dir"]))
    settings["nproc"] = settings.get("nproc_per_node", settings["gpus_per_node"]) or 1
    return settings


def _check_variables(yaml: dict[str, Any], forced: dict[str, Any], notes: list[str]) -> None:
    """Raises Refusal for a secret of this environment that a config reads; a note names other variables."""
    read, typed = (set(re.findall(r"env:([A-Za-z_][A-Za-z0-9_]*)", str(table))) for table in (yaml, forced))
    for name in sorted(read - typed - set(PUBLIC)):
        value = os.environ.get(name, "")
        if screen.secret_name(name) or screen.hide(value) != value:
            raise Refusal("run.env of the config reads %s, which looks like a secret" % name,
                          "if the recipe may have it, add it to [secrets] of your profile")
        notes += ["run.env of the config uses the value that %s has here" % name] * (name in os.environ)


def _trusted(yaml: dict[str, Any], forced: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """run.env with the command line's value of each key in PROFILES_ONLY. Raises Refusal where the YAML sets one that
    would have an effect: the profile wins over it, but tables would be merged."""
    trusted = dict(yaml)
    for key in [key for key in yaml if key in KEYS and (KEYS[key].alias or key) in PROFILES_ONLY]:
        name, trusted[key] = KEYS[key].alias or key, forced.get(key)
        wins = (name in profile.keys or name in profile.stage) and not isinstance(yaml[key], dict)
        here = name in ("host", "user", "port", "identity") and profile.settings.get("tunnel") == "local"
        unused = here or (KEYS[key].executors and profile.executor not in KEYS[key].executors)
        if yaml[key] not in (None, forced.get(key)) and not wins and not unused:
            raise Refusal("run.env of the config sets %s, which only a profile or the command line may" % key,
                          "remove it there; what you want of it belongs in your profile, or in run.env.%s=..." % key)
    return trusted


def _usable(yaml: dict[str, Any], forced: dict[str, Any], executor: str, notes: list[str]) -> dict[str, Any]:
    """The keys of run.env that this executor uses. Raises Refusal for a wrong type or a misspelt KEY=VALUE."""
    unknown = sorted(str(key) for key in yaml if key not in KEYS)
    notes += ["run.env.%s has no effect: %s" % (key, UNUSED[key]) for key in unknown if key in UNUSED and yaml[key]]
    others = [key for key in unknown if key not in UNUSED]
    if others:
        notes.append("run.env has %s, which Airlift does not use" % ", ".join(others))
    misspelt = [key for key in forced if key in unknown and difflib.get_close_matches(key, KEYS, 1, 0.75)]
    if misspelt:
        raise Refusal("there is no key run.env.%s" % misspelt[0], "did you mean %s?" % nearest(misspelt[0], KEYS))
    profiles_own = [key for key in PROFILES_OWN if key in yaml]
    if profiles_own:
        notes.append("run.env has %s, which only a profile can set" % ", ".join(profiles_own))
    mine = {key: value for key, value in yaml.items() if key in KEYS and key not in PROFILES_OWN}
    usable = {key: value for key, value in mine.items() if not KEYS[key].executors or executor in KEYS[key].executors}
    for key, value in usable.items():
        expected = "" if value is None or KEYS[key].kind == "count" or key == "nodes" else must_be(key, value)
        if expected:
            raise Refusal("run.env.%s is %s" % (key, "***" if isinstance(value, dict) else repr(value)),
                          "it must be " + expected)
    foreign = sorted(key for key in forced if key in mine and key not in usable)
    if foreign:
        notes.append("run.env has %s, which is not for executor %s" % (", ".join(foreign), executor))
    return usable


def _mounts(yaml: list[Any], ours: list[Any], executor: str, notes: list[str]) -> list[Any]:
    """The mounts of YAML and profile. On a cloud there is no host folder to mount: a string from the YAML becomes a
    note, one in the profile is refused, and ${auto_mount:…} repositories are cloned in the pod."""
    if executor == "local":
        notes += ["%s is not mounted: local pods see the files of this machine" % mount for mount in yaml]
        return []
    if executor in CLOUDS:
        def can(mount: Any) -> bool:
            return _is_repository(mount) or (executor == "lepton" and isinstance(mount, dict))

        notes += ["%s is not mounted: on %s there is no host folder to mount" % (mount, executor)
                  for mount in yaml if not can(mount)]
        yaml = [mount for mount in yaml if can(mount)]
        bad = [mount for mount in ours if not can(mount)]
        if bad:
            fix = "write a table with path, mount_path and from" if executor == "lepton" else "use pvcs for volumes"
            raise Refusal("the mount %s is not possible on %s" % (bad[0], executor), fix)
    theirs = [mount for mount in yaml if not _is_repository(mount)]
    if theirs and executor == "docker":  # whose containers are root on this machine
        raise Refusal("run.env of the config mounts %s of this machine into the container" % theirs[0],
                      "if you want that, add it to mounts in your profile")
    notes += ["the config, not your profile, mounts %s" % mount for mount in theirs]
    return yaml + ours


def _read(table: dict[str, Any], recipe: Recipe, notes: list[str], dry: bool) -> dict[str, Any]:
    """A run.env with variables read, except PWD and NEMO_RUN_DIR, which are the pod's. Raises Refusal."""
    unset: list[str] = []
    result = {key: value if re.search(r"env:(PWD|NEMO_RUN_DIR)\b", str(value)) else resolve(value, unset)
              for key, value in table.items() if key != "env_vars"}
    if "env_vars" in table:
        result["env_vars"] = resolve(places(table["env_vars"], recipe.root), unset)
        for name, value in (result["env_vars"] if isinstance(result["env_vars"], dict) else {}).items():
            if isinstance(value, str) and "${" in value:
                notes.append("env_vars.%s is sent unchanged as %s: only a config is resolved in the pod"
                             % (name, value))
    if unset and not dry:
        raise Refusal("run.env reads %s, which is not set here" % ", ".join(dict.fromkeys(unset)),
                      "export it, or override the key that reads it")
    notes += ["run.env reads %s, which is not set here" % name for name in dict.fromkeys(unset)]
    return result


ENTRY = re.compile(r"\$\{auto_mount:(.*)\}", re.DOTALL)
GRAMMAR = re.compile(r"git\+([a-z][a-z+]*://[^/]*/[^@,]+)@([^,\s]+),(/[^,\s]+)")  # URL, ref, target


@dataclass(frozen=True)
class AutoMount:
    """One repository to mount."""

    url: str
    ref: str  # a branch, a tag or a full commit
    target: str  # where the container sees it

    def folder(self, base: str) -> str:
        last = posixpath.basename(self.url.rstrip("/")).removesuffix(".git")
        name = re.sub(r"[^A-Za-z0-9._-]", "-", last) or "repository"
        return "%s/auto_mounts/%s-%s" % (base, name, hashlib.sha256(self.url.encode()).hexdigest()[:8])


def _is_repository(mount: Any) -> bool:
    return isinstance(mount, str) and mount.strip().startswith("${auto_mount:")


def repository_of(mount: str, mirrors: dict[str, str]) -> AutoMount | None:
    """The AutoMount of a mount, with the URL of its mirror; None for any other mount. Raises Refusal."""
    entry = ENTRY.fullmatch(mount.strip())
    if not entry:
        return None
    found = GRAMMAR.fullmatch(entry.group(1).strip())
    if not found:
        raise Refusal("the mount %s cannot be parsed" % mount, "write ${auto_mount:git+https://host/path.git@ref,/target}")
    url, ref, target = found.groups()
    prefix = max((prefix for prefix in mirrors if url.startswith(prefix)), key=len, default="")
    return AutoMount(mirrors[prefix] + url[len(prefix):] if prefix else url, ref, target)


def clones(settings: dict[str, Any], executor: str) -> tuple[list[dict[str, str]], list[str]]:
    """(the repositories that each pod clones where there are no bind mounts, notes). Raises Refusal."""
    found, notes = [], []
    for mount in settings.get("mounts") or []:
        if _is_repository(mount) and executor in ("docker", *CLOUDS):
            repository = repository_of(mount, settings.get("git_mirrors", {}))
            if repository and settings.get("auto_mount") == "image":
                notes.append("%s: the copy inside the image is used" % repository.target)
            elif repository:
                found.append({"url": repository.url, "ref": repository.ref, "target": repository.target})
                notes.append("each pod clones %s at %s to %s" % (repository.url, repository.ref, repository.target))
    return found, notes


PERSISTENT_CACHES = {"VLLM_CACHE_ROOT": "vllm_compile_cache", "DG_JIT_CACHE_DIR": "vllm_compile_cache/deep_gemm",
                     "FLASHINFER_CUBIN_DIR": "flashinfer_cubins", "FLASHINFER_WORKSPACE_BASE": "flashinfer_workspace"}


def persistent_caches(settings: dict[str, Any]) -> dict[str, str]:
    """The variables that persistent_cache sets: NAME -> folder, which the pod creates."""
    base = settings.get("persistent_cache")
    return {name: posixpath.join(base, folder) for name, folder in PERSISTENT_CACHES.items()} if base else {}


def sandbox(settings: dict[str, Any]) -> dict[str, str]:
    """The variables of a [sandbox], as NeMo-Gym and the images of NeMo-Skills read them. Raises Refusal."""
    box = settings.get("sandbox") or {}
    port = box.get("port", 6000)
    odd = sorted(map(str, box.keys() - {"container", "port", "command"}))
    if odd or not isinstance(port, int):
        raise Refusal("sandbox has %s" % (odd[0] if odd else "the port %r" % port),
                      "it takes container, port (a number) and command")
    if not box.get("container"):
        return {}
    ports = dict.fromkeys(("LISTEN_PORT", "NGINX_PORT", "NEMO_SKILLS_SANDBOX_PORT"), str(port))
    return ports | {"SANDBOX_CONTAINER": str(box["container"]),
                    "SANDBOX_ENV_VARS": "NEMO_SKILLS_SANDBOX_PORT=%d" % port,
                    "SANDBOX_COMMAND": str(box.get("command", "/start-with-nginx.sh"))}


def require_image(job: Job) -> str:
    """The job's image. Raises Refusal if it has none."""
    if job.image:
        return job.image
    raise Refusal("the job has no image", "set container_image in the profile, or image in the recipe's header")


def setup_commands(settings: dict[str, Any]) -> list[str]:
    """The commands that run before the recipe, in its shell."""
    commands: list[str] = settings.get("pre_launch_commands", []) + settings.get("startup_commands", [])
    return commands


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


def mount_points(settings: dict[str, Any]) -> list[str]:
    """Where the pod sees mounts and volumes, without repositories."""
    mounts = settings.get("mounts") or []
    points = [mount.get("mount_path") if isinstance(mount, dict) else mount.split(":")[1] for mount in mounts
              if isinstance(mount, dict) or (":" in mount and not mount.startswith("${"))]
    return [str(point) for point in [*points, *(volume.get("path") for volume in settings.get("pvcs") or [])] if point]


def workspace(settings: dict[str, Any]) -> str | None:
    """Where outputs are kept, as the pod sees it: the first of the keys below that is set, else the first mount."""
    for key in ("workspace", "nemo_run_dir", "pvc_nemo_run_dir", "remote_job_dir"):
        if settings.get(key):
            return str(settings[key])
    return next(iter(mount_points(settings)), None)


def is_mounted(path: str, settings: dict[str, Any]) -> bool:
    """Whether a path is a mount point or below one."""
    return any((path + "/").startswith(point.rstrip("/") + "/") for point in mount_points(settings))


def not_kept(settings: dict[str, Any], executor: str) -> str:
    """A note where what a job writes is lost with its pod; "" where it is kept."""
    base, lost = workspace(settings), ": what the job writes stays in the pod and is lost with it"
    if base is None:
        return "no workspace is set" + lost
    kept = executor not in ("docker", "lepton") or settings.get("existing_ray_cluster") or is_mounted(base, settings)
    return "" if kept else "the workspace %s is on none of the mounts%s" % (base, lost)


def starts_in_image(settings: dict[str, Any], executor: str) -> str:
    """A note where the recipe starts in a folder of its image, to which relative paths lead; "" where it does not."""
    folder = settings.get("workdir") or ""
    own = executor != "local" and settings.get("container_image") and folder and not is_mounted(folder, settings)
    return "the recipe starts in %s of its image: what it writes by a relative path is lost with the pod, so give " \
        "folders like ${oc.env:NEMO_RUN_DIR}/results in its config" % folder if own else ""


def run_root(settings: dict[str, Any], family: str, name: str | None = None) -> str | None:
    """<workspace>/<name of the experiment>, else run_dir, else <workspace>/<family>: the same for every launch of it.
    None: outputs stay in the pod."""
    if name and not re.fullmatch(r"(?!\.)[\w.-]{1,100}", name, re.ASCII):
        raise Refusal("--name is %r" % name, "a name has letters, digits and . _ -, and does not begin with a dot")
    base = workspace(settings)
    at_home = base == settings.get("remote_job_dir") and str(base).startswith("~/")  # which submit() resolves
    if base and not base.startswith(("/", "<unset ")) and not at_home:
        raise Refusal("the workspace is %r" % base, "it must be an absolute path, as the pod sees it")
    if settings.get("run_dir") and not name:
        return posixpath.join(base or "/", settings["run_dir"])
    return posixpath.join(base, name or family) if base else None


def ray_cluster(recipe: Recipe, settings: dict[str, Any], executor: str) -> str:
    """Who makes the Ray cluster that the recipe runs on; "" where it needs none, or starts Ray itself on one node."""
    several = settings["nodes"] > 1 or (executor == "lepton" and settings.get("existing_ray_cluster"))
    return "" if recipe.launch != "ray" or not several else "platform" if executor == "lepton" else "pods"


def unpacking(settings: dict[str, Any]) -> Description:
    """The part of the description that says where to unpack: in each pod, or once for all. Raises Refusal."""
    if settings["unpack"] == "local":
        return Description(unpack="local")
    base = workspace(settings)
    if base is None:
        raise Refusal('unpack = "shared" needs a workspace that all pods see',
                      "set workspace in the profile, or remove unpack")
    return Description(unpack="shared", shared=posixpath.join(base, ".airlift"), keep=settings["keep"])


def environment(settings: dict[str, Any], run: dict[str, Any], name: str, executor: str, root: str | None
                ) -> Description:
    """The part of the description with the recipe's environment: what run.wandb and env_vars name; and as defaults,
    what follows from workspace, run root, caches and the recipe's name."""
    env: dict[str, str] = {}
    base = workspace(settings)
    ours = persistent_caches(settings) | sandbox(settings) | ({"WANDB_DIR": root} if root else {})
    if base and executor != "local":
        ours["HF_HOME"] = posixpath.join(base, "hf")
    wandb = run.get("wandb")
    if isinstance(wandb, dict):
        names = {"entity": "WANDB_ENTITY", "project": "WANDB_PROJECT", "name": "WANDB_NAME", "run_name": "WANDB_NAME",
                 "group": "WANDB_GROUP", "job_type": "WANDB_JOB_TYPE"}
        env = {names[key]: str(value) for key, value in wandb.items() if key in names and value}
        tags = wandb.get("tags")
        if tags:
            env["WANDB_TAGS"] = ",".join(map(str, tags)) if isinstance(tags, list) else str(tags)
        if wandb.get("project"):
            ours |= {"WANDB_ENABLED": "true", "WANDB_JOB_TYPE": name, "WANDB_NAME": name.replace("/", "-")}
    env |= settings["env_vars"]
    return Description(env=env, defaults={name: value for name, value in ours.items() if name not in env})


def node_env(job: Job) -> dict[str, str]:
    """What the nodes of a Ray cluster that a platform makes have from their start, for Ray itself and for tasks on all
    of them; what only a pod knows comes with the driver (pod/ray_cluster.py). Lepton reserves the names LEPTON_..."""
    sent = job.description
    made = sent.get("cluster") == "platform" and not job.settings.get("existing_ray_cluster")
    found = RAY_LIMITS | sent["defaults"] | sent["env"] if made else {}
    return {name: value for name, value in found.items() if not name.startswith("LEPTON_") and name not in job.secrets}


# What a job may not be able to do without, where a person has it; TOKENS have notes of their own.
LOOKS_NEEDED = re.compile(r"(?i:(https?|no|all)_proxy)$|(SSL_CERT|REQUESTS_CA|CURL_CA|GIT_SSL|AWS_CA)_"
                          r"|WANDB_(MODE|BASE_URL)$|HF_(HOME|ENDPOINT|HUB_OFFLINE)$|(PIP|UV)_\w*INDEX"
                          r"|(TRANSFORMERS|HF_DATASETS)_(OFFLINE|CACHE)$|(?!LEPTON_)\w+_(API_KEY|TOKEN)$")


def not_sent(executor: str, sent: set[str]) -> list[str]:
    """A note about variables that are set here and do not reach the pods. On Slurm a login sets what its jobs need."""
    here = [] if executor == "slurm" else sorted(
        name for name in os.environ if LOOKS_NEEDED.match(name) and name not in {*sent, *TOKENS} and os.environ[name])
    return ["%s %s set here and not sent; what the job needs of it belongs in env_vars, or in [secrets]" % (
        ", ".join(here), "is" if len(here) == 1 else "are")] * bool(here)


TOKENS = ("HF_TOKEN", "WANDB_API_KEY", "NGC_API_KEY")
BY_VALUE = ("env", "login")  # sources of [secrets] whose value is sent: a variable here, or what a login has kept
REFERENCES = {"lepton": (r"env|login|lepton:[\w.-]+", ', or "lepton:name" for a secret of the workspace'),
              "dgxcloud": (r"env|login|runai:[\w.-]+/[\w.-]+", ', or "runai:credential/key"')}


def login(name: str) -> tuple[str, str]:
    """(the token that another tool's login has kept on this machine for that variable, its file); ("", "") without."""
    hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    place = Path({"HF_TOKEN": os.environ.get("HF_TOKEN_PATH") or hub + "/token", "NGC_API_KEY": "~/.ngc/config",
                  "WANDB_API_KEY": os.environ.get("NETRC") or "~/.netrc"}.get(name, os.devnull)).expanduser()
    try:
        if name == "WANDB_API_KEY":
            host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
            found = netrc.netrc(str(place)).hosts.get(host, ("", "", ""))[2] or ""
        else:
            found = place.read_text(encoding="utf-8")
    except (OSError, ValueError, netrc.NetrcParseError):  # there is none, or none that we can read
        return "", ""
    if name == "NGC_API_KEY":
        found = "".join(re.findall(r"(?m)^\s*apikey\s*=\s*(\S+)", found)[:1])
    found = found.strip()
    screen.conceal(found)
    return found, str(place) if found else ""


def check_secrets(wanted: dict[str, Any], executor: str, plain: Any = ()) -> tuple[dict[str, str], list[str]]:
    """(the [secrets] of a profile, notes about them); `plain` is the recipe's environment. Raises Refusal."""
    pattern, example = REFERENCES.get(executor, ("env|login", ""))
    notes = []
    for name, source in wanted.items():
        if not isinstance(source, str) or not re.fullmatch(pattern, source):
            raise Refusal("secrets.%s is not a reference that %s supports" % (name, executor),
                          'write "env" or "login"' + example)
        if source in BY_VALUE:
            notes.append("%s is sent by value, in %s" % (name, "a private file that is removed when the job is over"
                                                         if executor == "slurm" else "the job's environment"))
    notes += ["%s is set here but not sent; add it to [secrets] to send it" % name
              for name in TOKENS if os.environ.get(name) and name not in wanted and name not in plain]
    away = TOKENS if executor != "local" else ()  # local pods have this home, and what is in it
    logins = [(name, login(name)[1]) for name in away if name not in {*wanted, *plain, *os.environ}]
    notes += ['%s is in %s, and is not sent; in [secrets] write %s = "login" to send it' % (name, place, name)
              for name, place in logins if place]
    notes += ["%s is sent as a plain variable; in [secrets] it would stay out of files and records" % name
              for name in plain if screen.secret_name(name) and plain[name] and name not in wanted
              and executor != "slurm"]
    return dict(wanted), notes


def secret_values(job: Job, dry: bool) -> dict[str, str]:
    """The secrets that are sent by value. Raises Refusal for one that is not set, except in a dry run."""
    found = {name: login(name)[0] or None if source == "login" else os.environ.get(name)
             for name, source in job.secrets.items() if source in BY_VALUE}
    unset = [name for name, value in found.items() if value is None]
    if unset and not dry:
        raise Refusal("secret %s is not set here" % ", ".join(unset), "export it, or remove it from [secrets]"
                      if job.secrets[unset[0]] == "env" else "log in with its own tool, or remove it from [secrets]")
    return {name: "<unset %s>" % name if value is None else value for name, value in found.items()}
