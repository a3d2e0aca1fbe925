"""The errors a user can cause. The command line prints them in one line and exits with code 2."""


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
