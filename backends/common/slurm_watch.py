"""Watching a Slurm job: its state by Slurm, the exit codes of its ranks, and their logs as they grow."""

import re
import shlex
import sys
import time
from dataclasses import replace
from typing import TypedDict

import screen
from backends import FINAL, GONE, Status
from backends.common.ends import Ends, code_in
from backends.common.ssh import Host, last_lines
from runs import Run
from transport import Refusal

POLL_S = 2.0  # seconds between two requests
PATIENCE_S = 120.0  # seconds without an answer until following gives up
LATE_S = 10.0  # seconds for the end of a log to reach the login node through a shared file system
MOST = 1 << 20  # bytes of one log in one answer, and of a line that are kept until its end comes
STATES = {
    "RUNNING": "running", "COMPLETING": "running", "RESIZING": "running", "SIGNALING": "running", "STOPPED": "running",
    "STAGE_OUT": "running", "COMPLETED": "done", "CANCELLED": "cancelled", "REVOKED": "cancelled", "FAILED": "failed",
    "TIMEOUT": "failed", "PREEMPTED": "failed", "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
}  # all others are kinds of waiting: PENDING, CONFIGURING, REQUEUED, SUSPENDED, REQUEUE_HOLD and more


class Record(TypedDict, total=False):
    """What is kept of a Slurm job."""

    host: dict[str, object]  # the fields of the Host that has sbatch
    name: str  # of the job, to find it if its id never arrived
    folder: str  # of the job, on the cluster
    secrets: bool  # whether the folder has secrets.json while the job may still run
    continuations: int  # how often the job may be continued at its time limit
    job: str  # Slurm's job id, once it is known


def job_id(host: Host, run: Run) -> str:
    """Slurm's job id, looked up by name if the launcher was cut off before it arrived. Raises Refusal."""
    if not run.record.get("job"):
        name = shlex.quote(run.record["name"])
        script = "squeue -h -n %s -o %%i; sacct -X -n -P --name %s -o JobID 2>/dev/null || :" % (name, name)
        found = host.output(script, "look for the job").split()
        if not found:
            raise Refusal("%s has no job of run %s" % (host, run.id), "it was not submitted; launch it again")
        run.keep(Record(job=found[0]))
    return str(run.record["job"])


# Nothing but Parts is printed where the controller has forgotten the job and accounting does not know it either.
STATE = """\
if ! said=$(scontrol -o show job %(job)s 2>&1); then
  case $said in
  *"Invalid job id"*) said=$(sacct -X -n -P -j %(job)s -o State,ExitCode,Timelimit 2>/dev/null) || said= ;;
  *) printf '%%s\\n' "$said" >&2; exit 1 ;;
  esac
fi
printf '%%s\\n' "$said" "Parts=$(cat %(folder)s/parts 2>/dev/null)"
"""


def ask(host: Host, run: Run) -> Status:
    """The job's state by Slurm. Raises Refusal (exit code 5) if the controller does not answer."""
    done = host.run(STATE % {"job": shlex.quote(job_id(host, run)), "folder": shlex.quote(run.record["folder"])})
    if done.returncode:
        raise Refusal("%s: Slurm does not give the job's state: %s" % (host, last_lines(done.stderr)),
                      "try again later", 5)
    return read_state(done.stdout.decode("utf-8", "replace"), run.starts, run.record.get("continuations", 0))


WHY = {"NODE_FAIL": "a node went down", "OUT_OF_MEMORY": "it needed more than mem",
       "PREEMPTED": "a job of higher priority took its nodes", "BOOT_FAIL": "a node did not start"}


def read_state(text: str, starts: int = 1, continuations: int = 0) -> Status:
    """The Status of scontrol's line, or of sacct's (State|ExitCode|Timelimit), for a job of at most `starts` starts
    besides its continuations."""
    said, _, parts = text.partition("Parts=")
    fields = dict(re.findall(r"(\w+)=(\S*)", said))
    if not fields:
        row = [*(said.strip().splitlines() or [""])[-1].split("|"), "", ""]
        fields = {"JobState": row[0].split(" ")[0], "ExitCode": row[1], "TimeLimit": row[2]}
    word = fields["JobState"]
    if not word:
        return Status("failed", GONE, gone=True)
    state = STATES.get(word, "waiting")
    why = WHY.get(word, "")
    if word == "TIMEOUT":
        why = "it reached its time limit of " + fields.get("TimeLimit", "")
    if fields.get("Reason") == "DependencyNeverSatisfied":
        why = "the stage before it did not succeed"
    elif state == "waiting" and fields.get("Reason", "None") != "None":
        why = fields["Reason"]
    detail = "%s: %s" % (word, why) if why else word
    continued = int(parts) if parts.strip().isdigit() else 0
    again = int(fields.get("Restarts", "0")) - continued
    if continuations:
        detail += ", part %d of at most %d" % (continued + 1, continuations + 1)
    if again > 0:
        detail += ", attempt %d of %d" % (again + 1, starts)
    code = re.match("[0-9]+", fields.get("ExitCode", "")) if word == "FAILED" else None
    return Status(state, detail, 0 if state == "done" else (int(code.group()) or None) if code else None)


def forget(folder: str) -> str:
    """The command that removes a job's secrets."""
    return "rm -f %s/secrets.json" % shlex.quote(folder)


# Each log that has grown: a line "NAME BYTES", then that many bytes. What has been read of each comes on standard
# input, as "NAME BYTES", so that a round costs one pass over the logs, and a process only for those that have grown.
GROWN = """\
cd %(folder)s 2>/dev/null || exit 0
{ cat; wc -c %(logs)s /dev/null 2>/dev/null; } | awk -v most=%(most)d '
  $0 == "" { sizes = 1; next }
  !sizes { read[$1] = $2; next }
  $2 ~ /^log-/ && $1 > read[$2] + 0 { more = $1 - read[$2]; print $2, read[$2] + 0, (more > most ? most : more) }' |
while read -r log from count; do
  echo "$log $count"
  if [ $from -eq 0 ]; then head -c $count "$log"; else tail -c +$((from + 1)) "$log" | head -c $count; fi
done
"""


def rank_of(log: str) -> int:
    """The rank whose log has this name: log-NAME_JOB_RANK_RESTART.out."""
    return int(log.split("_")[-2])


class Watch:
    """Watches one job: its states, and what its logs have grown by."""

    def __init__(self, run: Run) -> None:
        self.run, self.host = run, Host(**run.record["host"])
        self.offsets: dict[str, int] = {}  # bytes read of each log
        self.rests: dict[str, bytes] = {}  # the last line of each, while it is incomplete
        self.ended: set[str] = set()  # logs whose last line says that the rank has ended

    def ask(self) -> Status:
        """The state by Slurm, or, where it has forgotten the job, by what the ranks' logs say last."""
        status = ask(self.host, self.run)
        ends = self.ends() if status.gone else Ends()
        if not ends.codes:
            return status
        code = ends.code()
        said = "Slurm has forgotten it; by its logs, "
        if code is None and len(ends.codes) < self.run.nodes:
            return replace(status, detail=said + "%d of %d ranks ended" % (len(ends.codes), self.run.nodes))
        return Status("failed" if code else "done", said + ("a rank failed" if code else "all ranks ended"), code or 0)

    def status(self) -> Status:
        return self.final(self.ask())

    def final(self, status: Status) -> Status:
        """For a final status, remove the secrets, and find the exit code of the rank that failed first."""
        if status.state in FINAL and self.run.record.get("secrets"):
            self.host.run(forget(self.run.record["folder"]))
        if status.state == "failed" and status.exit_code is not None:
            ends = self.ends()
            return replace(status, exit_code=ends.code() or status.exit_code, why=ends.said())
        return status

    def ends(self) -> Ends:
        """How the ranks ended, by the last lines of their logs."""
        where = shlex.quote(self.run.record["folder"]), shlex.quote(job_id(self.host, self.run))
        script = "cd %s && for log in log-*_%s_*.out; do tail -c 4000 \"$log\" | sed \"s/^/$log /\"; echo; done"
        found = Ends()
        for text in self.host.run(script % where).stdout.decode("utf-8", "replace").split("\n"):
            log, _, line = text.partition(" ")
            if log.endswith(".out"):
                found.note(rank_of(log), line)
        return found

    def to_the_end(self) -> Status:
        """Print states and logs until the job ends for good."""
        last, heard, late = None, time.monotonic(), 0.0
        while True:
            try:
                status = self.ask()
                grown = self.print_grown()
            except Refusal as refusal:
                if refusal.code != 5 or time.monotonic() - heard > PATIENCE_S:
                    raise
                time.sleep(POLL_S)
                continue
            heard = time.monotonic()
            if status.state == "running":
                self.run.running_since = self.run.running_since or time.time()
            if status != last:
                print(screen.status_line(status, self.run), flush=True)
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
        return self.final(status)

    def print_all(self) -> None:
        """Print the logs so far. Raises Refusal if there are none."""
        status = self.ask()
        while self.print_grown() >= MOST:
            pass
        self.print_rests()
        if not self.offsets and not (status.state in FINAL and self.print_batch_log()):
            raise Refusal("run %s has no log: it is %s (%s)" % (self.run.id, status.state, status.detail),
                          "python launch.py logs -f %s waits for it" % self.run.id)

    def print_grown(self) -> int:
        """Print what is new; returns the number of bytes."""
        job = shlex.quote(job_id(self.host, self.run))
        every = len(self.run.ranks) == self.run.nodes > 1
        logs = " ".join("log-*_%s_%s_*.out" % (job, rank) for rank in ("*" if every else map(int, self.run.ranks)))
        known = "".join("%s %d\n" % item for item in self.offsets.items()) + "\n"
        done = self.host.run(GROWN % {"folder": shlex.quote(self.run.record["folder"]), "logs": logs, "most": MOST},
                             data=known.encode())
        data = done.stdout
        while data:
            header, _, data = data.partition(b"\n")
            name, _, size = header.decode().rpartition(" ")
            self.print_part(name, data[: int(size)])
            data = data[int(size):]
        return len(done.stdout)

    def print_part(self, name: str, data: bytes) -> None:
        self.offsets[name] = self.offsets.get(name, 0) + len(data)
        *whole, rest = (self.rests.get(name, b"") + data).split(b"\n")
        for line in whole:
            self.print_line(name, line)
        if len(rest) > MOST:
            self.print_line(name, rest, b"\n" if len(self.run.ranks) > 1 else b"")
            rest = b""
        self.rests[name] = rest
        sys.stdout.flush()

    def print_line(self, name: str, line: bytes, end: bytes = b"\n") -> None:
        if code_in(rank_of(name), line.decode("utf-8", "replace")) is not None:
            self.ended.add(name)
        prefix = screen.rank(rank_of(name)).encode() if len(self.run.ranks) > 1 else b""
        sys.stdout.buffer.write(prefix + line + end)

    def print_rests(self) -> None:
        for name, rest in self.rests.items():
            if rest:
                self.print_line(name, rest)
        sys.stdout.flush()

    def print_batch_log(self) -> bool:
        """Print the end of the batch script's log, for a job whose ranks have no complete log. Whether there is one."""
        script = "tail -n 20 %s/sbatch_*_%s.out" % (
            shlex.quote(self.run.record["folder"]), shlex.quote(self.run.record["job"]))
        log = self.host.run(script).stdout
        sys.stdout.buffer.write(log)
        sys.stdout.flush()
        return bool(log)
