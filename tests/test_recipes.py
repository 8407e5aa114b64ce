"""recipes.py: headers, configs and commands."""

import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout import header, nemotron, recipe, write
from omegaconf import OmegaConf
from support import toml

import configs
import recipes
from transport import Refusal

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def refusal(call, *args, **kwargs):
    with pytest.raises(Refusal) as caught:
        call(*args, **kwargs)
    assert caught.value.code == 2
    return caught.value


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


# ---------------------------------------------------------------- which config


@pytest.fixture
def one(tmp_path):
    """A recipe with three configs."""
    script = recipe(tmp_path, yaml="a: 1\n")
    write(script.parent / "config/tiny.yaml", "a: 2\n")
    write(script.parent / "config/old.yml", "a: 3\n")
    return recipes.find(tmp_path, "nano3/sft")


def test_c_is_a_name_or_a_path(one, tmp_path, monkeypatch):
    assert configs.config_file(one, None) == one.config_dir / "default.yaml"
    assert configs.config_file(one, "tiny") == one.config_dir / "tiny.yaml"
    assert configs.config_file(one, "old") == one.config_dir / "old.yml"
    mine = write(tmp_path / "mine.yaml", "a: 4\n")
    assert configs.config_file(one, str(mine)) == mine
    monkeypatch.chdir(tmp_path)
    assert configs.config_file(one, "mine.yaml") == Path("mine.yaml")
    assert configs.config_file(one, "./mine.yaml").read_text() == "a: 4\n"


def test_the_headers_default_may_be_a_file_name(tmp_path):
    recipe(tmp_path, default="default.yaml")
    assert configs.config_file(recipes.find(tmp_path, "nano3/sft"), None).name == "default.yaml"


def test_an_unknown_config_names_the_nearest(one, tmp_path):
    assert refusal(configs.config_file, one, "tny").fix == "did you mean tiny?"
    assert refusal(configs.config_file, one, "zzz").fix == "did you mean default or old or tiny?"
    found = refusal(configs.config_file, one, "tiny.yaml")
    assert found.what == "there is no config file tiny.yaml" and str(one.config_dir) in found.fix
    assert "there is no config file" in refusal(configs.config_file, one, str(tmp_path) + "/").what
    for path in one.config_dir.iterdir():
        path.unlink()
    assert refusal(configs.config_file, one, "zzz").fix == "create one there"


# ---------------------------------------------------------------- compile


def compiled(root, text, overrides=(), settings=lambda recipe, yaml, forced: yaml, name=None):
    """The compiled config of a recipe whose default.yaml is `text`, and what the two readers make of it."""
    recipe(root, yaml=text)
    config = configs.compile_config(recipes.find(root, "nano3/sft"), name, list(overrides), settings)
    read = OmegaConf.to_container(OmegaConf.load(io.StringIO(config.text)), resolve=False)
    assert yaml.safe_load(config.text) == read
    return config, read


def parents(root, **files):
    for name, text in files.items():
        write(root / "src/nemotron/recipes/nano3/sft/config" / (name + ".yaml"), text)


def test_run_stays_here(tmp_path):
    config, read = compiled(tmp_path, "run: {env: {nodes: 2}, x: y}\ntrain: {lr: 1e-3}\n")
    assert read == {"train": {"lr": 0.001}}
    assert config.run == {"env": {"nodes": 2}, "x": "y", "recipe": {
        "name": "nano3/sft", "script": "src/nemotron/recipes/nano3/sft/train.py"}}


@pytest.mark.parametrize(("text", "want"), [
    ("defaults: base\na: 1\n", {"a": 1, "b": 2, "c": {"x": 1, "y": 2}}),
    ("defaults: base.yaml\nc: {y: 9}\n", {"a": 0, "b": 2, "c": {"x": 1, "y": 9}}),
    ("defaults: [base, other]\n", {"a": 5, "b": 2, "c": {"x": 1, "y": 2}, "d": [1]}),
    ("defaults: [other, base]\n", {"a": 0, "b": 2, "c": {"x": 1, "y": 2}, "d": [1]}),
    ("defaults: [_self_, base]\na: 7\n", {"a": 7, "b": 2, "c": {"x": 1, "y": 2}}),
    ("defaults: [grand]\nd: [2, 3]\n", {"a": 5, "b": 2, "c": {"x": 1, "y": 2}, "d": [2, 3], "e": 1}),
    ("defaults:\n  - execution: slurm\n  - _self_\na: 1\n", {"defaults": [{"execution": "slurm"}, "_self_"], "a": 1}),
    ("defaults: []\na: 1\n", {"defaults": [], "a": 1}),
    ("defaults: [_self_]\na: 1\n", {"a": 1}),
    ("", {}),
])
def test_defaults_merge_parents(tmp_path, text, want):
    parents(tmp_path, base="a: 0\nb: 2\nc: {x: 1, y: 2}\n", other="a: 5\nd: [1]\n",
            grand="defaults: [base, other]\ne: 1\n")
    assert compiled(tmp_path, text)[1] == want


def test_a_diamond_is_no_cycle_and_absolute_parents_work(tmp_path):
    outside = write(tmp_path / "outside/shared.yaml", "z: 1\n")
    parents(tmp_path, a="defaults: top\na: 1\n", b="defaults: top\nb: 1\n", top="defaults: %s\nr: 1\n" % outside)
    assert compiled(tmp_path, "defaults: [a, b]\n")[1] == {"z": 1, "r": 1, "a": 1, "b": 1}


BAD_CONFIGS = [
    ("defaults: default\n", "the defaults: of configs form a cycle: default.yaml -> default.yaml", "remove one of them"),
    ("defaults: ring\n", "form a cycle: default.yaml -> ring.yaml -> default.yaml", "remove one of them"),
    ("defaults: gone\n", "config/gone.yaml is named in defaults: of", "fix the defaults:"),
    ("defaults: ???\n", "config/???.yaml is named in defaults: of", "fix the defaults:"),
    ("defaults: ['${oc.env:NOPE}']\n", "is named in defaults: of", "fix the defaults:"),
    ("defaults: listed\n", "listed.yaml is not a config: it is a list, not a table", "fix the YAML"),
    ("defaults: broken\n", "broken.yaml is not a config: ", "fix the YAML"),
    ("defaults: tabled\na: [1]\n", "cannot be merged with its defaults: ", "a table cannot replace"),
    ("- 1\n", "it is a list, not a table", "fix the YAML"), ("3\n", "Invalid loaded object type", "fix the YAML"),
    ("a: b: c\n", "mapping values are not allowed", "fix the YAML"),
    ("a: 1\na: 2\n", "found duplicate key a", "fix the YAML"), ("a: ${\n", "is not a config: ", "fix the YAML"),
    ("\0", "control characters are not allowed", "fix the YAML"),
    ("a: !!python/object:os.system x\n", "could not determine a constructor", "fix the YAML"),
    ("a: &x [*x]\n", "is not a config: ", "fix the YAML"), ("null: 1\n", "Incompatible key type", "fix the YAML"),
    ("a: %s\n" % ("[" * 3000 + "]" * 3000), "is not a config: ", "fix the YAML"),
    ("run: 5\n", "run is 5, not a table", "fix the config's run section"),
    ("run: {env: [1]}\n", "run.env is [1], not a table", "fix the config's run section"),
]


@pytest.mark.parametrize(("text", "what", "fix"), BAD_CONFIGS, ids=[case[0][:24].strip() for case in BAD_CONFIGS])
def test_a_bad_config_is_refused(tmp_path, text, what, fix):
    parents(tmp_path, ring="defaults: default\n", listed="- 1\n", broken="a: [\n", tabled="a: {b: 1}\n")
    found = refusal(compiled, tmp_path, text)
    assert what in found.what and fix in found.fix
    assert "\n" not in found.what


@pytest.mark.parametrize(("words", "want"), [
    (["a=1"], {"a": 1}), (["a=1.5"], {"a": 1.5}), (["a=1e3"], {"a": 1000.0}), (["a='1'"], {"a": "1"}),
    (["a=true"], {"a": True}), (["a=null"], {"a": None}), (["a="], {"a": None}), (["a=x=y"], {"a": "x=y"}),
    (["a=[1,two,3.0]"], {"a": [1, "two", 3.0]}), (["a={b: 1}"], {"a": {"b": 1}}),
    (["a=2026-01-02"], {"a": "2026-01-02"}),
    (["a=${oc.env:HOME}/x"], {"a": "${oc.env:HOME}/x"}), (["a=a b"], {"a": "a b"}),
    (["t.lr=2"], {"a": 0, "t": {"lr": 2, "wd": 1}}), (["new.deep.key=x"], {"a": 0, "new": {"deep": {"key": "x"}}}),
    (["a=1", "a=2"], {"a": 2}), (["my-key/x=1"], {"a": 0, "my-key/x": 1}), (["a=/nemo_run/x"], {"a": "/nemo_run/x"}),
])
def test_overrides(tmp_path, words, want):
    assert compiled(tmp_path, "a: 0\nt: {lr: 1, wd: 1}\n", words)[1] == {"a": 0, "t": {"lr": 1, "wd": 1}} | want


@pytest.mark.parametrize("word", ["=1", ".a=1", "a..b=1", "a.=1", "+a=1", "~a=1", "a=[1", "a=${", "l.x=1", "l[0]=1",
                                  "a=*x"])
def test_a_bad_override_is_refused(tmp_path, word):
    found = refusal(compiled, tmp_path, "a: {b: 0}\nl: [1]\n", [word])
    assert "override" in found.what and found.fix.startswith(
        "its value is read as YAML" if "cannot be parsed" in found.what else "overrides are KEY=VALUE with dots between")


def test_overrides_of_run_reach_the_settings(tmp_path):
    asked = []
    config, _ = compiled(tmp_path, "run: {env: {nodes: 1, mounts: [a]}}\n",
                         ["run.env.nodes=4", "run.env.env_vars.A=1", "run.data=d:v2"],
                         lambda recipe, yaml, forced: asked.append((yaml, forced)) or {"nodes": 4})
    assert asked == [({"nodes": 4, "mounts": ["a"], "env_vars": {"A": 1}}, {"nodes": 4, "env_vars": {"A": 1}})]
    assert config.run["env"] == {"nodes": 4}
    for word in ("run=5", "run.env=5"):
        assert "not a table" in refusal(compiled, tmp_path, "a: 1\n", [word]).what


def test_run_references_as_text_and_typed(tmp_path):
    config, read = compiled(tmp_path, """\
        run:
          env: {nodes: 1, time: "04:00:00", host: login}
          wandb: {project: p, entity: null, tags: [a, b]}
          chain: ${run.wandb.project}-x
        nodes: ${run.env.nodes}
        text: "n=${run.env.nodes} of ${run.wandb.project}"
        tags: ${run.wandb.tags}
        none: ${run.wandb.entity}
        empty: "[${run.wandb.entity}]"
        name: ${run.recipe.name}
        chain: ${run.chain}
        host: ${run.env.host}
        gone: ${run.wandb.group}
        gone_too: "${run.wandb.group}/${run.nothing}"
        other: ${nodes}
        """, settings=lambda recipe, yaml, forced: {"nodes": 3})
    assert read == {"nodes": 3, "text": "n=3 of p", "tags": ["a", "b"], "none": None, "empty": "[]",
                    "name": "nano3/sft",
                    "chain": "p-x", "host": "login", "gone": "${run.wandb.group}",
                    "gone_too": "${run.wandb.group}/${run.nothing}", "other": "${nodes}"}
    assert config.notes == ("the config refers to ${run.nothing}, which is not set anywhere",
                            "the config refers to ${run.wandb.group}, which is not set anywhere")


def test_artifacts_stay_under_run(tmp_path):
    _, read = compiled(tmp_path, """\
        run: {data: "nano3-sft-data:latest", model: "m:v5", old: DataBlendsArtifact-pretrain, image: "nvcr.io/x:1",
              word: plain, time: "04:00:00", place: "/a/b:latest", number: 3}
        d: ${art:data,path}
        """)
    assert read == {"d": "${art:data,path}", "run": {
        "data": "nano3-sft-data:latest", "model": "m:v5", "old": "DataBlendsArtifact-pretrain", "time": "04:00:00"}}


PLACES = [
    ("${oc.env:PWD}/data", "/nemo_run/code/data"), ("${oc.env:PWD}/../output", "/nemo_run/output"),
    ("${oc.env:PWD}", "/nemo_run/code"), ("x:${oc.env:PWD}/a", "x:/nemo_run/code/a"),
    ("${oc.env:PWD}/a/../../output/./b", "/nemo_run/output/b"),
    ("${oc.env:NEMO_RUN_DIR}/out", "/nemo_run/out"), ("${oc.env:NEMO_RUN_DIR,.}/out", "/nemo_run/out"),
    ("${oc.env:NEMO_RUN_DIR,${oc.env:PWD}/output}/x", "/nemo_run/x"),
    ("ROOT", "/nemo_run/code"), ("ROOT/data/x.jsonl", "/nemo_run/code/data/x.jsonl"), ("ROOT/", "/nemo_run/code/"),
    ("LINK", "/nemo_run/code"), ("LINK/data//x", "/nemo_run/code/data//x"), ("LINK/../x", "/nemo_run/x"),
    ("LINKS/x", "LINKS/x"), ("LINK-none/x", "LINK-none/x"), ("/" + "x" * 9000, "/" + "x" * 9000), ("/a\0b", "/a\0b"),
    ("ROOT2/x", "ROOT2/x"), ("ROOT-old/x", "ROOT-old/x"), ("x/ROOT/y", "x/ROOT/y"),
    ("/nemo_run/nano3-sft-model", "/nemo_run/nano3-sft-model"), ("/nemo_run/code/../x", "/nemo_run/x"),
    ("/nemo_runner/../x", "/nemo_runner/../x"), ("s3://b/nemo_run/../x", "s3://b/nemo_run/../x"),
    ("/data/../nemo_run", "/data/../nemo_run"), ("${oc.env:HOME}/x", "${oc.env:HOME}/x"),
]


@pytest.mark.parametrize(("value", "want"), PLACES)
def test_places(tmp_path, value, want):
    root, link = tmp_path / "repo", tmp_path / "links/to"  # a link on the way, and one at its end
    (tmp_path / "links").symlink_to(tmp_path)
    (tmp_path / "to").symlink_to(root)
    value, want = (text.replace("ROOT", str(root)).replace("LINK", str(link)) for text in (value, want))
    _, read = compiled(root, yaml.safe_dump({"a": value, "list": [{"b": value}]}))
    assert read == {"a": want, "list": [{"b": want}]}


def test_places_in_what_run_brings(tmp_path):
    _, read = compiled(tmp_path, "run: {out: '${oc.env:PWD}/../output'}\na: ${run.out}/b\n")
    assert read == {"a": "/nemo_run/output/b"}


# ---------------------------------------------------------------- dump

TRICKY = [
    "", " ", "yes", "No", "on", "null", "~", "NULL", "true", "1", "-1", "+1", "0x1F", "0o17", "017", "0b1", "1_000",
    "1e3", "1E5", "1.e3", "+1e3", "-1e-3", "1e", "e1", ".5", "5.", "._5", "1__0", "1_e5", ".inf", "-.Inf", ".nan",
    "nan", "inf", "1:30", "190:20:30", "1:30.5", "2026-11-22", "2026-11-22T14:00:00Z", "2026-11-22 14:00:00.5 +1",
    "<<", "=", "-", "- a", "? a", ": a", "a: b", "a #b", "#", "&a", "*a", "!a", "!!int 3", "|", ">", "%a", "@a",
    "`a", "'", "\"", "a'b\"c", "\\", "\\n", "a\nb", "a\n", "\na", " a\n b ", "a\r\nb", "\t", "a\tb", "\x00", "\x07",
    "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\xa0", "é", "日本", "😀", "---", "...", "--- a", "a\n--- b",
    "/nemo_run/x", "/nemo_run", "a /nemo_run/é b", "x=/nemo_run/code\n", "[a", "{a", "a]", "a, b", "0.", "00", "08",
    "0_8", "1.2.3", "+.5", "-", "+", ".", "e", "1e400"]
STRINGS = st.one_of(
    st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.from_regex(r"\A[-+0-9._eExob:T]{1,10}\Z"),
    st.lists(st.sampled_from(["\n", " ", "a", "/nemo_run", '"', "'", "#", ":", "\\", "é", "\t"]),
             max_size=8).map("".join))
PLAIN = STRINGS.filter(lambda text: "${" not in text and text != "???")  # OmegaConf's own words
LEAVES = st.one_of(PLAIN, st.none(), st.booleans(), st.integers(), st.floats())
NESTED = st.dictionaries(PLAIN | st.integers() | st.booleans(), st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PLAIN, inner, max_size=4), max_leaves=10),
    max_size=5)


def both_read(value):
    text = configs.dump(value)
    assert repr(yaml.safe_load(text)) == repr(value)
    assert repr(OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)) == repr(value)


@settings(FUZZ, max_examples=250)
@given(NESTED)
def test_what_is_dumped_both_readers_read_back(value):
    both_read(value)


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_strings_stay_strings(text):
    both_read({"a": text, text: [text, {text: text}]})


@pytest.mark.parametrize("value", [1e16, 1e-7, 1e300, 5e-324, float("inf"), -float("inf"), -0.0, 10**30, 0, True, None,
                                   [], {}])
def test_numbers_stay_numbers(value):
    both_read({"a": value, "b": [value]})


def test_places_are_quoted_so_that_any_path_fits(tmp_path):
    """pod.py puts a path with quotes, blanks, `: ` and ` #` in, escaped for "...", where no word goes on."""
    path = '/mnt/my "data": a #1\\x'
    text = configs.dump({"a": "/nemo_run/x", "/nemo_run/k": ["y /nemo_run"],
                         "lines": "cd\n/nemo_run/a\t/nemo_run \\n/nemo_run"})
    filled = re.sub(r"(?<![\w./}-])/nemo_run", lambda match: json.dumps(path)[1:-1], text)
    assert yaml.safe_load(filled) == {"a": path + "/x", path + "/k": ["y " + path],
                                      "lines": "cd\n" + path + "/a\t" + path + " \\n/nemo_run"}


# ---------------------------------------------------------------- commands

SETTINGS = {"nodes": 2, "nproc": 4, "rendezvous_timeout": 1800}


@pytest.fixture
def shell(tmp_path):
    """Runs a command as the pod would: in bash, with places that have blanks, and tools that show their words."""
    tools = tmp_path / "tools"
    for tool in ("torchrun", "python", "uv", "my-tool"):
        write(tools / tool, "#!/bin/sh\nprintf '%s\\0' " + tool + ' "$@"\n').chmod(0o755)
    env = {"PATH": "%s:/usr/bin:/bin" % tools, "AIRLIFT_CODE": "/code root", "AIRLIFT_CONFIG": "/a b/config.yaml",
           "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29400"}

    def run(command):
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=20)
        assert done.stderr == ""
        return done.stdout.split("\0")[:-1]

    return run


def made(tmp_path, args=(), cloud=False, settings=None, **fields):
    recipe(tmp_path, **fields)
    found = recipes.find(tmp_path, "nano3/sft")
    workdir = {"workdir": found.workdir} if found.workdir else {}
    return recipes.command(found, SETTINGS | workdir | (settings or {}), list(args), cloud)


SCRIPT = "/code root/src/nemotron/recipes/nano3/sft/train.py"
CONFIG = ["--config", "/a b/config.yaml"]


def test_torchrun(tmp_path, shell):
    command, tool, notes = made(tmp_path)
    assert shell(command) == [
        "torchrun", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "4", "--rdzv-backend", "static",
        "--rdzv-endpoint", "host:29400", "--rdzv-conf", "timeout=1800", SCRIPT, *CONFIG]
    assert (tool, notes) == ("torchrun", [])


@pytest.mark.parametrize("launch", ["direct", "python", "ray"])
def test_other_modes_start_python(tmp_path, shell, launch):
    command, tool, _ = made(tmp_path, launch=launch)
    assert shell(command) == ["python", SCRIPT, *CONFIG]
    assert tool == "python"


ARGS = ["a=1", "two words", "it's", '"q"', "$HOME", "`id`", "", "*", "\\", "a\nb", "é", "--flag", ";", "&&"]


@pytest.mark.parametrize("fields", [{}, {"launch": "direct"}, {"cmd": "my-tool {script}"}])
def test_arguments_arrive_as_they_are(tmp_path, shell, fields):
    assert shell(made(tmp_path, ARGS, **fields)[0])[-len(ARGS):] == ARGS


def test_cmd_and_run_command_are_filled_in(tmp_path, shell):
    command, tool, _ = made(tmp_path, cmd="my-tool {script} --config {config} '{{x}}' ${{HOME:-none}}")
    assert shell(command) == ["my-tool", SCRIPT, *CONFIG, "{x}", "none"]
    assert tool == "my-tool"
    command, tool, _ = made(tmp_path, cmd="uv run {script}", settings={"run_command": "A=1 my-tool {config}"})
    assert shell(command) == ["my-tool", "/a b/config.yaml"]
    assert tool == ""  # what comes first is not a tool


def test_a_script_with_a_blank_in_its_path(tmp_path, shell):
    recipe(tmp_path, "nano3/sft", path="src/my pkg/recipes/nano3/it's $x.py", launch="direct")
    found = recipes.find(tmp_path, "nano3/sft")
    assert shell(recipes.command(found, SETTINGS, [], False)[0])[1] == "/code root/src/my pkg/recipes/nano3/it's $x.py"


@pytest.mark.parametrize("template", ["{scrpt}", "{}", "{0}", "{script.x}", "{script[0]}", "{script", "}", "{script:d}",
                                      "{script!z}", "{script:{width}}", "${HOME}", "awk '{print}'"])
def test_a_template_that_cannot_be_filled_in(tmp_path, template):
    found = refusal(made, tmp_path, settings={"run_command": "run " + template})
    assert found.what.startswith("the command %r cannot be filled in: " % ("run " + template))
    assert found.fix == "only {script} and {config} are filled in; double other braces"


def test_uv_run_needs_a_project(tmp_path, shell):
    cmd = "uv run --extra xenna python {script} --config {config}"
    command, tool, notes = made(tmp_path, ["x=1"], cloud=True, cmd=cmd)
    assert shell(command) == ["python", SCRIPT, *CONFIG, "x=1"]
    assert tool == "python"
    assert notes == ["`%s` needs a project and the network, so the pod runs plain python instead" % cmd]
    here = ["uv", "run", "--extra", "xenna", "python", SCRIPT, *CONFIG]
    assert shell(made(tmp_path, cmd=cmd)[0]) == here  # not a cloud
    assert shell(made(tmp_path, cloud=True, cmd=cmd, workdir="/opt/nemo-rl")[0]) == here  # a project in the image
    assert shell(made(tmp_path, cloud=True, cmd=cmd, settings={"workdir": "/opt/x"})[0]) == here
    assert shell(made(tmp_path, cloud=True, cmd="ray", settings={"run_command": cmd})[0]) == here  # asked for
    assert made(tmp_path, cloud=True, cmd=cmd, workdir="/opt/nemo-rl")[1:] == ("uv", [])


def test_without_omegaconf_it_says_so(monkeypatch, one):
    monkeypatch.setitem(__import__("sys").modules, "omegaconf", None)
    found = refusal(configs.compile_config, one, None, [], lambda recipe, yaml, forced: yaml)
    assert "omegaconf" in found.what and "requirements.txt" in found.fix


@pytest.mark.skipif("NEMOTRON_ROOT" not in os.environ, reason="needs a Nemotron checkout in NEMOTRON_ROOT")
def test_every_recipe_of_a_real_checkout_is_found():
    found, problems = recipes.scan(Path(os.environ["NEMOTRON_ROOT"]))
    assert problems == []
    assert len(found) >= 84
