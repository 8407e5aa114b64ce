"""What a person sees: tables, times, budgets and colours, and a dry run as text or as JSON.

Colours are used only on a terminal, and not if NO_COLOR is set (no-color.org) or TERM is dumb.
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import transport

if TYPE_CHECKING:
    from backends import Status
    from jobs import Job
    from prepare import Launch
    from runs import Run

CODES = {"red": 31, "green": 32, "yellow": 33, "cyan": 36, "dim": 2, "bold": 1}
COLOURS = {"waiting": "yellow", "running": "cyan", "done": "green", "failed": "red", "cancelled": "yellow",
           "unknown": "yellow", "ok": "green", "warning": "yellow", "failure": "red"}


def paint(text: str, how: str, stream: IO[str] | None = None) -> str:
    """The text in a colour or weight, where `stream` (standard output by default) can show colours."""
    stream = stream or sys.stdout
    plain = os.environ.get("NO_COLOR") or not _is_terminal(stream)
    return text if plain or how not in CODES else "\033[%dm%s\033[0m" % (CODES[how], text)


def _is_terminal(stream: IO[str]) -> bool:
    """Whether the stream is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def progress(line: str, before: str) -> str:
    """On a terminal, replace the progress line `before` with `line`, cut to the width ("" removes it). Returns it."""
    if line != before and _is_terminal(sys.stdout):
        width = shutil.get_terminal_size().columns - 1
        print("\r%s\033[K" % "".join(c for c in line if c.isprintable())[:width], end="", flush=True)
    return line


def state(word: str, width: int = 0) -> str:
    """A state, or the result of a check, in its colour."""
    return paint(word, COLOURS.get(word, "")) + " " * (width - len(word))


def status_line(status: "Status", run: "Run") -> str:
    """A line of the follow view: the state, the platform's detail, and the time since the launch."""
    detail = " (%s)" % plain(status.detail) if status.detail else ""
    after = "" if run.ended else " after " + span(time.time() - run.started)
    return "-- %s%s%s" % (state(status.state), detail, after)


def complain(what: str, fix: str) -> None:
    """An error's two lines, on standard error."""
    first, second = plain(what)[:LONGEST], plain(fix)[:LONGEST]
    print("%s %s\n%s" % (paint("airlift:", "red", sys.stderr), first, second), file=sys.stderr)


def note(text: str) -> None:
    print("%s %s" % (paint("note:", "yellow"), plain(text)))


def rank(number: str | int) -> str:
    """The prefix of a log line where the logs of several ranks are shown."""
    return paint("[%s]" % number, "dim") + " "


def table(rows: Sequence[Sequence[str]], coloured: int = -1) -> str:
    """Rows as aligned columns, the first row as heading; the column `coloured` contains states."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [state(cell, width) if number and column == coloured else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        line = "  ".join(cells).rstrip()
        lines.append(line if number else paint(line, "dim"))
    return "\n".join(lines)


def run_table(rows: list[dict[str, Any]]) -> str:
    """The table of `status`."""
    lines = [("RUN", "STATE", "AGE", "RECIPE", "PROFILE", "NODES", "DETAIL")]
    for row in rows:
        details = ("" if row["detail"] == "exit code 0" else row["detail"],
                   "exit code %s" % row["job_exit_code"] if row["job_exit_code"] else "",
                   "after " + row["after"] if row["after"] else "")
        detail = "; ".join(dict.fromkeys(filter(None, details)))
        lines.append((row["run"], row["state"], span(row["age_s"]), row["recipe"], row["profile"], str(row["nodes"]),
                      detail))
    return table(lines, 1)


def span(seconds: float) -> str:
    """Seconds as 4 s, 3 min 20 s, 2 h 5 min or 3 d 4 h."""
    whole = max(0, int(seconds + 0.5))
    for big, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // part
            return "%d %s" % (whole // size, big) + (" %d %s" % (rest, small) if rest else "")
    return "%d s" % whole


def shape(job: "Job") -> str:
    nodes = "1 node" if job.nodes == 1 else "%d nodes" % job.nodes
    return nodes + (" x %s GPUs" % job.gpus_per_node if job.gpus_per_node else ", CPU only")


def times(run: "Run", packing: float, submitting: float, now: float) -> str:
    """How the time of a launch was spent. A short job may have ended before it was seen running."""
    begun, sent = run.running_since, run.started + submitting
    parts = [("packing", packing), ("submitting", submitting)]
    parts += [("waiting", begun - sent), ("running", now - begun)] if begun else [("waiting and running", now - sent)]
    return ", ".join("%s %s" % (name, "%.1f s" % max(0.0, took) if took < 10 else span(took)) for name, took in parts)


LONGEST = 4_000  # characters of one line of an error: names in a server's answer may fill megabytes


def one_line(text: str) -> str:
    return " ".join(text.split())


def plain(text: str) -> str:
    """`text` as a person may see it who did not write it: without secrets, and with control characters, escape
    sequences and what reverses the order of letters as \\x1b or \\u202e. Only a job's own log is passed on as it is."""
    text = hide(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def said(text: str) -> str:
    """What a server said, as a part of a line: secrets go before the text is cut, and so do long words, which are
    parts of what was sent to it."""
    text = one_line(hide(text)[:10_000])
    return re.sub(r"[\w+/=-]{120,}", lambda word: "<%d characters>" % len(word.group()), text)[:300]


VERBOSE = False  # set by --verbose


@contextlib.contextmanager
def step(doing: str) -> Iterator[None]:
    """With --verbose, print a line before and one after a request, an ssh command or a slow import, with its time."""
    if not VERBOSE:
        yield
        return
    begun, shown = time.monotonic(), plain(one_line(doing))
    _tell(shown)
    try:
        yield
    finally:
        _tell("%s: %.2f s" % (shown, time.monotonic() - begun))


def _tell(line: str) -> None:
    """One write: several logs are read at once, each by its own thread."""
    sys.stderr.write("%s %s\n" % (time.strftime("%H:%M:%S"), line))
    sys.stderr.flush()


def budget(name: str, used: int, limit: int) -> str:
    """A budget as a bar of 20 characters; red where it is exceeded."""
    filled = min(20, -(-used * 20 // limit))
    colour = "red" if used > limit else "yellow" if used > 0.8 * limit else "green"
    size, most = (transport.human(count) if limit >= 65536 else str(count) for count in (used, limit))
    return "%-12s|%s%s| %3d %% of %s (%s)" % (
        name, paint("#" * filled, colour), "." * (20 - filled), -(-used * 100 // limit), most, size)


def show(launch: "Launch", refused: str, config: bool = False) -> None:
    """Print the dry run of a launch, with its config or without; `refused` says why it would be refused, "" if not."""
    job, plan = launch.job, launch.plan
    head = "%s on %s (%s)" % (job.name, launch.profile.name, job.executor)
    print("%s: %s, %s" % (paint(head, "bold"), shape(job), job.description["launch"]))
    rows = [
        ("script", "%s/%s" % (launch.source, job.description["script"])), ("config", str(launch.config.path)),
        ("profile", ", ".join(launch.profile.files)), ("image", "" if job.executor == "local" else job.image),
        ("command", job.description["command"]), ("outputs", job.description["run_root"]),
        ("ships", "%d files, %s as %s, %s, sha256 %s" % (
            plan.files, transport.human(len(plan.tar)), plan.compression,
            "1 chunk" if plan.chunks == 1 else "%d chunks" % plan.chunks, plan.digest[:16])),
    ]
    rows = [(label, plain(value or "")) for label, value in rows]
    rows += [("" if number else "budgets", budget(*one)) for number, one in enumerate(plan.budgets)]
    env = [pair for pair in sorted(shown_env(launch).items()) if not pair[0].startswith("AIRLIFT_")]
    rows += [("env", plain("%s=%s" % pair)) for pair in env]
    rows += [("note", plain(note)) for note in [*filter(None, [refused]), *launch.notes()]]
    for label, value in rows:
        if value:
            print("  %s%s" % (paint("%-9s" % label, "yellow" if label == "note" else "dim"), value))
    if config:
        print("\n".join(map(plain, launch.config.shown.rstrip("\n").split("\n"))))
    print("nothing was submitted")


def as_json(launch: "Launch", refused: str) -> dict[str, Any]:
    """The dry run as an object for JSON; scripts read it, so its keys stay."""
    job, plan = launch.job, launch.plan
    env_bytes, env_limit = plan.budget("environment")
    object_bytes, object_limit = plan.budget("API object")
    text = launch.config.text.encode()
    return {
        "recipe": {"name": job.name, "script": job.description["script"], "launch": job.description["launch"],
                   "nodes": job.nodes, "gpus_per_node": job.gpus_per_node, "nproc_per_node": job.nproc,
                   "image": job.image and hide(job.image)},
        "profile": {"name": launch.profile.name, "executor": job.executor, "files": list(launch.profile.files)},
        "config": {"path": str(launch.config.path), "sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text),
                   "text": hide(launch.config.shown)},
        "payload": {"files": plan.files, "tar_bytes": len(plan.tar), "encoded_chars": -(-len(plan.tar) // 3) * 4,
                    "sha256": plan.digest, "compression": plan.compression, "chunks": plan.chunks,
                    "chunk_limit": plan.chunk_limit or None, "env_bytes": env_bytes, "env_limit": env_limit,
                    "object_bytes": object_bytes or None, "object_limit": object_limit or None, "fits": plan.fits},
        "env": shown_env(launch), "argv": plan.argv, "command": hide(job.description["command"]),
        "notes": [hide(note) for note in [*filter(None, [refused]), *launch.notes()]],
    }


# Names of variables and of config keys, as words_like_this: what belongs to models and data, like the tokens of a
# vocabulary, or only tells about a secret; and secrets.
HARMLESS = re.compile(r"""(?:^|_)(?:(?:[be]o[a-su-z]|eot|pad(?:ding)?|unk|mask|cls|sep|special|stop|start|end|begin|next
    |prev|last|first|per|num|number|n|max|min|any|prompt|think(?:ing)?|reasoning|tool|call|assistant|im|image|img|video
    |audio|vision|text|fim|prefix|suffix|middle|placeholder|extra|added|turn|target|draft|word|sub|byte|by|single|multi
    |context|newline|response|loss|seq|query|output|input|generated|page|continuation|patch|null|empty|answer|role|space
    |time(?:stamp)?|lang(?:uage)?|unused|reserved|delimiter|sampled)_token|token_(?:ids?|drop|shift|mix|merg|rout|prun|emb
    |per|wise|group|batch|by)[a-z]*|(?:forward|backward|first|second|single|two|multi|one|last|num|per|all|test)_pass
    )(?=_|$)|.*_(?:paths?|files?|dir|folder|names?|env|var|type|kind|mode|class|order|len|length|size|count|limit|level
    |loss|rate|ratio|ttl|timeout|expir\w+|format|policy|(?<!webhook_)url|endpoint|host|port|header|field|version|enabled
    |required|strategy|method|provider|store|manager|backend|budget|weights?|sock)$""", re.VERBOSE)
SECRET = re.compile(r"""pass_?(?:word|wd|phrase|code)(?!less)|secret(?!ar|ion)|credential
    |(?:^|_)(?:auth|access|api|hf|gh|git|bearer|refresh|id|session|csrf|bot|user|slack|wandb)?token(?:_|\d|$)
    |(?:^|_)(?:api|access|auth|bearer|refresh|hf)_tokens
    |(?:^|_)(?:api|access|private|ssh|sign(?:ing)?|(?:en|de)crypt(?:ion)?|master|service|account|auth|admin|shared|app|hmac
        |consumer|deploy|license|webhook|openai|nvidia|ngc|wandb|hf|github|aws|azure|gcp)_?keys?(?:_|\d|$)
    |(?:(?:^|_|db|user|admin|root|sql|pg|redis|smtp|ftp|proxy)(?:pass|pwd|pw)|[a-z]_(?:pat|sas)|(?:^|_)(?:o?auth|jwt|dsn
        |authorization|cookies?|bearer|otp|conn(?:ection)?_?str(?:ing)?|webhook(?:_url)?|auth_config))
        (?:_?v?\d+|_(?:prod|dev|test|staging|old|new))?$""", re.VERBOSE)
# What no secret is: a switch, and what stands for a value.
OPEN = re.compile(r"(?i:true|false|yes|no|none|null|[01]?)|<unset [^>]*>|\$\{[^}]*\}|\$\w+|\.\.\.|\*+|env"
                  r"|(?:lepton|runai):\S+")


@functools.cache
def secret_name(name: str) -> bool:
    """Whether a variable, or a key of a config, has by its name a secret for a value."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+", "_", name).lower().strip("_")
    return name != "PWD" and bool(SECRET.search(HARMLESS.sub("", words)))


def masked(value: Any, named: bool = False) -> Any:
    """A table with *** for what is `named` like a secret, itself or what it lies in; hide() knows it from then on."""
    if isinstance(value, dict):
        return {key: masked(item, named or secret_name(str(key if key != "value" else value.get("name", key))))
                for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item, named) for item in value]
    if not named or isinstance(value, float) or OPEN.fullmatch(str(value)):
        return value
    conceal(str(value))
    return "***"


def shown_env(launch: "Launch") -> dict[str, str]:
    """The environment of the pods, Airlift's and the recipe's: secrets as ***, chunks by their length."""
    sent = launch.job.description
    env = sent["defaults"] | launch.plan.env | sent["env"]
    env.update((name, "***") for name in launch.job.secrets if not env.get(name, "").startswith("<unset "))
    for name, value in env.items():
        if re.match(r"AIRLIFT_[A-Z]+_\d+$", name):
            env[name] = "<%d characters>" % len(value)
        else:
            env[name] = hide(masked({name: value})[name])
    return env


CONCEALED: set[str] = set()  # secrets of the profile, tokens, and other forms of them
# Who logs in, in a URL of any scheme. A password may hold @, and / after a colon that no port follows; their lengths
# have a bound, so that a server's answer of megabytes is searched in little time.
IN_URL = re.compile(r"(://)(?:[^/\s\"'<>:@]{0,99}:(?!\d+/)[^\s\"'<>]{1,99}|[^/\s\"'<>]{1,999})@")
# NAME=VALUE, --name VALUE and "name": "VALUE"; a shell writes ' within '...' as '"'"'.
ASSIGNED = re.compile(r"""(?<![\w-])(?P<before>(?P<open>["'])?(?P<dash>--?)?(?P<name>[A-Za-z_][\w.-]*+)
    (?:=|(?P<json>["']\s?:\s?)|(?(dash)\s+|(?!))))(?P<value>\*{3}|<unset\ [^>]*>|(?:"[^"]*"|'[^']*')+
    |(?(json)[^\s,}\]]+|(?(open)[^"']*(?:'"'"'[^"']*)*|[^\s&;]+)))""", re.VERBOSE)
SHAPE = re.compile(transport.CREDENTIAL_SHAPE.pattern.decode())


def conceal(*values: str | None) -> None:
    """Add secrets that hide() replaces, and the forms in which a server may repeat them."""
    for value in values:
        if value and not OPEN.fullmatch(value):
            CONCEALED.update(forms(value))


@functools.lru_cache(1024)
def forms(value: str) -> frozenset[str]:
    """`value`, and from 8 characters on its lines, and each in JSON, in a URL, and in the base64 of any text that it
    stands in."""
    lines = [line.strip() for line in value.splitlines() if len(line.strip()) >= 8]
    return frozenset(itertools.chain([value], *map(_forms, {value, *lines} if len(value) >= 8 else ())))


def _forms(value: str) -> Iterator[str]:
    yield value
    yield repr(value)[1:-1]
    for ascii_only in (True, False):
        once = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        yield from (once, json.dumps(once)[1:-1])  # JSON in JSON, too
    yield from (urllib.parse.quote(value), urllib.parse.quote(value, ""), urllib.parse.quote_plus(value))
    for before, shared in enumerate((0, 2, 3)):  # bytes before it, and characters that hold bits of them
        data = b"-" * before + value.encode("utf-8", "surrogateescape")
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(data).decode()[shared:len(data) * 8 // 6]


def hide(text: str) -> str:
    """`text` with *** for concealed secrets, for what looks like a credential, and for the value of any variable here
    that is named like a secret: a profile may have copied it with ${env:NAME} into another variable, or a command."""
    named = [forms(value) for name, value in os.environ.items() if secret_name(name)]
    for form in sorted(CONCEALED.union(*named), key=len, reverse=True):
        if len(form) >= 8:
            text = text.replace(form, "***")
        elif len(form) >= 4 and text == form:
            text = "***"
    text = ASSIGNED.sub(lambda found: found.group() if not secret_name(found.group("name")) or OPEN.fullmatch(
        found.group("value").strip("\"'")) else found.group("before") + "***", text)
    return SHAPE.sub("***", IN_URL.sub(r"\1***@", text))
