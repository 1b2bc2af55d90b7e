"""What can go wrong, named by who must act.

- FedgeError                 it failed (exit code 1)
  - UserError                the user must change something (exit code 2)
    - SettingsError          federation.settings: a setting is unknown or out of range
    - ResumeError            federation.run_directory: a run that cannot be gone on with
    - SecureMemoryError      federation.secure_memory: what a server kept of a secure sum is damaged
    - ModelError             federation.base_model: a model directory is missing or does not fit
    - DataError              client.records: a line of a data set
    - StudentError           distill.student: no legal student of that size
    - SiteStateError         client.site_state: what a site kept between rounds is damaged
    - FleetKeyError          client.superlink: the SuperLink does not take the site's key
    - RequestError           client.request: what a run asks is no request
    - BudgetError            federation.accountant: no noise keeps within this budget
    - FingerprintError       client.fingerprint: the secret of a site's fingerprints
    - NotALedgerError        client.chain: there is no ledger in that place
    - ClosedError            client.health: a file that is another user's
  - EventLogError            federation.events: a line of a run's log that cannot be read
  - WireError                federation.wire: bytes that are not the update they claim to be
    - MissingReferenceError  federation.wire: a change of an adapter that this side does not hold
  - AggregationError         federation.aggregation: updates that cannot be averaged
  - RoundError               federation.exchange: too few sites answered
  - FleetError               client.superlink: the SuperLink refused a request
    - CertificateError       client.superlink: the SuperLink's certificate is not one to trust
  - RunOverError             client.superlink: nobody waits for a reply any more
  - Stopped                  client.superlink: the node was told to leave
  - LinkError                client.trainer_link: no question or no answer
    - TrainerLostError       client.trainer_link: nobody answers at the trainer's socket
  - Refused                  client.reasons: this site's policy does not allow it
  - LedgerError              client.chain: a ledger that is broken, in use, or takes no row
  - PrivacyError             client.record_gradients: one record cannot be told apart
  - SecureSumError           federation.secure_messages: a secure sum that cannot go on
  - ChildError               client.child: a program of the site ends as soon as it is started

Each message holds the value seen, what was expected, and the way out. No message ever holds
text from a data set.
"""


class FedgeError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class UserError(FedgeError):
    """The user must change something: an argument, a file, a setting."""

    exit_code = 2
