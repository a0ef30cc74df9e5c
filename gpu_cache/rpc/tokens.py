"""The token that clients show and servers ask for: read from everywhere alike, and never part of a message."""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path

TOKEN_VARIABLE = "AREAL_RPC_TOKEN"

_PRINTABLE = re.compile(r"[!-~]*")

logger = logging.getLogger(__name__)


def find_token(given: str | None = None) -> str | None:
    """Return the token that a caller gave, else that of AREAL_RPC_TOKEN; None where there is neither.

    White space around it is dropped: secrets that come from a file end with a newline.

    Raises:
        ValueError: It could not be sent as it is. The message says why, and never what it is.
    """
    if given is not None:
        return _checked(given, "the token given as an argument")
    found = os.environ.get(TOKEN_VARIABLE)
    return _checked(found, f"the token in {TOKEN_VARIABLE}") if found else None


def read_token_file(path: Path) -> str:
    """Return the token that a file holds, and warn if other users may read the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: As `find_token`.
    """
    # latin-1 decodes any bytes: an error of another codec would carry them.
    token = _checked(path.read_text("latin-1"), f"the token file {path}")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        logger.warning("other users may read the token file %s (mode %04o): chmod 600 %s", path, mode, path)
    return token


def _checked(text: str, origin: str) -> str:
    token = text.strip()
    if not token:
        raise ValueError(f"{origin} is empty")
    if (num_lines := len(token.splitlines())) > 1:
        raise ValueError(f"{origin} has {num_lines:,} lines, a token is one line")
    if not _PRINTABLE.fullmatch(token):
        raise ValueError(f"{origin} has a space, a control character or a letter outside ASCII in it")
    return token
