"""Process 1 of the cluster's namespaces: it starts the daemons, says "ready" and reaps until it is ended.

Everything lies at its usual place (/etc/slurm, /run/munge, ports), since network, mounts and processes are its own:
nothing that it changes is seen outside, and its end is the end of all of it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
USER, UID = "airlift", 4321
PATIENCE = 60.0  # seconds for a daemon to be ready


def main(root: Path, repository: str, keep: list[str], images: list[str]) -> None:
    network()
    files(root, keep, images)
    open_up(root, [repository, *keep])
    etc(root)
    daemons(root)
    accounts()
    wait("two idle nodes", lambda: output("sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D").strip() == "2")
    print("ready", flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


def network() -> None:
    """Loopback only. getaddrinfo wants one more address than 127.0.0.1, or slurmctld finds no host at all."""
    call("ip", "link", "set", "lo", "up")
    call("ip", "addr", "add", "192.0.2.9/32", "dev", "lo")


def files(root: Path, keep: list[str], images: list[str]) -> None:
    """The cluster's own files, made from the templates beside this one."""
    for folder in ("log", "state", "n1", "n2", "etc", "gpu", "new", "db", "shared", "home/.ssh"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for template in ("slurm.conf", "slurmdbd.conf", "gres.conf", "sshd_config"):
        place = root / ("sshd_config" if template == "sshd_config" else "etc/" + template)
        place.write_text((HERE / template).read_text().replace("@ROOT@", str(root)))
    (root / "etc/slurmdbd.conf").chmod(0o600)
    words = ["new=%s/new" % root, *("image=" + name for name in images), *("keep=" + path for path in keep)]
    (root / "etc/plugstack.conf").write_text("required %s/container.so %s\n" % (root, " ".join(words)))
    call("gcc", "-shared", "-fPIC", "-O1", "-o", str(root / "container.so"), str(HERE / "container.c"))
    for number in range(8):
        os.mknod(root / "gpu" / str(number), 0o020666, os.makedev(1, 3))  # each is /dev/null by another name
    if not (root / "hostkey").exists():
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / "hostkey"))
    for owned in (root / "shared", root / "home", root / "home/.ssh"):
        os.chown(owned, UID, UID)


def open_up(root: Path, wanted: list[str]) -> None:
    """Let the cluster's user reach this Python and this repository, also where they lie in a closed folder like /root:
    that folder is covered by an empty one, in which only what is wanted is shown again."""
    closed = {}
    for path in wanted:
        parents = [str(parent) for parent in Path(path).parents]
        shut = [parent for parent in parents if not os.stat(parent).st_mode & 0o001]
        if shut:
            closed.setdefault(min(shut, key=len), []).append(path)
    for number, (folder, paths) in enumerate(sorted(closed.items())):
        stash = root / "stash" / str(number)
        for index, path in enumerate(paths):
            bind(path, stash / str(index))
        call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
        for index, path in enumerate(paths):
            bind(str(stash / str(index)), Path(path))


def etc(root: Path) -> None:
    """A user, names for the nodes, and a /run of our own."""
    for name, line in (("passwd", "%s:x:%d:%d::%s/home:/bin/bash" % (USER, UID, UID, root)),
                       ("group", "%s:x:%d:" % (USER, UID)), ("shadow", "%s:*:19000:0:99999:7:::" % USER),
                       ("hosts", "127.0.0.1 n1 n2 login %s" % socket.gethostname())):
        text = Path("/etc", name).read_text()
        if name == "passwd":  # ssh looks for its files in the home that stands there: root is the person at the laptop
            text = "".join("root:x:0:0::%s/laptop:/bin/bash\n" % root if entry.startswith("root:") else entry + "\n"
                           for entry in text.splitlines())
        place = root / ("etc." + name)
        place.write_text(text.rstrip("\n") + "\n" + line + "\n")
        place.chmod(0o640 if name == "shadow" else 0o644)
        call("mount", "--bind", str(place), "/etc/" + name)
    bind(str(root / "etc"), Path("/etc/slurm"))
    call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for name, owner in (("munge", "munge"), ("mysqld", "mysql"), ("sshd", "root")):
        Path("/run", name).mkdir()
        shutil.chown(Path("/run", name), owner, owner)
        Path("/run", name).chmod(0o755)


def daemons(root: Path) -> None:
    """Start them all, in the order in which they need each other."""
    shutil.copy("/etc/munge/munge.key", root / "munge.key")
    shutil.chown(root / "munge.key", "munge", "munge")
    start(root, "munged", ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground",
                           "--force", "--key-file=%s/munge.key" % root, "--log-file=/run/munge/log",
                           "--seed-file=/run/munge/seed"])
    if not (root / "db/mysql").exists():
        shutil.chown(root / "db", "mysql", "mysql")
        call("mariadb-install-db", "--no-defaults", "--user=mysql", "--datadir=%s/db" % root, "--skip-test-db")
    start(root, "mariadbd", ["mariadbd", "--no-defaults", "--user=mysql", "--datadir=%s/db" % root, "--skip-networking",
                             "--socket=/run/mysqld/mysqld.sock", "--innodb-buffer-pool-size=64M",
                             "--innodb-flush-log-at-trx-commit=0"])
    wait("mariadbd", lambda: not failed("mariadb", "-e", "select 1"))
    call("mariadb", "-e", "create database if not exists slurm; create user if not exists slurm@localhost;"
         " grant all on slurm.* to slurm@localhost")
    start(root, "slurmdbd", ["slurmdbd", "-D"])
    wait("slurmdbd", lambda: not failed("sacctmgr", "-n", "show", "cluster"))
    failed("sacctmgr", "-i", "add", "cluster", "airlift")
    start(root, "slurmctld", ["slurmctld", "-D"])
    for node in ("n1", "n2"):
        start(root, node, ["slurmd", "-D", "-N", node])
    start(root, "sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", "%s/sshd_config" % root])


def accounts() -> None:
    """Jobs are taken for account "team" only."""
    wait("slurmctld", lambda: not failed("scontrol", "ping"))
    call("sacctmgr", "-i", "add", "account", "team", "cluster=airlift")
    call("sacctmgr", "-i", "add", "user", USER, "account=team", "cluster=airlift")


# ---------------------------------------------------------------- small tools


def start(root: Path, name: str, command: list[str]) -> None:
    with open(root / "log" / (name + ".out"), "ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("%s: %s" % (" ".join(command), done.stderr or done.stdout))


def failed(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode != 0


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def bind(source: str, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    call("mount", "--rbind", source, str(place))


def wait(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit("the cluster did not come up: waited %d s for %s" % (PATIENCE, what))
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split("\n"), sys.argv[4].split("\n"))
