"""What runs leave out: rotation, tables, and what is said of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiers
from tiers import ABOUT, CLIENT, REPO, SHARES, TABLES, TESTS, choose, functions, older_than_code, sections, touched

IDS = [
    *(f"tests/boot/test_boot.py::test_{n}[k]" for n in range(38)),
    *(f"tests/lab/test_events.py::test_{n}" for n in range(15)),
    *(f"tests/lab/test_matrix.py::test_matrix[{n}]" for n in range(56)),
]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    return tmp_path


def git(repo: Path, *argv: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", repo, *who, *argv], check=True, capture_output=True)


def commit(repo: Path, **files: str) -> None:
    for name, text in files.items():
        path = repo / name.replace("__", "/").replace("_py", ".py").replace("_md", ".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "--allow-empty", "-m", "x")


def test_ten_turns_have_run_every_row() -> None:
    turns = [choose(IDS, number, set()) for number in range(7, 7 + SHARES)]
    assert set().union(*turns) == set(IDS)
    assert sum(map(len, turns)) == len(IDS)
    for kind in {tiers.kind_of(row) for row in IDS}:
        sizes = {sum(row.startswith(kind) for row in turn) for turn in turns}
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@pytest.mark.parametrize(
    ("names", "also"),
    [
        ({"commit"}, {"test_matrix[power-commit]"}),
        ({"boots"}, {"test_panic[systemd-boot]"}),
        ({"test_panic"}, {"test_panic[systemd-boot]"}),
        ({"names"}, set()),
    ],
)
def test_rows_that_are_about_what_was_touched_always_run(names: set[str], also: set[str]) -> None:
    rows = [f"tests/boot/test_boot.py::test_{n}" for n in range(100, 110)]
    about = ["tests/lab/test_matrix.py::test_matrix[power-commit]", "tests/boot/test_boot.py::test_panic[systemd-boot]"]
    for number in range(SHARES):
        new = choose(rows + about, number, names) - choose(rows + about, number, set())
        assert {row.rpartition("::")[2] for row in new} <= also
    assert also <= {row.rpartition("::")[2] for row in choose(rows + about, 5, names)}


def test_what_the_last_commits_have_touched(repo: Path) -> None:
    client = ["# --- errors ---", "", "A = 1", "# --- commit ---", "", "def f(): ...", "def g(): ..."]
    test = "import os\n\n@mark\ndef test_one():\n    pass\n\ndef test_two():\n    pass\n"
    commit(repo, bento_client_py="\n".join(client), tests__boot__test_boot_py=test)
    assert touched(repo) == {name for names in ABOUT.values() for name in names}  # there is no history to tell
    for _ in range(tiers.LANDING):
        commit(repo)
    assert touched(repo) == set()
    commit(repo, bento_client_py="\n".join([*client[:5], *client[6:]]))
    assert touched(repo) == {"commit"}
    commit(repo, tests__boot__test_boot_py=test.replace("@mark", "@other"))
    assert touched(repo) == {"commit", "test_one"}
    for _ in range(tiers.LANDING):
        commit(repo)
    assert touched(repo) == set()
    (repo / CLIENT).write_text("\n".join(["", *client[:5], *client[6:]]))  # not committed yet; the line is above all sections
    assert touched(repo) == set()


def test_what_is_named_here_is_there() -> None:
    rows = [name for path in TESTS.rglob("test_*.py") if tiers.ROWS.match(str(path.relative_to(REPO))) for name in functions(path.read_text("utf-8"))]
    for part, about in ABOUT.items():
        assert part.partition("[")[0] in rows
        assert about <= sections((REPO / CLIENT).read_text("utf-8")).keys()
    assert [name for name in tiers.QUICK if not (TESTS / f"test_{name}.py").exists()] == []
    assert [name for names in TABLES.values() for name in names if not (REPO / name).exists()] == []


def test_a_table_that_is_older_than_its_code(repo: Path) -> None:
    table = next(iter(TABLES))
    commit(repo, bento_client_py="1")
    first = subprocess.check_output(["git", "-C", repo, "log", "-1", "--format=%h %cs", "--abbrev=8"], text=True).strip()
    commit(repo, tests__boot__table_md=f"| panic | {first} |\n| good | {first.replace(' ', '+ ')} |\n| x | deadbeef 2026-01-01 |\n")
    (repo / TABLES[table][2] / "x").write_text("as tests/boot, but not committed")
    assert older_than_code(table, repo) == ""
    commit(repo, README_md="1")
    commit(repo, bento_client_py="2")
    expected = f"{table}: 2 of 3 stamps are of older code, the oldest of {first.split()[0]} ({first.split()[1]}): tests/run --whole"
    assert older_than_code(table, repo) == expected


def test_failures_are_shown_when_they_happen(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_a():\n    print('said'); assert 1 == 2\n\ndef test_b():\n    pass\n")
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "tiers", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    path = f"{TESTS}:{Path(pytest.__file__).parents[1]}"
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    first, _, last = done.stdout.partition("test_b")
    assert "assert 1 == 2" in first and "said" in first
    assert "AssertionError" not in last and "FAILED" in last and "1 failed, 1 passed" in last
