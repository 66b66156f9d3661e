"""The commands of ``python -m bench`` that measure nothing."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from da_triton import selfcheck

from . import arguments, names, providers, suite
from . import warm as warming
from .arguments import UsageError
from .codegen.table import cannot_compile
from .compare import NotComparableError, compare, read
from .providers import LAYOUTS
from .workloads import Workload, select


def plan(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "plan", "What the block would run on a GPU for a shape, and why. Times are a model's.",
        "plan yolo_p3\nplan --shape 16,256,80,80 --c-m 64 --c-n 64 --heads 4 --dtype fp16",
    )  # fmt: skip
    parser.add_argument("workload", nargs="*", help="names of workloads")
    parser.add_argument("--shape", type=arguments.listed, help="N,C,positions… instead of a name")
    parser.add_argument("--c-m", type=int)
    parser.add_argument("--c-n", type=int)
    parser.add_argument("--heads", type=int, default=1)
    arguments.add_lists(parser, dtype="bf16", layout="nchw")
    options = parser.parse_args(argv)
    from da_triton import plan as planned

    names.check("layout", options.layout, LAYOUTS)
    shapes = [
        ((w.n, w.c, *w.positions), w.c_m, w.c_n, w.heads)
        for w in select(options.workload, "all", table)
        if options.workload
    ]
    if options.shape:
        if not (options.c_m and options.c_n):
            raise UsageError("--shape needs --c-m and --c-n.")
        try:
            shape = tuple(map(int, options.shape))
        except ValueError:
            raise UsageError(f"--shape takes integers, got {','.join(options.shape)}.") from None
        shapes.append((shape, options.c_m, options.c_n, options.heads))
    if not shapes:
        raise UsageError("plan needs the name of a workload, or --shape with --c-m and --c-n.")
    for shape, c_m, c_n, heads in shapes:
        for dtype in arguments.chosen("dtype", options.dtype, arguments.DTYPES):
            for layout in options.layout:
                form = torch.contiguous_format
                if layout == providers.CHANNELS_LAST:
                    form = torch.channels_last
                try:
                    found = planned(shape, c_m, c_n, heads=heads, dtype=dtype, memory_format=form)
                except (ValueError, RuntimeError) as error:
                    raise UsageError(error) from None
                print(found, end="\n\n")
    return 0


def compare_files(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "compare", "What got slower between two runs, beyond the noise that both measured. Exit "
        "status 1 if something did.", "compare old/results.csv new/results.csv",
    )  # fmt: skip
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--across", action="store_true", help="files of different machines, too")
    options = parser.parse_args(argv)
    try:
        found = compare(read(options.old), read(options.new), options.across)
    except NotComparableError as error:
        raise UsageError(error) from None
    print(found)
    return int(found.regressed)


def warm(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "warm", "Fills Triton's compile cache for a GPU that is not there: what the block launches "
        "on the planned routes, forward and backward, in both memory formats.",
        "warm --arch sm_90 --out /tmp/cache --smoke\nwarm --out /tmp/cache --check",
    )  # fmt: skip
    parser.add_argument("--arch", choices=list(warming.TARGETS), default="sm_90")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("TRITON_CACHE_DIR"),
        help="the cache's folder; default: TRITON_CACHE_DIR",
    )  # fmt: skip
    arguments.add_lists(parser, workload="")
    parser.add_argument(
        "--check", action="store_true",
        help="compile nothing: print the key, relocate a copied cache, and exit "
        "with 1 if it was made with another Triton, ptxas or other kernels",
    )  # fmt: skip
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the kernels of the smoke check, too, which are many",
    )
    options = parser.parse_args(argv)
    chosen = select(options.workload, "all", table)
    if reason := cannot_compile("warm"):
        raise UsageError(reason)
    if options.out is None and not options.check:
        raise UsageError("warm needs --out or TRITON_CACHE_DIR: a folder for the cache.")
    if not options.check:
        checks = list(selfcheck.units()) if options.smoke else []
        found = warming.warm(options.arch, chosen, options.out, checks=checks)
        print(
            f"{found.kernels} kernels, {found.compiled} of them compiled in {found.seconds:.1f} s, "
            f"{found.bytes / 1e6:.1f} MB in {options.out}"
        )
    for name, value in warming.key(options.arch).items():
        print(f"{name}: {value}")
    if options.check and options.out is not None:
        if not (options.out / warming.FILE).exists():
            raise UsageError(f"{options.out} has no {warming.FILE}: `warm` did not fill it.")
        print(f"{warming.relocate(options.out)} entries adjusted to the folder's place")
        differing = warming.differences(options.out)
        print(*(differing or ["the cache is of this Triton and these kernels"]), sep="\n")
        return int(bool(differing))
    return 0


def codegen(argv: Sequence[str], table: Sequence[Workload]) -> int:
    from .codegen import table as tables

    parser = arguments.parser(
        "codegen", "Registers, spills, shared memory and loads of every kernel with its tiles, "
        "without a GPU. Programs that have not changed are not compiled again; all of them take "
        "minutes for each architecture. See what a change made of them by git diff.",
        "codegen\ncodegen --arch sm_90\ncodegen --arch gfx942 --out /tmp/codegen.csv",
    )  # fmt: skip
    parser.add_argument(
        "--arch", action="append", choices=tables.ORDER, help="repeatable; all without"
    )
    parser.add_argument("--out", type=Path, default=tables.KEPT, help="a CSV file, kept in order")
    options = parser.parse_args(argv)
    if reason := cannot_compile():
        raise UsageError(reason)
    tables.update(options.arch or tables.ORDER, options.out)
    return 0


def test_suite(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "suite", "What the tests would do on a GPU, without one: whether any mixes devices or runs "
        "the CPU's own code, and whether each launch compiles and fits. Exit status 1 if not.",
        "suite\nsuite --arch sm_80 tests/test_block.py\nsuite --interpret tests/cores",
    )  # fmt: skip
    parser.add_argument("tests", nargs="*", help="as for pytest (default: all that a GPU runs)")
    parser.add_argument("--arch", default="sm_90", help="the GPU to compile for")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="run the kernels, too: an hour, not minutes",
    )
    options = parser.parse_args(argv)
    from .codegen import table as tables

    names.check("arch", [options.arch], tables.ORDER)
    if find_spec("triton") is None:
        raise UsageError("`python -m bench suite` compiles kernels, and Triton is not installed.")
    every = [str(file.relative_to(suite.ROOT)) for file in suite.files()]
    found = suite.record(options.tests or every, interpret=options.interpret)
    early = sum(bool(test["ended"]) for test in found.tests)
    print(f"{len(found.tests)} tests, {early} of which did not reach their end without a GPU.")
    faults = {name: found.names(name) for name in ("mixed", "cpu")}
    for name, title in (("mixed", "mixes devices"), ("cpu", "runs the CPU's own code")):
        for test in faults[name]:
            print(f"{title}: {test}")
    launches = list(suite.compiled(found.launches, options.arch, options.jobs))
    problems = [(kernel, test, problem) for kernel, test, _, problem in launches if problem]
    largest = max((shared for *_, shared, problem in launches if not problem), default=0)
    print(
        f"{len(launches)} distinct launches on {options.arch}: {len(launches) - len(problems)} "
        f"compile and fit, with {largest:,} bytes of shared memory at most."
    )
    for kernel, test, problem in problems:
        print(f"{kernel} {problem}, in {test}")
    return int(bool(problems or faults["mixed"] or faults["cpu"]))
