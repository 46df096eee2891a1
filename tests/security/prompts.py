"""Prompts as nobody foresees them, for hypothesis: words of shells, JSON, YAML and TOML, and every letter there is."""

from __future__ import annotations

from hypothesis import strategies as st

AWKWARD = (
    "$(HOME)", "$$", "$(PATH", "${HOME}", "`id`", "$(rm -rf /)", "; rm -rf /", "&& id", "| id", "> /etc/passwd", "%s",
    "a, b", '"', "'", "\\", "\\n", "\n", "\r\n", "\t", "\x00", "\x1b[31m", "\u2028", "\u0085", "\ufeff", "\x7f",
    "\U0001f408", "\U0001f469\u200d\U0001f467", "\xe9", "e\u0301", "\u0645\u0631", "--help", "--output=/x", "-", "--",
    "=", "1", "null", "true", "~", "[1]", "{a: b}", "# no", ": ", "- a", "!!python/object/apply:os.system [id]",
    "&a *a", "%YAML", "---", "--d 5 --w 64", "{a|b}", "(cat:1.5)", "<lora:x:1>", "|||", "*.png", "?", "\U0010ffff",
)  # fmt: skip
LONGEST = 10_000
PIECES = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def prompts(*, without: str = "") -> st.SearchStrategy[str]:
    """Prompts of 1 to 10,000 letters. without: letters that a place cannot carry at all."""

    def joined(pieces: list[str]) -> str:
        text = "".join(pieces)
        return "".join(letter for letter in text if letter not in without)

    short = st.lists(PIECES, min_size=1, max_size=6).map(joined)
    # The longest ones are cheap to draw: a few pieces again and again.
    long = st.builds(lambda text, length: (text * length)[:length], short, st.sampled_from((500, LONGEST - 1, LONGEST)))
    return (short | long).filter(lambda text: 1 <= len(text) <= LONGEST)


TYPED = prompts(without="\x00")
"""What can be typed: no program's argument has a zero byte."""
