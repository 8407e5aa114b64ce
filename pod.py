"""The half that runs in the pod: chunks -> verified tree -> recipe. Standard library only, Python 3.8 and later.

It arrives as chunks of the environment (transport.py tells the protocol) and is started by `python3 -c`. In order: find
the rank; join and check the chunks; unpack; write the config; take its own variables out of the environment; then run
setup and recipe in one bash, and stay above it as a small init that forwards TERM and INT, reaps, passes the output
through and returns the recipe's exit code.

Places. The code root, <scratch>/airlift-<run>/code, holds the tree; the run root holds what the recipe writes. In the
config `/nemo_run/code` stands for the first and any other `/nemo_run/...` for the second, by whole path components.

The tree is unpacked into a private folder, compared with its digest on the way, and renamed into place, so that its name
is absent or complete. A tree that is already there (the container was restarted) is compared with what came; anything
else under that name is refused and left as it is.

Each failure of its own has an exit code in FAILURES and one plain sentence. Everything else is the recipe's code.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from typing import IO, Iterator

POD, PAYLOAD, RANK, PLACE, PYTHON, SETUP, TOOL, INTERNAL = 80, 81, 82, 83, 85, 86, 87, 89

FAILURES = {
    POD: ("the program that unpacks did not arrive whole", "the platform changed the job's environment; see its limits"),
    PAYLOAD: ("the payload did not arrive whole", "the platform dropped or changed a chunk of the environment"),
    RANK: ("the pod's rank is not certain", "set NODE_RANK in every pod, or remove what contradicts it"),
    PLACE: ("the pod could not put the files in place", "give the pod disk space, or a writable TMPDIR and workspace"),
    PYTHON: ("the pod's python3 cannot unpack the payload", 'use an image with Python 3.8, or compression = "gz"'),
    SETUP: ("a startup command failed", "mend startup_commands in the profile; its output is above"),
    TOOL: ("the image lacks what the recipe is started with", "use an image that has it, or set run_command"),
    INTERNAL: ("pod.py itself failed", "please report it with the lines above"),
}


class Failure(Exception):
    """A failure of ours: its exit code and what was seen."""

    def __init__(self, code: int, seen: str) -> None:
        super().__init__(seen)
        self.code, self.seen = code, seen


def say(text: str) -> None:
    """One line on standard output, past Python's buffers and the locale. Where nobody can read it, nothing happens."""
    try:
        os.write(1, ("airlift: " + text + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass


# ---------------------------------------------------------------- rank


def find_rank(env: dict[str, str], hostname: str, nodes: int) -> int:
    """This pod's rank, 0 to nodes-1, counted over all replica types.

    NODE_RANK, LEPTON_JOB_WORKER_INDEX, PET_NODE_RANK, RANK and SLURM_NODEID must agree where they are set. With several
    nodes the hostname's suffix must agree too, unless NODE_RANK or Slurm speaks: machines can be named gpu-worker-3.
    Raises Failure(RANK) where two disagree, or none speaks with several nodes.
    """
    names = ("NODE_RANK", "LEPTON_JOB_WORKER_INDEX", "PET_NODE_RANK", "RANK", "SLURM_NODEID")
    found = {name: env[name].strip() for name in names if env.get(name, "").strip()}
    if nodes > 1 and "NODE_RANK" not in found and "SLURM_NODEID" not in found:
        suffix = _host_rank(hostname, env)
        if suffix is not None:
            found["hostname " + hostname] = suffix
    if not found:
        if nodes == 1:
            return 0
        raise Failure(RANK, "no variable of this platform and no hostname tells which of %d pods this is" % nodes)
    for name, value in found.items():
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise Failure(RANK, "%s is %r, not a number" % (name, value))
    if len({int(value) for value in found.values()}) > 1:
        raise Failure(RANK, "sources disagree: " + ", ".join("%s says %s" % pair for pair in sorted(found.items())))
    rank = int(next(iter(found.values())))
    if rank >= nodes:
        raise Failure(RANK, "%s says rank %d, but the job has %d" % (next(iter(found)), rank, nodes))
    return rank


def _host_rank(hostname: str, env: dict[str, str]) -> str | None:
    """Kubeflow's hostnames: <job>-master-0 is rank 0, and <job>-worker-N is N, or N+1 where there is a master."""
    match = re.search(r"-(master|worker)-([0-9]+)$", hostname.split(".")[0])
    if not match:
        return None
    master = "-master-0" in env.get("MASTER_ADDR", "") + env.get("PET_MASTER_ADDR", "")
    return str(int(match.group(2)) + (1 if master and match.group(1) == "worker" else 0))


def find_master(env: dict[str, str], nodes: int) -> tuple[str, str]:
    """(address, port) where rank 0 listens. Raises Failure(RANK) if there are several nodes and nothing tells it."""
    port = env.get("MASTER_PORT") or env.get("PET_MASTER_PORT")
    if nodes == 1:
        return env.get("MASTER_ADDR") or "127.0.0.1", port or str(_free_port())
    port = port or "29400"
    for name in ("MASTER_ADDR", "PET_MASTER_ADDR"):
        if env.get(name):
            return env[name], port
    if env.get("LEPTON_JOB_WORKER_PREFIX") and env.get("LEPTON_SUBDOMAIN"):
        return "%s-0.%s" % (env["LEPTON_JOB_WORKER_PREFIX"], env["LEPTON_SUBDOMAIN"]), port
    if env.get("SLURM_JOB_NODELIST"):
        # Two jobs may share a node, so the port comes from the job's id.
        job = env.get("SLURM_JOB_ID", "")
        job_port = str(20000 + int(job) % 10000) if re.fullmatch(r"[0-9]{1,18}", job) else port
        return first_host(env["SLURM_JOB_NODELIST"]), env.get("MASTER_PORT") or job_port
    raise Failure(RANK, "nothing tells where rank 0 is: set MASTER_ADDR")


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "dgx[007-009,012],login" -> "dgx007", "r[1-2]n[3,5]" -> "r1n3"."""
    first = re.sub(r"\[([0-9]+)[-,0-9]*\]", r"\1", nodelist).split(",")[0].strip()
    if not re.fullmatch(r"[\w.-]+", first):
        raise Failure(RANK, "SLURM_JOB_NODELIST is %r" % nodelist)
    return first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- payload


def join(env: dict[str, str], stream: str) -> bytes:
    """The bytes of one stream. Raises Failure(PAYLOAD), for pod.py's own POD, unless exactly the chunks that were sent
    are there."""
    lost = POD if stream == "POD" else PAYLOAD
    prefix = "AIRLIFT_" + stream + "_"
    count = env.get(prefix + "CHUNKS", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", count):
        raise Failure(lost, "%sCHUNKS is %r" % (prefix, count[:40]))
    expected = {"%s%04d" % (prefix, i) for i in range(int(count))}
    present = {name for name in env if re.match(re.escape(prefix) + "[0-9]+$", name)}
    if present != expected:
        odd = sorted(present ^ expected)
        raise Failure(lost, "of %s chunks of %s, %s is %s"
                      % (count, stream, odd[0], "missing" if odd[0] in expected else "one too many"))
    text = "".join(env[name] for name in sorted(expected))
    if hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() != env.get(prefix + "SHA256"):
        raise Failure(lost, "the chunks of %s do not have the digest that was sent" % stream)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Failure(lost, "the chunks of %s are not base64: %s" % (stream, error)) from None


def read_job(env: dict[str, str]) -> dict:
    try:
        return json.loads(zlib.decompress(join(env, "JOB")))
    except (ValueError, zlib.error) as error:
        raise Failure(PAYLOAD, "the job's description cannot be read: %s" % error) from None


def decompress(data: bytes, method: str) -> bytes:
    """The tar of a tree. Raises Failure(PYTHON) if this Python was built without the method."""
    try:
        if method == "xz":
            import lzma

            return lzma.decompress(data)
        import gzip

        return gzip.decompress(data)
    except ImportError as error:
        raise Failure(PYTHON, "this Python has no %s: %s" % (method, error)) from None
    except Exception as error:  # the digest was right, so it is this Python's; lzma, gzip and zlib have errors of their own
        raise Failure(PYTHON, "this Python cannot unpack %s: %s" % (method, error)) from None


def unpack(tar: bytes, target: str) -> None:
    """Put the tar's tree at `target`, whole or not at all. Raises Failure(PLACE), with a foreign `target` left alone."""
    if os.path.lexists(target):
        if not holds(target, tar):
            raise Failure(PLACE, "%s is there already and does not hold this payload" % target)
        return
    private = tempfile.mkdtemp(prefix="code.", dir=os.path.dirname(target))
    try:
        extract(tar, private)
        os.chmod(private, 0o755)
        try:
            os.rename(private, target)
        except OSError:
            if not holds(target, tar):  # another pod with the same scratch space was faster
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def members(tar: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """(TarInfo, bytes) of each file and link. Raises Failure(PAYLOAD) for anything else, or a path that leads out."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive:
            parts = info.name.split("/")
            if info.name.startswith("/") or ".." in parts or not (info.isfile() or info.issym()):
                raise Failure(PAYLOAD, "the tar holds %r, which does not belong there" % info.name)
            file = archive.extractfile(info) if info.isfile() else None
            yield info, file.read() if file else info.linkname.encode()


def extract(tar: bytes, folder: str) -> None:
    for info, data in members(tar):
        path = os.path.join(folder, os.fsdecode(info.name.encode()))  # UTF-8, whatever the image's locale
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if info.issym():
            os.symlink(os.fsdecode(data), path)
            continue
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, info.mode & 0o777)


def holds(folder: str, tar: bytes) -> bool:
    """Whether every file and link of the tar stands in the folder, byte for byte."""
    for info, data in members(tar):
        path = os.path.join(folder, os.fsdecode(info.name.encode()))
        try:
            if info.issym():
                same = os.fsencode(os.readlink(path)) == data
            elif not stat.S_ISREG(os.lstat(path).st_mode):  # a FIFO would hold us for ever
                same = False
            else:
                with open(path, "rb") as file:
                    same = file.read(len(data) + 1) == data
        except OSError:
            return False
        if not same:
            return False
    return True


# ---------------------------------------------------------------- places


class Places:
    """Where things are in this pod. All are absolute paths."""

    def __init__(self, job: dict, env: dict[str, str]) -> None:
        self.base = os.path.join(os.path.abspath(env.get("TMPDIR") or "/tmp"), "airlift-" + job["run"])
        self.code = os.path.join(self.base, "code")
        self.config = os.path.join(self.base, "config.yaml")
        self.run_root = job.get("run_root") or os.path.join(self.base, "output")
        self.keeps = bool(job.get("run_root"))
        self.logs = os.path.join(self.run_root, "runs", job["run"])

    def make(self, folders: list[str]) -> None:
        """Make the folders; `base` only for this user, since the config lies in it."""
        os.makedirs(self.base, mode=0o700, exist_ok=True)
        for folder in [self.run_root] + ([self.logs] if self.keeps else []) + [self.fill(folder) for folder in folders]:
            os.makedirs(folder, exist_ok=True)

    def fill(self, text: str, quote: bool = False) -> str:
        """`text` with /nemo_run/code and /nemo_run replaced, by whole path components; `quote` escapes for "..."."""

        def place(match: re.Match) -> str:
            path = self.code if match.group(1) else self.run_root
            return quoted(path) if quote else path

        return re.sub(r"(?<![\w./})\]~-])/nemo_run(/code)?(?![\w.-])", place, text)

    def write_config(self, text: str) -> None:
        descriptor, private = tempfile.mkstemp(dir=self.base)  # 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.fill(text, quote=True))
        os.rename(private, self.config)


def quoted(text: str) -> str:
    """`text` as it stands between the double quotes of YAML: as in JSON, but YAML reads no surrogate pairs, and takes some
    characters only in escapes."""
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: "\\u%04x" % ord(match.group()),
                  json.dumps(text, ensure_ascii=False)[1:-1])


# ---------------------------------------------------------------- run


def recipe_env(env: dict[str, str], job: dict, places: Places, rank: int) -> dict[str, str]:
    """The recipe's environment: the pod's without what is ours, then the user's, then rank and places."""
    result = {name: value for name, value in env.items() if not name.startswith("AIRLIFT_")}
    if job["launch"] == "torchrun":  # a platform's PET_RDZV_BACKEND would overrule torchrun's arguments
        result = {name: value for name, value in result.items() if not name.startswith("PET_")}
    result.setdefault("PYTHONUNBUFFERED", "1")
    result.update({name: places.fill(value) for name, value in job["env"].items()})
    address, port = find_master(dict(env, **result), job["nodes"])
    paths = [os.path.join(places.code, "src")] + [p for p in result.get("PYTHONPATH", "").split(":") if p]
    result.update({
        "PYTHONPATH": ":".join(paths), "NODE_RANK": str(rank), "NNODES": str(job["nodes"]),
        "MASTER_ADDR": address, "MASTER_PORT": port, "NEMO_RUN_DIR": places.run_root,
        "AIRLIFT_RUN": job["run"], "AIRLIFT_CODE": places.code, "AIRLIFT_CONFIG": places.config,
    })
    return result


def script_for(job: dict, workdir: str, ready: int) -> str:
    """The one bash script: startup commands, then the recipe. Between them a byte goes to the descriptor `ready`, which
    tells whose exit code it is.

    The trap makes bash wait for the recipe to end by itself when TERM arrives, so that its own code comes back.
    """
    lines = ["trap : TERM INT", "cd -- %s || exit %d" % (shlex.quote(workdir), TOOL)]
    for number, command in enumerate(job["setup"], 1):
        lines.append("eval %s || { echo 'airlift: startup command %d failed with exit code '$? >&2; exit %d; }"
                     % (shlex.quote(command), number, SETUP))
    if job.get("tool"):
        tool = shlex.quote(job["tool"])
        lines.append("command -v %s >/dev/null || { echo 'airlift: there is no '%s' in this image' >&2; exit %d; }"
                     % (tool, tool, TOOL))
    return "\n".join(lines + ["echo >&%d; exec %d>&-" % (ready, ready), job["command"]]) + "\n"


class Child:
    """The bash that runs the recipe, in a process group of its own, and the signals for it."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.signal = 0  # the last one that came
        for number in self.SIGNALS:
            signal.signal(number, self.forward)

    def forward(self, number: int, _frame: object) -> None:
        self.signal = number
        if self.process is None:
            say("ended by signal %d before the recipe was started" % number)
            raise SystemExit(128 + number)
        try:
            os.killpg(self.process.pid, number)
        except OSError:  # it has ended, or now belongs to another user
            pass

    def run(self, script: str, env: dict[str, str], log: str | None, ready: int) -> int:
        """Run bash to its end; its output also goes to the file `log`. Returns its code, 128+N if signal N ended it."""
        become_subreaper()
        # A signal that came while bash is being started would find nobody to go to: it waits until there is.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            self.process = subprocess.Popen(
                ["bash", "-c", script], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if log else None,
                stderr=subprocess.STDOUT if log else None, start_new_session=True, pass_fds=(ready,),
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS))
        except FileNotFoundError:
            raise Failure(TOOL, "there is no bash in this image") from None
        except OSError as error:
            raise Failure(TOOL, "bash cannot be started: %s" % error.strerror) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
            os.close(ready)
        pump = None
        try:
            if log and self.process.stdout:
                pump = threading.Thread(target=copy_output, args=(self.process.stdout, log), daemon=True)
                pump.start()
            return reap(self.process.pid)
        finally:
            end_the_rest()
            if pump:
                pump.join(5)  # a daemon that escaped may hold the pipe open for ever


def copy_output(pipe: IO[bytes], log: str) -> None:
    """Pass bytes on as they come. A log that cannot be written (full disk) is said once; the recipe goes on. It also goes
    on when nobody reads our output any more: the pipe must be emptied, or the recipe would stand still."""
    try:
        file = open(log, "ab", buffering=0)
    except OSError as error:
        say("the log %s cannot be kept: %s" % (log, error.strerror))
        file = None
    while True:
        data = os.read(pipe.fileno(), 65536)
        if not data:
            return
        try:
            if file:
                file.write(data)
        except OSError as error:
            say("the log %s ends here: %s" % (log, error.strerror))
            file = None
        try:
            while data:
                data = data[os.write(1, data):]
        except OSError:
            pass


def become_subreaper() -> None:
    """Have orphans handed to us, as to process 1. Only Linux can, and only with ctypes; without it they go to init."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    except (ImportError, OSError, AttributeError):
        pass


def reap(pid: int) -> int:
    """Wait for `pid`, and meanwhile for every orphan, as process 1 must."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def end_the_rest(grace: float = 5.0) -> None:
    """End what the recipe left running: TERM, then KILL after `grace` seconds, until no child is left. What even KILL
    does not end (a file system that hangs) is left after twice the time."""
    deadline = time.monotonic() + grace
    told: set[int] = set()
    while time.monotonic() < deadline + grace:
        late = time.monotonic() > deadline
        for pid in _children():
            if late or pid not in told:
                told.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                except OSError:  # it has ended, or belongs to another user
                    pass
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Our children, orphans included, by each process's own word: not every kernel has /proc/<pid>/task/*/children."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            with open("/proc/%d/stat" % int(name), "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
        except (ValueError, OSError):  # not a process, or no longer
            continue
    return found


# ---------------------------------------------------------------- main


def main() -> int:
    child = Child()
    env = dict(os.environ)
    rank_text = "?"
    try:
        if sys.version_info < (3, 8):
            raise Failure(PYTHON, "python3 is %d.%d; 3.8 is the oldest that works" % sys.version_info[:2])
        join(env, "POD")  # what runs here is whole; its number of chunks and their names are to be right as well
        if not re.fullmatch(r"[1-9][0-9]{0,5}", env.get("AIRLIFT_NODES", "")):
            raise Failure(PAYLOAD, "AIRLIFT_NODES is %r" % env.get("AIRLIFT_NODES", "")[:40])
        rank = find_rank(env, socket.gethostname(), int(env["AIRLIFT_NODES"]))
        rank_text = str(rank)
        job = read_job(env)
        tar = decompress(join(env, "TREE"), job["tree"]["compression"])
        digest = hashlib.sha256(tar).hexdigest()
        if digest != job["tree"]["sha256"]:
            raise Failure(PAYLOAD, "the tree's digest is %s, not %s" % (digest, job["tree"]["sha256"]))
        places = Places(job, env)
        put(tar, job, places)
        say("rank %d of %d, sha256 %s, %d files in %s" % (rank, job["nodes"], digest, job["tree"]["files"], places.code))
        code = start(child, env, job, places, rank)
    except Failure as failure:
        what, fix = FAILURES[failure.code]
        say("rank %s: %s: %s" % (rank_text, what, failure.seen))
        say("what to do: " + fix)
        code = failure.code
    say("rank %s ended with exit code %d" % (rank_text, code))  # the launcher looks for this line in the logs
    return code


def put(tar: bytes, job: dict, places: Places) -> None:
    """Tree and config in place. Raises Failure(PLACE)."""
    try:
        places.make(job.get("folders", []))
        unpack(tar, places.code)
        places.write_config(job["config"])
    except OSError as error:
        full = " (the disk is full)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise Failure(PLACE, "%s: %s%s" % (error.filename or places.base, error.strerror, full)) from None
    except UnicodeEncodeError:
        raise Failure(PLACE, "%s is not UTF-8, so no config can name it" % places.base) from None


def start(child: Child, env: dict[str, str], job: dict, places: Places, rank: int) -> int:
    """Run the recipe to its end and return its code; with a workspace, keep log and code under the run's folder."""
    workdir = os.path.join(places.code, places.fill(job["workdir"])) if job.get("workdir") else places.code
    if not os.path.isdir(workdir):
        raise Failure(TOOL, "there is no folder %s, where the recipe is to be started" % workdir)
    for name in [name for name in os.environ if name.startswith("AIRLIFT_")]:
        del os.environ[name]
    log = os.path.join(places.logs, "rank-%d.log" % rank) if places.keeps else None
    keep_code(log, None)
    begun, low = os.pipe()
    ready = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100)  # startup commands may use the low numbers for their own
    os.close(low)
    code = child.run(script_for(job, workdir, ready), recipe_env(env, job, places, rank), log, ready)
    ran = bool(select.select([begun], [], [], 0)[0] and os.read(begun, 1))
    if not ran:
        code = 128 + child.signal if child.signal else TOOL if code == TOOL else SETUP
    keep_code(log, code)
    if not ran and not child.signal:
        raise Failure(code, "see the lines above")
    return code


def keep_code(log: str | None, code: int | None) -> None:
    """Write the exit code beside the log, if there is one; None: remove that of an earlier start of this pod."""
    if not log:
        return
    path = log[:-len("log")] + "exit"
    try:
        if code is not None:
            with open(path, "w") as file:
                file.write("%d\n" % code)
        elif os.path.exists(path):
            os.unlink(path)
    except OSError as error:
        say("the exit code cannot be kept in %s: %s" % (path, error.strerror))


if __name__ == "__main__":
    try:
        ended = main()
    except (Exception, KeyboardInterrupt):
        import traceback

        traceback.print_exc()
        say("exit %d: %s" % (INTERNAL, FAILURES[INTERNAL][0]))
        ended = INTERNAL
    os._exit(ended)  # not sys.exit: a thread that still waits for output must not hold the pod
