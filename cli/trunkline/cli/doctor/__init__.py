"""`trunkline doctor`."""

from trunkline.cli.doctor.command import app

__all__ = ["app"]
