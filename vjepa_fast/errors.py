"""The errors a user can cause. The command line prints them in one line and exits with code 2."""

import unicodedata

_JOINERS = "\u200c\u200d"  # of Persian words and of emoji


def shown(c: str) -> bool:
    """Whether a character is one that a terminal or page shows, blanks of any width among them."""
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def printable(text: object, keep: str = "") -> str:
    """Text from a file as a terminal or page shows it: control characters and what is no Unicode as escapes.

    A name can neither move the cursor, nor colour or hide what follows. ``keep``: characters that stay as they are.
    """
    return "".join(c if c in keep or shown(c) else c.encode("unicode_escape").decode() for c in str(text))


class UserError(ValueError):
    """Wrong input of any kind. The message names the file, key or sample at fault and says what to do."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A manifest, video or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another architecture."""


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss, for example."""
