"""src/starter's rl recipes: the reward, the numbers of GRPO, rollouts, runs that are cut short, and real Ray."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import as_a_recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
sys.path.insert(0, str(SRC))

import torch  # noqa: E402

from starter import chat, checkpoint, cluster, grpo, rl  # noqa: E402
from starter.config import RecipeError, RLConfig, parse_args  # noqa: E402
from starter.distributed import World  # noqa: E402
from starter.reward import A_NUMBER, RIGHT, reward  # noqa: E402
from starter.rollout import Prompt, Rollout, read_prompts  # noqa: E402
from starter.training import open_model  # noqa: E402
from tests.layout import launcher  # noqa: E402

RECIPES = SRC / "starter/recipes"
TOKENIZER = chat.byte_tokenizer()
END = chat.end_id(TOKENIZER)
SMALL = ["rollout.answers_per_prompt=4", "train.global_batch_size=32", "train.steps=4", "train.log_every=1",
         "train.eval_every=2", "train.checkpoint_every=2", "train.warmup_steps=1", "grpo.cold_start=5"]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with what data/prep/rl writes there."""
    root = tmp_path_factory.mktemp("root")
    folder = RECIPES / "nano3/data_prep_rl"
    config = folder / "config/tiny.yaml"
    argv = [sys.executable, str(folder / "prep.py"), "--config", str(config), f"output={root}/data/rl"]
    subprocess.run(argv, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC)}, check=True, stdout=subprocess.DEVNULL)
    return root


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_a_recipe(monkeypatch):
        yield


def config_for(prepared: Path, family: str = "nano3") -> Path:
    """The tiny config as the pod gets it."""
    text = (RECIPES / family / "rl/config/tiny.yaml").read_text()
    path = prepared / f"{family}.yaml"
    path.write_text(text.replace("/nemo_run", str(prepared)))
    return path


class Here:
    """A crew in this process: the same rollouts, without Ray between them and the learner."""

    nodes = 1

    def __init__(self, make: Any, count: int) -> None:
        self.count = count or 2
        self.objects = [make() for _ in range(self.count)]

    def share(self, value: Any) -> Any:
        return value

    def call(self, method: str, *arguments: list[Any]) -> list[Any]:
        return [getattr(one, method)(*mine) for one, *mine in zip(self.objects, *arguments, strict=True)]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def joined(cpus: int, store: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(cluster, "joined", joined)
    monkeypatch.setattr(cluster, "Crew", lambda ray, make, count: Here(make, count))


def train(prepared: Path, output: Path, *overrides: str) -> int:
    argv = ["--config", str(config_for(prepared)), f"output={output}", *SMALL, *overrides]
    return rl.run(RECIPES / "nano3/rl", argv)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


# Headers and configs


def header_of(script: Path) -> dict[str, Any]:
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.DOTALL | re.MULTILINE)
    assert block
    found: dict[str, Any] = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))["tool"]["runspec"]
    return found


def test_a_sub_stage_is_its_stage_with_an_output_of_its_own(tmp_path: Path) -> None:
    header = header_of(RECIPES / "super3/rl/stage1_rlvr/train.py")
    assert header == header_of(RECIPES / "super3/rl/train.py") | {"name": "super3/rl/stage1_rlvr"}
    env = os.environ | {"AIRLIFT_HOME": str(tmp_path)}
    configs = {}
    for stage in ("rl", "rl/stage1_rlvr"):
        done = launcher(ROOT, "super3", stage, "local", "--dry-run", "--json", env=env)
        assert done.returncode == 0, done.stderr
        configs[stage] = yaml.safe_load(json.loads(done.stdout)["config"]["text"])
    assert configs["rl"]["output"] == "/nemo_run/rl"
    assert configs["rl/stage1_rlvr"] == configs["rl"] | {"output": "/nemo_run/rl/stage1_rlvr"}


@pytest.mark.parametrize("family", ["nano3", "super3"])
def test_the_header_and_its_config(family: str, prepared: Path) -> None:
    header = header_of(RECIPES / family / "rl/train.py")
    assert header["name"] == f"{family}/rl" and header["run"] == {"launch": "ray"}
    cfg = parse_args(RLConfig, ["--config", str(config_for(prepared, family))])
    assert cfg.data.train == str(prepared / "data/rl/train/train-split.jsonl")
    sft = (RECIPES / family / "sft/config/tiny.yaml").read_text()
    model = sft[sft.index("model:") : sft.index("data:")]
    assert model in (RECIPES / family / "rl/config/tiny.yaml").read_text(), "not the policy that sft has"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch_size=30"], "30 answers cannot be 4 to each prompt"),
        (["rollout.answers_per_prompt=1"], r"rollout\.answers_per_prompt is 1\.\nGive 2"),
        (["rollout.actors=0"], r"rollout\.actors is 0"),
        (["grpo.clip=1.5"], "grpo has a number that makes no sense"),
        (["data.train=none.jsonl"], r"cannot read the prompts .*none\.jsonl"),
        (["data.train=${manifest:/nowhere,train}"], "there is no /nowhere/manifest.json"),
        (["train.lr=1e30", "train.clip_grad_norm=1e30", "train.steps=9"], "gradient is not finite at step"),
    ],
)
def test_what_cannot_be_trained_is_named(
    overrides: list[str], message: str, prepared: Path, tmp_path: Path, without_ray: None
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        train(prepared, tmp_path / "out", *overrides)
    assert len(str(caught.value).splitlines()) == 2


# Reward


@pytest.mark.parametrize(
    ("answer", "ended", "expected", "earned"),
    [
        ("12", True, "12", RIGHT),
        ("12", False, "12", 0),
        ("13", True, "12", A_NUMBER),
        ("", True, "12", 0),
        ("twelve", True, "12", 0),
        ("9+3=12", True, "12", RIGHT),
        ("12 or 13", True, "12", A_NUMBER),
        ("12.0", True, "12", RIGHT),
        ("0.5", True, "1/2", RIGHT),
        ("-3", True, "-3", RIGHT),
        ("1/0", True, "12", 0),
        ("1" * 60, True, "12", A_NUMBER),
        (" x+1 ", True, "x+1", RIGHT),
        ("x", True, "x+1", 0),
        ("1e9999999999", True, "9", A_NUMBER),
    ],
)
def test_a_reward_is_for_the_right_number(answer: str, ended: bool, expected: str, earned: float) -> None:
    assert reward(answer, ended, expected) == earned


# The numbers of GRPO

REWARDS = st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=4).map(torch.tensor)


@given(REWARDS)
def test_an_advantage_is_against_the_group(rewards: torch.Tensor) -> None:
    found = grpo.advantages(rewards.double())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.mean(1), torch.zeros(len(found)).double(), atol=1e-6, rtol=0)
    for row, group in zip(found, rewards, strict=True):
        assert torch.equal(row.argsort(stable=True)[group.diff().eq(0).all() :], row.argsort(stable=True)[group.diff().eq(0).all() :])
        if len(set(group.tolist())) == 1:
            assert not row.any(), "where all are the same, there is nothing to learn"


def test_advantages_by_hand() -> None:
    found = grpo.advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1, -1, 1], [0.0] * 4]), atol=1e-3, rtol=0)


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    p, q = (torch.randn(3, 50, generator=torch.Generator().manual_seed(i)).double().log_softmax(-1) for i in (0, 1))
    estimate = grpo.kl_to_reference(p, q)
    assert (estimate >= 0).all() and not grpo.kl_to_reference(p, p).any()
    exact = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close((p.exp() * estimate).sum(-1), exact)


def test_the_loss_pushes_by_advantage_and_stops_at_the_clip() -> None:
    old = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-2.0, 0.0]])
    logprobs = (old + torch.tensor([[0.0, 0.0], [0.5, 0.0], [-0.5, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    gain = torch.tensor([2.0, 1.0, 1.0])
    grpo.policy_loss(logprobs, old, torch.zeros(3, 2), gain, mask, clip=0.2, kl_weight=0.1).backward()
    assert logprobs.grad is not None
    expected = [[-1.0, -1.0],  # its advantage, over two tokens
                [0.0, -0.5],  # the first has left the clip where its gain is no more
                [-float(torch.exp(torch.tensor(-0.5))), 0.0]]  # below the clip it still gains; what is masked never does  # fmt: skip
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


def test_the_kl_term_pulls_to_the_reference() -> None:
    logprobs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    kl = grpo.kl_to_reference(logprobs, torch.tensor([[-2.0, -2.0]]))
    mask = torch.ones(1, 2, dtype=torch.bool)
    grpo.policy_loss(logprobs, logprobs.detach(), kl, torch.zeros(1), mask, clip=0.2, kl_weight=1.0).backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 0] > 0 > logprobs.grad[0, 1]


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6))
def test_what_is_drawn_follows_the_probabilities(logits: list[float]) -> None:
    grid = (torch.arange(1000).double() + 0.5) / 1000
    tokens = grpo.draw(torch.tensor(logits).expand(1000, -1), grid)
    share = torch.bincount(tokens, minlength=len(logits)) / 1000
    torch.testing.assert_close(share, torch.tensor(logits).softmax(-1), atol=2e-3, rtol=0)


def test_the_largest_number_draws_a_token_that_there_is() -> None:
    logits = torch.tensor([[0.0] * 263 + [-90.0]])
    assert grpo.draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() < 264


# Rollouts


@pytest.fixture(scope="module")
def policy(prepared: Path) -> tuple[Rollout, dict[str, torch.Tensor]]:
    cfg = parse_args(RLConfig, ["--config", str(config_for(prepared))])
    opened = open_model(cfg.model, World(0, 1, torch.device("cpu")), chat=True)
    weights = opened.load(7, weights=True).state_dict()
    return Rollout(opened.config, opened.tokenizer, 5, batch_size=8), weights


@pytest.fixture(scope="module")
def prompts(prepared: Path) -> list[Prompt]:
    return read_prompts(prepared / "data/rl/train/train-split.jsonl", TOKENIZER)


def test_prompts_are_chat_up_to_the_answer(prompts: list[Prompt]) -> None:
    texts = [TOKENIZER.decode(prompt.ids) for prompt in prompts]
    assert len(texts) == 84 and all(text.startswith("<|im_start|>user\n") for text in texts)
    assert all(text.endswith("<|im_end|>\n<|im_start|>assistant\n") for text in texts)
    sums = [re.search(r"(\d+) ?(?:\+|plus) ?(\d+)", text) for text in texts]
    assert [str(int(found[1]) + int(found[2])) for found in sums if found] == [prompt.expected for prompt in prompts]


def test_what_is_drawn_depends_on_seed_and_place_alone(
    policy: tuple[Rollout, dict[str, torch.Tensor]], prompts: list[Prompt]
) -> None:
    rollout, weights = policy
    some, places = prompts[:6], list(range(40, 46))
    whole = rollout.answer(weights, some, places, 4, 3, False)
    split = [group for i in range(6) for group in rollout.answer(weights, some[i : i + 1], places[i : i + 1], 4, 3, False)]
    for one, other in zip(whole, split, strict=True):
        assert torch.equal(one.answers.tokens, other.answers.tokens)
        torch.testing.assert_close(one.answers.logprobs, other.answers.logprobs, atol=1e-4, rtol=0)
    elsewhere = rollout.answer(weights, some, [place + 6 for place in places], 4, 3, False)
    assert any(not torch.equal(a.answers.tokens, b.answers.tokens) for a, b in zip(whole, elsewhere, strict=True))
    assert len({tuple(row) for group in whole for row in group.answers.tokens.tolist()}) > 12, "all answers alike"


def test_the_learner_sees_the_probabilities_that_the_answers_were_drawn_with(
    policy: tuple[Rollout, dict[str, torch.Tensor]], prompts: list[Prompt]
) -> None:
    rollout, weights = policy
    groups = rollout.answer(weights, prompts[:12], list(range(12)), 2, 4, False)  # prompts of several lengths
    ids = [prompt.ids for prompt in prompts[:12] for _ in range(2)]
    answers = [group.answers for group in groups]
    tokens, drawn, mask = (torch.cat([getattr(a, name) for a in answers]) for name in ("tokens", "logprobs", "mask"))
    learned = grpo.token_logprobs(rollout.model, ids, tokens, END).detach()
    torch.testing.assert_close(learned[mask], drawn[mask], atol=1e-4, rtol=0)


def test_an_answer_ends_with_its_end(policy: tuple[Rollout, dict[str, torch.Tensor]], prompts: list[Prompt]) -> None:
    rollout, weights = policy
    weights = {name: value.clone() for name, value in weights.items()}
    weights["lm_head.weight"][END] = 10 * weights["lm_head.weight"].abs().max()  # so that ends come soon
    groups = rollout.answer(weights, prompts[:20], list(range(20)), 4, 5, False)
    lengths = {length for group in groups for length in group.answers.lengths.tolist()}
    assert len(lengths) > 2, "an end must be drawn at several places for this test to mean something"
    for group in groups:
        for tokens, length in zip(group.answers.tokens.tolist(), group.answers.lengths.tolist(), strict=True):
            assert END not in tokens[: length - 1] and (length == 5 or tokens[length - 1] == END)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"expected_answer": "1"}', "responses_create_params"),
        ('{"responses_create_params": {"input": []}, "expected_answer": "1"}', "lists no messages"),
        ('{"responses_create_params": {"input": [{"role": "user", "content": "x"}]}}', "expected_answer"),
        ('{"responses_create_params": {"input": [{"role": "user", "content": "x"}]}, "expected_answer": null}', "no text"),
        ('{"responses_create_params": {"input": [{"role": "bot", "content": "x"}]}, "expected_answer": "1"}', "one of the roles"),
        ('{"responses_create_params": {"input": [{"role": "user", "content": 5}]}, "expected_answer": "1"}', "one of the roles"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    good = {"responses_create_params": {"input": [{"role": "user", "content": "1+1="}]}, "expected_answer": 2}
    path.write_text(json.dumps(good) + "\n\n" + row + "\n")
    with pytest.raises(RecipeError, match=rf"p\.jsonl:3: not a prompt .*{message}") as caught:
        read_prompts(path, TOKENIZER)
    assert len(str(caught.value).splitlines()) == 2


# Runs in this process


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_ray: None
) -> None:
    assert train(prepared, tmp_path / "whole") == 0
    real_step = rl.Learner.train_step

    def die_in_step_4(self: rl.Learner) -> Any:
        if self.step == 3:
            raise MemoryError  # as good as a kill: nothing of ours handles it
        return real_step(self)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rl.Learner, "train_step", die_in_step_4)
        train(prepared, tmp_path / "out")
    assert train(prepared, tmp_path / "out") == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "out")
    assert metrics == read_metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all({"loss", "reward", "accuracy", "kl", "length", "grad_norm", "lr"} <= set(line) for line in metrics)
    assert [line["step"] for line in metrics if {"val_reward", "val_accuracy"} <= set(line)] == [2, 4]
    whole, resumed = (torch.load(tmp_path / name / "checkpoints/step-00000004.pt") for name in ("whole", "out"))
    for name in ("fingerprint", "config"):
        assert resumed.pop(name) == whole.pop(name)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)

    assert train(prepared, tmp_path / "out") == 0
    assert "resumed at step 4 of 4: nothing left to train, val_reward" in capsys.readouterr().out
    (tmp_path / "out/checkpoints/reference.pt").unlink()
    with pytest.raises(RecipeError, match=r"reference\.pt"):
        train(prepared, tmp_path / "out", "train.steps=5")


def test_the_number_of_actors_changes_nothing(prepared: Path, tmp_path: Path, without_ray: None) -> None:
    for count in (1, 3):
        assert train(prepared, tmp_path / str(count), f"rollout.actors={count}", "train.steps=2") == 0
    one, three = (read_metrics(tmp_path / name) for name in ("1", "3"))
    assert [line["reward"] for line in one] == [line["reward"] for line in three]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in three], rel=1e-2, abs=1e-5)


def test_a_run_of_other_prompts_is_refused(prepared: Path, tmp_path: Path, without_ray: None) -> None:
    assert train(prepared, tmp_path / "out", "train.steps=1", "data.val=null") == 0
    assert "val_reward" not in read_metrics(tmp_path / "out")[0]
    val = prepared / "data/rl/train/val-split.jsonl"
    with pytest.raises(RecipeError, match=r"trained with data\.train = sha256 \w+, now it is sha256"):
        train(prepared, tmp_path / "out", "train.steps=2", f"data.train={val}")


def test_the_reference_is_the_policy_after_the_cold_start(prepared: Path, tmp_path: Path, without_ray: None) -> None:
    assert train(prepared, tmp_path / "out", "train.steps=1", "train.lr=1e-9", "grpo.cold_start=20") == 0
    trained = torch.load(tmp_path / "out/checkpoints/step-00000001.pt")["model"]
    reference = torch.load(tmp_path / "out/checkpoints/reference.pt")
    torch.testing.assert_close(trained, reference, rtol=0, atol=1e-6)
    assert read_metrics(tmp_path / "out")[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_without_ray_it_says_so(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match="Ray is not installed"):
        train(prepared, tmp_path / "out")


# Real Ray


@contextlib.contextmanager
def started(prepared: Path, output: Path, *overrides: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """The recipe as a pod starts it, in a process group of its own, of which nothing is left in the end."""
    base = {"PATH": os.environ["PATH"], "HOME": str(prepared), "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(RECIPES / "nano3/rl/train.py"), "--config", str(config_for(prepared)), *SMALL]
    with subprocess.Popen([*argv, f"output={output}", *overrides], env=base | env, text=True, process_group=0,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def until_step_3(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(read_metrics(output)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)


@pytest.mark.slow
def test_a_signal_to_all_its_processes_ends_in_a_checkpoint(prepared: Path, tmp_path: Path) -> None:
    with started(prepared, tmp_path / "out", "train.steps=100000") as process:
        until_step_3(process, tmp_path / "out")
        os.killpg(process.pid, signal.SIGTERM)  # as pod.py does
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 143, told
    stopped = re.search(r"SIGTERM: stopped after step (\d+), checkpoint saved", told)
    assert stopped, told
    newest = checkpoint.newest_checkpoint(tmp_path / "out/checkpoints")
    assert newest and newest.name == f"step-{int(stopped[1]):08d}.pt"


TWO_NODES = """
import os, sys
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # loopback only
from ray.cluster_utils import Cluster
os.makedirs("/tmp/ray", exist_ok=True)  # where it notes the newest cluster, wherever its own files are
options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "temp_dir": sys.argv[1]}
cluster = Cluster(initialize_head=True, head_node_args=options)
second = cluster.add_node(**{name: value for name, value in options.items() if name in ("num_cpus", "object_store_memory")})
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
cluster.shutdown()
"""


@pytest.fixture
def two_nodes(prepared: Path) -> Iterator[subprocess.Popen[str]]:
    """A Ray cluster of two nodes with one CPU each; a line to its standard input kills the second."""
    pytest.importorskip("ray")
    folder = f"/tmp/r{os.getpid()}"
    env = {"PATH": os.environ["PATH"], "HOME": str(prepared)}
    with subprocess.Popen([sys.executable, "-c", TWO_NODES, folder], env=env, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.address = process.stdout.readline().strip()  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def joins(cluster: Any) -> dict[str, str]:
    """A driver's environment. What listens on loopback only is joined so too."""
    return {"RAY_ADDRESS": cluster.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.mark.slow
def test_the_reward_rises_on_two_nodes_by_the_launcher_alone(two_nodes: Any, prepared: Path, tmp_path: Path) -> None:
    variables = joins(two_nodes) | {"HOME": prepared, "OMP_NUM_THREADS": "1"}
    (tmp_path / "env.toml").write_text(
        f'[two]\nextends = "local"\nworkspace = "{tmp_path}/out"\n'
        "[two.env_vars]\n" + "".join(f'{name} = "{value}"\n' for name, value in variables.items())
    )
    env = os.environ | {"AIRLIFT_HOME": str(tmp_path / "home"), "NEMOTRON_ENV_FILE": str(tmp_path / "env.toml")}
    done = launcher(ROOT, "super3", "data/prep/rl,rl", "two", "train.steps=30", env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rollout actors on 2 nodes" in done.stdout
    metrics = read_metrics(tmp_path / "out/super3/rl")
    begin, end = (sum(line["reward"] for line in part) / 3 for part in (metrics[:3], metrics[-3:]))
    vals = [line["val_reward"] for line in metrics if "val_reward" in line]
    print(f"reward {begin:.3f} -> {end:.3f}, val {vals}")
    assert end > begin + 0.1
    assert (tmp_path / "out/super3/rl/model/config.json").is_file()


@pytest.mark.slow
def test_a_node_that_dies_ends_the_run_and_the_next_goes_on(two_nodes: Any, prepared: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    with started(prepared, tmp_path / "out", "train.steps=100000", MARK=mark, **joins(two_nodes)) as process:
        until_step_3(process, tmp_path / "out")
        marked = [path for path in Path("/proc").glob("[0-9]*/environ") if mark.encode() in _bytes(path)]
        assert [int(path.parent.name) for path in marked] == [process.pid], "its environment went to the cluster"
        two_nodes.stdin.write("\n")
        two_nodes.stdin.flush()
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"^error: a rollout actor was lost: .*\nStart again: ", told, re.MULTILINE), told
    done = read_metrics(tmp_path / "out")[-1]["step"] // 2 * 2
    again = [f"train.steps={done + 2}", "rollout.actors=1"]
    with started(prepared, tmp_path / "out", *again, **joins(two_nodes)) as process:
        told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resumed at step {done} of {done + 2}" in told, told


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_cluster_that_cannot_be_reached_is_named(prepared: Path, tmp_path: Path) -> None:
    with started(prepared, tmp_path / "out", RAY_ADDRESS="127.0.0.1:9") as process:
        told, _ = process.communicate(timeout=120)
    error = told[told.index("error: ") :]
    assert process.returncode == 1 and "cannot reach the Ray cluster at 127.0.0.1:9" in error, told
    assert len(error.splitlines()) == 2
