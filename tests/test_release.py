"""What is published: README's links on a package index, the changelog's form, the workflows and the forms of issues."""

from __future__ import annotations

import configparser
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

from msgdrop_numba import __version__

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/someone/msgdrop_numba"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
links = runpy.run_path(str(ROOT / ".ci/links"))["main"]


@pytest.fixture
def copy(tmp_path):
    """The repository's files, of which README.md and setup.cfg may be changed."""
    for path in ROOT.iterdir():
        if path.name in ("README.md", "setup.cfg"):
            (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        elif not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_an_index_shows_readme_as_it_is_here(copy):
    before = (copy / "README.md").read_text()
    links(str(copy), ADDRESS, "abc123")
    after = (copy / "README.md").read_text()
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", after)
    assert len(found) == len(re.findall(r"\]\(", before))
    assert all(target.startswith("https://") for _, target in found)
    pictures = [target for mark, target in found if mark]
    assert pictures == [f"{ADDRESS}/raw/abc123/benchmarks/results/demo.png"]
    assert f"{ADDRESS}/blob/abc123/msgdrop_numba/LIMITS.md#devices" in after
    for kind in ("raw", "blob"):
        after = after.replace(f"{ADDRESS}/{kind}/abc123/", "")
    assert after == before
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(copy / "setup.cfg")
    assert setup["metadata"]["url"] == ADDRESS
    assert setup["metadata"]["name"] == "msgdrop_numba"


def test_what_would_lead_nowhere_is_refused(copy):
    with pytest.raises(SystemExit, match="must begin with https://"):
        links(str(copy), "git@example.org:x", "abc123")
    (copy / "README.md").write_text("![x](nothing.png)")
    with pytest.raises(SystemExit, match=r"links to nothing\.png, which isn't there"):
        links(str(copy), ADDRESS, "abc123")
    (copy / "README.md").write_text("")
    links(str(copy), ADDRESS, "abc123")
    with pytest.raises(SystemExit, match="names an address already"):
        links(str(copy), ADDRESS, "abc123")


def test_the_changelog_has_the_form_that_tools_read():
    """That of https://keepachangelog.com/en/1.1.0: versions with their dates, newest first, changes by kind."""
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    heads = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    versions = [re.fullmatch(r"\[(Unreleased|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)\]?", head) for head in heads]
    assert all(versions)
    numbers = [tuple(map(int, re.findall(r"\d+", head)[:3])) for head in heads if "Unreleased" not in head]
    assert numbers == sorted(numbers, reverse=True)
    assert __version__ in [".".join(map(str, number)) for number in numbers]
    kinds = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert kinds
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        assert section.lstrip().startswith("### "), "each change stands below its kind"


def test_workflows_run_what_is_there():
    assert WORKFLOWS.keys() == {"ci", "release"}
    steps = [step for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job.get("steps", [])]
    for script in re.findall(r"\.ci/\w+", str(steps)):
        assert os.access(ROOT / script, os.X_OK), script
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    newest = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])[-1]
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    jobs = WORKFLOWS["ci"]["jobs"]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == [oldest, newest]
    assert {name.partition("-")[0] for name in jobs["newest"]["strategy"]["matrix"]["os"]} == {
        "ubuntu",
        "macos",
        "windows",
    }
    assert [step["with"]["python-version"] for step in jobs["oldest"]["steps"] if "with" in step] == [oldest]


@pytest.mark.processes
def test_a_release_is_tested_and_needs_no_password():
    jobs, text = WORKFLOWS["release"]["jobs"], (ROOT / ".github/workflows/release.yml").read_text()
    assert jobs["publish"]["needs"] == "ci"
    assert jobs["ci"] == {"needs": "version", "uses": "./.github/workflows/ci.yml"}
    assert "workflow_call" in WORKFLOWS["ci"][True]  # YAML 1.1 reads `on` as true
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets" not in text
    assert "password:" not in text
    uploaded, downloaded = (
        [step["with"]["name"] for step in job["steps"] if "artifact" in step.get("uses", "")]
        for job in (WORKFLOWS["ci"]["jobs"]["wheel"], jobs["publish"])
    )
    assert uploaded == downloaded == ["dist"]
    check = jobs["version"]["steps"][1]["run"]
    for tag, code in ((f"v{__version__}", 0), ("v0.0.0", 1)):
        done = subprocess.run(["sh", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}, check=False)
        assert done.returncode == code


def test_the_forms_of_issues_ask_for_what_is_needed():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert forms.pop("config") == {"blank_issues_enabled": True}
    for form in forms.values():
        assert {"name", "description", "body"} <= form.keys()
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields)
        assert any(field.get("validations", {}).get("required") for field in form["body"])


@pytest.mark.processes
@pytest.mark.long
def test_the_wheel(tmp_path):
    """Needs a package index."""
    done = subprocess.run(
        ["bash", ".ci/wheel", tmp_path, ADDRESS], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gz", ".whl"]
    assert done.stdout.count("PASSED") == 2
    assert "# runs, without torch" in done.stdout
