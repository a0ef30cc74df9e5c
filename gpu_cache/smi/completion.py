"""Scripts that complete the command line of `gpu-cache-smi`, one for each shell, made from its options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

PROGRAM = "gpu-cache-smi"


class Option(NamedTuple):
    """One option, as a shell needs it.

    Attributes:
        names: As written, such as `-o` and `--output`.
        words: Values to choose from.
        takes: What follows: "nothing", "file", "folder", or "value".
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    takes: str


def script(shell: str, parser: argparse.ArgumentParser, words: Mapping[str, Iterable[str]]) -> str:
    """The script for a shell.

    Args:
        shell: One of `SHELLS`.
        parser: Has the options.
        words: Values of options that the parser does not list, by option.
    """
    return _WRITERS[shell]([_option(action, words) for action in parser._actions if action.option_strings])


def _option(action: argparse.Action, words: Mapping[str, Iterable[str]]) -> Option:
    names = tuple(action.option_strings)
    listed = next((tuple(words[name]) for name in names if name in words), tuple(action.choices or ()))
    is_path = action.type is Path
    takes = "nothing" if action.nargs == 0 else "value" if not is_path else "folder" if "--dir" in names else "file"
    return Option(names, listed, takes)


def _bash(options: list[Option]) -> str:
    cases = "".join(f"    {'|'.join(one.names)}) {_bash_answer(one)};;\n" for one in options if one.takes != "nothing")
    names = " ".join(name for one in options for name in one.names)
    return (
        "_gpu_cache_smi() {\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD-1]}" start=\n'
        '  if [[ $word == "=" ]]; then word=\n'
        '  elif [[ $option == "=" ]]; then option="${COMP_WORDS[COMP_CWORD-2]}"; fi\n'
        '  if [[ $word == *,* ]]; then start="${word%,*},"; word="${word##*,}"; fi\n'
        "  [[ $word == -* ]] && option=\n"
        "  COMPREPLY=()\n"
        "  case $option in\n"
        f"{cases}"
        f'    *) COMPREPLY=($(compgen -W "{names}" -- "$word"));;\n'
        "  esac\n"
        "}\n"
        f"complete -F _gpu_cache_smi {PROGRAM}\n"
    )


def _bash_answer(option: Option) -> str:
    if option.words:
        return f'COMPREPLY=($(compgen -P "$start" -W "{" ".join(option.words)}" -- "$word"))'
    kinds = {"file": "-f", "folder": "-d"}
    return f'COMPREPLY=($(compgen {kinds[option.takes]} -- "$word"))' if option.takes in kinds else ":"


def _zsh(options: list[Option]) -> str:
    lines = [f"  '{name}{_zsh_value(one, name)}'" for one in options for name in one.names]
    return f"#compdef {PROGRAM}\n_arguments \\\n" + " \\\n".join(lines) + "\n"


def _zsh_value(option: Option, name: str) -> str:
    if option.takes == "nothing":
        return ""
    kinds = {"file": "_files", "folder": "_files -/", "value": " "}
    answer = f"({' '.join(option.words)})" if option.words else kinds[option.takes]
    return f"{'=' if name.startswith('--') else '+'}:value:{answer}"


def _fish(options: list[Option]) -> str:
    return f"complete -c {PROGRAM} -f\n" + "".join(map(_fish_line, options))


def _fish_line(option: Option) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    kinds = {"nothing": "", "file": " -r -F", "folder": " -x -a '(__fish_complete_directories)'", "value": " -x"}
    answer = f" -x -a '{' '.join(option.words)}'" if option.words else kinds[option.takes]
    return f"complete -c {PROGRAM} {names}{answer}\n"


_WRITERS: dict[str, Callable[[list[Option]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_WRITERS)
