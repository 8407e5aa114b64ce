"""configs.py: which YAML counts, how it is merged, overridden and compiled, and what the script reads."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import PROFILE, refusal, shown, speaker, swapped
from layout import nemotron, recipe, write
from omegaconf import OmegaConf

import configs
import recipes
from transport import Refusal

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


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


@pytest.mark.parametrize("word", ["=1", ".a=1", "a..b=1", "a.=1", "+=1", "~a=1", "a=[1", "a=${", "l.x=1", "l[0]=1",
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


def test_without_omegaconf_it_says_so(monkeypatch, one):
    monkeypatch.setitem(__import__("sys").modules, "omegaconf", None)
    found = refusal(configs.compile_config, one, None, [], lambda recipe, yaml, forced: yaml)
    assert "omegaconf" in found.what and "requirements.txt" in found.fix


# ---------------------------------------------------------------- another script


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
def test_train_script_that_is_not_in_the_tree(tmp_path, monkeypatch, capsys, value):
    root = swapped(tmp_path, "run: {train_script: %s}\n" % value)
    monkeypatch.setenv("NEMOTRON_ENV_FILE", str(write(root / "env.toml", PROFILE)))
    code, _, err = speaker(capsys)("nano3", "sft", "mine", "-c", "test", "--repo-root", root, "--dry-run")
    assert code == 2 and "run.train_script" in err and len(err.splitlines()) == 2


def test_recipes_outside_of_src_are_no_scripts(tmp_path):
    root = nemotron(tmp_path)
    with pytest.raises(Refusal):
        configs.with_script(recipes.find(root, "nano3/sft"), "nowhere.py", root / "x.yaml")


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


@settings(FUZZ, max_examples=100)
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


# ---------------------------------------------------------------- what a person types


@pytest.mark.parametrize(("typed", "value", "note"), [
    ("12:30:45", "12:30:45", ""), ("1:30", "1:30", ""), ("0755", "0755", ""), ("00", "00", ""), ("-01:00", "-01:00", ""),
    ("[12:30:45, 1, 010]", ["12:30:45", 1, "010"], ""), ("{at: 12:00:00}", {"at": "12:00:00"}, ""), ("12:30:45.5", "12:30:45.5", ""),
    ("2024-01-31", "2024-01-31", ""), ("v1.10", "v1.10", ""), ("1.10.2", "1.10.2", ""), ("5", 5, ""), ("+5", 5, ""), ("-5", -5, ""),
    ("0", 0, ""), ("0.5", 0.5, ""), (".5", 0.5, ""), ("1e-3", 0.001, ""), ("1E5", 100000.0, ""), ("true", True, ""), ("False", False, ""),
    ("null", None, ""), ("", None, ""), ("text", "text", ""), ('"yes"', "yes", ""), ("'0x1F'", "0x1F", ""), ("a b", "a b", ""),
    ("yes", True, "true"), ("Off", False, "false"), ("1_000", 1000, "1000"), ("0x1F", 31, "31"), ("3.10", 3.1, "3.1"),
    ("0b11", 3, "3"), ("1_0.5", 10.5, "10.5")])
def test_a_text_that_is_typed_stays_or_a_note_says_what_it_became(tmp_path, typed, value, note):
    found, read = compiled(tmp_path, "{}", ["+a=%s" % typed])
    assert read["a"] == value and type(read["a"]) is type(value)
    notes = [text for text in found.notes if "is read as" in text]
    assert notes == (["+a=%s is read as %s; if you mean the text: '+a=\"%s\"'" % (typed, note, typed)] if note else [])


@pytest.mark.parametrize(("word", "said"), [
    ("trian.steps=5", "did you mean train.steps? if it is to be new: +trian.steps=..."),
    ("train.step=5", "did you mean train.steps?"), ("train.Steps=5", "did you mean train.steps?"), ("tran=5", "did you mean train?")])
def test_a_misspelt_override_is_not_sent(tmp_path, word, said):
    problem = refusal(compiled, tmp_path, "train: {steps: 1, lr: 2}\ndata: {x: 1}\n", [word])
    assert problem.what == "the config has no key " + word.split("=")[0] and said in problem.fix


def test_a_new_key_is_named_unless_it_is_meant(tmp_path):
    def config(*words):
        return compiled(tmp_path, "train: {steps: 1}\nlist: [1]\nname: text\n", words)[0]

    assert "fresh.key is new: the config has no such key" in config("fresh.key=1").notes
    assert "train.other is new: the config has no such key" in config("train.other=1").notes
    for word in ("+fresh.key=1", "++fresh.key=1", "+trian.steps=5", "train.steps=2", "++train.steps=2"):
        found = config(word)
        assert not [note for note in found.notes if "is new" in note]
        assert word.split(".")[1].split("=")[0] + ": " + word[-1] in found.text
    assert "none can be removed with ~" in refusal(config, "~train.steps=").fix


def test_values_that_a_person_must_give_are_all_named(tmp_path):
    text = "a: ???\nb: {c: '???', d: [1, {e: '???'}]}\nf: '${a}'\nrun: {env: {time: '???'}}\n"
    assert compiled(tmp_path, text, ["a=1"])[0].missing == ("b.c", "b.d.1.e", "run.env.time")
    assert compiled(tmp_path, text, ["a=1", "b=2", "run.env.time=x"])[0].missing == ()
