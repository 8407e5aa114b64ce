"""How long a Ray cluster of pods takes to form, and what rank 0 costs afterwards, by the number of nodes.

    python benchmarks/ray_join.py [100 1000 10000]

Rank 0 is the pod's own program (pod/ray_nodes.py). The workers are plain sockets of one other process that speak the
pods' protocol over loopback, and `ray start` is a stub that registers at once: what is measured is ours, not Ray's.
"""

import hashlib
import json
import os
import re
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import transport  # noqa: E402
from pod.peers import keyed  # noqa: E402
from pod.rank import free_port  # noqa: E402

SECRET = hashlib.sha256(b"only for this benchmark").hexdigest()
AFTER_S = 5  # seconds over which rank 0's CPU is counted once the cluster is up
AT_ONCE = 1000  # connections that are being made at the same time


def workers(port: int, nodes: int) -> None:
    """Be all ranks but 0, to rank 0's last word."""
    raise_limit(nodes)
    selector = selectors.DefaultSelector()
    ranks = iter(range(1, nodes))
    ended, unproven = 0, 0
    while ended < nodes - 1:
        while unproven < AT_ONCE and (rank := next(ranks, None)):
            line = socket.create_connection(("127.0.0.1", port), timeout=30)
            selector.register(line, selectors.EVENT_READ, rank)
            unproven += 1
        for key, _ in selector.select():
            line, rank = key.fileobj, key.data
            data = line.recv(4096)  # a line each: they are short, and rank 0 waits for the answer
            if not data:
                sys.exit("rank %d was sent away" % rank)
            message = json.loads(data.split(b"\n")[0])
            if "nonce" in message:
                proof = keyed(SECRET, "worker", rank, message["nonce"], "mine")
                line.sendall(json.dumps({"rank": rank, "nonce": "mine", "proof": proof}).encode() + b"\n")
            unproven -= "proof" in message
            if "ray" in message or b'"ray"' in data:
                line.sendall(b'{"up": true}\n')
            ended += "end" in message


def raise_limit(nodes: int) -> None:
    """As many descriptors as there may be. Ends the program where that is too few."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < nodes + 100:
        sys.exit("%d nodes need as many descriptors in a process, and the hard limit is %d: ulimit -Hn" % (nodes, hard))


def cpu(pid: int) -> float:
    """Seconds of CPU time so far."""
    fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def joined(place: Path, nodes: int) -> tuple[float, float, float, int]:
    """Seconds until the cluster is up; rank 0's CPU seconds until then, and per second afterwards; its KiB."""
    (place / "pod.py").write_bytes(transport.pod_program({"cluster": "pods"}))
    (place / "recipe.sh").write_text("sleep %d" % (AFTER_S + 2))
    (place / "ray").write_text("#!/bin/sh\n")
    (place / "ray").chmod(0o755)
    settings = {"run": "join%d" % nodes, "nodes": nodes, "patience": 300, "secret": SECRET, "rank": 0,
                "script": str(place / "recipe.sh")}
    (place / "ray.json").write_text(json.dumps(settings))
    port = free_port()
    env = {"PATH": "%s:%s" % (place, os.environ["PATH"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "RAY_TMPDIR": str(place)}
    words = [sys.executable, "-I", "-S", str(place / "pod.py"), "ray", str(place / "ray.json")]
    head = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
    others = None
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        began = time.monotonic()
        others = subprocess.Popen([sys.executable, __file__, "--workers", str(port), str(nodes)])
        said = head.stdout.readline()
        took, used = time.monotonic() - began, cpu(head.pid)
        assert "cluster of %d nodes is up" % nodes in said, said
        time.sleep(AFTER_S)
        after = (cpu(head.pid) - used) / AFTER_S
        memory = int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/%d/status" % head.pid).read_text())[0])
        assert (head.wait(60), others.wait(60)) == (0, 0)
        return took, used, after, memory
    finally:
        for process in filter(None, (head, others)):
            if process.poll() is None:
                process.kill()
                process.wait()


def main() -> None:
    if sys.argv[1:2] == ["--workers"]:
        workers(int(sys.argv[2]), int(sys.argv[3]))
        return
    print("%7s  %12s  %18s  %22s  %8s" % ("nodes", "cluster up", "rank 0's CPU then", "and per second after", "memory"))
    for nodes in map(int, sys.argv[1:] or (100, 1000, 10000)):
        raise_limit(nodes)
        with tempfile.TemporaryDirectory(prefix="join-") as place:
            print("%7d  %10.2f s  %16.2f s  %20.4f s  %4d MiB" % (nodes, *(figure := joined(Path(place), nodes))[:3],
                                                                  figure[3] // 1024), flush=True)


if __name__ == "__main__":
    main()
