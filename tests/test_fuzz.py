"""No input ends in a traceback: command line, profiles, env.toml, headers, configs, and what a pod reads.

AIRLIFT_FUZZ is the number of inputs of each test; `python -m pytest tests/test_fuzz.py -s` tells how many there were.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
import zlib
from pathlib import Path

import pytest
import support
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout import recipe, write
from support import toml

import launch
import prepare
import profiles
import recipes
import transport
from pod import entry, failures, payload, process
from transport import Refusal

MANY = int(os.environ.get("AIRLIFT_FUZZ", "0"))
TRIED: dict[str, int] = {}
REFUSED: dict[str, int] = {}


def fuzz(modest, many=800):
    """A test in two sizes: `modest` inputs always, `many` where the slow tests run; AIRLIFT_FUZZ replaces both."""
    def twice(test):
        quick = settings(deadline=None, max_examples=MANY or modest, suppress_health_check=list(HealthCheck))
        slow = settings(quick, max_examples=MANY or many)

        def run(world, size):
            (quick if size == "quick" else slow)(test)(world)

        return pytest.mark.parametrize("size", ["quick", pytest.param("slow", marks=pytest.mark.slow)])(run)
    return twice


def tried(name, refused):
    TRIED[name] = TRIED.get(name, 0) + 1
    REFUSED[name] = REFUSED.get(name, 0) + bool(refused)


def refusal(call, *args):
    """What the call refuses, in two plain lines; None if it does not. Anything else that it raises is a bug."""
    try:
        call(*args)
    except Refusal as found:
        assert found.what and found.fix and found.code in (2, 3)
        assert "Traceback" not in str(found)
        (found.what + found.fix).encode("utf-8", "backslashreplace")
        return found
    return None


@pytest.fixture(scope="module")
def world():
    """A checkout and profiles that all inputs share; nothing of this machine's environment is read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        root = Path(name).resolve() / "checkout"
        recipe(root, nodes=1, gpus=0, yaml="a: 1\nb: [1, {c: 2}]\nrun: {env: {}, wandb: {project: x}}\n")
        write(root / "profiles/local.toml", 'executor = "local"\n[env_vars]\nA = "b"\n')
        write(root / "profiles/docker.toml", 'executor = "docker"\n')
        write(root / "env.toml", "")
        patch.setattr(prepare, "HERE", root)
        patch.chdir(root)
        patch.setattr(profiles, "FOLDER", root / "profiles")
        patch.setattr(transport, "compress", lambda data, method: transport.lzma.compress(data, preset=0))
        patch.setenv("AIRLIFT_HOME", str(root / "home"))
        patch.setenv("NEMOTRON_ENV_FILE", str(root / "env.toml"))
        patch.chdir(root)
        yield root
    for kind, count in TRIED.items():
        print("%-14s %7d inputs, %d refused" % (kind, count, REFUSED[kind]))


# ---------------------------------------------------------------- words and TOML

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
WORDS = st.sampled_from([
    "nano3", "sft", "sft,sft", ",", "rl", "local", "docker", "nope", "list", "profiles", "files", "status", "logs",
    "cancel", "launch",
    "-c", "default", "./x.yaml", "/dev/null", "--config=", "--nodes", "--nodes=2", "2", "-1", "9" * 30, "--repo-root",
    ".", "..", "/", "--json",
    "--dry-run", "--all-ranks", "--", "---", "a=1", "a=[", "a.b=1", "b.0=2", "b=null", "run=1", "run.env=x",
    "run.env.nodes=3", "run.env.nodes=[",
    "run.wandb=x", "run.wandb.tags=3", "run.wandb.tags=[1,{}]", "run.env.mounts=3", "run.env.mounts=[[1]]",
    "run.env.env_vars={A: 1}", "run.env.env_vars={1: 2}",
    "run.env.env_vars={A: {}}", "run.env.secrets={A: b}", "run.env.workspace=x", "run.env.pvcs=[1]",
    "run.env.run_command={", "run.env.exclude=[a]", "run.env.unpack=x",
    "run.env.unpack=shared", "run.env.chunk_bytes=1", "run.env.rendezvous_timeout=x", "run.env.persistent_cache=/x",
    "run.env.scope=x",
    "a=${", "a=${x}", "a=${run.x}", "a=${run.env}", "a=${oc.env:X}", "artifacts=3", "=", "+a=1", "~a=1", "a==b",
    "a=!!python/object:x {}", "a=*x", "a=&x [*x]"])


@fuzz(100)
@given(st.sampled_from([[], ["nano3", "sft"], ["nano3", "sft", "docker"]]),
       st.lists(WORDS | TEXT.filter(lambda word: "\0" not in word), max_size=6))
def test_any_words(world, first, words):
    words = first + words
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        patch.setattr("sys.stdout", io.StringIO())
        try:
            code = launch.main(["--dry-run", *words])
        except SystemExit as done:
            assert done.code == 0 and {"-h", "--help"} & set(words)
            return
    assert code in (0, 2, 3) and len(said.getvalue().splitlines()) == (2 if code else 0), said.getvalue()
    assert "airlift: a bug" not in said.getvalue()
    tried("words", code)


SCALARS = st.one_of(TEXT, st.integers(-10, 2**70), st.booleans(), st.floats(), st.sampled_from(
    ["local", "docker", "slurm", "lepton", "gpu", "${env:GONE}", "${oc.env:A,${oc.env:B,x}}", "${oc.env:A,{", "p", "q",
     "xz", "a:b", "/x", "~",
     "${auto_mount:git+https://h/x@m,/x}", "${auto_mount:", "env"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(
    ["rl", "sft", "path", "mount_path", "nodes", "A"]), inner, max_size=3), max_leaves=6)
KEYS = st.sampled_from(sorted([*profiles.KEYS, *profiles.REFUSED, *profiles.UNUSED])) | TEXT
TABLE = st.dictionaries(KEYS, VALUES, max_size=4)
TOKENS = st.sampled_from(["[", "]", "[[", "]]", "executor", "=", '"local"', "'", '"""', "\n", "[stages.rl]", "[p]",
                          "[wandb]", ".", "{", "}", ",", "extends", '"p"', "#", "1",
                          "nan", "1979-05-27", "true", "\0", "\\u0000", "${env:X}", "﻿"])


def whole_profile(profile):
    """What a dry run makes of a profile."""
    found = profiles.load(profile, "sft")
    assert found.executor in transport.LIMITS
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        patch.setattr("sys.stdout", io.StringIO())
        code = launch.main(["nano3", "sft", profile, "--json", "--repo-root", os.getcwd()])
    assert "airlift: a bug" not in said.getvalue(), said.getvalue()
    assert code in (0, 2, 3) and len(said.getvalue().splitlines()) in (0, 2), said.getvalue()


@fuzz(150)
@given(st.lists(TOKENS | TEXT, max_size=15).map(" ".join) | st.binary(max_size=40), st.booleans())
def test_any_text_as_a_profile(world, text, in_env):
    data = text if isinstance(text, bytes) else text.encode()
    (world / ("env.toml" if in_env else "profiles/p.toml")).write_bytes(data)
    try:
        found = refusal(profiles.load, "p", "rl")
        refusal(profiles.names)
        refusal(profiles.section, "wandb")
        refusal(lambda: list(profiles.overview()))
    finally:
        (world / "env.toml").write_text("")
    tried("TOML text", found)


@fuzz(150)
@given(st.sampled_from(sorted(transport.LIMITS)) | SCALARS, TABLE, TABLE, st.dictionaries(
    st.sampled_from(["rl", "sft", "sft/x"]), TABLE | SCALARS, max_size=2), st.booleans(),
    st.dictionaries(KEYS, VALUES, max_size=2))
def test_any_tables_as_profiles(world, executor, table, parent, stages, in_env, wandb):
    """p extends q; either may be a file or a section."""
    needed = {"account": "a", "partition": "p", "remote_job_dir": "/j"} if executor == "slurm" else {
        "node_group": "g", "resource_shape": "s"} if executor == "lepton" else {
        "base_url": "u", "client_id": "i", "client_secret": "s", "project_name": "p"} if executor == "dgxcloud" else {}
    child = needed | {"executor": executor, "extends": "q"} | table | ({"stages": stages} if stages else {})
    texts = ["\n".join("%s = %s" % (json.dumps(key), toml(value)) for key, value in each.items()) for each in (child,
                                                                                                               parent)]
    try:
        (world / "profiles/q.toml").write_text(texts[1], errors="replace")
        if in_env:
            (world / "env.toml").write_text("[p]\n%s\n[wandb]\n%s\n[artifacts]\nroot = 'x'\n" % (texts[0], "\n".join(
                "%s = %s" % (json.dumps(key), toml(value)) for key, value in wandb.items())), errors="replace")
        else:
            (world / "profiles/p.toml").write_text(texts[0], errors="replace")
        found = refusal(whole_profile, "p")
    finally:
        (world / "env.toml").write_text("")
    tried("TOML tables", found)


# ---------------------------------------------------------------- headers and configs

LINES = st.sampled_from(["[tool.runspec]", 'name = "nano3/sft"', "name = 3", "[tool.runspec.run]", 'launch = "ray"',
                         'cmd = "{script} {config}"',
                         'cmd = "{"', "[tool.runspec.resources]", "nodes = 2", "nodes = true", 'gpus_per_node = "gpu"',
                         "[tool.runspec.config]",
                         'dir = "/"', 'default = "x"', "[tool.runspec.env]", "A = 1", '"" = 2', "[[tool.runspec]]",
                         "tool = 1", "run = 3", "///", "/// script", '"""', "\\"]) | TEXT
BYTES = st.binary(max_size=20).filter(lambda data: b"\n" not in data)


@fuzz(200)
@given(st.lists(LINES, max_size=10), st.lists(BYTES, max_size=2), st.sampled_from(["\n", "\r\n", "\r", ""]))
def test_any_header(world, lines, odd, end):
    path = world / "src/nemotron/recipes/nano3/sft/fuzzed.py"
    text = "".join("# %s%s" % (line, end) for line in ["/// script", *lines, "///"])
    try:
        path.write_bytes(text.encode("utf-8", "replace") + b"\n".join(odd))
        found = refusal(recipes.read_header, world, path)
        recipes.scan(world)
        refusal(recipes.find, world, "nano3/sft")
    finally:
        path.unlink()
    tried("headers", found)


YAML = st.sampled_from(["a", ":", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&x ", "*x", "!!python/object:os.system",
                        "!!binary ", "<<: ", "| ", "? ", "run", "env",
                        "defaults", "defaults: [_self_]", "run: {env: {nodes: ", "mounts", "${", "${run.env}",
                        "${oc.env:PWD}", "/nemo_run/code", "1e3", "0x1", "1:30", "~", "null",
                        "'", '"', "\\", "\t", "---\n", "...\n", "%YAML 9\n", "\u0085", "2001-01-01", ".inf",
                        "artifacts", "wandb: ", "tags"])


@fuzz(150)
@given(st.lists(YAML | TEXT, max_size=14).map("".join) | st.binary(max_size=30))
def test_any_text_as_a_config(world, text):
    path = world / "fuzzed.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        patch.setattr("sys.stdout", io.StringIO())
        code = launch.main(["nano3", "sft", "docker", "-c", str(path), "--json"])
    assert code in (0, 2, 3) and "airlift: a bug" not in said.getvalue(), said.getvalue()
    assert len(said.getvalue().splitlines()) == (2 if code == 2 else 0)
    tried("YAML text", code)


YAML_VALUES = st.recursive(st.none() | SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    TEXT | st.sampled_from([*sorted(profiles.KEYS), "env", "wandb", "tags", "A"]), inner, max_size=3), max_leaves=8)


@fuzz(100)
@given(st.dictionaries(st.sampled_from(sorted(profiles.KEYS)) | TEXT, YAML_VALUES, max_size=3), YAML_VALUES,
       st.sampled_from(["local", "docker"]))
def test_any_run_section(world, env, wandb, profile):
    import yaml

    path = world / "fuzzed.yaml"
    path.write_text(yaml.safe_dump({"run": {"env": env, "wandb": wandb}, "x": "${run.wandb}"}), encoding="utf-8")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        patch.setattr("sys.stdout", io.StringIO())
        code = launch.main(["nano3", "sft", profile, "-c", str(path), "--json"])
    assert code in (0, 2, 3) and "airlift: a bug" not in said.getvalue(), said.getvalue()
    tried("run sections", code)


# ---------------------------------------------------------------- the pod

NAMES = st.sampled_from(["AIRLIFT_NODES", "NODE_RANK", "RANK", "PET_NODE_RANK", "LEPTON_JOB_WORKER_INDEX",
                         "SLURM_NODEID", "MASTER_ADDR",
                         "MASTER_PORT", "SLURM_JOB_NODELIST", "SLURM_JOB_ID", "TMPDIR", "LEPTON_JOB_FAILURE_COUNT",
                         "AIRLIFT_TREE_CHUNKS",
                         "AIRLIFT_JOB_SHA256", "AIRLIFT_JOB_0000", "AIRLIFT_TREE_0001", "AIRLIFT_TREE_0000",
                         "LEPTON_SUBDOMAIN",
                         "LEPTON_JOB_WORKER_PREFIX", "PATH"]) | st.text("AIRLFT_0", min_size=1, max_size=12)
SAID = TEXT.filter(lambda text: "\0" not in text) | st.sampled_from(
    ["0", "1", "-1", "2", "9" * 30, "１", " 1 ", "dgx[007-009,012],login", "r[1-2", "[", "]", "a,b", "/tmp", "/proc/x",
     "\udcff"])
ODD = st.recursive(st.none() | st.booleans() | st.integers(-5, 2**40) | TEXT | st.floats(allow_nan=False)
                   | st.sampled_from(["pods", "platform"]), lambda inner:
                   st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5)
FIELDS = ["run", "recipe", "script", "launch", "nodes", "run_root", "config", "env", "setup", "command", "tool",
          "workdir", "tree", "clones",
          "folders", "unpack", "shared", "keep", "patience", "cluster"]


def started(child, script, env, log, ready):
    """In place of bash: the recipe has been started, and was done."""
    assert "\0" not in script + "".join([*env, *env.values()])
    os.write(ready, b"x")
    os.close(ready)
    return 0


def pod_ends(env, scratch):
    """The exit code of entry.main in this process, up to where it would start bash; all that it wrote."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (entry, failures, process):
            patch.setattr(module, "say", lambda text, to=1: written.append(text))
        patch.setattr(process.Child, "__init__", lambda self: setattr(self, "process", None) or setattr(self, "signal", 0))
        patch.setattr(process.Child, "run", started)
        patch.setattr(entry.sys, "argv", ["pod_py"])
        for name in list(os.environ):
            patch.delenv(name)
        for name, value in {"TMPDIR": str(scratch), **env}.items():
            patch.setenv(name, value)
        code = entry.main()
    return code, "\n".join(written)


def check_pod(name, env, scratch):
    before = sorted(os.listdir(scratch.parent))
    code, said = pod_ends(env, scratch)
    assert "Traceback" not in said and code != failures.INTERNAL, said
    assert code in failures.FAILURES or code == 0, said
    assert sorted(os.listdir(scratch.parent)) == before  # nothing beside it
    tried(name, code)
    return code


def scratch_of(world):
    folder = Path(tempfile.mkdtemp(dir=world, prefix="pod-"))
    (folder / "scratch").mkdir()
    return folder / "scratch"


def sent(**changes):
    return support.plan(**changes).env


@fuzz(200)
@given(st.dictionaries(NAMES, SAID, max_size=5), st.sampled_from([1, 2, 3]))
def test_any_environment_of_a_pod(world, odd, nodes):
    env = sent(nodes=nodes) | {name: value for name,
                               value in odd.items() if name != "TMPDIR" or value.startswith("/proc")}
    check_pod("pod env", env, scratch_of(world))


def described(job, tar=None):
    """The environment of a pod with that description, right digests and all."""
    data = support.plan()
    env = dict(data.env) | transport.stream("JOB", zlib.compress(json.dumps(job).encode()), 4096)
    if tar is not None:
        env |= transport.stream("TREE", transport.lzma.compress(tar), 98_304)
    return env


def good_job():
    whole = support.plan()
    job = json.loads(zlib.decompress(payload.join(whole.env, "JOB")))
    return job


@fuzz(200)
@given(st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3), st.lists(st.sampled_from(FIELDS), max_size=2), ODD,
       st.booleans())
def test_descriptions_of_the_wrong_shape(world, changes, gone, other, replaced):
    job = {key: value for key, value in (good_job() | changes).items() if key not in gone}
    text = "".join(str(changes.get(name, "")) for name in ("run", "run_root", "folders", "shared"))
    if "/" in text or ".." in text:  # a description may name any place; the digest says that it is ours
        job = good_job()
    check_pod("descriptions", described(other if replaced else job), scratch_of(world))


PATHS = st.sampled_from(["src/a", "src/a/b", "/abs", "../out", "src/../../out", "src", "src/./a", "", ".", "src//a",
                         "a" * 300, "src/caf\udce9", "src/\n",
                         "src/link/x", "src/link", support.SCRIPT]) | TEXT.map(lambda text: "src/" + text)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                         tarfile.CHRTYPE,
                         tarfile.BLKTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE])
TARGETS = st.sampled_from(["a", "/etc", "../../../out", "..", ".", "link", "", "x" * 300])
MEMBERS = st.lists(st.tuples(PATHS, KINDS, TARGETS, st.binary(max_size=10), st.sampled_from([None, 2**40, -1, 5])),
                   max_size=6)


def hostile(members, cut):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for path, kind, target, data, size in members:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = kind, target
            info.mode, info.size = 0o7777, len(data) if kind == tarfile.REGTYPE else 0
            start = buffer.tell()
            tar.addfile(info, io.BytesIO(data))
            if size is not None and size >= 0:  # the header lies about the size
                info.size = size
                head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:]
                here = buffer.tell()
                buffer.seek(start)
                buffer.write(head)
                buffer.seek(here)
    return buffer.getvalue()[: cut or None]


@fuzz(200)
@given(MEMBERS | st.binary(max_size=600), st.sampled_from([0, 0, 0, 100, 513, 700]))
def test_hostile_tars(world, members, cut):
    tar = members if isinstance(members, bytes) else hostile(members, cut)
    scratch = scratch_of(world)
    job = good_job() | {"tree": {"sha256": hashlib.sha256(tar).hexdigest(), "files": 1, "compression": "xz"}}
    code = check_pod("tars", described(job, tar), scratch)
    for path in scratch.rglob("*"):
        assert not path.is_symlink() or path.is_relative_to(scratch)
        assert path.is_symlink() or path.is_dir() or path.is_file(), path
        assert path.is_symlink() or not path.stat().st_mode & 0o7000, path
    if code in (failures.PAYLOAD, failures.PLACE):
        assert not list(scratch.glob("airlift-*/code"))


@fuzz(100)
@given(st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=2), st.lists(st.sampled_from(FIELDS), max_size=1),
       st.binary(max_size=30) | st.none())
def test_manifests_of_the_wrong_shape(world, changes, gone, text):
    """As on Slurm: the tree lies beside it as one file."""
    folder = scratch_of(world)
    path = folder / "airlift.json"
    good = transport.files(support.plan(), support.job())
    for name, data in good.items():
        (folder / name).write_bytes(data)
    job = {key: value for key, value in (json.loads(good["airlift.json"]) | changes).items() if key not in gone}
    if any("/" in str(value) or ".." in str(value) for value in changes.values()):
        job = json.loads(good["airlift.json"])
    path.write_bytes(json.dumps(job).encode() if text is None else text)
    with pytest.MonkeyPatch.context() as patch:
        written = []
        for module in (entry, failures, process):
            patch.setattr(module, "say", lambda text, to=1: written.append(text))
        patch.setattr(process.Child, "__init__", lambda self: setattr(self, "process", None) or setattr(self, "signal", 0))
        patch.setattr(process.Child, "run", started)
        patch.setattr(entry.sys, "argv", ["pod.py", str(path), hashlib.sha256(path.read_bytes()).hexdigest()])
        patch.setenv("TMPDIR", str(folder))
        code = entry.main()
    assert "Traceback" not in "\n".join(written) and (code == 0 or code in set(failures.FAILURES) - {failures.INTERNAL}), written
    tried("manifests", code)
