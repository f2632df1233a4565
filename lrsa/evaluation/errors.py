"""What the user of an evaluation can put right."""


class EvaluationInputError(ValueError):
    """Data or settings that an evaluation cannot work with; the message says which, and how to put it right."""


class TruncationWarning(UserWarning):
    """Prompts lost their beginning because they were longer than the model reads."""
