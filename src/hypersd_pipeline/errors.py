"""The one exception for bad input."""


class UserError(Exception):
    """A mistake in the user's input or configuration.

    The message is one sentence that names the file, key or row and the cure. The command line prints it without a traceback.
    """
