"""Whether a tracking server answers, without an import of MLflow, which takes seconds."""

from __future__ import annotations

import os
import re
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException

from mtl_ranker.errors import ProjectError

PAUSES = (1.0, 3.0)  # seconds before the second and the third request


def check_server() -> None:
    """Raise ProjectError if $MLFLOW_TRACKING_URI names a server that does not answer.

    A server that restarts is asked again, after `PAUSES`. Without a server there is nothing to
    check.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.lower().startswith("http"):
        return
    for pause in (*PAUSES, None):
        try:
            check_answers(uri, timeout=5)
        except ConnectionError as error:
            if pause is None:
                raise ProjectError(f"MLFLOW_TRACKING_URI: {error}") from error
            time.sleep(pause)
        else:
            return


def check_answers(uri: str, timeout: float = 10) -> None:
    """Raise ConnectionError unless a server answers at this address, with any status.

    Args:
        timeout: in seconds.
    """
    address = without_credentials(uri)
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=timeout).close()
    except urllib.error.HTTPError:
        return
    except (OSError, HTTPException, ValueError) as error:  # the last for a malformed address
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # MLflow has settings of its own for certificates
            return
        raise ConnectionError(
            f"MLflow at {address} does not answer ({reason}): start it, or correct "
            "MLFLOW_TRACKING_URI"
        ) from error


def without_credentials(url: str) -> str:
    """An address without user and password."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url, count=1)
