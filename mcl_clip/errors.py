"""Errors that a user can act on."""


class UserError(ValueError):
    """A mistake outside the code: shown as one sentence without a traceback, exit code 2.

    The message names the value, the limit and the way out. `everywhere` is set where all processes raise the same
    error, so that it is shown once.
    """

    everywhere = False

    def on_every_process(self) -> "UserError":
        """The same error, known to be raised by all processes."""
        self.everywhere = True
        return self
