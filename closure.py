"""scope = "imports": the part of a collected tree that the script reaches. The source is read, never imported or run.

Starting with the script, transitively:

  - its own folder and its config folder: all files but Python, and the Python beside the script that is no recipe
  - `import a.b`, `from a import b` (module or attribute), relative imports, and each package's __init__ on the way;
    also from the folder of a script, which is first on its sys.path
  - modules named in text: import_module("a.b"), "a.b:Class", `_target_: a.b.Class`, `python -m a.b`; an import_module
    of which only the beginning is in the source (f"a.b.{kind}") reaches the whole package
  - files and folders of the tree that are named in text, or joined with `/` to a Path
  - the files beside such a module that are not Python: templates, tables, shell scripts

A module whose name is computed at run time cannot be seen; `files` lists what is not sent.
"""

import ast
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import transport
from transport import COLLECTIONS, Entry, Tree, resolve_link

DOTTED = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
RUN_MODULE = re.compile(r"(?<!\S)-m[\s\"',]+([A-Za-z_][\w.]*)")
PLACE = re.compile(r"[\w.-]*(?:/[\w.-]+)+|[\w-]+\.[a-z0-9]{1,6}\b")
TEXTS = (".yaml", ".yml", ".toml", ".json", ".sh", ".cfg", ".ini", ".jinja", ".j2")
LOADERS = {"import_module", "__import__", "find_spec", "run_module", "files", "get_data", "read_text", "read_binary",
           "open_text", "open_binary", "path", "contents", "is_resource", "as_file", "PackageLoader",
           "resource_filename", "resource_string", "iter_modules"}


def narrow(tree: Tree, script: str, configs: Iterable[str], texts: Iterable[str] = ()) -> tuple[Tree, set[str]]:
    """(the part of the tree that the script reaches, the paths that it names and the tree does not have). `configs` are
    folders and files of the tree, `texts` are compiled configs."""
    walk = _Closure({entry.path: entry for entry in tree.entries}, script)
    walk.start([*configs, *tree.asked], texts)
    kept = tuple(entry for entry in tree.entries if entry.path in walk.reached)
    left = [(entry.path, "not imported") for entry in tree.entries if entry.path not in walk.reached]
    return replace(tree, entries=kept, left_out=tuple(sorted([*tree.left_out, *left]))), walk.absent


def collect(root: Path, script: str, exclude: tuple[str, ...], configs: Iterable[Path], text: str,
            include: tuple[str, ...] = (), also: tuple[str, ...] = ()) -> Tree:
    """The tree that the script reaches. `configs` are folders and files anywhere, `text` is the compiled config; the
    rest is as in transport.collect."""
    inside = [path.resolve().relative_to(root).as_posix() for path in configs if path.resolve().is_relative_to(root)]
    tree = transport.collect(root, script, exclude, include, also)
    narrowed, absent = narrow(tree, script, inside, [text])
    elsewhere = [path for path, reason in tree.left_out if reason == "another family"]
    if any((name + "/").startswith(folder + "/") for name in absent for folder in elsewhere):
        found, _ = narrow(transport.collect(root, script, exclude, include, also, True), script, inside, [text])
        return replace(found, left_out=narrowed.left_out)
    return narrowed


@dataclass
class _Closure:
    entries: dict[str, Entry]
    script: str
    reached: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)  # paths, with or without a suffix, that are named but do not exist
    todo: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.links = {path: entry.data.decode() for path, entry in self.entries.items() if entry.link}
        self.folders = {folder for path in self.entries for folder in _above(path)}
        self.tops = {path.split("/")[1].removesuffix(".py") for path in self.entries if path.startswith("src/")}
        self.roots = ["src"]  # folders that modules are imported from

    def start(self, configs: Iterable[str], texts: Iterable[str]) -> None:
        self.run(self.script)
        folder = posixpath.dirname(self.script)
        for path in configs:
            self.add_all(path)
        if folder.count("/") > 1:  # not a package's root, or src itself
            self.add_all(folder, beside=True)
        for text in texts:
            self.read_text(text, folder)
        while self.todo:
            path = self.todo.pop()
            data = self.entries[path].data
            if path.endswith(".py"):
                self.read_module(path, data)
            elif path.endswith(TEXTS):
                self.read_text(data.decode("utf-8", "replace"), posixpath.dirname(path))

    def find(self, path: str) -> str | None:
        """The file or folder of the tree that a path leads to, or None."""
        path = posixpath.normpath(path)
        if self.links:
            path = resolve_link(path, self.links)
        return path if path in self.entries or path in self.folders else None

    def add(self, path: str) -> bool:
        """Reach a file, and the links on the way to it. Returns whether it exists."""
        found = self.find(path)
        for link in [link for link in self.links if (posixpath.normpath(path) + "/").startswith(link + "/")]:
            new = link not in self.reached
            self.reached.add(link)
            if new and link == path and found in self.folders:
                self.add_all(found)
        if found not in self.entries:
            return False
        assert found is not None
        if found not in self.reached:
            self.reached.add(found)
            self.todo.append(found)
            if found.endswith(".py"):
                self.add_data(posixpath.dirname(found))
        return True

    def add_all(self, folder: str, beside: bool = False) -> None:
        """Reach a file, or all below a folder; with `beside`, of Python only what is in it and not a recipe."""
        found = self.find(folder)
        if found is None or found in self.entries:
            self.add(folder)
            return
        for path in [path for path in self.entries if path.startswith(found + "/")]:
            is_recipe = b"[tool.runspec" in self.entries[path].data
            if not (beside and path.endswith(".py") and (posixpath.dirname(path) != found or is_recipe)):
                self.add(path)

    def add_data(self, folder: str) -> None:
        """Reach the data in a module's folder and, except for recipes, in folders without Python below it."""
        recipes = folder.split("/")[2:3] in [[name] for name in COLLECTIONS]
        python = {above for path in self.entries if path.endswith(".py") for above in _above(path)}
        for path in [path for path in self.entries if path.startswith(folder + "/") and not path.endswith(".py")]:
            inner = [above for above in _above(path) if above.startswith(folder + "/")]
            if path in self.links and self.find(path) in self.folders:
                continue
            if not inner or not (recipes or python.intersection(inner)):
                self.add(path)

    def run(self, path: str) -> None:
        """Reach a script that is started by its path, so that its folder is on its sys.path, or as a module."""
        if self.add(path):
            folder = posixpath.dirname(self.find(path) or path)
            if folder not in self.roots:
                self.roots.append(folder)
            self.add_packages(path)

    def add_packages(self, path: str) -> None:
        for folder in _above(path):
            self.add(folder + "/__init__.py")

    def module(self, name: str) -> bool:
        """Reach a module by its dotted name, with its packages. Returns whether it, or a namespace, exists."""
        there = False
        for root in self.roots:
            path = root + "/" + name.replace(".", "/")
            here = self.add(path + ".py") or self.add(path + "/__init__.py")
            if here:
                self.add_packages(path + "/x")
            there = there or here or self.find(path) in self.folders
        return there

    def longest(self, name: str) -> None:
        """Reach the longest module that a dotted name begins with: a.b.Class reaches a.b."""
        parts = name.split(".")
        if parts[0] in self.tops:
            whole = self.module(name)
            while not whole and len(parts) > 1:
                parts.pop()
                whole = self.module(".".join(parts))
            if ".".join(parts) != name:
                self.absent.add("src/" + name.replace(".", "/"))

    def read_text(self, text: str, folder: str) -> None:
        for match in DOTTED.finditer(text):
            self.longest(match.group())
        for match in RUN_MODULE.finditer(text):
            self.module(match.group(1))
            self.module(match.group(1) + ".__main__")
        for match in PLACE.finditer(text):
            self.place(match.group(), folder)

    def place(self, text: str, folder: str) -> None:
        """Reach a file or folder that a text names, from the tree's root, the text's folder or the script's."""
        text = text.removeprefix("/nemo_run/code")
        if re.search(r"\w", posixpath.normpath(text)):  # not "." or "../.."
            for base in ("", folder, posixpath.dirname(self.script)):
                path = posixpath.normpath(posixpath.join(base, text.lstrip("/")))
                if not self.reach(path, folder) and path.startswith("src/"):
                    self.absent.add(path)

    def reach(self, path: str, here: str) -> bool:
        """Reach a file, or a folder with all files below it, that is named in the folder `here`: but not a folder above
        `here`, a package's root or a collection. Returns whether it was reached."""
        found = self.find(path) if path.startswith("src/") else None
        if found is None:
            return False
        if found in self.entries:
            self.run(path) if path.endswith(".py") else self.add(path)
            return True
        parts = found.split("/")
        meant = len(parts) > 2 and not (len(parts) == 3 and parts[2] in COLLECTIONS)
        if meant and not (here + "/").startswith(found + "/"):
            self.add_all(path)
            return True
        return False

    def read_module(self, path: str, data: bytes) -> None:
        try:
            top = ast.parse(data)
        except (SyntaxError, ValueError):  # a template, or Python of another version
            return
        folder = posixpath.dirname(path)
        package = folder.removeprefix("src").replace("/", ".").strip(".")
        nodes = list(ast.walk(top))
        loose = any(isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__")
                    and not (node.args and isinstance(node.args[0], ast.Constant)) for node in nodes)
        docstrings = {id(node.body[0].value) for node in nodes
                      if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                      and node.body and isinstance(node.body[0], ast.Expr)}
        inner = {id(node.left) for node in nodes if isinstance(node, ast.BinOp)}  # of a / b / c, a / b
        for node in nodes:
            if isinstance(node, ast.Import):
                for name in node.names:
                    self.longest(name.name) if "." in name.name else self.module(name.name)
            elif isinstance(node, ast.ImportFrom):
                self.import_from(node, package)
            elif isinstance(node, ast.Call) and _called(node) in LOADERS:
                self.load(node, package)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and id(node) not in inner:
                self.joined(_parts(node), folder)
            elif isinstance(node, (ast.List, ast.Tuple)):
                for flag, module in itertools.pairwise(map(_string, node.elts)):
                    if flag == "-m" and module:
                        self.module(module)
                        self.module(module + ".__main__")
            elif isinstance(node, ast.Constant) and _string(node) and id(node) not in docstrings:
                self.read_text(_string(node), folder)
                if loose and re.fullmatch(r"\.+[A-Za-z_][\w.]*|[A-Za-z_]\w*" if path.endswith("/__init__.py") else
                                          r"\.+[A-Za-z_][\w.]*", _string(node)):
                    self.relative(_string(node), package)

    def import_from(self, node: ast.ImportFrom, package: str) -> None:
        base = node.module or ""
        if node.level:
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
        self.longest(base) if "." in base else self.module(base)
        for name in node.names:
            if name.name == "*":  # it imports the modules in the package's __all__
                init = self.entries.get(self.find("src/%s/__init__.py" % base.replace(".", "/")) or "")
                text = init.data.decode("utf-8", "replace") if init else ""
                for member in re.findall(r"[\"']([A-Za-z_]\w*)[\"']", text):
                    self.module(base + "." + member)
            elif base.split(".")[0] in self.tops or len(self.roots) > 1:
                self.module(base + "." + name.name)

    def relative(self, name: str, package: str) -> None:
        """Reach the name that an import_module of this file may get: `.writers`, or in an __init__ just `writers`."""
        dots = len(name) - len(name.lstrip("."))
        parts = package.split(".")
        base = parts[: len(parts) - max(dots, 1) + 1]
        if base and base != [""]:
            self.module(".".join([*base, name.lstrip(".")]))

    def load(self, node: ast.Call, package: str) -> None:
        """import_module("a.b"), files("a.b"), get_data("a.b", "x.json")."""
        for argument in node.args[:1]:
            if name := _string(argument):
                self.relative(name, package) if name.startswith(".") else self.module(name)
            begun = _begun(argument)
            if begun.strip(".") and begun.endswith(".") and self.module(begun.rstrip(".")):
                self.add_all("src/" + begun.rstrip(".").replace(".", "/"))
        if len(node.args) > 1 and _called(node) != "import_module":
            module, name = map(_string, node.args[:2])
            if module and name:
                self.place("src/%s/%s" % (module.replace(".", "/"), name), "src")

    def joined(self, parts: list[str], folder: str) -> None:
        """Path(__file__).parent / "templates" / "x.j2": in the module's folder or any folder above it."""
        text = "/".join(parts)
        for base in [folder, *_above(folder), ""] if text else []:
            self.reach(posixpath.normpath(posixpath.join(base, text)), folder)


def _above(path: str) -> Iterator[str]:
    """The folders that contain a path, the nearest first, up to src."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _called(node: ast.AST) -> str:
    """The last name of what is called: import_module of importlib.import_module(...)."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _string(node: ast.AST | None) -> str:
    """The text of a string literal, "" of all else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _begun(node: ast.AST) -> str:
    """What a computed name begins with: "a.b." of f"a.b.{kind}" and of "a.b." + kind."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else \
        node.left if isinstance(node, ast.BinOp) else None
    return _string(first)


def _parts(node: ast.AST) -> list[str]:
    """The strings at the end of a / b / c."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [*_parts(node.left), _string(node.right)] if _string(node.right) else []
    return [_string(node)] if _string(node) else []
