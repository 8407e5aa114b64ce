"""What other hosts, other users of a machine and the recipe itself may not do to a pod: each test is an attack."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import resource
import shutil
import socket
import stat
import sys
import tarfile
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from layout import flat_folder, recipe
from support import (
    ENDED,
    NOBODY,
    PATH,
    SCRIPT,
    SECRET,
    Pod,
    as_nobody,
    failed,
    job,
    need,
    plan,
    plant,
    ran,
    started,
    tree,
)

import transport
from pod import failures, payload
from pod.rank import free_port


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """A folder that other users reach, too."""
    need(os.geteuid() == 0, "needs another user to be")
    for folder in [tmp_path, *tmp_path.parents]:
        if not os.stat(folder).st_mode & 0o001:
            os.chmod(folder, 0o711)
    return tmp_path


# ---------------------------------------------------------------- peers

RAY = """#!/bin/sh
echo "$NODE_RANK $RAY_AUTH_TOKEN $*" >>%s
"""


def stub(place: Path, script: str = RAY) -> Path:
    """A folder with a `ray` that notes how it was started."""
    plant(place, {"bin/ray": script.replace("%s", str(place / "noted"))})
    (place / "bin/ray").chmod(0o755)
    return place / "bin"


@contextlib.contextmanager
def cluster(place: Path, ranks: list[int], nodes: int, port: int, **changes: Any) -> Iterator[list[Pod]]:
    env = {"MASTER_ADDR": "127.0.0.1", "PATH": "%s:%s" % (stub(place), PATH)} | changes.pop("environ", {})
    job = {"run": "s%05d" % (os.getpid() % 100_000), "command": "exit 5", "patience": 20} | changes
    whole = plan(launch="ray", nodes=nodes, cluster="pods", **job)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(whole, place / str(rank), env=env | {
            "MASTER_PORT": str(port), "NODE_RANK": str(rank)})) for rank in ranks]
    assert not os.path.exists("/tmp/airlift-%s-ray" % job["run"])


def connected(port: int, host: str = "127.0.0.1") -> socket.socket:
    deadline = time.monotonic() + 15
    while True:
        try:
            return socket.create_connection((host, port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def said_to(connection: socket.socket, seconds: float) -> bytes:
    """All that comes within some time."""
    data, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            more = connection.recv(65536)
            if not more:
                break
            data += more
    return data


def proof(connection: socket.socket, rank: int, secret: str = SECRET) -> dict[str, Any]:
    """What a worker says that knows the secret."""
    from pod.peers import keyed

    nonce = json.loads(connection.makefile().readline())["nonce"]
    return {"rank": rank, "nonce": "mine", "proof": keyed(secret, "worker", rank, nonce, "mine")}


def send(connection: socket.socket, message: Any) -> socket.socket:
    connection.sendall(json.dumps(message).encode() + b"\n")
    return connection


def test_who_knows_only_the_run_is_no_pod_and_is_told_nothing(tmp_path: Path) -> None:
    """It would be given Ray's token, and then it can run code on every node."""
    port = free_port()
    with cluster(tmp_path, [0], 2, port, patience=6) as (head,):
        stranger = connected(port)
        send(stranger, {"run": "s%05d" % (os.getpid() % 100_000), "rank": 1, "at": "127.0.0.1"})
        told = said_to(stranger, 3)
        assert b"TOKEN" not in told and b"join" not in told, told
        wrong = connected(port)
        send(wrong, proof(wrong, 1, "0" * 64))
        assert said_to(wrong, 3) == b""
        assert head.end() == failures.RAY
    assert "rank 1 did not come within" in head.text and not (tmp_path / "noted").exists()


@pytest.mark.parametrize("first", [{}, {"nonce": "x"}], ids=str)
def test_who_answers_in_place_of_rank_0_runs_nothing(tmp_path: Path, first: dict[str, str]) -> None:
    evil = stub(tmp_path / "evil", "#!/bin/sh\ntouch %s\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one = server.accept()[0]
                    for message in (first, {"proof": "0" * 64}, {"join": "127.0.0.1:1", "env": {"PATH": str(evil)}},
                                    {"ray": 1, "master": 2}):
                        send(one, message)

        threading.Thread(target=answer, daemon=True).start()
        with cluster(tmp_path, [1], 2, server.getsockname()[1], patience=3) as (worker,):
            assert worker.end() == failures.RAY
    assert not (tmp_path / "evil/noted").exists() and not (tmp_path / "noted").exists()
    assert "does not prove that it is rank 0 of this job" in worker.text


@pytest.mark.parametrize("message", [
    {"ray": 0, "master": 1}, {"ray": 70000, "master": 1}, {"ray": "1", "master": 2}, {"ray": True, "master": 2}, {"ray": 5},
    {"end": -1}, {"end": 256}, {"end": "0"}, {"env": {"PATH": "/evil"}}, {"join": "x:1", "env": {}}, {},
], ids=str)
def test_of_what_rank_0_says_only_known_fields_are_taken(tmp_path: Path, message: dict[str, Any]) -> None:
    from pod.peers import keyed

    with socket.create_server(("127.0.0.1", 0)) as server, cluster(
            tmp_path, [1], 2, server.getsockname()[1], patience=9) as (worker,):
        one = send(server.accept()[0], {"nonce": "n"})
        told = json.loads(one.makefile().readline())
        send(one, {"proof": keyed(SECRET, "head", 1, "n", told["nonce"])})
        send(one, message)
        assert worker.end() == failures.RAY
    assert "rank 0 says what has no meaning" in worker.text and not (tmp_path / "noted").exists()


def test_a_rank_that_is_held_stays_held_until_its_pod_is_gone(tmp_path: Path) -> None:
    port = free_port()
    with cluster(tmp_path, [0], 3, port) as (head,):
        first = connected(port)
        send(first, proof(first, 1))
        assert b"proof" in said_to(first, 0.5)
        second = connected(port)
        send(second, proof(second, 1))
        assert said_to(second, 3) == b"", "it is closed without a proof"
        first.close()
        again = connected(port)
        send(again, proof(again, 1))
        assert b"proof" in said_to(again, 0.5), "a pod that was started again"
        other = connected(port)
        send(other, proof(other, 2))
        told = said_to(again, 5)
        assert re.fullmatch(rb'\{"ray": \d+, "master": \d+\}\n', told), told
        for line in (again, other):
            send(line, {"up": True})
        assert head.end() == 5 and said_to(again, 2) == b'{"end": 5}\n'


def test_rays_token_is_never_sent_and_the_users_own_wins(tmp_path: Path) -> None:
    from pod.peers import keyed

    for own in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-users"}):
        port, place = free_port(), tmp_path / str(len(own))
        with cluster(place, [0, 1], 2, port, env=own) as pods:
            assert [pod.end() for pod in pods] == [5, 5], pods[0].text + pods[1].text
        tokens = {line.split()[1] for line in (place / "noted").read_text().splitlines()}
        assert tokens == {own.get("RAY_AUTH_TOKEN") or keyed(SECRET, "ray")}


def size(pod: Pod) -> int:
    """KiB of memory of all that belongs to a pod."""
    found = 0
    for pid in [pod.process.pid, *pod.alive()]:
        with contextlib.suppress(OSError):
            found += int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/%d/status" % pid).read_text())[0])
    return found


def test_who_sends_for_ever_costs_nothing(tmp_path: Path) -> None:
    port = free_port()
    with cluster(tmp_path, [0], 2, port) as (head,):
        connected(port).close()
        before, sent = size(head), 0
        for words in (b"{}\n" * 20000, b"x" * 60000, b"[" * 60000, b'{"rank": 1, "nonce": "' + b"y" * 60000):
            talker, deadline = connected(port), time.monotonic() + 1
            with contextlib.suppress(OSError):
                while time.monotonic() < deadline:
                    sent += talker.send(words)
        assert size(head) - before < 8000, sent
        member = connected(port)
        send(member, proof(member, 1))
        assert b"ray" in said_to(member, 3)
        with contextlib.suppress(OSError):
            while True:  # also one that has proven itself
                member.sendall(b"{}\n" * 20000)
        assert head.end() == failures.RAY and size(head) - before < 8000
    assert "rank 1 could not join: None" in head.text


def test_silent_connections_do_not_end_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port = free_port()
    try:
        with cluster(tmp_path, [0], 2, port) as (head,), contextlib.ExitStack() as held:
            for _ in range(2100):
                held.enter_context(connected(port))
            before = ticks(head)
            time.sleep(1)
            assert ticks(head) - before < 30, "it waits for none of them"
            with cluster(tmp_path / "other", [1], 2, port) as (worker,):
                assert (head.end(), worker.end()) == (5, 5), head.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ticks(pod: Pod) -> int:
    """CPU time of a pod's processes, in hundredths of a second."""
    return sum(sum(map(int, Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[11:13]))
               for pid in [pod.process.pid, *pod.alive()])


def test_rank_0_listens_only_where_its_pods_are(tmp_path: Path) -> None:
    port = free_port()
    with cluster(tmp_path, [0], 2, port, patience=3, environ={"MASTER_ADDR": "localhost"}) as (head,):
        connected(port).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        assert head.end() == failures.RAY


# ---------------------------------------------------------------- what other users have prepared

PREPARED = ["foreign", "open", "link"]


def prepare(folder: Path, how: str) -> None:
    """What another user leaves where a pod will come by."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        folder.symlink_to(tempfile.mkdtemp(dir=folder.parent))
    else:
        folder.mkdir()
        folder.chmod(0o777 if how == "open" else 0o755)
        os.chown(folder, *((0, 0) if how == "open" else (NOBODY, NOBODY)))


@pytest.mark.parametrize("how", PREPARED)
def test_a_prepared_base_is_not_used(open_path: Path, how: str) -> None:
    base = open_path / "scratch" / ("airlift-%d" % os.geteuid())
    prepare(base, how)
    code, out = ran(plan(command="echo RECIPE RAN"), open_path / "scratch")
    assert code == failures.PLACE and failed(code, out).startswith(str(base)), out.text
    assert os.listdir(base) == []


@pytest.mark.parametrize("how", PREPARED)
def test_a_prepared_folder_for_ray_is_not_used(open_path: Path, how: str) -> None:
    """Ray's sockets, logs and temporary code lie in it."""
    place, run = open_path / "ray-tmp", "p%05d" % (os.getpid() % 100_000)
    prepare(place / ("airlift-%s-ray" % run), how)
    with cluster(open_path, [0, 1], 2, free_port(), run=run, env={"RAY_TMPDIR": str(place)}) as pods:
        assert failures.PLACE in [pod.end() for pod in pods], pods[0].text + pods[1].text
    assert "airlift-%s-ray" % run in pods[0].text + pods[1].text and not (open_path / "noted").exists()


def test_rays_folder_is_private_and_short(tmp_path: Path) -> None:
    with cluster(tmp_path, [0, 1], 2, free_port(), run="q%05d" % (os.getpid() % 100_000), command="exit 5") as pods:
        assert [pod.end() for pod in pods] == [5, 5]
    folders = set(re.findall(r"--temp-dir (\S+)", (tmp_path / "noted").read_text()))
    assert len(folders) == 1 and all(len(folder) < 35 for folder in folders)
    script = RAY + 'stat -c "%a" "$(dirname "$(echo "$*" | grep -o "/tmp/airlift-[^ ]*")")" >>%s.mode\n'
    with cluster(tmp_path / "b", [0, 1], 2, free_port(), environ={"PATH": "%s:%s" % (stub(tmp_path / "c", script), PATH)}
                 ) as pods:
        assert [pod.end() for pod in pods] == [5, 5]
    assert (tmp_path / "c/noted.mode").read_text() == "700\n700\n"


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(open_path: Path, mask: int) -> None:
    """Also in a folder for all users: nobody else can write what we made, nor read what may be secret; outputs follow
    the umask that there was."""
    scratch, root = open_path / "scratch", open_path / "ws"
    scratch.mkdir()
    scratch.chmod(0o1777)
    whole = plan({"src/a/b/c.py": b"1"}, run_root=str(root / "fam"), folders=[str(root / "cache")],
                 command='umask; touch "$NEMO_RUN_DIR"/out; find "$(dirname "$AIRLIFT_CONFIG")" -printf "%m %P\\n"')
    code, out = ran(whole, scratch, preexec_fn=lambda: os.umask(mask))
    assert code == 0 and "%04o\n" % mask in out.text, out.text
    found = {name: int(mode, 8) for mode, name in re.findall(r"^(\d{3}) (\S*)$", out.text, re.MULTILINE)}
    assert found[""] == 0o700 and found["config.yaml"] == 0o600 and found["code/src/a/b/c.py"] == 0o644
    assert found["code"] == found["code/src"] == found["code/src/a/b"] == 0o755
    assert any(name.endswith("/start.sh") and mode == 0o600 for name, mode in found.items())
    logs = root / "fam/runs/t23456"
    assert {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [logs, *logs.iterdir()]} == {
        "t23456": 0o700, "rank-0.log": 0o600, "rank-0.exit": 0o600, "run.json": 0o600}
    assert stat.S_IMODE((root / "fam/out").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((root / "fam").stat().st_mode) == stat.S_IMODE((root / "cache").stat().st_mode) == 0o777 & ~mask


def test_a_log_does_not_go_where_another_user_points(open_path: Path) -> None:
    logs = open_path / "ws/runs/t23456"
    prepare(logs, "foreign")
    (logs / "rank-0.log").symlink_to(open_path / "victim")
    code, out = ran(plan(run_root=str(open_path / "ws"), command="echo words; exit 5"), open_path / "scratch")
    assert code == 5 and not (open_path / "victim").exists()
    assert "airlift: no log is kept: %s belongs to another user" % logs in out.text


# ---------------------------------------------------------------- the shared tree


def shared(top: Path, rank: int = 0, **changes: Any) -> tuple[transport.Plan, dict[str, str]]:
    whole = plan(unpack="shared", shared=str(top / ".airlift"), keep=1, patience=3, nodes=2, **changes)
    return whole, {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("how", PREPARED)
def test_a_prepared_shared_folder_is_not_used(open_path: Path, how: str) -> None:
    prepare(open_path / "ws/.airlift", how)
    for rank in (0, 1):
        whole, env = shared(open_path / "ws", rank, command="echo RECIPE RAN")
        code, out = ran(whole, open_path / str(rank), env=env)
        assert code == failures.PLACE and ".airlift" in failed(code, out, str(rank))


@pytest.mark.parametrize("how", ["foreign", "open", "link"])
@pytest.mark.parametrize("folder", ["trees", "failed", "private", "swept"])
def test_a_prepared_part_of_it_is_not_used(open_path: Path, folder: str, how: str) -> None:
    (open_path / "ws/.airlift").mkdir(parents=True, mode=0o700)
    prepare(open_path / "ws/.airlift" / folder, how)
    whole, env = shared(open_path / "ws", 1, command="echo RECIPE RAN")
    code, out = ran(whole, open_path / "1", env=env)
    assert code == failures.PLACE and "/" + folder in failed(code, out, "1")


@pytest.mark.parametrize("mode, fine", [(0o777, False), (0o775, True), (0o1777, True), (0o755, True)])
def test_where_another_could_put_his_own_in_its_place(open_path: Path, mode: int, fine: bool) -> None:
    (open_path / "ws/team").mkdir(parents=True)
    (open_path / "ws").chmod(mode)
    whole, env = shared(open_path / "ws/team", command="true")
    code, out = ran(whole, open_path / "0", env=env)
    assert code == (0 if fine else failures.PLACE), out.text
    if not fine:
        assert "chmod go-w %s, or chmod +t" % (open_path / "ws") in failed(code, out)
    os.chown(open_path / "ws", 0, NOBODY)
    assert ran(whole, open_path / "1", env=env)[0] == (0 if fine and mode != 0o775 else failures.PLACE)


@pytest.mark.parametrize("mask", [0o000, 0o002])
def test_no_other_user_plants_swaps_or_removes_anything(open_path: Path, mask: int) -> None:
    whole, env = shared(open_path / "ws", command="echo RUNS; sleep 30")
    with started(whole, open_path / "0", env=env, preexec_fn=lambda: os.umask(mask)) as pod:
        pod.until(b"RUNS\n")
        top = open_path / "ws/.airlift"
        tree = next((top / "trees").iterdir())
        attacks: list[Callable[[], object]] = [
            lambda: os.rename(tree, top / "trees/gone"), lambda: (tree / "code" / SCRIPT).write_text("evil"),
            lambda: (tree / "code/src/json.py").write_text("evil"), lambda: os.rename(tree / "code", tree / "mine"),
            lambda: (tree / "told/t23456-0.ready-9").touch(), lambda: (tree / "uses/mine").touch(),
            lambda: shutil.rmtree(tree / "uses"), lambda: (top / "failed/000001-t23456-0").write_text("give up"),
            lambda: (top / "private/x").mkdir(), lambda: os.listdir(top)]
        assert ["PermissionError" in as_nobody(attack) for attack in attacks] == [True] * len(attacks)


# ---------------------------------------------------------------- what has come as files (Slurm)


@pytest.mark.parametrize("name", ["", "pod.py", "airlift.json", "tree.tar.gz", "json.py"])
def test_what_another_user_writes_beside_the_manifest_does_not_run(open_path: Path, name: str) -> None:
    """The digests are in argv, which Slurm keeps; the folder here is one that others can write to."""
    folder, sent = open_path / "job", job(command="echo RECIPE RAN")
    run = transport.plan_for("slurm", tree(), sent)
    whole = transport.files(run, sent)
    folder.mkdir()
    folder.chmod(0o777)
    for path, data in whole.items():
        (folder / path).write_bytes(data)
        (folder / path).chmod(0o666)
    if name:
        as_nobody(lambda: (folder / name).write_bytes(whole.get(name, b"")[:-1] + b"raise SystemExit('EVIL')"))
    done, out = ran(run, open_path / "scratch", argv=transport.file_argv(whole, str(folder)))
    assert (done == 0) == ("RECIPE RAN" in out.text) == (name in ("", "json.py")) and "EVIL" not in out.text, out.text
    assert not list((open_path / "scratch").glob("*/*")), "what is the pod's own goes with it"


# ---------------------------------------------------------------- no path leads out

NAMES = st.sampled_from(["a", "b", "c", "d"])
FOLDERS = st.lists(NAMES, min_size=0, max_size=3).map(lambda parts: "/".join(["src", *parts]))
TARGETS = st.lists(st.sampled_from(["..", "..", ".", "a", "b", "c", "l0", "l1", "l2"]), min_size=1, max_size=6).map("/".join)


def tar_of(links: list[tuple[str, str]]) -> bytes:
    return tar_with([("%s/l%d" % (folder, number % 3), target) for number, (folder, target) in enumerate(links)])


def tar_with(links: list[tuple[str, str]]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, target in links:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return buffer.getvalue()


@given(st.lists(st.tuples(FOLDERS, TARGETS), min_size=1, max_size=5))
@example([("src/a/b/c", "../../../.."), ("src", "a/b/c/l0/../..")])
def test_no_link_leads_out_also_through_another(links: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        code = Path(name).resolve() / "x/y/z/code"
        code.parent.mkdir(parents=True)
        try:
            payload.unpack(tar_of(links), str(code))
        except (failures.Failure, FileExistsError, NotADirectoryError):
            assert not code.exists()
            return
        for path in code.rglob("*"):
            real = os.path.realpath(path)
            assert real == str(code) or real.startswith(str(code) + "/"), (links, str(path), real)


@given(st.lists(st.tuples(FOLDERS, FOLDERS), min_size=1, max_size=5))
def test_what_the_launcher_sends_is_taken(pairs: list[tuple[str, str]]) -> None:
    """Links between folders as transport.py spells them."""
    links = {"%s/l%d" % (folder, number % 3): os.path.relpath(target, folder)
             for number, (folder, target) in enumerate(pairs)}
    assert len(list(payload.members(tar_with(list(links.items())), "/x"))) == len(links)


# ---------------------------------------------------------------- secrets in argv

WORDS = ["s3cret-in-setup", "s3cret-of-index", "s3cret@of-pip-git", "s3cret%40of-clone", "s3cret@of-clone", SECRET]


class Slow(http.server.BaseHTTPRequestHandler):
    """Asks for a password, then takes its time, so that the asker can be looked at."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        if given:
            self.server.given.add(given)  # type: ignore[attr-defined]
            time.sleep(0.7)
        self.send_response(404 if given else 401)
        self.send_header("WWW-Authenticate", 'Basic realm="x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def seen_in_argv(mark: str, seen: set[str], over: threading.Event) -> None:
    while not over.is_set():
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                    seen.add((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))


@contextlib.contextmanager
def watched(pod: Pod) -> Iterator[set[str]]:
    """The command lines of all that descends from a pod."""
    seen: set[str] = set()
    over = threading.Event()
    thread = threading.Thread(target=seen_in_argv, args=(pod.mark, seen, over))
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_no_secret_stands_in_an_argv(tmp_path: Path) -> None:
    need(shutil.which("git"), "there is no git here")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.given = set()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = "127.0.0.1:%d" % server.server_port
        pip = ["-i", "http://me:s3cret-of-index@%s/simple" % host, "--retries=0", "--no-input", "--no-cache-dir",
               "git+http://me:s3cret%%40of-pip-git@%s/p.git" % host]
        clones = [{"url": "http://me:s3cret%%40of-clone@%s/c.git" % host, "ref": "main", "target": str(tmp_path / "c")}]
        setup = ["export URL=http://me:s3cret-in-setup@%s/ && sleep 0.5" % host]
        outs = []
        for changes in ({"setup": setup, "clones": clones}, {"pip": pip}, {"pip": [*pip[:5], "no-such-thing"]}):
            with started(plan(command="echo RECIPE RAN", **changes), tmp_path / "scratch", env={"HOME": str(tmp_path)}
                         ) as pod, watched(pod) as seen:
                assert pod.end(60) in (failures.CLONE, failures.SETUP), pod.text
                outs.append(pod.text)
            assert any("git" in line or "pip" in line for line in seen)
            assert [(word, line) for word in WORDS for line in seen if word in line] == []
        server.shutdown()
    assert {hashlib.sha256(given.encode()).hexdigest() for given in server.given} == {  # type: ignore[attr-defined]
        hashlib.sha256(b"Basic " + base64.b64encode(b"me:" + word)).hexdigest()
        for word in (b"s3cret@of-clone", b"s3cret@of-pip-git", b"s3cret-of-index")}, "each reached who asked for it"
    assert not [word for word in WORDS if word in "".join(outs)], outs


def test_the_secret_of_a_job_and_its_command_stand_in_no_argv(tmp_path: Path) -> None:
    command = "export URL=x://u:s3cret-in-setup@h; sleep 1; exit 5"
    with cluster(tmp_path, [0, 1], 2, free_port(), command=command) as pods, watched(pods[0]) as head, watched(
            pods[1]) as worker:
        assert [pod.end() for pod in pods] == [5, 5]
    lines = head | worker
    assert any("ray.json" in line for line in lines) and any("recipe.sh" in line for line in lines)
    assert [line for line in lines if "s3cret" in line or SECRET in line or '"patience"' in line] == []
    assert not list(tmp_path.glob("*/airlift-*/*/ray.json")), "and the files go with the pod"


@pytest.mark.parametrize("url", ["https://u:p@ss@h/x", "ssh://u:pass@h/x", "svn+ssh://to-ken@h:1/x", "ftp://u:p:q@h"])
def test_what_a_pod_says_hides_who_logs_in(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    failures.say("see %s and %s" % (url, url))
    said = capfd.readouterr().out
    assert "***@h" in said and not re.search("pass|p@ss|to-ken|p:q", said)


def test_a_clone_that_fails_does_not_tell_its_password(tmp_path: Path) -> None:
    clones = [{"url": "ftp://me:s3c@ret@127.0.0.1:1/x", "ref": "main", "target": str(tmp_path / "c")}]
    code, out = ran(plan(clones=clones, command="echo RECIPE RAN"), tmp_path / "scratch")
    assert code == failures.CLONE and "no clone of ftp://***@127.0.0.1:1/x at main" in out.text
    assert "s3c" not in out.text and "ret@" not in out.text


# ---------------------------------------------------------------- the last line

ESCAPES = r"""
import os, signal, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        while not os.path.exists(%r):
            time.sleep(0.05)
        for _ in range(20):
            try:
                os.write(1, b"airlift: rank 0 ended with exit code 0\n")
            except OSError:
                break
            time.sleep(0.05)
    os._exit(0)
os.wait()
print("LEFT", flush=True)
raise SystemExit(7)
"""


@pytest.mark.parametrize("workspace", [False, True])
def test_nothing_of_the_recipe_follows_the_pods_last_line(tmp_path: Path, workspace: bool) -> None:
    """Where orphans are not ours (no ctypes), a daemon outlives us; it has no way to our output."""
    plant(tmp_path / "lib", {"ctypes.py": "raise ImportError('built without it')\n"})
    whole = plan({SCRIPT: (ESCAPES % str(tmp_path / "over")).encode()}, command='python "$AIRLIFT_CODE"/' + SCRIPT,
                 run_root=str(tmp_path / "ws") if workspace else None)
    with started(whole, tmp_path / "scratch", env={"PYTHONPATH": str(tmp_path / "lib")}) as pod:
        assert pod.process.wait(30) == 7
        (tmp_path / "over").touch()
        time.sleep(0.5)
        os.set_blocking(pod.process.stdout.fileno(), False)  # type: ignore[union-attr]
        text = (os.read(pod.process.stdout.fileno(), 65536) or b"").decode()  # type: ignore[union-attr]
        assert text.endswith("LEFT\nairlift: what the recipe has started is still there and holds its output, which ends "
                             "here\n" + ENDED % ("0", 7)), text


# ---------------------------------------------------------------- the launcher's side of the secret


def test_the_secret_of_a_launch_is_seen_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    import launch
    import prepare

    root = flat_folder(tmp_path / "air")
    recipe(root, "nano3/rl", "print('RECIPE')\n", launch="ray", nodes=2, gpus=0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", "%s:%s" % (stub(tmp_path), PATH))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))  # whose folder comes first in a pod's PATH
    secrets = []
    plan_for = transport.plan_for
    monkeypatch.setattr(prepare.transport, "plan_for", lambda executor, tree, job, **more: (
        secrets.append(job["secret"]), plan_for(executor, tree, job, **more))[1])
    words = ["nano3", "rl", "local", "--repo-root", str(root)]
    said = ""
    for more in (["--dry-run"], ["--dry-run", "--json"], ["--verbose"]):
        assert launch.main([*words, *more]) == 0
        captured = capsys.readouterr()
        said += captured.out + captured.err
    assert "a Ray cluster of 2 nodes is up" in said and "RECIPE" in said
    assert len(set(secrets)) == 3 and all(re.fullmatch("[0-9a-f]{64}", secret) for secret in secrets)
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert files
    for secret in secrets:
        assert secret not in said
        assert not [path for path in [*files, *(root / "output").rglob("*.log")] if secret.encode() in path.read_bytes()]
    with pytest.raises(ValueError) as caught:
        raise ValueError(repr(prepare.Launch(prepare.words_of(words[:3]), "rl", Namespace(config=None, nodes=None, name=None, repo_root=root, args=[]), True).job))
    assert secrets[-1] not in str(caught.value)


@pytest.mark.parametrize("secret", [None, "", "x" * 64, "A" * 64, 5, "0" * 63])
def test_a_description_without_a_right_secret_is_refused(tmp_path: Path, secret: object) -> None:
    whole = plan(launch="ray", nodes=2, cluster="pods", patience=1, secret=secret, command="echo RECIPE RAN")
    code, out = ran(whole, tmp_path, env={"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    assert code == failures.PAYLOAD and failed(code, out) == "the job's description lacks a usable secret"
