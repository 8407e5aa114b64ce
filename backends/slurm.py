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
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import transport
from backends import ENDED_ALREADY, FINAL, GONE, Job, Run, Status, await_end, screen
from backends.checks import Finding, tried
from backends.hosts import Host, words
from backends.repositories import parse
from transport import Plan, Refusal

CAN = {"detach", "ray"}
POLL_S = 2.0  # seconds between two questions
PATIENCE_S = 120.0  # seconds without an answer until following gives up
LATE_S = 10.0  # seconds for a log's end to reach the login node through a shared file system
SQUASH_S = 7200.0  # seconds for an image to be squashed, in the queue and on a node
MOST = 1 << 20  # bytes of one log in one answer
STATES = {
    "RUNNING": "running", "COMPLETING": "running", "RESIZING": "running", "SIGNALING": "running", "STOPPED": "running",
    "STAGE_OUT": "running", "COMPLETED": "done", "CANCELLED": "cancelled", "REVOKED": "cancelled", "FAILED": "failed",
    "TIMEOUT": "failed", "PREEMPTED": "failed", "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
}  # all others are kinds of waiting: PENDING, CONFIGURING, REQUEUED, SUSPENDED, REQUEUE_HOLD and more
PLAIN = re.compile(r"/[\w.@+=/-]+", re.ASCII)  # to shells without quotes, to sbatch's patterns (%) and mounts (: and ,)
ENDED = re.compile(r"airlift: rank (\S+) ended with exit code (\d+)")  # pod.py's last line


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
    name = re.sub(r"[^A-Za-z0-9]+", "-", job.name, flags=re.ASCII).strip("-")[:40] + "-" + job.run
    folder = "%s/experiments/%s/%s_1/%s" % (base, name, name, name)
    run.record |= {"host": host.__dict__, "name": "airlift." + name, "folder": folder, "secrets": bool(job.secrets)}
    run.save()
    from backends import nemo  # takes seconds; what can be refused has been by now

    secrets = {key: plan.env[key] for key in job.secrets}
    package = transport.native(plan, job.description | {"secrets": bool(secrets)})
    executor = slurm_executor(job, host, base, image, mounts, folder, attached, launcher=None)
    try:
        run.record["job"] = nemo.submit_slurm(name, executor, job.run, package, base,
                                              lambda: leave_secrets(host, folder, secrets))
    except BaseException as error:
        if secrets and not (isinstance(error, Refusal) and error.code == 5):
            host.run(forget(folder))
        raise
    run.save()


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
        return ENDED_ALREADY % before.detail
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
                 "time": shlex.quote(settings.get("time", "04:00:00"))}
        yield tried("partition", lambda words=ASK_SLURM % asked, name=partition: "%s: %s" % (  # type: ignore[misc]
            name, host.ask(words, "submit to %s as %s" % (name, settings["account"])).strip().split(": ", 1)[-1]))
    yield tried("sacct", lambda: host.ask("sacct -n -X -S now >/dev/null", "ask the accounting"), "answers")
    named = job.image if job else settings.get("container_image")
    if named or (not job and "container_image" not in settings):
        yield tried("pyxis", lambda: host.ask("srun --help | grep -q -e --container-image", "find --container-image "
                                              "in srun, which images need"), "is there")
    if settings.get("tunnel") == "ssh":
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
    if settings.get("tunnel", "local") == "ssh" and not (settings.get("host") and settings.get("user")):
        raise Refusal('tunnel is "ssh", but the profile names no %s' % ("user" if settings.get("host") else "host"),
                      'set host and user, or tunnel = "local" on the cluster itself')
    identity = settings.get("identity")
    if settings.get("tunnel") == "ssh" and identity and not Path(identity).expanduser().is_file():
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
        if parse(mount, settings.get("git_mirrors", {})):
            if not job.image and settings.get("auto_mount") != "image":
                raise Refusal("%s needs a container to be mounted into" % mount, "set container_image in the profile")
        elif not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:[^:,\s]+)?", mount):
            raise Refusal("the mount %r cannot be read" % mount,
                          'write "SRC:DST" or "SRC:DST:FLAGS", two whole paths of the cluster and the container')


def host_of(settings: dict[str, Any]) -> Host:
    if settings.get("tunnel", "local") == "local":
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
    from backends.repositories import clone

    mounts = []
    for mount in settings.get("mounts") or []:
        repository = parse(mount, settings.get("git_mirrors", {}))
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
    words = {"base": base, "key": re.sub(r"[^A-Za-z0-9._-]+", "-", plain), "url": shlex.quote("docker://" + plain),
             "account": shlex.quote(settings["account"]), "partition": shlex.quote(settings["squash_partition"])}
    return host.ask(SQUASH % words, "squash " + image, SQUASH_S).strip().splitlines()[-1]


# ---------------------------------------------------------------- the job


def slurm_executor(job: Job, host: Host, base: str, image: str | None, mounts: list[str], folder: str, attached: bool,
                   launcher: Any) -> Any:
    """The one factory of nemo-run's executor for every kind of job. `launcher` None: pod.py starts torchrun, Ray or the
    script itself, in the task."""
    from backends import nemo

    settings = job.settings
    own = settings.get("run_partition" if attached else "batch_partition")
    return nemo.CarriedSlurm(
        account=settings["account"], partition=own or settings["partition"], nodes=job.nodes, ntasks_per_node=1,
        gpus_per_node=job.gpus_per_node if isinstance(job.gpus_per_node, int) and job.gpus_per_node else None,
        cpus_per_task=settings.get("cpus_per_task"), mem=settings.get("mem"), time=settings.get("time", "04:00:00"),
        exclusive=settings.get("exclusive") or None, container_image=image,
        container_mounts=mounts if image else [], job_name_prefix="airlift.", launcher=launcher,
        setup_lines=setup_lines(settings, folder if job.secrets else ""), job_details=nemo.LogOfEachRank(),
        packager=nemo.TreePackager(airlift_run=job.run), tunnel=nemo.tunnel(host, base + "/experiments"),
        poll_estimated_start_time=False, airlift_run=job.run)


def setup_lines(settings: dict[str, Any], secrets: str) -> str:
    """What the batch script does first. nemo-run traces it: that ends here, before the user's own lines."""
    lines = ["{ set +vx; } 2>/dev/null"]
    if secrets:
        lines.append(FORGET_AT_END % forget(secrets))
    lines.append(LAST_START % settings.get("retries", 0))
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


def forget(folder: str) -> str:
    return "rm -f %s/secrets.json" % folder


# ---------------------------------------------------------------- what became of it


def job_id(host: Host, run: Run) -> str:
    """Slurm's number of the job; by its name where the launcher was cut off before it knew. Raises Refusal."""
    if not run.record.get("job"):
        name = shlex.quote(run.record["name"])
        script = "squeue -h -n %s -o %%i; sacct -X -n -P --name %s -o JobID" % (name, name)
        found = host.ask(script, "look for the job").split()
        if not found:
            raise Refusal("%s has no job of run %s" % (host, run.run), "it was not submitted; launch it again")
        run.record["job"] = found[0]
        run.save()
    return str(run.record["job"])


STATE = """\
if ! said=$(scontrol -o show job %(job)s 2>&1); then
  case $said in
  *"Invalid job id"*) said=$(sacct -X -n -P -j %(job)s -o State,ExitCode,Timelimit) || exit 1 ;;
  *) printf '%%s\\n' "$said" >&2; exit 1 ;;
  esac
fi
printf '%%s\\n' "$said"
"""


def ask(host: Host, run: Run) -> Status:
    """Slurm's word. Raises Refusal (exit code 5) where the controller does not answer."""
    done = host.run(STATE % {"job": job_id(host, run)})
    if done.returncode:
        raise Refusal("%s: Slurm does not tell the job's state: %s" % (host, words(done.stderr)), "try again later", 5)
    return read_state(done.stdout.decode("utf-8", "replace"), run.starts)


def read_state(text: str, starts: int = 1) -> Status:
    """The Status that scontrol's line tells, or sacct's: State|ExitCode|Timelimit; `starts` is how many it may have."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    if not fields:
        row = [*(text.strip().splitlines() or [""])[-1].split("|"), "", ""]
        fields = {"JobState": row[0].split(" ")[0], "ExitCode": row[1], "TimeLimit": row[2]}
    word = fields["JobState"]
    if not word:
        return Status("failed", GONE)
    state = STATES.get(word, "waiting")
    detail = word
    if word == "TIMEOUT":
        detail = "TIMEOUT: it reached its time limit of %s" % fields.get("TimeLimit", "")
    elif word == "NODE_FAIL":
        detail = "NODE_FAIL: a node went down"
    elif word == "OUT_OF_MEMORY":
        detail = "OUT_OF_MEMORY: it needed more than mem"
    elif state == "waiting" and fields.get("Reason", "None") != "None":
        detail = "%s: %s" % (word, fields["Reason"])
    if fields.get("Restarts", "0") != "0":
        detail += ", attempt %d of %d" % (int(fields["Restarts"]) + 1, starts)
    code = re.match("[0-9]+", fields.get("ExitCode", "")) if word == "FAILED" else None
    return Status(state, detail, 0 if state == "done" else int(code.group()) if code else None)


def settled(host: Host, run: Run, status: Status) -> Status:
    """At the end for good: no secret stays, and a failed job gets the code of the rank that failed first."""
    if status.state not in FINAL:
        return status
    if run.record.get("secrets"):
        host.run(forget(run.record["folder"]))
    if status.state == "failed" and status.exit_code is not None:
        return Status(status.state, status.detail, rank_code(host, run) or status.exit_code)
    return status


def rank_code(host: Host, run: Run) -> int | None:
    """The first failure that is not an echo of another's end, from the last lines of each rank's newest log."""
    place = run.record["folder"], run.record["job"]
    script = "cd %s && for log in log-*_%s_*.out; do tail -c 300 \"$log\"; done" % place
    codes: dict[str, int] = {}
    for found in ENDED.finditer(host.run(script).stdout.decode("utf-8", "replace")):
        codes[found.group(1)] = int(found.group(2))  # a later start comes later
    failures = [code for _, code in sorted(codes.items()) if code]
    return next((code for code in failures if code not in (137, 143)), failures[0] if failures else None)


# ---------------------------------------------------------------- logs

# Each log that has grown: a line "NAME BYTES", then that many bytes.
GROWN = """\
cd %(folder)s 2>/dev/null || exit 0
for log in %(logs)s; do
  [ -f "$log" ] || continue
  from=0
  case $log in
%(known)s
  esac
  size=$(wc -c <"$log")
  [ $size -le $((from + %(most)d)) ] || size=$((from + %(most)d))
  [ $size -gt $from ] || continue
  echo "$log $((size - from))"
  tail -c +$((from + 1)) "$log" | head -c $((size - from))
done
"""


@dataclass
class Watch:
    """Watches one job: tells its states through `tell`, and prints what its logs have grown by."""

    host: Host
    run: Run
    tell: Callable[[str], None]
    offsets: dict[str, int] = field(default_factory=dict)  # of each log
    rests: dict[str, bytes] = field(default_factory=dict)  # the last line of each, while it is not whole
    ended: set[str] = field(default_factory=set)  # logs that say so

    def to_the_end(self) -> Status:
        last, heard, late = None, time.monotonic(), 0.0
        while True:
            try:
                status = ask(self.host, self.run)
                grown = self.print_grown()
            except Refusal as refusal:
                if refusal.code != 5 or time.monotonic() - heard > PATIENCE_S:
                    raise
                time.sleep(POLL_S)
                continue
            heard = time.monotonic()
            if status.state == "running":
                self.run.seen_running()
            if status != last:
                self.tell(screen.told(status, self.run))
                last = status
            if status.state in FINAL:
                late = late or heard + LATE_S
                if not grown and (self.ended or status.state == "cancelled" or heard > late):
                    break
            if not grown:
                time.sleep(POLL_S)
        self.print_rests()
        if status.state == "failed" and not self.ended:
            self.print_batch_log()
        return status

    def print_all(self) -> None:
        """Print what there is. Raises Refusal where there is nothing."""
        status = ask(self.host, self.run)
        while self.print_grown() >= MOST:
            pass
        self.print_rests()
        if not self.offsets and not (status.state in FINAL and self.print_batch_log()):
            raise Refusal("run %s has no log: it is %s (%s)" % (self.run.run, status.state, status.detail),
                          "python launch.py logs -f %s waits for it" % self.run.run)

    def print_grown(self) -> int:
        """Print what is new; gives how much that is."""
        job = job_id(self.host, self.run)
        known = "\n".join("  %s) from=%d ;;" % (shlex.quote(name), offset) for name, offset in self.offsets.items())
        every = len(self.run.ranks) == self.run.nodes > 1
        logs = " ".join("log-*_%s_%s_*.out" % (job, rank) for rank in ("*" if every else self.run.ranks))
        words = {"folder": self.run.record["folder"], "logs": logs, "known": known, "most": MOST}
        done = self.host.run(GROWN % words)
        data = done.stdout
        while data:
            header, _, data = data.partition(b"\n")
            name, _, size = header.decode().rpartition(" ")
            self.print_part(name, data[: int(size)])
            data = data[int(size):]
        return len(done.stdout)

    def print_part(self, name: str, data: bytes) -> None:
        self.offsets[name] = self.offsets.get(name, 0) + len(data)
        *whole, self.rests[name] = (self.rests.get(name, b"") + data).split(b"\n")
        for line in whole:
            self.print_line(name, line)
        sys.stdout.flush()

    def print_line(self, name: str, line: bytes) -> None:
        if ENDED.search(line.decode("utf-8", "replace")):
            self.ended.add(name)
        prefix = screen.rank(name.split("_")[-2]).encode() if len(self.run.ranks) > 1 else b""
        sys.stdout.buffer.write(prefix + line + b"\n")

    def print_rests(self) -> None:
        for name, rest in self.rests.items():
            if rest:
                self.print_line(name, rest)
        sys.stdout.flush()

    def print_batch_log(self) -> bool:
        """No rank got as far as pod.py's end: the batch script's log tells why."""
        script = "tail -n 20 %s/sbatch_*_%s.out" % (self.run.record["folder"], self.run.record["job"])
        said = self.host.run(script).stdout
        sys.stdout.buffer.write(said)
        sys.stdout.flush()
        return bool(said)
