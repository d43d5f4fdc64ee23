"""Runs targets under a coverage-guided fuzzer (atheris: libFuzzer for Python); see dev/fuzz --help."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
NAMES = ("commands", "host", "guest", "hyperstart", "manifest", "cni", "layer")
NO_FUZZER = 75
INPUT_TIMEOUT_S = 10
MEMORY_MIB = 2048


def fuzz_one(name: str, arguments: list[str]) -> None:
    """Become the fuzzer of one target; never returns."""
    import atheris

    with atheris.instrument_imports(include=["vcnode"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([name, *arguments], TARGETS[name])
    atheris.Fuzz()


def run(name: str, *, runs: int, seed: int, keep: bool) -> bool:
    """Fuzz one target in a process of its own; whether nothing was found."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vcfuzz-") as work:
        found, kept = Path(work) / "found", CORPUS / name
        found.mkdir()
        kept.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "tests.fuzz", "--one", name, f"-runs={runs}", f"-seed={seed}",
            f"-timeout={INPUT_TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MIB}", "-max_len=4096", "-verbosity=1",
            "-print_final_stats=1", f"-artifact_prefix={work}/", str(found), str(kept),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        log = result.stdout + result.stderr
        tried = re.search(r"stat::number_of_executed_units: (\d+)", log)
        new = list(found.iterdir())
        took = time.monotonic() - began
        if result.returncode == 0:
            print(f"{name:10} {tried[1] if tried else '?':>8} inputs {took:7.1f} s  ok", flush=True)
            if keep:
                _merge(name, found, kept)
            return True
        print(log[-6000:])
        for path in Path(work).glob("*-*"):
            if path.is_file():
                kept_as = CORPUS / name / f"bug-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
                shutil.copy(path, kept_as)
                print(f"{name}: the input is kept as {kept_as.relative_to(CORPUS.parent.parent.parent)}")
        print(f"{name:10} FAILED after {took:.1f} s, {len(new)} new inputs", flush=True)
        return False


def _merge(name: str, found: Path, kept: Path) -> None:
    """Add to the kept corpus what covers something that it does not."""
    command = [sys.executable, "-m", "tests.fuzz", "--one", name, "-merge=1", str(kept), str(found)]
    subprocess.run(command, capture_output=True, check=True)


def main() -> int:
    """Read the command line and run."""
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(prog="dev/fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"one of {', '.join(NAMES)}; default: all")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target (default: 100,000)")
    parser.add_argument("--seed", type=int, default=1, help="start of the random numbers (default: 1)")
    parser.add_argument("--keep", action="store_true", help="add what reached new code to tests/fuzz/corpus")
    options = parser.parse_args()
    if unknown := set(options.target) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    try:
        import atheris  # noqa: F401
    except ImportError:
        print(f"dev/fuzz: there is no atheris for Python {sys.version.split()[0]}; use 3.11 or 3.12")
        return NO_FUZZER
    results = [
        run(name, runs=options.runs, seed=options.seed, keep=options.keep) for name in options.target or NAMES
    ]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
