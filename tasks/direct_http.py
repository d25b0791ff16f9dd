"""HTTP requests that bypass the proxies of the environment, for servers on this machine."""

import http.client
import urllib.request
from typing import Any

HEALTH_TIMEOUT_SECONDS = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_direct(request: urllib.request.Request, timeout_seconds: float) -> Any:
    """Send a request and return the response, to be closed by the caller.

    Raises:
        OSError: as `urllib.request.urlopen`.
        http.client.HTTPException: the response is not valid HTTP.
    """
    return _OPENER.open(request, timeout=timeout_seconds)


def fetch_or_none(url: str) -> bytes | None:
    """Return the response to a GET request, None on any error."""
    try:
        with open_direct(urllib.request.Request(url), HEALTH_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, http.client.HTTPException):  # urllib's own errors are OSErrors
        return None
