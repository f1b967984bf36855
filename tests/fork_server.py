"""A process that has done its imports, and forks children that go on from there.

A script, started by `children.Forks`; its argument is code for the imports. Every line of standard input is a list of children
to run side by side, as JSON; the answer is the list of their return codes. In every other way a child is a program of its own:
working folder, arguments, variables, output and end are as under `python -c`.
"""

import json
import os
import sys


def become(child: dict) -> None:
    """Turn a forked process into the child that was asked for."""
    os.chdir(child["folder"])
    os.environ.update(child["variables"])
    for number, name in enumerate((os.devnull, child["output"], child["errors"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["-c", *child["arguments"]]
    sys.path[:0] = child["path"]


def wait(pids: list[int]) -> list[int]:
    """Return codes, the signal's number with a minus for a child that one ended; who waits for a child that failed is ended."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            for other in set(pids) - set(codes):
                os.kill(other, 9)
    return [codes[pid] for pid in pids]


def serve() -> str:
    """Answer requests until there are no more; in a child, return its code."""
    for line in sys.stdin:
        pids = []
        for child in json.loads(line):
            pids.append(os.fork())
            if pids[-1] == 0:
                become(child)
                return child["code"]
        print(json.dumps(wait(pids)), flush=True)
    return ""


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this script
    exec(sys.argv[1])
    print('"ready"', flush=True)
    exec(compile(serve(), "<child>", "exec"), {"__name__": "__main__"})
