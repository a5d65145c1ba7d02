"""``report``: pages made again from stored reports, the committed ones among them, and every message."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from qsparse_moe.ablation.allocation.report import as_dict as sparsity_dict
from qsparse_moe.cli.app import run
from tests.ablation.page_contents import RESULTS, SETTINGS, joint_content, sensitivity_content
from tests.ablation.test_allocation_report import allocation as sparsity_allocation
from tests.ablation.test_joint_report import result
from tests.support.pages import read_page

GUIDE = (RESULTS.parent / "docs" / "sensitivity.md").read_text().replace("\\\n", " ")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^qsparse-moe report .*$", GUIDE, re.MULTILINE)]


def test_the_guide_has_the_command_of_every_page_that_is_kept():
    made = {command[command.index("--output") + 1] for command in COMMANDS}
    assert made == {f"results/{file.relative_to(RESULTS)}" for file in RESULTS.rglob("*.html")}


# One page takes seconds; the smallest is made in the fast tier.
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=command[1], marks=() if "60m" in command[1] else pytest.mark.slow)
        for command in COMMANDS
    ],
)
def test_a_page_that_is_kept_is_what_its_command_makes(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "results").symlink_to(RESULTS)
    monkeypatch.chdir(tmp_path)
    place = command.index("--output") + 1
    kept = read_page((RESULTS.parent / command[place]).read_text())
    command = [*command[:place], "page.html", *command[place + 1 :], "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    text = (tmp_path / "page.html").read_text()
    assert found == {"output": "page.html", "title": kept.headings[0], "bytes": len(text.encode())}
    made = read_page(text)
    # Another version of matplotlib may draw other lines.
    assert made.tables == kept.tables and made.paragraphs == kept.paragraphs and made.commands == kept.commands
    assert made.images.keys() == kept.images.keys()


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_several_reports_are_one_front_with_the_sequences_of_each(tmp_path, capsys):
    first, second = (joint_content(results=(result(share),)) for share in (0.5, 0.25))
    second["rows"], second["output"] = 96, "other.json"
    files = [write(tmp_path / "a.json", first), write(tmp_path / "b.json", second)]
    assert run(["report", *files, "--output", str(tmp_path / "page.html")]) == 0
    assert f"Joint plans for runs/x: {tmp_path / 'page.html'}, " in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    found = read_page(text)
    assert "<dt>training sequences for the plans</dt><dd>48 to 96</dd>" in text
    assert found.tables["S at expert hidden, mean of the experts, by budget"][0] == ["layer", "0.25", "0.5"]
    assert {"bytes=0.25@batch=2", "bytes=0.5@batch=2"} <= set(found.tables) and "other.json" not in text


def test_a_folder_is_read_by_the_report_in_it(tmp_path):
    (tmp_path / "sensitivity").mkdir()
    write(tmp_path / "sensitivity" / "sensitivity.json", sensitivity_content()[1])
    assert run(["report", str(tmp_path / "sensitivity"), "--output", str(tmp_path / "page.html")]) == 0
    assert read_page((tmp_path / "page.html").read_text()).headings[0] == "Sensitivities of runs/x"


def test_the_report_of_s_alone_is_read_with_its_plan(tmp_path):
    found = sparsity_allocation()
    found.plan.save(tmp_path / "plan.json")
    content = sparsity_dict(found, run_dir="runs/x", output=tmp_path / "plan.json") | SETTINGS
    file = write(tmp_path / "printed.json", content)
    assert run(["report", file, "--output", str(tmp_path / "page.html")]) == 0
    page = read_page((tmp_path / "page.html").read_text())
    assert page.tables["S at sites without experts"][1:] == [["0", "0.2500"], ["1", "0.7500"]]


WRONG = {
    "nothing there": (["none.json"], "none.json cannot be read as a report ("),
    "no JSON": (["text.json"], "text.json cannot be read as a report (Expecting value"),
    "another file": (
        ["plan.json"],
        "plan.json is no report of allocate or sensitivity: its format is 'x', and it must",
    ),
    "a list": (["list.json"], "list.json is no report of allocate or sensitivity: its format is None"),
    "a part is missing": (
        ["part.json"],
        "part.json has no 'budgets'; name a report as allocate or sensitivity wrote it",
    ),
    "an empty folder": (
        ["empty"],
        "empty is a folder with neither allocation.json nor sensitivity.json; name the JSON",
    ),
    "a folder with two": (["both"], "both is a folder with both allocation.json and sensitivity.json; name the JSON"),
    "one budget twice": (
        ["half.json", "again.json"],
        "bytes=0.5@batch=2 is in half.json and in again.json; name one of them",
    ),
    "two models": (
        ["half.json", "other.json"],
        "other.json has run_dir runs/y and half.json has runs/x; one page shows one model, compared on the same",
    ),
    "other sequences": (
        ["half.json", "dense.json"],
        'dense.json has dense {"cost": 100.0, "loss": 2.0} and half.json has {"cost": 100.0, "loss": 1.25}; one page',
    ),
    "two kinds": (
        ["half.json", "sensitivity.json"],
        "sensitivity.json is no report of allocate --budget; only these are put together, so name it alone",
    ),
    "a folder as the page": (
        ["half.json", "--output", "empty"],
        "--output (empty) is a folder; name a file, such as empty/",
    ),
    "a page that exists": (
        ["half.json", "--output", "list.json"],
        "--output (list.json) exists and is not overwritten",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_message_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = joint_content(results=(result(0.5),))
    contents = {
        "plan": {"format": "x"},
        "list": [1],
        "half": half,
        "again": half,
        "other": half | {"run_dir": "runs/y"},
    }
    contents["part"] = {key: value for key, value in half.items() if key != "budgets"}
    contents["dense"] = joint_content(results=(result(0.25),)) | {"dense": {"cost": 100.0, "loss": 2.0}}
    contents["sensitivity"] = sensitivity_content()[1]
    for stem, content in contents.items():
        write(tmp_path / f"{stem}.json", content)
    (tmp_path / "text.json").write_text("no JSON")
    for folder in ("empty", "both"):
        (tmp_path / folder).mkdir()
    for stem in ("allocation", "sensitivity"):
        write(tmp_path / "both" / f"{stem}.json", half)
    before = sorted(tmp_path.rglob("*"))
    arguments, message = WRONG[name]
    output = [] if "--output" in arguments else ["--output", "page.html"]
    assert run(["report", *arguments, *output]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
