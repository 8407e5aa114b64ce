"""The findings of `check`. What only a platform knows is checked by its backend's probe()."""

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import backends
from backends import Finding
from jobs import is_mounted, login, require_image, secret_values, workspace
from profiles import FOLDER, Profile
from transport import Refusal, human

if TYPE_CHECKING:
    from prepare import Launch

NEEDS = {"local": (), "docker": ("nemo-run", "docker"), "slurm": ("nemo-run",), "lepton": ("nemo-run", "leptonai"),
         "dgxcloud": ("nemo-run", "requests")}


def attempt(what: str, make: Callable[[], Any], text: Callable[[Any], object]) -> tuple[Any, Finding]:
    """(what `make` returns, a finding that is ok with the `text` of it); (None, a failure) for a Refusal."""
    try:
        made = make()
        return made, Finding(what, "ok", str(text(made)))
    except Refusal as refusal:
        return None, Finding(what, "failure", refusal.what, refusal.fix, refusal.code)


def finding(what: str, call: Callable[[], object], text: str = "") -> Finding:
    """A finding that is ok with what `call` returns, or with `text` if that is nothing; a failure for a Refusal."""
    return attempt(what, call, lambda made: made or text)[1]


def guarded(what: str, find: Callable[[], Finding]) -> Iterator[Finding]:
    """The finding; a warning where the platform does not tell."""
    try:
        yield find()
    except Refusal as refusal:
        yield Finding(what, "warning", "cannot be checked: " + refusal.what, refusal.fix)


def pull_secrets(names: list[str]) -> Iterator[Finding]:
    """No API of a cloud lists them."""
    for name in names:
        yield Finding("pull secret", "warning", "%s: cannot be checked" % name, "look in the console")


def listed(what: str, wanted: list[str], ask: Callable[[], list[str]], fix: str, certain: bool = True
           ) -> Iterator[Finding]:
    """Whether each wanted name is in a platform's list; a warning if the list is not `certain` or cannot be read."""
    try:
        known = ask() if wanted else []
    except Refusal as refusal:
        yield Finding(what, "warning", "cannot be checked: " + refusal.what, refusal.fix)
        return
    for name in wanted:
        if name in known:
            yield Finding(what, "ok", name)
        else:
            said = "%s is not among %s" % (name, ", ".join(sorted(known)) or "none")
            yield Finding(what, "failure" if certain else "warning", said, fix, 4 if certain else 0)


def findings(profile: Profile, launch: "Launch | None" = None) -> Iterator[Finding]:
    """All findings for a profile, and for a recipe on it if there is a launch."""
    yield finding("profile", profile.require_set, "%s, executor %s, from %s" % (
        profile.name, profile.executor, ", ".join(profile.files)))
    yield from versions(profile.executor)
    settings = launch.job.settings if launch else profile.settings
    if launch:
        yield from recipe_findings(launch)
    if not profile.unset:
        yield from backends.backend(profile.executor).probe(settings, launch.job if launch else None)
    else:
        yield Finding(profile.executor, "warning", "was not asked: the profile is not complete",
                      "complete it as said above, then check again")


def recipe_findings(launch: "Launch") -> Iterator[Finding]:
    job = launch.job
    yield Finding("recipe", "ok", "%s, %s, %d files" % (job.name, job.description["launch"], launch.plan.files))
    yield finding("secrets", lambda: ", ".join(secret_values(job, False)), "no secret is sent by value")
    if not launch.profile.unset:
        yield finding("job", partial(launch.check, True), "%s can launch it" % job.executor)
    for name, used, limit in launch.plan.budgets:
        said = "%d %% of %s" % (-(-used * 100 // limit), human(limit) if limit >= 65536 else limit)
        nearly = used > 0.9 * limit and not name.startswith("one ")  # a chunk fills its value by design
        state = "failure" if used > limit else "warning" if nearly else "ok"
        fix = "" if state == "ok" else "leave files out with exclude or .airliftignore"
        yield Finding(name, state, said, fix, 3 if used > limit else 0)
    yield from wandb_finding(job)
    if launch.config.unread:
        said = "it refers to %s, which nothing sets" % ", ".join("${%s}" % name for name in launch.config.unread)
        yield Finding("config", "failure", said,
                      "set it in the profile or in [wandb] of your env.toml, or override the key that refers to it", 2)
    for note in job.notes:
        yield Finding("note", "warning", note)


def wandb_finding(job: Any) -> Iterator[Finding]:
    """Whether W&B has a key, where it is on. On Slurm a login may have one."""
    env = job.description["defaults"] | job.description["env"]
    if "WANDB_PROJECT" not in env or env.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    here = job.executor == "local" and login("WANDB_API_KEY")[1]
    if "WANDB_API_KEY" in {*env, *job.secrets} or here:
        yield Finding("W&B", "ok", "a key is in " + here if here else "a key is sent")
        return
    state = "warning" if job.executor == "slurm" else "failure"
    yield Finding("W&B", state, "run.wandb.project is set, and no WANDB_API_KEY is sent",
                  'add WANDB_API_KEY = "env" or "login" to [secrets], or WANDB_MODE = "offline" to env_vars', 2)


def image_finding(settings: dict[str, Any], job: Any) -> Finding:
    """Whether there is an image; without a job, only the profile's is known."""
    if job or settings.get("container_image"):
        return finding("image", lambda: require_image(job) if job else settings["container_image"])
    return Finding("image", "warning", "the profile has none, so the recipe's header must have one",
                   "check FAMILY STAGE PROFILE")


def workspace_finding(settings: dict[str, Any]) -> Finding:
    """Whether there is a workspace, on storage that is mounted."""
    base = workspace(settings)
    if not base:
        return Finding("workspace", "warning", "there is none: what a job writes is lost with its pod",
                       "set workspace in the profile")
    if is_mounted(base, settings):
        return Finding("workspace", "ok", base)
    return Finding("workspace", "failure", "%s is on none of the mounts" % base,
                   "mount its storage, or change the workspace", 2)


def versions(executor: str) -> Iterator[Finding]:
    """Whether the libraries that the executor needs have the versions that requirements.txt pins."""
    pins = FOLDER.parent / "requirements.txt"
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\;]+)", pins.read_text(), re.M)) if pins.exists() else {}
    for name in ("omegaconf", *NEEDS[executor]):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "failure", "is not installed", "pip install -r requirements.txt, or make install", 2)
            continue
        wanted = pinned.get(name, found)
        yield Finding(name, "ok", found) if found == wanted else Finding(
            name, "warning", "%s, and requirements.txt pins %s" % (found, wanted), "pip install -r requirements.txt")
