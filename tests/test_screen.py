"""screen.py: times, tables, budgets, colour only where it belongs, a dry run in words and as JSON, and no secret."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import layout
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inside import CONFIGS, FAMILY, check_shape, plan_of, shown
from layout import nemotron, recipe, write

import screen
from backends import Status
from runs import Run


@pytest.mark.parametrize("seconds, said", [
    (-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"),
    (86400 * 3 + 3600 * 4 + 61, "3 d 4 h")])
def test_times(seconds: float, said: str) -> None:
    assert screen.span(seconds) == said


def test_where_the_time_went() -> None:
    run = Run("t23456", "a/b", "p", "local", 1, "0" * 64, 100.0)
    assert screen.times(run, 0.25, 2.0, 161.0) == "packing 0.2 s, submitting 2.0 s, waiting and running 59 s"
    run.running_since = 110.5
    assert screen.times(run, 0.25, 2.0, 161.0) == "packing 0.2 s, submitting 2.0 s, waiting 8.5 s, running 51 s"


def test_a_state_is_told_with_its_time_only_while_it_is_news() -> None:
    run = Run("t23456", "a/b", "p", "local", 1, "0" * 64)
    assert re.fullmatch(r"-- done \(Completed\) after \d s", screen.status_line(Status("done", "Completed"), run))
    run.ended = ["done", "Completed"]
    assert screen.status_line(Status("done", "Completed"), run) == "-- done (Completed)"


@given(st.lists(st.lists(st.text("ab c", max_size=9), min_size=3, max_size=3), min_size=1, max_size=6))
def test_columns_are_aligned(rows: list[list[str]]) -> None:
    rows = [["x" + cell for cell in row] for row in rows]  # no cell is empty
    lines = screen.table(rows).split("\n")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, line in zip(rows, lines, strict=True):
        at = 0
        for cell, width in zip(row, widths, strict=True):
            assert line[at:at + len(cell)].rstrip() == cell.rstrip()
            at += width + 2


@pytest.mark.parametrize("used, bar, figures", [
    (0, "." * 20, "0 % of 1.5 MiB (0 B)"), (1, "#" + "." * 19, "1 % of 1.5 MiB (1 B)"),
    (1572864, "#" * 20, "100 % of 1.5 MiB (1.5 MiB)"), (1572865, "#" * 20, "101 % of 1.5 MiB (1.5 MiB)")])
def test_a_budget_is_drawn_and_never_looks_emptier_than_it_is(used: int, bar: str, figures: str) -> None:
    assert re.fullmatch(r"API object  \|%s\| +%s" % (re.escape(bar), re.escape(figures)),
                        screen.budget("API object", used, 1572864))


def on_a_terminal(home: Path, **env: str) -> str:
    """What a dry run prints on a terminal of its own."""
    words = [sys.executable, str(layout.REPO / "launch.py"), "nano3", "sft", "lepton", "--dry-run"]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=home,
                          env=clean | {"TERM": "xterm", "AIRLIFT_HOME": str(home)} | env) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            said += data
            if not data:
                break
    os.close(ours)
    assert process.returncode == 0
    return said.decode().replace("\r\n", "\n")


def test_colour_only_on_a_terminal_and_never_with_no_color(tmp_path: Path) -> None:
    coloured = on_a_terminal(tmp_path)
    plain = on_a_terminal(tmp_path, NO_COLOR="1")
    assert "\033[32m#" in coloured and "\033[1mnano3/sft on lepton" in coloured
    assert "\033" not in plain + on_a_terminal(tmp_path, TERM="dumb")
    assert re.sub(r"\033\[\d*m", "", coloured) == plain


# ---------------------------------------------------------------- --verbose


@pytest.fixture
def verbose() -> Iterator[None]:
    screen.VERBOSE = True
    yield
    screen.VERBOSE = False


STEP = r"\d\d:\d\d:\d\d %s\n"


def test_a_step_is_told_before_and_after_with_its_time(verbose: None, capsys: pytest.CaptureFixture[str]) -> None:
    with screen.step("GET https://host/a\n  b"):
        said = capsys.readouterr()  # a hang shows where
        assert re.fullmatch(STEP % "GET https://host/a b", said.err) and said.out == ""
    said = capsys.readouterr()
    assert re.fullmatch(STEP % r"GET https://host/a b: \d\.\d\d s", said.err) and said.out == ""


def test_a_step_that_fails_is_told_with_its_time_too(verbose: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), screen.step("import x"):
        raise ZeroDivisionError
    assert re.fullmatch(STEP % "import x" + STEP % r"import x: \d\.\d\d s", capsys.readouterr().err)


def test_no_step_shows_a_secret(verbose: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "CONCEALED", set())
    monkeypatch.setenv("MY_TOKEN", "of-the-environment")
    screen.conceal("of-the-profile", None, "<unset X>")
    with screen.step("GET https://me:word@host/?a=of-the-environment&b=of-the-profile hf_%s <unset X>" % ("a1" * 17)):
        pass
    said = capsys.readouterr().err
    assert said.count("GET https://***@host/?a=***&b=*** *** <unset X>") == 2


def test_without_the_option_a_step_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.step("GET https://host/"):
        pass
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- the dry run


def test_a_dry_run_shows_the_compiled_config_where_it_is_asked_for(say, here):
    said = say(*FAMILY, "lepton", "lr=1", "+api_key=hush-hush-123", "--show-config")
    assert said[0] == 0 and said[1].endswith("\nnothing was submitted\n"), said
    assert "\nlr: 1\n" in said[1] and "\napi_key: '***'\n" in said[1] and "hush" not in said[1]


def test_a_dry_run_shows_what_would_happen(say, here):
    code, out, err = say(*FAMILY, "lepton", "lr=1", "--nodes", "2", "--dry-run", "--", "--flag", "two words")
    assert (code, err) == (0, "")
    assert out.startswith("nano3/sft on lepton (lepton): 2 nodes x 8 GPUs, torchrun\n")
    assert out.endswith("nothing was submitted\n")
    rows = {}
    for line in out.splitlines()[1:-1]:
        rows.setdefault(line[2:11].strip(), []).append(line[11:])
    assert rows["script"] == [str(here) + "/src/nemotron/recipes/nano3/stage1_sft/train.py"]
    assert rows["config"] == [str(here / CONFIGS / "default.yaml")]
    assert rows["image"] == ["nvcr.io/nemo:26.02"]  # the YAML's, not the header's
    assert rows["command"][0].startswith("torchrun --nnodes 2 --node-rank \"$NODE_RANK\" --nproc-per-node 8 ")
    assert rows["command"][0].endswith(" --config \"$AIRLIFT_CONFIG\" --flag 'two words'")
    assert rows["outputs"] == ["/shared/airlift/nano3"]
    assert " files, " in rows["ships"][0] and " as xz, 1 chunk, sha256 " in rows["ships"][0]
    budgets = "\n".join(rows["budgets"] + rows[""])
    for name in ("one string", "environment", "API object"):
        assert name in budgets
    assert "% of 1.5 MiB" in budgets and "|#" in budgets
    assert "WANDB_PROJECT=nano3" in rows["env"]


def test_json_has_exactly_the_keys_of_the_design(say, here):
    plan = plan_of(say, *FAMILY, "dgxcloud")
    check_shape(plan)
    assert plan["recipe"] == {
        "name": "nano3/sft", "script": "src/nemotron/recipes/nano3/stage1_sft/train.py", "launch": "torchrun",
        "nodes": 1,
        "gpus_per_node": 8, "nproc_per_node": 8, "image": "nvcr.io/nemo:26.02"}
    assert plan["profile"] == {"name": "dgxcloud", "executor": "dgxcloud",
                               "files": [str(here / "profiles/dgxcloud.toml")]}
    payload = plan["payload"]
    assert payload["fits"] is True and payload["chunk_limit"] == 9216 and payload["object_limit"] == 1_572_864
    assert payload["tar_bytes"] < payload["encoded_chars"] <= payload["chunks"] * 9216
    assert 0 < payload["env_bytes"] < payload["env_limit"]
    assert plan["config"]["bytes"] == len(plan["config"]["text"].encode())
    assert "save: \"/nemo_run/nano3-sft-model\"" in plan["config"]["text"]
    assert "output_dir: \"/nemo_run/output/sft\"" in plan["config"]["text"]
    assert plan["argv"][:2] == ["python3", "-c"]
    assert plan["command"].startswith("torchrun ")


def test_chunks_are_shown_by_their_length_only(say):
    env = plan_of(say, *FAMILY, "dgxcloud")["env"]
    chunks = {name: value for name, value in env.items() if name.startswith("AIRLIFT_") and name[-1].isdigit()
              and not name.endswith("SHA256")}
    assert len(chunks) >= 3
    assert all(value.startswith("<") and value.endswith(" characters>") for value in chunks.values())
    assert env["AIRLIFT_TREE_CHUNKS"] == "1"
    assert max(map(len, env.values())) < 100


def test_secrets_and_what_looks_like_one_show_as_stars(say, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    monkeypatch.setenv("PLAIN", "visible")
    write(here / "profiles/mine.toml", """\
        extends = "lepton"
        [secrets]
        HF_TOKEN = "env"
        NGC_API_KEY = "env"
        WANDB_API_KEY = "lepton:wandb"
        [env_vars]
        MY_API_KEY = "in-the-profile"
        OTHER_TOKEN = "${env:GONE}"
        PLAIN = "${env:PLAIN}"
        """)
    plan = plan_of(say, *FAMILY, "mine")
    assert {name: plan["env"].get(name) for name in (
        "HF_TOKEN", "NGC_API_KEY", "WANDB_API_KEY", "MY_API_KEY", "OTHER_TOKEN", "PLAIN")} == {
        "HF_TOKEN": "***", "NGC_API_KEY": "<unset NGC_API_KEY>", "WANDB_API_KEY": "***", "MY_API_KEY": "***",
        "OTHER_TOKEN": "<unset GONE>", "PLAIN": "visible"}
    assert "HF_TOKEN is sent by value, in the job's environment" in plan["notes"]
    text = json.dumps(plan) + say(*FAMILY, "mine", "--dry-run")[1]
    assert "hf_secret_value" not in text and "in-the-profile" not in text


def test_no_secret_shows_in_a_note_an_error_or_a_config(say, here, monkeypatch):
    secret, token = "swordfish-%d" % os.getpid(), "hf_" + "a1" * 17
    monkeypatch.setenv("DEPLOY_TOKEN", secret)
    monkeypatch.setenv("WKEY", secret[::-1])
    write(here / "profiles/mine.toml", """\
        extends = "lepton"
        mounts = ["${auto_mount:git+https://host/x@main,/x}"]
        run_command = "login ${env:WKEY} && python {script}"
        container_image = "registry/${env:DEPLOY_TOKEN}"
        [git_mirrors]
        "https://host/" = "https://me:${env:DEPLOY_TOKEN}@mirror/"
        [secrets]
        WKEY = "env"
        """)
    write(here / "env.toml", "[wandb]\napi_key = 'in-the-section'\nproject = 'p'")
    monkeypatch.chdir(here)
    recipe(here, path="src/nemotron/recipes/nano3/stage1_sft/train.py",
           yaml="key: ${run.wandb.api_key}\ntoken: %s\n" % token)
    plan = plan_of(say, *FAMILY, "mine")
    assert "each pod clones https://***@mirror/x at main to /x" in plan["notes"]
    assert "the config contains what looks like a credential, and is sent as it is" in plan["notes"]
    write(here / "profiles/bad.toml", 'extends = "mine"\nstartup_commands = "login ${env:DEPLOY_TOKEN}"')
    write(here / "profiles/worse.toml", 'extends = "mine"\nrun_command = "login ${env:DEPLOY_TOKEN} {x}"')
    said = json.dumps(plan) + repr([say(*FAMILY, name, "--dry-run") for name in ("mine", "bad", "worse")])
    for hidden in (secret, secret[::-1], token, "in-the-section"):
        assert hidden not in said, said


# ---------------------------------------------------------------- names

SECRETS = re.findall(r"\w+", """
    password passwd passphrase passcode secret credential credentials token api_key apikey access_key private_key secret_key
    client_secret db_password db_pass db_pwd mysql_pass mysql_pwd pg_password redis_auth registry_auth basic_auth authorization
    bearer cookie session_cookie jwt github_pat azure_devops_ext_pat sentry_dsn database_connection_string conn_str azure_sas
    hf_token wandb_api_key ngc_api_key openai_api_key openai_key aws_secret_access_key aws_access_key_id aws_session_token
    ssh_private_key ssh_key signing_key encryption_key master_key service_key account_key storage_account_key deploy_key auth_token
    access_token refresh_token id_token bot_token ci_job_token gh_token slack_webhook_url webhook access_tokens api_keys otp
    admin_pw oauth_token user_password root_password vault_secret_id docker_auth_config x_api_key proxy_pass smtp_pass""")
PLAIN = re.findall(r"\w+", """
    tokenizer tokenizer_path tokenizer_name tokenizers_parallelism tokens max_tokens num_tokens max_new_tokens train_tokens
    tokens_per_second pad_token pad_token_id eos_token eos_token_id bos_token unk_token mask_token cls_token sep_token
    special_tokens additional_special_tokens stop_token_ids image_token video_token num_image_token think_end_token
    decoder_start_token_id per_token_loss calculate_per_token_loss token_level_loss moe_token_dispatcher_type token_drop_policy
    add_eos_token skip_tokenizer_init token_count token_ids return_token_id_information next_token page_token tokenized detokenize
    old_pwd_path keyboard monkey turkey hotkey keyword key keys primary_key foreign_key sort_key public_key input_key label_key
    cache_key query_key_value num_key_value_heads host_key gpg_key key_path api_key_env api_key_name password_file
    password_min_length secret_name hf_token_path token_type forward_pass backward_pass first_pass num_pass pass_rate pass_at_1
    n_passes passage_prefix passenger bypass compass author authors authority author_email ssh_auth_sock xauthority seed path
    pattern file_pattern partition patch compassion secretary passwordless auth_mode use_path kv_cache session_name""")
STYLES = {
    "UPPER_CASE": str.upper, "snake_case": str.lower, "kebab-case": lambda name: name.replace("_", "-"),
    "dotted": lambda name: name.replace("_", "."), "PascalCase": lambda name: "".join(map(str.capitalize, name.split("_"))),
    "camelCase": lambda name: name.split("_")[0] + "".join(map(str.capitalize, name.split("_")[1:])),
    "with a prefix": lambda name: "MY_" + name.upper(), "below a key": lambda name: "service.x." + name}


@pytest.mark.parametrize("style", STYLES)
def test_which_names_are_secret_and_which_are_not(style: str) -> None:
    """1,600 names."""
    assert [name for name in SECRETS if not screen.secret_name(STYLES[style](name))] == []
    assert [name for name in PLAIN if screen.secret_name(STYLES[style](name))] == []


def test_names_of_every_machine() -> None:
    for name in ("PWD", "OLDPWD", "PATH", "HOME", "SSH_AUTH_SOCK", "SSH_ASKPASS", "XAUTHORITY", "GPG_KEY", "KEYBOARD_LAYOUT",
                 "WANDB_MODE", "DBUS_SESSION_BUS_ADDRESS", "HF_HOME", "TOKENIZER_PATH", "NCCL_SOCKET_IFNAME", "PGHOST", "PGPASSFILE"):
        assert not screen.secret_name(name), name
    for name in ("PGPASSWORD", "DB_PASS_PROD", "PASSWORD1", "API_KEY_2", "HF_TOKEN_READ", "MYSQLPWD", "userPwd", "dbpass", "HFToken"):
        assert screen.secret_name(name), name


@given(st.sampled_from(["password", "secret", "token", "api_key", "pass", "pwd", "auth", "credential"]), st.sampled_from(
    ["", "2", "_2", "_v2", "_prod", "_dev", "_old"]), st.from_regex(r"[b-dw-z]{3,8}_", fullmatch=True))
def test_a_secret_stays_one_with_a_number_or_the_name_of_a_place(name: str, end: str, start: str) -> None:
    assert screen.secret_name(start + name + end) and screen.secret_name((start + name + end).upper())


# ---------------------------------------------------------------- values

HIDDEN = "hunter2"  # short: nothing but its name tells


@pytest.mark.parametrize("text, shown", [
    ("--password %s --lr 1", "--password *** --lr 1"), ("-- db.password=%s lr=1", "-- db.password=*** lr=1"),
    ("'db.password=%s with blanks' x", "'db.password=***' x"), ("--api-key '%s x' y", "--api-key *** y"),
    ("--pw-token 'it'\"'\"'s %s' y", "--pw-token *** y"), ("'a_token=it'\"'\"'s %s' y", "'a_token=***' y"),
    ('{"password": "%s", "a": 1}', '{"password": ***, "a": 1}'), ("{'api_key': '%s', 'b': 2}", "{'api_key': ***, 'b': 2}"),
    ("https://h/x?token=%s&a=b", "https://h/x?token=***&a=b"), ("Name=x;AccountKey=%s==;End=y", "Name=x;AccountKey=***;End=y"),
    ("postgres://me:%s@h/db", "postgres://***@h/db"), ("mysql+x://:%s@h, a://b:%s/x@h", "mysql+x://***@h"),
    ("PGPASSWORD=%s psql", "PGPASSWORD=*** psql"),
])
def test_a_value_behind_a_secret_name_in_any_text(text: str, shown: str) -> None:
    text = text.replace("%s", HIDDEN)
    assert screen.hide(text).startswith(shown) and HIDDEN not in screen.hide(text)
    assert screen.hide(screen.hide(text)) == screen.hide(text)


@pytest.mark.parametrize("text", [
    "eos_token=</s> max_tokens=5 pad_token='[PAD]'", "--tokenizer /x/y --max-tokens 5", "TOKEN=$TOKEN", 'TOKEN="$TOKEN"',
    "run.env.secrets.HF_TOKEN=env", "run.env.secrets.HF_TOKEN=lepton:my-token", "HF_TOKEN is set here but not sent; add it to [secrets]",
    "secret: not found", "use_auth=true api_key=null", "remove it; or write run.env.client_secret=...", "a=b c=d", "x == y, token",
    "api_key: ${oc.env:MY_API_KEY}", "HF_TOKEN=<unset HF_TOKEN>", "git@host:path", "https://host:8080/x@y", "PWD=/x"])
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert screen.hide(text) == text


@given(st.text(max_size=300) | st.text("=-'\"a_token: ", max_size=300))
def test_hiding_ends_soon_and_is_done_once(text: str) -> None:
    once = screen.hide(text)
    assert screen.hide(once) == once


VALUES = st.text("abcxyz0123456789!#%/", min_size=3, max_size=12).map(lambda text: "Zq" + text)
TABLES = st.recursive(VALUES | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from([*SECRETS[:20], *PLAIN[:20]]), inner, max_size=4), max_leaves=12)


@given(TABLES)
def test_a_table_is_masked_wherever_a_name_says_so(value: object) -> None:
    def leaves(item: object, named: bool = False) -> Iterator[tuple[object, bool]]:
        if isinstance(item, dict):
            for key, inner in item.items():
                yield from leaves(inner, named or key in SECRETS)
        elif isinstance(item, list):
            for inner in item:
                yield from leaves(inner, named)
        else:
            yield item, named

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "CONCEALED", set())
        masked = list(leaves(screen.masked(value)))
    open_ = [item for item, named in leaves(value) if not named or item in (None, True, False, 0, 1)]
    assert [item for item, _ in masked if item != "***"] == open_


def test_a_name_may_stand_in_a_value():
    assert screen.masked([{"name": "DB_PASSWORD", "value": HIDDEN}, {"name": "A", "value": "b"}]) == [
        {"name": "DB_PASSWORD", "value": "***"}, {"name": "A", "value": "b"}]


def test_no_secret_of_config_words_and_variables_is_shown_or_kept(say, here, tmp_path, monkeypatch):
    """In a dry run, its JSON, a launch with all that Airlift keeps of it, and errors. The recipe gets it all."""
    recipe(here, path="src/nemotron/recipes/nano3/stage1_sft/train.py", launch="python", gpus=0, yaml="""\
        db: {host: h, password: s3cr-1, url: "postgres://me:s3cr-2@h/x"}
        apiKey: s3cr-3
        tokens: {eos_token: </s>, pad_token_id: 0, max_tokens: 5}
        credentials: [s3cr-4, {user: s3cr-5}]
        run: {env: {env_vars: {DB_PWD: s3cr-6, TOKENIZER_PATH: /x/y}}}
        """, body="""
        import os, pathlib, sys
        text = repr([pathlib.Path(sys.argv[2]).read_text(), dict(os.environ), sys.argv])
        missing = [n for n in range(1, 11) if "s3cr-%d" % n not in text]
        sys.exit("missing: %s" % missing if missing else 0)
        """)
    words = [*FAMILY, "local", "a.b.secret_key=s3cr-7", "run.env.env_vars.MYSQL_PASS=s3cr-8", "run.env.workspace=%s" % tmp_path]
    args = ["--", "--token", "s3cr-9", "x.password=s3cr-10"]
    plan = json.loads(say(*words, "--json", *args)[1])
    text = plan["config"]["text"]
    for readable in ("eos_token: </s>", "pad_token_id: 0", "max_tokens: 5", "host: h", "password: '***'"):
        assert readable in text, text
    assert (plan["env"]["DB_PWD"], plan["env"]["TOKENIZER_PATH"]) == ("***", "/x/y")
    assert plan["command"].endswith(" --token *** x.password=***")
    said = [json.dumps(plan), *say(*words, "--dry-run", *args)[1:], *say(*words, "--verbose", *args)]
    assert said[-3] == 0, said
    said += [*say("nano3", "sft,sft", "local", "=s3cr-1", "db.password=s3cr-1")[1:], *say(*words, "a.password=[s3cr-1")[1:]]
    kept = [path.read_bytes().decode("latin-1") for path in (here.parent / "home").rglob("*") if path.is_file()]
    assert len(kept) >= 2
    for one in [*map(str, said), *kept]:
        assert "s3cr-" not in one, one


def test_a_secret_under_a_harmless_name_is_not_shown(tmp_path):
    root, secret = nemotron(tmp_path), "s3cret-" + "x" * 20
    text = 'run_command = "login ${env:MY_TOKEN} && python {script}"\n' \
        '[mine.env_vars]\nPLAIN = "${env:MY_TOKEN}"\nURL = "//u:${env:MY_TOKEN}@h"\n'
    found = shown(root, "nano3", "sft", "mine", profile=text,
                  env={"MY_TOKEN": secret, "TOKENIZERS_PARALLELISM": "false"})
    assert secret not in json.dumps(found)
    assert (found["env"]["PLAIN"], found["env"]["URL"]) == ("***", "//u:***@h") and "login ***" in found["command"]
