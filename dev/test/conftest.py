"""pytest's hooks and fixtures; `make test` ends with the line that is printed here."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from helpers import Lab  # noqa: E402


@pytest.fixture
def lab(tmp_path):
    """A folder of its own, in which the trainer runs."""
    return Lab(tmp_path)


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory):
    """One for a whole file of tests, for those that only compare logs."""
    return Lab(tmp_path_factory.mktemp("lab"))


def pytest_unconfigure(config):
    """The last lines: each reason to skip with the tests that it skips, then how many passed, failed and were skipped."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    skipped = {}
    for report in terminal.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        tests = skipped.setdefault(reason, {})
        test = report.nodeid.split("[")[0]
        tests[test] = tests.get(test, 0) + 1
    for reason, tests in sorted(skipped.items()):
        print(f"skipped {sum(tests.values())}: {reason}")
        for test, n in sorted(tests.items()):
            print(f"    {test}{f' ({n} cases)' if n > 1 else ''}")
    count = {kind: len(terminal.stats.get(kind, [])) for kind in ("passed", "xpassed", "failed", "error", "skipped", "xfailed")}
    print(f"{count['passed']} passed, {count['failed'] + count['error'] + count['xpassed']} failed, "
          f"{count['skipped'] + count['xfailed']} skipped", flush=True)
