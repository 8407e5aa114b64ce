"""pod.py, as it is shipped: real processes, started by a plan's argv in a plan's environment."""

import ast
import contextlib
import fnmatch
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MARKS, PATH, SCRIPT, job, need, plan, plant, pythons, ran, shape, shape_of, started, tmpfs, tree

import configs
import pod
import transport
from pod import Failure, find_master, find_rank, first_host
from transport import collect, plan_for

ROOT = Path(pod.__file__).parent
ENDED = "airlift: rank %s ended with exit code %d\n"


def failed(code: int, out: "Any", rank: str = "0") -> str:
    """Check what every failure of pod.py's own must say, and give the sentence that tells what was seen."""
    assert "Traceback" not in out.text, out.text
    assert "RECIPE RAN" not in out.text, out.text
    lines = out.text.splitlines()
    if code == pod.POD and "what to do" not in out.text:  # the bootstrap's own words
        assert lines == ["airlift: the program that unpacks did not arrive whole",
                         "airlift: rank unknown ended with exit code 80"]
        return lines[0]
    what, fix = pod.FAILURES[code]
    assert out.text.endswith(ENDED % (rank, code)), out.text
    assert lines[-2] == "airlift: what to do: " + fix
    start = "airlift: rank %s: %s: " % (rank, what)
    assert lines[-3].startswith(start), out.text
    return lines[-3][len(start):]


# ---------------------------------------------------------------- the round trip


def usual(name: str) -> bool:
    """Whether a name is none that collect leaves out, so that the whole tree must come back."""
    return (name not in (".", "..", *transport.COLLECTIONS, *transport.CACHES) and len(name.encode()) <= 255
            and not name.endswith((*transport.CACHE_SUFFIXES, *transport.DATA_SUFFIXES))
            and not transport._named_secret(name)
            and name not in transport.CREDENTIAL_FOLDERS and name != "pyvenv.cfg"
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in transport.DOCUMENTS))


NAMES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\0"), min_size=1, max_size=10),
    st.sampled_from(["a", "b", " ", "-rf", "$(id)", "'\"", "\n", "名前", "e\u0301", "é", "..a", "x" * 255, "\U0001f680",
                     "*", "\\"]),
).filter(usual)
CONTENTS = st.one_of(st.just(b""), st.binary(max_size=200), st.binary(min_size=1, max_size=4).map(lambda b: b * 5000)
                     ).filter(lambda data: not transport.looks_secret(data))
MODES = st.one_of(st.sampled_from([0o644, 0o755, 0o600, 0o700]),
                  st.integers(0o400, 0o7777).map(lambda mode: mode | 0o400))


Files = dict[str, tuple[bytes, int]]  # path -> bytes and mode
Links = dict[str, tuple[str, bool]]  # path -> the path that it leads to, and whether by an absolute link


@st.composite
def trees(draw: Any) -> tuple[Files, Links]:
    """What may lie on somebody's disk. In all of it is the recipe's script."""
    files: Files = {SCRIPT: (b"pass\n", 0o644)}
    folders = ["src"]
    for _ in range(draw(st.integers(0, 12))):
        parts = draw(st.lists(NAMES, min_size=1, max_size=7))
        path = draw(st.sampled_from(folders)) + "/" + "/".join(parts)
        above = {"/".join(path.split("/")[:end]) for end in range(1, path.count("/") + 1)}
        if path in folders or path in files or above & files.keys() or len(path.encode()) > 900:
            continue
        files[path] = (draw(CONTENTS), draw(MODES))
        folders += sorted(above - set(folders))
    links = {}
    for name in draw(st.lists(NAMES, max_size=3)):
        path = draw(st.sampled_from(folders)) + "/" + name
        if path not in files and path not in folders and path not in links:
            links[path] = (draw(st.sampled_from([*folders, *files])), draw(st.booleans()))
    return files, links


def write(root: Path, files: Files, links: Links) -> None:
    for path, (data, mode) in files.items():
        plant(root, {path: data})
        (root / path).chmod(mode)
    for path, (target, absolute) in links.items():
        (root / path).symlink_to(root / target if absolute else os.path.relpath(target, os.path.dirname(path)))


def expected(files: Files, links: Links) -> dict[str, tuple[str, bytes, bool]]:
    found = {path: ("file", data, bool(mode & 0o100)) for path, (data, mode) in files.items()}
    for path, (target, _) in links.items():
        found[path] = ("link", os.path.relpath(target, os.path.dirname(path)).encode(), False)
    return found


@settings(max_examples=15)
@given(trees(), st.sampled_from([("local", 0), ("dgxcloud", 0), ("local", 1024)]), st.sampled_from(["xz", "gz"]))
def test_any_tree_comes_back_from_a_real_exec(made: Any, carrier: tuple[str, int], compression: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        write(here / "repo", *made)
        before = shape(here / "repo")
        whole = plan_for(carrier[0], collect(here / "repo", SCRIPT), job(), chunk_bytes=carrier[1],
                         compression=compression)
        assert whole.fits
        code, out = ran(whole, here / "scratch")
        assert (code, out.text) == (0, "airlift: rank 0 of 1, sha256 %s, %d files in %s\n" % (
            whole.digest, len(expected(*made)), out.code) + ENDED % ("0", 0))
        assert shape(out.code) == expected(*made)
        assert shape(here / "repo") == before, "the source is only read"
        assert sorted(path.name for path in out.places[0].iterdir()) == ["code", "config.yaml", "output"]


@given(trees(), st.integers(16, 3000))
def test_any_tree_comes_back_in_this_process(made: Any, size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        write(here, *made)
        found = collect(here, SCRIPT)
        assert shape_of(found) == expected(*made)
        tar = transport.pack(found)
        env = transport.stream("TREE", transport.compress(tar, "gz"), size)
        assert pod.decompress(pod.join(env, "TREE"), "gz") == tar
        pod.unpack(tar, name + "/code")
        assert shape(name + "/code") == expected(*made)
        assert pod.holds(name + "/code", tar)


def test_a_large_tree_through_the_largest_environment(tmp_path: Path) -> None:
    """1.1 MB that do not compress: 15 chunks of 96 KiB, or 160 of 9 KiB."""
    files = {"src/noise%d" % number: random.Random(number).randbytes(275_000) for number in range(4)}
    for executor in ("lepton", "dgxcloud"):
        whole = plan(files, executor)
        assert whole.fits and whole.chunks == {"lepton": 15, "dgxcloud": 160}[executor]
        code, out = ran(whole, tmp_path / executor)
        assert code == 0 and shape(out.code) == shape_of(tree(files))


@pytest.mark.parametrize("how", ["sh", "sh unquoted words", "split"])
def test_started_through_a_shell_or_a_split(tmp_path: Path, how: str) -> None:
    whole = plan()
    argv = {"sh": ["sh", "-c", shlex.join(whole.argv)], "split": " ".join(whole.argv).split(),
            "sh unquoted words": ["sh", "-c", 'exec "$@"', "sh", *shlex.split(" ".join(whole.argv))]}[how]
    code, out = ran(whole, tmp_path, argv=argv)
    assert code == 0 and shape(out.code) == shape_of(tree())


def test_the_recipe_is_started_from_the_code_root(tmp_path: Path) -> None:
    files = {SCRIPT: b"import kit, sys; print('RECIPE', sys.argv[1:], kit.NAME)",
             "src/kit/__init__.py": b"NAME = 'kit 7'"}
    code, out = ran(plan(files, command='python "$AIRLIFT_CODE"/%s --config "$AIRLIFT_CONFIG"' % SCRIPT), tmp_path)
    assert code == 0
    assert "RECIPE ['--config', '%s/airlift-t23456/config.yaml'] kit 7\n" % tmp_path in out.text
    assert (out.code.parent / "config.yaml").read_text() == "answer: 42\n"
    assert (out.code.parent / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert out.code.parent.stat().st_mode & 0o777 == 0o700, "a config may say what is nobody's business"


def test_files_of_the_folder_it_is_started_in_are_not_taken_for_pythons_own(tmp_path: Path) -> None:
    names = ("zlib", "json", "tarfile", "socket", "subprocess", "hashlib", "base64")
    plant(tmp_path / "workdir", {name + ".py": "raise SystemExit('wrong %s')" % name for name in names})
    code, out = ran(plan(), tmp_path / "scratch", cwd=tmp_path / "workdir")
    assert code == 0, out.text


@pytest.mark.parametrize("locale", [
    {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LANG": "de_DE.ISO-8859-1"},
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONOPTIMIZE": "2"}, {"PYTHONSAFEPATH": "1"}, {"PYTHONWARNINGS": "error"},
], ids=str)
def test_names_are_utf8_whatever_the_image_says(tmp_path: Path, locale: dict[str, str | None]) -> None:
    files = {"src/größe/データ.txt": b"x"}
    code, out = ran(plan(files), tmp_path / "Ablage für データ", env=locale)
    assert code == 0, out.text
    assert shape(out.code) == shape_of(tree(files))
    assert "Ablage" in out.text


# ---------------------------------------------------------------- damage


def damaged(whole: transport.Plan, stream: str, kind: str) -> dict[str, str | None]:
    """What to change in the environment (None: take out), so that one stream does not arrive whole."""
    names = sorted(name for name in whole.env if re.fullmatch("AIRLIFT_%s_[0-9]+" % stream, name))
    assert len(names) >= 3, "a swap needs several chunks"
    first, second, last = names[0], names[1], names[-1]
    value = whole.env[first]
    after = "AIRLIFT_%s_%04d" % (stream, len(names))
    digest = "AIRLIFT_%s_SHA256" % stream
    count = "AIRLIFT_%s_CHUNKS" % stream
    return {
        "drop first": {first: None}, "drop last": {last: None}, "drop all": dict.fromkeys(names),
        "truncate": {first: value[:-1]}, "truncate last": {last: whole.env[last][:-4]}, "empty": {second: ""},
        "swap": {first: whole.env[second], second: value},
        "flip case": {first: value[:7] + value[7:].swapcase()}, "flip bit": {first: chr(ord(value[0]) ^ 1) + value[1:]},
        "eighth bit": {first: "\udcc1" + value[1:]}, "unicode": {first: "é" + value[1:]},
        "twice": {after: whole.env[last]}, "first twice": {after: value}, "empty one more": {after: ""},
        "rename": {last: None, after: whole.env[last]}, "rename far": {last: None, last[:-4] + "0999": whole.env[last]},
        "short name": {last: None, last[:-4] + "%d" % (len(names) - 1): whole.env[last]},
        "newline": {first: value + "\n"}, "blank": {last: whole.env[last] + " "},
        "digest": {digest: "0" * 64}, "no digest": {digest: None}, "digest of another": {
            digest: whole.env["AIRLIFT_%s_SHA256" % ("JOB" if stream != "JOB" else "TREE")]},
        "count more": {count: str(len(names) + 1)}, "count less": {count: str(len(names) - 1)},
        "count zero": {count: "0"},
        "no count": {count: None}, "count huge": {count: "9" * 30}, "count word": {count: "three"},
        "count -1": {count: "-1"},
        "count in other digits": {count: "３"},
    }[kind]


DAMAGES = ["drop first", "drop last", "drop all", "truncate", "truncate last", "empty", "swap", "flip case", "flip bit",
           "eighth bit", "unicode", "twice", "first twice", "empty one more", "rename", "rename far", "short name",
           "newline",
           "blank", "digest", "no digest", "digest of another", "count more", "count less", "count zero", "no count",
           "count huge", "count word", "count -1", "count in other digits"]


@pytest.fixture(scope="module")
def in_pieces() -> transport.Plan:
    noise = random.Random(5)
    return plan({"src/noise": noise.randbytes(4000)}, chunk_bytes=1024, command="echo RECIPE RAN",
                config="x: %s\n" % noise.randbytes(3000).hex(), setup=["echo RECIPE RAN"])


@pytest.mark.parametrize("stream", ["POD", "JOB", "TREE"])
def test_a_stream_that_does_not_arrive_whole(in_pieces: transport.Plan, stream: str, tmp_path: Path) -> None:
    code = pod.POD if stream == "POD" else pod.PAYLOAD
    for number, kind in enumerate(DAMAGES[::3] if stream == "JOB" else DAMAGES):  # JOB and TREE share their code
        found, out = ran(in_pieces, tmp_path / str(number), env=damaged(in_pieces, stream, kind))
        assert found == code, (kind, out.text)
        rank = "?" if stream == "POD" and "what to do" in out.text else "0"
        seen = failed(code, out, rank)
        assert seen and len(seen) < 200, kind
        assert not out.places, "nothing was unpacked"
    code, out = ran(in_pieces, tmp_path / "whole")
    assert code == 0 and out.text.count("RECIPE RAN") == 2


@pytest.mark.parametrize("value", [None, "", "0", "-1", "two", "1.0", " ", "9" * 40, "１"])
def test_a_wrong_number_of_nodes(tmp_path: Path, value: str | None) -> None:
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path, env={"AIRLIFT_NODES": value})
    assert code == pod.PAYLOAD and "AIRLIFT_NODES" in failed(code, out, "?")


def test_a_tree_that_is_not_the_one_that_was_named(tmp_path: Path) -> None:
    """Each stream is whole, but the tree belongs to another launch."""
    one, other = plan({"src/a": b"1"}, command="echo RECIPE RAN"), plan({"src/a": b"2"})
    mixed = {name: value for name, value in other.env.items() if "_TREE_" in name}
    code, out = ran(one, tmp_path, env=mixed)
    assert code == pod.PAYLOAD and "digest" in failed(code, out) and not out.places


@settings(max_examples=15)
@given(st.data())
def test_any_change_of_our_variables_is_noticed(in_pieces: transport.Plan, data: st.DataObject) -> None:
    changes: dict[str, str | None] = {}
    for name in data.draw(st.lists(st.sampled_from(sorted(in_pieces.env)), min_size=1, max_size=3, unique=True)):
        value = in_pieces.env[name]
        at = data.draw(st.integers(0, len(value)))
        changes[name] = data.draw(st.sampled_from([None, "", value[:at], value[at:] + value[:at], value + value,
                                                   value + "A",
                                                   value[:at] + "\udcff" + value[at + 1:], value.lower(), value[::-1]]))
    same = all(in_pieces.env[name] == value for name, value in changes.items())
    with tempfile.TemporaryDirectory() as name:
        code, out = ran(in_pieces, Path(name), env=changes)
        if same:
            assert code == 0
        elif code == pod.RANK:  # AIRLIFT_NODES became another number
            failed(code, out, "?")
        elif code == 0:
            assert int(changes["AIRLIFT_NODES"] or 0) >= 1 and len(changes) == 1
        else:
            assert code in (pod.POD, pod.PAYLOAD), out.text
            assert "RECIPE RAN" not in out.text and "Traceback" not in out.text


@pytest.mark.parametrize("stream, data, code", [
    ("JOB", b"", pod.PAYLOAD), ("JOB", b"no zlib", pod.PAYLOAD), ("TREE", b"no xz", pod.PYTHON),
    ("TREE", b"", pod.PYTHON),
])
def test_streams_that_are_whole_but_nonsense(tmp_path: Path, stream: str, data: bytes, code: int) -> None:
    found, out = ran(plan(command="echo RECIPE RAN"), tmp_path, env=dict(transport.stream(stream, data, 1024)))
    assert found == code, out.text
    failed(code, out)


def test_a_stream_that_is_not_base64() -> None:
    import hashlib

    text = "====!"
    env = {"AIRLIFT_JOB_0000": text, "AIRLIFT_JOB_CHUNKS": "1",
           "AIRLIFT_JOB_SHA256": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(Failure, match="base64"):
        pod.join(env, "JOB")


@given(st.dictionaries(st.sampled_from(["CHUNKS", "SHA256", "0000", "0001", "00000", "x", ""]),
                       st.one_of(st.text(max_size=20), st.sampled_from(["1", "2", "0", "QUJD"]))))
def test_join_never_ends_in_a_traceback(parts: dict[str, str]) -> None:
    with pytest.raises(Failure) as caught:
        pod.join({"AIRLIFT_TREE_" + name: value for name, value in parts.items()}, "TREE")
    assert caught.value.code == pod.PAYLOAD


@pytest.mark.parametrize("name, kind", [
    ("../out", "file"), ("/abs", "file"), ("src/../../out", "file"), ("src/fifo", "fifo"), ("src/hard", "hard"),
    ("src/folder", "folder"),
])
def test_a_tar_that_leads_out(tmp_path: Path, name: str, kind: str) -> None:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type = {"file": tarfile.REGTYPE, "fifo": tarfile.FIFOTYPE, "hard": tarfile.LNKTYPE,
                     "folder": tarfile.DIRTYPE}[kind]
        tar.addfile(info)
    with pytest.raises(Failure) as caught:
        pod.unpack(buffer.getvalue(), str(tmp_path / "code"))
    assert caught.value.code == pod.PAYLOAD and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- rank

LEPTON = {"LEPTON_JOB_NAME": "j", "LEPTON_JOB_TOTAL_WORKERS": "3", "LEPTON_SUBDOMAIN": "j-job-svc",
          "LEPTON_JOB_WORKER_PREFIX": "worker", "LEPTON_JOB_WORKER_HOSTNAME_PREFIX": "worker"}
KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "PET_MASTER_ADDR": "job-master-0",
            "PET_MASTER_PORT": "23456", "JOB_NAME": "job", "POD_INDEX": "0"}
ELASTIC = {"PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_BACKEND": "c10d", "PET_NNODES": "3:3"}
SLURM = {"SLURM_JOB_NODELIST": "dgx[007-009]", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "3"}


@pytest.mark.parametrize("env, host, nodes, rank", [
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "0"}, "worker-0", 3, 0),
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "2"}, "j-worker-2.j-job-svc", 3, 2),
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "2"}, "j-2-x7f", 3, 2),
    (KUBEFLOW | {"RANK": "0", "PET_NODE_RANK": "0"}, "job-master-0", 3, 0),
    (KUBEFLOW | {"RANK": "1", "PET_NODE_RANK": "1"}, "job-worker-0", 3, 1),
    (KUBEFLOW | {"RANK": "2", "PET_NODE_RANK": "2", "POD_INDEX": "1"}, "job-worker-1.ns.svc", 3, 2),
    (KUBEFLOW, "job-master-0", 3, 0), (KUBEFLOW, "job-worker-1", 3, 2),
    ({"PET_MASTER_ADDR": "job-master-0"}, "job-worker-0", 2, 1),
    ({}, "job-worker-0", 3, 0), ({}, "job-worker-2", 3, 2), ({"POD_INDEX": "2"}, "my-job-worker-2", 3, 2),
    (ELASTIC, "job-worker-0", 3, 0), (ELASTIC, "job-worker-2", 3, 2),
    (SLURM | {"SLURM_NODEID": "0"}, "dgx007", 3, 0), (SLURM | {"SLURM_NODEID": "2"}, "dgx009", 3, 2),
    (SLURM | {"SLURM_NODEID": "0"}, "gpu-worker-7", 3, 0),
    (SLURM | {"SLURM_NODEID": "1", "PET_NODE_RANK": "1"}, "x", 3, 1),
    ({"NODE_RANK": "1"}, "anything", 2, 1), ({"NODE_RANK": " 1 "}, "x-worker-7", 2, 1),
    ({"NODE_RANK": "1", "RANK": "01"}, "job-worker-0", 2, 1),
    ({"NODE_RANK": ""}, "job-worker-1", 2, 1), ({"NODE_RANK": "", "RANK": "1"}, "x", 2, 1),
    ({}, "my-laptop", 1, 0), ({}, "gpu-worker-3", 1, 0), ({"NODE_RANK": "0"}, "x", 1, 0),
    ({"POD_INDEX": "0"}, "job-0-0", 1, 0),
])
def test_rank(env: dict[str, str], host: str, nodes: int, rank: int) -> None:
    assert find_rank(env, host, nodes) == rank


@pytest.mark.parametrize("env, host, nodes, word", [
    ({}, "my-laptop", 2, "no variable"), ({"POD_INDEX": "1"}, "x-1", 2, "no variable"),
    ({"NODE_RANK": ""}, "h", 2, "no variable"),
    ({"NODE_RANK": "0", "RANK": "1"}, "h", 2, "disagree"), ({"RANK": "0"}, "job-worker-1", 2, "disagree"),
    (KUBEFLOW | {"RANK": "0"}, "job-worker-0", 3, "disagree"),
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "1", "RANK": "0"}, "h", 3, "dis"),
    ({"SLURM_NODEID": "0", "PET_NODE_RANK": "1"}, "h", 2, "disagree"),
    ({"NODE_RANK": "2"}, "h", 2, "job has 2"), ({"NODE_RANK": "1"}, "h", 1, "job has 1"),
    ({}, "job-worker-2", 2, "job has 2"),
    ({"RANK": "1"}, "h", 1, "job has 1"), (KUBEFLOW, "job-worker-2", 3, "job has 3"),
    ({"NODE_RANK": "one"}, "h", 2, "not a number"), ({"RANK": "-1"}, "h", 2, "not a number"),
    ({"NODE_RANK": "1.0"}, "h", 2, "not a number"), ({"NODE_RANK": "٣"}, "h", 9, "not a number"),
    ({"NODE_RANK": "$SLURM_NODEID"}, "h", 2, "not a number"), ({"NODE_RANK": "9" * 50}, "h", 2, "not a number"),
])
def test_a_rank_that_is_not_certain(env: dict[str, str], host: str, nodes: int, word: str) -> None:
    with pytest.raises(Failure, match=re.escape(word)) as caught:
        find_rank(env, host, nodes)
    assert caught.value.code == pod.RANK


@pytest.mark.parametrize("env, master", [
    (LEPTON, ("worker-0.j-job-svc", "29400")), (LEPTON | {"MASTER_PORT": "7"}, ("worker-0.j-job-svc", "7")),
    (KUBEFLOW, ("job-master-0", "23456")), ({"PET_MASTER_ADDR": "m"}, ("m", "29400")),
    (SLURM, ("dgx007", "24567")), (SLURM | {"SLURM_JOB_ID": "7"}, ("dgx007", "20007")),
    (SLURM | {"MASTER_PORT": "1", "MASTER_ADDR": "m"}, ("m", "1")),
    (SLURM | {"SLURM_JOB_ID": "x"}, ("dgx007", "29400")),
    (SLURM | {"MASTER_PORT": "99"}, ("dgx007", "99")),
])
def test_where_rank_0_listens(env: dict[str, str], master: tuple[str, str]) -> None:
    assert find_master(env, 3) == master


def test_where_rank_0_listens_alone() -> None:
    address, port = find_master({}, 1)
    assert address == "127.0.0.1" and 1024 < int(port) < 65536
    assert find_master({"MASTER_ADDR": "m", "MASTER_PORT": "5"}, 1) == ("m", "5")


def test_nothing_tells_where_rank_0_is() -> None:
    for env in ({}, ELASTIC, {"SLURM_JOB_NODELIST": "[1-2"}, {"SLURM_JOB_NODELIST": ","}):
        with pytest.raises(Failure) as caught:
            find_master(env, 2)
        assert caught.value.code == pod.RANK


@pytest.mark.parametrize("nodelist, host", [
    ("dgx[007-009,012],login1", "dgx007"), ("n[1-2]", "n1"), ("a,b", "a"), ("a", "a"), ("n[3,5-7]", "n3"),
    ("a.b-c_d,e", "a.b-c_d"),
    ("rack[1-2]n[3,5]", "rack1n3"), ("n[1-2]-ib,m", "n1-ib"), ("n[08-10]", "n08"), ("login,dgx[1-2]", "login"),
])
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


PLATFORMS_WORDS = ["NODE_RANK", "RANK", "PET_NODE_RANK", "SLURM_NODEID", "LEPTON_JOB_WORKER_INDEX", "MASTER_ADDR",
                   "MASTER_PORT", "PET_MASTER_ADDR", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"]


@given(st.dictionaries(st.sampled_from(PLATFORMS_WORDS), st.one_of(st.text(max_size=8), st.sampled_from("012"))),
       st.text(max_size=12), st.integers(2, 9))
def test_the_platforms_words_never_end_in_a_traceback(env: dict[str, str], host: str, nodes: int) -> None:
    with contextlib.suppress(Failure):
        rank = find_rank(env, host, nodes)
        assert 0 <= rank < nodes
        said = [int(value) for name, value in env.items() if name in PLATFORMS_WORDS[:5] and value.strip().isdigit()]
        assert set(said) <= {rank}
        assert said or re.search("-(master|worker)-[0-9]", host), "never 0 by default"
    with contextlib.suppress(Failure):
        address, port = find_master(env, nodes)
        assert address and port


def test_a_rank_that_is_not_certain_ends_the_pod(tmp_path: Path) -> None:
    code, out = ran(plan(nodes=2, command="echo RECIPE RAN"), tmp_path, env={"NODE_RANK": "0", "RANK": "1"})
    assert code == pod.RANK
    assert failed(code, out, "?") == "sources disagree: NODE_RANK says 0, RANK says 1"
    assert not out.places
    code, out = ran(plan(nodes=2, command="echo RECIPE RAN"), tmp_path, env={"NODE_RANK": "1"})
    assert code == pod.RANK and "MASTER_ADDR" in failed(code, out, "1")


# ---------------------------------------------------------------- places


def places(run_root: str | None = "/ws/fam", tmp: str = "/tmp") -> pod.Places:
    return pod.Places(job(run_root=run_root), {"TMPDIR": tmp})


@pytest.mark.parametrize("text, filled", [
    ("/nemo_run", "ROOT"), ("/nemo_run/", "ROOT/"), ("/nemo_run/code", "CODE"), ("/nemo_run/code/", "CODE/"),
    ("/nemo_run/code/src/x", "CODE/src/x"), ("/nemo_run/out/x", "ROOT/out/x"), ("/nemo_run/codes", "ROOT/codes"),
    ("/nemo_run/code.bak", "ROOT/code.bak"), ("/nemo_run/code-1", "ROOT/code-1"),
    ("/nemo_run/code_x/y", "ROOT/code_x/y"),
    ("/nemo_run/codé", "ROOT/codé"), ("/nemo_run/x/code", "ROOT/x/code"),
    ("/nemo_run/code:/nemo_run:/x", "CODE:ROOT:/x"), ("--out=/nemo_run/a,/nemo_run/b", "--out=ROOT/a,ROOT/b"),
    ('x: "/nemo_run/a"', 'x: "ROOT/a"'), ("[/nemo_run/a, '/nemo_run']", "[ROOT/a, 'ROOT']"),
    ("/nemo_runs", "/nemo_runs"), ("/nemo_run2/x", "/nemo_run2/x"), ("/nemo_run.old", "/nemo_run.old"),
    ("/nemo_run-2", "/nemo_run-2"), ("/nemo_runé", "/nemo_runé"), ("/data/nemo_run", "/data/nemo_run"),
    ("/data/nemo_run/code", "/data/nemo_run/code"), ("nemo_run/x", "nemo_run/x"), ("./nemo_run", "./nemo_run"),
    ("../nemo_run/x", "../nemo_run/x"), ("${x}/nemo_run", "${x}/nemo_run"), ("~/nemo_run/x", "~/nemo_run/x"),
    ("$(pwd)/nemo_run", "$(pwd)/nemo_run"), ("x-/nemo_run", "x-/nemo_run"), ("", ""),
    ("file:/nemo_run/code/x", "file:CODE/x"), ("/nemo_run/nemo_run", "ROOT/nemo_run"),
])
def test_places_by_whole_path_components(text: str, filled: str) -> None:
    at = places("/ws/fam")
    assert at.fill(text) == filled.replace("ROOT", "/ws/fam").replace("CODE", "/tmp/airlift-t23456/code")


@pytest.mark.parametrize("root", ["/nemo_run/fam", "/nemo_run/code/fam"])
def test_where_storage_is_mounted_at_nemo_run_a_profiles_paths_are_real(root: str) -> None:
    at = places(root)
    assert at.fill("/nemo_run/hf:/nemo_run:/nemo_run/code/src") == "/nemo_run/hf:/nemo_run:%s/src" % at.code
    assert at.fill('"/nemo_run/hf"', config=True) == '"%s/hf"' % root  # NVIDIA's configs mean the run root


COMPONENT = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)


@given(st.lists(COMPONENT, max_size=4), st.sampled_from(["", "code/", "other/"]),
       st.sampled_from(["", " ", ":", ",", '"', "'"]))
def test_places_property(parts: list[str], first: str, before: str) -> None:
    at = places("/w s/fam")
    path = "/nemo_run/" + first + "/".join(parts)
    root = at.code + "/" if path.startswith("/nemo_run/code/") else at.run_root + "/"
    rest = path[len("/nemo_run/code/" if path.startswith("/nemo_run/code/") else "/nemo_run/"):]
    if path == "/nemo_run/code":
        root, rest = at.code, ""
    assert at.fill(before + path) == before + root + rest


@given(st.text(max_size=60).filter(lambda text: "/nemo_run" not in text))
def test_what_names_no_place_stays(text: str) -> None:
    assert places().fill(text) == text == places().fill(text, config=True)


AWKWARD = ["/w s/a'b", '/w"q', "/w\\back", "/w: colon #hash", "/größe/データ", "/tab\there", "/new\nline",
           "/rocket\U0001f680", "/{}[]&*!|>%@`", "/nel\x85x", "/ls\u2028x", "/del\x7fx", "/bom\ufeffx", "/esc\x1b[0m",
           "/$(id)$$", "/nemo_run", "/nemo_run/code", "/\\1\\g<0>"]


@pytest.mark.parametrize("root", AWKWARD, ids=ascii)
def test_a_config_with_awkward_places_is_still_yaml(root: str) -> None:

    value = {"out": "/nemo_run/out", "list": ["/nemo_run", "a:/nemo_run/x y"], "n": 1, "other": "größe: #x",
             "/nemo_run/key": 1}
    filled = places(root).fill(configs.dump(value), config=True)
    assert yaml.safe_load(filled) == {"out": root + "/out", "list": [root, "a:" + root + "/x y"], "n": 1,
                                      "other": "größe: #x", root + "/key": 1}


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20))
def test_any_place_is_quoted_for_yaml(text: str) -> None:
    assert yaml.safe_load('x: "%s"' % pod.quoted("/" + text)) == {"x": "/" + text}


def test_the_config_that_the_recipe_reads(tmp_path: Path) -> None:
    root = str(tmp_path / "work \"space\": #1 \\ ü")
    scratch = tmp_path / "scr 'atch\" $HOME"
    code, out = ran(plan(config='a: "/nemo_run/out"\nb: "/nemo_run/code/src"\n', run_root=root,
                         folders=["/nemo_run/made/for you"],
                         command='cp "$AIRLIFT_CONFIG" "$NEMO_RUN_DIR"/copy; pwd; cat "$AIRLIFT_CODE"/' + SCRIPT),
                         scratch)
    assert code == 0, out.text
    assert yaml.safe_load((Path(root) / "copy").read_text()) == {"a": root + "/out", "b": str(out.code / "src")}
    assert (Path(root) / "made/for you").is_dir()
    assert "\n%s\npass\n" % out.code in out.text


@pytest.mark.parametrize("mount", ["nemo_run", "nemo_run/code"])
def test_a_workspace_that_is_itself_called_nemo_run(tmp_path: Path, mount: str) -> None:
    """NVIDIA's profiles mount their volume at /nemo_run. Such a path, once real, is not filled in again."""
    need(os.geteuid() == 0, "needs a mount namespace")
    (tmp_path / "volume").mkdir()
    whole = plan(run_root="/%s/fam" % mount, config='a: "/nemo_run/x"\n', env={"HF_HOME": "/nemo_run/hf"},
                 command='cat "$AIRLIFT_CONFIG"; echo "models in $HF_HOME"; exit 4')
    script = """
        mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work /mnt/root
        mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root || exit 98
        mount --rbind /proc /mnt/root/proc && mount --bind /dev /mnt/root/dev && mkdir -p "/mnt/root/$1" || exit 97
        mount --bind "$2" "/mnt/root/$1" && shift 2 && exec chroot /mnt/root "$@" """
    argv = ["unshare", "-m", "sh", "-c", script, "sh", mount, str(tmp_path / "volume"), *whole.argv]
    code, out = ran(whole, tmp_path / "scratch", argv=argv, env={"TMPDIR": "/%s/tmp" % mount})
    assert code == 4, out.text
    assert 'a: "/%s/fam/x"\n' % mount in out.text and "models in /nemo_run/hf\n" in out.text
    assert "in /%s/tmp/airlift-t23456/code\n" % mount in out.text
    logs = tmp_path / "volume/fam/runs/t23456"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0.exit", "rank-0.log"]
    assert sorted(path.name for path in (tmp_path / "volume").iterdir()) == ["fam", "tmp"]


# ---------------------------------------------------------------- disks


def test_a_full_disk(tmp_path: Path) -> None:
    noise = {"src/noise": random.Random(6).randbytes(900_000)}
    with tmpfs(tmp_path / "small", "size=256k") as small:
        code, out = ran(plan(noise, command="echo RECIPE RAN"), small)
        assert code == pod.PLACE
        assert "disk is full" in failed(code, out)
        assert sorted(path.name for path in out.places[0].iterdir()) == ["output"], "what was begun is taken away"


def test_a_disk_with_room_for_the_tree_only(tmp_path: Path) -> None:
    config = "x: %s\n" % random.Random(6).randbytes(60_000).hex()
    with tmpfs(tmp_path / "small", "size=96k") as small:
        code, out = ran(plan(config=config, command="echo RECIPE RAN"), small)
        assert code == pod.PLACE and "disk is full" in failed(code, out)
        assert not (out.code.parent / "config.yaml").exists(), "a config is whole or absent"


def test_a_read_only_place(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "fixed", "ro,size=64k") as fixed:
        code, out = ran(plan(command="echo RECIPE RAN"), fixed)
        assert code == pod.PLACE and failed(code, out).endswith("Read-only file system")
        code, out = ran(plan(command="echo RECIPE RAN", run_root=str(fixed / "ws")), tmp_path / "scratch")
        assert code == pod.PLACE and str(fixed / "ws") in failed(code, out)


def test_a_place_of_somebody_else(tmp_path: Path) -> None:
    need(os.geteuid() == 0 and shutil.which("setpriv"), "needs another user to be")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        argv = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        whole = plan(command="echo RECIPE RAN")
        seen = subprocess.run([*argv, "/usr/bin/python3", "-c", ""], capture_output=True)
        need(seen.returncode == 0, "no python3 that another user may start: %s" % seen.stderr.decode())
        code, out = ran(whole, Path(name), argv=[*argv, *whole.argv], env={"PATH": "/usr/bin:/bin"})
        assert code == pod.PLACE and failed(code, out).endswith("Permission denied")
        os.chmod(name, 0o1777)
        code, out = ran(whole, Path(name), argv=[*argv, *whole.argv], env={"PATH": "/usr/bin:/bin"})
        assert code == 0
        code, out = ran(plan(command="true", run="t34567"), Path(name))
        assert code == 0, "two users of one machine do not meet"


@pytest.mark.parametrize("where", ["scratch", "base", "code", "config", "run root", "logs"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, where: str) -> None:
    scratch, base, workspace = tmp_path / "scratch", tmp_path / "scratch/airlift-t23456", tmp_path / "ws"
    path = {"scratch": tmp_path / "file/scratch", "base": base, "code": base / "code", "config": base / "config.yaml",
            "run root": workspace, "logs": workspace / "runs"}[where]
    if where == "config":
        path.mkdir(parents=True)
    else:
        target = tmp_path / "file" if where == "scratch" else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("here first")
    env = {"TMPDIR": str(path)} if where == "scratch" else {}
    code, out = ran(plan(run_root=str(workspace), command="echo RECIPE RAN"), scratch, env=env)
    assert code == pod.PLACE, out.text
    failed(code, out)
    if where == "config":
        assert path.is_dir()
    else:
        assert target.read_text() == "here first"


@pytest.mark.parametrize("what", ["folder", "empty", "link", "dangling", "fifo", "almost"])
def test_a_foreign_thing_at_the_target(tmp_path: Path, what: str) -> None:
    code_root = tmp_path / "scratch/airlift-t23456/code"
    whole = plan({"src/a": b"1"}, command="echo RECIPE RAN")
    if what == "almost":
        plant(code_root, {"src/a": "1", "mine.txt": "keep"})
        os.mkfifo(code_root / "src/fifo")
        (code_root / SCRIPT).parent.mkdir(parents=True)
        os.mkfifo(code_root / SCRIPT)  # whoever opened it would wait for ever
    elif what == "folder":
        plant(code_root, {"mine.txt": "keep"})
    else:
        code_root.parent.mkdir(parents=True)
        if what == "empty":
            code_root.mkdir()
        elif what == "fifo":
            os.mkfifo(code_root)
        else:
            code_root.symlink_to(tmp_path if what == "link" else "nowhere")

    def seen() -> tuple[object, ...]:
        info = os.lstat(code_root)
        return info.st_ino, info.st_mode, info.st_mtime_ns, code_root.is_dir() and sorted(os.listdir(code_root))

    before = seen()
    code, out = ran(whole, tmp_path / "scratch")
    assert code == pod.PLACE, out.text
    assert failed(code, out) == "%s is there already and does not hold this payload" % code_root
    assert before == seen()
    assert sorted(os.listdir(code_root.parent)) == ["code", "output"]


def test_a_restart_finds_its_tree_and_verifies_it(tmp_path: Path) -> None:
    whole = plan({"src/a": b"1"}, command='echo RUN; touch "$AIRLIFT_CODE"/src/__pycache__ || true')
    for _ in range(3):
        code, out = ran(whole, tmp_path)
        assert code == 0 and "RUN" in out.text
        born = out.code.stat().st_ino
    assert ran(whole, tmp_path)[1].code.stat().st_ino == born, "it is used, not made again"
    changes: list[Callable[[], object]] = [
        lambda: (out.code / "src/a").write_text("2"), lambda: (out.code / "src/a").write_text("11"),
        lambda: (out.code / "src/a").write_text(""), lambda: (out.code / "src/a").unlink()]
    for change in changes:
        change()
        code, again = ran(whole, tmp_path)
        assert code == pod.PLACE and "does not hold this payload" in again.text and "RUN" not in again.text
        (out.code / "src/a").write_text("1")
        assert ran(whole, tmp_path)[0] == 0


def test_a_restart_after_death_at_any_time(tmp_path: Path) -> None:
    """SIGKILL while it unpacks; the next start is as the first."""
    files = {"src/p/m%04d.py" % number: b"x" * 50 for number in range(1000)}
    whole = plan(files, command="echo DONE")
    for delay in (0.0, 0.02, 0.05):
        with started(whole, tmp_path) as dying:
            _until(lambda: any(tmp_path.glob("airlift-*/code*")))
            time.sleep(delay)
            dying.process.kill()
            dying.end()
        code, out = ran(whole, tmp_path)
        assert code == 0 and "DONE" in out.text
        assert len(list((out.code / "src/p").iterdir())) == 1000
        shutil.rmtree(out.code.parent)


def _until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pods_that_share_a_scratch_folder(tmp_path: Path) -> None:
    """Two ranks on one machine, as two tasks of a node: each finds or makes the tree, and none spoils the other's."""
    files = {"src/p/m%04d.py" % number: b"x" * 50 for number in range(300)}
    whole = plan(files, nodes=4, command="sleep 0.2; exit 1$NODE_RANK", run_root=str(tmp_path / "ws"))
    for attempt in range(2):
        with contextlib.ExitStack() as stack:
            pods = [stack.enter_context(started(whole, tmp_path / str(attempt),
                                                env={"NODE_RANK": str(rank), "MASTER_ADDR": "m"}))
                    for rank in range(4)]
            assert [one.end() for one in pods] == [10, 11, 12, 13], [one.text for one in pods]
        assert sorted(os.listdir(pods[0].code.parent)) == ["code", "config.yaml"], "nothing private is left"
        assert [(tmp_path / "ws/runs/t23456" / ("rank-%d.exit" % rank)).read_text() for rank in range(4)] == [
            "10\n", "11\n", "12\n", "13\n"]


# ---------------------------------------------------------------- the recipe's end


@pytest.mark.parametrize("command, code", [
    ("true", 0), ("exit 3", 3), ("exit 255", 255), ("python -c 'import sys; sys.exit(7)'", 7), ("kill -KILL $$", 137),
    ("kill -SEGV $$", 139), ("set -eu; true; exit 5", 5), ("sleep 0 & wait; exit 6", 6),
    ("python -c 'import os; os.abort()'", 134),
    ("python -c 'import os; os.kill(os.getpid(), 9)'", 137), ("exec python -c 'import sys; sys.exit(9)'", 9),
    ("exit 86", 86), ("exit 87", 87), ("exit 80", 80), ("no-such-program", 127), ("false", 1), ("if", 2),
    ("false; true", 0),
])
def test_the_exit_code_is_the_recipes(tmp_path: Path, command: str, code: int) -> None:
    found, out = ran(plan(command=command), tmp_path)
    assert found == code
    assert out.text.endswith(ENDED % ("0", code)) and "what to do" not in out.text
    if code == 86:
        found, out = ran(plan(command=command, setup=["true"], tool="bash", run_root=str(tmp_path / "ws")), tmp_path)
        assert found == code and "what to do" not in out.text


READY = "import signal, sys, time, os\nprint('READY', flush=True)\n"
ENDS_ITSELF = READY.replace("print", "signal.signal(signal.{0}, lambda *_: (print('GOT IT'), sys.exit(7)))\nprint")
ENDS_ITSELF += "time.sleep(30)"
IGNORES = READY.replace("print", "signal.signal(signal.{0}, signal.SIG_IGN)\nprint") + "time.sleep(0.7); sys.exit(9)"
DEFAULT = READY + "time.sleep(30)"


@pytest.mark.parametrize("workspace", [False, True])
@pytest.mark.parametrize("number, recipe, code", [
    (signal.SIGTERM, ENDS_ITSELF, 7), (signal.SIGINT, ENDS_ITSELF, 7), (signal.SIGTERM, IGNORES, 9),
    (signal.SIGINT, IGNORES, 9), (signal.SIGTERM, DEFAULT, 143), (signal.SIGINT, DEFAULT, 130),
])
def test_signals_reach_the_recipe(tmp_path: Path, number: signal.Signals, recipe: str, code: int,
                                  workspace: bool) -> None:
    whole = plan({SCRIPT: recipe.format(number.name).encode()}, command='python "$AIRLIFT_CODE"/%s' % SCRIPT,
                 run_root=str(tmp_path / "ws") if workspace else None)
    with started(whole, tmp_path / "scratch") as running:
        running.until(b"READY\n")
        assert running.signal(number) == code
        assert running.text.endswith(ENDED % ("0", code))
        assert ("GOT IT" in running.text) == (recipe is ENDS_ITSELF)
        assert not running.alive()


def test_a_signal_reaches_the_recipe_even_if_it_was_ignored_when_the_pod_began(tmp_path: Path) -> None:
    """As after `nohup`, or in the background of a shell."""
    whole = plan({SCRIPT: ENDS_ITSELF.format("SIGINT").encode()}, command='python "$AIRLIFT_CODE"/%s' % SCRIPT)
    with started(whole, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as running:
        running.until(b"READY\n")
        assert running.signal(signal.SIGINT) == 7


def test_term_while_it_unpacks(tmp_path: Path) -> None:
    files = {"src/p/m%04d.py" % number: b"x" * 50 for number in range(4000)}
    with started(plan(files, command="echo RECIPE RAN; sleep 30"), tmp_path) as running:
        _until(lambda: any(tmp_path.glob("airlift-*/code.*/src/p")))
        assert running.signal(signal.SIGTERM) == 143
        assert "RECIPE RAN" not in running.text and "Traceback" not in running.text
        assert running.text == ("airlift: rank 0: ended by a signal before the recipe was started\n"
                                + ENDED % ("0", 143))
        assert not any(tmp_path.glob("airlift-*/code*")), "what was begun is taken away"


def test_term_during_a_startup_command(tmp_path: Path) -> None:
    with started(plan(setup=["echo READY", "sleep 30"], command="echo RECIPE RAN"), tmp_path) as running:
        running.until(b"READY\n")
        assert running.signal(signal.SIGTERM) == 143
        assert "RECIPE RAN" not in running.text and "what to do" not in running.text
        assert running.text.endswith(ENDED % ("0", 143))


@pytest.mark.parametrize("spread", range(10))
def test_term_at_any_moment_leaves_nothing_running(tmp_path: Path, spread: int) -> None:
    with started(plan(setup=["true"], command="sleep 30", run_root=str(tmp_path / "ws")),
                 tmp_path / "scratch") as running:
        time.sleep(0.02 + 0.016 * spread)
        code = running.signal(signal.SIGTERM)
        assert code == 143, running.text
        assert not running.alive()
        assert "Traceback" not in running.text


def test_term_while_bash_is_about_to_start_something(tmp_path: Path) -> None:
    """What was not there when the signal came did not hear it; bash waits for that, and would heed its trap later."""
    command = "trap : TERM; trap - DEBUG; kill -TERM $PPID; for ((i = 0; i < 300000; i++)); do :; done; sleep 30"
    with started(plan(command=command), tmp_path) as running:
        assert running.end(15) == 143


@pytest.mark.parametrize("command, code", [
    ("sh -c 'kill -TERM $PPID; sleep 0.1; exit 0'; echo GOES ON", 143),
    ("sh -c 'kill -TERM $PPID; sleep 0.1; exit 5'", 5),
    ("sh -c 'kill -TERM $PPID; sleep 0.1; exit 0'", 0), ("until sh -c 'echo TRY; sleep 30'; do :; done", 143),
    ("sleep 30 & echo TRY; wait", 143), ("sh -c 'echo TRY; exec sleep 30' | cat", 143),
    ("trap 'echo SAVED; exit 4' TERM; sh -c 'echo TRY; exec sleep 30'; exit 5", 4),
])
def test_term_and_recipes_of_several_commands(tmp_path: Path, command: str, code: int) -> None:
    """The command that was running ends with its own code; no further one begins."""
    with started(plan(command=command, setup=["set -eu"]), tmp_path) as running:
        if "TRY" in command:
            running.until(b"TRY\n")
            time.sleep(0.1)
            os.kill(running.process.pid, signal.SIGTERM)
        assert running.end(15) == code, running.text
        assert "GOES ON" not in running.text and running.text.count("TRY") <= 1
        assert ("SAVED" in running.text) == ("SAVED" in command)


TERM_AT_THE_WORST = """
import os, runpy, signal, subprocess, sys
real = subprocess.Popen
class Popen(real):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
sys.argv = [{0!r}]
runpy.run_path({0!r}, run_name="__main__")
""".format(str(ROOT / "pod.py"))


def test_term_between_the_start_of_bash_and_the_news_of_it(tmp_path: Path) -> None:
    with started(plan(command="sleep 30"), tmp_path, argv=[sys.executable, "-c", TERM_AT_THE_WORST]) as running:
        assert running.end() == 143
        assert not running.alive(), "bash would go on alone"


DAEMON = r"""
import os, sys, time, signal
def daemon(*, ignore):
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("DAEMON", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_nothing_the_recipe_starts_is_left(tmp_path: Path, stubborn: bool) -> None:
    """Children in the background and daemons that forked twice, in sessions of their own. TERM is enough for most; what
    ignores it, or was stopped, is killed after five seconds."""
    recipe = DAEMON + "daemon(ignore=False); daemon(ignore=%r); time.sleep(0.3); sys.exit(3)" % stubborn
    command = ("sleep 61 & setsid sleep 62 & (sleep 63 &) ; nohup sleep 64 >/dev/null 2>&1 & sleep 65 & %s\n"
               'python "$AIRLIFT_CODE"/%s' % ("kill -STOP $!" if stubborn else "", SCRIPT))
    begin = time.monotonic()
    root = str(tmp_path / "ws") if stubborn else None
    with started(plan({SCRIPT: recipe.encode()}, command=command, run_root=root), tmp_path / "scratch") as running:
        assert running.end() == 3
        assert running.text.count("DAEMON") == 2
        assert not running.alive()
        assert (time.monotonic() - begin > 4.5) == stubborn


def test_orphans_are_reaped_while_the_recipe_runs(tmp_path: Path) -> None:
    command = ("for i in 1 2 3 4 5; do (sh -c 'sleep 0.05' &); done; sleep 0.4\n"
               "cat /proc/[0-9]*/stat 2>/dev/null | awk '$4 == '$PPID")
    code, out = ran(plan(command=command), tmp_path)
    assert code == 0
    states = re.findall(r"^\d+ \(.*\) (\w) ", out.text, re.MULTILINE)
    assert states == ["S"], "only bash itself is a child of the pod, and none is a zombie: " + out.text


def as_process_1(whole: transport.Plan) -> list[str]:
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    seen = subprocess.run([*argv, "true"], capture_output=True)
    need(seen.returncode == 0, "no PID namespaces here: %s" % seen.stderr.decode())
    return [*argv, *whole.argv]


def test_as_process_1_of_a_pod(tmp_path: Path) -> None:
    """TERM works, though the kernel ignores it for a process 1 that does not handle it, and zombies are reaped."""
    recipe = DAEMON + (
        "print('PARENT OF BASH', open('/proc/%d/stat' % os.getppid()).read().split()[3], flush=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "for _ in range(5):\n    os.system('(sleep 0.01 &)')\n"
        "daemon(ignore=False)\ntime.sleep(0.3)\n"
        "stats = [open('/proc/%s/stat' % pid).read() for pid in os.listdir('/proc') if pid.isdigit()]\n"
        "print('ZOMBIES', sum(') Z ' in stat for stat in stats), flush=True)\ntime.sleep(30)")
    whole = plan({SCRIPT: recipe.encode()}, command='python "$AIRLIFT_CODE"/' + SCRIPT, run_root=str(tmp_path / "ws"))
    with started(whole, tmp_path / "scratch", argv=as_process_1(whole)) as running:
        running.until(b"ZOMBIES 0\n")
        assert b"PARENT OF BASH 1\n" in running.output
        inner = Path("/proc/%d/task/%d/children" % (running.process.pid, running.process.pid)).read_text().split()
        os.kill(int(inner[0]), signal.SIGTERM)
        assert running.end() == 7
        assert running.text.endswith(ENDED % ("0", 7))
        assert not running.alive()


# ---------------------------------------------------------------- startup commands and what is missing


def test_startup_commands_share_one_bash(tmp_path: Path) -> None:
    plant(tmp_path, {"env.sh": "export SOURCED='a b'\nfunc() { echo \"FUNC $1\"; }\n"})
    setup = ["export A=1 B='x y'", "source %s" % (tmp_path / "env.sh"), "cd /", "local_only=2", "false || true",
             "cat <<'E'\nhere 'doc' $A\nE", "exec 3>&1 5>&1", "set -o noclobber"]
    command = "func \"$A/$B/$SOURCED/$local_only\"; pwd; python -c 'import os; print(os.environ[\"B\"])'"
    code, out = ran(plan(setup=setup, command=command), tmp_path / "scratch")
    assert code == 0
    assert "here 'doc' $A\nFUNC 1/x y/a b/2\n/\nx y\n" in out.text


@pytest.mark.parametrize("command", [
    "echo THIS IS WHY >&2; false", "echo THIS IS WHY; exit 0", "echo THIS IS WHY; exit 3", "echo THIS IS WHY; exit 200",
    "echo THIS IS WHY\nif", "echo THIS IS WHY; kill -KILL $$", "echo THIS IS WHY; exec false",
    "set -e; echo THIS IS WHY; false", "echo THIS IS WHY; (exit 87)", "echo THIS IS WHY; kill -TERM $$; false",
])
@pytest.mark.parametrize("workspace", [False, True])
def test_a_startup_command_that_fails(tmp_path: Path, command: str, workspace: bool) -> None:
    root = str(tmp_path / "ws") if workspace else None
    code, out = ran(plan(setup=["true", command, "echo RECIPE RAN"], command="echo RECIPE RAN", run_root=root),
                    tmp_path / "scratch")
    assert code == pod.SETUP, out.text
    failed(code, out)
    assert "THIS IS WHY\n" in out.text
    if workspace:
        assert (tmp_path / "ws/runs/t23456/rank-0.exit").read_text() == "86\n"
        assert "THIS IS WHY" in (tmp_path / "ws/runs/t23456/rank-0.log").read_text()


def test_which_startup_command_failed(tmp_path: Path) -> None:
    code, out = ran(plan(setup=["true", "(exit 5)"], command="echo RECIPE RAN"), tmp_path)
    assert code == pod.SETUP and "airlift: startup command 2 failed with exit code 5\n" in out.text


@pytest.mark.parametrize("tool", ["torchrun-not-here", "/no/such/tool", "it's"])
def test_a_tool_that_is_missing(tmp_path: Path, tool: str) -> None:
    code, out = ran(plan(tool=tool, command="echo RECIPE RAN"), tmp_path)
    assert code == pod.TOOL
    failed(code, out)
    assert "airlift: there is no %s in this image\n" % tool in out.text


def test_a_tool_that_a_startup_command_brings(tmp_path: Path) -> None:
    plant(tmp_path, {"bin/brought": "#!/bin/sh\nexit 6\n"})
    (tmp_path / "bin/brought").chmod(0o755)
    code, _ = ran(plan(tool="brought", command="brought", setup=["PATH=%s/bin:$PATH" % tmp_path]), tmp_path / "scratch")
    assert code == 6


def test_working_directories(tmp_path: Path) -> None:
    code, out = ran(plan(workdir="/no/such folder", command="echo RECIPE RAN"), tmp_path)
    assert code == pod.TOOL and "/no/such folder" in failed(code, out)
    (tmp_path / "it's a dir").mkdir()
    for workdir, found in (("%s/it's a dir" % tmp_path, "%s/it's a dir" % tmp_path),
                           ("/nemo_run/code/src", "%s/src" % out.code),
                           ("src/pkg", "%s/src/pkg" % out.code), (None, str(out.code))):
        code, out = ran(plan(workdir=workdir, command="pwd", setup=["pwd"]), tmp_path)
        assert code == 0 and out.text.count("\n%s\n" % found) in (1, 2) and out.text.count(found + "\n") >= 2, out.text


def test_an_image_without_bash(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path / "scratch", env={"PATH": str(tmp_path / "bin")})
    assert code == pod.TOOL and failed(code, out) == "there is no bash in this image"
    (tmp_path / "bin/bash").write_text("no program")
    (tmp_path / "bin/bash").chmod(0o755)
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path / "scratch", env={"PATH": str(tmp_path / "bin")})
    assert code == pod.TOOL and "Exec format error" in failed(code, out)


def test_an_environment_too_large_for_the_recipe(tmp_path: Path) -> None:
    """plan_for refuses it, but an image may add what nobody knew of."""
    env = {"V%02d" % number: "x" * 100_000 for number in range(18)}
    code, out = ran(plan(command="echo RECIPE RAN", env={"W%02d" % number: "y" * 100_000 for number in range(18)}),
                    tmp_path, env=env)
    assert code == pod.TOOL and "Argument list too long" in failed(code, out)


@pytest.mark.parametrize("module, compression, code", [
    ("lzma", "xz", pod.PYTHON), ("lzma", "gz", 0), ("gzip", "gz", pod.PYTHON), ("ctypes", "xz", 0),
])
def test_a_python_that_lacks_a_module(tmp_path: Path, module: str, compression: str, code: int) -> None:
    plant(tmp_path / "lib", {module + ".py": "raise ImportError('built without it')\n"})
    whole = plan_for("local", tree(), job(command="true" if code == 0 else "echo RECIPE RAN"), compression=compression)
    found, out = ran(whole, tmp_path / "scratch", env={"PYTHONPATH": str(tmp_path / "lib")})
    assert found == code, out.text
    if code:
        assert failed(code, out) == "this Python has no %s: built without it" % compression


# ---------------------------------------------------------------- the recipe's environment


def environment_of(whole: transport.Plan, scratch: Path, **env: str | None) -> dict[str, str]:
    code, out = ran(whole, scratch, env=env)
    assert code == 0, out.text
    data = (out.code.parent / "output/env").read_bytes()
    return dict(item.split("=", 1) for item in data.decode("utf-8", "surrogateescape").split("\0") if item)


DUMP = 'env -0 > "$NEMO_RUN_DIR"/env'
USER = {"SPACES": " a  b ", "QUOTES": "'\"`", "DOLLAR": "$HOME ${X} $(id) $$", "KUBE": "$(NODE_RANK)", "EMPTY": "",
        "LINES": "a\nb\n\n", "UNI": "größe データ \U0001f680", "BACK": "\\n\\", "GLOB": "* ? [a]", "EQUAL": "a=b=c",
        "lower.dot-ted": "1", "HASH": "# no"}


def test_the_users_environment_arrives_as_it_is(tmp_path: Path) -> None:
    found = environment_of(plan(env=USER, command=DUMP), tmp_path)
    assert {name: found.get(name) for name in USER} == USER


@settings(max_examples=8)
@given(st.dictionaries(st.from_regex(r"U[A-Z0-9_]{0,8}", fullmatch=True), max_size=5, values=st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30).filter(
        lambda text: "/nemo_run" not in text)))  # a place, which pod.py fills in
def test_any_environment_arrives_as_it_is(env: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = environment_of(plan(env=env, command=DUMP), Path(name))
        assert {key: found.get(key) for key in env} == env


def test_what_else_is_in_the_recipes_environment(tmp_path: Path) -> None:
    image = {"PYTHONPATH": "/opt/image::/opt/more", "PET_NODE_RANK": "0", "PET_NNODES": "1", "FROM_IMAGE": "x",
             "AIRLIFT_OTHER": "y",
             "ODD": "\udcff"}
    found = environment_of(plan(command=DUMP, env={"WHERE": "/nemo_run/x:/nemo_run/code"}), tmp_path / "scr", **image)
    base = tmp_path / "scr/airlift-t23456"
    assert {name: value for name, value in found.items() if "AIRLIFT" in name} == {
        "AIRLIFT_RUN": "t23456", "AIRLIFT_CODE": str(base / "code"), "AIRLIFT_CONFIG": str(base / "config.yaml")}
    assert found["PYTHONPATH"] == "%s/code/src:/opt/image:/opt/more" % base
    assert found["NODE_RANK"] == "0" and found["NNODES"] == "1" and found["MASTER_ADDR"] == "127.0.0.1"
    assert found["MASTER_PORT"].isdigit() and found["PYTHONUNBUFFERED"] == "1"
    assert found["NEMO_RUN_DIR"] == str(base / "output") and found["WHERE"] == "%s/output/x:%s/code" % (base, base)
    assert found["FROM_IMAGE"] == "x" and found["ODD"] == "\udcff" and found["PET_NNODES"] == "1"


def test_torchrun_sees_no_pet_variables(tmp_path: Path) -> None:
    image = {"PET_NODE_RANK": "1", "PET_RDZV_BACKEND": "c10d", "PET_MASTER_ADDR": "job-master-0",
             "PET_MASTER_PORT": "99"}
    found = environment_of(plan(command=DUMP, launch="torchrun", nodes=2), tmp_path, **image)
    assert not [name for name in found if name.startswith("PET_")]
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("job-master-0", "99")
    assert (found["NODE_RANK"], found["NNODES"]) == ("1", "2")


def test_the_user_can_say_where_rank_0_is_but_not_which_rank_this_is(tmp_path: Path) -> None:
    env = {"MASTER_ADDR": "mine", "MASTER_PORT": "1", "NODE_RANK": "7", "PYTHONPATH": "/mine", "AIRLIFT_RUN": "x",
           "PYTHONUNBUFFERED": ""}
    found = environment_of(plan(command=DUMP, env=env, nodes=2), tmp_path, NODE_RANK="1", MASTER_ADDR="theirs")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["NODE_RANK"]) == ("mine", "1", "1")
    assert found["PYTHONPATH"].endswith("/code/src:/mine") and found["AIRLIFT_RUN"] == "t23456"
    assert found["PYTHONUNBUFFERED"] == ""


def test_the_recipe_inherits_no_descriptor_and_no_terminal(tmp_path: Path) -> None:
    code, out = ran(plan(command="ls -l /proc/self/fd; cat"), tmp_path, stdin=subprocess.PIPE)
    assert code == 0
    links = re.findall(r" (\d+) -> (\S+)", out.text)
    assert [name for name, _ in links] == ["0", "1", "2", "3"] and links[0][1] == "/dev/null", out.text


# ---------------------------------------------------------------- output and workspace


def test_the_log_equals_the_output(tmp_path: Path) -> None:
    recipe = ("import os, sys\nfor i in range(300):\n    os.write(1 + i % 2, b'%d \\xff\\r' % i * 97)\n"
              "os.write(1, b'no end of line')\nsys.exit(5)")
    whole = plan({SCRIPT: recipe.encode()}, setup=["echo from setup"], command='python "$AIRLIFT_CODE"/' + SCRIPT,
                 run_root=str(tmp_path / "ws"))
    for attempt in (1, 2):
        code, out = ran(whole, tmp_path / "scratch", stderr=subprocess.PIPE)
        assert code == 5
        first, _, rest = out.output.partition(b"\n")
        assert first.startswith(b"airlift: rank 0 of 1")
        tail = (ENDED % ("0", 5)).encode()
        assert rest.endswith(b"no end of line" + tail)
        logs = tmp_path / "ws/runs/t23456"
        assert (logs / "rank-0.log").read_bytes() == rest[:-len(tail)] * attempt, "a restart goes on in the same log"
        assert (logs / "rank-0.exit").read_text() == "5\n"
        assert sorted(os.listdir(logs)) == ["rank-0.exit", "rank-0.log"]


def test_the_code_of_an_earlier_start_is_gone_while_it_runs_again(tmp_path: Path) -> None:
    whole = plan(run_root=str(tmp_path / "ws"), command='ls "$NEMO_RUN_DIR"/runs/t23456')
    ran(whole, tmp_path / "scratch")
    code, out = ran(whole, tmp_path / "scratch")
    assert code == 0 and "rank-0.log\n" in out.text and "rank-0.exit" not in out.text


def test_output_comes_as_it_is_written(tmp_path: Path) -> None:
    whole = plan(command="printf 'no line'; sleep 30", run_root=str(tmp_path / "ws"))
    with started(whole, tmp_path / "scratch") as running:
        running.until(b"no line", 5)
        assert running.signal(signal.SIGTERM) == 143


def test_a_full_disk_under_the_log_does_not_end_the_recipe(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "ws", "size=64k") as workspace:
        code, out = ran(plan(command="head -c 300000 /dev/zero | tr '\\0' x; echo THE END; exit 5",
                             run_root=str(workspace)),
                        tmp_path / "scratch")
        assert code == 5, out.text[-500:]
        assert "THE END" in out.text and out.text.count("x" * 1000) >= 290
        assert len(re.findall("airlift: the log .* ends here: No space left on device", out.text)) == 1
        assert out.text.endswith(ENDED % ("0", 5)) and "Traceback" not in out.text


def test_a_log_that_cannot_be_opened_does_not_end_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "ws/runs/t23456/rank-0.log").mkdir(parents=True)
    (tmp_path / "ws/runs/t23456/rank-0.exit").mkdir(parents=True)
    code, out = ran(plan(command="echo OUT; exit 5", run_root=str(tmp_path / "ws")), tmp_path / "scratch")
    assert code == 5 and "OUT" in out.text and "cannot be kept" in out.text and "Traceback" not in out.text


@pytest.mark.parametrize("workspace", [False, True])
def test_nobody_reads_the_output(tmp_path: Path, workspace: bool) -> None:
    """The other end of standard output is closed: the recipe goes on, and its code comes back."""
    recipe = b"import os, sys\ntry:\n    os.write(1, b'x' * 300000)\nexcept BrokenPipeError:\n    pass\nsys.exit(5)"
    whole = plan({SCRIPT: recipe}, command='python "$AIRLIFT_CODE"/' + SCRIPT,
                 run_root=str(tmp_path / "ws") if workspace else None)
    read, write = os.pipe()
    with started(whole, tmp_path / "scratch", stdout=write) as running:
        os.close(write)
        os.close(read)
        assert running.process.wait(20) == 5
    if workspace:
        assert (tmp_path / "ws/runs/t23456/rank-0.log").stat().st_size == 300_000
        assert (tmp_path / "ws/runs/t23456/rank-0.exit").read_text() == "5\n"


def test_a_torchrun_job_with_several_ranks_reports_each(tmp_path: Path) -> None:
    whole = plan(nodes=3, command="exit $NODE_RANK", run_root=str(tmp_path / "ws"))
    for rank in range(3):
        code, out = ran(whole, tmp_path / str(rank), env={"NODE_RANK": str(rank), "MASTER_ADDR": "m"})
        assert code == rank and out.text.startswith("airlift: rank %d of 3, sha256 %s" % (rank, whole.digest))


# ---------------------------------------------------------------- Pythons

NEWER = {"graphlib", "zoneinfo", "tomllib", "compression", "annotationlib"}  # in the standard library only after 3.8


def test_pod_is_written_for_python_3_8() -> None:
    source = (ROOT / "pod.py").read_text()
    module = ast.parse(source, feature_version=(3, 8))
    ast.parse(source, feature_version=(3, 7))
    spread = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Spread")
    module.body.remove(spread)  # it talks to the image's Ray, in a process of its own; nothing else does
    imported = {alias.name.split(".")[0] for node in ast.walk(module) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names - NEWER
    newer = {"removeprefix", "removesuffix", "waitstatus_to_exitcode", "pidfd_open", "is_relative_to", "randbytes",
             "file_digest",
             "add_note", "process_group", "pairwise", "bit_count"}
    used = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    assert not used & newer
    assert not [node for node in ast.walk(module)
                if type(node).__name__ in ("Match", "NamedExpr")], "3.7 must be able to read it"


@pytest.mark.parametrize("version", [version for version in pythons() if version[0] == 3],
                         ids=lambda version: "%d.%d" % version)
def test_every_python_of_this_machine(tmp_path: Path, version: tuple[int, int]) -> None:
    python = pythons()[version]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text('#!/bin/sh\nexec %s "$@"\n' % python)
    (tmp_path / "bin/python3").chmod(0o755)
    env = {"PATH": str(tmp_path / "bin") + os.pathsep + PATH}
    files = {"src/größe.txt": b"x", SCRIPT: b"import sys; sys.exit(9)"}
    whole = plan(files, command='python3 "$AIRLIFT_CODE"/' + SCRIPT, run_root=str(tmp_path / "ws"),
                 config='a: "/nemo_run/x"\n')
    code, out = ran(whole, tmp_path / "scratch", env=env)
    if version < (3, 7):  # it cannot even read pod.py
        assert (code, out.text) == (pod.PYTHON, "airlift: the python3 of this image is too old\n"
                                                "airlift: rank unknown ended with exit code 85\n")
        return
    if version == (3, 7):
        assert code == pod.PYTHON and failed(code, out, "?") == "python3 is 3.7; 3.8 is the oldest that works"
        return
    assert code == 9, out.text
    assert shape(out.code) == shape_of(tree(files))
    (out.code / "src/größe.txt").write_text("changed")
    for change, expect in (({"AIRLIFT_POD_0000": None}, pod.POD), ({}, pod.PLACE)):
        code, out = ran(whole, tmp_path / "scratch", env=env | change)
        assert code == expect
        failed(code, out)
    with started(plan(command="sh -c 'echo READY; exec sleep 30'"), tmp_path / "other", env=env) as running:
        running.until(b"READY\n")
        assert running.signal(signal.SIGTERM) == 143 and not running.alive()


@pytest.mark.parametrize("description", [{"nodes": 1}, {"nodes": 1, "run": "t23456"}])
def test_a_description_without_the_rest(tmp_path: Path, description: dict[str, Any]) -> None:
    code, out = ran(plan_for("local", tree(), description), tmp_path)
    assert code == pod.PAYLOAD
    failed(code, out)


def test_pod_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """-S and -I: no site-packages, no PYTHON* variables."""
    whole = plan()
    code, out = ran(whole, tmp_path, argv=[whole.argv[0], "-I", "-S", *whole.argv[1:]])
    assert code == 0, out.text


def test_an_error_of_our_own_is_said_with_its_traceback(tmp_path: Path) -> None:
    plant(tmp_path / "lib", {"ctypes.py": "raise RuntimeError('nobody expects this')\n"})
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path / "scratch", env={"PYTHONPATH": str(tmp_path / "lib")})
    assert code == pod.INTERNAL and "RECIPE RAN" not in out.text
    assert "Traceback" in out.text and "nobody expects this" in out.text
    assert out.text.endswith("airlift: rank 0: pod.py itself failed\n" + ENDED % ("0", 89))


def test_each_failure_has_its_sentences() -> None:
    assert {pod.POD, pod.PAYLOAD, pod.RANK, pod.PLACE, pod.PYTHON, pod.SETUP, pod.TOOL,
            pod.INTERNAL} <= set(pod.FAILURES)
    assert all(80 <= code <= 91 and what and fix and "\n" not in what + fix for code,
               (what, fix) in pod.FAILURES.items())
    assert len({what for what, _ in pod.FAILURES.values()}) == len(pod.FAILURES)


def test_the_tests_leave_nothing_behind() -> None:
    environs = b""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            environs += path.read_bytes()
    assert not [mark for mark in MARKS if mark.encode() in environs]
