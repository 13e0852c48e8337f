"""`trunkline faults`: real processes under load, faults by a seeded schedule, and a proof that nothing was lost."""

from trunkline.cli.faults.command import app

__all__ = ["app"]
