"""Generated code of every kernel, for GPUs that are not there: ``python -m bench codegen``.

    table      one row per compilation: the CSV file, its summary, what got worse
    survey     the launches that are compiled: of every kernel, with every shipped tile
    compile    one recorded launch -> registers, spills, shared memory, instructions
    candidates the tiles that a search tries
    tiles      the search for the fused kernels' tiles

Triton is needed, in a process without TRITON_INTERPRET; importing this package needs neither.
"""
