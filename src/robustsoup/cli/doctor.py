"""The command that describes the installation and this machine."""

from robustsoup.cli.options import AsJson
from robustsoup.cli.running import DataRoot
from robustsoup.cli.terminal import print_json


def doctor_command(data_root: DataRoot = None, as_json: AsJson = False) -> None:
    """Show versions, devices, folders, and causes of slowness.

    Also shows which extras are installed and how to install the others.

    Example: `robustsoup doctor`
    """
    from robustsoup.cli.diagnosis import diagnose, print_diagnosis

    diagnosis = diagnose(data_root)
    if as_json:
        print_json(diagnosis)
    else:
        print_diagnosis(diagnosis)
