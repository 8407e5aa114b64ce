"""From the words of the command line to a launch that is ready to submit: profile, recipe, config, job, tree and plan.

Nothing here contacts a platform. All stages of a pipeline are prepared before the first one is submitted.
"""

import dataclasses
import os
import re
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import archive
import backends
import bundle
import closure
import configs
import jobs
import profiles
import recipes
import runs
import screen
import start
import transport
import wheels
from transport import Refusal

HERE = Path(__file__).resolve().parent


class Words(NamedTuple):
    """The words of a launch."""

    family: str
    stages: list[str]
    profile: str
    overrides: list[str]  # KEY=VALUE


def words_of(words: list[str], root: Path | None = None) -> Words:
    """FAMILY STAGE[,STAGE...] [PROFILE] and the KEY=VALUE overrides among the words; a stage may be written with blanks
    in place of its slashes. `root` is the tree that was named, if one was. Raises Refusal."""
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) < 2:
        raise Refusal("a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local")
    family, *stage, profile = names if len(names) > 2 else [*names, "local"]
    if len(names) > 2 and profile not in profiles.names():
        known, _ = recipes.scan(recipes.source_tree(root, HERE), "/".join(names).encode())
        if "/".join(names) in known:
            stage, profile = names[1:], "local"
        elif len(names) > 3:
            raise Refusal("unexpected word %r" % names[3],
                          "overrides are KEY=VALUE; arguments for the script follow --")
    return Words(family, [each.strip("/") for each in "/".join(stage).split(",")], profile, overrides)


def config_for(named: list[str], stage: str, recipe: recipes.Recipe, several: bool) -> str | None:
    """The config of a stage by the -c of the command line: STAGE=CONFIG is for that stage, CONFIG for all; of several
    stages, for those that have it."""
    own = [text.partition("=")[2] for text in named if text.partition("=")[0] == stage]
    rest = [text for text in named if not re.match(r"[\w/.-]+=", text)]
    if own or not rest:
        return own[-1] if own else None
    return None if several and not configs.has(recipe, rest[-1]) else rest[-1]


class Launch:
    """One launch, resolved by config, nodes, repo_root and args of the options. `dry`: variables may be unset; `new`:
    overrides that are for every stage, since no stage's config has their key."""

    def __init__(self, words: Words, stage: str, options: Namespace, dry: bool, new: Sequence[str] = (),
                 kept: archive.Kept | None = None) -> None:
        begun = time.time()
        self.kept = kept
        self.profile = profiles.load(words.profile, stage)
        screen.masked(self.profile.settings | dict.fromkeys(("secrets", "image_pull_secrets")))  # those are only names
        if not dry:
            self.profile.require_set()
            if self.profile.executor in backends.WARM:
                backends.warm(self.profile.executor)
        own = self.profile.keys.get("repo_root")
        if own and not options.repo_root:
            profiles.BESIDE[:] = [Path(own, "env.toml")]
        self.root = recipes.source_tree(options.repo_root or own, HERE)
        recipe = recipes.find(self.root, words.family + "/" + stage)
        self.overrides, self.several = words.overrides, len(words.stages) > 1
        self.config_name = config_for(options.config or [], stage, recipe, self.several)
        if self.several:  # an override is for the stages whose config has its first key; run.env is for all
            known = configs.known_keys(recipe, self.config_name)
            self.overrides = [word for word in words.overrides
                              if word in new or re.findall(r"^\+*(run\.[^.=[]+|[^.=[]*)", word)[0] in known]
        ahead = _Ahead(self.root, recipe, self.profile, kept)
        try:
            notes = list(self.profile.notes)
            self.config = self._compiled(recipe, options, notes, dry)
            self.recipe = self.config.recipe
            self.job = self._job(options, notes)
            sent = jobs.secret_values(self.job, dry)
            screen.conceal(*sent.values())
            sent |= jobs.node_env(self.job)
            if self.profile.executor in profiles.CLOUDS:
                sent = {name: transport.literal(value) for name, value in sent.items()}
            transport.pod_program(dict(self.job.description))  # its parts are cached; built beside the packing
        finally:
            ahead.join()  # a local launch forks, and no thread may hold a lock then
        settings = self.job.settings
        named = () if kept else self._named()
        for also in (named, tuple(path for path in named if path != transport.LOCK)):
            self.tree, self.packed = ahead.take(self.recipe, settings, self.config, also, self.wheels.files)
            self.git = kept.made.get("git") if kept else archive.git_state(self.root, self.tree)
            self.job.description["made"] = self._made(words, options)
            self.plan = transport.plan_for(
                self.profile.executor, self.tree, dict(self.job.description), ready=self.packed, env=sent,
                compression=settings.get("compression", ""), chunk_bytes=settings.get("chunk_bytes", 0),
                limits=transport.limits_for(self.profile.executor, dict(self.job.description),
                                            settings.get("dgxcloud_max_args_chars", 0)))
            if self.plan.fits or transport.LOCK not in named:
                break
        self.no_lock = also != named
        self.origin = self._origin()
        self.took = time.time() - begun  # seconds

    def _compiled(self, recipe: recipes.Recipe, options: Namespace, notes: list[str], dry: bool) -> configs.Config:
        def settings(recipe: recipes.Recipe, yaml: dict[str, Any], forced: dict[str, Any]) -> dict[str, Any]:
            return jobs.settings_for(recipe, self.profile, options.nodes, yaml, forced, notes, dry)

        wandb = profiles.section("wandb", dry)
        screen.masked(wandb)
        return configs.compile_config(recipe, self.config_name, self.overrides, settings, wandb,
                                      profiles.section("artifacts", dry), self.profile.others)

    def _job(self, options: Namespace, notes: list[str]) -> jobs.Job:
        recipe, executor = self.recipe, self.profile.executor
        settings = self.config.run["env"]
        root = jobs.run_root(settings, recipe.family, options.name)
        lost = jobs.not_kept(settings, executor)
        self.outputs = None if lost else root
        notes += filter(None, [lost or jobs.starts_in_image(settings, executor)])
        cluster = jobs.ray_cluster(recipe, settings, executor)
        self.wheels = wheels.wheels(settings)
        begin = start.start(recipe, settings, list(options.args), executor, cluster)
        secrets, about_secrets = jobs.check_secrets(settings.get("secrets", {}), executor, settings["env_vars"])
        repositories, about_clones = jobs.clones(settings, executor)
        notes += jobs.not_sent(executor, {*settings["env_vars"], *secrets})
        carried = ["wheels that are sent: " + ", ".join(map(os.path.basename, self.wheels.files))]
        notes += [*begin.notes, *carried * bool(self.wheels.files), *about_secrets, *about_clones, *self.config.notes]
        run_id = runs.new_run_id()
        description = jobs.Description(
            run=run_id, recipe=recipe.name, script=recipe.script, launch=recipe.launch, nodes=settings["nodes"],
            run_root=root, config=self.config.text,
            pip=self.wheels.extras, install=self.wheels.install, links=self.wheels.links,
            setup=jobs.setup_commands(settings) + begin.setup,
            command=begin.command, tool=begin.tool,
            workdir=settings.get("workdir"),
            clones=repositories, folders=list(jobs.persistent_caches(settings).values()),
            retries=settings.get("retries", 0), patience=settings["rendezvous_timeout"],
            cluster=cluster)
        description |= jobs.environment(settings, self.config.run, recipe.name, executor, root)
        description |= jobs.unpacking(settings)
        screen.masked(description["env"])
        if description["cluster"] == "pods":
            description["secret"] = os.urandom(32).hex()
            screen.conceal(description["secret"])
        return jobs.Job(
            run_id, recipe.name, executor, settings["nodes"], settings["gpus_per_node"], settings["nproc"],
            settings.get("container_image"), settings, description, secrets, tuple(notes))

    def _made(self, words: Words, options: Namespace) -> archive.Made:
        """How the run comes about, without secrets."""
        typed = [words.family, self.job.name.partition("/")[2], words.profile, *self.overrides]
        return archive.Made(
            words=archive.clean_words(typed), config=list(options.config or []), nodes=options.nodes, name=options.name,
            args=archive.clean_words(options.args), run=archive.clean_run(self.config.yaml),
            overrides=archive.clean_words([word for word in self.overrides if word.lstrip("+~").startswith("run.")]),
            settings=archive.clean_settings(self.job.settings), git=self.git, version=bundle.VERSION,
            plain=screen.hide(self.config.shown) == self.config.text,
            again=self.kept.run.id if self.kept else None)

    def _origin(self) -> runs.Origin:
        if self.kept and self.kept.run.origin:
            return self.kept.run.origin
        is_path = configs.is_path(self.config_name or "")
        return runs.Origin(
            repo_root=str(self.root), env_file=str(profiles.env_file() or os.devnull),
            config=str(self.config.path.resolve()) if is_path else self.config_name,
            overrides=[word for word in self.overrides if word.startswith((
                "run.env.exclude", "run.env.include", "run.env.scope"))])

    def _named(self) -> tuple[str, ...]:
        """The paths of the source tree that config, commands and variables name, and that ship only for that: those of
        other families, and what lies outside of src."""
        sent = self.job.description
        settings = self.job.settings
        found = set(start.project_files(self.recipe, settings, jobs.setup_commands(settings)))
        text = "\n".join([sent["config"], sent["command"], *sent["setup"], *sent["env"].values()])
        for word in {*re.split(r"[\s,:;='\"]+", text), *re.split(r": |- |['\"\n]+", text)}:  # blanks may be in a name
            path = os.path.normpath(word.removeprefix("/nemo_run/code/"))
            if path.startswith("src/"):
                found.update([path] * (transport.family_of(path) != transport.family_of(self.recipe.script)))
            elif re.search("[./]", word) and not path.startswith(("/", "..")) and path not in (".", "src"):
                found.update([path] * os.path.lexists(self.root / path))
        return tuple(sorted(found))

    @property
    def source(self) -> str:
        """Where the tree comes from, in words."""
        return "run " + self.kept.run.id if self.kept else str(self.root)

    def came(self) -> dict[str, Any]:
        """What the run's file has of it."""
        return {"made": self.job.description["made"], "config": screen.hide(self.config.shown)}

    def notes(self) -> list[str]:
        """What the user should know about the launch."""
        near = ["this is the starter's %s, and %s has one of its family, too: --repo-root says which is meant" % (
            self.job.name, tree) for tree in recipes.others_near(self.recipe)]
        secret = transport.credential_in(self.config.text.encode())
        found = ["the config contains what looks like a credential, and is sent as it is"] * bool(secret)
        found += ["%s is too big for this job, so uv finds versions of its own" % transport.LOCK] * self.no_lock
        outside = [entry.path for entry in self.tree.entries
                   if not entry.path.startswith(("src/", wheels.FOLDER + "/")) and entry.path != start.PROJECT]
        found += ["also sent, as config or command name them: " + ", ".join(outside)] * bool(outside)
        return [*near, *self.job.notes, *found, *_left_out(self.tree)]

    def check(self, attached: bool) -> None:
        """Raises Refusal for what can be refused without contacting the platform."""
        if self.config.missing:
            raise Refusal("the config wants a value for " + ", ".join(self.config.missing),
                          "give each as KEY=VALUE: " + " ".join(key + "=..." for key in self.config.missing))
        backends.require(self.job, attached, self.several)
        backends.backend(self.job.executor).check(self.job, self.plan)

    def refusal(self, attached: bool) -> str:
        """Why a launch would be refused, for a dry run; "" if it would not, or if the profile has unset variables."""
        try:
            if not self.profile.unset:
                self.check(attached)
        except Refusal as refusal:
            return "a launch would be refused: %s; %s" % (screen.one_line(refusal.what), screen.one_line(refusal.fix))
        return ""


EXPECTED = ("documentation", "another family", "version control", "cache", "virtual environment",
            "left by a program")  # `files` lists them


def _left_out(tree: transport.Tree) -> list[str]:
    """A note for each reason why files are not sent; credentials are listed."""
    reasons: dict[str, list[str]] = {}
    for path, reason in tree.left_out:
        reasons.setdefault(reason, []).append(path)
    return ["left out, as they look like credentials: " + ", ".join(paths) if reason == "credential" else
            "left out, %s: %d, like %s" % (reason, len(paths), paths[0])
            for reason, paths in sorted(reasons.items()) if reason not in EXPECTED]


class _Ahead(threading.Thread):
    """Collects and packs the tree by the profile's settings while the config is compiled, which takes as long: lzma
    runs in parallel to Python. If the config then changes what is sent, it is done again."""

    def __init__(self, root: Path, recipe: recipes.Recipe, profile: profiles.Profile, kept: archive.Kept | None
                 ) -> None:
        super().__init__(daemon=True)
        self.kept = kept
        self.root, self.executor, settings = root, profile.executor, profile.settings
        self.inputs = self.inputs_of(recipe, settings, start.project_files(
            recipe, settings, jobs.setup_commands(settings)))
        self.found: tuple[transport.Tree, transport.Packed] | None = None
        self.start()

    @staticmethod
    def inputs_of(recipe: recipes.Recipe, settings: dict[str, Any], also: tuple[str, ...], carried: tuple[str, ...] = ()
                  ) -> tuple[Any, ...]:
        """What the tree depends on; `also` are paths that ship since they are named."""
        return (recipe.script, tuple(settings.get("exclude", ())), tuple(settings.get("include", ())), also,
                settings["scope"], settings.get("compression", ""), carried)

    def run(self) -> None:
        *what, scope, compression, _ = self.inputs
        if scope == "family" and not self.kept:
            try:
                tree = transport.collect(self.root, *what)
                self.found = tree, archive.packed(tree, transport.method_for(self.executor, compression))
            except Exception:  # noqa: S110 - take() runs into it again, and reports it
                pass

    def take(self, recipe: recipes.Recipe, settings: dict[str, Any], config: configs.Config, also: tuple[str, ...],
             carried: tuple[str, ...]) -> tuple[transport.Tree, transport.Packed]:
        """The tree by the recipe and settings as they are now, and the same packed."""
        method = transport.method_for(self.executor, settings.get("compression", ""))
        if self.kept:
            tree = archive.entries(self.kept.tree)
            return tree, self.kept.tree if self.kept.tree.method == method else archive.packed(tree, method)
        inputs = script, exclude, include, also, scope, *_ = self.inputs_of(recipe, settings, also, carried)
        if self.found and inputs == self.inputs:
            return self.found
        if scope == "family":
            tree = transport.collect(self.root, script, exclude, include, also)
        else:
            places = recipe.config_dir, config.path
            tree = closure.collect(self.root, script, exclude, places, config.text, include, also)
        tree = dataclasses.replace(tree, entries=(*tree.entries, *wheels.entries(carried)))
        return tree, archive.packed(tree, method)
