"""A real SuperLink in a thread of the test: flwr's own app on loopback, with TLS and node keys.

The test holds its state, and so does what a run's ServerApp would do: send a message to a node and
take the reply. Being in the test's process, it can be stopped at a point and started again.
"""

import gc
import logging
import os
import socket
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deployment"))


class LocalSuperlink:
    """One SuperLink with one registered site and one run."""

    def __init__(self, directory: Path) -> None:
        from certificates import issue_server_certificate, make_authority, make_node_key
        from processes import free_ports

        self.directory = directory
        self.certificate = make_authority(directory)
        issue_server_certificate(directory, "superlink", ["127.0.0.1"])
        self.node_key = make_node_key(directory)
        (self.port,) = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self.start()
        self.node_id = self.register(self.node_key)
        self.run_id = self.start_run()
        self.ended = threading.Event()
        threading.Thread(target=self.keep_run_alive, daemon=True).start()

    def start(self) -> None:
        import uvicorn

        os.environ["FLWR_DATABASE"] = str(self.directory / "state.db")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # alembic's and fastapi's own, in flwr's hands
            from flwr.superlink.main import create_app

            logging.getLogger("flwr").disabled = True
            app = create_app()
        del os.environ["FLWR_DATABASE"]
        self.state: Any = app.state.linkstate_factory.state()
        config = uvicorn.Config(
            app,
            ssl_certfile=str(self.directory / "superlink.crt"),
            ssl_keyfile=str(self.directory / "superlink.key"),
            log_level="critical",
            ws="none",
            loop="asyncio",
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        # Said to be TCP, as asyncio's own sockets are: else every answer waits 40 ms for Nagle.
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", self.port))
        self.thread = threading.Thread(target=self.server.run, args=[[self.socket]], daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            self.thread.join(0.05)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.socket.close()
        del self.server, self.thread
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()  # uvicorn leaves the connections of clients that stay to the collector

    def register(self, node_key: Path) -> int:
        from flwr.common.constant import NOOP_FLWR_AID
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key: Any = load_ssh_private_key(node_key.read_bytes(), None)
        public = public_key_to_bytes(key.public_key())
        node_id = int(self.state.create_node(NOOP_FLWR_AID, "test", public, 30))
        # A message may be sent to a node that was there once.
        assert self.state.activate_node(node_id, 30)
        assert self.state.deactivate_node(node_id)
        return node_id

    def start_run(self) -> int:
        from flwr.common.constant import NOOP_FLWR_AID
        from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType

        run_id = self.state.create_run(
            "a/b", "1", "ab" * 32, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (run,) = self.state.get_run_info(run_ids=[run_id])
        self.task_id = run.primary_task_id
        self.token = self.state.claim_task(self.task_id)
        assert self.state.activate_task(self.task_id)
        return int(run_id)

    def keep_run_alive(self) -> None:
        while not self.ended.wait(10):  # a run that is silent for 60 s counts as failed
            self.state.acknowledge_task_heartbeat(self.task_id)

    def close(self) -> None:
        self.ended.set()
        self.stop()

    def send(self, content: bytes, *, kind: str = "train", ttl: float = 600.0) -> str:
        """Put a message for the site there, whole."""
        from flwr.common.constant import SUPERLINK_NODE_ID
        from flwr.supercore.date import now
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
        )

        records = RecordDict(
            {
                "adapter": ArrayRecord({"adapter": Array(np.frombuffer(content, np.uint8))}),
                "round": ConfigRecord({"server_round": 1, "run": "ab" * 8}),
                "training": ConfigRecord({"num_steps": 2}),
            }
        )
        metadata = Metadata(
            self.run_id, "", SUPERLINK_NODE_ID, self.node_id, "", "1", now().timestamp(), ttl, kind
        )
        metadata.delivered_at = ""
        message = make_message(metadata, content=records)
        metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run_id)
        stored, _ = self.state.store_message_and_object_tree(
            message, get_object_tree(message), session
        )
        assert stored
        for object_id, part in get_all_nested_objects(message).items():
            self.state.store_object(self.run_id, session, object_id, part.deflate())
        return str(message.object_id)

    def grid(self) -> Any:
        """Return what a run's ServerApp gets: flwr's client with the token of the run."""
        from flwr.superlink.grid.http_grid import HttpGrid

        certificate = self.certificate.read_bytes()
        made: Any = HttpGrid(self.address, False, certificate, token=self.token)
        (run,) = self.state.get_run_info(run_ids=[self.run_id])
        made.set_run(run)
        return made

    def take_reply(self, message_id: str) -> tuple[Message, list[str]] | None:
        """Take a reply as the ServerApp does: its head, and the ids of its objects."""
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        replies = self.state.get_message_res({message_id}, self.run_id)
        if not replies:
            return None
        self.state.delete_messages({message_id})
        (reply,) = replies
        try:
            tree = self.state.object_store.get_object_tree(reply.metadata.message_id)
        except Exception:  # made by the SuperLink itself: the node is not there
            return reply, []
        return reply, [part.object_id for part in iterate_object_tree(tree)]

    def whole_reply(self, taken: tuple[Message, list[str]]) -> Message:
        """Return a reply with its content; every object must be there."""
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        contents = {}
        for object_id in taken[1]:
            contents[object_id] = self.state.get_object(self.run_id, object_id)
            assert contents[object_id], "an object of the reply is missing"
        reply: Any = inflate_object_from_contents(taken[0].metadata.message_id, contents)
        return reply
