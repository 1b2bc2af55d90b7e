"""`flower-supernode`, whose lease ends 24 s after it dies and not 60 s: a test kills it often.

Flower has one constant for how often a SuperNode says that it lives, and how long its app may be
silent.
"""

import flwr.common.constant

flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL = 12

from flwr.supernode.cli.flower_supernode import flower_supernode  # noqa: E402

if __name__ == "__main__":
    flower_supernode()
