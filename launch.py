#!/usr/bin/env python3
"""Airlift: python launch.py FAMILY STAGE [PROFILE] [-c CONFIG] [KEY=VALUE ...] [options] [-- ARGS...]

Packs the local source tree and starts one of its recipes on the profile's executor; --help explains the rest. This file
is the command line: parser and help are made from the table COMMANDS, whose functions are here or in commands.py. Any
Python can parse this file (no annotations, no f-strings), so that an old one ends with a plain message and not with a
SyntaxError.
"""
from __future__ import print_function

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OWN_PYTHON = os.path.join(HERE, ".venv", "bin", "python")


def elsewhere():
    """Whether `make setup` has made a virtual environment beside this file that this Python is not, and that is to run
    us: outside of any other one, and in one that lacks what we need."""
    own = os.path.realpath(os.path.join(HERE, ".venv"))
    if not os.path.exists(OWN_PYTHON) or sys.executable == OWN_PYTHON or os.path.realpath(sys.prefix) == own:
        return False
    try:
        from importlib.util import find_spec
        return sys.prefix == sys.base_prefix or not (find_spec("omegaconf") and find_spec("nemo_run"))
    except (ImportError, AttributeError):  # a Python before 3.4
        return True


if __name__ == "__main__" and elsewhere():
    os.execv(OWN_PYTHON, [OWN_PYTHON] + sys.argv)  # noqa: S606 - the same words, and no shell
if sys.version_info < (3, 11):
    sys.stderr.write("airlift: needs Python 3.11 or later, and this is %d.%d\n" % sys.version_info[:2])
    sys.stderr.write("start it with a newer one, like: python3.11 launch.py ..., or run `make setup`\n")
    sys.exit(2)

import argparse
import collections
import contextlib
import difflib
import json
import re
import shlex
import time
import traceback
from pathlib import Path

import archive
import backends
import commands
import profiles
import runs
import screen
import transport
from prepare import Launch, Words, words_of
from screen import one_line
from transport import Refusal


def launch(options):
    """Launch one stage or several, each as its own job; all are prepared before the first one is submitted."""
    options.dry_run |= options.show_config
    dry = options.dry_run or options.json
    words = words_of(options.words, options.repo_root)
    launches = [Launch(words, stage, options, dry) for stage in words.stages]
    new = [word for word in words.overrides if not any(word in one.overrides for one in launches)]
    if new:
        launches = [Launch(words, stage, options, dry, new) for stage in words.stages]
    if options.config and not any(one.config_name for one in launches):
        raise Refusal("no stage has the config %s" % options.config[-1], "see the folder config beside their scripts")
    return go(launches, words.stages, options)


def go(launches, stages, options):
    """Show launches that are prepared, or submit them."""
    if options.json:
        shown = [screen.as_json(one, one.refusal(not options.detach)) for one in launches]
        print(json.dumps(shown[0] if len(shown) == 1 else {"stages": shown}, indent=1))
        return 0 if all(one.plan.fits for one in launches) else 3
    for one in launches:
        if options.dry_run:
            screen.show(one, one.refusal(not options.detach), options.show_config)
        one.plan.require_fit()
        if not options.dry_run:
            commands.chosen(options, one.job.nodes)
            one.check(not options.detach)
    return 0 if options.dry_run else run_stages(launches, stages, options)


def again(options):
    """Launch the tree and config of a run once more, on its profile or another, with KEY=VALUE on top."""
    new, names = ([word for word in options.words if ("=" in word) == has] for has in (True, False))
    if not 1 <= len(names) <= 2:
        raise Refusal("again takes RUN, perhaps a profile, and KEY=VALUE", "python launch.py status lists the runs")
    run = runs.load_run(names[0])
    profile = names[1] if len(names) > 1 else run.profile
    options.dry_run |= options.show_config
    world = run.origin["env_file"] if run.origin and profile == run.profile else None
    with archive.laid_out(run) as kept, profiles.pinned(world):
        family, _, stage = run.recipe.partition("/")
        options.config, options.repo_root = [str(kept.config)], kept.root
        for option in ("nodes", "name", "args"):
            setattr(options, option, getattr(options, option) or kept.made[option])
        # of a job that was adopted, what its words set is the word of a YAML, not of this person
        words = Words(family, [stage], profile, (kept.made["overrides"] if run.origin else []) + new)
        one = Launch(words, stage, options, options.dry_run or options.json, kept=kept)
    if not run.origin and not (options.dry_run or options.json):  # adopted: it may be another person's
        screen.show(one, "", False)
    return go([one], [stage], options)


def run_stages(launches, stages, options):
    if options.detach and len(launches) > 1:
        return submit_chain(launches, options)
    for number, one in enumerate(launches):
        left = stages[number:]
        try:
            run, submitting = submit(one, options)
            code = 0 if options.detach else commands.follow(run, (one.took, submitting))
            if not code:
                left = stages[number + 1:]
            if run.ended and run.ended[0] == "done":
                left = []
                continue
            return code
        finally:
            if len(launches) > 1 and left:
                print("to continue from here: %s" % screen.plain(command_line(options, left, one.profile.name)))
    return 0


def submit_chain(launches, options):
    """Submit all stages now, each to begin when the one before it has succeeded; all of them or none."""
    first = run = None
    try:
        for one in launches:
            run, _ = submit(one, options, run and run.id)
            first = first or run
    except BaseException:
        if first:
            with contextlib.redirect_stdout(sys.stderr):  # nobody may read the other one any more
                print("not all stages could be submitted, so those that were are cancelled:")
                commands.end(first)
        raise
    return 0


def command_line(options, stages, profile):
    """The command line that launches these stages with the same options."""
    names = [word for word in options.words if "=" not in word]
    words = [names[0], ",".join(stages), profile] + [word for word in options.words if "=" in word]
    words += [word for config in options.config or [] for word in ("--config", config)]
    for option in ("nodes", "name", "repo_root", "rank"):
        if getattr(options, option) is not None:
            words += ["--" + option.replace("_", "-"), str(getattr(options, option))]
    words += ["--all-ranks"] * options.all_ranks + ["--debug"] * options.debug + ["--"] * bool(options.args)
    return "python launch.py " + " ".join(map(shlex.quote, words + options.args))


def submit(launch, options, after=None):
    """Start the job, or have it start after another run; returns (its run, the seconds that it took)."""
    job, plan, begun = launch.job, launch.plan, time.time()
    print(screen.plain("%s on %s: %s, %d files of %s, %s, sha256 %s, run %s" % (
        job.name, launch.profile.name, screen.shape(job), plan.files, launch.source, transport.human(len(plan.tar)),
        plan.digest[:12], job.run_id)))
    print(screen.plain("profile from %s" % ", ".join(launch.profile.files)))
    for note in launch.notes() + commands.beside(job, launch.profile.name):
        screen.note(note)
    sys.stdout.flush()
    every = job.executor == "local" and options.rank is None  # on this machine, all ranks are shown
    run = runs.Run(job.run_id, job.name, launch.profile.name, job.executor, job.nodes, plan.digest, begun,
                   retries=job.description["retries"], outputs=launch.outputs, origin=launch.origin,
                   ranks=list(range(job.nodes)) if every else commands.chosen(options, job.nodes),
                   carries=runs.fingerprints(launch.tree), after=after, came=launch.came(),
                   notify=None if options.detach else job.settings.get("notify"))
    if options.detach and job.settings.get("notify") and job.executor != "slurm":
        screen.note("notify has no effect: with --detach nobody is here when the job ends")
    for problem in filter(None, [archive.keep(launch.packed)]):
        screen.note(problem)
    try:
        backends.backend(job.executor).submit(run, job, plan, not options.detach)
    except Refusal as refusal:
        if refusal.code != 5:  # after a broken connection the job may exist
            run.forget()
        raise
    if options.detach:
        print("%s; to follow it: python launch.py logs -f %s" % (
            "starts when run %s has succeeded" % after if after else "started", job.run_id))
    return run, time.time() - begun


# ---------------------------------------------------------------- the table of commands


Option = collections.namedtuple("Option", "flags takes about kind")  # takes: "" for a flag without a value
OPTIONS = {
    "config": Option(("-c", "--config"), "CONFIG", "another config: name or path; STAGE=CONFIG for one stage", list),
    "nodes": Option(("--nodes",), "N", "number of nodes, one pod each", int),
    "name": Option(("--name",), "NAME", "the experiment: its outputs go to <workspace>/NAME, and only it resumes", str),
    "repo_root": Option(("--repo-root",), "DIR", "the source tree that is packed", Path),
    "dry_run": Option(("--dry-run",), "", "resolve and show everything, submit nothing", None),
    "show_config": Option(("--show-config",), "", "a dry run that prints the compiled config, too", None),
    "json": Option(("--json",), "", "print JSON; a launch becomes a dry run", None),
    "detach": Option(("--detach",), "", "return as soon as the job is submitted", None),
    "follow": Option(("-f", "--follow"), "", "follow the log to the end of the job; exit code 1 if it fails", None),
    "rank": Option(("--rank",), "N", "show the log of this rank (0)", int),
    "all_ranks": Option(("--all-ranks",), "", "show the logs of all ranks", None),
    "download": Option(("--download",), "DIR", "write the log of each rank to a file of its own there", Path),
    "outputs": Option(("--outputs",), "PATTERN", "copy outputs whose path fits, in place of tree and config", str),
    "args": Option(("--",), "ARGS...", "arguments for the recipe's script", None),
    "stat": Option(("--stat",), "", "name the files, without their lines", None),
    "verbose": Option(("--verbose",), "", "print each request, ssh command and slow import with its time", None),
    "debug": Option(("--debug",), "", "print the traceback of an error", None),
}
ALWAYS = ("verbose", "debug")  # options of every command
SELECTING = ("config", "nodes", "name", "repo_root")  # options that say what is launched

Command = collections.namedtuple("Command", "function words options about")  # options: keys of OPTIONS, besides ALWAYS
COMMANDS = {
    "launch": Command(launch, "FAMILY STAGE [PROFILE] [KEY=VALUE ...]", SELECTING + (
        "dry_run", "show_config", "json", "detach", "rank", "all_ranks", "args"),
        "launch a recipe (on the profile local by default)"),
    "list": Command(commands.list_recipes, "[FAMILY]", ("repo_root", "json"), "list the recipes of the source tree"),
    "profiles": Command(commands.list_profiles, "", ("json",), "list the profiles, the places to run them"),
    "files": Command(commands.files, "FAMILY STAGE [PROFILE]", SELECTING + ("json", "args"),
                     "list the files that would be sent, and those left out"),
    "check": Command(commands.check, "[FAMILY STAGE] PROFILE", SELECTING + ("json", "args"),
                     "check whether a launch can be expected to work"),
    "allow": Command(commands.allow, "[FILE]", (), "say that an env.toml is yours: the next one upwards, or FILE"),
    "status": Command(commands.status, "[RUN]", ("json",), "show the state of your runs"),
    "logs": Command(commands.logs, "RUN", ("follow", "rank", "all_ranks", "download"), "print the log of a run"),
    "cancel": Command(commands.cancel, "RUN", (), "end a run"),
    "again": Command(again, "RUN [PROFILE] [KEY=VALUE ...]", (
        "nodes", "name", "dry_run", "show_config", "json", "detach", "rank", "all_ranks", "args"),
        "launch the tree and config of a run once more"),
    "fetch": Command(commands.fetch, "RUN DIR", ("outputs",), "write the tree and config of a run to a new folder"),
    "adopt": Command(commands.adopt, "PROFILE [NAME]", (),
                     "make the run of a job that is on its platform; without NAME, list them"),
    "diff": Command(commands.diff, "RUN [RUN]", ("repo_root", "stat", "json"),
                    "compare a run with what lies here, or with another"),
}
LAUNCH_HELP = """\
STAGE is the rest of the recipe's name, like sft or data/prep/rl; stages with commas between them, like
data/prep/sft,sft, run in order, each as its own job. KEY=VALUE overrides the recipe's config.
Without --detach the launcher follows the job; Ctrl-C detaches, or ends the job on this machine."""
EXIT_CODES = """\
Exit codes: 0 done, 1 the job failed, 2 bad usage, profile, recipe or config, 3 the payload does not fit,
4 the platform refused, 5 the platform could not be reached."""


# ---------------------------------------------------------------- the command line


def overview():
    """The text of `--help`."""
    lines = ["python launch.py %s" % COMMANDS["launch"].words, ""]
    for name, command in COMMANDS.items():
        usage = command.words if name == "launch" else (name + " " + command.words).rstrip()
        lines.append("  %-40s %s" % (usage, command.about))
    return "\n".join(lines + ["", "COMMAND --help shows the options of a command; launch --help those of a launch.",
                              EXIT_CODES, ""])


def detail(name):
    """The text of `COMMAND --help`."""
    command = COMMANDS[name]
    words = [command.words] if name == "launch" else [name, command.words]
    lines = ["python launch.py " + " ".join(filter(None, words + ["[options]"])), command.about, ""]
    for option in (OPTIONS[key] for key in command.options + ALWAYS):
        lines.append("  %-22s %s" % ((", ".join(option.flags) + " " + option.takes).strip(), option.about))
    return "\n".join(lines + (["", LAUNCH_HELP, ""] if name == "launch" else [""]))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: ([^ =]+)", message)
        number = re.match(r"argument (--nodes|--rank): invalid int value: (.*)", message)
        lacks = re.match(r"argument (?:-c/)?(--[a-z-]+): expected one argument", message)
        if unknown and unknown.group(1) in ("--run", "--batch"):
            raise Refusal("there is no option %s: the profile is the word behind the stage" % unknown.group(1),
                          "write: python launch.py FAMILY STAGE PROFILE%s" % (" --detach" * ("b" in unknown.group(1))))
        if unknown:
            flags = [option.flags[-1] for name, option in OPTIONS.items() if name != "args"]
            close = difflib.get_close_matches(unknown.group(1), flags, 1, 0.61)
            raise Refusal("there is no option %s" % unknown.group(1), "did you mean %s?" % close[0] if close else
                          "overrides are KEY=VALUE without dashes; --help shows the options")
        if number:
            least = 1 if number.group(1) == "--nodes" else 0
            raise Refusal("%s is %s" % number.groups(), "it must be a whole number, %d or more" % least)
        if lacks:
            raise Refusal("%s needs a value" % lacks.group(1), "write it after the option, like: --nodes 2, -c default")
        raise Refusal(message, "see python launch.py --help")


def parse(argv):
    """(the command's name, its options). Raises Refusal for words and options that do not fit."""
    script_args = argv[argv.index("--") + 1:] if "--" in argv else []
    words = argv[: argv.index("--")] if "--" in argv else argv
    parser = Parser(prog="launch.py", allow_abbrev=False, add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    for name, option in OPTIONS.items():
        if option.kind is list:
            parser.add_argument(*option.flags, action="append", dest=name)
        elif option.takes and name != "args":
            parser.add_argument(*option.flags, type=option.kind, dest=name)
        elif name != "args":
            parser.add_argument(*option.flags, action="store_true", dest=name)
    options = parser.parse_intermixed_args(words)
    options.args = script_args
    name = options.words[0] if options.words and options.words[0] in COMMANDS else "launch"
    if options.help:
        return (name if options.words else ""), options
    if not options.words:
        raise Refusal("no recipe was named", "python launch.py list shows them; --help shows all commands")
    options.words = options.words[0 if options.words[0] != name else 1:]
    for each in OPTIONS:
        if getattr(options, each) not in (None, False, []) and each not in COMMANDS[name].options + ALWAYS:
            raise Refusal("%s does not take %s" % (name, OPTIONS[each].flags[-1]), "leave it out")
    if options.nodes is not None and options.nodes < 1:
        raise Refusal("--nodes is %d" % options.nodes, "it must be a whole number, 1 or more")
    if options.rank is not None and options.all_ranks:
        raise Refusal("--rank and --all-ranks cannot be combined", "leave one out")
    return name, options


def utf8(word):
    """A word of the command line, decoded as UTF-8 whatever the locale. Raises Refusal for other bytes."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        pass
    raise Refusal("the word %s is not UTF-8" % ascii(word), "write it in UTF-8")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    code = 0
    try:
        name, options = parse([utf8(word) for word in argv])
        if options.help:
            print(detail(name) if name else overview(), end="")
        else:
            screen.VERBOSE = options.verbose or bool(os.environ.get("AIRLIFT_DEBUG"))
            profiles.BESIDE[:] = [options.repo_root / "env.toml"] if options.repo_root else []
            code = COMMANDS[name].function(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `launch.py list | head`
        pass
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv[: argv.index("--") if "--" in argv else None]:
            sys.stderr.write("".join(screen.plain(line) + "\n" for line in traceback.format_exc().split("\n")))
        what, fix, code = explained(error)
        screen.complain(one_line(what), one_line(fix))
    try:
        sys.stdout.flush()
    except OSError:  # the reader is gone, or the disk is full; Python would try again at exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def explained(error):
    """(what is wrong, how to fix it, the exit code) of an error."""
    if isinstance(error, Refusal):
        return error.what, error.fix, error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "python launch.py status shows what was started", 130
    if isinstance(error, ImportError):
        return "a library cannot be imported by %s: %s" % (sys.executable, error), (
            "make setup, or pip install -r requirements.txt with that Python"), 2
    if isinstance(error, OSError):
        name = "%s: " % error.filename if error.filename else ""
        return name + (error.strerror or str(error)), "check that it exists, its permissions, and the space on disk", 2
    return "a bug: %r" % error, "please report it with the traceback that --debug shows", 2


def leave(code):
    """End the process at once: the SDKs take a second for their clean-up at exit, which is not needed."""
    if "backends.common.ssh" in sys.modules:
        sys.modules["backends.common.ssh"].close()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # A path with letters that the locale lacks must not make a message fail.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    leave(main())
