"""What Ray starts in place of its own `default_worker.py`: asks for a worker, and ends when the worker does.

A worker that Ray starts imports Ray twice, then torch and transformers, which takes 8 seconds of a processor;
one that is forked from a process with all of it takes half of one. See `on_ray.cluster`.
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as asked:
    asked.connect(os.environ["LORICA_RAY_WORKERS"])
    asked.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode())
    asked.shutdown(socket.SHUT_WR)
    while asked.recv(1):  # the worker holds the other end
        pass
