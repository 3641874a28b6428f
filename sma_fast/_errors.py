"""The exceptions that more than one module raises or catches."""


class Unavailable(Exception):
    """Why a backend, or one op of it, cannot answer here."""
