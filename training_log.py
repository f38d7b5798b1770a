"""The record of a training run: `log.jsonl`, the loss picture, and the optional report targets."""

import json
import math
import sys
from pathlib import Path

import runtime_utils
from runtime_utils import UserError, is_main, warn


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_gb(device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Recorder:
    """Collects a line for every step and evaluation and writes them to `log.jsonl` on rank 0."""

    def __init__(self, args, output_dir: Path):
        self.args, self.path = args, output_dir / "log.jsonl"
        self.lines, self.step, self.writer = [], 0, None
        if is_main() and args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output_dir / "tensorboard"))
        if is_main() and args.report_to == "wandb":
            import wandb

            wandb.init(project=args.save_name, config=vars(args), dir=str(output_dir))

    def cut_back(self, step: int, evaluation_due: bool = False) -> None:
        """Drops the lines that a run resumed at `step` writes again, and damaged ones, such as a half-written last one.

        Arguments:
            evaluation_due: whether the evaluation of `step` itself will be made again too.

        Raises:
            UserError: when the log cannot be written.
        """
        self.step = step
        if not is_main():
            return
        kept = []
        if step and self.path.is_file():
            for line in self.path.read_bytes().split(b"\n")[:-1]:
                try:
                    values = json.loads(line.decode("utf-8"))
                    again = evaluation_due and values["step"] == step and "dev_loss" in values
                    if values["step"] <= step and not again:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    warn(f"{self.path}: dropped a damaged line: {line[:80].decode(errors='replace')!r}")
        runtime_utils.write_bytes_atomic(self.path, b"".join(kept))

    def __call__(self, values: dict, epoch: int) -> None:
        """Takes one optimizer step's line; every `--logging_steps` lines reach the disk."""
        self.step += 1
        self._add({"step": self.step, "epoch": epoch, **values})
        if self.step % self.args.logging_steps == 0:
            self.flush()

    def evaluation(self, step: int, loss: float) -> None:
        """Takes an evaluation's line."""
        self._add({"step": step, "dev_loss": loss, "dev_perplexity": perplexity(loss)})
        self.flush()

    def _add(self, line: dict) -> None:
        if is_main():
            self.lines.append(line)

    def flush(self) -> None:
        """Appends what has gathered to the file and sends it to the report target."""
        if not self.lines:
            return
        text = ""
        for line in self.lines:
            text += json.dumps(line) + "\n"
            self._report(line)
        self.lines = []
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({len(text)} bytes): {error.strerror or error}") from error

    def _report(self, line: dict) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, line["step"])
        if self.args.report_to == "wandb":
            import wandb

            wandb.log(values, step=line["step"])


def draw_loss(log_file: Path, picture: Path) -> None:
    """Draws training and dev loss over optimizer steps."""
    import io

    import matplotlib

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
    runtime_utils.write_bytes_atomic(picture, buffer.getvalue())
