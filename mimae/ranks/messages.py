"""Messages between the processes of a run: JSON and never a pickle, signed if the job has a secret.

Anybody who reaches a store or a connection of a run can write bytes there. Bytes that are read as JSON can end a run;
they cannot run code. With a secret (MIMAE_SECRET in the environment, the same for all processes of a job) a message
carries an HMAC-SHA256 over its place and its text, and a message without a valid one is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from typing import Any

SECRET = "MIMAE_SECRET"
"""Name of the environment variable that contains the secret of a job."""

_MAC = hashlib.sha256().digest_size * 2


class MessageError(RuntimeError):
    """A message that was not written by a process of this job."""


def pack(value: Any, place: str) -> str:
    """Return a value as a message for `place`: the key or the purpose under which the receiver reads it."""
    text, key = json.dumps(value), _key()
    return text if key is None else _mac(key, place, text.encode()) + text


def unpack(message: bytes, place: str) -> Any:
    """Return the value of a message. Raises MessageError if it is not JSON, or not signed with the job's secret."""
    key, text = _key(), message
    if key is not None:
        text = message[_MAC:]
        if not hmac.compare_digest(message[:_MAC], _mac(key, place, text).encode()):
            raise MessageError(f"the message {place} is not signed with this job's secret ({SECRET})")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "" if key else f", and this process has no secret ({SECRET}), which other processes may have"
        raise MessageError(f"the message {place} is not JSON{hint}") from error


def _key() -> bytes | None:
    secret = os.environ.get(SECRET)
    return secret.encode() if secret else None


def _mac(key: bytes, place: str, text: bytes) -> str:
    return hmac.digest(key, place.encode() + b"\0" + text, "sha256").hex()
