"""Common parts of all pictures: size, colours that colour-blind readers tell apart, whole files."""

import io

from mindmerger.runtime.files import write_bytes_atomic

# Okabe and Ito's palette (2008), without yellow, which is faint on white; then four that are far from it and from each
# other, in dichromatic vision too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
COLOURS += ("#5B2C00", "#B2DF8A", "#332288", "#882255")
MARKERS = "osD^vP*X"
HATCHES = ("", "//", "..", "xx")
LINE_STYLES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float, columns: int = 1):
    """Makes a figure of that many inches and its axes (one, or a list of `columns`), without any global state."""
    from matplotlib.figure import Figure

    # pyplot would choose a display's backend, and keeps every figure in memory until it is closed.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def colour(i: int) -> str:
    """Returns the i-th colour; they repeat after twelve."""
    return COLOURS[i % len(COLOURS)]


def hatch(i: int) -> str:
    """Returns the hatching of the i-th of many bars: it tells apart equal colours, or nearly equal ones in print."""
    return HATCHES[(i // 4) % len(HATCHES)]


def marker(i: int) -> str:
    """Returns the marker of the i-th of many series: it changes where the colours repeat."""
    return MARKERS[(i // len(COLOURS)) % len(MARKERS)]


def line(i: int) -> dict:
    """Returns colour, style and marker of the i-th of several lines: those that lie on each other stay visible."""
    return {
        "color": colour(i),
        "linestyle": LINE_STYLES[i % len(LINE_STYLES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": max(3, 8 - 1.5 * i),
    }


def legend_label(name: str) -> str:
    """Returns a user's name as it can stand in a legend, from which names that begin with "_" are left out."""
    return f" {name}" if name.startswith("_") else name


def save_figure(figure, path) -> None:
    """Writes a PNG, whole or not at all, with every text as it is.

    A byte of a label that is not UTF-8 becomes \\udcXX, as in the tables, since fonts have no glyph for it; two dollars
    in a label are not a formula.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode("utf-8"))
        text.set_parse_math(False)
    # In memory first: a kill or a full disk must not leave half a picture in the place of a whole one.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomic(path, buffer.getvalue())
