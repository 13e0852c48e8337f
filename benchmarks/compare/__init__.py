"""Trunkline and what else a user would pick, measured side by side: `scripts/bench`."""
