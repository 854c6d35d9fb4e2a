"""The two ways a command ends badly, and what the terminal says about each."""


class ZiphiusError(Exception):
    """A failure told in one line: what went wrong, where, and what to do. Exit code 1.

    ``advice`` ends that line. Of many processes that fail together one tells it, and none that
    knows it ``told`` by another. ``lost`` says that a process has missed others.
    """

    exit_code = 1
    advice = ""
    told = False
    lost = False


class BadInput(ZiphiusError):
    """The caller's input cannot be used: nothing was written or lost. Exit code 2."""

    exit_code = 2


def in_one_line(error: object) -> str:
    """Return what an error of any kind says, without line breaks."""
    return " ".join(str(error).split()) or "no message"
