"""Stand-in for `torch.utils.tensorboard`: a writer that buffers as the real one does, and TensorBoard's way to read.

Each writer makes one file of JSON lines. A start event hides what earlier files hold from its step on.
"""

import json
from pathlib import Path


class SummaryWriter:
    """Writes events into a folder."""

    def __init__(self, log_dir, purge_step=None):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        number = len(list(Path(log_dir).glob("events.*")))
        self._folder, self._file = log_dir, open(Path(log_dir) / f"events.{number:03d}", "w")  # noqa: SIM115
        self._buffer = [] if purge_step is None else [{"start": purge_step}]

    def add_scalar(self, tag, value, step):
        """Takes one point."""
        assert isinstance(value, int | float)
        self._buffer.append({"tag": tag, "value": value, "step": step})

    def add_hparams(self, hparam_dict, metric_dict, run_name=None):
        """Takes the hyper-parameters, which the real one puts into a file of its own in the folder `run_name`."""
        assert all(isinstance(value, bool | int | float | str) for value in hparam_dict.values())
        with SummaryWriter(Path(self._folder) / run_name) as writer:
            writer._buffer.append({"hparams": hparam_dict})

    def flush(self):
        """Brings the buffer to the disk."""
        self._file.writelines(json.dumps(event) + "\n" for event in self._buffer)
        self._file.flush()
        self._buffer = []

    def close(self):
        """Flushes and ends the file."""
        self.flush()
        self._file.write('{"closed": true}\n')
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def events(folder) -> list[dict]:
    """All events of a folder in the order of the files."""
    return [json.loads(line) for file in sorted(Path(folder).glob("events.*")) for line in file.open()]


def shown(folder) -> list[tuple[str, int]]:
    """(tag, step) of the points that TensorBoard shows, doubled ones included."""
    points = []
    for event in events(folder):
        if "start" in event:
            points = [point for point in points if point[1] < event["start"]]
        if "tag" in event:
            points.append((event["tag"], event["step"]))
    return points
