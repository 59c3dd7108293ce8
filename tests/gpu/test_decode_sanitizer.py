"""`mla_decode`'s kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlakit.hardware import capability

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parent / "sanitize_decode.py"
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def sanitize(tool: str, *options: str) -> subprocess.CompletedProcess[str]:
    if not os.access(SANITIZER, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    if options[-1] != "triton" and capability("cuda") != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")
    *flags, group = options
    command = [SANITIZER, "--tool", tool, *flags, sys.executable, str(SCRIPT), group]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "right: " in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    ("tool", "group"),
    [
        ("memcheck", "hopper"),
        ("memcheck", "triton"),
        ("racecheck", "few"),
        ("racecheck", "rows"),
        ("racecheck", "triton"),
    ],
)
def test_no_error(tool: str, group: str) -> None:
    done = sanitize(tool, "--error-exitcode", "86", group)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


Race = tuple[str, frozenset[str]]  # the kernel, and what both accesses do, as their lines of source say it


def races(report: str, sources: list[Path]) -> set[Race]:
    """What racecheck's analysis reports: every access that a line "Race reported between" and its lines "and" name."""
    lines = {source.name: source.read_text().splitlines() for source in sources}
    access = re.compile(r"(?:Race reported between|and) (?:Read|Write) access at (\w+)\+0x[0-9a-f]+ in (\S+):(\d+)")
    found: set[Race] = set()
    first = ""
    for text in report.splitlines():
        match = access.search(text)
        if match is None:
            continue
        what = lines[match[2]][int(match[3]) - 1].strip() if match[2] in lines else match[2]
        if "Race reported" in text:
            first = what
        else:
            found.add((match[1], frozenset({first, what})))
    return found


def is_handing_over(race: Race) -> bool:
    """Triton's own: the first warpgroup writes what the second one is to run and with which arguments, and it reads."""
    own = ("def ", "_launch(", "gl.warp_specialize(", "mbarrier.init(")
    return all(what.startswith(own) for what in race[1])


ANALYSIS = ("--racecheck-report", "analysis", "--print-limit", "1000")


def test_what_racecheck_says_of_two_warpgroups() -> None:
    """One exchange, ordered by the same barriers: racecheck says nothing of it where one thread writes each number, and
    reports a race where four threads write it, the same value, as in the kernel for many heads. So its report there is
    of how numbers are written and not of their order (of which it says little: an exchange by one thread each that
    nobody waits for is not reported either).
    """
    done = sanitize("racecheck", *ANALYSIS, "exchange")
    found = {race for race in races(done.stdout, [SCRIPT]) if not is_handing_over(race)}
    assert {kernel for kernel, _ in found} == {"_four_threads_kernel"}, done.stdout[-3000:]


# What the two warpgroups of the kernel for many heads tell one another, by numbers that four threads write. The weights
# are read by matrix instructions, which racecheck does not follow; tests against float64 do.
EXCHANGED = {
    frozenset({"first_max.store(m_new)", "m_new = gl.maximum(first_max.load(of_row), own_max)"}),
    frozenset({"both_max.store(m_new)", "m = both_max.load(of_row)"}),
    frozenset({"first_sum.store(l)", "l += second_sum.load(of_row) if W == 0 else first_sum.load(of_row)"}),
    frozenset({"second_sum.store(l)", "l += second_sum.load(of_row) if W == 0 else first_sum.load(of_row)"}),
}


@pytest.mark.parametrize("group", ["many", "causal"])
def test_two_warpgroups_race_nowhere_else(group: str) -> None:
    from mlakit.decode import hopper_many

    source = Path(hopper_many.__file__)
    for pair in EXCHANGED:  # else a line that has changed would be accepted for ever, or never
        for what in pair:
            assert source.read_text().count(what) >= 1, what
    done = sanitize("racecheck", *ANALYSIS, group)
    found = races(done.stdout, [source])
    assert "RACECHECK SUMMARY" in done.stdout
    assert not {race for race in found if race[1] not in EXCHANGED and not is_handing_over(race)}
