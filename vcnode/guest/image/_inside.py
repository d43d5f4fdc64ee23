"""Runs in the *guest's* interpreter at build time: finds what the agent imports, and compiles.

Not imported by vcnode. Reads one JSON document from standard input and writes one to standard output.
"""

import sys


def imported(roots: list[list[str]]) -> list[dict[str, str]]:
    """Import *roots* and tell what that loaded, with the files.

    A root is ``[module]`` or ``[module, name, …]``, where a name may be a submodule. Modules that are
    part of the interpreter's binary are left out.
    """
    # What shutil and the like do without, when it is not there.
    sys.modules.update(dict.fromkeys(("_bz2", "_lzma", "bz2", "lzma")))  # type: ignore[arg-type]
    for module, *names in roots:
        __import__(module)
        for name in names:
            if not hasattr(sys.modules[module], name):
                __import__(f"{module}.{name}")
    loaded = dict(sys.modules)
    found = []
    for name, loaded_module in sorted(loaded.items()):
        origin = getattr(getattr(loaded_module, "__spec__", None), "origin", None)
        if name != "__main__" and origin not in (None, "built-in", "frozen"):
            found.append({"name": name, "file": origin})
    return found


def compiled(sources: list[dict[str, str]]) -> None:
    """Compile each ``source`` file to the file ``output``, as if it lay at ``shown`` (what tracebacks say).

    Without docstrings and asserts. The pycs are never checked against a source: there is none in the guest.
    """
    import importlib.util
    import marshal

    for job in sources:
        with open(job["source"], "rb") as file:
            source = file.read()
        code = compile(source, job["shown"], "exec", dont_inherit=True, optimize=2)
        header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")  # hash-based, unchecked
        with open(job["output"], "wb") as file:
            file.write(header + importlib.util.source_hash(source) + marshal.dumps(code))


def main() -> None:
    """Do what standard input asks for."""
    # Only now: what json needs must not count as needed by the agent.
    command, argument = sys.argv[1], sys.argv[2]
    if command == "imported":
        roots = [line.split() for line in argument.splitlines()]
        result = imported(roots)
        import json

        json.dump(result, sys.stdout)
    else:
        import json

        with open(argument, encoding="utf-8") as file:
            compiled(json.load(file))


if __name__ == "__main__":
    main()
