"""Slurm, by SSH or from the cluster itself: nemo-run packs, copies and submits; pod.py checks what came in each task.

One srun starts one pod.py on each node, and its rank is found there, in the task. What the others need of a job lies in
its folder, <remote_job_dir>/experiments/<name>/<name>_1/<name>: the tree (code/), one log for each rank and each start
of the job, the batch script's own log, and, while the job may still run, secrets.json (0600).

Ray on several nodes is such a job too: the tasks form the cluster (pod.py). nemo-run's SlurmRayJob is not used, for its
batch script, which is all it has, would have to be another one: it traces every line and prints its environment into
logs, needs containers, jq and pmix, loses double quotes, leaves out what .gitignore names, and lets a job go on whose
worker has died.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transport
from backends import FINAL, Finding, Status, await_end, ended_already
from backends.common import import_nemo
from backends.common.checks import tried
from backends.common.slurm_watch import Record, Watch, ask, forget, job_id, settled
from backends.common.ssh import Host
from jobs import Job, repository_of
from runs import Run
from transport import Plan, Refusal

CAN = {"detach", "ray"}
SQUASH_S = 7200.0  # seconds for an image to be squashed, in the queue and on a node
PLAIN = re.compile(r"/[\w.@+=/-]+", re.ASCII)  # to shells without quotes, to sbatch's patterns (%) and mounts (: and ,)


# ---------------------------------------------------------------- what launch.py calls


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Have everything on the cluster that the job needs, then sbatch. Raises Refusal with the cluster's own words."""
    settings, host = job.settings, host_of(job.settings)
    base = settings["remote_job_dir"].rstrip("/")
    look_around(host, base, [settings["persistent_cache"]] if settings.get("persistent_cache") else [])
    mounts = resolved_mounts(host, settings, base)
    image = squashed(host, settings, str(job.image), base) if job.image else None
    if not image and settings.get("mounts"):
        print("note: there is no container image, so nothing is mounted")
    name = re.sub(r"[^A-Za-z0-9]+", "-", job.name, flags=re.ASCII).strip("-")[:40] + "-" + job.run_id
    folder = "%s/experiments/%s/%s_1/%s" % (base, name, name, name)
    run.keep(Record(host=dict(host.__dict__), name="airlift." + name, folder=folder, secrets=bool(job.secrets)))
    nemo = import_nemo()

    secrets = {key: plan.env[key] for key in job.secrets}
    package = transport.native(plan, job.description | {"secrets": bool(secrets)})
    executor = slurm_executor(job, host, base, image, mounts, folder, attached, launcher=None)
    try:
        number = nemo.submit_slurm(name, executor, job.run_id, package, base,
                                   lambda: leave_secrets(host, folder, secrets))
    except BaseException as error:
        if secrets and not (isinstance(error, Refusal) and error.code == 5):
            host.run(forget(folder))
        raise
    run.keep(Record(job=number))


def follow(run: Run) -> Status:
    """Pass the logs on until the job ends for good; a job that is requeued is followed into its next start."""
    host = host_of_run(run)
    status = Watch(host, run, lambda text: print(text, flush=True)).to_the_end()
    return settled(host, run, status)


def logs(run: Run) -> None:
    host = host_of_run(run)
    Watch(host, run, lambda text: None).print_all()


def status(run: Run) -> Status:
    host = host_of_run(run)
    return settled(host, run, ask(host, run))


def cancel(run: Run) -> str:
    """scancel; returns when the job has ended, or after a minute."""
    host = host_of_run(run)
    before = ask(host, run)
    if before.state in FINAL:
        settled(host, run, before)
        return ended_already(before.detail)
    host.ask("scancel " + job_id(host, run), "cancel the job")
    after = await_end(lambda: ask(host, run))
    settled(host, run, after)
    done = "job %s was cancelled" % job_id(host, run)
    return done if after.state in FINAL else done + "; it is still %s" % after.detail


ASK_SLURM = """\
sbatch --test-only -A %(account)s -p %(partition)s -N %(nodes)d --time=%(time)s %(more)s --wrap true 2>&1 || exit 1
"""


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """The login node, its Slurm, account and partitions (by sbatch --test-only), pyxis, and the folder of all jobs."""
    first = tried("profile", partial(require_plain, settings))
    if first.state != "ok":  # what a shell would make of it
        yield first
        return
    host, base = host_of(settings), settings["remote_job_dir"].rstrip("/")
    yield (found := tried("login node", lambda: host.ask("hostname", "run a command").strip()))
    if found.state != "ok":
        return
    yield tried("Slurm", lambda: host.ask("sbatch --version", "find sbatch").strip())
    gpus = (job.gpus_per_node if job else settings.get("gpus_per_node")) or 0
    more = ["--gpus-per-node=%s" % gpus] if isinstance(gpus, int) and gpus else []
    more += ["--exclusive"] if settings.get("exclusive") else []
    more += ["--mem=%s" % settings["mem"]] if settings.get("mem") else []
    for partition in dict.fromkeys(settings.get(key) or settings["partition"] for key in (
            "run_partition", "batch_partition")):
        asked = {"account": shlex.quote(settings["account"]), "partition": shlex.quote(partition),
                 "nodes": job.nodes if job else settings.get("nodes", 1), "more": " ".join(map(shlex.quote, more)),
                 "time": shlex.quote(settings["time"])}
        yield tried("partition", lambda script=ASK_SLURM % asked, name=partition: "%s: %s" % (  # type: ignore[misc]
            name, host.ask(script, "submit to %s as %s" % (name, settings["account"])).strip().split(": ", 1)[-1]))
    yield tried("sacct", lambda: host.ask("sacct -n -X -S now >/dev/null", "ask the accounting"), "answers")
    named = job.image if job else settings.get("container_image")
    if named or (not job and "container_image" not in settings):
        yield tried("pyxis", lambda: host.ask("srun --help | grep -q -e --container-image", "find --container-image "
                                              "in srun, which images need"), "is there")
    if settings["tunnel"] == "ssh":
        yield Finding("rsync", "ok", "here") if shutil.which("rsync") else Finding(
            "rsync", "failure", "is not here", "install it: it copies the tree", 2)
        yield tried("rsync there", lambda: host.ask("command -v rsync", "find rsync").strip())
    yield tried("job folder", lambda: host.ask(
        "mkdir -p %s && test -w %s && df -Ph %s | awk 'NR==2 {print $4 \" free\"}'" % (base, base, base),
        "write to " + base).strip())


# ---------------------------------------------------------------- before it is sent


def require_plain(settings: dict[str, Any]) -> None:
    """Raises Refusal for what a shell would read in another way, and for a login node that is not whole."""
    base = settings["remote_job_dir"]
    if not PLAIN.fullmatch(base) or ".." in base.split("/"):
        raise Refusal("remote_job_dir is %r, and nemo-run hands it to shells as it is" % base,
                      "name a folder by its whole path, of letters, digits and . _ - + = @")
    if settings["tunnel"] == "ssh" and not (settings.get("host") and settings.get("user")):
        raise Refusal('tunnel is "ssh", but the profile names no %s' % ("user" if settings.get("host") else "host"),
                      'set host and user, or tunnel = "local" on the cluster itself')
    identity = settings.get("identity")
    if settings["tunnel"] == "ssh" and identity and not Path(identity).expanduser().is_file():
        raise Refusal("there is no key %s" % identity, "mend identity in the profile, or leave it out")
    if identity and re.search(r"[^\w.@%+=:/~-]", identity):
        raise Refusal("identity is %r, and nemo-run hands it to a shell as it is" % identity,
                      "move the key to a plain path")


def check(job: Job, plan: Plan) -> None:
    """What would fail later, or worse, somewhere else. Raises Refusal."""
    settings = job.settings
    require_plain(settings)
    for mount in settings.get("mounts") or []:
        if not isinstance(mount, str):
            raise Refusal("a mount is %r, and Slurm's are text" % mount, 'write "SRC:DST" or "SRC:DST:FLAGS"')
        if repository_of(mount, settings.get("git_mirrors", {})):
            if not job.image and settings.get("auto_mount") != "image":
                raise Refusal("%s needs a container to be mounted into" % mount, "set container_image in the profile")
        elif not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:[^:,\s]+)?", mount):
            raise Refusal("the mount %r cannot be read" % mount,
                          'write "SRC:DST" or "SRC:DST:FLAGS", two whole paths of the cluster and the container')


def host_of(settings: dict[str, Any]) -> Host:
    if settings["tunnel"] == "local":
        return Host()
    identity = settings.get("identity")
    return Host(settings["host"], settings["user"], settings.get("port"),
                str(Path(identity).expanduser()) if identity else None)


def host_of_run(run: Run) -> Host:
    return Host(**run.record["host"])


LOOK = """\
command -v sbatch >/dev/null ||
  { echo "there is no sbatch: no login node, or not in the PATH that ssh gives" >&2; exit 1; }
mkdir -p %(base)s %(folders)s && test -w %(base)s
"""


def look_around(host: Host, base: str, folders: list[str]) -> None:
    """Raises Refusal unless the host has Slurm and a folder for us; makes those that a container is to see."""
    host.ask(LOOK % {"base": base, "folders": " ".join(map(shlex.quote, folders))}, "use %s" % base)


def resolved_mounts(host: Host, settings: dict[str, Any], base: str) -> list[str]:
    """The mounts as srun takes them: repositories cloned, lustre_mount and the folder of all jobs added."""
    from backends.common.repositories import clone

    mounts = []
    for mount in settings.get("mounts") or []:
        repository = repository_of(mount, settings.get("git_mirrors", {}))
        if repository is None:
            mounts.append(mount)
        elif settings.get("auto_mount") != "image":
            mounts.append("%s:%s" % (clone(host, repository, base), repository.target))
    if settings.get("lustre_mount"):
        mounts.append(settings["lustre_mount"])
    mounts += [settings[key] for key in ("sif_dir", "persistent_cache") if settings.get(key)]
    mounts = [mount if ":" in mount else "%s:%s" % (mount, mount) for mount in mounts]
    return list(dict.fromkeys([*mounts, "%s:%s" % (base, base)]))


# Prints the file. Whoever comes second waits for the first; a file under its own name is whole.
SQUASH = """\
set -e
mkdir -p %(base)s/images
file=%(base)s/images/%(key)s.sqsh
exec 9>"$file.lock"
flock 9
if [ ! -f "$file" ]; then
  rm -f "$file.new"
  srun -J airlift.squash -N1 -n1 -A %(account)s -p %(partition)s -t 60 enroot import -o "$file.new" %(url)s >&2
  mv "$file.new" "$file"
fi
echo "$file"
"""


def squashed(host: Host, settings: dict[str, Any], image: str, base: str) -> str:
    """The image as srun takes it: as given, or, where the profile has a squash_partition and the image is a registry's
    address, as a file that enroot makes there once for each tag or digest. Raises Refusal in enroot's own words."""
    if not settings.get("squash_partition") or image.startswith(("/", "./")) or image.endswith(".sqsh"):
        return image
    plain = image.removeprefix("docker://")
    registry, _, rest = plain.partition("/")
    if "#" not in plain and rest and re.search("[.:]", registry):
        plain = registry + "#" + rest  # enroot divides a registry from an image so
    values = {"base": base, "key": re.sub(r"[^A-Za-z0-9._-]+", "-", plain), "url": shlex.quote("docker://" + plain),
              "account": shlex.quote(settings["account"]), "partition": shlex.quote(settings["squash_partition"])}
    return host.ask(SQUASH % values, "squash " + image, SQUASH_S).strip().splitlines()[-1]


# ---------------------------------------------------------------- the job


def slurm_executor(job: Job, host: Host, base: str, image: str | None, mounts: list[str], folder: str, attached: bool,
                   launcher: Any) -> Any:
    """The one factory of nemo-run's executor for every kind of job. `launcher` None: pod.py starts torchrun, Ray or the
    script itself, in the task."""
    nemo = import_nemo()

    settings = job.settings
    own = settings.get("run_partition" if attached else "batch_partition")
    return nemo.CarriedSlurm(
        account=settings["account"], partition=own or settings["partition"], nodes=job.nodes, ntasks_per_node=1,
        gpus_per_node=job.gpus_per_node if isinstance(job.gpus_per_node, int) and job.gpus_per_node else None,
        cpus_per_task=settings.get("cpus_per_task"), mem=settings.get("mem"), time=settings["time"],
        exclusive=settings.get("exclusive") or None, container_image=image,
        container_mounts=mounts if image else [], job_name_prefix="airlift.", launcher=launcher,
        setup_lines=setup_lines(settings, folder if job.secrets else ""), job_details=nemo.LogOfEachRank(),
        packager=nemo.TreePackager(airlift_run=job.run_id), tunnel=nemo.tunnel(host, base + "/experiments"),
        poll_estimated_start_time=False, airlift_run=job.run_id)


def setup_lines(settings: dict[str, Any], secrets: str) -> str:
    """What the batch script does first. nemo-run traces it: that ends here, before the user's own lines."""
    lines = ["{ set +vx; } 2>/dev/null"]
    if secrets:
        lines.append(FORGET_AT_END % forget(secrets))
    lines.append(LAST_START % settings["retries"])
    return "\n".join([*lines, settings.get("setup_lines", "")])


# nemo-run always submits with --requeue; Slurm counts the starts, but knows no limit.
LAST_START = '[ "${SLURM_RESTART_COUNT:-0}" -lt %d ] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0'

# When the batch script ends, however that is (Slurm sends it TERM), unless Slurm has counted one more start for it.
FORGET_AT_END = """\
airlift_forget() {
  restarts=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -o ' Restarts=[0-9]*')
  [ "${restarts#*=}" != "${SLURM_RESTART_COUNT:-0}" ] || %s
}
trap airlift_forget EXIT"""


def leave_secrets(host: Host, folder: str, secrets: dict[str, str]) -> None:
    """Put them into secrets.json, which only this user can read; pod.py does."""
    if secrets:
        host.ask("umask 077\nmkdir -p %s\ncat >%s/secrets.json <<'AIRLIFT_END'\n%s\nAIRLIFT_END"
                 % (folder, folder, json.dumps(secrets)), "keep the secrets")
