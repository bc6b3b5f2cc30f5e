"""What the README tells people to type is there: the scripts, their flags, the files that it names."""
import json
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest

from config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?m)^(?:    .*\n|\n(?=    ))+", README)
COMMANDS = sorted({line.strip().split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()
                   if re.match(r"    (?:python|torchrun[^\n]*) +[\w./-]+\.py", line)})


@cache
def help_of(run_cli, script: str) -> str:
    text = run_cli(script, "--help").stdout
    for command in re.findall(r"(?m)^    (\w+) ", text):
        text += run_cli(script, command, "--help").stdout
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_knows_its_flags(run_cli, command):
    script = re.search(r"[\w./-]+\.py", command)[0]
    assert (ROOT / script).exists()
    flags = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", command.split(script)[1]))
    known = set(re.findall(r"--?[a-z][\w-]*", help_of(run_cli, script)))
    assert flags <= known


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = next(block for block in BLOCKS if "from model import GPT" in block)
    exec(textwrap.dedent(code), {})
    assert "Bulletin(headline='farmers count their sheep after flood', story='" in capsys.readouterr().out


def test_the_commands_were_found():
    assert len(COMMANDS) > 12


def test_the_file_map_is_whole():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb"), *ROOT.glob("*.json"), *ROOT.glob("runs/*.sh")]:
        assert f"`{path.relative_to(ROOT)}`" in README, path


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_config_table_is_that_of_the_configs():
    rows = dict(re.findall(r"\| `([\w.]+)` \| [^|]+ \| ((?:[\d.]+|false)(?: \| (?:[\d.]+|false)){3}) \|", README))
    configs = [json.loads((ROOT / "configs" / f"{size}.json").read_text()) for size in ("3M", "11M", "28M", "59M")]
    assert all(Config.load(path) for path in ROOT.glob("configs/*.json"))
    for section in ("model", "train"):
        for key in configs[0][section]:
            told = [json.loads(value) for value in rows[f"{section}.{key}"].split(" | ")]
            assert told == [config[section][key] for config in configs], key
