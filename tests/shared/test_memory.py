"""Memory goes back to the system."""

from pathlib import Path

from trunkline.shared.memory import release_memory


def resident_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def test_memory_that_was_freed_among_what_stays_goes_back_to_the_system() -> None:
    """An owner that had forgotten 200,000 topics kept the memory of half of them."""
    before = resident_bytes()
    pieces = [bytearray(2000) for _ in range(50_000)]
    kept = pieces[::100]
    del pieces
    release_memory()
    assert len(kept) == 500
    assert resident_bytes() - before < 30_000_000
