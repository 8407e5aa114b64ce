#!/usr/bin/env python3
"""Pack Airlift into one file for an air gap, and set it up there without a network.

    python bundle.py make [--torch] [--python 3.12] [--platform x86_64] [--wheels DIR]    (make bundle)
    python bundle.py install                                        (make install, in the unpacked bundle)

A bundle is dist/airlift-<version>.tar.gz: the scripts, the profiles, the starter recipes, a wheel of every pinned
dependency, SHA256SUMS and INSTALL. The same inputs give the same bytes: sorted names, no times, no owners, and wheels
by the hashes that requirements*.txt pin. It needs only the standard library and pip.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transport import CREDENTIAL_SHAPE, Refusal, human

HERE = Path(__file__).resolve().parent
VERSION = "1.0"
LISTS = {"launcher": "requirements.txt", "recipes": "requirements-recipes.txt", "torch": "requirements-torch.txt"}
FILES = (*(path.name for path in HERE.glob("*.py")), "Makefile", "README.md", "how.svg", "LICENSE", *LISTS.values())
# The lists of launcher and recipes are complete and pinned by hash; the dependencies of torch depend on its build.
STRICT = {"launcher": ("--no-deps", "--require-hashes"), "recipes": ("--no-deps", "--require-hashes"), "torch": ()}
FOLDERS = {"pod": (".py",), "backends": (".py",), "profiles": (".py", ".toml"), "src/starter": ()}  # suffixes; () all
INSTALL = """\
Airlift %(version)s, for Python %(python)s on %(platform)s. First compare the SHA-256 of the file that this came in.

    make install                     verifies every file, then sets up .venv without a network

or by hand:

    sha256sum --check --quiet SHA256SUMS
    python%(python)s -m venv .venv
    .venv/bin/pip install --no-index %(lists)s
%(more)s
Then: python launch.py list, python launch.py nano3 sft local, python launch.py check PROFILE. See README.md.
%(torch)s"""
BY_HAND_TORCH = ("    .venv/bin/pip install --no-index -f wheels/launcher -f wheels/recipes -f wheels/torch "
                 "-r requirements-torch.txt\n")
WITHOUT_TORCH = "This bundle has no torch: launches need none, but the local profile trains with the torch in .venv.\n"


def make(options: argparse.Namespace) -> None:
    target = {"version": VERSION, "python": options.python or "%d.%d" % sys.version_info[:2],
              "platform": "linux " + (options.platform or platform.machine()), "torch": options.torch}
    with tempfile.TemporaryDirectory(prefix="airlift-bundle-") as scratch:
        wheels = Path(options.wheels or scratch)
        if not options.wheels:
            download(options, wheels)
        members = dict(scripts()) | {"wheels/%s" % path.relative_to(wheels).as_posix(): path
                                     for name in lists(options.torch) for path in (wheels / name).glob("*.whl")}
        values = target | {"torch": "" if options.torch else WITHOUT_TORCH, "more": BY_HAND_TORCH * options.torch,
                           "lists": " ".join("-f wheels/%s -r %s" % (name, LISTS[name]) for name in lists(False))}
        texts = {"INSTALL": INSTALL % values, "TARGET": json.dumps(target, sort_keys=True) + "\n"}
        sums = {name: digest(path) for name, path in members.items()}
        sums |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        texts["SHA256SUMS"] = "".join("%s  %s\n" % (sums[name], name) for name in sorted(sums))
        made = Path(options.out) / ("airlift-%s.tar.gz" % VERSION)
        write(made, members, texts)
    print("%s  %s" % (digest(made), made))
    print("%s, %d wheels, for Python %s on %s%s" % (
        human(made.stat().st_size), sum(name.startswith("wheels/") for name in members), target["python"],
        target["platform"], "" if options.torch else ", without torch"))


def scripts() -> Iterator[tuple[str, Path]]:
    """(name in the bundle, path) of all files but wheels. Raises Refusal for what looks like a credential."""
    paths = [HERE / name for name in FILES]
    for folder, suffixes in FOLDERS.items():
        paths += [path for path in sorted((HERE / folder).rglob("*")) if path.is_file()
                  and "__pycache__" not in path.parts and (not suffixes or path.suffix in suffixes)]
    for path in paths:
        name = path.relative_to(HERE).as_posix()
        if not path.is_file():
            raise Refusal("%s is missing" % name, "make a bundle from a whole checkout")
        if CREDENTIAL_SHAPE.search(path.read_bytes()):
            raise Refusal("%s contains what looks like a credential" % name,
                          "read it from the environment: ${env:NAME}")
        yield name, path


def lists(torch: bool) -> list[str]:
    return [name for name in LISTS if torch or name != "torch"]


def download(options: argparse.Namespace, wheels: Path) -> None:
    """Download the pinned wheels for the target into a folder for each list. Raises Refusal."""
    target = ["--only-binary", ":all:"]
    if options.python:
        tag = "cp" + options.python.replace(".", "")
        target += ["--python-version", options.python, "--implementation", "cp", "--abi", tag, "--abi", "abi3",
                   "--abi", "none"]
    if options.platform:
        tags = ["manylinux2014", "manylinux2010", "manylinux1", *("manylinux_2_%d" % minor for minor in range(5, 36))]
        target += [item for tag in [*tags, "linux"] for item in ("--platform", "%s_%s" % (tag, options.platform))]
    have: set[str] = set()
    for name in lists(options.torch):
        wanted = wheels / LISTS[name]
        wanted.write_text(needed((HERE / LISTS[name]).read_text(), options))
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", *target, *STRICT[name]]
        done = subprocess.run([*pip, "--dest", str(wheels / name), "-r", str(wanted)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Refusal("pip cannot get the wheels of %s: %s" % (LISTS[name], " ".join(errors[-1:])),
                          "check that this machine can reach its package index", 5)
        for path in (wheels / name).glob("*.whl"):
            if path.name in have:
                path.unlink()
            have.add(path.name)


def needed(text: str, options: argparse.Namespace) -> str:
    """A list with only what the target needs, and without conditions, which pip would apply to its own Python."""
    from pip._vendor.packaging.markers import Marker  # this script runs before any package is installed
    python = options.python and {"python_version": options.python, "python_full_version": options.python + ".0"}
    other = (python or {}) | ({"platform_machine": options.platform} if options.platform else {})
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        pin, _, condition = line.partition(" ; ")
        condition, hashes, rest = condition.partition(" --hash")
        if not condition or Marker(condition).evaluate(other):
            lines.append(pin + hashes + rest + "\n")
    return "".join(lines)


def write(made: Path, members: dict[str, Path], texts: dict[str, str]) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    with (open(made, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, 0) as file,
          tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar):
        for name in sorted([*members, *texts]):
            info = tarfile.TarInfo("airlift-%s/%s" % (VERSION, name))
            info.mode = 0o644
            path = members.get(name)
            info.size = path.stat().st_size if path else len(texts[name].encode())
            with open(path, "rb") if path else io.BytesIO(texts[name].encode()) as source:
                tar.addfile(info, source)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def install(options: argparse.Namespace) -> None:
    target = verify(HERE)
    here = "%d.%d" % sys.version_info[:2]
    if (here, "linux " + platform.machine()) != (target["python"], target["platform"]):
        raise Refusal("this is Python %s on linux %s, and the bundle is for Python %s on %s" % (
            here, platform.machine(), target["python"], target["platform"]),
            "make install PYTHON=/path/to/python%s, or make a bundle with --python %s" % (target["python"], here))
    python = HERE / ".venv/bin/python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(HERE / ".venv")], "make .venv")
    pip = [str(python), "-m", "pip", "--isolated", "--quiet", "--disable-pip-version-check", "install", "--no-index"]
    for name in lists(target["torch"]):
        pip += ["--find-links", str(HERE / "wheels" / name)]
        run([*pip, *STRICT[name], "-r", str(HERE / LISTS[name])], "install what %s pins" % LISTS[name])
    for stamp in ("launcher", "recipes") if target["torch"] else ("launcher",):  # those of the Makefile
        (HERE / ".venv" / stamp).touch()
    print("ready: python launch.py list")


def verify(folder: Path) -> dict:
    """The bundle's TARGET. Raises Refusal that names the files that are missing, changed, or not of the bundle."""
    try:
        lines = (folder / "SHA256SUMS").read_text().splitlines()
    except FileNotFoundError:
        raise Refusal("SHA256SUMS is missing: this is not a bundle", "in a checkout, use make setup") from None
    sums = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    missing = [name for name in sums if not (folder / name).is_file()]
    changed = [name for name in sums if name not in missing and digest(folder / name) != sums[name]]
    wheels = [path.relative_to(folder).as_posix() for path in (folder / "wheels").glob("*/*")]
    strange = [name for name in wheels if name not in sums]
    for names, what in ((missing, "missing"), (changed, "not as packed"), (strange, "not of this bundle")):
        if names:
            raise Refusal("%s %s: %s" % (len(names), what, ", ".join(sorted(names)[:10])),
                          "unpack the bundle again, and compare the SHA-256 of the file that it came in")
    return dict(json.loads((folder / "TARGET").read_text()))


def run(command: list[str], doing: str) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Refusal("cannot %s: %s" % (doing, " ".join(done.stderr.split())[-300:]), "fix what it names")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bundle.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--torch", action="store_true", help="include torch, for the local profile")
    making.add_argument("--python", help="the target's Python version, like 3.12 (default: this one's)")
    making.add_argument("--platform", help="the target's machine: x86_64 or aarch64 (default: this one's)")
    making.add_argument("--wheels", help="a folder of wheels to use, instead of a download")
    making.add_argument("--out", default=str(HERE / "dist"))
    commands.add_parser("install")
    options = parser.parse_args()
    try:
        {"make": make, "install": install}[options.command](options)
    except Refusal as refusal:
        print("airlift: %s\n%s" % (refusal.what, refusal.fix), file=sys.stderr)
        return refusal.code
    return 0


if __name__ == "__main__":
    os.environ.pop("PIP_REQUIRE_VIRTUALENV", None)
    sys.exit(main())
