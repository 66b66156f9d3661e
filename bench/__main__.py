"""``python -m bench [COMMAND] …``: the tool with which a user decides whether to switch."""

import sys
from collections.abc import Sequence

from . import commands
from .arguments import UsageError
from .names import UnknownNameError, check
from .workloads import WORKLOADS, Workload


def main(argv: Sequence[str] | None = None, table: Sequence[Workload] = WORKLOADS) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "report"
    if argv and not argv[0].startswith("-"):
        name = argv.pop(0)
    try:
        check("command", [name], list(commands.COMMANDS))
        return commands.COMMANDS[name](argv, table)
    except (UnknownNameError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
