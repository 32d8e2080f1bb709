"""The two ways a run ends early: refused (running again cannot help) and incomplete (running again resumes)."""


class Refusal(ValueError):
    """Something the user gave cannot work: one sentence with the name, the value and what to do. Exit code 2."""


class Incomplete(RuntimeError):
    """The run stopped through no fault of its input, with every committed layer kept. Exit code 75."""
