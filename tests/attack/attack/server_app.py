"""Mallory at the coordinator: asks every node, and writes down what comes home."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(config["num_sites"]):
        time.sleep(0.2)
    contents = {name: Path(str(config[name])).read_bytes() for name in ("adapter", "other")}
    arrays = {
        name: ArrayRecord({name: Array(np.frombuffer(content, dtype=np.uint8))})
        for name, content in contents.items()
    }
    asked = {"server_round": 1, "run": str(config["run"]), "told": str(config["told"])}
    records = {
        **arrays,
        "round": ConfigRecord(asked),
        "training": ConfigRecord({"num_steps": 1}),
    }
    messages = [
        Message(RecordDict(records), dst_node_id=node, message_type="train", ttl=900.0)
        for node in nodes
    ]
    replies = grid.send_and_receive(messages, timeout=600)
    home = []
    for reply in replies:
        if reply.has_error():
            home.append({"error": [reply.error.code, str(reply.error.reason)]})
        else:
            home.append(json.loads(reply.content["adapter"]["adapter"].numpy().tobytes()))
    Path(str(config["report"])).write_text(json.dumps(home, indent=1))
