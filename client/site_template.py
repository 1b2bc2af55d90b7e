"""The site.toml that `client init` writes: every key, with a comment; a test holds it to that."""

from __future__ import annotations

import json

PLACEHOLDERS = {
    "superlink": "fleet.example.org:443",
    "root_certificate": "ca.crt",
    "base_model": "base-model",
    "data": "records.jsonl",
}
"""What stands in a new file until somebody says the real thing."""
_ORDINARY = {
    "node_key": "node",
    "identity_key": "identity",
    "policy": "policy.toml",
    "state": "state",
    "name": "",
    "trainer": "child",
    "socket_group": "",
    "health": "",
}
"""Of a site whose daemon and trainer are one user's."""
TWO_CONTAINERS = {
    "trainer": "/run/fedge/trainer",
    "socket_group": "fedge",
    "state": "/var/lib/fedge-trainer",
    "node_state": "/var/lib/fedge-node",
    "health": "127.0.0.1:8470",
}
"""Of a site whose two halves are containers, as docker/compose.yaml mounts them."""

_TEMPLATE = """\
# site.toml: what this site says of itself to its own daemon and trainer. Nothing in it is sent
# anywhere but the name. Relative paths start at this file's directory. `client doctor --config
# site.toml` says what is still missing.

# HOST:PORT of the coordinator's port for sites, and the PEM file of the CA that signed its
# certificate. Get the second by a way on which nobody else could swap it.
superlink = @superlink@
root_certificate = @root_certificate@

# This site's private key (ECDSA P-384). The coordinator registers its public half, and knows the
# site by it: never copy it to another machine.
node_key = @node_key@

# This site's private key (Ed25519) in secure sums, for life. Only the trainer reads it. `client
# identity` prints the public half, which the other sites list in their policies: tell it to them
# yourself, not by way of the coordinator.
identity_key = @identity_key@

# Directory of the base model (Hugging Face layout), the same bytes as at every other site.
base_model = @base_model@

# The site's records: one JSON object with prompt and response a line. They are read by the trainer
# only, and never leave.
data = @data@

# What this site allows. `client policy check policy.toml` says it in sentences.
policy = @policy@

# Directory for what must survive a restart: the ledger, answers, the optimizer's state. Back it up:
# it holds what the records have spent of their privacy.
state = @state@

# What the site calls itself, for the coordinator's tables; up to 64 characters.
name = @name@

# Slices of the adapter that this site trains, for a smaller GPU. Absent: all.
# rank = 8

# "resident": the daemon is the Flower node and runs no code of a run. "supernode": a stock
# flower-supernode is, which runs the app that a run brings: that needs a trainer that is started
# apart, as another user, and records, state and policy out of the daemon's reach.
node = "resident"
# Whether that app may be the trainer's user after all, and so read the records: not with real data.
# allow_same_user = false

# "child": the daemon starts the trainer and ends it. Else the socket of a trainer that is started
# apart (`client trainer --config site.toml`), as another user that alone can read the data.
trainer = @trainer@
# Group that may speak to that trainer, where the node is another user. Empty: its own user only.
socket_group = @socket_group@
# Directory of the daemon's own state, where it may not read `state`. Absent: in `state`.
@node_state@

# HOST:PORT on loopback on which the daemon answers GET /healthz. Empty: none.
health = @health@

# Seconds between two looks for a message while there is work, and to what they grow without.
poll_s = 0.1
idle_poll_s = 1.0
# Seconds that SIGTERM lets the round in hand go on.
drain_s = 3600.0

# Largest message that the trainer takes in, in bytes.
max_message_bytes = 4_294_967_296

# File of the log. Absent: stderr. Its level: "debug", "info", "warning" or "error".
# log = "site.log"
log_level = "info"
"""


def site_template(**known: str) -> str:
    """Return the text of a new site.toml.

    Args:
        known: Values of keys that somebody said; the others get an ordinary value or a placeholder.
    """
    values = PLACEHOLDERS | _ORDINARY | known
    node_state = values.pop("node_state", "")
    line = f"node_state = {toml_string(node_state)}" if node_state else '# node_state = "node"'
    text = _TEMPLATE.replace("@node_state@", line)
    for key, value in values.items():
        text = text.replace(f"\n{key} = @{key}@\n", f"\n{key} = {toml_string(value)}\n")
    return text


def toml_string(text: str) -> str:
    """Return a text as a basic string of TOML.

    JSON's escapes are TOML's, but for surrogate pairs (hence no ASCII only) and DEL, which JSON
    leaves as it is.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
