"""Why something failed, in a line, and what it means for the run."""

from pipeline.errors import Incomplete, Refusal

TOKEN = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the token that the cluster was started with"
)


def in_a_line(error: BaseException) -> str:
    """The first line of what an error says, its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unreachable(where: str, reason: str) -> Incomplete:
    """Nobody answers at an address.

    A cluster that is away for a moment looks like one that never was: on Kubernetes even the name of its head is gone.
    """
    return Incomplete(
        f"{where}: no Ray cluster answers there ({reason}); see that the address is right and can be reached, "
        "and run again; jobs that it has go on meanwhile"
    )


def without_token(where: str) -> Refusal:
    """The cluster asks for a token."""
    return Refusal(f"{where}: the cluster does not accept this token, or there is none; {TOKEN}")
