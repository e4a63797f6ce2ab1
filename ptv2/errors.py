"""The one error that people cause and can mend; the command line prints its sentence and exits with status 2."""


class InputError(ValueError):
    """Bad data, a bad option or a bad checkpoint: one sentence that names the file or field and what to do."""
