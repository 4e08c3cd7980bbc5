"""The part of `robustsoup doctor` that times passes of several sizes."""

from pathlib import Path

from robustsoup.checkpoints import Checkpoint
from robustsoup.checkpoints.remote import remote_address
from robustsoup.cli.progress import Bar
from robustsoup.cli.tables import print_table
from robustsoup.cli.terminal import print_json, print_line
from robustsoup.diagnosis.pass_shapes import CPU_PASS_SIZE, PassTimes, measure_pass_times
from robustsoup.models import load_model
from robustsoup.paths import user_path
from robustsoup.user_code import import_named_module


def calibrate(name: str, pixels: int, *, as_json: bool) -> None:
    """Time passes of several sizes and print which size to choose.

    Args:
        name: Name of a network, or path of a checkpoint that records its network.
        pixels: Height and width of an image.
        as_json: Print JSON.
    """
    channels = 3
    if remote_address(name) or user_path(name).exists():
        checkpoint = Checkpoint.load(name)
        network, settings = checkpoint.network(), checkpoint.network_settings
        channels = settings.channels if settings else channels
    else:
        import_named_module(name, Path.cwd())
        network = load_model(name)
    with Bar("timing passes") as bar:
        times = measure_pass_times(network, (channels, pixels, pixels), on_progress=bar)
    if as_json:
        sizes = {precision: times.best_size(precision) for precision in times.seconds}
        print_json({"threads": times.threads, "seconds": times.seconds, "batch_size": sizes})
    else:
        _print_times(times)


def _print_times(times: PassTimes) -> None:
    precisions = list(times.seconds)
    sizes = times.seconds[precisions[0]]
    rows = [
        (str(size), *(f"{1e3 * times.seconds[name][size]:.3g} ms" for name in precisions))
        for size in sizes
    ]
    print_table(("images a pass", *precisions), rows)
    print_line(f"for one step of one image, with {times.threads} threads")
    for precision in precisions:
        best = times.best_size(precision)
        if best == CPU_PASS_SIZE:
            print_line(f"{precision}: keep the default of {CPU_PASS_SIZE} images a pass")
        else:
            saved = times.saved_share(precision, best)
            print_line(
                f"{precision}: --batch-size {best} saves {saved:.0%}; in a recipe, batch_size = "
                f"{best} under [evaluate]"
            )
