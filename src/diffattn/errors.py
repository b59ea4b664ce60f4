"""The errors that a user can meet. Each message is one line: what was given, what was wanted, the way out."""


class DiffattnError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it as one line."""


class ConfigError(DiffattnError, ValueError):
    """A shape, an option or a configuration that cannot work."""


class UnsupportedError(DiffattnError, RuntimeError):
    """A backend, machine or engine that cannot do what was asked of it by name."""


class DataError(DiffattnError, ValueError):
    """Text that cannot be read, found or turned into at least one block of tokens."""


class CheckpointError(DiffattnError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged, or of another shape."""


class TrainingError(DiffattnError, RuntimeError):
    """A run that had to end: its loss is not a number, or the disk is full. The last good checkpoint is kept."""
