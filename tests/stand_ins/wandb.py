"""Stand-in for the package wandb that keeps its documented rules; the "server" is the file WANDB_SERVER.

- `init(id=…, resume="allow")` continues the run of that id from its last step, or makes one; without `resume` a new run
  begins.
- Steps only rise: a row of a step below the current one is dropped, rows of the same step become one.
- A row is sent when the next step's comes or the run is finished; a finished run takes no more.
"""

import json
import os
from pathlib import Path


class Error(Exception):
    """The base of wandb's errors."""


class Run:
    """A run as this process sees it."""

    def __init__(self, id: str, server: dict):
        self.id, self._server = id, server
        rows = server[id]["rows"]
        self.starting_step = self._step = int(max(rows, key=int)) + 1 if rows else 0
        self._pending, self._finished = {}, False

    def define_metric(self, name, step_metric=None):
        """Chooses what a metric is drawn over."""
        self._server[self.id]["metrics"][name] = step_metric

    def log(self, data, step=None):
        """Takes a row."""
        assert not self._finished, "a finished run takes no rows"
        step = self._step if step is None else step
        if step < self._step:
            self._server[self.id]["dropped"].append(step)
            return
        if step > self._step:
            self._send()
            self._step = step
        self._pending |= data

    def finish(self, exit_code=None):
        """Ends the run."""
        self._send()
        self._server[self.id]["exit_code"] = exit_code
        self._finished = True
        _write(self._server)

    def _send(self):
        if self._pending:
            self._server[self.id]["rows"][str(self._step)] = self._pending
            self._pending = {}
        _write(self._server)


def _read() -> dict:
    file = Path(os.environ["WANDB_SERVER"])
    return json.loads(file.read_text()) if file.exists() else {}


def _write(server: dict) -> None:
    Path(os.environ["WANDB_SERVER"]).write_text(json.dumps(server))


def init(project=None, config=None, dir=None, id=None, resume=None):
    """Starts or continues a run."""
    if os.environ.get("WANDB_REFUSES"):
        raise Error("No API key configured. Use `wandb login` to log in.\nSecond line")
    server = _read()
    if id is None or resume is None or id not in server:
        id = id or f"run{len(server)}"
        server[id] = {"rows": {}, "metrics": {}, "dropped": [], "inits": 0}
    server[id] |= {"project": project, "config": config, "inits": server[id]["inits"] + 1}
    _write(server)
    return Run(id, server)
