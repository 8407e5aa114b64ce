"""archive.py: trees that are kept, how a run came about, fetch, again, diff and adopt, on this machine and both clouds.
Docker and Slurm have theirs in their own files."""

import errno
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import threading
import zlib
from pathlib import Path

import pytest
from cloud import EMULATED, PLATFORMS, cloud
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_transport import FILES

import archive
import runs
import state
import transport
from transport import Entry, Refusal, Tree

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "home"))
    for name in ("AIRLIFT_TREES", "AIRLIFT_TREES_BYTES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def a_tree(text="print()\n"):
    return Tree((Entry("src/p/a.py", text.encode()), Entry("src/p/run.sh", b"#!/bin/sh\n", executable=True),
                 Entry("src/p/link", b"a.py", link=True)))


def kept(home):
    return sorted(path.name for path in (home / "trees").glob("*.*"))


def a_run(digest, number=0, **fields):
    run = runs.Run(**{"id": "r%05d" % number, "recipe": "nano3/sft", "profile": "local", "executor": "local", "nodes": 1,
                      "sha256": digest, "started": 1000.0 + number} | fields)
    run.save()
    return run


# ---------------------------------------------------------------- trees


@QUIET
@given(files=FILES, links=st.sets(st.integers(0, 7)), method=st.sampled_from(["xz", "gz"]))
def test_what_is_written_out_is_what_was_packed(files, links, method, tmp_path_factory, home):
    names = sorted(files)
    entries = [Entry("src/" + name, *files[name]) for name in names]
    entries += [Entry("src/%d in/%s" % (number, names[number % len(names)]), b"../" + names[number % len(names)].encode(),
                      link=True) for number in links]
    tree = Tree(tuple(sorted({entry.path: entry for entry in entries}.values(), key=lambda entry: entry.path)))
    folder = tmp_path_factory.mktemp("out")
    packed = archive.packed(tree, method)
    assert archive.keep(packed) == "" and archive.entries(packed).entries == tree.entries
    archive.write_out(packed, folder)
    found = archive._on_disk(folder, tree)
    assert hashlib.sha256(transport.pack(found)).hexdigest() == packed.digest
    shutil.rmtree(folder)


def test_a_tree_is_kept_once_and_privately(home, monkeypatch):
    packed = archive.packed(a_tree(), "xz")
    assert archive.keep(packed) == archive.keep(packed) == ""
    assert kept(home) == [packed.digest + ".xz"]
    assert (home / "trees").stat().st_mode & 0o777 == 0o700
    assert (home / "trees" / kept(home)[0]).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(transport, "compress", lambda data, method: pytest.fail("it is there"))
    assert archive.packed(a_tree(), "xz") == packed  # and costs nothing


def test_a_flipped_bit_is_noticed_and_mended_by_the_next_launch(home):
    packed = archive.packed(a_tree(), "gz")
    archive.keep(packed)
    path = home / "trees" / kept(home)[0]
    run = a_run(packed.digest)
    for place in range(0, len(packed.data), 7):
        broken = bytearray(packed.data)
        broken[place] ^= 4
        path.write_bytes(bytes(broken))
        try:  # some bits of a gzip's head mean nothing
            assert archive.tree_of(run).digest == packed.digest
        except Refusal as refusal:
            assert "is damaged: " + path.name in refusal.what
            archive.keep(archive.packed(a_tree(), "gz"))
            assert path.read_bytes() == packed.data
    path.unlink()
    with pytest.raises(Refusal, match="is not kept here"):
        archive.tree_of(run)


def test_a_full_disk_is_said_and_nothing_else(home, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    assert archive.keep(archive.packed(a_tree(), "xz")) == (
        "the tree is not kept for fetch and again: No space left on device")
    assert kept(home) == []


def test_two_launches_at_once(home):
    """Of the same tree and of others."""
    packed = [archive.packed(a_tree("x = %d\n" % (number % 3)), "xz") for number in range(12)]
    barrier, said = threading.Barrier(12), []

    def keep(tree):
        barrier.wait()
        said.append(archive.keep(tree))

    threads = [threading.Thread(target=keep, args=(tree,)) for tree in packed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [""] * 12 and len(kept(home)) == 3
    for number, tree in enumerate(packed):
        assert archive.tree_of(a_run(tree.digest, number)) == tree


@pytest.mark.parametrize(("name", "value"), [("AIRLIFT_TREES", "3"), ("AIRLIFT_TREES_BYTES", "600")])
def test_the_oldest_go_but_none_of_the_newest_runs_or_of_one_that_goes_on(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(archive, "NEWEST", 2)
    packed = [archive.packed(a_tree("x = %d\n" % number), "xz") for number in range(8)]
    for number, tree in enumerate(packed):
        a_run(tree.digest, number, ended=None if number == 1 else ["done", ""])
        assert archive.keep(tree) == ""
        os.utime(home / "trees" / (tree.digest + ".xz"), (number, number))
        assert tree.digest + ".xz" in kept(home)
    stay = {packed[number].digest + ".xz" for number in (1, 6, 7)}
    assert stay <= set(kept(home)) and len(kept(home)) <= 4
    monkeypatch.setenv(name, "many")
    with pytest.raises(Refusal, match="%s is 'many'" % name):
        archive.keep(archive.packed(a_tree("y"), "xz"))


# ---------------------------------------------------------------- how it came about


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                   capture_output=True)


def test_the_commit_and_whether_what_travels_differs(tmp_path):
    tree = a_tree()
    for entry in tree.entries:
        path = tmp_path / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.fsdecode(entry.data)) if entry.link else path.write_bytes(entry.data)
    assert archive.git_state(tmp_path, tree) is None
    git(tmp_path, "init", "-qb", "topic")
    assert archive.git_state(tmp_path, tree) is None  # no commit yet
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    found = archive.git_state(tmp_path, tree)
    assert (found["branch"], found["dirty"], len(found["commit"])) == ("topic", False, 40)
    assert archive.git_state(tmp_path, a_tree("changed\n"))["dirty"]
    assert archive.git_state(tmp_path, Tree((*tree.entries, Entry("src/p/new.py", b""))))["dirty"]
    sub = Tree(tuple(Entry(entry.path[4:], entry.data, link=entry.link) for entry in tree.entries))
    assert not archive.git_state(tmp_path / "src", sub)["dirty"]  # a checkout that lies in a larger one


def test_nothing_that_a_checkout_configures_is_run(tmp_path):
    """Filters, monitors, hooks, pagers, aliases and ssh of a hostile .git/config."""
    tree, ran = a_tree(), tmp_path / "ran"
    (tmp_path / "src/p").mkdir(parents=True)
    for entry in tree.entries:
        (tmp_path / entry.path).write_bytes(entry.data)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    evil = "touch %s #" % ran
    (tmp_path / ".gitattributes").write_text("* filter=evil diff=evil\n")
    for key in ("filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "core.fsmonitor", "core.pager",
                "core.sshCommand", "diff.external", "core.alternateRefsCommand", "core.editor", "alias.ls-tree",
                "alias.rev-parse", "core.askPass", "credential.helper"):
        git(tmp_path, "config", key, "!" + evil if key.startswith("alias") else evil)
    git(tmp_path, "config", "extensions.partialClone", "origin")
    git(tmp_path, "config", "remote.origin.url", "ext::sh -c '%s'" % evil)
    for hook in ("post-index-change", "reference-transaction", "pre-auto-gc"):
        path = tmp_path / ".git/hooks" / hook
        path.write_text("#!/bin/sh\n%s\n" % evil)
        path.chmod(0o755)
    (tmp_path / "src/p/a.py").write_text("changed, and so asked for\n")
    archive.git_state(tmp_path, tree)
    assert not ran.exists()


def test_a_checkout_of_another_user_or_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert archive.git_state(tmp_path, a_tree()) is None


# ---------------------------------------------------------------- on the clouds


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


SHOWS = "import sys, yaml\nprint('read', yaml.safe_load(open(sys.argv[sys.argv.index('--config') + 1])), sys.argv[3:])\n"
CANARY = "canary-4f1c-9d2e-77aa"


def printed(job):
    """(the digest that the first pod printed, what the recipe printed)."""
    lines = job.pods[0].output.splitlines()
    digest = next(line for line in lines if " sha256 " in line).split("sha256 ")[1].split(",")[0]
    return digest, next(line for line in lines if line.startswith("read "))


@EMULATED
def test_again_launches_exactly_that_whatever_lies_here_now(here):
    here.recipe(SHOWS, yaml="train:\n  steps: 3\n  rate: 1.0e-05\n  when: '12:00:00'\nrun:\n  env:\n    env_vars: {A: b}\n")
    first = here.launch("train.steps=7", "--", "--seed", "1")
    assert first.code == 0, first.err
    before = printed(here.job)
    here.recipe("raise SystemExit('another')", yaml="other: 1\n")
    again = here.main("again", first.run)
    assert again.code == 0 and printed(here.job) == before, again.out + again.err
    assert "files of run %s" % first.run in again.out and len(here.jobs) == 2
    shutil.rmtree(here.root)  # nor is it needed
    onto = here.main("again", first.run, "train.steps=9", "run.env.env_vars.A=c", "--nodes", "2", "--detach")
    assert onto.code == 0, onto.err
    here.job.wait("Completed")
    digest, read = printed(here.job)
    assert digest == before[0] and "'steps': 9" in read and "--seed" in read and len(here.job.pods) == 2
    said = here.main("status", onto.run).out
    assert "the tree and config of run %s again" % first.run in said and "train.steps=9" in said
    twice = here.main("again", onto.run)
    assert twice.code == 0 and printed(here.job) == (digest, read)


@EMULATED
def test_secrets_by_value_are_taken_from_the_environment_again(here):
    """Those of the profile, and those that the command line named."""
    here.profile('[secrets]\nMY_TOKEN = "env"\n')
    here.recipe("import os\nprint('read', len(os.environ['MY_TOKEN']), len(os.environ['OTHER_TOKEN']))\n")
    for name in ("MY_TOKEN", "OTHER_TOKEN"):
        here.monkeypatch.setenv(name, "0815-first-")
    first = here.launch("run.env.secrets.OTHER_TOKEN=env")
    assert printed(here.job)[1] == "read 11 11", first.err
    here.monkeypatch.setenv("OTHER_TOKEN", "0815-another-")
    again = here.main("again", first.run)
    assert again.code == 0 and printed(here.job)[1] == "read 11 13", again.err
    here.monkeypatch.delenv("OTHER_TOKEN")
    assert "OTHER_TOKEN is not set" in here.main("again", first.run).err


@EMULATED
def test_the_pods_leave_the_record_beside_their_logs(here):
    here.recipe(SHOWS, yaml="train: {steps: 3}\n")
    first = here.launch("train.steps=4")
    folder = here.volume / "airlift/nano3/runs" / first.run
    record = json.loads((folder / "run.json").read_text())
    assert record["made"]["words"] == ["nano3", "sft", here.kind, "train.steps=4"]
    assert record["tree"]["sha256"] == printed(here.job)[0] and record["command"]
    assert "steps: 4" in (folder / "config.yaml").read_text()
    assert {(folder / name).stat().st_mode & 0o777 for name in ("run.json", "config.yaml")} == {0o600}
    here.recipe(SHOWS, yaml="api_key: %s\n" % CANARY)
    folder = folder.parent / here.launch().run
    assert (folder / "run.json").exists() and not (folder / "config.yaml").exists()


@EMULATED
def test_again_on_another_platform_gives_the_same_digest(tmp_path, monkeypatch, capsys):
    halves = [cloud(kind, tmp_path / kind, monkeypatch, capsys) for kind in PLATFORMS]
    for kind in PLATFORMS:
        (tmp_path / kind).mkdir()
    one = next(halves[0])
    one.recipe(SHOWS, yaml="train: {steps: 3}\n")
    first = one.launch()
    digest = printed(one.job)[0]
    other = next(halves[1])
    monkeypatch.setenv("AIRLIFT_HOME", str(one.place / "airlift"))
    shutil.copy(one.folder / "lepton.toml", other.folder)
    again = other.main("again", first.run, "dgxcloud")
    assert again.code == 0 and printed(other.job)[0] == digest, again.err
    for half in halves:
        next(half, None)


@EMULATED
def test_no_secret_is_in_any_of_it(here):
    """Of the words, the config, the profile, the environment, and what was sent by value."""
    here.monkeypatch.setenv("MY_TOKEN", CANARY + "-value")
    here.profile('[secrets]\nMY_TOKEN = "env"\n[env_vars]\nSOME_PASSWORD = "%s-profile"\n' % CANARY)
    here.recipe(SHOWS, yaml="service:\n  api_key: %s-config\n" % CANARY)
    first = here.launch("+hub.token=%s-word" % CANARY, "--", "--password=%s-arg" % CANARY)
    assert first.code == 0, first.err
    for words in (["status", first.run, "--json"], ["status", first.run], ["diff", first.run],
                  ["fetch", first.run, here.place / "there"]):
        done = here.main(*words)
        assert done.code == 0 and CANARY not in done.out + done.err, words
    held = [path for path in [*(here.place / "airlift").rglob("*"), *(here.place / "there").rglob("*")]
            if path.is_file() and "tree" not in path.relative_to(here.place).parts[:2]]
    assert len(held) > 4
    for path in held:
        data = path.read_bytes()
        for each in (data, zlib.decompress(data) if path.suffix in (".made", ".files") else b""):
            assert CANARY.encode() not in each, path
    again = here.main("again", first.run)
    assert again.code == 2 and "launched with a secret that is not kept" in again.err and "fetch" in again.err


@EMULATED
def test_adopted_by_another_home(here):
    here.recipe(SHOWS, yaml="train: {steps: 3}\n")
    first = here.launch("--detach", "--nodes", "2")
    here.job.wait("Completed")
    name, before = here.job.name, printed(here.job)
    here.monkeypatch.setenv("AIRLIFT_HOME", str(here.place / "another"))
    assert name in here.main("adopt", here.kind).out
    done = here.main("adopt", here.kind, name)
    assert done.code == 0 and "run %s of nano3/sft" % first.run in done.out, done.err
    assert here.main("adopt", here.kind, name).err.startswith("airlift: run %s is here already" % first.run)
    assert " done " in here.main("status", first.run).out and "read " in here.main("logs", first.run).out
    assert here.main("fetch", first.run, here.place / "there").code == 0
    again = here.main("again", first.run)
    assert again.code == 0 and printed(here.job) == before and "api object" in again.out.lower(), again.err
    assert "was adopted" in here.main("diff", first.run).err
    assert here.main("diff", first.run, again.run).out.count("the files are the same") == 1


@EMULATED
@pytest.mark.parametrize("word", ["run.env.secrets.MY_TOKEN=env", "run.env.visibility=public", "run.env.labels.a=b",
                                  "run.env.notify=evil"])
def test_what_the_words_of_another_person_set_is_not_believed(here, word):
    """As in a YAML: whom we talk to, what is sent and what runs here is this person's alone."""
    here.monkeypatch.setenv("MY_TOKEN", "a-token-of-theirs-0815")
    (here.place / "home").mkdir(exist_ok=True)
    here.recipe(SHOWS)
    done = here.launch(word, "--detach")
    if "visibility" in word and here.kind == "dgxcloud":
        return
    assert done.code == 0, done.err
    here.monkeypatch.setenv("AIRLIFT_HOME", str(here.place / "another"))
    here.monkeypatch.setenv("MY_TOKEN", CANARY)
    assert here.main("adopt", here.kind, here.job.name).code == 0
    before = len(here.jobs)
    again = here.main("again", done.run)
    assert again.code == 2 and "run.env" in again.err and len(here.jobs) == before, again.err


@EMULATED
def test_a_job_that_goes_on_is_adopted_and_cancelled(here):
    run = here.up()
    name = here.job.name
    here.monkeypatch.setenv("AIRLIFT_HOME", str(here.place / "another"))
    assert here.main("adopt", here.kind, name).code == 0
    assert " running " in here.main("status", run).out
    assert "was cancelled" in here.main("cancel", run).out


@EMULATED
def test_what_a_platform_hides_or_changes_is_said(here):
    here.launch()
    entries = here.job.spec["envs" if here.kind == "lepton" else "environmentVariables"]
    chunk = next(entry for entry in entries if entry["name"] == "AIRLIFT_TREE_0000")
    here.monkeypatch.setenv("AIRLIFT_HOME", str(here.place / "another"))
    whole = chunk["value"]
    for value, words in (("", "do not have the digest"), (whole[:-4], "do not have the digest")):
        chunk["value"] = value
        done = here.main("adopt", here.kind, here.job.name)
        assert done.code == 2 and "the platform does not show what was sent" in done.err and words in done.err
    entries.remove(chunk)
    assert "is missing" in here.main("adopt", here.kind, here.job.name).err
    del entries[:]
    assert "carries no source" in here.main("adopt", here.kind, here.job.name).err
    assert here.main("adopt", here.kind, "nobody-abcdef").code == 4
    assert runs.all_runs() == ([], [])


@QUIET
@given(seed=st.integers(0, 10**9))
def test_what_anyone_sends_is_adopted_or_refused(seed, home):
    """Descriptions of other shapes, in chunks that are right."""
    import random
    pick = random.Random(seed)
    odd = [None, 3, "x", "../../x", [], {}, ["a"], {"a": 1}, "x" * 50, "a" * 5, True, -1, "***"]
    tar = transport.pack(a_tree())
    sent = {"run": "abc234", "recipe": "nano3/sft", "nodes": 1, "script": "src/p/a.py", "launch": "direct", "config": "a: 1\n",
            "env": {}, "defaults": {}, "setup": [], "command": "true", "tree": {
                "sha256": hashlib.sha256(tar).hexdigest(), "files": 3, "compression": "gz"}, "made": {"words": ["a"]}}
    for _ in range(pick.randint(0, 3)):
        inner = pick.choice([sent, sent.get("made") if isinstance(sent.get("made"), dict) else sent])
        inner[pick.choice([*sent, *archive.Made.__annotations__])] = pick.choice(odd)
    env = transport.stream("TREE", transport.compress(tar, "gz"), 1000) | transport.stream(
        "JOB", zlib.compress(json.dumps(sent).encode()), 1000)
    try:
        run = archive.adopted(archive.from_env(env, {}, 0.0), "p", "lepton")
    except Refusal:
        return
    made, _ = run.made() if run.came else runs.load_run(run.id).made()
    assert archive.command_line(run, made) and list(archive.story(run, made)) and archive.how_to(run, made)
    run.forget()


def test_a_source_that_grows_without_end(home, monkeypatch):
    monkeypatch.setattr(archive, "WIDEST", 1 << 20)
    bomb = b"\0" * (4 << 20)
    for data in (lzma.compress(bomb), zlib.compress(bomb), transport.compress(bomb, "gz")):
        with pytest.raises(Refusal, match="grows beyond"):
            archive._require_bounded(data)
    archive._require_bounded(zlib.compress(b"x" * 1000))
    archive._require_bounded(b"no such thing")


# ---------------------------------------------------------------- fetch and diff


@EMULATED
def test_fetch_is_whole_or_not_at_all(here):
    here.recipe(SHOWS, yaml="train: {steps: 3}\n")
    (here.root / "src/nemotron/recipes/nano3/sft/a ü\n.py").write_text("x = 1\n")
    (here.root / "src/nemotron/recipes/nano3/sft/run.sh").write_text("#!/bin/sh\n")
    (here.root / "src/nemotron/recipes/nano3/sft/run.sh").chmod(0o755)
    (here.root / "src/nemotron/recipes/nano3/sft/link").symlink_to("run.sh")
    first = here.launch()
    assert first.code == 0, first.err
    there = here.place / "there"
    there.mkdir()
    done = here.main("fetch", first.run, there)
    assert done.code == 0 and printed(here.job)[0] in done.out, done.err
    folder = there / "tree/src/nemotron/recipes/nano3/sft"
    assert (folder / "a ü\n.py").read_text() == "x = 1\n" and os.readlink(folder / "link") == "run.sh"
    assert (folder / "run.sh").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in there.iterdir()) == ["README.md", "config.yaml", "run.json", "tree"]
    assert here.main("fetch", first.run, there).err.startswith("airlift: %s is there" % there)
    from_it = here.main("nano3", "sft", here.kind, "--repo-root", there / "tree", "-c", there / "config.yaml")
    assert from_it.code == 0 and printed(here.job) == printed(here.jobs[0])
    write_out = archive.write_out
    here.monkeypatch.setattr(archive, "write_out", lambda tree, folder: (write_out(tree, folder), 1 / 0))
    assert here.main("fetch", first.run, here.place / "half").code == 2
    assert not [path for path in here.place.iterdir() if path.name.startswith("half")]


def test_another_program_that_writes_meanwhile_is_noticed(home, tmp_path, monkeypatch):
    packed = archive.packed(a_tree(), "xz")
    extract = archive.payload.extract

    def meddled(tar, folder):
        extract(tar, folder)
        Path(folder, "src/p/a.py").write_text("other")

    monkeypatch.setattr(archive.payload, "extract", meddled)
    with pytest.raises(Refusal, match="has the digest"):
        archive.write_out(packed, tmp_path / "x")


@EMULATED
def test_diff_shows_lines_config_and_settings(here):
    here.recipe("print(1)\n" + SHOWS, yaml="train: {steps: 3}\n")
    first = here.launch()
    here.recipe("print(2)\n" + SHOWS, yaml="train: {steps: 4}\n")
    here.profile(retries=1) if here.kind == "lepton" else here.profile(chunk_bytes=4096)
    second = here.launch("--detach")
    for words in (["diff", first.run], ["diff", first.run, second.run]):
        said = here.main(*words).out
        assert "\n-print(1)\n+print(2)\n" in said and "\n-  steps: 3\n+  steps: 4\n" in said, said
        assert '"retries": 1' in said if here.kind == "lepton" else '"chunk_bytes": 4096' in said
        few = here.main(*words, "--stat").out
        assert "train.py" in few and "print(1)" not in few
    assert here.main("diff").code == 2


@EMULATED
@pytest.mark.slow
def test_many_trees_come_back_from_the_platform(here):
    """Launched, the home deleted, adopted and fetched: each with the digest that its pods printed."""
    import random
    pick, digests = random.Random(7), {}
    folder = here.root / "src/nemotron/recipes/nano3/sft"
    for number in range(int(os.environ.get("AIRLIFT_MANY", "25"))):  # 200 by hand
        shutil.rmtree(here.root)
        here.recipe("pass", yaml="n: %d\n" % number)
        for each in range(pick.randint(0, 12)):
            path = folder / ("%s/%s" % (pick.choice(["a", "b ü", "c/d"]), pick.choice(["x", "y.py", "z\n", "é"]) + str(each)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pick.randbytes(pick.choice([0, 1, 100, 20_000])))
            path.chmod(pick.choice([0o644, 0o755]))
        done = here.launch("--detach")
        assert done.code == 0, done.err
        digests[here.job.name] = here.job
    here.monkeypatch.setenv("AIRLIFT_HOME", str(here.place / "another"))
    shutil.rmtree(here.place / "airlift")
    for name, job in digests.items():
        job.wait("Completed")
        digest = next(line for line in job.pods[0].output.splitlines() if " sha256 " in line).split("sha256 ")[1].split(",")[0]
        assert here.main("adopt", here.kind, name).code == 0
        fetched = here.main("fetch", name[-6:], here.place / "there" / name)
        assert fetched.code == 0 and digest in fetched.out, fetched.err


def test_a_tree_of_twenty_thousand_files(home, tmp_path):
    tree = Tree(tuple(sorted((Entry("src/p/%03d/%d.py" % (number % 300, number), b"x = %d\n" % number)
                              for number in range(20_000)), key=lambda entry: entry.path)))
    packed = archive.packed(tree, "gz")
    assert archive.keep(packed) == "" and archive.entries(archive.tree_of(a_run(packed.digest))).entries == tree.entries
    archive.write_out(packed, tmp_path / "out")
