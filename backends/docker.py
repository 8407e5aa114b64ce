"""Docker, or what has the same API: one container on this machine, which carries its own source as on the clouds.

nemo-run's DockerExecutor describes the container, and its list of jobs has it. The daemon is found as the `docker`
command finds it (DOCKER_HOST). When a container is first seen to have ended, its log and exit code are saved in
Airlift's home and it is removed, since chunks and secrets are in its environment.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import archive
import profiles
import screen
import state
from backends import ENDED_ALREADY, FINAL, GONE, Finding, Status, exit_status
from backends.common import checks, import_nemo
from backends.common.checks import finding
from backends.common.outputs import copied
from jobs import Job, repository_of, require_image
from profiles import FOLDER
from runs import Run
from transport import Plan, Refusal

CAN = {"detach"}
ANSWER_S = 60  # seconds for the daemon's answer
GRACE_S = 20  # seconds between TERM and KILL


class Record(TypedDict):
    """What is kept of a container."""

    name: str
    mounts: list[str]  # what was mounted: HERE:THERE


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Pull the image unless it is here, and start the container."""
    mounts = volumes(job.settings)
    client = connect()
    if ask_docker(lambda: client.images.get(str(job.image)), True) is None:
        ask_docker(lambda: client.images.pull(str(job.image)))
    name = "airlift-%s-%s" % (re.sub(r"[^A-Za-z0-9]+", "-", job.name, flags=re.ASCII).strip("-")[:40], job.run_id)
    run.keep(Record(name=name, mounts=mounts))
    nemo = import_nemo()
    ask_docker(lambda: nemo.submit_docker(docker_executor(job, mounts), job.run_id, name, plan.argv, plan.env, client))
    run.running_since = run.running_since or time.time()


def follow(run: Run) -> Status:
    """Print the log until the container ends."""
    if not run.ended:
        print(screen.status_line(Status("running", "container " + run.record["name"]), run), flush=True)
    _show(run, True)
    while (now := status(run)).state not in FINAL:  # its log cannot be read, or has ended early
        time.sleep(1)
    return now


def logs(run: Run) -> None:
    _show(run, False)


def _show(run: Run, follow: bool) -> None:
    container = find(run)
    if container is None:
        kept = _kept(run) / "log"
        pieces: Any = [kept.read_bytes()] if kept.exists() else []
    else:
        pieces = log_of(container, follow)
    for piece in pieces:
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()


def log_of(container: Any, follow: bool = False) -> Iterator[bytes]:
    """A container's log; a line that says why, where there is none: not every logging driver can be read."""
    try:
        yield from ask_docker(lambda: container.logs(stream=True, follow=follow))
    except Refusal as refusal:
        if refusal.code != 4:
            raise
        yield b"airlift: there is no log of this container. %s\n" % refusal.what.encode()


def status(run: Run) -> Status:
    container = find(run)
    if container is None:
        return _ended(run)
    state = container.attrs["State"]
    if state["Status"] in ("exited", "dead", "stopped"):
        return _put_away(run, container)
    return Status("waiting" if state["Status"] in ("created", "configured") else "running", state["Status"])


def cancel(run: Run) -> str:
    """Send TERM, and KILL if that does not end it; returns when it has ended."""
    container = find(run)
    if container is None or container.status == "exited":
        return ENDED_ALREADY % status(run).detail
    (_kept(run, True) / "cancelled").touch(0o600)
    ask_docker(lambda: container.stop(timeout=GRACE_S))
    status(run)
    return "container %s was stopped and removed; its log is kept" % run.record["name"]


def jobs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    client = connect()
    for container in ask_docker(lambda: client.containers.list(all=True, filters={"name": "^airlift-"})):
        yield container.name, container.status


def adopt(settings: dict[str, Any], name: str) -> archive.Found:
    """A container that has ended was removed when its end was first seen."""
    client = connect()
    container = ask_docker(lambda: client.containers.get(name), True)
    if container is None:
        raise Refusal("there is no container " + name, "python launch.py adopt PROFILE lists those that are there", 4)
    env = dict(line.partition("=")[::2] for line in container.attrs["Config"]["Env"] or [])
    mounts = (container.attrs.get("HostConfig") or {}).get("Binds") or []
    record = Record(name=name, mounts=list(mounts))
    return archive.from_env(env, record, profiles.moment(container.attrs["Created"][:19] + "+00:00") or 0)


def bring(run: Run, pattern: str, folder: Path) -> list[str]:
    """From the folder of this machine that was mounted where the outputs are. Raises Refusal."""
    pairs = [mount.split(":")[:2] for mount in run.record.get("mounts", [])]
    for here, there in sorted(pairs, key=lambda pair: -len(pair[1])):
        if ("%s/" % run.outputs).startswith(there.rstrip("/") + "/") and os.path.isdir(here):
            return copied(Path(here, str(run.outputs)[len(there.rstrip("/")):].lstrip("/")), pattern, folder)
    raise Refusal("the outputs of run %s are on no folder of this machine" % run.id, "look in its volumes")


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """The daemon, the image, the runtime, the mounts."""
    client, found = checks.attempt("daemon", connect, lambda client: "%s, %s" % (
        os.environ.get("DOCKER_HOST", "its usual socket"), ask_docker(client.version)["Version"]))
    yield found
    if client is None:
        return
    yield (named := checks.image_finding(settings, job))
    if named.state == "ok":
        image = ask_docker(lambda: client.images.get(named.said), True)
        yield Finding("image here", "ok", str(image.short_id)) if image else Finding(
            "image here", "warning", "no: the first launch will pull it", "docker pull " + named.said)
    if (job.gpus_per_node if job else settings.get("gpus_per_node")) and settings.get("runtime"):
        yield from checks.listed("runtime", [settings["runtime"]], lambda: list(ask_docker(client.info)["Runtimes"]),
                                 "install it, or remove runtime")
    yield finding("mounts", lambda: ", ".join(volumes(settings, False)) or "none")
    yield checks.workspace_finding(settings)


def check(job: Job, plan: Plan) -> None:
    """Raises Refusal for what Docker cannot do, or would refuse."""
    if job.nodes > 1:
        raise Refusal("Docker starts one container on this machine, and the job has %d nodes" % job.nodes,
                      "set nodes = 1 in the profile, or use --nodes 1")
    require_image(job)
    volumes(job.settings, False)


def volumes(settings: dict[str, Any], make: bool = True) -> list[str]:
    """The mounts as Docker takes them: `~`, variables and relative paths (from launch.py's folder) filled in, and with
    `make`, missing folders created. A name without a slash is a Docker volume. Raises Refusal."""
    result = []
    for mount in settings.get("mounts") or []:
        if isinstance(mount, str) and repository_of(mount, {}):
            continue  # the pod clones it
        found = re.fullmatch(r"([^:]+):(/[^:]*)(:[^:]+)?", str(mount))
        if not found:
            raise Refusal("the mount %r cannot be parsed" % mount,
                          'write "SRC:DST" or "SRC:DST:ro", where DST is an absolute path')
        source = os.path.expanduser(os.path.expandvars(found.group(1)))
        unset = re.search(r"\$\{?(\w+)", source)
        if unset:
            raise Refusal("the mount %r reads %s, which is not set" % (mount, unset.group(1)),
                          "export it, or write the path")
        if "/" in source or source.startswith("."):
            source = os.path.normpath(FOLDER.parent / source)
            if make and not os.path.exists(source):
                os.makedirs(source)  # Docker would create it, too, but owned by root
        result.append(source + ":" + found.group(2) + (found.group(3) or ""))
    return result


def docker_executor(job: Job, mounts: list[str]) -> Any:
    """nemo-run's executor, with GPUs and their runtime only if the job has any."""
    from nemo_run.core.execution.docker import DockerExecutor
    from nemo_run.core.packaging.base import Packager
    gpus = -1 if job.gpus_per_node == "gpu" else job.gpus_per_node
    settings = job.settings
    return DockerExecutor(
        container_image=str(job.image), num_gpus=gpus or None, runtime=settings.get("runtime") if gpus else None,
        ipc_mode=settings.get("ipc_mode"), volumes=mounts, network="host", packager=Packager(),
        shm_size=settings.get("shm_size") if settings.get("ipc_mode") != "host" else None)  # else it is the host's


def connect() -> Any:
    """The daemon's client. Raises Refusal with exit code 4 if it refuses, 5 if it cannot be reached."""
    with screen.step("import docker"):
        import docker

    def sign_in() -> Any:  # the SDK would ask for the daemon's version itself, before there is a session to confine
        first = docker.from_env(timeout=ANSWER_S, version=docker.constants.MINIMUM_DOCKER_API_VERSION)
        version = confined(first).version(api_version=False).get("ApiVersion")
        return confined(docker.from_env(timeout=ANSWER_S, version=str(version)))

    return ask_docker(sign_in)


def confined(client: Any) -> Any:
    """The client, with its session confined as those to the clouds are, and bounds on the daemon's answers. Time has
    none: the daemon is root on this machine, or as good as that, and a pull may take hours."""
    from backends.common import http

    def bound(response: Any, **how: Any) -> None:
        response.raw = Body(response.raw, http.origin(response.url), how.get("stream"))

    http.confined(client.api)
    client.api.headers["Accept-Encoding"] = "identity"
    client.api.hooks["response"].append(bound)
    return client


class Body:
    """The body of an answer of the daemon, read in pieces as requests and the SDK read it."""

    def __init__(self, raw: Any, origin: str, stream: bool | None) -> None:
        from backends.common import http

        self.raw, self.http, self.origin, self.left = raw, http, origin, float("inf") if stream else http.MOST
        if (raw.headers.get("Content-Encoding") or "identity").lower() != "identity":
            raise http.endless(origin, http.COMPRESSED)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def take(self, amount: float) -> None:
        self.left -= amount
        if self.left < 0 or amount > self.http.MOST:
            raise self.http.endless(self.origin, self.http.TOO_MUCH)

    def read(self, amount: int | None = None, **how: Any) -> Any:
        self.take(amount or 0)  # a frame of a log says its length itself
        return self.raw.read(amount, **how)

    def stream(self, amount: int, **how: Any) -> Iterator[bytes]:
        for piece in self.raw.stream(amount, **how):
            self.take(len(piece))
            yield piece


def ask_docker(call: Any, may_lack: bool = False) -> Any:
    """The call's result; with `may_lack`, None for what does not exist. Raises Refusal with the daemon's reason."""
    import requests
    from docker.errors import APIError, DockerException, NotFound
    where = os.environ.get("DOCKER_HOST", "its usual socket")
    try:
        return call()
    except APIError as error:
        if may_lack and isinstance(error, NotFound):
            return None
        raise Refusal("Docker refuses: %s" % screen.said(str(error.explanation or error)),
                      "correct what it names in the profile", 4) from None
    except (DockerException, requests.RequestException) as error:
        if "Permission denied" in str(error):
            raise Refusal("this user may not use Docker at %s" % where, "join its group, or set DOCKER_HOST",
                          4) from None
        raise Refusal("Docker cannot be reached at %s" % where, "start it, or set DOCKER_HOST", 5) from None


def find(run: Run) -> Any:
    """The run's container, or None."""
    client = connect()
    return ask_docker(lambda: client.containers.get(run.record["name"]), True)


def _kept(run: Run, make: bool = False) -> Path:
    return state.folder("docker", run.id, make=make)


def _put_away(run: Run, container: Any) -> Status:
    """Keep log and exit code, then remove the container."""
    folder = _kept(run, True)
    with open(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
        log.writelines(log_of(container))
    state.write(folder / "exit", b"%d\n" % container.attrs["State"]["ExitCode"])
    ask_docker(lambda: container.remove(force=True))
    return _ended(run)


def _ended(run: Run) -> Status:
    """The final status of a container that has been removed."""
    return exit_status(_kept(run)) or Status("failed", GONE, gone=True)
