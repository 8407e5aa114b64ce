"""Carry a source tree in a job's environment: tree -> tar -> xz -> base64 -> chunks within limits -> Plan.

Standard library only, and nothing of ours is imported: this file and pod/ are the two ends of one protocol.

The protocol. Three streams travel, each cut into chunks that are environment variables:

    AIRLIFT_POD_0000 ...   the pod program: those modules of pod/ that the job needs, without comments, zlib
    AIRLIFT_JOB_0000 ...   the job's description (JSON: config, commands, the user's environment), zlib
    AIRLIFT_TREE_0000 ...  the tree's tar, xz or gz

A stream is base64 text; its chunks, joined in the order of their numbers, are that text again. Beside each stream stand
AIRLIFT_<STREAM>_CHUNKS (their number) and AIRLIFT_<STREAM>_SHA256 (of the text), so that the pod can tell a dropped,
cut, swapped, flipped or doubled chunk before it uses any. A platform sees base64, numbers and digests, never a user's
text: Kubernetes rewrites $(NAME) and $$ in what it passes on.

The tree itself is named by the SHA-256 of its uncompressed tar, the same on any machine; zlib and zlib-ng differ.

Edge cases, all of them tested against the real kernel:
  - the kernel counts NAME=VALUE with its NUL, and 8 bytes of pointer for each string of argv and environment;
  - an API object can hold the environment more than once (a RayCluster does), and etcd limits the object;
  - a file that changes while it is read is an error: the tar would hold a tree that never was.
"""

import base64
import fnmatch
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import resource
import stat
import tarfile
import tokenize
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

# The kernel's two limits stand in its source, and were measured on Linux 6.18: one byte more gives E2BIG.
MAX_STRING = 131_072  # bytes of one NAME=VALUE or argv string with its NUL: MAX_ARG_STRLEN in uapi/linux/binfmts.h
MAX_EXEC = 2_097_152  # bytes of argv and environment of one execve: a quarter of the stack, here 8 MiB (fs/exec.c)
EXEC_RESERVE = 131_072  # bytes left free for what platform, image and shell add to a pod's environment (our choice)
MAX_FILE = 67_108_864  # bytes of one file of the tree: no source is larger, and it is read into memory (our choice)
MAX_NAMED = 1_048_576  # bytes of a file outside of src that a config names: above, it is data (our choice)
LOCK, MAX_LOCK = "uv.lock", 4_194_304  # the one that may be larger: Nemotron's has 1.2 MB (our choice)
MAX_PATH = 1_024  # bytes of one path in the tree, so that it fits below any folder of a pod: Linux ends at 4,096
MIN_CHUNK = 1_024  # characters: with fewer, the pod's chunks need more than the three digits the bootstrap reads
POINTER = 8  # bytes the kernel counts for each string, besides the string
OBJECT_RESERVE = 32_768  # bytes of an API object left for all that is not environment: image, mounts, custom_spec


class Refusal(Exception):
    """Something Airlift will not do. `what` is wrong, `fix` is what to do about it; `code` is the exit code, `http` the
    status code of a server that refused, 0 without one."""

    def __init__(self, what: str, fix: str, code: int = 2, http: int = 0) -> None:
        super().__init__(what + "\n" + fix)
        self.what, self.fix, self.code, self.http = what, fix, code, http


@dataclass(frozen=True)
class Limits:
    """What an executor can carry. Sizes in characters of base64 (= bytes) or bytes; 0 means that there is no limit."""

    chunk: int  # characters of one chunk; 0: the tree does not travel in chunks
    value: int = 0  # characters of one environment value: run:AI answers 400 above, as NVIDIA's launcher documents it
    args: int = 0  # characters of argv joined by blanks: nemo-run 0.11.1 stops there, run:AI's server at 10,000
    object: int = 0  # bytes of the API object: etcd's --max-request-bytes, 1.5 MiB unless it is set
    copies: int = 1  # how often the environment stands in that object
    exec: int = MAX_EXEC  # bytes of argv and environment of one execve


LIMITS = {
    "local": Limits(chunk=98_304),
    "docker": Limits(chunk=98_304),
    "lepton": Limits(chunk=98_304, object=1_572_864),
    "dgxcloud": Limits(chunk=9_216, value=10_000, args=9_500, object=1_572_864),
    "slurm": Limits(chunk=0),
}


# ---------------------------------------------------------------- collect

# What is made anew and what programs leave behind, by names that no source has; `venv` may well be a package.
NEVER_SOURCE = re.compile(r"""
    (?P<version_control>\.(git|hg|svn|bzr|jj))
  | (?P<cache>__(pycache|pypackages)__|node_modules|\.(venv|cache|tox|nox|eggs|hypothesis|\w+_cache
      |ipynb_checkpoints|virtual_documents)|\.coverage(\..*)?|.*\.(py[cod]|egg-info))
  | (?P<left_by_a_program>\.\#.*|\#.*\#|.*~|\.~.*|~\$.*|\..*\.sw[a-p]|.*\.(sw[op]|kate-swp|orig|rej|bak)|4913  # editors
      |\.(idea|vscode|history)|.*___jb_(tmp|old|bak)___|.*\.py\.save(\.\d+)?|\.goutputstream-.*
      |.*[._](BACKUP|BASE|LOCAL|REMOTE)[._]\d{4,}\.\w+|(vg)?core\.\d+  # merges, crashes
      |\.nfs[0-9a-f]{8,}|\.fuse_hidden.*|\.snapshots?|lost\+found|\.Trash.*|@eaDir|\.directory  # file systems
      |\._.*|\.DS_Store|\.AppleDouble|__MACOSX|Thumbs\.db|desktop\.ini|.*[:\uf03a]Zone\.Identifier
      |\.st(folder|versions|ignore)|(\.syncthing\.|~syncthing~|\.dropbox).*|\.rsync-partial  # copiers
      |\..+\.\w+\.(?=\w*[A-Z0-9])\w{6}|.*(\.sync-conflict-|conflicted\ copy|Case\ Conflict).*)
    """, re.VERBOSE | re.DOTALL)
MARKS = {"CACHEDIR.TAG": "cache",  # what a folder holds that is one
         **dict.fromkeys(("pyvenv.cfg", "conda-meta", "bin/activate"), "virtual environment")}
DATA_SUFFIXES = (".parquet", ".arrow", ".bin", ".idx", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".ckpt", ".onnx",
                 ".h5", ".hdf5", ".nemo", ".gguf", ".tfrecord", ".mmap", ".sqlite", ".db", ".tar", ".tgz", ".gz",
                 ".xz", ".zst", ".bz2", ".zip", ".whl", ".sqsh", ".sif", ".mp4", ".wav")
DOCUMENTS = ("README*", "CHANGELOG*", "CONTRIBUTING*", "AGENTS.md", "CLAUDE.md", "SKILL.md")  # read by people only
CREDENTIAL_FILES = (".env", ".env.*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", "id_rsa*", "id_dsa*",
                    "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.kubeconfig",
                    "kubeconfig", "credentials", "credentials.json", "service-account*.json", "env.toml")
CREDENTIAL_NAME = re.compile("|".join(map(fnmatch.translate, CREDENTIAL_FILES)))
CREDENTIAL_FOLDERS = (".ssh", ".aws", ".docker", ".kube", ".gnupg")
HARMLESS_FILES = (".env.example", ".env.sample", ".env.template")
# By shape: Hugging Face, GitHub, GitLab, NVIDIA, AWS, OpenAI-like and Slack tokens, and private keys, also inside JSON.
CREDENTIAL_SHAPE = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{40,}|\bnvapi-[A-Za-z0-9_-]{40,}"
    rb"|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{32,}|\bxox[abp]-[A-Za-z0-9-]{20,}"
    rb"|\bglpat-[A-Za-z0-9_-]{20,}|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:\s|\\[nr])+[A-Za-z0-9+/]{40}"
)
CREDENTIAL_HINTS = (b"hf_", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_", b"nvapi-", b"AKIA", b"sk-",
                    b"xox", b"glpat-", b"PRIVATE KEY")


EXAMPLE = re.compile(rb"(.)\1{7}|example|placeholder|changeme|redacted|your|dummy|0123456789|1234567890|abcdefgh"
                     rb"|16C7e42F292c6912E7710c838347Ae178B4a", re.IGNORECASE | re.DOTALL)  # GitHub's own, at last
MODULES = (".py", ".pyx", ".sh")  # a job breaks without one


@dataclass(frozen=True)
class Entry:
    """One file or link of a tree: its path in the tar, its bytes (a link's target for a link), whether it may run."""

    path: str
    data: bytes
    executable: bool = False
    link: bool = False


@dataclass(frozen=True)
class Tree:
    """What ships. `left_out` pairs a path with why it stays here ("credential", "data or model file", a pattern);
    `oversize` are (bytes, path) of files that would have to ship and cannot: they are not read, and no plan fits;
    `asked` are the paths that ship since somebody named them."""

    entries: tuple[Entry, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    oversize: tuple[tuple[int, str], ...] = ()
    asked: tuple[str, ...] = ()


COLLECTIONS = ("recipes", "steps")


def family_of(script: str) -> tuple[str, str] | None:
    """(collection, family) of a script: ("recipes", "nano3") for src/pkg/recipes/nano3/...; None outside of both."""
    parts = PurePosixPath(script).parts
    return (parts[2], parts[3]) if len(parts) > 4 and parts[0] == "src" and parts[2] in COLLECTIONS else None


def collect(root: Path, script: str, exclude: tuple[str, ...] = (), include: tuple[str, ...] = (),
            also: tuple[str, ...] = (), whole: bool = False) -> Tree:
    """The files under root/src that the script (relative to root, posix) may need: every package, but of recipes/ and
    steps/ only the one that the script lies in, and of that only its family, the plain files, and the folders whose
    names begin with `_`. Where another folder is divided by recipe families too (cli/commands/nano3, …/super3), only
    the script's family ships from it as well. `exclude` and `include` are patterns, and `!pattern` in the former takes
    back in, too, but no credential: a checkout may have it. `also` are files and folders that ship whatever their
    family, and files outside of src; `whole` is all families. Raises Refusal for a link that leaves what ships, a name
    that is not UTF-8, a module with a credential in it, or a file that changes meanwhile."""
    if not (root / "src").is_dir():
        raise Refusal("%s has no src folder, so there is nothing to ship" % root,
                      "name the source tree with --repo-root")
    top = os.path.realpath(root / "src")
    if not top.startswith(os.path.realpath(root) + "/"):
        raise Refusal("%s is a link that leaves the tree" % (root / "src"), "name the tree that it leads to")
    walk = _Walk(top, None if whole else family_of(script), _ignore_file(root) + exclude, include)
    try:
        walk.all()
        for path in also:
            walk.one(path) if path.startswith("src/") else walk.outside(path, os.path.realpath(root))
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (error.filename, error.strerror),
                      "make it readable, or name it in exclude") from None
    if walk.secrets:
        raise Refusal("%s: what looks like a credential, and without the module the job would break"
                      % ", ".join(sorted(walk.secrets)),
                      "take it out; or name the file in exclude, or, if it is none, in include of your profile")
    entries = tuple(sorted(walk.entries, key=lambda entry: entry.path))
    _check_links(entries)
    if not any(entry.path == script for entry in entries):
        left = dict(walk.left_out)
        reason = next((left[str(path)] for path in (PurePosixPath(script), *PurePosixPath(script).parents)
                       if str(path) in left), "there is no such file")
        raise Refusal("%s is the recipe, but it would not ship: %s" % (script, reason),
                      "take the pattern out of exclude, or name the recipe in include")
    return Tree(entries, tuple(sorted(walk.left_out)), tuple(sorted(walk.oversize, reverse=True)), tuple(walk.asked))


def _ignore_file(root: Path) -> tuple[str, ...]:
    path = root / ".airliftignore"
    if not path.is_file():
        return ()
    if path.stat().st_size > 1 << 20:
        raise Refusal("%s has more than 1 MiB" % path, "write fewer patterns")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (path, error.strerror), "make it readable, or remove it") from None
    except UnicodeDecodeError:
        raise Refusal("%s cannot be read: it is not UTF-8" % path, "save it as UTF-8") from None
    return tuple(line for line in lines if line and not line.startswith("#"))


def never_source(name: str, folder: str = "") -> str:
    """What is never source, by its name or by what `folder`, the place of a folder, holds; "" for all else."""
    if found := NEVER_SOURCE.fullmatch(name):
        return str(found.lastgroup).replace("_", " ")
    return next((MARKS[mark] for mark in MARKS if folder and os.path.exists(os.path.join(folder, mark))), "")


def _ruling(patterns: tuple[str, ...], path: str) -> str:
    """The last pattern that fits a path, "" without one: with `/` the whole of it, else its last name."""
    name = path.rpartition("/")[2]
    return next((pattern for pattern in reversed(patterns) if fnmatch.fnmatchcase(
        path if "/" in pattern.strip("!/") else name, pattern.removeprefix("!").strip("/"))), "")


class _Walk:
    """One walk over src. Kept as an object because its lists grow together. A path is what stands in the tar; `real`
    is the same on this disk, spelled as this machine's locale wants it."""

    def __init__(self, top: str, family: tuple[str, str] | None, exclude: tuple[str, ...], include: tuple[str, ...]
                 ) -> None:
        self.top, self.own = top, tuple("!" + pattern for pattern in include)
        self.patterns = exclude + self.own
        self.collection, self.family = family or ("", "")
        folders = Path(top).glob("*/recipes/*") if self.collection == "recipes" else ()
        self.others = {path.name for path in folders if path.is_dir() and path.name[0] != "_"} - {self.family}
        self.entries: list[Entry] = []
        self.left_out: list[tuple[str, str]] = []
        self.oversize: list[tuple[int, str]] = []
        self.asked: list[str] = []
        self.secrets: list[str] = []  # modules with what looks like a credential, and its line
        self.folders = [("src", top)]  # still to be walked

    def all(self) -> None:
        while self.folders:
            path, real = self.folders.pop()
            with os.scandir(real) as items:
                for item in sorted(items, key=lambda item: item.name):
                    self._item(path + "/" + _utf8(item.name, path), item.path)

    def one(self, path: str) -> None:
        """A path of another family that ships all the same, if it is there."""
        left = [folder for folder, reason in self.left_out if reason == "another family" and
                (path + "/").startswith(folder + "/")]
        if left and os.path.lexists(self.top + path[3:]):
            self.family = ""
            self.left_out = [(name, reason) for name, reason in self.left_out if name != path]
            self._item(path, self.top + path[3:])
            self.all()

    def outside(self, path: str, root: str) -> None:
        """A path outside of src that a config names: a small file ships, what it leads to if it is a link."""
        real = os.path.realpath(os.path.join(root, path))
        above = [path[:match.start()] for match in re.finditer("/|$", path)]
        reason = next(filter(None, (self._reason(each, os.path.join(root, each)) for each in above)), "")
        most = MAX_LOCK if path == LOCK else MAX_NAMED
        if not real.startswith(root + "/") or not os.path.isfile(real) or os.path.getsize(real) > most:
            reason = reason or "outside of src, and no file of up to " + human(most)
        if reason:
            self.left_out.append((path, reason))
            return
        self.asked.append(path)
        self._file(path, real)

    def _item(self, path: str, real: str) -> None:
        if reason := self._reason(path, real):
            self.left_out.append((path, reason))
        elif len(path.encode()) > MAX_PATH:
            raise Refusal("%s... is a path of more than %d bytes" % (path[:80], MAX_PATH), "rename its folders")
        elif os.path.isdir(real) and not os.path.islink(real):
            self.folders.append((path, real))
        else:
            self._file(path, real)

    def _reason(self, path: str, real: str) -> str:
        """Why a path does not ship; "" if it does."""
        name, folder, ruling = path.rpartition("/")[2], os.path.isdir(real), _ruling(self.patterns, path)
        secret = name in CREDENTIAL_FOLDERS if folder else \
            CREDENTIAL_NAME.match(name) and name not in HARMLESS_FILES and not name.endswith(MODULES)
        if ruling and not ruling.startswith("!"):
            return "excluded by " + ruling
        if ruling and (not secret or ruling in self.own):
            self.asked.append(path)
            return ""
        never = never_source(name, real if folder else "")
        if never or secret:
            return never or "credential"
        if folder:
            return "another family" * (bool(self.family) and self._other_family(path.split("/"), real))
        if name.endswith(DATA_SUFFIXES):
            return "data or model file"
        read = path.startswith("src/") and any(fnmatch.fnmatchcase(name, pattern) for pattern in DOCUMENTS)
        return "documentation" if read else ""

    def _other_family(self, parts: list[str], real: str) -> bool:
        name = parts[-1]
        if len(parts) == 3 and name in COLLECTIONS:
            return name != self.collection
        if len(parts) == 4 and parts[2] in COLLECTIONS:
            return name != self.family and not name.startswith("_")
        return name in self.others and os.path.isdir(os.path.join(os.path.dirname(real), self.family))

    def _file(self, path: str, real: str) -> None:
        info = os.lstat(real)
        if stat.S_ISLNK(info.st_mode):
            self.entries.append(Entry(path, _inner_target(self.top, path, real).encode(), link=True))
        elif not stat.S_ISREG(info.st_mode):
            self.left_out.append((path, "neither a file, a folder nor a link"))
        elif info.st_size > MAX_FILE:
            self.oversize.append((info.st_size, path))
        else:
            data = _read_whole(real)
            found = None if _ruling(self.own, path).startswith("!") else credential_in(data)
            if found and path.endswith(MODULES):
                self.secrets.append("%s:%d" % (path, data[:found.start()].count(b"\n") + 1))
            elif found:
                self.left_out.append((path, "credential"))
            else:
                self.entries.append(Entry(path, data, executable=bool(info.st_mode & 0o100)))


def _utf8(name: str, folder: str) -> str:
    """A name of this disk as what it is in UTF-8, whatever this machine's locale. Raises Refusal where it is not."""
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("a name in %s is not UTF-8: %s" % (folder, ascii(name)),
                      "rename it, or exclude its folder") from None


def _read_whole(path: str) -> bytes:
    """The file's bytes. Raises Refusal if it changed while it was read, or cannot be read."""
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            data = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise Refusal("%s cannot be read: %s" % (path, error.strerror),
                      "make it readable, or name it in exclude") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != after.st_size:
        raise Refusal("%s changed while it was packed" % path, "wait until it is written, then launch again")
    return data


def credential_in(data: bytes) -> re.Match[bytes] | None:
    """The first token or key in a file, by its shape."""
    found = CREDENTIAL_SHAPE.finditer(data) if any(hint in data for hint in CREDENTIAL_HINTS) else ()
    return next((match for match in found if not EXAMPLE.search(match.group())), None)


def _inner_target(top: str, path: str, real: str) -> str:
    """A link's target, relative to its folder. Raises Refusal where it leaves src, whose place on disk is `top`."""
    target = os.readlink(real)
    full = os.path.join(os.path.dirname(real), target)
    plain, final = os.path.normpath(full), os.path.realpath(full)
    if os.path.realpath(plain) != final or os.path.commonpath([plain, top]) != top:
        plain = final  # a `..` behind a link, or the tree by another of its names
    if os.path.commonpath([plain, top]) != top:
        raise Refusal("%s is a link that leaves the tree: it points to %s" % (path, ascii(target)[1:-1]),
                      "put a copy in its place, or name it in exclude")
    return _utf8(os.path.relpath(plain, os.path.dirname(real)), path)


def _check_links(entries: tuple[Entry, ...]) -> None:
    """Each link must lead to something that ships too: a file, or a folder that something lies in."""
    links = {entry.path: entry.data.decode() for entry in entries if entry.link}
    shipped = {entry.path for entry in entries if not entry.link}
    for path in [entry.path for entry in entries]:
        shipped.update(str(parent) for parent in PurePosixPath(path).parents)
    for path in links:
        target = resolve_link(path, links)
        if target not in shipped:
            raise Refusal("%s is a link to %s, which does not ship" % (path, target or "itself"),
                          "put a copy in its place, or name it in exclude")


def resolve_link(path: str, links: dict[str, str]) -> str:
    """Where a path of the tree leads, through the tree's own links; "" if it leads in a circle."""
    for _ in range(40):  # the kernel's own limit
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            link = "/".join(parts[:end])
            if link in links:
                path = os.path.normpath("/".join([*parts[: end - 1], links[link], *parts[end:]]))
                break
        else:
            return path
    return ""


# ---------------------------------------------------------------- pack and chunk


def pack(tree: Tree) -> bytes:
    """The tree's tar, uncompressed: sorted names, zero times and owners, modes 644 and 755."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in tree.entries:
            info = tarfile.TarInfo(entry.path)
            info.mode = 0o755 if entry.executable else 0o644
            if entry.link:
                info.type, info.linkname = tarfile.SYMTYPE, entry.data.decode()
            else:
                info.size = len(entry.data)
            tar.addfile(info, None if entry.link else io.BytesIO(entry.data))
    return buffer.getvalue()


# For text: four literal context bits. On a Nemotron checkout within 1 % of the smallest, in three quarters of its time
# (measured). Beyond preset 6 only the dictionary grows, past any payload.
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0, "nice_len": 40}]


def compress(data: bytes, method: str) -> bytes:
    """`data` as xz or gz, without a time in it."""
    if method == "xz":
        return lzma.compress(data, check=lzma.CHECK_CRC32, filters=XZ_FILTERS)
    if method == "gz":
        return gzip.compress(data, 9, mtime=0)
    raise Refusal("compression %r is not known" % method, 'set compression to "xz" or "gz"')


# The modules of pod/, each after those that it imports.
PARTS = ("failures", "rank", "payload", "places", "process", "shared", "peers", "ray_nodes", "ray_cluster", "entry")


def pod_program(job: dict[str, Any]) -> bytes:
    """What the pods of a job run: those modules of pod/ that it needs, and __main__.py, which starts them."""
    needed = {"shared": job.get("unpack") == "shared", "peers": job.get("cluster") == "pods",
              "ray_nodes": job.get("cluster") == "pods",
              "ray_cluster": job.get("cluster") == "platform"}
    parts = [part for part in PARTS if needed.get(part, True)]
    *texts, main = [_bare((Path(__file__).parent / "pod" / (part + ".py")).read_text(encoding="utf-8"))
                    for part in (*parts, "__main__")]
    named = ["('pod.%s', r'''%s'''),\n" % pair for pair in zip(parts, texts, strict=True)]
    return "".join(["PARTS = (('pod', ''),\n", *named, ")\n", main]).encode()


@functools.cache
def _bare(source: str) -> str:
    """A source without comments and docstrings; its lines keep their numbers, so that tracebacks fit."""
    lines, before = source.splitlines(), tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last, end) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
        elif token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines[row - 1:last] = [lines[row - 1][:column] + '""' + lines[last - 1][end:]] + [""] * (last - row)
        before = before if token.type in (tokenize.COMMENT, tokenize.NL) else token.type
    return "\n".join(lines) + "\n"


def literal(text: str) -> str:
    """A text that must be visible to a platform, so written that Kubernetes, which makes `$$` a `$` and puts a value in
    the place of $(NAME), hands on what was meant."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def chunk(text: str, size: int) -> list[str]:
    """`text` in pieces of at most `size` characters; at least one piece, so that an empty text is still said."""
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]


def stream(name: str, data: bytes, size: int) -> dict[str, str]:
    """The environment of one stream: its chunks, their number and the digest of their text."""
    text = base64.b64encode(data).decode("ascii")
    env = {"AIRLIFT_%s_%04d" % (name, i): piece for i, piece in enumerate(chunk(text, size))}
    return env | {"AIRLIFT_%s_CHUNKS" % name: str(len(env)),
                  "AIRLIFT_%s_SHA256" % name: hashlib.sha256(text.encode()).hexdigest()}


def _end(code: int, sentence: str) -> str:
    """The expression of the bootstrap that says two lines, as the pod would, and exits."""
    lines = "%s=0,rank_unknown_ended_with_exit_code_%d=0" % (sentence, code)
    return ("([print(*dict(airlift=0),w.replace(chr(95),chr(32)),sep=chr(58)+chr(32))for(w)in(dict(%s))]"
            ",__import__(*dict(sys=0)).exit(%d))" % (lines, code))


# What starts the pod program: one argument without blanks, quotes or `$`, so that neither a split by blanks nor shell
# rules change it; `*dict(name=0)` spells a string without quotes. The same in ordinary Python:
#
#     if "" in sys.path:  # the folder that it is started in: a zlib.py that lies there is not Python's
#         sys.path.remove("")
#     if sys.version_info[:2] <= (3, 6):  # it cannot read the program
#         end(85, "the python3 of this image is too old")
#     text = "".join(os.environ[name] for name in sorted(os.environ) if name.startswith("AIRLIFT_POD_0"))
#     if hashlib.sha256(text.encode("utf8", "replace")).hexdigest() != os.environ.get("AIRLIFT_POD_SHA256"):
#         end(80, "the program that unpacks did not arrive whole")
#     exec(compile(zlib.decompress(base64.b64decode(text)), "pod_py", "exec"), {"__name__": "__main__"})
BOOTSTRAP = (
    "[exec(compile(__import__(*dict(zlib=0)).decompress(__import__(*dict(base64=0)).b64decode(t)),*dict(pod_py=0),"
    "*dict(exec=0)),dict(__name__=str().join(dict(__main__=0))))"
    "if(__import__(*dict(hashlib=0)).sha256(t.encode(*dict(utf8=0,replace=0))).hexdigest()"
    "==e.get(*dict(AIRLIFT_POD_SHA256=0)))"
    "else" + _end(80, "the_program_that_unpacks_did_not_arrive_whole") +
    "for(p)in[[q.remove(str())for(q)in[__import__(*dict(sys=0)).path]if(str()in(q))]]"
    "for(v)in[__import__(*dict(sys=0)).version_info]if(v[:2]>(3,6))"
    "or" + _end(85, "the_python3_of_this_image_is_too_old") +
    "for(e)in[__import__(*dict(os=0)).environ]"
    "for(t)in[str().join([(e[k])for(k)in(sorted(e))if(k.startswith(*dict(AIRLIFT_POD_0=0)))])]]"
)
ARGV = ("python3", "-c", BOOTSTRAP)


# ---------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """What every pod of a job gets, and its measured sizes. `env` has the chunks; `budgets` are (name, used, limit)."""

    executor: str
    env: dict[str, str] = field(repr=False)  # secrets may be in it
    argv: list[str]
    digest: str  # SHA-256 of the uncompressed tar
    compression: str
    files: int
    tar: bytes = field(repr=False)  # the compressed tar, for an executor that packs natively
    program: bytes = field(repr=False)  # that of the pods, for one that brings it as a file
    chunks: int  # chunks of the tree alone
    chunk_limit: int
    budgets: tuple[tuple[str, int, int], ...]
    biggest: tuple[tuple[int, str], ...] = field(default=(), repr=False)  # (bytes, path), the ten biggest files

    @property
    def fits(self) -> bool:
        return all(used <= limit for _, used, limit in self.budgets)

    def budget(self, name: str) -> tuple[int, int]:
        """(used, limit) of one budget; (0, 0) where this executor has no such limit."""
        return next(((used, limit) for n, used, limit in self.budgets if n == name), (0, 0))

    def require_fit(self) -> None:
        """Raises Refusal (exit code 3) that names the sum, the limit, the biggest files and what to do."""
        for name, used, limit in self.budgets:
            if used > limit:
                files = ", ".join("%s (%s)" % (path, human(size)) for size, path in self.biggest)
                fix = {"one string": "shorten the longest variable, or lower chunk_bytes",
                       "one value": "shorten the longest variable, or lower chunk_bytes",
                       "recipe's environment": "shorten env_vars"}
                raise Refusal(
                    f"the payload does not fit: {name} needs {used:,} of {limit:,} bytes; nothing was submitted",
                    fix.get(name, "leave files out with exclude or .airliftignore; the biggest are " + files), 3)


@dataclass(frozen=True)
class Packed:
    """A tree as it travels: the digest of its tar, and the tar compressed."""

    digest: str
    method: str
    data: bytes = field(repr=False)


def method_for(executor: str, compression: str = "") -> str:
    """How a tree is compressed for an executor. Raises Refusal for an executor that is not known."""
    if executor not in LIMITS:
        raise Refusal("executor %r is not known" % executor, "use one of " + ", ".join(sorted(LIMITS)))
    return compression or ("xz" if LIMITS[executor].chunk else "gz")


def packed(tree: Tree, method: str) -> Packed:
    """Raises Refusal for an unknown method."""
    tar = pack(tree)
    return Packed(hashlib.sha256(tar).hexdigest(), method, compress(tar, method))


def plan_for(executor: str, tree: Tree, job: dict[str, Any], *, compression: str = "", chunk_bytes: int = 0,
             env: dict[str, str] | None = None, limits: Limits | None = None, ready: Packed | None = None) -> Plan:
    """The Plan that carries `tree` and the description `job` (JSON-able; pod/payload.py checks its keys) on `executor`.
    `env` is what must be visible to the platform besides (numbers, a rank, secrets sent by value). `compression` and
    `chunk_bytes` (characters of base64) replace the executor's own; `ready` is the tree, if it is packed already. A
    plan that does not fit is returned all the same: ask `fits`, or call `require_fit()`. Raises Refusal for an unknown
    executor or compression, for chunks too small to count, and for text that no environment can hold."""
    standard = method_for(executor, compression)
    limits = limits or limits_for(executor, job)
    size = chunk_bytes or limits.chunk
    if limits.chunk and size < MIN_CHUNK:
        raise Refusal("chunk_bytes is %d" % size, "set it to %d or more" % MIN_CHUNK)
    done = ready or packed(tree, standard)
    job = job | {"tree": {"sha256": done.digest, "files": len(tree.entries), "compression": done.method}}
    whole = dict(env or {}) | {"AIRLIFT_NODES": str(job["nodes"])}
    recipe = _recipe_env(whole, job)
    chunks: dict[str, str] = {}
    program = pod_program(job)
    if limits.chunk:
        chunks = stream("TREE", done.data, size)
        whole |= chunks | stream("POD", zlib.compress(program, 9), size)
        whole |= stream("JOB", zlib.compress(json.dumps(job, sort_keys=True).encode(), 9), size)
    argv = list(ARGV) if limits.chunk else ["python3", PROGRAM]
    budgets = _budgets(whole, argv, limits, recipe)
    budgets[:0] = [("one file", largest, MAX_FILE) for largest, _ in tree.oversize[:1]]
    biggest = sorted([*tree.oversize, *((len(entry.data), entry.path) for entry in tree.entries)], reverse=True)[:10]
    return Plan(executor, whole, argv, done.digest, done.method, len(tree.entries), done.data,
                program, max(0, len(chunks) - 2), size, tuple(budgets), tuple(biggest))


PROGRAM, MANIFEST, ARCHIVE = "pod.py", "airlift.json", "tree.tar."  # the last with the compression behind it


def files(plan: Plan, job: dict[str, Any]) -> dict[str, bytes]:
    """The plan as three files, name -> content, for an executor that copies files: the pod program, the manifest (the
    job's description, with the digest of the tar as it lies there) and the tar."""
    tree = {"sha256": plan.digest, "files": plan.files, "compression": plan.compression,
            "bytes": len(plan.tar), "packed": hashlib.sha256(plan.tar).hexdigest()}
    manifest = json.dumps(job | {"tree": tree}, sort_keys=True, indent=1).encode()
    return {PROGRAM: plan.program, MANIFEST: manifest, ARCHIVE + plan.compression: plan.tar}


# What starts a pod from those files: python3 -c CHECKED FOLDER <SHA-256 of the program> <SHA-256 of the manifest>. The
# digests stand where nobody can change them any more (Slurm keeps a copy of its own of the batch script), and what is
# run is what was read. It must be readable to any Python.
CHECKED = """\
import sys
sys.path[:] = [path for path in sys.path if path]
def end(code, sentence):
    print("airlift: " + sentence + "\\nairlift: rank unknown ended with exit code %d" % code)
    sys.exit(code)
if sys.version_info[:2] <= (3, 6):
    end(85, "the python3 of this image is too old")
import hashlib
folder, program, manifest = sys.argv[1:]
try:
    with open(folder + "/pod.py", "rb") as file:
        source = file.read(1 << 22)
except EnvironmentError as error:
    end(80, "the program that unpacks did not arrive whole: %s" % error)
if hashlib.sha256(source).hexdigest() != program:
    end(80, "the program that unpacks did not arrive whole")
sys.argv[:] = ["pod.py", folder + "/airlift.json", manifest]
exec(compile(source, "pod.py", "exec"), {"__name__": "__main__", "SOURCE": source})
"""


def file_argv(sent: dict[str, bytes], folder: str) -> list[str]:
    """The argv that starts a pod whose files() lie in the folder."""
    return ["python3", "-c", CHECKED, folder, *(hashlib.sha256(sent[name]).hexdigest() for name in (PROGRAM, MANIFEST))]


def _recipe_env(env: dict[str, str], job: dict[str, Any]) -> dict[str, str]:
    """What the pod will start bash with, about; its script is a file. Raises Refusal for what no pod can have."""
    result = job.get("defaults", {}) | env | job.get("env", {})
    texts = [*job.get("pip", []), *job.get("setup", []), job.get("command", "")]
    for name in result:
        if not re.fullmatch(r"[^=\0]+", name):
            raise Refusal("a variable cannot be named %r" % name, "fix its name in env_vars")
    commands = [("a command", text) for text in texts]
    for what, text in [*result.items(), *commands, ("the config", job.get("config", ""))]:
        if "\0" in text or text != text.encode("utf-8", "ignore").decode():
            raise Refusal("%s holds a NUL or what is not UTF-8" % what, "take that character out")
    return result


def limits_for(executor: str, job: dict[str, Any], args: int = 0) -> Limits:
    """The executor's limits for a job of this shape, with `args` in place of its own. The environment stands twice in a
    RayCluster (head and worker spec) and in a distributed run:AI workload (the operator's master and worker spec)."""
    several = job["nodes"] > 1
    twice = several and (executor == "dgxcloud" or (executor == "lepton" and job.get("launch") == "ray"))
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]  # of this machine, where a local pod starts; -1: no limit
    own = MAX_EXEC if stack < 0 else max(MAX_STRING, min(MAX_EXEC, stack // 4))
    return replace(LIMITS[executor], copies=2 if twice else 1, args=args or LIMITS[executor].args,
                   exec=own if executor == "local" else MAX_EXEC)


def exec_bytes(env: dict[str, str], argv: list[str]) -> int:
    """Bytes that the kernel counts for argv and environment of one execve, but for the program's path and its NUL."""
    strings = [name + "=" + value for name, value in env.items()] + argv
    return sum(len(string.encode("utf-8", "surrogateescape")) + 1 + POINTER for string in strings)


def _budgets(env: dict[str, str], argv: list[str], limits: Limits, recipe: dict[str, str]
             ) -> list[tuple[str, int, int]]:
    strings = [n + "=" + v for n, v in (env | recipe).items()] + argv
    budgets = [("one string", max(len(text.encode("utf-8", "surrogateescape")) + 1 for text in strings), MAX_STRING),
               ("environment", exec_bytes(env, argv), max(1, limits.exec - EXEC_RESERVE))]
    if exec_bytes(recipe, []) > budgets[-1][2]:  # seldom: only what compresses well comes as far as this
        budgets.append(("recipe's environment", exec_bytes(recipe, []), budgets[-1][2]))
    others = (("one value", max(map(len, env.values())), limits.value), ("arguments", len(" ".join(argv)), limits.args),
              ("API object", object_bytes(env, argv, limits.copies), limits.object))
    return budgets + [budget for budget in others if budget[2]]


def object_bytes(env: dict[str, str], argv: list[str], copies: int) -> int:
    """Bytes of an API object that holds the environment `copies` times, as JSON, with OBJECT_RESERVE for the rest."""
    listed = [{"name": name, "value": value} for name, value in env.items()]
    return copies * (len(json.dumps(listed)) + len(json.dumps(argv))) + OBJECT_RESERVE


def human(size: int) -> str:
    """1234567 -> "1.2 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return "%d %s" % (value, unit) if unit == "B" else "%.1f %s" % (value, unit)
