"""What became of a Slurm job: its state by Slurm's word, the exit code of its ranks, and their logs as they grow."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

import screen
from backends import FINAL, GONE, Status
from backends.common.podlog import ENDED, first_failure, note
from backends.common.ssh import Host, last_lines
from runs import Run
from transport import Refusal

POLL_S = 2.0  # seconds between two questions
PATIENCE_S = 120.0  # seconds without an answer until following gives up
LATE_S = 10.0  # seconds for a log's end to reach the login node through a shared file system
MOST = 1 << 20  # bytes of one log in one answer
STATES = {
    "RUNNING": "running", "COMPLETING": "running", "RESIZING": "running", "SIGNALING": "running", "STOPPED": "running",
    "STAGE_OUT": "running", "COMPLETED": "done", "CANCELLED": "cancelled", "REVOKED": "cancelled", "FAILED": "failed",
    "TIMEOUT": "failed", "PREEMPTED": "failed", "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
}  # all others are kinds of waiting: PENDING, CONFIGURING, REQUEUED, SUSPENDED, REQUEUE_HOLD and more


class Record(TypedDict, total=False):
    """What is remembered of a Slurm job."""

    host: dict[str, object]  # the fields of the Host that has sbatch
    name: str  # the job's, by which it is found where its number never arrived
    folder: str  # its folder on the cluster
    secrets: bool  # whether secrets.json lies there while the job may still run
    job: str  # Slurm's number, once it is known


# ---------------------------------------------------------------- its state


def job_id(host: Host, run: Run) -> str:
    """Slurm's number of the job; by its name where the launcher was cut off before it knew. Raises Refusal."""
    if not run.record.get("job"):
        name = shlex.quote(run.record["name"])
        script = "squeue -h -n %s -o %%i; sacct -X -n -P --name %s -o JobID" % (name, name)
        found = host.ask(script, "look for the job").split()
        if not found:
            raise Refusal("%s has no job of run %s" % (host, run.id), "it was not submitted; launch it again")
        run.keep(Record(job=found[0]))
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
        raise Refusal("%s: Slurm does not tell the job's state: %s" % (host, last_lines(done.stderr)),
                      "try again later", 5)
    return read_state(done.stdout.decode("utf-8", "replace"), run.starts)


def read_state(text: str, starts: int = 1) -> Status:
    """The Status that scontrol's line tells, or sacct's: State|ExitCode|Timelimit; `starts` is how many it may have."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    if not fields:
        row = [*(text.strip().splitlines() or [""])[-1].split("|"), "", ""]
        fields = {"JobState": row[0].split(" ")[0], "ExitCode": row[1], "TimeLimit": row[2]}
    word = fields["JobState"]
    if not word:
        return Status("failed", GONE, gone=True)
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


def forget(folder: str) -> str:
    """The command that removes a job's secrets."""
    return "rm -f %s/secrets.json" % folder


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
    script = "cd %s && for log in log-*_%s_*.out; do tail -c 900 \"$log\" | sed \"s/^/$log /\"; echo; done" % place
    codes: dict[str, int] = {}
    for found in host.run(script).stdout.decode("utf-8", "replace").split("\n"):
        log, _, line = found.partition(" ")
        note(codes, log.split("_")[-2] if log else "", line)
    return first_failure(codes)


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
            raise Refusal("run %s has no log: it is %s (%s)" % (self.run.id, status.state, status.detail),
                          "python launch.py logs -f %s waits for it" % self.run.id)

    def print_grown(self) -> int:
        """Print what is new; gives how much that is."""
        job = job_id(self.host, self.run)
        known = "\n".join("  %s) from=%d ;;" % (shlex.quote(name), offset) for name, offset in self.offsets.items())
        every = len(self.run.ranks) == self.run.nodes > 1
        logs = " ".join("log-*_%s_%s_*.out" % (job, rank) for rank in ("*" if every else self.run.ranks))
        where = {"folder": self.run.record["folder"], "logs": logs, "known": known, "most": MOST}
        done = self.host.run(GROWN % where)
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
