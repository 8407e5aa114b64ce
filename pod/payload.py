"""What was sent, checked: chunks -> the job's description and the tree's tar -> a folder that holds the tree."""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from typing import Iterator

from pod.failures import PAYLOAD, PLACE, POD, PYTHON, Failure


def join(env: dict[str, str], stream: str) -> bytes:
    """The bytes of one stream. Raises Failure(PAYLOAD or POD) unless exactly the chunks that were sent are there."""
    lost = POD if stream == "POD" else PAYLOAD
    prefix = "AIRLIFT_" + stream + "_"
    count = env.get(prefix + "CHUNKS", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", count):
        raise Failure(lost, "%sCHUNKS is %r" % (prefix, count[:40]))
    expected = {"%s%04d" % (prefix, i) for i in range(int(count))}
    present = {name for name in env if re.match(re.escape(prefix) + "[0-9]+$", name)}
    if present != expected:
        odd = sorted(present ^ expected)
        raise Failure(lost, "of %s chunks of %s, %s is %s"
                      % (count, stream, odd[0], "missing" if odd[0] in expected else "one too many"))
    text = "".join(env[name] for name in sorted(expected))
    if hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() != env.get(prefix + "SHA256"):
        raise Failure(lost, "the chunks of %s do not have the digest that was sent" % stream)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Failure(lost, "the chunks of %s are not base64: %s" % (stream, error)) from None


def read_payload(env: dict[str, str]) -> tuple[dict, bytes]:
    """The job's description and the tar, both whole. Raises Failure."""
    try:
        job = checked(json.loads(zlib.decompress(join(env, "JOB"))))
    except (ValueError, RecursionError, zlib.error) as error:
        raise Failure(PAYLOAD, "the job's description cannot be read: %s" % error) from None
    return job, tar_of(join(env, "TREE"), job["tree"])


def read_manifest(path: str, digest: str) -> dict:
    """The job's description, where it has come as a file. Raises Failure(PAYLOAD)."""
    try:
        return checked(json.loads(whole_file(path, 1 << 26, digest)))
    except (ValueError, RecursionError) as error:
        raise Failure(PAYLOAD, "%s cannot be read: %s" % (path, error)) from None


def read_tree(folder: str, tree: dict) -> bytes:
    """The tar of the tree, where it has come as a file. Raises Failure."""
    path = os.path.join(folder, "tree.tar." + tree["compression"])
    return tar_of(whole_file(path, tree.get("bytes", 0), tree.get("packed", "")), tree)


def whole_file(path: str, most: int, digest: str) -> bytes:
    """A file of at most so many bytes. Raises Failure(PAYLOAD) unless it has the digest that was sent."""
    try:
        data = content(path, most + 1)
    except OSError as error:
        raise Failure(PAYLOAD, "%s: %s" % (path, error.strerror)) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise Failure(PAYLOAD, "%s is not what was sent" % path)
    return data


def tar_of(packed: bytes, tree: dict) -> bytes:
    """The tar, uncompressed. Raises Failure(PAYLOAD or PYTHON) unless it has the tree's digest."""
    tar = decompress(packed, tree["compression"])
    digest = hashlib.sha256(tar).hexdigest()
    if digest != tree["sha256"]:
        raise Failure(PAYLOAD, "the tree's digest is %s, not %s" % (digest, tree["sha256"]))
    return tar


def checked(job: dict) -> dict:
    """The description, if its shape is right. Raises Failure(PAYLOAD): launcher and pod may be of two versions."""
    job = job if isinstance(job, dict) else {}
    tree: dict = job["tree"] if isinstance(job.get("tree"), dict) else {}
    shared, cluster = job.get("unpack") == "shared", job.get("cluster", "")
    right = {
        "run": texts([job.get("run")]) and re.fullmatch(r"[\w-]{1,64}", job["run"]),
        "nodes": whole(job.get("nodes")),
        "tree": texts([tree.get("sha256"), tree.get("compression")]) and whole(tree.get("files"), 0),
        "env": table(job.get("env")) and table(job.get("defaults", {})) and all(
            name and "=" not in name for name in [*job["env"], *job.get("defaults", {})]),
        "setup": texts(job.get("setup")), "pip": texts(job.get("pip", [])), "folders": texts(job.get("folders", [])),
        "install": texts(job.get("install", [])), "links": texts(job.get("links", [])),
        "clones": isinstance(job.get("clones", []), list) and all(
            table(clone) and sorted(clone) == ["ref", "target", "url"] for clone in job.get("clones", [])),
        "secrets": texts(job.get("secrets", [])), "made": isinstance(job.get("made", {}), dict),
        "shared": not shared or texts([job.get("shared")]), "keep": not shared or whole(job.get("keep")),
        "patience": not (shared or cluster) or whole(job.get("patience")),
        "cluster": cluster in ("", "platform") or (cluster == "pods" and whole(job.get("nodes"), 2)),
        "secret": cluster != "pods" or re.fullmatch("[0-9a-f]{64}", str(job.get("secret"))),
    }
    right.update({name: texts([job.get(name)]) for name in ("launch", "config", "command")})
    right.update({name: texts([job.get(name) or ""]) for name in ("run_root", "workdir", "tool")})
    odd = [name for name, value in right.items() if not value]
    if odd:
        raise Failure(PAYLOAD, "the job's description lacks a usable %s" % ", ".join(odd))
    return job


def texts(values: object) -> bool:
    """A list of strings that a path, an environment and a file can hold."""
    return isinstance(values, list) and all(
        isinstance(text, str) and "\0" not in text and text == text.encode("utf-8", "ignore").decode()
        for text in values)


def table(value: object) -> bool:
    return isinstance(value, dict) and texts([*value, *value.values()])


def whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def decompress(data: bytes, method: str) -> bytes:
    """The tar of a tree. Raises Failure(PYTHON) if this Python was built without the method."""
    try:
        return importlib.import_module("lzma" if method == "xz" else "gzip").decompress(data)
    except Exception as error:  # what came is what was sent; lzma, gzip and zlib have errors of their own
        lacks = "has no" if isinstance(error, ImportError) else "cannot unpack"
        raise Failure(PYTHON, "this Python %s %s: %s" % (lacks, method, error)) from None


def read_file(path: str) -> dict:
    """What came in a file of JSON, because no environment carries it. Raises Failure(PAYLOAD)."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Failure(PAYLOAD, "%s cannot be read: %s" % (path, error)) from None


def nodes_sent(env: dict[str, str]) -> int:
    """The number of pods. Raises Failure."""
    join(env, "POD")  # what runs is whole, but the names and the number of its chunks are to be right as well
    if not re.fullmatch(r"[1-9][0-9]{0,5}", env.get("AIRLIFT_NODES", "")):
        raise Failure(PAYLOAD, "AIRLIFT_NODES is %r" % env.get("AIRLIFT_NODES", "")[:40])
    return int(env["AIRLIFT_NODES"])


def unpack(tar: bytes, target: str) -> None:
    """Put the tar's tree at `target`, whole or not at all. Raises Failure(PLACE); a foreign `target` is left alone."""
    if os.path.lexists(target):
        if not holds(target, tar):
            raise Failure(PLACE, "%s is there already and does not hold this payload" % target)
        return
    private = tempfile.mkdtemp(prefix="code.", dir=os.path.dirname(target))
    try:
        extract(tar, private)
        os.chmod(private, 0o755)
        try:
            os.rename(private, target)
        except OSError:
            if not holds(target, tar):  # another pod with the same scratch space was faster
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def members(tar: bytes, folder: str) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """(path below the folder, TarInfo, bytes) of each file and link. Raises Failure(PAYLOAD) for all else, and for a
    path that comes twice or leads out, also by way of a link: a link's target must be spelled in the shortest way, for
    after another link `..` leads elsewhere than the text says."""
    links: dict[str, bool] = {}  # path -> whether it is a link
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            for info in archive:
                parts = info.name.split("/")
                kept = texts([info.name, info.linkname]) and info.type in (tarfile.REGTYPE, tarfile.SYMTYPE)
                leads = os.path.normpath(os.path.join(os.path.dirname(info.name), info.linkname))
                out = info.issym() and (leads.split("/")[0] in ("", "..") or
                                        os.path.normpath(info.linkname) != info.linkname)
                through = any(links.get("/".join(parts[:end])) for end in range(1, len(parts)))
                if not kept or set(parts) & {"", ".", ".."} or info.name in links or out or through:
                    raise Failure(PAYLOAD, "the tar holds %r, which does not belong there" % info.name[:200])
                links[info.name] = info.issym()
                file = archive.extractfile(info) if info.isfile() else None
                path = os.path.join(folder, os.fsdecode(info.name.encode()))  # UTF-8, whatever the image's locale
                yield path, info, file.read() if file else info.linkname.encode()
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise Failure(PAYLOAD, "the tar cannot be read: %s" % error) from None


def extract(tar: bytes, folder: str) -> None:
    """Write the tar's files and links below the folder. Raises Failure(PAYLOAD), OSError."""
    for path, info, data in members(tar, folder):
        make_folders(os.path.dirname(path))
        if info.issym():
            os.symlink(os.fsdecode(data), path)
            continue
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, info.mode & 0o777)


def make_folders(path: str) -> None:
    """Folders that all may read and only this user can change, whatever the umask."""
    umask = os.umask(0o022)
    try:
        os.makedirs(path, exist_ok=True)
    finally:
        os.umask(umask)


def holds(folder: str, tar: bytes) -> bool:
    """Whether every file and link of the tar stands in the folder, byte for byte."""
    for path, info, data in members(tar, folder):
        try:
            if (os.fsencode(os.readlink(path)) if info.issym() else content(path, len(data) + 1)) != data:
                return False
        except OSError:
            return False
    return True


def content(path: str, most: int = -1) -> bytes:
    """What a file holds. Raises OSError, also where it has become a FIFO, which would hold us for ever."""
    with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK | os.O_NOFOLLOW)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no file", path)
        return file.read(most)


def strays(folder: str, tar: bytes) -> list[str]:
    """Files and links in the folder that are not of the tar."""
    sent = {path for path, _, _ in members(tar, folder)}
    found = []
    for place, folders, files in os.walk(folder):
        paths = [os.path.join(place, name) for name in files + folders]
        found += [path for path in paths if path not in sent and (os.path.islink(path) or not os.path.isdir(path))]
    return found
