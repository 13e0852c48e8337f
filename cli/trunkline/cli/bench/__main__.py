"""`python -m trunkline.cli.bench` is `trunkline bench`."""

from trunkline.cli.bench import app

if __name__ == "__main__":
    app(prog_name="trunkline bench")
