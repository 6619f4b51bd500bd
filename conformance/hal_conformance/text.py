# SPDX-License-Identifier: Apache-2.0
"""Text that came from somewhere else (a recording, an implementation, a driver), made safe to show."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

MAX_DETAIL = 500
"""Characters of a detail line that are kept: a person reads no more, and a hostile one may be megabytes."""


def plain(text: object, limit: int = MAX_DETAIL) -> str:
    r"""Return one printable line: whatever a terminal could act on is spelled out, as in `\x1b[2J`.

    Line breaks become spaces. What `str.isprintable` calls unprintable covers control characters, lone
    surrogates and the marks that reverse the direction of writing.
    """
    try:
        source = str(text)
    except Exception as error:  # noqa: BLE001  an implementation's exception may have a broken __str__
        source = f"<{type(text).__name__} whose __str__ raises {type(error).__name__}>"
    source = " ".join(source[: 4 * limit].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in source)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def xml_text(text: object) -> str:
    """Return text for an XML element."""
    return escape(plain(text))


def xml_attribute(text: object) -> str:
    """Return a quoted XML attribute value, quotes included."""
    return quoteattr(plain(text))


def markdown(text: object) -> str:
    """Return text for one cell of a Markdown table: nothing in it is markup, HTML or a cell border."""
    line = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\`*_[]|~#!@" else c for c in line)
