"""The stubs say what is there: they are what people and their editors read."""

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", *arguments], cwd=PACKAGE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stubs_say_what_the_module_has():
    # Not all of the package: the adapters of engines can be imported only where the engine is.
    run("mypy.stubtest", "kvd._native")


def test_the_package_and_its_example_are_typed():
    run("mypy", "--strict", "kvd", "examples")
