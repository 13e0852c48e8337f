"""The commands that run one role each."""
