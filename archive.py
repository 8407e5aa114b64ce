"""The job is the archive: each packed tree is kept once under its digest, and how each run came about.

<state>/trees/<SHA-256 of the tar>.<compression> is a tree as it travelled. It appears whole or not at all, and is only
used where it still has its digest. AIRLIFT_TREES and AIRLIFT_TREES_BYTES bound their number and size; those of the
newest runs, and of runs that go on, stay in any case.
"""

import contextlib
import hashlib
import json
import lzma
import os
import re
import shlex
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import configs
import runs
import screen
import state
import transport
from pod import payload
from pod.failures import Failure
from profiles import UNREAD_KEYS
from transport import Packed, Refusal, Tree

TREES, BYTES = 200, 1 << 30  # bounds, where the variables do not say others (our choice)
NEWEST = 20  # runs whose trees stay in any case
METHODS = ("xz", "gz")
WIDEST = 1 << 30  # bytes of the tar of a job that is adopted
LARGEST = 4 << 30  # bytes of one packed tree that is read again


class Made(TypedDict, total=False):
    """How a run came about; it travels with the job. What is named or looks like a secret is ***."""

    words: list[str]  # of the command line
    config: list[str]  # of -c
    nodes: int | None  # of --nodes
    name: str | None  # of --name
    args: list[str]  # behind --
    run: dict[str, Any]  # the config's run section, with the overrides
    overrides: list[str]  # those of run.…
    settings: dict[str, Any]  # of the profile, with all that won over it
    git: dict[str, Any] | None  # commit, branch, and whether what travels differs from the commit
    version: str  # Airlift's
    plain: bool  # whether its config has no secret
    again: str | None  # the run whose tree and config it launched again


# ---------------------------------------------------------------- trees


def _limit(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,15}", text):
        raise Refusal("%s is %r" % (name, text), "it must be a whole number, 0 or more")
    return int(text)


def _held(digest: str, method: str) -> bytes | None:
    """A kept tree as it travelled, None where there is none, or a damaged one."""
    try:
        data = state.read(state.folder("trees", make=False) / ("%s.%s" % (digest, method)), LARGEST)
        return data if hashlib.sha256(payload.decompress(data, method)).hexdigest() == digest else None
    except (OSError, Failure):
        return None


def packed(tree: Tree, method: str) -> Packed:
    """The tree as it travels. Where it is kept, nothing is compressed again. Raises Refusal."""
    tar = transport.pack(tree)
    digest = hashlib.sha256(tar).hexdigest()
    return Packed(digest, method, _held(digest, method) or transport.compress(tar, method))


def keep(tree: Packed) -> str:
    """Keep a tree, and let go of the oldest beyond the bounds. Returns "", or why it could not be kept."""
    try:
        folder = state.folder("trees")
        path = folder / ("%s.%s" % (tree.digest, tree.method))
        if path.exists() and _held(tree.digest, tree.method):
            os.utime(path)
        else:
            state.write(path, tree.data)
        _let_go(folder, tree.digest)
    except OSError as error:
        return "the tree is not kept for fetch and again: %s" % error.strerror
    return ""


def _let_go(folder: Path, newest: str) -> None:
    most, room = _limit("AIRLIFT_TREES", TREES), _limit("AIRLIFT_TREES_BYTES", BYTES)
    found = []
    for path in folder.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # another launcher was here
            info = path.stat()
            found.append((info.st_mtime, info.st_size, path))
    if len(found) <= most and sum(size for _, size, _ in found) <= room:
        return
    known = runs.all_runs()[0]
    stay = {newest, *(run.sha256 for number, run in enumerate(known) if number < NEWEST or not run.ended)}
    for _, size, path in sorted(found, reverse=True):
        most, room = most - 1, room - size
        if (most < 0 or room < 0) and path.stem not in stay:
            path.unlink(missing_ok=True)


def tree_of(run: runs.Run) -> Packed:
    """The tree that a run carries. Raises Refusal where it is not kept, or no longer as it was."""
    for method in METHODS:
        data = _held(run.sha256, method)
        if data:
            return Packed(run.sha256, method, data)
    there = [path.name for path in state.folder("trees", make=False).glob(run.sha256 + ".*")]
    raise Refusal("the tree of run %s is %s" % (run.id, "damaged: " + there[0] if there else "not kept here"),
                  "if the job is still on its platform: python launch.py adopt %s NAME" % run.profile)


def entries(tree: Packed) -> Tree:
    """A packed tree's files and links."""
    tar = payload.decompress(tree.data, tree.method)
    return Tree(tuple(transport.Entry(info.name, data, bool(info.mode & 0o100), info.issym())
                      for _, info, data in payload.members(tar, "")))


def write_out(tree: Packed, folder: Path) -> None:
    """The tree's files in a folder that is new; what was written is read again and must have the digest. Raises
    Refusal."""
    try:
        payload.extract(payload.decompress(tree.data, tree.method), str(folder))
    except OSError as error:
        raise Refusal("%s cannot be written: %s" % (error.filename or folder, error.strerror),
                      "make room there, or name another folder") from None
    found = hashlib.sha256(transport.pack(_on_disk(folder, entries(tree)))).hexdigest()
    if found != tree.digest:
        raise Refusal("what was written to %s has the digest %s, not %s" % (folder, found[:12], tree.digest[:12]),
                      "another program changes it, or its file system does; name another folder")


def _on_disk(folder: Path, tree: Tree) -> Tree:
    """What lies in a folder at the paths of a tree, read again, and whatever lies beside it."""
    found = []
    for place, folders, names in os.walk(folder):
        for name in [*names, *(each for each in folders if os.path.islink(os.path.join(place, each)))]:
            path = os.path.join(place, name)
            link = os.path.islink(path)
            data = os.fsencode(os.readlink(path)) if link else payload.content(path)
            inner = os.fsencode(os.path.relpath(path, folder)).decode("utf-8", "replace")
            found.append(transport.Entry(inner, data, not link and bool(os.lstat(path).st_mode & 0o100), link))
    order = {entry.path: number for number, entry in enumerate(tree.entries)}
    return Tree(tuple(sorted(found, key=lambda entry: order.get(entry.path, len(order)))))


# ---------------------------------------------------------------- how a run came about


def clean(value: Any) -> Any:
    """A copy of JSON-able data with *** for what is named like a secret, or looks like one."""
    def hidden(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): hidden(each) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [hidden(each) for each in item]
        return screen.hide(item) if isinstance(item, str) else item

    return hidden(screen.masked(value))


REFERENCES = ("secrets", "image_pull_secrets")  # keys whose values are names and references, never secrets


def clean_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A job's settings without what may hold secrets under any name."""
    hidden: dict[str, Any] = {key: "***" for key in UNREAD_KEYS if settings.get(key)}
    hidden["env_vars"] = dict.fromkeys(settings.get("env_vars", {}), "***")
    return clean({**settings, **hidden}) | {key: settings[key] for key in REFERENCES if key in settings}


def clean_run(section: Mapping[str, Any]) -> dict[str, Any]:
    """A config's run section."""
    env = section.get("env")
    kept = {key: env[key] for key in REFERENCES if key in env} if isinstance(env, dict) else {}
    return clean(section) | ({"env": clean(env) | kept} if kept else {})


def clean_words(words: list[str]) -> list[str]:
    """The words with *** for the value of each KEY=VALUE whose key is named like a secret."""
    split = [word.partition("=") for word in words]
    references = ("run.env.secrets", "run.env.image_pull_secrets")
    return [key + "=***" if sep and screen.secret_name(key.rpartition(".")[2]) and not key.lstrip("+~").startswith(
        references) else screen.hide(key + sep + value) for key, sep, value in split]


def git_state(root: Path, tree: Tree) -> dict[str, Any] | None:
    """The commit and branch of a source tree, and whether one of the files that travel differs from the commit; None
    where git, or a repository, is missing. Nothing that a checkout configures is run: no filter, hook or monitor."""
    git = ["git", "-C", str(root), "-c", "core.fsmonitor=false"]
    env = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", ""), "GIT_OPTIONAL_LOCKS": "0",
           "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}

    def asked(*words: str) -> bytes:
        return subprocess.run([*git, *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True,
                              timeout=5).stdout

    try:
        commit = asked("rev-parse", "--verify", "HEAD").decode().strip()
        branch = asked("rev-parse", "--abbrev-ref", "HEAD").decode("utf-8", "replace").strip()
        listed = asked("ls-tree", "-r", "-z", "HEAD").split(b"\0")
    except (OSError, subprocess.SubprocessError):
        return None
    blobs = {line.split(b"\t", 1)[1].decode("utf-8", "replace"): line.split(None, 3)[2] for line in listed if line}
    dirty = any(blobs.get(entry.path) != _blob(entry.data) for entry in tree.entries)
    return {"commit": commit, "branch": branch, "dirty": dirty}


def _blob(data: bytes) -> bytes:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest().encode()  # noqa: S324


def command_line(run: runs.Run, made: Made) -> str:
    """The command line that made a run."""
    words = list(made["words"])
    words += [word for name in made["config"] for word in ("-c", name)]
    for option, value in (("--nodes", made["nodes"]), ("--name", made["name"])):
        words += [option, str(value)] if value is not None else []
    words += ["--", *made["args"]] if made["args"] else []
    return "python launch.py " + " ".join(map(shlex.quote, words))


def story(run: runs.Run, made: Made) -> Iterator[str]:
    """How a run came about, in a few lines."""
    again = ", the tree and config of run %s again" % made["again"] if made.get("again") else ""
    yield "by:       %s%s" % (command_line(run, made), again)
    git = made.get("git")
    yield "tree:     sha256 %s%s" % (run.sha256, ", commit %s on %s%s" % (
        git["commit"][:12], git["branch"], ", with changes" if git["dirty"] else "") if git else "")
    yield "outputs:  %s" % (run.outputs or "none are kept")
    yield "airlift:  %s" % made["version"]


def how_to(run: runs.Run, made: Made) -> str:
    """The README of what `fetch` writes."""
    family, _, stage = run.recipe.partition("/")
    return """\
# Run %s of %s

    %s

%s

`tree/` is the source that its pods ran, file by file; packed by Airlift it has the SHA-256 above. `config.yaml` is the
config that its script read, with the `run` section that it was made with. What stood where `***` stands now was a
secret, and is not kept. To launch it from here:

    python launch.py %s %s PROFILE --repo-root tree -c config.yaml
""" % (run.id, run.recipe, "\n    ".join(story(run, made)),
       time.strftime("Launched at %F %T UTC.", time.gmtime(run.started)), family, stage)


# ---------------------------------------------------------------- adopt


class Found(NamedTuple):
    """A job on its platform, as its backend reads it: all that was sent, verified."""

    record: dict[str, Any]  # the backend's own
    sent: dict[str, Any]  # the job's description (pod/payload.py checks it)
    tree: Packed
    started: float


def from_env(env: Mapping[str, str], record: Mapping[str, Any], started: float) -> Found:
    """A job whose chunks are in its environment. Raises Refusal where the platform does not show all of them, or not
    as they were sent."""
    own = {name: value for name, value in env.items() if name.startswith("AIRLIFT_")}
    if not own:
        raise Refusal("the job carries no source of Airlift's", "name a job that Airlift has launched")
    try:
        data = payload.join(own, "TREE")
        for each in (data, payload.join(own, "JOB")):
            _require_bounded(each)
        sent, tar = payload.read_payload(own)
    except Failure as failure:
        raise Refusal("the platform does not show what was sent: " + failure.seen,
                      "fetch it where it was launched") from None
    tree = Packed(hashlib.sha256(tar).hexdigest(), sent["tree"]["compression"], data)
    return Found(dict(record), sent, tree, started)


def from_files(manifest: bytes, data: bytes, record: Mapping[str, Any], started: float) -> Found:
    """A job whose description and tree lie in two files. Raises Refusal."""
    _require_bounded(data)
    try:
        sent = payload.checked(json.loads(manifest))
        if hashlib.sha256(data).hexdigest() != sent["tree"].get("packed"):
            raise Failure(80, "the tree is not what was sent")
        tar = payload.tar_of(data, sent["tree"])
    except (Failure, ValueError, RecursionError) as problem:
        raise Refusal("the job's files are not as they were sent: %s" % getattr(problem, "seen", problem),
                      "fetch it where it was launched") from None
    tree = Packed(hashlib.sha256(tar).hexdigest(), sent["tree"]["compression"], data)
    return Found(dict(record), sent, tree, started)


def _require_bounded(data: bytes) -> None:
    """Raises Refusal for what grows beyond WIDEST: it may be anyone's."""
    size = 0
    with contextlib.suppress(lzma.LZMAError, zlib.error):  # read_payload() says that
        for piece in _pieces(data):
            size += piece
            if size > WIDEST:
                raise Refusal("the job's source grows beyond %s" % transport.human(WIDEST), "it is none of Airlift's")


def _pieces(data: bytes) -> Iterator[int]:
    """The sizes of the pieces that xz, gzip or zlib data grows to."""
    xz = data.startswith(b"\xfd7zXZ\0")
    opened: Any = lzma.LZMADecompressor() if xz else zlib.decompressobj(47)
    while not opened.eof and (piece := opened.decompress(data, 1 << 20)):
        yield len(piece)
        data = b"" if xz else opened.unconsumed_tail


def adopted(found: Found, profile: str, executor: str) -> runs.Run:
    """The run of a job that was found, with its tree kept. Raises Refusal for one that is here already."""
    sent = found.sent
    run_id = str(sent["run"])
    if not re.fullmatch("[a-z0-9]{1,40}", run_id):
        raise Refusal("the job has no run of Airlift's: %r" % run_id[:40], "name a job that Airlift has launched")
    if run_id in {run.id for run in runs.all_runs()[0]}:
        raise Refusal("run %s is here already" % run_id, "python launch.py status " + run_id)
    made, config = read_made(sent), configs.shown(sent["config"])
    run = runs.Run(run_id, str(sent["recipe"]), profile, executor, sent["nodes"], found.tree.digest, found.started,
                   retries=sent.get("retries") or 0, outputs=sent.get("run_root") or None, record=found.record,
                   carries=runs.fingerprints(entries(found.tree)), came={"made": made, "config": config})
    problem = keep(found.tree)
    if problem:
        raise Refusal(problem, "make room on the disk of Airlift's home")
    run.save()
    return run


def read_made(sent: Mapping[str, Any]) -> Made:
    """The record in a job's description, which may be anyone's: what is not as it should be is left out."""
    said = sent.get("made") if isinstance(sent.get("made"), dict) else {}

    def typed(name: str, kind: type, default: Any) -> Any:
        value = said.get(name) if isinstance(said, dict) else None
        odd = kind is list and isinstance(value, list) and not all(isinstance(item, str) for item in value)
        return clean(value) if isinstance(value, kind) and not odd else default

    family, _, stage = str(sent["recipe"]).partition("/")
    git = typed("git", dict, None)
    return Made(
        words=typed("words", list, [family, stage]), config=typed("config", list, []), nodes=sent["nodes"],
        name=typed("name", str, None), args=typed("args", list, []), run=typed("run", dict, {}),
        overrides=typed("overrides", list, []), settings=typed("settings", dict, {}), again=typed("again", str, None),
        git=git if git and {"commit", "branch", "dirty"} <= git.keys() else None,
        version=typed("version", str, "of another version"), plain=False)


# ---------------------------------------------------------------- again


class Kept(NamedTuple):
    """A run's tree and config, laid out to be launched."""

    run: runs.Run
    made: Made
    tree: Packed
    root: Path
    config: Path


@contextlib.contextmanager
def laid_out(run: runs.Run) -> Iterator[Kept]:
    """Within it, a run's tree and config lie in a private folder. Raises Refusal."""
    tree, (made, config) = tree_of(run), run.made()
    hidden = [word for word in [*made["overrides"], *made["args"]] if "***" in word]
    if hidden or "***" in config:
        what = ", ".join(hidden) or "a value of its config"
        raise Refusal("run %s was launched with a secret that is not kept: %s" % (run.id, what),
                      "launch it from its tree, which this gives: python launch.py fetch %s DIR" % run.id)
    with tempfile.TemporaryDirectory(prefix="airlift-again-") as folder:
        root = Path(folder, "tree")
        root.mkdir()
        write_out(tree, root)
        path = Path(folder, "config.yaml")
        path.write_text(configs.with_run(config, made["run"]), encoding="utf-8")
        yield Kept(run, made, tree, root, path)

