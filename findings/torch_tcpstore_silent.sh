#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    TCPStore(host, port, is_master=False, timeout=2 seconds), where the service that listens at host:port accepts
#           connections and sends nothing, as an HTTP server does until it is asked.
# Behavior: the constructor never returns: `timeout` bounds connecting, but not the wait for the store's answer. So a
#           process whose MASTER_PORT another service uses hangs in init_process_group, whatever its timeout.
# Output:   after 10 s the constructor with a timeout of 2 s has not returned
# Upstream: the documentation says that the timeout is used "during initialization"; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import datetime
import os
import socket
import threading

from torch.distributed import TCPStore

service = socket.create_server(("127.0.0.1", 0))
done = threading.Event()


def connect():
    try:
        TCPStore("127.0.0.1", service.getsockname()[1], is_master=False, timeout=datetime.timedelta(seconds=2))
    finally:
        done.set()


threading.Thread(target=connect, daemon=True).start()
if done.wait(10.0):
    raise SystemExit("the behavior has changed")
print("after 10 s the constructor with a timeout of 2 s has not returned", flush=True)
os._exit(0)  # the thread cannot be ended
PY
