"""Which server is asked, how, and with which key."""

import dataclasses
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """A server and how it is asked.

    `base_url` ends where `/chat/completions` follows, mostly in `/v1`. `key_env` names the
    environment variable that holds the key; empty for a server that asks for none. At most
    `concurrency` HTTP requests are open at once. Each has `timeout_s` seconds from its beginning to
    the last byte of its answer, and `attempts` in all: after a time-out, a broken connection, an
    answer that is cut, or status 408, 409, 425, 429 or 5xx the next one waits `backoff_s` seconds,
    twice as long each time up to `longest_wait_s`, or what Retry-After says up to that.

    `limit_field` is the field for the most tokens (`max_completion_tokens` with some vendors),
    `send_seed` whether the server knows `seed`. `extra` is added to the body of each request, such
    as {"chat_template_kwargs": {"thinking": True}}. `think` says that the model thinks first, so
    that an answer without `</think>`, and without reasoning apart, is thinking that never ended.
    `version` names the model in every response; empty is its name and the server's.
    """

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    attempts: int = 6
    timeout_s: float = 1800.0
    backoff_s: float = 1.0
    longest_wait_s: float = 60.0
    limit_field: str = "max_tokens"
    send_seed: bool = True
    think: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: str = ""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"remote.base_url = {self.base_url!r}: must be like http://127.0.0.1:8000/v1"
            )
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"remote.base_url of {parts.hostname} holds a user, a password or a query: a key "
                "belongs into the environment variable that remote.key_env names"
            )
        if not self.model:
            raise ValueError("remote.model is empty: name what the server calls its model")
        if self.concurrency < 1 or self.attempts < 1:
            raise ValueError(
                f"remote.concurrency = {self.concurrency}, remote.attempts = {self.attempts}: "
                "both must be at least 1"
            )
        if self.timeout_s <= 0 or self.backoff_s < 0 or self.longest_wait_s < self.backoff_s:
            raise ValueError(
                f"remote.timeout_s = {self.timeout_s} must be positive, backoff_s = "
                f"{self.backoff_s} not negative and at most longest_wait_s = {self.longest_wait_s}"
            )
        taken = {"model", "messages", "n", "stream", "seed", self.limit_field} & set(self.extra)
        if taken:
            raise ValueError(f"remote.extra sets {sorted(taken)}: these are the requests' own")


def read_key(name: str) -> str:
    """The key in an environment variable, empty where none is named; ValueError without it."""
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(
            f"remote.key_env = {name!r}: the environment has no such variable, or an empty one: "
            f"export {name}=..., or set remote.key_env = '' for a server that asks for no key"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"remote.key_env = {name!r}: what the variable holds cannot be a key, it has a space, "
            "a new line or a character beyond ASCII in it (it is not shown here)"
        )
    return key


def is_local(host: str) -> bool:
    """Whether that is this machine."""
    return host == "localhost" or host == "::1" or host.startswith("127.")
