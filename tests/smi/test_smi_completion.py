"""The completion scripts, in the shells themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpu_cache.smi import options
from gpu_cache.smi.query import FIELDS


def in_shell(shell: str, code: str, tmp_path: Path) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on the PATH")
    (tmp_path / "script").write_text(options.completion(shell))
    command = {"bash": ["bash", "--norc"], "zsh": ["zsh", "-f"], "fish": ["fish", "--no-config"]}[shell]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout


def bash_completes(words: list[str], tmp_path: Path) -> set[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    setting = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}"
    code = f'. ./script; {setting}; _gpu_cache_smi; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return set(in_shell("bash", code, tmp_path).split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tim"], {"--timeline"}),
        (["--json", "--no"], {"--no-color"}),
        (["--by", ""], {"gpu", "proc", "source"}),
        (["--by", "=", "s"], {"source"}),
        (["--completion", "="], set(options.SHELLS)),
        (["--record", "rec"], {"recorded.jsonl"}),
        (["--dir", "re"], {"reports"}),
        (["-c", ""], set()),
        (["--query-proc", "=", "pid,"], {f"pid,{name}" for name in FIELDS["proc"]}),
    ],
)
def test_bash_completes_options_and_values(words: list[str], expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "recorded.jsonl").touch()
    (tmp_path / "reports").mkdir()
    assert bash_completes(["gpu-cache-smi", *words], tmp_path) == expected


def test_fish_completes_options_and_values(tmp_path: Path) -> None:
    asked = ("--tim", "--by ", "--query-gpu ")
    code = "source script; " + "; ".join(f"complete -C 'gpu-cache-smi {words}'" for words in asked)
    found = {line.partition("\t")[0] for line in in_shell("fish", code, tmp_path).splitlines()}
    assert {"--timeline", "gpu", "proc", "source", *FIELDS["gpu"]} <= found


def test_zsh_reads_the_script(tmp_path: Path) -> None:
    found = in_shell("zsh", "_arguments() { print -l -- $@ }; . ./script", tmp_path).splitlines()
    assert {"--by=:value:(gpu proc source)", "--json", "-o+:value:_files"} <= set(found)


def test_every_option_of_the_help_is_completed() -> None:
    script = options.completion("fish")
    names = set(re.findall(r"--[a-z][a-z-]+", options.parser().format_help()))
    assert {"--json", "--query-source", "--completion"} < names
    assert not {name for name in names if f"-l {name[2:]} " not in script.replace("\n", " \n")}
