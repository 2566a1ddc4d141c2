"""What `paving serve` starts, with edits that fail for prompts of FAULTY_LENGTH tokens.

The fault stands at module level, so that an engine process that is spawned has it, too.
"""

from __future__ import annotations

import os
import runpy
import sys

from paving.serving.command import SERVER, server_command
from paving.serving.served import Served

LENGTH = int(os.environ["FAULTY_LENGTH"])
after_layer = Served.after_layer


def breaking(self, layer, hidden, residual):
    faulty = [s for s in self._spans if s.prompt == LENGTH and self.requests[s.request].strength is not None]
    if faulty and layer == self.controller.config.edit_layers[3]:
        raise RuntimeError("a fault for the test")
    return after_layer(self, layer, hidden, residual)


Served.after_layer = breaking

if __name__ == "__main__":
    _serve, folder, _port, port, _dashes, *extra = sys.argv[1:]
    command, environment = server_command(folder, model=None, host="127.0.0.1", port=int(port), extra=extra)
    os.environ.update(environment)
    sys.argv = command[2:]  # behind python -m
    runpy.run_module(SERVER, run_name="__main__", alter_sys=False)
