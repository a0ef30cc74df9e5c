"""The corpus: small files, valid ones and others, each named by what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

CORPUS = Path(__file__).parent.parent / "corpus"


def corpus(*folders: str) -> pytest.MarkDecorator:
    """Parametrize `content` with the files in folders of the corpus."""
    files = [path for folder in folders for path in sorted((CORPUS / folder).iterdir())]
    assert files
    names = [path.relative_to(CORPUS).with_suffix("").as_posix() for path in files]
    return pytest.mark.parametrize("content", [path.read_bytes() for path in files], ids=names)


def contents(folder: str) -> list[bytes]:
    """The bytes of all files in a folder and its folders."""
    return [path.read_bytes() for path in sorted((CORPUS / folder).rglob("*.*"))]
