"""Which of the job's pods this one is, and where rank 0 listens."""

from __future__ import annotations

import re
import socket

from pod.failures import RANK, Failure

# What ray.util.state may list: NVIDIA's pipelines (cosmos-xenna) ask for 40,000 actors, and Ray's own limit is 10,000.
RAY_LIMITS = dict.fromkeys(("RAY_MAX_LIMIT_FROM_API_SERVER", "RAY_MAX_LIMIT_FROM_DATA_SOURCE"), "40000")


def find_rank(env: dict[str, str], hostname: str, nodes: int) -> int:
    """This pod's rank, 0 to nodes-1, counted over all replica types. The variables must agree where they are set; with
    several nodes the hostname's suffix must agree too, unless NODE_RANK or Slurm speaks: machines can be named
    gpu-worker-3. Raises Failure(RANK) where two disagree, or none speaks with several nodes."""
    names = ("NODE_RANK", "LEPTON_JOB_WORKER_INDEX", "PET_NODE_RANK", "RANK", "SLURM_NODEID")
    found = {name: env[name].strip() for name in names if env.get(name, "").strip()}
    if nodes > 1 and "NODE_RANK" not in found and "SLURM_NODEID" not in found:
        suffix = host_rank(hostname, env)
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


def host_rank(hostname: str, env: dict[str, str]) -> str | None:
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
        return env.get("MASTER_ADDR") or "127.0.0.1", port or str(free_port())
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


def free_port() -> int:
    """A TCP port that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
