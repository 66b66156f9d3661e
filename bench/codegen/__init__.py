"""Generated code of every kernel, for GPUs that are not there: ``python -m bench codegen``.

    compiler   one recorded launch -> registers, spills, shared memory, instructions
    launches   the launches that a call of the core or of the block makes
    survey     which launches stand for everything that ships
    table      one row a compilation: the file that is kept, what is printed, what got worse
    candidates the tiles that a search tries
    tiles      the search for the fused kernels' tiles

Triton is needed, in a process without TRITON_INTERPRET; importing this package needs neither.
"""
