"""A request that cannot go on, while its neighbours can."""

from ziphius.config.errors import ZiphiusError


class RequestError(ZiphiusError):
    """One request failed as it ran: its own error, in one line. Other requests are not touched."""
