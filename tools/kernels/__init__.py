"""``python -m tools.kernels``: every shipped kernel configuration, compiled ahead of time and read.

No GPU is needed: triton compiles for a target that is not there, and brings the tools that take the
result apart. What a launch would only find out on the GPU is found here: registers that spill,
matrix products that miss the tensor cores or wait for one another, operands that change under a
product, arithmetic in float64, more shared memory than a multiprocessor has. Whatever is found must
not be shipped, in any configuration.

    registry                 what to compile: the signatures, constants and options of the launches
    compiler                 compiles a variant and reads what comes out
    disassembly, sass        the output of NVIDIA's tools, and what the instructions say
    gate                     what must not be shipped
    report                   ``report.json`` and the table
    h100, estimate           what the compiled kernels should take on an H100
"""
