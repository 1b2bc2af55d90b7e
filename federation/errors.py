"""What can go wrong, named by who must act.

- FedgeError                 it failed (exit code 1)
  - UserError                the user must change something (exit code 2)
    - SettingsError          federation.settings: a setting is unknown or out of range
    - ModelError             federation.base_model: a model directory is missing or does not fit
    - DataError              client.records: a line of a data set
    - StudentError           distill.student: no legal student of that size
  - WireError                federation.wire: bytes that are not the update they claim to be
  - AggregationError         federation.aggregation: updates that cannot be averaged
  - RoundError               federation.rounds: too few sites answered

Each message holds the value seen, what was expected, and the way out. No message ever holds
text from a data set.
"""


class FedgeError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class UserError(FedgeError):
    """The user must change something: an argument, a file, a setting."""

    exit_code = 2
