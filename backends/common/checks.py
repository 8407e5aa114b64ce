"""`check`: what can be known before a launch, as findings. What only a platform knows, its backend's probe() asks.

A finding is ok, a warning (a launch may still work, or it could not be found out), or a failure (it would not).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backends
from backends import Finding
from jobs import lies_on, secret_values, workspace
from profiles import FOLDER, Profile
from transport import Refusal, human

if TYPE_CHECKING:
    from prepare import Launch

NEEDS = {"local": (), "docker": ("nemo-run", "docker"), "slurm": ("nemo-run",), "lepton": ("nemo-run", "leptonai"),
         "dgxcloud": ("nemo-run", "requests")}


def tried(what: str, look: Callable[[], object], said: str = "") -> Finding:
    """A finding: ok with what `look` gives, or `said` where it gives nothing; a failure with its Refusal's words."""
    try:
        return Finding(what, "ok", str(look() or said))
    except Refusal as refusal:
        return Finding(what, "failure", refusal.what, refusal.fix, refusal.code)


def listed(what: str, wanted: list[str], look: Callable[[], list[str]], fix: str, surely: bool = True
           ) -> Iterator[Finding]:
    """Findings for names that a platform lists: one that is missing is a failure, or a warning unless it is `surely`
    missing; a list that cannot be had is a warning."""
    try:
        known = look() if wanted else []
    except Refusal as refusal:
        yield Finding(what, "warning", "cannot be asked for: " + refusal.what, refusal.fix)
        return
    for name in wanted:
        if name in known:
            yield Finding(what, "ok", name)
        else:
            said = "%s is not among %s" % (name, ", ".join(sorted(known)) or "none")
            yield Finding(what, "failure" if surely else "warning", said, fix, 4 if surely else 0)


def look(profile: Profile, launch: Launch | None = None) -> Iterator[Finding]:
    """All findings for a profile, and for a recipe on it where there is a launch."""
    yield tried("profile", profile.require_set, "%s, executor %s, from %s" % (
        profile.name, profile.executor, ", ".join(Path(name).name for name in profile.files)))
    yield from versions(profile.executor)
    settings = launch.job.settings if launch else profile.settings
    if launch:
        yield from recipe(launch)
    if not profile.unset:
        yield from backends.backend(profile.executor).probe(settings, launch.job if launch else None)


def recipe(launch: Launch) -> Iterator[Finding]:
    job = launch.job
    yield Finding("recipe", "ok", "%s, %s, %d files" % (job.name, job.description["launch"], launch.plan.files))
    yield tried("secrets", lambda: ", ".join(secret_values(job, False)), "none is sent by value")
    if not launch.profile.unset:
        yield tried("job", partial(launch.check, True), "%s can launch it" % job.executor)
    for name, used, limit in launch.plan.budgets:
        said = "%d %% of %s" % (-(-used * 100 // limit), human(limit) if limit >= 65536 else limit)
        if used > limit or (used > 0.9 * limit and not name.startswith("one ")):  # a chunk fills its value by design
            fix = "leave files out with exclude or .airliftignore"
            yield Finding(name, "failure" if used > limit else "warning", said, fix, 3 if used > limit else 0)
        else:
            yield Finding(name, "ok", said)
    for note in job.notes:
        yield Finding("note", "warning", note)


def image_finding(settings: dict[str, Any], job: Any) -> Finding:
    """Whether there is an image. Only a recipe's header may have it."""
    name = job.image if job else settings.get("container_image")
    if name:
        return Finding("image", "ok", str(name))
    if job:
        return Finding("image", "failure", "the job has none",
                       "set container_image in the profile, or image in the recipe's header", 2)
    return Finding("image", "warning", "the profile has none: the recipe's header must", "check FAMILY STAGE PROFILE")


def workspace_finding(settings: dict[str, Any], places: list[str]) -> Finding:
    """Whether what a job writes is kept: on a workspace that lies on storage, mounted at one of `places`."""
    base = workspace(settings)
    if not base:
        return Finding("workspace", "warning", "there is none: what a job writes goes with its pod",
                       "set workspace in the profile")
    if lies_on(base, places):
        return Finding("workspace", "ok", base)
    return Finding("workspace", "failure", "%s lies on none of the mounts" % base,
                   "mount its storage, or change the workspace", 2)


def versions(executor: str) -> Iterator[Finding]:
    """The libraries that the executor needs, against the versions that requirements.txt pins."""
    import importlib.metadata

    pins = FOLDER.parent / "requirements.txt"
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\;]+)", pins.read_text(), re.M)) if pins.exists() else {}
    for name in ("omegaconf", *NEEDS[executor]):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "failure", "is not installed", "pip install -r requirements.txt, or make install", 2)
            continue
        wanted = pinned.get(name, found)
        yield Finding(name, "ok" if found == wanted else "warning", found if found == wanted else
                      "%s, and requirements.txt pins %s" % (found, wanted),
                      "" if found == wanted else "pip install -r requirements.txt")
