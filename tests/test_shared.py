"""The shared unpack, with real processes: pods that are killed, starved and lied to, alone and by the thousand.

AIRLIFT_KILLS is the number of kills of a storm. tests/chaos.py has the storm and can be run by hand.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from chaos import FLAWS, WAYS, Ground, Pod, aftermath, looked, plant, source, spoil, stray
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from layout import REPO, flat_folder, launcher, recipe, write
from support import need, plan, ran, started, tmpfs

from pod.shared import SharedTree

SOURCES = [source(number) for number in range(4)]
ONE, TWO, THREE, FOUR = SOURCES
KILLS = os.environ.get("AIRLIFT_KILLS")


@pytest.fixture
def ground(tmp_path):
    return Ground(tmp_path, SOURCES)


def results(ground, pids):
    """Wait for these; what each wrote."""
    codes = [ground.finish(pid) for pid in pids]
    for entry in ground.entries():
        assert entry.get("violations", []) == []
        ground.ended[entry["pid"]] = entry
    assert [ground.ended[pid]["code"] for pid in pids] == codes
    return [ground.ended[pid] for pid in pids]


def run(ground, *pods):
    return results(ground, [ground.start(each) for each in pods])


def chaos(capsys, *words, seconds=600):
    """Run a storm as a program of its own; its figures are shown, and any violation fails the test."""
    done = subprocess.run([sys.executable, str(REPO / "tests/chaos.py"), *map(str, words)], capture_output=True,
                          stdin=subprocess.DEVNULL, text=True, timeout=seconds)
    said = re.search("^figures: (.*)$", done.stdout, re.M)
    assert said, done.stdout + done.stderr
    with capsys.disabled():
        print("\nchaos %s: %s" % (" ".join(map(str, words)), said.group(1)))
    assert "violation:" not in done.stdout, done.stdout
    return json.loads(said.group(1))


def uses(ground):
    return [path.name for path in Path(ground.path("trees")).glob("*/uses/*")]


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------- storms


def test_a_storm(capsys):
    figures = chaos(capsys, "--kills", KILLS or 120, "--pods", 24, "--seed", 7)
    assert figures["kills"] >= int(KILLS or 120)
    assert figures["looks of readers"] > 100 < figures["looks of the observer"]


def test_a_kill_at_some_of_all_calls(capsys):
    assert chaos(capsys, "--every", 29, "--seed", random.randrange(29))["kills"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("pods, share", [(8, 0.2), (32, 0.5), (64, 0.3)])
def test_a_storm_of_thousands(capsys, pods, share):
    kills = int(int(KILLS or 1200) * share)
    assert chaos(capsys, "--kills", kills, "--pods", pods, "--seed", pods, seconds=3600)["kills"] >= kills


@pytest.mark.slow
def test_a_kill_at_one_call_in_eight(capsys):
    assert chaos(capsys, "--every", 8, "--seed", random.randrange(8), seconds=3600)["kills"] > 80


@pytest.mark.slow
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_storm_finds_flaws(flaw):
    for seed in range(5):
        done = subprocess.run([sys.executable, str(REPO / "tests/chaos.py"), "--kills", "400", "--pods", "24", "--seed",
                               str(seed), "--flaw", flaw], capture_output=True, text=True, timeout=600)
        if done.returncode == 1 and "violation:" in done.stdout:
            return
    pytest.fail("no storm finds a pod that " + flaw)


@pytest.mark.slow
def test_a_storm_over_two_mounts_of_one_nfs_export(capsys):
    """The machine's kernel may have no NFS; a Linux in user mode (Debian has it) brings client and server."""
    need(shutil.which("linux.uml"), "NFS is not tested: there is no linux.uml here (apt-get install user-mode-linux)")
    need(os.geteuid() == 0, "NFS is not tested: the Linux in user mode reads this machine's files as root")
    figures = chaos(capsys, "--nfs", 500, "--kills", 40, "--pods", 6, "--patience", 3, "--slack", 20)
    assert figures["kills"] >= 40


# ---------------------------------------------------------------- one tree for all


@pytest.mark.parametrize("pods", [2, 8, 64])
def test_all_pods_see_one_tree(ground, pods):
    ranks = list(range(pods))
    random.shuffle(ranks)
    done = run(ground, *[Pod("a", ONE, rank=rank, patience=30, hold=0.1) for rank in ranks])
    assert {entry["code"] for entry in done} == {0} and len({entry["path"] for entry in done}) == 1
    assert uses(ground) == [] and len(ground.published()) == 1
    assert os.listdir(ground.path("private")) == os.listdir(ground.path("swept")) == []
    told = os.listdir(ground.path("trees", ground.published()[0], "told"))
    assert told == ["a-0.ready-3"]


def test_launches_of_one_digest_share_a_tree_and_others_do_not(ground):
    first = run(ground, Pod("a", ONE, keep=9))
    again = run(ground, *[Pod("b", ONE, rank=rank, keep=9) for rank in (0, 1)], Pod("c", TWO, keep=9))
    assert [entry["path"] == first[0]["path"] for entry in again] == [True, True, False]


def test_without_rank_0_a_pod_waits_until_its_deadline(ground):
    entry, = run(ground, Pod("a", ONE, rank=1, patience=1))
    assert (entry["code"], entry["seen"]) == (84, "rank 0 has said nothing after 1 s in " + ground.top)
    assert 1 <= entry["waited"] < 4


def test_the_others_stop_at_once_when_rank_0_of_their_attempt_fails(ground):
    waiting = [ground.start(Pod("a", ONE, rank=rank, patience=60)) for rank in (1, 2)]
    bystanders = [ground.start(each) for each in (Pod("a", ONE, 1, 1, patience=60), Pod("b", ONE, rank=1, patience=2))]
    failed, = run(ground, Pod("a", ONE, plan={"quota": "no quota here"}))
    assert failed["code"] == 83 and "no quota here" in failed["seen"]
    for entry in results(ground, waiting):
        assert entry["code"] == 84 and entry["waited"] < 20
        assert entry["seen"].startswith("rank 0 says: ") and "no quota here" in entry["seen"]
    restarted, = run(ground, Pod("a", ONE, 1))
    other, unaware = results(ground, bystanders)
    assert restarted["code"] == other["code"] == 0
    assert unaware["code"] == 84 and unaware["waited"] >= 2 and "rank 0 has said nothing" in unaware["seen"]


def test_a_failure_is_taken_back_by_the_next_start(ground):
    assert run(ground, Pod("a", ONE, plan={"quota": "x"}))[0]["code"] == 83
    assert run(ground, Pod("a", ONE, rank=1, patience=60))[0]["code"] == 84  # of the same attempt, whenever it starts
    for rank in (0, 1):
        assert run(ground, Pod("a", ONE, rank=rank))[0]["code"] == 0
    assert os.listdir(ground.path("failed")) == []


def test_rank_0s_word_of_a_tree_counts_more_than_a_failure_after_it(ground):
    run(ground, Pod("a", ONE))
    (Path(ground.place) / "scratch/2").write_text("in the way")
    assert [entry["code"] for entry in run(ground, Pod("a", ONE))] == [83]
    assert [entry["code"] for entry in run(ground, Pod("a", ONE, rank=1))] == [0]


def test_what_fails_beside_the_tree_is_told_as_well(ground):
    """Rank 0 cannot write files of its own."""
    (Path(ground.place) / "scratch/1").write_text("in the way")
    failed, = run(ground, Pod("a", ONE))
    assert failed["code"] == 83
    other, = run(ground, Pod("a", ONE, rank=1, patience=60))
    assert other["code"] == 84 and other["seen"].startswith("rank 0 says: ")


# ---------------------------------------------------------------- two that are the same


def test_two_rank_0s_of_one_attempt(ground):
    """The platform starts one again that was only cut off: neither takes the other's tree away."""
    cut_off = ground.start(Pod("a", ONE, hold=0.5, plan={"slow": 0.01}))
    until(lambda: os.path.isdir(ground.path("private")) and os.listdir(ground.path("private")))
    others = [ground.start(Pod("a", ONE, rank=rank, patience=30, hold=1.5)) for rank in (0, 1, 2)]
    first, = results(ground, [cut_off])
    assert first["code"] == 0
    for number in range(3):  # now only those that came later hold it
        assert ground.run(Pod("s%d" % number, TWO, keep=0, hold=0)) == 0
    assert [entry["code"] for entry in results(ground, others)] == [0, 0, 0]


def test_rank_0_begins_anew_when_its_folder_is_taken_for_one_left_behind(ground):
    slow = ground.start(Pod("a", ONE, plan={"slow": 0.01}))
    swept = 0
    for _ in range(2):
        until(lambda: list(Path(ground.path("private")).glob("*/code/src")))
        for name in os.listdir(ground.path("private")):
            os.rename(ground.path("private", name), ground.path("swept", "mine-%d" % swept))
            swept += 1
    entry, = results(ground, [slow])
    assert entry["code"] == 0 and swept >= 2 and looked(ground) == []


def test_a_use_that_was_left_behind_keeps_its_tree_and_nothing_else(ground):
    assert ground.run(Pod("a", ONE, plan={"kill": (40, "before")})) == 137
    left = ground.start(Pod("a", ONE, 1, hold=60))
    until(lambda: uses(ground))
    os.kill(left, signal.SIGKILL)
    assert ground.finish(left) == 137
    kept = ground.published()
    for number, tree in enumerate([TWO, THREE, TWO, THREE]):
        assert ground.run(Pod("s%d" % number, tree, keep=1, hold=0)) == 0
    assert set(kept) < set(ground.published()) and len(ground.published()) == 2


# ---------------------------------------------------------------- what is found there


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_tree_is_not_used(ground, how):
    first, = run(ground, Pod("a", ONE))
    spoil(ground, random.Random(how), ground.published()[0], how)
    waiting = ground.start(Pod("a", ONE, rank=1, patience=1))
    refused, = results(ground, [waiting])
    assert refused["code"] == 84 and "which is not what was sent" in refused["seen"]
    waiting = ground.start(Pod("a", ONE, rank=1, patience=30))
    again, = run(ground, Pod("a", ONE))
    other, = results(ground, [waiting])
    assert first["path"] != again["path"] == other["path"]


def test_the_others_stop_at_once_when_the_tree_is_damaged_and_rank_0_cannot_mend_it(ground):
    run(ground, Pod("a", ONE))
    spoil(ground, random.Random(1), ground.published()[0], "flip")
    run(ground, Pod("a", ONE, plan={"quota": "no quota"}))
    entry, = run(ground, Pod("a", ONE, rank=1, patience=60))
    assert entry["code"] == 84 and "no quota" in entry["seen"] and entry["waited"] < 20


def test_a_tree_with_more_in_it_is_not_reused(ground):
    first, = run(ground, Pod("a", ONE))
    stray(ground, ground.published()[0])
    sibling, = run(ground, Pod("a", ONE, rank=1))  # what a sibling wrote does not stop a pod of the same attempt
    later, late = run(ground, Pod("b", ONE), Pod("b", ONE, rank=1))
    assert first["path"] == sibling["path"] != later["path"] == late["path"]


def test_what_is_foreign_stays(ground):
    run(ground, Pod("z", TWO))
    name, = ground.published()
    dice = random.Random(3)
    trees = Path(ground.path("trees"))
    (trees / "notes.txt").write_text("mine")
    (trees / ("\u00b2" * 6 + "-x")).mkdir()  # a digit to Python, and no number
    (trees / ("999999-" + ONE.digest)).mkdir()
    for how, number in enumerate((1, 2, 3, 900, 901, 902, 2 * 10**6)):
        dice.choice = lambda ways, how=how: ways[(0, 1, 2, 4)[how % 4]]  # not "like": that one is swept by half
        plant(ground, dice, ONE.digest, number)
    foreign = {path for path in trees.rglob("*") if not path.is_relative_to(trees / name)}
    for run_id in ("a", "b"):
        done = run(ground, *[Pod(run_id, ONE, rank=rank, keep=0) for rank in (0, 1)])
        assert [entry["code"] for entry in done] == [0, 0]
    assert len(foreign) > 10 and foreign <= set(trees.rglob("*"))


def test_old_trees_are_swept_by_keep(ground):
    using = ground.start(Pod("u", FOUR, hold=60))
    until(lambda: uses(ground))
    used = ground.published()
    for number in range(6):
        assert ground.run(Pod("k%d" % number, SOURCES[number % 3], keep=2, hold=0)) == 0
        assert len([name for name in ground.published() if name not in used]) <= 2
    assert set(used) <= set(ground.published())
    os.kill(using, signal.SIGUSR1)
    assert ground.finish(using) == 0
    assert ground.run(Pod("last", ONE, keep=0, hold=0)) == 0
    assert len(ground.published()) == 1  # its own, in use while it swept
    assert os.listdir(ground.path("swept")) == []


def test_what_a_killed_sweeper_left_is_swept(ground):
    for number, tree in enumerate([ONE, TWO, THREE]):
        ground.run(Pod("k%d" % number, tree, keep=9, hold=0))
    half = ground.published()[0]
    os.rmdir(ground.path("trees", half, "uses"))
    shutil.copytree(ground.path("trees", half), ground.path("swept", "half"))
    assert run(ground, Pod("a", ONE, rank=0, keep=9))[0]["code"] == 0  # not with the tree that is half gone
    assert run(ground, Pod("b", TWO, keep=3, hold=0))[0]["code"] == 0
    assert half not in ground.published() and os.listdir(ground.path("swept")) == []


def test_what_failed_and_what_was_begun_does_not_pile_up(ground):
    left = SharedTree.LEFT
    os.makedirs(ground.path("private"))
    os.makedirs(ground.path("failed"))
    for number in range(3 * left):
        os.makedirs(ground.path("private", "%06d-%s.%08x" % (number, ONE.digest, number), "code"))
        Path(ground.path("failed", "%06d-x%d-0" % (number, number))).touch()
    assert ground.run(Pod("a", ONE, hold=0)) == 0
    assert sorted(os.listdir(ground.path("failed")))[0].startswith("%06d-" % (2 * left))
    assert len(os.listdir(ground.path("private"))) == len(os.listdir(ground.path("failed"))) == left


# ---------------------------------------------------------------- no space, no permission, a file system that lies


@pytest.mark.parametrize("where", ["trees", ""])
def test_a_quota_that_fails_the_rename(ground, where):
    """Also where nothing at all can be renamed, what rank 0 wrote is removed, or each start would make it worse."""
    waiting = ground.start(Pod("a", ONE, rank=1, patience=60))
    entry, = run(ground, Pod("a", ONE, plan={"quota": "no quota", "where": where}))
    assert entry["code"] == 83 and entry["seen"].endswith(": no quota (the disk is full)")
    assert results(ground, [waiting])[0]["code"] == 84
    assert ground.published() == os.listdir(ground.path("private")) == os.listdir(ground.path("swept")) == []
    assert aftermath(ground, Pod("clean", ONE)) == []


def test_a_full_disk(tmp_path):
    with tmpfs(tmp_path / "small", "size=600k") as top:
        ground = Ground(tmp_path, SOURCES, top / "shared")
        using = ground.start(Pod("z", TWO, hold=60))  # a tree that nobody uses would make room
        until(lambda: uses(ground))
        ballast = top / "ballast"
        with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        for _ in range(3):
            waiting = ground.start(Pod("a", ONE, rank=1, patience=60))
            entry, = run(ground, Pod("a", ONE))
            other, = results(ground, [waiting])
            assert entry["code"] == 83 and entry["seen"].endswith("(the disk is full)")
            assert other["code"] == 84 and other["seen"].startswith("rank 0 says: ") and other["waited"] < 20
            with open(ballast, "ab", buffering=0) as file, pytest.raises(OSError):  # also what it freed
                while True:
                    file.write(bytes(4096))
        assert looked(ground) == []
        ballast.unlink()
        os.kill(using, signal.SIGUSR1)
        assert results(ground, [using])[0]["code"] == 0
        assert aftermath(ground, Pod("clean", THREE)) == []


def test_a_disk_that_is_full_of_what_killed_pods_left(tmp_path):
    """Nobody needs to tidy up: what is begun, swept by half or no longer used makes room."""
    with tmpfs(tmp_path / "small", "size=400k") as top:
        ground = Ground(tmp_path, SOURCES, top / "shared")
        for tree in (TWO, THREE, FOUR):
            assert ground.run(Pod("k" + tree.digest[:3], tree, keep=99, hold=0)) == 0
        begun = [0]
        while begun[-1] == len(begun) - 1:  # until one of them found no space, and made some
            assert len(begun) < 200
            assert ground.run(Pod("a", ONE, plan={"kill": (57, "before")})) == 137
            begun.append(len(os.listdir(ground.path("private"))))
        assert looked(ground) == [] and len(ground.published()) < 3
        assert run(ground, Pod("b", ONE, keep=99), Pod("b", ONE, rank=1, keep=99))[0]["code"] == 0
        assert looked(ground) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start pods of another user")
def test_another_user(tmp_path):
    os.chmod(tmp_path, 0o755)
    for folder in tmp_path.parents:
        if not os.stat(folder).st_mode & 0o001:
            os.chmod(folder, 0o711)
    ground = Ground(tmp_path, SOURCES)
    os.chmod(ground.place + "/scratch", 0o777)
    Path(ground.book).touch()
    os.chmod(ground.book, 0o666)
    assert run(ground, Pod("z", ONE))[0]["code"] == 0
    done = run(ground, *[Pod("a", ONE, rank=rank, uid=65534) for rank in (0, 1)])
    assert [entry["code"] for entry in done] == [83, 83] and "belongs to another user" in done[0]["seen"]
    for mode in (0o1777, 0o775):  # a folder for all users is nobody's
        os.chmod(ground.top, mode)
        entry, = run(ground, Pod("b", ONE))
        assert entry["code"] == 83 and "can be written by other users" in entry["seen"]
    os.chmod(ground.top, 0o755)
    assert run(ground, Pod("c", ONE))[0]["code"] == 0
    assert os.stat(ground.top).st_mode & 0o777 == 0o700 and len(ground.published()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start pods of another user")
def test_permission_taken_away(tmp_path):
    test_another_user(tmp_path)
    ground = Ground(tmp_path, SOURCES)
    ground.entries()
    ground.started = 100
    for path in [ground.top, *Path(ground.top).rglob("*")]:
        os.chown(path, 65534, 65534)
    for folder in ("trees", "private", "failed"):
        os.chown(ground.path(folder), 0, 0)
        done = run(ground, *[Pod("p", TWO, rank=rank, uid=65534, patience=1) for rank in (0, 1)])
        assert {entry["code"] for entry in done} == {83} and all(folder in entry["seen"] for entry in done)
        os.chown(ground.path(folder), 65534, 65534)
    assert {entry["code"] for entry in run(ground, *[Pod("p", TWO, 1, rank, uid=65534) for rank in (0, 1)])} == {0}


@pytest.mark.parametrize("lies", [{"lost": 1}, {"lost": 99}, {"stale": 3}])
def test_a_file_system_that_lies(ground, lies):
    """A rename that is carried out and answered ENOENT; listings that are out of date."""
    for number in range(2):
        pods = [Pod("a%d" % number, SOURCES[number], rank=rank, plan=lies) for rank in range(4)]
        done = run(ground, *pods)
        assert [entry["code"] for entry in done] == [0] * 4 and len({entry["path"] for entry in done}) == 1
    assert aftermath(ground, Pod("clean", ONE)) == []


# ---------------------------------------------------------------- the program as it is shipped


def shipped(top, patience=20, **changes):
    return plan({"src/pkg/data.txt": b"data"}, unpack="shared", shared=str(top), keep=1, patience=patience, nodes=4,
                **{"command": "sleep 0.2; cat src/pkg/data.txt", **changes})


def env(rank, attempt=0):
    return {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "LEPTON_JOB_FAILURE_COUNT": str(attempt)}


def test_shipped_pods_are_killed_and_started_again(tmp_path):
    """Four pods by execve, each killed a few times before it is left alone: then all succeed, with one tree."""
    job, dice = shipped(tmp_path / "shared"), random.Random(4)
    for attempt, round_ in ((0, 1), (0, 2), (1, 3)):
        for rank in (1, 0, 2, 0, 3):
            with started(job, tmp_path / ("%d.%d" % (round_, rank)), env=env(rank, attempt)):
                time.sleep(dice.uniform(0.05, 0.25))  # and leaving the block kills it
    with started(job, tmp_path / "w1", env=env(1, 1)) as one, started(job, tmp_path / "w2", env=env(2, 1)) as two:
        code, zero = ran(job, tmp_path / "w0", env=env(0, 1))
        assert (code, one.end(), two.end()) == (0, 0, 0)
    first = {re.sub(r"rank \d", "rank N", each.text.splitlines()[0]) for each in (zero, one, two)}
    assert len(first) == 1 and str(tmp_path / "shared/trees/") in first.pop()
    assert all("\ndata" in each.text for each in (zero, one, two))


def test_a_shipped_pod_that_is_told_to_end_leaves_no_use(tmp_path):
    job = shipped(tmp_path / "shared", command="echo running; sleep 60")
    with started(job, tmp_path / "1", env=env(1)) as waiting:
        time.sleep(0.3)
        assert waiting.signal(signal.SIGTERM) == 143
    with started(job, tmp_path / "0", env=env(0)) as zero, started(job, tmp_path / "2", env=env(2)) as two:
        zero.until(b"running")
        two.until(b"running")
        assert len(list(tmp_path.glob("shared/trees/*/uses/*"))) == 2
        assert zero.signal(signal.SIGTERM) == two.signal(signal.SIGTERM) == 143
    assert list(tmp_path.glob("shared/trees/*/uses/*")) == []


def test_a_shipped_pod_says_why_it_stops(tmp_path):
    job = shipped(tmp_path / "shared", patience=1)
    code, waiting = ran(job, tmp_path / "1", env=env(1))
    assert code == 84
    assert "rank 1: rank 0 did not put the shared tree in place: rank 0 has said nothing after 1 s" in waiting.text
    (tmp_path / "file").write_text("")
    code, zero = ran(shipped(tmp_path / "file/shared"), tmp_path / "0", env=env(0))
    assert code == 83 and "the pod could not put the files in place: " in zero.text and "Traceback" not in zero.text


# ---------------------------------------------------------------- end to end


@pytest.fixture
def folder(tmp_path):
    folder = flat_folder(tmp_path / "airlift")
    recipe(folder, body="import os\nprint('hello from', os.environ['NODE_RANK'], __file__)\n", launch="direct", nodes=2)
    write(folder / "profiles/together.toml", 'extends = "local"\nunpack = "shared"\n')
    write(folder / "profiles/nowhere.toml", 'executor = "docker"\ncontainer_image = "i"\nunpack = "shared"\n')
    return folder


def launch(folder, *words):
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder.parent), "AIRLIFT_HOME": str(folder.parent / "state"),
           "TMPDIR": str(folder.parent)}
    return launcher(folder, "nano3", "sft", *words, env=env, cwd=folder.parent)


@pytest.mark.parametrize("pods", [2, 8])
def test_a_launch_with_a_shared_tree(folder, pods):
    for _ in range(2 if pods == 2 else 1):
        done = launch(folder, "together", "--nodes", pods)
        assert done.returncode == 0, done.stdout + done.stderr
        said = re.findall(r"airlift: rank (\d) of %d, sha256 ([0-9a-f]{64}), (\d+) files in (\S+)" % pods, done.stdout)
        assert len(said) == pods == len({rank for rank, *_ in said}) and len({rest for _, *rest in map(tuple, said)
                                                                              for rest in [tuple(rest)]}) == 1
        _, digest, _, place = said[0]
        assert place.startswith(str(folder / "output/.airlift/trees/")) and digest in place
        hello = re.findall(r"hello from \d (\S+)", done.stdout)
        assert len(hello) == pods and all(path.startswith(place + "/src/") for path in hello)
    assert len(list((folder / "output/.airlift/trees").iterdir())) == 1  # the second launch took the first one's
    assert list((folder / "output/.airlift/trees").glob("*/code/**/__pycache__")) == []


def test_without_a_workspace_it_is_refused(folder):
    done = launch(folder, "nowhere")
    assert done.returncode == 2 and "workspace" in done.stderr and len(done.stderr.splitlines()) == 2


# ---------------------------------------------------------------- any order of it all


class Cluster(RuleBasedStateMachine):
    """Pods of three launches on one small disk, started, killed, finished in any order, between damage and no space."""

    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="airlift-cluster-"))
        self.disk = tmpfs(self.place / "disk", "size=1m")
        self.top = self.disk.__enter__()
        self.ground = Ground(self.place, SOURCES, self.top / "shared")
        self.alive, self.number = [], 0

    def teardown(self):
        try:
            for pid in self.alive:
                os.kill(pid, signal.SIGKILL)
                self.ground.finish(pid)
            self.empty()
            assert aftermath(self.ground, Pod("clean", FOUR)) == []
        finally:
            self.disk.__exit__(None, None, None)
            shutil.rmtree(self.place)

    @rule(launch=st.integers(0, 2), attempt=st.integers(0, 1), rank=st.integers(0, 2), keep=st.integers(0, 2),
          death=st.none() | st.tuples(st.integers(1, 150), st.sampled_from(["before", "half", "after"])))
    def start(self, launch, attempt, rank, keep, death):
        wanted = Pod("l%d" % launch, SOURCES[launch % 2], attempt, rank, keep, patience=0.4, hold=60,
                     plan={"kill": death} if death else {})
        self.alive.append(self.ground.start(wanted))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99), number=st.sampled_from([signal.SIGKILL, signal.SIGUSR1]))
    def end(self, which, number):
        """It is killed, or comes to its end by itself."""
        pid = self.alive.pop(which % len(self.alive))
        os.kill(pid, number)
        assert self.ground.finish(pid) in (0, 83, 84, 128 + number, 137)

    @rule()
    def wait(self):
        time.sleep(0.03)

    @precondition(lambda self: self.ground.published())
    @rule(which=st.integers(0, 99), how=st.sampled_from([*WAYS, "stray"]))
    def damage(self, which, how):
        names = self.ground.published()
        name = names[which % len(names)]
        stray(self.ground, name) if how == "stray" else spoil(self.ground, random.Random(which), name, how)

    @rule(room=st.integers(0, 30))
    def fill(self, room):
        """All but so many KiB."""
        with open(self.top / "ballast", "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - room * 1024))

    @rule()
    def empty(self):
        (self.top / "ballast").unlink(missing_ok=True)

    @rule(tree=st.sampled_from(SOURCES))
    def sweep(self, tree):
        self.number += 1
        code = self.ground.run(Pod("s%d" % self.number, tree, keep=0, hold=0))
        assert code == 0 or (code == 83 and (self.top / "ballast").exists())

    @invariant()
    def published_is_complete_and_readers_see_it_so(self):
        assert looked(self.ground) == []
        for entry in self.ground.entries():
            assert entry.get("violations", []) == []
            assert entry.get("code", 0) in (0, 83, 84) and (entry.get("seen") or not entry.get("code"))
            assert entry.get("code") != 84 or entry["rank"]


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
