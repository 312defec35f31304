"""The one exception of this package: something that the user can put right."""


class UserError(ValueError):
    """The user's input, data or files are wrong; the message is one sentence that says how to fix it.

    The command line prints the message without a traceback and exits with 1.
    """
