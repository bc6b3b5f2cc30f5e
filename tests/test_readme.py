"""What the README tells people to type is there: the scripts, their flags, the files that it names."""
import importlib.util
import io
import json
import re
import textwrap
from contextlib import redirect_stdout
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
def help_of(script: str) -> str:
    """Return what a script and its subcommands print for --help, all in this process."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def printed(*arguments: str) -> str:
        with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            module.main([*arguments, "--help"])
        return text.getvalue()

    text = printed()
    return text + "".join(map(printed, re.findall(r"(?m)^    (\w+) ", text)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_knows_its_flags(command):
    script = re.search(r"[\w./-]+\.py", command)[0]
    assert (ROOT / script).exists()
    flags = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", command.split(script)[1]))
    known = set(re.findall(r"--?[a-z][\w-]*", help_of(script)))
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


def test_the_table_of_runs_is_that_of_their_files():
    rows = re.findall(r"\| \[([\w-]+)\]\(results/\1/run\.json\) \|.*"
                      r"\| ([\d,]+) \| ([\d.]+) \| ([\d.]+ to [\d.]+) \| ([\d.]+) \|", README)
    assert {name for name, *_ in rows} == {path.parent.name for path in ROOT.glob("results/*/run.json")}
    for name, n_steps, nats, interval, bits in rows:
        run, loss = (json.loads((ROOT / "results" / name / file).read_text()) for file in ("run.json", "loss.json"))
        assert (n_steps, nats) == (f"{run['n_steps']:,}", f"{loss['nats_per_token']:.3f}"), name
        assert (interval, bits) == (f"{loss['low']:.3f} to {loss['high']:.3f}", f"{loss['bits_per_byte']:.3f}"), name
