"""transport.py: what ships and what does not, one tar for one tree, nothing over a limit, against the real kernel."""

import ast
import base64
import contextlib
import encodings.utf_8_sig  # noqa: F401  an unprivileged child may not be able to read the library
import fnmatch
import hashlib
import json
import os
import random
import re
import resource
import shlex
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import SCRIPT, job, need, plan, plant, pythons, tree

import transport
from pod import payload
from transport import LIMITS, Entry, Limits, Refusal, Tree, collect, pack, plan_for

ROOT = Path(transport.__file__).parent
HF_TOKEN = "hf_" + "Ab1" * 12  # put together here, so that no scanner takes this file for a leak


def shipped(root: Path, script: str = SCRIPT, exclude: tuple[str, ...] = (), include: tuple[str, ...] = ()) -> dict[str, Entry]:
    return {entry.path: entry for entry in collect(root, script, exclude, include).entries}


def refused(root: Path, script: str = SCRIPT, exclude: tuple[str, ...] = ()) -> Refusal:
    with pytest.raises(Refusal) as caught:
        collect(root, script, exclude)
    assert caught.value.what and caught.value.fix
    assert "\n" not in caught.value.what + caught.value.fix, "what is wrong and what to do are one line each"
    return caught.value


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return plant(tmp_path / "repo", {SCRIPT: "print('hello')\n"})


# ---------------------------------------------------------------- collect: what ships


def test_family_scope(tmp_path: Path) -> None:
    """Every package; of recipes/ the script's family, plain files and folders that begin with `_`; no steps/."""
    root = plant(tmp_path, dict.fromkeys([
        "src/nemotron/__init__.py", "src/nemotron/kit/io.py", "src/other/recipes_like.py",
        "src/nemotron/recipes/__init__.py", "src/nemotron/recipes/_shared/a.py",
        "src/nemotron/recipes/nano3/stage0/train.py", "src/nemotron/recipes/nano3/stage0/config/default.yaml",
        "src/nemotron/recipes/nano3/_shared/b.py", "src/nemotron/recipes/super3/stage0/train.py",
        "src/nemotron/recipes/super3/x/y.py", "src/other/recipes/super3/z.py", "src/other/recipes/nano3/z.py",
        "src/nemotron/steps/__init__.py", "src/nemotron/steps/nano3/s.py", "src/nemotron/steps/super3/s.py",
        "src/nemotron/cli/nano3/c.py", "src/nemotron/cli/super3/c.py", "src/nemotron/cli/_shared/c.py",
        "src/nemotron/cli/common/c.py", "src/nemotron/plots/super3/p.py", "outside.py", "tests/test_x.py"], ""))
    found = collect(root, "src/nemotron/recipes/nano3/stage0/train.py")
    assert [entry.path for entry in found.entries] == [
        "src/nemotron/__init__.py", "src/nemotron/cli/_shared/c.py", "src/nemotron/cli/common/c.py",
        "src/nemotron/cli/nano3/c.py", "src/nemotron/kit/io.py", "src/nemotron/plots/super3/p.py",
        "src/nemotron/recipes/__init__.py", "src/nemotron/recipes/_shared/a.py",
        "src/nemotron/recipes/nano3/_shared/b.py", "src/nemotron/recipes/nano3/stage0/config/default.yaml",
        "src/nemotron/recipes/nano3/stage0/train.py", "src/other/recipes/nano3/z.py", "src/other/recipes_like.py",
    ]
    assert found.left_out == tuple((path, "another family") for path in (
        "src/nemotron/cli/super3", "src/nemotron/recipes/super3", "src/nemotron/steps", "src/other/recipes/super3"))
    step = shipped(root, "src/nemotron/steps/super3/s.py")
    assert "src/nemotron/steps/__init__.py" in step
    assert not [path for path in step if "/recipes/" in path or "/steps/nano3/" in path]


def test_script_beside_the_families_ships_all_of_them(tmp_path: Path) -> None:
    root = plant(tmp_path, {"src/p/recipes/all.py": "", "src/p/recipes/a/x.py": "", "src/p/recipes/b/x.py": ""})
    assert len(shipped(root, "src/p/recipes/all.py")) == 3


LEFT_BEHIND = {
    "version control": [".git/config", ".git", ".hg/x", ".svn/x", ".jj/x"],
    "cache": [
        "__pycache__/x", ".venv/lib/x.py", "node_modules/x.js", ".tox/x", ".pytest_cache/x", ".mypy_cache/x", ".ruff_cache/x",
        ".hypothesis/x", ".cache/x", "p.egg-info/PKG-INFO", "a.pyc", ".ipynb_checkpoints/x.py", ".virtual_documents/x.py",
        ".coverage", ".coverage.host.1"],
    "left by a program": [
        ".a.py.swp", ".a.py.swo", "a.py.swp", "a.py~", "a.py.~1~", ".#a.py", "#a.py#", "4913", ".a.py.kate-swp", ".~a.ipynb",
        ".~lock.a.csv#", "~$a.docx", "a.py.save", "a.py.save.1", "a.py___jb_tmp___", "a.py___jb_old___", ".idea/x", ".vscode/x",
        ".history/a_2024.py", ".goutputstream-AB12CD", "a.py.orig", "a.py.rej", "a.bak", "a_LOCAL_12345.py", "a_BASE_1234.yaml",
        "a.py.REMOTE.9123.py", "core.4711", "vgcore.1", ".nfs00000000a1b2c3d400000001", ".fuse_hidden0000a1", ".snapshot/x.py",
        "lost+found/x", ".Trash-1000/x.py", "@eaDir/x", ".directory", "._a.py", ".DS_Store", "__MACOSX/a.py", ".AppleDouble/a.py",
        "Thumbs.db", "desktop.ini", "a.py:Zone.Identifier", "a.py\uf03aZone.Identifier", ".stfolder/x", ".stversions/a.py",
        ".syncthing.a.py.tmp", "~syncthing~a.py.tmp", "a.sync-conflict-20240101-120000-ABCDEFG.py", ".dropbox.cache/a.py",
        "a (me's conflicted copy 2024-01-01).py", "a (Case Conflict).py", ".rsync-partial/a.py", ".a.py.Xy12aB", ".a.py.ABCDEF"],
    "virtual environment": ["my env/pyvenv.cfg", "venv/bin/activate", "conda/conda-meta/history"],
}
LEFT_BEHIND["cache"].append("tagged/CACHEDIR.TAG")


@pytest.mark.parametrize("reason, place", [(reason, place) for reason, places in LEFT_BEHIND.items() for place in places])
def test_what_is_never_source_stays_and_is_listed(repo: Path, reason: str, place: str) -> None:
    plant(repo, {"src/pkg/" + place: "x"})
    if "." in place.split("/")[0]:  # some are links to nowhere, like the locks of Emacs
        (repo / "src/pkg/sub").mkdir()
        (repo / "src/pkg/sub" / place.split("/")[0]).symlink_to("me@host.4711:1700000000")
    found = collect(repo, SCRIPT)
    assert [entry.path for entry in found.entries] == [SCRIPT]
    assert {where for _, where in found.left_out} == {reason}
    assert ("src/pkg/" + place.split("/")[0], reason) in found.left_out
    assert "src/pkg/" + place in shipped(repo, include=(place.split("/")[0],), exclude=("sub",))


@pytest.mark.parametrize("place", [
    "venv/__init__.py", "env/x.py", "core/x.py", "core.py", "cache/x.py", "history/x.py", "build/x.py", "dist/x.py", "snapshot.py",
    ".env.example", ".env.sample", ".gitignore", ".dockerignore", "x.original.py", "backup.py", "base_1.py", "LOCAL_1.py", "qwen_BASE_72.yaml", "x_BASE_1000/x.py",
    "rejects.py", "a_base_12.py", "__main__.py", "swp.py", "conflict.py", "4913.py", ".hidden.yaml", "#notes.txt", "a#b.py",
    "thumbs.py", "TRASH.py", ".pre-commit.config.sample", "venv/bin/x.py", "vgcore.py",
])
def test_source_with_a_similar_name_ships(repo: Path, place: str) -> None:
    plant(repo, {"src/pkg/" + place: "x"})
    assert "src/pkg/" + place in shipped(repo)


@given(st.text(max_size=40) | st.from_regex(transport.NEVER_SOURCE, fullmatch=True))
def test_no_name_is_looked_at_for_long_and_python_source_is_never_dropped_by_its_name(name: str) -> None:
    reason = transport.never_source(name)
    assert reason in ("", "version control", "cache", "left by a program")
    if name.isidentifier() and not name.startswith("__"):
        assert not reason or name == "node_modules" or "___jb_" in name  # JetBrains writes those


def test_gitignored_source_ships(repo: Path) -> None:
    plant(repo, {".gitignore": "data/\nbuild\n*.py\n", "src/pkg/.gitignore": "*", "src/pkg/data/prep.py": "",
                 "src/pkg/build/make.py": ""})
    assert {"src/pkg/data/prep.py", "src/pkg/build/make.py"} <= set(shipped(repo))


@pytest.mark.parametrize("name, reason", [
    ("weights.safetensors", "data or model file"), ("a.parquet", "data or model file"), ("x.tar", "data or model file"),
    ("x.jsonl.gz", "data or model file"), ("README.md", "documentation"), ("CLAUDE.md", "documentation"),
    (".env", "credential"), (".env.local", "credential"), (".netrc", "credential"), ("id_rsa", "credential"),
    ("id_ed25519.pub", "credential"), ("server.pem", "credential"), ("server.key", "credential"),
    ("credentials.json", "credential"), ("service-account-7.json", "credential"), ("env.toml", "credential"),
    (".npmrc", "credential"), ("kubeconfig", "credential"), (".aws/config", "credential"),
    (".ssh/known_hosts", "credential"),
    (".kube/x", "credential"), (".docker/config.json", "credential"),
])
def test_left_out_and_listed(repo: Path, name: str, reason: str) -> None:
    plant(repo, {"src/pkg/" + name: "x"})
    found = collect(repo, SCRIPT)
    assert [entry.path for entry in found.entries] == [SCRIPT]
    assert found.left_out == (("src/pkg/" + name.split("/")[0], reason),)


KEY_LINE = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"
PEM = "-----BEGIN %sPRIVATE KEY-----"  # put together here as well


@pytest.mark.parametrize("secret", [
    HF_TOKEN, "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2_" * 10, "nvapi-" + "a1-_" * 12, "AKIA" + "IOSFODNN7EXAMPLF",
    "sk-" + "a1B2" * 10, "xoxb-" + "123-abc" * 4, "glpat-" + "a1B2c" * 4, PEM % "" + "\n" + KEY_LINE,
    PEM % "RSA " + "\r\n" + KEY_LINE, PEM % "OPENSSH " + "\n" + KEY_LINE,
    json.dumps({"type": "service_account", "private_key": PEM % "" + "\n" + KEY_LINE + "\n"}),
], ids=lambda secret: secret[:12].strip())
def test_tokens_by_their_shape(repo: Path, secret: str) -> None:
    plant(repo, {"src/pkg/notes.txt": "first line\nkey = '%s'\n" % secret,
                 "src/pkg/clean.txt": "key = os.environ['KEY']"})
    found = collect(repo, SCRIPT)
    assert [entry.path for entry in found.entries] == ["src/pkg/clean.txt", SCRIPT]
    assert found.left_out == (("src/pkg/notes.txt", "credential"),)


@pytest.mark.parametrize("text", [
    "from hf_transfer import x; ghp_ = 1; sk- AKIA xoxb- nvapi-", "task-" + "a" * 40,
    "hf_home_and_more_words_than_thirty_letters",
    'PATTERN = "-----BEGIN PRIVATE KEY-----"', "whisk-" + "b" * 40,
])
def test_what_only_looks_a_little_like_a_token_ships(repo: Path, text: str) -> None:
    plant(repo, {"src/pkg/x.py": text})
    assert "src/pkg/x.py" in shipped(repo)


@pytest.mark.parametrize("text", [
    "AKIA" + "IOSFODNN7EXAMPLE", "AKIA" + "I44QH8DHBEXAMPLE", "hf_" + "x" * 34, "hf_" + "YourHuggingFaceTokenHere0123456789",
    "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a", "sk-" + "your-api-key-goes-in-here-please-1", "sk-" + "1234567890abcdef" * 2,
    "nvapi-" + "X" * 64, "glpat-" + "0" * 20, "xoxb-" + "EXAMPLE-TOKEN-OF-SLACK-1", "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789",
], ids=lambda text: text[:12])
def test_the_example_keys_of_documentation_are_none(repo: Path, text: str) -> None:
    plant(repo, {"src/pkg/x.py": "# like %s\n" % text, "src/pkg/x.md": text})
    assert {"src/pkg/x.py", "src/pkg/x.md"} <= set(shipped(repo))
    plant(repo, {"src/pkg/x.py": "# like %s\nkey = '%s'\n" % (text, HF_TOKEN)})
    assert "src/pkg/x.py:2: " in refused(repo).what, "an example hides no other key"


def test_a_module_with_a_credential_is_no_hole_in_the_job(repo: Path) -> None:
    plant(repo, {"src/pkg/a.py": "import os\n\nkey = '%s'\n" % HF_TOKEN, "src/pkg/b.sh": "K=%s\n" % HF_TOKEN,
                 "src/pkg/notes.txt": HF_TOKEN, "src/pkg/id_rsa_utils.py": "x = 1\n"})
    problem = refused(repo)
    assert problem.what.startswith("src/pkg/a.py:3, src/pkg/b.sh:1: ") and HF_TOKEN not in str(problem)
    assert "exclude" in problem.fix and "include" in problem.fix and problem.code == 2
    left = collect(repo, SCRIPT, ("a.py", "src/pkg/b.sh"))
    assert [entry.path for entry in left.entries] == ["src/pkg/id_rsa_utils.py", SCRIPT]
    assert dict(left.left_out) == {"src/pkg/a.py": "excluded by a.py", "src/pkg/b.sh": "excluded by src/pkg/b.sh",
                                   "src/pkg/notes.txt": "credential"}
    assert {"src/pkg/a.py", "src/pkg/b.sh"} < set(shipped(repo, include=("a.py", "b.sh")))
    (repo / ".airliftignore").write_text("!a.py\nb.sh\n")
    assert refused(repo).what.startswith("src/pkg/a.py:3: "), "a checkout takes no credential in"


def test_env_examples_ship(repo: Path) -> None:
    plant(repo, {"src/pkg/.env.example": "A=", "src/pkg/credentials/__init__.py": ""})
    assert {"src/pkg/.env.example", "src/pkg/credentials/__init__.py"} <= set(shipped(repo))


def test_exclude_and_ignore_file(repo: Path) -> None:
    plant(repo, {"src/pkg/big/a.txt": "", "src/pkg/notes.txt": "", "src/pkg/x.csv": "", "src/pkg/sub/x.csv": "",
                 "src/pkg/only/here.py": "", "src/pkg/sub/only/here.py": "", "src/pkg/keep.py": ""})
    (repo / ".airliftignore").write_bytes(b"\xef\xbb\xbfbig/\r\n\r\n# a comment\r\n  notes.* \r\nsrc/pkg/only\r\n")
    found = collect(repo, SCRIPT, ("*.csv",))
    assert [e.path for e in found.entries] == ["src/pkg/keep.py", SCRIPT, "src/pkg/sub/only/here.py"]
    assert dict(found.left_out) == {
        "src/pkg/big": "excluded by big/", "src/pkg/notes.txt": "excluded by notes.*",
        "src/pkg/only": "excluded by src/pkg/only",
        "src/pkg/x.csv": "excluded by *.csv", "src/pkg/sub/x.csv": "excluded by *.csv"}


def test_what_is_taken_back_in(repo: Path) -> None:
    plant(repo, {"src/pkg/vocab.txt.gz": "", "src/pkg/other.gz": "", "src/pkg/README.md": "", "src/pkg/venv/pyvenv.cfg": "",
                 "src/pkg/x.csv": "", "src/pkg/y.csv": "", "src/pkg/recipes/kin/a.py": "", "src/pkg/.env": "", "src/pkg/id_rsa": ""})
    (repo / ".airliftignore").write_text("*.csv\n!y.csv\n!vocab.*\n!.env\n!kin\n")
    found = collect(repo, SCRIPT, ("!id_rsa",))
    assert [entry.path for entry in found.entries] == [
        "src/pkg/recipes/fam/train.py", "src/pkg/recipes/kin/a.py", "src/pkg/vocab.txt.gz", "src/pkg/y.csv"]
    assert dict(found.left_out) == {
        "src/pkg/.env": "credential", "src/pkg/id_rsa": "credential", "src/pkg/other.gz": "data or model file",
        "src/pkg/README.md": "documentation", "src/pkg/venv": "virtual environment", "src/pkg/x.csv": "excluded by *.csv"}
    mine = collect(repo, SCRIPT, ("*.gz",), ("src/pkg/*",))
    assert not mine.left_out and len(mine.entries) == 10
    assert [path for path in shipped(repo, exclude=("y.csv",)) if path.endswith(".csv")] == [], "the last pattern wins"


PATTERNS = st.lists(st.builds(lambda sign, text: sign + text, st.sampled_from(["", "!"]), st.sampled_from(
    ["*.py", "a*", "src/pkg/*", "b.gz", "*", "pkg", "src/pkg/a.py", "[ab].gz", "*/b.gz"])), max_size=6)


@given(PATTERNS, st.sampled_from(["src/pkg/a.py", "src/pkg/b.gz", "src/x/a.gz", "src/pkg"]))
def test_the_last_pattern_that_fits_rules(patterns: list[str], path: str) -> None:
    def fits(pattern: str) -> bool:
        return fnmatch.fnmatchcase(path if "/" in pattern else path.split("/")[-1], pattern.lstrip("!"))

    assert transport._ruling(tuple(patterns), path) == next(filter(fits, reversed(patterns)), "")


def test_what_a_config_names_outside_of_src(repo: Path, tmp_path: Path) -> None:
    plant(repo, {"conf/blend.json": "{}", "README.md": "x", "conf/link.json": "-> blend.json", ".git/config": "x", ".env": "x",
                 "conf/away.json": "-> %s/secret" % tmp_path, "conf/up.json": "-> ../../secret", "w.safetensors": "x",
                 "conf/odd.txt": HF_TOKEN, "old/x.json": "{}", "conf/dangling": "-> nowhere"})
    (tmp_path / "secret").write_text("x")
    (repo / "big.json").write_bytes(b"x" * (transport.MAX_NAMED + 1))
    also = ("conf/blend.json", "README.md", "conf/link.json", ".git/config", ".env", "conf/away.json", "conf/up.json",
            "w.safetensors", "conf/odd.txt", "old/x.json", "conf/dangling", "big.json", "conf")
    found = collect(repo, SCRIPT, ("old",), also=also)
    assert {entry.path: (entry.data, entry.link) for entry in found.entries if entry.path != SCRIPT} == {
        "conf/blend.json": (b"{}", False), "README.md": (b"x", False), "conf/link.json": (b"{}", False)}
    limit = "outside of src, and no file of up to 1.0 MiB"
    assert dict(found.left_out) == {
        ".git/config": "version control", ".env": "credential", "conf/away.json": limit, "conf/up.json": limit,
        "w.safetensors": "data or model file", "conf/odd.txt": "credential", "old/x.json": "excluded by old",
        "conf/dangling": limit, "big.json": limit, "conf": limit}


def test_uncommitted_and_executable(repo: Path) -> None:
    for mode in (0o000, 0o644, 0o755, 0o700, 0o4755, 0o611, 0o066):
        path = repo / ("src/m%o" % mode)
        path.write_bytes(b"x")
        path.chmod(mode | (0 if os.geteuid() == 0 else 0o400))
    assert {path for path, entry in shipped(repo).items() if entry.executable} == {"src/m755", "src/m700", "src/m4755"}


# ---------------------------------------------------------------- collect: links


def test_links_in_the_tree(repo: Path) -> None:
    plant(repo, {
        "src/pkg/real/a.py": "", "src/pkg/file": "-> real/a.py", "src/pkg/folder": "-> real",
        "src/pkg/up": "-> ../pkg/real/a.py",
        "src/pkg/chain": "-> file", "src/pkg/loop": "-> .", "src/pkg/through": "-> folder/a.py",
        "src/pkg/round": "-> ../../../%s/src/pkg/real/a.py" % repo.name, "src/abs": "-> %s/src/pkg/real" % repo,
        "src/all": "-> ../src",
    })
    links = {path: entry.data.decode() for path, entry in shipped(repo).items() if entry.link}
    assert links == {
        "src/pkg/file": "real/a.py", "src/pkg/folder": "real", "src/pkg/up": "real/a.py", "src/pkg/chain": "file",
        "src/pkg/loop": ".", "src/pkg/through": "folder/a.py", "src/pkg/round": "real/a.py", "src/abs": "pkg/real",
        "src/all": "."}


def test_a_link_whose_way_leads_back_through_another_link(repo: Path) -> None:
    """The kernel takes `..` from where a link leads to; a path that is only cleaned as text would name another file."""
    plant(repo, {"src/deep/er/in.py": "right", "src/deep/which.py": "right", "src/which.py": "wrong",
                 "src/jump": "-> deep/er", "src/odd": "-> jump/../which.py"})
    assert (repo / "src/odd").read_text() == "right"
    assert shipped(repo)["src/odd"].data == b"deep/which.py"


def test_absolute_links_under_another_name_of_the_tree(tmp_path: Path) -> None:
    plant(tmp_path / "real", {SCRIPT: "", "src/a.py": ""})
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "real/src/link").symlink_to(tmp_path / "alias/src/a.py")
    for root in (tmp_path / "real", tmp_path / "alias"):
        assert shipped(root)["src/link"].data == b"a.py"


def test_a_relative_root(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(repo, {"src/a.py": "", "src/link": "-> %s/src/a.py" % repo})
    monkeypatch.chdir(repo)
    assert shipped(Path("."))["src/link"].data == b"a.py"


@pytest.mark.parametrize("target, word", [
    ("/etc/passwd", "leaves the tree"), ("../../../outside.txt", "leaves the tree"),
    ("../../../outside", "leaves the tree"),
    ("../../../nowhere", "leaves the tree"), ("nowhere.py", "does not ship"), ("real/nowhere", "does not ship"),
    ("big.parquet", "does not ship"), ("empty", "does not ship"), (".env", "does not ship"),
    ("__pycache__/x.pyc", "not ship"),
    ("../../src2/x.py", "leaves the tree"), ("link", "does not ship"), ("other", "does not ship"),
    ("gone/a.py", "does not ship"),
])
def test_links_that_would_be_holes(repo: Path, tmp_path: Path, target: str, word: str) -> None:
    plant(tmp_path, {"outside.txt": "secret", "outside/x": "", "repo/src2/x.py": "", "repo/src/pkg/real/a.py": "",
                     "repo/src/pkg/big.parquet": "", "repo/src/pkg/.env": "", "repo/src/pkg/__pycache__/x.pyc": "",
                     "repo/src/pkg/other": "-> link", "repo/src/pkg/gone": "-> real"})
    (repo / "src/pkg/empty").mkdir()
    (repo / "src/pkg/link").symlink_to(target)
    exclude = ("gone",) if target.startswith("gone") else ("other",) if target != "other" else ()
    problem = refused(repo, exclude=exclude)
    assert word in problem.what and problem.code == 2
    assert re.match("src/pkg/(link|other) is a link", problem.what)
    assert "exclude" in problem.fix
    assert SCRIPT in shipped(repo, exclude=(*exclude, "link", "other")), "what the refusal proposes must help"


def test_a_link_into_another_family(repo: Path) -> None:
    plant(repo, {"src/pkg/recipes/other/x.py": "", "src/pkg/recipes/fam/x.py": "-> ../other/x.py"})
    assert "does not ship" in refused(repo).what


# ---------------------------------------------------------------- collect: refusals


def test_no_src(tmp_path: Path) -> None:
    assert "no src" in refused(tmp_path).what
    assert "no src" in refused(tmp_path / "absent").what


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_neither_file_nor_folder(repo: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repo / "src/pkg/odd"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("odd")
    else:
        need(os.geteuid() == 0, "only root makes devices")
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    found = collect(repo, SCRIPT)
    assert [entry.path for entry in found.entries] == [SCRIPT]
    assert found.left_out == (("src/pkg/odd", "neither a file, a folder nor a link"),)


@pytest.mark.parametrize("name", [b"caf\xe9.py", b"\xff\xfe", b"\xed\xa0\x80"])
def test_names_that_are_not_utf8(repo: Path, name: bytes) -> None:
    with open(os.fsencode(repo) + b"/src/pkg/" + name, "wb"):
        pass
    problem = refused(repo)
    assert "not UTF-8" in problem.what and "src/pkg" in problem.what
    problem.what.encode()  # it can be printed


def test_link_targets_that_are_not_utf8(repo: Path) -> None:
    os.symlink(b"/caf\xe9", os.fsencode(repo) + b"/src/pkg/away")
    problem = refused(repo)
    assert "leaves the tree" in problem.what
    problem.what.encode()
    os.unlink(repo / "src/pkg/away")
    os.symlink(b"caf\xe9", os.fsencode(repo) + b"/src/pkg/near")
    refused(repo).what.encode()


def test_a_file_that_changes_while_it_is_packed(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repo / "src/pkg/growing.log"
    changes = [lambda: path.write_bytes(b"more than before"), lambda: path.write_bytes(b"less"),
               lambda: (path.write_bytes(b"12345678"), os.utime(path, (1, 1)))]
    real = os.fstat
    for change in changes:
        path.write_bytes(b"12345678")
        calls = []

        def fstat(number: int, change=change, calls=calls) -> os.stat_result:
            if os.readlink("/proc/self/fd/%d" % number) != str(path):
                return real(number)
            calls.append(number)
            if len(calls) == 2:
                change()
            return real(number)

        monkeypatch.setattr(transport.os, "fstat", fstat)
        problem = refused(repo)
        assert "growing.log changed while it was packed" in problem.what
        assert "launch again" in problem.fix


def test_a_file_that_vanishes_meanwhile(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(repo, {"src/pkg/gone.py": ""})
    real = os.lstat

    def lstat(path: str) -> os.stat_result:
        if str(path).endswith("gone.py"):
            os.unlink(path)
        return real(path)

    monkeypatch.setattr(transport.os, "lstat", lstat)
    assert "gone.py cannot be read: No such file" in refused(repo).what


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Permissions bind: root's own reading does not tell."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was == 0:
            os.seteuid(0)


@pytest.mark.parametrize("place", ["src/pkg/closed.py", "src/pkg/closed", ".airliftignore"])
def test_what_cannot_be_read(place: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # tmp_path lies in a folder that is closed to others
        root = plant(Path(name), {SCRIPT: "", "src/pkg/closed.py": "", "src/pkg/closed/x.py": "", ".airliftignore": ""})
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        (root / place).chmod(0)
        with as_nobody():
            problem = refused(root)
        assert place in problem.what and "cannot be read" in problem.what


def test_an_ignore_file_that_is_not_text(repo: Path) -> None:
    (repo / ".airliftignore").write_bytes(b"\xff\xfe\x00")
    assert ".airliftignore cannot be read" in refused(repo).what


@pytest.mark.parametrize("exclude, word", [
    (("train.py",), "excluded by train.py"), (("src/pkg/recipes/fam",), "excluded by src/pkg/recipes/fam"),
    (("pkg",), "excluded by pkg"),
])
def test_a_recipe_that_would_not_ship(repo: Path, exclude: tuple[str, ...], word: str) -> None:
    problem = refused(repo, exclude=exclude)
    assert SCRIPT + " is the recipe" in problem.what and word in problem.what


def test_a_recipe_with_a_secret_in_it(repo: Path) -> None:
    (repo / SCRIPT).write_text("TOKEN = '%s'\n" % HF_TOKEN)
    problem = refused(repo)
    assert problem.what.startswith(SCRIPT + ":1: what looks like a credential")
    assert HF_TOKEN not in problem.what + problem.fix


def test_a_recipe_in_a_folder_that_never_ships(tmp_path: Path) -> None:
    script = "src/pkg/.tox/train.py"
    assert refused(plant(tmp_path, {script: ""}), script).what == script + " is the recipe, but it would not ship: cache"
    assert "no such file" in refused(tmp_path, "src/pkg/train.py").what


def test_a_file_too_large_for_source(repo: Path) -> None:
    with open(repo / "src/pkg/weights", "wb") as file:
        file.truncate(50 << 30)  # sparse; nobody reads it into memory
    found = collect(repo, SCRIPT)
    assert found.oversize == ((50 << 30, "src/pkg/weights"),)
    whole = plan_for("lepton", found, job())
    assert not whole.fits and whole.biggest[0] == (50 << 30, "src/pkg/weights")
    with pytest.raises(Refusal, match="one file needs 53,687,091,200 of 67,108,864 bytes") as problem:
        whole.require_fit()
    assert problem.value.code == 3 and "src/pkg/weights" in problem.value.fix and "exclude" in problem.value.fix


def test_folders_without_end(repo: Path) -> None:
    folder = repo / "src"
    for _ in range(18):
        folder = folder / ("d" * 60)
    folder.mkdir(parents=True)
    (folder / "x").touch()
    assert "path of more than" in refused(repo).what


def test_folders_as_deep_as_allowed(repo: Path, tmp_path: Path) -> None:
    deep = "src/" + "d/" * 509 + "x"
    assert len(deep) == transport.MAX_PATH - 1
    plant(repo, {deep: "here"})
    found = collect(repo, SCRIPT)
    assert deep in {entry.path for entry in found.entries}
    payload.unpack(pack(found), str(tmp_path / "code"))
    assert (tmp_path / "code" / deep).read_text() == "here"


def test_twenty_thousand_files(tmp_path: Path) -> None:
    for number in range(200):
        folder = tmp_path / ("src/pkg/p%03d" % number)
        folder.mkdir(parents=True)
        for index in range(100):
            (folder / ("m%02d.py" % index)).write_bytes(b"value = %d\n" % (number * 100 + index))
    plant(tmp_path, {SCRIPT: ""})
    found = collect(tmp_path, SCRIPT)
    tar = pack(found)
    assert len(found.entries) == 20_001 and len(tar) > 20_001 * 1024


# ---------------------------------------------------------------- pack: one tree, one tar

FIXED = {"src/pkg/__init__.py": "", "src/pkg/größe/データ.txt": "ünï", "src/pkg/" + "long" * 40 + ".py": "x" * 1000,
         "src/pkg/link": "-> größe", "src/a b/'q\"uote.sh": "#!/bin/sh\n", "src/pkg/new\nline": "1", SCRIPT: "pass\n"}
FIXED_SHA256 = "e62beb72eb53f342f68d5d51295ffa1726e76b90f264cfaaee5e65054226ff8a"
PRINT_DIGEST = """
import hashlib, os, random, sys
sys.path.insert(0, %r)
import transport
from pathlib import Path
real = os.scandir
class Shuffled(list):
    __enter__ = lambda self: self
    __exit__ = lambda self, *rest: None
def scandir(path):
    with real(path) as items:
        found = Shuffled(items)
    random.shuffle(found)
    return found
os.scandir = scandir
tree = transport.collect(Path(sys.argv[1]), sys.argv[2])
print(hashlib.sha256(transport.pack(tree)).hexdigest(), hashlib.sha256(ascii(tree).encode()).hexdigest())
""" % str(ROOT)


def digest_in(root: Path, python: str = sys.executable, umask: int = 0o022, **env: str) -> list[str]:
    done = subprocess.run([python, "-c", PRINT_DIGEST, str(root), SCRIPT], env=env, capture_output=True, umask=umask)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split()


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = plant(tmp_path_factory.mktemp("fixed"), FIXED)
    (root / "src/a b/'q\"uote.sh").chmod(0o755)
    return root


def test_the_fixed_tree_has_the_digest_it_had_on_every_machine_before(fixed: Path) -> None:
    assert digest_in(fixed)[0] == FIXED_SHA256


@pytest.mark.parametrize("env", [
    {"TZ": "Asia/Tokyo"}, {"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
     "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}, {"SOURCE_DATE_EPOCH": "1"},
], ids=str)
def test_same_tar_in_another_environment(fixed: Path, env: dict[str, str]) -> None:
    assert digest_in(fixed, **env) == digest_in(fixed)


def test_same_tar_elsewhere_later_and_under_another_umask(fixed: Path, tmp_path: Path) -> None:
    was = os.umask(0o077)
    try:
        names = list(FIXED)
        random.shuffle(names)
        plant(tmp_path / "some where 'else'", {name: FIXED[name] for name in names})
    finally:
        os.umask(was)
    copy = tmp_path / "some where 'else'"
    (copy / "src/a b/'q\"uote.sh").chmod(0o700)
    for number, path in enumerate(sorted(copy.rglob("*"))):
        if not path.is_symlink():
            os.utime(path, (number * 1e6, number * 1e7))
    assert digest_in(copy, umask=0o077) == digest_in(fixed)


def test_same_tar_from_every_python(fixed: Path) -> None:
    for version, path in pythons().items():
        if version >= (3, 11):
            assert digest_in(fixed, path)[0] == FIXED_SHA256, path


NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\0"), min_size=1, max_size=8)
FILES = st.dictionaries(NAMES.filter(lambda name: name not in (".", "..")),
                        st.tuples(st.binary(max_size=60), st.booleans()),
                        min_size=1, max_size=8)


@given(FILES, st.randoms())
def test_order_of_entries_does_not_matter(files: dict[str, tuple[bytes, bool]], chance: random.Random) -> None:
    entries = [Entry("src/" + name, data, run) for name, (data, run) in files.items()]
    shuffled = list(entries)
    chance.shuffle(shuffled)
    one, two = (pack(Tree(tuple(sorted(some, key=lambda entry: entry.path)))) for some in (entries, shuffled))
    assert one == two


@given(FILES)
def test_any_change_gives_another_digest(files: dict[str, tuple[bytes, bool]]) -> None:
    entries = tuple(Entry("src/" + name, data, run) for name, (data, run) in sorted(files.items()))
    first = entries[0]
    changed = [Entry(first.path, first.data + b"x", first.executable),
               Entry(first.path + "x", first.data, first.executable),
               Entry(first.path, first.data, not first.executable)]
    tars = {pack(Tree((entry, *entries[1:]))) for entry in [first, *changed]}
    assert len(tars) == 4


@pytest.mark.parametrize("method", ["xz", "gz"])
def test_compression_holds_no_time(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = transport.compress(b"data" * 1000, method)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert transport.compress(b"data" * 1000, method) == first


def test_unknown_compression_and_executor() -> None:
    for executor, compression, word in (("local", "zip", "zip"), ("moon", "xz", "moon")):
        with pytest.raises(Refusal, match=word):
            plan_for(executor, tree(), job(), compression=compression)


# ---------------------------------------------------------------- the pod program

JOBS: list[dict[str, str]] = [{}, {"unpack": "shared"}, {"cluster": "pods"}, {"cluster": "platform"},
                              {"unpack": "shared", "cluster": "pods"}]


def parts_of(program: bytes) -> dict[str, str]:
    """module -> source of what a program holds."""
    parts = ast.parse(program).body[0]
    assert isinstance(parts, ast.Assign)
    return dict(ast.literal_eval(parts.value))


@pytest.mark.parametrize("description", JOBS, ids=str)
def test_a_program_holds_what_its_job_needs(description: dict[str, str]) -> None:
    made = plan(**(description | {"shared": "/s"} if description else {}))
    assert made.program == transport.pod_program(description)
    sent = "".join(made.env["AIRLIFT_POD_%04d" % number] for number in range(int(made.env["AIRLIFT_POD_CHUNKS"])))
    assert zlib.decompress(base64.b64decode(sent)) == made.program
    found = parts_of(made.program)
    optional = {"pod.shared": "unpack" in description, "pod.ray_nodes": description.get("cluster") == "pods",
                "pod.peers": description.get("cluster") == "pods",
                "pod.ray_cluster": description.get("cluster") == "platform"}
    base = {"pod", "pod.failures", "pod.rank", "pod.payload", "pod.places", "pod.process", "pod.entry"}
    assert set(found) == base | {name for name, there in optional.items() if there}
    for name in set(found) - {"pod"}:
        source = (ROOT / (name.replace(".", "/") + ".py")).read_text()
        assert found[name] == transport._bare(source)
    assert made.program.decode().endswith(transport._bare((ROOT / "pod/__main__.py").read_text()))


def test_every_module_of_the_pod_has_its_place_in_a_program() -> None:
    assert {path.stem for path in (ROOT / "pod").glob("*.py")} == {*transport.PARTS, "__init__", "__main__"}
    init = ast.parse((ROOT / "pod/__init__.py").read_text())
    assert len(init.body) == 1 and ast.get_docstring(init), "it travels as an empty one"


@pytest.mark.parametrize("path", sorted((ROOT / "pod").glob("*.py")), ids=lambda path: path.name)
def test_the_stripped_program_is_the_same_program(path: Path) -> None:
    source = path.read_text()
    bare = transport._bare(source)
    assert bare.count("\n") == source.count("\n"), "lines keep their numbers"
    assert len(bare) < len(source)

    def code(text: str) -> str:
        module = ast.parse(text)
        for node in ast.walk(module):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        return ast.dump(module)

    assert code(source) == code(bare)
    with open(path, "rb") as file:
        comments = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    assert not any(comment in bare for comment in comments)


SNIPPETS = ['"""doc"""\nx = "# no comment"  # yes\n', 'def f():\n    """doc\n    more"""\n    return "#"\n',
            'def f(): "doc"\n', 'class A:\n    "doc"  # here\n    y = """a\n# b\n"""\n', "x = 1 # end",
            "def f():\n    'é' # ü\n"]


@pytest.mark.parametrize("source", SNIPPETS)
def test_stripping(source: str) -> None:
    bare = transport._bare(source)
    namespaces: list[dict[str, object]] = [{}, {}]
    for text, namespace in zip((source, bare), namespaces, strict=True):
        exec(compile(text, "x", "exec"), namespace)
    plain = [{key: value for key, value in space.items() if isinstance(value, str | int) and key != "__doc__"}
             for space in namespaces]
    assert plain[0] == plain[1]


# ---------------------------------------------------------------- chunk


@given(st.text("abc+/=", max_size=300), st.integers(1, 50))
def test_chunks_join_to_the_text(text: str, size: int) -> None:
    pieces = transport.chunk(text, size)
    assert "".join(pieces) == text
    assert pieces and all(len(piece) == size for piece in pieces[:-1]) and len(pieces[-1]) <= size


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_stream(data: bytes, size: int) -> None:
    env = transport.stream("TREE", data, size)
    chunks = {name: value for name, value in env.items() if re.fullmatch(r"AIRLIFT_TREE_\d{4}", name)}
    assert len(env) == len(chunks) + 2
    assert env["AIRLIFT_TREE_CHUNKS"] == str(len(chunks))
    text = "".join(chunks[name] for name in sorted(chunks))
    assert base64.b64decode(text, validate=True) == data
    assert hashlib.sha256(text.encode()).hexdigest() == env["AIRLIFT_TREE_SHA256"]


@settings(max_examples=20)
@given(st.sampled_from(["local", "lepton", "dgxcloud", "docker"]), st.integers(0, 40_000), st.text(max_size=50),
       st.sampled_from([0, 1024, 5000]))
@example("dgxcloud", 40_000, "$(HOME) $$ `id` \"'", 0)
def test_what_a_platform_sees(executor: str, size: int, text: str, chunk_bytes: int) -> None:
    """Base64, digits and hexadecimal only, within the chunk limit; never the user's text."""
    text = text.replace("\0", "")
    made = plan_for(executor, tree({"src/data": random.Random(1).randbytes(size)}), chunk_bytes=chunk_bytes,
                    job=job(config=text, command="echo " + text, env={"A": text}, setup=[text]))
    limit = chunk_bytes or LIMITS[executor].chunk
    assert made.fits and made.chunk_limit == limit
    for name, value in made.env.items():
        assert re.fullmatch(r"AIRLIFT_(POD|JOB|TREE)_(\d{4}|CHUNKS|SHA256)|AIRLIFT_NODES", name)
        assert re.fullmatch(r"[A-Za-z0-9+/=]+", value)
        assert len(value) <= limit
    trees = [name for name in made.env if re.fullmatch(r"AIRLIFT_TREE_\d+", name)]
    assert len(trees) == made.chunks == -(-len(base64.b64encode(made.tar)) // limit)


def test_argv_survives_splitting() -> None:
    for executor in ("local", "docker", "lepton", "dgxcloud"):
        argv = plan(executor=executor).argv
        assert not re.search(r"[\s\"'$`\\#~!]", "".join(argv))
        joined = " ".join(argv)
        assert argv == shlex.split(joined) == joined.split() == shlex.split(joined, comments=True)
        assert len(joined) < 2_000


def test_the_plan_does_not_show_what_may_be_secret() -> None:
    assert "s3cr3t" not in repr(plan(visible={"TOKEN": "s3cr3t"}))


# ---------------------------------------------------------------- limits: the kernel's


def execs(env: dict[str, str], argv: list[str], program: str = "/bin/true") -> bool:
    """Whether the kernel takes argv and environment, at an 8 MiB stack."""
    def stack() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    try:
        return subprocess.run(argv, executable=program, env=env, preexec_fn=stack).returncode == 0
    except OSError as error:
        assert error.strerror == "Argument list too long"
        return False


def padding(size: int, name: str = "PAD%03d", piece: int = 100_000) -> dict[str, str]:
    """Variables for which exec_bytes counts exactly `size`."""
    env = {}
    head = len(name % 0) + 2 + transport.POINTER
    while size > 0:
        take = piece + head if size > piece + 2 * head else size
        assert take >= head
        env[name % len(env)] = "x" * (take - head)
        size -= take
    return env


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_one_string_against_the_kernel(over: int) -> None:
    size = transport.MAX_STRING + over
    assert execs({"A": "x" * (size - 3)}, ["true"]) == (over <= 0)
    assert execs({}, ["true", "x" * (size - 1)]) == (over <= 0)
    made = plan(visible={"A": "x" * (size - 3)})
    assert made.budget("one string") == (size, transport.MAX_STRING)
    assert made.fits == (over <= 0)
    unicode = plan(visible={"A": "é" * ((size - 3) // 2) + "x" * ((size - 3) % 2)})
    assert unicode.fits == (over <= 0), "the kernel counts bytes"


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_recipes_own_strings_are_checked_before_anything_is_sent(over: int) -> None:
    """They travel compressed in the chunks; in the pod they become an environment again."""
    size = transport.MAX_STRING + over
    assert plan_for("local", tree(), job(env={"A": "x" * (size - 3)})).fits == (over <= 0)
    assert plan_for("local", tree(), job(command="x" * size, setup=["x" * size])).fits, "a script is a file there"
    many = {"V%02d" % number: "x" * 100_000 for number in range(25)}
    with pytest.raises(Refusal, match="recipe's environment") as caught:
        plan_for("local", tree(), job(env=many)).require_fit()
    assert caught.value.code == 3


def test_exec_bytes_counts_what_the_kernel_counts() -> None:
    """By bisection: the largest environment that this kernel takes. The program's path is all that we do not count."""
    env, argv, low, high = {"A": "1", "EMPTY": ""}, ["true", "", "some argument"], 0, 3 << 20
    while high - low > 1:
        middle = (low + high) // 2
        if middle < 20 or execs(env | padding(middle), argv):
            low = middle
        else:
            high = middle
    largest = transport.exec_bytes(env | padding(low), argv)
    assert largest + len("/bin/true") + 1 == transport.MAX_EXEC


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_environment_against_the_kernel(over: int) -> None:
    """A plan at its limit still leaves room for what platform and image add, to the last byte of the reserve."""
    base = plan()
    limit = transport.MAX_EXEC - transport.EXEC_RESERVE
    made = plan(visible=padding(limit - base.budget("environment")[0] + over))
    assert made.budget("environment") == (limit + over, limit)
    assert made.fits == (over <= 0)
    path = len("/bin/true") + 1
    added = padding(transport.EXEC_RESERVE - path, "ADD%03d", 50_000)
    assert execs(made.env | added, made.argv) == (over <= 0)


# ---------------------------------------------------------------- limits: the platforms'


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("executor", ["lepton", "dgxcloud", "local", "docker"])
def test_chunk_limits(executor: str, over: int) -> None:
    """A tree whose text just fills a chunk: one chunk more only when it is one character too long."""
    limit = {"lepton": 98_304, "dgxcloud": 9_216}.get(executor, LIMITS[executor].chunk)
    assert len(transport.chunk("x" * (limit + over), LIMITS[executor].chunk)) == (2 if over > 0 else 1)
    made = plan({"src/noise": random.Random(2).randbytes(200_000)}, executor)
    assert max(len(value) for name, value in made.env.items() if "TREE_0" in name) == limit
    assert made.fits


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_value_limit(over: int) -> None:
    made = plan(executor="dgxcloud", visible={"TOKEN": "x" * (10_000 + over)})
    assert made.budget("one value") == (10_000 + over, 10_000)
    assert made.fits == (over <= 0)
    assert plan(executor="lepton", visible={"TOKEN": "x" * (10_000 + over)}).fits, "only run:AI has this limit"


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_argument_limit(over: int) -> None:
    used = len(" ".join(transport.ARGV))
    assert plan(executor="dgxcloud").budget("arguments") == (used, 9_500)
    limits = Limits(chunk=9_216, args=used - over)
    assert plan_for("dgxcloud", tree(), job(), limits=limits).fits == (over <= 0)


def object_size(made: transport.Plan, copies: int) -> int:
    """What an API object with `copies` copies of the environment is at least, in JSON."""
    pod = {"env": [{"name": name, "value": value} for name, value in made.env.items()], "command": made.argv}
    return len(json.dumps({"kind": "Job", "specs": [pod] * copies}))


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("executor, changes, copies", [
    ("lepton", {}, 1), ("lepton", {"nodes": 2}, 1), ("lepton", {"nodes": 2, "launch": "ray"}, 2), ("dgxcloud", {}, 1),
    ("dgxcloud", {"nodes": 2}, 2),
])
def test_object_limit(executor: str, changes: dict, copies: int, over: int) -> None:
    def padded(size: int) -> transport.Plan:
        """`size` bytes of JSON more, in values that no other limit minds."""
        env, each = {}, 4_000 + len(json.dumps({"name": "PAD000", "value": ""})) + 2
        while size > 2 * each:
            env["PAD%03d" % len(env)] = "x" * 4_000
            size -= each
        env["PAD%03d" % len(env)] = "x" * (size - each + 4_000)
        return plan_for(executor, tree(), job(**changes), env=env)

    limit = 1_572_864
    used, found = plan_for(executor, tree(), job(**changes)).budget("API object")
    assert found == limit
    room = (limit - used) // copies
    made = padded(room + over)
    assert 0 <= limit + over * copies - made.budget("API object")[0] < copies
    assert made.fits == (over <= 0)
    assert made.budget("environment")[0] <= made.budget("environment")[1]
    assert object_size(made, copies) <= made.budget("API object")[0] - transport.OBJECT_RESERVE + 100


def test_a_lowered_limit_is_used() -> None:
    used = plan(executor="lepton").budget("API object")[0]
    for over in (-1, 0, 1):
        limits = Limits(chunk=98_304, object=used - over)
        assert plan_for("lepton", tree(), job(), limits=limits).fits == (over <= 0)


def test_what_does_not_fit_is_said() -> None:
    """The sum, the limit, the ten biggest files and what to do; exit code 3."""
    noise = random.Random(3)
    files = {"src/n%02d" % number: noise.randbytes(80_000 + number) for number in range(15)}
    made = plan(files, "lepton")
    assert not made.fits
    with pytest.raises(Refusal) as caught:
        made.require_fit()
    refusal = caught.value
    assert refusal.code == 3
    used, limit = made.budget("API object")
    assert f"{used:,}" in refusal.what and f"{limit:,}" in refusal.what and "nothing was submitted" in refusal.what
    assert [name for name in files if name in refusal.fix] == ["src/n%02d" % number for number in range(5, 15)]
    assert "exclude" in refusal.fix and "\n" not in refusal.what + refusal.fix
    assert plan(files, "slurm").fits, "nemo-run's packager carries it there"


@pytest.mark.parametrize("executor, visible, changes, word", [
    ("dgxcloud", {"TOKEN": "x" * 10_001}, {}, "shorten the longest variable"),
    ("local", {"TOKEN": "x" * 131_072}, {}, "shorten the longest variable"),
    ("local", {}, {"env": {"A": "x" * 131_072}}, "shorten the longest variable"),
])
def test_what_to_do_fits_what_is_too_long(executor: str, visible: dict, changes: dict, word: str) -> None:
    with pytest.raises(Refusal) as caught:
        plan(executor=executor, visible=visible, **changes).require_fit()
    assert caught.value.code == 3 and word in caught.value.fix


@pytest.mark.parametrize("size", [-5, 1, 100, 1023])
def test_chunks_too_small_to_count(size: int) -> None:
    with pytest.raises(Refusal, match="chunk_bytes is %d" % size) as caught:
        plan(chunk_bytes=size)
    assert caught.value.code == 2
    assert int(plan(chunk_bytes=1024).env["AIRLIFT_POD_CHUNKS"]) < 1000, "the bootstrap reads AIRLIFT_POD_0..."


@pytest.mark.parametrize("changes", [
    {"env": {"A": "nul\0here"}}, {"env": {"A=B": ""}}, {"env": {"": ""}}, {"env": {"A\0": ""}}, {"setup": ["a\0"]},
    {"command": "a\0"}, {"env": {"A": "\udcff"}}, {"command": "\ud800"}, {"config": "\udcff"},
], ids=ascii)
def test_text_that_no_environment_holds(changes: dict) -> None:
    with pytest.raises(Refusal) as caught:
        plan(**changes)
    assert caught.value.code == 2
    str(caught.value).encode()


def test_a_tree_for_slurm_travels_outside_the_environment() -> None:
    files = {"src/noise": random.Random(4).randbytes(3_000_000)}
    made = plan(files, "slurm")
    assert made.fits and made.chunks == 0 and made.compression == "gz"
    assert not any("TREE" in name for name in made.env)
    assert made.digest == hashlib.sha256(pack(tree(files))).hexdigest()


def test_human() -> None:
    assert [transport.human(size) for size in (0, 1023, 1024, 1_234_567, 5 << 30)] == [
        "0 B", "1023 B", "1.0 KiB", "1.2 MiB", "5.0 GiB"]
