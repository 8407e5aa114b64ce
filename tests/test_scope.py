"""What ships: scope = "imports", run.train_script, and sources that a config names; on made-up layouts."""

import ast
import json
import os

import pytest
from layout import REPO, header, launcher, nemotron, recipe, write
from support import plant

import closure
from transport import Entry, Refusal, Tree, collect

SCRIPT = "src/pkg/recipes/fam/sft/train.py"
CONFIG = "src/pkg/recipes/fam/sft/config"


def reached(tmp_path, files, text=""):
    """What the script reaches, without the packages' __init__ files and without itself."""
    root = plant(tmp_path / "repo", {"src/pkg/__init__.py": "", SCRIPT: header()} | files)
    tree = closure.collect(root.resolve(), SCRIPT, (), (root / CONFIG,), text)
    return {entry.path.removeprefix("src/") for entry in tree.entries} - {
        SCRIPT.removeprefix("src/"), *(path.removeprefix("src/") for path in files if path.endswith("__init__.py"))
    } - {"pkg/__init__.py"}


MODULES = {"src/pkg/a/__init__.py": "", "src/pkg/a/b.py": "", "src/pkg/a/c.py": "", "src/pkg/a/__main__.py": "",
           "src/pkg/far/__init__.py": "", "src/pkg/far/away.py": "", "src/other/m.py": "X = 1\n"}


@pytest.mark.parametrize(("source", "wanted"), [
    ("import pkg.a.b", {"pkg/a/b.py"}),
    ("import pkg.a.b as x, other.m", {"pkg/a/b.py", "other/m.py"}),
    ("from pkg.a import b", {"pkg/a/b.py"}),
    ("from pkg.a import NOT_A_MODULE", set()),
    ("from pkg.a.b import NAME", {"pkg/a/b.py"}),
    ("from ....a import b", {"pkg/a/b.py"}),
    ("from ....a.c import x", {"pkg/a/c.py"}),
    ("from other import m", {"other/m.py"}),
    ("def f():\n    if True:\n        import pkg.a.b", {"pkg/a/b.py"}),
    ("try:\n    import pkg.a.b\nexcept ImportError:\n    pass", {"pkg/a/b.py"}),
    ("import importlib\nimportlib.import_module('pkg.a.b')", {"pkg/a/b.py"}),
    ("from importlib import import_module as i, import_module\nimport_module('....a.b', __package__)", {"pkg/a/b.py"}),
    ("__import__('pkg.a.c')", {"pkg/a/c.py"}),
    ("import importlib\nimportlib.import_module(f'pkg.a.{kind}')", {"pkg/a/b.py", "pkg/a/c.py", "pkg/a/__main__.py"}),
    ("import importlib\nimportlib.import_module('pkg.a.' + kind)", {"pkg/a/b.py", "pkg/a/c.py", "pkg/a/__main__.py"}),
    ("TABLE = {'x': 'pkg.a.b:Class', 'y': 'pkg.a.c.Class'}", {"pkg/a/b.py", "pkg/a/c.py"}),
    ("import os\nos.system('python -m pkg.a.b --flag')", {"pkg/a/b.py"}),
    ("import os\nos.system('python -m pkg.a')", {"pkg/a/__main__.py"}),
    ("WORDS = ['python', '-m', 'pkg.a.b']", {"pkg/a/b.py"}),
    ("WORDS = ['python', 'src/pkg/a/c.py']", {"pkg/a/c.py"}),
    ("from pathlib import Path\nP = Path(__file__).parents[3] / 'a' / 'b.py'", {"pkg/a/b.py"}),
    ('"""Mentions pkg.a.b only."""', set()),
    ("x = 'a/../..'\ny = '.'\nz = '/'", set()),
    ("import not_here\nfrom pkg import nothing\nimport pkg.nothing", set()),
    ("this is not Python", set()),
])
def test_what_is_followed(tmp_path, source, wanted):
    assert reached(tmp_path, MODULES | {SCRIPT: header() + source + "\n"}) == wanted


def test_what_is_reached_reaches_more_also_in_a_circle(tmp_path):
    files = {"src/pkg/a.py": "from pkg import b\n", "src/pkg/b.py": "import pkg.c\n", "src/pkg/c.py": "import pkg.a\n",
             "src/pkg/d.py": "import pkg.a\n", SCRIPT: header() + "import pkg.a\n"}
    assert reached(tmp_path, files) == {"pkg/a.py", "pkg/b.py", "pkg/c.py"}


def test_packages_bring_their_inits_and_what_those_import(tmp_path):
    files = {"src/pkg/deep/__init__.py": "from .side import x\n", "src/pkg/deep/side.py": "",
             "src/pkg/deep/in/__init__.py": "", "src/pkg/deep/in/m.py": "",
             SCRIPT: header() + "import pkg.deep.in_.m\nimport pkg.deep.inner\n",
             "src/pkg/deep/inner/__init__.py": "from . import m\n", "src/pkg/deep/inner/m.py": "", "src/pkg/not.py": ""}
    assert reached(tmp_path, files) == {"pkg/deep/side.py", "pkg/deep/inner/m.py"}


def test_star_and_lazy_packages(tmp_path):
    lazy = "import importlib\nNAMES = ['one', '.two']\ndef f(n):\n    return importlib" \
           ".import_module('.' + n, __name__)\n"
    files = {"src/pkg/lazy/__init__.py": lazy, "src/pkg/lazy/one.py": "", "src/pkg/lazy/two.py": "",
             "src/pkg/lazy/3.py": "", "src/pkg/star/__init__.py": "__all__ = ['s']\n",
             "src/pkg/star/s.py": "", "src/pkg/star/t.py": "",
             SCRIPT: header() + "import pkg.lazy\nfrom pkg.star import *\n"}
    assert reached(tmp_path, files) == {"pkg/lazy/one.py", "pkg/lazy/two.py", "pkg/star/s.py"}


def test_data_beside_what_is_reached(tmp_path):
    data = ["a/x.yaml", "a/templates/deep/t.jinja", "a/py.typed", "a/run.sh"]
    stays = ["a/sub/code.py", "a/sub/its.json", "b/y.yaml", "b/__init__.py"]
    files = {"src/pkg/a/__init__.py": "", "src/pkg/a/m.py": ""} | {"src/pkg/" + name: "" for name in data + stays}
    wanted = {"pkg/" + name for name in ["a/m.py", *data]}
    assert reached(tmp_path, files | {SCRIPT: header() + "import pkg.a.m\n"}) == wanted


@pytest.mark.parametrize("source", [
    "from importlib.resources import files\nfiles('pkg.res')", "import pkgutil\npkgutil.get_data('pkg.res', 'x.json')",
    "from importlib import resources\nresources.read_text('pkg.res', 'x.json')"])
def test_package_resources(tmp_path, source):
    files = {"src/pkg/res/x.json": "{}", "src/pkg/res/__init__.py": "", SCRIPT: header() + source}
    assert reached(tmp_path, files) == {"pkg/res/x.json"}


def test_a_namespace_package_and_a_top_module(tmp_path):
    files = {"src/space/in/x.py": "", "src/space/inner/y.py": "", "src/single.py": "import space.inner.y\n",
             SCRIPT: header() + "import single\n"}
    assert reached(tmp_path, files) == {"single.py", "space/inner/y.py"}


def test_the_recipes_whole_folder(tmp_path):
    """Helpers beside the script and what lies in its folders go along; other recipes and their imports do not."""
    files = {"src/pkg/recipes/fam/sft/helper.py": "import pkg.used\n", "src/pkg/used.py": "", "src/pkg/unused.py": "",
             "src/pkg/recipes/fam/sft/data_prep.py": header("fam/data/prep") + "import pkg.unused\n",
             "src/pkg/recipes/fam/sft/uv.lock": "x", CONFIG + "/default.yaml": "", CONFIG + "/data/blend.json": "{}",
             "src/pkg/recipes/fam/rl/train.py": header("fam/rl"), "src/pkg/recipes/fam/rl/config/default.yaml": ""}
    assert reached(tmp_path, files) == {"pkg/used.py"} | {"pkg/recipes/fam/sft/" + name for name in (
        "helper.py", "uv.lock", "config/default.yaml", "config/data/blend.json")}


def test_imports_from_the_scripts_own_folder(tmp_path):
    """It is first on sys.path, also that of a script which is started by its path."""
    files = {"src/pkg/recipes/fam/sft/sub/run.py": "import near\n", "src/pkg/recipes/fam/sft/sub/near.py": "",
             "src/pkg/recipes/fam/sft/sub/far.py": "", SCRIPT: header() + "X = 'sub/run.py'\nimport sub.near\n"}
    assert reached(tmp_path, files) == {"pkg/recipes/fam/sft/sub/run.py", "pkg/recipes/fam/sft/sub/near.py"}


def test_what_a_config_names(tmp_path):
    yaml = "model: {_target_: pkg.a.b.Class}\nrun: python -m pkg.far.away\nx: ${oc.env:PWD}/src/other/m.py\n"
    assert reached(tmp_path, MODULES | {CONFIG + "/x.yaml": yaml}) == {
        "pkg/a/b.py", "pkg/far/away.py", "other/m.py", CONFIG[4:] + "/x.yaml"}
    assert reached(tmp_path / "2", MODULES, "y: /nemo_run/code/src/pkg/a/c.py\n_target_: pkg.a.b\n") == {
        "pkg/a/b.py", "pkg/a/c.py"}


def test_links_bring_what_they_lead_to(tmp_path):
    files = {"src/pkg/real/m.py": "", "src/pkg/real/n.py": "", "src/pkg/alias": "-> real", "src/pkg/stays": "-> real",
             SCRIPT: header() + "import pkg.alias.m\n"}
    found = reached(tmp_path, files)
    assert found == {"pkg/alias", "pkg/real/m.py"}


def test_another_family_ships_where_it_is_imported(tmp_path):
    files = {"src/pkg/recipes/kin/x.py": "import pkg.used\n", "src/pkg/recipes/kin/y.py": "", "src/pkg/used.py": "",
             SCRIPT: header() + "from pkg.recipes.kin import x\n"}
    assert reached(tmp_path, files) == {"pkg/recipes/kin/x.py", "pkg/used.py"}


def test_what_stays_is_listed_and_the_tree_is_the_same_every_time(tmp_path):
    root = plant(tmp_path, {SCRIPT: header() + "import pkg.a\n", "src/pkg/a.py": "", "src/pkg/b.py": "",
                            "src/pkg/recipes/kin/x.py": ""})
    made = [closure.collect(root, SCRIPT, (), (), "") for _ in range(2)]
    assert made[0] == made[1]
    assert dict(made[0].left_out) == {"src/pkg/b.py": "not imported", "src/pkg/recipes/kin": "another family"}
    assert set(made[0].entries) <= set(collect(root, SCRIPT).entries)


def test_a_tree_may_hold_anything(tmp_path):
    """What is not Python, not UTF-8 or far too deep is shipped or left, never a reason to stop."""
    odd = {"src/pkg/a.py": b"\xff\xfe", "src/pkg/b.py": b"x = " + b"(" * 300 + b")" * 300, "src/pkg/c.py": b"\0"}
    tree = Tree(tuple(Entry(path, data) for path, data in sorted(
        ({SCRIPT: header().encode() + b"import pkg.a, pkg.b, pkg.c\n"} | odd).items())))
    assert {entry.path for entry in closure.narrow(tree, SCRIPT, [])[0].entries} == {SCRIPT, *odd}


def test_our_own_starter_has_no_holes():
    """Each import of the starter's recipes leads to a file that ships."""
    for script in sorted((REPO / "src/starter/recipes").rglob("*.py")):
        path = script.relative_to(REPO).as_posix()
        tree = closure.collect(REPO, path, (), (script.parent / "config",), "")
        have = {entry.path for entry in tree.entries}
        assert len(have) < len(collect(REPO, path).entries)
        for entry in tree.entries:
            for node in ast.walk(ast.parse(entry.data)) if entry.path.endswith(".py") else ():
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starter"):
                    place = "src/" + str(node.module).replace(".", "/")
                    assert {place + ".py", place + "/__init__.py"} & have, (entry.path, node.module)


# ---------------------------------------------------------------- through the launcher

PROFILE = """
[mine]
executor = "lepton"
node_group = "g"
resource_shape = "gpu.8xh100-80gb"
container_image = "image:1"
workspace = "/shared"
gpus_per_node = 2
"""


def shown(root, *words, profile="", env=None):
    write(root / "env.toml", PROFILE + profile)
    done = launcher(REPO, *words, "--repo-root", root, "--json", cwd=root, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_launcher_narrows_and_lists(tmp_path):
    root = nemotron(tmp_path)
    whole = shown(root, "nano3", "sft", "mine")["payload"]["files"]
    assert shown(root, "nano3", "sft", "mine", profile='scope = "imports"')["payload"]["files"] < whole
    listed = shown(root, "files", "nano3", "sft", "mine", profile='scope = "imports"')
    assert {"path": "src/nemotron/kit/io.py", "reason": "not imported"} in listed["left_out"]


def test_sources_of_another_family_that_a_config_names(tmp_path):
    root = nemotron(tmp_path)
    blend = write(root / "src/nemotron/recipes/super3/data/blend.json", "{}")
    write(root / "src/nemotron/recipes/super3/data/other.json", "{}")
    write(root / "src/nemotron/recipes/nano3/stage1_sft/config/kin.yaml",
          "blend: ${oc.env:PWD}/src/nemotron/recipes/super3/data/blend.json\n"
          "gone: ${oc.env:PWD}/src/nemotron/x/y.json\n")
    for scope in ("family", "imports"):
        listed = shown(root, "files", "nano3", "sft", "mine", "-c", "kin", profile='scope = "%s"' % scope)
        paths = [item["path"] for item in listed["files"]]
        assert blend.relative_to(root).as_posix() in paths and not any("other.json" in path for path in paths)


def swapped(tmp_path, yaml, body=None):
    root = nemotron(tmp_path)
    folder = root / "src/nemotron/recipes/nano3/stage1_sft"
    other = header("nano3/sft-test", launch="python", nodes=2, gpus=1)
    (folder / "test_train.py").write_text(other if body is None else body)
    write(folder / "config/test.yaml", yaml)
    return root


TEST_SCRIPT = "src/nemotron/recipes/nano3/stage1_sft/test_train.py"


@pytest.mark.parametrize("scope", ["family", "imports"])
@pytest.mark.parametrize("spelled", [TEST_SCRIPT, "./" + TEST_SCRIPT, "${oc.env:PWD}/" + TEST_SCRIPT])
def test_train_script_swaps_the_script(tmp_path, scope, spelled):
    root = swapped(tmp_path, "run: {train_script: '%s'}\nx: 1\n" % spelled)
    found = shown(root, "nano3", "sft", "mine", "-c", "test", "gpus=1", profile='scope = "%s"' % scope)
    assert found["recipe"] | {"gpus_per_node": 0, "nproc_per_node": 0} == {
        "name": "nano3/sft", "script": TEST_SCRIPT, "launch": "python", "nodes": 2, "gpus_per_node": 0,
        "nproc_per_node": 0, "image": "image:1"}
    assert found["command"] == 'python "$AIRLIFT_CODE"/%s --config "$AIRLIFT_CONFIG"' % TEST_SCRIPT
    assert "train_script" not in found["config"]["text"]
    listed = shown(root, "files", "nano3", "sft", "mine", "-c", "test", profile='scope = "%s"' % scope)
    assert TEST_SCRIPT in [item["path"] for item in listed["files"]]


def test_train_script_without_a_header_keeps_the_recipes(tmp_path):
    root = swapped(tmp_path, "x: 1\n", body="print('no header')\n")
    found = shown(root, "nano3", "sft", "mine", "run.train_script=" + TEST_SCRIPT)
    assert (found["recipe"]["script"], found["recipe"]["launch"]) == (TEST_SCRIPT, "torchrun")
    assert TEST_SCRIPT in found["command"] and found["command"].startswith("torchrun ")


@pytest.mark.parametrize("value", ["src/no/such.py", "/etc/passwd", "../x.py", "[1]", "setup.py"])
def test_train_script_that_is_not_in_the_tree(tmp_path, value):
    root = swapped(tmp_path, "run: {train_script: %s}\n" % value)
    write(root / "env.toml", PROFILE)
    done = launcher(REPO, "nano3", "sft", "mine", "-c", "test", "--repo-root", root, "--dry-run", cwd=root)
    assert done.returncode == 2 and "run.train_script" in done.stderr and len(done.stderr.splitlines()) == 2


def test_run_env_reads_the_environment(tmp_path):
    """As NVIDIA's launcher does, which reads run.env by way of OmegaConf."""
    root = swapped(tmp_path, """\
        run:
          nproc_per_node: 8
          env:
            nodes: ${oc.env:MY_NODES,8}
            container_image: /home/${oc.env:MY_USER}/x.sqsh
            executor: slurm
            env_vars: {A: "${oc.env:MY_A,fallback}", B: "${oc.env:PWD}/x", C: "${art:data,path}"}
        """)
    found = shown(root, "nano3", "sft", "mine", "-c", "test", env={"MY_NODES": "3"})
    assert (found["recipe"]["nodes"], found["recipe"]["image"]) == (3, "/home/<unset MY_USER>/x.sqsh")
    assert (found["env"]["A"], found["env"]["B"]) == ("fallback", "/nemo_run/code/x")
    notes = "\n".join(found["notes"])
    for words in ("run.env reads MY_USER", "run.nproc_per_node has no effect", "executor, which only a profile can set",
                  "env_vars.C is sent unchanged"):
        assert words in notes, notes


def test_a_secret_under_a_harmless_name_is_not_shown(tmp_path):
    root, secret = nemotron(tmp_path), "s3cret-" + "x" * 20
    text = 'run_command = "login ${env:MY_TOKEN} && python {script}"\n' \
        '[mine.env_vars]\nPLAIN = "${env:MY_TOKEN}"\nURL = "//u:${env:MY_TOKEN}@h"\n'
    found = shown(root, "nano3", "sft", "mine", profile=text,
                  env={"MY_TOKEN": secret, "TOKENIZERS_PARALLELISM": "false"})
    assert secret not in json.dumps(found)
    assert (found["env"]["PLAIN"], found["env"]["URL"]) == ("***", "//u:***@h") and "login ***" in found["command"]


def test_recipes_outside_of_src_are_no_scripts(tmp_path):
    from configs import with_script
    from recipes import find

    root = nemotron(tmp_path)
    with pytest.raises(Refusal):
        with_script(find(root, "nano3/sft"), "nowhere.py", root / "x.yaml")


def test_resources_of_the_header_on_every_executor(tmp_path):
    """gpus_per_node = "gpu", launch = "python", env and workdir."""
    root = tmp_path / "repo"
    recipe(root, "nano3/sft", launch="python", gpus="gpu", nodes=2, env={"A": 1}, workdir="/opt/x")
    tables = {"local": "", "docker": 'container_image = "i"',
              "slurm": 'account = "a"\npartition = "p"\nremote_job_dir = "/l"',
              "lepton": 'node_group = "g"\nresource_shape = "s"\ncontainer_image = "i"',
              "dgxcloud": 'base_url = "u"\nclient_id = "c"\nclient_secret = "s"\nproject_name = "p"\n'
                          'container_image = "i"'}
    text = "".join('[my-%s]\nexecutor = "%s"\n%s\n' % (name, name, rest) for name, rest in tables.items())
    for name in tables:
        found = shown(root, "nano3", "sft", "my-" + name, profile=text)
        assert found["recipe"] | {"image": None} == {
            "name": "nano3/sft", "script": "src/nemotron/recipes/nano3/sft/train.py", "launch": "python", "nodes": 2,
            "gpus_per_node": "gpu", "nproc_per_node": "gpu", "image": None}
        assert found["env"]["A"] == "1" and found["command"].startswith('python "$AIRLIFT_CODE"/src/')
