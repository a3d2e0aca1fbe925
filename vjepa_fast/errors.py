"""The errors a user can cause. The command line prints them in one line and exits with code 2."""


def printable(text: object, keep: str = "") -> str:
    """Text from a file as a terminal or page shows it: control characters and what is no Unicode as escapes.

    A name can neither move the cursor, nor colour or hide what follows. ``keep``: characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))


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
