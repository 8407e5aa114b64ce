"""pod/payload.py: every tree comes back, and whatever does not arrive whole is noticed. Real processes, mostly."""

import fnmatch
import os
import random
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ENDED, SCRIPT, failed, job, plan, plant, ran, shape, shape_of, tree

import transport
from pod import failures, payload
from pod.failures import Failure
from transport import collect, plan_for

# ---------------------------------------------------------------- the round trip


def usual(name: str) -> bool:
    """Whether a name is none that collect leaves out, so that the whole tree must come back."""
    return (name not in (".", "..", *transport.COLLECTIONS, *transport.MARKS) and len(name.encode()) <= 255
            and not transport.never_source(name) and not name.endswith(transport.DATA_SUFFIXES)
            and not transport.CREDENTIAL_NAME.match(name) and name not in transport.CREDENTIAL_FOLDERS
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in transport.DOCUMENTS))


NAMES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\0"), min_size=1, max_size=10),
    st.sampled_from(["a", "b", " ", "-rf", "$(id)", "'\"", "\n", "名前", "e\u0301", "é", "..a", "x" * 255, "\U0001f680",
                     "*", "\\"]),
).filter(usual)
CONTENTS = st.one_of(st.just(b""), st.binary(max_size=200), st.binary(min_size=1, max_size=4).map(lambda b: b * 5000)
                     ).filter(lambda data: not transport.credential_in(data))
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
        assert payload.decompress(payload.join(env, "TREE"), "gz") == tar
        payload.unpack(tar, name + "/code")
        assert shape(name + "/code") == expected(*made)
        assert payload.holds(name + "/code", tar)


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
    assert "RECIPE ['--config', '%s/config.yaml'] kit 7\n" % out.code.parent in out.text
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
    code = failures.POD if stream == "POD" else failures.PAYLOAD
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
    assert code == failures.PAYLOAD and "AIRLIFT_NODES" in failed(code, out, "?")


def test_a_tree_that_is_not_the_one_that_was_named(tmp_path: Path) -> None:
    """Each stream is whole, but the tree belongs to another launch."""
    one, other = plan({"src/a": b"1"}, command="echo RECIPE RAN"), plan({"src/a": b"2"})
    mixed = {name: value for name, value in other.env.items() if "_TREE_" in name}
    code, out = ran(one, tmp_path, env=mixed)
    assert code == failures.PAYLOAD and "digest" in failed(code, out) and not out.places


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
        elif code == failures.RANK:  # AIRLIFT_NODES became another number
            failed(code, out, "?")
        elif code == 0:
            assert int(changes["AIRLIFT_NODES"] or 0) >= 1 and len(changes) == 1
        else:
            assert code in (failures.POD, failures.PAYLOAD), out.text
            assert "RECIPE RAN" not in out.text and "Traceback" not in out.text


@pytest.mark.parametrize("stream, data, code", [
    ("JOB", b"", failures.PAYLOAD), ("JOB", b"no zlib", failures.PAYLOAD), ("TREE", b"no xz", failures.PYTHON),
    ("TREE", b"", failures.PYTHON),
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
        payload.join(env, "JOB")


@given(st.dictionaries(st.sampled_from(["CHUNKS", "SHA256", "0000", "0001", "00000", "x", ""]),
                       st.one_of(st.text(max_size=20), st.sampled_from(["1", "2", "0", "QUJD"]))))
def test_join_never_ends_in_a_traceback(parts: dict[str, str]) -> None:
    with pytest.raises(Failure) as caught:
        payload.join({"AIRLIFT_TREE_" + name: value for name, value in parts.items()}, "TREE")
    assert caught.value.code == failures.PAYLOAD


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
        payload.unpack(buffer.getvalue(), str(tmp_path / "code"))
    assert caught.value.code == failures.PAYLOAD and not list(tmp_path.iterdir())
