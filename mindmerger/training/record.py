"""The record of a training run: `log.jsonl`, the loss picture, and the optional report targets."""

import contextlib
import json
import math
import sys
from pathlib import Path

from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.files import unfollowed, write_bytes_atomic, write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import is_main, log, warn

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_run_id"
TRACKIO_FILE = "trackio_run.json"


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf  # a double overflows at exp(709.8)


def peak_memory_gb(device) -> float:
    """Returns the peak of memory so far, in GB of 10^9 bytes: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    # Linux counts in kB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class TensorBoard:
    """Every line as scalars, and the arguments as hyper-parameters, in the output folder's `tensorboard`."""

    def __init__(self, args, output_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an abandoned course wrote from this step on is hidden, the step itself included.
        self.writer = SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=step)
        # Of hyper-parameters the writer refuses lists and leaves None out.
        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in vars(args).items()}
        self.writer.add_hparams(plain, {}, run_name=".")

    def add(self, line: dict) -> None:
        """Adds a line of the log."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Brings what was added to the disk."""
        self.writer.flush()

    def close(self, failed: bool) -> None:
        """Ends the file."""
        self.writer.close()


class WandB:
    """Every line as a row of one Weights & Biases run, which a resumed training run continues.

    wandb drops rows whose step is not above that of the rows it has, and a step and its evaluation may be sent by
    different processes. So row 2n holds step n and row 2n + 1 its evaluation, and charts are drawn over "step".
    """

    def __init__(self, args, output_dir: Path, step: int):
        import wandb

        file = output_dir / WANDB_FILE
        same = {"id": file.read_text(encoding="utf-8").strip(), "resume": "allow"} if step and file.is_file() else {}
        try:
            self.run = wandb.init(project=args.save_name, config=vars(args), dir=str(output_dir), **same)
        except wandb.Error as error:
            raise UserError(
                f"--report_to wandb: {one_line(error)}: log in with 'wandb login', or set WANDB_MODE=offline"
            ) from error
        write_text_atomic(file, self.run.id + "\n")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.first = self.run.starting_step
        if (self.first - 1) // 2 > step:
            log(f"wandb has the steps {step + 1} to {(self.first - 1) // 2} of its run already: they stay as they are")

    def add(self, line: dict) -> None:
        """Adds a line of the log, unless the run has it."""
        row = 2 * line["step"] + ("dev_loss" in line)
        if row >= self.first:
            self.run.log(line, step=row)

    def flush(self) -> None:
        """Does nothing: a process of wandb's sends what was added."""

    def close(self, failed: bool) -> None:
        """Ends this part of the run."""
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Every line as a row of one run of Trackio's, which a resumed training run continues.

    Trackio keeps whatever it gets, the same step twice too, and may keep it in a Space that is slow to ask. So a file
    beside the log says up to where rows were sent. A kill may lose the last half second of them.
    """

    def __init__(self, args, output_dir: Path, step: int):
        import trackio

        self.file = output_dir / TRACKIO_FILE
        self.sent = {"run": None, "step": 0, "evaluation": 0}
        if step and self.file.is_file():
            self.sent = self._read()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a dry run's and an evaluation's results go to the other
                self.run = trackio.init(
                    args.save_name, name=self.sent["run"], config=vars(args), resume="allow", embed=False
                )
        except (OSError, ValueError) as error:
            raise UserError(
                f"--report_to trackio: {one_line(error)}: log in with 'hf auth login', or unset TRACKIO_SPACE_ID and "
                "TRACKIO_SERVER_URL to keep the run on this machine"
            ) from error
        self.sent["run"] = self.run.name
        write_json_atomic(self.file, self.sent)
        if self.sent["step"] > step:
            log(f"trackio has the steps {step + 1} to {self.sent['step']} of its run already: they stay as they are")

    def _read(self) -> dict:
        try:
            sent = json.loads(self.file.read_text(encoding="utf-8"))
            return {"run": str(sent["run"]), "step": int(sent["step"]), "evaluation": int(sent["evaluation"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is damaged: remove it, and trackio begins another run") from error

    def add(self, line: dict) -> None:
        """Adds a line of the log, unless the run has it."""
        kind, step = "evaluation" if "dev_loss" in line else "step", line["step"]
        if step > self.sent[kind]:
            self.run.log({name: value for name, value in line.items() if name != "step"}, step=step)
            self.sent[kind] = step

    def flush(self) -> None:
        """Notes what was sent: a thread of Trackio's stores it."""
        write_json_atomic(self.file, self.sent)

    def close(self, failed: bool) -> None:
        """Waits until all is stored, and ends this part of the run."""
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # not the run's own `finish`: that one would be repeated when Python ends


TARGETS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


class Recorder:
    """Collects a line for every step and evaluation and writes them to `log.jsonl` on rank 0."""

    def __init__(self, args, output_dir: Path):
        self.args, self.path = args, output_dir / "log.jsonl"
        self.lines, self.step, self.target = [], 0, None

    def rewind(self, step: int, evaluation_due: bool = False) -> None:
        """Drops the lines that a run resumed at `step` writes again, and damaged ones, such as a half-written last one;
        then opens the report target there.

        Args:
            evaluation_due: whether the evaluation of `step` itself will be made again too.

        Raises:
            UserError: when the log cannot be written, or the report target cannot be reached.
        """
        self.step = step
        if not is_main():
            return
        kept = []
        if step and self.path.is_file():
            # Behind the last line end stands what a kill cut short. As bytes: one that is not UTF-8 costs its own line
            # and not the log.
            for line in self.path.read_bytes().split(b"\n")[:-1]:
                try:
                    values = json.loads(line.decode("utf-8"))
                    again = evaluation_due and values["step"] == step and "dev_loss" in values
                    if values["step"] <= step and not again:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    warn(f"{self.path}: dropped a damaged line: {line[:80].decode(errors='replace')!r}")
        write_bytes_atomic(self.path, b"".join(kept))
        if self.args.report_to in TARGETS:
            self.target = TARGETS[self.args.report_to](self.args, self.path.parent, step)
            # TensorBoard hides the step itself along with all later ones.
            for values in map(json.loads, kept):
                if values["step"] == step:
                    self.target.add(values)

    def __call__(self, values: dict, epoch: int) -> None:
        """Takes one optimizer step's line; every `--logging_steps` lines reach the disk."""
        self.step += 1
        self._add({"step": self.step, "epoch": epoch, **values})
        if self.step % self.args.logging_steps == 0:
            self.flush()

    def evaluation(self, step: int, loss: float, accuracy: float | None = None) -> None:
        """Takes an evaluation's line."""
        line = {"step": step, "dev_loss": loss, "dev_perplexity": perplexity(loss)}
        self._add(line | ({"dev_accuracy": accuracy} if accuracy is not None else {}))
        self.flush()

    def _add(self, line: dict) -> None:
        if is_main():
            self.lines.append(line)

    def flush(self) -> None:
        """Appends what has gathered to the file and sends it to the report target."""
        if not self.lines:
            return
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        try:
            # Never through a link: someone else's file could stand behind it.
            with open(self.path, "a", encoding="utf-8", opener=unfollowed) as file:
                file.write(text)
            if self.target is not None:
                for line in self.lines:
                    self.target.add(line)
                self.target.flush()
        except OSError as error:
            where = error.filename or self.path
            raise UserError(f"cannot write {where} ({len(text)} bytes): {error.strerror or error}") from error
        self.lines = []

    def close(self, failed: bool) -> None:
        """Closes the report target."""
        if self.target is not None:
            self.target.close(failed)


@contextlib.contextmanager
def recording(args, output_dir: Path):
    """Context manager: gives a `Recorder`, whose report target learns at the end whether the run failed."""
    record = Recorder(args, output_dir)
    try:
        yield record
    # Not Exception: an interrupt or an exit is a failed run to the target as well.
    except BaseException:
        record.close(failed=True)
        raise
    record.close(failed=False)


def draw_loss(log_file: Path, picture: Path) -> None:
    """Draws training and dev loss over optimizer steps."""
    import io

    import matplotlib

    # The others look for a display, which a compute node lacks.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("dev_loss", "dev split")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if key == "dev_loss" else None, label=label, linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per target token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_bytes_atomic(picture, buffer.getvalue())
