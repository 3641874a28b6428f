"""The one exception of everything between files and batches."""


class DataError(ValueError):
    """Raised where data cannot be used as they are.

    The message names the file and the line (1-based, the header counted) or the row, what was
    found, what is allowed and what to do.
    """
