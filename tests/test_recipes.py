"""recipes.py: headers, how recipes are found, and the command that starts one."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import refusal
from layout import header, nemotron, recipe, write
from support import as_nobody, need, toml

import recipes
from transport import Refusal, collect

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------- headers


def test_every_field(tmp_path):
    recipe(tmp_path, "super3/rl/stage1_rlvr", launch="ray", cmd="uv run python {script}", workdir="/opt/nemo-rl",
           image="nvcr.io/nemo:1", nodes=109, gpus=4, config_dir="./yaml", default="big",
           env={"A": "1", "B": 2, "C": True})
    found = recipes.find(tmp_path, "super3/rl/stage1_rlvr")
    assert found == recipes.Recipe(
        "super3/rl/stage1_rlvr", tmp_path, "src/nemotron/recipes/super3/rl/stage1_rlvr/train.py", "nvcr.io/nemo:1",
        "ray", "uv run python {script}", "/opt/nemo-rl",
        tmp_path / "src/nemotron/recipes/super3/rl/stage1_rlvr/yaml", "big", 109, 4, {"A": "1", "B": 2, "C": True})
    assert (found.family, found.stage) == ("super3", "rl/stage1_rlvr")


def test_defaults(tmp_path):
    script = recipe(tmp_path)
    found = recipes.find(tmp_path, "nano3/sft")
    assert (found.image, found.launch, found.cmd, found.workdir) == (None, "torchrun", None, None)
    assert (found.config_dir, found.config_default) == (script.parent / "config", "default")
    assert (found.nodes, found.gpus_per_node, found.env) == (1, 8, {})


def test_gpu_as_a_word_and_windows_line_ends(tmp_path):
    script = recipe(tmp_path, gpus="gpu", nodes=3)
    script.write_bytes(b"#!/usr/bin/env python\r\n" + script.read_bytes().replace(b"\n", b"\r\n"))
    assert recipes.find(tmp_path, "nano3/sft").gpus_per_node == "gpu"


def test_a_byte_order_mark_hides_no_recipe(tmp_path):
    script = recipe(tmp_path, nodes=3)
    script.write_bytes(b"\xef\xbb\xbf" + script.read_bytes())
    assert recipes.find(tmp_path, "nano3/sft").nodes == 3
    for coding in ("utf-16", "utf-16-be"):
        script.write_bytes(b"\xfe\xff" * (coding == "utf-16-be") + header().encode(coding))
        found = refusal(recipes.find, tmp_path, "nano3/sft")
        assert found.what == "src/nemotron/recipes/nano3/sft/train.py:1: a script in UTF-16, which Python does not run"
    script.write_bytes(b"\xff\xfe\0\1\2")  # data by that name
    assert recipes.scan(tmp_path) == ({}, [])


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_header_may_end_the_file(tmp_path, end):
    script = recipe(tmp_path)
    script.write_text(header().rstrip("\n") + end, newline="")
    assert recipes.find(tmp_path, "nano3/sft").nodes == 1


@pytest.mark.parametrize("text", [
    "", "print('no header')\n", "# /// script\n# dependencies = []\n# ///\n", "x = '[tool.runspec]'\n",
    "# /// script\n# [tool.other]\n# ///\n# [tool.runspec]\n",
    "# /// script\n# tool = 3\n# ///\nx = '[tool.runspec]'\n",
])
def test_scripts_without_a_header_are_no_recipes(tmp_path, text):
    path = write(tmp_path / "src/nemotron/recipes/nano3/x.py", text)
    assert recipes.read_header(tmp_path, path) is None
    assert recipes.scan(tmp_path) == ({}, [])


BAD_HEADERS = [
    # (lines of the block, line of the file that is named, what is wrong, what to do)
    (["[tool.runspec]", 'name = "a/b'], 4, "is not TOML: Illegal character", "fix the block"),
    (["[tool.runspec]", 'name = "a/b"', "x ="], 5, "is not TOML: Invalid value", "fix the block"),
    (["[tool.runspec]", 'name = "a/b"', "n = " + "9" * 5000], 2, "is not TOML: Exceeds the limit", "fix the block"),
    (["[tool.runspec]", "name = " + "[" * 3000], 2, "is not TOML: ", "fix the block"),
    (["[tool.runspec]", 'nmae = "a/b"'], 4, "unknown field 'nmae'", "did you mean name"),
    (["[tool.runspec]", 'name = "a/b"', "", "[tool.runspec.run]", 'lauch = "ray"'], 7, "unknown field 'lauch'",
     "did you mean launch?"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.config]", 'default = "x"', "[tool.runspec.resources]",
      "default = 1"], 8, "unknown field 'default'", "did you mean gpus_per_node or nodes?"),
    (["[tool.runspec]", 'name = "a/b"', 'run.launch = "mpi"'], 5, "launch mode 'mpi' is not known",
     "use one of torchrun"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.run]", 'launch = "Ray"'], 6, "launch mode 'Ray' is not known",
     "torchrun, ray, direct, python"),
    (["[tool.runspec]", "name = 3"], 4, "name is 3", "it must be a string"),
    (["[tool.runspec]", 'name = "a/b"', "image = true"], 5, "image is True", "it must be a string"),
    (["[tool.runspec]", 'name = "a/b"', 'run = "ray"'], 5, "run is 'ray'", "it must be a table"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.resources]", 'nodes = "2"'], 6, "nodes is '2'",
     "it must be a whole number"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.resources]", "nodes = true"], 6, "nodes is True",
     "it must be a whole number"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.resources]", "gpus_per_node = 1.5"], 6, "gpus_per_node is 1.5",
     "it must be a whole number or a string"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.resources]", "nodes = 0"], 6, "resources are {'nodes': 0}",
     "nodes must be 1 or more"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.resources]", "gpus_per_node = -1"], 6, "gpus_per_node': -1",
     "0 or more"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.resources]", 'gpus_per_node = "all"'], 6, "'all'", '"gpu"'),
    (["[tool.runspec]", 'name = "sft"'], 4, "name is 'sft'", 'like "family/stage"'),
    (["[tool.runspec]", 'name = "../sft"'], 4, "name is '../sft'", 'like "family/stage"'),
    (["[tool.runspec]", 'name = "nano3/s ft"'], 4, "name is 'nano3/s ft'", 'like "family/stage"'),
    (["[tool.runspec]", 'schema = "1"'], 3, "name is ''", 'like "family/stage"'),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.env]", "A = [1]"], 6, "env.A is [1]", "letters, digits and _"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.env]", '"A B" = "x"'], 6, "env.A B is 'x'",
     "letters, digits and _"),
    (["[tool.runspec]", 'name = "a/b"', "[tool.runspec.env]", 'A = "\\u0000"'], 6, "env.A is ", "without NUL"),
]


@pytest.mark.parametrize(("lines", "at", "what", "fix"), BAD_HEADERS, ids=[case[2] for case in BAD_HEADERS])
def test_a_bad_header_names_file_and_line(tmp_path, lines, at, what, fix):
    text = "".join("# %s\n" % line for line in ["/// script", *lines, "///"])
    path = write(tmp_path / "src/p/recipes/a/t.py", "#!python\n" + text)
    found = refusal(recipes.read_header, tmp_path, path)
    assert found.what.startswith("src/p/recipes/a/t.py:%d: " % at)
    assert what in found.what and fix in found.fix
    assert "(at line" not in found.what  # TOML's own count would contradict ours


def test_a_broken_header_does_not_stop_another_recipe(tmp_path):
    recipe(tmp_path, "nano3/sft")
    recipe(tmp_path, "nano3/bad", extra="[tool.runspec.run]\nlauch = 1")
    assert recipes.find(tmp_path, "nano3/sft").name == "nano3/sft"
    found = refusal(recipes.find, tmp_path, "nano3/bad")
    assert found.what == "nano3 has no stage 'bad'"
    assert "or fix src/nemotron/recipes/nano3/bad/train.py:8: the header has an unknown field 'lauch'" in found.fix
    (tmp_path / "src/nemotron/recipes/nano3/sft/train.py").unlink()
    assert "unknown field 'lauch'" in refusal(recipes.find, tmp_path, "nano3/sft").what


def test_what_is_not_a_file_is_passed_over_or_named(tmp_path):
    recipe(tmp_path)
    (tmp_path / "src/nemotron/recipes/folder.py").mkdir()
    (tmp_path / "src/nemotron/recipes/gone.py").symlink_to("nowhere")
    found, problems = recipes.scan(tmp_path)
    assert list(found) == ["nano3/sft"]
    assert [p.what for p in problems] == ["src/nemotron/recipes/gone.py cannot be read: No such file or directory"]


@pytest.mark.parametrize("copy", [
    ".ipynb_checkpoints/train-checkpoint.py", ".#train.py", "#train.py#", "train_BASE_1234.py", ".history/train_2024.py", "._train.py",
    "train (me's conflicted copy).py", "train.sync-conflict-2024.py", ".snapshot/hourly/train.py", "env/pyvenv.cfg", "__MACOSX/train.py",
    "../../../../.ipynb_checkpoints/recipes/train.py", "../../../../nemotron.orig/recipes/nano3/sft/train.py"])
def test_what_programs_leave_behind_is_no_recipe(tmp_path, copy):
    """By the same rule as for what ships: a launch and `list` go on."""
    script = recipe(tmp_path)
    write(script.parent / copy, script.read_text())
    if copy.endswith("pyvenv.cfg"):
        write(script.parent / "env/lib/train.py", script.read_text())
    assert (list(recipes.scan(tmp_path)[0]), recipes.scan(tmp_path)[1]) == (["nano3/sft"], [])
    shipped = [entry.path for entry in collect(tmp_path, script.relative_to(tmp_path).as_posix()).entries]
    assert [path for path in shipped if "runspec" in (tmp_path / path).read_text()] == [script.relative_to(tmp_path).as_posix()]


def test_a_lock_of_emacs_that_leads_nowhere(tmp_path):
    script = recipe(tmp_path)
    (script.parent / ".#train.py").symlink_to("me@host.4711:1700000000")
    assert recipes.scan(tmp_path)[1] == [] and recipes.find(tmp_path, "nano3/sft").script.endswith("/train.py")


def test_a_package_called_venv_has_recipes(tmp_path):
    recipe(tmp_path, path="src/venv/recipes/nano3/env/train.py")
    assert recipes.find(tmp_path, "nano3/sft").script == "src/venv/recipes/nano3/env/train.py"


def test_a_folder_that_cannot_be_searched_is_said():
    need(os.geteuid() == 0, "only root becomes another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # tmp_path lies in a folder that is closed to others
        root = Path(name)
        recipe(root)
        closed = recipe(root, "nano3/rl").parent
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        closed.chmod(0)

        def look():
            found, problems = recipes.scan(root)
            assert list(found) == ["nano3/sft"]
            assert [problem.what for problem in problems] == ["%s cannot be read: Permission denied" % closed]

        assert as_nobody(look) == ""


def test_two_scripts_of_one_name_are_an_error_that_names_both(tmp_path):
    one = recipe(tmp_path, "nano3/sft", path="src/a/recipes/nano3/train.py")
    recipe(tmp_path, "nano3/sft", path="src/b/recipes/nano3/train.py")
    recipe(tmp_path, "nano3/rl", path="src/b/recipes/nano3/rl.py")
    both = "two scripts are named nano3/sft: src/a/recipes/nano3/train.py and src/b/recipes/nano3/train.py"
    assert refusal(recipes.find, tmp_path, "nano3/sft").what == both
    assert recipes.find(tmp_path, "nano3/rl").name == "nano3/rl"
    recipe(tmp_path, "nano3/sft", path="src/c/steps/nano3/train.py")
    assert refusal(recipes.find, tmp_path, "nano3/sft").what == both + " and src/c/steps/nano3/train.py"
    one.unlink()
    assert "src/b" in refusal(recipes.find, tmp_path, "nano3/sft").what


@pytest.mark.parametrize("package", ["aaa", "zzz"])
def test_the_starter_yields(tmp_path, package):
    recipe(tmp_path, "nano3/sft", path="src/starter/recipes/nano3/sft/train.py")
    assert recipes.find(tmp_path, "nano3/sft").script.startswith("src/starter/")
    recipe(tmp_path, "nano3/sft", path="src/%s/recipes/nano3/sft/train.py" % package)
    assert recipes.find(tmp_path, "nano3/sft").script == "src/%s/recipes/nano3/sft/train.py" % package


def test_two_starters_of_one_name_are_an_error(tmp_path):
    recipe(tmp_path, "nano3/sft", path="src/starter/recipes/nano3/a.py")
    recipe(tmp_path, "nano3/sft", path="src/starter/recipes/nano3/b.py")
    assert "a.py and src/starter/recipes/nano3/b.py" in refusal(recipes.find, tmp_path, "nano3/sft").what


def test_unknown_names_name_the_nearest(tmp_path):
    nemotron(tmp_path)
    assert str(refusal(recipes.find, tmp_path, "nano/sft")) == "there is no family 'nano'\ndid you mean nano3?"
    assert str(refusal(recipes.find, tmp_path, "nano3/stf")) == "nano3 has no stage 'stf'\ndid you mean sft?"
    assert refusal(recipes.find, tmp_path, "super3/rl/stage_rlvr").fix == "did you mean rl/stage1_rlvr?"
    assert refusal(recipes.find, tmp_path, "qwen/sft").fix == "did you mean nano3 or steps or super3?"
    assert refusal(recipes.find, tmp_path / "src", "nano3/sft").fix == "name the source tree with --repo-root"


def test_a_nemotron_layout(tmp_path):
    found, problems = recipes.scan(nemotron(tmp_path))
    assert problems == []
    assert list(found) == ["nano3/data/prep/rl", "nano3/rl", "nano3/sft", "steps/eval", "super3/rl/stage1_rlvr"]
    assert found["nano3/data/prep/rl"].stage == "data/prep/rl"
    assert found["super3/rl/stage1_rlvr"].nodes == 109


VALUES = st.recursive(
    st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.floats(),
              st.sampled_from(["ray", "gpu", "a/b", "8"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
WORDS = sorted({*recipes.FIELDS, *[key for table in recipes.FIELDS.values() for key in table]} - {""})
SPECS = st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=6), VALUES | st.dictionaries(
    st.sampled_from(WORDS) | st.text(max_size=6), VALUES, max_size=4), max_size=5)


def check_any(folder, data):
    path = folder / "src/p/recipes/a/t.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        found = recipes.read_header(folder, path)
    except Refusal as problem:
        assert re.match(r"src/p/recipes/a/t\.py:\d+: ", problem.what)
        return
    if found is not None:
        assert found.launch in recipes.LAUNCH_MODES and found.nodes >= 1 and "/" in found.name


@FUZZ
@given(st.lists(st.binary(max_size=30) | st.sampled_from(
    [b"# [tool.runspec]", b"# ///", b"# /// script", b"#", b"# name = 'a/b'", b"# [tool.runspec.run]", b"# tool = 1",
     b"# [[tool.runspec]]", b"# [tool]", b"# runspec = 5", b"\xff\xfe", b"# x = 2020-13-45", b'# name = "\xe9/b"']),
     max_size=8))
def test_any_bytes_are_a_recipe_or_none_or_a_refusal(tmp_path, lines):
    check_any(tmp_path, b"# /// script\n# [tool.runspec]\n" + b"\n".join(lines) + b"\n# ///\n")
    check_any(tmp_path, b"\n".join(lines) + b"[tool.runspec")


@FUZZ
@given(SPECS)
def test_any_toml_is_a_recipe_or_a_refusal(tmp_path, spec):
    lines = ["[tool.runspec]"] + ["%s = %s" % (json.dumps(k), toml(v)) for k, v in ({"name": "a/b"} | spec).items()]
    check_any(tmp_path, "".join("# %s\n" % line for line in ["/// script", *lines, "///"]).encode())


@pytest.mark.skipif("NEMOTRON_ROOT" not in os.environ, reason="needs a Nemotron checkout in NEMOTRON_ROOT")
def test_every_recipe_of_a_real_checkout_is_found():
    found, problems = recipes.scan(Path(os.environ["NEMOTRON_ROOT"]))
    assert problems == []
    assert len(found) >= 84
