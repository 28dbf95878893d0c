"""What a run of the tests leaves out, which it says at its end; and failures, which are shown when they happen.

Without a file's name and without --all it is QUICK: what any machine can run in a few minutes, and of that nothing that needs
root. Rows (the boots, the lab's matrix and its events) take hours: of them a run takes its commit's share, one of SHARES, and
those that the last commits are about. Whoever names rows (-k, ::) or says --whole gets all of these.
"""

import ast
import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
CLIENT = "bento_client.py"
SHARES = 10
# So many commits are looked at for what they touch: a landing is seldom longer.
LANDING = 10
# What is pure comes first.
QUICK = re.findall(
    r"\w+",
    """
    decisions formats causes settings settle bento_json command_line history fleet_nix views states status truth waves
    machine tiers add checks release publication prune parts contact model versions small_print download outages by_hand killed desktop
    way_back
    """,
)
ROWS = re.compile(r"tests/(boot|lab/test_matrix|lab/test_events)\b")
# (a part of) a row's id -> the sections of the client that it is about.
ABOUT = {
    "test_matrix[kill-fetch]": {"sftp", "fetch and build"},
    "test_matrix[server-build]": {"fetch and build"},
    "test_matrix[kill-activate]": {"activation: what can lose a machine", "journal and watchdog", "the attempt"},
    "test_matrix[power-prove]": {"proof", "the way back"},
    "test_matrix[power-commit]": {"commit", "boot loaders"},
    "test_matrix[kill-report]": {"reports"},
    "test_an_older_generation_that_a_person_picks": {"boots", "this machine"},
    "test_panic[systemd-boot]": {"boot loaders", "boots"},
    "test_panic[grub-ext4]": {"boot loaders"},
}
# A table -> the code that its rows show.
TABLES = {
    "tests/boot/table.md": (CLIENT, "utils/bento.nix", "tests/boot", "tests/toy"),
    "tests/lab/matrix.md": (CLIENT, "utils/bento.nix", "tests/lab", "tests/toy"),
    "tests/lab/events.md": (CLIENT, "utils/bento.nix", "tests/lab", "tests/toy"),
}

# Kind of row -> how many were left out; xdist's workers tell theirs.
left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bento", "Bento")
    group.addoption("--all", action="store_true", help="all files; and of the rows (boots, matrix, events) this commit's share")
    group.addoption("--whole", action="store_true", help="all rows as well, which takes hours, and writes their tables")
    group.addoption("--seed", type=int, help="where random histories and power cuts begin (default: where the commit says)")
    group.addoption("--walks", type=int, help="how many random histories (default: 2000; with --whole 20000)")
    group.addoption("--cuts", type=int, help="how many power cuts at random moments (default: 6; with --whole 100)")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    option.quick = not (option.all or option.whole or config.args_source is pytest.Config.ArgsSource.ARGS)
    option.seed = int(head()[:7], 16) if option.seed is None else option.seed
    option.walks = option.walks or (20_000 if option.whole else 200 if option.quick else 2_000)
    option.cuts = option.cuts or (100 if option.whole else 6)
    if option.quick:
        os.environ.setdefault("BENTO_TESTS", "quick")
    if reporter := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(AtOnce(config, reporter))
    if config.pluginmanager.has_plugin("xdist"):
        config.pluginmanager.register(Workers())


class AtOnce:
    """Failures are shown when they happen, and only then: the end of an hour is too late."""

    def __init__(self, config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
        self.writer = config.get_terminal_writer()
        reporter.summary_failures = reporter.summary_errors = lambda: None  # type: ignore[method-assign]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.show(report)

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.show(report)

    def show(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.writer.line()  # after the dots
        self.writer.sep("_", report.nodeid, red=True)
        report.toterminal(self.writer)
        for title, text in report.sections:
            self.writer.sep("-", title)
            self.writer.line(text.rstrip("\n"))
        self.writer.flush()


# --- what is left out ---


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.quick and (collection_path.name in ("lab", "boot") or collection_path.suffix == ".py"):
        return collection_path.stem.removeprefix("test_") not in QUICK or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        order = {name: number for number, name in enumerate(QUICK)}
        items.sort(key=lambda item: order[item.path.stem.removeprefix("test_")])
        items[:] = [item for item in items if item.path.stem != "test_model" or name_of(item.nodeid) == "test_random_histories"]
    if config.option.whole or config.option.keyword or any("::" in argument for argument in config.args):
        return
    rows = [item for item in items if ROWS.match(item.nodeid)]
    taken = choose([item.nodeid for item in rows], turn(), touched())
    spared = [item for item in rows if item.nodeid not in taken]
    if spared:
        left_out.update(kind_of(item.nodeid) for item in spared)
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in spared]


def kind_of(row: str) -> str:
    found = ROWS.match(row)
    assert found is not None
    return found[0]


def choose(rows: list[str], number: int, names: set[str]) -> set[str]:
    """The rows of this turn: of each kind every tenth, and those that are about these functions and sections."""
    taken = {row for row in rows if name_of(row) in names or any(part in row and ABOUT[part] & names for part in ABOUT)}
    for kind in {kind_of(row) for row in rows}:
        taken.update(sorted(row for row in rows if kind_of(row) == kind)[number % SHARES :: SHARES])
    return taken


def name_of(row: str) -> str:
    return row.rpartition("::")[2].partition("[")[0]


# --- the commit ---


def git(*argv: str, repo: Path = REPO) -> str:
    """What it says; nothing where it cannot."""
    try:
        return subprocess.run(["git", "-C", repo, *argv], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def head(repo: Path = REPO) -> str:
    return git("rev-parse", "HEAD", repo=repo) or "1"


def turn(repo: Path = REPO) -> int:
    """Ten commits that follow each other are ten turns; where the history is cut off, its commit's name has to do."""
    whole = git("rev-parse", "--is-shallow-repository", repo=repo) == "false"
    return int(git("rev-list", "--count", "HEAD", repo=repo)) if whole else int(head(repo)[:7], 16)


def touched(repo: Path = REPO) -> set[str]:
    """Functions of the tests and sections of the client that the last commits, or what is not committed yet, have changed.
    All sections, where the history does not say."""
    since = git("rev-parse", "--verify", "--quiet", f"HEAD~{LANDING}", repo=repo)
    if not since:
        return {name for names in ABOUT.values() for name in names}
    found: set[str] = set()
    for name in git("diff", "--name-only", since, "--", CLIENT, "tests/boot", "tests/lab", repo=repo).splitlines():
        if name.endswith(".py") and (repo / name).is_file():
            places = (sections if name == CLIENT else functions)((repo / name).read_text(encoding="utf-8"))
            changed = changed_lines(git("diff", "-U0", since, "--", name, repo=repo))
            found |= {place for place, lines in places.items() if changed & set(lines)}
    return found


def changed_lines(diff: str) -> set[int]:
    """Of the new file; where lines have only gone, the ones beside them."""
    changed: set[int] = set()
    for start, count in re.findall(r"(?m)^@@ -\S+ \+(\d+)(?:,(\d+))? @@", diff):
        changed |= set(range(int(start), int(start) + int(count or 1))) or {int(start), int(start) + 1}
    return changed


def functions(text: str) -> dict[str, range]:
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found[node.name] = range(first, (node.end_lineno or first) + 1)
    return found


def sections(text: str) -> dict[str, range]:
    lines = text.splitlines()
    marks = [(number, line[6:-4]) for number, line in enumerate(lines, 1) if re.fullmatch(r"# --- .* ---", line)]
    ends = [*(number for number, _ in marks[1:]), len(lines) + 1]
    return {name: range(number, end) for (number, name), end in zip(marks, ends, strict=True)}


# --- tables of results ---


@cache
def stamp() -> str:
    """The commit that a row of a table is of, and its day: `070f0b8 2026-11-26`, with a plus where more was changed."""
    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("log", "-1", f"--format=%h{changed} %cs", "--abbrev=7")


def older_than_code(table: str, repo: Path = REPO) -> str:
    """What to say of a table that has rows of older code than this; nothing where there are none."""
    stamps = re.findall(r"\b([0-9a-f]{7,40})\+? (\d{4}-\d\d-\d\d)\b", (repo / table).read_text(encoding="utf-8"))
    known = [(commit, day) for commit, day in stamps if git("cat-file", "-t", commit, repo=repo) == "commit"]
    newer = {commit: git("rev-list", "--count", f"{commit}..HEAD", "--", *TABLES[table], ":!*.md", repo=repo) for commit, _ in known}
    old = [(day, commit) for commit, day in known if newer[commit] != "0"]
    if not old:
        return ""
    day, commit = min(old)
    return f"{table}: {len(old)} of {len(stamps)} stamps are of older code, the oldest of {commit} ({day}): tests/run --whole"


# --- what is said at the end ---


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    for kind, number in sorted(left_out.items()):
        write(f"Not run: {number} rows of {kind}, which are other commits' turns. All of them: tests/run --whole {kind}")
    if config.option.quick:
        files = [path for path in TESTS.rglob("test_*.py") if path.stem.removeprefix("test_") not in QUICK]
        write(f"Not run: {len(files)} more files of tests (real Nix, sshd, chroots; hostile hosts and servers; booted containers; boot")
        write("loaders in QEMU), of the model its pairs of faults, and what needs root. All of it: tests/run --all, which says first what")
        write("it installs, and where.")


class Workers:
    """Only where pytest-xdist is: it knows of workers."""

    def pytest_testnodedown(self, node: object) -> None:
        told: dict[str, int] = getattr(node, "workeroutput", {}).get("left_out", {})
        for kind, number in told.items():
            left_out[kind] = max(left_out[kind], number)  # all of them have left out the same
