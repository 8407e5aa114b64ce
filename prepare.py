"""From the words of the command line to a launch that is ready: profile, recipe, config, job, tree and plan.

Nothing here asks a platform. Every stage of a pipeline is prepared before the first of them is submitted.
"""

import os
import re
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import backends
import closure
import configs
import jobs
import profiles
import recipes
import runs
import screen
import transport
from transport import Refusal

HERE = Path(__file__).resolve().parent


class Words(NamedTuple):
    """What the words of a launch name."""

    family: str
    stages: list[str]
    profile: str
    overrides: list[str]  # KEY=VALUE


class Options(NamedTuple):
    """The options of the command line that say what is launched; the others say how it is shown."""

    config: str | None = None  # of -c
    nodes: int | None = None
    repo_root: Path | None = None
    args: tuple[str, ...] = ()  # for the script


def words_of(words: list[str]) -> Words:
    """FAMILY STAGE[,STAGE...] [PROFILE] and the KEY=VALUE overrides among the words. Raises Refusal."""
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) < 2:
        raise Refusal("a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local")
    if len(names) > 3:
        raise Refusal("%r is one word too many" % names[3],
                      "overrides are KEY=VALUE; what follows -- goes to the script")
    stages = [stage.strip("/") for stage in names[1].split(",")]
    return Words(names[0], stages, names[2] if len(names) > 2 else "local", overrides)


class Launch:
    """One launch, resolved. `dry` takes what a look needs: variables and secrets may be unset, nothing is required."""

    def __init__(self, words: Words, stage: str, options: Options, dry: bool) -> None:
        begun = time.time()
        self.profile = profiles.load(words.profile, stage)
        screen.conceal(*(self.profile.keys.get(key) for key in profiles.SECRET_KEYS))
        if not dry:
            self.profile.require_set()
        self.root = Path(options.repo_root or self.profile.keys.get("repo_root") or HERE).resolve()
        recipe = recipes.find(self.root, words.family + "/" + stage)
        several = len(words.stages) > 1
        self.overrides = _for_stage(words.overrides, recipe, options.config) if several else words.overrides
        ahead = _Ahead(self.root, recipe, self.profile)
        try:
            notes = list(self.profile.notes)
            self.config = self._compiled(recipe, options, notes, dry)
            self.recipe = self.config.recipe
            self.job = self._job(options, notes)
            sent = jobs.secret_values(self.job, dry)
            screen.conceal(*sent.values())
            transport.pod_program(dict(self.job.description))  # its parts are made here, beside the packing, and kept
        finally:
            ahead.thread.join()  # a local launch forks: no thread may hold a lock then
        settings = self.job.settings
        self.tree, ready = ahead.take(self.recipe, settings, self.config)
        self.plan = transport.plan_for(
            self.profile.executor, self.tree, dict(self.job.description), compression=settings.get("compression", ""),
            chunk_bytes=settings.get("chunk_bytes", 0), env=sent, ready=ready,
            limits=transport.limits_for(self.profile.executor, dict(self.job.description),
                                        settings.get("dgxcloud_max_args_chars", 0)))
        self.origin = self._origin(options)
        self.took = time.time() - begun  # seconds

    def _compiled(self, recipe: recipes.Recipe, options: Options, notes: list[str], dry: bool) -> configs.Config:
        def settings(recipe: recipes.Recipe, yaml: dict[str, Any], forced: dict[str, Any]) -> dict[str, Any]:
            return jobs.settings_for(recipe, self.profile, options.nodes, yaml, forced, notes, dry)

        wandb = profiles.section("wandb", dry)
        screen.conceal(str(wandb.get("api_key") or ""))
        return configs.compile_config(recipe, options.config, self.overrides, settings, wandb,
                                      profiles.section("artifacts", dry))

    def _job(self, options: Options, notes: list[str]) -> jobs.Job:
        recipe, executor = self.recipe, self.profile.executor
        settings = self.config.run["env"]
        root = jobs.run_root(settings, recipe.family)
        kept = jobs.not_kept(settings, executor)
        notes += [kept] if kept else []
        command, tool, said = recipes.command(recipe, settings, list(options.args), executor in profiles.CLOUDS)
        secrets, about = jobs.check_secrets(settings.get("secrets", {}), executor, settings["env_vars"])
        repositories, cloned = jobs.clones(settings, executor)
        run_id = runs.new_run_id()
        description = jobs.Description(
            run=run_id, recipe=recipe.name, script=recipe.script, launch=recipe.launch, nodes=settings["nodes"],
            run_root=root, config=self.config.text,
            env=jobs.environment(settings, self.config.run, recipe.name, executor),
            pip=settings.get("pip_extras") or [], setup=jobs.setup_commands(settings), command=command, tool=tool,
            workdir=settings.get("workdir"),
            clones=repositories, folders=list(jobs.persistent_caches(settings).values()),
            retries=settings.get("retries", 0), patience=settings["rendezvous_timeout"],
            cluster=jobs.ray_cluster(recipe, settings, executor))
        description |= jobs.unpacking(settings)
        if description["cluster"] == "pods":
            description["secret"] = os.urandom(32).hex()
            screen.conceal(description["secret"])
        return jobs.Job(
            run_id, recipe.name, executor, settings["nodes"], settings["gpus_per_node"], settings["nproc"],
            settings.get("container_image"), settings, description, secrets,
            tuple(notes + said + about + cloned + list(self.config.notes)))

    def _origin(self, options: Options) -> runs.Origin:
        named = configs.is_path(options.config or "")
        return runs.Origin(
            repo_root=str(self.root), env_file=str(profiles.env_file() or os.devnull),
            config=str(self.config.path.resolve()) if named else options.config,
            overrides=[word for word in self.overrides if word.startswith(("run.env.exclude", "run.env.scope"))])

    def notes(self) -> list[str]:
        """What the person should know."""
        sent = ["the config holds what looks like a credential, and is sent as it is"]
        return [*self.job.notes, *sent * transport.looks_secret(self.config.text.encode()), *_left_out(self.tree)]

    def check(self, attached: bool) -> None:
        """Raises Refusal for what would be refused without asking the platform."""
        backends.require(self.job, attached)
        backends.backend(self.job.executor).check(self.job, self.plan)

    def refusal(self, attached: bool) -> str:
        """Why a launch would be refused, for a dry run; "" where it would not. A template that is not filled in yet has
        nothing to check."""
        try:
            if not self.profile.unset:
                self.check(attached)
        except Refusal as refusal:
            return "a launch would be refused: %s; %s" % (screen.one_line(refusal.what), screen.one_line(refusal.fix))
        return ""


def _for_stage(overrides: list[str], recipe: recipes.Recipe, config: str | None) -> list[str]:
    """Of the overrides of several stages, those whose first word this one's config has; run is for all."""
    known = configs.known_keys(recipe, config) | {"run"}
    return [word for word in overrides if re.split(r"[.=\[]", word)[0] in known]


def _left_out(tree: transport.Tree) -> list[str]:
    """One line for each kind of thing that stays here; credentials are named."""
    kinds: dict[str, list[str]] = {}
    for path, reason in tree.left_out:
        kinds.setdefault(reason, []).append(path)
    notes = []
    for reason, paths in sorted(kinds.items()):
        if reason == "credential":
            notes.append("left out, as they look like credentials: " + ", ".join(paths))
        elif reason not in ("documentation", "another family"):
            notes.append("left out, %s: %d, like %s" % (reason, len(paths), paths[0]))
    return notes


class _Ahead:
    """Collects and packs the tree that the profile asks for while the config is compiled, which takes as long: lzma
    lets Python work beside it. What the config then changes (the script, what to leave out) is done again."""

    def __init__(self, root: Path, recipe: recipes.Recipe, profile: profiles.Profile) -> None:
        self.root, self.wanted = root, self.wishes(recipe, profile.settings, "")
        self.found: tuple[transport.Tree, transport.Packed] | None = None
        self.executor = profile.executor
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @staticmethod
    def wishes(recipe: recipes.Recipe, settings: dict[str, Any], text: str) -> tuple[Any, ...]:
        return (recipe.script, tuple(settings.get("exclude", ())), settings["scope"], settings.get("compression", ""),
                [path for path in configs.named_sources(text)
                 if transport.family_of(path) != transport.family_of(recipe.script)])

    def run(self) -> None:
        script, exclude, scope, compression, _ = self.wanted
        if scope == "family":
            try:
                tree = transport.collect(self.root, script, exclude)
                self.found = tree, transport.packed(tree, transport.method_for(self.executor, compression))
            except Exception:  # take() meets it again, and tells
                pass

    def take(self, recipe: recipes.Recipe, settings: dict[str, Any], config: configs.Config
             ) -> tuple[transport.Tree, transport.Packed | None]:
        """The tree as recipe and settings are now, and the same packed, if it is."""
        wanted = script, exclude, scope, _, also = self.wishes(recipe, settings, config.text)
        if self.found and wanted == self.wanted:
            return self.found
        if scope == "family":
            return transport.collect(self.root, script, exclude, tuple(also)), None
        return closure.collect(self.root, script, exclude, (recipe.config_dir, config.path), config.text), None
