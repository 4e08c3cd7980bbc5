"""`python -m robustsoup` is the `robustsoup` command."""

from robustsoup.cli import main

main()
