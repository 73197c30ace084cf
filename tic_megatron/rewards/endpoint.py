"""Rewards from a server: `reward.function: https://judge.example.org/grade`. The protocol is described in docs/rewards.md."""

from __future__ import annotations

import asyncio
import json
import os
import random
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from tic_megatron.config import RewardSettings, SettingsError
from tic_megatron.rewards.registry import InvalidRewardError, Reward, describe, shown
from tic_megatron.rewards.secret_names import looks_secret

if TYPE_CHECKING:
    import aiohttp  # otherwise when the first answer is asked for: it takes a while

VERSION = 1
FIRST_WAIT_S = 0.5
"""Before the second attempt; doubled for each one more, and randomly up to twice as long, so that clients spread."""
LONGEST_WAIT_S = 30.0
LARGEST_REPLY = 16 << 20
TOO_MANY_REQUESTS = 429


def endpoint_reward(url: str, settings: RewardSettings) -> Reward:
    """The reward that a server gives. SettingsError for an address that cannot be one."""
    endpoint = Endpoint(url, settings)
    return Reward("http", endpoint.grade, isolated=True, check=endpoint.check, splits=False)


class EndpointError(RuntimeError):
    """The server does not answer, or refuses."""


class Endpoint:
    """A server that grades. One connection pool per process and event loop."""

    def __init__(self, url: str, settings: RewardSettings) -> None:
        self.url, self._settings = url, settings
        self._session: aiohttp.ClientSession | None = None
        try:
            parts = urlsplit(url)
            valid = bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid or any(character.isspace() for character in url):
            place = url.partition("?")[0].rpartition("@")[2][:60]  # without a password or key
            raise SettingsError(f"reward.function: {place!r} is no address; give http://HOST:PORT/PATH")
        named = [name for part in (parts.query, parts.fragment) for name, _ in parse_qsl(part, keep_blank_values=True)]
        secrets = [name for name in named if looks_secret(name)]
        if parts.username is not None or parts.password is not None or secrets:
            raise SettingsError(
                f"reward.function: the address of {parts.hostname} holds a name, password or key, which would be written down; "
                "remove it, and give a token in the environment variable that reward.http_token_env names"
            )

    async def grade(
        self, responses: list[str], answers: list[str], prompts: list[str], problem_ids: list[str], retries: int | None = None
    ) -> list[Any]:
        """Rewards as the server gives them, null among them. EndpointError when it does not answer; InvalidRewardError for a
        reply of another shape."""
        body = {"version": VERSION, "responses": responses, "answers": answers, "prompts": prompts, "problem_ids": problem_ids}
        reply = await self._post(body, self._settings.retries if retries is None else retries)
        rewards = reply.get("rewards") if isinstance(reply, dict) else None
        if not isinstance(rewards, list):
            raise InvalidRewardError(f"the endpoint's reply is {shown(reply)}, not an object with the list 'rewards'")
        return rewards

    def check(self) -> None:
        """SettingsError when the server does not answer a request without responses as it should."""

        async def ask() -> None:
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    rewards = await self.grade([], [], [], [], retries=0)
                if rewards:
                    raise InvalidRewardError(f"it gave {len(rewards)} rewards for no response")
            finally:
                if self._session is not None:
                    await self._session.close()
                self._session = None

        try:
            asyncio.run(ask())
        except (EndpointError, InvalidRewardError, TimeoutError) as error:
            reason = (
                f"no answer in reward.timeout_s {self._settings.timeout_s:g}" if isinstance(error, TimeoutError) else str(error)
            )
            place = self.url.partition("?")[0]
            raise SettingsError(
                f"reward.function: the endpoint {place} does not grade ({reason}); start it, or correct the address"
            ) from error

    async def _post(self, body: dict[str, Any], retries: int) -> Any:
        import aiohttp

        if self._session is None:
            # Its own limits are off: the caller has one for all attempts together.
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), headers=self._headers())
        wait_s = FIRST_WAIT_S
        for attempt in range(retries + 1):
            if attempt:
                await asyncio.sleep(min(LONGEST_WAIT_S, wait_s) * random.uniform(1.0, 2.0))
                wait_s *= 2
            try:
                async with self._session.post(self.url, json=body, allow_redirects=False) as reply:
                    if reply.status == 200:
                        return _decoded(await _read(reply))
                    problem = f"it answered with status {reply.status}"
                    if reply.status != TOO_MANY_REQUESTS and reply.status < 500:
                        raise EndpointError(problem)
            except (aiohttp.ClientError, OSError) as error:
                problem = describe(error)
        raise EndpointError(f"{problem}, in the last of {retries + 1} attempts" if retries else problem)

    def _headers(self) -> dict[str, str]:
        name = self._settings.http_token_env
        return {} if name is None else {"Authorization": f"Bearer {os.environ[name]}"}


async def _read(reply: Any) -> bytes:
    content = bytearray()
    async for chunk in reply.content.iter_chunked(1 << 16):
        content += chunk
        if len(content) > LARGEST_REPLY:
            raise InvalidRewardError(f"the endpoint's reply is longer than {LARGEST_REPLY >> 20} MiB")
    return bytes(content)


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidRewardError(f"the endpoint's reply is {shown(content)}, not JSON") from None
