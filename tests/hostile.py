"""Names that a file may hold and that nothing may obey, and what a terminal would obey of them."""

from __future__ import annotations

from hypothesis import strategies as st

NAMES = (
    "\x1b]0;x\x07",  # sets a terminal's title
    "\x1b[2J\x1b[H",  # clears it
    "\x9b31m",  # an escape sequence of one byte
    "a\rb",
    "a\nb",
    "\u202eb",  # turns the direction of reading
    "a\u2028b",
    "\ud800",
    "\x00",
    "[red]",
    "[/red]",
    "[link=file:///]",
    ":warning:",
    '"""\nimport os\nos.system("touch owned")\n"""',
    "'''\nraise SystemExit\n'''",
    "x')\n__import__('os').system('touch owned')\n#",
    "\\",
    "x\\",
    "# -*- coding: utf-7 -*-",
    "{0.__class__}",
    "%s%n",
    "<script>alert(1)</script>",
    "]]></style>",
    "../../victim",
    "/etc/passwd",
    "triton:../../victim",
    "triton:**/*",
    "9" * 5000,
    "x" * 5000,
    "",
)
TEXTS = st.sampled_from(NAMES) | st.text(max_size=40)


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal would obey or not show, line ends left out."""
    return [c for c in text if c != "\n" and not c.isprintable()]
