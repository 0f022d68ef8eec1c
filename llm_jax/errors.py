"""What a command can end with: each error is one sentence for the user and one exit code for the launcher."""


class UserError(Exception):
    """A mistake in what the user gave (config, file, flag): one clear sentence, no traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A config key with a value that cannot be used; the message names key, value, reason and fix."""


class DataError(UserError):
    """A data file or record that cannot be used; the message names file, record and fix."""


class BadStepsError(Exception):
    """Too many steps in a row had a non-finite loss or gradient; the last good checkpoint is untouched."""

    exit_code = 3


class Preempted(Exception):
    """The machine was asked to stop; the state is saved and the same command goes on from there."""

    exit_code = 4


class CorruptCheckpointError(Exception):
    """Checkpoints exist but none can be restored; training does not start from scratch behind the user's back."""

    exit_code = 5


class Unproven(Exception):
    """A conversion was written, and nothing was there to compare the model's logits with."""

    exit_code = 6


class ConversionMismatch(Exception):
    """A converted model's logits are not those of its source; nothing was kept."""

    exit_code = 7
