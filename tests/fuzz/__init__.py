"""Random calls of every public function, module and raw op, judged by oracles of their own.

    make fuzz                                                       # three minutes
    PYTHONPATH=tests python -m fuzz --seed 0 --cases 3000           # so many cases
    PYTHONPATH=tests python -m fuzz --seed 0 --case raw/prune/17    # one case, and the call as a snippet

There are three kinds of case:

- **valid**: a call that the documentation allows. Results and gradients are compared with float64 oracles, which are
  loops over the sequences written from the equations and share no code with `stamp_kernels.reference`. The backend is
  drawn too: the registered ops, the reference, or Triton in its interpreter.
- **invalid**: a valid call with one argument replaced by something that the documentation does not allow. It must raise
  a ValueError (RuntimeError for contents) that names the argument.
- **raw**: a call of `torch.ops.stamp.*`, recorded from a valid one, with one to three arguments replaced. It may raise
  or give some result, but not crash; a number outside its documented range must raise.

The subject of a case names the function. A case depends on the seed and on its own name alone, so that it can be
repeated without the others. Cases run in worker processes: a crash ends a worker, not the run.
"""
