"""Time, memory and exactness on a GPU, in a given time and with nothing but torch and triton.

    python -m bench.chip smoke main --output DIR --seconds 120    # bench/h100.sh calls it
    python -m bench.chip --report A.json B.json --output bench/results

Parts, in their order:

- smoke: every kernel once, small, with asserts on the results; ``--tiny`` for compute-sanitizer.
- main: Llama 3 8B's head with 8,192 rows: bare products and copies, a step of every mode, the time
  of each launch, dWeight 20 times bit for bit, other settings of the kernels, baselines.
- heads: other heads and numbers of rows, and peers.
- sharing: whole training steps of a model with Llama 3.2-1B's sizes, prefixes shared and padded.
- memory: peaks, over numbers of rows.

The contenders are those of `make bench`. Each round of a contender follows one of the bare
products, so that both see the same clocks; the bare products are the fastest of several ways to
form each, in 16 bits or float32, measured in the same run. ``h100.json`` and ``h100.md`` are
written after every case, so a run that is cut off keeps what it has. What was left out is named.

    setup       what is measured, and by whom
    timing      one contender, launch or setting
    settings    other settings of the kernels than those that are shipped
    results     the files
    sharing     steps of a whole model
    parts       the parts
"""
