"""site.toml: what a site says of itself to its own daemon and trainer.

Paths are relative to the directory of the file. Nothing here is sent anywhere; the name is, beside
an update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from client.site import Site
from client.trainer_link import LONGEST_PATH
from federation.settings import Settings, SettingsError, load_settings, read_toml

_ADDRESS = re.compile(r"[^/\s]+:[0-9]{1,5}")
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\]):[0-9]{1,5}")


class SiteSettings(Settings):
    """One institution's node and trainer."""

    superlink: str
    """HOST:PORT of the coordinator's port for sites."""
    root_certificate: Path
    """PEM file of the CA that signed the coordinator's certificate."""
    node_key: Path
    """This site's private key, as `ssh-keygen -t ecdsa -b 384` makes it; the coordinator registers
    its public half."""
    base_model: Path
    """Directory of the base model (Hugging Face layout)."""
    data: Path
    """JSONL file of this site's records."""
    policy: Path
    """policy.toml: what this site allows (client.policy)."""
    state: Path
    """Directory for what must survive a restart; no other site's and no other daemon's."""
    identity_key: Path | None = None
    """This site's Ed25519 private key (PEM, unencrypted) for secure sums, for life: the other sites
    list its public half in their policies. `client identity` makes it. None = in ``state``, and
    without the file there the site takes part in no secure sum."""
    name: Annotated[str, Field(max_length=64)] = ""
    """What the site calls itself, for the coordinator's tables."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Slices of the adapter that it trains; none = all."""
    node: Literal["resident", "supernode"] = "resident"
    """resident: the daemon is the Flower node and runs no code of a run. supernode: a stock
    flower-supernode is, which runs the app that a run brings: that needs a ``trainer`` that is
    started apart, as another user."""
    trainer: Path = Path("child")
    """"child": the daemon starts the trainer and ends it. Else the socket of a trainer that is
    started apart, as another user, with this same file."""
    socket_group: str = ""
    """Group, by name or number, that may speak to the trainer, where the node runs as another user:
    the socket has mode 0660 then. Empty = the trainer's own user only, 0600."""
    allow_same_user: bool = False
    """supernode only: the code that runs bring may have the rights of the trainer's user, and so
    read the records, send them anywhere, and change policy and ledger. Never for real data."""
    node_state: Path | None = None
    """Directory of the daemon's own state, where it may not read ``state``; none = in ``state``."""
    health: str = ""
    """HOST:PORT on loopback of GET /healthz; empty = none."""
    poll_s: Annotated[float, Field(gt=0, le=60)] = 0.1
    """Seconds between two looks for a message soon after an answer."""
    idle_poll_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """To what they grow, by 5 % of the time since that answer."""
    drain_s: Annotated[float, Field(ge=0)] = 3600.0
    """How long SIGTERM lets the round in hand go on."""
    max_message_bytes: Annotated[int, Field(ge=1)] = 1 << 32
    """Largest message that the trainer takes in."""
    log: Path | None = None
    """File of the log; none = stderr."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("superlink")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if not _ADDRESS.fullmatch(value) or not _port_exists(value):
            raise ValueError(
                f"setting 'superlink' is {value!r}: expected HOST:PORT without https://, such as "
                "fleet.example.org:443"
            )
        return value

    @field_validator("health")
    @classmethod
    def _is_on_loopback(cls, value: str) -> str:
        if value and not (_LOOPBACK.fullmatch(value) and _port_exists(value)):
            raise ValueError(
                f"setting 'health' is {value!r}: expected a port up to 65535 on loopback, such as "
                "127.0.0.1:8470, or nothing: whoever reaches it reads the site's status"
            )
        return value

    @model_validator(mode="after")
    def _socket_fits(self) -> Self:
        if len(str(self.socket).encode()) > LONGEST_PATH:
            raise ValueError(
                f"the trainer's socket {self.socket.name} would have a path of more than "
                f"{LONGEST_PATH} bytes, which no system takes: choose a shorter state or trainer"
            )
        return self

    @model_validator(mode="after")
    def _code_is_kept_apart(self) -> Self:
        if self.node == "supernode" and self.is_child and not self.allow_same_user:
            raise ValueError(
                'node is "supernode" and trainer "child": the code that a run brings would run as '
                "the trainer's user, who reads this site's records. Start `client trainer` as "
                'another user and name its socket in trainer, or keep node at "resident", which '
                "runs no code of a run; allow_same_user = true lets it read them"
            )
        return self

    @property
    def is_child(self) -> bool:
        """Whether the daemon starts the trainer itself."""
        return self.trainer == Path("child")

    @property
    def socket(self) -> Path:
        """Where the trainer listens."""
        return self.state / "socket" / "trainer" if self.is_child else self.trainer

    @property
    def memory(self) -> Path:
        """Where the daemon keeps what it must know after a restart."""
        return self.node_state or self.state / "node"

    @property
    def identity(self) -> Path:
        """Where this site's key for secure sums is, or would be."""
        return self.identity_key or self.state / "identity"

    @property
    def site(self) -> Site:
        """What the training needs."""
        return Site(self.base_model, self.data, self.name, self.state, self.rank)


def _port_exists(address: str) -> bool:
    return int(address.rpartition(":")[2]) <= 65535


_PATHS = (
    *("root_certificate", "node_key", "base_model", "data", "policy"),
    *("state", "node_state", "trainer", "log", "identity_key"),
)


def load_site(path: Path) -> SiteSettings:
    """Return the settings of a site.toml, with absolute paths.

    Raises:
        SettingsError: The file is missing, or a key is unknown, missing or out of range.
    """
    return site_settings(read_toml(path), path.absolute().parent, path.name)


def site_settings(values: Mapping[str, Any], directory: Path, source: str) -> SiteSettings:
    """Return the settings of a site.toml's values, with absolute paths.

    Args:
        values: As they stand in the file.
        directory: Of the file; absolute.
        source: Its name, for the error message.

    Raises:
        SettingsError: A key is unknown, missing or out of range.
    """
    absolute = dict(values)
    for key in _PATHS:
        value = absolute.get(key)
        if isinstance(value, str) and not (key == "trainer" and value == "child"):
            absolute[key] = str(directory / Path(value).expanduser())
    return load_settings(SiteSettings, absolute, source)


__all__ = ["SettingsError", "SiteSettings", "load_site", "site_settings"]
