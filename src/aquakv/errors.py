"""Every error that aquakv raises on purpose.

A message says what was expected, what came, and what to do. Errors below `InputError` are the caller's to
mend: the command line prints them as one line and exits with code 2.
"""

from __future__ import annotations


class AquaKVError(Exception):
    """Base of all errors raised by aquakv."""


class InputError(AquaKVError, ValueError):
    """Something handed to aquakv is wrong; the message says what and how to mend it."""


class ConfigError(InputError):
    """A setting is unknown, has the wrong type or an impossible value."""


class ShapeError(InputError):
    """A tensor's shape or dtype is not what the operation takes."""


class DataError(InputError):
    """A text source is missing, unreadable, empty or too short."""


class ModelError(InputError):
    """A model is missing, unreadable or cannot be loaded."""


class UnsupportedModelError(ModelError):
    """A model's architecture or setting is one that aquakv cannot compress correctly."""


class CodecFileError(InputError):
    """A codec file is missing, truncated, damaged, of another format or unsafe to load."""


class CodecMismatchError(CodecFileError):
    """A codec was calibrated for another model than the one it is used with."""


class CacheFileError(InputError):
    """The file of a saved cache is missing, truncated, damaged, of another format or unsafe to load."""


class ResourceError(InputError):
    """A job needs more memory than there is; the message says how to make it smaller."""


class CheckpointError(InputError):
    """What an interrupted calibration left is damaged, or belongs to another calibration."""


class OutputError(InputError):
    """A result could not be written; nothing half-written is left behind."""


class CacheStateError(AquaKVError, RuntimeError):
    """A cache is used in a way that its state does not allow, or that aquakv cannot do correctly."""
