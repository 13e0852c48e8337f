"""`python -m trunkline.cli` is `trunkline`."""

from trunkline.cli.main import main

main()
