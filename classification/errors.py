"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake of the user's; its text is one sentence that says what was expected, what came and what to do."""

    def __init__(self, text: str) -> None:
        # A loading process hands its error over wrapped in a traceback: keep the sentence.
        super().__init__(text.rpartition("UserError: ")[2].strip())
