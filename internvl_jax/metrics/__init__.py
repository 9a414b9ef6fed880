"""Metrics of a run: what is measured, what is logged, and where it is written.

run_log.py   the log history: means over the steps between two entries, and what a checkpoint keeps of it
gauges.py    where the time of a step goes, and rates made of counts and seconds
trace.py     an XProf trace of some steps
writers/     who gets the metrics: the JSON files, the progress bar, log lines, TensorBoard; one file each

FLOPs are counted three times, since three questions are asked of them:

mfu.py           `useful_flops`: what this very batch needs, from the counts that came with it. A formula over the shapes of
                 the parameters, evaluated in every step: padding and masked pairs of attention do not count.
flops.py         `count_flops`: what a traced function computes, from its jaxpr, padding and recomputation included. It is
                 independent of the formula, and tests hold the formula to it.
aot/costs.py     `model_flops`: what one full batch of a given shape needs, by part of the model and by phase, for
                 `python -m internvl_jax.plan`, which has shapes and no batch. It counts the plainest form of the step with
                 flops.py, so that neither kernels nor recomputation change it.

XLA's own `cost_analysis` is none of them: it counts the body of a loop once, however often it runs.
"""
