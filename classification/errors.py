"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake of the user's; its text is one sentence that says what was expected, what came and what to do."""
