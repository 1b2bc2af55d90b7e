"""The policy.toml that `client init` writes: every key, with a comment, and safe values.

It loads as it is and allows nothing: somebody has to name a base model, and a run or a signer.
"""

from collections.abc import Sequence

from client.site_template import toml_string

POLICY_TEMPLATE = """\
# policy.toml: what this site allows. Read by this site's trainer only; nothing that comes from
# outside can change it. What is not written here is not allowed: a list that is absent is empty, a
# largest value that is absent is 0. `client policy check policy.toml` says what it allows,
# `client policy explain REQUEST.json --policy policy.toml` what it makes of a request.

[models]
# Digests of the base models that may be trained, or "any".
base = []

[runs]
# Ids of the runs that may ask, or "any". Every run named here may use up what is allowed below.
allowed = []
# Ed25519 public keys (64 hex digits), such as `federation keygen` prints: runs that one of them
# signed may ask too, exactly as they were signed.
signers = []
# sha256 of the app bundles that a run may carry, or "any". A resident node runs no code of one. A
# stock SuperNode does, and cannot tell the trainer which: there only "any" lets a run in.
bundles = ["any"]

[adapter]
# Modules that may be trained: * any characters, ? one.
modules = ["model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj"]
max_rank = 64
max_alpha = 128

[training]
# Optimizer steps of a round.
max_steps = 64
# Records of a step (batch_size * accumulation).
max_batch = 64
# Longest record, in tokens.
max_tokens = 1024
# Largest learning rate.
max_learning_rate = 0.01
# Last round that a run may ask.
max_rounds = 50

[traffic]
# Number formats in which an update may leave: "float32", "bfloat16", "int8", "int4".
uplink = ["float32", "bfloat16"]
# Bytes of one update, and of all updates of a run.
max_round_bytes = 200_000_000
max_run_bytes = 10_000_000_000

[aggregation]
# What the server may make of the updates, or "any". Without a secure sum this is its word alone.
kinds = ["alternating"]
# Whether the server may learn no more than the sum over many sites.
secure_sum_required = true
# Fewest sites in a sum, this one included. Without a secure sum only the server's word.
min_cohort = 3
# Identities (64 hex digits: `client identity`) of the sites that may be in a secure sum with this
# one, told by the sites themselves and not by the coordinator; or "any": then a coordinator that
# cheats can play the other sites and open this one's update.
cohort = []

[privacy]
# Whether every round must be differentially private (DP-SGD, per record). One round without noise
# makes the epsilon of its data infinite, for good.
required = true
# Smallest noise multiplier.
noise_floor = 0.5
# Largest L2 norm of one record's gradient.
max_record_clip_norm = 1.0
# What a data set may spend for life, over all runs, at delta. Delta must stay below 1 / records.
epsilon = 8.0
delta = 1e-6
# Whether only one factor of the adapter may learn at a time: noise in both multiplies.
one_factor_only = true

[metrics]
# Numbers that may leave beside the update, of "num-examples", "train_loss" and "seconds". Each is
# told by the records, and the noise does not cover it: a step of DP-SGD takes longer the more
# records it drew. So none leaves unless you list it.
allowed = []
max_count = 3
# Significant digits that are left of each.
digits = 3

[quiet_hours]
# When nothing is trained and nothing leaves, by the clock of this time zone.
time_zone = "UTC"
windows = []
# A window that ends before it begins goes on into the next day:
# windows = [{ days = ["mon", "tue", "wed", "thu", "fri"], from = "22:00", to = "06:00" }]
"""


def policy_template(*, base_models: Sequence[str] = (), signers: Sequence[str] = ()) -> str:
    """Return the text of a new policy.toml.

    Args:
        base_models: Digests that it allows, in hex.
        signers: Ed25519 public keys whose runs it allows, in hex.
    """
    return POLICY_TEMPLATE.replace("\nbase = []\n", f"\nbase = {_list(base_models)}\n").replace(
        "\nsigners = []\n", f"\nsigners = {_list(signers)}\n"
    )


def _list(words: Sequence[str]) -> str:
    return f"[{', '.join(map(toml_string, words))}]"
