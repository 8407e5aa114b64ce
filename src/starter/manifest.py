"""manifest.json: what a data prep has written, and how a recipe's config finds it.

    {"train": PATH, "val": PATH or null, "test": PATH or null, "mode": …, "source_splits": […], "run_hash": …,
     "splits": {NAME: {"train": PATH or null, "val": PATH or null}}, "files": {PATH: {"rows", "bytes", "sha256"}}}

A PATH is relative to the manifest, and names a file, a folder, or what several file names begin with. In a config,

    ${manifest:DIR,KEY}           is the entry KEY of DIR/manifest.json, with dots between nested keys
    ${manifest:DIR,KEY,DEFAULT}   is DEFAULT where there is no folder DIR, which is said aloud

A folder without a manifest is an error also with a default: there a data prep has begun and not ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from starter.config import RecipeError

NO_PATHS = ("mode", "run_hash", "source_splits")
REFERENCE = re.compile(r"\$\{manifest:\s*([^,{}]+?)\s*,\s*([^,{}]+?)\s*(?:,\s*([^{}]*?)\s*)?\}")


def fill(text: str, where: str) -> Any:
    """``text`` with its references replaced. Where one is the whole text, its value keeps its type."""
    whole = REFERENCE.fullmatch(text)
    if whole:
        return lookup(whole, where)
    return REFERENCE.sub(lambda match: str(lookup(match, where)), text)


def lookup(match: re.Match[str], where: str) -> Any:
    folder, key, default = Path(match[1]).absolute(), match[2], match[3]
    if default is not None and not folder.exists():
        say(f"{where}: there is no {folder}, so this run takes {default}")
        return default
    manifest = read(folder, where)
    value = entry(manifest, key, folder, where)
    if key not in NO_PATHS and is_path(manifest, value, folder):
        value = str(present(manifest, value, folder, where))
    say(f"{where}: {value} (manifest of {folder}, run {manifest.get('run_hash', 'unknown')})")
    return value


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def read(folder: Path, where: str) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("it is no table")
    except (FileNotFoundError, NotADirectoryError):
        there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise RecipeError(
            f"{where}: there is no {path} ({there or 'the folder is empty'}).\n"
            "Run the data prep that writes it to its end, as in: launch.py nano3 data/prep/sft PROFILE."
        ) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: cannot read {path}: {error}\nRun its data prep again, with force=true.") from error
    return manifest


def entry(manifest: dict[str, Any], key: str, folder: Path, where: str) -> Any:
    """The value under a dotted key. Raises RecipeError that lists the keys that are there."""
    try:
        value = below(manifest, key)
    except KeyError:
        there = ", ".join(sorted(keys(manifest)))
        raise RecipeError(f"{where}: {folder}/manifest.json has no {key}.\nIt has: {there}.") from None
    if isinstance(value, dict):
        raise RecipeError(f"{where}: {key} of {folder}/manifest.json is a table.\nName one in it: {', '.join(value)}.")
    if value is None:
        raise RecipeError(f"{where}: {key} of {folder}/manifest.json is empty: the data prep had nothing for it.\n"
                          f"Prepare such data, or set {where}=null if the recipe may go without.")  # fmt: skip
    return value


def below(table: Any, key: str) -> Any:
    """The value under a dotted key, whose parts may hold dots themselves. Raises KeyError."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if isinstance(table, dict) and name in table:
            with contextlib.suppress(KeyError):
                return below(table[name], rest) if rest else table[name]
    raise KeyError(key)


def keys(table: dict[str, Any], prefix: str = "") -> list[str]:
    """All dotted keys that lead to a value, but for the list of files."""
    found: list[str] = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += keys(value, f"{prefix}{key}.") if key != "files" else []
        else:
            found.append(prefix + key)
    return found


def files_of(manifest: dict[str, Any], value: str) -> dict[str, Any]:
    """The listed files that an entry stands for."""
    listed = manifest.get("files", {}).items()
    return {name: facts for name, facts in listed if name == value or name.startswith((value + "/", value + "."))}


def is_path(manifest: dict[str, Any], value: Any, folder: Path) -> bool:
    if not isinstance(value, str):
        return False
    return bool(files_of(manifest, value)) or ("files" not in manifest and (folder / value).exists())


def present(manifest: dict[str, Any], value: str, folder: Path, where: str) -> Path:
    """The path of an entry, once its files are there with the sizes that the manifest tells."""
    for name, facts in files_of(manifest, value).items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            state = "is not there" if size is None else f"has {size:,} bytes, not {facts['bytes']:,}"
            raise RecipeError(f"{where}: {path} {state}, against its manifest.\nRun its data prep again.")
    return Path(os.path.normpath(folder / value))


def owner(path: Path) -> tuple[Path, dict[str, Any], str] | None:
    """The nearest manifest above ``path`` that lists it: its folder, itself, and its name for the path."""
    for folder in path.absolute().parents:
        if (folder / "manifest.json").is_file():
            found = read(folder, str(path))
            name = path.absolute().relative_to(folder).as_posix()
            if files_of(found, name):
                return folder, found, name
    return None


def check(path: Path) -> None:
    """Compare the files of an entry with the SHA-256 in their manifest. What no manifest lists, it says it leaves."""
    from starter.files import sha256

    owned = owner(path)
    if not owned:
        return say(f"{path.resolve()}: no manifest lists it, so that there is nothing to compare it with")
    folder, manifest, name = owned
    for file, facts in files_of(manifest, name).items():
        if sha256(folder / file) != facts["sha256"]:
            raise RecipeError(f"{folder / file} is not what its manifest tells (SHA-256).\nRun its data prep again.")


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, out of the manifest that lists it, else of its bytes."""
    from starter.files import sha256

    owned = owner(path)
    return files_of(*owned[1:])[owned[2]]["sha256"] if owned else sha256(path)
