"""Loss curve and contact sheet."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from stiv_deploy.stiv_ref import plots
from stiv_deploy.stiv_ref.commands.plot import plot
from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.plots import (
    Row,
    contact_sheet,
    fitted,
    label_font,
    legend_below,
    plot_training,
    read_stages,
    smooth,
)

ROOT = Path(__file__).parents[3]


def write_log(path: Path, entries: list[tuple[int, str, int, float]], tail: str = "") -> Path:
    lines = [json.dumps({"stage": s, "task": t, "step": n, "loss": x}) for s, t, n, x in entries]
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def test_a_resumed_log_counts_each_step_once_and_a_torn_line_not(tmp_path: Path) -> None:
    entries = [(1, "t2i", 0, 2.0), (1, "t2i", 1, 1.5), (1, "t2i", 1, 1.4), (0, "vae", 0, 9.0)]
    log = write_log(tmp_path / "log.jsonl", entries, '{"stage": 1, "ta')
    vae, images = read_stages(log)
    assert [(each.stage, each.task) for each in (vae, images)] == [(0, "vae"), (1, "t2i")]
    assert images.values("step").tolist() == [0, 1]
    assert images.values("loss").tolist() == [2.0, 1.4]


def test_smoothing_is_a_trailing_mean() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6])
    np.testing.assert_allclose(smooth(np.array([4.0, 2])), [4, 3])


def test_smoothing_passes_over_what_is_missing() -> None:
    got = smooth(np.array([np.nan, 1.0, np.nan, 5, np.nan]), 3)
    np.testing.assert_allclose(got, [np.nan, 1, 1, 3, 5])


NEW = {
    "stage": 1,
    "name": "low",
    "task": "t2i",
    "loss": 1.0,
    "gradient_norm": 2.0,
    "learning_rate": 0.1,
    "samples": 2,
    "tokens_per_second": 50.0,
}


def panels(count: int) -> Figure:
    """Curves of the same names in each of ``count`` panels, everywhere in them."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in np.atleast_1d(figure.subplots(1, count)):
        for level in range(8):
            axes.plot([0, 1], [level, 7 - level], label=f"a curve with a long name, {level}")
        axes.set(title="title", xlabel="step")
    return figure


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Labels of legends of ``figure`` that share a pixel with a panel or leave the picture."""
    figure.canvas.draw()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    inner = [axes.get_window_extent() for axes in figure.axes]
    return [
        (legend.get_texts()[0].get_text(), str(legend.get_window_extent()))
        for legend in legends
        if any(legend.get_window_extent().overlaps(box) for box in inner)
        or not figure.bbox.padded(0.5).contains(*legend.get_window_extent().max)
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_a_legend_lies_below_all_data_with_each_name_once(count: int) -> None:
    figure = panels(count)
    legend_below(figure, columns=3)
    assert overlaps(figure) == []
    (legend,) = figure.legends
    assert [text.get_text()[-1] for text in legend.get_texts()] == list("01234567")


def test_a_figure_without_names_gets_no_legend() -> None:
    figure = Figure(layout="constrained")
    figure.subplots().plot([0, 1])
    legend_below(figure)
    assert figure.legends == []


def test_the_legend_of_a_training_lies_beside_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = {f"0.{tenth}": 1.0 + tenth for tenth in range(10)}
    lines = [json.dumps({**NEW, "step": step, "loss_by_t": bands}) for step in range(3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, _: drawn.append(figure))
    plot_training(tmp_path, tmp_path / "plot.png")
    assert overlaps(drawn[0]) == []


def test_all_legends_are_placed_by_this_file() -> None:
    """``loc="best"`` takes the least bad place, which may be over data."""
    found = [
        file.name
        for folder in ("benchmarks", "calibration", "export", "runtime", "stiv_ref")
        for file in (ROOT / folder).rglob("*.py")
        if ".legend(" in file.read_text(encoding="utf-8")
    ]
    assert found == ["plots.py"]


def test_lines_old_and_new_are_read(tmp_path: Path) -> None:
    old = {"stage": 0, "task": "vae", "step": 0, "loss": 9.0, "seconds": 1.0}
    new = [{**NEW, "step": 1, "loss_by_t": {"0.1": 4.0}}, {**NEW, "step": 0, "loss_by_t": {"0.9": 2.0}}]
    odd = ["[1]", '{"stage": 1}', "3"]
    (tmp_path / "log.jsonl").write_text("\n".join([*map(json.dumps, (old, *new)), *odd]))
    vae, low = read_stages(tmp_path / "log.jsonl")
    assert (vae.stage, vae.name, vae.task) == (0, "vae", "vae")
    assert np.isnan(vae.values("gradient_norm")).all()
    assert vae.bands() == {}
    assert (low.stage, low.name, low.task) == (1, "low", "t2i")
    assert low.values("step").tolist() == [0, 1]
    assert list(low.bands()) == ["0.1", "0.9"]
    np.testing.assert_array_equal(low.bands()["0.1"], [np.nan, 4.0])


def training_run(folder: Path, *, new: bool) -> Path:
    """A run with a VAE and two stages, in the old or the new format of the log."""
    folder.mkdir()
    entries = [{"stage": 0, "task": "vae", "step": step, "loss": 1.0} for step in range(5)]
    for stage in (1, 2):
        for step in range(60):
            entry = {**NEW, "stage": stage, "step": step, "loss": 1 / (step + 1), "loss_by_t": {"0.1": 1.0, "0.7": 2.0}}
            old = {"stage", "task", "step", "loss", "gradient_norm", "learning_rate"}
            entries.append(entry if new else {key: value for key, value in entry.items() if key in old})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def test_training_curves_have_a_panel_for_all_that_was_logged(tmp_path: Path) -> None:
    heights = {}
    for new in (False, True):
        run = training_run(tmp_path / f"new-{new}", new=new)
        plot_training(run, run / "training.png")
        assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "training.png"]
        with Image.open(run / "training.png") as image:
            heights[new] = image.height
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert heights == {False: 660, True: 1060}  # 3 and 5 panels of 2 inches, and 0.6 for the names


def test_plot_command(tmp_path: Path) -> None:
    run, app = training_run(tmp_path / "run", new=True), typer.Typer()
    app.command()(plot)
    done = CliRunner().invoke(app, [str(run)])
    assert done.exit_code == 0
    assert str(run / "training.png") in done.stdout
    assert "samples" not in done.stdout
    (run / "samples").mkdir()
    about = {"stage": 1, "name": "low", "step": 1}
    rows = [Row(video=np.zeros((2, 3, 8, 8), np.float32), caption="one")]
    contact_sheet(rows, run / "samples" / "low-1.png", columns=1, about=about)
    done = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "other.png")])
    assert (tmp_path / "other.png").exists()
    assert (run / "samples" / "index.png").exists()


def test_plot_command_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StivRefError, match="cannot read the training log"):
        plot(tmp_path / "nothing", tmp_path / "out.png")
    run = training_run(tmp_path / "run", new=False)
    with pytest.raises(StivRefError, match="its folder does not exist"):
        plot(run, tmp_path / "no" / "out.png")
    (run / "log.jsonl").write_text("\n")
    with pytest.raises(StivRefError, match="there is nothing to plot"):
        plot(run, None)
    (run / "log.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(StivRefError, match="cannot read the training log"):
        plot(run, None)
    assert not (run / "training.png").exists()


def test_contact_sheet_shows_every_frame_and_mark(tmp_path: Path) -> None:
    levels = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3, 1, 1, 1)
    videos = np.broadcast_to(levels, (2, 3, 3, 8, 8)) * np.array([1, 0, 0], np.float32).reshape(3, 1, 1)
    rows = [
        Row(video=videos[0], caption="digit one", mark="right"),
        Row(video=videos[1], caption="digit two", mark="wrong"),
        Row(video=videos[1], caption="digit two"),
    ]
    contact_sheet(rows, tmp_path / "sheet.png", columns=1, heading="a heading")
    with Image.open(tmp_path / "sheet.png") as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20) or []}
    for index in range(
        6
    ):  # each level is one frame of 8 x 8 pixels at zoom 2, red varying, green and blue at the middle
        red = round((levels.flat[index] + 1) * 127.5)
        assert colours[(red, 128, 128)] == (256 if index < 3 else 512)
    assert colours[(0x10, 0x7C, 0x10)] > 50
    assert colours[(0xC5, 0x0F, 0x1F)] > 50


def test_captions_are_shown_in_their_cells(tmp_path: Path) -> None:
    """Two cells beside each other, the first without a caption: nothing of the second's is cut, or lies in the first.

    The other side is the same caption drawn on a picture that has room for it.
    """
    caption, video = "base again: yellow triangle moving down", np.zeros((3, 3, 64, 64), np.float32)
    rows = [Row(video=video, caption=""), Row(video=video, caption=caption)]
    contact_sheet(rows, tmp_path / "sheet.png", columns=2, zoom=1)
    alone = Image.new("L", (600, 18), 255)
    ImageDraw.Draw(alone).text((0, 0), caption, fill=34, font=label_font())
    with Image.open(tmp_path / "sheet.png") as image:
        found, left = np.asarray(image.convert("L")), json.loads(image.info["stiv"])["strips"][1][0]
    assert found.shape[1] - left < 300
    assert np.array_equal(found[6:24, left:], np.asarray(alone)[:, : found.shape[1] - left])
    assert (np.asarray(alone)[:, found.shape[1] - left :] == 255).all()
    assert (found[6:24, :left] == 255).all()


def test_long_captions_end_in_an_ellipsis(tmp_path: Path) -> None:
    long, short = "a caption that somebody wrote " * 20, "a short one"
    found = fitted([long, short], 200)
    assert found[1] == short
    assert long.startswith(found[0].removesuffix("..."))
    assert 150 < label_font().getlength(found[0]) <= 200
    assert fitted(["anything"], 0) == ["..."]
    row = Row(video=np.zeros((2, 3, 8, 8), np.float32), caption=long)
    contact_sheet([row], tmp_path / "sheet.png", columns=1, zoom=1)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width < 320
        assert json.loads(image.info["stiv"])["captions"] == [long]


def test_labels_keep_their_spaces() -> None:
    """The gap between two words is wider than the one between two letters, unlike in Pillow's default size."""
    picture = Image.new("L", (200, 16))
    ImageDraw.Draw(picture).text((0, 0), "digit one", fill=255, font=label_font())
    inked = np.flatnonzero(np.asarray(picture).max(axis=0) > 128)
    gaps = sorted(np.diff(inked))
    assert gaps[-1] >= gaps[-2] + 2
