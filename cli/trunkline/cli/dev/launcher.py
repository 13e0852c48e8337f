"""Runs a command that ends when its parent ends, however the parent ends.

    python -I -S launcher.py <pid of the parent> <command> [argument …]

Called as a file, by `trunkline.cli.dev.child`. It needs nothing but the standard library, and replaces itself
by the command, so that the pid stays. On Linux the kernel kills the process as soon as the parent is gone;
the flag survives `exec`. The command gets a session of its own: Ctrl-C is for the parent, which stops its
children in order.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """See above. Ends with code 127 if the command cannot be run."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    os.setsid()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(1)  # the parent was gone before the flag was set
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
