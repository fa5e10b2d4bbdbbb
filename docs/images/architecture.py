"""Draws architecture.svg beside this file: `python docs/images/architecture.py`. The page explains what is in it."""

from pathlib import Path

WIDTH, HEIGHT = 960, 430
INK, LINE, PAPER = "#1f2937", "#64748b", "#ffffff"
FILLS = {
    "data": "#e0f2fe",
    "run": "#ede9fe",
    "outer": "#f1f5f9",
    "rule": "#fef3c7",
    "base": "#dcfce7",
    "out": "#ffe4e6",
}


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str, top: bool = False) -> str:
    """A rounded box, its first line bold; the text in the middle, or at the top of a box that holds others."""
    start = y + 20 if top else y + height / 2 - 8 * (len(lines) - 1) + 5
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{FILLS[fill]}" stroke="{LINE}"/>',
        *(
            f'<text x="{x + width / 2:g}" y="{start + 16 * place:g}" text-anchor="middle"'
            f' font-weight="{600 if place == 0 else 400}">{line}</text>'
            for place, line in enumerate(lines)
        ),
    ]
    return "\n".join(parts)


def arrow(*points: tuple[int, int], text: str = "", at: tuple[int, int] = (0, 0)) -> str:
    """A line through the points, with a head at its end, and a word beside it."""
    path = " ".join(f"{x},{y}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>'
    return line + (f'\n<text x="{at[0]}" y="{at[1]}" text-anchor="middle" fill="{LINE}">{text}</text>' if text else "")


def picture() -> str:
    """The whole file."""
    rows = []
    for place, (name, call, rules, base) in enumerate(
        [
            ("P0 apply", "state.apply", "precision, remat, tensor_parallel, fsdp", "module as a function"),
            ("P1 gradient", "lm.value_and_grad", "ddp, fsdp, accumulate, dp_sgd, precision", "gradient engine"),
            (
                "P2 update",
                "state.apply_gradients",
                "guard, clip, dp_sgd, precision, donate",
                "optimizer: plain or fused",
            ),
        ]
    ):
        y = 112 + 72 * place
        rows += [
            box(262, y, 150, 52, "outer", name, call),
            box(442, y, 260, 52, "rule", "rules, outermost first", rules),
            box(732, y, 176, 52, "base", "base", base),
            arrow((412, y + 26), (438, y + 26)),
            arrow((702, y + 26), (728, y + 26)),
        ]
    body = [
        box(20, 60, 150, 60, "data", "Loader", "order of (seed, epoch)"),
        box(20, 180, 150, 60, "run", "Runner", "counts, logs, saves"),
        box(
            240,
            40,
            690,
            300,
            "outer",
            "step(state, batch) under its transforms",
            "the host side: seeding, raising, tracing",
            top=True,
        ),
        *rows,
        box(262, 362, 200, 48, "out", "typed metrics", "merged at log time"),
        box(500, 362, 180, 48, "out", "sinks", "TensorBoard, JSONL, …"),
        box(20, 362, 150, 48, "out", "checkpoint", "state and all else"),
        arrow((95, 120), (95, 176), text="batch", at=(120, 152)),
        arrow((170, 196), (236, 196), text="calls", at=(203, 188)),
        arrow((240, 226), (174, 226), text="new state", at=(205, 242)),
        arrow((362, 340), (362, 358)),
        arrow((462, 386), (496, 386)),
        arrow((95, 240), (95, 358), text="state", at=(118, 304)),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
            "<title>The path of a batch through a step</title>",
            f'<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
            *body,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())
